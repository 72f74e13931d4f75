// Linear layer: out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC), its gradients, and ReLU in the same
// pass. The products are the library's (matmul_library.cuh), which stores matrices by columns: d (m, n) = op(a) @
// op(b). A matrix whose rows are ld elements apart is, read by columns, its transpose; so what it is asked for are our
// equations, transposed, with the same memory:
//
//                     d (m, n)                   op(a)                   op(b)                         k      vector
//   forward           out^T (OC, rows), ldo      weight (C, OC), T       inp^T (C, rows), N            C      bias (m)
//   backward_input    dinp^T (C, rows)           weight (C, OC), N       dout^T (OC, rows), ldd, N     OC
//   backward_weight   dweight^T (C, OC)          inp^T (C, rows), N      dout^T (OC, rows), ldd, T     rows   dbias (n)
//
// T: op transposes. A bias is added to d's columns, one element for each row. Its gradient has an element for each of
// d's columns: the sums of op(b), dout, over k. ReLU's mask has a bit for each element of forward's d, out^T, and is
// read where dinp^T has that shape.
// defines: Matmul, relu_mask_bytes, column_sums
#pragma once
#include <initializer_list>
#include <set>
#include <string>
#include <tuple>
#include <type_traits>

#include "device.cuh"
#include "launch.cuh"
#include "matmul_library.cuh"
#include "relu.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// The sums of a matrix' columns, a bias' gradient. A block takes 64 columns of one of several parts of the rows; a
// second kernel adds the parts. How the rows are divided depends on nothing but their number.

constexpr int column_sums_parts = 128;  // at most

template <class Real>
__global__ void __launch_bounds__(256)
    column_sums_kernel(float* parts, const Real* x, int rows, int OC, int ld, int rows_of_part) {
  __shared__ float of_warp[8][64];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane % 8 * 8;  // eight columns of every 32nd row
  const int block_column = blockIdx.x * 64;
  const int first = blockIdx.y * rows_of_part, last = first + rows_of_part < rows ? first + rows_of_part : rows;
  Float8 sum = {};
  if (block_column + c < OC) {
    x += block_column + c;
#pragma unroll 4
    for (int r = first + threadIdx.x / 8; r < last; r += 32) {
      const Float8 v = load8(x + size_t(r) * ld);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += v[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {  // a warp has four rows at a time
    sum[i] += __shfl_xor_sync(all_lanes, sum[i], 8);
    sum[i] += __shfl_xor_sync(all_lanes, sum[i], 16);
    if (lane < 8) of_warp[warp][c + i] = sum[i];
  }
  __syncthreads();
  const int column = block_column + threadIdx.x;
  if (threadIdx.x < 64 && column < OC) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < 8; w++) total += of_warp[w][threadIdx.x];
    parts[size_t(blockIdx.y) * OC + column] = total;
  }
}

static __global__ void __launch_bounds__(128)
    add_parts_kernel(float* sums, const float* parts, bool accumulate, int n_parts, int OC) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= OC) return;
  float total = 0;
#pragma unroll 8
  for (int i = 0; i < n_parts; i++) total += parts[size_t(i) * OC + c];
  sums[c] = accumulate ? sums[c] + total : total;
}

// sums (OC) = or += the sums over rows of x (rows, OC), a row of which is ld elements long; what is behind the first OC
// does not matter. parts (column_sums_parts, OC) is scratch.
template <class Real>
void column_sums(float* sums, float* parts, const Real* x, bool accumulate, int rows, int OC, int ld,
                 cudaStream_t stream) {
  require(rows > 0 && OC > 0, "column_sums: rows = ", rows, ", OC = ", OC);
  require(ld >= OC && ld % 8 == 0, "column_sums: rows of ", ld, " elements for OC = ", OC);
  const int rows_of_part = ceil_div(ceil_div(rows, column_sums_parts), 32) * 32;
  const int n_parts = ceil_div(rows, rows_of_part);
  launch(column_sums_kernel<Real>, {dim3(ceil_div(OC, 64), n_parts), 256, 0, stream}, parts, x, rows, OC, ld,
         rows_of_part);
  launch(add_parts_kernel, {unsigned(ceil_div(OC, 128)), 128, 0, stream}, sums, parts, accumulate, n_parts, OC);
}

