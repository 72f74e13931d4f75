// Rung 0, gradient descent: Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", Nature
// 1986; Karpathy's first lecture. A small network is built from single numbers (scalar.h), each of which knows how it
// came about; it learns to tell two interleaved half moons apart. Everything above this rung computes the same
// derivatives, by hand and for whole arrays: the last lines here check that, for three of the trainer's layers.
#include <cmath>

#include "charts.h"
#include "rung.h"
#include "rungs.h"
#include "scalar.h"

#include "../../host/plot.h"
#include "../../host/progress.h"
#include "../../kernels/attention.h"
#include "../../kernels/layernorm.h"

namespace gradient_descent {

struct Point {
  double x, y, label;  // label: 1 or -1
};

// Two half circles, the second upside down and shifted into the first, with noise around them.
inline std::vector<Point> two_moons(int count, double noise, uint64_t seed) {
  std::vector<Point> points;
  for (int i = 0; i < count; i++) {
    double normal[4];
    normal4(normal, random4(seed, 0, site::init, uint64_t(i)));
    const double angle = M_PI * (i / 2) / (count / 2 - 1.0);
    const bool upper = i % 2 == 0;
    points.push_back({(upper ? std::cos(angle) : 1 - std::cos(angle)) + noise * normal[0],
                      (upper ? std::sin(angle) : 0.5 - std::sin(angle)) + noise * normal[1], upper ? 1.0 : -1.0});
  }
  return points;
}

// Layers of neurons, tanh(w . x + b) each; the last neuron has no tanh.
class Net {
 public:
  Net(const std::vector<int>& sizes, uint64_t seed) : sizes_(sizes) {
    for (size_t l = 1; l < sizes.size(); l++)
      for (int i = 0; i < sizes[l] * (sizes[l - 1] + 1); i++) {
        double normal[4];
        normal4(normal, random4(seed, 1, site::init + uint32_t(l), uint64_t(i)));
        weights_.push_back(normal[0] / std::sqrt(sizes[l - 1]));
      }
  }
  std::vector<Scalar>& weights() { return weights_; }

  Scalar operator()(double x, double y) const {
    std::vector<Scalar> values = {x, y};
    auto weight = weights_.begin();
    for (size_t l = 1; l < sizes_.size(); l++) {
      std::vector<Scalar> next;
      for (int i = 0; i < sizes_[l]; i++) {
        Scalar sum = *weight++;
        for (const Scalar& value : values) sum += *weight++ * value;
        next.push_back(l + 1 < sizes_.size() ? tanh(sum) : sum);
      }
      values = next;
    }
    return values[0];
  }

