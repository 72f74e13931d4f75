// How good a model is: the losses that decide which weights are the best, and the losses that a run reports.
// defines: Interrupted, evaluate, exact_loss, strided_loss, fixed_tokens, fixed_windows, fixed_name, fixed_loss, loss_text
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>

#include "metrics.h"
#include "trainer.h"

struct Interrupted {};  // thrown out of a long task when a signal came

// The mean losses of eval_iters random batches of either split, as the course estimates them.
EvalPoint evaluate(Scorer& model, const Config& config, int iteration);

// The mean loss of a whole split: every token but the first is scored once, in windows of T that do not overlap; the
// last window may be shorter. tokens: how many the split has.
double exact_loss(Scorer& model, Split split, uint64_t tokens, int batch_size);

// The same with windows that begin `stride` tokens apart, at most T. Each scores the tokens that the ones before it have not
// reached: after the first window the last `stride` ones, which have at least T - stride tokens before them. A short
// stride makes the same model look better, so a loss says little without it.
double strided_loss(Scorer& model, Split split, uint64_t tokens, int batch_size, int stride);

// The same tokens of the validation split decide every time which weights are the best, so that luck has no part in it.
// They are the whole split if it is short, like Tiny Shakespeare's with its 111,540 tokens; in a longer one they are
// windows that lie evenly over it. This bound says what is short, so that an evaluation takes no longer
// with a longer text. It is 64 batches of preset small and 8 of lecture, beside 40 and 400 random ones.
constexpr uint64_t fixed_tokens = 131'072;

// In how many windows of T the fixed tokens of a long split lie; 0: the split is short, and they are all of it.
inline uint64_t fixed_windows(uint64_t tokens, int T) {
  return tokens - 1 <= fixed_tokens ? 0 : std::max<uint64_t>(fixed_tokens / uint64_t(T), 1);
}
std::string fixed_name(uint64_t tokens, int T);  // "exact val loss", "val loss of 512 fixed windows"
double fixed_loss(Scorer& model, Split split, uint64_t tokens, int batch_size);

std::string loss_text(double val_exact);  // "1.5123 (2.182 bits per character)"
