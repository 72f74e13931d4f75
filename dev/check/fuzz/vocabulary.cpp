// vocab.json: what is accepted is written again and read again as the same vocabulary.
#include "../../../host/text.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string path = fuzz_file("vocab.json", data, size);
  refused([&] {
    const Vocabulary vocabulary = Vocabulary::load(path);
    const std::string again = fuzz_folder() + "/again.json";
    vocabulary.save(again);
    must(Vocabulary::load(again).hash() == vocabulary.hash());
  });
  return 0;
}
