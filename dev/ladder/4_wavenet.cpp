// Rung 4, WaveNet: van den Oord et al., "WaveNet: A Generative Model for Raw Audio", 2016. Every position looks at
// itself and at one position further back, 1, 2, 4, ... layer by layer, so that what it sees doubles with each layer;
// gates decide what passes (equation 2), residual and skip connections carry it (figure 4). All positions of a text are
// predicted at once, as in the transformer. To write text, a position at a time, each layer remembers its past.
//
// Beside it, the tree of Karpathy's makemore lectures, with as many parameters: the same doubling, without the sharing
// of work between neighbouring positions (3_mlp.cpp with a fan of 2).
#include <chrono>
#include <cmath>

#include "layers.h"
#include "rung.h"
#include "rungs.h"

#include "../../kernels/relu.h"
#include "../../kernels/residual.h"

namespace wavenet {

// L = stacks * doublings layers: dilations 1, 2, ... 2^(doublings - 1), again and again. The stream has C channels, the
// skips' sum S.
struct Shape {
  int V, T = 256, C = 64, S = 128, doublings = 6, stacks = 2;
  int L() const { return stacks * doublings; }
  int dilation(int l) const { return 1 << l % doublings; }
  int receptive_field() const { return 1 + stacks * ((1 << doublings) - 1); }
};

template <class Real>
struct Parameters {
  Slices<Real> convw, convb, resw, resb, skipw;
  Real *wte, *skipb, *postw, *postb, *headw, *headb;

  void place(Arena& a, const Shape& s) {
    const size_t V = s.V, C = s.C, S = s.S, L = s.L();
    a(wte, "wte", {V, C});
    a(convw, "convw", {L, 2 * C, 2 * C});  // (filter and gate, past and present)
    a(convb, "convb", {L, 2 * C});
    a(resw, "resw", {L - 1, C, C});  // the last layer ends in the skips: it has no residual path
    a(resb, "resb", {L - 1, C});
    a(skipw, "skipw", {L, S, C});
    a(skipb, "skipb", {S});
    a(postw, "postw", {S, S});
    a(postb, "postb", {S});
    a(headw, "headw", {V, S});
    a(headb, "headb", {V});
  }
};
template <class Real>
struct Activations {
  Slices<Real> inp, conv, z;
  Real *taps, *skip, *post, *logits, *dpost, *dskip, *dstream, *dz, *dconv, *dtaps;

