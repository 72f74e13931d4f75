// A table of flags, from which a command line is read and --help and the printout of a run are made.
// defines: Flag, no_limit, set_flag, flag_value, parse_flags, nearest, help_line, print_flags
#pragma once
#include <cstdint>
#include <functional>
#include <limits>
#include <set>
#include <string>
#include <variant>
#include <vector>

constexpr double no_limit = std::numeric_limits<double>::infinity();

// The type of the target decides what is accepted: a number from low to high, or one of the words in choices (any text,
// if there are none).
struct Flag {
  std::string name;
  std::variant<std::string*, int*, double*, bool*, uint64_t*> target;
  double low = 0, high = no_limit;
  std::vector<std::string> choices = {};
  std::string help = "";
};

void set_flag(const Flag& flag, const std::string& value);  // raises an Error that says what the flag takes
std::string flag_value(const Flag& flag);

// Reads `--flag value` and `--flag=value` and returns the names of the flags given. If a flag is repeated, the last counts.
// If --help (-h) or --version is among the arguments, it returns that name alone and sets nothing. It calls
// unknown(name) for each flag that is not in the table, and other(word) for each word that is neither a flag nor a
// value; without `other`, such a word is an Error.
std::set<std::string> parse_flags(std::vector<std::string> arguments, const std::vector<Flag>& flags,
                                  const std::function<void(const std::string& name)>& unknown,
                                  const std::function<void(const std::string& word)>& other = nullptr);

// The most similar of these words.
std::string nearest(const std::string& word, const std::vector<std::string>& words);

// "  --batch_size 64 <note>      sequences of a batch"
std::string help_line(const Flag& flag, const std::string& note = "");
// "n_layer 6, n_head 6, ..." in lines of readable length
std::string print_flags(const std::vector<Flag>& flags);
