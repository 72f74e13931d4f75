// Rung 6, the transformer, piece by piece: Vaswani et al., "Attention Is All You Need", 2017, at the small size at
// which Karpathy's lecture puts it together, 8 characters of context and 32 channels. Each row of the table adds one
// thing to the row before. The last is the trainer's own model: train_gpt_cpu.cpp, at the top of this repository, is
// the same program without switches.
#include <cmath>

#include "layers.h"
#include "rung.h"
#include "rungs.h"

#include "../../kernels/attention.h"
#include "../../kernels/embedding.h"
#include "../../kernels/layernorm.h"
#include "../../kernels/relu.h"
#include "../../kernels/residual.h"

namespace transformer {

// Without residual connections a block is attention and then, perhaps, one linear layer with ReLU; with them both
// branches end in a projection of their own, and the hidden layer is four times as wide.
struct Shape {
  int V, T = 8, C = 32, heads = 1, L = 1;
  bool feed_forward = false, residual = false, layernorm = false;
  int F() const { return residual ? 4 * C : C; }
};

template <class Real>
struct Parameters {
  Slices<Real> ln1w, ln1b, qkvw, attprojw, attprojb, ln2w, ln2b, fcw, fcb, fcprojw, fcprojb, lnfw, lnfb;
  Real *wte, *wpe, *headw, *headb;

  void place(Arena& a, const Shape& s) {
    const size_t V = s.V, T = s.T, C = s.C, F = s.F(), L = s.L;
    // Tensors that the network does not use yet have no layers.
    const size_t norms = s.layernorm ? L : 0, last_norm = s.layernorm, hidden = s.feed_forward ? L : 0,
                 projections = s.residual ? L : 0;
    a(wte, "wte", {V, C});
    a(wpe, "wpe", {T, C});
    a(ln1w, "ln1w", {norms, C});
    a(ln1b, "ln1b", {norms, C});
    a(qkvw, "qkvw", {L, 3 * C, C});
    a(attprojw, "attprojw", {projections, C, C});
    a(attprojb, "attprojb", {projections, C});
    a(ln2w, "ln2w", {norms, C});
    a(ln2b, "ln2b", {norms, C});
    a(fcw, "fcw", {hidden, F, C});
    a(fcb, "fcb", {hidden, F});
    a(fcprojw, "fcprojw", {projections, C, F});
    a(fcprojb, "fcprojb", {projections, C});
    a(lnfw, "lnfw", {last_norm, C});
    a(lnfb, "lnfb", {last_norm, C});
    a(headw, "headw", {V, C});
    a(headb, "headb", {V});
  }
};
template <class Real>
struct Activations {
  Slices<Real> inp, ln1, ln1_mean, ln1_rstd, qkv, att, lse, mid, ln2, ln2_mean, ln2_rstd, fc;
  Real *out, *lnf, *lnf_mean, *lnf_rstd, *logits, *dstream, *dbranch, *dnorm, *datt, *dqkv, *dfc;

