// The kernels that compute only the last row of each text, against plain loops in double. test_cuda_model.cu compares
// the pass that they make with the pass over whole windows.
#include "../kernels/decode.cuh"
#include "cuda.h"

namespace {

using Doubles = std::vector<double>;

// B texts in windows of T tokens. Their lengths are T, 1, and something between.
struct Texts {
  int B, T;
  int length(int b) const { return b % 3 == 0 ? T : b % 3 == 1 ? 1 : 1 + (b * 7 + 4) % T; }
  int last_row(int b) const { return b * T + length(b) - 1; }
  std::vector<int> lengths() const {
    std::vector<int> all;
    for (int b = 0; b < B; b++) all.push_back(length(b));
    return all;
  }
};

// The last rows of x (B, T, C), whose rows are ld elements long. Fails the test if anything else has been written: all
// of x was NaN before, as fresh memory is.
template <class Real>
std::vector<float> last_rows(const DeviceArray<Real>& x, const std::vector<int>& lengths, int T, int ld, int C) {
  const std::vector<float> all = x.floats();
  std::vector<float> rows;
  const auto written = std::count_if(all.begin(), all.end(), [](float number) { return !std::isnan(number); });
  CHECK(size_t(written) == lengths.size() * C);
  for (size_t b = 0; b < lengths.size(); b++) {
    const auto row = all.begin() + long((b * T + lengths[b] - 1) * ld);
    rows.insert(rows.end(), row, row + C);
  }
  return rows;
}

// The numbers of a text alone, from what all texts together read: a window of `count` numbers for each.
std::vector<float> of_text(const std::vector<float>& all, int b, size_t count) {
  return {all.begin() + long(b * count), all.begin() + long((b + 1) * count)};
}

// How far a float sum of C terms, rounded to Real, may be off.
template <class Real>
double tolerance(int C) {
  return 4 * std::sqrt(C) * 0x1p-24 + (sizeof(Real) == 2 ? 2 * rounding_of<Real> : 0);
}

struct Shape {
  int B, T, C, OC, ldo;
};
// One text and several, blocks that are not full, columns that four do not divide, one chunk, many; rows with a gap.
const std::vector<Shape> shapes = {{1, 5, 8, 65, 72},      {1, 1, 264, 3, 8},  {3, 4, 48, 130, 136},
                                   {1, 3, 1544, 384, 384}, {5, 2, 264, 7, 16}, {4, 3, 2048, 65, 72}};

// What decode_product makes of inp, which has the last rows alone; stream: what it is added to.
template <class Real, bool NORM, Finish FINISH>
Doubles product(const Shape& s, const std::vector<float>& inp, const std::vector<float>& stream,
                const std::vector<float>& norm_weight, const std::vector<float>& norm_bias,
                const std::vector<float>& weight, const std::vector<float>& bias) {
  Doubles out;
  for (int b = 0; b < s.B; b++) {
    const std::vector<float> of_b = of_text(inp, b, size_t(s.C));
    Doubles x = rounded<Real>(of_b);
    if (NORM) {
      double mean = 0, squares = 0;
      for (const double v : x) mean += v / s.C;
      for (const double v : x) squares += (v - mean) * (v - mean) / s.C;
      for (int c = 0; c < s.C; c++) {
        const double norm = (x[c] - mean) / std::sqrt(squares + 1e-5) * norm_weight[c] + norm_bias[c];
        x[c] = double(float(Real(float(norm))));
      }
    }
    for (int o = 0; o < s.OC; o++) {
      double sum = 0;
      for (int c = 0; c < s.C; c++) sum += x[c] * double(float(Real(weight[size_t(o) * s.C + c])));
      if (FINISH == Finish::residual) {
        out.push_back(double(float(Real(stream[size_t(b) * s.OC + o]))) + sum + double(bias[o]));
      } else {
        if (!bias.empty()) sum += double(float(Real(bias[o])));
        out.push_back(FINISH == Finish::relu ? std::max(sum, 0.0) : sum);
      }
    }
  }
  return out;
}

template <class Real, bool NORM, Finish FINISH>
void check_product(const Shape& s, bool with_bias = true) {
  const auto [B, T, C, OC, ldo] = s;
  INFO("B " << B << ", T " << T << ", C " << C << ", OC " << OC << ", rows of " << ldo);
  const Texts texts = {B, T};
  const std::vector<float> rows = noise(size_t(B) * C, 1), stream = noise(size_t(B) * OC, 2, 3),
                           weight = noise(size_t(OC) * C, 3, 1 / std::sqrt(C)), norm_weight = noise(C, 4),
                           norm_bias = noise(C, 5), bias = with_bias ? noise(OC, 6) : std::vector<float>();
  // The results of these texts. Rows that are not a text's last hold NaN: nobody may read them.
  const auto run = [&](const std::vector<int>& which) {
    const int count = int(which.size());
    std::vector<float> inp(size_t(count) * T * C, NAN), before(size_t(count) * T * ldo, NAN);
    std::vector<int> lengths;
    for (int k = 0; k < count; k++) {
      const int b = which[k], row = k * T + texts.length(b) - 1;
      lengths.push_back(texts.length(b));
      std::copy_n(rows.begin() + long(b) * C, C, inp.begin() + long(row) * C);
      if (FINISH == Finish::residual) std::copy_n(stream.begin() + long(b) * OC, OC, before.begin() + long(row) * ldo);
    }
    const DeviceArray<Real> in(inp), w(weight), out(before);
    const DeviceArray<float> nw(norm_weight), nb(norm_bias);
    const DeviceArray<DecodeBias<Real, FINISH>> device_bias(bias);
    const DeviceArray<int> device_lengths(lengths);
    const LastRows last = {device_lengths.data(), T};
    decode_product<NORM, FINISH>(out.data(), in.data(), NORM ? nw.data() : nullptr, NORM ? nb.data() : nullptr,
                                 w.data(), with_bias ? device_bias.data() : nullptr, last, count, C, OC, ldo, nullptr);
    return last_rows(out, lengths, T, ldo, OC);
  };
  std::vector<int> every(B);
  for (int b = 0; b < B; b++) every[b] = b;
  const std::vector<float> got = run(every);
  check_close(got, product<Real, NORM, FINISH>(s, rows, stream, norm_weight, norm_bias, weight, bias),
              tolerance<Real>(C) * (NORM ? 4 : 1));
  CHECK((run({B - 1}) == of_text(got, B - 1, size_t(OC))));  // the same bits alone
}

// Every query's weighted sum of the values, over its text's tokens.
template <class Real>
Doubles attention_of(const Texts& texts, int NH, int HS, const std::vector<float>& qkv) {
  const Doubles x = rounded<Real>(qkv);
  const int C = NH * HS;
  Doubles out;
  for (int b = 0; b < texts.B; b++)
    for (int h = 0; h < NH; h++) {
      const double* const query = &x[size_t(texts.last_row(b)) * 3 * C + size_t(h) * HS];
      Doubles weights;
      double largest = -INFINITY, sum = 0;
      for (int t = 0; t < texts.length(b); t++) {
        double dot = 0;
        for (int c = 0; c < HS; c++) dot += query[c] * x[size_t(b * texts.T + t) * 3 * C + C + size_t(h) * HS + c];
        weights.push_back(dot / std::sqrt(HS));
        largest = std::max(largest, weights.back());
      }
      for (double& weight : weights) sum += weight = std::exp(weight - largest);
      for (int c = 0; c < HS; c++) {
        double total = 0;
        for (int t = 0; t < texts.length(b); t++)
          total += weights[t] / sum * x[size_t(b * texts.T + t) * 3 * C + 2 * C + size_t(h) * HS + c];
        out.push_back(total);
      }
    }
  return out;
}

template <class Real>
void check_attention(const Texts& texts, int NH, int HS) {
  const auto [B, T] = texts;
  const int C = NH * HS;
  INFO("B " << B << ", T " << T << ", NH " << NH << ", HS " << HS);
  // Rows behind a text's last hold NaN: nobody may read them.
  std::vector<float> qkv = noise(size_t(B) * T * 3 * C, 1, 1.5);
  for (int b = 0; b < B; b++)
    std::fill(qkv.begin() + (long(texts.last_row(b)) + 1) * 3 * C, qkv.begin() + long(b + 1) * T * 3 * C, NAN);
  const DeviceArray<Real> in(qkv), out(size_t(B) * T * C);
  const DeviceArray<int> lengths(texts.lengths());
  decode_attention(out.data(), in.data(), {lengths.data(), T}, B, C, NH, nullptr);
  const std::vector<float> got = last_rows(out, texts.lengths(), T, C, C);
  check_close(got, attention_of<Real>(texts, NH, HS, qkv), 1e-5 + (sizeof(Real) == 2 ? 2 * rounding_of<Real> : 0));
  // The last text alone has the same bits.
  const size_t window = size_t(T) * 3 * C;
  const DeviceArray<Real> alone(of_text(qkv, B - 1, window)), out_alone(size_t(T) * C);
  const DeviceArray<int> length(std::vector<int>{texts.length(B - 1)});
  decode_attention(out_alone.data(), alone.data(), {length.data(), T}, 1, C, NH, nullptr);
  CHECK((of_text(out_alone.floats(), texts.length(B - 1) - 1, size_t(C)) == of_text(got, B - 1, size_t(C))));
}

}  // namespace

