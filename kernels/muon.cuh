// The update of all parameters on the GPU: by AdamW (adamw.cuh) or, for the matrices inside the layers, by Muon (muon.h).
// A tensor's matrices, of all layers and heads, are worked on together, for a product of one of them would leave most of
// the card idle. The products are the library's, with operands of type Real; before and after them stand small kernels,
// which read and write the gradients, m and the parameters in float.
// defines: MuonAndAdamW
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "../host/tensors.h"
#include "../host/tree.h"
#include "adamw.cuh"
#include "block.cuh"
#include "matmul.cuh"
#include "muon_law.h"
#include "runtime.cuh"

// The matrices (rows, columns) of a tensor as they lie in a buffer of parameters: in a slice for each layer `parts` of them,
// one after the other, and `stride` elements from a slice to the next. The products see them as (n, k) with n <= k: a
// matrix with more rows than columns is transposed on its way there, and back.
struct MuonTensor {
  size_t offset, stride;
  int layers, parts, rows, columns;

  MuonTensor(const TensorSpec& spec, int matrices)
      : offset(spec.offset),
        stride(spec.stride),
        layers(spec.layers),
        parts(matrices),
        rows(int(spec.shape[0]) / matrices),
        columns(int(spec.shape[1])) {}
  int count() const { return layers * parts; }
  int n() const { return std::min(rows, columns); }
  int k() const { return std::max(rows, columns); }
  bool tall() const { return rows > columns; }
  __host__ __device__ size_t size() const { return size_t(rows) * columns; }
  __device__ size_t begin(int i) const { return offset + i / parts * stride + i % parts * size(); }  // of a matrix
};

constexpr int muon_partials = 32;  // sums of squares of a matrix, which are then added up
constexpr int muon_tile = 32;      // a block works on 32 x 32 elements of a matrix

// Launched with ceil(rows * columns / 1024) x count() blocks of 256 threads, each of which has four neighbouring elements.
//   grads (the layout's count) = momentum, as muon_momentum of muon.h;  m (own.count): updated
static __global__ void __launch_bounds__(256)
    muon_momentum_kernel(float* grads, float* m, MuonTensor t, size_t own_first, size_t own_count,
                         const TrainState* state) {
  wait_for_inputs();
  const size_t i = 4 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x), at = t.begin(int(blockIdx.y)) + i;
  if (i >= t.size() || at < own_first || at >= own_first + own_count || state->overflow) return;
  constexpr float beta = float(muon_beta), rest = float(1 - muon_beta);
  const float scale = state->gradient_scale;
  Four<float> gs = load4(grads + at), ms = load4(m + at - own_first);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float g = gs.v[j] * scale;
    ms.v[j] = beta * ms.v[j] + rest * g;
    gs.v[j] = beta * ms.v[j] + rest * g;
  }
  store4(grads + at, gs);
  store4(m + at - own_first, ms);
}

// Launched with muon_partials x count() blocks of 256 threads.
//   partials (count(), muon_partials) = sums of squares of pieces of each matrix in grads
static __global__ void __launch_bounds__(256) muon_squares_kernel(double* partials, const float* grads, MuonTensor t) {
  wait_for_inputs();
  const float* const matrix = grads + t.begin(int(blockIdx.y));
  double squares = 0;
  for (size_t i = 4 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x); i < t.size();
       i += 4 * size_t(gridDim.x) * blockDim.x) {
    const Four<float> g = load4(matrix + i);
#pragma unroll
    for (int j = 0; j < 4; j++) squares += double(g.v[j]) * double(g.v[j]);
  }
  squares = block_sum<256>(squares);
  if (threadIdx.x == 0) partials[blockIdx.y * gridDim.x + blockIdx.x] = squares;
}

// Calls store(j, load(i)) for the elements of a block's tile of a matrix (rows, columns), where i and j count elements row
// by row: of the matrix, and of the same or, if `transposed`, of its transpose (columns, rows). A warp has 32 neighbours
// along a row whenever it reads or writes; where it transposes, they change places in shared memory.
template <bool transposed, class Load, class Store>
__device__ inline void visit_tile(int rows, int columns, Load load, Store store) {
  __shared__ float tile[muon_tile][muon_tile + 1];  // one column more: its elements lie in different banks
  const int x = threadIdx.x % muon_tile, first_y = threadIdx.x / muon_tile;
  const int first_row = blockIdx.y * muon_tile, first_column = blockIdx.x * muon_tile;
  for (int y = first_y; y < muon_tile; y += 256 / muon_tile) {
    const int row = first_row + y, column = first_column + x;
    const bool inside = row < rows && column < columns;
    if constexpr (transposed)
      tile[y][x] = inside ? load(size_t(row) * columns + column) : 0;
    else if (inside)
      store(size_t(row) * columns + column, load(size_t(row) * columns + column));
  }
  if constexpr (transposed) {
    __syncthreads();
    for (int y = first_y; y < muon_tile; y += 256 / muon_tile) {
      const int row = first_row + x, column = first_column + y;
      if (row < rows && column < columns) store(size_t(column) * rows + row, tile[x][y]);
    }
  }
}

