// The library that computes matrix products, cuBLASLt, or plain loops where there is no GPU. Sums over the inner
// dimension are in float, whatever the type of the operands. Which algorithm of cuBLASLt is the fastest depends on the
// card and the shapes, and is found by trying them; the choice can be kept, and then a later run repeats this one. For a
// product that cuBLASLt has no algorithm for there is a simple kernel of our own.
// defines: Product, Operands, AlgorithmTable, ProductStream, MatmulLibrary
#pragma once
#include <dlfcn.h>
#ifndef CUDA_ON_CPU
#include <cublasLt.h>
#endif

#include <algorithm>
#include <cmath>
#include <compare>
#include <cstdio>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../host/error.h"
#include "../host/files.h"
#include "../host/text.h"
#include "device.cuh"
#include "dropout_law.h"
#include "launch.cuh"
#include "runtime.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// What the library is asked for. It stores matrices by columns.

enum class OperandType { float32, tf32, bfloat16, float16 };            // tf32: floats, multiplied with 10 bits of each
enum class Epilogue { none, bias, relu, relu_mask, drelu, bias_grad };  // the first two relus add a bias before

// d (m, n) = op(a) (m, k) @ op(b) (k, n). This is all that the choice of an algorithm depends on: the library is not
// told whether the product is added to d until it computes it.
struct Product {
  OperandType type;
  bool float_d;  // d is float, otherwise of the operands' type
  bool transpose_a, transpose_b;
  int m, n, k, lda, ldb, ldd;
  Epilogue epilogue = Epilogue::none;
  // > 0: each `window` columns of d get the bits that they would get alone, however many there are: by the algorithm that
  // they would have alone, which is not the fastest for all of them.
  int window = 0;
  int batch = 1;  // so many of them at once; the matrices of each operand follow each other without gaps

  auto operator<=>(const Product&) const = default;
  Product with(Epilogue e) const {
    Product out = *this;
    out.epilogue = e;
    return out;
  }
  Product window_alone() const {
    Product out = *this;
    out.n = window;
    out.window = 0;
    return out;
  }
  bool adds_bias() const {
    return epilogue == Epilogue::bias || epilogue == Epilogue::relu || epilogue == Epilogue::relu_mask;
  }
  // Elements from a matrix of a batch to the next.
  size_t a_size() const { return size_t(lda) * (transpose_a ? m : k); }
  size_t b_size() const { return size_t(ldb) * (transpose_b ? k : n); }
  size_t d_size() const { return size_t(ldd) * n; }
  bool has_mask() const { return epilogue == Epilogue::relu_mask || epilogue == Epilogue::drelu; }

  std::string text() const {
    constexpr const char* types[] = {"float32", "tf32", "bfloat16", "float16"};
    constexpr const char* epilogues[] = {"", " bias", " relu", " relu_mask", " drelu", " bias_grad"};
    std::ostringstream out;
    out << types[int(type)] << (float_d ? " to float32" : "") << epilogues[int(epilogue)] << " "
        << "NT"[transpose_a] << "NT"[transpose_b] << " m " << m << " n " << n << " k " << k << " ld " << lda << " "
        << ldb << " " << ldd;
    if (window) out << " by " << window;
    if (batch > 1) out << " times " << batch;
    return out.str();
  }
};

struct Operands {
  void* d;
  const void *a, *b;
  const void* bias = nullptr;     // (m), of d's type, is added to every column
  float* dbias = nullptr;         // (n) = the sums of op(b) over k; d is float, too
  unsigned char* mask = nullptr;  // a bit for each element of d; its columns begin mask_stride(m) bits apart
};

constexpr int mask_stride(int m) { return ceil_div(m, 128) * 128; }

// Which algorithm computes which product, as text.
class AlgorithmTable {
 public:
  // machine: all else on which that depends, the card and the version of the library
  explicit AlgorithmTable(std::string machine) : machine_(std::move(machine)) {}

  const std::string* find(const std::string& product) const {
    const auto it = algorithms_.find(product);
    return it == algorithms_.end() ? nullptr : &it->second;
  }
  void set(const std::string& product, const std::string& algorithm) { algorithms_[product] = algorithm; }

