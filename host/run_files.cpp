#include "run_files.h"

#include <cmath>
#include <cstdio>
#include <filesystem>

#include "error.h"
#include "files.h"
#include "plot.h"
#include "pth.h"

namespace fs = std::filesystem;

std::string checkpoint_path(const Config& config) {
  if (config.checkpoint != "last" && config.checkpoint != "best") return config.checkpoint;
  return config.out_dir + "/ckpt_" + config.checkpoint + ".safetensors";
}

void say_which(const ModelWeights& weights, const Config& config) {
  const CheckpointInfo& info = weights.info();
  std::fprintf(stderr, "weights: %s\n", weights.describe().c_str());
  if (config.checkpoint == "last" && info.best_iteration < info.iteration && std::isfinite(info.best_loss) &&
      fs::exists(best_checkpoint(config.out_dir)))
    std::fprintf(stderr,
                 "those of step %d, which --checkpoint best takes, have the lowest validation loss so far, %.4f\n",
                 info.best_iteration, info.best_loss);
}

void set_aside_older_run(const std::string& out_dir) {
  const std::string last = last_checkpoint(out_dir);
  if (!fs::exists(last)) return;
  int iteration = -1;  // unless it can be read
  try {
    iteration = Checkpoint(last).info().iteration;
  } catch (const Error&) {}
  if (iteration == 0) return;  // it never got further than its start
  std::string folder;
  for (int n = 1; folder.empty() || fs::exists(folder); n++) folder = text(out_dir, "/run_", n);
  make_folder(folder);
  // The algorithms that a GPU's products were measured with stay, and go along: the older run needs them to go on exactly.
  if (const std::string table = out_dir + "/matmul_algorithms.txt"; fs::exists(table))
    write_file(folder + "/matmul_algorithms.txt", read_file(table));
  // The checkpoint goes last: after a crash on the way the next run moves the rest.
  for (const char* name : {"microGPT.html", "sample.txt", "metrics.jsonl", "training_plot.png", "microGPT_model.pth",
                           "ckpt_best.safetensors", "ckpt_last.safetensors"})
    if (fs::exists(out_dir + "/" + name)) move_file(out_dir + "/" + name, folder + "/" + name);
  flush_folder(folder);
  flush_folder(out_dir);
  std::fprintf(stderr, "%s held another run%s: it is in %s now; --init_from resume would have gone on with it\n",
               out_dir.c_str(), iteration > 0 ? text(" of ", iteration, " iterations").c_str() : "", folder.c_str());
}

RunFiles::RunFiles(const Config& config, int first_iteration)
    : config_(config),
      baselines_(load_baselines(config.data + "/baselines.json")),
      metrics_(path("metrics.jsonl"), first_iteration) {}

std::string RunFiles::path(const char* name) const { return config_.out_dir + "/" + name; }

bool RunFiles::plot(const std::string& title, const IterPoint& end, const IterPoint& best,
                    const std::string& fixed_name) {
  PlotData data;
  data.evals = metrics_.record().evals;
  for (const EvalPoint& e : data.evals) data.fixed.push_back({e.iter, e.fixed});
  data.fixed.push_back(end);
  data.best = best;
  data.fixed_name = fixed_name;
  data.iters = metrics_.record().iters;
  data.baselines = baselines_;
  data.title = title;
  return draw_plot(path("training_plot.png"), data);
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