// Launched with ceil(columns / 32) x ceil(rows / 32) x count() blocks of 256 threads.
//   x (count(), n, k) = the matrices in grads, each divided by its norm;  partials: from muon_squares_kernel
template <class Real, bool transposed>
__global__ void __launch_bounds__(256)
    muon_normalize_kernel(Real* x, const float* grads, const double* partials, MuonTensor t) {
  wait_for_inputs();
  double squares = 0;
  for (int i = 0; i < muon_partials; i++) squares += partials[blockIdx.z * muon_partials + i];
  const float factor = float(1 / (sqrt(squares) + 1e-7));
  const float* const from = grads + t.begin(int(blockIdx.z));
  Real* const to = x + blockIdx.z * t.size();
  visit_tile<transposed>(
      t.rows, t.columns, [&](size_t i) { return from[i] * factor; }, [&](size_t i, float v) { to[i] = Real(v); });
}

// Launched with ceil(count / 256) blocks of 256 threads, one for each element of the matrices (count(), n, n).
//   squared = a 1 + b gram + c squared
template <class Real>
__global__ void __launch_bounds__(256) muon_polynomial_kernel(Real* squared, const Real* gram, int n, size_t count) {
  wait_for_inputs();
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x, in_matrix = i % (size_t(n) * n);
  if (i >= count) return;
  const float diagonal = in_matrix / n == in_matrix % n ? float(muon_a) : 0;
  squared[i] = Real(diagonal + float(muon_b) * float(gram[i]) + float(muon_c) * float(squared[i]));
}

// Launched with ceil(k / 32) x ceil(n / 32) x count() blocks of 256 threads.
//   params (the layout's count): updated by x (count(), n, k), as muon_update of muon.h;  working: likewise, or null
//   ring (ring_size): iteration i's row is i % ring_size
template <class Real, bool transposed>
__global__ void __launch_bounds__(256)
    muon_update_kernel(float* params, Real* working, const Real* x, MuonTensor t, float size, size_t own_first,
                       size_t own_count, const AdamWStep* ring, int ring_size, const TrainState* state) {
  wait_for_inputs();
  if (state->overflow) return;
  const AdamWStep step = ring[state->step % ring_size];
  const Real* const from = x + blockIdx.z * t.size();
  const size_t matrix = t.begin(int(blockIdx.z));
  const int n = min(t.rows, t.columns), k = max(t.rows, t.columns);
  visit_tile<transposed>(
      n, k, [&](size_t i) { return float(from[i]); },
      [&](size_t i, float v) {
        const size_t at = matrix + i;
        if (at < own_first || at >= own_first + own_count) return;
        const float p = params[at] * step.decay - step.learning_rate * size * v;
        params[at] = p;
        if (working) working[at] = Real(p);
      });
}

template <class Real>
class MuonAndAdamW {
 public:
  // own: which elements of the layout this rank updates. use_muon: false, AdamW updates all of them.
  MuonAndAdamW(const ModelShape& shape, const Part& own, bool use_muon) : own_(own) {
    const Layout layout = parameter_layout(shape);
    size_t end = 0;
    const auto rest_until = [&](size_t begin) {
      if (const Part part = common({end, begin - end}, own); part.count > 0) rest_.push_back(part);
    };
    for (const TensorSpec& spec : layout.tensors()) {
      const int matrices = use_muon ? hidden_matrices(spec, shape.NH) : 0;
      if (matrices == 0) continue;
      tensors_.emplace_back(spec, matrices);
      rest_until(spec.offset);
      end = spec.offset + spec.stride * size_t(spec.layers);
    }
    rest_until(layout.size());
    if (!use_muon) return;
    const Sizes sizes = sizes_of(tensors_);
    x_ = DeviceBuffer<Real>(2 * sizes.x, "Muon's matrices");
    gram_ = DeviceBuffer<Real>(2 * sizes.gram, "Muon's matrices");
    partials_ = DeviceBuffer<double>(sizes.count * muon_partials, "Muon's norms");
    x_size_ = sizes.x;
    gram_size_ = sizes.gram;
  }
  static double muon_bytes(const ModelShape& shape) {
    std::vector<MuonTensor> tensors;
    const Layout layout = parameter_layout(shape);
    for (const TensorSpec& spec : layout.tensors())
      if (const int matrices = hidden_matrices(spec, shape.NH)) tensors.emplace_back(spec, matrices);
    const Sizes sizes = sizes_of(tensors);
    return 2.0 * double(sizes.x + sizes.gram) * sizeof(Real);
  }

