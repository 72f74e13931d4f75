// Trains a GPT on the CPU, from its parameters in one buffer to its sampled text. Read it top to bottom: the tensors,
// forward, backward, update, main. Each layer is one call; its arithmetic stands in kernels/<layer>.h. What is not the
// model (files, flags, the loop around the steps) is in host/.
//
// The contract of every layer function: outputs, inputs, then sizes; activations' gradients are written (=) unless the
// function says otherwise, parameters' gradients are added (+=) to what zero_gradients leaves.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "host/batch.h"     // defines: random_batch
#include "host/commands.h"  // defines: run_command, dtype_so_far, ...
#include "host/config.h"    // defines: Config, parse_command_line
#include "host/data.h"      // defines: Data, Split
#include "host/error.h"     // defines: fail, run_main
#include "host/machine.h"   // defines: built_for, use_threads
#include "host/memory.h"    // defines: Buffer, MemoryPlan
#include "host/ranks.h"     // defines: ranks, with_ranks, even_parts
#include "host/schedule.h"  // defines: learning_rate_at
#include "host/tensors.h"   // defines: ModelShape, Params, Arena, Layout
#include "host/trainer.h"   // defines: Trainer, trainer_type
#include "host/tree.h"      // defines: Part, sum_tree, tree_part, ...
#include "host/version.h"   // defines: version_text
#include "kernels/adamw.h"
#include "kernels/add.h"
#include "kernels/amx.h"
#include "kernels/attention.h"
#include "kernels/crossentropy.h"
#include "kernels/embedding.h"
#include "kernels/layernorm.h"
#include "kernels/matmul.h"
#include "kernels/muon.h"
#include "kernels/peak.h"
#include "kernels/relu.h"
#include "kernels/residual.h"

namespace cpu {

// ---------------------------------------------------------------------------------------------------------------------
// The tensors. The learned ones, Params, are in host/tensors.h: both trainers and all files share them. Gradients and
// AdamW's m and v are buffers of the same layout.

// What forward leaves behind for backward, in a slice for each layer where every layer has its own.
template <class Real>
struct Activations {
  Slices<Real> inp, ln1, ln1_mean, ln1_rstd, qkv, att, lse, mid, ln2, ln2_mean, ln2_rstd, fc;
  Real *out, *lnf, *lnf_mean, *lnf_rstd, *logits, *probs, *losses;

  void place(Arena& a, const ModelShape& s, size_t rows) {  // rows = B * T
    const size_t V = s.V, C = s.C, L = s.L, NH = s.NH;
    a(inp, "inp", {L, rows, C});  // the residual stream where it enters the layer
    a(ln1, "ln1", {L, rows, C});
    a(ln1_mean, "ln1_mean", {L, rows});
    a(ln1_rstd, "ln1_rstd", {L, rows});
    a(qkv, "qkv", {L, rows, 3 * C});  // queries, keys, values: the cache in sampling
    a(att, "att", {L, rows, C});      // the heads' outputs, side by side
    a(lse, "lse", {L, rows, NH});     // (L, B, NH, T): log of the softmax's denominator
    a(mid, "mid", {L, rows, C});      // the stream between attention and feed-forward
    a(ln2, "ln2", {L, rows, C});
    a(ln2_mean, "ln2_mean", {L, rows});
    a(ln2_rstd, "ln2_rstd", {L, rows});
    a(fc, "fc", {L, rows, 4 * C});  // the hidden layer, after ReLU
    a(out, "out", {rows, C});       // the stream behind the last layer
    a(lnf, "lnf", {rows, C});
    a(lnf_mean, "lnf_mean", {rows});
    a(lnf_rstd, "lnf_rstd", {rows});
    a(logits, "logits", {rows, V});
    a(probs, "probs", {rows, V});
    a(losses, "losses", {rows});
  }
};

// Gradients of activations: none outlives its layer, so one of each serves all layers.
template <class Real>
struct ActivationGrads {
  Real *dstream, *dbranch, *dnorm, *datt, *dqkv, *dfc, *dlogits;

