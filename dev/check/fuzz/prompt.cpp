// Prompts, from the command line and from a file: what is accepted becomes its own characters again.
#include "../../../host/commands.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Vocabulary vocabulary({'\n', ' ', 'a', 'b', U'é', U'€', U'😀'});
  Config config;
  config.given = {"start"};
  const std::string words(reinterpret_cast<const char*>(data), size);
  for (const bool from_file : {true, false}) {
    config.start = from_file ? "FILE:" + fuzz_file("prompt", data, size) : words;
    if (!from_file && words.rfind("FILE:", 0) == 0) continue;  // that would read any file of this machine
    refused([&] {
      const std::vector<int> tokens = prompt_tokens(config, vocabulary);
      std::string again;
      for (const int token : tokens) again += vocabulary.decode(token);
      must(again == words || "\uFEFF" + again == words);
      must(!tokens.empty());
    });
  }
  return 0;
}
