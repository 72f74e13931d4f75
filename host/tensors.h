// Every buffer of the trainers is one allocation, in which a struct's tensors lie one after the other. The struct says in
// a function `place` which tensors it has; Params, the model's parameters, is the example to read.
// defines: ModelShape, TensorSpec, Layout, Slices, Arena, layout_of, placed, Params, parameter_layout, ExportTensor,
//          export_table, init_parameters, all_finite, first_not_finite, canaries
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

// The letters of the field: V vocabulary, T positions (block_size), C channels (n_embd), L layers, NH heads per layer.
struct ModelShape {
  int V = 0, T = 0, C = 0, L = 0, NH = 0;
  int HS() const { return C / NH; }
  bool operator==(const ModelShape&) const = default;
};

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

// Of how many matrices a layer's slice consists, one above the other: as many as the state dict has tensors for it. 0: it is
// none of the matrices inside the layers, but a vector, an embedding or the head.
inline int hidden_matrices(const TensorSpec& spec, int NH) {
  if (spec.shape.size() != 2 || !spec.export_name.starts_with("blocks.")) return 0;
  return spec.export_name.find("{h}") == std::string::npos ? 1 : 3 * NH;  // query, key and value of each head
}

// Places tensors one after the other. Every slice starts on a multiple of 64 elements, so that a bias of V = 65 does
// not misalign all that follows it; with canaries (debug and test builds, -DCANARIES) a gap of at least 64 elements
// follows each slice, and what an overrun writes there is found.
class Layout {
 public:
  // padding: zeros that follow each slice, which kernels may read and, with zeros, write
  void add(std::string name, int layers, std::vector<size_t> shape, Init init = Init::none,
           std::string export_name = "", size_t padding = 0);
  const std::vector<TensorSpec>& tensors() const { return tensors_; }
  size_t size() const { return size_; }    // of the buffer, in elements, gaps included
  size_t count() const { return count_; }  // of the elements that belong to tensors

 private:
  std::vector<TensorSpec> tensors_;
  size_t size_ = 0, count_ = 0;
};

// A tensor that every layer has: [l] is layer l's slice.
template <class Real>
struct Slices {
  Real* first = nullptr;
  size_t stride = 0;  // from slice to slice, in elements
  Real* operator[](int l) const { return first + size_t(l) * stride; }
  unsigned char* bytes(int l) const { return reinterpret_cast<unsigned char*>((*this)[l]); }  // of bits, say
  Slices from(int l) const { return {(*this)[l], stride}; }  // layer l and those above it
};

// What Params says of its tensors besides their shapes.
struct Learned {
  Init init = Init::none;
  std::string export_name = "";
  size_t padding = 0;
};

// Walks through a buffer and gives every tensor the next place in it. `arena(w, "w", {V, C})` adds a tensor of that shape
// to the layout; for Slices the first extent is the number of layers. An arena without memory only measures; one with
// memory also points the tensors into it. All tensors of an arena have the same type of element.
class Arena {
 public:
  explicit Arena(void* memory = nullptr) : memory_(memory) {}

  template <class Real>
  void operator()(Real*& tensor, const char* name, std::initializer_list<size_t> shape, const Learned& learned = {}) {
    const TensorSpec& spec = add(name, 1, shape, learned);
    if (memory_) tensor = static_cast<Real*>(memory_) + spec.offset;
  }
  template <class Real>
  void operator()(Slices<Real>& tensor, const char* name, std::initializer_list<size_t> shape,
                  const Learned& learned = {}) {
    const std::vector<size_t> extents = shape;
    const TensorSpec& spec = add(name, int(extents[0]), {extents.begin() + 1, extents.end()}, learned);
    if (memory_) tensor = {static_cast<Real*>(memory_) + spec.offset, spec.stride};
  }
  const Layout& layout() const { return layout_; }

 private:
  const TensorSpec& add(const char* name, int layers, std::vector<size_t> shape, const Learned& learned) {
    layout_.add(name, layers, std::move(shape), learned.init, learned.export_name, learned.padding);
    return layout_.tensors().back();
  }
  void* memory_;
  Layout layout_;
};

