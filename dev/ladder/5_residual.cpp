// Rung 5, residual networks: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, and, for the
// order within a block, "Identity Mappings in Deep Residual Networks", 2016: normalise, compute, add. The same network
// with and without its skip connections, 2 to 64 blocks deep: without them a deeper network is soon a worse one, and
// not for want of parameters. He's networks see pictures and normalise batches; these see 16 characters and normalise
// layers.
#include <cmath>

#include "charts.h"
#include "layers.h"
#include "rung.h"
#include "rungs.h"

#include "../../host/plot.h"
#include "../../kernels/layernorm.h"
#include "../../kernels/relu.h"
#include "../../kernels/residual.h"

namespace residual_net {

struct Shape {
  int V, K = 16, E = 16, C = 64, L = 8;  // K characters of context, E channels each; L blocks of C channels
  bool skips = true;
};

template <class Real>
struct Parameters {
  Real *wte, *inw, *inb, *lnfw, *lnfb, *headw, *headb;
  Slices<Real> lnw, lnb, fcw, fcb, projw, projb;

  void place(Arena& a, const Shape& s) {
    const size_t V = s.V, K = s.K, E = s.E, C = s.C, L = s.L;
    a(wte, "wte", {V, E});
    a(inw, "inw", {C, K * E});
    a(inb, "inb", {C});
    a(lnw, "lnw", {L, C});
    a(lnb, "lnb", {L, C});
    a(fcw, "fcw", {L, C, C});
    a(fcb, "fcb", {L, C});
    a(projw, "projw", {L, C, C});
    a(projb, "projb", {L, C});
    a(lnfw, "lnfw", {C});
    a(lnfb, "lnfb", {C});
    a(headw, "headw", {V, C});
    a(headb, "headb", {V});
  }
};
template <class Real>
struct Activations {
  Slices<Real> inp, ln, ln_mean, ln_rstd, fc, dout;
  Real *emb, *out, *lnf, *lnf_mean, *lnf_rstd, *logits, *dstream, *dfc, *dnorm, *demb;

  void place(Arena& a, const Shape& s, size_t B) {
    const size_t V = s.V, K = s.K, E = s.E, C = s.C, L = s.L;
    a(emb, "emb", {B * K, E});
    a(inp, "inp", {L, B, C});  // the stream where it enters the block
    a(ln, "ln", {L, B, C});
    a(ln_mean, "ln_mean", {L, B});
    a(ln_rstd, "ln_rstd", {L, B});
    a(fc, "fc", {L, B, C});  // after ReLU
    a(out, "out", {B, C});   // the stream behind the last block
    a(lnf, "lnf", {B, C});
    a(lnf_mean, "lnf_mean", {B});
    a(lnf_rstd, "lnf_rstd", {B});
    a(logits, "logits", {B, V});
    a(dout, "dout", {L, B, C});  // gradients of the stream behind each block
    a(dstream, "dstream", {B, C});
    a(dfc, "dfc", {B, C});
    a(dnorm, "dnorm", {B, C});
    a(demb, "demb", {B * K, E});
  }
};

template <class Real>
struct Net {
  static constexpr bool every_position = false;
  Shape s;
  int V = s.V, T = s.K, C = s.C, L = s.L;
  int max_B;  // the activations have room for so many rows of a batch
  Layout param_layout = layout_of<Parameters<Real>>(s), act_layout = layout_of<Activations<Real>>(s, size_t(max_B));
  Buffer<Real> params{param_layout}, grads{param_layout}, acts{act_layout};
  Parameters<Real> w = placed<Parameters<Real>>(params.data(), s), dw = placed<Parameters<Real>>(grads.data(), s);
  Activations<Real> a = placed<Activations<Real>>(acts.data(), s, size_t(max_B));

  Net(const Shape& shape, int batch) : s(shape), max_B(batch) {}