  void place(Arena& a, const Shape& s, size_t B) {
    const size_t V = s.V, C = s.C, S = s.S, L = s.L(), rows = B * s.T;
    a(inp, "inp", {L, rows, C});        // the stream where it enters the layer
    a(conv, "conv", {L, rows, 2 * C});  // tanh of the filter, sigmoid of the gate
    a(z, "z", {L, rows, C});            // their product
    a(taps, "taps", {rows, 2 * C});     // past and present side by side, for one layer at a time
    a(skip, "skip", {rows, S});         // the skips' sum, after ReLU
    a(post, "post", {rows, S});
    a(logits, "logits", {rows, V});
    a(dpost, "dpost", {rows, S});
    a(dskip, "dskip", {rows, S});
    a(dstream, "dstream", {rows, C});
    a(dz, "dz", {rows, C});
    a(dconv, "dconv", {rows, 2 * C});
    a(dtaps, "dtaps", {rows, 2 * C});
  }
};

// taps (B, T, 2C) = at each position, inp (B, T, C) of `dilation` positions before (0 before the start) and its own
template <class Real>
void taps_forward(Real* taps, const Real* inp, int B, int T, int C, int dilation) {
#pragma omp parallel for schedule(static) if (size_t(B) * T * C > worth_threads)
  for (int r = 0; r < B * T; r++) {
    Real* row = taps + size_t(r) * 2 * C;
    if (r % T < dilation)
      std::fill(row, row + C, Real(0));
    else
      std::copy_n(inp + size_t(r - dilation) * C, C, row);
    std::copy_n(inp + size_t(r) * C, C, row + C);
  }
}

// dinp (B, T, C) += dtaps (B, T, 2C) from the input's two uses: at its own position, and `dilation` later
template <class Real>
void taps_backward(Real* dinp, const Real* dtaps, int B, int T, int C, int dilation) {
#pragma omp parallel for schedule(static) if (size_t(B) * T * C > worth_threads)
  for (int r = 0; r < B * T; r++) {
    Real* row = dinp + size_t(r) * C;
    const Real* present = dtaps + size_t(r) * 2 * C + C;
    for (int c = 0; c < C; c++) row[c] += present[c];
    if (r % T + dilation >= T) continue;
    const Real* later = dtaps + size_t(r + dilation) * 2 * C;
    for (int c = 0; c < C; c++) row[c] += later[c];
  }
}

// z (rows, C) = tanh(filter) * sigmoid(gate); conv (rows, 2C) holds filter and gate, then their tanh and sigmoid
template <class Real>
void gate_forward(Real* z, Real* conv, int rows, int C) {
#pragma omp parallel for schedule(static) if (size_t(rows) * C > worth_threads)
  for (int r = 0; r < rows; r++) {
    Real *filter = conv + size_t(r) * 2 * C, *gate = filter + C;
    apply_vec(filter, size_t(C), [](const Vec<Real>& v) { return tanh_vec(v); });
    apply_vec(gate, size_t(C), [](const Vec<Real>& v) { return sigmoid_vec(v); });
    for (int c = 0; c < C; c++) z[size_t(r) * C + c] = filter[c] * gate[c];
  }
}

// dconv (rows, 2C) = the gradients of filter and gate, from dz (rows, C) and conv as forward left it
template <class Real>
void gate_backward(Real* dconv, const Real* dz, const Real* conv, int rows, int C) {
#pragma omp parallel for schedule(static) if (size_t(rows) * C > worth_threads)
  for (int r = 0; r < rows; r++) {
    const Real *filter = conv + size_t(r) * 2 * C, *gate = filter + C, *d = dz + size_t(r) * C;
    Real *dfilter = dconv + size_t(r) * 2 * C, *dgate = dfilter + C;
    for (int c = 0; c < C; c++) {
      dfilter[c] = d[c] * gate[c] * (1 - filter[c] * filter[c]);
      dgate[c] = d[c] * filter[c] * gate[c] * (1 - gate[c]);
    }
  }
}

// To go on by one position we remember each layer's last `dilation` inputs, and keep the weights packed for products of
// one row.
template <class Real>
struct Memory {
  int position = 0;
  std::vector<std::vector<Real>> past;  // (dilation, C) each, in a ring
  struct Packed {
    std::vector<Unit<Real>> units;
    Packed(const Real* weight, int C, int OC) : units(product::packed_size<Real>(C, OC)) {
      pack_weight<Real>(units.data(), weight, C, OC);
    }
  };
  std::vector<Packed> conv, res, skip, post, head;
};

template <class Real>
struct Net {
  static constexpr bool every_position = true;
  Shape s;
  int V = s.V, T = s.T, C = s.C, S = s.S, L = s.L();
  int max_B;  // the activations have room for so many rows of a batch
  Layout param_layout = layout_of<Parameters<Real>>(s), act_layout = layout_of<Activations<Real>>(s, size_t(max_B));
  Buffer<Real> params{param_layout}, grads{param_layout}, acts{act_layout};
  Parameters<Real> w = placed<Parameters<Real>>(params.data(), s), dw = placed<Parameters<Real>>(grads.data(), s);
  Activations<Real> a = placed<Activations<Real>>(acts.data(), s, size_t(max_B));
  Memory<Real> memory;

  Net(const Shape& shape, int batch) : s(shape), max_B(batch) {}

  void init(uint64_t seed) {
    uint32_t number = 0;
    const auto normal = [&](Real* weight, int inputs, int outputs, double gain = 1) {
      ladder::fill_normal(weight, size_t(outputs) * inputs, gain / std::sqrt(inputs), seed, number++);
    };
    ladder::fill_normal(w.wte, size_t(V) * C, 1, seed, number++);
    for (int l = 0; l < L; l++) {
      normal(w.convw[l], 2 * C, 2 * C);
      if (l + 1 < L) normal(w.resw[l], C, C);
      normal(w.skipw[l], C, S, 1 / std::sqrt(L));  // L of them are added up
    }
    normal(w.postw, S, S, std::sqrt(2.0));  // behind a ReLU, which takes half
    normal(w.headw, S, V, 0.1);
  }

  double multiply_adds() const {
    const double c = C, last = s.S;
    return L * (4 * c * c + c * c + c * last) - c * c + last * last + last * V;
  }

