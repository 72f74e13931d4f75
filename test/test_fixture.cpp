// The whole model against PyTorch: test/fixture.safetensors holds weights and a batch, and the logits, the loss, the
// gradients and the losses of ten AdamW steps that dev/check/reference.py computed from them in double precision.
#define MICROGPT_NO_MAIN
#include "../train_gpt_cpu.cpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../host/safetensors.h"
#include "compare.h"
#include "test.h"

using namespace cpu;

namespace {

const SafetensorsFile& fixture() {
  static const SafetensorsFile file("test/fixture.safetensors");
  return file;
}

const double* numbers(const std::string& name, size_t count) {
  const TensorView& tensor = fixture().find(name);
  REQUIRE(tensor.dtype == "F64");
  REQUIRE(tensor.bytes() == count * sizeof(double));
  return static_cast<const double*>(tensor.data);
}

template <class Got>
void check_close(const std::string& what, const Got* got, const double* want, size_t n, double tolerance) {
  const std::string message = mismatch(got, want, n, tolerance);
  INFO(what << ": " << message);
  CHECK(message.empty());
}

struct Batch {
  std::vector<int> x, y;
  int B, T;
};

Batch fixture_batch() {
  const auto tokens = [](const char* name) {
    const TensorView& tensor = fixture().find(name);
    REQUIRE(tensor.dtype == "I64");
    const int64_t* first = static_cast<const int64_t*>(tensor.data);
    return std::vector<int>(first, first + tensor.bytes() / sizeof(int64_t));
  };
  const std::vector<size_t>& shape = fixture().find("x").shape;
  REQUIRE(shape.size() == 2);
  return {tokens("x"), tokens("y"), int(shape[0]), int(shape[1])};
}

// The fixture's sizes, from the shapes and names of its tensors.
ModelShape fixture_shape() {
  ModelShape shape;
  shape.V = int(fixture().find("token_embedding_table.weight").shape[0]);
  shape.C = int(fixture().find("token_embedding_table.weight").shape[1]);
  shape.T = int(fixture().find("position_embedding_table.weight").shape[0]);
  while (fixture().maybe("blocks." + std::to_string(shape.L) + ".ln1.weight")) shape.L++;
  while (fixture().maybe("blocks.0.sa.heads." + std::to_string(shape.NH) + ".key.weight")) shape.NH++;
  return shape;
}

// A model with the fixture's weights. It has room for one row more than the batch has: code that takes the model's T
// for the batch's, or allocated rows for rows in use, fails the test.
template <class Real>
GPT<Real> fixture_model(int B) {
  GPT<Real> m(fixture_shape(), B + 1);
  m.prepare_training();
  for (const ExportTensor& tensor : export_table(m.shape, m.param_layout)) {
    REQUIRE(fixture().find(tensor.name).shape == tensor.shape);
    const double* from = numbers(tensor.name, tensor.size());
    std::transform(from, from + tensor.size(), m.params_memory.data() + tensor.offset,
                   [](double x) { return Real(x); });
  }
  return m;
}

// Each tolerance is relative to an element and its tensor's root mean square, see compare.h.
template <class Real>
void check_model(double tolerance) {
  const Batch batch = fixture_batch();
  const int B = batch.B, T = batch.T;
  const double rows = double(B) * T;
  GPT<Real> m = fixture_model<Real>(B);
  REQUIRE(T < m.shape.T);

  forward(m, batch.x.data(), B, T);
  check_close("logits", m.a.logits, numbers("logits", size_t(B) * T * m.shape.V), size_t(B) * T * m.shape.V, tolerance);
  const double loss = loss_sum(m, batch.y.data(), B, T) / rows;
  check_close("loss", &loss, numbers("loss", 1), 1, tolerance);

  zero_gradients(m);
  backward(m, batch.x.data(), batch.y.data(), B, T, 1 / rows);
  for (const ExportTensor& tensor : export_table(m.shape, m.param_layout))
    check_close("grad." + tensor.name, m.grads() + tensor.offset, numbers("grad." + tensor.name, tensor.size()),
                tensor.size(), tolerance);

  double losses[10];
  for (int step = 1; step <= 10; step++) {
    update(m, {1e-3, 0.9, 0.99, 1e-8, 0.1, step, 1}, 0);
    forward(m, batch.x.data(), B, T);
    losses[step - 1] = loss_sum(m, batch.y.data(), B, T) / rows;
    zero_gradients(m);
    backward(m, batch.x.data(), batch.y.data(), B, T, 1 / rows);
  }
  check_close("losses", losses, numbers("losses", 10), 10, tolerance);
  check_all_canaries(m);
}

}  // namespace

