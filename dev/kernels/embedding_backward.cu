// The embedding's gradient. Row v of dwte (V, C) is the sum of the rows of dout (B, T, C) at which token v stands. dwpe
// (T, C) is dout summed over B.
//
// It reads 12.6 MB, 4 us for the memory. But some tokens are more frequent than others. Here every eighth token is the
// same one, so one row of dwte is a sum of 2000 rows, and another is a sum of 100. No version adds with atomics: their
// order, and with it the rounding, changes from run to run, and two runs of the trainer must be equal bit for bit.
//
//   1  a thread has a channel        It goes through all rows, as the CPU does, and adds to memory. Only 384 threads
//                                    work, and each waits for one load after the other: the compiler cannot load the
//                                    next row before the sum is stored, because for all it knows the store changes
//                                    that row.
//   2  a thread has a channel of     320 times as many threads, and a sum stays in a register, so that loads can start
//      one token or position         early. But a token's threads look at all 16384 tokens, and most are not theirs.
//   3  a block has a token           A block looks at 512 tokens together, each warp at 32 of them at once, and lists
//                                    the rows to add. Its threads then load only those.
//   4  16 bytes at a time            48 threads share a row, so a block of 256 adds five rows at once, each with four
//                                    loads under way. This is the shipped kernel, with all rows in one segment.
//   5  the shipped kernels           In version 4 all wait for the block of the most frequent token. Now a block has a
//                                    token in one segment of 512 rows, and a second kernel adds up the segments.
#include "../../kernels/embedding.cuh"
#include "../../kernels/embedding.h"
#include "lab.cuh"

namespace {

// Launched with ceil(C / 128) blocks of 128 threads.
//   dwte (V, C) =, dwpe (T, C) =;  dout (B, T, C), x (B, T): the tokens
__global__ void __launch_bounds__(128)
    embedding_backward_1(float* dwte, float* dwpe, const bf16* dout, const int* x, int B, int T, int C, int V) {
  const int c = blockIdx.x * 128 + threadIdx.x;
  if (c >= C) return;
  for (int v = 0; v < V; v++) dwte[size_t(v) * C + c] = 0;
  for (int t = 0; t < T; t++) dwpe[size_t(t) * C + c] = 0;
  for (int row = 0; row < B * T; row++) {
    const float d = float(dout[size_t(row) * C + c]);
    dwte[size_t(x[row]) * C + c] += d;
    dwpe[size_t(row % T) * C + c] += d;
  }
}

// Launched with (ceil(C / 128), T + V) blocks of 128 threads: the first T have a position each, the others a token. The
// shapes are version 1's.
__global__ void __launch_bounds__(128)
    embedding_backward_2(float* dwte, float* dwpe, const bf16* dout, const int* x, int B, int T, int C) {
  const int c = blockIdx.x * 128 + threadIdx.x, token = int(blockIdx.y) - T;
  if (c >= C) return;
  float sum = 0;
  if (token < 0) {
    for (int row = blockIdx.y; row < B * T; row += T) sum += float(dout[size_t(row) * C + c]);
    dwpe[size_t(blockIdx.y) * C + c] = sum;
  } else {
    for (int row = 0; row < B * T; row++)
      if (x[row] == token) sum += float(dout[size_t(row) * C + c]);
    dwte[size_t(token) * C + c] = sum;
  }
}

// Launched with (ceil(C / 256), T + V) blocks of 256 threads, which rows_of_token needs. The rest is as in version 2.
__global__ void __launch_bounds__(embedding_threads)
    embedding_backward_3(float* dwte, float* dwpe, const bf16* dout, const int* x, int B, int T, int C) {
  __shared__ int list[embedding_piece];
  const int c = blockIdx.x * embedding_threads + threadIdx.x, token = int(blockIdx.y) - T, rows = B * T;
  float sum = 0;
  if (token < 0) {
    for (int row = blockIdx.y; row < rows && c < C; row += T) sum += float(dout[size_t(row) * C + c]);
    if (c < C) dwpe[size_t(blockIdx.y) * C + c] = sum;
    return;  // the whole block
  }
  for (int first = 0; first < rows; first += embedding_piece) {
    const int n = rows_of_token(list, x, token, first, min(rows, first + embedding_piece));  // all threads together
    for (int i = 0; i < n && c < C; i++) sum += float(dout[size_t(list[i]) * C + c]);
  }
  if (c < C) dwte[size_t(token) * C + c] = sum;
}

// (rows) tokens, of which some are as frequent as in a text: the first k tokens together have the share sqrt(k / V).
std::vector<int> uneven_tokens(int rows, int V) {
  std::vector<int> x(rows);
  for (int r = 0; r < rows; r++) {
    const double u = unit_open(random4(2, 0, 0, r).word[0]);
    x[r] = int(V * u * u);
  }
  return x;
}

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int B = s.B, T = s.T, C = s.C, V = s.V;
  const size_t count = size_t(s.rows()) * C;
  const std::vector<int> tokens = uneven_tokens(s.rows(), V);
  const lab::Array<bf16> dout = lab.noise<bf16>(count, 1, 1, true);
  const lab::Array<int> x = lab.input(tokens);
  const lab::Array<float> dwte = lab.output<float>(size_t(V) * C), dwpe = lab.output<float>(size_t(T) * C),
                          partials = lab.output<float>(embedding_partials(B, T, C, V));
  if (lab.checks()) {
    std::vector<double> want_dwte(size_t(V) * C, 0), want_dwpe(size_t(T) * C, 0);
    ::embedding_backward(want_dwte.data(), want_dwpe.data(), dout.values().data(), tokens.data(), B, T, C);
    const double tolerance = 4 * 0x1p-24;  // a bf16 has 8 bits, so float sums of thousands are hardly rounded
    dwte.expect(want_dwte, tolerance);
    dwpe.expect(want_dwpe, tolerance);
  }
  lab.needs(double(count) * sizeof(bf16) + 4.0 * s.rows() + 4.0 * (V + T) * C, 0);

