// The loop around a model: evaluate, step, log, save; and the commands sample and eval. Written once for every trainer.
// A Model is what train_gpt_cpu.cpp's CpuModel and train_gpt.cu's GpuModel show:
//   Model(config, shape, data, training)          allocates; without data (null) it only samples; training: also
//                                                 gradients and AdamW's moments
//   static MemoryPlan plan(config, shape, data, training)  what that will take, static AvailableMemory memory()
//   shape(), layout(), describe(), peak_flops()   peak_flops: of the machine, 0 if it was not measured
//   restore(params, m, v), snapshot(params, m, v) from and to buffers of that layout on the host; m, v: null, or both
//   first_not_finite()                            after a step: its first activation, or else gradient, with infinity or
//                                                 NaN; empty: none has
//   state(), set_state(map)                       what else a resumed run needs, for the checkpoint's metadata
//   int chunk()                                   steps, or batches, that are best asked for at once
//   std::vector<float> train_steps(iteration, count)          updates; each one's loss, the mean over its batches
//   double random_losses(split, iteration, first, count)      the sum of the mean losses of random batches, dropout off
//   double window_losses(split, at, B, n, stride) the sum of the losses in B windows of n tokens, which begin `stride`
//                                                 apart; without a stride, one after the other
//   int next_token(context, n, known, choice)     see generate in sampler.h
// defines: run_command, evaluate, exact_loss, fixed_loss
#pragma once
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint.h"
#include "config.h"
#include "data.h"
#include "error.h"
#include "memory.h"
#include "metrics.h"
#include "ngram.h"
#include "progress.h"
#include "sampler.h"
#include "schedule.h"
#include "signals.h"

// ---------------------------------------------------------------------------------------------------------------------
// What needs no model: train_loop.cpp

struct Interrupted {};  // thrown out of a long task when a signal came
struct NotFinite {      // thrown when a number has become infinite or NaN, in this iteration or one before
  std::string what;
  int iteration;
  bool evaluation = false;
};

std::string checkpoint_path(const Config& config);  // --checkpoint last, best, or a file
double flops_per_token(const ModelShape& shape);    // of a training step: 3 x forward, attention causal
std::string flops_text(double flops, double peak);  // "12.3 GFLOP/s", with the share of a peak that is not 0
std::string loss_text(double val_exact);            // "1.5123 (2.182 bits per character)"
inline int64_t ceil_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Refuses to be one of several processes, by what mpirun, srun and torchrun say in the environment.
void require_one_process();
// The type of the run that this one goes on with, samples from or evaluates; empty: none, or none is recorded.
std::string dtype_so_far(const Config& config);
// Refuses to go on with another text, or with a run that is complete; says it if the type is another.
void check_resumed(const Config& config, const Checkpoint& checkpoint, const Data& data);
// Moves the files of a run that was trained in out_dir before into a folder of its own there.
void set_aside_older_run(const std::string& out_dir);
// Refuses sizes for which the plan itself, or the number of a window, could not be computed.
void require_imaginable(const Config& config, const ModelShape& shape, double available);

template <class Model>
MemoryPlan possible_plan(const Config& config, const ModelShape& shape, const Data* data, bool training) {
  const AvailableMemory memory = Model::memory();
  require_imaginable(config, shape, memory.bytes);
  MemoryPlan plan = Model::plan(config, shape, data, training);
  plan.require(memory);
  return plan;
}

// The files of a run in out_dir: each is written whole or not at all.
class RunFiles {
 public:
  RunFiles(const Config& config, int first_iteration);
  Metrics& metrics() { return metrics_; }
  std::string path(const char* name) const;
  // end: the loss of the fixed validation windows behind the last step; best: the lowest one, fixed_name: what it is of.
  // false: no gnuplot.
  bool plot(const std::string& title, const IterPoint& end = {}, const IterPoint& best = {},
            const std::string& fixed_name = "");

 private:
  Config config_;
  std::vector<Baseline> baselines_;  // read first: if they are damaged, nothing has been touched
  Metrics metrics_;
};

std::vector<int> prompt_tokens(const Config& config, const Vocabulary& vocabulary);
void export_pth(const std::string& path, const ModelShape& shape, const Layout& layout, const float* params);
int export_command(const Config& config);

// ---------------------------------------------------------------------------------------------------------------------
// Evaluation

