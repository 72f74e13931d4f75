// The text that a model is trained on: its vocabulary and its two splits, as tokens.
// defines: Split, Data, open_data
#pragma once
#include <string>

#include "shards.h"
#include "text.h"

enum class Split { train, val };

struct Data {
  Vocabulary vocabulary;
  Tokens train, val;
  std::string fingerprint;

  const Tokens& operator[](Split split) const { return split == Split::train ? train : val; }
};
Data open_data(const std::string& folder, const Vocabulary* expected = nullptr);  // expected: the checkpoint's
