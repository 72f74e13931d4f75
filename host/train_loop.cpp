#include "train_loop.h"

#include "files.h"
#include "ngram.h"
#include "plot.h"
#include "pth.h"

Data open_data(const std::string& folder, const Vocabulary* expected) {
  Vocabulary vocabulary = Vocabulary::load(folder + "/vocab.json");
  if (expected && expected->hash() != vocabulary.hash())
    fail("the text in ", folder, " has another vocabulary (", vocabulary.size(), " characters) than the checkpoint (",
         expected->size(), " characters); point --data to the text that it was trained on");
  Tokens train(folder, "train", vocabulary), val(folder, "val", vocabulary);
  const std::string fingerprint = hash_text(train.fingerprint()) + hash_text(val.fingerprint());
  return {std::move(vocabulary), std::move(train), std::move(val), fingerprint};
}

std::string checkpoint_path(const Config& config) {
  if (config.checkpoint != "last" && config.checkpoint != "best") return config.checkpoint;
  return config.out_dir + "/ckpt_" + config.checkpoint + ".safetensors";
}

double flops_per_token(const ModelShape& s) {
  const double C = s.C, products = s.L * 12.0 * C * C + C * s.V;  // multiply-adds of the linear layers
  const double attention = s.L * 2.0 * C * (s.T + 1) / 2;         // of q.k and P.v, over the visible keys
  return 3 * 2 * (products + attention);
}

std::string flops_text(double flops, double peak) {
  char line[64];
  const bool tera = flops >= 1e12;
  const int n = std::snprintf(line, sizeof line, "%.1f %s", flops / (tera ? 1e12 : 1e9), tera ? "TFLOP/s" : "GFLOP/s");
  if (peak > 0) std::snprintf(line + n, sizeof line - size_t(n), ", %.0f %% of peak", 100 * flops / peak);
  return line;
}

RunFiles::RunFiles(const Config& config, int first_iteration)
    : config_(config), metrics_((make_folder(config.out_dir), path("metrics.jsonl")), first_iteration) {}

std::string RunFiles::path(const char* name) const { return config_.out_dir + "/" + name; }

bool RunFiles::plot(const std::string& title) {
  PlotData data;
  data.evals = metrics_.evals();
  data.iters = metrics_.iters();
  data.baselines = load_baselines(config_.data + "/baselines.json");
  data.title = title;
  return draw_plot(path("training_plot.png"), data);
}

std::vector<int> prompt_tokens(const Config& config, const Vocabulary& vocabulary) {
  if (!config.given.count("start")) return {0};  // the newline, in any text that has lines
  const bool from_file = config.start.rfind("FILE:", 0) == 0;
  const std::string prompt = from_file ? read_file(config.start.substr(5)) : config.start;
  if (prompt.empty()) fail("--start is empty: the model needs at least one character to go on from");
  const std::vector<uint16_t> tokens = vocabulary.encode(prompt, "--start");
  return {tokens.begin(), tokens.end()};
}

void export_pth(const std::string& path, const ModelShape& shape, const Layout& layout, const float* params) {
  // The course's model keeps the causal mask of every head as a buffer, so strict loading wants it: one storage for
  // all.
  const size_t T = shape.T;
  std::vector<float> tril(T * T);
  for (size_t q = 0; q < T; q++)
    for (size_t kv = 0; kv <= q; kv++) tril[q * T + kv] = 1;
  std::vector<TensorView> tensors;
  for (TensorView& view : export_views(shape, layout, params)) {
    const std::string value = ".value.weight";  // a head's last tensor
    const bool last_of_head = view.name.size() > value.size() && view.name.ends_with(value);
    const std::string head = view.name.substr(0, view.name.size() - value.size());
    tensors.push_back(std::move(view));
    if (last_of_head) tensors.push_back({head + ".tril", "F32", {T, T}, tril.data()});
  }
  write_pth(path, tensors);
}

int export_command(const Config& config) {
  const Checkpoint checkpoint(checkpoint_path(config));
  const ModelShape& shape = checkpoint.info().shape;
  const Layout layout = parameter_layout(shape);
  const Buffer<float> params(layout);
  checkpoint.load_params(params.data(), layout);
  make_folder(config.out_dir);
  const std::string path = config.out_dir + "/microGPT_model.pth";
  export_pth(path, shape, layout, params.data());
  std::fprintf(stderr, "wrote %s\n", path.c_str());
  return 0;
}
