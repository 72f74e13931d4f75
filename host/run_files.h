// The files of a run, in its folder out_dir: each is written whole or not at all.
// defines: last_checkpoint, best_checkpoint, checkpoint_path, say_which, set_aside_older_run, RunFiles, export_pth
#pragma once
#include <string>
#include <vector>

#include "config.h"
#include "metrics.h"
#include "ngram.h"
#include "tensors.h"
#include "weights.h"

inline std::string last_checkpoint(const std::string& out_dir) { return out_dir + "/ckpt_last.safetensors"; }
inline std::string best_checkpoint(const std::string& out_dir) { return out_dir + "/ckpt_best.safetensors"; }
std::string checkpoint_path(const Config& config);  // --checkpoint last, best, or a file
// A line on stderr about the weights that a command takes, and about better ones if the run knows of them.
void say_which(const ModelWeights& weights, const Config& config);

// Moves the files of a run that was trained in out_dir before into a folder of its own there.
void set_aside_older_run(const std::string& out_dir);

// The record of a run, and the picture that is drawn from it.
class RunFiles {
 public:
  RunFiles(const Config& config, int first_iteration);
  Metrics& metrics() { return metrics_; }
  std::string path(const char* name) const;
  // end: the loss of the fixed validation windows after the last step. best: the lowest such loss. fixed_name: what the
  // legend calls these losses. false: gnuplot is missing or failed.
  bool plot(const std::string& title, const IterPoint& end = {}, const IterPoint& best = {},
            const std::string& fixed_name = "");

 private:
  Config config_;
  std::vector<Baseline> baselines_;  // read first: if they are damaged, nothing has been touched
  Metrics metrics_;
};

// Writes the parameters as a state dict that the course's model loads.
void export_pth(const std::string& path, const ModelShape& shape, const Layout& layout, const float* params);