  // Says that a product of the table was computed.
  void use(const std::string& product) { used_.insert(product); }
  // Names what has been used so far: with the same name, the same bits.
  std::string name() const {
    std::string lines;
    for (const std::string& product : used_) lines += line(product, algorithms_.at(product));
    return machine_ + ", " + digest(lines).substr(0, 8);
  }

  std::string save() const {
    std::string text = head();
    for (const auto& [product, algorithm] : algorithms_) text += line(product, algorithm);
    return text + line("digest", digest(text));
  }
  // Takes what save() returned on the same machine. Anything else is ignored: it can be measured again.
  void load(const std::string& text) {
    const size_t begin = head().size(), end = text.rfind("digest: ");
    if (end == std::string::npos || text.rfind(head(), 0) != 0) return;
    if (text.substr(end) != line("digest", digest(text.substr(0, end)))) return;
    std::istringstream lines(text.substr(begin, end - begin));
    for (std::string next; std::getline(lines, next);)
      if (const size_t colon = next.find(": "); colon != std::string::npos)
        set(next.substr(0, colon), next.substr(colon + 2));
  }

 private:
  std::string head() const { return "algorithms of matrix products, version 1\n" + machine_ + "\n"; }
  static std::string line(const std::string& key, const std::string& value) { return key + ": " + value + "\n"; }
  static std::string digest(const std::string& words) { return hash_text(fnv1a(words.data(), words.size())); }

  std::string machine_;
  std::map<std::string, std::string> algorithms_;
  std::set<std::string> used_;
};

// Loads a shared library from where the loader looks for those that a program is linked with: the program's rpath,
// LD_LIBRARY_PATH, the system's folders.
inline void* load_library(const std::string& name) {
  void* const library = dlopen(name.c_str(), RTLD_LAZY);
  if (!library)
    fail("cuBLASLt cannot be loaded (", dlerror(), "): install the CUDA Toolkit's cuBLAS, or name its folder in ",
         "LD_LIBRARY_PATH");
  return library;
}

// ---------------------------------------------------------------------------------------------------------------------
// The product that needs no library. cuBLASLt 13.1 has no float32 algorithm for some small shapes (seen on an H100: TN,
// m 72, n 60, k 48), and a text with 72 different characters may ask for one. This kernel is slow, but the run goes on.

// A block has tiles of 16 x 16: of d, one element a thread, and, one after the other along k, of op(a) and op(b).
constexpr int simple_tile = 16;

template <class Real, class D>
__global__ void __launch_bounds__(simple_tile* simple_tile)
    simple_product_kernel(D* d, const Real* a, const Real* b, bool transpose_a, bool transpose_b, int m, int n, int K,
                          int lda, int ldb, int ldd, size_t a_size, size_t b_size, size_t d_size) {
  wait_for_inputs();
  a += blockIdx.z * a_size;
  b += blockIdx.z * b_size;
  d += blockIdx.z * d_size;
  __shared__ float a_tile[simple_tile][simple_tile + 1], b_tile[simple_tile][simple_tile + 1];  // k comes first
  const int x = threadIdx.x % simple_tile, y = threadIdx.x / simple_tile;
  const int first_i = blockIdx.y * simple_tile, first_j = blockIdx.x * simple_tile;
  float sum = 0;
  for (int first_k = 0; first_k < K; first_k += simple_tile) {
    // Neighbouring threads read what is side by side in memory, whichever way the matrix is transposed.
    const int at_ak = transpose_a ? x : y, at_i = transpose_a ? y : x, ak = first_k + at_ak, i = first_i + at_i;
    const int at_bk = transpose_b ? y : x, at_j = transpose_b ? x : y, bk = first_k + at_bk, j = first_j + at_j;
    float from_a = 0, from_b = 0;
    if (i < m && ak < K) from_a = float(transpose_a ? a[size_t(i) * lda + ak] : a[size_t(ak) * lda + i]);
    if (j < n && bk < K) from_b = float(transpose_b ? b[size_t(bk) * ldb + j] : b[size_t(j) * ldb + bk]);
    a_tile[at_ak][at_i] = from_a;
    b_tile[at_bk][at_j] = from_b;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < simple_tile; k++) sum += a_tile[k][x] * b_tile[k][y];
    __syncthreads();
  }
  const int i = first_i + x, j = first_j + y;
  if (i >= m || j >= n) return;
  d[size_t(j) * ldd + i] = D(sum);
}