TEMPLATE_TEST_CASE("The embedding of the last tokens is the embedding's last rows", "[cuda]", float, bf16, fp16) {
  constexpr int V = 65;
  for (const auto& [B, T, C] : {std::tuple{1, 1, 8}, {3, 7, 48}, {2, 5, 1032}}) {
    const Texts texts = {B, T};
    std::vector<int> x(size_t(B) * T, 1 << 30);  // what is no last token may not be looked up
    for (int b = 0; b < B; b++) x[size_t(texts.last_row(b))] = (b * 31 + 64) % V;
    const std::vector<float> wte = noise(size_t(V) * C, 1), wpe = noise(size_t(T) * C, 2);
    const DeviceArray<TestType> device_wte(wte), device_wpe(wpe), out(size_t(B) * T * C);
    const DeviceArray<int> device_x(x), lengths(texts.lengths());
    decode_embedding(out.data(), device_x.data(), device_wte.data(), device_wpe.data(), {lengths.data(), T}, B, C,
                     nullptr);
    std::vector<float> want;
    for (int b = 0; b < B; b++)
      for (int c = 0; c < C; c++)
        want.push_back(float(TestType(float(TestType(wte[size_t(x[size_t(texts.last_row(b))]) * C + c])) +
                                      float(TestType(wpe[size_t(texts.length(b) - 1) * C + c])))));
    CHECK((last_rows(out, texts.lengths(), T, C, C) == want));
  }
}

