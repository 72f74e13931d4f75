// How fast the layers and a whole training step are, as shares of what this machine can do.
//   bench [all] [dtype]           every layer of the lecture's model, and whole steps
//   bench layers [dtype] [sizes]  every layer, and one whole step
//   bench step [dtype] [sizes]    the step alone
//   bench point [dtype] [sizes]   the same as a line of numbers, with the memory it took, for bench_scaling.sh
//   bench products [dtype]        answers lines of stdin, "forward 2048 384 1152", with the time of that product
// dtype: float32 or bfloat16. Without one, `point` and `products` take float32, and the others run every type that this
// processor has.
// sizes: T=256 C=384 L=6 V=65 B=8 threads=2, any of them; small, the preset's; muon, for an update by Muon. A head has 64
// channels, small's 32.
// Each figure is the median of several runs after a warm-up, with the fastest and the slowest: machines are noisy, and
// a share is only as good as the peak that was measured beside it.
#define MICROGPT_NO_MAIN
#include "../../host/run.h"  // defines: flops_per_token
#include "../../train_gpt_cpu.cpp"

#include <sys/resource.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>

using namespace cpu;

namespace {

double median(std::vector<double> numbers) {
  std::sort(numbers.begin(), numbers.end());
  return numbers[numbers.size() / 2];
}

template <class Work>
double seconds(Work&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// GFLOP/s of all threads' multiply-adds in registers (kernels/peak.h), in a loop of 1 to 8 ms.
template <class Factor>
double peak_loop() {
  constexpr int rounds = 300'000;
  const int threads = omp_get_max_threads();
  std::vector<float> sink(size_t(threads) * 16);
  double operations = 0;
  const double time = seconds([&] {
#pragma omp parallel reduction(+ : operations)
    {
      const int thread = omp_get_thread_num();
      operations = multiply_at_the_peak<Factor>(rounds, float(thread + 1), sink[size_t(thread) * 16]);
    }
  });
  return operations / time / 1e9;
}

struct Times {
  double median, min, max;  // seconds of a run
  double sustained;         // the peak while it was measured, GFLOP/s
};

// Measures work, and the peak in between. A processor's clock falls under such work and moves with what its neighbours
// do, so no step can keep up with the fastest loop. The sustained peak is the median of the loops between the runs, and
// shares refer to it.
class Stopwatch {
 public:
  explicit Stopwatch(double (*loop)()) : loop_(loop) {}

  // As many runs as fit into 3 seconds, at least 3. Loops come first and after each tenth of a second: not before every
  // run, because the neighbours use the shared cache meanwhile, and short runs would all find it cold.
  template <class Work>
  Times measure(Work&& work, int most = 15) {
    const int runs = std::clamp(int(3 / seconds(work)), 3, most);
    std::vector<double> times, peaks;
    double since_loops = 1;
    for (int i = 0; i < runs; i++) {
      if (since_loops > 0.1) {
        for (int k = 0; k < 5; k++) peaks.push_back(loop_());
        since_loops = 0;
      }
      times.push_back(seconds(work));
      since_loops += times.back();
    }
    peaks_.insert(peaks_.end(), peaks.begin(), peaks.end());
    const auto [min, max] = std::minmax_element(times.begin(), times.end());
    return {median(times), *min, *max, median(peaks)};
  }

  double sustained() const { return median(peaks_); }
  double fastest() const { return *std::max_element(peaks_.begin(), peaks_.end()); }
  size_t loops() const { return peaks_.size(); }

 private:
  double (*loop_)();
  std::vector<double> peaks_;  // of all loops so far
};

// Bytes that all threads together read and write in a second, in GB/s: a = b + c * a over 256 MB.
double memory_bandwidth() {
  const size_t n = 32'000'000;
  std::vector<float> a(n), b(n, 1.f);
  std::vector<double> rates;
  for (int i = 0; i < 9; i++)
    rates.push_back(3.0 * n * sizeof(float) / 1e9 / seconds([&] {
#pragma omp parallel for simd schedule(static)
                      for (size_t k = 0; k < n; k++) a[k] = b[k] + 0.5f * a[k];
                    }));
  return median(rates);
}

std::string processor() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown processor";
}

struct Sizes {
  ModelShape shape = {65, 256, 384, 6, 6};  // the lecture's
  int B = 8;
  double dropout = 0.2;
  std::string name = "lecture";
  bool muon = false;  // the update's optimizer, else AdamW
};
const Sizes small_preset = {{65, 128, 128, 4, 4}, 16, 0, "small"};

// Reads T=256 and the like, small, or muon.
void set_size(Sizes& sizes, const std::string& word) {
  if (word == "small") return void(sizes = small_preset);
  if (word == "muon") return void(sizes.muon = true);
  const size_t equals = word.find('=');
  const std::string name = word.substr(0, equals);
  const int value = equals == std::string::npos ? 0 : std::atoi(word.c_str() + equals + 1);
  if (value < 1) fail("not a size, such as T=256: ", word);
  if (name == "threads") return omp_set_num_threads(value);
  ModelShape& s = sizes.shape;
  int* number = name == "T" ? &s.T : name == "C" ? &s.C : name == "L" ? &s.L : name == "V" ? &s.V : &sizes.B;
  if (number == &sizes.B && name != "B") fail("no such size: ", name);
  *number = value;
  if (s.C % 64 != 0) fail("C must be a multiple of 64, a head's channels");
  s.NH = s.C / 64;
  sizes.name = text("T=", s.T, " C=", s.C, " L=", s.L, " V=", s.V);
}

double bandwidth;  // GB/s

// A table of layers: how often a step calls each, its time, and its share of what bounds it, the peak of the products'
// type or the memory bandwidth. A layer that fits the caches can exceed 100 % of the bandwidth.
class Layers {
 public:
  explicit Layers(Stopwatch& watch) : watch_(watch) {}

