// The head: logits (rows, V) = inp (rows, C) @ headw (V, C)^T + headb (V), a matrix product with V = 65 columns. A row
// of logits has Vp = 72 elements, and headw and headb have 72 rows, of which the last seven are zeros.
//
// It reads 12.6 MB, writes 2.4 MB and does 0.8 GFLOP. With tensor cores the bytes are the limit, 5 us. Without them it
// is the arithmetic, which takes the card's float units at least 16 us.
//
//   1  a thread has a logit          A warp's threads read 32 rows of headw, so each load touches 32 lines of memory.
//                                    There are two loads for each multiplication.
//   2  tiles in shared memory        A block loads 16 x 16 numbers of each operand at a time and uses each number 16
//                                    times. (The trainer uses this kernel where cuBLASLt has none. A second kernel adds
//                                    the bias.)
//   3  cuBLASLt, 65 columns          Tensor cores. But for 65 columns the library takes an old kernel, which loads one
//                                    number at a time (align1 in its name), although all rows begin at multiples of 16
//                                    bytes.
//   4  shipped: cuBLASLt, 72         The product includes the seven rows of zeros: 11 % more work. For 72 columns the
//      columns                       library takes a new kernel, whose tiles have exactly 72 columns.
#include <memory>
#include <optional>

#include "../../kernels/matmul.cuh"
#include "../../kernels/matmul.h"
#include "lab.cuh"

namespace {

// Launched with ceil(rows * V / 256) blocks of 256 threads.
//   logits (rows, Vp), of which the first V columns are written;  inp (rows, C), headw (Vp, C), headb (Vp)
__global__ void __launch_bounds__(256)
    head_1(bf16* logits, const bf16* inp, const bf16* headw, const bf16* headb, int rows, int C, int V, int Vp) {
  const int i = blockIdx.x * 256 + threadIdx.x, row = i / V, v = i % V;
  if (row >= rows) return;
  float sum = float(headb[v]);
  for (int c = 0; c < C; c++) sum += float(inp[size_t(row) * C + c]) * float(headw[size_t(v) * C + c]);
  logits[size_t(row) * Vp + v] = bf16(sum);
}

// x, filled up with zeros to `count` numbers.
std::vector<bf16> padded(const std::vector<float>& x, size_t count) {
  std::vector<bf16> out(x.begin(), x.end());
  out.resize(count, bf16(0.f));
  return out;
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int rows = s.rows(), C = s.C, V = s.V, Vp = padded_vocabulary(V);
  const size_t size = size_t(rows) * Vp;
  const lab::Array<bf16> inp = lab.noise<bf16>(size_t(rows) * C, 1, 1, true);
  const lab::Array<bf16> headw = lab.input(padded(noise(size_t(V) * C, 2), size_t(Vp) * C)),
                         headb = lab.input(padded(noise(V, 3), Vp));
  // Only the last version writes the padding, with zeros. So the padding begins as zeros, and the rest as NaN.
  std::vector<bf16> before(size);
  for (size_t i = 0; i < size; i++) before[i] = bf16(int(i % Vp) < V ? NAN : 0.f);
  const lab::Array<bf16> logits = lab.updated(before);
  if (lab.checks()) {
    std::vector<double> want(size);
    ::reference::matmul_forward(want.data(), inp.values().data(), headw.values().data(), headb.values().data(), rows, C,
                                Vp);
    // Two roundings, for versions that add the bias in a second pass, and the error of a float sum of C terms.
    logits.expect(want, 2 * rounding_of<bf16> + 4 * std::sqrt(C) * 0x1p-24);
  }
  lab.needs(2.0 * (double(rows) * C + double(V) * C + double(size)), 2.0 * rows * C * V);

  lab.version({1, "a thread has a logit", 1900}, [=](int set, cudaStream_t stream) {
    launch(head_1, {unsigned(ceil_div(rows * V, 256)), 256, 0, stream}, logits[set], inp[set], headw[set], headb[set],
           rows, C, V, Vp);
  });
  lab.version({2, "tiles in shared memory", 180}, [=](int set, cudaStream_t stream) {
    const Product product = {OperandType::bfloat16, false, true, false, V, rows, C, C, C, Vp};
    simple_product(product, {.d = logits[set], .a = headw[set], .b = inp[set]}, stream);
    bias_forward(logits[set], headb[set], rows, V, Vp, stream);
  });
  // The first version that runs opens the library. To list the versions we do not need it.
  const auto matmul = std::make_shared<std::optional<Matmul>>();
  const auto by_library = [=](int set, int columns, cudaStream_t stream) {
    if (!*matmul) matmul->emplace(false, stream);
    (*matmul)->forward(logits[set], inp[set], headw[set], headb[set], rows, C, columns, Vp);
  };
  lab.version({3, "cuBLASLt, 65 columns", 27}, [=](int set, cudaStream_t stream) { by_library(set, V, stream); });
  lab.version({4, "shipped: cuBLASLt, 72 columns", 9.5},
              [=](int set, cudaStream_t stream) { by_library(set, head_rows<bf16>(V), stream); });
}
const lab::Listed listed({"head", describe, {{3, 31, 48, 1, 65}, {1, 1, 8, 1, 65}, {1, 17, 40, 1, 16}}});

}  // namespace
