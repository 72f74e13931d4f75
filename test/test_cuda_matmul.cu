#include <array>
#include <limits>
#include <stdexcept>

#include "../kernels/matmul.cuh"
#include "../kernels/matmul.h"
#include "../kernels/relu.h"
#include "cuda.h"

namespace {

constexpr float nan_float = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int rows, C, OC, ld;  // ld: of the matrix with OC columns
};
// V = 65 in rows of 72; one row; more columns than a block has and than the mask's rows of 128 bits
const Shape shapes[] = {{31, 48, 65, 72}, {1, 16, 65, 72}, {70, 32, 136, 136}, {40, 264, 48, 64}};

// The result, a float sum of K products, is rounded once, and again if a bias is added afterwards.
template <class Real>
double tolerance(int K, int roundings = 1) {
  return roundings * rounding_of<Real> + 4 * std::sqrt(double(K)) * 0x1p-24;
}

// (rows, columns) -> (rows, ld), with NaN in the padding
std::vector<float> with_padding(const std::vector<float>& x, int rows, int columns, int ld) {
  std::vector<float> out(size_t(rows) * ld, nan_float);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) out[size_t(r) * ld + c] = x[size_t(r) * columns + c];
  return out;
}
// (rows, ld) -> (rows, columns); checks that nobody has written the padding.
template <class Real>
std::vector<float> without_padding(const DeviceArray<Real>& from, int rows, int columns, int ld) {
  const std::vector<Real> x = from.read();
  std::vector<float> out;
  size_t overwritten = 0;
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < ld; c++) {
      const Real& element = x[size_t(r) * ld + c];
      if (c < columns) {
        out.push_back(float(element));
        continue;
      }
      unsigned char bytes[sizeof(Real)];
      std::memcpy(bytes, &element, sizeof(Real));
      for (const unsigned char byte : bytes) overwritten += byte != 0xff;
    }
  CHECK(overwritten == 0);
  return out;
}

// A layer and its gradients, in double, from numbers rounded to Real.
template <class Real>
struct Layer {
  int rows, C, OC;
  std::vector<float> inp, weight, bias, dout;
  explicit Layer(const Shape& s)
      : rows(s.rows),
        C(s.C),
        OC(s.OC),
        inp(noise(size_t(rows) * C, 1)),
        weight(noise(size_t(OC) * C, 2, 0.3)),
        bias(noise(OC, 3, 2)),
        dout(noise(size_t(rows) * OC, 4, 0.1)) {}

  std::vector<double> forward(bool with_bias) const {
    std::vector<double> out(size_t(rows) * OC);
    matmul_forward(out.data(), rounded<Real>(inp).data(), rounded<Real>(weight).data(),
                   with_bias ? rounded<Real>(bias).data() : nullptr, rows, C, OC);
    return out;
  }
  struct Gradients {
    std::vector<double> dinp, dweight;
  };
  Gradients backward() const {
    Gradients g = {std::vector<double>(size_t(rows) * C), std::vector<double>(size_t(OC) * C)};
    matmul_backward(g.dinp.data(), g.dweight.data(), static_cast<double*>(nullptr), rounded<Real>(dout).data(),
                    rounded<Real>(inp).data(), rounded<Real>(weight).data(), rows, C, OC);
    return g;
  }
};

template <class Real>
constexpr const char* name_of = "float32";
template <>
constexpr const char* name_of<bf16> = "bfloat16";
template <>
constexpr const char* name_of<fp16> = "float16";

template <class Real>
bool same_bits(const std::vector<Real>& a, const std::vector<Real>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Real)) == 0;
}

}  // namespace

TEMPLATE_TEST_CASE("matmul forward on the GPU agrees with the CPU's", "[cuda][matmul]", float, bf16, fp16) {
  using Real = TestType;
  const bool fuse = GENERATE(true, false);
  Matmul matmul(false, nullptr, fuse);
  for (const Shape& s : shapes) {
    const Layer<Real> layer(s);
    const DeviceArray<Real> inp(layer.inp), weight(layer.weight), bias(layer.bias);
    for (const bool with_bias : {true, false}) {
      CAPTURE(fuse, with_bias, s.rows, s.C, s.OC);
      std::vector<float> first;
      for (int run = 0; run < 2; run++) {
        const DeviceArray<Real> out(size_t(s.rows) * s.ld);
        matmul.forward(out.data(), inp.data(), weight.data(), with_bias ? bias.data() : nullptr, s.rows, s.C, s.OC,
                       s.ld);
        const std::vector<float> got = without_padding(out, s.rows, s.OC, s.ld);
        if (run == 0)
          check_close(first = got, layer.forward(with_bias), tolerance<Real>(s.C, 3));
        else
          CHECK(same_bits(got, first));
      }
    }
  }
}

