// How fast the GPU trainer is, as shares of what this card can do.
//   bench_gpu ceilings              memory bandwidth, second-level cache, large products, gaps between kernels
//   bench_gpu products [DTYPE ...]  every matrix product of a step with all that can be fused to it, and its kernels
//   bench_gpu kernels [DTYPE]       every kernel and matrix product of a step beside the least time it could take
//   bench_gpu step [DTYPE ...]      whole training steps, as a graph and kernel by kernel, and evaluation
//   bench_gpu start [DTYPE ...]     what happens before the first step, stage by stage
//   bench_gpu sample [DTYPE ...]    characters a second by both versions of `sampling` (kernels/choices.cuh): one text,
//                                   as a graph and kernel by kernel, and several together
//   bench_gpu profile [DTYPE]       one step, kernel by kernel, between cudaProfilerStart and cudaProfilerStop
//   bench_gpu names [DTYPE]         the names of a step's kernels, in order
//   bench_gpu planted               a kernel with errors: if compute-sanitizer misses them, its silence proves nothing
// Choices of kernels may stand beside the types (attention_forward=2: kernels/choices.cuh), and flags of train_gpt may
// follow (--batch_size 8); without, it is the preset lecture, on random tokens. A figure is the
// median of several runs after a warm-up, with the fastest and the slowest. A share is only as good as the ceiling that
// was measured beside it, so both stand in one output.
#define MICROGPT_NO_MAIN
#include "../../host/run.h"  // defines: flops_per_token, flops_text
#include "../../train_gpt.cu"
#include "measure.cuh"

#include <chrono>
#include <filesystem>
#include <memory>
#if __has_include(<cuda_profiler_api.h>) && !defined(CUDA_ON_CPU)
#include <cuda_profiler_api.h>
#else
inline void cudaProfilerStart() {}
inline void cudaProfilerStop() {}
#endif

namespace {

constexpr int V = 65;

// ---------------------------------------------------------------------------------------------------------------------
// What the card can do

__global__ void empty_kernel(int*) {}

// Reads 16 bytes at a time past the first-level cache; in every pass a block reads another part, which no other reads.
__global__ void __launch_bounds__(512) read_kernel(float* sink, const float4* from, size_t count, int passes) {
  const size_t threads = size_t(gridDim.x) * blockDim.x, self = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  float sum = 0;
  for (int pass = 0; pass < passes; pass++) {
#pragma unroll 8
    for (size_t i = (self + size_t(pass) * 37 * blockDim.x) % threads; i < count; i += threads) {
      const float4 x = __ldcg(from + i);
      sum += x.x + x.y + x.z + x.w;
    }
  }
  if (sum == 1) *sink = sum;  // never, but it keeps the compiler from leaving out the loads
}

void ceilings(const Config&, const std::vector<std::string>& dtypes) {
  const Stream stream;
  const cudaDeviceProp card = current_card();
  print_clocks();
  const CopyBandwidth copy = copy_bandwidth(stream);
  std::printf("copy of 2 GB, read and written  %7.0f GB/s by cudaMemcpy, %.0f by a kernel\n", copy.memcpy / 1e9,
              copy.kernel / 1e9);
  const DeviceBuffer<float> memory(2000 * megabyte / 4, "reading"), sink(1, "a sum");
  const unsigned blocks = 4 * unsigned(card.multiProcessorCount);
  for (const size_t megabytes : {8, 16, 32, 48, 2000}) {
    const size_t bytes = megabytes * megabyte, passes = std::max<size_t>(4000 / megabytes, 1);
    const Times t = in_graph(stream, 1, 7, [&](int) {
      launch(read_kernel, {blocks, 512, 0, stream}, sink.data(), reinterpret_cast<const float4*>(memory.data()),
             bytes / 16, int(passes));
    });
    std::printf("%4zu MB read again and again     %7.0f GB/s\n", megabytes, double(bytes * passes) / t.min / 1e9);
  }
  const auto print_peak = [&](const char* name, double tflops) {
    std::printf("large product, %-10s       %7.0f TFLOP/s\n", name, tflops);
  };
  for (const std::string& dtype : dtypes) {
    Matmul matmul(dtype == "tf32", stream);
    print_peak(dtype.c_str(), dtype == "bfloat16"  ? matmul.measure_peak<bf16>()
                              : dtype == "float16" ? matmul.measure_peak<fp16>()
                                                   : matmul.measure_peak<float>());
  }
  constexpr int count = 200;
  const auto empty = [&](int) { launch(empty_kernel, {1, 32, 0, stream}, static_cast<int*>(nullptr)); };
  std::vector<double> eager;
  for (int run = 0; run < 9; run++)
    eager.push_back(device_seconds(stream,
                                   [&] {
                                     for (int i = 0; i < count; i++) empty(i);
                                   }) /
                    count);
  std::printf("empty kernel, from one to the next  %.2f us by themselves, %.2f us in a graph\n", of(eager).median * 1e6,
              in_graph(stream, count, 9, empty).median * 1e6);
  print_clocks();
}

// ---------------------------------------------------------------------------------------------------------------------
// Products: every matrix product of a step with everything that can be fused to it, and the kernels behind it

#ifdef CUDA_ON_CPU
void products(const Config&, const std::vector<std::string>&) { fail("products: on the CPU they are plain loops"); }
void names(const Config&, const std::vector<std::string>&) { fail("names: no driver tells them on the CPU"); }
#else

// A line for each product and epilogue. Launches take several sets of buffers in turn, so that a set has
// left the cache before it is used again.
template <class Real>
class ProductTable {
 public:
  using Algorithm = MatmulLibrary::Algorithm;
  using Clock = std::chrono::steady_clock;