// The layout of a struct's tensors, without memory: layout_of<Activations<float>>(shape, rows).
template <class Tensors, class... Sizes>
Layout layout_of(const Sizes&... sizes) {
  Arena arena;
  Tensors{}.place(arena, sizes...);
  return arena.layout();
}
// The struct with its pointers set: memory has room for that layout.
template <class Tensors, class... Sizes>
Tensors placed(void* memory, const Sizes&... sizes) {
  Arena arena(memory);
  Tensors tensors{};
  tensors.place(arena, sizes...);
  return tensors;
}

// The rows of the head's weight are padded with zeros to a multiple of 8: a GPU's products are faster then (train_gpt.cu).
inline int padded_vocabulary(int V) { return (V + 7) / 8 * 8; }

// The parameters, in the order in which they lie in their buffer, with how they begin and what PyTorch's state dict calls
// them. Gradients, and AdamW's m and v, are placed the same way. A linear layer's weight is (out, in), as in PyTorch.
template <class Real>
struct Params {
  Real *wte, *wpe;                          // token and position embedding
  Slices<Real> ln1w, ln1b;                  // LayerNorm before attention
  Slices<Real> qkvw, attprojw, attprojb;    // attention: the queries' rows of all heads, then the keys', the values'
  Slices<Real> ln2w, ln2b;                  // LayerNorm before the feed-forward layers
  Slices<Real> fcw, fcb, fcprojw, fcprojb;  // feed-forward: C -> 4C -> C
  Real *lnfw, *lnfb, *headw, *headb;        // the last LayerNorm; the head: C -> V

  void place(Arena& a, const ModelShape& s) {
    const size_t V = s.V, T = s.T, C = s.C, L = s.L, padding = size_t(padded_vocabulary(s.V)) - V;
    a(wte, "wte", {V, C}, {Init::normal, "token_embedding_table.weight"});
    a(wpe, "wpe", {T, C}, {Init::normal, "position_embedding_table.weight"});
    a(ln1w, "ln1w", {L, C}, {Init::ones, "blocks.{l}.ln1.weight"});
    a(ln1b, "ln1b", {L, C}, {Init::zeros, "blocks.{l}.ln1.bias"});
    a(qkvw, "qkvw", {L, 3 * C, C}, {Init::normal, "blocks.{l}.sa.heads.{h}.{query,key,value}.weight"});
    a(attprojw, "attprojw", {L, C, C}, {Init::normal, "blocks.{l}.sa.proj.weight"});
    a(attprojb, "attprojb", {L, C}, {Init::zeros, "blocks.{l}.sa.proj.bias"});
    a(ln2w, "ln2w", {L, C}, {Init::ones, "blocks.{l}.ln2.weight"});
    a(ln2b, "ln2b", {L, C}, {Init::zeros, "blocks.{l}.ln2.bias"});
    a(fcw, "fcw", {L, 4 * C, C}, {Init::normal, "blocks.{l}.ffwd.net.0.weight"});
    a(fcb, "fcb", {L, 4 * C}, {Init::zeros, "blocks.{l}.ffwd.net.0.bias"});
    a(fcprojw, "fcprojw", {L, C, 4 * C}, {Init::normal, "blocks.{l}.ffwd.net.2.weight"});
    a(fcprojb, "fcprojb", {L, C}, {Init::zeros, "blocks.{l}.ffwd.net.2.bias"});
    a(lnfw, "lnfw", {C}, {Init::ones, "ln_f.weight"});
    a(lnfb, "lnfb", {C}, {Init::zeros, "ln_f.bias"});
    a(headw, "headw", {V, C}, {Init::normal, "lm_head.weight", padding * C});
    a(headb, "headb", {V}, {Init::zeros, "lm_head.bias", padding});
  }
};
inline Layout parameter_layout(const ModelShape& shape) { return layout_of<Params<float>>(shape); }

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
