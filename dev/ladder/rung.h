// What the rungs of the ladder share: their flags, a model around their network, the loop that trains it, and what they
// tell the report. A rung's own file holds nothing but its network.
// defines: Arguments, read_flags, open_text, require_memory, Mode, LanguageModel, train, Row, Result, save_result,
//          load_result, fill_normal, sample_text, has_targets, decimals
#pragma once
#include <chrono>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "../../host/batch.h"
#include "../../host/config.h"
#include "../../host/evaluation.h"
#include "../../host/files.h"
#include "../../host/progress.h"
#include "../../host/run_files.h"
#include "../../host/sampler.h"
#include "../../host/schedule.h"
#include "../../kernels/adamw.h"
#include "../../kernels/crossentropy.h"
#include "../../kernels/dropout.h"

namespace ladder {

using Arguments = std::vector<std::string>;

// Reads a rung's own flags and those that it shares with the trainer; for these, config holds the rung's defaults.
// Returns false if it was asked for --help, and has answered.
bool read_flags(const std::string& rung, const Arguments& arguments, Config& config, const std::vector<Flag>& own,
                const std::vector<std::string>& common = {"data", "out_dir", "batch_size", "max_iters", "eval_interval",
                                                          "eval_iters", "learning_rate", "warmup_iters", "weight_decay",
                                                          "grad_clip", "threads", "seed"});

// Opens the text; refuses one that is too short for windows of T characters.
Data open_text(const Config& config, int T);

// Fails, before anything is allocated, if memory has no room for the network.
void require_memory(const Config& config, const Layout& params, const Layout& acts, int V, int T);

// ---------------------------------------------------------------------------------------------------------------------
// A network, as the model below sees it. Its tensors are structs with a function `place`, as in train_gpt_cpu.cpp.
//   static constexpr bool every_position   whether forward predicts the successor of each of the T tokens of a row,
//                                          or of the last one only
//   Layout param_layout, act_layout        the parameters, and everything else that forward and backward write
//   Buffer<Real> params, grads, acts
//   int V, T                               T: the window it is trained on
//   double multiply_adds()                 of one prediction
//   Real* forward(x, B, T, mode)           x (B, T); returns the logits (B * T, V) or (B, V)
//   void backward(x, dlogits, B, T, mode)  adds to grads

struct Mode {
  bool training = false;
  Dropout drop = {};
};

// tensor (count) = N(0, std); the values depend on nothing but the seed and `number`
template <class Real>
void fill_normal(Real* tensor, size_t count, double std, uint64_t seed, uint32_t number) {
  for (size_t i = 0; i < count; i += 4) {
    double normal[4];
    normal4(normal, random4(seed, 0, site::init + number, i / 4));
    for (size_t j = i; j < std::min(count, i + 4); j++) tensor[j] = Real(std * normal[j - i]);
  }
}

// Trains any network, and answers what an evaluation asks (Scorer in host/trainer.h).
template <class Net>
class LanguageModel final : public Scorer {
 public:
  LanguageModel(Net& net, const Config& config, const Data& data)
      : net_(net),
        config_(config),
        data_(data),
        x_(size_t(config.batch_size) * net.T),
        y_(x_.size()),
        losses_(rows()),
        probs_(rows() * size_t(net.V)),
        dlogits_(probs_.size()),
        m_(net.param_layout),
        v_(net.param_layout) {}

  // If the network predicts the last position only, we score a text target by target, each with its full context.
  ModelShape shape() const override {
    ModelShape shape;
    shape.V = net_.V;
    shape.T = Net::every_position ? net_.T : 1;
    return shape;
  }
  int chunk() const override { return 1; }

