#include "evaluation.h"

#include <cmath>
#include <cstdio>

#include "error.h"
#include "progress.h"
#include "signals.h"

// The mean loss of eval_iters random batches. done: how many batches the bar has counted so far.
static double random_loss(Scorer& model, Split split, const Config& config, int iteration, ProgressBar& bar,
                          uint64_t& done) {
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

double exact_loss(Scorer& model, Split split, uint64_t tokens, int batch_size) {
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

std::string fixed_name(uint64_t tokens, int T) {
  const uint64_t windows = fixed_windows(tokens, T);
  return windows == 0 ? "exact val loss" : text("val loss of ", windows, " fixed windows");
}

double fixed_loss(Scorer& model, Split split, uint64_t tokens, int batch_size) {
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

std::string loss_text(double val_exact) {
  char line[64];
  std::snprintf(line, sizeof line, "%.4f (%.3f bits per character)", val_exact, val_exact / std::log(2.0));
  return line;
}