// body(Real(), D()): the types of the operands, and of d
template <class Body>
void with_types_of(const Product& p, Body body) {
  if (p.type == OperandType::bfloat16)
    p.float_d ? body(bf16(), float()) : body(bf16(), bf16());
  else if (p.type == OperandType::float16)
    p.float_d ? body(fp16(), float()) : body(fp16(), fp16());
  else
    body(float(), float());
}

inline void simple_product(const Product& p, const Operands& o, cudaStream_t stream) {
  require(p.epilogue == Epilogue::none, "cuBLASLt has no algorithm for ", p.text());
  const dim3 grid(ceil_div(p.n, simple_tile), ceil_div(p.m, simple_tile), p.batch);
  with_types_of(p, [&]<class Real, class D>(Real, D) {
    launch(simple_product_kernel<Real, D>, {grid, simple_tile * simple_tile, 0, stream}, static_cast<D*>(o.d),
           static_cast<const Real*>(o.a), static_cast<const Real*>(o.b), p.transpose_a, p.transpose_b, p.m, p.n, p.k,
           p.lda, p.ldb, p.ldd, p.a_size(), p.b_size(), p.d_size());
  });
}

// body(product, operands) for each window of p, in order; p has neither a mask nor a transposed b.
template <class Body>
void for_each_window(const Product& p, const Operands& o, Body body) {
  require(p.n % p.window == 0 && !p.transpose_b && !p.has_mask(), "no product of windows: ", p.text());
  with_types_of(p, [&]<class Real, class D>(Real, D) {
    Operands of_window = o;
    for (size_t first = 0; first < size_t(p.n); first += size_t(p.window)) {
      of_window.b = static_cast<const Real*>(o.b) + first * p.ldb;
      of_window.d = static_cast<D*>(o.d) + first * p.ldd;
      body(p.window_alone(), of_window);
    }
  });
}

// Where products are computed: the stream, and scratch memory that only this stream's products use.
struct ProductStream {
  cudaStream_t stream;
  DeviceMemory workspace;
};

inline void say_simple(const Product& p) {
  std::fprintf(stderr,
               "cuBLASLt has no algorithm for %s: a simple kernel computes it, slowly; another --dtype may be faster\n",
               p.text().c_str());
}

#ifdef CUDA_ON_CPU
// ---------------------------------------------------------------------------------------------------------------------
// Plain loops, as work on the stream.

template <class Real, class D>
void multiply_on_cpu(const Product& p, const Operands& o) {
  const Real *a = static_cast<const Real*>(o.a), *b = static_cast<const Real*>(o.b);
  const size_t m = p.m, n = p.n, K = p.k, lda = p.lda, ldb = p.ldb, mask_bytes = mask_stride(p.m) / 8;
  const bool relu = p.epilogue == Epilogue::relu || p.epilogue == Epilogue::relu_mask;
  std::vector<float> a_columns(m * K), sums(m);  // op(a), a column of d
  for (size_t k = 0; k < K; k++)
    for (size_t i = 0; i < m; i++) a_columns[k * m + i] = float(p.transpose_a ? a[i * lda + k] : a[k * lda + i]);
  for (size_t j = 0; j < n; j++) {
    float* const sum = sums.data();
    float b_sum = 0;
    for (size_t i = 0; i < m; i++) sum[i] = p.adds_bias() ? float(static_cast<const D*>(o.bias)[i]) : 0;
    for (size_t k = 0; k < K; k++) {
      const float x = float(p.transpose_b ? b[k * ldb + j] : b[j * ldb + k]);
      const float* const column = a_columns.data() + k * m;
#pragma omp simd
      for (size_t i = 0; i < m; i++) sum[i] += x * column[i];
      b_sum += x;
    }
    if (p.epilogue == Epilogue::bias_grad) o.dbias[j] = b_sum;
    unsigned char* const mask = p.has_mask() ? o.mask + j * mask_bytes : nullptr;
    if (p.epilogue == Epilogue::relu_mask) std::memset(mask, 0, mask_bytes);
    D* const d = static_cast<D*>(o.d) + j * p.ldd;
    for (size_t i = 0; i < m; i++) {
      if (p.epilogue == Epilogue::relu_mask && sum[i] > 0) mask[i / 8] |= 1 << i % 8;
      const bool passes = p.epilogue == Epilogue::drelu ? mask[i / 8] >> i % 8 & 1 : !relu || sum[i] > 0;
      d[i] = D(passes ? sum[i] : 0);
    }
  }
}

