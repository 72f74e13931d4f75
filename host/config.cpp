#include "config.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <variant>
#include <vector>

#include "error.h"

namespace {

using Member = std::variant<std::string Config::*, int Config::*, double Config::*, bool Config::*, uint64_t Config::*>;

constexpr double any = std::numeric_limits<double>::infinity();

// A flag: its name, where its value goes, the commands that take it (t: train, s: sample, e: eval, x: export), the
// range of a number, the words that a text may be, and what --help says. r: the value is recorded in checkpoints; m: it
// is, and belongs to the model's shape.
struct Flag {
  std::string name;
  Member member;
  std::string commands;
  double low, high;
  std::vector<std::string> choices;
  std::string help;
};

// clang-format off
const std::vector<Flag>& flags() {
  static const std::vector<Flag> table = {
      {"preset", &Config::preset, "t", 0, 0, {"auto", "lecture", "small"}, "auto: lecture on a GPU, small on a CPU"},
      {"data", &Config::data, "te", 0, 0, {}, "folder with the token shards that data_prep wrote"},
      {"out_dir", &Config::out_dir, "tsex", 0, 0, {}, "folder for checkpoints, samples, metrics and the plot"},
      {"init_from", &Config::init_from, "t", 0, 0, {"scratch", "resume"}, "resume goes on with out_dir's ckpt_last"},
      {"checkpoint", &Config::checkpoint, "sex", 0, 0, {}, "last, best, or a file"},
      {"n_layer", &Config::n_layer, "tm", 1, 2e9, {}, "transformer blocks"},
      {"n_head", &Config::n_head, "tm", 1, 2e9, {}, "attention heads of a block"},
      {"n_embd", &Config::n_embd, "tm", 1, 2e9, {}, "channels"},
      {"block_size", &Config::block_size, "tm", 1, 2e9, {}, "tokens of context"},
      {"dropout", &Config::dropout, "tr", 0, 0.99, {}, "probability that an activation is dropped"},
      {"batch_size", &Config::batch_size, "ter", 1, 2e9, {}, "sequences of a batch"},
      {"gradient_accumulation_steps", &Config::gradient_accumulation_steps, "tr", 1, 2e9, {}, "batches of a step"},
      {"max_iters", &Config::max_iters, "tr", 1, 2e9, {}, "training steps"},
      {"eval_interval", &Config::eval_interval, "tr", 1, 2e9, {}, "steps between evaluations"},
      {"eval_iters", &Config::eval_iters, "ter", 1, 1e6, {}, "random batches of each split in an evaluation"},
      {"log_interval", &Config::log_interval, "tr", 1, 2e9, {}, "steps between lines with the loss"},
      {"checkpoint_secs", &Config::checkpoint_secs, "t", 0, any, {},
       "seconds between checkpoints; 0: only at evaluations"},
      {"learning_rate", &Config::learning_rate, "tr", 0, 10, {}, "of AdamW, at its highest"},
      {"decay_lr", &Config::decay_lr, "tr", 0, 0, {}, "cosine decay to min_lr"},
      {"warmup_iters", &Config::warmup_iters, "tr", 0, 2e9, {}, "steps of linear warm-up"},
      {"lr_decay_iters", &Config::lr_decay_iters, "tr", 0, 2e9, {}, "step at which min_lr is reached; 0: max_iters"},
      {"min_lr", &Config::min_lr, "tr", 0, 10, {}, "the learning rate after the decay"},
      {"weight_decay", &Config::weight_decay, "tr", 0, 10, {}, "of AdamW, on every parameter"},
      {"beta1", &Config::beta1, "tr", 0, 0.999999, {}, "of AdamW"},
      {"beta2", &Config::beta2, "tr", 0, 0.999999, {}, "of AdamW"},
      {"grad_clip", &Config::grad_clip, "tr", 0, any, {}, "largest norm of the gradient; 0: no clipping"},
      {"start", &Config::start, "s", 0, 0, {}, "text to go on from, or FILE:path"},
      {"num_samples", &Config::num_samples, "s", 1, 1e6, {}, "texts to make"},
      {"max_new_tokens", &Config::max_new_tokens, "s", 1, 2e9, {}, "characters to add"},
      {"temperature", &Config::temperature, "s", 0, 100, {}, "0: always the likeliest; 1: as learned; higher: wilder"},
      {"top_k", &Config::top_k, "s", 0, 65535, {}, "choose among the k likeliest; 0: among all"},
      {"device", &Config::device, "tse", 0, 0, {"auto", "cuda", "cpu"}, "cuda never falls back to cpu"},
      {"dtype", &Config::dtype, "tse", 0, 0, {"auto", "float32", "tf32", "bfloat16", "float16"},
       "of the products; auto: 16 bits where the hardware has them"},
      {"threads", &Config::threads, "tse", 0, 1024, {}, "of the CPU; 0: one for each core. Results do not depend on it"},
      {"seed", &Config::seed, "tser", 0, any, {}, "of all random numbers"},
  };
  return table;
}
// clang-format on

const char* const command_names[] = {"train", "sample", "eval", "export"};
char command_letter(const std::string& command) { return command == "export" ? 'x' : command[0]; }

// The preset `lecture` is Config's own values. `small` is what two CPU cores with AVX512_BF16 train in three minutes.
const std::vector<std::pair<std::string, std::string>> small_preset = {
    {"n_layer", "4"},        {"n_head", "4"},           {"n_embd", "128"},     {"block_size", "128"},
    {"dropout", "0"},        {"batch_size", "16"},      {"max_iters", "4000"}, {"eval_iters", "20"},
    {"log_interval", "100"}, {"learning_rate", "3e-3"}, {"decay_lr", "true"},  {"warmup_iters", "100"},
    {"beta2", "0.99"},       {"weight_decay", "0.1"},   {"grad_clip", "1"},
};

template <class Number>
bool parse_number(const std::string& value, Number& number) {
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  return error == std::errc() && end == value.data() + value.size() && !value.empty();
}

std::string shown(double x) {
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, x).ptr};
}