// ---------------------------------------------------------------------------------------------------------------------

// Bytes of the mask that forward_relu leaves for backward_input_relu.
constexpr size_t relu_mask_bytes(int rows, int OC) { return size_t(rows) * mask_stride(OC) / 8; }

// The products of one stream. The first time that a function is called with new shapes it chooses an algorithm, which
// takes a while and may not happen while a graph is captured; from then on it only launches. All pointers are aligned
// to 16 bytes; C and the lengths of rows are multiples of 8.
class Matmul {
 public:
  static constexpr size_t workspace_bytes = MatmulLibrary::workspace_bytes;

  // tf32: products of floats take 10 bits of their mantissas. fuse = false: bias and ReLU get passes of their own, as
  // where the library has no algorithm that includes them.
  Matmul(bool tf32, cudaStream_t stream, bool fuse = true)
      : tf32_(tf32), fuse_(fuse), stream_(stream), library_(stream) {}

  // out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC); no bias: nullptr. A row of out is ldo elements long,
  // what is behind the first OC is left alone.
  template <class Real>
  void forward(Real* out, const Real* inp, const Real* weight, const std::type_identity_t<Real>* bias, int rows, int C,
               int OC, int ldo) {
    check("forward", {out, inp, weight, bias}, rows, C, OC, ldo);
    const Product p = {operand<Real>(), false, true, false, OC, rows, C, C, C, ldo};
    const Operands o = {.d = out, .a = weight, .b = inp, .bias = bias};
    if (!bias) return library_.multiply(p, o);
    run(p.with(Epilogue::bias), o, [&] {
      library_.multiply(p, o);
      bias_forward(out, bias, rows, OC, ldo, stream_);
    });
  }

  // out (rows, OC) = max(inp (rows, C) @ weight (OC, C)^T + bias (OC), 0). mask (relu_mask_bytes(rows, OC)) is for
  // backward_input_relu; nullptr: there will be none.
  template <class Real>
  void forward_relu(Real* out, unsigned char* mask, const Real* inp, const Real* weight, const Real* bias, int rows,
                    int C, int OC) {
    check("forward_relu", {out, mask, inp, weight, bias}, rows, C, OC, OC);
    const Product p = {operand<Real>(), false, true, false, OC, rows, C, C, C, OC};
    const Operands o = {.d = out, .a = weight, .b = inp, .bias = bias, .mask = mask};
    const bool fused = run(p.with(mask ? Epilogue::relu_mask : Epilogue::relu), o, [&] {
      library_.multiply(p, o);
      bias_relu_forward(out, bias, rows, OC, OC, stream_);
    });
    if (mask && fused) masks_.insert({p.type, rows, OC});
  }

  // dinp (rows, C) = dout (rows, OC) @ weight (OC, C); a row of dout is ldd elements long
  template <class Real>
  void backward_input(Real* dinp, const Real* dout, const Real* weight, int rows, int C, int OC, int ldd) {
    check("backward_input", {dinp, dout, weight}, rows, C, OC, ldd);
    library_.multiply({operand<Real>(), false, false, false, C, rows, OC, C, ldd, C},
                      {.d = dinp, .a = weight, .b = dout});
  }

