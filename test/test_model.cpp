// The whole model: its gradient against finite differences, with dropout on, and results that must be exactly equal.
#define MICROGPT_NO_MAIN
#include "../host/run.h"
#include "../train_gpt_cpu.cpp"

#include <functional>

#include "compare.h"
#include "test.h"
#include "tiles.h"

using namespace cpu;

namespace {

const ModelShape tiny = {65, 20, 48, 2, 3};  // V, T, C, L, NH

std::vector<int> some_tokens(size_t count, uint32_t which, int V = tiny.V) {
  std::vector<int> tokens;
  for (size_t i = 0; i < count; i++) tokens.push_back(int(random4(3, which, 0, i).word[0] % uint32_t(V)));
  return tokens;
}

// Weights larger than at the start of training, and biases that are not zero, so that no gradient is small by symmetry.
template <class Real, class Factor>
void randomise(GPT<Real, Factor>& m) {
  for (const TensorSpec& spec : m.param_layout.tensors())
    for (int l = 0; l < spec.layers; l++)
      for (size_t i = 0; i < spec.slice; i++) {
        double x[4];
        normal4(x, random4(4, uint32_t(spec.offset), uint32_t(l), i));
        m.params_memory.data()[spec.offset + l * spec.stride + i] = Real((spec.init == Init::ones) + 0.2 * x[0]);
      }
}

template <class Real, class Factor>
std::vector<Real> gradients(GPT<Real, Factor>& m) {
  std::vector<Real> all;
  for (const TensorSpec& spec : m.param_layout.tensors())
    for (int l = 0; l < spec.layers; l++) {
      const Real* from = m.grads() + spec.offset + l * spec.stride;
      all.insert(all.end(), from, from + spec.slice);
    }
  return all;
}

Dropout dropout_at(int step, int first_row = 0) { return {11, uint32_t(step), 0, dropout_threshold(0.2), first_row}; }

}  // namespace

TEST_CASE("The course's model has 10,788,929 parameters, tensor by tensor") {
  const ModelShape lecture = {65, 256, 384, 6, 6};
  const Layout layout = parameter_layout(lecture);
  CHECK(layout.count() == 10788929);
  size_t block = 0;
  for (const TensorSpec& spec : layout.tensors()) {
    if (spec.layers == 6) block += spec.slice;
    CHECK(spec.offset % 64 == 0);
    CHECK(spec.stride % 64 == 0);
  }
  CHECK(block == 1773312);
  CHECK(find_tensor(layout, "wte").slice == 24960);
  CHECK(find_tensor(layout, "wpe").slice == 98304);
  CHECK(find_tensor(layout, "headw").slice + find_tensor(layout, "headb").slice == 25025);
  CHECK(find_tensor(layout, "headw").padded == 72 * 384);
  CHECK(find_tensor(layout, "headb").padded == 72);
  size_t exported = 0;
  std::set<size_t> places;
  for (const ExportTensor& tensor : export_table(lecture, layout)) {
    exported += tensor.size();
    places.insert(tensor.offset);
  }
  CHECK(exported == layout.count());
  CHECK(places.size() == export_table(lecture, layout).size());
  CHECK(flops_per_token(lecture) == Approx(1104.34e9 / 16384).epsilon(1e-4));
}

TEST_CASE("Initial weights are N(0, 0.02), biases 0, layernorms 1 and 0") {
  const Layout layout = parameter_layout(tiny);
  std::vector<double> params(layout.size());
  init_parameters(params.data(), layout, 1);
  for (const TensorSpec& spec : layout.tensors()) {
    double sum = 0, squares = 0;
    for (int l = 0; l < spec.layers; l++)
      for (size_t i = 0; i < spec.slice; i++) {
        const double x = params[spec.offset + l * spec.stride + i];
        sum += x;
        squares += x * x;
        if (spec.init == Init::ones) REQUIRE(x == 1);
        if (spec.init == Init::zeros) REQUIRE(x == 0);
      }
    if (spec.init != Init::normal) continue;
    const double n = double(spec.layers * spec.slice), scale = 0.02;
    INFO(spec.name);
    CHECK(std::fabs(sum / n) < 4 * scale / std::sqrt(n));
    CHECK(std::fabs(squares / n - scale * scale) < 4 * scale * scale * std::sqrt(2 / n));
  }
  std::vector<double> again(layout.size()), other(layout.size());
  init_parameters(again.data(), layout, 1);
  init_parameters(other.data(), layout, 2);
  CHECK(params[5] == again[5]);
  CHECK(params[5] != other[5]);
}

