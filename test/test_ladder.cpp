// The ladder's networks: every gradient against finite differences in double; what a WaveNet sees and remembers.
#include <cmath>

#include "../dev/ladder/2_bigram.cpp"
#include "../dev/ladder/3_mlp.cpp"
#include "../dev/ladder/4_wavenet.cpp"
#include "../dev/ladder/5_residual.cpp"
#include "../dev/ladder/6_transformer.cpp"
#include "compare.h"
#include "test.h"

namespace {

std::vector<int> tokens(int count, int V) {
  std::vector<int> x(count);
  for (int i = 0; i < count; i++) x[i] = int(random4(7, 0, 0, uint64_t(i)).word[0] % uint32_t(V));
  return x;
}

// Fills what is learned with noise, so that nothing is special, and compares every tensor's gradient of a random
// combination of the logits with central differences, at up to forty of its elements.
template <class Net>
void check_gradients(Net& net, int B, int T, const ladder::Mode& mode) {
  const std::vector<int> x = tokens(B * T, net.V);
  const int rows = Net::every_position ? B * T : B;
  std::vector<double> dlogits(size_t(rows) * net.V);
  ladder::fill_normal(dlogits.data(), dlogits.size(), 1, 5, 99);
  uint32_t number = 0;
  for (const TensorSpec& spec : net.param_layout.tensors())
    for (int l = 0; l < spec.layers; l++)
      ladder::fill_normal(net.params.data() + spec.offset + l * spec.stride, spec.slice, 0.5, 6, number++);
  const auto f = [&] {
    const double* logits = net.forward(x.data(), B, T, mode);
    double sum = 0;
    for (size_t i = 0; i < dlogits.size(); i++) sum += logits[i] * dlogits[i];
    return sum;
  };
  for (const TensorSpec& spec : net.param_layout.tensors())
    for (int l = 0; l < spec.layers; l++)
      std::fill_n(net.grads.data() + spec.offset + l * spec.stride, spec.slice, 0.25);  // += is what is asked for
  f();
  net.backward(x.data(), dlogits.data(), B, T, mode);
  for (const TensorSpec& spec : net.param_layout.tensors())
    for (int l = 0; l < spec.layers; l++) {
      INFO(spec.name << " " << l);
      double *p = net.params.data() + spec.offset + l * spec.stride, *g = net.grads.data() + spec.offset + l * spec.stride;
      std::vector<double> got, want;
      for (size_t i = 0; i < spec.slice; i += std::max<size_t>(1, spec.slice / 40)) {
        const double h = 1e-5, kept = p[i];
        p[i] = kept + h;
        const double up = f();
        p[i] = kept - h;
        const double down = f();
        p[i] = kept;
        got.push_back(g[i] - 0.25);
        want.push_back((up - down) / (2 * h));
      }
      check_close(got, want, 1e-6);
    }
  check_canaries(net.acts.data(), net.act_layout, "activations");
  check_canaries(net.grads.data(), net.param_layout, "gradients");
}

const ladder::Mode training = {true, {3, 4, 0, dropout_threshold(0), 0}};

}  // namespace

TEST_CASE("ladder: gradients of the bigram", "[ladder]") {
  bigram::Net<double> net(7, 5, 3);
  check_gradients(net, 3, 5, training);
}

TEST_CASE("ladder: gradients of the MLP and of the tree", "[ladder]") {
  for (const bool batchnorm : {true, false})
    for (const int fan : {8, 2}) {
      INFO("batchnorm " << batchnorm << ", fan " << fan);
      mlp::Shape shape;
      shape.V = 11, shape.E = 5, shape.H = 7, shape.fan = fan, shape.batchnorm = batchnorm;
      mlp::Net<double> net(shape, 6);
      check_gradients(net, 6, shape.K, training);
    }
}

TEST_CASE("ladder: gradients of the WaveNet", "[ladder]") {
  wavenet::Shape shape;
  shape.V = 11, shape.T = 9, shape.C = 6, shape.S = 10, shape.doublings = 3, shape.stacks = 2;
  wavenet::Net<double> net(shape, 2);
  for (const int T : {9, 5, 1}) check_gradients(net, 2, T, training);
}

TEST_CASE("ladder: a WaveNet sees its receptive field and not one character more", "[ladder]") {
  wavenet::Shape shape;
  shape.V = 11, shape.T = 40, shape.C = 8, shape.S = 8, shape.doublings = 3, shape.stacks = 2;
  const int seen = shape.receptive_field(), V = shape.V;
  REQUIRE(seen == 1 + 2 * (1 + 2 + 4));
  wavenet::Net<double> net(shape, 1);
  net.init(1);
  std::vector<int> x = tokens(shape.T, V);
  const auto last = [&] {
    const double* logits = net.forward(x.data(), 1, shape.T, {}) + size_t(shape.T - 1) * V;
    return std::vector<double>(logits, logits + V);
  };
  const std::vector<double> before = last();
  for (int back = 0; back < shape.T; back++) {  // back = 0: the last character itself
    INFO(back);
    int& token = x[size_t(shape.T - 1 - back)];
    const int kept = token;
    token = (token + 1) % V;
    CHECK((last() == before) == (back >= seen));
    token = kept;
  }
}

TEST_CASE("ladder: a WaveNet that remembers writes what one that does not would", "[ladder]") {
  wavenet::Shape shape;
  shape.V = 11, shape.T = 40, shape.C = 33, shape.S = 17, shape.doublings = 3, shape.stacks = 2;
  wavenet::Net<float> net(shape, 1);
  net.init(1);
  const std::vector<int> x = tokens(shape.T, shape.V);
  const float* logits = net.forward(x.data(), 1, shape.T, {});
  const std::vector<float> whole(logits, logits + size_t(shape.T) * shape.V);
  for (int round = 0; round < 2; round++) {  // nothing of the first text is left in the second
    for (int t = 0; t < shape.T; t++) {
      const float* row = net.next_logits(x.data(), t + 1, t);
      const std::vector<float> got(row, row + shape.V), want(whole.begin() + t * shape.V, whole.begin() + (t + 1) * shape.V);
      INFO("position " << t);
      CHECK((got == want));
    }
  }
}

TEST_CASE("ladder: gradients of the residual network", "[ladder]") {
  for (const bool skips : {true, false}) {
    INFO("skips " << skips);
    residual_net::Shape shape;
    shape.V = 11, shape.K = 3, shape.E = 5, shape.C = 9, shape.L = 3, shape.skips = skips;
    residual_net::Net<double> net(shape, 5);
    check_gradients(net, 5, shape.K, training);
  }
}

TEST_CASE("ladder: gradients of the transformer with each of its pieces", "[ladder]") {
  transformer::Shape shape;
  shape.V = 11, shape.T = 5, shape.C = 6;
  const auto check = [&](double dropout) {
    INFO(shape.heads << " heads, " << shape.feed_forward << shape.residual << shape.layernorm << ", dropout " << dropout);
    transformer::Net<double> net(shape, 2);
    for (const int T : {5, 1})
      check_gradients(net, 2, T, ladder::Mode{true, {3, 4, 0, dropout_threshold(dropout), 0}});
  };
  check(0);
  shape.heads = 3;
  check(0);
  shape.feed_forward = true;
  check(0);
  shape.residual = true, shape.L = 2;
  check(0);
  shape.layernorm = true;
  check(0);
  check(0.3);
}
