#include "config.h"

#include <algorithm>
#include <vector>

#include "error.h"

namespace {

// The commands that take a flag, and what else is true of it. Each is a bit.
enum Mark : unsigned {
  train = 1,
  sample = 2,
  eval = 4,
  export_ = 8,
  page = 16,
  recorded = 32,  // a checkpoint records its value
  fixed = 64,     // a resumed run cannot change it: the model's shape; the optimizer, whose moments it goes on with
  later = 128,    // checkpoints of older programs do not record it; their runs had its default
};
constexpr unsigned computing = train | sample | eval;

struct CommandFlag {
  unsigned marks;
  Flag flag;
  bool has(unsigned mark) const { return marks & mark; }
};

const std::vector<std::pair<std::string, Mark>> commands = {
    {"train", train}, {"sample", sample}, {"eval", eval}, {"export", export_}, {"page", page}};

// clang-format off
std::vector<CommandFlag> flags(Config& c) {
  return {
      {train, {"preset", &c.preset, 0, 0, {"auto", "lecture", "small", "best"},
               "ready-made settings; auto: lecture on a GPU, small on a CPU; best: the lowest loss that we know"}},
      {computing | page, {"data", &c.data, 0, 0, {}, "folder with the token shards that data_prep wrote"}},
      {computing | export_ | page, {"out_dir", &c.out_dir, 0, 0, {}, "folder for checkpoints, samples, metrics and the plot"}},
      {train, {"init_from", &c.init_from, 0, 0, {},
               "scratch, a new run; resume, go on with ckpt_last in out_dir; or a file, whose weights begin a new run"}},
      {sample | eval | export_ | page, {"checkpoint", &c.checkpoint, 0, 0, {},
                                        "which checkpoint of out_dir, last or best, or the path of one"}},
      {train | recorded | fixed, {"n_layer", &c.n_layer, 1, 2e9, {}, "transformer blocks, one after the other"}},
      {train | recorded | fixed, {"n_head", &c.n_head, 1, 2e9, {}, "attention heads in each block"}},
      {train | recorded | fixed, {"n_embd", &c.n_embd, 1, 2e9, {}, "channels of the residual stream"}},
      {train | recorded | fixed, {"block_size", &c.block_size, 1, 2e9, {}, "tokens of context that the model sees"}},
      {train | recorded, {"dropout", &c.dropout, 0, 0.99, {}, "probability that training drops an activation"}},
      {train | eval | recorded, {"batch_size", &c.batch_size, 1, 2e9, {}, "sequences in a batch"}},
      {train | recorded, {"gradient_accumulation_steps", &c.gradient_accumulation_steps, 1, 2e9, {},
                          "batches whose gradients make one step"}},
      {train | recorded | later, {"batches", &c.batches, 0, 0, {"random", "shuffled"},
                                  "windows from anywhere in the text, or the text cut into windows and shuffled, anew in each epoch"}},
      {train | recorded, {"max_iters", &c.max_iters, 1, 2e9, {}, "training steps in all"}},
      {train | recorded, {"eval_interval", &c.eval_interval, 1, 2e9, {}, "steps between evaluations"}},
      {train | eval | recorded, {"eval_iters", &c.eval_iters, 1, 1e6, {},
                                 "random batches of each split in an evaluation"}},
      {train | recorded | later, {"patience", &c.patience, 0, 2e9, {},
                          "evaluations without a lower validation loss that end the run; 0: it goes on"}},
      {train | recorded, {"log_interval", &c.log_interval, 1, 2e9, {}, "steps between lines with the loss"}},
      {train | recorded | later, {"sample_chars", &c.sample_chars, 0, 10000, {},
                          "characters that each evaluation writes into metrics.jsonl; 0: none"}},
      {train, {"page", &c.page, 0, 0, {}, "whether the run ends by writing microGPT.html"}},
      {train, {"checkpoint_secs", &c.checkpoint_secs, 0, no_limit, {},
               "seconds between checkpoints; 0: only at evaluations"}},
      {train | recorded | later | fixed, {"optimizer", &c.optimizer, 0, 0, {"adamw", "muon"},
                                  "what updates the matrices inside the layers; AdamW updates the rest, at the same rate"}},
      {train | recorded, {"learning_rate", &c.learning_rate, 0, 10, {},
                          "the optimizer's step size, after warm-up and before decay"}},
      {train | recorded, {"decay_lr", &c.decay_lr, 0, 0, {},
                          "whether the learning rate falls to min_lr"}},
      {train | recorded | later, {"lr_decay", &c.lr_decay, 0, 0, {"cosine", "linear"}, "how it falls: along half a cosine, or a straight line"}},
      {train | recorded, {"warmup_iters", &c.warmup_iters, 0, 2e9, {},
                          "first steps, over which the learning rate rises"}},
      {train | recorded, {"lr_decay_iters", &c.lr_decay_iters, 0, 2e9, {},
                          "step at which min_lr is reached; 0: max_iters"}},
      {train | recorded, {"min_lr", &c.min_lr, 0, 10, {}, "learning rate after the decay"}},
      {train | recorded, {"weight_decay", &c.weight_decay, 0, 10, {},
                          "how strongly an update pulls every parameter towards 0"}},
      {train | recorded, {"beta1", &c.beta1, 0, 0.999999, {}, "decay of AdamW's running mean of the gradient"}},
      {train | recorded, {"beta2", &c.beta2, 0, 0.999999, {}, "decay of AdamW's running mean of the squared gradient"}},
      {train | recorded, {"grad_clip", &c.grad_clip, 0, no_limit, {}, "largest norm of the gradient; 0: no clipping"}},
      {eval, {"stride", &c.stride, 0, 2e9, {},
              "tokens from a window of the exact loss to the next; 0: block_size, so that none is in two windows"}},
      {sample, {"start", &c.start, 0, 0, {}, "text to go on from, or FILE:path of a file with it"}},
      {sample, {"num_samples", &c.num_samples, 1, 1e6, {}, "texts to make"}},
      {sample, {"max_new_tokens", &c.max_new_tokens, 1, 2e9, {}, "characters to add"}},
      {sample, {"temperature", &c.temperature, 0, 100, {}, "0: always the likeliest; 1: as learned; higher: wilder"}},
      {sample, {"top_k", &c.top_k, 0, 65535, {}, "choose among the k likeliest; 0: among all"}},
      {computing, {"device", &c.device, 0, 0, {"auto", "cuda", "cpu"},
                   "where to compute; cuda never falls back to cpu"}},
      {computing, {"dtype", &c.dtype, 0, 0, {"auto", "float32", "tf32", "bfloat16", "float16"},
                   "type of the matrix products; auto: 16 bits on a GPU, and on a CPU where they are faster"}},
      {computing, {"threads", &c.threads, 0, 1024, {},
                   "threads of the CPU; 0: one for each core. Results do not depend on it"}},
      {train, {"comm_timeout", &c.comm_timeout, 1, 1e6, {},
               "seconds that a process of a run under MPI waits for the others"}},
      {computing | recorded, {"seed", &c.seed, 0, no_limit, {}, "of all random numbers: the same seed, the same run"}},
  };
}
// clang-format on

std::vector<std::string> command_names() {
  std::vector<std::string> names;
  for (const auto& [name, mark] : commands) names.push_back(name);
  return names;
}

Mark mark_of(const std::string& command) {
  for (const auto& [name, mark] : commands)
    if (name == command) return mark;
  fail("there is no command ", command);
}

std::vector<Flag> flags_of(Config& config, const std::string& command) {
  std::vector<Flag> chosen;
  for (const CommandFlag& f : flags(config))
    if (f.has(mark_of(command))) chosen.push_back(f.flag);
  return chosen;
}

using Settings = std::vector<std::pair<std::string, std::string>>;  // a flag and its value

// The preset `lecture` is Config's own values. `small` is what two CPU cores with AVX-512 train in two to three minutes;
// doc/leaderboard.md says what its settings brought.
const Settings small_preset = {
    {"n_layer", "4"},     {"n_head", "4"},         {"n_embd", "128"},       {"block_size", "128"},
    {"dropout", "0"},     {"batch_size", "16"},    {"batches", "shuffled"}, {"max_iters", "3000"},
    {"eval_iters", "20"}, {"log_interval", "100"}, {"optimizer", "muon"},   {"learning_rate", "5e-3"},
    {"decay_lr", "true"}, {"lr_decay", "linear"},  {"min_lr", "0"},         {"warmup_iters", "100"},
    {"beta2", "0.99"},    {"weight_decay", "0.1"}, {"grad_clip", "1"},
};

// `best` is the preset small but for these. It has the lowest loss that we know, at three times the price.
const Settings best_preset = {{"n_layer", "6"}, {"n_head", "6"}, {"n_embd", "192"}, {"learning_rate", "3e-3"}};

// What a preset says that Config's own values do not, in this order: the last value of a flag holds.
Settings settings_of(const std::string& preset) {
  if (preset != "small" && preset != "best") return {};
  Settings settings = small_preset;
  if (preset == "best") settings.insert(settings.end(), best_preset.begin(), best_preset.end());
  return settings;
}

// " (small: 4, best: 6)" for the flag of a preset that says something else than the default.
std::string values_in_presets(const std::string& flag) {
  std::string values;
  for (const auto& [preset, settings] : {std::pair("small", &small_preset), std::pair("best", &best_preset)})
    for (const auto& [name, value] : *settings)
      if (name == flag) values += text(values.empty() ? " (" : ", ", preset, ": ", value);
  return values.empty() ? "" : values + ")";
}

[[noreturn]] void refuse_unknown(const std::string& name, Config& config) {
  std::vector<std::string> names = {"help", "version"};
  for (const CommandFlag& f : flags(config)) {
    if (f.flag.name == name) {
      std::string others;
      for (const auto& [other, mark] : commands)
        if (f.has(mark)) others += (others.empty() ? "" : ", ") + other;
      fail("--", name, " is a flag of ", others, ", not of ", config.command);
    }
    if (f.has(mark_of(config.command))) names.push_back(f.flag.name);
  }
  fail("--", name, " is not a flag of ", config.command, "; the nearest is --", nearest(name, names), ", see --help");
}

}  // namespace