  // One update on one batch; calls each_gradient before the update, and returns the batch's loss.
  double train_step(int iteration, const std::function<void()>& each_gradient = {}) {
    const Mode mode = {true, {config_.seed, uint32_t(iteration), 0, dropout_threshold(config_.dropout), 0}};
    draw(data_.train, iteration, site::batch, 0);
    const double loss = loss_of_batch(config_.batch_size, net_.T, mode) / double(rows());
    crossentropy_backward(dlogits_.data(), probs_.data(), y_.data(), float(1.0 / double(rows())), int(rows()), net_.V);
    std::fill(net_.grads.data(), net_.grads.data() + net_.param_layout.size(), 0.f);
    net_.backward(x_.data(), dlogits_.data(), config_.batch_size, net_.T, mode);
    if (each_gradient) each_gradient();
    adamw_update(net_.params.data(), m_.data(), v_.data(), net_.grads.data(), net_.param_layout.size(),
                 {learning_rate_at(config_, iteration), config_.beta1, config_.beta2, 1e-8, config_.weight_decay,
                  iteration + 1, clip_scale(net_.grads.data(), net_.param_layout, config_.grad_clip)});
    return loss;
  }

  std::vector<double> random_losses(Split split, int iteration, int first, int count) override {
    std::vector<double> means;
    for (int k = first; k < first + count; k++) {
      draw(data_[split], iteration, evaluation_site(split), uint64_t(k) * config_.batch_size);
      means.push_back(loss_of_batch(config_.batch_size, net_.T, {}) / double(rows()));
    }
    return means;
  }

  double window_losses(Split split, uint64_t at, int B, int n, uint64_t stride = 0) override {
    if (stride != 0) fail("a rung scores windows one after the other, not ", stride, " tokens apart");
    const Tokens& tokens = data_[split];
    tokens.copy(at + 1, size_t(B) * n, y_.data());
    if (Net::every_position) {
      tokens.copy(at, size_t(B) * n, x_.data());
      return loss_of_batch(B, n, {});
    }
    for (int b = 0; b < B; b++) {  // the T tokens before each target; before the text begins, newlines
      const uint64_t end = at + b + 1, known = std::min<uint64_t>(end, net_.T);
      int* row = x_.data() + size_t(b) * net_.T;
      std::fill(row, row + net_.T, 0);
      tokens.copy(end - known, known, row + net_.T - known);
    }
    return loss_of_batch(B, net_.T, {});
  }

  // The logits (V) of the token after these n, the first `known` of which are the same as in the call before.
  const float* next_logits(const int* context, int n, int known) {
    if constexpr (requires { net_.next_logits(context, n, known); }) {
      return net_.next_logits(context, n, known);
    } else if (Net::every_position) {
      return net_.forward(context, 1, n, {}) + size_t(n - 1) * net_.V;
    } else {
      std::vector<int> row(net_.T, 0);
      std::copy(context + std::max(0, n - net_.T), context + n, row.end() - std::min(n, net_.T));
      return net_.forward(row.data(), 1, net_.T, {});
    }
  }

 private:
  size_t rows() const { return size_t(config_.batch_size) * (Net::every_position ? net_.T : 1); }

  void draw(const Tokens& tokens, int iteration, uint32_t site, uint64_t first_row) {
    const int B = config_.batch_size, T = net_.T;
    random_batch(x_.data(), y_.data(), tokens, config_.seed, iteration, site, first_row, B, T);
    if (!Net::every_position)
      for (int b = 0; b < B; b++) y_[b] = y_[size_t(b) * T + T - 1];
  }

  // Returns the sum of the losses of x_, y_, and leaves probs_ for backward.
  double loss_of_batch(int B, int T, const Mode& mode) {
    const float* logits = net_.forward(x_.data(), B, T, mode);
    const int n = Net::every_position ? B * T : B;
    crossentropy_forward(losses_.data(), probs_.data(), logits, y_.data(), n, net_.V);
    double sum = 0;
    for (int r = 0; r < n; r++) sum += losses_[r];
    return sum;
  }

