#include "run.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <tuple>

#include "error.h"
#include "evaluation.h"
#include "files.h"
#include "page.h"
#include "ranks.h"
#include "sampler.h"
#include "signals.h"
#include "version.h"

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

// Whether --patience ends the run at this iteration.
static bool out_of_patience(const Config& config, const CheckpointInfo& info) {
  const int64_t since_best = int64_t(info.iteration) - info.best_iteration;
  return config.patience > 0 && info.iteration % config.eval_interval == 0 &&
         since_best >= int64_t(config.patience) * config.eval_interval;
}

// Refuses to go on with another text, or with a run that is complete. Says so if the type of arithmetic has changed.
static void check_resumed(const Config& config, const Checkpoint& checkpoint, const Data& data) {
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
  if (out_of_patience(config, info) && has_final(config.out_dir + "/metrics.jsonl", info.iteration))
    fail("this run has ended after ", info.iteration, " iterations, because --patience ", config.patience,
         " evaluations brought no lower validation loss; --patience 0 goes on, or sample, eval or export it");
  if (const std::string before = recorded_dtype(info); !before.empty() && before != config.dtype)
    std::fprintf(stderr, "going on in another type: %s -> %s\n", before.c_str(), config.dtype.c_str());
}

static double seconds_since(std::chrono::steady_clock::time_point then) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - then).count();
}

// The beginning of the first line that is not empty, up to the end of a word.
static std::string first_line(const std::string& text) {
  const size_t begin = std::min(text.find_first_not_of('\n'), text.size());
  const std::string line = text.substr(begin, text.find('\n', begin) - begin);
  return line.size() > 72 ? line.substr(0, line.find(' ', 60)) : line;
}

static int64_t ceil_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---------------------------------------------------------------------------------------------------------------------
// Before the first step

std::unique_ptr<Checkpoint> TrainingRun::open_resumed(Config& config) {
  if (config.init_from != "resume") return nullptr;
  auto resumed = std::make_unique<Checkpoint>(last_checkpoint(config.out_dir));
  for (const std::string& change : apply_settings(config, resumed->info().settings))
    std::fprintf(stderr, "going on with another value of %s\n", change.c_str());
  return resumed;
}

// --init_from FILE: the new run has the shape of the model in the file, except that it may have another block_size.
std::unique_ptr<ModelWeights> TrainingRun::open_weights(Config& config) {
  if (config.init_from == "scratch" || config.init_from == "resume") return nullptr;
  if (!std::filesystem::exists(config.init_from))
    fail("--init_from ", config.init_from,
         ": there is no such file; scratch begins with random weights, and resume goes ",
         "on with ckpt_last in --out_dir");
  auto weights = std::make_unique<ModelWeights>(config.init_from);
  const ModelShape& s = weights->info().shape;
  for (const auto& [name, mine, theirs] : {std::tuple{"n_layer", &config.n_layer, s.L},
                                           {"n_head", &config.n_head, s.NH},
                                           {"n_embd", &config.n_embd, s.C},
                                           {"block_size", &config.block_size, s.T}}) {
    if (!config.given.count(name))
      *mine = theirs;
    else if (*mine != theirs && mine != &config.block_size)
      fail("--", name, " is ", *mine, ", but the model in ", weights->path(), " has ", theirs,
           "; leave the flag out to begin with that model");
  }
  return weights;
}

// Divides the batches of a step until each rank has one, into as few pieces as possible.
static void divide_batches(Config& config, int ranks) {
  const int windows = config.batch_size, batches = config.gradient_accumulation_steps;
  if (batches >= ranks) return;
  for (int pieces = 2; pieces <= windows; pieces++) {
    if (windows % pieces != 0 || int64_t(batches) * pieces < ranks) continue;
    config.batch_size = windows / pieces;
    config.gradient_accumulation_steps = batches * pieces;
    std::fprintf(stderr,
                 "%d processes share a step: --batch_size %d --gradient_accumulation_steps %d. With these two numbers "
                 "one process makes the same run\n",
                 ranks, config.batch_size, config.gradient_accumulation_steps);
    return;
  }
  fail(ranks, " processes cannot share the ", int64_t(windows) * batches, " windows of a step (--batch_size times ",
       "--gradient_accumulation_steps): start fewer, or raise one of them");
}