TEST_CASE("The model's gradient is that of its loss, dropout on") {
  const int B = 2, T = 19;
  GPT<double> m(tiny, B);
  m.prepare_training();
  randomise(m);
  const std::vector<int> x = some_tokens(B * T, 1), y = some_tokens(B * T, 2);
  const double dloss = 1.0 / (B * T);
  const auto loss = [&] {
    forward(m, x.data(), B, T, dropout_at(7));
    return loss_sum(m, y.data(), B, T) * dloss;
  };
  loss();
  zero_gradients(m);
  backward(m, x.data(), y.data(), B, T, dloss, dropout_at(7));
  check_all_canaries(m);
  for (const TensorSpec& spec : m.param_layout.tensors())
    for (int l = 0; l < spec.layers; l++) {
      std::vector<double> got, want;
      for (size_t i = 0; i < spec.slice; i += 1 + spec.slice / 10) {
        double& p = m.params_memory.data()[spec.offset + l * spec.stride + i];
        const double kept = p, h = 1e-5;
        p = kept + h;
        const double up = loss();
        p = kept - h;
        const double down = loss();
        p = kept;
        got.push_back(m.grads()[spec.offset + l * spec.stride + i]);
        want.push_back((up - down) / (2 * h));
      }
      // A hidden unit within h of ReLU's kink would fail the test, but these numbers have none.
      const std::string message = mismatch(got.data(), want.data(), got.size(), 1e-6);
      INFO(spec.name << ", layer " << l << ": " << message);
      CHECK(message.empty());
    }
}

TEMPLATE_TEST_CASE("Losses and gradients are bit-identical with 1, 2 and 3 threads", "", float, bfloat16) {
  const ModelShape shape = {65, 64, 96, 2, 3};  // large enough that every layer uses all threads
  const int B = 8, T = shape.T;
  CHECK(size_t(B) * T * std::min(shape.C, shape.V) > worth_threads);
  const int threads_before = omp_get_max_threads();
  for (const bool tiles : ways_of<TestType>()) {
    const TakeTiles take(tiles);
    std::vector<std::vector<float>> results;
    for (const int threads : {1, 2, 3}) {
      omp_set_num_threads(threads);
      GPT<float, TestType> m(shape, B);
      m.prepare_training();
      init_parameters(m.params_memory.data(), m.param_layout, 1);
      const std::vector<int> x = some_tokens(B * T, 1), y = some_tokens(B * T, 2);
      std::vector<float> result;
      for (int step = 0; step < 3; step++) {
        zero_gradients(m);
        forward(m, x.data(), B, T, dropout_at(step));
        result.push_back(float(loss_sum(m, y.data(), B, T)));
        backward(m, x.data(), y.data(), B, T, 1.0 / (B * T), dropout_at(step));
        update(m, {1e-2, 0.9, 0.99, 1e-8, 0.1, step + 1, 1}, 0.5);
      }
      const std::vector<float> g = gradients(m);
      result.insert(result.end(), g.begin(), g.end());
      results.push_back(result);
    }
    omp_set_num_threads(threads_before);
    CHECK((results[0] == results[1]));
    CHECK((results[0] == results[2]));
    CHECK(results[0][2] < results[0][0]);  // the model learns
  }
}

TEST_CASE("The type of the products is bfloat16 only where it is clearly faster") {
  CHECK(faster_dtype({181, 403}) == "float32");    // as on Emerald Rapids
  CHECK(faster_dtype({2700, 177}) == "bfloat16");  // Emerald Rapids with matrix registers
  CHECK(faster_dtype({488, 243}) == "bfloat16");   // Zen 4
  CHECK(faster_dtype({139, 100}) == "float32");
  CHECK(faster_dtype({141, 100}) == "bfloat16");
}

TEST_CASE("Products of type bfloat16 train as float ones do") {
  const ModelShape shape = {65, 32, 64, 2, 2};
  const int B = 4, T = shape.T;
  const auto losses = [&](auto& m) {
    m.prepare_training();
    init_parameters(m.params_memory.data(), m.param_layout, 1);
    const std::vector<int> x = some_tokens(B * T, 1), y = some_tokens(B * T, 2);
    std::vector<double> out;
    for (int step = 0; step < 30; step++) {
      zero_gradients(m);
      forward(m, x.data(), B, T, dropout_at(step));
      out.push_back(loss_sum(m, y.data(), B, T) / (B * T));
      backward(m, x.data(), y.data(), B, T, 1.0 / (B * T), dropout_at(step));
      update(m, {3e-3, 0.9, 0.99, 1e-8, 0.1, step + 1, 1}, 1);
    }
    return out;
  };
  GPT<float> exact(shape, B);
  GPT<float, bfloat16> rounded(shape, B);
  const std::vector<double> want = losses(exact), got = losses(rounded);
  CHECK(got != want);
  CHECK(want.back() < want.front() - 0.5);
  for (size_t i = 0; i < want.size(); i++) CHECK(got[i] == Approx(want[i]).margin(0.02));
}

