// Linear layer: out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC), its gradients, and ReLU in the same
// pass. The products are the library's (matmul_library.cuh), which stores matrices by columns: d (m, n) = op(a) @
// op(b). A matrix whose rows are ld elements apart is, read by columns, its transpose; so what it is asked for are our
// equations, transposed, with the same memory:
//
//                     d (m, n)                   op(a)                   op(b)                         k
//   forward           out^T (OC, rows), ldo      weight (C, OC), T       inp^T (C, rows), N            C
//   backward_input    dinp^T (C, rows)           weight (C, OC), N       dout^T (OC, rows), ldd, N     OC
//   backward_weight   dweight^T (C, OC)          inp^T (C, rows), N      dout^T (OC, rows), ldd, T     rows
//
// T: op transposes. A bias is added to d's columns, one element for each row; its gradient, the sums of dout's columns,
// is column_sums.cuh's. ReLU's mask has a bit for each element of forward's d, out^T, and is read where dinp^T has that
// shape.
// defines: Matmul, relu_mask_bytes, head_rows
#pragma once
#include <cmath>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <type_traits>

#include "../host/files.h"
#include "../host/tensors.h"
#include "choices.cuh"
#include "column_sums.cuh"
#include "launch.cuh"
#include "matmul_library.cuh"
#include "relu.cuh"

// ---------------------------------------------------------------------------------------------------------------------

// How many rows of the head the products use. With 16-bit types we include the rows of zeros after row V: cuBLASLt's
// kernels for 65 rows take three times as long as its kernels for 72. With floats we don't: for 72 rows it sometimes has
// no kernel at all (seen with cuBLASLt 13.1 on an H100).
template <class Real>
constexpr int head_rows(int V) {
  return sizeof(Real) == 2 ? padded_vocabulary(V) : V;
}

// Bytes of the mask that forward_relu leaves for backward_input_relu.
constexpr size_t relu_mask_bytes(int rows, int OC) { return size_t(rows) * mask_stride(OC) / 8; }

// The products of one stream. The first time that a function is called with new shapes it chooses an algorithm, which
// takes a while and may not happen while a graph is captured; from then on it only launches. All pointers are aligned
// to 16 bytes; C and the lengths of rows are multiples of 8.
class Matmul {
 public:
  static constexpr size_t workspace_bytes = MatmulLibrary::workspace_bytes;  // of each of its streams
  static double memory() { return double(workspace_bytes) * (choices().weight_gradients == 2 ? 2 : 1); }  // in bytes

  // tf32: products of floats take 10 bits of their mantissas. fuse = false: bias and ReLU get passes of their own going
  // forward, as where the library has no algorithm that includes them.
  Matmul(bool tf32, cudaStream_t stream, bool fuse = true)
      : tf32_(tf32), fuse_(fuse), stream_(stream), library_(stream) {
    if (choices().weight_gradients == 2) beside_ = std::make_unique<Beside>();
  }
  bool tf32() const { return tf32_; }

  // From now on each `rows` rows going forward get the bits that they would get alone, however many there are in all: so
  // texts that are generated together are those that are generated one by one. 0: all rows together, as fast as possible.
  void keep_windows(int rows) { window_ = rows; }

  // out (rows, OC) = inp (rows, C) @ weight (OC, C)^T + bias (OC); no bias: nullptr. A row of out is ldo elements long,
  // what is behind the first OC is left alone.
  template <class Real>
  void forward(Real* out, const Real* inp, const Real* weight, const std::type_identity_t<Real>* bias, int rows, int C,
               int OC, int ldo) {
    check("forward", {out, inp, weight, bias}, rows, C, OC, ldo);
    const Product p = forward_product<Real>(rows, C, OC, ldo);
    const Operands o = {.d = out, .a = weight, .b = inp, .bias = bias};
    if (!bias) return library_.multiply(p, o);
    run(p.with(Epilogue::bias), o, [&] {
      library_.multiply(p, o);
      bias_forward(out, bias, rows, OC, ldo, stream_);
    });
  }

  // How a hidden layer's ReLU is computed, forward and backward together. By a mask: the product that goes forward leaves
  // a bit for each element, and the one that comes back reads it. Or by a pass of our own over what the product that
  // comes back has left, which makes the sums for the bias's gradient on the way.
  void use_relu_mask(bool use) { relu_mask_ = use; }

