// Trains a GPT on an NVIDIA GPU. Read it beside train_gpt_cpu.cpp: the same sections in the same order; each layer is one
// call, whose kernel stands in kernels/<layer>.cuh. A training step is captured once as a CUDA graph and then launched
// again and again: all that changes from step to step (its number, the learning rate, the batch) is read on the device.
//
// The contract of every layer function: outputs, inputs, then sizes, then the stream (Matmul has its own). Gradients are
// written (=), but for dstream, to which LayerNorm's backward pass adds (+=). Real is the type of the products' operands:
// float, bf16 or fp16. Master weights, their gradients, moments and all statistics are float.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "host/commands.h"  // defines: run_command, dtype_so_far, ...
#include "host/config.h"    // defines: Config, parse_command_line
#include "host/data.h"      // defines: Data, Split
#include "host/error.h"     // defines: fail, run_main
#include "host/memory.h"    // defines: MemoryPlan
#include "host/ranks.h"     // defines: ranks, with_ranks
#include "host/schedule.h"  // defines: learning_rate_at
#include "host/tensors.h"   // defines: ModelShape, Params, Arena, Layout
#include "host/trainer.h"   // defines: Trainer, trainer_type
#include "host/tree.h"      // defines: sum_tree, tree_levels
#include "host/version.h"   // defines: version_text
#include "kernels/add.cuh"
#include "kernels/attention.cuh"
#include "kernels/batch.cuh"
#include "kernels/card.cuh"
#include "kernels/choices.cuh"
#include "kernels/column_sums.cuh"
#include "kernels/crossentropy.cuh"
#include "kernels/embedding.cuh"
#include "kernels/layernorm.cuh"
#include "kernels/matmul.cuh"
#include "kernels/muon.cuh"
#include "kernels/ranks.cuh"
#include "kernels/runtime.cuh"
#include "kernels/sampler.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// The tensors. The learned ones, Params, are in host/tensors.h: trainers and files share them. Gradients, AdamW's m and v
// and the working copy (the parameters, rounded to Real, as the products read them) are buffers of the same layout.

// What forward leaves behind for backward. L: a slice for each layer; or, without backward, one that all layers share.
template <class Real>
struct Activations {
  Slices<Real> inp, ln1, qkv, att, mid, ln2, fc;
  Real *out, *lnf, *logits, *branch;

  void place(Arena& a, const ModelShape& s, size_t rows, size_t L) {  // rows = B * T
    const size_t C = s.C, Vp = padded_vocabulary(s.V);
    a(inp, "inp", {L, rows, C});  // the residual stream where it enters the layer
    a(ln1, "ln1", {L, rows, C});
    a(qkv, "qkv", {layers_of_qkv(s, L), rows, 3 * C});  // queries, keys, values
    a(att, "att", {L, rows, C});                        // the heads' outputs, side by side
    a(mid, "mid", {L, rows, C});                        // the stream between attention and feed-forward
    a(ln2, "ln2", {L, rows, C});
    a(fc, "fc", {L, rows, 4 * C});  // the hidden layer, after ReLU
    a(out, "out", {rows, C});       // the stream behind the last layer
    a(lnf, "lnf", {rows, C});
    a(logits, "logits", {rows, Vp});  // then their gradient, in the same place
    a(branch, "branch", {rows, C});   // what a branch adds to the stream, before its bias and dropout
  }

  // The same memory for a pass that leaves nothing behind: all layers use the first slice, and the stream stays in place.
  Activations without_backward() const {
    Activations shared = *this;
    for (Slices<Real>* slices : {&shared.inp, &shared.ln1, &shared.qkv, &shared.att, &shared.ln2, &shared.fc})
      slices->stride = 0;
    shared.mid = shared.inp;
    shared.out = shared.inp[0];
    return shared;
  }
};

// Gradients of activations live no longer than their layer, so one of each serves all layers.
template <class Real>
struct ActivationGrads {
  Real *dstream, *dbranch, *dnorm, *datt, *dqkv, *dfc;

  void place(Arena& a, const ModelShape& s, size_t rows) {
    const size_t C = s.C;
    a(dstream, "dstream", {rows, C});
    a(dbranch, "dbranch", {rows, C});
    a(dnorm, "dnorm", {rows, C});
    a(datt, "datt", {rows, C});
    a(dqkv, "dqkv", {rows, 3 * C});
    a(dfc, "dfc", {rows, 4 * C});
  }
};

