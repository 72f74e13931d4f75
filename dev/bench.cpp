// How fast the layers and a whole training step are, as shares of what this machine can do.
//   bench [all] [dtype]   the peak, the memory bandwidth, every layer of the lecture's model, and whole steps
//   bench layers [dtype]  the same with one whole step
//   bench step [dtype]    the peak and this step only
// dtype: float32 or bfloat16; none: those that this processor has.
// Each figure is the median of several runs after a warm-up, with the fastest and the slowest: machines are noisy, and
// a share is only as good as the peak that was measured beside it.
#define MICROGPT_NO_MAIN
#include "../train_gpt_cpu.cpp"

#include <chrono>
#include <fstream>
#include <string>

using namespace cpu;

namespace {

struct Times {
  double median, min, max;  // seconds
};

template <class Work>
Times measure(int runs, Work work) {
  work();
  std::vector<double> seconds;
  for (int i = 0; i < runs; i++) {
    const auto start = std::chrono::steady_clock::now();
    work();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(seconds.begin(), seconds.end());
  return {seconds[seconds.size() / 2], seconds.front(), seconds.back()};
}

// The peak of all threads' multiply-adds, in GFLOP/s (kernels/peak.h). The fastest run counts: nothing is faster than
// the peak.
template <class Factor>
double product_peak() {
  constexpr int rounds = 10'000'000 / product::MR;
  const int threads = omp_get_max_threads();
  std::vector<float> sink(size_t(threads) * 16);
  const Times t = measure(9, [&] {
#pragma omp parallel
    {
      const int thread = omp_get_thread_num();
      sink[size_t(thread) * 16] = multiply_in_registers<Factor>(rounds, float(thread + 1));
    }
  });
  return rounds * flops_a_round<Factor> * threads / t.min / 1e9;
}

// Bytes that all threads together read and write in a second, in GB/s: a = b + c * a over 256 MB.
double memory_bandwidth() {
  const size_t n = 32'000'000;
  std::vector<float> a(n), b(n, 1.f);
  const Times t = measure(5, [&] {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) a[i] = b[i] + 0.5f * a[i];
  });
  return 3.0 * n * sizeof(float) / t.min / 1e9;
}

std::string processor() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown processor";
}

double bandwidth;

const ModelShape lecture = {65, 256, 384, 6, 6}, small = {65, 128, 128, 4, 4};

// A table of layers: how often a step calls each, its time, and its share of what bounds it, the peak of the products'
// type or the memory bandwidth. What fits the caches can exceed 100 % of the latter.
class Layers {
 public:
  explicit Layers(double peak) : peak_(peak) {}

  template <class Work>
  void products(const std::string& name, int calls, double flops, Work work) {
    print(name, calls, measure(runs, work), flops / 1e9, "GFLOP/s", peak_, "peak");
  }
  template <class Work>
  void memory(const std::string& name, int calls, double bytes, Work work) {
    print(name, calls, measure(runs, work), bytes / 1e9, "GB/s", bandwidth, "bandwidth");
  }
  double sum() const { return sum_; }  // seconds of a step's calls

 private:
  static constexpr int runs = 9;
  void print(const std::string& name, int calls, const Times& t, double work, const char* unit, double limit,
             const char* of) {
    std::printf("%-26s %2d x %7.2f ms (%.2f .. %.2f)  %6.1f %-7s  %3.0f %% of %s\n", name.c_str(), calls,
                t.median * 1e3, t.min * 1e3, t.max * 1e3, work / t.median, unit, 100 * work / t.median / limit, of);
    std::fflush(stdout);
    sum_ += calls * t.median;
  }
  double peak_, sum_ = 0;
};

