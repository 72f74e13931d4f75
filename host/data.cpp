#include "data.h"

#include "error.h"

Data open_data(const std::string& folder, const Vocabulary* expected) {
  Vocabulary vocabulary = Vocabulary::load(folder + "/vocab.json");
  if (expected && expected->hash() != vocabulary.hash())
    fail("the text in ", folder, " has another vocabulary (", vocabulary.size(), " characters, hash ",
         hash_text(vocabulary.hash()), ") than the checkpoint (", expected->size(), ", hash ",
         hash_text(expected->hash()), "); point --data to the text that it was trained on");
  Tokens train(folder, "train", vocabulary), val(folder, "val", vocabulary);
  const std::string fingerprint = hash_text(train.fingerprint()) + hash_text(val.fingerprint());
  return {std::move(vocabulary), std::move(train), std::move(val), fingerprint};
}
