#include "commands.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "error.h"
#include "evaluation.h"
#include "files.h"
#include "page.h"
#include "run.h"
#include "run_files.h"
#include "sampler.h"
#include "signals.h"
#include "weights.h"

std::string dtype_so_far(const Config& config) {
  if (config.command != "train") return recorded_dtype(ModelWeights(checkpoint_path(config), Verify::header).info());
  if (config.init_from != "resume") return "";
  return recorded_dtype(Checkpoint(last_checkpoint(config.out_dir), Verify::header).info());
}

std::vector<int> prompt_tokens(const Config& config, const Vocabulary& vocabulary) {
  if (!config.given.count("start")) return {0};  // the newline, in any text that has lines
  const bool from_file = config.start.rfind("FILE:", 0) == 0;
  const std::string prompt = from_file ? read_file(config.start.substr(5)) : config.start;
  const std::vector<uint16_t> tokens = vocabulary.encode(prompt, "--start");
  if (tokens.empty()) fail("--start is empty: the model needs at least one character to go on from");
  return {tokens.begin(), tokens.end()};
}

std::unique_ptr<Trainer> load_trainer(const TrainerType& type, Config& config, const ModelWeights& weights,
                                      const Data* data) {
  apply_settings(config, weights.info().settings);
  const ModelShape& shape = weights.info().shape;
  possible_plan(type, config, shape, data, false);
  std::unique_ptr<Trainer> trainer = type.make(config, shape, data, false);
  const Buffer<float> params(trainer->layout());
  weights.load_params(params.data(), trainer->layout());
  trainer->restore(params.data(), nullptr, nullptr);
  return trainer;
}

// A trainer that makes samples together makes batch_size of them at a time. We print the first while it grows, and the
// others after it.
static int sample(const TrainerType& type, Config config) {
  const ModelWeights weights(checkpoint_path(config));
  say_which(weights, config);
  const Vocabulary vocabulary = vocabulary_of(weights, config.data);
  const std::vector<int> prompt = prompt_tokens(config, vocabulary);
  const bool prompt_given = config.given.count("start");
  apply_settings(config, weights.info().settings);
  config.batch_size = type.samples_together ? std::min(config.batch_size, config.num_samples) : 1;
  config.given.insert("batch_size");
  const auto trainer = load_trainer(type, config, weights, nullptr);
  const auto print = [](const std::string& piece) {
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    return std::fflush(stdout) == 0;  // closed: no reader is left
  };
  std::string begin;
  if (prompt_given)
    for (const int token : prompt) begin += vocabulary.decode(token);
  const std::string begin_next = "\n---------------\n" + begin;
  for (int first = 0; first < config.num_samples; first += config.batch_size) {
    const int samples = std::min(config.batch_size, config.num_samples - first);
    std::vector<std::string> others(samples - 1, begin_next);
    print(first == 0 ? begin : begin_next);
    generate(*trainer, prompt, {config.max_new_tokens, {config.temperature, config.top_k}, config.seed, first, samples},
             [&](int k, int token) {
               const std::string piece = vocabulary.decode(token);
               if (k == 0) return print(piece);
               others[k - 1] += piece;
               return true;
             });
    for (const std::string& text : others) print(text);
  }
  print("\n");
  return 0;
}

static int eval(const TrainerType& type, Config config) {
  const ModelWeights weights(checkpoint_path(config));
  say_which(weights, config);
  const Vocabulary vocabulary = vocabulary_of(weights, config.data);
  const Data data = open_data(config.data, &vocabulary);
  data.train.require_window(weights.info().shape.T);
  data.val.require_window(weights.info().shape.T);
  const int T = weights.info().shape.T;
  if (config.stride > T)
    fail("--stride ", config.stride, " is more than the model's block_size, ", T, ": tokens would be left out");
  const auto trainer = load_trainer(type, config, weights, &data);
  catch_signals();
  try {
    const EvalPoint point = evaluate(*trainer, config, weights.info().iteration);
    std::printf("step %d: train loss %.4f, val loss %.4f\n", point.iter, point.train, point.val);
    const double val_exact = exact_loss(*trainer, Split::val, data.val.size(), config.batch_size);
    std::printf("val exact: %s\n", loss_text(val_exact).c_str());
    if (config.stride > 0 && config.stride < T) {
      const double strided = strided_loss(*trainer, Split::val, data.val.size(), config.batch_size, config.stride);
      std::printf("val exact, stride %d: %s\n", config.stride, loss_text(strided).c_str());
    }
  } catch (const Interrupted&) { return 128 + stop_signal(); }
  return 0;
}

static int export_command(const Config& config) {
  const ModelWeights weights(checkpoint_path(config));
  say_which(weights, config);
  const ModelShape& shape = weights.info().shape;
  const Layout layout = parameter_layout(shape);
  const Buffer<float> params(layout);
  weights.load_params(params.data(), layout);
  make_folder(config.out_dir);
  const std::string path = config.out_dir + "/microGPT_model.pth";
  export_pth(path, shape, layout, params.data());
  std::fprintf(stderr, "wrote %s\n", path.c_str());
  return 0;
}

bool needs_no_trainer(const Config& config) { return config.command == "export" || config.command == "page"; }
int run_without_trainer(const Config& config) {
  return config.command == "page" ? page_command(config) : export_command(config);
}

int run_command(const TrainerType& type, const Config& config) {
  if (config.command == "sample") return sample(type, config);
  if (config.command == "eval") return eval(type, config);
  return TrainingRun(type, config).go();
}