  // dinp (rows, C) = dout (rows, OC) @ weight (OC, C) where the input passed its ReLU, else 0. mask and relu_out
  // (rows, C) are what this object's forward_relu left; which of them is read depends on what the library offers.
  template <class Real>
  void backward_input_relu(Real* dinp, const Real* dout, const Real* weight, const unsigned char* mask,
                           const Real* relu_out, int rows, int C, int OC) {
    check("backward_input_relu", {dinp, dout, weight, mask, relu_out}, rows, C, OC, OC);
    const Product p = {operand<Real>(), false, false, false, C, rows, OC, C, OC, C};
    const Operands o = {.d = dinp, .a = weight, .b = dout, .mask = const_cast<unsigned char*>(mask)};
    const auto unfused = [&] {
      library_.multiply(p, o);
      relu_backward(dinp, relu_out, size_t(rows) * C, stream_);
    };
    if (masks_.count({p.type, rows, C}))
      run(p.with(Epilogue::drelu), o, unfused);
    else
      unfused();
  }

  // dweight (OC, C) = or += dout (rows, OC)^T @ inp (rows, C);  dbias (OC) = or += column sums of dout, not wanted:
  // nullptr. A row of dout is ldd elements long.
  template <class Real>
  void backward_weight(float* dweight, float* dbias, const Real* dout, const Real* inp, bool accumulate, int rows,
                       int C, int OC, int ldd) {
    check("backward_weight", {dweight, dbias, dout, inp}, rows, C, OC, ldd);
    const Product p = {operand<Real>(), true, false, true, C, OC, rows, C, ldd, C};
    const Operands o = {.d = dweight, .a = inp, .b = dout, .accumulate = accumulate, .dbias = dbias};
    if (!dbias) return library_.multiply(p, o);
    require(sizeof(float) * column_sums_parts * OC <= workspace_bytes, "backward_weight: OC = ", OC, " is too large");
    const auto unfused = [&] {
      library_.multiply(p, o);
      column_sums(dbias, library_.workspace(), dout, accumulate, rows, OC, ldd, stream_);
    };
    if (accumulate)
      unfused();  // the library would overwrite dbias
    else
      run(p.with(Epilogue::bias_grad), o, unfused);
  }

  // The algorithms chosen so far, as text for a file, and back. The table of another card or of another version of the
  // library, and a damaged one, is ignored.
  std::string save_table() { return library_.table().save(); }
  void load_table(const std::string& text) { library_.table().load(text); }
  // Card, library, and a digest of the algorithms used so far: with the same name, the same bits.
  std::string name() { return library_.table().name(); }

  // TFLOP/s of a large product; 0 if that cannot be said
  template <class Real>
  double measure_peak() {
    return library_.measure_peak<Real>(operand<Real>());
  }

 private:
  template <class Real>
  OperandType operand() const {
    if constexpr (std::is_same_v<Real, float>)
      return tf32_ ? OperandType::tf32 : OperandType::float32;
    else
      return std::is_same_v<Real, bf16> ? OperandType::bfloat16 : OperandType::float16;
  }
  static void check(const char* name, std::initializer_list<const void*> pointers, int rows, int C, int OC, int ld) {
    require(rows > 0 && C > 0 && C % 8 == 0 && OC > 0, name, ": rows = ", rows, ", C = ", C, ", OC = ", OC);
    require(ld >= OC && ld % 8 == 0, name, ": rows of ", ld, " elements for OC = ", OC);
    for (const void* p : pointers)
      require(reinterpret_cast<uintptr_t>(p) % 16 == 0, name, ": ", p, " is not aligned to 16 bytes");
  }
  // The product with its epilogue, or else `unfused`; returns whether it was the former.
  template <class Unfused>
  bool run(const Product& p, const Operands& o, Unfused unfused) {
    if (fuse_ && library_.fuses(p, o, unfused)) {
      library_.multiply(p, o);
      return true;
    }
    unfused();
    return false;
  }

  bool tf32_, fuse_;
  cudaStream_t stream_;
  MatmulLibrary library_;
  std::set<std::tuple<OperandType, int, int>> masks_;  // (rows, OC) for which forward_relu writes a mask
};