  // params, working, grads (the layout's count), m and v (own.count), as in adamw_update; grads is overwritten. cards: the
  // ranks, which need all of each matrix and so exchange their shares of the momenta.
  template <class Cards>
  void update(float* params, float* m, float* v, Real* working, float* grads, const Optimizer& o,
              const TrainState* state, Matmul& matmul, Cards& cards, cudaStream_t stream) {
    for (const MuonTensor& t : tensors_)
      launch(muon_momentum_kernel, {dim3(unsigned(ceil_div(t.size(), 1024)), unsigned(t.count())), 256, 0, stream},
             grads, m, t, own_.first, own_.count, state);
    if (!tensors_.empty()) cards.gather(grads, cards.shares(), stream);
    for (const MuonTensor& t : tensors_) update_matrices(params, working, grads, t, o, state, matmul, stream);
    for (const Part& part : rest_)
      adamw_update(params + part.first, m + part.first - own_.first, v + part.first - own_.first,
                   working ? working + part.first : nullptr, grads + part.first, part.count, o.beta1, o.beta2, o.eps,
                   o.ring, o.ring_size, state, stream);
  }

 private:
  struct Sizes {
    size_t x = 0, gram = 0, count = 0;  // elements, and matrices, of the largest tensor
  };
  static Sizes sizes_of(const std::vector<MuonTensor>& tensors) {
    Sizes sizes;
    for (const MuonTensor& t : tensors) {
      const size_t count = size_t(t.count()), n = size_t(t.n());
      sizes = {std::max(sizes.x, count * t.size()), std::max(sizes.gram, count * n * n), std::max(sizes.count, count)};
    }
    return sizes;
  }

  // The iteration of orthogonalize in muon.h, and the update, for one tensor. `gram` is A there; `squared` is A A, and then
  // the polynomial B.
  void update_matrices(float* params, Real* working, const float* grads, const MuonTensor& t, const Optimizer& o,
                       const TrainState* state, Matmul& matmul, cudaStream_t stream) {
    const int n = t.n(), k = t.k(), count = t.count();
    Real *x = x_.data(), *next = x + x_size_, *const gram = gram_.data(), *const squared = gram + gram_size_;
    const auto tiles = [&](int rows, int columns) {
      return dim3(ceil_div(columns, muon_tile), ceil_div(rows, muon_tile), count);
    };
    launch(muon_squares_kernel, {dim3(muon_partials, count), 256, 0, stream}, partials_.data(), grads, t);
    const auto normalize = t.tall() ? muon_normalize_kernel<Real, true> : muon_normalize_kernel<Real, false>;
    launch(normalize, {tiles(t.rows, t.columns), 256, 0, stream}, x, grads, partials_.data(), t);
    const size_t elements = size_t(count) * n * n;
    for (int round = 0; round < muon_rounds; round++) {
      matmul.gram(gram, x, n, k, count);
      matmul.square_times(squared, gram, gram, n, n, count);
      launch(muon_polynomial_kernel<Real>, {unsigned(ceil_div(elements, 256)), 256, 0, stream}, squared, gram, n,
             elements);
      matmul.square_times(next, squared, x, n, k, count);
      std::swap(x, next);
    }
    const auto update = t.tall() ? muon_update_kernel<Real, true> : muon_update_kernel<Real, false>;
    launch(update, {tiles(n, k), 256, 0, stream}, params, working, x, t, float(muon_size * std::sqrt(double(k))),
           own_.first, own_.count, o.ring, o.ring_size, state);
  }

  Part own_;
  std::vector<MuonTensor> tensors_;
  std::vector<Part> rest_;       // this rank's share of all else
  DeviceBuffer<Real> x_, gram_;  // two of each
  DeviceBuffer<double> partials_;
  size_t x_size_ = 0, gram_size_ = 0;
};