TEST_CASE("Two batches of B/2 accumulate to one of B, dropout on") {
  const int B = 4, T = 20;
  const std::vector<int> x = some_tokens(B * T, 1), y = some_tokens(B * T, 2);
  GPT<double> whole(tiny, B), halves(tiny, B / 2);
  for (GPT<double>* m : {&whole, &halves}) {
    m->prepare_training();
    randomise(*m);
    zero_gradients(*m);
  }
  const double dloss = 1.0 / (B * T);
  forward(whole, x.data(), B, T, dropout_at(3));
  double loss = loss_sum(whole, y.data(), B, T), loss_of_halves = 0;
  backward(whole, x.data(), y.data(), B, T, dloss, dropout_at(3));
  for (int b = 0; b < B; b += B / 2) {
    forward(halves, &x[b * T], B / 2, T, dropout_at(3, b));
    loss_of_halves += loss_sum(halves, &y[b * T], B / 2, T);
    backward(halves, &x[b * T], &y[b * T], B / 2, T, dloss, dropout_at(3, b));
  }
  CHECK(loss_of_halves == Approx(loss).epsilon(1e-13));
  const std::vector<double> a = gradients(whole), b = gradients(halves);
  CHECK(mismatch(b.data(), a.data(), a.size(), 1e-12) == "");
}

TEMPLATE_TEST_CASE("Logits of cached keys and values are those of the whole text, bit by bit", "", float, bfloat16) {
  for (const bool tiles : ways_of<TestType>()) {
    const TakeTiles take(tiles);
    GPT<float, TestType> whole(tiny, 1), cached(tiny, 1);
    randomise(whole);
    randomise(cached);
    const std::vector<int> x = some_tokens(tiny.T, 1);
    int known = 0;
    for (const int n : {1, 2, 3, 9, 10, 20}) {
      forward(whole, x.data(), 1, n);
      if (n == 3) pack_weights(cached);
      const float *a = whole.a.logits + (n - 1) * tiny.V,
                  *b = forward(cached, x.data() + known, 1, n, {}, known, n != 9);
      CHECK((std::vector<float>(a, a + tiny.V) == std::vector<float>(b, b + tiny.V)));
      known = n;
    }
  }
}

TEST_CASE("Weights that were packed for sampling are forgotten when they change") {
  GPT<float> m(tiny, 1);
  m.prepare_training();
  randomise(m);
  zero_gradients(m);
  const std::vector<int> x = some_tokens(tiny.T, 1);
  pack_weights(m);
  update(m, {0.1, 0.9, 0.99, 1e-8, 0.5, 1, 1}, 0);  // the gradient is zero: weight decay alone acts
  const float* logits = forward(m, x.data(), 1, tiny.T);
  const std::vector<float> got(logits, logits + tiny.V);
  m.packed = {};
  forward(m, x.data(), 1, tiny.T);
  CHECK((got == std::vector<float>(logits, logits + tiny.V)));
}

TEST_CASE("What follows a token does not change its logits") {
  GPT<float> m(tiny, 1);
  randomise(m);
  std::vector<int> x = some_tokens(tiny.T, 1);
  forward(m, x.data(), 1, tiny.T);
  const std::vector<float> before(m.a.logits, m.a.logits + tiny.T * tiny.V);
  x[10] = (x[10] + 1) % tiny.V;
  forward(m, x.data(), 1, tiny.T);
  const std::vector<float> after(m.a.logits, m.a.logits + tiny.T * tiny.V);
  CHECK(std::equal(before.begin(), before.begin() + 10 * tiny.V, after.begin()));
  for (int t = 10; t < tiny.T; t++)
    CHECK(!std::equal(&before[t * tiny.V], &before[t * tiny.V] + tiny.V, &after[t * tiny.V]));
}

TEST_CASE("Clipping scales the gradient to the norm that is asked for") {
  GPT<double> m(tiny, 1);
  m.prepare_training();
  zero_gradients(m);
  m.dw.wte[0] = 3;
  m.dw.headb[64] = 4;  // a norm of 5
  // With beta1 = 0, the first m is the scaled gradient: (1 - 0) * g.
  update(m, {0, 0, 0.9, 1e-8, 0, 1, 1}, 1);
  const auto moments = placed<Params<double>>(m.m_memory.data(), tiny);
  CHECK(moments.wte[0] == Approx(0.6));
  CHECK(moments.headb[64] == Approx(0.8));
  update(m, {0, 0, 0.9, 1e-8, 0, 1, 1}, 10);
  CHECK(moments.wte[0] == 3);
}

TEST_CASE("A write behind a tensor is found and named") {
  GPT<float> m(tiny, 1);
  m.prepare_training();
  check_all_canaries(m);
  m.a.logits[tiny.T * tiny.V] = 0;
  CHECK_THROWS_WITH(check_all_canaries(m), "something was written 0 elements behind activations.logits, layer 0");
}