 private:
  std::vector<int> sizes_;
  std::vector<Scalar> weights_;
};

// The mean over the points of log(1 + exp(-label * f)): the cross-entropy of two classes.
inline Scalar loss_of(const Net& net, const std::vector<Point>& points) {
  Scalar sum = 0;
  for (const Point& p : points) sum += log(1 + exp(-p.label * net(p.x, p.y)));
  return sum * (1.0 / double(points.size()));
}

// ---------------------------------------------------------------------------------------------------------------------
// The bridge to the other end of the ladder. For each layer we take a random combination of its outputs and compute its
// gradients twice, by the engine and by the layer's own backward function. How far are they apart, at most?

inline std::vector<double> noise(size_t count, uint32_t number) {
  std::vector<double> values(count);
  ladder::fill_normal(values.data(), count, 1, 42, number);
  return values;
}
inline std::vector<Scalar> scalars(const std::vector<double>& values) { return {values.begin(), values.end()}; }
inline Scalar combined(const std::vector<Scalar>& out, const std::vector<double>& dout) {
  Scalar sum = 0;
  for (size_t i = 0; i < out.size(); i++) sum += out[i] * dout[i];
  return sum;
}
inline double difference(const std::vector<Scalar>& x, const std::vector<double>& dx) {
  double largest = 0;
  for (size_t i = 0; i < x.size(); i++) largest = std::fmax(largest, std::fabs(x[i].grad() - dx[i]));
  return largest;
}

inline double layernorm_difference() {
  const int rows = 3, C = 5;
  const auto inp = noise(rows * C, 1), weight = noise(C, 2), bias = noise(C, 3), dout = noise(rows * C, 4);
  const auto x = scalars(inp), w = scalars(weight), b = scalars(bias);
  std::vector<Scalar> out;
  for (int r = 0; r < rows; r++) {
    Scalar mean = 0, variance = 0;
    for (int c = 0; c < C; c++) mean += x[r * C + c] * (1.0 / C);
    for (int c = 0; c < C; c++) variance += pow(x[r * C + c] - mean, 2) * (1.0 / C);
    for (int c = 0; c < C; c++) out.push_back((x[r * C + c] - mean) * pow(variance + 1e-5, -0.5) * w[c] + b[c]);
  }
  combined(out, dout).backward();

  std::vector<double> y(rows * C), mean(rows), rstd(rows), dinp(rows * C), dweight(C), dbias(C);
  layernorm_forward(y.data(), mean.data(), rstd.data(), inp.data(), weight.data(), bias.data(), rows, C);
  layernorm_backward(dinp.data(), dweight.data(), dbias.data(), dout.data(), inp.data(), mean.data(), rstd.data(),
                     weight.data(), rows, C);
  return std::fmax(difference(x, dinp), std::fmax(difference(w, dweight), difference(b, dbias)));
}

inline double crossentropy_difference() {
  const int rows = 3, V = 6, targets[rows] = {2, 0, 5};
  const auto logits = noise(rows * V, 5);
  const auto x = scalars(logits);
  Scalar loss = 0;
  for (int r = 0; r < rows; r++) {
    Scalar sum = 0;
    for (int v = 0; v < V; v++) sum += exp(x[r * V + v]);
    loss += (log(sum) - x[r * V + targets[r]]) * (1.0 / rows);
  }
  loss.backward();

  std::vector<double> losses(rows), probs(rows * V), dlogits(rows * V);
  crossentropy_forward(losses.data(), probs.data(), logits.data(), targets, rows, V);
  crossentropy_backward(dlogits.data(), probs.data(), targets, 1.0 / rows, rows, V);
  return difference(x, dlogits);
}

inline double attention_difference() {
  const int B = 2, T = 4, C = 6, NH = 2, HS = C / NH;
  const auto qkv = noise(B * T * 3 * C, 6), dout = noise(B * T * C, 7);
  const auto x = scalars(qkv);
  std::vector<Scalar> out(B * T * C);
  for (int b = 0; b < B; b++)
    for (int h = 0; h < NH; h++)
      for (int q = 0; q < T; q++) {
        const auto at = [&](int which, int t, int i) { return x[((b * T + t) * 3 + which) * C + h * HS + i]; };
        std::vector<Scalar> weights;
        Scalar sum = 0;
        for (int kv = 0; kv <= q; kv++) {
          Scalar score = 0;
          for (int i = 0; i < HS; i++) score += at(0, q, i) * at(1, kv, i);
          weights.push_back(exp(score * (1 / std::sqrt(HS))));
          sum += weights.back();
        }
        for (int i = 0; i < HS; i++) {
          Scalar mixed = 0;
          for (int kv = 0; kv <= q; kv++) mixed += weights[kv] / sum * at(2, kv, i);
          out[(b * T + q) * C + h * HS + i] = mixed;
        }
      }
  combined(out, dout).backward();

  std::vector<double> y(B * T * C), lse(B * NH * T), dqkv(qkv.size());
  attention_forward(y.data(), lse.data(), qkv.data(), {}, B, T, C, NH);
  attention_backward(dqkv.data(), dout.data(), qkv.data(), y.data(), lse.data(), {}, B, T, C, NH);
  return difference(x, dqkv);
}

}  // namespace gradient_descent

