#include "metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "error.h"
#include "files.h"

namespace {

using Json = nlohmann::ordered_json;

double number(const Json& line, const char* key) {
  const auto found = line.find(key);
  return found != line.end() && found->is_number() ? found->get<double>() : std::numeric_limits<double>::quiet_NaN();
}

// Calls take(row, line, iter) for the lines of a record that are whole. Without a file there are none.
template <class Take>
void for_each_line(const std::string& path, Take take) {
  if (!std::filesystem::exists(path)) return;
  std::istringstream lines(read_file(path));
  for (std::string row; std::getline(lines, row);) {
    const Json line = Json::parse(row, nullptr, /*allow_exceptions=*/false);
    const auto iter = line.is_object() ? line.find("iter") : line.end();
    if (iter == line.end() || !iter->is_number_integer()) continue;
    const int64_t number = iter->get<int64_t>();
    if (number >= 0 && number <= std::numeric_limits<int>::max()) take(row, line, number);
  }
}

}  // namespace

Metrics::Metrics(const std::string& path, int first_iter) : path_(path) {
  std::string kept;
  if (first_iter > 0)
    for_each_line(path, [&](const std::string& row, const Json& line, int64_t iter) {
      if (iter >= first_iter) return;
      kept += row + '\n';
      remember(line);
    });
  write_file(path, kept);
  file_ = open_file(path, O_WRONLY | O_APPEND);
  if (file_ < 0) fail_errno("write " + path);
}

Metrics::~Metrics() {
  if (file_ >= 0) close(file_);
}

void Metrics::add(const Json& line) {
  const std::string row = line.dump() + '\n';
  write_all(file_, row.data(), row.size(), path_);
  remember(line);
}

void Metrics::flush() {
  if (!flush_file(file_)) fail_errno("write " + path_);
}

bool has_final(const std::string& path, int iter) {
  bool found = false;
  for_each_line(path, [&](const std::string&, const Json& line, int64_t at) {
    found = found || (at == iter && line.value("type", Json()) == "final");
  });
  return found;
}

void Metrics::add_iter(int iter, double loss, double lr, double time_ms, double tokens_per_s) {
  add({{"type", "iter"},
       {"iter", iter},
       {"loss", loss},
       {"lr", lr},
       {"time_ms", time_ms},
       {"tokens_per_s", tokens_per_s}});
}

void Metrics::add_eval(int iter, double train_loss, double val_loss, double val_fixed) {
  Json line = {{"type", "eval"}, {"iter", iter}, {"train_loss", train_loss}, {"val_loss", val_loss}};
  if (!std::isnan(val_fixed)) line["val_fixed"] = val_fixed;
  add(line);
}

void Metrics::add_final(int iter, double val_exact, double train_seconds, double val_fixed) {
  Json line = {{"type", "final"}, {"iter", iter}};
  if (!std::isnan(val_fixed)) line["val_fixed"] = val_fixed;
  line["val_exact"] = val_exact;
  line["train_seconds"] = train_seconds;
  add(line);
}

void Metrics::remember(const Json& line) {
  const auto type = line.find("type");
  if (type == line.end()) return;
  if (*type == "eval")
    evals_.push_back(
        {line["iter"].get<int>(), number(line, "train_loss"), number(line, "val_loss"), number(line, "val_fixed")});
  if (*type == "iter") iters_.push_back({line["iter"].get<int>(), number(line, "loss")});
}