Config parse_command_line(int argc, char** argv) {
  Config config;
  std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  if (!arguments.empty() && !arguments[0].empty() && arguments[0][0] != '-') {
    config.command = arguments[0];
    const std::vector<std::string> names = command_names();
    if (std::find(names.begin(), names.end(), config.command) == names.end())
      fail("'", config.command, "' is not a command (train, sample, eval, export, page); the nearest is ",
           nearest(config.command, names));
    arguments.erase(arguments.begin());
  }
  config.given = parse_flags(arguments, flags_of(config, config.command),
                             [&](const std::string& name) { refuse_unknown(name, config); });
  config.help = config.given.count("help");
  config.version = config.given.count("version");
  return config;
}

Flag config_flag(Config& config, const std::string& name) {
  for (const CommandFlag& f : flags(config))
    if (f.flag.name == name) return f.flag;
  fail("there is no flag ", name);
}

void apply_preset(Config& config, const std::string& preset) {
  config.preset = preset;
  for (const auto& [name, value] : settings_of(preset))
    if (!config.given.count(name)) set_flag(config_flag(config, name), value);
}

std::string help_text(const std::string& command) {
  std::string out =
      text("usage: ./train_gpt [train | sample | eval | export | page] [--flag value | --flag=value ...]\n\n",
           "flags of ", command, ", with their defaults:\n");
  Config defaults;
  for (const Flag& flag : flags_of(defaults, command))
    out += help_line(flag, command == "train" ? values_in_presets(flag.name) : "");
  return out +
         "\n  --help with another command shows that command's flags\n"
         "  --version says what to add to a report of a fault: versions, compilers, cards\n";
}

