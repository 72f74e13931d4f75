// The page out/microGPT.html: a trained model that runs in a browser, without a server or a network. What stands on the page
// are the files of host/page/; this puts them, the weights and the record of the run into one file.
// defines: to_half, PageRecord, write_page, page_command
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint.h"
#include "config.h"
#include "data.h"
#include "metrics.h"
#include "ngram.h"
#include "tensors.h"

// The nearest number of 16 bits (IEEE 754's binary16, ties to even). The page holds the weights so, which makes it half
// as large. A number that is too large becomes 65504, the largest; no weight of a working model is.
uint16_t to_half(float x);

// What the page says besides the model. Whatever is not known may be missing.
struct PageRecord {
  std::string text;  // to begin with
  Record run;        // what metrics.jsonl holds
  std::vector<Baseline> baselines;
};
// The text is the beginning of the one that the model was trained on.
PageRecord page_record(const Data& data, const std::string& folder, int T);

// If the file cannot be written, this raises an Error, and the one that was there before stays.
void write_page(const std::string& path, const CheckpointInfo& info, const Vocabulary& vocabulary, const Layout& layout,
                const float* params, const PageRecord& record);

int page_command(const Config& config);  // ./train_gpt page: needs no trainer
