// Rectified linear unit, in place: after forward, the tensor itself says which elements passed. matmul_forward and
// matmul_backward_input call it for each block that they have just written (matmul.h).
// defines: relu_forward, apply_relu, relu_backward, apply_relu_backward
#pragma once
#include <cstddef>

// x (count) = max(x, 0). NaN stays NaN, as in PyTorch, so that mistakes show.
template <class Real>
void relu_forward(Real* x, size_t count) {
  for (size_t i = 0; i < count; i++) x[i] = x[i] < 0 ? Real(0) : x[i];
}
// The same as a product's `after`, for its result x.
template <class Real>
auto apply_relu(Real* x) {
  return [=](size_t first, size_t count) { relu_forward(x + first, count); };
}

// dx (count) becomes 0 where out (count), forward's result, is 0.
template <class Real>
void relu_backward(Real* dx, const Real* out, size_t count) {
  for (size_t i = 0; i < count; i++) dx[i] = out[i] <= 0 ? Real(0) : dx[i];
}
// The same as a product's `after`, for its result dx.
template <class Real>
auto apply_relu_backward(Real* dx, const Real* out) {
  return [=](size_t first, size_t count) { relu_backward(dx + first, out + first, count); };
}
