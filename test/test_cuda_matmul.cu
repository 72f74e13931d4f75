#include <limits>
#include <stdexcept>

#include "../kernels/matmul.cuh"
#include "../kernels/matmul.h"
#include "../kernels/relu.h"
#include "cuda.h"

namespace {

constexpr float nan_float = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int rows, C, OC, ld;  // of the matrix with OC columns
};
// V = 65 in rows of 72; one row; more columns than a block has, and than a row of the mask's 128 bits
const Shape shapes[] = {{31, 48, 65, 72}, {1, 16, 65, 72}, {70, 32, 136, 136}, {40, 264, 48, 64}};

// The result is rounded once, and once more where a bias is added afterwards; its K products are summed in float.
template <class Real>
double tolerance(int K, int roundings = 1) {
  return roundings * rounding_of<Real> + 4 * std::sqrt(double(K)) * 0x1p-24;
}

// (rows, columns) -> (rows, ld), with NaN where there is nothing
std::vector<float> with_padding(const std::vector<float>& x, int rows, int columns, int ld) {
  std::vector<float> out(size_t(rows) * ld, nan_float);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) out[size_t(r) * ld + c] = x[size_t(r) * columns + c];
  return out;
}
// And back; all that was in the padding has to be as in fresh memory.
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

// A layer and its gradients, in double, from what Real makes of the numbers.
template <class Real>
struct Layer {
  int rows, C, OC;
  std::vector<float> inp, weight, bias, dout, dweight, dbias;  // the last two: what is added to
  explicit Layer(const Shape& s)
      : rows(s.rows),
        C(s.C),
        OC(s.OC),
        inp(noise(size_t(rows) * C, 1)),
        weight(noise(size_t(OC) * C, 2, 0.3)),
        bias(noise(OC, 3, 2)),
        dout(noise(size_t(rows) * OC, 4, 0.1)),
        dweight(noise(size_t(OC) * C, 5)),
        dbias(noise(OC, 6)) {}

