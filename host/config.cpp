#include "config.h"

#include <algorithm>
#include <vector>

#include "error.h"

namespace {

// A flag and the commands that take it (t: train, s: sample, e: eval, x: export). r: the value is recorded in
// checkpoints; m: it is, and belongs to the model's shape.
struct CommandFlag {
  std::string commands;
  Flag flag;
};

// clang-format off
std::vector<CommandFlag> flags(Config& c) {
  return {
      {"t", {"preset", &c.preset, 0, 0, {"auto", "lecture", "small"}, "auto: lecture on a GPU, small on a CPU"}},
      {"te", {"data", &c.data, 0, 0, {}, "folder with the token shards that data_prep wrote"}},
      {"tsex", {"out_dir", &c.out_dir, 0, 0, {}, "folder for checkpoints, samples, metrics and the plot"}},
      {"t", {"init_from", &c.init_from, 0, 0, {"scratch", "resume"}, "resume goes on with out_dir's ckpt_last"}},
      {"sex", {"checkpoint", &c.checkpoint, 0, 0, {}, "last, best, or a file"}},
      {"tm", {"n_layer", &c.n_layer, 1, 2e9, {}, "transformer blocks"}},
      {"tm", {"n_head", &c.n_head, 1, 2e9, {}, "attention heads of a block"}},
      {"tm", {"n_embd", &c.n_embd, 1, 2e9, {}, "channels"}},
      {"tm", {"block_size", &c.block_size, 1, 2e9, {}, "tokens of context"}},
      {"tr", {"dropout", &c.dropout, 0, 0.99, {}, "probability that an activation is dropped"}},
      {"ter", {"batch_size", &c.batch_size, 1, 2e9, {}, "sequences of a batch"}},
      {"tr", {"gradient_accumulation_steps", &c.gradient_accumulation_steps, 1, 2e9, {}, "batches of a step"}},
      {"tr", {"max_iters", &c.max_iters, 1, 2e9, {}, "training steps"}},
      {"tr", {"eval_interval", &c.eval_interval, 1, 2e9, {}, "steps between evaluations"}},
      {"ter", {"eval_iters", &c.eval_iters, 1, 1e6, {}, "random batches of each split in an evaluation"}},
      {"tr", {"log_interval", &c.log_interval, 1, 2e9, {}, "steps between lines with the loss"}},
      {"t", {"checkpoint_secs", &c.checkpoint_secs, 0, no_limit, {},
             "seconds between checkpoints; 0: only at evaluations"}},
      {"tr", {"learning_rate", &c.learning_rate, 0, 10, {}, "of AdamW, at its highest"}},
      {"tr", {"decay_lr", &c.decay_lr, 0, 0, {}, "cosine decay to min_lr"}},
      {"tr", {"warmup_iters", &c.warmup_iters, 0, 2e9, {}, "steps of linear warm-up"}},
      {"tr", {"lr_decay_iters", &c.lr_decay_iters, 0, 2e9, {}, "step at which min_lr is reached; 0: max_iters"}},
      {"tr", {"min_lr", &c.min_lr, 0, 10, {}, "the learning rate after the decay"}},
      {"tr", {"weight_decay", &c.weight_decay, 0, 10, {}, "of AdamW, on every parameter"}},
      {"tr", {"beta1", &c.beta1, 0, 0.999999, {}, "of AdamW"}},
      {"tr", {"beta2", &c.beta2, 0, 0.999999, {}, "of AdamW"}},
      {"tr", {"grad_clip", &c.grad_clip, 0, no_limit, {}, "largest norm of the gradient; 0: no clipping"}},
      {"s", {"start", &c.start, 0, 0, {}, "text to go on from, or FILE:path"}},
      {"s", {"num_samples", &c.num_samples, 1, 1e6, {}, "texts to make"}},
      {"s", {"max_new_tokens", &c.max_new_tokens, 1, 2e9, {}, "characters to add"}},
      {"s", {"temperature", &c.temperature, 0, 100, {}, "0: always the likeliest; 1: as learned; higher: wilder"}},
      {"s", {"top_k", &c.top_k, 0, 65535, {}, "choose among the k likeliest; 0: among all"}},
      {"tse", {"device", &c.device, 0, 0, {"auto", "cuda", "cpu"}, "cuda never falls back to cpu"}},
      {"tse", {"dtype", &c.dtype, 0, 0, {"auto", "float32", "tf32", "bfloat16", "float16"},
               "of the products; auto: 16 bits on a GPU, and on a CPU where they are faster"}},
      {"tse", {"threads", &c.threads, 0, 1024, {}, "of the CPU; 0: one for each core. Results do not depend on it"}},
      {"tser", {"seed", &c.seed, 0, no_limit, {}, "of all random numbers"}},
  };
}
// clang-format on

const std::vector<std::string> command_names = {"train", "sample", "eval", "export"};
char command_letter(const std::string& command) { return command == "export" ? 'x' : command[0]; }

std::vector<Flag> flags_of(Config& config, const std::string& command) {
  std::vector<Flag> chosen;
  for (const auto& [commands, flag] : flags(config))
    if (commands.find(command_letter(command)) != std::string::npos) chosen.push_back(flag);
  return chosen;
}

// The preset `lecture` is Config's own values. `small` is what two CPU cores with AVX-512 train in three to four minutes.
const std::vector<std::pair<std::string, std::string>> small_preset = {
    {"n_layer", "4"},        {"n_head", "4"},         {"n_embd", "128"},         {"block_size", "128"},
    {"dropout", "0"},        {"batch_size", "16"},    {"max_iters", "4000"},     {"eval_interval", "1000"},
    {"eval_iters", "20"},    {"log_interval", "100"}, {"learning_rate", "3e-3"}, {"decay_lr", "true"},
    {"warmup_iters", "100"}, {"beta2", "0.99"},       {"weight_decay", "0.1"},   {"grad_clip", "1"},
};

[[noreturn]] void refuse_unknown(const std::string& name, Config& config) {
  std::vector<std::string> names = {"help", "version"};
  for (const auto& [commands, flag] : flags(config)) {
    if (flag.name == name) {
      std::string others;
      for (const std::string& other : command_names)
        if (commands.find(command_letter(other)) != std::string::npos) others += (others.empty() ? "" : ", ") + other;
      fail("--", name, " is a flag of ", others, ", not of ", config.command);
    }
    if (commands.find(command_letter(config.command)) != std::string::npos) names.push_back(flag.name);
  }
  fail("--", name, " is not a flag of ", config.command, "; the nearest is --", nearest(name, names), ", see --help");
}

}  // namespace