template <class Factor>
double layers_of_a_step(double peak, const ModelShape& shape, int B, double p) {
  const int T = shape.T, C = shape.C, NH = shape.NH, V = shape.V, L = shape.L, rows = B * T;
  const size_t stream = size_t(rows) * C, n_params = parameter_layout(shape).size();
  std::vector<float> wide(4 * stream, 0.1f), wide2(4 * stream, 0.2f), inp(4 * stream), weight(4 * size_t(C) * C, 0.02f),
      dweight(weight.size()), bias(4 * C), dbias(4 * C), stats(size_t(rows) * NH), stats2(size_t(rows) * NH);
  for (size_t i = 0; i < inp.size(); i++) inp[i] = float(int(random4(1, 0, 0, i).word[0] % 2001) - 1000) / 1000;
  const Dropout drop = {1, 1, site::attention_dropout, dropout_threshold(p), 0};
  Layers table(peak);
  const auto linear = [&](const std::string& name, int calls, int in, int out, auto after, auto after_backward) {
    const double flops = 2.0 * rows * in * out;
    table.products(name + " forward", calls, flops, [&] {
      matmul_forward<float, Factor>(wide.data(), inp.data(), weight.data(), bias.data(), rows, in, out, after);
    });
    table.products(name + " backward", calls, 2 * flops, [&] {
      matmul_backward<float, Factor>(wide.data(), dweight.data(), dbias.data(), wide2.data(), inp.data(), weight.data(),
                                     rows, in, out, after_backward);
    });
  };
  const product::Nothing nothing;
  const auto add = add_residual(wide.data(), wide2.data(), drop, T, C);
  linear("qkv", L, C, 3 * C, nothing, nothing);
  linear("attproj + residual", L, C, C, add, nothing);
  linear("fc + relu", L, C, 4 * C, apply_relu(wide.data()), nothing);
  linear("fcproj + residual, relu", L, 4 * C, C, add, apply_relu_backward(wide.data(), wide2.data()));
  linear("head", 1, C, V, nothing, nothing);
  const double attention = 4.0 * B * C * T * (T + 1) / 2;
  table.products("attention forward", L, attention,
                 [&] { attention_forward<float, Factor>(wide.data(), stats.data(), inp.data(), drop, B, T, C, NH); });
  table.products("attention backward", L, 2 * attention, [&] {
    attention_backward<float, Factor>(wide2.data(), inp.data(), inp.data(), wide.data(), stats.data(), drop, B, T, C,
                                      NH);
  });
  const double bytes = sizeof(float) * double(stream);
  std::vector<int> tokens(rows);
  table.memory("layernorm forward", 2 * L + 1, 2 * bytes, [&] {
    layernorm_forward(wide.data(), stats.data(), stats2.data(), inp.data(), bias.data(), bias.data(), rows, C);
  });
  table.memory("layernorm backward", 2 * L + 1, 4 * bytes, [&] {
    layernorm_backward(wide.data(), dbias.data(), dbias.data() + C, wide2.data(), inp.data(), stats.data(),
                       stats2.data(), bias.data(), rows, C);
  });
  table.memory("residual backward", 2 * L, 2 * bytes,
               [&] { residual_backward(wide.data(), inp.data(), drop, B, T, C); });
  table.memory("cross-entropy", 1, 3 * sizeof(float) * double(rows) * V, [&] {
    crossentropy_forward(stats.data(), wide.data(), inp.data(), tokens.data(), rows, V);
    crossentropy_backward(wide2.data(), wide.data(), tokens.data(), 1.f, rows, V);
  });
  table.memory("embedding", 1, 3 * bytes, [&] {
    embedding_forward(wide.data(), tokens.data(), inp.data(), inp.data(), B, T, C);
    embedding_backward(wide2.data(), inp.data(), wide.data(), tokens.data(), B, T, C);
  });
  std::vector<float> params(n_params), grads(n_params, 0.1f), m(n_params), v(n_params);
  table.memory("AdamW, gradients to zero", 1, 8.0 * sizeof(float) * double(n_params), [&] {
    adamw_update(params.data(), m.data(), v.data(), grads.data(), n_params, {1e-4, 0.9, 0.99, 1e-8, 0.01, 1, 1});
    std::fill(grads.begin(), grads.end(), 0.1f);
  });
  return table.sum();
}

template <class Factor>
double whole_step(const char* name, double peak, const ModelShape& shape, int B, double dropout, int runs) {
  GPT<float, Factor> m(shape, B);
  m.prepare_training();
  init_parameters(m.params_memory.data(), m.param_layout, 1);
  const int T = shape.T;
  std::vector<int> x(size_t(B) * T), y(x.size());
  for (size_t i = 0; i < x.size(); i++) {
    const Philox4 r = random4(1, 0, 0, i);
    x[i] = int(r.word[0] % uint32_t(shape.V));
    y[i] = int(r.word[1] % uint32_t(shape.V));
  }
  int step = 0;
  const Times t = measure(runs, [&] {
    const Dropout drop = {1, uint32_t(step), 0, dropout_threshold(dropout), 0};
    zero_gradients(m);
    forward(m, x.data(), B, T, drop);
    loss_sum(m, y.data(), B, T);
    backward(m, x.data(), y.data(), B, T, 1.0 / (B * T), drop);
    update(m, {1e-4, 0.9, 0.99, 1e-8, 0.01, ++step, 1}, 0);
  });
  const double tokens = double(B) * T, rate = tokens * flops_per_token(shape) / t.median / 1e9;
  std::printf("%s step, B = %d: median %.2f ms (%.2f .. %.2f), %.0f tokens/s, %.1f GFLOP/s, %.1f %% of peak\n", name, B,
              t.median * 1e3, t.min * 1e3, t.max * 1e3, tokens / t.median, rate, 100 * rate / peak);
  std::fflush(stdout);
  return t.median;
}

template <class Factor>
void bench(const char* dtype, bool layers, bool all_steps) {
  const double peak = product_peak<Factor>();
  std::printf("\n%s: peak %.0f GFLOP/s\n", dtype, peak);
  const double sum = layers ? layers_of_a_step<Factor>(peak, lecture, 8, 0.2) : 0;
  const double step = whole_step<Factor>("lecture", peak, lecture, 8, 0.2, 5);
  if (layers) std::printf("  of which its layers, measured alone, %.2f ms, %.1f %%\n", sum * 1e3, 100 * sum / step);
  if (all_steps) whole_step<Factor>("lecture", peak, lecture, 64, 0.2, 3);
  if (all_steps) whole_step<Factor>("small", peak, small, 16, 0, 15);
  std::printf("peak after: %.0f GFLOP/s\n", product_peak<Factor>());
}

}  // namespace

int main(int argc, char** argv) {
  return run_main([&] {
    const std::string what = argc > 1 ? argv[1] : "all", dtype = argc > 2 ? argv[2] : "";
    if (what != "all" && what != "layers" && what != "step") fail("usage: bench [all|layers|step] [float32|bfloat16]");
    if (dtype == "bfloat16" && !built_for.avx512_bf16) fail("bfloat16 needs AVX512_BF16");
    use_threads(0);
    std::printf("%s, %d threads, vectors of %d bits", processor().c_str(), omp_get_max_threads(), 8 * vector_bytes);
    if (what != "step") std::printf(", memory %.1f GB/s", bandwidth = memory_bandwidth());
    std::printf("\n");
    if (dtype != "bfloat16") bench<float>("float32", what != "step", what == "all");
    if (dtype == "bfloat16" || (dtype.empty() && built_for.avx512_bf16))
      bench<bfloat16>("bfloat16", what != "step", what == "all");
    return 0;
  });
}