TrainingRun::TrainingRun(const TrainerType& type, Config config)
    : config_(std::move(config)),
      resumed_(ranks().agree([&] { return open_resumed(config_); })),
      begin_with_(ranks().agree([&] { return open_weights(config_); })),
      data_(ranks().agree([&] { return open_data(config_.data, resumed_ ? &resumed_->vocabulary() : nullptr); })),
      shape_(ranks().agree([&] { return model_shape(config_, data_.vocabulary.size()); })) {
  ranks().agree([&] { check(); });
  ranks().require_same(version_text(), "program");
  ranks().require_same(print_config(config_), "settings");
  ranks().require_same(data_.fingerprint, "text");
  ranks().agree([&] { prepare(type); });
  if (first_params_.data())
    ranks().require_same(hash_text(checksum(first_params_.data(), 4 * parameter_layout(shape_).size())), "weights");
  make_trainer(type);
  prepare_parameters();
  ranks().agree([&] {
    if (ranks().first()) files_.emplace(config_, info_.iteration);
  });
  start_ = last_save_ = Clock::now();
}

// Refuses what cannot work.
void TrainingRun::check() {
  data_.train.require_window(shape_.T);
  data_.val.require_window(shape_.T);
  if (resumed_) check_resumed(config_, *resumed_, data_);
  divide_batches(config_, ranks().count());
}

void TrainingRun::prepare(const TrainerType& type) {
  std::fprintf(stderr, "%s\n", print_config(config_).c_str());
  std::fprintf(stderr, "%s\n", possible_plan(type, config_, shape_, &data_, true).print().c_str());
  if (begin_with_) load_first_params();
  if (ranks().first()) {
    make_folder(config_.out_dir);
    lock_.emplace(config_.out_dir);
    if (!resumed_) set_aside_older_run(config_.out_dir);
  }
}

// Makes the parameters that a run with --init_from FILE begins with: first random ones, then the file's in their place.
// Says which ones stay random.
void TrainingRun::load_first_params() {
  const Layout layout = parameter_layout(shape_);
  first_params_ = Buffer<float>(layout);
  init_parameters(first_params_.data(), layout, config_.seed);
  const TakenOver rest = take_over(first_params_.data(), shape_, data_.vocabulary, *begin_with_,
                                   vocabulary_of(*begin_with_, config_.data));
  std::fprintf(stderr, "a new run, with the weights of %s\n", begin_with_->describe().c_str());
  const auto say = [](const std::vector<char32_t>& characters, const char* one, const char* many) {
    if (characters.empty()) return;
    std::string names;
    for (size_t i = 0; i < std::min<size_t>(characters.size(), 40); i++) names += " " + shown(characters[i]);
    std::fprintf(stderr, "%zu %s:%s%s\n", characters.size(), characters.size() == 1 ? one : many, names.c_str(),
                 characters.size() > 40 ? " ..." : "");
  };
  say(rest.fresh, "character is new to the model and begins at random",
      "characters are new to the model and begin at random");
  say(rest.dropped, "of the model's characters does not occur in this text and is left out",
      "of the model's characters do not occur in this text and are left out");
  const int T = shape_.T, theirs = begin_with_->info().shape.T;
  if (T == theirs + 1) std::fprintf(stderr, "its position %d begins at random\n", theirs);
  if (T > theirs + 1) std::fprintf(stderr, "its positions %d to %d begin at random\n", theirs, T - 1);
  if (T < theirs) std::fprintf(stderr, "of its %d positions the first %d are kept\n", theirs, T);
  begin_with_.reset();
}

