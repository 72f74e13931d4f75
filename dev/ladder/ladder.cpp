#include "rungs.h"
int main(int argc, char** argv) {
  return run_main([&] {
    const std::string name = argv[1];
    const ladder::Arguments rest(argv + 2, argv + argc);
    if (name == "bigram") bigram_rung(rest);
    if (name == "mlp") mlp_rung(rest);
    if (name == "wavenet") wavenet_rung(rest);
    if (name == "transformer") transformer_rung(rest);
    if (name == "residual") residual_rung(rest);
    return 0;
  });
}