  Real* forward(const int* x, int B, int n, const ladder::Mode&) {
    const int rows = B * n;
    lookup_forward(a.inp[0], x, w.wte, rows, C);
    for (int r = 0; r < rows; r++) std::copy_n(w.skipb, S, a.skip + size_t(r) * S);
    for (int l = 0; l < L; l++) {
      taps_forward(a.taps, a.inp[l], B, n, C, s.dilation(l));
      matmul_forward<Real>(a.conv[l], a.taps, w.convw[l], w.convb[l], rows, 2 * C, 2 * C);
      gate_forward(a.z[l], a.conv[l], rows, C);
      if (l + 1 < L)
        matmul_forward<Real>(a.inp[l + 1], a.z[l], w.resw[l], w.resb[l], rows, C, C,
                             add_residual(a.inp[l + 1], a.inp[l], {}, n, C));
      matmul_add(a.skip, a.z[l], w.skipw[l], rows, C, S);
    }
    relu_forward(a.skip, size_t(rows) * S);
    matmul_forward<Real>(a.post, a.skip, w.postw, w.postb, rows, S, S, apply_relu(a.post));
    matmul_forward<Real>(a.logits, a.post, w.headw, w.headb, rows, S, V);
    return a.logits;
  }

  void backward(const int* x, const Real* dlogits, int B, int n, const ladder::Mode&) {
    const int rows = B * n;
    matmul_backward<Real>(a.dpost, dw.headw, dw.headb, dlogits, a.post, w.headw, rows, S, V,
                          apply_relu_backward(a.dpost, a.post));
    matmul_backward<Real>(a.dskip, dw.postw, dw.postb, a.dpost, a.skip, w.postw, rows, S, S,
                          apply_relu_backward(a.dskip, a.skip));
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < S; c++) dw.skipb[c] += a.dskip[size_t(r) * S + c];
    std::fill_n(a.dstream, size_t(rows) * C, Real(0));
    std::fill_n(a.dz, size_t(rows) * C, Real(0));
    for (int l = L - 1; l >= 0; l--) {
      if (l + 1 < L) matmul_backward<Real>(a.dz, dw.resw[l], dw.resb[l], a.dstream, a.z[l], w.resw[l], rows, C, C);
      matmul_add_backward(a.dz, dw.skipw[l], a.dskip, a.z[l], w.skipw[l], rows, C, S);
      gate_backward(a.dconv, a.dz, a.conv[l], rows, C);
      taps_forward(a.taps, a.inp[l], B, n, C, s.dilation(l));
      matmul_backward<Real>(a.dtaps, dw.convw[l], dw.convb[l], a.dconv, a.taps, w.convw[l], rows, 2 * C, 2 * C);
      taps_backward(a.dstream, a.dtaps, B, n, C, s.dilation(l));
    }
    lookup_backward(dw.wte, a.dstream, x, rows, C);
  }

  // Forgets all text, and packs the weights as they are now.
  void begin_text() {
    memory = {};
    for (int l = 0; l < L; l++) {
      memory.past.emplace_back(size_t(s.dilation(l)) * C, Real(0));
      memory.conv.emplace_back(w.convw[l], 2 * C, 2 * C);
      if (l + 1 < L) memory.res.emplace_back(w.resw[l], C, C);
      memory.skip.emplace_back(w.skipw[l], C, S);
    }
    memory.post.emplace_back(w.postw, S, S);
    memory.head.emplace_back(w.headw, S, V);
  }

  // forward for the next position alone: the same numbers, from what the layers remember.
  const Real* next_position(int token) {
    const auto packed = [](const Real* weight, const typename Memory<Real>::Packed& p) {
      return Weight<Real>(weight, p.units.data());
    };
    std::copy_n(w.wte + size_t(token) * C, C, a.inp[0]);
    std::copy_n(w.skipb, S, a.skip);
    for (int l = 0; l < L; l++) {
      Real* past = memory.past[l].data() + size_t(memory.position % s.dilation(l)) * C;
      std::copy_n(past, C, a.taps);
      std::copy_n(a.inp[l], C, a.taps + C);
      std::copy_n(a.inp[l], C, past);
      matmul_forward<Real>(a.conv[l], a.taps, packed(w.convw[l], memory.conv[l]), w.convb[l], 1, 2 * C, 2 * C);
      gate_forward(a.z[l], a.conv[l], 1, C);
      if (l + 1 < L)
        matmul_forward<Real>(a.inp[l + 1], a.z[l], packed(w.resw[l], memory.res[l]), w.resb[l], 1, C, C,
                             add_residual(a.inp[l + 1], a.inp[l], {}, 1, C));
      product::multiply<Real>(a.skip, {a.skip, size_t(S)}, {a.z[l], size_t(C), 1}, {w.skipw[l], 1, size_t(C)}, 1, S, C,
                              product::Nothing{}, nullptr, memory.skip[l].units.data());
    }
    relu_forward(a.skip, S);
    matmul_forward<Real>(a.post, a.skip, packed(w.postw, memory.post[0]), w.postb, 1, S, S, apply_relu(a.post));
    matmul_forward<Real>(a.logits, a.post, packed(w.headw, memory.head[0]), w.headb, 1, S, V);
    memory.position++;
    return a.logits;
  }