TEMPLATE_TEST_CASE("matmul keeps a window's bits, however many windows there are", "[cuda][matmul]", float, bf16,
                   fp16) {
  using Real = TestType;
  const bool fuse = GENERATE(true, false);
  Matmul matmul(false, nullptr, fuse);
  constexpr int windows = 3;
  for (const int rows : {1, 31, 256})
    for (const Shape& s : {Shape{rows, 384, 65, 72}, Shape{rows, 128, 384, 384}}) {
      const Layer<Real> layer({windows * rows, s.C, s.OC, s.ld});
      const DeviceArray<Real> inp(layer.inp), weight(layer.weight), bias(layer.bias);
      const DeviceArray<Real> alone(size_t(windows * rows) * s.ld), together(size_t(windows * rows) * s.ld);
      const auto check = [&](auto compute) {
        for (int k = 0; k < windows; k++)
          compute(alone.data() + size_t(k * rows) * s.ld, inp.data() + size_t(k * rows) * s.C, rows);
        matmul.keep_windows(rows);
        compute(together.data(), inp.data(), windows * rows);
        matmul.keep_windows(0);
        CHECK(same_bits(alone.read(), together.read()));
      };
      CAPTURE(fuse, rows, s.C, s.OC);
      for (const bool with_bias : {true, false})
        check([&](Real* out, const Real* in, int n) {
          matmul.forward(out, in, weight.data(), with_bias ? bias.data() : nullptr, n, s.C, s.OC, s.ld);
        });
      if (s.OC == s.ld)
        check([&](Real* out, const Real* in, int n) {
          matmul.forward_relu(out, nullptr, in, weight.data(), bias.data(), n, s.C, s.OC);
        });
      const std::vector<float> got = without_padding(together, windows * rows, s.OC, s.ld);
      CHECK(std::all_of(got.begin(), got.end(), [](float x) { return std::isfinite(x); }));
    }
}

TEST_CASE("matmul with tf32 takes ten bits of its operands", "[cuda][matmul]") {
  const Shape s = {64, 128, 64, 64};
  const Layer<float> layer(s);
  const DeviceArray<float> inp(layer.inp), weight(layer.weight), out(size_t(s.rows) * s.OC);
  Matmul matmul(true, nullptr);
  matmul.forward(out.data(), inp.data(), weight.data(), nullptr, s.rows, s.C, s.OC, s.OC);
  check_close(out.read(), layer.forward(false), 0x1p-8);  // TF32 rounds each factor by up to 2^-11 of itself
}

