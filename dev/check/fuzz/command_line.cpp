// Command lines, an argument a line: what is accepted can be printed, recorded, and read back as the same.
#include <sstream>

#include "../../../host/config.h"
#include "../../../host/run.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<std::string> arguments = {"./train_gpt"};
  std::istringstream lines(std::string(reinterpret_cast<const char*>(data), size));
  for (std::string line; std::getline(lines, line);) arguments.push_back(line.c_str());  // ends at NUL, as a real one
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  refused([&] {
    Config config = parse_command_line(int(argv.size()), argv.data());
    if (config.help) return void(help_text(config.command));
    print_config(config);
    const auto settings = recorded_settings(config);
    Config again;
    must(apply_settings(again, settings).empty());
    must(recorded_settings(again) == settings);
    apply_preset(config, config.preset == "auto" ? "small" : config.preset);
    const ModelShape shape = model_shape(config, 65);
    require_imaginable(config, shape, 1e10);
    must(double(config.batch_size) * shape.T <= 2147483647.0);
    must(double(config.batch_size) * config.gradient_accumulation_steps <= 2147483647.0);
    flops_per_token(shape);
  });
  return 0;
}