// All ranks together, because their trainers may exchange something already.
void TrainingRun::make_trainer(const TrainerType& type) {
  trainer_ = type.make(config_, shape_, &data_, true);
  const Layout& layout = trainer_->layout();
  std::fprintf(stderr, "%zu parameters, %.1f MFLOP a token, %s\n", layout.count(), flops_per_token(shape_) / 1e6,
               trainer_->describe().c_str());

  info_.shape = shape_;
  info_.settings = recorded_settings(config_);
  info_.best_loss = std::numeric_limits<double>::infinity();
  info_.data = data_.fingerprint;
  writer_.emplace(data_.vocabulary, layout);
}

// Fills the trainer with the parameters and moments of the checkpoint, or of a new run.
void TrainingRun::prepare_parameters() {
  Snapshot& start = writer_->snapshot();
  const Layout& layout = trainer_->layout();
  if (resumed_) {
    info_.iteration = resumed_->info().iteration;
    info_.best_loss = resumed_->info().best_loss;
    info_.best_iteration = resumed_->info().best_iteration;
    if (std::isnan(info_.best_loss)) score_best_again();
    ranks().agree([&] {
      resumed_->load_params(start.params.data(), layout);
      resumed_->load_moments(start.m.data(), start.v.data(), layout);
      trainer_->set_state(resumed_->info().state);
    });
    resumed_.reset();
    std::fprintf(stderr, "going on at iteration %d\n", info_.iteration);
  } else {
    if (first_params_.data())
      std::copy_n(first_params_.data(), layout.size(), start.params.data());
    else
      init_parameters(start.params.data(), layout, config_.seed);
    first_params_ = {};
  }
  trainer_->restore(start.params.data(), start.m.data(), start.v.data());
}

// A checkpoint of an older program has the loss of random batches for its best weights. That cannot be compared with the
// loss of the fixed windows, so these score the weights again. Afterwards the trainer has those weights.
void TrainingRun::score_best_again() {
  info_.best_loss = std::numeric_limits<double>::infinity();
  const std::string path = best_checkpoint(config_.out_dir);
  if (!std::filesystem::exists(path)) return;
  const Buffer<float> params(trainer_->layout());
  const int iteration = ranks().agree([&] {  // -1: it is another run's
    const Checkpoint best(path);
    if (best.info().shape != info_.shape || best.info().data != info_.data) return -1;
    best.load_params(params.data(), trainer_->layout());
    return best.info().iteration;
  });
  if (iteration < 0) return;
  trainer_->restore(params.data(), nullptr, nullptr);
  info_.best_loss = fixed_val_loss();
  info_.best_iteration = iteration;
}

// ---------------------------------------------------------------------------------------------------------------------
// The loop

int TrainingRun::go() {
  catch_signals(ranks().count() > 1);
  const std::string last = last_checkpoint(config_.out_dir);
  try {
    try {
      train();
    } catch (const Interrupted&) {
      if (saved_iteration_ != info_.iteration) save(false);
      writer_->wait();
      std::fprintf(stderr, "\nstopped before iteration %d and saved; --init_from resume goes on\n", info_.iteration);
    }
  } catch (const NotFinite& bad) {
    writer_->wait();
    if (info_.iteration == 0 && saved_iteration_ < 0) ranks().fail_alike(bad.what + " from the start");
    if (ranks().count() > 1)
      ranks().fail_alike(text(bad.what, ". ", last, " is the last good state; one process that goes on from it by ",
                              "--init_from resume repeats these steps and says where it began"));
    std::fprintf(stderr, "%s; the steps since the last checkpoint are repeated, to see where it began\n",
                 bad.what.c_str());
    fail(bad.what, "; ", find_not_finite(bad), ". ", last, " is the last good state; ",
         "--init_from resume with a lower --learning_rate, or with --grad_clip 1, may get further");
  } catch (const Error& error) {
    if (writer_->saved() < 0) throw;
    fail(error.what(), "; ", last, " is whole, --init_from resume goes on at iteration ", writer_->saved());
  }
  return stop_signal() ? 128 + stop_signal() : 0;
}