// The mean loss of eval_iters random batches, as the course estimates it.
template <class Model>
double random_loss(Model& model, Split split, const Config& config, int iteration, ProgressBar& bar, uint64_t& done) {
  double sum = 0;
  for (int k = 0; k < config.eval_iters;) {
    if (stop_signal()) throw Interrupted();
    const int count = std::min(model.chunk(), config.eval_iters - k);
    sum += model.random_losses(split, iteration, k, count);
    k += count;
    bar.update(done += uint64_t(count));
  }
  return sum / config.eval_iters;
}

template <class Model>
EvalPoint evaluate(Model& model, const Config& config, int iteration) {
  ProgressBar bar("evaluate", 2 * uint64_t(config.eval_iters), "batch");
  uint64_t done = 0;
  bar.update(0);
  EvalPoint point;
  point.iter = iteration;
  point.train = random_loss(model, Split::train, config, iteration, bar, done);
  point.val = random_loss(model, Split::val, config, iteration, bar, done);
  bar.clear();
  return point;
}

// Every token of a split but its first is scored once, in windows of T that do not overlap; the last may be shorter.
template <class Model>
double exact_loss(Model& model, Split split, uint64_t tokens, int batch_size) {
  const uint64_t T = uint64_t(model.shape().T), targets = tokens - 1;
  ProgressBar bar("exact loss", targets, "char");
  double sum = 0;
  for (uint64_t at = 0; at < targets;) {
    if (stop_signal()) throw Interrupted();
    const uint64_t full = std::min<uint64_t>((targets - at) / T, uint64_t(batch_size));
    const uint64_t B = std::max<uint64_t>(full, 1), n = full ? T : targets - at;
    sum += model.window_losses(split, at, int(B), int(n));
    at += B * n;
    bar.update(at);
  }
  bar.clear();
  return sum / double(targets);
}

// Which weights are the best is decided by the same tokens of the validation split every time, so that luck has no part
// in it: by all of them, as in Tiny Shakespeare's 111,540, or in a longer split by windows that lie evenly over it. This
// bound keeps an evaluation from taking longer the longer the text: it is 64 batches of preset small and 8 of lecture,
// beside 40 and 400 random ones.
constexpr uint64_t fixed_tokens = 131'072;

// In how many windows of T the fixed tokens of a long split lie; 0: the split is short, and they are all of it.
inline uint64_t fixed_windows(uint64_t tokens, int T) {
  return tokens - 1 <= fixed_tokens ? 0 : std::max<uint64_t>(fixed_tokens / uint64_t(T), 1);
}
std::string fixed_name(uint64_t tokens, int T);  // "exact val loss", "val loss of 512 fixed windows"

template <class Model>
double fixed_loss(Model& model, Split split, uint64_t tokens, int batch_size) {
  const int T = model.shape().T;
  const uint64_t windows = fixed_windows(tokens, T);
  if (windows == 0) return exact_loss(model, split, tokens, batch_size);
  const uint64_t stride = (tokens - 1) / windows;
  ProgressBar bar("fixed windows", windows, "window");
  double sum = 0;
  for (uint64_t k = 0; k < windows;) {
    if (stop_signal()) throw Interrupted();
    const uint64_t B = std::min(windows - k, uint64_t(batch_size));
    sum += model.window_losses(split, k * stride, int(B), T, stride);
    bar.update(k += B);
  }
  bar.clear();
  return sum / (double(windows) * T);
}

// ---------------------------------------------------------------------------------------------------------------------
// train

// Repeats the steps of a run since its last checkpoint one by one, up to the bad one, and says which step and which of its
// tensors were the first with a number that is not finite. A run is a function of its checkpoint and its settings, so
// that what went wrong goes wrong again; if not, it was no mistake in the numbers.
template <class Model>
std::string find_not_finite(Model& model, const std::string& path, const NotFinite& bad) {
  const Checkpoint good(path);
  const Layout& layout = model.layout();
  const Snapshot now{Buffer<float>(layout), Buffer<float>(layout), Buffer<float>(layout)};
  good.load_params(now.params.data(), layout);
  good.load_moments(now.m.data(), now.v.data(), layout);
  model.restore(now.params.data(), now.m.data(), now.v.data());
  model.set_state(good.info().state);
  for (int i = good.info().iteration; i <= bad.iteration && !stop_signal(); i++) {
    const float loss = model.train_steps(i, 1)[0];
    model.snapshot(now.params.data(), now.m.data(), now.v.data());
    if (std::isfinite(loss) && now.all_finite(layout)) continue;
    std::string tensor = model.first_not_finite();
    for (const auto& [buffer, what] : {std::pair{now.m.data(), "AdamW's m of "},
                                       {now.v.data(), "AdamW's v of "},
                                       {now.params.data(), "the weights "}})
      if (const std::string name = first_not_finite(buffer, layout, Order::backward); tensor.empty() && !name.empty())
        tensor = what + name;
    return text("it began in iteration ", i, tensor.empty() ? "" : " with ", tensor);
  }
  if (stop_signal()) return "where it began was not looked for to the end";
  if (bad.evaluation) return "the weights are finite, but too large";
  return "it did not come back when the steps were repeated: memory or processor may be faulty";
}

