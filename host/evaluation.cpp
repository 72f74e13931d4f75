#include "evaluation.h"

#include <cmath>
#include <cstdio>
#include <numeric>

#include "error.h"
#include "progress.h"
#include "ranks.h"
#include "signals.h"

// Calls losses(first, count, to) until each of `all` batches has been scored: by this rank, or by another one that has
// them meanwhile. The ranks take turns at pieces of up to `most` batches. Returns the losses by batch, so their sum does
// not depend on the number of ranks. A signal to any rank interrupts all of them.
template <class Losses>
static std::vector<double> score(int all, int most, const Losses& losses) {
  std::vector<double> out(size_t(all), 0.0);
  for (int k = 0; k < all;) {
    for (const int stop : ranks().all(stop_signal()))
      if (stop) throw Interrupted();
    std::vector<Part> parts;
    for (int r = 0; r < ranks().count(); r++) {
      parts.push_back({size_t(k), size_t(std::min(most, all - k))});
      k += int(parts.back().count);
    }
    const Part& own = parts[size_t(ranks().rank())];
    if (own.count > 0) losses(int(own.first), int(own.count), out.data() + own.first);
    ranks().gather(out.data(), parts);
  }
  return out;
}

// The mean loss of eval_iters random batches. done: how many batches the bar has counted so far.
static double random_loss(Scorer& model, Split split, const Config& config, int iteration, ProgressBar& bar,
                          uint64_t& done) {
  const std::vector<double> means = score(config.eval_iters, model.chunk(), [&](int first, int count, double* to) {
    const std::vector<double> some = model.random_losses(split, iteration, first, count);
    std::copy(some.begin(), some.end(), to);
    bar.update(done += uint64_t(count) * uint64_t(ranks().count()));
  });
  return std::accumulate(means.begin(), means.end(), 0.0) / config.eval_iters;
}

EvalPoint evaluate(Scorer& model, const Config& config, int iteration) {
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

// The sum of the losses of these batches of windows.
struct Windows {
  uint64_t first;  // the first token
  int B, n;        // so many windows of so many tokens
};
static double sum_of_windows(Scorer& model, Split split, const std::vector<Windows>& batches, uint64_t stride,
                             const char* name) {
  ProgressBar bar(name, batches.size(), "batch");
  uint64_t done = 0;
  const std::vector<double> sums = score(int(batches.size()), 1, [&](int k, int, double* to) {
    const Windows& w = batches[size_t(k)];
    *to = model.window_losses(split, w.first, w.B, w.n, stride);
    bar.update(done += uint64_t(ranks().count()));
  });
  bar.clear();
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

double exact_loss(Scorer& model, Split split, uint64_t tokens, int batch_size) {
  const uint64_t T = uint64_t(model.shape().T), targets = tokens - 1;
  std::vector<Windows> batches;
  for (uint64_t at = 0; at < targets;) {
    const uint64_t full = std::min<uint64_t>((targets - at) / T, uint64_t(batch_size));
    batches.push_back({at, int(std::max<uint64_t>(full, 1)), int(full ? T : targets - at)});
    at += uint64_t(batches.back().B) * uint64_t(batches.back().n);
  }
  return sum_of_windows(model, split, batches, 0, "exact loss") / double(targets);
}

double strided_loss(Scorer& model, Split split, uint64_t tokens, int batch_size, int stride) {
  const int T = model.shape().T;
  const uint64_t targets = tokens - 1, S = uint64_t(stride);
  if (stride == T || targets <= uint64_t(T)) return exact_loss(model, split, tokens, batch_size);
  // We want the losses of a window's last S tokens. They are the losses of the whole window minus those of a shorter one,
  // its first T - S tokens: no token sees what comes after it, so these have the same losses in both.
  std::vector<Windows> whole = {{0, 1, T}}, first_parts;
  const auto score_last = [&](uint64_t first, int B, int count) {
    whole.push_back({first, B, T});
    first_parts.push_back({first, B, T - count});
  };
  const uint64_t windows = (targets - uint64_t(T)) / S;
  for (uint64_t k = 0; k < windows; k += uint64_t(whole.back().B))
    score_last((k + 1) * S, int(std::min(windows - k, uint64_t(batch_size))), stride);
  if (const uint64_t rest = (targets - uint64_t(T)) % S; rest > 0) score_last(targets - uint64_t(T), 1, int(rest));
  return (sum_of_windows(model, split, whole, S, "windows") - sum_of_windows(model, split, first_parts, S, "windows")) /
         double(targets);
}

std::string fixed_name(uint64_t tokens, int T) {
  const uint64_t windows = fixed_windows(tokens, T);
  return windows == 0 ? "exact val loss" : text("val loss of ", windows, " fixed windows");
}

double fixed_loss(Scorer& model, Split split, uint64_t tokens, int batch_size) {
  const int T = model.shape().T;
  const uint64_t windows = fixed_windows(tokens, T);
  if (windows == 0) return exact_loss(model, split, tokens, batch_size);
  const uint64_t stride = (tokens - 1) / windows;
  std::vector<Windows> batches;
  for (uint64_t k = 0; k < windows; k += uint64_t(batches.back().B))
    batches.push_back({k * stride, int(std::min(windows - k, uint64_t(batch_size))), T});
  return sum_of_windows(model, split, batches, stride, "fixed windows") / (double(windows) * T);
}

std::string loss_text(double val_exact) {
  char line[64];
  std::snprintf(line, sizeof line, "%.4f (%.3f bits per character)", val_exact, val_exact / std::log(2.0));
  return line;
}