void TrainingRun::train() {
  ProgressBar bar("train", uint64_t(config_.max_iters), "it");
  bar.update(uint64_t(info_.iteration));
  while (info_.iteration < config_.max_iters) {
    if (judged() || info_.iteration == config_.max_iters - 1) {
      bar.clear();
      evaluate_and_save();
      if (out_of_patience(config_, info_)) break;
    } else if (checkpoint_is_due()) {
      save(false);
    }
    if (stopped()) throw Interrupted();
    step(bar);
    if ((info_.iteration - 1) % config_.log_interval == 0) {
      bar.clear();
      log();
    }
  }
  bar.finish();
  if (info_.iteration < config_.max_iters)
    std::fprintf(stderr, "no lower validation loss since step %d: the run ends here (--patience)\n",
                 info_.best_iteration);
  finish();
}

// Whether the fixed windows score the weights before this iteration. The last evaluation leaves that out, unless it is
// due anyway: the weights after the last step are scored instead. So a run that is made longer afterwards has judged
// the same weights as one that was long from the start, if it had ended where that one evaluates.
bool TrainingRun::judged() const { return info_.iteration % config_.eval_interval == 0; }

// Rank 0 decides, by its clock.
bool TrainingRun::checkpoint_is_due() {
  const bool due = ranks().first() && !writer_->busy() && config_.checkpoint_secs > 0 &&
                   seconds_since(last_save_) >= config_.checkpoint_secs;
  return ranks().all(char(due))[0];
}

// Whether a signal has come to one of the ranks.
bool TrainingRun::stopped() {
  const std::vector<int> signals = ranks().all(stop_signal());
  return *std::max_element(signals.begin(), signals.end()) > 0;
}

void TrainingRun::evaluate_and_save() {
  const int iteration = info_.iteration;
  EvalPoint point = evaluate(*trainer_, config_, iteration);
  if (judged()) point.fixed = fixed_val_loss();
  if (!std::isfinite(point.train) || !std::isfinite(point.val) || (judged() && !std::isfinite(point.fixed)))
    throw NotFinite{text("the losses of the evaluation before iteration ", iteration, " are not finite"), iteration - 1,
                    true};
  std::printf("step %d: train loss %.4f, val loss %.4f\n", iteration, point.train, point.val);
  if (files_ && config_.sample_chars > 0) {
    point.sample = sample(config_.sample_chars, [](const std::string&) {});
    std::fprintf(stderr, "it writes: %s\n", first_line(point.sample).c_str());
  }
  if (files_) files_->metrics().add_eval(point);
  save(judged() && note_if_best(point.fixed));
}

// As many steps as the trainer likes to do at once, up to the next line of the log or the next evaluation.
void TrainingRun::step(ProgressBar& bar) {
  const int iteration = info_.iteration, last = config_.max_iters - 1;
  const int64_t next_log = ceil_to(iteration, config_.log_interval) + 1;
  const int64_t next_eval =
      std::min<int64_t>(ceil_to(iteration + 1, config_.eval_interval), std::max(last, iteration + 1));
  const int count = int(std::min<int64_t>({trainer_->chunk(), next_log - iteration, next_eval - iteration}));
  const Clock::time_point before = Clock::now();
  const std::vector<float> losses = trainer_->train_steps(iteration, count);
  for (int i = 0; i < count; i++)
    if (!std::isfinite(losses[size_t(i)]))
      throw NotFinite{text("the loss of iteration ", iteration + i, " is not finite (", losses[size_t(i)], ")"),
                      iteration + i};
  step_seconds_ += seconds_since(before);
  steps_ += count;
  info_.iteration += count;
  newest_loss_ = losses.back();
  bar.update(uint64_t(info_.iteration), text("loss ", std::round(newest_loss_ * 1e4) / 1e4));
}

