#include "train_loop.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <limits>

#include "files.h"
#include "plot.h"
#include "pth.h"

namespace fs = std::filesystem;

Data open_data(const std::string& folder, const Vocabulary* expected) {
  Vocabulary vocabulary = Vocabulary::load(folder + "/vocab.json");
  if (expected && expected->hash() != vocabulary.hash())
    fail("the text in ", folder, " has another vocabulary (", vocabulary.size(), " characters, hash ",
         hash_text(vocabulary.hash()), ") than the checkpoint (", expected->size(), ", hash ",
         hash_text(expected->hash()), "); point --data to the text that it was trained on");
  Tokens train(folder, "train", vocabulary), val(folder, "val", vocabulary);
  const std::string fingerprint = hash_text(train.fingerprint()) + hash_text(val.fingerprint());
  return {std::move(vocabulary), std::move(train), std::move(val), fingerprint};
}

static std::string dtype_of(const CheckpointInfo& info) {
  const auto found = info.state.find("dtype");
  for (const char* known : {"float32", "tf32", "bfloat16", "float16"})
    if (found != info.state.end() && found->second == known) return known;
  return "";
}

void require_one_process() {
  // The innermost launcher comes first: mpirun starts its helpers by srun. Slurm counts the processes that the script of
  // a job may start in SLURM_NTASKS, those that srun did start in this one.
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    const char* size = std::getenv(name);
    if (!size || (name == std::string("WORLD_SIZE") && !std::getenv("RANK"))) continue;
    if (std::atoi(size) > 1)
      fail(name, " is ", size, ", but a training run is one process: start it without mpirun, srun or torchrun (runs ",
           "that have nothing to do with each other, each with an --out_dir of its own, start with that unset: env -u ",
           name, " ./train_gpt)");
    return;
  }
}

std::string dtype_so_far(const Config& config) {
  const auto dtype_in = [](const std::string& path) { return dtype_of(Checkpoint(path, Verify::header).info()); };
  if (config.command != "train") return dtype_in(checkpoint_path(config));
  return config.init_from == "resume" ? dtype_in(config.out_dir + "/ckpt_last.safetensors") : "";
}

void check_resumed(const Config& config, const Checkpoint& checkpoint, const Data& data) {
  const CheckpointInfo& info = checkpoint.info();
  if (info.data != data.fingerprint)
    fail("the checkpoint was trained on another text (", info.data, ") than the one in ", config.data, " (",
         data.fingerprint, "); point --data to that text, or choose another --out_dir for a new run");
  if (info.iteration > config.max_iters)
    fail("this run has done ", info.iteration, " iterations, more than --max_iters ", config.max_iters,
         "; raise it to go on, or sample, eval or export the run");
  if (info.iteration == config.max_iters && has_final(config.out_dir + "/metrics.jsonl", info.iteration))
    fail("this run has done its ", info.iteration,
         " iterations; raise --max_iters to go on, or sample, eval or export it");
  if (const std::string before = dtype_of(info); !before.empty() && before != config.dtype)
    std::fprintf(stderr, "going on in another type: %s -> %s\n", before.c_str(), config.dtype.c_str());
}

void set_aside_older_run(const std::string& out_dir) {
  const std::string last = out_dir + "/ckpt_last.safetensors";
  if (!fs::exists(last)) return;
  int iteration = -1;  // unless it can be read
  try {
    iteration = Checkpoint(last).info().iteration;
  } catch (const Error&) {}
  if (iteration == 0) return;  // it never got further than its start
  std::string folder;
  for (int n = 1; folder.empty() || fs::exists(folder); n++) folder = text(out_dir, "/run_", n);
  make_folder(folder);
  // The checkpoint goes last: after a crash on the way the next run moves the rest.
  for (const char* name : {"sample.txt", "metrics.jsonl", "training_plot.png", "microGPT_model.pth",
                           "ckpt_best.safetensors", "ckpt_last.safetensors"})
    if (fs::exists(out_dir + "/" + name)) move_file(out_dir + "/" + name, folder + "/" + name);
  flush_folder(folder);
  flush_folder(out_dir);
  std::fprintf(stderr, "%s held another run%s: it is in %s now; --init_from resume would have gone on with it\n",
               out_dir.c_str(), iteration > 0 ? text(" of ", iteration, " iterations").c_str() : "", folder.c_str());
}

void require_imaginable(const Config& config, const ModelShape& s, double available) {
  const double windows = double(config.batch_size) * config.gradient_accumulation_steps;
  if (windows > std::numeric_limits<int>::max())
    fail("--batch_size ", config.batch_size, " times --gradient_accumulation_steps ",
         config.gradient_accumulation_steps, " is more than ", std::numeric_limits<int>::max(), " windows a step");
  const double C = s.C, rows = double(config.batch_size) * s.T;
  const double params = C * (2.0 * s.V + s.T) + 12 * C * C * s.L;
  const double bytes = 4 * (params + rows * (10 * C * s.L + s.V));
  if (bytes < 1e15 && rows <= std::numeric_limits<int>::max()) return;
  fail("this run needs more than ", std::ceil(bytes / 1e9), " GB of memory, ", std::floor(available / 1e9),
       " GB are there; lower --batch_size and --block_size (", rows, " positions in a batch, at most ",
       std::numeric_limits<int>::max(), ") or --n_embd and --n_layer (", params, " parameters)");
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

std::string loss_text(double val_exact) {
  char line[64];
  std::snprintf(line, sizeof line, "%.4f (%.3f bits per character)", val_exact, val_exact / std::log(2.0));
  return line;
}

std::string fixed_name(uint64_t tokens, int T) {
  const uint64_t windows = fixed_windows(tokens, T);
  return windows == 0 ? "exact val loss" : text("val loss of ", windows, " fixed windows");
}

RunFiles::RunFiles(const Config& config, int first_iteration)
    : config_(config),
      baselines_(load_baselines(config.data + "/baselines.json")),
      metrics_(path("metrics.jsonl"), first_iteration) {}

std::string RunFiles::path(const char* name) const { return config_.out_dir + "/" + name; }

bool RunFiles::plot(const std::string& title, const IterPoint& end, const IterPoint& best,
                    const std::string& fixed_name) {
  PlotData data;
  data.evals = metrics_.evals();
  for (const EvalPoint& e : data.evals) data.fixed.push_back({e.iter, e.fixed});
  data.fixed.push_back(end);
  data.best = best;
  data.fixed_name = fixed_name;
  data.iters = metrics_.iters();
  data.baselines = baselines_;
  data.title = title;
  return draw_plot(path("training_plot.png"), data);
}

std::vector<int> prompt_tokens(const Config& config, const Vocabulary& vocabulary) {
  if (!config.given.count("start")) return {0};  // the newline, in any text that has lines
  const bool from_file = config.start.rfind("FILE:", 0) == 0;
  const std::string prompt = from_file ? read_file(config.start.substr(5)) : config.start;
  const std::vector<uint16_t> tokens = vocabulary.encode(prompt, "--start");
  if (tokens.empty()) fail("--start is empty: the model needs at least one character to go on from");
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