  void place(Arena& a, const ModelShape& s, size_t rows) {
    const size_t V = s.V, C = s.C;
    a(dstream, "dstream", {rows, C});
    a(dbranch, "dbranch", {rows, C});
    a(dnorm, "dnorm", {rows, C});
    a(datt, "datt", {rows, C});
    a(dqkv, "dqkv", {rows, 3 * C});
    a(dfc, "dfc", {rows, 4 * C});
    a(dlogits, "dlogits", {rows, V});
  }
};

// The weights once more, packed for products of few rows: text is sampled a row at a time.
template <class Factor>
struct PackedWeights {
  Slices<Unit<Factor>> qkvw, attprojw, fcw, fcprojw;
  Unit<Factor>* headw;

  void place(Arena& a, const ModelShape& s) {
    const int V = s.V, C = s.C;
    const auto size = [](int inputs, int outputs) { return product::packed_size<Factor>(inputs, outputs); };
    const size_t L = s.L;
    a(qkvw, "qkvw", {L, size(C, 3 * C)});
    a(attprojw, "attprojw", {L, size(C, C)});
    a(fcw, "fcw", {L, size(C, 4 * C)});
    a(fcprojw, "fcprojw", {L, size(4 * C, C)});
    a(headw, "headw", {size(C, V)});
  }
};

template <class Real, class Factor = Real>
struct GPT {
  ModelShape shape;
  int max_B;  // the activations have room for so many rows of shape.T tokens

  Layout param_layout = parameter_layout(shape);
  std::vector<MuonMatrix> hidden = muon_matrices(param_layout, shape.NH);  // the matrices inside the layers
  Layout act_layout = layout_of<Activations<Real>>(shape, rows());
  Layout act_grad_layout = layout_of<ActivationGrads<Real>>(shape, rows());
  Buffer<Real> params_memory{param_layout}, acts_memory{act_layout};
  // Only if the model is trained. Gradients: once, and once more for each level of the tree of batches. In a run of
  // several processes, which are called ranks, each updates its share of the parameters: it has AdamW's m and v for these
  // alone, and receives the others' gradients of them.
  std::vector<Part> shares = even_parts(param_layout.size(), norm_block, ranks().count());  // by rank
  Part own = shares[size_t(ranks().rank())];
  std::vector<Buffer<Real>> grads_memory;
  Buffer<Real> m_memory, v_memory, act_grads_memory, received_memory;  // received: (ranks, own.count)
  Buffer<Unit<Factor>> packed_memory;                                  // only if it writes text

  Params<Real> w = placed<Params<Real>>(params_memory.data(), shape);
  Params<Real> dw{};
  Activations<Real> a = placed<Activations<Real>>(acts_memory.data(), shape, rows());
  ActivationGrads<Real> g{};
  PackedWeights<Factor> packed{};  // nullptrs, unless pack_weights has packed the present w

  GPT(const ModelShape& model_shape, int batch) : shape(model_shape), max_B(batch) {}
  size_t rows() const { return size_t(max_B) * shape.T; }