class MatmulLibrary {
 public:
  static constexpr size_t workspace_bytes = 1 << 18;

  explicit MatmulLibrary(cudaStream_t stream) : own_{stream, DeviceMemory(workspace_bytes)} {}

  static std::string load() {  // so that a test can see what a library that is missing leads to
    if (const char* instead = std::getenv("CUDA_ON_CPU_CUBLASLT")) load_library(instead);
    return "plain loops instead of cuBLASLt";
  }

  AlgorithmTable& table() { return table_; }

  // The plain loops can compute any product. But a table from a GPU may say that cuBLASLt had no algorithm there, and a test
  // may say so for every product.
  bool has(const Product& p, const Operands& o) {
    if (p.window) return has(p.window_alone(), o);
    const std::string* known = table_.find(p.text());
    return known ? *known != "unfused" : !std::getenv("CUDA_ON_CPU_NO_ALGORITHMS");
  }
  template <class Unfused>
  bool fuses(const Product& p, const Operands& o, Unfused) {
    return has(p, o);
  }
  void multiply(const Product& p, const Operands& o) { multiply(p, o, own_); }
  void multiply(const Product& p, const Operands& o, const ProductStream& where) {
    if (p.window) return for_each_window(p, o, [&](const Product& q, const Operands& of_q) { multiply(q, of_q); });
    const bool simple = !has(p, o);
    if (used_.insert(p).second) {
      if (simple) say_simple(p);
      table_.set(p.text(), simple ? "unfused" : "loops");
      table_.use(p.text());
    }
    if (simple) return simple_product(p, o, where.stream);
    cuda_on_cpu::enqueue(where.stream, [p, o] {
      with_types_of(p, [&]<class Real, class D>(Real, D) {
        Operands one = o;
        for (size_t i = 0; i < size_t(p.batch); i++) {
          one.a = static_cast<const Real*>(o.a) + i * p.a_size();
          one.b = static_cast<const Real*>(o.b) + i * p.b_size();
          one.d = static_cast<D*>(o.d) + i * p.d_size();
          multiply_on_cpu<Real, D>(p, one);
        }
      });
    });
  }
  // Nothing is measured here: no way is faster than another.
  template <class Work>
  float time(Work) {
    return 0;
  }
  template <class Real>
  double measure_peak(OperandType) {
    return 0;
  }

 private:
  ProductStream own_;
  AlgorithmTable table_{"CPU"};
  std::set<Product> used_;
};

#else
// ---------------------------------------------------------------------------------------------------------------------
// cuBLASLt. The program is not linked with it: it loads it when it uses a GPU, and so starts where it is missing.

struct CublasLt {
  void* library = load_library("libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR));

// cublasLt().Create is what the manual calls cublasLtCreate. The library's header has functions of its own, cublasLt...Init:
// they call what ends in _internal.
#define CUBLASLT_FUNCTION(name) decltype(&::cublasLt##name) name = find<decltype(name)>("cublasLt" #name);
  CUBLASLT_FUNCTION(Create)
  CUBLASLT_FUNCTION(Destroy)
  CUBLASLT_FUNCTION(GetStatusString)
  CUBLASLT_FUNCTION(GetVersion)
  CUBLASLT_FUNCTION(Matmul)
  CUBLASLT_FUNCTION(MatmulAlgoCheck)
  CUBLASLT_FUNCTION(MatmulAlgoConfigGetAttribute)
  CUBLASLT_FUNCTION(MatmulAlgoGetHeuristic)
  CUBLASLT_FUNCTION(MatmulDescInit_internal)
  CUBLASLT_FUNCTION(MatmulDescSetAttribute)
  CUBLASLT_FUNCTION(MatmulPreferenceInit_internal)
  CUBLASLT_FUNCTION(MatmulPreferenceSetAttribute)
  CUBLASLT_FUNCTION(MatrixLayoutInit_internal)
  CUBLASLT_FUNCTION(MatrixLayoutSetAttribute)
#undef CUBLASLT_FUNCTION

 private:
  template <class Function>
  Function find(const char* name) const {
    void* const function = dlsym(library, name);
    if (!function) fail("cuBLASLt is not the one this program was built for (", dlerror(), ")");
    return reinterpret_cast<Function>(function);
  }
};
inline const CublasLt& cublasLt() {
  static const CublasLt functions;
  return functions;
}

// x = numbers in [-1, 1), eight for each thread
template <class Real>
__global__ void __launch_bounds__(256) noise_kernel(Real* x) {
  wait_for_inputs();
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const Philox4 r = random4(0, 0, 0, i);
  Float8 v;
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = float(draw_of(r, j)) / 32768 - 1;
  store8(x + 8 * i, v);
}

class MatmulLibrary {
 public:
  static constexpr size_t workspace_bytes = 32 << 20;  // what cuBLAS' manual recommends for Hopper

