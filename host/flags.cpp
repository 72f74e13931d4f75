#include "flags.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>

#include "error.h"

namespace {

template <class Number>
bool parse_number(const std::string& value, Number& number) {
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  return error == std::errc() && end == value.data() + value.size() && !value.empty();
}

std::string shown(double x) {
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, x).ptr};
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

}  // namespace

void set_flag(const Flag& flag, const std::string& value) {
  const auto refuse = [&](const std::string& wanted) { fail("--", flag.name, " is ", wanted, ", not '", value, "'"); };
  const auto limit = [](double x) { return x == std::floor(x) ? text(int64_t(x)) : shown(x); };
  const std::string range = flag.high == no_limit ? text("a number of at least ", limit(flag.low))
                                                  : text("a number from ", limit(flag.low), " to ", limit(flag.high));
  if (const auto word = std::get_if<std::string*>(&flag.target)) {
    if (!flag.choices.empty() && std::find(flag.choices.begin(), flag.choices.end(), value) == flag.choices.end()) {
      std::string words = "one of";
      for (const std::string& choice : flag.choices) words += " " + choice;
      refuse(words);
    }
    **word = value;
  } else if (const auto integer = std::get_if<int*>(&flag.target)) {
    int64_t number;
    if (!parse_number(value, number) || double(number) < flag.low || double(number) > flag.high)
      refuse("a whole " + range.substr(2));
    **integer = int(number);
  } else if (const auto real = std::get_if<double*>(&flag.target)) {
    double number;
    if (!parse_number(value, number) || !std::isfinite(number) || number < flag.low || number > flag.high)
      refuse(range);
    **real = number;
  } else if (const auto boolean = std::get_if<bool*>(&flag.target)) {
    std::string lower = value;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return char(std::tolower(c)); });
    if (lower != "true" && lower != "1" && lower != "false" && lower != "0") refuse("true or false");
    **boolean = lower == "true" || lower == "1";
  } else if (const auto big = std::get_if<uint64_t*>(&flag.target)) {
    if (!parse_number(value, **big)) refuse("a whole number from 0 to 18446744073709551615");
  }
}

std::string flag_value(const Flag& flag) {
  return std::visit(
      [&](const auto target) -> std::string {
        const auto& value = *target;
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
      flag.target);
}

std::string nearest(const std::string& word, const std::vector<std::string>& words) {
  return *std::min_element(words.begin(), words.end(), [&](const std::string& a, const std::string& b) {
    return edit_distance(word, a) < edit_distance(word, b);
  });
}

std::set<std::string> parse_flags(std::vector<std::string> arguments, const std::vector<Flag>& flags,
                                  const std::function<void(const std::string& name)>& unknown,
                                  const std::function<void(const std::string& word)>& other) {
  // --flag=value becomes two arguments, so that a value may be empty; what follows a flag without = is its value.
  for (size_t i = 0; i < arguments.size(); i++) {
    if (arguments[i].rfind("--", 0) != 0 || arguments[i] == "--help" || arguments[i] == "--version") continue;
    const size_t equals = arguments[i].find('=');
    if (equals != std::string::npos) {
      arguments.insert(arguments.begin() + long(i) + 1, arguments[i].substr(equals + 1));
      arguments[i].resize(equals);
    }
    i++;
  }

  // CLI11 sorts the arguments, and only that: values come from checkpoints and presets too, so their checks, and the
  // help that shows what was checked, are made from our own table.
  CLI::App app;
  app.set_help_flag();
  app.allow_extras();
  bool help = false, version = false;
  app.add_flag("--help,-h", help);
  app.add_flag("--version", version);
  std::vector<std::pair<const Flag*, std::string>> values;
  for (const Flag& flag : flags)
    app.add_option_function<std::string>("--" + flag.name,
                                         [&](const std::string& value) {
                                           values.push_back({&flag, value});
                                         })
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them
  try {
    app.parse(arguments);
  } catch (const CLI::ParseError& e) { fail(e.what(), "; see --help"); }
  if (help) return {"help"};
  if (version) return {"version"};
  for (const std::string& argument : app.remaining()) {
    if (argument.rfind("--", 0) == 0)
      unknown(argument.substr(2));
    else if (other && argument.rfind("-", 0) != 0)
      other(argument);
    else
      fail("'", argument, "' is not a flag; flags begin with --, see --help");
  }
  std::set<std::string> given;
  for (const auto& [flag, value] : values) {
    set_flag(*flag, value);
    given.insert(flag->name);
  }
  return given;
}

std::string help_line(const Flag& flag, const std::string& note) {
  std::string line = text("  --", flag.name, " ", flag_value(flag), note);
  line.resize(std::max<size_t>(line.size() + 2, 46), ' ');
  line += flag.help;
  for (size_t i = 0; i < flag.choices.size(); i++) line += (i == 0 ? " (" : ", ") + flag.choices[i];
  if (!flag.choices.empty()) line += ")";
  return line + "\n";
}

std::string print_flags(const std::vector<Flag>& flags) {
  std::string out, line;
  for (const Flag& flag : flags) {
    const std::string item = text(flag.name, " ", flag_value(flag));
    if (line.size() + item.size() > 110) {
      out += line + ",\n";
      line.clear();
    }
    line += (line.empty() ? "" : ", ") + item;
  }
  return out + line;
}