  void prepare_training(int batches = 1) {  // in a step
    for (int level = 0; level <= tree_levels(batches); level++) grads_memory.emplace_back(param_layout);
    m_memory = Buffer<Real>(own.count);
    v_memory = Buffer<Real>(own.count);
    if (ranks().count() > 1) received_memory = Buffer<Real>(own.count * size_t(ranks().count()));
    act_grads_memory = Buffer<Real>(act_grad_layout);
    use_gradients(0);
    g = placed<ActivationGrads<Real>>(act_grads_memory.data(), shape, rows());
  }
  Real* grads(int level = 0) const { return grads_memory[size_t(level)].data(); }
  void use_gradients(int level) { dw = placed<Params<Real>>(grads(level), shape); }  // backward writes to them
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward: logits (B, T, V) of the tokens x (B, T).
// With first > 0 (B = 1, no dropout) only the positions first ... T - 1 are computed: x and logits hold these alone,
// and the keys and values of the earlier ones are still in a.qkv. That is how text is sampled token by token. With
// last_only (B = 1) the last layer goes on with the last position alone. Returns the logits of the last row (V).

template <class Real, class Factor>
const Real* forward(GPT<Real, Factor>& m, const int* x, int B, int T, const Dropout& drop = {}, int first = 0,
                    bool last_only = false) {
  const Params<Real>& w = m.w;
  const PackedWeights<Factor>& p = m.packed;
  const Activations<Real>& a = m.a;
  const int V = m.shape.V, C = m.shape.C, L = m.shape.L, NH = m.shape.NH;
  int n = T - first, rows = B * n;

  embedding_forward(L ? a.inp[0] : a.out, x, w.wte, w.wpe + size_t(first) * C, B, n, C);
  for (int l = 0; l < L; l++) {
    const Real* inp = a.inp[l];
    Real* out = l + 1 < L ? a.inp[l + 1] : a.out;
    Real* qkv = a.qkv[l] + size_t(first) * 3 * C;

    layernorm_forward(a.ln1[l], a.ln1_mean[l], a.ln1_rstd[l], inp, w.ln1w[l], w.ln1b[l], rows, C);
    matmul_forward<Real, Factor>(qkv, a.ln1[l], {w.qkvw[l], p.qkvw[l]}, nullptr, rows, C, 3 * C);
    if (last_only && l + 1 == L) {
      inp += size_t(n - 1) * C;
      first = T - 1;
      n = rows = 1;
    }
    attention_forward<Real, Factor>(a.att[l], a.lse[l], a.qkv[l], drop.at(site::attention_dropout, l), B, T, C, NH,
                                    first);
    matmul_forward<Real, Factor>(a.mid[l], a.att[l], {w.attprojw[l], p.attprojw[l]}, w.attprojb[l], rows, C, C,
                                 add_residual(a.mid[l], inp, drop.at(site::proj_dropout, l), T, C));

    layernorm_forward(a.ln2[l], a.ln2_mean[l], a.ln2_rstd[l], a.mid[l], w.ln2w[l], w.ln2b[l], rows, C);
    matmul_forward<Real, Factor>(a.fc[l], a.ln2[l], {w.fcw[l], p.fcw[l]}, w.fcb[l], rows, C, 4 * C,
                                 apply_relu(a.fc[l]));
    matmul_forward<Real, Factor>(out, a.fc[l], {w.fcprojw[l], p.fcprojw[l]}, w.fcprojb[l], rows, 4 * C, C,
                                 add_residual(out, a.mid[l], drop.at(site::fc_dropout, l), T, C));
  }
  layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, a.out, w.lnfw, w.lnfb, rows, C);
  matmul_forward<Real, Factor>(a.logits, a.lnf, {w.headw, p.headw}, w.headb, rows, C, V);
  return a.logits + size_t(rows - 1) * V;
}

// Packs the weights into m.packed, for sampling; valid until they change.
template <class Real, class Factor>
void pack_weights(GPT<Real, Factor>& m) {
  const int V = m.shape.V, C = m.shape.C;
  if (!m.packed_memory.data()) m.packed_memory = Buffer<Unit<Factor>>(layout_of<PackedWeights<Factor>>(m.shape));
  m.packed = placed<PackedWeights<Factor>>(m.packed_memory.data(), m.shape);
  for (int l = 0; l < m.shape.L; l++) {
    pack_weight<Real, Factor>(m.packed.qkvw[l], m.w.qkvw[l], C, 3 * C);
    pack_weight<Real, Factor>(m.packed.attprojw[l], m.w.attprojw[l], C, C);
    pack_weight<Real, Factor>(m.packed.fcw[l], m.w.fcw[l], C, 4 * C);
    pack_weight<Real, Factor>(m.packed.fcprojw[l], m.w.fcprojw[l], 4 * C, C);
  }
  pack_weight<Real, Factor>(m.packed.headw, m.w.headw, C, V);
}

// The sum of the losses of the targets y (B, T), after forward; in double, in the order of the rows.
template <class Real, class Factor>
double loss_sum(GPT<Real, Factor>& m, const int* y, int B, int T) {
  crossentropy_forward(m.a.losses, m.a.probs, m.a.logits, y, B * T, m.shape.V);
  double sum = 0;
  for (int r = 0; r < B * T; r++) sum += m.a.losses[r];
  return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward, after forward and loss_sum: adds the gradient of dloss * (sum of the losses) to every parameter's gradient.
// It is forward read from bottom to top.

template <class Real, class Factor>
void backward(GPT<Real, Factor>& m, const int* x, const int* y, int B, int T, double dloss, const Dropout& drop = {}) {
  const Params<Real>&w = m.w, &dw = m.dw;
  const Activations<Real>& a = m.a;
  const ActivationGrads<Real>& g = m.g;
  const int V = m.shape.V, C = m.shape.C, L = m.shape.L, NH = m.shape.NH, rows = B * T;
  const size_t stream = size_t(rows) * C;

  crossentropy_backward(g.dlogits, a.probs, y, Real(dloss), rows, V);
  matmul_backward<Real, Factor>(g.dnorm, dw.headw, dw.headb, g.dlogits, a.lnf, w.headw, rows, C, V);
  std::fill(g.dstream, g.dstream + stream, Real(0));
  layernorm_backward(g.dstream, dw.lnfw, dw.lnfb, g.dnorm, a.out, a.lnf_mean, a.lnf_rstd, w.lnfw, rows, C);

  for (int l = L - 1; l >= 0; l--) {
    residual_backward(g.dbranch, g.dstream, drop.at(site::fc_dropout, l), B, T, C);
    matmul_backward<Real, Factor>(g.dfc, dw.fcprojw[l], dw.fcprojb[l], g.dbranch, a.fc[l], w.fcprojw[l], rows, 4 * C, C,
                                  apply_relu_backward(g.dfc, a.fc[l]));
    matmul_backward<Real, Factor>(g.dnorm, dw.fcw[l], dw.fcb[l], g.dfc, a.ln2[l], w.fcw[l], rows, C, 4 * C);
    layernorm_backward(g.dstream, dw.ln2w[l], dw.ln2b[l], g.dnorm, a.mid[l], a.ln2_mean[l], a.ln2_rstd[l], w.ln2w[l],
                       rows, C);

    residual_backward(g.dbranch, g.dstream, drop.at(site::proj_dropout, l), B, T, C);
    matmul_backward<Real, Factor>(g.datt, dw.attprojw[l], dw.attprojb[l], g.dbranch, a.att[l], w.attprojw[l], rows, C,
                                  C);
    attention_backward<Real, Factor>(g.dqkv, g.datt, a.qkv[l], a.att[l], a.lse[l], drop.at(site::attention_dropout, l),
                                     B, T, C, NH);
    matmul_backward<Real, Factor>(g.dnorm, dw.qkvw[l], nullptr, g.dqkv, a.ln1[l], w.qkvw[l], rows, C, 3 * C);
    layernorm_backward(g.dstream, dw.ln1w[l], dw.ln1b[l], g.dnorm, a.inp[l], a.ln1_mean[l], a.ln1_rstd[l], w.ln1w[l],
                       rows, C);
  }
  embedding_backward(dw.wte, dw.wpe, g.dstream, x, B, T, C);
}

// ---------------------------------------------------------------------------------------------------------------------
// Update: add up the ranks' gradients, clip their norm if asked to, then AdamW over this rank's share: alone, over all.

template <class Real, class Factor>
void zero_gradients(GPT<Real, Factor>& m, int level = 0) {
  std::fill(m.grads(level), m.grads(level) + m.param_layout.size(), Real(0));
  plant_canaries(m.grads(level), m.param_layout);
}

template <class Real, class Factor>
void check_all_canaries(const GPT<Real, Factor>& m) {
  check_canaries(m.params_memory.data(), m.param_layout, "params");
  for (const Buffer<Real>& grads : m.grads_memory) check_canaries(grads.data(), m.param_layout, "grads");
  check_canaries(m.acts_memory.data(), m.act_layout, "activations");
  check_canaries(m.act_grads_memory.data(), m.act_grad_layout, "activation gradients");
}

// The ranks' gradients become one sum, of which each rank has its share.
template <class Real, class Factor>
void sum_over_ranks(GPT<Real, Factor>& m) {
  if (ranks().count() == 1) return;
  Real* const received = m.received_memory.data();
  ranks().scatter(received, m.grads(), m.shares);
  std::vector<Real*> pieces;  // by rank
  for (int r = 0; r < ranks().count(); r++)
    pieces.push_back(r == ranks().rank() ? m.grads() + m.own.first : received + size_t(r) * m.own.count);
  sum_pieces(pieces.data(), ranks().count(), [&](Real* sum, const Real* x) { add(sum, x, m.own.count); });
  if (!ranks().first()) std::copy(pieces[0], pieces[0] + m.own.count, m.grads() + m.own.first);
}

// Muon for the matrices inside the layers, AdamW for what lies between them. A matrix is made orthogonal as a whole, so each
// rank needs the momentum of all its elements, and computes all matrices, in its own gradients.
template <class Real, class Factor>
void muon_and_adamw(GPT<Real, Factor>& m, const AdamW& optimizer) {
  const Muon muon = {optimizer.learning_rate, optimizer.weight_decay, optimizer.gradient_scale};
  const std::vector<MuonMatrix>& matrices = m.hidden;
  Real* const params = m.params_memory.data();
  const auto own_of = [&](const Buffer<Real>& moments, const Part& part) {  // m and v begin with the rank's share
    return moments.data() + (part.first - m.own.first);
  };

  for (const MuonMatrix& x : matrices) {
    const Part part = common(x.elements, m.own);
    muon_momentum(m.grads() + part.first, own_of(m.m_memory, part), part.count, muon);
  }
  ranks().gather(m.grads(), m.shares);
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < matrices.size(); i++)
    orthogonalize<Factor>(m.grads() + matrices[i].elements.first, matrices[i].rows, matrices[i].columns);

  const auto update_rest = [&](size_t begin, size_t end) {
    const Part part = common({begin, end - begin}, m.own);
    adamw_update(params + part.first, own_of(m.m_memory, part), own_of(m.v_memory, part), m.grads() + part.first,
                 part.count, optimizer);
  };
  size_t done = 0;
  for (const MuonMatrix& x : matrices) {
    update_rest(done, x.elements.first);
    const Part part = common(x.elements, m.own);
    muon_update(params + part.first, m.grads() + part.first, part.count, x.rows, x.columns, muon);
    done = x.elements.first + x.elements.count;
  }
  update_rest(done, m.param_layout.size());
}

template <class Real, class Factor>
void update(GPT<Real, Factor>& m, AdamW optimizer, double grad_clip, bool muon = false) {
  sum_over_ranks(m);
  if (grad_clip > 0) {
    std::vector<double> squares = norm_squares(m.grads(), m.param_layout, m.own);
    ranks().gather(squares.data(), even_parts(squares.size(), 1, ranks().count()));
    optimizer.gradient_scale = clip_scale(squares, grad_clip);
  }
  m.packed = {};
  if (muon)
    muon_and_adamw(m, optimizer);
  else
    adamw_update(m.params_memory.data() + m.own.first, m.m_memory.data(), m.v_memory.data(), m.grads() + m.own.first,
                 m.own.count, optimizer);
  ranks().gather(m.params_memory.data(), m.shares);
}

// ---------------------------------------------------------------------------------------------------------------------
// The model as the training loop sees it (host/trainer.h).

// Factor: what the products' operands are rounded to, kernels/factors.h
template <class Factor>
class CpuModel final : public Trainer {
 public:
  CpuModel(const Config& config, const ModelShape& shape, const Data* data, bool training)
      : config_(config),
        data_(data),
        gpt_(shape, config.batch_size),
        x_(size_t(config.batch_size) * shape.T),
        y_(x_.size()) {
    if (training) gpt_.prepare_training(int(own_batches(config).count));
  }