  // He et al., "Delving Deep into Rectifiers", 2015, equation 10: variance 2 / inputs keeps a signal's size through
  // ReLUs.
  void init(uint64_t seed) {
    const auto normal = [&](Real* weight, int inputs, int outputs, double variance, uint32_t number) {
      ladder::fill_normal(weight, size_t(outputs) * inputs, std::sqrt(variance / inputs), seed, number);
    };
    ladder::fill_normal(w.wte, size_t(V) * s.E, 1, seed, 0);
    normal(w.inw, s.K * s.E, C, 1, 1);
    normal(w.headw, C, V, 0.1, 2);
    for (int l = 0; l < L; l++) {
      std::fill_n(w.lnw[l], C, Real(1));
      normal(w.fcw[l], C, C, 2, uint32_t(3 + 2 * l));
      normal(w.projw[l], C, C, 2, uint32_t(4 + 2 * l));
    }
    std::fill_n(w.lnfw, C, Real(1));
  }

  double multiply_adds() const { return double(s.K) * s.E * C + 2.0 * L * C * C + double(C) * V; }

  Real* forward(const int* x, int B, int K, const ladder::Mode&) {
    lookup_forward(a.emb, x, w.wte, B * K, s.E);
    matmul_forward<Real>(a.inp[0], a.emb, w.inw, w.inb, B, K * s.E, C);
    for (int l = 0; l < L; l++) {
      Real* out = l + 1 < L ? a.inp[l + 1] : a.out;
      layernorm_forward(a.ln[l], a.ln_mean[l], a.ln_rstd[l], a.inp[l], w.lnw[l], w.lnb[l], B, C);
      matmul_forward<Real>(a.fc[l], a.ln[l], w.fcw[l], w.fcb[l], B, C, C, apply_relu(a.fc[l]));
      if (s.skips)
        matmul_forward<Real>(out, a.fc[l], w.projw[l], w.projb[l], B, C, C, add_residual(out, a.inp[l], {}, 1, C));
      else
        matmul_forward<Real>(out, a.fc[l], w.projw[l], w.projb[l], B, C, C);
    }
    layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, a.out, w.lnfw, w.lnfb, B, C);
    matmul_forward<Real>(a.logits, a.lnf, w.headw, w.headb, B, C, V);
    return a.logits;
  }

  void backward(const int* x, const Real* dlogits, int B, int K, const ladder::Mode&) {
    const size_t stream = size_t(B) * C;
    matmul_backward<Real>(a.dnorm, dw.headw, dw.headb, dlogits, a.lnf, w.headw, B, C, V);
    std::fill_n(a.dstream, stream, Real(0));
    layernorm_backward(a.dstream, dw.lnfw, dw.lnfb, a.dnorm, a.out, a.lnf_mean, a.lnf_rstd, w.lnfw, B, C);
    for (int l = L - 1; l >= 0; l--) {
      std::copy_n(a.dstream, stream, a.dout[l]);
      matmul_backward<Real>(a.dfc, dw.projw[l], dw.projb[l], a.dout[l], a.fc[l], w.projw[l], B, C, C,
                            apply_relu_backward(a.dfc, a.fc[l]));
      matmul_backward<Real>(a.dnorm, dw.fcw[l], dw.fcb[l], a.dfc, a.ln[l], w.fcw[l], B, C, C);
      if (!s.skips) std::fill_n(a.dstream, stream, Real(0));  // else it flows past the block as well
      layernorm_backward(a.dstream, dw.lnw[l], dw.lnb[l], a.dnorm, a.inp[l], a.ln_mean[l], a.ln_rstd[l], w.lnw[l], B,
                         C);
    }
    matmul_backward<Real>(a.demb, dw.inw, dw.inb, a.dstream, a.emb, w.inw, B, K * s.E, C);
    lookup_backward(dw.wte, a.demb, x, B * K, s.E);
  }
};

}  // namespace residual_net

