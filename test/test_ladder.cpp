// The ladder's networks: every gradient against finite differences in double; which characters a WaveNet sees, and
// whether it remembers them correctly.
#include <cmath>

#include "../dev/ladder/0_gradient_descent.cpp"
#include "../dev/ladder/1_counted.cpp"
#include "../dev/ladder/2_bigram.cpp"
#include "../dev/ladder/3_mlp.cpp"
#include "../dev/ladder/4_wavenet.cpp"
#include "../dev/ladder/5_residual.cpp"
#include "../dev/ladder/6_transformer.cpp"
#include "gradient.h"
#include "trainer.h"

namespace {

std::vector<int> tokens(int count, int V) {
  std::vector<int> x(count);
  for (int i = 0; i < count; i++) x[i] = int(random4(7, 0, 0, uint64_t(i)).word[0] % uint32_t(V));
  return x;
}

// Fills the parameters with noise, so that nothing is special. The loss is a random combination of the logits. Compares
// about a hundred elements of each parameter's gradient with central differences.
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
      std::fill_n(net.grads.data() + spec.offset + l * spec.stride, spec.slice, 0.25);  // backward has to add
  f();
  net.backward(x.data(), dlogits.data(), B, T, mode);
  for (const TensorSpec& spec : net.param_layout.tensors())
    for (int l = 0; l < spec.layers; l++) {
      INFO(spec.name << " " << l);
      double *p = net.params.data() + spec.offset + l * spec.stride,
             *g = net.grads.data() + spec.offset + l * spec.stride;
      for (size_t i = 0; i < spec.slice; i++) g[i] -= 0.25;
      check_gradient(p, g, spec.slice, f, 1e-6);
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
  for (int round = 0; round < 2; round++) {  // the second round must not see what the first one left
    for (int t = 0; t < shape.T; t++) {
      const float* row = net.next_logits(x.data(), t + 1, t);
      const std::vector<float> got(row, row + shape.V),
          want(whole.begin() + t * shape.V, whole.begin() + (t + 1) * shape.V);
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
    INFO(shape.heads << " heads, " << shape.feed_forward << shape.residual << shape.layernorm << ", dropout "
                     << dropout);
    transformer::Net<double> net(shape, 2);
    for (const int T : {5, 1}) check_gradients(net, 2, T, ladder::Mode{true, {3, 4, 0, dropout_threshold(dropout), 0}});
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

TEST_CASE("ladder: the engine's derivatives, and those of the trainer's layers by it", "[ladder]") {
  // f uses each operation; a's path through it forks and joins.
  const auto f = [](const Scalar& a, const Scalar& b) {
    const Scalar c = a * b + tanh(a), d = relu(c) + relu(-1.0 * c) / b;
    return exp(c * 0.3) - log(d + 2) * pow(b, 1.7) + c * a;
  };
  for (const auto& [x, y] : {std::pair{0.7, 1.3}, {-1.2, 0.4}, {-0.3, 2.5}}) {
    const Scalar a = x, b = y;
    f(a, b).backward();
    const double h = 1e-6;
    CHECK(a.grad() == Approx((f(x + h, y).value() - f(x - h, y).value()) / (2 * h)).epsilon(1e-7));
    CHECK(b.grad() == Approx((f(x, y + h).value() - f(x, y - h).value()) / (2 * h)).epsilon(1e-7));
  }
  const Scalar a = 2, c = a * a;
  c.backward();
  c.backward();
  CHECK(a.grad() == 8);  // a second backward adds to it, as documented
  CHECK(gradient_descent::layernorm_difference() < 1e-12);
  CHECK(gradient_descent::crossentropy_difference() < 1e-12);
  CHECK(gradient_descent::attention_difference() < 1e-12);
}

TEST_CASE("ladder: counting by hand", "[ladder]") {
  const std::vector<int> text = {0, 1, 0, 1, 0, 2, 0};  // 01 twice, 02 once, 10 twice, 20 once
  counted::Model bigram(3, 1);
  bigram.count(text);
  CHECK(bigram.probability(0, 1, 1) == Approx((2 + 1) / (3 + 3.0)));
  CHECK(bigram.probability(2, 0, 0) == 1);
  CHECK(bigram.loss(text, 1) == Approx(bigram_loss(text, text, 3)));
  CHECK(bigram.loss(text, 0) == Approx(bigram_loss(text, text, 3, 0)));
  CHECK(bigram.loss(text, 0) == Approx(-(2 * std::log(2 / 3.0) + std::log(1 / 3.0)) / 6));
  counted::Model trigram(3, 2);
  trigram.count(text);
  CHECK(trigram.probability(0 * 3 + 1, 0, 0) == 1);
  CHECK(trigram.probability(1 * 3 + 0, 1, 0) == 0.5);
  const int context[] = {2, 1, 0};
  CHECK(std::exp(trigram.next_logits(context, 3, 0)[2]) == Approx((1 + 1) / (2 + 3.0)));
}

namespace {

const std::string ladder_program = program("ladder/ladder");

// A text with lines, long enough for every rung's windows.
std::string with_text() {
  std::string text;
  for (int i = 0; i < 600; i++) text += i % 3 ? "the cat sat on a mat\n" : "a dog ran, too\n";
  return prepared(text);
}

}  // namespace

TEST_CASE("ladder: every rung runs, and the report tells of it", "[ladder]") {
  const std::string folder = with_text(), data = " --data " + folder + "/data", out = folder + "/ladder";
  const std::string brief = data + " --max_iters=3 --eval_interval=2 --eval_iters=1 --batch_size=8 --threads=2";
  const std::pair<const char*, std::string> runs[] = {
      {"gradient_descent", " --max_iters=2 --points=6 --hidden=3"},
      {"counted", data},
      {"bigram", brief},
      {"tree", brief + " --hidden=8"},
      {"wavenet", brief + " --block_size=20 --channels=8 --skip_channels=8 --doublings=2"},
      {"residual", brief + " --channels=8 --deepest=4"},
      {"transformer", brief + " --block_size=4 --n_embd=8"},
  };
  for (const auto& [rung, flags] : runs) {
    const Run r = run(ladder_program + " " + rung + flags + " --out_dir " + out + "/" + rung);
    INFO(rung << ": " << r.err);
    CHECK(r.code == 0);
    CHECK(fs::exists(out + "/" + rung + "/result.json"));
    CHECK(!fs::exists(out + "/" + rung + "/lock"));
  }
  const Run r = run(ladder_program + " report" + data + " --out_dir " + out);
  INFO(r.err);
  CHECK(r.code == 1);  // two steps do not tell the moons apart
  CHECK(contains(read_file(out + "/README.md"), "- **missed**: "));
  const std::string report = read_file(out + "/README.md");
  for (const char* part : {"| bigram, counted | ", "| Tree of pairs | ", "| WaveNet | ", "| 4 blocks, without | ",
                           "| + layernorm | ", "Receptive field: 7 characters", "~~~\n", "4.4e-16"})
    CHECK(contains(report, part));

  // Equal flags give equal bytes: apart from the times, a rung depends only on its seed and its text.
  const auto numbers = [&](const std::string& where) {
    nlohmann::json json = nlohmann::json::parse(read_file(where + "/result.json"));
    for (auto& row : json["rows"]) row.erase("seconds"), row.erase("record");
    return json.dump();
  };
  REQUIRE(run(ladder_program + " transformer" + runs[6].second + " --threads=1 --out_dir " + folder + "/again").code ==
          0);
  CHECK(numbers(folder + "/again") == numbers(out + "/transformer"));

  write_file(out + "/bigram/result.json", "{}");
  check_refused(ladder_program + " report" + data + " --out_dir " + out, "/bigram/result.json is damaged");
}

TEST_CASE("ladder: a rung says what it missed where it had a chance to reach it", "[ladder]") {
  std::string text;  // as long as Tiny Shakespeare
  for (int i = 0; i < 1115394; i++) text += char('0' + i % 65);
  const std::string missed = "MISSED: counted bigram, val ", counted = ladder_program +
                                                                       " counted --seed=3 --data=" + prepared(text) +
                                                                       "/data --out_dir=" + test_folder();
  CHECK(contains(run(counted).out, missed));
  const Run other = run(counted + " --order=1");
  CHECK(other.code == 0);
  CHECK(!contains(other.out, missed));
  CHECK(!contains(run(ladder_program + " counted --data " + with_text() + "/data --out_dir " + test_folder()).out,
                  missed));
}

TEST_CASE("ladder: what cannot be is refused", "[ladder]") {
  const std::string folder = with_text(), data = " --data " + folder + "/data --out_dir " + folder + "/out";
  check_refused(ladder_program + " wavnet", "'wavnet' is not a rung of the ladder; the nearest is wavenet");
  check_refused(ladder_program + " wavenet --chanels=3",
                "--chanels is not a flag of wavenet; the nearest is --channels");
  check_refused(ladder_program + " mlp --block_size=9" + data, "--block_size 9 is not a power of --fan 8");
  check_refused(ladder_program + " transformer --n_head=5" + data, "--n_embd 32 is not a multiple of --n_head 5");
  check_refused(ladder_program + " gradient_descent --hidden=1000 --points=10000 --out_dir " + folder + "/out",
                "lower --points or --hidden");
  check_refused(ladder_program + " mlp --hidden=0" + data, "--hidden is a whole number from 1 to 100000, not '0'");
  check_refused(ladder_program + " wavenet --channels=100000" + data,
                "MB; lower --batch_size or the sizes of the network");
  check_refused(ladder_program + " bigram --block_size=99999" + data, "a window of --block_size 99999 needs 100000");
  check_refused(ladder_program + " bigram --data " + folder + "/nothing", "/nothing/vocab.json");
  check_refused(ladder_program + " bigram --learning_rate=10 --max_iters=900 --weight_decay=10" + data, "not finite");
  check_refused(ladder_program + " report --out_dir " + folder + "/empty", "no rung has been trained in ");
  CHECK(run(ladder_program).out == run(ladder_program + " --help").out);
  CHECK(contains(run(ladder_program + " wavenet --help").out, "  --doublings 6 "));
}