  void place(Arena& a, const Shape& s, size_t B) {
    const size_t V = s.V, C = s.C, F = s.F(), L = s.L, heads = s.heads, rows = B * s.T;
    a(inp, "inp", {L, rows, C});
    a(ln1, "ln1", {L, rows, C});
    a(ln1_mean, "ln1_mean", {L, rows});
    a(ln1_rstd, "ln1_rstd", {L, rows});
    a(qkv, "qkv", {L, rows, 3 * C});
    a(att, "att", {L, rows, C});
    a(lse, "lse", {L, rows, heads});
    a(mid, "mid", {L, rows, C});  // between attention and feed-forward
    a(ln2, "ln2", {L, rows, C});
    a(ln2_mean, "ln2_mean", {L, rows});
    a(ln2_rstd, "ln2_rstd", {L, rows});
    a(fc, "fc", {L, rows, F});  // after ReLU
    a(out, "out", {rows, C});
    a(lnf, "lnf", {rows, C});
    a(lnf_mean, "lnf_mean", {rows});
    a(lnf_rstd, "lnf_rstd", {rows});
    a(logits, "logits", {rows, V});
    a(dstream, "dstream", {rows, C});
    a(dbranch, "dbranch", {rows, C});
    a(dnorm, "dnorm", {rows, C});
    a(datt, "datt", {rows, C});
    a(dqkv, "dqkv", {rows, 3 * C});
    a(dfc, "dfc", {rows, F});
  }
};

template <class Real>
struct Net {
  static constexpr bool every_position = true;
  Shape s;
  int V = s.V, T = s.T, C = s.C, F = s.F(), L = s.L;
  int max_B;  // the activations have room for so many rows of a batch
  Layout param_layout = layout_of<Parameters<Real>>(s), act_layout = layout_of<Activations<Real>>(s, size_t(max_B));
  Buffer<Real> params{param_layout}, grads{param_layout}, acts{act_layout};
  Parameters<Real> w = placed<Parameters<Real>>(params.data(), s), dw = placed<Parameters<Real>>(grads.data(), s);
  Activations<Real> a = placed<Activations<Real>>(acts.data(), s, size_t(max_B));

  Net(const Shape& shape, int batch) : s(shape), max_B(batch) {}

  // Begins as PyTorch and the lecture do, with embeddings N(0, 1). Their weights are uniform below 1 / sqrt(inputs);
  // ours are normal with the same variance, 1 / (3 inputs).
  void init(uint64_t seed) {
    uint32_t number = 0;
    const auto normal = [&](Real* weight, int inputs, int outputs) {
      ladder::fill_normal(weight, size_t(outputs) * inputs, 1 / std::sqrt(3.0 * inputs), seed, number++);
    };
    ladder::fill_normal(w.wte, size_t(V) * C, 1, seed, number++);
    ladder::fill_normal(w.wpe, size_t(T) * C, 1, seed, number++);
    for (int l = 0; l < L; l++) {
      normal(w.qkvw[l], C, 3 * C);
      if (s.feed_forward) normal(w.fcw[l], C, F);
      if (s.residual) normal(w.attprojw[l], C, C), normal(w.fcprojw[l], F, C);
      if (s.layernorm) std::fill_n(w.ln1w[l], C, Real(1)), std::fill_n(w.ln2w[l], C, Real(1));
    }
    if (s.layernorm) std::fill_n(w.lnfw[0], C, Real(1));
    normal(w.headw, C, V);
  }

  double multiply_adds() const {
    const double c = C, per_layer = 3 * c * c + 2 * c * (T + 1) / 2 + s.residual * c * c + s.feed_forward * c * F +
                                    s.residual * c * F;
    return L * per_layer + c * V;
  }

  Real* forward(const int* x, int B, int n, const ladder::Mode& mode) {
    const int rows = B * n;
    const Dropout& drop = mode.drop;
    embedding_forward(a.inp[0], x, w.wte, w.wpe, B, n, C);
    for (int l = 0; l < L; l++) {
      Real *inp = a.inp[l], *out = l + 1 < L ? a.inp[l + 1] : a.out;
      if (s.layernorm) layernorm_forward(a.ln1[l], a.ln1_mean[l], a.ln1_rstd[l], inp, w.ln1w[l], w.ln1b[l], rows, C);
      matmul_forward<Real>(a.qkv[l], s.layernorm ? a.ln1[l] : inp, w.qkvw[l], nullptr, rows, C, 3 * C);
      Real* att = s.residual ? a.att[l] : s.feed_forward ? a.mid[l] : out;
      attention_forward(att, a.lse[l], a.qkv[l], drop.at(site::attention_dropout, l), B, n, C, s.heads);
      if (s.residual)
        matmul_forward<Real>(a.mid[l], att, w.attprojw[l], w.attprojb[l], rows, C, C,
                             add_residual(a.mid[l], inp, drop.at(site::proj_dropout, l), n, C));
      if (!s.feed_forward) continue;

      if (s.layernorm)
        layernorm_forward(a.ln2[l], a.ln2_mean[l], a.ln2_rstd[l], a.mid[l], w.ln2w[l], w.ln2b[l], rows, C);
      Real* fc = s.residual ? a.fc[l] : out;
      matmul_forward<Real>(fc, s.layernorm ? a.ln2[l] : a.mid[l], w.fcw[l], w.fcb[l], rows, C, F, apply_relu(fc));
      if (s.residual)
        matmul_forward<Real>(out, fc, w.fcprojw[l], w.fcprojb[l], rows, F, C,
                             add_residual(out, a.mid[l], drop.at(site::fc_dropout, l), n, C));
    }
    if (s.layernorm) layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, a.out, w.lnfw[0], w.lnfb[0], rows, C);
    matmul_forward<Real>(a.logits, s.layernorm ? a.lnf : a.out, w.headw, w.headb, rows, C, V);
    return a.logits;
  }

