#include "metrics.h"

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

}  // namespace

Metrics::Metrics(const std::string& path, int first_iter) : path_(path) {
  std::string kept;
  if (first_iter > 0 && std::filesystem::exists(path)) {
    std::istringstream lines(read_file(path));
    for (std::string row; std::getline(lines, row);) {
      const Json line = Json::parse(row, nullptr, /*allow_exceptions=*/false);
      const bool whole = line.is_object() && line.contains("iter") && line["iter"].is_number_integer();
      if (!whole || line["iter"].get<int64_t>() >= first_iter) continue;
      kept += row + '\n';
      remember(line);
    }
  }
  write_file(path, kept);
  file_ = std::fopen(path.c_str(), "a");
  if (file_ == nullptr) fail_errno("write " + path);
}

Metrics::~Metrics() {
  if (file_ != nullptr) std::fclose(file_);
}

void Metrics::add(const Json& line) {
  const std::string row = line.dump() + '\n';
  if (std::fwrite(row.data(), 1, row.size(), file_) != row.size() || std::fflush(file_) != 0)
    fail_errno("write " + path_);
  remember(line);
}

void Metrics::add_iter(int iter, double loss, double lr, double time_ms, double tokens_per_s) {
  add({{"type", "iter"},
       {"iter", iter},
       {"loss", loss},
       {"lr", lr},
       {"time_ms", time_ms},
       {"tokens_per_s", tokens_per_s}});
}

void Metrics::add_eval(int iter, double train_loss, double val_loss) {
  add({{"type", "eval"}, {"iter", iter}, {"train_loss", train_loss}, {"val_loss", val_loss}});
}

void Metrics::add_final(int iter, double val_exact, double train_seconds) {
  add({{"type", "final"}, {"iter", iter}, {"val_exact", val_exact}, {"train_seconds", train_seconds}});
}

void Metrics::remember(const Json& line) {
  const auto type = line.find("type");
  if (type == line.end()) return;
  if (*type == "eval")
    evals_.push_back({line["iter"].get<int>(), number(line, "train_loss"), number(line, "val_loss")});
  if (*type == "iter") iters_.push_back({line["iter"].get<int>(), number(line, "loss")});
}