  static MemoryPlan plan(const Config& config, const ModelShape& shape, const Data*, bool training) {
    const size_t rows = size_t(config.batch_size) * shape.T;
    const double params = 4.0 * parameter_layout(shape).size();
    MemoryPlan plan;
    plan.add("parameters", params);
    if (training) plan_training(plan, params, config);
    plan.add("weights packed for sampling", 4.0 * layout_of<PackedWeights<Factor>>(shape).size());
    plan.add("activations", 4.0 * layout_of<Activations<float>>(shape, rows).size());
    if (training) plan.add("their gradients", 4.0 * layout_of<ActivationGrads<float>>(shape, rows).size());
    if (training) plan.add("a snapshot for checkpoints", 3 * params);
    return plan;
  }
  static AvailableMemory memory() { return {usable_memory(), "this machine has"}; }

  ModelShape shape() const override { return gpt_.shape; }
  const Layout& layout() const override { return gpt_.param_layout; }
  std::string describe() const override {
    const int threads = omp_get_max_threads();
    return text(config_.dtype, ", ", threads, threads == 1 ? " thread" : " threads", ranks().shared_by());
  }
  double peak_flops() const override { return 0; }
  int chunk() const override { return 1; }
  GPT<float, Factor>& gpt() { return gpt_; }

