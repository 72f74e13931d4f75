// Token shards, up to three of a split: what is accepted has only tokens of the vocabulary, and all of them can be read.
// The input is cut into shards at the byte that its first byte names.
#include "../../../host/shards.h"

#include "../../../host/text.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Vocabulary vocabulary({'a', 'b', 'c'});
  if (size < 1) return 0;
  const size_t cut = std::min<size_t>(8 * data[0], size - 1);
  fuzz_file("train_000000.bin", data + 1, cut ? cut : size - 1);
  if (cut) fuzz_file("train_000001.bin", data + 1 + cut, size - 1 - cut);
  refused([&] {
    const Tokens tokens(fuzz_folder(), "train", vocabulary);
    std::vector<int> all(tokens.size());
    tokens.copy(0, all.size(), all.data());
    for (const int id : all) must(id >= 0 && id < 3);
    must(refused([&] { tokens.copy(1, all.size(), all.data()); }));
    tokens.fingerprint();
    must(refused([&] { tokens.require_window(2); }) == (tokens.size() < 3));
  });
  if (cut) unlink((fuzz_folder() + "/train_000001.bin").c_str());
  return 0;
}