// An older program's run knows only what random batches thought of its best weights: they are scored by the fixed windows.
// Afterwards the model has those weights.
template <class Model>
void score_best_again(Model& model, CheckpointInfo& info, const std::string& path, const Data& data, int batch_size) {
  info.best_loss = std::numeric_limits<double>::infinity();
  if (!std::filesystem::exists(path)) return;
  const Checkpoint best(path);
  if (best.info().shape != info.shape || best.info().data != info.data) return;  // another run's
  const Buffer<float> params(model.layout());
  best.load_params(params.data(), model.layout());
  model.restore(params.data(), nullptr, nullptr);
  info.best_loss = fixed_loss(model, Split::val, data.val.size(), batch_size);
  info.best_iteration = best.info().iteration;
}

template <class Model>
int train(Config config) {
  const std::string last_path = config.out_dir + "/ckpt_last.safetensors";
  const std::string best_path = config.out_dir + "/ckpt_best.safetensors";
  std::optional<Checkpoint> resumed;
  if (config.init_from == "resume") {
    resumed.emplace(last_path);
    for (const std::string& change : apply_settings(config, resumed->info().settings))
      std::fprintf(stderr, "going on with another value of %s\n", change.c_str());
  }
  const Data data = open_data(config.data, resumed ? &resumed->vocabulary() : nullptr);
  const ModelShape shape = model_shape(config, data.vocabulary.size());
  data.train.require_window(shape.T);
  data.val.require_window(shape.T);
  if (resumed) check_resumed(config, *resumed, data);

  std::fprintf(stderr, "%s\n", print_config(config).c_str());
  std::fprintf(stderr, "%s\n", possible_plan<Model>(config, shape, &data, true).print().c_str());
  make_folder(config.out_dir);
  const Lock lock(config.out_dir);
  if (!resumed) set_aside_older_run(config.out_dir);
  Model model(config, shape, &data, true);
  const Layout& layout = model.layout();
  std::fprintf(stderr, "%zu parameters, %.1f MFLOP a token, %s\n", layout.count(), flops_per_token(shape) / 1e6,
               model.describe().c_str());

  CheckpointInfo info;
  info.shape = shape;
  info.settings = recorded_settings(config);
  info.best_loss = std::numeric_limits<double>::infinity();
  info.data = data.fingerprint;
  CheckpointWriter writer(data.vocabulary, layout);
  {
    Snapshot& start = writer.snapshot();
    if (resumed) {
      info.iteration = resumed->info().iteration;
      info.best_loss = resumed->info().best_loss;
      info.best_iteration = resumed->info().best_iteration;
      if (std::isnan(info.best_loss)) score_best_again(model, info, best_path, data, config.batch_size);
      resumed->load_params(start.params.data(), layout);
      resumed->load_moments(start.m.data(), start.v.data(), layout);
      model.set_state(resumed->info().state);
      resumed.reset();
      std::fprintf(stderr, "going on at iteration %d\n", info.iteration);
    } else {
      init_parameters(start.params.data(), layout, config.seed);
    }
    model.restore(start.params.data(), start.m.data(), start.v.data());
  }

  RunFiles files(config, info.iteration);
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  const Clock::time_point start = Clock::now();
  Clock::time_point last_save = start;
  const auto take_snapshot = [&]() -> Snapshot& {
    Snapshot& snapshot = writer.snapshot();
    model.snapshot(snapshot.params.data(), snapshot.m.data(), snapshot.v.data());
    if (!snapshot.all_finite(layout))
      throw NotFinite{text("the weights after iteration ", info.iteration - 1, " are not finite"), info.iteration - 1};
    info.state = model.state();
    info.state["dtype"] = config.dtype;
    return snapshot;
  };
  const auto save = [&](bool best) {  // in the background, from a snapshot
    take_snapshot();
    files.metrics().flush();  // a checkpoint never knows of an iteration that the record does not
    writer.write(info, last_path, best ? best_path : "");
    last_save = Clock::now();
  };
  const std::string fixed = fixed_name(data.val.size(), shape.T);
  const auto is_best = [&](double loss) {  // and says it
    const bool best = loss < info.best_loss;
    if (best) info.best_loss = loss, info.best_iteration = info.iteration;
    std::fprintf(stderr, "%s: %.4f, %s\n", fixed.c_str(), loss,
                 info.best_iteration == info.iteration
                     ? "the best so far"
                     : text("the best is that of step ", info.best_iteration).c_str());
    return best;
  };

  const double tokens_per_step = double(config.batch_size) * config.gradient_accumulation_steps * shape.T;
  const auto run = [&] {
    ProgressBar bar("train", uint64_t(config.max_iters), "it");
    bar.update(uint64_t(info.iteration));
    double step_seconds = 0;  // since the last log line
    int steps = 0;
    while (info.iteration < config.max_iters) {
      const int iteration = info.iteration, last = config.max_iters - 1;
      // The last evaluation scores no fixed windows: the weights behind the last step are scored instead. So a run that is
      // made longer afterwards has judged the same weights as one that was long from the start, if it had ended where that
      // one evaluates.
      const bool judged = iteration % config.eval_interval == 0;
      if (judged || iteration == last) {
        bar.clear();
        EvalPoint point = evaluate(model, config, iteration);
        if (judged) point.fixed = fixed_loss(model, Split::val, data.val.size(), config.batch_size);
        if (!std::isfinite(point.train) || !std::isfinite(point.val) || (judged && !std::isfinite(point.fixed)))
          throw NotFinite{text("the losses of the evaluation before iteration ", iteration, " are not finite"),
                          iteration - 1, true};
        std::printf("step %d: train loss %.4f, val loss %.4f\n", iteration, point.train, point.val);
        files.metrics().add_eval(iteration, point.train, point.val, point.fixed);
        save(judged && is_best(point.fixed));
      } else if (!writer.busy() && config.checkpoint_secs > 0 && seconds_since(last_save) >= config.checkpoint_secs) {
        save(false);
      }
      if (stop_signal()) throw Interrupted();

      // As many steps as the model likes to do at once, up to the next log line or evaluation.
      const int64_t next_log = ceil_to(iteration, config.log_interval) + 1;
      const int64_t next_eval =
          std::min<int64_t>(ceil_to(iteration + 1, config.eval_interval), std::max(last, iteration + 1));
      const int count = int(std::min<int64_t>({model.chunk(), next_log - iteration, next_eval - iteration}));
      const Clock::time_point before = Clock::now();
      const std::vector<float> losses = model.train_steps(iteration, count);
      for (int i = 0; i < count; i++)
        if (!std::isfinite(losses[size_t(i)]))
          throw NotFinite{text("the loss of iteration ", iteration + i, " is not finite (", losses[size_t(i)], ")"),
                          iteration + i};
      step_seconds += seconds_since(before);
      steps += count;
      info.iteration += count;
      const int newest = info.iteration - 1;
      const double loss = losses.back();
      bar.update(uint64_t(info.iteration), text("loss ", std::round(loss * 1e4) / 1e4));
      if (newest % config.log_interval == 0) {
        const double each = step_seconds / steps, rate = tokens_per_step / each, flops = rate * flops_per_token(shape);
        bar.clear();
        std::printf("iter %d: loss %.4f, time %.2fms, %.0f tokens/s, %s\n", newest, loss, each * 1e3, rate,
                    flops_text(flops, model.peak_flops()).c_str());
        files.metrics().add_iter(newest, losses.back(), learning_rate_at(config, newest), each * 1e3, rate);
        step_seconds = steps = 0;
      }
    }
    bar.finish();
    const double train_seconds = seconds_since(start);
    const double val_fixed = fixed_loss(model, Split::val, data.val.size(), config.batch_size);
    if (!std::isfinite(val_fixed))
      throw NotFinite{text("the loss after iteration ", info.iteration - 1, " is not finite"), info.iteration - 1,
                      true};
    save(is_best(val_fixed));

    // What a finished run leaves besides. The record's last line comes last: a run without it finishes when it goes on.
    const double val_exact = fixed_windows(data.val.size(), shape.T) == 0
                                 ? val_fixed
                                 : exact_loss(model, Split::val, data.val.size(), config.batch_size);
    std::printf("val exact: %s\n", loss_text(val_exact).c_str());
    export_pth(files.path("microGPT_model.pth"), shape, layout, take_snapshot().params.data());
    const bool plotted = files.plot(text("microGPT, ", layout.count(), " parameters"), {info.iteration, val_fixed},
                                    {info.best_iteration, info.best_loss}, fixed);
    std::fprintf(stderr, "trained in %s; 500 characters from the last weights:\n", duration(train_seconds).c_str());
    std::string sample;
    generate(model, {0}, {500, {1.0, 0}, config.seed, 0}, [&](int token) {
      const std::string piece = data.vocabulary.decode(token);
      sample += piece;
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
      return !stop_signal();
    });
    std::printf("\n");
    if (stop_signal()) throw Interrupted();
    write_file(files.path("sample.txt"), sample + "\n");
    files.metrics().add_final(info.iteration, val_exact, train_seconds, val_fixed);
    files.metrics().flush();
    std::fprintf(
        stderr,
        "in %s: ckpt_last.safetensors, ckpt_best.safetensors, microGPT_model.pth, %smetrics.jsonl, sample.txt\n",
        config.out_dir.c_str(), plotted ? "training_plot.png, " : "");
  };

  catch_signals();
  try {
    try {
      run();
    } catch (const Interrupted&) {
      save(false);
      writer.wait();
      std::fprintf(stderr, "\nstopped before iteration %d and saved; --init_from resume goes on\n", info.iteration);
    }
  } catch (const NotFinite& bad) {
    writer.wait();
    if (info.iteration == 0 && writer.saved() < 0) fail(bad.what, " from the start");
    std::fprintf(stderr, "%s; the steps since the last checkpoint are repeated, to see where it began\n",
                 bad.what.c_str());
    fail(bad.what, "; ", find_not_finite(model, last_path, bad), ". ", last_path, " is the last good state; ",
         "--init_from resume with a lower --learning_rate, or with --grad_clip 1, may get further");
  } catch (const Error& error) {
    if (writer.saved() < 0) throw;
    fail(error.what(), "; ", last_path, " is whole, --init_from resume goes on at iteration ", writer.saved());
  }
  return stop_signal() ? 128 + stop_signal() : 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// sample, eval

// A model with a checkpoint's weights. What the command line does not say is as it was when the checkpoint was trained.
template <class Model>
std::unique_ptr<Model> load_model(Config& config, const Checkpoint& checkpoint, const Data* data) {
  apply_settings(config, checkpoint.info().settings);
  const ModelShape& shape = checkpoint.info().shape;
  possible_plan<Model>(config, shape, data, false);
  auto model = std::make_unique<Model>(config, shape, data, false);
  const Buffer<float> params(model->layout());
  checkpoint.load_params(params.data(), model->layout());
  model->restore(params.data(), nullptr, nullptr);
  return model;
}

template <class Model>
int sample(Config config) {
  const Checkpoint checkpoint(checkpoint_path(config));
  const std::vector<int> prompt = prompt_tokens(config, checkpoint.vocabulary());
  const bool prompt_given = config.given.count("start");
  config.batch_size = 1;
  config.given.insert("batch_size");
  const auto model = load_model<Model>(config, checkpoint, nullptr);
  const auto print = [&](int token) {
    const std::string piece = checkpoint.vocabulary().decode(token);
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    return std::fflush(stdout) == 0;  // closed: no reader is left
  };
  for (int k = 0; k < config.num_samples; k++) {
    if (k > 0) std::printf("---------------\n");
    if (prompt_given)
      for (const int token : prompt) print(token);
    generate(*model, prompt, {config.max_new_tokens, {config.temperature, config.top_k}, config.seed, k}, print);
    std::printf("\n");
  }
  return 0;
}

template <class Model>
int eval(Config config) {
  const Checkpoint checkpoint(checkpoint_path(config));
  const Data data = open_data(config.data, &checkpoint.vocabulary());
  data.train.require_window(checkpoint.info().shape.T);
  data.val.require_window(checkpoint.info().shape.T);
  const auto model = load_model<Model>(config, checkpoint, &data);
  catch_signals();
  try {
    const EvalPoint point = evaluate(*model, config, checkpoint.info().iteration);
    std::printf("step %d: train loss %.4f, val loss %.4f\n", point.iter, point.train, point.val);
    const double val_exact = exact_loss(*model, Split::val, data.val.size(), config.batch_size);
    std::printf("val exact: %s\n", loss_text(val_exact).c_str());
  } catch (const Interrupted&) { return 128 + stop_signal(); }
  return 0;
}

template <class Model>
int run_command(const Config& config) {
  if (config.command == "sample") return sample<Model>(config);
  if (config.command == "eval") return eval<Model>(config);
  return train<Model>(config);
}