  void restore(const float* params, const float* m, const float* v) override {
    const size_t n = layout().size();
    std::copy(params, params + n, gpt_.params_memory.data());
    gpt_.packed = {};
    const Part& own = gpt_.own;
    if (m) std::copy(m + own.first, m + own.first + own.count, gpt_.m_memory.data());
    if (v) std::copy(v + own.first, v + own.first + own.count, gpt_.v_memory.data());
  }
  void snapshot(float* params, float* m, float* v) const override {
    const size_t n = layout().size();
    std::copy(gpt_.params_memory.data(), gpt_.params_memory.data() + n, params);
    for (const auto& [from, to] : {std::pair{gpt_.m_memory.data(), m}, {gpt_.v_memory.data(), v}}) {
      if (!to) continue;
      std::copy(from, from + gpt_.own.count, to + gpt_.own.first);
      ranks().gather_on_first(to, from, gpt_.shares);
    }
  }
  std::string first_not_finite() const override {
    std::string name = ::first_not_finite(gpt_.acts_memory.data(), gpt_.act_layout, Order::forward);
    if (!name.empty()) return name;
    name = ::first_not_finite(gpt_.grads(), gpt_.param_layout, Order::backward);
    return name.empty() ? name : "the gradient of " + name;
  }
  std::map<std::string, std::string> state() const override { return {}; }
  void set_state(const std::map<std::string, std::string>&) override {}