  explicit MatmulLibrary(cudaStream_t stream) : own_{stream, DeviceMemory(workspace_bytes)}, table_(machine()) {
    check(cublasLt().Create(&handle_), "cublasLtCreate");
  }
  ~MatmulLibrary() { cublasLt().Destroy(handle_); }
  MatmulLibrary(const MatmulLibrary&) = delete;

  // Loads the library, if it is not yet, and returns its name and version; an Error says why it cannot be loaded.
  static std::string load() {
    const size_t version = cublasLt().GetVersion();
    return ::text("cuBLASLt ", version / 10000, ".", version / 100 % 100, ".", version % 100);
  }

  AlgorithmTable& table() { return table_; }

  // Whether cuBLASLt computes p; otherwise multiply(p, o) can do it only without an epilogue.
  bool has(const Product& p, const Operands& o) { return plan_of(p, o, no_other_way).usable; }
  // Whether it is, and faster than unfused(), which arrives at the same without an epilogue.
  template <class Unfused>
  bool fuses(const Product& p, const Operands& o, Unfused unfused) {
    return plan_of(p.window ? p.window_alone() : p, o, [&] { return time(unfused); }).usable;
  }
  void multiply(const Product& p, const Operands& o) { multiply(p, o, own_); }
  // On a stream of the caller's. The first time, which algorithm is the fastest is measured on the library's own.
  void multiply(const Product& p, const Operands& o, const ProductStream& where) {
    Plan& plan = plan_of(p, o, no_other_way);
    if (p.window && !plan.usable)
      return for_each_window(p, o, [&](const Product& q, const Operands& of_q) { multiply(q, of_q); });
    if (!plan.used && !comparing_) {
      plan.used = true;
      table_.use(p.text());
      if (!plan.usable) say_simple(p);
    }
    if (!plan.usable) return simple_product(p, o, where.stream);
    set_pointers(plan, p, o);
    check(run(plan, plan.algorithm, o, where), "cublasLtMatmul");
  }
  // Milliseconds of work on the stream, one of several ways to compute the same: its products are not in use yet.
  template <class Work>
  float time(Work work) {
    const bool outer = std::exchange(comparing_, true);
    const float out = milliseconds(work);
    comparing_ = outer;
    return out;
  }

  // What dev/bench/bench_gpu.cu looks into: the algorithms that the library proposes, the one that was taken or would
  // have been, had the other way not been faster, and a product computed by one of them. Returns false: it cannot.
  struct Algorithm {  // with a name, which the library's struct has not: nvcc 13.0 fails on a vector of those
    cublasLtMatmulAlgo_t opaque{};

