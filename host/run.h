// The training loop: now and then evaluate and save, then step, then log.
// defines: flops_per_token, flops_text, TrainingRun
#pragma once
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "config.h"
#include "data.h"
#include "files.h"
#include "progress.h"
#include "run_files.h"
#include "trainer.h"
#include "weights.h"

double flops_per_token(const ModelShape& shape);    // of a training step: 3 x forward, attention causal
std::string flops_text(double flops, double peak);  // "12.3 GFLOP/s", with the share of a peak that is not 0

// A run of the command train, from its settings to its last file. doc/reliability.md says what signals, crashes, full
// disks and numbers that are not finite do to it.
class TrainingRun {
 public:
  // Opens what is there (the text and, to go on, the checkpoint), refuses what cannot work, and makes the trainer.
  TrainingRun(const TrainerType& type, Config config);
  // Trains. Returns the program's exit code; after a signal that is 128 plus the signal's number.
  int go();

 private:
  using Clock = std::chrono::steady_clock;
  struct NotFinite {  // thrown when a number has become infinite or NaN, in this iteration or one before
    std::string what;
    int iteration;
    bool evaluation = false;
  };

  // Before the first step: run.cpp says what each does.
  static std::unique_ptr<Checkpoint> open_resumed(Config& config);
  static std::unique_ptr<ModelWeights> open_weights(Config& config);
  void check();
  void prepare(const TrainerType& type);
  void load_first_params();
  void make_trainer(const TrainerType& type);
  void prepare_parameters();
  void score_best_again();

  // The loop and its parts.
  void train();
  bool judged() const;
  bool checkpoint_is_due();
  static bool stopped();
  void evaluate_and_save();
  void step(ProgressBar& bar);
  void log();
  void finish();
  std::string sample(int count, const std::function<void(const std::string& piece)>& show);
  void write_sample();

  // What these share.
  double fixed_val_loss();
  bool note_if_best(double loss);
  Snapshot& take_snapshot();
  void save(bool best);
  std::string find_not_finite(const NotFinite& bad);

  Config config_;
  std::unique_ptr<Checkpoint> resumed_;       // until its tensors are in the trainer
  std::unique_ptr<ModelWeights> begin_with_;  // until its tensors are in first_params_
  Data data_;
  ModelShape shape_;
  Buffer<float> first_params_;  // what --init_from FILE begins with; until they are in the trainer
  std::optional<Lock> lock_;
  std::unique_ptr<Trainer> trainer_;
  CheckpointInfo info_;  // of the next checkpoint; info_.iteration is the number of the next update
  std::optional<CheckpointWriter> writer_;
  std::optional<RunFiles> files_;

  Clock::time_point start_, last_save_;
  double step_seconds_ = 0;  // time and number of the steps since the last line of the log
  int steps_ = 0;
  double newest_loss_ = 0;
  int saved_iteration_ = -1;  // of the newest checkpoint; -1: this process has written none
};