  void backward(const int* x, const Real* dlogits, int B, int n, const ladder::Mode& mode) {
    const int rows = B * n;
    const size_t stream = size_t(rows) * C;
    const Dropout& drop = mode.drop;
    // Takes the gradient of a branch's input through the layernorm, if there is one, and adds it to the stream's.
    const auto into_stream = [&](const Real* d, Real* dlnw, Real* dlnb, const Real* inp, const Real* mean,
                                 const Real* rstd, const Real* lnw) {
      if (!s.residual) std::fill_n(a.dstream, stream, Real(0));
      if (s.layernorm)
        layernorm_backward(a.dstream, dlnw, dlnb, d, inp, mean, rstd, lnw, rows, C);
      else
        for (size_t i = 0; i < stream; i++) a.dstream[i] += d[i];
    };
    matmul_backward<Real>(a.dnorm, dw.headw, dw.headb, dlogits, s.layernorm ? a.lnf : a.out, w.headw, rows, C, V);
    std::fill_n(a.dstream, stream, Real(0));
    into_stream(a.dnorm, dw.lnfw[0], dw.lnfb[0], a.out, a.lnf_mean, a.lnf_rstd, w.lnfw[0]);

    for (int l = L - 1; l >= 0; l--) {
      const Real* out = l + 1 < L ? a.inp[l + 1] : a.out;
      if (s.feed_forward) {
        if (s.residual) {
          residual_backward(a.dbranch, a.dstream, drop.at(site::fc_dropout, l), B, n, C);
          matmul_backward<Real>(a.dfc, dw.fcprojw[l], dw.fcprojb[l], a.dbranch, a.fc[l], w.fcprojw[l], rows, F, C,
                                apply_relu_backward(a.dfc, a.fc[l]));
        } else {
          std::copy_n(a.dstream, stream, a.dfc);
          relu_backward(a.dfc, out, stream);
        }
        matmul_backward<Real>(a.dnorm, dw.fcw[l], dw.fcb[l], a.dfc, s.layernorm ? a.ln2[l] : a.mid[l], w.fcw[l], rows,
                              C, F);
        into_stream(a.dnorm, dw.ln2w[l], dw.ln2b[l], a.mid[l], a.ln2_mean[l], a.ln2_rstd[l], w.ln2w[l]);
      }
      const Real* att = s.residual ? a.att[l] : s.feed_forward ? a.mid[l] : out;
      if (s.residual) {
        residual_backward(a.dbranch, a.dstream, drop.at(site::proj_dropout, l), B, n, C);
        matmul_backward<Real>(a.datt, dw.attprojw[l], dw.attprojb[l], a.dbranch, att, w.attprojw[l], rows, C, C);
      } else {
        std::copy_n(a.dstream, stream, a.datt);
      }
      attention_backward(a.dqkv, a.datt, a.qkv[l], att, a.lse[l], drop.at(site::attention_dropout, l), B, n, C,
                         s.heads);
      matmul_backward<Real>(a.dnorm, dw.qkvw[l], nullptr, a.dqkv, s.layernorm ? a.ln1[l] : a.inp[l], w.qkvw[l], rows, C,
                            3 * C);
      into_stream(a.dnorm, dw.ln1w[l], dw.ln1b[l], a.inp[l], a.ln1_mean[l], a.ln1_rstd[l], w.ln1w[l]);
    }
    embedding_backward(dw.wte, dw.wpe, a.dstream, x, B, n, C);
  }
};

}  // namespace transformer

