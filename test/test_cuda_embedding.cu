// Batches and the embedding on the device: the windows equal the host's, the sums are close to sums in double.
#include <algorithm>
#include <vector>

#include "../host/batch.h"
#include "../host/text.h"
#include "../kernels/batch.cuh"
#include "../kernels/embedding.cuh"
#include "../kernels/embedding.h"
#include "cuda.h"

namespace {

constexpr int vocabulary_size = 40000;  // the larger ids would be negative as int16_t

std::vector<uint16_t> some_tokens(size_t count) {
  std::vector<uint16_t> tokens(count);
  for (size_t i = 0; i < count; i++) tokens[i] = uint16_t(random4(1, 0, 0, i).word[0] % vocabulary_size);
  tokens[count / 2] = vocabulary_size - 1;
  return tokens;
}

// The tokens in a file, which the host's random_batch reads.
Tokens on_disk(const std::vector<uint16_t>& tokens) {
  std::vector<char32_t> characters(vocabulary_size);
  for (int i = 0; i < vocabulary_size; i++) characters[i] = char32_t(0x10000 + i);
  const Vocabulary vocabulary(characters);
  const std::string folder = test_folder();
  ShardWriter writer(folder, "train", tokens.size(), vocabulary);
  writer.write(tokens.data(), tokens.size());
  writer.finish();
  return Tokens(folder, "train", vocabulary);
}

// (rows) tokens. Half of them are token 1, as often as a space in a text; tokens from V * 3 / 4 on do not occur.
std::vector<int> uneven_tokens(int rows, int V) {
  std::vector<int> x(rows);
  for (int r = 0; r < rows; r++) {
    const Philox4 draw = random4(2, 0, 0, r);
    x[r] = draw.word[0] & 1 ? std::min(1, V - 1) : int(draw.word[1] % std::max(1, V * 3 / 4));
  }
  return x;
}

struct Shape {
  int B, T, C, V;
};

template <class Real>
void check_backward(const Shape& s) {
  const auto [B, T, C, V] = s;
  INFO("B " << B << ", T " << T << ", C " << C << ", V " << V);
  const int rows = B * T;
  const std::vector<int> tokens = uneven_tokens(rows, V);
  const std::vector<float> dout = noise(size_t(rows) * C, 1);
  std::vector<double> want_dwte(size_t(V) * C), want_dwpe(size_t(T) * C);
  embedding_backward(want_dwte.data(), want_dwpe.data(), rounded<Real>(dout).data(), tokens.data(), B, T, C);

  const DeviceArray<Real> dout_device(dout);
  std::vector<int> and_more = tokens;
  and_more.resize(rows + embedding_piece, 0);  // the kernel must not count tokens behind the last row
  const DeviceArray<int> x(and_more);
  std::vector<float> first_dwte, first_dwpe;
  for (int run = 0; run < 2; run++) {
    DeviceArray<float> dwte(want_dwte.size()), dwpe(want_dwpe.size()), partials(embedding_partials(B, T, C, V));
    embedding_backward(dwpe.data(), partials.data(), dout_device.data(), x.data(), B, T, C, V, nullptr);
    add_partials({embedding_sums(dwte.data(), partials.data(), B, T, C, V)}, nullptr);
    const std::vector<float> got_dwte = dwte.read(), got_dwpe = dwpe.read();
    partials.read();  // checks the guards
    if (run == 1) {
      CHECK((got_dwte == first_dwte));
      CHECK((got_dwpe == first_dwpe));
      continue;
    }
    first_dwte = got_dwte;
    first_dwpe = got_dwpe;
    // Float sums of at most `rows` terms.
    check_close(got_dwte, want_dwte, 4 * std::sqrt(rows) * 0x1p-24);
    check_close(got_dwpe, want_dwpe, 4 * std::sqrt(B) * 0x1p-24);
    // The gradient of a token that does not occur is exactly 0.
    for (int v = 0; v < V; v++)
      if (std::find(tokens.begin(), tokens.end(), v) == tokens.end())
        for (size_t i = size_t(v) * C; i < size_t(v + 1) * C; i++)
          if (got_dwte[i] != 0) FAIL_CHECK("token " << v << " has a gradient");
  }
}

}  // namespace

TEST_CASE("Random and shuffled batches on the device are the host's", "[cuda]") {
  const std::vector<uint16_t> tokens = some_tokens(1000);
  const Tokens text = on_disk(tokens);
  const DeviceArray<uint16_t> on_device(tokens);
  const int B = 5, step = 4711;
  const DeviceArray<int> step_on_device(std::vector<int>{step});
  const uint64_t seed = 0x123456789abcdef0, first_row = (uint64_t{1} << 33) + 3;
  for (const int T : {1, 31, 256, 700, 999}) {  // with T = 999 there is only one window
    INFO("T " << T);
    std::vector<int> want_x(B * T), want_y(B * T);
    for (const uint64_t rows_of_step : {0, 12}) {
      random_batch(want_x.data(), want_y.data(), text, seed, step, site::batch, first_row, B, T, rows_of_step);
      const DeviceArray<int> x(B * T), y(B * T);
      gather_random(x.data(), y.data(), on_device.data(), tokens.size(), seed, step_on_device.data(), site::batch,
                    first_row, B, T, nullptr, rows_of_step);
      CHECK((x.read() == want_x));
      CHECK((y.read() == want_y));
    }
  }
  const DeviceArray<int> x(1000), y(1000);
  CHECK_THROWS_AS(gather_random(x.data(), y.data(), on_device.data(), 1000, seed, step_on_device.data(), site::batch, 0,
                                1, 1000, nullptr),
                  std::invalid_argument);
}