std::vector<std::string> recorded_flags() {
  std::vector<std::string> names;
  Config config;
  for (const CommandFlag& f : flags(config))
    if (f.has(recorded)) names.push_back(f.flag.name);
  return names;
}

std::map<std::string, std::string> recorded_settings(const Config& config) {
  std::map<std::string, std::string> settings;
  Config copy = config;
  for (const CommandFlag& f : flags(copy))
    if (f.has(recorded)) settings[f.flag.name] = flag_value(f.flag);
  return settings;
}

std::map<std::string, std::string> settings_of_older_programs() {
  std::map<std::string, std::string> settings;
  Config defaults;
  for (const CommandFlag& f : flags(defaults))
    if (f.has(later)) settings[f.flag.name] = flag_value(f.flag);
  return settings;
}

std::vector<std::string> apply_settings(Config& config, const std::map<std::string, std::string>& settings) {
  std::vector<std::string> differences;
  for (const CommandFlag& f : flags(config)) {
    const auto before = settings.find(f.flag.name);
    if (before == settings.end()) continue;
    const std::string name = f.flag.name, value = flag_value(f.flag);
    if (!config.given.count(name)) {
      set_flag(f.flag, before->second);
    } else if (value != before->second) {
      if (f.has(fixed))
        fail("--", name, " is ", value, ", but the checkpoint's run has ", before->second,
             "; leave the flag out to go on with that run, or choose another --out_dir for a new one");
      differences.push_back(text(name, ": ", before->second, " -> ", value));
    }
  }
  return differences;
}

std::string print_config(const Config& config) {
  Config copy = config;
  std::vector<Flag> flags = flags_of(copy, config.command);
  const auto leave_out = [&](const char* name) { std::erase_if(flags, [&](const Flag& f) { return f.name == name; }); };
  if (config.init_from == "resume") leave_out("preset");
  if (!config.given.count("comm_timeout")) leave_out("comm_timeout");
  return print_flags(flags);
}

ModelShape model_shape(const Config& config, int vocabulary_size) {
  if (config.n_embd % config.n_head != 0)
    fail("--n_embd ", config.n_embd, " is not a multiple of --n_head ", config.n_head,
         ": every head gets n_embd / n_head channels");
  return {vocabulary_size, config.block_size, config.n_embd, config.n_layer, config.n_head};
}
