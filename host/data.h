// The text that a model is trained on: its vocabulary and its two splits, as tokens.
// defines: Split, evaluation_site, Data, open_data
#pragma once
#include <string>

#include "random.h"
#include "shards.h"
#include "text.h"

enum class Split { train, val };

// The random numbers that choose the batches of an evaluation (host/random.h).
inline uint32_t evaluation_site(Split split) { return split == Split::train ? site::eval_train : site::eval_val; }

struct Data {
  Vocabulary vocabulary;
  Tokens train, val;
  std::string fingerprint;

  const Tokens& operator[](Split split) const { return split == Split::train ? train : val; }
};
Data open_data(const std::string& folder, const Vocabulary* expected = nullptr);  // expected: the checkpoint's