TEST_CASE("the model does what PyTorch does: double") { check_model<double>(1e-9); }

TEST_CASE("the model does what PyTorch does: float") { check_model<float>(1e-5); }

TEST_CASE("gradients are added, not written") {
  const Batch batch = fixture_batch();
  const int B = batch.B, T = batch.T;
  GPT<double> m = fixture_model<double>(B);
  zero_gradients(m);
  for (const double share : {0.25, 0.75}) {
    forward(m, batch.x.data(), B, T);
    loss_sum(m, batch.y.data(), B, T);
    backward(m, batch.x.data(), batch.y.data(), B, T, share / (double(B) * T));
  }
  for (const ExportTensor& tensor : export_table(m.shape, m.param_layout))
    check_close("grad." + tensor.name, m.grads() + tensor.offset, numbers("grad." + tensor.name, tensor.size()),
                tensor.size(), 1e-9);
}

TEST_CASE("every tensor of the fixture is looked at") {
  const ModelShape shape = fixture_shape();
  const size_t parameters = export_table(shape, parameter_layout(shape)).size();
  CHECK(fixture().tensors().size() == 2 * parameters + 5);  // x, y, logits, loss, losses
}

TEST_CASE("a wrong gradient does not pass the comparison") {
  const std::string name = "grad.blocks.1.sa.heads.2.key.weight";
  const size_t n = fixture().find(name).bytes() / sizeof(double);
  const double* want = numbers(name, n);
  std::vector<double> got(want, want + n);
  CHECK(mismatch(got.data(), want, n, 1e-9) == "");

  const size_t typical = size_t(std::max_element(want, want + n) - want);
  SECTION("a sign") { got[typical] = -got[typical]; }
  SECTION("a last digit or two") { got[typical] *= 1 + 1e-7; }
  SECTION("an element missing") { got[typical] = 0; }
  SECTION("a factor") {
    for (double& g : got) g *= 1 + 1e-8;
    CHECK(mismatch(got.data(), want, n, 1e-9).find("times the error allowed") != std::string::npos);
    return;
  }
  SECTION("the transpose") {
    const size_t C = fixture().find(name).shape[1], HS = n / C;
    for (size_t i = 0; i < HS; i++)
      for (size_t c = 0; c < C; c++) got[c * HS + i] = want[i * C + c];
    CHECK(mismatch(got.data(), want, n, 1e-9) != "");
    return;
  }
  SECTION("NaN") { got[typical] = std::numeric_limits<double>::quiet_NaN(); }
  SECTION("infinity") { got[typical] = -std::numeric_limits<double>::infinity(); }
  const std::string message = mismatch(got.data(), want, n, 1e-9);
  INFO(message);
  CHECK(message.find("element " + std::to_string(typical) + " of " + std::to_string(n)) == 0);
  CHECK(compare(got.data(), want, n, 1e-9).index == typical);
  CHECK(compare(got.data(), want, n, 1e-9).share > 1);
}

TEST_CASE("the comparison's corners") {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const double zero[3] = {0, 0, 0}, tiny[3] = {0, 1e-300, 0}, one[3] = {1, 1, 1}, near[3] = {1, 1 + 1.9e-6, 1};
  const double with_inf[3] = {1, inf, 1}, with_nan[3] = {1, 1, nan};
  CHECK(mismatch(zero, zero, 3, 1e-6) == "");
  CHECK(mismatch(tiny, zero, 3, 1e-6) != "");  // if all numbers should be zero, the tolerance is zero too
  CHECK(mismatch(near, one, 3, 1e-6) == "");   // 1e-6 * (1 + rms) is twice the tolerance
  CHECK(mismatch(near, one, 3, 0.9e-6) != "");
  CHECK(compare(near, one, 3, 1e-6).share == Approx(0.95).epsilon(1e-6));
  CHECK(mismatch(with_inf, with_inf, 3, 1e-6) != "");  // equal, but not finite
  CHECK(mismatch(with_nan, with_nan, 3, 1e-6) != "");
  CHECK(mismatch(one, with_inf, 3, 1e-6) != "");
  CHECK(mismatch(one, with_nan, 3, 1e-6) != "");
  CHECK(mismatch(with_inf, one, 3, 1e-6).find("element 1") == 0);
  CHECK(mismatch(with_nan, one, 3, 1e-6).find("element 2") == 0);
  CHECK(mismatch(one, one, 0, 1e-6) == "");
}