  // No line begins after `end`.
  ProductTable(int rows, int C, OperandType type, Clock::time_point end) : type_(type), rows_(rows), C_(C), end_(end) {
    CUDA_CHECK(cudaDeviceSynchronize());  // the buffers are filled with zeros by then
    for (const auto& [memory, bytes] : {std::pair<const void*, size_t>{x_.data(), sets * hidden_ * sizeof(Real)},
                                        {y_.data(), sets * hidden_ * sizeof(Real)},
                                        {weight_.data(), sets * size_t(4 * C) * C * sizeof(Real)},
                                        {bias_.data(), 4 * C * sizeof(Real)},
                                        {mask_.data(), sets * mask_bytes_}})
      launch(noise_kernel<Real>, {unsigned(ceil_div(bytes, 256 * 8 * sizeof(Real))), 256, 0, stream_},
             static_cast<Real*>(const_cast<void*>(memory)));
  }

  void print() {
    const int C = C_, Vp = padded_vocabulary(V);
    struct Linear {
      std::string name;
      int C, OC, ld;
    };
    std::printf("%-15s %-9s %7s %4s %7s %-5s %3s %7s %-15s %s\n", "", "", "us", "TF/s", "apart", "takes", "n", "cold",
                "algorithm", "kernels");
    for (const Linear& l :
         {Linear{"fc", C, 4 * C, 4 * C}, Linear{"fcproj", 4 * C, C, C}, Linear{"qkv", C, 3 * C, 3 * C},
          Linear{"attproj", C, C, C}, Linear{"head", C, V, Vp}, Linear{text("head of ", Vp), C, Vp, Vp}}) {
      const Product forward = {type_, false, true, false, l.OC, rows_, l.C, l.C, l.C, l.ld};
      const Product dX = {type_, false, false, false, l.C, rows_, l.OC, l.C, l.ld, l.C};
      const Product dW = {type_, true, false, true, l.C, l.OC, rows_, l.C, l.ld, l.C};
      row(l.name + " fwd", forward, Epilogue::none);
      row(l.name + " fwd", forward, Epilogue::bias);
      if (l.name == "fc") {
        row(l.name + " fwd", forward, Epilogue::relu);
        row(l.name + " fwd", forward, Epilogue::relu_mask);
      }
      row(l.name + " dX", dX, Epilogue::none);
      if (l.name == "fcproj") row(l.name + " dX", dX, Epilogue::drelu);
      row(l.name + " dW", dW, Epilogue::none);
      row(l.name + " dW", dW, Epilogue::bias_grad);
    }
    std::printf(
        "alignment of 256 bytes: something else was proposed for %d of %d lines; pieces of k added in any way: for "
        "%d of %d\n",
        aligned_, asked_, any_way_, asked_of_float_);
    if (left_out_ > 0) std::printf("%d lines were left out: the time was up\n", left_out_);
    std::fflush(stdout);
  }

 private:
  static constexpr int sets = 6;

  Operands operands(const Product& p, int i) const {
    const size_t set = size_t(i % sets);
    const Real *const x = x_.data() + set * hidden_, *const y = y_.data() + set * hidden_;
    const Real* const weight = weight_.data() + set * size_t(4 * C_) * C_;
    return {.d = out_.data() + set * hidden_,
            .a = p.transpose_b ? x : weight,
            .b = p.transpose_a ? x : y,
            .bias = bias_.data(),
            .dbias = dbias_.data(),
            .mask = mask_.data() + set * mask_bytes_};
  }
  // The same product without the epilogue, whose work follows in passes of its own, as Matmul does it.
  void apart(const Product& p, int i) {
    const Operands o = operands(p, i);
    Real* const d = static_cast<Real*>(o.d);
    library_.multiply(p.with(Epilogue::none), o);
    if (p.epilogue == Epilogue::bias)
      bias_forward(d, bias_.data(), rows_, p.m, p.ldd, stream_);
    else if (p.adds_bias())
      bias_relu_forward(d, bias_.data(), rows_, p.m, p.ldd, stream_);
    else if (p.epilogue == Epilogue::drelu)
      relu_backward(d, sums_.data(), x_.data() + size_t(i % sets) * hidden_, rows_, p.m, stream_);
    else if (p.epilogue == Epilogue::bias_grad) {
      column_partials(sums_.data(), static_cast<const Real*>(o.b), rows_, p.n, p.ldb, stream_);
      add_partials({sums_of(o.dbias, sums_.data(), rows_, p.n)}, stream_);
    }
  }
  bool multiply_by(const Algorithm& algorithm, const Product& p, int i) {
    return library_.multiply_by(algorithm, p, operands(p, i));
  }

  template <class Call>
  double microseconds(Call call) {
    return 1e6 * in_graph(stream_, 2 * sets, 9, call).median;
  }
  double microseconds(const Algorithm& algorithm, const Product& p) {
    return microseconds([&](int i) {
      if (!multiply_by(algorithm, p, i)) throw std::runtime_error("cublasLtMatmul refuses an algorithm it proposed");
    });
  }
  std::string kernels_of(const Algorithm& algorithm, const Product& p) {
    std::string out;
    for (const std::string& name : kernel_names(stream_, [&] { multiply_by(algorithm, p, 0); }))
      out += (out.empty() ? "" : " + ") + name;
    return out;
  }

  // MatmulLibrary's race, but with cold operands.
  Algorithm fastest(const std::vector<Algorithm>& candidates, const Product& p) {
    std::vector<double> times(candidates.size(), INFINITY);
    size_t best = 0;
    for (int round = 0; round < 3; round++)
      for (size_t i = 0; i < candidates.size(); i++) {
        if (round > 0 && !(times[i] < 1.2 * times[best])) continue;
        bool works = multiply_by(candidates[i], p, sets - 1);
        const double t = device_seconds(stream_, [&] {
          for (int j = 0; j < 2 * sets; j++) works = works && multiply_by(candidates[i], p, j);
        });
        if (works) times[i] = std::min(times[i], t);
        if (times[i] < times[best]) best = i;
      }
    return candidates[best];
  }