// A line about the newest step; times are means over the steps since the line before.
void TrainingRun::log() {
  const int newest = info_.iteration - 1;
  const double tokens = double(config_.batch_size) * config_.gradient_accumulation_steps * shape_.T;  // of a step
  const double each = step_seconds_ / steps_, rate = tokens / each, flops = rate * flops_per_token(shape_);
  std::printf("iter %d: loss %.4f, time %.2fms, %.0f tokens/s, %s\n", newest, newest_loss_, each * 1e3, rate,
              flops_text(flops, trainer_->peak_flops()).c_str());
  if (files_) files_->metrics().add_iter(newest, newest_loss_, trainer_->learning_rate(newest), each * 1e3, rate);
  step_seconds_ = steps_ = 0;
}

// What a finished run leaves besides its checkpoints. The record's last line comes last: a run without it finishes when
// it goes on.
void TrainingRun::finish() {
  const double train_seconds = seconds_since(start_);
  const double val_fixed = fixed_val_loss();
  if (!std::isfinite(val_fixed))
    throw NotFinite{text("the loss after iteration ", info_.iteration - 1, " is not finite"), info_.iteration - 1,
                    true};
  save(note_if_best(val_fixed));

  const double val_exact = fixed_windows(data_.val.size(), shape_.T) == 0
                               ? val_fixed
                               : exact_loss(*trainer_, Split::val, data_.val.size(), config_.batch_size);
  if (!ranks().first()) return;
  std::printf("val exact: %s\n", loss_text(val_exact).c_str());
  if (val_fixed - info_.best_loss > 0.01)
    std::fprintf(
        stderr,
        "step %d had a lower loss, %.4f instead of %.4f. Its weights are in ckpt_best: sample, eval, export and "
        "page take them with --checkpoint best, and ckpt_last without it\n",
        info_.best_iteration, info_.best_loss, val_fixed);
  const Layout& layout = trainer_->layout();
  export_pth(files_->path("microGPT_model.pth"), shape_, layout, writer_->snapshot().params.data());
  const bool plotted = files_->plot(text("microGPT, ", layout.count(), " parameters"), {info_.iteration, val_fixed},
                                    {info_.best_iteration, info_.best_loss}, fixed_name(data_.val.size(), shape_.T));
  const FinalPoint final = {info_.iteration, val_exact, train_seconds, val_fixed};
  if (config_.page) {
    PageRecord record = page_record(data_, config_.data, shape_.T);
    record.run = files_->metrics().record();
    record.run.final = final;
    write_page(files_->path("microGPT.html"), info_, data_.vocabulary, layout, writer_->snapshot().params.data(),
               record);
  }
  std::fprintf(stderr, "trained in %s; 500 characters from the last weights:\n", duration(train_seconds).c_str());
  write_sample();
  files_->metrics().add_final(final);
  files_->metrics().flush();
  std::fprintf(
      stderr,
      "in %s: ckpt_last.safetensors, ckpt_best.safetensors, microGPT_model.pth, %s%smetrics.jsonl, sample.txt\n",
      config_.out_dir.c_str(), plotted ? "training_plot.png, " : "",
      config_.page ? "microGPT.html (open it in a browser), " : "");
}

// What the weights write, always from the same random numbers. A signal cuts it short.
std::string TrainingRun::sample(int count, const std::function<void(const std::string& piece)>& show) {
  std::string sample;
  generate(*trainer_, {0}, {count, {1.0, 0}, config_.seed, 0}, [&](int, int token) {
    const std::string piece = data_.vocabulary.decode(token);
    sample += piece;
    show(piece);
    return !stop_signal();
  });
  return sample;
}