  std::vector<float> train_steps(int iteration, int count) override {
    std::vector<float> losses;
    for (int i = 0; i < count; i++) losses.push_back(train_step(iteration + i));
    return losses;
  }
  double learning_rate(int iteration) const override { return learning_rate_at(config_, iteration); }

  std::vector<double> random_losses(Split split, int iteration, int first, int count) override {
    const int B = config_.batch_size, T = shape().T;
    std::vector<double> means;
    for (int k = first; k < first + count; k++) {
      random_batch(x_.data(), y_.data(), (*data_)[split], config_.seed, iteration, evaluation_site(split),
                   uint64_t(k) * B, B, T);
      forward(gpt_, x_.data(), B, T);
      means.push_back(loss_sum(gpt_, y_.data(), B, T) / (double(B) * T));
    }
    return means;
  }

  double window_losses(Split split, uint64_t at, int B, int n, uint64_t stride = 0) override {
    for (int b = 0; b < B; b++) {
      const uint64_t first = at + b * (stride ? stride : n);
      (*data_)[split].copy(first, n, x_.data() + size_t(b) * n);
      (*data_)[split].copy(first + 1, n, y_.data() + size_t(b) * n);
    }
    forward(gpt_, x_.data(), B, n);
    return loss_sum(gpt_, y_.data(), B, n);
  }

  static constexpr bool samples_together = false;  // one at a time keeps its keys and values
  std::vector<int> next_tokens(const int* context, int n, int known, const Sampling& s, int i) override {
    if (!gpt_.packed.headw) pack_weights(gpt_);
    const float* logits = forward(gpt_, context + known, 1, n, {}, known, true);
    return {choose_token(logits, shape().V, s.choice_of(i))};
  }

 private:
  // One update on the mean gradient of gradient_accumulation_steps batches; returns their mean loss.
  float train_step(int iteration) {
    const int batches = config_.gradient_accumulation_steps;
    const double dloss = 1.0 / (double(config_.batch_size) * shape().T * batches);
    double losses[32];  // by level, like the gradients
    const auto one = [&](int number, int level) { losses[level] = one_batch(iteration, number, level, dloss); };
    const auto add_level = [&](int level) {
      add(gpt_.grads(level), gpt_.grads(level + 1), layout().size());
      losses[level] += losses[level + 1];
    };
    const Part own = own_batches(config_);
    sum_tree(int(own.first), int(own.count), 0, one, add_level);
    gpt_.use_gradients(0);
    std::vector<double> by_rank = ranks().all(losses[0]);
    sum_pieces(by_rank.data(), ranks().count(), [](double& sum, double x) { sum += x; });
    update(gpt_, {learning_rate(iteration), config_.beta1, config_.beta2, 1e-8, config_.weight_decay, iteration + 1, 1},
           config_.grad_clip, config_.optimizer == "muon");
    check_all_canaries(gpt_);
    return float(by_rank[0]);
  }

