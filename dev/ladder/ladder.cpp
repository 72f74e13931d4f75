// The ladder: the models that lead the course from single numbers to the transformer. `./ladder NAME` trains one of
// them, `./ladder all` trains all and then the trainer's preset `small`, and writes a report, out/ladder/README.md.
#include <spawn.h>
#include <sys/wait.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "../../train_gpt_cpu.cpp"  // without its main: the last rung

#include "../../host/evaluation.h"
#include "../../host/plot.h"
#include "../../host/run.h"
#include "charts.h"
#include "rungs.h"

extern char** environ;

namespace {

namespace fs = std::filesystem;

struct Rung {
  const char *name, *what;
  void (*run)(const ladder::Arguments&);
};
constexpr Rung rungs[] = {
    {"gradient_descent", "single numbers that know their derivatives", gradient_descent_rung},
    {"counted", "bigrams and trigrams, counted", counted_rung},
    {"bigram", "the bigram again, by gradient descent", bigram_rung},
    {"mlp", "a multi-layer perceptron (Bengio 2003)", mlp_rung},
    {"tree", "a tree of them, as large as the WaveNet", tree_rung},
    {"wavenet", "dilated convolutions with gates (van den Oord 2016)", wavenet_rung},
    {"residual", "2 to 64 blocks with skip connections and without (He 2015)", residual_rung},
    {"transformer", "attention and what belongs to it, piece by piece (Vaswani 2017)", transformer_rung},
};

std::string usage() {
  std::string out = "usage: ./ladder NAME [--flag value | --flag=value ...]\n\n";
  for (const Rung& rung : rungs) {
    std::string line = text("  ", rung.name);
    line.resize(20, ' ');
    out += line + rung.what + "\n";
  }
  return out +
         "  all               all of these, ./train_gpt --preset small, and a report: out/ladder/README.md\n"
         "  report            the report alone, of the rungs that have been trained\n\n"
         "  --help with a name shows its flags\n";
}

// ---------------------------------------------------------------------------------------------------------------------
// The top of the ladder is the trainer itself.

// Whether a finished run of the preset small on this text lies in the folder, and of the preset as it is today.
bool holds_small(const std::string& folder, const Data& data) {
  const std::string last = folder + "/ckpt_last.safetensors";
  if (!fs::exists(last)) return false;
  const Checkpoint checkpoint(last);
  Config small;
  apply_preset(small, "small");
  const CheckpointInfo& info = checkpoint.info();
  for (const auto& [name, value] : recorded_settings(small))
    if (name != "seed" && info.settings.at(name) != value) return false;
  return info.data == data.fingerprint && info.iteration == small.max_iters &&
         has_final(folder + "/metrics.jsonl", info.iteration);
}

void train_small(const Config& config, const std::string& folder) {
  std::vector<std::string> words = {"./train_gpt",
                                    "--preset=small",
                                    "--data=" + config.data,
                                    "--out_dir=" + folder,
                                    "--seed=" + std::to_string(config.seed),
                                    "--threads=" + std::to_string(config.threads)};
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  pid_t child = 0;
  int status = 0;
  if (const int error = posix_spawn(&child, argv[0], nullptr, nullptr, argv.data(), environ))
    fail("./train_gpt does not start (", std::strerror(error), "): make train_gpt builds it");
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) fail("./train_gpt --preset small did not end well");
}

// The lines of this type in a record, metrics.jsonl.
std::vector<nlohmann::json> lines_of_type(const std::string& path, const std::string& type) {
  std::vector<nlohmann::json> lines;
  std::ifstream record(path);
  for (std::string line; std::getline(record, line);) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (json.is_object() && json.value("type", "") == type) lines.push_back(json);
  }
  return lines;
}