  // Takes the table's way or, if that has none, the one in which run() takes less time: forward_relu and
  // backward_input_relu of all layers. A library whose fused kernels are slow, or which has none, is faster by our pass.
  template <class Real, class Run>
  void choose_relu(int rows, int C, int OC, Run run) {
    const Product p = forward_product<Real>(rows, C, OC, OC);
    const std::string key = "ReLU of " + p.text();
    const std::string* const known = library_.table().find(key);
    bool fastest = known && *known == "mask";
    float least = INFINITY;
    for (int round = 0; round < 3 && !known; round++)
      for (const bool mask : {false, true}) {
        use_relu_mask(mask);
        const float time = library_.time(run);
        if (time >= least) continue;
        least = time;
        fastest = mask;
      }
    use_relu_mask(fastest);
    library_.table().set(key, fastest ? "mask" : "pass");
    library_.table().use(key);
  }

  // out (rows, OC) = max(inp (rows, C) @ weight (OC, C)^T + bias (OC), 0). mask (relu_mask_bytes(rows, OC)) is for
  // backward_input_relu; nullptr: there will be none.
  template <class Real>
  void forward_relu(Real* out, unsigned char* mask, const Real* inp, const Real* weight, const Real* bias, int rows,
                    int C, int OC) {
    check("forward_relu", {out, mask, inp, weight, bias}, rows, C, OC, OC);
    const Product p = forward_product<Real>(rows, C, OC, OC);
    const Operands o = {.d = out, .a = weight, .b = inp, .bias = bias, .mask = mask};
    if (mask && relu_mask_ && library_.has(p.with(Epilogue::relu_mask), o)) {
      masks_.insert({p.type, rows, OC});
      return library_.multiply(p.with(Epilogue::relu_mask), o);
    }
    if (mask) masks_.erase({p.type, rows, OC});
    run(p.with(Epilogue::relu), o, [&] {
      library_.multiply(p, o);
      bias_relu_forward(out, bias, rows, OC, OC, stream_);
    });
  }

  // dinp (rows, C) = dout (rows, OC) @ weight (OC, C); a row of dout is ldd elements long
  template <class Real>
  void backward_input(Real* dinp, const Real* dout, const Real* weight, int rows, int C, int OC, int ldd) {
    check("backward_input", {dinp, dout, weight}, rows, C, OC, ldd);
    library_.multiply({operand<Real>(), false, false, false, C, rows, OC, C, ldd, C},
                      {.d = dinp, .a = weight, .b = dout});
  }

  // dinp (rows, C) = dout (rows, OC) @ weight (OC, C) where the input passed its ReLU, else 0
  // partials (ceil(rows / 64), C) = the sums of each 64 rows of dinp, for the gradient of the bias that was added before
  // ReLU (column_sums.cuh). mask and relu_out (rows, C) are what this object's forward_relu left.
  template <class Real>
  void backward_input_relu(Real* dinp, float* partials, const Real* dout, const Real* weight, const unsigned char* mask,
                           const Real* relu_out, int rows, int C, int OC) {
    check("backward_input_relu", {dinp, dout, weight, mask, relu_out}, rows, C, OC, OC);
    const Product p = {operand<Real>(), false, false, false, C, rows, OC, C, OC, C};
    const Operands o = {.d = dinp, .a = weight, .b = dout, .mask = const_cast<unsigned char*>(mask)};
    if (masks_.count({p.type, rows, C}) && library_.has(p.with(Epilogue::drelu), o)) {
      library_.multiply(p.with(Epilogue::drelu), o);
      column_partials(partials, dinp, rows, C, C, stream_);
    } else {
      library_.multiply(p, o);
      relu_backward(dinp, partials, relu_out, rows, C, stream_);
    }
  }

  // dweight (OC, C) = dout (rows, OC)^T @ inp (rows, C); a row of dout is ldd elements long
  // No other product waits for a gradient of weights. So they may have a stream of their own (Choices::weight_gradients),
  // where they fill multiprocessors that the other kernels leave free. Before inp or dweight is used otherwise, call
  // join(); before dout is written again, unread(dout).
  template <class Real>
  void backward_weight(float* dweight, const Real* dout, const Real* inp, int rows, int C, int OC, int ldd) {
    check("backward_weight", {dweight, dout, inp}, rows, C, OC, ldd);
    const Product p = {operand<Real>(), true, false, true, C, OC, rows, C, ldd, C};
    const Operands o = {.d = dweight, .a = inp, .b = dout};
    if (!beside_) return library_.multiply(p, o);
    beside_->begin.record(stream_);
    beside_->begin.hold(beside_->stream);
    library_.multiply(p, o, beside_->products);
    beside_->has_read[dout].record(beside_->stream);
    beside_->reading.insert(dout);
  }

