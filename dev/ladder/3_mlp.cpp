// Rung 3, a multi-layer perceptron: the last 8 characters become vectors, a hidden layer sees all of them at once, and
// what it finds decides about the next. Bengio, Ducharme, Vincent, Jauvin, "A Neural Probabilistic Language Model",
// JMLR 2003, section 2, with batch normalisation (Ioffe and Szegedy 2015) as in Karpathy's makemore lectures.
//
// The same program is the tree of makemore's last lecture: with a fan of 2 the hidden layers join neighbours two by
// two, pairs of pairs next, and so on, until one vector is left; with a fan of 8 there is one join, Bengio's.
#include <cmath>

#include "charts.h"
#include "layers.h"
#include "rung.h"
#include "rungs.h"

#include "../../host/plot.h"

namespace mlp {

struct Shape {
  int V, K = 8, E = 24, H = 200, fan = 8;  // K characters of context, E and H channels
  bool batchnorm = true;
  int levels() const {
    int n = 0;
    for (int k = K; k > 1; k /= fan) n++;
    return n;
  }
};

// At level l each row of a batch has K / fan^(l+1) positions, and each position joins `fan` of the level below.
template <class Real>
struct Parameters {
  Real *wte, *firstw, *headw, *headb;
  Slices<Real> joinw, gain, bias;

  void place(Arena& a, const Shape& s) {
    const size_t V = s.V, E = s.E, H = s.H, fan = s.fan, L = s.levels();
    a(wte, "wte", {V, E});
    a(firstw, "firstw", {H, fan * E});       // the first level joins embeddings,
    a(joinw, "joinw", {L - 1, H, fan * H});  // those above it hidden vectors
    a(gain, "gain", {L, H});
    a(bias, "bias", {L, H});
    a(headw, "headw", {V, H});
    a(headb, "headb", {V});
  }
};
template <class Real>
struct Activations {
  Slices<Real> pre, act, mean, rstd, running_mean, running_var;
  Real *emb, *logits, *dact, *dpre, *demb;

  void place(Arena& a, const Shape& s, size_t B) {
    const size_t V = s.V, K = s.K, E = s.E, H = s.H, L = s.levels(), rows = B * K / s.fan;
    a(emb, "emb", {B * K, E});
    a(pre, "pre", {L, rows, H});  // before batch normalisation
    a(act, "act", {L, rows, H});  // after it and tanh
    a(mean, "mean", {L, H});
    a(rstd, "rstd", {L, H});
    a(running_mean, "running_mean", {L, H});  // evaluation normalises with these
    a(running_var, "running_var", {L, H});
    a(logits, "logits", {B, V});
    a(dact, "dact", {rows, H});
    a(dpre, "dpre", {rows, H});
    a(demb, "demb", {B * K, E});
  }
};

template <class Real>
struct Net {
  static constexpr bool every_position = false;
  Shape s;
  int V = s.V, T = s.K, L = s.levels();
  int max_B;  // the activations have room for so many rows of a batch
  Layout param_layout = layout_of<Parameters<Real>>(s), act_layout = layout_of<Activations<Real>>(s, size_t(max_B));
  Buffer<Real> params{param_layout}, grads{param_layout}, acts{act_layout};
  Parameters<Real> w = placed<Parameters<Real>>(params.data(), s), dw = placed<Parameters<Real>>(grads.data(), s);
  Activations<Real> a = placed<Activations<Real>>(acts.data(), s, size_t(max_B));

  Net(const Shape& shape, int batch) : s(shape), max_B(batch) {
    for (int l = 0; l < L; l++) std::fill_n(a.running_var[l], s.H, Real(1));
  }

  // scaled: weights are scaled by 5/3 / sqrt(inputs), which keeps the variance through a tanh, and the head says little
  // at first. Else all are N(0, 1), as the course began.
  void init(uint64_t seed, bool scaled) {
    const auto std = [&](int inputs) { return scaled ? 5.0 / 3 / std::sqrt(inputs) : 1; };
    ladder::fill_normal(w.wte, size_t(V) * s.E, 1, seed, 0);
    for (int l = 0; l < L; l++) {
      ladder::fill_normal(weight(w, l), size_t(s.H) * inputs(l), std(inputs(l)), seed, uint32_t(1 + l));
      std::fill_n(w.gain[l], s.H, Real(1));
      std::fill_n(w.bias[l], s.H, Real(0));
    }
    ladder::fill_normal(w.headw, size_t(V) * s.H, scaled ? 0.1 / std::sqrt(s.H) : 1, seed, uint32_t(1 + L));
    std::fill_n(w.headb, V, Real(0));
  }

  Real* weight(const Parameters<Real>& p, int l) const { return l == 0 ? p.firstw : p.joinw[l - 1]; }
  int inputs(int l) const { return s.fan * (l == 0 ? s.E : s.H); }