TEMPLATE_TEST_CASE("matmul with ReLU, forward and backward, agrees with the CPU's", "[cuda][matmul]", float, bf16,
                   fp16) {
  using Real = TestType;
  const bool fuse = GENERATE(true, false), use_mask = GENERATE(true, false);
  // The hidden layer is the output of one product and the input of the next one.
  const Shape s = GENERATE(Shape{31, 48, 136, 136}, Shape{1, 16, 64, 64}, Shape{300, 32, 128, 128});
  const int rows = s.rows, C = s.C, hidden = s.OC;
  CAPTURE(fuse, use_mask, rows, C, hidden);
  const Layer<Real> layer(s);
  std::vector<double> want = layer.forward(true);
  relu_forward(want.data(), want.size());

  const DeviceArray<Real> inp(layer.inp), weight(layer.weight), bias(layer.bias);
  const DeviceArray<Real> out(want.size()), evaluated(want.size());
  const DeviceArray<unsigned char> mask(relu_mask_bytes(rows, hidden));
  Matmul matmul(false, nullptr, fuse);
  matmul.use_relu_mask(use_mask);
  matmul.forward_relu(out.data(), mask.data(), inp.data(), weight.data(), bias.data(), rows, C, hidden);
  matmul.forward_relu(evaluated.data(), nullptr, inp.data(), weight.data(), bias.data(), rows, C, hidden);
  mask.read();
  check_close(out.floats(), want, tolerance<Real>(C, 3));
  check_close(evaluated.floats(), want, tolerance<Real>(C, 3));
  for (const float x : out.floats()) REQUIRE(x >= 0);

  const std::vector<float> next_weight = noise(size_t(C) * hidden, 11, 0.3), dout = noise(size_t(rows) * C, 12);
  std::vector<double> dproduct(want.size()), unused(next_weight.size());
  matmul_backward(dproduct.data(), unused.data(), static_cast<double*>(nullptr), rounded<Real>(dout).data(),
                  want.data(), rounded<Real>(next_weight).data(), rows, hidden, C);
  const auto where_passed = [&](const DeviceArray<Real>& relu_out) {
    std::vector<double> dwant = dproduct;
    relu_backward(dwant.data(), rounded<Real>(relu_out.floats()).data(), dwant.size());
    return dwant;
  };

  const DeviceArray<Real> w(next_weight), d(dout), dinp(want.size()), again(want.size());
  const DeviceArray<float> partials(partials_size(rows, hidden)), partials_again(partials.size());
  const auto backward_relu = [&](Matmul& m, const DeviceArray<Real>& dx, const DeviceArray<float>& sums,
                                 const DeviceArray<unsigned char>& passed, const DeviceArray<Real>& relu_out) {
    m.backward_input_relu(dx.data(), sums.data(), d.data(), w.data(), passed.data(), relu_out.data(), rows, hidden, C);
  };
  backward_relu(matmul, dinp, partials, mask, out);
  backward_relu(matmul, again, partials_again, mask, out);
  check_close(dinp.floats(), where_passed(out), tolerance<Real>(C));
  CHECK(same_bits(dinp.read(), again.read()));
  const std::vector<float> got = dinp.floats(), relu_out = out.floats();
  size_t passed_nevertheless = 0;
  for (size_t i = 0; i < got.size(); i++) passed_nevertheless += relu_out[i] == 0 && got[i] != 0;
  CHECK(passed_nevertheless == 0);
  // The bias's gradient sums the rounded numbers that were stored.
  std::vector<double> dbias(partials.size());
  for (size_t i = 0; i < got.size(); i++) dbias[i / hidden / sums_block_rows * hidden + i % hidden] += double(got[i]);
  check_close(partials.read(), dbias, tolerance<float>(sums_block_rows));
  CHECK(same_bits(partials.read(), partials_again.read()));

#ifdef CUDA_ON_CPU  // where we know which of the two backward reads
  const DeviceArray<Real> no_out(want.size());
  const DeviceArray<unsigned char> no_mask(mask.size());
  backward_relu(matmul, again, partials, use_mask ? mask : no_mask, use_mask ? no_out : out);
  CHECK(same_bits(dinp.read(), again.read()));
  // If the library lacks the product that writes the mask, or the one that reads it, training works without the mask.
  const auto refuse = [&](Matmul& m, const std::string& product) {
    AlgorithmTable table("CPU");
    table.set(product, "unfused");
    m.load_table(table.save());
    m.use_relu_mask(true);
  };
  const auto backward_agrees = [&](Matmul& m, const DeviceArray<unsigned char>& passed) {
    m.forward_relu(evaluated.data(), nullptr, inp.data(), weight.data(), bias.data(), rows, C, hidden);
    m.forward_relu(evaluated.data(), passed.data(), inp.data(), weight.data(), bias.data(), rows, C, hidden);
    backward_relu(m, again, partials, passed, evaluated);
    check_close(again.floats(), where_passed(evaluated), tolerance<Real>(C));
  };
  for (const bool tf32 : {false, true}) {  // TF32's products have their own entries in the table
    const std::string type = tf32 && std::is_same_v<Real, float> ? "tf32" : name_of<Real>;
    std::ostringstream forward, backward;
    forward << type << " relu_mask TN m " << hidden << " n " << rows << " k " << C << " ld " << C << " " << C << " "
            << hidden;
    backward << type << " drelu NN m " << hidden << " n " << rows << " k " << C << " ld " << hidden << " " << C << " "
             << hidden;
    Matmul no_forward(tf32, nullptr), no_backward(tf32, nullptr);
    refuse(no_forward, forward.str());
    backward_agrees(no_forward, no_mask);
    CHECK(no_mask.read() == std::vector<unsigned char>(mask.size(), 0xff));
    refuse(no_backward, backward.str());
    backward_agrees(no_backward, mask);
    const DeviceArray<unsigned char> wrong_mask(mask.size());
    backward_relu(no_backward, again, partials, wrong_mask, evaluated);
    check_close(again.floats(), where_passed(evaluated), tolerance<Real>(C));
  }
#endif
}

