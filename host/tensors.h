// Every buffer of the trainers is one allocation, carved into named tensors by one table.
// defines: ModelShape, PARAMETERS, Params, TensorSpec, Layout, parameter_layout, ExportTensor, export_table,
//          init_parameters, all_finite, first_not_finite, canaries
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// The letters of the field: V vocabulary, T positions (block_size), C channels (n_embd), L layers, NH heads per layer.
struct ModelShape {
  int V = 0, T = 0, C = 0, L = 0, NH = 0;
  int HS() const { return C / NH; }
  bool operator==(const ModelShape&) const = default;
};

// The parameters, in the order in which they lie in their buffer. The struct of pointers, the sizes, the initialisation
// and the names in a PyTorch state dict all come from this table.
//   name, initialisation, name in the state dict, shape
// A linear layer's weight is (out, in), as in PyTorch. qkvw holds the queries' rows first, then the keys', the values',
// each head by head.
#define PARAMETERS(ONE, EACH_LAYER)                                                      \
  ONE(wte, normal, "token_embedding_table.weight", V, C)                                 \
  ONE(wpe, normal, "position_embedding_table.weight", T, C)                              \
  EACH_LAYER(ln1w, ones, "blocks.{l}.ln1.weight", C)                                     \
  EACH_LAYER(ln1b, zeros, "blocks.{l}.ln1.bias", C)                                      \
  EACH_LAYER(qkvw, normal, "blocks.{l}.sa.heads.{h}.{query,key,value}.weight", 3 * C, C) \
  EACH_LAYER(attprojw, normal, "blocks.{l}.sa.proj.weight", C, C)                        \
  EACH_LAYER(attprojb, zeros, "blocks.{l}.sa.proj.bias", C)                              \
  EACH_LAYER(ln2w, ones, "blocks.{l}.ln2.weight", C)                                     \
  EACH_LAYER(ln2b, zeros, "blocks.{l}.ln2.bias", C)                                      \
  EACH_LAYER(fcw, normal, "blocks.{l}.ffwd.net.0.weight", 4 * C, C)                      \
  EACH_LAYER(fcb, zeros, "blocks.{l}.ffwd.net.0.bias", 4 * C)                            \
  EACH_LAYER(fcprojw, normal, "blocks.{l}.ffwd.net.2.weight", C, 4 * C)                  \
  EACH_LAYER(fcprojb, zeros, "blocks.{l}.ffwd.net.2.bias", C)                            \
  ONE(lnfw, ones, "ln_f.weight", C)                                                      \
  ONE(lnfb, zeros, "ln_f.bias", C)                                                       \
  ONE(headw, normal, "lm_head.weight", V, C)                                             \
  ONE(headb, zeros, "lm_head.bias", V)

enum class Init { none, normal, zeros, ones };  // normal: N(0, 0.02)

// One tensor of a buffer. A tensor that every layer has is stored as `layers` slices, `stride` elements apart.
struct TensorSpec {
  std::string name;
  int layers = 1;
  std::vector<size_t> shape;  // of one slice
  Init init = Init::none;
  std::string export_name;
  size_t slice = 0;   // elements of one slice
  size_t padded = 0;  // with the zeros behind them
  size_t offset = 0;  // of the first slice, in elements
  size_t stride = 0;  // from slice to slice, in elements
};

// Places tensors one after the other. Every slice starts on a multiple of 64 elements, so that a bias of V = 65 does
// not misalign all that follows it; with canaries (debug and test builds, -DCANARIES) a gap of at least 64 elements
// follows each slice, and what an overrun writes there is found.
class Layout {
 public:
  // padding: zeros that follow each slice, which kernels may read and, with zeros, write
  void add(std::string name, int layers, std::vector<size_t> shape, Init init = Init::none,
           std::string export_name = "", size_t padding = 0);
  const std::vector<TensorSpec>& tensors() const { return tensors_; }
  const TensorSpec& find(const std::string& name) const;
  size_t size() const { return size_; }    // of the buffer, in elements, gaps included
  size_t count() const { return count_; }  // of the elements that belong to tensors

 private:
  std::vector<TensorSpec> tensors_;
  size_t size_ = 0, count_ = 0;
};

// Member types of the structs of pointers: a plain pointer, or one that is indexed by layer.
template <class Real>
struct Slices {
  Real* first = nullptr;
  size_t stride = 0;
  Real* operator[](int l) const { return first + size_t(l) * stride; }
};
template <class Real>
void point(Real*& member, Real* buffer, const TensorSpec& spec) {
  member = buffer + spec.offset;
}
template <class Real>
void point(Slices<Real>& member, Real* buffer, const TensorSpec& spec) {
  member = {buffer + spec.offset, spec.stride};
}

// A struct of pointers from a table like PARAMETERS: `DEFINE_POINTERS(Params, PARAMETERS)` has the members wte ...
// headb and the constructor Params(buffer, layout).
#define POINTER_MEMBER(name, ...) Real* name = nullptr;
#define SLICES_MEMBER(name, ...) Slices<Real> name;
#define SET_MEMBER(name, ...) point(name, buffer, layout.find(#name));
#define DEFINE_POINTERS(Struct, TABLE)                                           \
  template <class Real>                                                          \
  struct Struct {                                                                \
    TABLE(POINTER_MEMBER, SLICES_MEMBER)                                         \
    Struct() = default;                                                          \
    Struct(Real* buffer, const Layout& layout) { TABLE(SET_MEMBER, SET_MEMBER) } \
  };

DEFINE_POINTERS(Params, PARAMETERS)

// The head's rows are padded to a multiple of 8 with zeros, with which a GPU's products are faster (train_gpt.cu).
Layout parameter_layout(const ModelShape& shape);
inline int padded_vocabulary(int V) { return (V + 7) / 8 * 8; }

// The tensors of a PyTorch state dict, layer by layer: each is a contiguous piece of the parameter buffer.
struct ExportTensor {
  std::string name;
  std::vector<size_t> shape;
  size_t offset = 0;  // in elements
  size_t size() const;
};
std::vector<ExportTensor> export_table(const ModelShape& shape, const Layout& layout);

// Fills a parameter buffer (layout.size() elements) from the seed: N(0, 0.02) for weights, 0 and 1 for the rest.
template <class Real>
void init_parameters(Real* params, const Layout& layout, uint64_t seed);

// Numbers that are not finite. all_finite looks at the tensors, not at the gaps between them; first_not_finite names the
// first tensor, and its layer, in the order in which a step computes them (backward: the other way round); empty: none.
// slice(offset, count) gives the elements of a buffer that may lie elsewhere.
enum class Order { forward, backward };
template <class Real>
bool all_finite(const Real* buffer, const Layout& layout);
std::string first_not_finite(const std::function<const float*(size_t offset, size_t count)>& slice,
                             const Layout& layout, Order order);
inline std::string first_not_finite(const float* buffer, const Layout& layout, Order order) {
  return first_not_finite([=](size_t offset, size_t) { return buffer + offset; }, layout, order);
}

// The gaps between a buffer's slices, in builds with canaries: NaN, which no read goes unnoticed over and which AdamW
// leaves as it is; checked after every step, and so are the zeros of a slice's padding.
#ifdef CANARIES
constexpr size_t canary_gap = 64;
#else
constexpr size_t canary_gap = 0;
#endif
template <class Real>
void plant_canaries(Real* buffer, const Layout& layout);
// Raises an Error that names the tensor behind which something was written.
template <class Real>
void check_canaries(const Real* buffer, const Layout& layout, const char* buffer_name);