  double multiply_adds() const {
    double sum = double(V) * s.H;
    for (int l = 0, positions = s.K / s.fan; l < L; l++, positions /= s.fan) sum += double(positions) * inputs(l) * s.H;
    return sum;
  }

  // (B, positions, fan, C) in memory is (B * positions, fan * C): joining neighbours costs nothing.
  Real* forward(const int* x, int B, int K, const ladder::Mode& mode) {
    lookup_forward(a.emb, x, w.wte, B * K, s.E);
    const Real* inp = a.emb;
    int rows = B * K;
    for (int l = 0; l < L; l++) {
      rows /= s.fan;
      if (s.batchnorm) {
        matmul_forward<Real>(a.pre[l], inp, weight(w, l), nullptr, rows, inputs(l), s.H);
        batchnorm_forward(a.act[l], a.mean[l], a.rstd[l], a.running_mean[l], a.running_var[l], a.pre[l], w.gain[l],
                          w.bias[l], rows, s.H, mode.training);
      } else {
        matmul_forward<Real>(a.act[l], inp, weight(w, l), w.bias[l], rows, inputs(l), s.H);
      }
      tanh_forward(a.act[l], size_t(rows) * s.H);
      inp = a.act[l];
    }
    matmul_forward<Real>(a.logits, inp, w.headw, w.headb, B, s.H, V);
    return a.logits;
  }