// What else forward leaves behind: floats, and masks of bits.
struct Statistics {
  Slices<float> ln1_mean, ln1_rstd, lse, att_mask, ln2_mean, ln2_rstd, fc_mask;
  float *lnf_mean, *lnf_rstd, *losses;

  void place(Arena& a, const ModelShape& s, size_t rows, size_t L, size_t att_mask_bytes) {
    a(ln1_mean, "ln1_mean", {L, rows});
    a(ln1_rstd, "ln1_rstd", {L, rows});
    a(lse, "lse", {L, rows, size_t(s.NH)});  // (L, B, NH, T): log of the softmax's denominator
    if (att_mask_bytes > 0) a(att_mask, "att_mask", {L, att_mask_bytes / sizeof(float)});  // did dropout keep it?
    a(ln2_mean, "ln2_mean", {L, rows});
    a(ln2_rstd, "ln2_rstd", {L, rows});
    a(fc_mask, "fc_mask", {L, ceil_div(relu_mask_bytes(int(rows), 4 * s.C), sizeof(float))});  // did it pass ReLU?
    a(lnf_mean, "lnf_mean", {rows});
    a(lnf_rstd, "lnf_rstd", {rows});
    a(losses, "losses", {rows});
  }
};

// Backward's scratch in float. The partials are sums over blocks of rows, which sum_gradients adds up at the end.
struct GradStatistics {
  float *datt_out, *lnf_partials, *head_partials, *embedding_partials;
  Slices<float> ln1_partials, ln2_partials, fc_partials;

  void place(Arena& a, const ModelShape& s, int B) {
    const int rows = B * s.T, C = s.C;
    const size_t L = s.L;
    a(datt_out, "datt_out", {size_t(rows), size_t(s.NH)});  // attention_backward's D
    a(ln1_partials, "ln1_partials", {L, layernorm_partials(rows, C)});
    a(ln2_partials, "ln2_partials", {L, layernorm_partials(rows, C)});
    a(lnf_partials, "lnf_partials", {layernorm_partials(rows, C)});
    a(fc_partials, "fc_partials", {L, partials_size(rows, 4 * C)});
    a(head_partials, "head_partials", {partials_size(rows, s.V)});
    a(embedding_partials, "embedding_partials", {::embedding_partials(B, s.T, C, s.V)});
  }
};

// All of them in one buffer, for batches of B windows: first the tensors of type Real, then the floats.
template <class Real>
struct ActivationBuffer {
  Activations<Real> a{};
  ActivationGrads<Real> g{};
  Statistics s{};
  GradStatistics gs{};
  Layout of_real, of_float;

  // Without memory it only measures.
  ActivationBuffer(const ModelShape& shape, int B, bool training, bool dropout, Real* memory = nullptr) {
    const size_t rows = size_t(B) * shape.T, L = training ? shape.L : 1;
    Arena reals(memory);
    a.place(reals, shape, rows, L);
    if (training) g.place(reals, shape, rows);
    of_real = reals.layout();
    Arena floats(memory ? memory + of_real.size() : nullptr);
    s.place(floats, shape, rows, L, training && dropout ? attention_mask_bytes<Real>(B, shape.T, shape.NH) : 0);
    if (training) gs.place(floats, shape, B);
    of_float = floats.layout();
  }
  size_t bytes() const { return of_real.size() * sizeof(Real) + of_float.size() * sizeof(float); }
};

template <class Real>
struct GPT {
  static constexpr bool has_working_copy = !std::is_same_v<Real, float>;  // float is its own

  ModelShape shape;
  Config config;
  bool training, dropout = config.dropout > 0;
  cudaStream_t stream;
  int B = config.batch_size;  // windows in a batch, each of shape.T tokens

  Layout param_layout = parameter_layout(shape);
  size_t count = param_layout.size(), trained = training ? count : 0;
  DeviceRanks cards{param_layout, norm_unit(count), training};  // several processes share the update
  DeviceBuffer<float> params_memory{count, "the parameters"};
  DeviceBuffer<Real> working_memory{has_working_copy ? count : 0, "the working copy of the parameters"};
  // The gradients, and once more for each level of the tree of a step's batches.
  DeviceBuffer<float> grads_memory{trained * (1 + tree_levels(int(own_batches(config).count))), "the gradients"};
  DeviceBuffer<float> m_memory{cards.own().count, "AdamW's m"}, v_memory{cards.own().count, "AdamW's v"};
  DeviceBuffer<unsigned char> acts_memory{ActivationBuffer<Real>(shape, B, training, dropout).bytes(), "activations"};
  DeviceBuffer<int> x_memory{size_t(B) * shape.T, "a batch"}, y_memory{size_t(B) * shape.T, "a batch"};
  DeviceBuffer<TrainState> state_memory{1, "counters"};

