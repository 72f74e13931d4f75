#include "weights.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <set>

#include "error.h"
#include "memory.h"

namespace {

constexpr std::string_view first_name = "token_embedding_table.weight";

float from_half(uint16_t bits) {
  const bool finite = (bits & 0x7c00) != 0x7c00;
  const float size = finite ? std::bit_cast<float>(uint32_t(bits & 0x7fff) << 13) * 0x1p112f
                            : std::numeric_limits<float>::quiet_NaN();  // or infinite, which is as bad
  return bits & 0x8000 ? -size : size;
}

float as_float(const unsigned char* element, const std::string& dtype) {
  const auto read = [&](auto number) {
    std::memcpy(&number, element, sizeof number);
    return number;
  };
  if (dtype == "F32") return read(float{});
  if (dtype == "F64") return float(read(double{}));
  if (dtype == "F16") return from_half(read(uint16_t{}));
  return std::bit_cast<float>(uint32_t(read(uint16_t{})) << 16);  // BF16
}

// Copies a tensor row by row, whatever the order of its elements.
void copy_as_float(float* to, const TensorView& t) {
  const auto* const from = static_cast<const unsigned char*>(t.data);
  const size_t size = dtype_size(t.dtype), columns = t.shape.back(), rows = t.shape.size() == 2 ? t.shape[0] : 1;
  const size_t row_stride = t.stride.empty() ? columns : t.stride[0], stride = t.stride.empty() ? 1 : t.stride.back();
  for (size_t r = 0; r < rows; r++)
    for (size_t c = 0; c < columns; c++)
      to[r * columns + c] = as_float(from + (r * row_stride + c * stride) * size, t.dtype);
}

using Tensors = std::map<std::string, TensorView>;  // by name

// The names that begin with `before` and go on with a number: one more than the largest of these. "blocks.0.ln1.weight"
// and "blocks.1.ln1.weight" are 2 of "blocks.".
int count_numbered(const Tensors& tensors, const std::string& before) {
  int count = 0;
  for (auto at = tensors.lower_bound(before); at != tensors.end() && at->first.starts_with(before); ++at) {
    int number = -1;
    for (size_t i = before.size(); i < at->first.size() && std::isdigit(static_cast<unsigned char>(at->first[i])); i++)
      number = std::min(std::max(number, 0) * 10 + (at->first[i] - '0'), 1 << 20);
    count = std::max(count, number + 1);
  }
  return count;
}

std::string list(const std::vector<std::string>& names) {
  std::string out;
  for (size_t i = 0; i < std::min<size_t>(names.size(), 3); i++) out += (i ? ", " : "") + names[i];
  return names.size() > 3 ? text(out, " and ", names.size() - 3, " more") : out;
}

// The model among the tensors of a file. Their names may have something before them, the same for all, which is left out
// here: "module.", "_orig_mod.", "model.".
Tensors model_in(const std::string& path, const std::vector<TensorView>& all) {
  std::vector<std::string> prefixes, names;
  for (const TensorView& t : all) {
    names.push_back(t.name + " " + shape_text(t.shape));
    if (t.name.ends_with(first_name)) prefixes.push_back(t.name.substr(0, t.name.size() - first_name.size()));
  }
  if (prefixes.empty())
    fail(path, " has no ", first_name, ": it is not a model of the course's gpt.py. It has ",
         names.empty() ? "no tensors at all" : list(names));
  if (prefixes.size() > 1) fail(path, " has more than one model: ", list(prefixes));
  Tensors model;
  for (const TensorView& t : all) {
    if (!t.name.starts_with(prefixes[0])) continue;
    const std::string name = t.name.substr(prefixes[0].size());
    model[name] = t;
    model[name].name = name;
  }
  return model;
}

// Its shape, as far as the tensors that say it have one.
ModelShape shape_of(const std::string& path, const Tensors& model) {
  const auto extents = [&](std::string_view name) {
    const auto t = model.find(std::string(name));
    if (t == model.end()) fail(path, " has no ", name);
    const std::vector<size_t>& shape = t->second.shape;
    if (shape.size() != 2 || shape[0] < 1 || shape[1] < 1 || std::max(shape[0], shape[1]) > 1 << 20)
      fail(path, ": ", name, " has the shape ", shape_text(shape), ", which is no table");
    return shape;
  };
  ModelShape s;
  s.V = int(extents(first_name)[0]);
  s.C = int(extents(first_name)[1]);
  s.T = int(extents("position_embedding_table.weight")[0]);
  s.L = count_numbered(model, "blocks.");
  s.NH = count_numbered(model, "blocks.0.sa.heads.");
  if (s.V > Vocabulary::max_size) fail(path, " has ", s.V, " tokens, and ", Vocabulary::max_size, " is the most");
  if (s.L < 1) fail(path, " has no blocks.0: it is not a model of the course's gpt.py");
  if (s.NH < 1) fail(path, " has no blocks.0.sa.heads.0: its attention is not that of the course's gpt.py");
  if (s.C % s.NH != 0) fail(path, " has ", s.NH, " heads, which do not divide its ", s.C, " channels");
  // A number in a name is believed only if there are tensors for it.
  if (double(s.L) * (3.0 * s.NH + 9) > 1000.0 + 4.0 * double(model.size()))
    fail(path, " has ", model.size(), " tensors, too few for ", s.L, " layers with ", s.NH, " heads");
  return s;
}

}  // namespace