void set(Config& config, const Flag& flag, const std::string& value) {
  const auto refuse = [&](const std::string& wanted) { fail("--", flag.name, " is ", wanted, ", not '", value, "'"); };
  const auto limit = [](double x) { return x == std::floor(x) ? text(int64_t(x)) : shown(x); };
  const std::string range = flag.high == any ? text("a number of at least ", limit(flag.low))
                                             : text("a number from ", limit(flag.low), " to ", limit(flag.high));
  if (const auto member = std::get_if<std::string Config::*>(&flag.member)) {
    if (!flag.choices.empty() && std::find(flag.choices.begin(), flag.choices.end(), value) == flag.choices.end()) {
      std::string words = "one of";
      for (const std::string& choice : flag.choices) words += " " + choice;
      refuse(words);
    }
    config.*(*member) = value;
  } else if (const auto integer = std::get_if<int Config::*>(&flag.member)) {
    int64_t number;
    if (!parse_number(value, number) || double(number) < flag.low || double(number) > flag.high)
      refuse("a whole " + range.substr(2));
    config.*(*integer) = int(number);
  } else if (const auto real = std::get_if<double Config::*>(&flag.member)) {
    double number;
    if (!parse_number(value, number) || !std::isfinite(number) || number < flag.low || number > flag.high)
      refuse(range);
    config.*(*real) = number;
  } else if (const auto boolean = std::get_if<bool Config::*>(&flag.member)) {
    std::string word = value;
    std::transform(word.begin(), word.end(), word.begin(), [](unsigned char c) { return char(std::tolower(c)); });
    if (word != "true" && word != "1" && word != "false" && word != "0") refuse("true or false");
    config.*(*boolean) = word == "true" || word == "1";
  } else if (const auto big = std::get_if<uint64_t Config::*>(&flag.member)) {
    if (!parse_number(value, config.*(*big))) refuse("a whole number from 0 to 18446744073709551615");
  }
}

std::string value_of(const Config& config, const Flag& flag) {
  return std::visit(
      [&](const auto member) -> std::string {
        const auto& value = config.*member;
        using Value = std::decay_t<decltype(value)>;
        if constexpr (std::is_same_v<Value, std::string>)
          return value == "\n" ? "\\n" : value;
        else if constexpr (std::is_same_v<Value, bool>)
          return value ? "true" : "false";
        else if constexpr (std::is_same_v<Value, double>)
          return shown(value);
        else
          return std::to_string(value);
      },
      flag.member);
}

// The number of insertions, deletions and replacements that turn one word into the other (Levenshtein 1966).
size_t edit_distance(const std::string& from, const std::string& to) {
  std::vector<size_t> row(to.size() + 1);
  for (size_t j = 0; j <= to.size(); j++) row[j] = j;
  for (size_t i = 1; i <= from.size(); i++) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= to.size(); j++) {
      const size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (from[i - 1] != to[j - 1])});
      diagonal = above;
    }
  }
  return row.back();
}

template <class Names>
std::string nearest(const std::string& word, const Names& names) {
  return *std::min_element(std::begin(names), std::end(names), [&](const std::string& a, const std::string& b) {
    return edit_distance(word, a) < edit_distance(word, b);
  });
}

[[noreturn]] void refuse_unknown(const std::string& argument, const std::string& command) {
  if (argument.rfind("--", 0) != 0) fail("'", argument, "' is not a flag; flags begin with --, see --help");
  const std::string name = argument.substr(2);
  std::vector<std::string> names = {"help"};
  for (const Flag& flag : flags()) {
    if (flag.name == name) {
      std::string others;
      for (const char* other : command_names)
        if (flag.commands.find(command_letter(other)) != std::string::npos)
          others += (others.empty() ? "" : ", ") + std::string(other);
      fail("--", name, " is a flag of ", others, ", not of ", command);
    }
    if (flag.commands.find(command_letter(command)) != std::string::npos) names.push_back(flag.name);
  }
  fail("--", name, " is not a flag of ", command, "; the nearest is --", nearest(name, names), ", see --help");
}

}  // namespace