  Params<float> p = placed<Params<float>>(params_memory.data(), shape);  // the masters
  Params<float> dw = placed<Params<float>>(grads_memory.data(), shape);  // where backward writes
  Real* working = has_working_copy ? working_memory.data() : reinterpret_cast<Real*>(params_memory.data());
  Params<Real> w = placed<Params<Real>>(working, shape);
  ActivationBuffer<Real> acts{shape, B, training, dropout, reinterpret_cast<Real*>(acts_memory.data())};
  Activations<Real> forward_only = acts.a.without_backward();
  int *x = x_memory.data(), *y = y_memory.data();  // (B, T)
  TrainState* state = state_memory.data();
  Matmul matmul{config.dtype == "tf32", stream};
  MuonAndAdamW<Real> optimizer{shape, cards.own(), training && (config.optimizer == "muon")};

  GPT(const ModelShape& s, const Config& c, bool train, cudaStream_t on)
      : shape(s), config(c), training(train), stream(on) {}
  float* grads(int level = 0) const { return grads_memory.data() + size_t(level) * count; }
  void use_gradients(int level) { dw = placed<Params<float>>(grads(level), shape); }
  const int* step() const { return &state->step; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward: logits (B, T, Vp) of the tokens m.x (B, T). With for_backward it leaves behind what backward needs; without,
// nothing outlives its layer.

template <class Real>
void forward(GPT<Real>& m, int B, int T, const DeviceDropout& drop, bool for_backward) {
  Range range("forward");
  const Params<Real>& w = m.w;
  const Params<float>& p = m.p;
  const Activations<Real>& a = for_backward ? m.acts.a : m.forward_only;
  const Statistics& s = m.acts.s;
  const int V = m.shape.V, C = m.shape.C, L = m.shape.L, NH = m.shape.NH, rows = B * T;
  const cudaStream_t stream = m.stream;
  const auto kept = [&](const Slices<float>& slices, int l) { return for_backward ? slices[l] : nullptr; };

  embedding_forward(a.inp[0], m.x, w.wte, w.wpe, B, T, C, stream);
  layernorm_forward(a.ln1[0], kept(s.ln1_mean, 0), kept(s.ln1_rstd, 0), a.inp[0], p.ln1w[0], p.ln1b[0], rows, C,
                    stream);
  for (int l = 0; l < L; l++) {
    m.matmul.forward(a.qkv[l], a.ln1[l], w.qkvw[l], nullptr, rows, C, 3 * C, 3 * C);
    attention_forward(a.att[l], kept(s.lse, l), s.att_mask.bytes(l), a.qkv[l], drop.at(site::attention_dropout, l), B,
                      T, C, NH, stream, m.matmul.tf32());
    m.matmul.forward(a.branch, a.att[l], w.attprojw[l], nullptr, rows, C, C, C);
    residual_layernorm_forward(a.mid[l], a.ln2[l], kept(s.ln2_mean, l), kept(s.ln2_rstd, l), a.inp[l], a.branch,
                               p.attprojb[l], drop.at(site::proj_dropout, l), p.ln2w[l], p.ln2b[l], B, T, C, stream);
    m.matmul.forward_relu(a.fc[l], for_backward ? s.fc_mask.bytes(l) : nullptr, a.ln2[l], w.fcw[l], w.fcb[l], rows, C,
                          4 * C);
    m.matmul.forward(a.branch, a.fc[l], w.fcprojw[l], nullptr, rows, 4 * C, C, C);
    const DeviceDropout fc_drop = drop.at(site::fc_dropout, l);
    if (l + 1 < L)  // the branch joins the stream together with the next layer's first step
      residual_layernorm_forward(a.inp[l + 1], a.ln1[l + 1], kept(s.ln1_mean, l + 1), kept(s.ln1_rstd, l + 1), a.mid[l],
                                 a.branch, p.fcprojb[l], fc_drop, p.ln1w[l + 1], p.ln1b[l + 1], B, T, C, stream);
    else
      residual_layernorm_forward(a.out, a.lnf, for_backward ? s.lnf_mean : nullptr, for_backward ? s.lnf_rstd : nullptr,
                                 a.mid[l], a.branch, p.fcprojb[l], fc_drop, p.lnfw, p.lnfb, B, T, C, stream);
  }
  m.matmul.forward(a.logits, a.lnf, w.headw, w.headb, rows, C, head_rows<Real>(V), padded_vocabulary(V));
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward computes the losses of the targets m.y and, for every parameter, the gradient of dloss * (their sum) times
// the loss scale. It is forward read from bottom to top.

// Adds up the partials that backward made over blocks of rows: the gradients of the token embedding, of LayerNorm and of
// all biases. Each LayerNorm has the bias of the branch before it; for ln1 that branch is in the layer below.
template <class Real>
void sum_gradients(const GPT<Real>& m, int B, int T) {
  const Params<float>& dw = m.dw;
  const GradStatistics& gs = m.acts.gs;
  const int V = m.shape.V, C = m.shape.C, L = m.shape.L, rows = B * T;
  const Sums sums[] = {
      embedding_sums(dw.wte, gs.embedding_partials, B, T, C, V),
      layernorm_sums(dw.ln1w[0], dw.ln1b[0], nullptr, gs.ln1_partials[0], rows, C),
      layernorm_sums(dw.ln1w.from(1), dw.ln1b.from(1), dw.fcprojb, gs.ln1_partials.from(1), rows, C, L - 1),
      layernorm_sums(dw.ln2w, dw.ln2b, dw.attprojb, gs.ln2_partials, rows, C, L),
      sums_of(dw.fcb, gs.fc_partials, rows, 4 * C, L),
      layernorm_sums(dw.lnfw, dw.lnfb, dw.fcprojb[L - 1], gs.lnf_partials, rows, C),
      sums_of(dw.headb, gs.head_partials, rows, V),
  };
  add_partials(sums, m.stream);
}

template <class Real>
void backward(GPT<Real>& m, int B, int T, float dloss, const DeviceDropout& drop) {
  Range range("backward");
  const Params<Real>& w = m.w;
  const Params<float>&p = m.p, &dw = m.dw;
  const Activations<Real>& a = m.acts.a;
  const ActivationGrads<Real>& g = m.acts.g;
  const Statistics& s = m.acts.s;
  const GradStatistics& gs = m.acts.gs;
  const int V = m.shape.V, Vp = padded_vocabulary(V), C = m.shape.C, L = m.shape.L, NH = m.shape.NH, rows = B * T;
  const cudaStream_t stream = m.stream;

  Real* dlogits = a.logits;
  crossentropy_forward_backward(s.losses, dlogits, m.y, dloss, &m.state->loss_scale, rows, V, Vp, stream);
  m.matmul.backward_input(g.dnorm, dlogits, w.headw, rows, C, head_rows<Real>(V), Vp);
  m.matmul.backward_weight(dw.headw, dlogits, a.lnf, rows, C, head_rows<Real>(V), Vp);
  column_partials(gs.head_partials, dlogits, rows, V, Vp, stream);
  // From here on dstream is the residual stream's gradient, and dbranch the gradient of the branch that joined it here.
  residual_layernorm_backward(g.dstream, g.dbranch, gs.lnf_partials, g.dnorm, a.out, s.lnf_mean, s.lnf_rstd, p.lnfw,
                              true, drop.at(site::fc_dropout, L - 1), B, T, C, stream);

  // unread(x) waits until products on a second stream, if there is one (matmul.cuh), have read x; join(), for all of them.
  for (int l = L - 1; l >= 0; l--) {
    m.matmul.backward_weight(dw.fcprojw[l], g.dbranch, a.fc[l], rows, 4 * C, C, C);
    m.matmul.backward_input_relu(m.matmul.unread(g.dfc), gs.fc_partials[l], g.dbranch, w.fcprojw[l], s.fc_mask.bytes(l),
                                 a.fc[l], rows, 4 * C, C);
    m.matmul.backward_input(g.dnorm, g.dfc, w.fcw[l], rows, C, 4 * C, 4 * C);
    m.matmul.backward_weight(dw.fcw[l], g.dfc, a.ln2[l], rows, C, 4 * C, 4 * C);
    residual_layernorm_backward(g.dstream, m.matmul.unread(g.dbranch), gs.ln2_partials[l], g.dnorm, a.mid[l],
                                s.ln2_mean[l], s.ln2_rstd[l], p.ln2w[l], false, drop.at(site::proj_dropout, l), B, T, C,
                                stream);

    m.matmul.backward_input(g.datt, g.dbranch, w.attprojw[l], rows, C, C, C);
    m.matmul.backward_weight(dw.attprojw[l], g.dbranch, a.att[l], rows, C, C, C);
    attention_backward(m.matmul.unread(g.dqkv), gs.datt_out, g.datt, a.qkv[l], a.att[l], s.lse[l], s.att_mask.bytes(l),
                       drop.at(site::attention_dropout, l), B, T, C, NH, stream, m.matmul.tf32());
    m.matmul.backward_input(g.dnorm, g.dqkv, w.qkvw[l], rows, C, 3 * C, 3 * C);
    m.matmul.backward_weight(dw.qkvw[l], g.dqkv, a.ln1[l], rows, C, 3 * C, 3 * C);
    if (m.cards.early()) m.cards.leave(l, m.grads(), m.matmul.weights_written());
    residual_layernorm_backward(g.dstream, l > 0 ? m.matmul.unread(g.dbranch) : nullptr, gs.ln1_partials[l], g.dnorm,
                                a.inp[l], s.ln1_mean[l], s.ln1_rstd[l], p.ln1w[l], false,
                                drop.at(site::fc_dropout, l - 1), B, T, C, stream);
  }
  embedding_backward(dw.wpe, gs.embedding_partials, g.dstream, m.x, B, T, C, V, stream);
  sum_gradients(m, B, T);
  m.matmul.join();
}

// ---------------------------------------------------------------------------------------------------------------------
// Update: add up the ranks' gradients, clip their norm if asked to, then the optimizer, over this rank's share of them.

template <class Real>
void update(GPT<Real>& m, const Optimizer& o) {
  Range range("update");
  m.cards.sum(m.grads(), m.state->loss_sum, m.stream);
  if (o.grad_clip > 0 || o.loss_scaling) {
    gradient_norm(o.norm_partials, m.grads(), m.count, m.cards.own_units(), m.stream);
    m.cards.gather(o.norm_partials, m.cards.units(), m.stream);
    prepare_update(m.state, o.norm_partials, m.count, o.grad_clip, o.loss_scaling, m.stream);
  }
  m.optimizer.update(m.params_memory.data(), m.m_memory.data(), m.v_memory.data(),
                     m.cards.several() ? nullptr : m.working_memory.data(), m.grads(), o, m.state, m.matmul, m.cards,
                     m.stream);
  m.cards.gather(m.params_memory.data(), m.cards.shares(), m.stream);
  if (m.cards.several() && m.has_working_copy) round_to(m.working, m.params_memory.data(), m.count, m.stream);
}

template <class Real, class Visit>
void each_buffer(const GPT<Real>& m, Visit visit) {  // with canaries in the gaps (host/tensors.h)
  visit(m.params_memory.data(), m.param_layout, "params");
  if (m.has_working_copy) visit(m.working_memory.data(), m.param_layout, "working copy");
  visit(m.acts.a.inp[0], m.acts.of_real, "activations");
  visit(m.acts.s.ln1_mean[0], m.acts.of_float, "statistics");
}

// ---------------------------------------------------------------------------------------------------------------------
// The model as the training loop sees it (host/trainer.h).

template <class Real>
class GpuModel final : public Trainer {
 public:
  GpuModel(const Config& config, const ModelShape& shape, const Data* data, bool training)
      : gpt_(shape, config, training, stream_) {
    if (data)
      for (const Split split : {Split::train, Split::val}) tokens_.emplace_back((*data)[split]);
    set_state({});
    if (ranks().first()) gpt_.matmul.load_table_from(algorithms_path());
    if (training) prepare_training();
  }

  static MemoryPlan plan(const Config& config, const ModelShape& shape, const Data* data, bool training) {
    require_kernels_for(shape, config.batch_size);
    const double params = 4.0 * double(parameter_layout(shape).size());
    MemoryPlan plan;
    plan.add("parameters", params);
    if (GPT<Real>::has_working_copy) plan.add("their working copy", params * sizeof(Real) / 4);
    if (training) plan_training(plan, params, config);
    if (training && config.optimizer == "muon") plan.add("Muon's matrices", MuonAndAdamW<Real>::muon_bytes(shape));
    const ActivationBuffer<Real> activations(shape, config.batch_size, training, config.dropout > 0);
    plan.add("activations", double(activations.bytes()));
    if (data) plan.add("the text", 2.0 * double(data->train.size() + data->val.size()));
    plan.add("cuBLASLt's workspace", Matmul::memory());
    return plan;
  }
  static AvailableMemory memory() { return {free_device_memory(), "on this GPU there are free"}; }

  ModelShape shape() const override { return gpt_.shape; }
  const Layout& layout() const override { return gpt_.param_layout; }
  std::string describe() const override {
    return text(config_.dtype, " on ", card_text(),
                peak_flops_ > 0 ? text(", measured peak ", std::round(peak_flops_ / 1e12), " TFLOP/s") : "",
                ranks().shared_by());
  }
  double peak_flops() const override { return peak_flops_; }
  int chunk() const override { return ring_size; }

  void restore(const float* params, const float* m, const float* v) override {
    const Part& own = gpt_.cards.own();
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    copy_to_device(gpt_.params_memory.data(), params, gpt_.count);
    if (m) copy_to_device(gpt_.m_memory.data(), m + own.first, own.count);
    if (v) copy_to_device(gpt_.v_memory.data(), v + own.first, own.count);
    if (gpt_.has_working_copy) round_to(gpt_.working, gpt_.params_memory.data(), gpt_.count, stream_);
  }
  void snapshot(float* params, float* m, float* v) const override {
    const Part& own = gpt_.cards.own();
    copy_to_host(params, gpt_.params_memory.data(), gpt_.count, stream_);
    for (const auto& [to, from] : {std::pair{m, gpt_.m_memory.data()}, {v, gpt_.v_memory.data()}}) {
      if (!to) continue;
      copy_to_host(to + own.first, from, own.count, stream_);
      ranks().gather_on_first(to, to + own.first, gpt_.cards.shares());
    }
  }

  std::string first_not_finite() const override {
    const std::string name = first_not_finite_on_device(gpt_.acts.a.inp[0], gpt_.acts.of_real, Order::forward);
    const std::string of = first_not_finite_on_device(gpt_.grads(), gpt_.param_layout, Order::backward);
    return !name.empty() || of.empty() ? name : "the gradient of " + of;
  }

  std::map<std::string, std::string> state() const override {
    TrainState state;
    copy_to_host(&state, gpt_.state, 1, stream_);
    std::map<std::string, std::string> out = {{"matmul", algorithms_}};
    if (loss_scaling) save_loss_scale(out, state);
    return out;
  }
  void set_state(const std::map<std::string, std::string>& saved) override {
    TrainState state = initial_state(loss_scaling);
    if (loss_scaling) load_loss_scale(state, saved);
    copy_to_device(gpt_.state, &state, 1);
    step_ = state.step;
    if (saved.count("matmul") && saved.at("matmul") != algorithms_)
      std::fprintf(stderr,
                   "the kernels are not the same as before (%s, now %s): the run goes on, but not bit for bit\n",
                   saved.at("matmul").c_str(), algorithms_.c_str());
  }

  // Takes at most chunk() steps: the device has learning rates, and room for losses, for no more.
  std::vector<float> train_steps(int iteration, int count) override {
    require(count <= ring_size, "train_steps: ", count, " at once");
    const Config& c = config_;
    std::vector<AdamWStep> adamw(ring_size);
    for (int i = iteration; i < iteration + count; i++)
      adamw[size_t(i % ring_size)] = adamw_step(learning_rate(i), c.beta1, c.beta2, c.weight_decay, i + 1);
    copy_to_device(adamw_ring_.data(), adamw.data(), ring_size);
    set_step(iteration);
    for (int i = 0; i < count; i++) {
      if (use_graph && graph_.captured())
        graph_.launch(stream_);
      else
        enqueue_step(c.gradient_accumulation_steps);
      gpt_.cards.mark(stream_);
    }
    gpt_.cards.wait(stream_);
    step_ += count;
    std::vector<float> ring(ring_size), losses;
    copy_to_host(ring.data(), loss_ring_.data(), ring_size, stream_);
    for (int i = iteration; i < iteration + count; i++) losses.push_back(ring[size_t(i % ring_size)]);
    each_buffer(gpt_, [](auto* buffer, auto& layout, auto name) { check_canaries_on_device(buffer, layout, name); });
    check_canaries_on_device(gpt_.grads(), layout(), "grads", true);
    return losses;
  }
  double learning_rate(int iteration) const override { return learning_rate_at(config_, iteration); }

  std::vector<double> random_losses(Split split, int iteration, int first, int count) override {
    const int rows = gpt_.B * shape().T;
    set_step(iteration);
    std::vector<double> means =
        losses_of(count, rows, [&](int k) { gather(split, evaluation_site(split), first + k); });
    for (double& mean : means) mean /= rows;
    return means;
  }

  // Rows past B * n still hold an older batch. We compute them and ignore them (causality keeps them from changing
  // anything): the shapes stay the ones that cuBLASLt was prepared for.
  double window_losses(Split split, uint64_t first, int B, int n, uint64_t stride = 0) override {
    return losses_of(1, B * n, [&](int) {
      gather_windows(gpt_.x, gpt_.y, tokens_[size_t(split)].tokens.data(), first, stride ? stride : n, B, n, stream_);
    })[0];
  }

  // For the same reason a pass over the windows computes T tokens, whatever n is.
  static constexpr bool samples_together = true;
  std::vector<int> next_tokens(const int* contexts, int n, int known, const Sampling& s, int i) override {
    return sampler_.next_tokens(gpt_, contexts, n, known, s, i, use_graph,
                                [&](int B) { forward(gpt_, B, shape().T, {}, false); });
  }

  GPT<Real>& gpt() { return gpt_; }
  bool use_graph = true;  // false: every kernel is launched by itself, which a profiler shows more clearly

  // Puts a whole training step onto the stream, of so many batches in all.
  void enqueue_step(int batches) {
    const double dloss = 1.0 / (double(gpt_.B) * shape().T * batches);
    enqueue_gradients(gpt_.cards.begin_step(batches), dloss);
    update(gpt_, optimizer_);
    end_step(gpt_.state, loss_ring_.data(), ring_size, dloss, loss_scaling, stream_);
  }

 private:
  // grads() and loss_sum[0] = the sums of these batches' gradients and losses. host/tree.h has the order.
  void enqueue_gradients(const Part& batches, double dloss) {
    const auto add_level = [&](int level) {
      double* const loss = gpt_.state->loss_sum + level;
      add(gpt_.grads(level), gpt_.grads(level + 1), gpt_.count, loss, loss + 1, stream_);
    };
    const auto one = [&](int number, int level) { one_batch(number, level, dloss); };
    sum_tree(int(batches.first), int(batches.count), 0, one, add_level);
    gpt_.use_gradients(0);
  }

  // Computes the step's batch of this number, and writes its gradients to grads(level), its loss to loss_sum[level].
  void one_batch(int number, int level, double dloss) {
    const int B = gpt_.B, T = shape().T;
    const DeviceDropout drop({config_.seed, 0, 0, dropout_threshold(config_.dropout), number * B}, gpt_.step());
    gather(Split::train, site::batch, number);
    gpt_.use_gradients(level);
    forward(gpt_, B, T, drop, true);
    backward(gpt_, B, T, float(dloss), drop);
    sum_losses(gpt_.state->loss_sum + level, gpt_.acts.s.losses, B * T, stream_);
  }

  // The batch of this number goes into gpt_.x and gpt_.y.
  void gather(Split split, uint32_t site, int number) {
    const DeviceTokens& from = tokens_[size_t(split)];
    gather_random(gpt_.x, gpt_.y, from.tokens.data(), from.count, config_.seed, gpt_.step(), site,
                  uint64_t(number) * gpt_.B, gpt_.B, shape().T, stream_, rows_of_shuffled_step(config_));
  }

  void prepare_training() {
    const int batches = config_.gradient_accumulation_steps;
    each_buffer(gpt_, [](auto* buffer, auto& layout, auto) { plant_canaries_on_device(buffer, layout); });
    peak_flops_ = gpt_.matmul.template measure_peak<Real>() * 1e12;
    // Gradients and an evaluation choose the products' algorithms, and a step loads the other kernels; nothing may do that
    // while a graph is captured. What this changes is overwritten by restore and set_state. Rank 0 chooses for all.
    const Part own = own_batches(config_);
    if (!ranks().first()) gpt_.matmul.load_table(ranks().all_texts("")[0]);
    const auto batch = [&] { one_batch(int(own.first), 0, 1); };  // its time decides which way of ReLU is taken
    gpt_.matmul.template choose_relu<Real>(gpt_.B * shape().T, shape().C, 4 * shape().C, batch);
    enqueue_gradients({own.first, std::min<size_t>(own.count, 2)}, 1);
    losses_of(1, gpt_.B * shape().T, [](int) {});
    algorithms_ = gpt_.matmul.name() + choices().name();
    if (ranks().first()) gpt_.matmul.save_table_to(algorithms_path());
    if (ranks().first()) ranks().all_texts(gpt_.matmul.save_table());
    enqueue_step(gpt_.cards.several() ? batches : std::min(batches, 2));
    gpt_.cards.wait(stream_);
    if (batches <= graph_batches) graph_.capture(stream_, [&] { enqueue_step(batches); });
    set_state({});
  }

  // The losses of `count` batches with dropout off, each the sum over its first `rows` positions. get(k) puts batch k into
  // gpt_.x and gpt_.y.
  template <class Get>
  std::vector<double> losses_of(int count, int rows, Get get) {
    Range range("evaluate");
    require(count <= ring_size, "losses_of: ", count, " batches at once");
    for (int k = 0; k < count; k++) {
      get(k);
      forward(gpt_, gpt_.B, shape().T, {}, false);
      crossentropy_forward(gpt_.acts.s.losses, gpt_.forward_only.logits, gpt_.y, rows, shape().V,
                           padded_vocabulary(shape().V), stream_);
      sum_losses(batch_losses_.data() + k, gpt_.acts.s.losses, rows, stream_);
    }
    std::vector<double> losses(size_t(count), 0.0);
    copy_to_host(losses.data(), batch_losses_.data(), losses.size(), stream_);
    return losses;
  }

  void set_step(int step) {
    if (step != step_) copy_to_device(&gpt_.state->step, &step, 1);
    step_ = step;
  }

  // The algorithms are measured once and kept beside the run's other files, so that later runs repeat it bit for bit.
  std::string algorithms_path() const { return config_.out_dir + "/matmul_algorithms.txt"; }

  static constexpr int ring_size = 50, graph_batches = 64;  // a step of more batches is launched without a graph
  static constexpr bool loss_scaling = std::is_same_v<Real, fp16>;

  Stream stream_;
  GPT<Real> gpt_;
  const Config& config_ = gpt_.config;
  std::vector<DeviceTokens> tokens_;                                     // by Split
  DeviceBuffer<float> loss_ring_{ring_size, "losses"};                   // iteration i's is i % ring_size
  DeviceBuffer<AdamWStep> adamw_ring_{ring_size, "the learning rates"};  // likewise
  DeviceBuffer<double> batch_losses_{ring_size, "losses"};               // of an evaluation
  DeviceSampler sampler_{gpt_.x, config_.batch_size, gpt_.shape, stream_};
  DeviceBuffer<double> norm_partials_{gradient_norm_partials, "the gradient's norm"};
  Optimizer optimizer_{config_.beta1, config_.beta2,      1e-8,      config_.grad_clip,
                       loss_scaling,  adamw_ring_.data(), ring_size, norm_partials_.data()};
  Graph graph_;
  std::string algorithms_;  // names what computes the products of training and evaluation, and choices()
  int step_ = 0;            // state->step, as far as the host knows
  double peak_flops_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------

inline int run_on_gpu(Config config) {
  config.dtype = dtype_on(current_card(), config.dtype, config.dtype == "auto" ? dtype_so_far(config) : "");
  if (config.command == "train") apply_preset(config, config.preset == "auto" ? "lecture" : config.preset);
  config.device = "cuda";
  if (config.dtype == "bfloat16") return run_command(trainer_type<GpuModel<bf16>>(), config);
  if (config.dtype == "float16") return run_command(trainer_type<GpuModel<fp16>>(), config);
  return run_command(trainer_type<GpuModel<float>>(), config);
}

#ifndef MICROGPT_NO_MAIN
int main(int argc, char** argv) {
  return run_main([&] {
    const Config config = parse_command_line(argc, argv);
    if (config.help) return std::fputs(help_text(config.command).c_str(), stdout), 0;
    if (config.version) return std::fputs((version_text() + cpu::kernels_text() + cards_text()).c_str(), stdout), 0;
    return with_ranks(config, [&] {
      if (config.device == "cpu" || needs_no_trainer(config)) return cpu::run(config, "");
      const std::string why = ranks().first_of(no_gpu(ranks().number_on_host()));  // one device for all
      if (config.device == "cuda" && !why.empty()) ranks().fail_alike("--device cuda: " + why);
      return why.empty() ? run_on_gpu(config) : cpu::run(config, why);
    });
  });
}
#endif