void residual_rung(const ladder::Arguments& arguments) {
  using namespace residual_net;
  Config config;
  config.batch_size = 128;
  config.max_iters = 2400;
  config.eval_interval = 400;
  config.eval_iters = 20;
  config.learning_rate = 1e-3;
  config.decay_lr = true;
  config.warmup_iters = 50;
  config.min_lr = 0;
  config.grad_clip = 1;
  Shape shape;
  int deepest = 64;
  if (!ladder::read_flags(
          "residual", arguments, config,
          {{"block_size", &shape.K, 1, 4096, {}, "characters that decide about the next"},
           {"embedding", &shape.E, 1, 100000, {}, "channels of a character"},
           {"channels", &shape.C, 1, 100000, {}, "of the stream"},
           {"deepest", &deepest, 2, 4096, {}, "blocks of the deepest pair; the others have 2, 4, 8, ..."}}))
    return;
  const Data data = ladder::open_text(config, shape.K);
  shape.V = data.vocabulary.size();
  shape.L = deepest;
  ladder::require_memory(config, layout_of<Parameters<float>>(shape),
                         layout_of<Activations<float>>(shape, size_t(config.batch_size)), shape.V, shape.K);

  ladder::Result result;
  result.rung = "residual";
  result.title = "Residual networks";
  ladder::Panel depth{
      "by depth", "blocks", "exact validation loss (nats per character)", {}, "set logscale x 2\nset key top left\n"},
      gradients{text("before the first step, ", deepest, " blocks"),
                "block",
                "norm of the stream's gradient behind it",
                {},
                "set logscale y\nset format y '%.0e'\nset key top left\n"};
  std::string table = "| blocks | with skips: train | val | without: train | val |\n|---|---|---|---|---|\n";
  std::vector<std::string> cells;
  for (const bool skips : {true, false}) {
    const char *name = skips ? "with skips" : "without", *colour = skips ? train_colour : val_colour;
    ladder::Curve losses{name, {}, text("with linespoints lw 2.5 pt 7 lc rgb '", colour, "'")};
    size_t row_of_table = 0;
    for (int L = 2; L <= deepest; L *= 2) {
      shape.L = L;
      shape.skips = skips;
      using N = Net<float>;
      N net(shape, config.batch_size);
      net.init(config.seed);
      Config run = config;
      run.out_dir = text(config.out_dir, "/", skips ? "skips_" : "plain_", L);
      const ladder::Row row = ladder::train(
          net, run, data, text(L, " blocks, ", name),
          [&](int i) {
            if (i > 0 || 2 * L <= deepest) return;
            ladder::Curve norms{name, {}, text("with lines lw 2.5 lc rgb '", colour, "'")};
            for (int l = 0; l < L; l++)
              norms.points.push_back(
                  {double(l + 1), std::sqrt(gradient_norm_squared(net.a.dout[l], size_t(config.batch_size) * net.C))});
            gradients.curves.push_back(norms);
          },
          2 * L > deepest);
      losses.points.push_back({double(L), row.val});
      if (2 * L > deepest) result.rows.push_back(row);
      const std::string numbers = text(" ", ladder::decimals(row.train, 3), " | ", ladder::decimals(row.val, 3), " |");
      if (skips)
        cells.push_back(text("| ", L, " |", numbers));
      else
        cells[row_of_table++] += numbers;
      if (skips && 2 * L > deepest) {
        ladder::LanguageModel<N> model(net, run, data);
        result.sample = ladder::sample_text(model, data, config.seed, shape.K);
      }
    }
    depth.curves.push_back(losses);
  }
  for (const std::string& line : cells) table += line + "\n";
  ladder::draw_panels(config.out_dir + "/depth.png", 1300, 560, 2, {depth, gradients});
  result.notes = {table};
  result.pictures = {
      {"depth.png", text("Left: the losses of networks of equal width, equally long trained. Right: how large "
                         "the gradient is by the time it has come down to a block.")}};
  const auto last = [&](int curve) { return depth.curves[size_t(curve)].points.back().second; };
  const auto best = [&](int curve) {
    double least = INFINITY;
    for (const auto& [blocks, loss] : depth.curves[size_t(curve)].points) least = std::min(least, loss);
    return least;
  };
  if (ladder::has_targets(config, data))
    result.checks = {{text("with skips, ", deepest, " blocks are no worse than the best of the row by 0.05: ",
                           ladder::decimals(last(0), 3), ", ", ladder::decimals(best(0), 3)),
                      last(0) < best(0) + 0.05},
                     {text("without, they are: ", ladder::decimals(last(1), 3), ", ", ladder::decimals(best(1), 3)),
                      last(1) > best(1) + 0.05}};
  ladder::save_result(config.out_dir, result);
}