void gradient_descent_rung(const ladder::Arguments& arguments) {
  using namespace gradient_descent;
  Config config;
  config.max_iters = 200;
  config.learning_rate = 0.5;
  int count = 100, hidden = 16;
  double noise_size = 0.1;
  if (!ladder::read_flags("gradient_descent", arguments, config,
                          {{"points", &count, 4, 10000, {}, "of both moons together"},
                           {"noise", &noise_size, 0, 10, {}, "around them"},
                           {"hidden", &hidden, 1, 1000, {}, "neurons of each of two hidden layers"}},
                          {"out_dir", "max_iters", "learning_rate", "seed"}))
    return;
  // For each weight and point, a product and a sum of about 200 bytes each.
  MemoryPlan plan;
  plan.add("numbers", 400.0 * count * (hidden + 4.0) * (hidden + 1.0));
  plan.require({usable_memory(), "this machine has"}, "lower --points or --hidden");
  make_folder(config.out_dir);
  const std::vector<Point> points = two_moons(count, noise_size, config.seed);
  Net net({2, hidden, hidden, 1}, config.seed);
  const auto start = std::chrono::steady_clock::now();

  ladder::Points losses;
  {
    ProgressBar bar("gradient descent", uint64_t(config.max_iters), "it");
    for (int i = 0; i <= config.max_iters; i++) {
      bar.update(uint64_t(i));
      const Scalar loss = loss_of(net, points);
      losses.push_back({double(i), loss.value()});
      if (i == config.max_iters) break;
      for (Scalar& weight : net.weights()) weight.zero_grad();
      loss.backward();
      for (Scalar& weight : net.weights()) weight.set(weight.value() - config.learning_rate * weight.grad());
    }
    bar.finish();
  }
  int right = 0;
  for (const Point& p : points) right += p.label * net(p.x, p.y).value() > 0;
  std::printf("gradient descent: loss %.4f -> %.4f, %d of %d points on their side\n", losses[0].second,
              losses.back().second, right, count);

  // What the network says of every place, and where it changes its mind.
  std::string field = "$field << END\n";
  for (int j = 0; j <= 60; j++)
    for (int i = 0; i <= 80; i++) {
      const double x = -1.5 + i * 4.0 / 80, y = -1 + j * 2.5 / 60;
      field += text(x, " ", y, " ", 1 / (1 + std::exp(-net(x, y).value())), i == 80 ? "\n\n" : "\n");
    }
  field += "END\n$points << END\n";
  for (const Point& p : points) field += text(p.x, " ", p.y, " ", p.label, "\n");
  field += "END\n$loss << END\n";
  for (const auto& [i, loss] : losses) field += text(i, " ", loss, "\n");
  const std::string contour =
      "END\nset contour base\nset cntrparam levels discrete 0.5\nunset surface\nset table $line\n"
      "splot $field with lines notitle\nunset table\nunset contour\nset surface\n";
  draw_picture(config.out_dir + "/moons.png", 1300, 560,
               text(field, contour, "set multiplot layout 1,2\nset border 3\nset tics nomirror\n",
                    "set title 'probability of the first moon; the line: one half'\n",
                    "set palette defined (0 '#F5D0B5', 0.5 'white', 1 '#B5D5EA')\nset cbrange [0:1]\n",
                    "set xrange [-1.5:2.5]\nset yrange [-1:1.5]\n",
                    "plot $field with image notitle, $line with lines lw 2 lc rgb 'black' notitle, ",
                    "$points using 1:($3 > 0 ? $2 : NaN) with points pt 7 lc rgb '", train_colour, "' notitle, ",
                    "$points using 1:($3 < 0 ? $2 : NaN) with points pt 7 lc rgb '", val_colour, "' notitle\n",
                    "unset colorbox\nset title 'loss'\nset xrange [0:*]\nset yrange [*:*]\nset logscale y\n",
                    "set xlabel 'iteration'\nplot $loss with lines lw 2.5 lc rgb '", train_colour,
                    "' notitle\nunset multiplot\n"));

  ladder::Result result;
  result.rung = "gradient_descent";
  result.title = "Gradient descent";
  ladder::Row row;
  row.name = "two moons, from single numbers";
  row.parameters = double(net.weights().size());
  row.flops = 6 * row.parameters;
  row.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  result.rows = {row};
  std::string table = "| layer of the trainer | largest difference of its gradients from the engine's |\n|---|---|\n";
  for (const auto& [layer, distance] : {std::pair{"layernorm", layernorm_difference()},
                                        {"softmax and cross-entropy", crossentropy_difference()},
                                        {"attention, two heads", attention_difference()}}) {
    char number[32];
    std::snprintf(number, sizeof number, "%.1e", distance);
    table += text("| ", layer, " | ", number, " |\n");
    result.checks.push_back({text(layer, ": the engine's gradients, within ", number), distance < 1e-12});
  }
  result.checks.push_back({text(right, " of ", count, " points on their side"), right == count});
  result.notes = {text("Loss ", ladder::decimals(losses[0].second, 3), " at the start, ",
                       ladder::decimals(losses.back().second, 4), " after ", config.max_iters, " steps."),
                  table};
  result.pictures = {{"moons.png", "Left: what the network says of every place. Right: its loss."}};
  ladder::save_result(config.out_dir, result);
}