  std::vector<double> forward(bool with_bias) const {
    std::vector<double> out(size_t(rows) * OC);
    matmul_forward(out.data(), rounded<Real>(inp).data(), rounded<Real>(weight).data(),
                   with_bias ? rounded<Real>(bias).data() : nullptr, rows, C, OC);
    return out;
  }
  struct Gradients {
    std::vector<double> dinp, dweight, dbias;
  };
  Gradients backward(bool accumulate) const {
    Gradients g = {std::vector<double>(size_t(rows) * C), std::vector<double>(dweight.size()),
                   std::vector<double>(dbias.size())};
    if (accumulate) {
      g.dweight.assign(dweight.begin(), dweight.end());
      g.dbias.assign(dbias.begin(), dbias.end());
    }
    matmul_backward(g.dinp.data(), g.dweight.data(), g.dbias.data(), rounded<Real>(dout).data(),
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

TEST_CASE("matmul with tf32 takes ten bits of its operands", "[cuda][matmul]") {
  const Shape s = {64, 128, 64, 64};
  const Layer<float> layer(s);
  const DeviceArray<float> inp(layer.inp), weight(layer.weight), out(size_t(s.rows) * s.OC);
  Matmul matmul(true, nullptr);
  matmul.forward(out.data(), inp.data(), weight.data(), nullptr, s.rows, s.C, s.OC, s.OC);
  check_close(out.read(), layer.forward(false), 0x1p-8);  // each factor is wrong by up to 2^-11 of it
}

TEMPLATE_TEST_CASE("matmul with ReLU, forward and backward, agrees with the CPU's", "[cuda][matmul]", float, bf16,
                   fp16) {
  using Real = TestType;
  const bool fuse = GENERATE(true, false);
  // The hidden layer is the output of one product and the input of the next one.
  const Shape s = GENERATE(Shape{31, 48, 136, 136}, Shape{1, 16, 64, 64}, Shape{65, 32, 128, 128});
  const int rows = s.rows, C = s.C, hidden = s.OC;
  CAPTURE(fuse, rows, C, hidden);
  const Layer<Real> layer(s);
  std::vector<double> want = layer.forward(true);
  relu_forward(want.data(), want.size());

  const DeviceArray<Real> inp(layer.inp), weight(layer.weight), bias(layer.bias);
  const DeviceArray<Real> out(want.size()), evaluated(want.size());
  const DeviceArray<unsigned char> mask(relu_mask_bytes(rows, hidden));
  Matmul matmul(false, nullptr, fuse);
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
  matmul.backward_input_relu(dinp.data(), d.data(), w.data(), mask.data(), out.data(), rows, hidden, C);
  matmul.backward_input_relu(again.data(), d.data(), w.data(), mask.data(), out.data(), rows, hidden, C);
  check_close(dinp.floats(), where_passed(out), tolerance<Real>(C));
  CHECK(same_bits(dinp.read(), again.read()));
  const std::vector<float> got = dinp.floats(), relu_out = out.floats();
  size_t passed_nevertheless = 0;
  for (size_t i = 0; i < got.size(); i++) passed_nevertheless += relu_out[i] == 0 && got[i] != 0;
  CHECK(passed_nevertheless == 0);

#ifdef CUDA_ON_CPU  // where it is known which of the two is read
  const DeviceArray<Real> no_out(want.size());
  const DeviceArray<unsigned char> no_mask(mask.size());
  matmul.backward_input_relu(again.data(), d.data(), w.data(), (fuse ? mask : no_mask).data(),
                             (fuse ? no_out : out).data(), rows, hidden, C);
  CHECK(same_bits(dinp.read(), again.read()));
  // A mask that forward_relu did not write, because there was no such algorithm, is not read.
  const auto refuse_mask = [&](Matmul& m, const char* type) {
    std::ostringstream fused_forward;
    fused_forward << type << " relu_mask TN m " << hidden << " n " << rows << " k " << C << " ld " << C << " " << C
                  << " " << hidden;
    AlgorithmTable table("CPU");
    table.set(fused_forward.str(), "unfused");
    m.load_table(table.save());
  };
  Matmul other(false, nullptr), other_tf32(true, nullptr);
  refuse_mask(other, name_of<Real>);
  other.forward_relu(evaluated.data(), nullptr, inp.data(), weight.data(), bias.data(), rows, C, hidden);
  other.forward_relu(evaluated.data(), no_mask.data(), inp.data(), weight.data(), bias.data(), rows, C, hidden);
  CHECK(no_mask.read() == std::vector<unsigned char>(mask.size(), 0xff));
  other.backward_input_relu(again.data(), d.data(), w.data(), no_mask.data(), evaluated.data(), rows, hidden, C);
  check_close(again.floats(), where_passed(evaluated), tolerance<Real>(C));
  // Products in tf32 have entries of their own in the table.
  refuse_mask(other_tf32, std::is_same_v<Real, float> ? "tf32" : name_of<Real>);
  other_tf32.forward_relu(evaluated.data(), no_mask.data(), inp.data(), weight.data(), bias.data(), rows, C, hidden);
  CHECK(no_mask.read() == std::vector<unsigned char>(mask.size(), 0xff));
#endif
}

TEMPLATE_TEST_CASE("matmul backward on the GPU agrees with the CPU's", "[cuda][matmul]", float, bf16, fp16) {
  using Real = TestType;
  const bool fuse = GENERATE(true, false);
  Matmul matmul(false, nullptr, fuse);
  for (const Shape& s : shapes) {
    const Layer<Real> layer(s);
    const DeviceArray<Real> inp(layer.inp), weight(layer.weight), dinp(layer.inp.size());
    const DeviceArray<Real> dout(with_padding(layer.dout, s.rows, s.OC, s.ld));
    CAPTURE(fuse, s.rows, s.C, s.OC);
    matmul.backward_input(dinp.data(), dout.data(), weight.data(), s.rows, s.C, s.OC, s.ld);
    check_close(dinp.floats(), layer.backward(false).dinp, tolerance<Real>(s.OC));

    for (const bool accumulate : {false, true})
      for (const bool with_bias : {true, false}) {
        CAPTURE(accumulate, with_bias);
        const auto want = layer.backward(accumulate);
        std::vector<float> first_dweight, first_dbias;
        for (int run = 0; run < 2; run++) {
          const DeviceArray<float> fresh_dweight(layer.dweight.size()), fresh_dbias(layer.dbias.size());
          const DeviceArray<float> old_dweight(layer.dweight), old_dbias(layer.dbias);
          const DeviceArray<float>& dweight = accumulate ? old_dweight : fresh_dweight;
          const DeviceArray<float>& dbias = accumulate ? old_dbias : fresh_dbias;
          matmul.backward_weight(dweight.data(), with_bias ? dbias.data() : nullptr, dout.data(), inp.data(),
                                 accumulate, s.rows, s.C, s.OC, s.ld);
          if (run == 0) {
            check_close(first_dweight = dweight.read(), want.dweight, tolerance<float>(s.rows));
            first_dbias = dbias.read();
            if (with_bias) check_close(first_dbias, want.dbias, tolerance<float>(s.rows));
          } else {
            CHECK(same_bits(dweight.read(), first_dweight));
            CHECK(same_bits(dbias.read(), first_dbias));
          }
        }
      }
  }
}

TEMPLATE_TEST_CASE("column_sums adds rows up in a fixed order", "[cuda][matmul]", float, bf16, fp16) {
  using Real = TestType;
  // 4200 rows: parts of 64; 72 columns of which the last block has 8
  const Shape s = GENERATE(Shape{1, 0, 65, 72}, Shape{33, 0, 72, 72}, Shape{64, 0, 8, 16}, Shape{4200, 0, 65, 72});
  const bool accumulate = GENERATE(true, false);
  CAPTURE(s.rows, s.OC, accumulate);
  const std::vector<float> x = noise(size_t(s.rows) * s.OC, 1), before = noise(s.OC, 2);
  std::vector<double> want(s.OC);
  if (accumulate) want.assign(before.begin(), before.end());
  const std::vector<double> rows_of = rounded<Real>(x);
  for (size_t i = 0; i < x.size(); i++) want[i % s.OC] += rows_of[i];

  const DeviceArray<Real> in(with_padding(x, s.rows, s.OC, s.ld));
  std::vector<float> first;
  for (int run = 0; run < 2; run++) {
    const DeviceArray<float> parts(size_t(column_sums_parts) * s.OC), old(before), fresh(s.OC);
    const DeviceArray<float>& sums = accumulate ? old : fresh;
    column_sums(sums.data(), parts.data(), in.data(), accumulate, s.rows, s.OC, s.ld, nullptr);
    parts.read();
    if (run == 0) {
      first = sums.read();
      check_close(first, want, tolerance<float>(s.rows));
    } else {
      CHECK(same_bits(sums.read(), first));
    }
  }
}

TEMPLATE_TEST_CASE("bias and ReLU, as passes of their own, agree with the CPU's", "[cuda][matmul]", float, bf16, fp16) {
  using Real = TestType;
  const int rows = 37, OC = 65, ld = 72;
  const std::vector<float> x = noise(size_t(rows) * OC, 1), bias = noise(OC, 2);
  std::vector<double> want = rounded<Real>(x);
  const std::vector<double> b = rounded<Real>(bias);
  for (size_t i = 0; i < want.size(); i++) want[i] += b[i % OC];
  // As fresh memory, but for the logits.
  std::vector<Real> padded(size_t(rows) * ld);
  std::memset(static_cast<void*>(padded.data()), 0xff, padded.size() * sizeof(Real));
  for (size_t i = 0; i < x.size(); i++) padded[i / OC * ld + i % OC] = Real(x[i]);
  const DeviceArray<Real> sum(padded), relu(padded), bias_of(bias);
  bias_forward(sum.data(), bias_of.data(), rows, OC, ld, nullptr);
  bias_relu_forward(relu.data(), bias_of.data(), rows, OC, ld, nullptr);
  check_close(without_padding(sum, rows, OC, ld), want, tolerance<Real>(1));
  relu_forward(want.data(), want.size());
  check_close(without_padding(relu, rows, OC, ld), want, tolerance<Real>(1));

  // NaN shows, in a group of eight and in what is left of a row.
  const DeviceArray<Real> lost(padded.size());
  bias_relu_forward(lost.data(), bias_of.data(), rows, OC, ld, nullptr);
  for (const float each : without_padding(lost, rows, OC, ld)) CHECK(std::isnan(each));

  const std::vector<float> dx = noise(4104, 3);
  std::vector<float> out = noise(4104, 4);
  out[7] = 0;
  std::vector<double> dwant = rounded<Real>(dx);
  relu_backward(dwant.data(), rounded<Real>(out).data(), dwant.size());
  const DeviceArray<Real> d(dx), o(out);
  relu_backward(d.data(), o.data(), d.size(), nullptr);
  CHECK((rounded<Real>(d.floats()) == dwant));
  CHECK(d.floats()[7] == 0);
}

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
  CHECK_THROWS_WITH(relu_backward(p, p, 12, nullptr), ContainsSubstring("12 is not a multiple of 8"));
  CHECK_THROWS_WITH(matmul.backward_weight(p, p, p, p, true, 4, 16, 1 << 17, 1 << 17), ContainsSubstring("too large"));
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

  // A changed character anywhere, also of the digest, and a missing end.
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
    std::vector<float> dweight, dbias;
  };
  const auto run = [&](const std::string& table) {
    const DeviceArray<bf16> out(layer.dout.size());
    const DeviceArray<float> dweight(layer.weight.size()), dbias(layer.bias.size());
    Matmul matmul(false, nullptr);
    matmul.load_table(table);
    matmul.forward(out.data(), inp.data(), weight.data(), bias.data(), s.rows, s.C, s.OC, s.OC);
    matmul.backward_weight(dweight.data(), dbias.data(), dout.data(), inp.data(), false, s.rows, s.C, s.OC, s.OC);
    return Result{matmul.save_table(), matmul.name(), out.read(), dweight.read(), dbias.read()};
  };
  const Result first = run(""), second = run(first.table);
  CHECK(contains(first.table, "bfloat16 bias TN m 128 n 256 k 64 ld 64 64 128: "));
  CHECK(contains(first.table, "bfloat16 to float32 bias_grad NT m 64 n 128 k 256 ld 64 128 64: "));
  CHECK(second.table == first.table);
  CHECK(second.name == first.name);
  CHECK(same_bits(second.out, first.out));
  CHECK(same_bits(second.dweight, first.dweight));
  CHECK(same_bits(second.dbias, first.dbias));
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