TEST_CASE("how ReLU is computed is chosen once, and kept", "[cuda][matmul]") {
  const int rows = 64, C = 32, OC = 128;
  const Layer<bf16> layer({rows, C, OC, OC});
  const DeviceArray<bf16> inp(layer.inp), weight(layer.weight), bias(layer.bias), out(size_t(rows) * OC);
  const DeviceArray<unsigned char> mask(relu_mask_bytes(rows, OC));
  int runs = 0;
  const auto choose = [&](Matmul& matmul) {
    matmul.choose_relu<bf16>(rows, C, OC, [&] {
      runs++;
      matmul.forward_relu(out.data(), mask.data(), inp.data(), weight.data(), bias.data(), rows, C, OC);
    });
    matmul.forward_relu(out.data(), mask.data(), inp.data(), weight.data(), bias.data(), rows, C, OC);
  };
  Matmul first(false, nullptr), second(false, nullptr);
  choose(first);
  const std::string line = "ReLU of bfloat16 TN m 128 n 64 k 32 ld 32 32 128: ";
  const std::string table = first.save_table();
  CHECK((contains(table, line + "pass\n") || contains(table, line + "mask\n")));
  runs = 0;
  second.load_table(table);
  choose(second);
  CHECK(runs == 0);
  CHECK(second.save_table() == table);
  CHECK(second.name() == first.name());
#ifdef CUDA_ON_CPU  // where we can write a table by hand
  for (const bool use : {false, true}) {
    AlgorithmTable by_hand("CPU");
    by_hand.set(line.substr(0, line.size() - 2), use ? "mask" : "pass");
    Matmul third(false, nullptr);
    third.load_table(by_hand.save());
    const DeviceArray<unsigned char> fresh(mask.size());
    third.choose_relu<bf16>(rows, C, OC, [] {});
    third.forward_relu(out.data(), fresh.data(), inp.data(), weight.data(), bias.data(), rows, C, OC);
    CHECK((fresh.read() != std::vector<unsigned char>(mask.size(), 0xff)) == use);
    CHECK(contains(third.save_table(), line + (use ? "mask\n" : "pass\n")));
  }
#endif
}

TEMPLATE_TEST_CASE("matmul backward on the GPU agrees with the CPU's", "[cuda][matmul]", float, bf16, fp16) {
  using Real = TestType;
  Matmul matmul(false, nullptr);
  for (const Shape& s : shapes) {
    const Layer<Real> layer(s);
    const DeviceArray<Real> inp(layer.inp), weight(layer.weight), dinp(layer.inp.size());
    const DeviceArray<Real> dout(with_padding(layer.dout, s.rows, s.OC, s.ld));
    CAPTURE(s.rows, s.C, s.OC);
    matmul.backward_input(dinp.data(), dout.data(), weight.data(), s.rows, s.C, s.OC, s.ld);
    check_close(dinp.floats(), layer.backward().dinp, tolerance<Real>(s.OC));

    std::vector<float> first;
    for (int run = 0; run < 2; run++) {
      const DeviceArray<float> dweight(layer.weight.size());
      matmul.backward_weight(dweight.data(), dout.data(), inp.data(), s.rows, s.C, s.OC, s.ld);
      if (run == 0)
        check_close(first = dweight.read(), layer.backward().dweight, tolerance<float>(s.rows));
      else
        CHECK(same_bits(dweight.read(), first));
    }
  }
}

