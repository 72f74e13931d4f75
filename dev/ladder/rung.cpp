#include "rung.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "../../host/files.h"
#include "../../host/machine.h"

namespace ladder {

using Json = nlohmann::ordered_json;

bool read_flags(const std::string& rung, const Arguments& arguments, Config& config, const std::vector<Flag>& own,
                const std::vector<std::string>& common) {
  config.out_dir = "out/ladder/" + rung;
  std::vector<Flag> flags = own;
  for (const std::string& name : common) flags.push_back(config_flag(config, name));
  std::vector<std::string> names = {"help"};
  for (const Flag& flag : flags) names.push_back(flag.name);
  std::string help =
      text("usage: ./ladder ", rung, " [--flag value | --flag=value ...]\n\nflags, with their defaults:\n");
  for (const Flag& flag : flags) help += help_line(flag);

  config.given = parse_flags(arguments, flags, [&](const std::string& name) {
    fail("--", name, " is not a flag of ", rung, "; the nearest is --", nearest(name, names), ", see --help");
  });
  if (config.given.count("help")) {
    std::fputs(help.c_str(), stdout);
    return false;
  }
  use_threads(config.threads);
  std::fprintf(stderr, "%s: %s\n", rung.c_str(), print_flags(flags).c_str());
  return true;
}

Data open_text(const Config& config, int T) {
  Data data = open_data(config.data);
  data.train.require_window(T);
  data.val.require_window(T);
  return data;
}

void require_memory(const Config& config, const Layout& params, const Layout& acts, int V, int T) {
  MemoryPlan plan;
  plan.add("parameters, gradients, AdamW's m and v", 16.0 * double(params.size()));
  plan.add("activations and their gradients", 4.0 * double(acts.size()));
  plan.add("batches, probabilities", double(config.batch_size) * T * (8 + 8.0 * V));
  plan.require({usable_memory(), "this machine has"}, "lower --batch_size or the sizes of the network");
}

std::string decimals(double value, int digits) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.*f", digits, value);
  return buffer;
}

bool has_targets(const Config& config, const Data& data) {
  const std::set<std::string> harmless = {"data", "out_dir", "threads", "seed"};
  return std::includes(harmless.begin(), harmless.end(), config.given.begin(), config.given.end()) &&
         data.vocabulary.size() == 65 && data.train.size() == 1003854 && data.val.size() == 111540;
}

void save_result(const std::string& out_dir, const Result& result) {
  Json json = {{"rung", result.rung},    {"title", result.title},     {"rows", Json::array()},
               {"notes", result.notes},  {"pictures", Json::array()}, {"checks", Json::array()},
               {"sample", result.sample}};
  const auto number = [](double x) { return std::isfinite(x) ? Json(x) : Json(); };
  for (const Row& row : result.rows)
    json["rows"].push_back({{"name", row.name},
                            {"parameters", number(row.parameters)},
                            {"flops", number(row.flops)},
                            {"seconds", number(row.seconds)},
                            {"train", number(row.train)},
                            {"val", number(row.val)},
                            {"reference", row.reference},
                            {"record", row.record},
                            {"per_step", row.per_step}});
  for (const auto& [file, caption] : result.pictures)
    json["pictures"].push_back({{"file", file}, {"caption", caption}});
  for (const auto& [what, reached] : result.checks) {
    json["checks"].push_back({{"what", what}, {"reached", reached}});
    std::printf("%s: %s\n", reached ? "reached" : "MISSED", what.c_str());
  }
  std::fflush(stdout);
  write_file(out_dir + "/result.json", json.dump(1) + "\n");
}

Result load_result(const std::string& out_dir) {
  const std::string path = out_dir + "/result.json";
  try {
    const Json json = Json::parse(read_file(path));
    const auto number = [](const Json& x) { return x.is_null() ? not_measured : x.get<double>(); };
    Result result;
    result.rung = json.at("rung");
    result.title = json.at("title");
    for (const Json& row : json.at("rows"))
      result.rows.push_back({row.at("name"), number(row.at("parameters")), number(row.at("flops")),
                             number(row.at("seconds")), number(row.at("train")), number(row.at("val")),
                             row.at("reference"), row.at("record"), row.at("per_step")});
    for (const Json& note : json.at("notes")) result.notes.push_back(note);
    for (const Json& p : json.at("pictures")) result.pictures.push_back({p.at("file"), p.at("caption")});
    for (const Json& c : json.at("checks")) result.checks.push_back({c.at("what"), c.at("reached")});
    result.sample = json.at("sample");
    return result;
  } catch (const Json::exception& e) { fail(path, " is damaged: ", e.what(), " (run that rung again)"); }
}

}  // namespace ladder
