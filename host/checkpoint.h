// Checkpoints: safetensors files with everything that a model, or a run that goes on, needs. They hold no time, path or
// thread count, so that equal runs write equal files.
//   tensors     the parameters under their names in a PyTorch state dict; in ckpt_last AdamW's moments too, under
//               adamw.m.<name> and adamw.v.<name>
//   metadata    format, vocabulary, the flags that the run depends on under their names (n_layer, seed, ...), iteration,
//               best_fixed_loss, best_iteration, data (fingerprint of the tokens), state.<name> of the trainer, checksums
// defines: CheckpointInfo, recorded_dtype, save_checkpoint, Checkpoint, export_views, Snapshot, CheckpointWriter
#pragma once
#include <atomic>
#include <exception>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "memory.h"
#include "safetensors.h"
#include "tensors.h"
#include "text.h"

// What a checkpoint says besides its tensors.
struct CheckpointInfo {
  ModelShape shape;
  std::map<std::string, std::string> settings;  // recorded flags by name, host/config.h; the shape's are among them
  int iteration = 0;                            // updates done, and so the number of the next one
  double best_loss = 0;                      // the lowest loss so far of the fixed validation windows; infinity: none;
                                             // NaN: an older program, which asked random batches, wrote the file
  int best_iteration = 0;                    // the iteration whose weights had that loss
  std::string data;                          // fingerprint of the training and validation tokens
  std::map<std::string, std::string> state;  // what else a trainer needs to go on exactly, by name
};

// The type of arithmetic of the trainer that wrote it; empty: it is not recorded, or not one that we know.
std::string recorded_dtype(const CheckpointInfo& info);

// The parameters in a buffer of this layout, as the tensors of a state dict.
std::vector<TensorView> export_views(const ModelShape& shape, const Layout& layout, const float* params,
                                     const std::string& prefix = "");

// m and v are AdamW's moments, in the parameters' layout; nullptr: only the weights are saved.
void save_checkpoint(const std::string& path, const CheckpointInfo& info, const Vocabulary& vocabulary,
                     const Layout& layout, const float* params, const float* m, const float* v);

// A checkpoint that is open and checked: every tensor is there, has the right shape and type, and is undamaged. With
// Verify::header only the info has been checked, and the tensors must not be loaded.
class Checkpoint {
 public:
  explicit Checkpoint(const std::string& path, Verify what = Verify::all);
  const CheckpointInfo& info() const { return info_; }
  const Vocabulary& vocabulary() const { return vocabulary_; }
  void load_params(float* params, const Layout& layout) const;
  void load_moments(float* m, float* v, const Layout& layout) const;  // fails if only weights were saved

 private:
  void load(float* to, const Layout& layout, const std::string& prefix) const;

  std::string path_;
  SafetensorsFile file_;
  CheckpointInfo info_;
  Vocabulary vocabulary_;
};

// A copy of a model's weights and moments, on the host.
struct Snapshot {
  Buffer<float> params, m, v;
  bool all_finite(const Layout& layout) const;
};

// Writes checkpoints in a thread of its own, so that training goes on meanwhile; one at a time.
class CheckpointWriter {
 public:
  CheckpointWriter(const Vocabulary& vocabulary, const Layout& layout);
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;

  // The buffers to fill before write, once they are free: waits for the write under way, and raises its Error.
  Snapshot& snapshot();
  // Begins to write the snapshot with its moments, and to `best`, unless that is empty, without them.
  void write(const CheckpointInfo& info, const std::string& last, const std::string& best);
  void wait();                          // until all is on disk; raises the Error of a write that failed
  bool busy();                          // whether it still writes; raises the same
  int saved() const { return saved_; }  // the iteration of the newest ckpt_last that is whole; -1: none

 private:
  const Vocabulary& vocabulary_;
  Layout layout_;
  Snapshot snapshot_;
  std::thread thread_;
  std::exception_ptr error_;
  std::atomic<bool> busy_ = false;
  std::atomic<int> saved_ = -1;
};