  const Real* next_logits(const int* context, int n, int known) {
    if (known == 0) begin_text();
    const Real* logits = a.logits;
    for (int i = known; i < n; i++) logits = next_position(context[i]);
    return logits;
  }
};

// Seconds a character takes, with memory and without. Without it, the text so far goes through forward again, as much
// of it as can matter.
inline std::pair<double, double> seconds_per_character(Net<float>& net) {
  using Clock = std::chrono::steady_clock;
  const auto median = [](int times, auto body) {
    std::vector<double> seconds;
    for (int i = 0; i < times; i++) {
      const Clock::time_point start = Clock::now();
      body();
      seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    }
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  };
  const std::vector<int> text(size_t(net.s.receptive_field()), 0);
  net.begin_text();
  const double cached = median(301, [&] { net.next_position(0); });
  const double uncached = median(31, [&] { net.forward(text.data(), 1, int(text.size()), {}); });
  return {cached, uncached};
}

}  // namespace wavenet

void wavenet_rung(const ladder::Arguments& arguments) {
  Config config;
  config.batch_size = 16;
  config.max_iters = 900;
  config.eval_interval = 100;
  config.eval_iters = 10;
  config.learning_rate = 4e-3;
  config.decay_lr = true;
  config.warmup_iters = 50;
  config.min_lr = 0;
  config.beta2 = 0.99;
  config.grad_clip = 1;
  wavenet::Shape shape;
  if (!ladder::read_flags("wavenet", arguments, config,
                          {{"block_size", &shape.T, 1, 100000, {}, "characters of a batch's row"},
                           {"channels", &shape.C, 1, 100000, {}, "of the stream, of filters and gates"},
                           {"skip_channels", &shape.S, 1, 100000, {}, "of the skips' sum"},
                           {"doublings", &shape.doublings, 1, 20, {}, "layers of a stack: dilations 1, 2, 4, ..."},
                           {"stacks", &shape.stacks, 1, 1000, {}, "stacks, one on the other"}}))
    return;
  const Data data = ladder::open_text(config, shape.T);
  shape.V = data.vocabulary.size();
  if (shape.receptive_field() > shape.T)
    std::fprintf(stderr, "the receptive field, %d, is larger than --block_size %d: the rest of it is not trained\n",
                 shape.receptive_field(), shape.T);
  ladder::require_memory(config, layout_of<wavenet::Parameters<float>>(shape),
                         layout_of<wavenet::Activations<float>>(shape, size_t(config.batch_size)), shape.V, shape.T);
  std::fprintf(stderr, "receptive field: %d characters\n", shape.receptive_field());

  using Net = wavenet::Net<float>;
  Net net(shape, config.batch_size);
  net.init(config.seed);
  ladder::Result result;
  result.rung = "wavenet";
  result.title = "WaveNet";
  result.rows = {ladder::train(net, config, data, "WaveNet")};
  result.pictures = {{"training_plot.png", "Losses of the WaveNet."}};
  ladder::LanguageModel<Net> model(net, config, data);
  result.sample = ladder::sample_text(model, data, config.seed, 0);
  const auto [cached, uncached] = wavenet::seconds_per_character(net);
  result.notes = {text("Receptive field: ", shape.receptive_field(), " characters. A character takes ",
                       ladder::decimals(1e6 * cached, 0), " µs with what the layers remember, ",
                       ladder::decimals(1e6 * uncached, 0), " µs without: ", ladder::decimals(uncached / cached, 0),
                       " times as fast.")};
  result.rows[0].reference = "at most 1.75";
  if (ladder::has_targets(config, data))
    result.checks = {
        {text("WaveNet, val ", ladder::decimals(result.rows[0].val, 4), " at most 1.75"), result.rows[0].val <= 1.75}};
  ladder::save_result(config.out_dir, result);
}