Config parse_command_line(int argc, char** argv) {
  Config config;
  std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  if (!arguments.empty() && !arguments[0].empty() && arguments[0][0] != '-') {
    config.command = arguments[0];
    if (std::find(std::begin(command_names), std::end(command_names), config.command) == std::end(command_names))
      fail("'", config.command, "' is not a command (train, sample, eval, export); the nearest is ",
           nearest(config.command, command_names));
    arguments.erase(arguments.begin());
  }

  // --flag=value becomes two arguments, so that a value may be empty; what follows a flag without = is its value.
  for (size_t i = 0; i < arguments.size(); i++) {
    if (arguments[i].rfind("--", 0) != 0 || arguments[i] == "--help") continue;
    const size_t equals = arguments[i].find('=');
    if (equals != std::string::npos) {
      arguments.insert(arguments.begin() + long(i) + 1, arguments[i].substr(equals + 1));
      arguments[i].resize(equals);
    }
    i++;
  }

  CLI::App app;
  app.set_help_flag();
  app.allow_extras();
  app.add_flag("--help,-h", config.help);
  std::vector<std::pair<const Flag*, std::string>> values;
  for (const Flag& flag : flags())
    if (flag.commands.find(command_letter(config.command)) != std::string::npos)
      app.add_option_function<std::string>("--" + flag.name,
                                           [&](const std::string& value) {
                                             values.push_back({&flag, value});
                                           })
          ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them
  try {
    app.parse(arguments);
  } catch (const CLI::ParseError& e) { fail(e.what(), "; see --help"); }
  if (config.help) return config;
  if (!app.remaining().empty()) refuse_unknown(app.remaining()[0], config.command);
  for (const auto& [flag, value] : values) {
    set(config, *flag, value);
    config.given.insert(flag->name);
  }
  return config;
}

void apply_preset(Config& config, const std::string& preset) {
  config.preset = preset;
  if (preset != "small") return;
  for (const auto& [name, value] : small_preset)
    for (const Flag& flag : flags())
      if (flag.name == name && !config.given.count(name)) set(config, flag, value);
}

std::string help_text(const std::string& command) {
  std::string out = text("usage: ./train_gpt [train | sample | eval | export] [--flag value | --flag=value ...]\n\n",
                         "flags of ", command, ", with their defaults:\n");
  const Config defaults;
  for (const Flag& flag : flags()) {
    if (flag.commands.find(command_letter(command)) == std::string::npos) continue;
    std::string small;
    for (const auto& [name, value] : small_preset)
      if (name == flag.name && command == "train") small = " (small: " + value + ")";
    std::string line = text("  --", flag.name, " ", value_of(defaults, flag), small);
    line.resize(std::max<size_t>(line.size() + 2, 46), ' ');
    line += flag.help;
    for (size_t i = 0; i < flag.choices.size(); i++) line += (i == 0 ? " (" : ", ") + flag.choices[i];
    if (!flag.choices.empty()) line += ")";
    out += line + "\n";
  }
  return out + "\n  --help with another command shows that command's flags\n";
}

std::vector<std::string> recorded_flags() {
  std::vector<std::string> names;
  for (const Flag& flag : flags())
    if (flag.commands.find_first_of("rm") != std::string::npos) names.push_back(flag.name);
  return names;
}

std::map<std::string, std::string> recorded_settings(const Config& config) {
  std::map<std::string, std::string> settings;
  for (const Flag& flag : flags())
    if (flag.commands.find_first_of("rm") != std::string::npos) settings[flag.name] = value_of(config, flag);
  return settings;
}

std::vector<std::string> apply_settings(Config& config, const std::map<std::string, std::string>& settings) {
  std::vector<std::string> differences;
  for (const Flag& flag : flags()) {
    const auto recorded = settings.find(flag.name);
    if (recorded == settings.end()) continue;
    const std::string value = value_of(config, flag);
    if (!config.given.count(flag.name)) {
      set(config, flag, recorded->second);
    } else if (value != recorded->second) {
      if (flag.commands.find('m') != std::string::npos)
        fail("--", flag.name, " is ", value, ", but the checkpoint's model has ", recorded->second,
             "; leave the flag out to go on with that model, or choose another --out_dir for a new one");
      differences.push_back(text(flag.name, ": ", recorded->second, " -> ", value));
    }
  }
  return differences;
}

std::string print_config(const Config& config) {
  std::string out, line;
  for (const Flag& flag : flags()) {
    if (flag.commands.find(command_letter(config.command)) == std::string::npos) continue;
    const std::string item = text(flag.name, " ", value_of(config, flag));
    if (line.size() + item.size() > 110) {
      out += line + ",\n";
      line.clear();
    }
    line += (line.empty() ? "" : ", ") + item;
  }
  return out + line;
}

ModelShape model_shape(const Config& config, int vocabulary_size) {
  if (config.n_embd % config.n_head != 0)
    fail("--n_embd ", config.n_embd, " is not a multiple of --n_head ", config.n_head,
         ": every head gets n_embd / n_head channels");
  return {vocabulary_size, config.block_size, config.n_embd, config.n_layer, config.n_head};
}
