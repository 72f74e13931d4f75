// The weights of a model, from the file that has them, whoever wrote it: a checkpoint of ours, a safetensors file with our
// tensors' names, or what torch.save made of the course's model.
// defines: ModelWeights, vocabulary_of, TakenOver, take_over
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint.h"
#include "pth.h"
#include "text.h"

class ModelWeights {
 public:
  // Checks that all tensors are there and have the right shapes. Verify::header: only the info of a checkpoint of ours is
  // there afterwards, and of another program's file nothing.
  explicit ModelWeights(const std::string& path, Verify what = Verify::all);
  // Of another program's file the info is the shape alone: it is at iteration 0.
  const CheckpointInfo& info() const { return checkpoint_ ? checkpoint_->info() : info_; }
  const std::string& path() const { return path_; }
  const Vocabulary* vocabulary() const { return checkpoint_ ? &checkpoint_->vocabulary() : nullptr; }  // nullptr: none
  std::string describe() const;  // "out/ckpt_last.safetensors, after 4000 steps"

  // Fills params, float32 from whatever type the file has. Raises an Error if one is not finite.
  void load_params(float* params, const Layout& layout) const;

 private:
  void use(const std::vector<TensorView>& all, size_t file_bytes);

  std::string path_;
  std::optional<Checkpoint> checkpoint_;  // of ours; or else:
  std::unique_ptr<SafetensorsFile> safetensors_;
  std::unique_ptr<PthFile> pth_;
  CheckpointInfo info_;
  std::vector<TensorView> tensors_;  // in the order of export_table
};

// The characters that the weights' tokens stand for. A file without a vocabulary gets the one of the text in this
// folder, if it has as many characters, and a line on stderr says so.
Vocabulary vocabulary_of(const ModelWeights& weights, const std::string& data);

// What a new model could not take over from another one.
struct TakenOver {
  std::vector<char32_t> fresh;    // characters that the other did not know
  std::vector<char32_t> dropped;  // characters that the new one does not know
};

// Overwrites the parameters of a model, which may have another vocabulary and another block_size than the weights: a
// character's rows follow it to its new id, and the positions that both have are kept. What the weights lack stays as it
// is. The other sizes must agree.
TakenOver take_over(float* params, const ModelShape& shape, const Vocabulary& vocabulary, const ModelWeights& weights,
                    const Vocabulary& weights_vocabulary);
