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

void remember(Record& record, const Json& line) {
  const auto type = line.find("type"), sample = line.find("sample");
  if (type == line.end()) return;
  const int iter = line["iter"].get<int>();
  if (*type == "eval")
    record.evals.push_back({iter, number(line, "train_loss"), number(line, "val_loss"), number(line, "val_fixed"),
                            sample != line.end() && sample->is_string() ? sample->get<std::string>() : ""});
  if (*type == "iter") record.iters.push_back({iter, number(line, "loss")});
  if (*type == "final")
    record.final = {iter, number(line, "val_exact"), number(line, "train_seconds"), number(line, "val_fixed")};
}

}  // namespace

Record read_record(const std::string& path) {
  Record record;
  for_each_line(path, [&](const std::string&, const Json& line, int64_t) { remember(record, line); });
  return record;
}

Metrics::Metrics(const std::string& path, int first_iter) : path_(path) {
  std::string kept;
  if (first_iter > 0)
    for_each_line(path, [&](const std::string& row, const Json& line, int64_t iter) {
      if (iter >= first_iter) return;
      kept += row + '\n';
      remember(record_, line);
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
  remember(record_, line);
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

void Metrics::add_eval(const EvalPoint& point) {
  Json line = {{"type", "eval"}, {"iter", point.iter}, {"train_loss", point.train}, {"val_loss", point.val}};
  if (!std::isnan(point.fixed)) line["val_fixed"] = point.fixed;
  if (!point.sample.empty()) line["sample"] = point.sample;
  add(line);
}

void Metrics::add_final(const FinalPoint& point) {
  Json line = {{"type", "final"}, {"iter", point.iter}};
  if (!std::isnan(point.val_fixed)) line["val_fixed"] = point.val_fixed;
  line["val_exact"] = point.val_exact;
  line["train_seconds"] = point.train_seconds;
  add(line);
}