  // Computes the step's batch of this number, and writes its gradients to grads(level). Returns its losses, added up, times
  // dloss.
  double one_batch(int iteration, int number, int level, double dloss) {
    const int B = config_.batch_size, T = shape().T, first_row = number * B;
    const Dropout drop = {config_.seed, uint32_t(iteration), 0, dropout_threshold(config_.dropout), first_row};
    random_batch(x_.data(), y_.data(), data_->train, config_.seed, iteration, site::batch, first_row, B, T,
                 rows_of_shuffled_step(config_));
    zero_gradients(gpt_, level);
    gpt_.use_gradients(level);
    forward(gpt_, x_.data(), B, T, drop);
    const double loss = loss_sum(gpt_, y_.data(), B, T) * dloss;
    backward(gpt_, x_.data(), y_.data(), B, T, dloss, drop);
    return loss;
  }

  Config config_;
  const Data* data_;
  GPT<float, Factor> gpt_;
  std::vector<int> x_, y_;  // (B, T)
};

// For --version: what the kernels of the CPU were built for. gnu::used for the same reason as run.
[[gnu::used]] inline std::string kernels_text() {
  std::string out = text("CPU kernels: vectors of ", 8 * vector_bytes, " bits");
  if (built_for.fma) out += ", FMA";
  if (built_for.avx2) out += ", AVX2";
  if (built_for.avx512) out += ", AVX-512";
  if (built_for.avx512_bf16) out += ", AVX512_BF16";
  if (amx::enabled) out += ", AMX";
  return out + "\n";
}

// What --dtype auto means: the type that the run has used so far or, for a new run, the type that measures faster.
inline std::string auto_dtype(const Config& config) {
  const std::string so_far = dtype_so_far(config);
  if (!built_for.avx512_bf16 || so_far == "float32") return "float32";
  if (so_far == "bfloat16") return so_far;
  const Rates rates = measure_rates();
  const std::string faster = faster_dtype(rates);
  std::fprintf(stderr, "bfloat16 %.0f, float32 %.0f GFLOP/s a core: %s\n", rates.bfloat16, rates.float32,
               faster.c_str());
  return faster;
}

// Does what the command line says, on the CPU. why: what to tell somebody who did not ask for the CPU.
inline int run(Config config, const std::string& why) {
  if (needs_no_trainer(config)) return run_without_trainer(config);
  const bool train = config.command == "train";
  if (train && config.device == "auto") std::fprintf(stderr, "on the CPU: %s\n", why.c_str());
  if (config.dtype == "auto") config.dtype = ranks().all_texts(auto_dtype(config))[0];  // one type for all
  if (config.dtype == "bfloat16" && !built_for.avx512_bf16)
    fail("--dtype bfloat16 on a CPU needs AVX512_BF16, which this one, or what this was built for, does not have");
  if (config.dtype != "float32" && config.dtype != "bfloat16")
    fail("--dtype ", config.dtype, " needs a GPU; a CPU has float32 and, with AVX512_BF16, bfloat16");
  use_threads(config.threads, train && ranks().first(), ranks().sharing_cores());
  if (train) {
    if (config.preset == "auto" && config.init_from != "resume")  // a resumed run has its own settings
      std::fprintf(stderr, "preset small, which fits a CPU; --preset lecture trains the course's 10.8 M parameters\n");
    apply_preset(config, config.preset == "auto" ? "small" : config.preset);
  }
  config.device = "cpu";
  if (config.dtype == "bfloat16") return run_command(trainer_type<CpuModel<bfloat16>>(), config);
  return run_command(trainer_type<CpuModel<float>>(), config);
}
#ifdef MICROGPT_FALLBACK  // this object has run for train_gpt.cu, which calls it
int (*used)(Config, const std::string&) = run;
#endif

}  // namespace cpu

#ifndef MICROGPT_NO_MAIN
int main(int argc, char** argv) {
  return run_main([&] {
    const Config config = parse_command_line(argc, argv);
    if (config.help) return std::fputs(help_text(config.command).c_str(), stdout), 0;
    if (config.version)
      return std::fputs((version_text() + cpu::kernels_text() + "built without CUDA\n").c_str(), stdout), 0;
    const std::string why = "this program was built without CUDA";
    if (config.device == "cuda") fail("--device cuda: ", why, "; with nvcc on the path, make train_gpt builds it with");
    return with_ranks(config, [&] { return cpu::run(config, why); });
  });
}
#endif