TEMPLATE_TEST_CASE("The products of the last rows: LayerNorm before, bias, ReLU or the residual after", "[cuda]", float,
                   bf16, fp16) {
  for (const Shape& s : shapes) {
    check_product<TestType, true, Finish::bias>(s);
    check_product<TestType, false, Finish::residual>(s);
  }
  check_product<TestType, true, Finish::bias>(shapes[2], false);
  check_product<TestType, true, Finish::relu>(shapes[0]);
  check_product<TestType, true, Finish::relu>(shapes[4]);
}

TEMPLATE_TEST_CASE("Attention of the last queries", "[cuda]", float, bf16, fp16) {
  for (const int HS : {16, 32, 64, 128}) {
    check_attention<TestType>({3, 31}, 2, HS);
    check_attention<TestType>({1, 1}, 1, HS);
    check_attention<TestType>({1, 300}, 1, HS);
  }
  check_attention<TestType>({5, 130}, 3, 16);
}

TEST_CASE("The last rows' kernels refuse what they cannot compute", "[cuda]") {
  const DeviceArray<float> x(64);
  const DeviceArray<int> lengths(std::vector<int>{1});
  const LastRows last = {lengths.data(), 1};
  const auto multiply = [&](int B, int C, int OC, int ldo) {
    decode_product<false, Finish::bias>(x.data(), x.data(), nullptr, nullptr, x.data(), nullptr, last, B, C, OC, ldo,
                                        nullptr);
  };
  CHECK_THROWS_WITH(multiply(1, 12, 8, 8), ContainsSubstring("C = 12"));
  CHECK_THROWS_WITH(multiply(1, 8, 8, 7), ContainsSubstring("rows of 7"));
  CHECK_THROWS_WITH(multiply(0, 8, 8, 8), ContainsSubstring("B = 0"));
  CHECK_THROWS_WITH(decode_attention(x.data(), x.data(), last, 1, 48, 2, nullptr), ContainsSubstring("head size 24"));
  CHECK_THROWS_WITH(decode_embedding(x.data(), lengths.data(), x.data(), x.data(), last, 70000, 8, nullptr),
                    ContainsSubstring("B = 70000"));
}