  // For `count` matrices at once, which follow each other without gaps; n and k are multiples of 8:
  // gram (n, n) = x (n, k) @ x^T
  template <class Real>
  void gram(Real* gram, const Real* x, int n, int k, int count) {
    check("gram", {gram, x}, n, k, n, n);
    Product p = {operand<Real>(), false, true, false, n, n, k, k, k, n};
    p.batch = count;
    library_.multiply(p, {.d = gram, .a = x, .b = x});
  }
  // out (n, k) = a (n, n) @ b (n, k)
  template <class Real>
  void square_times(Real* out, const Real* a, const Real* b, int n, int k, int count) {
    check("square_times", {out, a, b}, n, k, n, n);
    Product p = {operand<Real>(), false, false, false, k, n, n, k, n, k};
    p.batch = count;
    library_.multiply(p, {.d = out, .a = b, .b = a});
  }

  // Returns x, which may be written from now on: the stream waits for the gradients of weights that read it.
  template <class Real>
  Real* unread(Real* x) {
    if (beside_ && beside_->reading.erase(x)) beside_->has_read[x].hold(stream_);
    return x;
  }
  // The stream waits for all gradients of weights. After that a graph can be captured: it must not wait for events from
  // before the capture.
  void join() {
    if (!beside_) return;
    for (const void* dout : beside_->reading) beside_->has_read[dout].hold(stream_);
    beside_->reading.clear();
  }

  // The point where the gradients of weights so far are written.
  const Event& weights_written() {
    weights_written_.record(beside_ ? cudaStream_t(beside_->stream) : stream_);
    return weights_written_;
  }

  // The algorithms chosen so far, as text for a file, and back. The table of another card or of another version of the
  // library, and a damaged one, is ignored.
  std::string save_table() { return library_.table().save(); }
  void load_table(const std::string& text) { library_.table().load(text); }
  void save_table_to(const std::string& path) {  // in a folder that may not be there yet
    make_folder(std::filesystem::path(path).parent_path());
    write_file(path, save_table());
  }
  void load_table_from(const std::string& path) {  // if there is such a file
    if (std::filesystem::exists(path)) load_table(read_file(path));
  }
  // Card, library, and a digest of the algorithms used so far: with the same name, the same bits.
  std::string name() { return library_.table().name(); }

  // TFLOP/s of a large product; 0 if that cannot be said
  template <class Real>
  double measure_peak() {
    return library_.measure_peak<Real>(operand<Real>());
  }

 private:
  template <class Real>
  OperandType operand() const {
    if constexpr (std::is_same_v<Real, float>)
      return tf32_ ? OperandType::tf32 : OperandType::float32;
    else
      return std::is_same_v<Real, bf16> ? OperandType::bfloat16 : OperandType::float16;
  }
  template <class Real>
  Product forward_product(int rows, int C, int OC, int ldo) const {
    Product p = {operand<Real>(), false, true, false, OC, rows, C, C, C, ldo};
    if (rows > window_) p.window = window_;
    return p;
  }
  static void check(const char* name, std::initializer_list<const void*> pointers, int rows, int C, int OC, int ld) {
    require(rows > 0 && C > 0 && C % 8 == 0 && OC > 0, name, ": rows = ", rows, ", C = ", C, ", OC = ", OC);
    require(ld >= OC && ld % 8 == 0, name, ": rows of ", ld, " elements for OC = ", OC);
    for (const void* p : pointers)
      require(reinterpret_cast<uintptr_t>(p) % 16 == 0, name, ": ", p, " is not aligned to 16 bytes");
  }
  // The product with its epilogue or, where the library has no algorithm that is faster so, `unfused`.
  template <class Unfused>
  void run(const Product& p, const Operands& o, Unfused unfused) {
    if (fuse_ && library_.fuses(p, o, unfused))
      library_.multiply(p, o);
    else
      unfused();
  }

  // The second stream.
  struct Beside {
    Stream stream;
    ProductStream products{stream, DeviceMemory(workspace_bytes)};
    Event begin;                            // what a gradient reads is there
    std::map<const void*, Event> has_read;  // by dout: the last gradient that reads it is computed
    std::set<const void*> reading;          // the douts whose event the first stream has not waited for
  };

  bool tf32_, fuse_, relu_mask_ = false;
  int window_ = 0;  // see keep_windows
  cudaStream_t stream_;
  MatmulLibrary library_;
  std::unique_ptr<Beside> beside_;  // if gradients of weights have a stream of their own
  Event weights_written_;
  std::set<std::tuple<OperandType, int, int>> masks_;  // (rows, OC) for which forward_relu left a mask
};
