// AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, in PyTorch's form: the
// decay is applied to every parameter, and eps is added after the bias-corrected root.
// defines: AdamW, adamw_update, gradient_norm_squared, clip_scale
#pragma once
#include <cmath>
#include <cstddef>

#include "../host/tensors.h"
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

// The factor that shrinks the gradients in a buffer of this layout to a norm of grad_clip; 1 if their norm is no
// larger, or if grad_clip is 0. Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks",
// 2013, algorithm 1.
template <class Real>
double clip_scale(const Real* grads, const Layout& layout, double grad_clip) {
  if (grad_clip <= 0) return 1;
  double squares = 0;  // one sum for each tensor and layer, added in this order
  for (const TensorSpec& spec : layout.tensors())
    for (int l = 0; l < spec.layers; l++)
      squares += gradient_norm_squared(grads + spec.offset + l * spec.stride, spec.slice);
  const double norm = std::sqrt(squares);
  return norm > grad_clip ? grad_clip / norm : 1;
}
