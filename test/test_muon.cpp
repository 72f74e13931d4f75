// kernels/muon.h: what orthogonalize makes of a matrix, by plain loops and by what must hold of singular values.
#include "../kernels/muon.h"

#include "../host/random.h"
#include "test.h"

namespace {

std::vector<double> random_matrix(int rows, int columns, uint32_t which = 0) {
  std::vector<double> x;
  for (size_t i = 0; i < size_t(rows) * columns; i++) {
    double normal[4];
    normal4(normal, random4(9, which, uint32_t(rows), i));
    x.push_back(normal[0]);
  }
  return x;
}

std::vector<double> transposed(const std::vector<double>& x, int rows, int columns) {
  std::vector<double> out(x.size());
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) out[size_t(c) * rows + r] = x[size_t(r) * columns + c];
  return out;
}

// One that has these singular values: the rows of q are orthogonal, by Gram and Schmidt.
std::vector<double> with_singular_values(const std::vector<double>& s, int columns, uint32_t which) {
  std::vector<double> q = random_matrix(int(s.size()), columns, which);
  for (size_t r = 0; r < s.size(); r++) {
    double* const row = &q[r * columns];
    for (size_t before = 0; before < r; before++) {
      double dot = 0, norm = 0;
      for (int c = 0; c < columns; c++) {
        dot += row[c] * q[before * columns + c];
        norm += q[before * columns + c] * q[before * columns + c];
      }
      for (int c = 0; c < columns; c++) row[c] -= dot / norm * q[before * columns + c];
    }
    double norm = 0;
    for (int c = 0; c < columns; c++) norm += row[c] * row[c];
    for (int c = 0; c < columns; c++) row[c] *= s[r] / std::sqrt(norm);
  }
  return q;
}

}  // namespace

TEST_CASE("Muon: all singular values become about one, and their directions stay", "[muon]") {
  const std::vector<double> values = {1, 0.5, 0.3, 0.1, 0.03, 0.02};
  std::vector<double> x = with_singular_values(values, 31, 3), before = x;
  orthogonalize<double>(x.data(), 6, 31);
  // Row r was s u^T; it is s' u^T now, with s' near 1.
  for (int r = 0; r < 6; r++) {
    const double factor = x[size_t(r) * 31] / before[size_t(r) * 31], now = factor * values[size_t(r)];
    CHECK(now > 0.65);
    CHECK(now < 1.2);
    for (int c = 0; c < 31; c++)
      CHECK(x[size_t(r) * 31 + c] == Approx(factor * before[size_t(r) * 31 + c]).margin(1e-9));
  }
}

TEST_CASE("Muon: orthogonalize computes what the plain loops compute", "[muon]") {
  const std::pair<int, int> shapes[] = {{1, 1},   {1, 9},   {9, 1},   {5, 7},    {7, 5},
                                        {16, 16}, {65, 31}, {31, 65}, {48, 192}, {144, 48}};
  for (const auto& [rows, columns] : shapes) {
    INFO(rows << " x " << columns);
    std::vector<double> x = random_matrix(rows, columns), want = x;
    std::vector<float> single(x.begin(), x.end());
    reference::orthogonalize(want.data(), rows, columns);
    orthogonalize<double>(x.data(), rows, columns);
    check_close(x, want, 1e-10);
    // In float the iteration multiplies errors in the smallest singular values by as much as the values themselves.
    orthogonalize<float>(single.data(), rows, columns);
    check_close(single, want, 2e-3);

    std::vector<double> other = transposed(random_matrix(rows, columns), rows, columns);
    orthogonalize<double>(other.data(), columns, rows);
    check_close(transposed(other, columns, rows), want, 1e-10);
  }
}

// The upper half of the result is a copy of the lower one.
TEMPLATE_TEST_CASE("A symmetric product has the bits of the whole product", "[muon]", double, float, bfloat16) {
  using Real = Sum<TestType>;
  for (const int N : {1, 5, 16, 31, 48, 65, 130, 200})
    for (const int K : {1, 7, 96, 500}) {
      INFO("N " << N << ", K " << K);
      const std::vector<double> numbers = random_matrix(N, K);
      const std::vector<Real> x(numbers.begin(), numbers.end());
      const size_t n = size_t(N), k = size_t(K);
      const product::View<Real> rows = {x.data(), k, 1}, columns = {x.data(), 1, k};  // x (N, K), and its transpose
      const product::View<Real> tall = {x.data(), 1, n}, wide = {x.data(), n, 1};     // x seen as (K, N)
      for (const auto& [a, b] : {std::pair{rows, columns}, {tall, wide}}) {
        std::vector<Real> want(n * n), got(n * n, NAN);
        product::multiply<TestType>(want.data(), {}, a, b, N, N, K);
        product::multiply_symmetric<TestType>(got.data(), a, b, N, K);
        CHECK((got == want));
        // A symmetric matrix times itself.
        std::vector<Real> want2(n * n), got2(n * n, NAN);
        product::multiply<TestType>(want2.data(), {}, {want.data(), n, 1}, {want.data(), n, 1}, N, N, N);
        product::multiply_symmetric<TestType>(got2.data(), {want.data(), n, 1}, {want.data(), n, 1}, N, N);
        CHECK((got2 == want2));
      }
    }
}

TEST_CASE("Muon: no gradient, no update; the gradient's size does not matter", "[muon]") {
  std::vector<float> zero(12, 0.f);
  orthogonalize<float>(zero.data(), 3, 4);
  CHECK(zero == std::vector<float>(12, 0.f));
  std::vector<double> x = random_matrix(6, 8), larger = x;
  for (double& element : larger) element *= 1e6;
  orthogonalize<double>(x.data(), 6, 8);
  orthogonalize<double>(larger.data(), 6, 8);
  check_close(larger, x, 1e-6);
}

TEST_CASE("Muon: momentum and update, by hand", "[muon]") {
  const Muon o = {0.5, 0.1, 2};
  std::vector<double> grads = {1, -3}, m = {10, 20};
  muon_momentum(grads.data(), m.data(), 2, o);
  CHECK(m[0] == Approx(0.95 * 10 + 0.05 * 2));
  CHECK(m[1] == Approx(0.95 * 20 - 0.05 * 6));
  CHECK(grads[0] == Approx(0.95 * m[0] + 0.05 * 2));
  CHECK(grads[1] == Approx(0.95 * m[1] - 0.05 * 6));
  std::vector<double> params = {1, 2};
  const double x[] = {0.25, -0.5};
  muon_update(params.data(), x, 2, 4, 9, o);
  CHECK(params[0] == Approx(0.95 - 0.5 * 0.2 * 3 * 0.25));
  CHECK(params[1] == Approx(1.9 + 0.5 * 0.2 * 3 * 0.5));
}