  void row(const std::string& name, const Product& plain, Epilogue epilogue) {
    constexpr const char* epilogues[] = {"", "bias", "relu", "relu_mask", "drelu", "bias_grad"};
    if (Clock::now() > end_) {
      left_out_++;
      return;
    }
    std::printf("%-15s %-9s ", name.c_str(), epilogues[int(epilogue)]);
    try {
      print_row(plain.with(epilogue));
    } catch (const std::exception& e) {
      cudaGraph_t graph = nullptr;
      if (cudaStreamEndCapture(stream_, &graph) == cudaSuccess && graph) cudaGraphDestroy(graph);
      cudaGetLastError();  // nothing was being captured
      std::printf("failed: %s\n", e.what());
      CUDA_CHECK(cudaStreamSynchronize(stream_));  // no line can follow an error that stays
    }
    std::fflush(stdout);
  }
  void print_row(const Product& p) {
    const bool fused = p.epilogue != Epilogue::none;
    bool takes = true;
    if (fused)
      takes = library_.fuses(p, operands(p, 0), [&] { apart(p, 0); });
    else
      library_.multiply(p, operands(p, 0));
    const std::string others = fused ? text_of(microseconds([&](int i) { apart(p, i); })) : "";
    const std::vector<Algorithm> candidates = library_.proposals(p, operands(p, 0), {});
    if (candidates.empty()) {
      std::printf("%7s %4s %7s %-5s %3d\n", "none", "", others.c_str(), "apart", 0);
      return;
    }
    const Algorithm chosen = library_.chosen(p), cold = fastest(candidates, p);
    const double us = microseconds(chosen, p);
    std::printf("%7.2f %4.0f %7s %-5s %3zu %7s %-15s %s\n", us, 2e-6 * p.m * p.n * p.k / us, others.c_str(),
                !fused  ? ""
                : takes ? "fused"
                        : "apart",
                candidates.size(), chosen == cold ? "same" : text_of(microseconds(cold, p)).c_str(),
                MatmulLibrary::about(chosen).c_str(), kernels_of(chosen, p).c_str());
    std::fflush(stdout);
    asked_++;
    aligned_ += print_other("alignment of 256 bytes", p, candidates, {.alignment = 256}, us);
    if (!p.float_d) return;
    asked_of_float_++;
    any_way_ +=
        print_other("pieces of k in any way", p, candidates, {.reductions = CUBLASLT_REDUCTION_SCHEME_MASK}, us);
  }
  // Prints the best algorithm that the library proposes for this request, but not for the usual one; false: none.
  bool print_other(const char* what, const Product& p, const std::vector<Algorithm>& usual,
                   const MatmulLibrary::Request& request, double usual_us) {
    std::vector<Algorithm> others;
    for (const Algorithm& a : library_.proposals(p, operands(p, 0), request))
      if (std::find(usual.begin(), usual.end(), a) == usual.end()) others.push_back(a);
    if (others.empty()) return false;
    const Algorithm best = fastest(others, p);
    const double us = microseconds(best, p);
    std::printf("  %-23s %7.2f us (%+.1f %%), %s, best of %zu others %s %s\n", what, us, 100 * (us / usual_us - 1),
                repeats(best, p) ? "the same bits 8 times" : "OTHER BITS EACH TIME", others.size(),
                MatmulLibrary::about(best).c_str(), kernels_of(best, p).c_str());
    std::fflush(stdout);
    return true;
  }
  // Whether the result is the same every time, bit for bit.
  bool repeats(const Algorithm& algorithm, const Product& p) {
    const size_t bytes = size_t(p.n) * p.ldd * (p.float_d ? sizeof(float) : sizeof(Real));
    std::vector<char> first(bytes), next(bytes);
    for (int i = 0; i < 8; i++) {
      multiply_by(algorithm, p, 0);
      CUDA_CHECK(cudaMemcpyAsync((i == 0 ? first : next).data(), out_.data(), bytes, cudaMemcpyDeviceToHost, stream_));
      CUDA_CHECK(cudaStreamSynchronize(stream_));
      if (i > 0 && first != next) return false;
    }
    return true;
  }
  static std::string text_of(double us) {
    char out[32];
    std::snprintf(out, sizeof out, "%.2f", us);
    return out;
  }

