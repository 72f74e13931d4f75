// AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, in PyTorch's form: the
// decay is applied to every parameter, and eps is added after the bias-corrected root.
// defines: AdamW, adamw_update, gradient_norm_squared, norm_block, norm_squares, clip_scale
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <vector>

#include "../host/tensors.h"
#include "../host/tree.h"
#include "simd.h"

struct AdamW {
  double learning_rate, beta1, beta2, eps, weight_decay;
  int step;               // counted from 1
  double gradient_scale;  // what every gradient is multiplied by, for clipping; 1 if nothing is clipped
};

// Updates params (count), m (count) and v (count) from grads (count).
template <class Real>
void adamw_update(Real* params, Real* m, Real* v, const Real* grads, size_t count, const AdamW& o) {
  const Real beta1 = Real(o.beta1), beta2 = Real(o.beta2), rest1 = Real(1 - o.beta1), rest2 = Real(1 - o.beta2);
  const Real decay = Real(1 - o.learning_rate * o.weight_decay), eps = Real(o.eps), scale = Real(o.gradient_scale);
  const Real step_size = Real(o.learning_rate / (1 - std::pow(o.beta1, o.step)));
  const Real root_correction = Real(1 / std::sqrt(1 - std::pow(o.beta2, o.step)));
#pragma omp parallel for simd schedule(static) if (parallel : count > worth_threads)
  for (size_t i = 0; i < count; i++) {
    const Real g = grads[i] * scale;
    m[i] = beta1 * m[i] + rest1 * g;
    v[i] = beta2 * v[i] + rest2 * g * g;
    params[i] = params[i] * decay - step_size * m[i] / (std::sqrt(v[i]) * root_correction + eps);
  }
}

// The sum of the squares of grads (count), in double.
template <class Real>
double gradient_norm_squared(const Real* grads, size_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (size_t i = 0; i < count; i++) sum += double(grads[i]) * double(grads[i]);
  return sum;
}

// The squares of gradients are summed in blocks of so many numbers of the buffer, and then block by block. So the sum has
// the same order wherever the blocks are computed.
constexpr size_t norm_block = 4096;

// For each block of a buffer of this layout, the sum of the squares of grads in it; 0 for blocks outside of `part`, which
// begins and ends with whole blocks. The gaps between tensors are left out.
template <class Real>
std::vector<double> norm_squares(const Real* grads, const Layout& layout, const Part& part) {
  std::vector<double> squares((layout.size() + norm_block - 1) / norm_block);
  for (const TensorSpec& spec : layout.tensors())
    for (int l = 0; l < spec.layers; l++) {
      const size_t begin = spec.offset + size_t(l) * spec.stride;
      const size_t end = std::min(begin + spec.slice, part.first + part.count);
      for (size_t at = std::max(begin, part.first); at < end;) {
        const size_t block = at / norm_block, next = std::min((block + 1) * norm_block, end);
        squares[block] += gradient_norm_squared(grads + at, next - at);
        at = next;
      }
    }
  return squares;
}

// The factor that shrinks gradients, of which these are the sums of squares, to a norm of grad_clip; 1 if their norm is no
// larger. Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013, algorithm 1.
inline double clip_scale(const std::vector<double>& squares, double grad_clip) {
  const double norm = std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0));
  return norm > grad_clip ? grad_clip / norm : 1;
}

// The same for all gradients in a buffer of this layout; grad_clip 0: 1.
template <class Real>
double clip_scale(const Real* grads, const Layout& layout, double grad_clip) {
  return grad_clip > 0 ? clip_scale(norm_squares(grads, layout, {0, layout.size()}), grad_clip) : 1;
}