// Prints the sample while it grows; a signal ends it, and then it is not written.
void TrainingRun::write_sample() {
  const std::string text = sample(500, [](const std::string& piece) {
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
  });
  std::printf("\n");
  if (stop_signal()) throw Interrupted();
  write_file(files_->path("sample.txt"), text + "\n");
}

// ---------------------------------------------------------------------------------------------------------------------
// What the loop's parts share

double TrainingRun::fixed_val_loss() { return fixed_loss(*trainer_, Split::val, data_.val.size(), config_.batch_size); }

// Notes in info_ whether this is the lowest loss so far, and says so.
bool TrainingRun::note_if_best(double loss) {
  const bool best = loss < info_.best_loss;
  if (best) info_.best_loss = loss, info_.best_iteration = info_.iteration;
  std::fprintf(stderr, "%s: %.4f, %s\n", fixed_name(data_.val.size(), shape_.T).c_str(), loss,
               info_.best_iteration == info_.iteration
                   ? "the best so far"
                   : text("the best is that of step ", info_.best_iteration).c_str());
  return best;
}

// Copies the weights and moments into the writer's buffers, and what a checkpoint says of them into info_.
Snapshot& TrainingRun::take_snapshot() {
  Snapshot& snapshot = writer_->snapshot();
  trainer_->snapshot(snapshot.params.data(), snapshot.m.data(), snapshot.v.data());
  const bool finite = !ranks().first() || snapshot.all_finite(trainer_->layout());  // rank 0 alone has all of it
  if (!ranks().all(char(finite))[0])
    throw NotFinite{text("the weights after iteration ", info_.iteration - 1, " are not finite"), info_.iteration - 1};
  info_.state = trainer_->state();
  info_.state["dtype"] = config_.dtype;
  return snapshot;
}

// Writes ckpt_last, and ckpt_best too if best, in the background.
void TrainingRun::save(bool best) {
  take_snapshot();
  last_save_ = Clock::now();
  saved_iteration_ = info_.iteration;
  if (!ranks().first()) return;
  files_->metrics().flush();  // a checkpoint never knows of an iteration that the record does not
  writer_->write(info_, last_checkpoint(config_.out_dir), best ? best_checkpoint(config_.out_dir) : "");
}

// Repeats the steps of a run since its last checkpoint one by one, up to the bad one, and says which step and which of
// its tensors were the first with a number that is not finite. A run is a function of its checkpoint and its settings,
// so that what went wrong goes wrong again; if not, it was no mistake in the numbers.
std::string TrainingRun::find_not_finite(const NotFinite& bad) {
  const Checkpoint good(last_checkpoint(config_.out_dir));
  const Layout& layout = trainer_->layout();
  const Snapshot now{Buffer<float>(layout), Buffer<float>(layout), Buffer<float>(layout)};
  good.load_params(now.params.data(), layout);
  good.load_moments(now.m.data(), now.v.data(), layout);
  trainer_->restore(now.params.data(), now.m.data(), now.v.data());
  trainer_->set_state(good.info().state);
  for (int i = good.info().iteration; i <= bad.iteration && !stop_signal(); i++) {
    const float loss = trainer_->train_steps(i, 1)[0];
    trainer_->snapshot(now.params.data(), now.m.data(), now.v.data());
    if (std::isfinite(loss) && now.all_finite(layout)) continue;
    std::string tensor = trainer_->first_not_finite();
    for (const auto& [buffer, what] : {std::pair{now.m.data(), "AdamW's m of "},
                                       {now.v.data(), "AdamW's v of "},
                                       {now.params.data(), "the weights "}})
      if (const std::string name = first_not_finite(buffer, layout, Order::backward); tensor.empty() && !name.empty())
        tensor = what + name;
    return text("it began in iteration ", i, tensor.empty() ? "" : " with ", tensor);
  }
  if (stop_signal()) return "where it began was not looked for to the end";
  if (bad.evaluation) return "the weights are finite, but too large";
  return "it did not come back when the steps were repeated: memory or processor may be faulty";
}
