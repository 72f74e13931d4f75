// kernels/muon.cuh against the CPU's muon.h: the update of all parameters, by one rank and by several shares.
#include "../kernels/muon.cuh"

#include <functional>

#include "../host/random.h"
#include "../host/ranks.h"
#include "../kernels/adamw.h"
#include "../kernels/muon.h"
#include "cuda.h"

namespace {

const ModelShape shape = {11, 8, 40, 3, 5};  // V, T, C, L, NH: no side is a multiple of a tile
const Layout layout = parameter_layout(shape);

std::vector<float> noise(uint32_t which, float size) {
  std::vector<float> x(layout.size());
  for (const TensorSpec& spec : layout.tensors())
    for (int l = 0; l < spec.layers; l++)
      for (size_t i = 0; i < spec.slice; i++) {
        double normal[4];
        const size_t at = spec.offset + size_t(l) * spec.stride + i;
        normal4(normal, random4(5, which, 0, at));
        x[at] = size * float(normal[0]);
      }
  return x;
}

constexpr double rate = 0.02, beta1 = 0.9, beta2 = 0.99, decay = 0.3;
constexpr int steps = 3;

struct State {
  std::vector<float> params = noise(1, 0.1f), m = std::vector<float>(layout.size()), v = m;
  std::vector<float> momenta[steps];  // what the gradients have become before the matrices are made orthogonal
};
std::vector<float> gradients(int step) { return noise(10 + uint32_t(step), 3); }

// What the CPU makes of it: a step after the other, tensor by tensor.
State on_the_cpu(double scale) {
  State s;
  for (int step = 0; step < steps; step++) {
    std::vector<float> grads = gradients(step);
    const AdamW adamw = {rate, beta1, beta2, 1e-8, decay, step + 1, scale};
    const Muon muon = {rate, decay, scale};
    s.momenta[step] = grads;
    for (const TensorSpec& spec : layout.tensors())
      for (int l = 0; l < spec.layers; l++) {
        const size_t at = spec.offset + size_t(l) * spec.stride;
        float *const p = s.params.data() + at, *const g = grads.data() + at;
        const int parts = hidden_matrices(spec, shape.NH);
        if (parts == 0) {
          adamw_update(p, s.m.data() + at, s.v.data() + at, g, spec.slice, adamw);
          continue;
        }
        const int rows = int(spec.shape[0]) / parts, columns = int(spec.shape[1]);
        muon_momentum(g, s.m.data() + at, spec.slice, muon);
        std::copy_n(g, spec.slice, s.momenta[step].data() + at);
        for (int i = 0; i < parts; i++) orthogonalize<float>(g + i * rows * columns, rows, columns);
        muon_update(p, g, spec.slice, rows, columns, muon);
      }
  }
  return s;
}

// Stands for the other ranks, where DeviceRanks would exchange the momenta.
struct Others {
  std::function<void(float* momenta)> exchange;
  std::vector<Part> shares() const { return {}; }
  void gather(float* momenta, const std::vector<Part>&, cudaStream_t) { exchange(momenta); }
};

// How far the parameters have got from where they were wanted, as a share of their way there.
double error_of_way(const std::vector<float>& got, const std::vector<float>& want, const std::vector<float>& begin) {
  double errors = 0, ways = 1e-30;
  for (size_t i = 0; i < got.size(); i++) {
    errors += std::pow(double(got[i]) - want[i], 2);
    ways += std::pow(double(want[i]) - begin[i], 2);
  }
  return std::sqrt(errors / ways);
}

// The steps of the rank that has this share, and how far they are from the CPU's. When it would receive the momenta of the
// others' shares, it gets the CPU's.
template <class Real>
void check_share(const Part& own, float scale, double error_allowed) {
  const State want = on_the_cpu(scale);
  const std::vector<float> begin = State().params;
  const Stream stream;
  Matmul matmul(false, stream);
  MuonAndAdamW<Real> optimizer(shape, own, true);
  DeviceArray<float> params(begin), m(std::vector<float>(own.count)), v(std::vector<float>(own.count));
  DeviceArray<Real> working(begin);
  std::vector<AdamWStep> table;
  for (int i = 0; i < steps; i++) table.push_back(adamw_step(rate, beta1, beta2, decay, i + 1));
  const DeviceArray<AdamWStep> ring(table);
  const Optimizer o = {beta1, beta2, 1e-8, 0, false, ring.data(), steps, nullptr};
  const auto mine = [&](const std::vector<float>& all) {
    return std::vector<float>(all.begin() + std::ptrdiff_t(own.first),
                              all.begin() + std::ptrdiff_t(own.first + own.count));
  };
  for (int step = 0; step < steps; step++) {
    TrainState state;
    state.step = step;
    state.gradient_scale = scale;
    const DeviceArray<TrainState> on_device(std::vector<TrainState>{state});
    const DeviceArray<float> grads(gradients(step));
    Others cards = {[&](float* sent) {
      CUDA_CHECK(cudaStreamSynchronize(stream));
      check_close(mine(grads.read()), mine(want.momenta[step]), 1e-6);
      CUDA_CHECK(cudaMemcpy(sent, want.momenta[step].data(), layout.size() * sizeof *sent, cudaMemcpyHostToDevice));
      CUDA_CHECK(cudaDeviceSynchronize());
    }};
    optimizer.update(params.data(), m.data(), v.data(), working.data(), grads.data(), o, on_device.data(), matmul,
                     cards, stream);
    CUDA_CHECK(cudaStreamSynchronize(stream));
  }
  std::vector<float> after = params.read();
  CHECK(error_of_way(mine(after), mine(want.params), mine(begin)) < error_allowed);
  check_close(m.read(), mine(want.m), 1e-6);
  check_close(v.read(), mine(want.v), 1e-6);
  // The working copy follows where something was updated; what belongs to others stays.
  const std::vector<Real> rounded(after.begin(), after.end());
  CHECK((working.floats() == std::vector<float>(rounded.begin(), rounded.end())));
  std::copy_n(begin.begin() + std::ptrdiff_t(own.first), own.count, after.begin() + std::ptrdiff_t(own.first));
  CHECK((after == begin));
}

}  // namespace

