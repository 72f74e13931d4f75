#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "error.h"
#include "random.h"

namespace {

constexpr size_t alignment = 64;  // elements

size_t product_of(const std::vector<size_t>& shape) {
  size_t count = 1;
  for (const size_t n : shape) count *= n;
  return count;
}

std::string replaced(std::string text, const std::string& what, const std::string& by) {
  const size_t at = text.find(what);
  return at == std::string::npos ? text : text.replace(at, what.size(), by);
}

}  // namespace

void Layout::add(std::string name, int layers, std::vector<size_t> shape, Init init, std::string export_name,
                 size_t padding) {
  TensorSpec spec;
  spec.slice = product_of(shape);
  spec.padded = spec.slice + padding;
  spec.name = std::move(name);
  spec.layers = layers;
  spec.shape = std::move(shape);
  spec.init = init;
  spec.export_name = std::move(export_name);
  spec.offset = size_;
  spec.stride = (spec.padded + canary_gap + alignment - 1) / alignment * alignment;
  size_ += spec.stride * size_t(layers);
  count_ += spec.slice * size_t(layers);
  tensors_.push_back(std::move(spec));
}

size_t ExportTensor::size() const { return product_of(shape); }

std::vector<ExportTensor> export_table(const ModelShape& shape, const Layout& layout) {
  const size_t C = shape.C, HS = shape.HS();
  std::vector<ExportTensor> table;
  const auto whole = [&](const TensorSpec& spec) { table.push_back({spec.export_name, spec.shape, spec.offset}); };
  bool layers_done = false;
  for (const TensorSpec& spec : layout.tensors()) {
    if (spec.export_name.find("{l}") == std::string::npos) {
      whole(spec);
      continue;
    }
    if (layers_done) continue;
    layers_done = true;
    for (int l = 0; l < shape.L; l++)
      for (const TensorSpec& row : layout.tensors()) {
        if (row.export_name.find("{l}") == std::string::npos) continue;
        const std::string name = replaced(row.export_name, "{l}", std::to_string(l));
        const size_t offset = row.offset + size_t(l) * row.stride;
        const std::string parts = "{query,key,value}";
        if (name.find(parts) == std::string::npos) {
          table.push_back({name, row.shape, offset});
          continue;
        }
        for (int h = 0; h < shape.NH; h++) {  // qkvw (3, NH, HS, C): one (HS, C) matrix for each head and part
          int part = 0;
          for (const char* part_name : {"query", "key", "value"}) {
            const std::string head = replaced(name, "{h}", std::to_string(h));
            table.push_back({replaced(head, parts, part_name), {HS, C}, offset + (size_t(part) * C + h * HS) * C});
            part++;
          }
        }
      }
  }
  return table;
}

template <class Real>
void init_parameters(Real* params, const Layout& layout, uint64_t seed) {
  for (size_t i = 0; i < layout.size(); i++) params[i] = 0;
  uint32_t tensor = 0;
  for (const TensorSpec& spec : layout.tensors()) {
    for (int l = 0; l < spec.layers; l++) {
      Real* p = params + spec.offset + size_t(l) * spec.stride;
      const uint64_t first = uint64_t(l) * ((spec.slice + 3) / 4);
      if (spec.init == Init::ones)
        for (size_t i = 0; i < spec.slice; i++) p[i] = 1;
      if (spec.init != Init::normal) continue;
#pragma omp parallel for schedule(static)
      for (size_t i = 0; i < spec.slice; i += 4) {
        double normal[4];
        normal4(normal, random4(seed, 0, site::init + tensor, first + i / 4));
        for (size_t j = 0; j < 4 && i + j < spec.slice; j++) p[i + j] = Real(0.02 * normal[j]);
      }
    }
    tensor++;
  }
  plant_canaries(params, layout);
}

namespace {

template <class Real>
bool finite(const Real* values, size_t count) {
  Real sums[8] = {};  // 0 as long as all are finite: 0 times infinity, or NaN, is NaN
  size_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (size_t j = 0; j < 8; j++) sums[j] += values[i + j] * 0;
  for (; i < count; i++) sums[0] += values[i] * 0;
  for (const Real sum : sums)
    if (sum != 0) return false;
  return true;
}

}  // namespace

template <class Real>
bool all_finite(const Real* buffer, const Layout& layout) {
  for (const TensorSpec& spec : layout.tensors())
    for (int l = 0; l < spec.layers; l++)
      if (!finite(buffer + spec.offset + size_t(l) * spec.stride, spec.slice)) return false;
  return true;
}

std::string first_not_finite(const std::function<const float*(size_t offset, size_t count)>& slice,
                             const Layout& layout, Order order) {
  // What comes before the layers, the layers one by one, and what comes after them.
  std::vector<std::pair<const TensorSpec*, int>> all, layers, after;
  int depth = 0;
  for (const TensorSpec& spec : layout.tensors()) depth = std::max(depth, spec.layers);
  bool in_layers = false;
  for (const TensorSpec& spec : layout.tensors()) {
    in_layers = in_layers || spec.layers > 1;
    if (spec.layers == 1 && depth > 1) (in_layers ? after : all).push_back({&spec, 0});
  }
  for (int l = 0; l < depth; l++)
    for (const TensorSpec& spec : layout.tensors())
      if (spec.layers == depth) layers.push_back({&spec, l});
  all.insert(all.end(), layers.begin(), layers.end());
  all.insert(all.end(), after.begin(), after.end());
  if (order == Order::backward) std::reverse(all.begin(), all.end());
  for (const auto& [spec, l] : all)
    if (!finite(slice(spec->offset + size_t(l) * spec->stride, spec->slice), spec->slice))
      return spec->layers > 1 ? text(spec->name, " of layer ", l) : spec->name;
  return "";
}

template <class Real>
void plant_canaries([[maybe_unused]] Real* buffer, [[maybe_unused]] const Layout& layout) {
  if constexpr (canary_gap > 0)
    for (const TensorSpec& spec : layout.tensors())
      for (int l = 0; l < spec.layers; l++)
        for (size_t i = spec.padded; i < spec.stride; i++)
          buffer[spec.offset + size_t(l) * spec.stride + i] = std::numeric_limits<Real>::quiet_NaN();
}

template <class Real>
void check_canaries([[maybe_unused]] const Real* buffer, [[maybe_unused]] const Layout& layout,
                    [[maybe_unused]] const char* buffer_name) {
  if constexpr (canary_gap > 0)
    for (const TensorSpec& spec : layout.tensors())
      for (int l = 0; l < spec.layers; l++) {
        const Real* const slice = buffer + spec.offset + size_t(l) * spec.stride;
        for (size_t i = spec.slice; i < spec.stride; i++)
          if (i < spec.padded ? slice[i] != 0 : !std::isnan(slice[i]))
            fail("something was written ", i - spec.slice, " elements behind ", buffer_name, ".", spec.name, ", layer ",
                 l);
      }
}

#define INSTANTIATE(Real)                                              \
  template void init_parameters<Real>(Real*, const Layout&, uint64_t); \
  template bool all_finite<Real>(const Real*, const Layout&);          \
  template void plant_canaries<Real>(Real*, const Layout&);            \
  template void check_canaries<Real>(const Real*, const Layout&, const char*);
INSTANTIATE(float)
INSTANTIATE(double)