  Net& net_;
  const Config& config_;
  const Data& data_;
  std::vector<int> x_, y_;
  std::vector<float> losses_, probs_, dlogits_;
  Buffer<float> m_, v_;
};

// Writes 200 characters. context: how many tokens next_logits looks back; 0: the network itself remembers the text.
template <class Model>
std::string sample_text(Model& model, const Data& data, uint64_t seed, int context) {
  struct Speaker {
    Model& model;
    int V, T;
    ModelShape shape() const { return {V, T}; }
    std::vector<int> next_tokens(const int* tokens, int n, int known, const Sampling& s, int i) {
      return {choose_token(model.next_logits(tokens, n, known), V, s.choice_of(i))};
    }
  } speaker{model, data.vocabulary.size(), context ? context : std::numeric_limits<int>::max()};
  std::string sample;
  generate(speaker, {0}, {200, {1.0, 0}, seed, 0}, [&](int, int token) {
    sample += data.vocabulary.decode(token);
    return true;
  });
  return sample;
}

// ---------------------------------------------------------------------------------------------------------------------
// What a rung tells the report. Losses in nats per character; NaN: not measured.

constexpr double not_measured = std::numeric_limits<double>::quiet_NaN();

struct Row {
  std::string name;
  double parameters = 0, flops = 0;  // of a training step, for each character that it predicts
  double seconds = 0, train = not_measured, val = not_measured;
  std::string reference = "";
  std::string record = "";  // its metrics.jsonl
  double per_step = 0;      // characters that an iteration predicts
};

struct Result {
  std::string rung, title;
  std::vector<Row> rows;
  std::vector<std::string> notes;                             // paragraphs, in Markdown
  std::vector<std::pair<std::string, std::string>> pictures;  // file, caption
  std::vector<std::pair<std::string, bool>> checks;           // a target, and whether it was reached
  std::string sample;
};
// Writes result.json, and prints which targets were reached.
void save_result(const std::string& out_dir, const Result& result);
Result load_result(const std::string& out_dir);

// Whether the targets hold: they are for Tiny Shakespeare, and for a rung whose flags change no result.
bool has_targets(const Config& config, const Data& data);

std::string decimals(double value, int digits);

// ---------------------------------------------------------------------------------------------------------------------
// Trains a network as the trainer trains its own: random batches, the same evaluations, record and picture, then the exact
// losses. Calls each_gradient(iteration) before every update. Without exact_train, the row's train loss is the last
// evaluation's estimate.
template <class Net>
Row train(Net& net, const Config& config, const Data& data, const std::string& name,
          const std::function<void(int)>& each_gradient = {}, bool exact_train = true) {
  using Clock = std::chrono::steady_clock;
  LanguageModel<Net> model(net, config, data);
  make_folder(config.out_dir);
  const Lock lock(config.out_dir);
  RunFiles files(config, 0);
  const Clock::time_point start = Clock::now();
  Row row;
  {
    ProgressBar bar(name, uint64_t(config.max_iters), "it");
    for (int i = 0; i < config.max_iters; i++) {
      bar.update(uint64_t(i));
      if (i % config.eval_interval == 0 || i == config.max_iters - 1) {
        bar.clear();
        const EvalPoint point = evaluate(model, config, i);
        std::printf("%s, step %d: train loss %.4f, val loss %.4f\n", name.c_str(), i, point.train, point.val);
        std::fflush(stdout);
        files.metrics().add_eval(point);
        row.train = point.train;
      }
      const double loss = model.train_step(i, [&] {
        if (each_gradient) each_gradient(i);
      });
      if (!std::isfinite(loss))
        fail("the loss of iteration ", i, " is not finite (", loss, "); a lower --learning_rate may get further");
      if (i % config.log_interval == 0) files.metrics().add_iter(i, loss, learning_rate_at(config, i), 0, 0);
    }
    bar.update(uint64_t(config.max_iters));
    bar.finish();
  }
  row.name = name;
  row.record = files.path("metrics.jsonl");
  row.per_step = double(config.batch_size) * (Net::every_position ? net.T : 1);
  row.parameters = double(net.param_layout.count());
  row.flops = 6 * net.multiply_adds();
  row.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  row.val = exact_loss(model, Split::val, data.val.size(), config.batch_size);
  if (exact_train) row.train = exact_loss(model, Split::train, data.train.size(), config.batch_size);
  std::printf("%s: train loss %.4f, exact val loss %.4f; %.0f parameters, trained in %.1f s\n", name.c_str(), row.train,
              row.val, row.parameters, row.seconds);
  std::fflush(stdout);
  files.plot(text(name, ", ", net.param_layout.count(), " parameters"));
  files.metrics().add_final({config.max_iters, row.val, row.seconds});
  files.metrics().flush();
  return row;
}

}  // namespace ladder