// Operands of 16 bits: the iteration multiplies their rounding where a singular value is small, as it multiplies the value.
TEST_CASE("Muon on the GPU updates as on the CPU", "[cuda][muon]") {
  const Part all = {0, layout.size()};
  check_share<float>(all, 1, 1e-4);
  check_share<float>(all, 0.25f, 1e-4);
  check_share<fp16>(all, 1, 0.01);
  check_share<bf16>(all, 1, 0.05);
}

TEST_CASE("Muon on the GPU: each rank updates its share, and no more", "[cuda][muon]") {
  for (const Part& own : even_parts(layout.size(), 1024, 5)) check_share<float>(own, 1, 1e-4);
  check_share<float>({layout.size(), 0}, 1, 1e-4);
}

TEST_CASE("Muon on the GPU: every element of a matrix counts in its norm", "[cuda][muon]") {
  for (const auto& [rows, columns] : {std::pair{200, 208}, {208, 200}}) {
    TensorSpec spec;
    spec.layers = 2;
    spec.shape = {size_t(rows), size_t(columns)};
    spec.stride = 208 * 200;
    const MuonTensor t(spec, 1);
    std::vector<float> ones(2 * t.stride, 2.0f);
    std::fill_n(ones.begin(), t.stride, 1.0f);
    const DeviceArray<float> grads(ones), x(ones.size());
    const DeviceArray<double> partials(2 * muon_partials);
    launch(muon_squares_kernel, {dim3(muon_partials, 2), 256}, partials.data(), grads.data(), t);
    const auto normalize = t.tall() ? muon_normalize_kernel<float, true> : muon_normalize_kernel<float, false>;
    launch(normalize, {dim3(7, 7, 2), 256}, x.data(), grads.data(), partials.data(), t);
    check_close(x.read(), std::vector<double>(ones.size(), 1 / std::sqrt(208.0 * 200)), 1e-6);
  }
}

TEST_CASE("Muon on the GPU leaves everything as it is after an overflow", "[cuda][muon]") {
  const Stream stream;
  Matmul matmul(false, stream);
  MuonAndAdamW<fp16> optimizer(shape, {0, layout.size()}, true);
  const std::vector<float> begin = noise(1, 0.1f), moments = noise(2, 0.1f);
  std::vector<float> infinite = gradients(0);
  for (float& g : infinite) g *= 1e38f;
  const DeviceArray<float> params(begin), m(moments), v(moments), grads(infinite);
  const DeviceArray<fp16> working(begin);
  const std::vector<float> rounded = working.floats();
  const DeviceArray<AdamWStep> ring(std::vector<AdamWStep>{adamw_step(rate, beta1, beta2, decay, 1)});
  TrainState state;
  state.overflow = 1;
  const DeviceArray<TrainState> on_device(std::vector<TrainState>{state});
  const Optimizer o = {beta1, beta2, 1e-8, 0, true, ring.data(), 1, nullptr};
  Others nobody = {[](float*) {}};
  optimizer.update(params.data(), m.data(), v.data(), working.data(), grads.data(), o, on_device.data(), matmul, nobody,
                   stream);
  CUDA_CHECK(cudaStreamSynchronize(stream));
  CHECK((params.read() == begin));
  CHECK((m.read() == moments));
  CHECK((v.read() == moments));
  CHECK((working.floats() == rounded));
}
