// Rectified linear unit, in place: after forward the tensor itself says which elements passed. matmul_forward and
// matmul_backward_input call it for each block that they have just written (matmul.h).
// defines: relu_forward, apply_relu, relu_backward, apply_relu_backward
#pragma once
#include <cstddef>

// x (count) = max(x, 0). What is not a number stays so, as in PyTorch: a mistake has to show.
template <class Real>
void relu_forward(Real* x, size_t count) {
  for (size_t i = 0; i < count; i++) x[i] = x[i] < 0 ? Real(0) : x[i];
}
template <class Real>
auto apply_relu(Real* x) {
  return [=](size_t first, size_t count) { relu_forward(x + first, count); };
}

// dx (count) = 0 where out is 0, else dx; out (count) is what forward left
template <class Real>
void relu_backward(Real* dx, const Real* out, size_t count) {
  for (size_t i = 0; i < count; i++) dx[i] = out[i] <= 0 ? Real(0) : dx[i];
}
template <class Real>
auto apply_relu_backward(Real* dx, const Real* out) {
  return [=](size_t first, size_t count) { relu_backward(dx + first, out + first, count); };
}