TEST_CASE("Windows on the device begin where they are to", "[cuda]") {
  const std::vector<uint16_t> tokens = some_tokens(1000);
  const DeviceArray<uint16_t> on_device(tokens);
  struct Windows {
    int first, stride, B, T;
  };
  for (const Windows w : {Windows{0, 1, 1, 1},
                          {998, 1, 1, 1},
                          {7, 31, 3, 31},
                          {231, 256, 3, 256},
                          {7, 100, 9, 31},
                          {3, 311, 3, 300},
                          {5, 2, 4, 9}}) {
    const int count = w.B * w.T;
    const DeviceArray<int> x(count), y(count);
    gather_windows(x.data(), y.data(), on_device.data(), uint64_t(w.first), uint64_t(w.stride), w.B, w.T, nullptr);
    std::vector<int> want_x, want_y;
    for (int b = 0; b < w.B; b++)
      for (int t = 0; t < w.T; t++) {
        want_x.push_back(tokens[size_t(w.first + b * w.stride + t)]);
        want_y.push_back(tokens[size_t(w.first + b * w.stride + t + 1)]);
      }
    CHECK((x.read() == want_x));
    CHECK((y.read() == want_y));
  }
}

TEMPLATE_TEST_CASE("embedding forward on the device", "[cuda]", float, bf16, fp16) {
  using Real = TestType;
  for (const Shape s : {Shape{3, 31, 48, 65}, {2, 1, 16, 7}, {1, 9, 400, 65}, {9, 2, 8, 3}}) {
    const auto [B, T, C, V] = s;
    INFO("B " << B << ", T " << T << ", C " << C << ", V " << V);
    const std::vector<int> tokens = uneven_tokens(B * T, V);
    const std::vector<float> wte = noise(size_t(V) * C, 1), wpe = noise(size_t(T) * C, 2);
    std::vector<double> want(size_t(B) * T * C);
    embedding_forward(want.data(), tokens.data(), rounded<Real>(wte).data(), rounded<Real>(wpe).data(), B, T, C);
    const DeviceArray<Real> out(want.size()), wte_device(wte), wpe_device(wpe);
    const DeviceArray<int> x(tokens);
    embedding_forward(out.data(), x.data(), wte_device.data(), wpe_device.data(), B, T, C, nullptr);
    check_close(out.floats(), want, rounding_of<Real>);  // the sum is rounded once
  }
}

TEMPLATE_TEST_CASE("embedding backward on the device", "[cuda]", float, bf16, fp16) {
  // Less than a warp of rows; several segments of a piece; one segment of three pieces; two of two; one channel group.
  for (const Shape s : {Shape{3, 31, 48, 65},
                        {2, 1, 16, 7},
                        {11, 120, 48, 65},
                        {5, 206, 16, 520},
                        {140, 11, 16, 520},
                        {3, 5, 400, 9},
                        {2, 3, 2048, 5},
                        {1, 1, 8, 1}})
    check_backward<TestType>(s);
}

TEST_CASE("embedding backward on the device: every row of a segment is the same token", "[cuda]") {
  const int B = 2, T = 520, C = 16, V = 3;
  const std::vector<float> ones(size_t(B) * T * C, 1);
  const DeviceArray<float> dout(ones), dwte(V * C), dwpe(T * C), partials(embedding_partials(B, T, C, V));
  const DeviceArray<int> x(std::vector<int>(B * T, 2));
  embedding_backward(dwpe.data(), partials.data(), dout.data(), x.data(), B, T, C, V, nullptr);
  add_partials({embedding_sums(dwte.data(), partials.data(), B, T, C, V)}, nullptr);
  std::vector<float> want(V * C, 0);
  std::fill(want.end() - C, want.end(), float(B * T));
  CHECK((dwte.read() == want));
  CHECK((dwpe.read() == std::vector<float>(T * C, float(B))));
}

TEST_CASE("embedding backward on the device: its scratch memory is bounded", "[cuda]") {
  CHECK(embedding_segments(64 * 256, 65) == 32);  // the lecture's model
  for (const int rows : {1, 511, 512, 513, 16384, 100000})
    for (const int V : {1, 65, 256, 5000, 65535}) {
      CHECK(embedding_partials(rows, 1, 16, V) <= size_t(16) * std::max(rows, V));
      CHECK(embedding_segments(rows, V) * pieces_per_segment(rows, V) * embedding_piece >= rows);
    }
}

TEST_CASE("embedding on the device refuses channels that it cannot load", "[cuda]") {
  const DeviceArray<float> some(64);
  const DeviceArray<int> x(1);
  CHECK_THROWS_AS(embedding_forward(some.data(), x.data(), some.data(), some.data(), 1, 1, 12, nullptr),
                  std::invalid_argument);
  for (const int C : {12, 2056})
    CHECK_THROWS_AS(embedding_backward(some.data(), some.data(), some.data(), x.data(), 1, 1, C, 1, nullptr),
                    std::invalid_argument);
}