ModelWeights::ModelWeights(const std::string& path, Verify what) : path_(path) {
  const MappedFile file(path);
  const std::string_view bytes(reinterpret_cast<const char*>(file.data()), file.size());
  const bool is_pth = PthFile::looks_like_one(bytes);
  if (!is_pth) {
    refuse_other(path, bytes, "a safetensors file",
                 "the weights of a model are needed: a checkpoint such as ckpt_last.safetensors, another safetensors "
                 "file, or a .pth of PyTorch");
    const Metadata metadata = SafetensorsFile(path, Verify::header).metadata();
    if (const auto format = metadata.find("format");
        format != metadata.end() && format->second.starts_with("microGPT")) {
      checkpoint_.emplace(path, what);
      return;
    }
  }
  if (what == Verify::header) return;
  if (is_pth)
    pth_ = std::make_unique<PthFile>(path);
  else
    safetensors_ = std::make_unique<SafetensorsFile>(path);
  use(is_pth ? pth_->tensors() : safetensors_->tensors(), file.size());
}

// Takes the model out of another program's file, if it is one of ours.
void ModelWeights::use(const std::vector<TensorView>& all, size_t file_bytes) {
  const Tensors model = model_in(path_, all);
  const ModelShape& s = info_.shape = shape_of(path_, model);
  std::set<std::string> known;
  std::vector<std::string> missing, others;
  for (const ExportTensor& wanted : export_table(s, parameter_layout(s))) {
    known.insert(wanted.name);
    const auto found = model.find(wanted.name);
    if (found == model.end()) {
      missing.push_back(wanted.name);
      continue;
    }
    const TensorView& t = found->second;
    if (t.shape != wanted.shape)
      fail(path_, ": tensor ", t.name, " has the shape ", shape_text(t.shape), "; with the others ",
           shape_text(wanted.shape), " is expected");
    if (t.dtype != "F32" && t.dtype != "F16" && t.dtype != "BF16" && t.dtype != "F64")
      fail(path_, ": tensor ", t.name, " is ", t.dtype, ", expected F32, F16, BF16 or F64");
    tensors_.push_back(t);
  }
  for (const auto& [name, t] : model)
    if (!known.count(name) && !name.ends_with(".tril")) others.push_back(name);  // tril: a head's causal mask
  if (!missing.empty()) fail(path_, " has no ", list(missing));
  if (!others.empty())
    fail(path_, " has ", list(others), others.size() > 1 ? ", which are no tensors" : ", which is no tensor",
         " of the course's model");
  // The tensors of a .pth may share their bytes, and one number may stand for millions.
  const size_t count = parameter_layout(s).count();
  if (count > file_bytes / 2)
    fail(path_, " describes ", count, " parameters, which its ", file_bytes, " bytes cannot hold");
  for (const auto& [name, value] : {std::pair{"n_layer", s.L}, {"n_head", s.NH}, {"n_embd", s.C}, {"block_size", s.T}})
    info_.settings[name] = std::to_string(value);
  info_.best_loss = std::numeric_limits<double>::infinity();
}