  lab.version({1, "a thread has a channel", 9000}, [=](int set, cudaStream_t stream) {
    launch(embedding_backward_1, {unsigned(ceil_div(C, 128)), 128, 0, stream}, dwte[set], dwpe[set], dout[set], x[set],
           B, T, C, V);
  });
  lab.version({2, "a thread has a channel of one token", 500}, [=](int set, cudaStream_t stream) {
    launch(embedding_backward_2, {dim3(ceil_div(C, 128), T + V), 128, 0, stream}, dwte[set], dwpe[set], dout[set],
           x[set], B, T, C);
  });
  lab.version({3, "a block has a token", 250}, [=](int set, cudaStream_t stream) {
    launch(embedding_backward_3, {dim3(ceil_div(C, embedding_threads), T + V), embedding_threads, 0, stream}, dwte[set],
           dwpe[set], dout[set], x[set], B, T, C);
  });
  lab.version({4, "16 bytes at a time", 65}, [=](int set, cudaStream_t stream) {
    const int all_rows = ceil_div(s.rows(), embedding_piece) * embedding_piece;  // one segment: its partials are sums
    launch(embedding_backward_kernel<bf16>, {unsigned(T + V), embedding_threads, 0, stream}, dwpe[set], dwte[set],
           dout[set], x[set], all_rows, B, T, C, V);
  });
  lab.version({5, "shipped: a block has a token in a segment", 28}, [=](int set, cudaStream_t stream) {
    embedding_backward(dwpe[set], partials[set], dout[set], x[set], B, T, C, V, stream);
    add_partials({embedding_sums(dwte[set], partials[set], B, T, C, V)}, stream);
  });
}
const lab::Listed listed({"embedding_backward",
                          describe,
                          {{3, 31, 48, 1, 65}, {1, 1, 8, 1, 65}, {2, 33, 384, 1, 5}, {10, 111, 16, 1, 7}}});

}  // namespace