void transformer_rung(const ladder::Arguments& arguments) {
  Config config;  // the lecture's
  config.batch_size = 32;
  config.max_iters = 5000;
  config.eval_interval = 500;
  config.eval_iters = 100;
  config.learning_rate = 1e-3;
  double dropout = 0.1;
  transformer::Shape shape;
  int heads = 4, blocks = 3;
  if (!ladder::read_flags("transformer", arguments, config,
                          {{"block_size", &shape.T, 1, 100000, {}, "characters of context"},
                           {"n_embd", &shape.C, 1, 100000, {}, "channels"},
                           {"n_head", &heads, 1, 1000, {}, "heads, once there are several"},
                           {"n_layer", &blocks, 1, 1000, {}, "blocks, once there are several"},
                           {"dropout", &dropout, 0, 0.99, {}, "of the last row"}}))
    return;
  if (shape.C % heads != 0) fail("--n_embd ", shape.C, " is not a multiple of --n_head ", heads);
  const Data data = ladder::open_text(config, shape.T);
  shape.V = data.vocabulary.size();
  struct Step {
    const char *adds, *reached_in_lecture;
    void (*change)(transformer::Shape&, int heads, int blocks);
  };
  const Step steps[] = {
      {"one head of self-attention", "about 2.4", [](auto&, int, int) {}},
      {"several heads", "2.28", [](auto& s, int n, int) { s.heads = n; }},
      {"feed-forward", "2.24", [](auto& s, int, int) { s.feed_forward = true; }},
      {"blocks with residuals", "2.08", [](auto& s, int, int n) { s.residual = true, s.L = n; }},
      {"layernorm", "2.06", [](auto& s, int, int) { s.layernorm = true; }},
      {"dropout", "", [](auto&, int, int) {}},
  };
  ladder::Result result;
  result.rung = "transformer";
  result.title = "Transformer, piece by piece";
  config.dropout = 0;
  int number = 0;
  for (const Step& step : steps) {
    step.change(shape, heads, blocks);
    if (step.adds == std::string("dropout")) config.dropout = dropout;
    ladder::require_memory(config, layout_of<transformer::Parameters<float>>(shape),
                           layout_of<transformer::Activations<float>>(shape, size_t(config.batch_size)), shape.V,
                           shape.T);
    using Net = transformer::Net<float>;
    Net net(shape, config.batch_size);
    net.init(config.seed);
    Config run = config;
    run.out_dir = text(config.out_dir, "/", ++number);
    const std::string name = (number == 1 ? "" : "+ ") + std::string(step.adds);
    ladder::Row row = ladder::train(net, run, data, name);
    if (*step.reached_in_lecture) row.reference = text(step.reached_in_lecture, " in the lecture");
    result.rows.push_back(row);
    if (step.adds == std::string("layernorm")) {
      ladder::LanguageModel<Net> model(net, config, data);
      result.sample = ladder::sample_text(model, data, config.seed, shape.T);
    }
  }
  result.pictures = {{text(number - 1, "/training_plot.png"), "Losses of the last row but one."}};
  if (ladder::has_targets(config, data)) {
    const double reached[] = {2.4, 2.28, 2.24, 2.08, 2.06};
    for (size_t i = 0; i < 5; i++)
      result.checks.push_back({text(steps[i].adds, ", val ", ladder::decimals(result.rows[i].val, 3),
                                    " within 0.06 of the lecture's ", steps[i].reached_in_lecture),
                               result.rows[i].val < reached[i] + 0.06});
  }
  ladder::save_result(config.out_dir, result);
}
