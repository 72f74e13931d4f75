// The loop around a model: evaluate, step, log, save; and the commands sample and eval. Written once for every trainer.
// A Model is what train_gpt_cpu.cpp's CpuModel shows:
//   Model(config, shape, training)                     allocates; training: also gradients and AdamW's moments
//   static MemoryPlan plan(config, shape, training)    what that will take
//   shape(), layout(), params(), m(), v()              the buffers, on the host, for checkpoints
//   float train_step(tokens, iteration, lr)            one update; the mean loss of its batches
//   double loss_sum(x, y, B, T)                        the summed losses of a batch, dropout off
//   const float* next_logits(context, n, known)        see generate in sampler.h
// defines: run_command, evaluate, exact_loss
#pragma once
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "batch.h"
#include "checkpoint.h"
#include "config.h"
#include "error.h"
#include "memory.h"
#include "metrics.h"
#include "progress.h"
#include "sampler.h"
#include "schedule.h"
#include "shards.h"
#include "signals.h"
#include "text.h"

// ---------------------------------------------------------------------------------------------------------------------
// What needs no model: train_loop.cpp

struct Interrupted {};  // thrown out of a long task when a signal came

struct Data {
  Vocabulary vocabulary;
  Tokens train, val;
  std::string fingerprint;
};
Data open_data(const std::string& folder, const Vocabulary* expected = nullptr);  // expected: the checkpoint's

std::string checkpoint_path(const Config& config);  // --checkpoint last, best, or a file
double flops_per_token(const ModelShape& shape);    // of a training step: 3 x forward, attention causal

// The files of a run in out_dir: each is written whole or not at all.
class RunFiles {
 public:
  RunFiles(const Config& config, int first_iteration);
  Metrics& metrics() { return metrics_; }
  std::string path(const char* name) const;
  bool plot(const std::string& title);  // false: no gnuplot

 private:
  Config config_;
  Metrics metrics_;
};

std::vector<int> prompt_tokens(const Config& config, const Vocabulary& vocabulary);
void export_pth(const std::string& path, const ModelShape& shape, const Layout& layout, const float* params);
int export_command(const Config& config);

// ---------------------------------------------------------------------------------------------------------------------
// Evaluation

// The mean loss of eval_iters random batches, as the course estimates it.
template <class Model>
double random_loss(Model& model, const Tokens& tokens, const Config& config, uint32_t site, int iteration,
                   ProgressBar& bar, uint64_t& done) {
  const int B = config.batch_size, T = model.shape().T;
  std::vector<int> x(size_t(B) * T), y(x.size());
  double sum = 0;
  for (int k = 0; k < config.eval_iters; k++) {
    if (stop_signal()) throw Interrupted();
    random_batch(x.data(), y.data(), tokens, config.seed, iteration, site, uint64_t(k) * B, B, T);
    sum += model.loss_sum(x.data(), y.data(), B, T) / (double(B) * T);
    bar.update(++done);
  }
  return sum / config.eval_iters;
}

template <class Model>
EvalPoint evaluate(Model& model, const Data& data, const Config& config, int iteration) {
  ProgressBar bar("evaluate", 2 * uint64_t(config.eval_iters), "batch");
  uint64_t done = 0;
  bar.update(0);
  EvalPoint point;
  point.iter = iteration;
  point.train = random_loss(model, data.train, config, site::eval_train, iteration, bar, done);
  point.val = random_loss(model, data.val, config, site::eval_val, iteration, bar, done);
  bar.clear();
  return point;
}

// Every token of a split but its first is scored once, in windows of T that do not overlap; the last may be shorter.
template <class Model>
double exact_loss(Model& model, const Tokens& tokens, int batch_size) {
  const uint64_t T = model.shape().T, targets = tokens.size() - 1;
  ProgressBar bar("exact loss", targets, "char");
  std::vector<int> window(T + 1), x, y;
  double sum = 0;
  for (uint64_t at = 0; at < targets;) {
    if (stop_signal()) throw Interrupted();
    const uint64_t full = std::min<uint64_t>((targets - at) / T, batch_size);
    const uint64_t B = std::max<uint64_t>(full, 1), n = full ? T : targets - at;
    x.clear();
    y.clear();
    for (uint64_t b = 0; b < B; b++) {
      tokens.copy(at + b * n, n + 1, window.data());
      x.insert(x.end(), window.begin(), window.begin() + n);
      y.insert(y.end(), window.begin() + 1, window.begin() + n + 1);
    }
    sum += model.loss_sum(x.data(), y.data(), int(B), int(n));
    at += B * n;
    bar.update(at);
  }
  bar.clear();
  return sum / double(targets);
}

