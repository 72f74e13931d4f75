#include "checkpoint.h"

#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "config.h"
#include "error.h"

namespace {

constexpr const char* format_name = "microGPT checkpoint 1";
const std::string state_prefix = "state.";

std::string exact(double x) {  // the shortest text that reads back as the same number
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, x).ptr};
}

}  // namespace

std::vector<TensorView> export_views(const ModelShape& shape, const Layout& layout, const float* params,
                                     const std::string& prefix) {
  std::vector<TensorView> views;
  for (const ExportTensor& tensor : export_table(shape, layout))
    views.push_back({prefix + tensor.name, "F32", tensor.shape, params + tensor.offset});
  return views;
}

void save_checkpoint(const std::string& path, const CheckpointInfo& info, const Vocabulary& vocabulary,
                     const Layout& layout, const float* params, const float* m, const float* v) {
  std::vector<TensorView> views = export_views(info.shape, layout, params);
  if (m)
    for (const auto& [moment, prefix] : {std::pair{m, "adamw.m."}, {v, "adamw.v."}})
      for (TensorView& view : export_views(info.shape, layout, moment, prefix)) views.push_back(std::move(view));
  std::string characters;
  for (int id = 0; id < vocabulary.size(); id++) characters += vocabulary.decode(id);
  Metadata metadata = {info.settings.begin(), info.settings.end()};
  metadata["format"] = format_name;
  metadata["vocab_size"] = text(info.shape.V);
  metadata["vocabulary"] = characters;
  metadata["iteration"] = text(info.iteration);
  metadata["best_fixed_loss"] = exact(info.best_loss);
  metadata["best_iteration"] = text(info.best_iteration);
  metadata["data"] = info.data;
  for (const auto& [name, value] : info.state) metadata[state_prefix + name] = value;
  write_safetensors(path, views, metadata);
}

Checkpoint::Checkpoint(const std::string& path, Verify what) : path_(path), file_(path, what) {
  const auto value = [&](const char* key) -> const std::string& {
    const auto at = file_.metadata().find(key);
    if (at == file_.metadata().end())
      fail(path_, " is not a checkpoint of this program: its metadata has no '", key, "'");
    return at->second;
  };
  const auto number = [&](const char* key, auto& out) {
    const std::string& s = value(key);
    const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), out);
    if (error != std::errc() || end != s.data() + s.size()) fail(path_, ": '", key, "' is not a number: '", s, "'");
  };
  if (value("format") != format_name)
    fail(path_, " is of the format '", value("format"), "'; this program reads '", format_name, "'");
  ModelShape& s = info_.shape;
  number("vocab_size", s.V);
  number("block_size", s.T);
  number("n_embd", s.C);
  number("n_layer", s.L);
  number("n_head", s.NH);
  number("iteration", info_.iteration);
  if (file_.metadata().count("best_fixed_loss")) {
    number("best_fixed_loss", info_.best_loss);
    number("best_iteration", info_.best_iteration);
  } else {
    info_.best_loss = std::numeric_limits<double>::quiet_NaN();
  }
  info_.data = value("data");
  for (const auto& [name, state] : file_.metadata())
    if (name.rfind(state_prefix, 0) == 0) info_.state[name.substr(state_prefix.size())] = state;
  info_.settings = settings_of_older_programs();
  for (const std::string& name : recorded_flags())
    if (file_.metadata().count(name) || !info_.settings.count(name)) info_.settings[name] = value(name.c_str());

  // The sizes are believed only as far as the file has bytes for them: the largest tensors alone bound their product.
  constexpr int limit = 1 << 20;
  for (const int n : {s.V, s.T, s.C, s.L, s.NH})
    if (n < 1 || n > limit) fail(path_, ": a size of ", n, " is not between 1 and ", limit);
  if (s.C % s.NH != 0) fail(path_, ": n_embd ", s.C, " is not a multiple of n_head ", s.NH);
  const double elements = (double(s.V) * 2 + s.T) * s.C + 12.0 * s.L * s.C * s.C;
  double bytes = 0;
  for (const TensorView& tensor : file_.tensors()) bytes += double(tensor.bytes());
  if (elements * sizeof(float) > bytes)
    fail(path_, ": its metadata describes ", elements, " parameters, its tensors have only ", bytes, " bytes");

  std::vector<char32_t> characters;
  Utf8Decoder decoder(path_ + ": the vocabulary", Utf8Decoder::Bom::keep);
  decoder.feed(value("vocabulary"), [&](char32_t c) { characters.push_back(c); });
  decoder.finish();
  vocabulary_ = Vocabulary(std::move(characters));
  if (vocabulary_.size() != s.V)
    fail(path_, ": the vocabulary has ", vocabulary_.size(), " characters, vocab_size says ", s.V);
}

void Checkpoint::load(float* to, const Layout& layout, const std::string& prefix) const {
  for (const ExportTensor& tensor : export_table(info_.shape, layout)) {
    const TensorView& view = file_.find(prefix + tensor.name);
    if (view.dtype != "F32") fail(path_, ": tensor ", view.name, " is ", view.dtype, ", expected F32");
    if (view.shape != tensor.shape)
      fail(path_, ": tensor ", view.name, " has the shape ", shape_text(view.shape), ", expected ",
           shape_text(tensor.shape));
    std::memcpy(to + tensor.offset, view.data, tensor.size() * sizeof(float));
  }
}

void Checkpoint::load_params(float* params, const Layout& layout) const { load(params, layout, ""); }

void Checkpoint::load_moments(float* m, float* v, const Layout& layout) const {
  if (!file_.maybe("adamw.m." + export_table(info_.shape, layout)[0].name))
    fail(path_, " has weights only; a run goes on from ckpt_last, which has AdamW's moments too");
  load(m, layout, "adamw.m.");
  load(v, layout, "adamw.v.");
}

bool Snapshot::all_finite(const Layout& layout) const {
  return ::all_finite(params.data(), layout) && ::all_finite(m.data(), layout) && ::all_finite(v.data(), layout);
}

std::string recorded_dtype(const CheckpointInfo& info) {
  const auto found = info.state.find("dtype");
  for (const char* known : {"float32", "tf32", "bfloat16", "float16"})
    if (found != info.state.end() && found->second == known) return known;
  return "";
}

CheckpointWriter::CheckpointWriter(const Vocabulary& vocabulary, const Layout& layout)
    : vocabulary_(vocabulary),
      layout_(layout),
      snapshot_{Buffer<float>(layout), Buffer<float>(layout), Buffer<float>(layout)} {}

CheckpointWriter::~CheckpointWriter() {
  if (thread_.joinable()) thread_.join();
}

void CheckpointWriter::wait() {
  if (thread_.joinable()) thread_.join();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

bool CheckpointWriter::busy() {
  if (busy_) return true;
  wait();
  return false;
}

Snapshot& CheckpointWriter::snapshot() {
  wait();
  return snapshot_;
}

void CheckpointWriter::write(const CheckpointInfo& info, const std::string& last, const std::string& best) {
  wait();
  busy_ = true;
  thread_ = std::thread([this, info, last, best] {
    try {
      if (!best.empty()) save_checkpoint(best, info, vocabulary_, layout_, snapshot_.params.data(), nullptr, nullptr);
      save_checkpoint(last, info, vocabulary_, layout_, snapshot_.params.data(), snapshot_.m.data(),
                      snapshot_.v.data());
      saved_ = info.iteration;
    } catch (...) { error_ = std::current_exception(); }
    busy_ = false;
  });
}