void small_rung(Config config, const std::string& out_dir) {
  const Data data = open_data(config.data);
  std::string folder = "out";
  if (!holds_small(folder, data)) folder = out_dir + "/run";
  if (!holds_small(folder, data)) train_small(config, folder);

  const ModelWeights weights(folder + "/ckpt_last.safetensors");
  const auto model = load_trainer(trainer_type<cpu::CpuModel<float>>(), config, weights, &data);
  ladder::Row row;
  row.name = "transformer, preset small";
  row.parameters = double(model->layout().count());
  row.flops = flops_per_token(model->shape());
  row.train = exact_loss(*model, Split::train, data.train.size(), config.batch_size);
  row.val = exact_loss(*model, Split::val, data.val.size(), config.batch_size);
  row.record = folder + "/metrics.jsonl";
  row.per_step = double(config.batch_size) * config.block_size;
  row.reference = "at most 1.49";
  for (const auto& line : lines_of_type(row.record, "final")) row.seconds = line.at("train_seconds");
  ladder::Result result;
  result.rung = "small";
  result.title = "The trainer's own model, preset small";
  result.rows = {row};
  result.notes = {text("The run in ", folder, ".")};
  result.sample = read_file(folder + "/sample.txt").substr(0, 200);
  if (ladder::has_targets(config, data))
    result.checks = {{text("preset small, val ", ladder::decimals(row.val, 4), " at most 1.49"), row.val <= 1.49}};
  make_folder(out_dir);
  std::printf("%s: exact loss, train %.4f, val %.4f\n", row.name.c_str(), row.train, row.val);
  ladder::save_result(out_dir, result);
}

// ---------------------------------------------------------------------------------------------------------------------
// The report.

std::string processor() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "an unnamed processor";
}

// All curves against the number of characters that training had predicted: how far each gets with as much text.
void draw_curves(const std::string& path, const std::vector<ladder::Result>& results, const std::string& data) {
  const char* const colours[] = {"#E69F00",    "#56B4E9",  third_colour, fourth_colour,
                                 train_colour, val_colour, "#8C564B",    "#000000"};
  ladder::Panel panel{
      "validation loss",
      "characters predicted in training",
      "nats per character",
      {},
      "set logscale x\nset xrange [1e5:2e7]\nset yrange [1.4:3.5]\nset format x '%.0s%c'\nset key outside\n"};
  size_t number = 0;
  for (const ladder::Result& result : results)
    for (const ladder::Row& row : result.rows) {
      if (row.record.empty() || !fs::exists(row.record)) continue;
      const bool last_of_its_rung = &row == &result.rows.back();
      if (result.rung == "transformer" && !last_of_its_rung) continue;  // six alike: the last stands for all
      ladder::Curve curve{result.rung == "transformer" ? "transformer, all pieces" : row.name,
                          {},
                          text("with lines lw 2.5 lc rgb '", colours[number++ % std::size(colours)], "'")};
      for (const auto& line : lines_of_type(row.record, "eval"))
        if (line.at("val_loss").is_number())
          curve.points.push_back({line.at("iter").get<double>() * row.per_step, line.at("val_loss").get<double>()});
      panel.curves.push_back(curve);
    }
  for (const Baseline& b : load_baselines(data + "/baselines.json"))
    if (b.loss < 3.5)
      panel.curves.push_back(
          {text(b.name, ", counted"), {{1e5, b.loss}, {2e7, b.loss}}, text("with lines dt 2 lc rgb '", grey, "'")});
  ladder::draw_panels(path, 1300, 750, 1, {panel});
}