    bool operator==(const Algorithm& other) const {
      return std::equal(opaque.data, opaque.data + 8, other.opaque.data);
    }
  };
  struct Request {
    uint32_t alignment = 16;  // of all pointers, in bytes; Matmul asks for no more, the library's default is 256
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;  // ways to add up the pieces of a k that is split
  };
  std::vector<Algorithm> proposals(const Product& p, const Operands& o, const Request& request) {
    Plan plan = describe(p);
    set_pointers(plan, p, o);
    return heuristics(plan, p.k, request);
  }
  const Algorithm& chosen(const Product& p) const { return plans_.at(p).algorithm; }
  bool multiply_by(const Algorithm& algorithm, const Product& p, const Operands& o) {
    Plan plan = describe(p);
    set_pointers(plan, p, o);
    return run(plan, algorithm, o, own_) == CUBLAS_STATUS_SUCCESS;
  }
  // "66/393/24/1/3": number of the algorithm, of its tile, of its stages, pieces of k, number of the cluster's shape
  static std::string about(const Algorithm& algorithm) {
    std::ostringstream out;
    const auto attribute = [&](cublasLtMatmulAlgoConfigAttributes_t of, auto value) {
      size_t written = 0;
      if (cublasLt().MatmulAlgoConfigGetAttribute(&algorithm.opaque, of, &value, sizeof value, &written) ==
          CUBLAS_STATUS_SUCCESS)
        out << value;
      else
        out << "?";
    };
    attribute(CUBLASLT_ALGO_CONFIG_ID, int32_t());
    for (const auto of :
         {CUBLASLT_ALGO_CONFIG_TILE_ID, CUBLASLT_ALGO_CONFIG_STAGES_ID, CUBLASLT_ALGO_CONFIG_SPLITK_NUM}) {
      out << "/";
      attribute(of, uint32_t());
    }
    out << "/";
    attribute(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, uint16_t());
    return out.str();
  }

  // TFLOP/s of a large product, 0: there is no memory for it. It multiplies noise: zeros would keep the card cooler,
  // and faster.
  template <class Real>
  double measure_peak(OperandType type) {
    const int n = sizeof(Real) == 2 ? 8192 : 4096;
    const size_t count = size_t(n) * n;
    try {
      const DeviceMemory memory(3 * count * sizeof(Real));
      Real* const x = memory.as<Real>();
      launch(noise_kernel<Real>, {unsigned(2 * count / 8 / 256), 256, 0, own_.stream}, x);
      const Operands o = {.d = x + 2 * count, .a = x, .b = x + count};
      Plan plan = describe({type, false, true, false, n, n, n, n, n, n});
      const std::vector<Algorithm> candidates = heuristics(plan, n, Request());
      float best = INFINITY, spent = 0;
      for (size_t i = 0; !candidates.empty() && i < 12 && spent < 50; i++) {
        const Algorithm& algorithm = candidates[i % std::min<size_t>(candidates.size(), 4)];
        const float t = milliseconds_of(plan, algorithm, o, 1);
        best = std::min(best, t);
        spent += 2 * t;
      }
      return 2e-9 * n * n * n / best;
    } catch (const CudaError& e) {
      if (e.code != cudaErrorMemoryAllocation) throw;
      cudaGetLastError();  // so that the error is not found again at the next launch
      return 0;
    }
  }

 private:
  struct Plan {
    cublasLtMatmulDescOpaque_t product{};
    cublasLtMatrixLayoutOpaque_t a{}, b{}, d{};
    Algorithm algorithm;
    bool usable = false;  // false: there is no algorithm, or another way is faster
    bool used = false;
  };

  static float no_other_way() { return INFINITY; }  // for plan_of
  static void check(cublasStatus_t status, const char* what) {
    if (status != CUBLAS_STATUS_SUCCESS)
      throw std::runtime_error(std::string("cuBLASLt: ") + what + ": " + cublasLt().GetStatusString(status));
  }
  static std::string machine() {
    const cudaDeviceProp card = current_card();
    std::ostringstream out;
    out << card.name << ", compute capability " << card.major << "." << card.minor << ", " << card.multiProcessorCount
        << " multiprocessors, cuBLASLt " << cublasLt().GetVersion();
    return out.str();
  }