Config parse_command_line(int argc, char** argv) {
  Config config;
  std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  if (!arguments.empty() && !arguments[0].empty() && arguments[0][0] != '-') {
    config.command = arguments[0];
    if (std::find(command_names.begin(), command_names.end(), config.command) == command_names.end())
      fail("'", config.command, "' is not a command (train, sample, eval, export); the nearest is ",
           nearest(config.command, command_names));
    arguments.erase(arguments.begin());
  }
  config.given = parse_flags(arguments, flags_of(config, config.command),
                             [&](const std::string& name) { refuse_unknown(name, config); });
  config.help = config.given.count("help");
  config.version = config.given.count("version");
  return config;
}

Flag config_flag(Config& config, const std::string& name) {
  for (const auto& [commands, flag] : flags(config))
    if (flag.name == name) return flag;
  fail("there is no flag ", name);
}

void apply_preset(Config& config, const std::string& preset) {
  config.preset = preset;
  if (preset != "small") return;
  for (const auto& [name, value] : small_preset)
    if (!config.given.count(name)) set_flag(config_flag(config, name), value);
}

std::string help_text(const std::string& command) {
  std::string out = text("usage: ./train_gpt [train | sample | eval | export] [--flag value | --flag=value ...]\n\n",
                         "flags of ", command, ", with their defaults:\n");
  Config defaults;
  for (const Flag& flag : flags_of(defaults, command)) {
    std::string small;
    for (const auto& [name, value] : small_preset)
      if (name == flag.name && command == "train") small = " (small: " + value + ")";
    out += help_line(flag, small);
  }
  return out +
         "\n  --help with another command shows that command's flags\n"
         "  --version says what to add to a report of a fault: versions, compilers, cards\n";
}

static bool is_recorded(const CommandFlag& f) { return f.commands.find_first_of("rm") != std::string::npos; }

std::vector<std::string> recorded_flags() {
  std::vector<std::string> names;
  Config config;
  for (const CommandFlag& f : flags(config))
    if (is_recorded(f)) names.push_back(f.flag.name);
  return names;
}

std::map<std::string, std::string> recorded_settings(const Config& config) {
  std::map<std::string, std::string> settings;
  Config copy = config;
  for (const CommandFlag& f : flags(copy))
    if (is_recorded(f)) settings[f.flag.name] = flag_value(f.flag);
  return settings;
}

std::vector<std::string> apply_settings(Config& config, const std::map<std::string, std::string>& settings) {
  std::vector<std::string> differences;
  for (const auto& [commands, flag] : flags(config)) {
    const auto recorded = settings.find(flag.name);
    if (recorded == settings.end()) continue;
    const std::string value = flag_value(flag);
    if (!config.given.count(flag.name)) {
      set_flag(flag, recorded->second);
    } else if (value != recorded->second) {
      if (commands.find('m') != std::string::npos)
        fail("--", flag.name, " is ", value, ", but the checkpoint's model has ", recorded->second,
             "; leave the flag out to go on with that model, or choose another --out_dir for a new one");
      differences.push_back(text(flag.name, ": ", recorded->second, " -> ", value));
    }
  }
  return differences;
}

std::string print_config(const Config& config) {
  Config copy = config;
  std::vector<Flag> flags = flags_of(copy, config.command);
  if (config.init_from == "resume") std::erase_if(flags, [](const Flag& f) { return f.name == "preset"; });
  return print_flags(flags);
}

ModelShape model_shape(const Config& config, int vocabulary_size) {
  if (config.n_embd % config.n_head != 0)
    fail("--n_embd ", config.n_embd, " is not a multiple of --n_head ", config.n_head,
         ": every head gets n_embd / n_head channels");
  return {vocabulary_size, config.block_size, config.n_embd, config.n_layer, config.n_head};
}
