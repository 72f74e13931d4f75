// How fast the layers and a whole training step are, as shares of what this machine can do.
//   bench          the peak, the memory bandwidth, every layer forward and backward, and whole steps
//   bench step     the peak and the whole steps only
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

// The fused-multiply-add peak of all threads, in GFLOP/s: in registers, with as many independent chains as the
// product's tile has. The fastest run counts: nothing is faster than the peak.
double fma_peak() {
  constexpr int chains = product::MR, rounds = 10'000'000 / chains;
  const int threads = omp_get_max_threads();
  std::vector<float> sink(size_t(threads) * 16);
  const Times t = measure(9, [&] {
#pragma omp parallel
    {
      const float seed = 1 + float(omp_get_thread_num());
      Vec<float> sum[chains][2], x = broadcast(seed), y = broadcast(0.999f);
      for (int i = 0; i < chains; i++) sum[i][0] = sum[i][1] = broadcast(seed * float(i));
      for (int r = 0; r < rounds; r++)
        for (int i = 0; i < chains; i++)
          for (int j = 0; j < 2; j++) sum[i][j] = sum[i][j] * y + x;
      for (int i = 1; i < chains; i++) sum[0][0] += sum[i][0] + sum[i][1];
      sink[size_t(omp_get_thread_num()) * 16] = horizontal_sum<float>(sum[0][0]);
    }
  });
  return 2.0 * 2 * chains * rounds * lanes<float> * threads / t.min / 1e9;
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

double peak, bandwidth;

void print_flops(const std::string& what, const Times& t, double flops) {
  const double rate = flops / t.median / 1e9;
  std::printf("%-26s median %8.2f ms (%.2f .. %.2f)  %6.1f GFLOP/s  %3.0f %% of peak\n", what.c_str(), t.median * 1e3,
              t.min * 1e3, t.max * 1e3, rate, 100 * rate / peak);
}

void print_bytes(const std::string& what, const Times& t, double bytes) {
  const double rate = bytes / t.median / 1e9;
  std::printf("%-26s median %8.2f ms (%.2f .. %.2f)  %6.1f GB/s     %3.0f %% of bandwidth\n", what.c_str(),
              t.median * 1e3, t.min * 1e3, t.max * 1e3, rate, 100 * rate / bandwidth);
}

const ModelShape lecture = {65, 256, 384, 6, 6};

void bench_step(const char* name, const ModelShape& shape, int B, double dropout, int runs) {
  GPT<float> m(shape, B);
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
}

void bench_layers(int B) {
  const int T = lecture.T, C = lecture.C, NH = lecture.NH, V = lecture.V, rows = B * T, runs = 9;
  const size_t stream = size_t(rows) * C;
  std::printf("\nlayers of the lecture model, B = %d\n", B);
  std::vector<float> wide(4 * stream, 0.1f), wide2(4 * stream, 0.2f), inp(4 * stream), weight(4 * size_t(C) * C, 0.02f),
      dweight(weight.size()), bias(4 * C), dbias(4 * C), stats(size_t(rows) * NH), stats2(size_t(rows) * NH);
  for (size_t i = 0; i < inp.size(); i++) inp[i] = float(int(random4(1, 0, 0, i).word[0] % 2001) - 1000) / 1000;
  struct Linear {
    const char* name;
    int in, out;
  };
  for (const Linear& l :
       {Linear{"qkv", C, 3 * C}, {"attproj", C, C}, {"fc", C, 4 * C}, {"fcproj", 4 * C, C}, {"head", C, V}}) {
    const double flops = 2.0 * rows * l.in * l.out;
    print_flops(
        text("matmul ", l.name, " forward"),
        measure(runs, [&] { matmul_forward(wide.data(), inp.data(), weight.data(), bias.data(), rows, l.in, l.out); }),
        flops);
    print_flops(text("matmul ", l.name, " backward"),
                measure(runs,
                        [&] {
                          matmul_backward(wide.data(), dweight.data(), dbias.data(), wide2.data(), inp.data(),
                                          weight.data(), rows, l.in, l.out);
                        }),
                2 * flops);
  }
  const double attention = 4.0 * B * NH * lecture.HS() * T * (T + 1) / 2;
  for (const double p : {0.0, 0.2}) {
    const Dropout drop = {1, 1, site::attention_dropout, dropout_threshold(p), 0};
    const char* with = p > 0 ? ", dropout" : "";
    print_flops(text("attention forward", with),
                measure(runs, [&] { attention_forward(wide.data(), stats.data(), inp.data(), drop, B, T, C, NH); }),
                attention);
    print_flops(text("attention backward", with),
                measure(runs,
                        [&] {
                          attention_backward(wide2.data(), inp.data(), inp.data(), wide.data(), stats.data(), drop, B,
                                             T, C, NH);
                        }),
                2 * attention);
  }
  const double bytes = sizeof(float) * double(stream);
  print_bytes("layernorm forward",
              measure(runs,
                      [&] {
                        layernorm_forward(wide.data(), stats.data(), stats2.data(), inp.data(), bias.data(),
                                          bias.data(), rows, C);
                      }),
              2 * bytes);
  print_bytes("layernorm backward",
              measure(runs,
                      [&] {
                        layernorm_backward(wide.data(), dbias.data(), dbias.data() + C, wide2.data(), inp.data(),
                                           stats.data(), stats2.data(), bias.data(), rows, C);
                      }),
              4 * bytes);
  for (const double p : {0.0, 0.2}) {
    const Dropout drop = {1, 1, site::proj_dropout, dropout_threshold(p), 0};
    const char* with = p > 0 ? ", dropout" : "";
    print_bytes(text("residual forward", with),
                measure(runs, [&] { residual_forward(wide.data(), inp.data(), wide2.data(), drop, B, T, C); }),
                3 * bytes);
    print_bytes(text("residual backward", with),
                measure(runs, [&] { residual_backward(wide.data(), inp.data(), drop, B, T, C); }), 2 * bytes);
  }
  print_bytes("relu forward", measure(runs, [&] { relu_forward(wide.data(), 4 * stream); }), 8 * bytes);
  print_bytes("relu backward", measure(runs, [&] { relu_backward(wide.data(), wide2.data(), 4 * stream); }),
              12 * bytes);
  std::vector<int> targets(rows);
  print_bytes(
      "cross-entropy forward",
      measure(runs, [&] { crossentropy_forward(stats.data(), wide.data(), inp.data(), targets.data(), rows, V); }),
      2 * sizeof(float) * double(rows) * V);
  const size_t n = parameter_layout(lecture).size();
  std::vector<float> p(n), g(n, 0.1f), m(n), v(n);
  print_bytes("AdamW",
              measure(runs,
                      [&] {
                        adamw_update(p.data(), m.data(), v.data(), g.data(), n, {1e-4, 0.9, 0.99, 1e-8, 0.01, 1, 1});
                      }),
              7.0 * sizeof(float) * double(n));
}

}  // namespace

int main(int argc, char** argv) {
  const bool only_step = argc > 1 && std::string(argv[1]) == "step";
  peak = fma_peak();
  std::printf("%s, %d threads, vectors of %d bits: peak %.0f GFLOP/s", processor().c_str(), omp_get_max_threads(),
              8 * vector_bytes, peak);
  if (!only_step) std::printf(", memory %.1f GB/s", bandwidth = memory_bandwidth());
  std::printf("\n");
  std::fflush(stdout);
  if (!only_step) bench_layers(8);
  std::printf("\n");
  bench_step("lecture", lecture, 8, 0.2, 5);
  if (!only_step) bench_step("small", {65, 128, 128, 4, 4}, 16, 0, 15);
  std::printf("peak after: %.0f GFLOP/s\n", fma_peak());
  return 0;
}