  // A new product's algorithm is the table's or, if that has none, the fastest, unless other_way() is faster still, which
  // returns milliseconds.
  template <class OtherWay>
  Plan& plan_of(const Product& p, const Operands& o, OtherWay other_way) {
    const auto it = plans_.find(p);
    if (it != plans_.end()) return it->second;
    cudaStreamCaptureStatus capture;
    CUDA_CHECK(cudaStreamIsCapturing(own_.stream, &capture));
    if (capture != cudaStreamCaptureStatusNone)
      throw std::runtime_error("matmul: " + p.text() + " is new, and no algorithm can be chosen while a graph is " +
                               "captured: compute everything once before");
    Plan plan = describe(p);
    set_pointers(plan, p, o);  // the heuristics look at their alignment
    const std::string* known = table_.find(p.text());
    if (p.window) {
      const Plan& alone = plan_of(p.window_alone(), o, no_other_way);
      plan.usable = alone.usable && restore(plan, algorithm_text(alone.algorithm));
    } else if (!known || (*known != "unfused" && !restore(plan, *known))) {
      const float best = choose(plan, p, o);
      plan.usable = best < other_way();
    }
    table_.set(p.text(), plan.usable ? algorithm_text(plan.algorithm) : "unfused");
    return plans_.insert_or_assign(p, plan).first->second;
  }