TEST_CASE("a gradient of weights on a second stream is waited for", "[cuda][matmul]") {
  const Choices before = choices();
  choices().weight_gradients = 2;
  const Stream stream;
  Matmul matmul(false, stream);
  choices() = before;
  const Shape s = {31, 48, 65, 72};
  const Layer<float> layer(s);
  const std::vector<float> padded = with_padding(layer.dout, s.rows, s.OC, s.ld);
  const DeviceArray<float> inp(layer.inp), dout(padded), other(padded), dweight(layer.weight.size()),
      second(layer.weight.size());
  const auto backward = [&](const DeviceArray<float>& to, const DeviceArray<float>& from) {
    matmul.backward_weight(to.data(), from.data(), inp.data(), s.rows, s.C, s.OC, s.ld);
  };
  const auto overwrite = [&](float* x, size_t count) {
    CUDA_CHECK(cudaMemsetAsync(x, 0, count * sizeof(float), stream));
  };
  for (int step = 0; step < 2; step++) {
    CUDA_CHECK(
        cudaMemcpyAsync(dout.data(), padded.data(), padded.size() * sizeof(float), cudaMemcpyHostToDevice, stream));
    backward(dweight, dout);
    backward(second, other);
    CHECK(matmul.unread(dout.data()) == dout.data());
    overwrite(dout.data(), dout.size());
    matmul.join();
    const DeviceArray<float> copy(dweight.size()), second_copy(dweight.size());
    for (const auto& [to, from] : {std::pair{&copy, &dweight}, {&second_copy, &second}}) {
      CUDA_CHECK(
          cudaMemcpyAsync(to->data(), from->data(), dweight.size() * sizeof(float), cudaMemcpyDeviceToDevice, stream));
      overwrite(from->data(), dweight.size());
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    check_close(copy.read(), layer.backward().dweight, tolerance<float>(s.rows));
    check_close(second_copy.read(), layer.backward().dweight, tolerance<float>(s.rows));
  }
}

TEMPLATE_TEST_CASE("bias and ReLU, as passes of their own, agree with the CPU's", "[cuda][matmul]", float, bf16, fp16) {
  using Real = TestType;
  const int rows = 37, OC = 65, ld = 72;
  const std::vector<float> x = noise(size_t(rows) * OC, 1), bias = noise(OC, 2);
  std::vector<double> want = rounded<Real>(x);
  const std::vector<double> b = rounded<Real>(bias);
  for (size_t i = 0; i < want.size(); i++) want[i] += b[i % OC];
  // The logits; the padding is like fresh memory.
  std::vector<Real> padded(size_t(rows) * ld);
  std::memset(static_cast<void*>(padded.data()), 0xff, padded.size() * sizeof(Real));
  for (size_t i = 0; i < x.size(); i++) padded[i / OC * ld + i % OC] = Real(x[i]);
  const DeviceArray<Real> sum(padded), relu(padded), bias_of(bias);
  bias_forward(sum.data(), bias_of.data(), rows, OC, ld, nullptr);
  bias_relu_forward(relu.data(), bias_of.data(), rows, OC, ld, nullptr);
  check_close(without_padding(sum, rows, OC, ld), want, tolerance<Real>(1));
  relu_forward(want.data(), want.size());
  check_close(without_padding(relu, rows, OC, ld), want, tolerance<Real>(1));

  // ReLU keeps NaN, both in a group of eight and in the rest of a row.
  const DeviceArray<Real> lost(padded.size());
  bias_relu_forward(lost.data(), bias_of.data(), rows, OC, ld, nullptr);
  for (const float each : without_padding(lost, rows, OC, ld)) CHECK(std::isnan(each));
}

TEMPLATE_TEST_CASE("a product that cuBLASLt has no algorithm for is computed all the same", "[cuda][matmul]", float,
                   bf16, fp16) {
  using Real = TestType;
  const OperandType type = std::is_same_v<Real, float>  ? OperandType::float32
                           : std::is_same_v<Real, bf16> ? OperandType::bfloat16
                                                        : OperandType::float16;
  const auto check_product = [&]<class D>(const Product& p, D) {
    const int a_rows = p.transpose_a ? p.m : p.k, b_rows = p.transpose_b ? p.k : p.n;  // as a and b lie in memory
    const std::vector<float> a = noise(size_t(a_rows) * p.lda, 1), b = noise(size_t(b_rows) * p.ldb, 2);
    std::vector<double> want(size_t(p.n) * p.m);
    const std::vector<double> ra = rounded<Real>(a), rb = rounded<Real>(b);
    for (int j = 0; j < p.n; j++)
      for (int i = 0; i < p.m; i++) {
        double& sum = want[size_t(j) * p.m + i];
        for (int k = 0; k < p.k; k++)
          sum += ra[p.transpose_a ? size_t(i) * p.lda + k : size_t(k) * p.lda + i] *
                 rb[p.transpose_b ? size_t(k) * p.ldb + j : size_t(j) * p.ldb + k];
      }
    const DeviceArray<Real> da(a), db(b);
    std::vector<D> padded(size_t(p.n) * p.ldd);
    std::memset(static_cast<void*>(padded.data()), 0xff, padded.size() * sizeof(D));
    const DeviceArray<D> d(padded);
    CAPTURE(p.text());
    simple_product(p, {.d = d.data(), .a = da.data(), .b = db.data()}, nullptr);
    check_close(without_padding(d, p.n, p.m, p.ldd), want, tolerance<D>(p.k, 2));
  };
  for (const bool transpose_a : {false, true})
    for (const bool transpose_b : {false, true})
      for (const auto& [m, n, k] : {std::array{72, 60, 48}, {1, 17, 5}, {33, 1, 16}}) {
        const Product p = {
            type, false, transpose_a, transpose_b, m, n, k, (transpose_a ? k : m) + 3, (transpose_b ? n : k) + 5,
            m + 2};
        check_product(p, Real());
        Product to_float = p;
        to_float.float_d = true;
        check_product(to_float, 0.0f);
      }
  CHECK_THROWS_WITH(
      simple_product(Product{type, false, true, false, 8, 8, 8, 8, 8, 8, Epilogue::drelu}, Operands{}, nullptr),
      ContainsSubstring("cuBLASLt has no algorithm for " + std::string(name_of<Real>) + " drelu TN m 8"));
}

TEMPLATE_TEST_CASE("several matrices multiplied at once give the same as one by one", "[cuda][matmul]", float, bf16,
                   fp16) {
  using Real = TestType;
  const int n = 24, k = 40, count = 3;
  const std::vector<float> x = noise(size_t(count) * n * k, 1), a = noise(size_t(count) * n * n, 2);
  const std::vector<double> rx = rounded<Real>(x), ra = rounded<Real>(a);
  std::vector<double> gram(a.size()), times(x.size());
  for (int i = 0; i < count; i++) {
    const double *const xi = rx.data() + size_t(i) * n * k, *const ai = ra.data() + size_t(i) * n * n;
    for (int r = 0; r < n; r++) {
      for (int s = 0; s < n; s++)
        for (int c = 0; c < k; c++) gram[(size_t(i) * n + r) * n + s] += xi[r * k + c] * xi[s * k + c];
      for (int c = 0; c < k; c++)
        for (int s = 0; s < n; s++) times[(size_t(i) * n + r) * k + c] += ai[r * n + s] * xi[s * k + c];
    }
  }
  const DeviceArray<Real> dx(x), da(a);
  const DeviceArray<Real> of_gram(a.size()), of_times(x.size());
  Matmul matmul(false, nullptr);
  matmul.gram(of_gram.data(), dx.data(), n, k, count);
  matmul.square_times(of_times.data(), da.data(), dx.data(), n, k, count);
  check_close(of_gram.floats(), gram, tolerance<Real>(k, 2));
  check_close(of_times.floats(), times, tolerance<Real>(n, 2));
  CHECK(contains(matmul.save_table(), "TN m 24 n 24 k 40 ld 40 40 24 times 3: "));

  // by the kernel for which no library is needed
  const OperandType type = std::is_same_v<Real, float>  ? OperandType::float32
                           : std::is_same_v<Real, bf16> ? OperandType::bfloat16
                                                        : OperandType::float16;
  Product p = {type, false, true, false, n, n, k, k, k, n};
  p.batch = count;
  const DeviceArray<Real> simple(a.size());
  simple_product(p, {.d = simple.data(), .a = dx.data(), .b = dx.data()}, nullptr);
  check_close(simple.floats(), gram, tolerance<Real>(k, 2));
}

#ifdef CUDA_ON_CPU  // where we can make the library refuse
TEST_CASE("a layer whose products cuBLASLt has no algorithm for works, and repeats", "[cuda][matmul]") {
  const Shape s = {60, 48, 72, 72};
  const Layer<float> layer(s);
  const DeviceArray<float> inp(layer.inp), weight(layer.weight), bias(layer.bias), dout(layer.dout);
  AlgorithmTable none("CPU");
  for (const char* product :
       {"float32 bias TN m 72 n 60 k 48 ld 48 48 72", "float32 TN m 72 n 60 k 48 ld 48 48 72",
        "float32 NN m 48 n 60 k 72 ld 48 72 48", "float32 to float32 NT m 48 n 72 k 60 ld 48 72 48"})
    none.set(product, "unfused");
  const auto run = [&](const std::string& table) {
    const DeviceArray<float> out(layer.dout.size()), dinp(layer.inp.size()), dweight(layer.weight.size());
    Matmul matmul(false, nullptr);
    matmul.load_table(table);
    matmul.forward(out.data(), inp.data(), weight.data(), bias.data(), s.rows, s.C, s.OC, s.OC);
    matmul.backward_input(dinp.data(), dout.data(), weight.data(), s.rows, s.C, s.OC, s.OC);
    matmul.backward_weight(dweight.data(), dout.data(), inp.data(), s.rows, s.C, s.OC, s.OC);
    check_close(out.read(), layer.forward(true), tolerance<float>(s.C, 2));
    check_close(dinp.read(), layer.backward().dinp, tolerance<float>(s.OC));
    check_close(dweight.read(), layer.backward().dweight, tolerance<float>(s.rows));
    return std::pair(matmul.save_table(), matmul.name());
  };
  const auto first = run(none.save());
  CHECK(first.first == none.save());
  CHECK(run(first.first) == first);
  CHECK(run("").second != first.second);
}
#endif

TEST_CASE("a captured product computes what it did before", "[cuda][matmul]") {
  const Shape s = {31, 48, 65, 72};
  const Layer<bf16> layer(s);
  const DeviceArray<bf16> inp(layer.inp), weight(layer.weight), bias(layer.bias), out(size_t(s.rows) * s.ld);
  cudaStream_t stream;
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  {
    Matmul matmul(false, stream);
    const auto enqueue = [&] {
      matmul.forward(out.data(), inp.data(), weight.data(), bias.data(), s.rows, s.C, s.OC, s.ld);
    };
    enqueue();
    CUDA_CHECK(cudaStreamSynchronize(stream));
    const std::vector<bf16> first = out.read();
    CUDA_CHECK(cudaMemset(out.data(), 0xff, out.size() * sizeof(bf16)));
    CUDA_CHECK(cudaDeviceSynchronize());

    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    enqueue();
#ifndef CUDA_ON_CPU
    CHECK_THROWS_WITH(matmul.forward(out.data(), inp.data(), weight.data(), nullptr, s.rows - 1, s.C, s.OC, s.ld),
                      ContainsSubstring("is new"));
#endif
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_CHECK(cudaGraphLaunch(exec, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CHECK(same_bits(out.read(), first));
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaGraphDestroy(graph));
  }
  CUDA_CHECK(cudaStreamDestroy(stream));
}

TEST_CASE("matmul refuses what its kernels do not expect", "[cuda][matmul]") {
  const DeviceArray<float> x(4096);
  float* const p = x.data();
  Matmul matmul(false, nullptr);
  CHECK_THROWS_WITH(matmul.forward(p, p, p, nullptr, 4, 12, 8, 8), ContainsSubstring("forward: rows = 4, C = 12"));
  CHECK_THROWS_WITH(matmul.forward(p, p, p, nullptr, 0, 16, 8, 8), ContainsSubstring("rows = 0"));
  CHECK_THROWS_WITH(matmul.forward(p, p, p, nullptr, 4, 16, 65, 65), ContainsSubstring("rows of 65 elements"));
  CHECK_THROWS_WITH(matmul.backward_input(p, p, p, 4, 16, 65, 64), ContainsSubstring("rows of 64 elements"));
  CHECK_THROWS_WITH(matmul.forward(p + 1, p, p, nullptr, 4, 16, 8, 8), ContainsSubstring("not aligned"));
  CHECK_THROWS_WITH(matmul.forward(p, p, p, p + 2, 4, 16, 8, 8), ContainsSubstring("not aligned"));
  CHECK_THROWS_WITH(relu_backward(p, p, p, 1, 12, nullptr), ContainsSubstring("12 is not a multiple of 8"));
}

TEST_CASE("the table of algorithms survives saving, and only on the same machine", "[cuda][matmul]") {
  AlgorithmTable table("a card, cuBLASLt 130100");
  table.set("bfloat16 NT m 1", "12 ab ");
  table.set("bfloat16 bias NT m 1", "unfused");
  const std::string text = table.save();

  AlgorithmTable same("a card, cuBLASLt 130100");
  same.set("float32", "7");
  same.load(text);
  REQUIRE(same.find("bfloat16 NT m 1"));
  CHECK(*same.find("bfloat16 NT m 1") == "12 ab ");
  REQUIRE(same.find("bfloat16 bias NT m 1"));
  CHECK(*same.find("bfloat16 bias NT m 1") == "unfused");
  CHECK(*same.find("float32") == "7");
  CHECK_FALSE(same.find("bfloat16 NT m 2"));
  AlgorithmTable again("a card, cuBLASLt 130100");
  again.load(text);
  CHECK(again.save() == text);

  // The loader ignores a table with one changed character, in the digest too, or with a missing end.
  const auto is_ignored = [&](const std::string& damaged, const std::string& machine = "a card, cuBLASLt 130100") {
    AlgorithmTable other(machine);
    const std::string before = other.save();
    other.load(damaged);
    return other.save() == before;
  };
  for (size_t i = 0; i < text.size(); i++) {
    std::string changed = text;
    changed[i] ^= 1;
    CAPTURE(i, changed);
    REQUIRE(is_ignored(changed));
    REQUIRE(is_ignored(text.substr(0, i)));
  }
  CHECK(is_ignored(text + "\n"));
  CHECK(is_ignored(text, "a card, cuBLASLt 130101"));
  CHECK_FALSE(is_ignored(text));
}

TEST_CASE("the name of the algorithms is that of those which were used", "[cuda][matmul]") {
  AlgorithmTable a("card"), b("card"), c("another card");
  for (AlgorithmTable* table : {&a, &b, &c})
    for (const char* product : {"one", "two", "three"}) table->set(product, "algorithm");
  a.use("one");
  a.use("two");
  b.use("two");
  const std::string with_one = b.name();
  CHECK(a.name() != b.name());
  b.use("one");
  CHECK(a.name() == b.name());
  CHECK(b.name() != with_one);
  c.use("one");
  c.use("two");
  CHECK(a.name() != c.name());
  b.set("three", "another algorithm");
  CHECK(a.name() == b.name());
  b.set("two", "another algorithm");
  CHECK(a.name() != b.name());
}

TEST_CASE("with the table of an earlier run matmul repeats it", "[cuda][matmul]") {
  const Shape s = {256, 64, 128, 128};
  const Layer<bf16> layer(s);
  const DeviceArray<bf16> inp(layer.inp), weight(layer.weight), bias(layer.bias), dout(layer.dout);
  struct Result {
    std::string table, name;
    std::vector<bf16> out;
    std::vector<float> dweight;
  };
  const auto run = [&](const std::string& table) {
    const DeviceArray<bf16> out(layer.dout.size());
    const DeviceArray<float> dweight(layer.weight.size());
    Matmul matmul(false, nullptr);
    matmul.load_table(table);
    matmul.forward(out.data(), inp.data(), weight.data(), bias.data(), s.rows, s.C, s.OC, s.OC);
    matmul.backward_weight(dweight.data(), dout.data(), inp.data(), s.rows, s.C, s.OC, s.OC);
    return Result{matmul.save_table(), matmul.name(), out.read(), dweight.read()};
  };
  const Result first = run(""), second = run(first.table);
  CHECK(contains(first.table, "bfloat16 bias TN m 128 n 256 k 64 ld 64 64 128: "));
  CHECK(contains(first.table, "bfloat16 to float32 NT m 64 n 128 k 256 ld 64 128 64: "));
  CHECK(second.table == first.table);
  CHECK(second.name == first.name);
  CHECK(same_bits(second.out, first.out));
  CHECK(same_bits(second.dweight, first.dweight));
}

TEST_CASE("the peak is measured where there is a GPU", "[cuda][matmul]") {
  Matmul matmul(false, nullptr);
  const double peak = matmul.measure_peak<bf16>();
#ifdef CUDA_ON_CPU
  CHECK(peak == 0);
#else
  CHECK(peak > 1);
  CHECK(peak < 100000);
#endif
}
