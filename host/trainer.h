// A model as the loop around it sees it: the interface between host/ and the two trainers. train_gpt_cpu.cpp's CpuModel
// and train_gpt.cu's GpuModel implement it; a call through it happens once in a step or a batch, which costs nothing.
// Whatever fails raises an Error (host/error.h).
// defines: Scorer, Trainer, TrainerType, trainer_type, plan_training, require_imaginable, possible_plan
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "config.h"
#include "data.h"
#include "memory.h"
#include "sampler.h"
#include "tensors.h"

// What an evaluation needs of a model (host/evaluation.h). Losses are in nats, with dropout off.
struct Scorer {
  virtual ~Scorer() = default;

  virtual ModelShape shape() const = 0;

  // How many steps, or random batches, are best asked for in one call. The CPU gains nothing from more than 1.
  virtual int chunk() const = 0;

  // The mean loss of each of `count` random batches, at most chunk() of them, the first of which has the number `first`.
  // Which batches these are depends on the seed, the split, the iteration and their numbers alone.
  virtual std::vector<double> random_losses(Split split, int iteration, int first, int count) = 0;

  // The sum of the losses of all B * n targets in B windows of n <= T tokens, B <= batch_size. The first window begins
  // at token `first` of the split, each of the others `stride` tokens after the one before it; stride 0 means n.
  virtual double window_losses(Split split, uint64_t first, int B, int n, uint64_t stride = 0) = 0;
};

// What training and sampling need besides.
struct Trainer : Scorer {
  virtual const Layout& layout() const = 0;  // of the parameters, and so of AdamW's m and v: host/tensors.h

  // The type of its arithmetic and the machine it runs on, for a line on stderr.
  virtual std::string describe() const = 0;

  // What the machine can do at most, in floating-point operations per second; 0 if that was not measured.
  virtual double peak_flops() const = 0;

  // Take the parameters and AdamW's moments from buffers on the host that have our layout, and give them back. m and v
  // are both nullptr where a model only samples or is evaluated.
  virtual void restore(const float* params, const float* m, const float* v) = 0;
  virtual void snapshot(float* params, float* m, float* v) const = 0;

  // What else a resumed run needs to go on exactly, by name. It goes into the checkpoint's metadata. set_state takes it
  // back; a name that is missing gets the value of a new run.
  virtual std::map<std::string, std::string> state() const = 0;
  virtual void set_state(const std::map<std::string, std::string>& saved) = 0;

  // Makes `count` updates, at most chunk() of them, and returns each one's loss: the mean over its batches. The first
  // update has the number `iteration`, on which its batches, its dropout and its learning rate depend.
  virtual std::vector<float> train_steps(int iteration, int count) = 0;

  // The learning rate of that update, exactly as the update takes it.
  virtual double learning_rate(int iteration) const = 0;

  // The first activation of the step before, or else the first gradient, that holds an infinity or a NaN; empty: none.
  virtual std::string first_not_finite() const = 0;

  // Draws tokens that follow contexts (s.samples, n): see generate in host/sampler.h.
  virtual std::vector<int> next_tokens(const int* contexts, int n, int known, const Sampling& s, int i) = 0;
};

// One kind of trainer, before there is one: the program picks it by device and type of arithmetic.
struct TrainerType {
  // Allocates everything. data is nullptr if the model only samples. training: it gets gradients and moments too.
  std::unique_ptr<Trainer> (*make)(const Config& config, const ModelShape& shape, const Data* data, bool training);
  // The memory that make will take, and the memory that there is. plan also refuses shapes that the kernels lack.
  MemoryPlan (*plan)(const Config& config, const ModelShape& shape, const Data* data, bool training);
  AvailableMemory (*memory)();
  bool samples_together;  // next_tokens takes up to batch_size texts; false: only one
};

// The TrainerType of a class that has a constructor and static functions of these kinds.
template <class Model>
TrainerType trainer_type() {
  const auto make = [](const Config& config, const ModelShape& shape, const Data* data,
                       bool training) -> std::unique_ptr<Trainer> {
    return std::make_unique<Model>(config, shape, data, training);
  };
  return {make, Model::plan, Model::memory, Model::samples_together};
}

// Adds what training takes besides a model of so many bytes of parameters, in this process: gradients and moments.
void plan_training(MemoryPlan& plan, double params, const Config& config);
// Refuses sizes for which the plan itself, or the number of a window, could not be computed.
void require_imaginable(const Config& config, const ModelShape& shape, double available);
// The plan of a trainer for whose memory there is room. Raises an Error if there is none.
MemoryPlan possible_plan(const TrainerType& type, const Config& config, const ModelShape& shape, const Data* data,
                         bool training);