  template <class Value>
  static void set(Plan& plan, cublasLtMatmulDescAttributes_t attribute, Value value) {
    check(cublasLt().MatmulDescSetAttribute(&plan.product, attribute, &value, sizeof value), "a descriptor");
  }
  static Plan describe(const Product& p) {
    constexpr cudaDataType_t types[] = {CUDA_R_32F, CUDA_R_32F, CUDA_R_16BF, CUDA_R_16F};
    constexpr cublasLtEpilogue_t epilogues[] = {CUBLASLT_EPILOGUE_DEFAULT,   CUBLASLT_EPILOGUE_BIAS,
                                                CUBLASLT_EPILOGUE_RELU_BIAS, CUBLASLT_EPILOGUE_RELU_AUX_BIAS,
                                                CUBLASLT_EPILOGUE_DRELU,     CUBLASLT_EPILOGUE_BGRADB};
    const cudaDataType_t type = types[int(p.type)];
    const bool tf32 = p.type == OperandType::tf32;
    Plan plan;
    check(cublasLt().MatmulDescInit_internal(&plan.product, sizeof plan.product,
                                             tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "a descriptor");
    set(plan, CUBLASLT_MATMUL_DESC_TRANSA, int32_t(p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N));
    set(plan, CUBLASLT_MATMUL_DESC_TRANSB, int32_t(p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N));
    set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(epilogues[int(p.epilogue)]));
    if (p.has_mask()) set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(mask_stride(p.m)));
    const auto layout = [&](cublasLtMatrixLayoutOpaque_t& matrix, cudaDataType_t of, int rows, int columns, int ld) {
      check(cublasLt().MatrixLayoutInit_internal(&matrix, sizeof matrix, of, uint64_t(rows), uint64_t(columns), ld),
            "a matrix layout");
      if (p.batch == 1) return;
      const int32_t count = p.batch;
      const int64_t next = int64_t(ld) * columns;
      check(cublasLt().MatrixLayoutSetAttribute(&matrix, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count),
            "a matrix layout");
      check(
          cublasLt().MatrixLayoutSetAttribute(&matrix, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &next, sizeof next),
          "a matrix layout");
    };
    layout(plan.a, type, p.transpose_a ? p.k : p.m, p.transpose_a ? p.m : p.k, p.lda);  // as stored, before op
    layout(plan.b, type, p.transpose_b ? p.n : p.k, p.transpose_b ? p.k : p.n, p.ldb);
    layout(plan.d, p.float_d ? CUDA_R_32F : type, p.m, p.n, p.ldd);
    return plan;
  }
  static void set_pointers(Plan& plan, const Product& p, const Operands& o) {
    if (p.adds_bias()) set(plan, CUBLASLT_MATMUL_DESC_BIAS_POINTER, o.bias);
    if (p.epilogue == Epilogue::bias_grad) set(plan, CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<void*>(o.dbias));
    if (p.has_mask()) set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, static_cast<void*>(o.mask));
  }
  cublasStatus_t run(Plan& plan, const Algorithm& algorithm, const Operands& o, const ProductStream& where) {
    const float alpha = 1, beta = 0;
    return cublasLt().Matmul(handle_, &plan.product, &alpha, o.a, &plan.a, o.b, &plan.b, &beta, o.d, &plan.d, o.d,
                             &plan.d, &algorithm.opaque, where.workspace.as<void>(), workspace_bytes, where.stream);
  }

  // An algorithm is 64 bytes, which may be kept for the same version of the library.
  static std::string algorithm_text(const Algorithm& algorithm) {
    std::ostringstream out;
    out << std::hex;
    for (const uint64_t word : algorithm.opaque.data) out << word << " ";
    return out.str();
  }
  bool restore(Plan& plan, const std::string& text) {
    std::istringstream in(text);
    in >> std::hex;
    for (uint64_t& word : plan.algorithm.opaque.data) in >> word;
    cublasLtMatmulHeuristicResult_t result{};
    plan.usable = in && cublasLt().MatmulAlgoCheck(handle_, &plan.product, &plan.a, &plan.b, &plan.d, &plan.d,
                                                   &plan.algorithm.opaque, &result) == CUBLAS_STATUS_SUCCESS;
    plan.usable = plan.usable && result.workspaceSize <= workspace_bytes;
    return plan.usable;
  }

  // The algorithms that the library proposes; only such that sum over k in the same order every time, and in float: in
  // one piece, or in pieces that lie in the workspace as floats until a second step adds them. The library's other ways
  // to split k add up in d's type, one of them in place while the pieces are computed.
  std::vector<Algorithm> heuristics(Plan& plan, int k, const Request& request) {
    cublasLtMatmulPreferenceOpaque_t preference{};
    check(cublasLt().MatmulPreferenceInit_internal(&preference, sizeof preference), "a preference");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      check(cublasLt().MatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value), "a preference");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(workspace_bytes));
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, request.reductions);
    for (const auto alignment :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      prefer(alignment, request.alignment);

    constexpr int count = 32;
    cublasLtMatmulHeuristicResult_t results[count];
    std::vector<Algorithm> out;
    int found = 0;
    if (cublasLt().MatmulAlgoGetHeuristic(handle_, &plan.product, &plan.a, &plan.b, &plan.d, &plan.d, &preference,
                                          count, results, &found) != CUBLAS_STATUS_SUCCESS)
      return out;
    for (int i = 0; i < found; i++) {
      const cublasLtMatmulHeuristicResult_t& r = results[i];
      if (r.state != CUBLAS_STATUS_SUCCESS || r.workspaceSize > workspace_bytes) continue;
      if (config(r.algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME) & ~request.reductions) continue;
      // Some versions are said to lose the last terms when tiles do not divide a k that is split.
      if (k % 128 != 0 && config(r.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) > 1) continue;
      out.push_back({r.algo});
    }
    return out;
  }
  static uint32_t config(const cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute) {
    uint32_t value = 0;
    size_t written = 0;
    check(cublasLt().MatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, sizeof value, &written),
          "an algorithm");
    return value;
  }

  // Gives the plan the fastest algorithm and returns its milliseconds; infinity: there is none. Overwrites d.
  float choose(Plan& plan, const Product& p, const Operands& o) {
    const std::vector<Algorithm> candidates = heuristics(plan, p.k, Request());
    std::vector<float> times(candidates.size(), INFINITY);
    float best = INFINITY;
    for (int round = 0; round < 3; round++)
      for (size_t i = 0; i < candidates.size(); i++) {
        if (round > 0 && !(times[i] < 1.2f * best)) continue;  // out of the race
        times[i] = std::min(times[i], milliseconds_of(plan, candidates[i], o, 4));
        if (times[i] >= best) continue;
        best = times[i];
        plan.algorithm = candidates[i];
      }
    return best;
  }
  float milliseconds_of(Plan& plan, const Algorithm& algorithm, const Operands& o, int calls) {
    bool fails = false;
    const float t = milliseconds([&] { fails |= run(plan, algorithm, o, own_) != CUBLAS_STATUS_SUCCESS; }, calls);
    return fails ? INFINITY : t;
  }

  // Of one of several calls in a row. The first, which may load kernels or make plans, is not counted.
  template <class Work>
  float milliseconds(Work work, int calls = 4) {
    work();
    const float total = device_milliseconds(own_.stream, [&] {
      for (int i = 0; i < calls; i++) work();
    });
    return total / float(calls);
  }

  ProductStream own_;
  AlgorithmTable table_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<Product, Plan> plans_;
  bool comparing_ = false;  // what is computed now is only timed
};
#endif
