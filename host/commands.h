// The commands train, sample, eval, export and page, for any trainer.
// defines: dtype_so_far, prompt_tokens, load_trainer, run_command, needs_no_trainer, run_without_trainer, cpu::run
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "config.h"
#include "text.h"
#include "trainer.h"
#include "weights.h"

// The type of the run that this one goes on with, samples from or evaluates; empty: none, or none is recorded.
std::string dtype_so_far(const Config& config);

// The tokens that --start asks for; without it a newline.
std::vector<int> prompt_tokens(const Config& config, const Vocabulary& vocabulary);

// A trainer with these weights, which only samples or is evaluated. What the command line does not say is as it was when
// they were trained.
std::unique_ptr<Trainer> load_trainer(const TrainerType& type, Config& config, const ModelWeights& weights,
                                      const Data* data);

// Does what config.command says: train, sample or eval. Returns the program's exit code.
int run_command(const TrainerType& type, const Config& config);
// export and page only read a checkpoint and write a file.
bool needs_no_trainer(const Config& config);
int run_without_trainer(const Config& config);

// The CPU trainer, to which the GPU program turns where there is no GPU: train_gpt_cpu.cpp.
namespace cpu {
int run(Config config, const std::string& why);  // does what the command line says; why: there is no GPU
std::string kernels_text();                      // for --version
}  // namespace cpu
