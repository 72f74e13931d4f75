// The trainers' command line: their flags, by command.
// defines: Config, rows_of_shuffled_step, parse_command_line, config_flag, apply_preset, help_text, print_config,
//          recorded_flags, recorded_settings, settings_of_older_programs, apply_settings, model_shape
#pragma once
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "flags.h"
#include "tensors.h"

// What a run is to do. The values are the preset `lecture`; config.cpp has the table of flags and the other preset.
struct Config {
  std::string command = "train";  // train, sample, eval, export, page

  std::string preset = "auto";
  std::string data = "data";
  std::string out_dir = "out";
  std::string init_from = "scratch";
  std::string checkpoint = "last";

  int n_layer = 6;
  int n_head = 6;
  int n_embd = 384;
  int block_size = 256;
  double dropout = 0.2;

  int batch_size = 64;
  int gradient_accumulation_steps = 1;
  std::string batches = "random";
  int max_iters = 5000;
  int eval_interval = 500;
  int eval_iters = 200;
  int patience = 0;
  int log_interval = 10;
  int sample_chars = 200;
  double checkpoint_secs = 60;
  bool page = true;

  std::string optimizer = "adamw";
  double learning_rate = 3e-4;
  bool decay_lr = false;
  std::string lr_decay = "cosine";
  int warmup_iters = 0;
  int lr_decay_iters = 0;  // 0: max_iters
  double min_lr = 3e-5;
  double weight_decay = 0.01;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double grad_clip = 0;  // 0: off

  std::string device = "auto";
  std::string dtype = "auto";
  int threads = 0;  // 0: see use_threads, host/machine.h
  double comm_timeout = 60;
  uint64_t seed = 1337;

  int stride = 0;  // 0: block_size
  std::string start = "\n";
  int num_samples = 1;
  int max_new_tokens = 500;
  double temperature = 1;
  int top_k = 0;  // 0: off

  bool help = false, version = false;
  std::set<std::string> given;  // the flags that stood on the command line
};

// The rows of a step, over gradient accumulation, if --batches shuffled counts them; otherwise 0.
inline uint64_t rows_of_shuffled_step(const Config& c) {
  return c.batches == "shuffled" ? uint64_t(c.batch_size) * uint64_t(c.gradient_accumulation_steps) : 0;
}

// Fails on an unknown flag (with the nearest name), a value out of range, or a flag of another command. The
// preset's values are still missing: the device decides which preset is taken.
Config parse_command_line(int argc, char** argv);

// One flag of the table, whose value goes into this config.
Flag config_flag(Config& config, const std::string& name);

// Sets what the preset (lecture or small) says, except where the command line says something else.
void apply_preset(Config& config, const std::string& preset);

std::string help_text(const std::string& command);

// The flags on which a run's result depends, and their values: what a checkpoint records and a resumed run goes on
// with.
std::vector<std::string> recorded_flags();
std::map<std::string, std::string> recorded_settings(const Config& config);
// What checkpoints of older programs may lack, and how their runs went: the flags that were added later, at their defaults.
std::map<std::string, std::string> settings_of_older_programs();
// Takes over what was recorded. Flags given on the command line stay, and those that differ are returned as
// "name: recorded -> given"; for the model's shape that is an Error.
std::vector<std::string> apply_settings(Config& config, const std::map<std::string, std::string>& settings);

// "n_layer 6, n_head 6, ..." of all flags that matter to the command, in lines of readable length. A preset does not
// matter to a resumed run, which goes on with recorded settings.
std::string print_config(const Config& config);

// Refuses what no kernel can compute, such as an n_embd that n_head does not divide.
ModelShape model_shape(const Config& config, int vocabulary_size);