  template <class Work>
  void products(const std::string& name, int calls, double flops, Work work) {
    const Times t = watch_.measure(work);
    print(name, calls, t, flops / 1e9, "GFLOP/s", t.sustained, "the sustained peak");
  }
  template <class Work>
  void memory(const std::string& name, int calls, double bytes, Work work) {
    print(name, calls, watch_.measure(work), bytes / 1e9, "GB/s", bandwidth, "bandwidth");
  }
  double sum() const { return sum_; }  // seconds of a step's calls

 private:
  void print(const std::string& name, int calls, const Times& t, double work, const char* unit, double limit,
             const char* of) {
    std::printf("%-33s %2d x %7.2f ms (%.2f .. %.2f)  %6.1f %-7s  %3.0f %% of %s\n", name.c_str(), calls,
                t.median * 1e3, t.min * 1e3, t.max * 1e3, work / t.median, unit, 100 * work / t.median / limit, of);
    std::fflush(stdout);
    sum_ += calls * t.median;
  }
  Stopwatch& watch_;
  double sum_ = 0;
};

template <class Factor>
double layers_of_a_step(Stopwatch& watch, const Sizes& sizes) {
  const ModelShape& shape = sizes.shape;
  const int B = sizes.B, T = shape.T, C = shape.C, NH = shape.NH, V = shape.V, L = shape.L, rows = B * T;
  const size_t stream = size_t(rows) * C, widest = std::max(4 * C, V), n_params = parameter_layout(shape).size();
  std::vector<float> wide(rows * widest, 0.1f), wide2(wide.size(), 0.2f), inp(wide.size()), weight(widest * C, 0.02f),
      dweight(weight.size()), bias(widest), dbias(widest), stats(size_t(rows) * NH), stats2(size_t(rows) * NH);
  for (size_t i = 0; i < inp.size(); i++) inp[i] = float(int(random4(1, 0, 0, i).word[0] % 2001) - 1000) / 1000;
  const Dropout drop = {1, 1, site::attention_dropout, dropout_threshold(sizes.dropout), 0};
  Layers table(watch);
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

// A training step on random tokens.
template <class Factor>
class Step {
 public:
  explicit Step(const Sizes& sizes)
      : sizes_(sizes), m_(sizes.shape, sizes.B), x_(size_t(sizes.B) * sizes.shape.T), y_(x_.size()) {
    m_.prepare_training();
    init_parameters(m_.params_memory.data(), m_.param_layout, 1);
    for (size_t i = 0; i < x_.size(); i++) {
      const Philox4 r = random4(1, 0, 0, i);
      x_[i] = int(r.word[0] % uint32_t(sizes.shape.V));
      y_[i] = int(r.word[1] % uint32_t(sizes.shape.V));
    }
  }
  void operator()() {
    const int B = sizes_.B, T = sizes_.shape.T;
    const Dropout drop = {1, uint32_t(step_), 0, dropout_threshold(sizes_.dropout), 0};
    zero_gradients(m_);
    forward(m_, x_.data(), B, T, drop);
    loss_sum(m_, y_.data(), B, T);
    backward(m_, x_.data(), y_.data(), B, T, 1.0 / (B * T), drop);
    update(m_, {1e-4, 0.9, 0.99, 1e-8, 0.01, ++step_, 1}, 0, sizes_.muon);
  }
  double tokens() const { return double(x_.size()); }
  double gflops() const { return tokens() * flops_per_token(sizes_.shape) / 1e9; }
  GPT<float, Factor>& model() { return m_; }

 private:
  Sizes sizes_;
  GPT<float, Factor> m_;
  std::vector<int> x_, y_;
  int step_ = 0;
};

template <class Factor>
double whole_step(Stopwatch& watch, const Sizes& sizes) {
  Step<Factor> step(sizes);
  const Times t = watch.measure(step);
  const double rate = step.gflops() / t.median;
  std::printf(
      "%s%s step, B = %d: median %.2f ms (%.2f .. %.2f), %.0f tokens/s, %.1f GFLOP/s, %.1f %% of the sustained peak\n",
      sizes.name.c_str(), sizes.muon ? " (Muon)" : "", sizes.B, t.median * 1e3, t.min * 1e3, t.max * 1e3,
      step.tokens() / t.median, rate, 100 * rate / t.sustained);
  std::fflush(stdout);
  return t.median;
}

template <class Factor>
void bench(const char* dtype, const std::string& what, const Sizes& sizes) {
  Stopwatch watch(peak_loop<Factor>);
  std::printf("\n%s\n", dtype);
  const double sum = what == "step" ? 0 : layers_of_a_step<Factor>(watch, sizes);
  const double step = whole_step<Factor>(watch, sizes);
  if (sum > 0) std::printf("  of which its layers, measured alone, %.2f ms, %.1f %%\n", sum * 1e3, 100 * sum / step);
  if (what == "all") {
    whole_step<Factor>(watch, {.B = 64});
    whole_step<Factor>(watch, small_preset);
    Sizes with_muon = small_preset;
    with_muon.muon = true;
    whole_step<Factor>(watch, with_muon);
  }
  std::printf("peak of %s: sustained %.0f GFLOP/s, the median of %zu loops between the runs; the fastest %.0f\n", dtype,
              watch.sustained(), watch.loops(), watch.fastest());
}

// A line of numbers for dev/bench/bench_scaling.sh, which prints their names.
template <class Factor>
void point(const char* dtype, const Sizes& sizes) {
  Stopwatch watch(peak_loop<Factor>);
  Step<Factor> step(sizes);
  const Times t = watch.measure(step);
  // The trainer's plan also counts what a step does not touch: the weights packed to sample, a checkpoint's snapshot.
  pack_weights(step.model());
  const std::vector<float> snapshot(3 * step.model().param_layout.size(), 1.f);
  rusage used;
  getrusage(RUSAGE_SELF, &used);
#ifdef __APPLE__
  const double memory = double(used.ru_maxrss);
#else
  const double memory = double(used.ru_maxrss) * 1024;
#endif
  Config config;
  config.batch_size = sizes.B;
  const ModelShape& s = sizes.shape;
  std::printf("%s,%d,%d,%d,%d,%d,%d,%.3f,%.3f,%.3f,%.0f,%.1f,%.1f,%.1f,%.1f,%.1f,%.1f\n", dtype, s.T, s.C, s.L, s.V,
              sizes.B, omp_get_max_threads(), t.median * 1e3, t.min * 1e3, t.max * 1e3, step.tokens() / t.median,
              step.gflops() / t.median, t.sustained, watch.fastest(), 100 * step.gflops() / t.median / t.sustained,
              memory / 1e6, CpuModel<Factor>::plan(config, s, nullptr, true).total() / 1e6);
}

// Times one of a linear layer's three products, called as the layer calls it, without bias and epilogue. Prints the
// milliseconds and the sustained peak in GFLOP/s.
template <class Factor>
void time_product(Stopwatch& watch, const std::string& which, int rows, int C, int OC) {
  if (rows < 1 || C < 1 || OC < 1) fail("a product is, for example, 'forward 2048 384 1152': rows, inputs, outputs");
  const auto noise = [](size_t n, uint32_t site) {
    std::vector<float> numbers(n);
    for (size_t i = 0; i < n; i++) numbers[i] = float(int(random4(1, 0, site, i).word[0] % 2001) - 1000) / 1000;
    return numbers;
  };
  std::vector<float> x = noise(size_t(rows) * C, 1), y = noise(size_t(rows) * OC, 2), w = noise(size_t(OC) * C, 3);
  const auto work = [&] {
    if (which == "forward")
      matmul_forward<float, Factor>(y.data(), x.data(), w.data(), nullptr, rows, C, OC);
    else if (which == "dX")
      matmul_backward_input<float, Factor>(x.data(), y.data(), w.data(), rows, C, OC);
    else if (which == "dW")
      matmul_backward_weight<float, Factor>(w.data(), nullptr, y.data(), x.data(), rows, C, OC);
    else
      fail("no such product: ", which);
  };
  const Times t = watch.measure(work, 5);
  std::printf("%.4f %.1f\n", t.median * 1e3, t.sustained);
  std::fflush(stdout);
}

template <class Factor>
void answer_products() {
  Stopwatch watch(peak_loop<Factor>);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string which;
    int rows = 0, C = 0, OC = 0;
    words >> which >> rows >> C >> OC;
    time_product<Factor>(watch, which, rows, C, OC);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_main([&] {
    use_threads(0);
    std::string what = "all", dtype;
    Sizes sizes;
    for (int i = 1; i < argc; i++) {
      const std::string word = argv[i];
      if (word == "float32" || word == "bfloat16")
        dtype = word;
      else if (i > 1)
        set_size(sizes, word);
      else if (word == "all" || word == "layers" || word == "step" || word == "point" || word == "products")
        what = word;
      else
        fail(
            "usage: bench [all|layers|step|point|products] [float32|bfloat16] [small|T=256 C=384 L=6 V=65 B=8 "
            "threads=2]");
    }
    if (dtype == "bfloat16" && !built_for.avx512_bf16) fail("bfloat16 needs AVX512_BF16");
    if (what == "point")
      return dtype == "bfloat16" ? point<bfloat16>("bfloat16", sizes) : point<float>("float32", sizes), 0;
    if (what == "products") return dtype == "bfloat16" ? answer_products<bfloat16>() : answer_products<float>(), 0;
    std::printf("%s, %d threads, vectors of %d bits", processor().c_str(), omp_get_max_threads(), 8 * vector_bytes);
    if (what != "step") std::printf(", memory %.1f GB/s", bandwidth = memory_bandwidth());
    std::printf("\n");
    if (dtype != "bfloat16") bench<float>("float32", what, sizes);
    if (dtype == "bfloat16" || (dtype.empty() && built_for.avx512_bf16)) bench<bfloat16>("bfloat16", what, sizes);
    return 0;
  });
}
