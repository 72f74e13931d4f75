// The learning rate by step: it rises along a straight line for warmup_iters. Then it stays, or it falls along half a cosine
// or a straight line to min_lr, where it stays.
//   Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, equation 5, without restarts;
//   Bergsma et al., "Straight to Zero: Why Linearly Decaying the Learning Rate to Zero Works Best for LLMs", 2025.
// defines: learning_rate_at
#pragma once
#include <cmath>

#include "config.h"

inline double learning_rate_at(const Config& c, int iteration) {
  if (iteration < c.warmup_iters) return c.learning_rate * (iteration + 1) / (c.warmup_iters + 1);
  if (!c.decay_lr) return c.learning_rate;
  const int end = c.lr_decay_iters ? c.lr_decay_iters : c.max_iters;
  if (iteration >= end) return c.min_lr;
  const double share = double(iteration - c.warmup_iters) / (end - c.warmup_iters);
  const double left = c.lr_decay == "linear" ? 1 - share : 0.5 * (1 + std::cos(M_PI * share));
  return c.min_lr + left * (c.learning_rate - c.min_lr);
}