  OperandType type_;
  int rows_, C_;
  Clock::time_point end_;
  int asked_ = 0, aligned_ = 0, asked_of_float_ = 0, any_way_ = 0, left_out_ = 0;
  // Elements and bytes of one set, of its largest matrix and mask; buffers end where noise_kernel does.
  size_t hidden_ = size_t(rows_) * 4 * C_, mask_bytes_ = relu_mask_bytes(rows_, 4 * C_);
  static constexpr size_t spare = 256 * 8;
  Stream stream_;
  MatmulLibrary library_{stream_};
  DeviceBuffer<Real> x_{sets * hidden_ + spare, "operands"}, y_{sets * hidden_ + spare, "operands"};
  DeviceBuffer<Real> out_{sets * hidden_, "products"}, weight_{sets * size_t(4 * C_) * C_ + spare, "weights"};
  DeviceBuffer<Real> bias_{size_t(4 * C_) + spare, "a bias"};
  DeviceBuffer<float> dbias_{size_t(4 * C_), "a bias"}, sums_{partials_size(rows_, 4 * C_), "sums"};
  DeviceBuffer<unsigned char> mask_{sets * mask_bytes_ + spare * sizeof(Real), "masks"};
};

void products(const Config& config, const std::vector<std::string>& dtypes) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(34);
  std::printf(
      "us, TF/s: operands are cold, in a graph, by the algorithm that is the fastest where they are hot, as the\n"
      "trainer takes it. apart: without the epilogue, and passes for it. takes: which way the trainer takes.\n"
      "n: proposals. cold: us of another algorithm, the fastest where operands are cold. algorithm: its number\n"
      "/ tile / stages / pieces of k / cluster, as cuBLASLt numbers them.\n");
  for (const std::string& dtype : dtypes) {
    const int rows = config.batch_size * config.block_size, C = config.n_embd;
    std::printf("%s, %d rows, %d channels\n", dtype.c_str(), rows, C);
    if (dtype == "bfloat16")
      ProductTable<bf16>(rows, C, OperandType::bfloat16, end).print();
    else if (dtype == "float16")
      ProductTable<fp16>(rows, C, OperandType::float16, end).print();
    else
      ProductTable<float>(rows, C, dtype == "tf32" ? OperandType::tf32 : OperandType::float32, end).print();
  }
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// A model on random tokens

// A folder for shards and for the table of algorithms, which is removed at the end. With --out_dir we take that
// run's table, and so its algorithms.
class Folder {
 public:
  Folder() : path_((std::filesystem::temp_directory_path() / "bench_gpu_XXXXXX").string()) {
    if (!mkdtemp(path_.data())) fail_errno("make a folder in " + std::filesystem::temp_directory_path().string());
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

Data random_data(const std::string& folder) {
  std::vector<char32_t> characters;
  for (int i = 0; i < V; i++) characters.push_back(char32_t(33 + i));
  const Vocabulary vocabulary(characters);
  vocabulary.save(folder + "/vocab.json");
  for (const auto& [split, count] : {std::pair{"train", 1000000}, {"val", 100000}}) {
    std::vector<uint16_t> tokens(count);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = uint16_t(random4(1, 0, 0, i).word[0] % V);
    ShardWriter writer(folder, split, tokens.size(), vocabulary);
    writer.write(tokens.data(), tokens.size());
    writer.finish();
  }
  return open_data(folder);
}

// body(zero), a zero of the type that products have with --dtype.
template <class Body>
void with_real(const std::string& dtype, Body body) {
  if (dtype == "bfloat16")
    body(bf16());
  else if (dtype == "float16")
    body(fp16());
  else
    body(0.0f);
}

// body(model) with the model that --dtype asks for, a few steps after its start.
template <class Body>
void with_model(Config config, const std::string& dtype, Body body) {
  const Folder folder;
  const Data data = random_data(folder.path());
  if (!config.given.count("out_dir")) config.out_dir = folder.path();
  config.dtype = dtype;
  with_real(dtype, [&](auto zero) {
    using Model = GpuModel<decltype(zero)>;
    const ModelShape shape = model_shape(config, V);
    Model::plan(config, shape, &data, true).require(Model::memory());
    Model model(config, shape, &data, true);
    std::vector<float> params(model.layout().size()), zeros(params.size());
    init_parameters(params.data(), model.layout(), config.seed);
    model.restore(params.data(), zeros.data(), zeros.data());
    model.train_steps(0, 3);
    body(model);
  });
}

void print_times(const std::string& what, const Times& t, double tokens, double flops_per_token, double peak) {
  std::printf("%-24s median %8.3f ms (%.3f .. %.3f), %.0f tokens/s, %s\n", what.c_str(), t.median * 1e3, t.min * 1e3,
              t.max * 1e3, tokens / t.median, flops_text(tokens * flops_per_token / t.median, peak).c_str());
  std::fflush(stdout);
}

// Seconds a step in each of `runs` runs of `steps` steps, by the host's clock. This waits as the training loop waits.
template <class Model>
Times time_steps(Model& model, int runs, int steps) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  int iteration = 0;
  for (int i = -1; i < runs; i++) {  // the first is a warm-up
    const Clock::time_point start = Clock::now();
    for (const int end = iteration + steps; iteration < end;) {
      const int count = std::min(model.chunk(), end - iteration);
      model.train_steps(iteration, count);
      iteration += count;
    }
    if (i >= 0) seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count() / steps);
  }
  return of(seconds);
}

void step(const Config& config, const std::vector<std::string>& dtypes) {
  for (const std::string& dtype : dtypes)
    with_model(config, dtype, [&](auto& model) {
      const double tokens = double(config.batch_size) * config.gradient_accumulation_steps * config.block_size;
      const double flops = flops_per_token(model.shape()), peak = model.peak_flops();
      std::printf("%s, batches of %d x %d, %.1f MFLOP a token (attention causal), peak %.0f TFLOP/s\n", dtype.c_str(),
                  config.batch_size, config.block_size, flops / 1e6, peak / 1e12);
      // As many steps as take 0.8 s, or one where the CPU plays the card.
      const int steps = peak == 0 ? 1 : std::clamp(int(0.8 / time_steps(model, 1, 10).median), 10, 200);
      for (const bool graph : {true, false}) {
        model.use_graph = graph;
        print_times(text("step ", dtype, graph ? " graph" : " eager"), time_steps(model, 5, steps), tokens, flops,
                    peak);
      }
      const int batches = std::min(steps, model.chunk());
      std::vector<double> seconds;
      for (int i = -1; i < 5; i++) {
        const auto start = std::chrono::steady_clock::now();
        model.random_losses(Split::val, 0, 0, batches);
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        if (i >= 0) seconds.push_back(taken.count() / batches);
      }
      print_times("evaluate " + dtype, of(seconds), double(config.batch_size) * config.block_size, flops / 3, peak);
    });
}

// Prints how long body() takes by the host's clock.
template <class Body>
void timed(const std::string& stage, Body body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  CUDA_CHECK(cudaDeviceSynchronize());
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  std::printf("%-58s %7.0f ms\n", stage.c_str(), taken.count() * 1e3);
  std::fflush(stdout);
}

void start(const Config& given, const std::vector<std::string>& dtypes) {
  timed("a first product", [] {
    const Stream stream;
    Matmul matmul(false, stream);
    const DeviceBuffer<float> x(64, "a product");
    matmul.forward(x.data(), x.data(), x.data(), nullptr, 8, 8, 8, 8);
    CUDA_CHECK(cudaStreamSynchronize(stream));
  });
  for (const std::string& dtype : dtypes)
    with_real(dtype, [&](auto zero) {
      using Real = decltype(zero);
      const Folder folder;
      Config config = given;
      config.out_dir = folder.path();  // where the algorithms of the products are kept
      config.dtype = dtype;
      const Data data = random_data(folder.path());
      const ModelShape shape = model_shape(config, V);
      const Layout layout = parameter_layout(shape);
      std::vector<float> params(layout.size()), zeros(params.size());
      timed("the first weights drawn", [&] { init_parameters(params.data(), layout, config.seed); });
      timed(dtype + ": the peak, by large products", [] {
        const Stream stream;
        Matmul(false, stream).measure_peak<Real>();
      });
      for (const char* algorithms : {"raced", "on file"}) {
        std::unique_ptr<GpuModel<Real>> model;
        timed(text(dtype, ": the model made, the peak, products' algorithms ", algorithms),
              [&] { model = std::make_unique<GpuModel<Real>>(config, shape, &data, true); });
        timed(dtype + ": weights copied, one step", [&] {
          model->restore(params.data(), zeros.data(), zeros.data());
          model->train_steps(0, 1);
        });
      }
    });
}

// Seconds by the host's clock: that the model chooses its algorithms and captures its graphs is part of the warm-up.
template <class Model>
void print_characters(Model& model, const Config& config, const std::string& how, int samples) {
  const int count = model.peak_flops() > 0 ? 128 : 2;
  std::vector<double> seconds;
  for (int i = -1; i < 5; i++) {
    const auto start = std::chrono::steady_clock::now();
    generate(model, {0}, {count, {1, 0}, config.seed, 0, samples}, [](int, int) { return true; });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    if (i >= 0) seconds.push_back(taken.count() / count);
  }
  const Times t = of(seconds);
  std::printf("%-52s median %8.3f ms a character of each (%.3f .. %.3f), %.0f characters/s\n", how.c_str(),
              t.median * 1e3, t.min * 1e3, t.max * 1e3, samples / t.median);
  std::fflush(stdout);
}

// Both ways to sample (choices.cuh), each with a model that has been made for it.
void sample(const Config& config, const std::vector<std::string>& dtypes) {
  for (const std::string& dtype : dtypes)
    for (const int version : {1, 2}) {
      choose("sampling", version);
      const std::string what = text("sample ", dtype, version == 2 ? ", kept keys," : "");
      with_model(config, dtype, [&](auto& model) {
        for (const bool graph : {false, true}) {
          model.use_graph = graph;
          print_characters(model, config, text(what, graph ? " graph" : " eager", ", one text"), 1);
        }
        for (int samples = 4; samples <= config.batch_size; samples *= 4)
          print_characters(model, config, text(what, " graph, ", samples, " texts together"), samples);
      });
    }
}

void profile(const Config& config, const std::vector<std::string>& dtypes) {
  with_model(config, dtypes.front(), [&](auto& model) {
    model.use_graph = false;
    model.train_steps(3, 2);
    cudaProfilerStart();
    const float loss = model.train_steps(5, 1)[0];
    cudaProfilerStop();
    std::printf("one step of %s, kernel by kernel: loss %.4f\n", dtypes.front().c_str(), loss);
  });
}

#ifndef CUDA_ON_CPU
void names(const Config& config, const std::vector<std::string>& dtypes) {
  with_model(config, dtypes.front(), [&](auto& model) {
    const auto work = [&] { model.enqueue_step(config.gradient_accumulation_steps); };
    for (const std::string& name : kernel_names(model.gpt().stream, work)) std::printf("%s\n", name.c_str());
  });
}
#endif

// Reads memory that nothing has written, exchanges it between warps without a barrier, and writes behind the end.
__global__ void __launch_bounds__(256) planted_kernel(float* memory) {
  __shared__ float exchange[256];
  exchange[threadIdx.x] = memory[threadIdx.x];
  memory[threadIdx.x + 1] = exchange[255 - threadIdx.x];
}

void planted(const Config&, const std::vector<std::string>&) {
  float* memory = nullptr;
  CUDA_CHECK(cudaMalloc(&memory, 256 * sizeof(float)));
  launch(planted_kernel, {1, 256}, memory);
  CUDA_CHECK(cudaDeviceSynchronize());
  CUDA_CHECK(cudaFree(memory));
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel by kernel. Launches take the layers' slices in turn, so that most of what one reads has left the cache since
// a launch last read it; in a step much of it would still be there. Kernels without such slices are marked.

class KernelTable {
 public:
  KernelTable(cudaStream_t stream, int layers, double peak, double bandwidth)
      : stream_(stream), layers_(layers), peak_(peak), bandwidth_(bandwidth) {
    std::printf("%-37s %7s %9s %18s %8s %6s %10s\n", "", "a step", "us", "(min .. max)", "floor", "share", "us a step");
  }
  // flops, bytes: the least a launch needs, each input read once, each output written once. call(l) launches it on layer
  // l's arrays.
  template <class Call>
  void row(const char* name, int per_step, double flops, double bytes, Call call, bool one_buffer = false) {
    const Times t = in_graph(stream_, ceil_div(24, layers_) * layers_, 9, [&](int i) { call(i % layers_); });
    const double floor = std::max(peak_ > 0 ? flops / peak_ : 0, bytes / bandwidth_);
    std::printf("%-35s %s %7d %9.2f (%7.2f ..%7.2f) %8.2f %5.0f%% %10.1f\n", name, one_buffer ? "*" : " ", per_step,
                t.median * 1e6, t.min * 1e6, t.max * 1e6, floor * 1e6, 100 * floor / t.median,
                per_step * t.median * 1e6);
    std::fflush(stdout);
    sum_ += per_step * t.median;
    floors_ += per_step * floor;
  }
  template <class Call>
  void row_of_one(const char* name, int per_step, double flops, double bytes, Call call) {
    row(name, per_step, flops, bytes, call, true);
  }
  void finish(double step_seconds) {
    std::printf("a step: sum of the kernels %.0f us, of their floors %.0f us; the whole, measured, %.0f us\n",
                sum_ * 1e6, floors_ * 1e6, step_seconds * 1e6);
    std::printf("* the same buffers every time; else those of %d layers in turn\n", layers_);
  }

 private:
  cudaStream_t stream_;
  int layers_;
  double peak_, bandwidth_, sum_ = 0, floors_ = 0;
};

template <class Real>
void time_kernels(GPT<Real>& m, const Config& config, KernelTable& table) {
  const Activations<Real>& a = m.acts.a;
  const ActivationGrads<Real>& g = m.acts.g;
  const Statistics& s = m.acts.s;
  const GradStatistics& gs = m.acts.gs;
  const Params<Real>& w = m.w;
  const Params<float>&p = m.p, &dw = m.dw;
  const int B = m.B, T = m.shape.T, C = m.shape.C, L = m.shape.L, NH = m.shape.NH, Vp = padded_vocabulary(V);
  const int rows = B * T;
  const cudaStream_t st = m.stream;
  const DeviceDropout drop({config.seed, 0, 0, dropout_threshold(config.dropout), 0}, m.step());
  const DeviceBuffer<uint16_t> text(100001, "a text");
  const DeviceBuffer<AdamWStep> rates(1, "a learning rate");
  const AdamWStep nothing_moves = {1, 0, 1, 0};
  copy_to_device(rates.data(), &nothing_moves, 1);

  // A: bytes of one activation; CC: elements of a square weight, FCC: operations of the product with it
  const double R = sizeof(Real), A = double(rows) * C * R, stats = 8.0 * rows, lse = 4.0 * rows * NH;
  const double CC = double(C) * C, FCC = 2.0 * rows * CC, mask = double(relu_mask_bytes(rows, 4 * C));
  const double logits = double(rows) * Vp * R, head = 2.0 * rows * C * V, tables = double(V + T) * C;
  const double attention = 4.0 * B * NH * m.shape.HS() * (T * (T + 1.0) / 2);  // two products over the visible keys
  const double partials = 4.0 * double(layernorm_partials(rows, C)), count = double(m.param_layout.size());

  table.row_of_one("gather_random", 1, 0, 12.0 * rows,
                   [&](int) { gather_random(m.x, m.y, text.data(), 100000, 1, m.step(), site::batch, 0, B, T, st); });
  table.row_of_one("embedding_forward", 1, 0, A + tables * R + 4.0 * rows,
                   [&](int) { embedding_forward(a.inp[0], m.x, w.wte, w.wpe, B, T, C, st); });
  table.row("layernorm_forward", 1, 0, 2 * A + stats, [&](int l) {
    layernorm_forward(a.ln1[l], s.ln1_mean[l], s.ln1_rstd[l], a.inp[l], p.ln1w[l], p.ln1b[l], rows, C, st);
  });
  table.row("residual_layernorm_forward", 2 * L, 0, 4 * A + stats, [&](int l) {
    residual_layernorm_forward(a.mid[l], a.ln2[l], s.ln2_mean[l], s.ln2_rstd[l], a.inp[l], a.branch, p.attprojb[l],
                               drop.at(site::proj_dropout, l), p.ln2w[l], p.ln2b[l], B, T, C, st);
  });
  table.row("qkv forward", L, 3 * FCC, 4 * A + 3 * CC * R,
            [&](int l) { m.matmul.forward(a.qkv[l], a.ln1[l], w.qkvw[l], nullptr, rows, C, 3 * C, 3 * C); });
  table.row("attention_forward", L, attention, 4 * A + lse, [&](int l) {
    attention_forward(a.att[l], s.lse[l], s.att_mask.bytes(l), a.qkv[l], drop.at(site::attention_dropout, l), B, T, C,
                      NH, st, m.matmul.tf32());
  });
  table.row("attproj forward", L, FCC, 2 * A + CC * R,
            [&](int l) { m.matmul.forward(a.branch, a.att[l], w.attprojw[l], nullptr, rows, C, C, C); });
  table.row("fc forward, bias, ReLU", L, 4 * FCC, 5 * A + 4 * CC * R + mask, [&](int l) {
    m.matmul.forward_relu(a.fc[l], s.fc_mask.bytes(l), a.ln2[l], w.fcw[l], w.fcb[l], rows, C, 4 * C);
  });
  table.row("fcproj forward", L, 4 * FCC, 5 * A + 4 * CC * R,
            [&](int l) { m.matmul.forward(a.branch, a.fc[l], w.fcprojw[l], nullptr, rows, 4 * C, C, C); });
  table.row_of_one("head forward, bias", 1, head, A + logits,
                   [&](int) { m.matmul.forward(a.logits, a.lnf, w.headw, w.headb, rows, C, head_rows<Real>(V), Vp); });
  table.row_of_one("crossentropy_forward", 0, 0, logits + 8.0 * rows,
                   [&](int) { crossentropy_forward(s.losses, a.logits, m.y, rows, V, Vp, st); });
  table.row_of_one("crossentropy_forward_backward", 1, 0, 2 * logits + 8.0 * rows, [&](int) {
    crossentropy_forward_backward(s.losses, a.logits, m.y, 1.0f / float(rows), &m.state->loss_scale, rows, V, Vp, st);
  });
  table.row_of_one("sum_losses", 1, 0, 4.0 * rows, [&](int) { sum_losses(m.state->loss_sum, s.losses, rows, st); });

  table.row_of_one("head dX", 1, head, A + logits,
                   [&](int) { m.matmul.backward_input(g.dnorm, a.logits, w.headw, rows, C, head_rows<Real>(V), Vp); });
  table.row_of_one("head dW", 1, head, A + logits + 4.0 * V * C,
                   [&](int) { m.matmul.backward_weight(dw.headw, a.logits, a.lnf, rows, C, head_rows<Real>(V), Vp); });
  table.row_of_one("head's column_partials", 1, 0, logits,
                   [&](int) { column_partials(gs.head_partials, a.logits, rows, V, Vp, st); });
  table.row("residual_layernorm_backward", 2 * L + 1, 0, 5 * A + stats + partials, [&](int l) {
    residual_layernorm_backward(g.dstream, g.dbranch, gs.ln2_partials[l], g.dnorm, a.mid[l], s.ln2_mean[l],
                                s.ln2_rstd[l], p.ln2w[l], false, drop.at(site::proj_dropout, l), B, T, C, st);
  });
  table.row("fcproj dX, ReLU", L, 4 * FCC, 5 * A + 4 * CC * R + mask, [&](int l) {
    m.matmul.backward_input_relu(g.dfc, gs.fc_partials[l], g.dbranch, w.fcprojw[l], s.fc_mask.bytes(l), a.fc[l], rows,
                                 4 * C, C);
  });
  table.row("fcproj dW", L, 4 * FCC, 5 * A + 16 * CC,
            [&](int l) { m.matmul.backward_weight(dw.fcprojw[l], g.dbranch, a.fc[l], rows, 4 * C, C, C); });
  table.row("fc dX", L, 4 * FCC, 5 * A + 4 * CC * R,
            [&](int l) { m.matmul.backward_input(g.dnorm, g.dfc, w.fcw[l], rows, C, 4 * C, 4 * C); });
  table.row("fc dW", L, 4 * FCC, 5 * A + 16 * CC,
            [&](int l) { m.matmul.backward_weight(dw.fcw[l], g.dfc, a.ln2[l], rows, C, 4 * C, 4 * C); });
  table.row("attproj dX", L, FCC, 2 * A + CC * R,
            [&](int l) { m.matmul.backward_input(g.datt, g.dbranch, w.attprojw[l], rows, C, C, C); });
  table.row("attproj dW", L, FCC, 2 * A + 4 * CC,
            [&](int l) { m.matmul.backward_weight(dw.attprojw[l], g.dbranch, a.att[l], rows, C, C, C); });
  // Five products: the weights are not kept, so they have to be made again.
  table.row("attention_backward", L, 2.5 * attention, 8 * A + 2 * lse, [&](int l) {
    attention_backward(g.dqkv, gs.datt_out, g.datt, a.qkv[l], a.att[l], s.lse[l], s.att_mask.bytes(l),
                       drop.at(site::attention_dropout, l), B, T, C, NH, st, m.matmul.tf32());
  });
  table.row("qkv dX", L, 3 * FCC, 4 * A + 3 * CC * R,
            [&](int l) { m.matmul.backward_input(g.dnorm, g.dqkv, w.qkvw[l], rows, C, 3 * C, 3 * C); });
  table.row("qkv dW", L, 3 * FCC, 4 * A + 12 * CC,
            [&](int l) { m.matmul.backward_weight(dw.qkvw[l], g.dqkv, a.ln1[l], rows, C, 3 * C, 3 * C); });
  table.row_of_one("embedding_backward", 1, 0, A + 4.0 * rows + 4 * tables,
                   [&](int) { embedding_backward(dw.wpe, gs.embedding_partials, g.dstream, m.x, B, T, C, V, st); });
  const double all_partials =
      4.0 * double(partials_size(rows, V) + 4 * L * partials_size(rows, C) + embedding_partials(B, T, C, V)) +
      (2 * L + 1) * partials;
  table.row_of_one("add_partials", 1, 0, all_partials, [&](int) { sum_gradients(m, B, T); });

  for (const bool by_mask : {false, true}) {
    m.matmul.use_relu_mask(by_mask);
    table.row(by_mask ? "fc forward, fcproj dX, by a mask" : "fc forward, fcproj dX, by a pass", 0, 8 * FCC,
              10 * A + 8 * CC * R, [&](int l) {
                m.matmul.forward_relu(a.fc[l], s.fc_mask.bytes(l), a.ln2[l], w.fcw[l], w.fcb[l], rows, C, 4 * C);
                m.matmul.backward_input_relu(g.dfc, gs.fc_partials[l], g.dbranch, w.fcprojw[l], s.fc_mask.bytes(l),
                                             a.fc[l], rows, 4 * C, C);
              });
  }

  // Both versions where the card can run both; its own choice stands in the row "attention_forward" above.
  if (sizeof(Real) == 2 && attention::whole_head_fits(m.shape.HS(), T, shared_memory_of_block())) {
    const int chosen = choices().attention_forward;
    for (const int version : {1, 2}) {
      choices().attention_forward = version;
      table.row(version == 1 ? "attention_forward, version 1" : "attention_forward, version 2", 0, attention,
                4 * A + lse, [&](int l) {
                  attention_forward(a.att[l], s.lse[l], s.att_mask.bytes(l), a.qkv[l],
                                    drop.at(site::attention_dropout, l), B, T, C, NH, st);
                });
    }
    choices().attention_forward = chosen;
  }
  if constexpr (std::is_same_v<Real, float>) {
    const int chosen = choices().attention_float;
    for (const int version : {1, 2}) {
      choices().attention_float = version;
      if (version == 2 && !attention::has_tf32_kernels()) continue;
      const std::string name = version == 1 ? ", simple" : m.matmul.tf32() ? ", one product" : ", three products";
      table.row(("attention_forward" + name).c_str(), 0, attention, 4 * A + lse, [&](int l) {
        attention_forward(a.att[l], s.lse[l], s.att_mask.bytes(l), a.qkv[l], drop.at(site::attention_dropout, l), B, T,
                          C, NH, st, m.matmul.tf32());
      });
      table.row(("attention_backward" + name).c_str(), 0, 2.5 * attention, 8 * A + 2 * lse, [&](int l) {
        attention_backward(g.dqkv, gs.datt_out, g.datt, a.qkv[l], a.att[l], s.lse[l], s.att_mask.bytes(l),
                           drop.at(site::attention_dropout, l), B, T, C, NH, st, m.matmul.tf32());
      });
    }
    choices().attention_float = chosen;
  }
  if (sizeof(Real) == 2 && attention::once::fits(m.shape.HS(), T, current_card().sharedMemPerBlockOptin)) {
    const int chosen = choices().attention_backward;
    for (const int version : {1, 2}) {
      choices().attention_backward = version;
      table.row(version == 1 ? "attention_backward, two kernels" : "attention_backward, one kernel", 0, 2.5 * attention,
                8 * A + 2 * lse, [&](int l) {
                  attention_backward(g.dqkv, gs.datt_out, g.datt, a.qkv[l], a.att[l], s.lse[l], s.att_mask.bytes(l),
                                     drop.at(site::attention_dropout, l), B, T, C, NH, st);
                });
    }
    choices().attention_backward = chosen;
  }

  const DeviceBuffer<double> norm_partials(gradient_norm_partials, "the gradient's norm");
  table.row_of_one("prepare_update", 0, 0, 4 * count, [&](int) {
    gradient_norm(norm_partials.data(), m.grads(), m.count, m.cards.own_units(), st);
    prepare_update(m.state, norm_partials.data(), m.count, 1, false, st);
  });
  table.row_of_one("adamw_update", 1, 0, count * (28 + (m.has_working_copy ? R : 0)), [&](int) {
    adamw_update(m.params_memory.data(), m.m_memory.data(), m.v_memory.data(), m.working_memory.data(), m.grads(),
                 m.param_layout.size(), config.beta1, config.beta2, 1e-8, rates.data(), 1, m.state, st);
  });
  // Five rounds of three products: for each layer 42 C^3 operations in a round, and 12 C^2 HS + 6 C HS^2 for the heads.
  MuonAndAdamW<Real> muon(m.shape, m.cards.own(), true);
  const Optimizer optimizer = {config.beta1, config.beta2, 1e-8, 0, false, rates.data(), 1, nullptr};
  table.row_of_one("update with Muon", 0,
                   L * CC * (210.0 * C + 60.0 * m.shape.HS() + 30.0 * m.shape.HS() * m.shape.HS() / C), 0, [&](int) {
                     muon.update(m.params_memory.data(), m.m_memory.data(), m.v_memory.data(), m.working_memory.data(),
                                 m.grads(), optimizer, m.state, m.matmul, m.cards, st);
                   });
  const DeviceBuffer<float> ring(1, "losses");
  table.row_of_one("end_step", 1, 0, 0, [&](int) { end_step(m.state, ring.data(), 1, 1.0 / rows, false, st); });
  const std::vector<Choice> draws(1 << 14, Choice{1, 0, 0.5});  // more than the row below launches
  const DeviceBuffer<Choice> choices(draws.size(), "random numbers");
  const DeviceBuffer<int> tokens(draws.size(), "tokens"), length(1, "a length"), drawn(1, "a count");
  copy_to_device(choices.data(), draws.data(), draws.size());
  copy_to_device(length.data(), &T, 1);
  const Texts texts = {m.x, length.data(), drawn.data(), choices.data(), tokens.data()};
  table.row_of_one("sample_token", 0, 0, 0, [&](int) { sample_token(texts, a.logits, 1, T, V, Vp, st); });
}

void kernels(const Config& config, const std::vector<std::string>& dtypes) {
  with_model(config, dtypes.front(), [&](auto& model) {
    const double peak = model.peak_flops(), bandwidth = copy_bandwidth(model.gpt().stream).best();
    const Times whole = time_steps(model, 5, peak > 0 ? 100 : 1);
    std::printf("%s, batches of %d x %d, peak %.0f TFLOP/s, copy %.0f GB/s\n", dtypes.front().c_str(),
                config.batch_size, config.block_size, peak / 1e12, bandwidth / 1e9);
    KernelTable table(model.gpt().stream, model.shape().L, peak, bandwidth);
    time_kernels(model.gpt(), config, table);
    table.finish(whole.median);
  });
}

int run(int argc, char** argv) {
  using Command = void (*)(const Config&, const std::vector<std::string>&);
  const std::map<std::string, Command> commands = {
      {"ceilings", ceilings}, {"products", products}, {"kernels", kernels}, {"step", step},      {"start", start},
      {"sample", sample},     {"profile", profile},   {"names", names},     {"planted", planted}};
  const auto command = commands.find(argc > 1 ? argv[1] : "");
  if (command == commands.end())
    fail("usage: bench_gpu ceilings | products [DTYPE ...] | kernels [DTYPE] | step [DTYPE ...] | ",
         "start [DTYPE ...] | sample [DTYPE ...] | profile [DTYPE] | names [DTYPE] | planted, then flags of train_gpt");
  std::vector<std::string> dtypes;
  std::map<std::string, int> wanted;
  int first = 2;  // argument that is a flag
  for (; first < argc && argv[first][0] != '-'; first++) {
    const std::string argument = argv[first];
    const size_t equals = argument.find('=');
    if (equals == std::string::npos)
      dtypes.push_back(argument);
    else
      wanted[argument.substr(0, equals)] = std::atoi(argument.c_str() + equals + 1);
  }
  argv[first - 1] = argv[0];
  Config config = parse_command_line(argc - first + 1, argv + first - 1);
  apply_preset(config, config.preset == "auto" ? "lecture" : config.preset);

  if (command->first == "start") timed("CUDA's first call: the driver, a context", [] { cudaFree(nullptr); });
  std::string why;
  const auto look = [&] { why = no_gpu(); };
  if (command->first == "start")
    timed("a first kernel, cuBLASLt opened", look);
  else
    look();
  if (!why.empty()) fail(why);
  for (const auto& [operation, version] : wanted) choose(operation, version);
  const bool ampere = current_card().major >= 8;
  if (dtypes.empty()) {
    dtypes = ampere ? std::vector<std::string>{"bfloat16", "float16", "tf32", "float32"}
                    : std::vector<std::string>{"float16", "float32"};
    if (command->first == "products") dtypes.resize(ampere ? 2 : 1);
  }
  for (const std::string& dtype : dtypes) {
    if (dtype != "bfloat16" && dtype != "float16" && dtype != "tf32" && dtype != "float32")
      fail("'", dtype, "' is none of bfloat16, float16, tf32, float32");
    if (!ampere && (dtype == "bfloat16" || dtype == "tf32"))
      fail(current_card().name, " has no ", dtype, " arithmetic");
  }
  print_card();
  command->second(config, dtypes);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_main([&] { return run(argc, argv); });
}