std::string ModelWeights::describe() const {
  if (!checkpoint_) return path_;
  const int steps = info().iteration;
  return text(path_, ", after ", steps, steps == 1 ? " step" : " steps");
}

void ModelWeights::load_params(float* params, const Layout& layout) const {
  if (checkpoint_) {
    checkpoint_->load_params(params, layout);
  } else {
    const std::vector<ExportTensor> table = export_table(info_.shape, layout);
    for (size_t i = 0; i < table.size(); i++) copy_as_float(params + table[i].offset, tensors_[i]);
  }
  if (const std::string name = first_not_finite(params, layout, Order::forward); !name.empty())
    fail(path_, ": ", name, " has a number that is not finite");
}

Vocabulary vocabulary_of(const ModelWeights& weights, const std::string& data) {
  if (weights.vocabulary()) return *weights.vocabulary();
  const int size = weights.info().shape.V;
  const std::string path = data + "/vocab.json";
  Vocabulary vocabulary = Vocabulary::load(path);
  if (vocabulary.size() != size)
    fail(weights.path(), " has no vocabulary, only ", size, " tokens, and ", path, " has ", vocabulary.size(),
         " characters: point --data to the text that it was trained on");
  std::fprintf(stderr, "%s has no vocabulary: its %d tokens are taken for the %d characters in %s\n",
               weights.path().c_str(), size, size, path.c_str());
  return vocabulary;
}

TakenOver take_over(float* params, const ModelShape& shape, const Vocabulary& vocabulary, const ModelWeights& weights,
                    const Vocabulary& weights_vocabulary) {
  const ModelShape& theirs = weights.info().shape;
  const Layout to_layout = parameter_layout(shape), from_layout = parameter_layout(theirs);
  const Buffer<float> loaded(from_layout);
  weights.load_params(loaded.data(), from_layout);

  // Their row for each of our characters, and the other way round what is left.
  TakenOver rest;
  std::vector<int> theirs_of;
  for (const char32_t c : vocabulary.characters()) {
    theirs_of.push_back(weights_vocabulary.find(c));
    if (theirs_of.back() < 0) rest.fresh.push_back(c);
  }
  for (const char32_t c : weights_vocabulary.characters())
    if (vocabulary.find(c) < 0) rest.dropped.push_back(c);

  for (size_t t = 0; t < to_layout.tensors().size(); t++) {
    const TensorSpec &to = to_layout.tensors()[t], &from = from_layout.tensors()[t];
    const size_t width = to.shape.size() == 2 ? to.shape[1] : 1;  // of a row
    if (to.name == "wte" || to.name == "headw" || to.name == "headb") {
      for (size_t id = 0; id < theirs_of.size(); id++)
        if (theirs_of[id] >= 0)
          std::copy_n(loaded.data() + from.offset + size_t(theirs_of[id]) * width, width,
                      params + to.offset + id * width);
    } else {  // wpe may have more rows, or fewer
      for (int l = 0; l < to.layers; l++)
        std::copy_n(loaded.data() + from.offset + size_t(l) * from.stride, std::min(from.slice, to.slice),
                    params + to.offset + size_t(l) * to.stride);
    }
  }
  return rest;
}