  void backward(const int* x, const Real* dlogits, int B, int K, const ladder::Mode&) {
    matmul_backward<Real>(a.dact, dw.headw, dw.headb, dlogits, a.act[L - 1], w.headw, B, s.H, V);
    int rows = B;
    for (int l = L - 1; l >= 0; l--, rows *= s.fan) {
      tanh_backward(a.dact, a.act[l], size_t(rows) * s.H);
      if (s.batchnorm)
        batchnorm_backward(a.dpre, dw.gain[l], dw.bias[l], a.dact, a.pre[l], a.mean[l], a.rstd[l], w.gain[l], rows,
                           s.H);
      else
        std::copy_n(a.dact, size_t(rows) * s.H, a.dpre);
      matmul_backward<Real>(l == 0 ? a.demb : a.dact, weight(dw, l), s.batchnorm ? nullptr : dw.bias[l], a.dpre,
                            l == 0 ? a.emb : a.act[l - 1], weight(w, l), rows, inputs(l), s.H);
    }
    lookup_backward(dw.wte, a.demb, x, B * K, s.E);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// What goes wrong in a badly scaled network, and what batch normalisation mends: the hidden layer's values and their
// gradients at the start and after `steps`, and how large an update is beside the weights.

inline void diagnose(const Config& config, const Data& data, Shape shape, const std::string& png_path) {
  std::vector<ladder::Panel> panels;
  for (const bool scaled : {false, true})
    for (const bool batchnorm : {false, true}) {
      shape.batchnorm = batchnorm;
      Net<float> net(shape, config.batch_size);
      net.init(config.seed, scaled);
      ladder::LanguageModel<Net<float>> model(net, config, data);
      const std::string what = std::string(scaled ? "weights N(0, (5/3)² / inputs)" : "weights N(0, 1)") +
                               (batchnorm ? ", batch normalisation" : "");
      ladder::Panel values{"", "hidden value", "share", {}, "set xrange [-1:1]\nset yrange [0:*]\n"},
          gradients{what, "log10 |gradient before tanh|", "share", {}, "set xrange [-10:0]\nset yrange [0:*]\n"},
          ratios{"", "iteration", "log10 (update / weight)", {}, "set yrange [-5:0]\n"};
      const size_t count = size_t(config.batch_size) * shape.H, weights = size_t(shape.H) * net.inputs(0);
      const auto look = [&](const char* when, const char* colour) {
        const std::string style = text("with lines lw 2 lc rgb '", colour, "'");
        values.curves.push_back({when, ladder::histogram(net.a.act[0], count, -1, 1, 50), style});
        std::vector<float> logs(count);
        for (size_t i = 0; i < count; i++) logs[i] = std::log10(std::fabs(net.a.dact[i]));  // 0 is left out
        gradients.curves.push_back({when, ladder::histogram(logs.data(), count, -10, 0, 50), style});
      };
      ladder::Points ratio_hidden, ratio_head;
      const auto deviation = [](const std::vector<float>& v) {
        double sum = 0;
        for (const float x : v) sum += double(x) * x;
        return std::sqrt(sum / double(v.size()));
      };
      ProgressBar bar("mlp, initialisation", uint64_t(config.max_iters), "it");
      for (int i = 0; i <= config.max_iters; i++) {
        bar.update(uint64_t(i));
        const std::vector<float> hidden(net.w.firstw, net.w.firstw + weights),
            head(net.w.headw, net.w.headw + size_t(shape.V) * shape.H);
        model.train_step(i, [&] {
          if (i == 0) look("at the start", val_colour);
          if (i == config.max_iters) look(text("after ", i, " steps").c_str(), train_colour);
        });
        const auto ratio = [&](std::vector<float> before, const float* now) {
          const double size = deviation(before);
          for (size_t k = 0; k < before.size(); k++) before[k] = now[k] - before[k];
          return std::log10(deviation(before) / size);
        };
        ratio_hidden.push_back({double(i), ratio(hidden, net.w.firstw)});
        ratio_head.push_back({double(i), ratio(head, net.w.headw)});
      }
      bar.finish();
      ratios.curves = {
          {"hidden layer", ratio_hidden, text("with lines lc rgb '", train_colour, "'")},
          {"head", ratio_head, text("with lines lc rgb '", val_colour, "'")},
          {"1 in 1000", {{0, -3}, {double(config.max_iters), -3}}, text("with lines dt 2 lc rgb '", grey, "'")}};
      for (ladder::Panel& panel : {std::ref(values), std::ref(gradients), std::ref(ratios)}) panels.push_back(panel);
    }
  ladder::draw_panels(png_path, 1300, 1300, 3, panels);
}

inline void run(const std::string& rung, const std::string& name, Config config, Shape shape,
                const ladder::Arguments& arguments, double target, bool diagnosis) {
  bool scaled = true;
  if (!ladder::read_flags(
          rung, arguments, config,
          {{"block_size", &shape.K, 2, 4096, {}, "characters that decide about the next: a power of --fan"},
           {"embedding", &shape.E, 1, 100000, {}, "channels of a character"},
           {"hidden", &shape.H, 1, 100000, {}, "channels of a hidden vector"},
           {"fan",
            &shape.fan,
            2,
            4096,
            {},
            "neighbours that a hidden layer joins; as many as --block_size: all at once"},
           {"batchnorm", &shape.batchnorm, 0, 1, {}, "batch normalisation before tanh"},
           {"scaled_init", &scaled, 0, 1, {}, "weights scaled by their number of inputs; false: N(0, 1)"}}))
    return;
  int power = 1;
  while (power < shape.K) power *= shape.fan;
  if (power != shape.K) fail("--block_size ", shape.K, " is not a power of --fan ", shape.fan);
  const Data data = ladder::open_text(config, shape.K);
  shape.V = data.vocabulary.size();
  ladder::require_memory(config, layout_of<Parameters<float>>(shape),
                         layout_of<Activations<float>>(shape, size_t(config.batch_size)), shape.V, shape.K);

  Net<float> net(shape, config.batch_size);
  net.init(config.seed, scaled);
  ladder::Result result;
  result.rung = rung;
  result.title = name;
  result.rows = {ladder::train(net, config, data, name)};
  result.rows[0].reference = text("at most ", target);
  if (ladder::has_targets(config, data))
    result.checks = {{text(name, ", val ", ladder::decimals(result.rows[0].val, 4), " at most ", target),
                      result.rows[0].val <= target}};
  result.pictures = {{"training_plot.png", "Losses."}};
  ladder::LanguageModel<Net<float>> model(net, config, data);
  result.sample = ladder::sample_text(model, data, config.seed, shape.K);
  if (diagnosis) {
    Config short_run = config;
    short_run.max_iters = 1000;
    short_run.decay_lr = false;
    diagnose(short_run, data, shape, config.out_dir + "/initialisation.png");
    result.pictures.push_back(
        {"initialisation.png",
         "The hidden layer at the start and after 1000 steps, with weights of the right scale and "
         "without, with batch normalisation and without."});
  }
  ladder::save_result(config.out_dir, result);
}

}  // namespace mlp

void mlp_rung(const ladder::Arguments& arguments) {
  Config config;
  config.batch_size = 256;
  config.max_iters = 12000;
  config.eval_interval = 1000;
  config.eval_iters = 50;
  config.learning_rate = 3e-3;
  config.decay_lr = true;
  config.warmup_iters = 100;
  config.min_lr = 0;
  mlp::Shape shape;
  mlp::run("mlp", "MLP", config, shape, arguments, 1.8, true);
}

// The tree has about as many parameters as the WaveNet of the next rung.
void tree_rung(const ladder::Arguments& arguments) {
  Config config;
  config.batch_size = 256;
  config.max_iters = 6000;
  config.eval_interval = 500;
  config.eval_iters = 50;
  config.learning_rate = 2e-3;
  config.decay_lr = true;
  config.warmup_iters = 100;
  config.min_lr = 0;
  mlp::Shape shape;
  shape.H = 290;
  shape.fan = 2;
  mlp::run("tree", "Tree of pairs", config, shape, arguments, 1.7, false);
}