// Writes the report; returns whether every target was reached.
bool report(const Config& config) {
  std::vector<ladder::Result> results;
  std::vector<std::string> names;
  for (const Rung& rung : rungs) names.push_back(rung.name);
  names.push_back("small");
  for (const std::string& name : names)
    if (fs::exists(config.out_dir + "/" + name + "/result.json"))
      results.push_back(ladder::load_result(config.out_dir + "/" + name));
  if (results.empty()) fail("no rung has been trained in ", config.out_dir, " yet: ./ladder all, or ./ladder NAME");

  const auto or_dash = [](double x, auto show) { return std::isfinite(x) ? show(x) : std::string("–"); };
  const auto whole = [](double x) { return with_commas(uint64_t(x)); };
  const auto loss = [](double x) { return ladder::decimals(x, 4); };
  std::string out = text("# The ladder\n\nOn ", processor(), ", ", omp_get_max_threads(),
                         " threads. Losses in nats per character, exact: every character is scored once.\n\n",
                         "| rung | parameters | FLOPs a character | seconds | train | validation | reference |\n",
                         "|---|---|---|---|---|---|---|\n");
  for (const ladder::Result& result : results)
    for (const ladder::Row& row : result.rows)
      out +=
          text("| ", row.name, " | ", or_dash(row.parameters, whole), " | ",
               row.flops > 0 ? row.flops < 1e5 ? whole(row.flops) : ladder::decimals(row.flops / 1e6, 2) + " M" : "–",
               " | ", or_dash(row.seconds, [](double x) { return ladder::decimals(x, 1); }), " | ",
               or_dash(row.train, loss), " | ", or_dash(row.val, loss), " | ", row.reference, " |\n");
  draw_curves(config.out_dir + "/curves.png", results, config.data);
  out += "\n![validation loss of all rungs](curves.png)\n";
  bool reached = true;
  for (const ladder::Result& result : results) {
    out += text("\n## ", result.title, "\n\n");
    for (const std::string& note : result.notes) out += note + "\n\n";
    for (const auto& [file, caption] : result.pictures)
      out += text("![", caption, "](", result.rung, "/", file, ")\n\n*", caption, "*\n\n");
    if (!result.sample.empty()) out += "~~~\n" + result.sample + "\n~~~\n\n";
    for (const auto& [what, holds] : result.checks) {
      out += text("- ", holds ? "reached" : "**missed**", ": ", what, "\n");
      reached = reached && holds;
    }
  }
  write_file(config.out_dir + "/README.md", out);
  std::fprintf(stderr, "the report: %s/README.md\n", config.out_dir.c_str());
  return reached;
}

int climb(const ladder::Arguments& arguments, bool train) {
  Config config;
  const std::string name = train ? "all" : "report";
  if (!ladder::read_flags(name, arguments, config, {}, {"data", "out_dir", "threads", "seed"})) return 0;
  if (!config.given.count("out_dir")) config.out_dir = "out/ladder";
  const auto start = std::chrono::steady_clock::now();
  if (train) {
    for (const Rung& rung : rungs) {
      std::fprintf(stderr, "\n");
      ladder::Arguments own = {"--out_dir", text(config.out_dir, "/", rung.name), "--seed",
                               std::to_string(config.seed)};
      if (rung.run != gradient_descent_rung) own.insert(own.end(), {"--data", config.data});
      if (rung.run != gradient_descent_rung && rung.run != counted_rung)
        own.insert(own.end(), {"--threads", std::to_string(config.threads)});
      std::fprintf(stderr, "rung %td of %zu, ", &rung - rungs + 1, std::size(rungs));
      rung.run(own);
    }
    std::fprintf(stderr, "\nthe rungs took %s\n",
                 duration(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()).c_str());
    small_rung(config, config.out_dir + "/small");
  }
  return report(config) ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  return run_main([&] {
    if (argc < 2 || argv[1] == std::string("--help") || argv[1] == std::string("-h")) {
      std::fputs(usage().c_str(), stdout);
      return 0;
    }
    const std::string name = argv[1];
    const ladder::Arguments arguments(argv + 2, argv + argc);
    if (name == "all" || name == "report") return climb(arguments, name == "all");
    std::vector<std::string> names = {"all", "report"};
    for (const Rung& rung : rungs) {
      names.push_back(rung.name);
      if (name != rung.name) continue;
      rung.run(arguments);
      return 0;
    }
    fail("'", name, "' is not a rung of the ladder; the nearest is ", nearest(name, names),
         ", ./ladder shows them all");
  });
}