// ---------------------------------------------------------------------------------------------------------------------
// train

template <class Model>
int train(Config config) {
  std::optional<Checkpoint> resumed;
  if (config.init_from == "resume") {
    resumed.emplace(config.out_dir + "/ckpt_last.safetensors");
    for (const std::string& change : apply_settings(config, resumed->info().settings))
      std::fprintf(stderr, "going on with another value of %s\n", change.c_str());
  }
  const Data data = open_data(config.data, resumed ? &resumed->vocabulary() : nullptr);
  const ModelShape shape = model_shape(config, data.vocabulary.size());
  data.train.require_window(shape.T);
  data.val.require_window(shape.T);
  if (resumed && resumed->info().data != data.fingerprint)
    fail("the checkpoint was trained on another text (", resumed->info().data, ") than the one in ", config.data, " (",
         data.fingerprint, "); point --data to that text, or choose another --out_dir for a new run");

  std::fprintf(stderr, "%s\n", print_config(config).c_str());
  const MemoryPlan plan = Model::plan(config, shape, true);
  plan.require(physical_memory());
  std::fprintf(stderr, "%s\n", plan.print().c_str());
  Model model(config, shape, true);
  const Layout& layout = model.layout();
  std::fprintf(stderr, "%zu parameters, %.1f MFLOP a token, %zu threads\n", layout.count(),
               flops_per_token(shape) / 1e6, size_t(model.threads()));

  CheckpointInfo info;
  info.shape = shape;
  info.settings = recorded_settings(config);
  info.best_loss = std::numeric_limits<double>::infinity();
  info.data = data.fingerprint;
  if (resumed) {
    info.iteration = resumed->info().iteration;
    info.best_loss = resumed->info().best_loss;
    resumed->load_params(model.params(), layout);
    resumed->load_moments(model.m(), model.v(), layout);
    resumed.reset();
    if (info.iteration >= config.max_iters)
      fail("this run has done its ", info.iteration,
           " iterations; raise --max_iters to go on, or sample, eval or export it");
    std::fprintf(stderr, "going on at iteration %d\n", info.iteration);
  } else {
    init_parameters(model.params(), layout, config.seed);
  }

  RunFiles files(config, info.iteration);
  const auto save_last = [&] {
    save_checkpoint(files.path("ckpt_last.safetensors"), info, data.vocabulary, layout, model.params(), model.m(),
                    model.v());
  };

  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  const Clock::time_point start = Clock::now();
  const double tokens_per_step = double(config.batch_size) * config.gradient_accumulation_steps * shape.T;
  catch_signals();
  try {
    ProgressBar bar("train", uint64_t(config.max_iters), "it");
    bar.update(uint64_t(info.iteration));
    double step_seconds = 0;  // since the last log line
    int steps = 0;
    for (; info.iteration < config.max_iters; info.iteration++) {
      const int iteration = info.iteration;
      if (iteration % config.eval_interval == 0 || iteration == config.max_iters - 1) {
        bar.clear();
        const EvalPoint point = evaluate(model, data, config, iteration);
        std::printf("step %d: train loss %.4f, val loss %.4f\n", iteration, point.train, point.val);
        std::fflush(stdout);
        files.metrics().add_eval(iteration, point.train, point.val);
        if (point.val < info.best_loss) {
          info.best_loss = point.val;
          save_checkpoint(files.path("ckpt_best.safetensors"), info, data.vocabulary, layout, model.params(), nullptr,
                          nullptr);
        }
        save_last();
      }
      if (stop_signal()) throw Interrupted();

      const Clock::time_point before = Clock::now();
      const double lr = learning_rate_at(config, iteration);
      const float loss = model.train_step(data.train, iteration, lr);
      if (!std::isfinite(loss))
        fail("the loss of iteration ", iteration, " is not finite (", loss, "): ", files.path("ckpt_last.safetensors"),
             " is the last good state; a lower --learning_rate or a --grad_clip of 1 may help");
      step_seconds += seconds_since(before);
      steps++;
      bar.update(uint64_t(iteration) + 1, text("loss ", std::round(loss * 1e4) / 1e4));
      if (iteration % config.log_interval == 0) {
        const double each = step_seconds / steps, rate = tokens_per_step / each;
        bar.clear();
        std::printf("iter %d: loss %.4f, time %.2fms, %.0f tokens/s, %.1f GFLOP/s\n", iteration, double(loss),
                    each * 1e3, rate, rate * flops_per_token(shape) / 1e9);
        std::fflush(stdout);
        files.metrics().add_iter(iteration, loss, lr, each * 1e3, rate);
        step_seconds = steps = 0;
      }
    }
    bar.finish();
    const double train_seconds = seconds_since(start);
    save_last();

    const double val_exact = exact_loss(model, data.val, config.batch_size);
    std::printf("val exact: %.4f\n", val_exact);
    files.metrics().add_final(info.iteration, val_exact, train_seconds);
    export_pth(files.path("microGPT_model.pth"), shape, layout, model.params());
    const bool plotted = files.plot(text("microGPT, ", layout.count(), " parameters"));
    std::fprintf(stderr, "trained in %s; 500 characters from the last weights:\n", duration(train_seconds).c_str());

    std::string sample;
    generate(model, {0}, {500, 1.0, 0, config.seed, 0}, [&](int token) {
      const std::string piece = data.vocabulary.decode(token);
      sample += piece;
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
      return !stop_signal();
    });
    std::printf("\n");
    write_file(files.path("sample.txt"), sample + "\n");
    std::fprintf(
        stderr,
        "in %s: ckpt_last.safetensors, ckpt_best.safetensors, microGPT_model.pth, %smetrics.jsonl, sample.txt\n",
        config.out_dir.c_str(), plotted ? "training_plot.png, " : "");
  } catch (const Interrupted&) {
    save_last();
    std::fprintf(stderr, "\nstopped before iteration %d and saved; --init_from resume goes on\n", info.iteration);
  }
  if (std::ferror(stdout))
    fail("not all lines could be written to standard output; everything in ", config.out_dir, " is whole");
  return stop_signal() ? 128 + stop_signal() : 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// sample, eval

// A model with a checkpoint's weights. What the command line does not say is as it was when the checkpoint was trained.
template <class Model>
Model load_model(Config& config, const Checkpoint& checkpoint) {
  apply_settings(config, checkpoint.info().settings);
  Model::plan(config, checkpoint.info().shape, false).require(physical_memory());
  Model model(config, checkpoint.info().shape, false);
  checkpoint.load_params(model.params(), model.layout());
  return model;
}

template <class Model>
int sample(Config config) {
  const Checkpoint checkpoint(checkpoint_path(config));
  const std::vector<int> prompt = prompt_tokens(config, checkpoint.vocabulary());
  const bool prompt_given = config.given.count("start");
  config.batch_size = 1;
  config.given.insert("batch_size");
  Model model = load_model<Model>(config, checkpoint);
  const auto print = [&](int token) {
    const std::string piece = checkpoint.vocabulary().decode(token);
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    return std::fflush(stdout) == 0;  // closed: no reader is left
  };
  for (int k = 0; k < config.num_samples; k++) {
    if (k > 0) std::printf("---------------\n");
    if (prompt_given)
      for (const int token : prompt) print(token);
    generate(model, prompt, {config.max_new_tokens, config.temperature, config.top_k, config.seed, k}, print);
    std::printf("\n");
  }
  return 0;
}

template <class Model>
int eval(Config config) {
  const Checkpoint checkpoint(checkpoint_path(config));
  const Data data = open_data(config.data, &checkpoint.vocabulary());
  Model model = load_model<Model>(config, checkpoint);
  data.train.require_window(model.shape().T);
  data.val.require_window(model.shape().T);
  catch_signals();
  try {
    const EvalPoint point = evaluate(model, data, config, checkpoint.info().iteration);
    std::printf("step %d: train loss %.4f, val loss %.4f\n", point.iter, point.train, point.val);
    std::printf("val exact: %.4f\n", exact_loss(model, data.val, config.batch_size));
  } catch (const Interrupted&) { return 128 + stop_signal(); }
  return 0;
}

template <class Model>
int run_command(const Config& config) {
  if (config.command == "sample") return sample<Model>(config);
  if (config.command == "eval") return eval<Model>(config);
  if (config.command == "export") return export_command(config);
  return train<Model>(config);
}
