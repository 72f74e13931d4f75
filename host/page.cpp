#include "page.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>

#include "error.h"
#include "files.h"
#include "run_files.h"
#include "weights.h"

// The assembler puts the files of host/page/ into the program: name and name_end are its first byte and the one behind
// its last. The paths begin where the compiler is started.
#ifdef __APPLE__
#define PAGE_FILE(name, path)                                                                                        \
  asm(".section __TEXT,__const\n.globl _" #name "\n_" #name ": .incbin \"" path "\"\n.globl _" #name "_end\n_" #name \
      "_end: .byte 0\n.text\n");                                                                                     \
  extern "C" const char name[], name##_end[]
#else
#define PAGE_FILE(name, path)                                                                                 \
  asm(".pushsection .rodata\n.globl " #name "\n" #name ": .incbin \"" path "\"\n.globl " #name "_end\n" #name \
      "_end: .byte 0\n.popsection\n");                                                                        \
  extern "C" const char name[], name##_end[]
#endif
PAGE_FILE(page_html, "host/page/page.html");
PAGE_FILE(page_css, "host/page/page.css");
PAGE_FILE(page_model, "host/page/model.js");
PAGE_FILE(page_worker, "host/page/worker.js");
PAGE_FILE(page_script, "host/page/page.js");

namespace {

using Json = nlohmann::ordered_json;

std::string base64(const std::vector<uint8_t>& bytes) {
  constexpr char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  out.reserve((bytes.size() + 2) / 3 * 4);
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    uint32_t three = 0;
    for (size_t k = 0; k < 3; k++) three = three << 8 | (k < n ? bytes[i + k] : 0);
    for (size_t k = 0; k < 4; k++) out += k <= n ? digits[three >> (18 - 6 * k) & 63] : '=';
  }
  return out;
}

// In the order of the layout, without the gaps between tensors.
std::string encoded_weights(const Layout& layout, const float* params) {
  std::vector<uint8_t> bytes;
  bytes.reserve(2 * layout.count());
  for (const TensorSpec& spec : layout.tensors())
    for (int l = 0; l < spec.layers; l++)
      for (size_t i = 0; i < spec.slice; i++) {
        const uint16_t half = to_half(params[spec.offset + size_t(l) * spec.stride + i]);
        bytes.push_back(uint8_t(half));
        bytes.push_back(uint8_t(half >> 8));
      }
  return base64(bytes);
}

// Without times: equal runs write equal pages.
Json run_as_json(const Record& run) {
  Json json = {{"evals", Json::array()}, {"iters", Json::array()}};
  for (const EvalPoint& e : run.evals)
    json["evals"].push_back(
        {{"iter", e.iter}, {"train", e.train}, {"val", e.val}, {"fixed", e.fixed}, {"sample", e.sample}});
  constexpr size_t enough = 1000;  // points of the curve of training losses
  const size_t step = run.iters.size() / enough + 1;
  for (size_t i = 0; i < run.iters.size(); i += step) json["iters"].push_back({run.iters[i].iter, run.iters[i].loss});
  if (run.final.iter >= 0)
    json["final"] = {{"iter", run.final.iter}, {"val_fixed", run.final.val_fixed}, {"val_exact", run.final.val_exact}};
  return json;
}

// Pure ASCII, and nothing in it can end the element that it stands in, whatever the text has trained the model to write.
std::string escaped(const Json& json) {
  std::string out;
  for (const char c : json.dump(-1, ' ', true)) out += c == '<' ? "\\u003c" : std::string(1, c);
  return out;
}

std::string record_as_json(const CheckpointInfo& info, const Vocabulary& vocabulary, const Layout& layout,
                           const PageRecord& record) {
  const ModelShape& s = info.shape;
  Json json = {{"shape", {{"V", s.V}, {"T", s.T}, {"C", s.C}, {"L", s.L}, {"NH", s.NH}}},
               {"iteration", info.iteration},
               {"settings", info.settings},
               {"text", record.text},
               {"run", run_as_json(record.run)}};
  for (const char32_t c : vocabulary.characters()) json["characters"].push_back(uint32_t(c));
  for (const TensorSpec& spec : layout.tensors())
    json["tensors"].push_back({{"name", spec.name}, {"layers", spec.layers}, {"shape", spec.shape}});
  json["baselines"] = Json::array();
  for (const Baseline& b : record.baselines) json["baselines"].push_back({{"name", b.name}, {"loss", b.loss}});
  return escaped(json);
}

}  // namespace

uint16_t to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (!(size < 65520)) return sign | 0x7bff;
  if (size < 0x1p-14f) return uint16_t(sign | std::lrint(size * 0x1p24f));  // subnormal: multiples of 2^-24
  const uint32_t bits = std::bit_cast<uint32_t>(size);
  return uint16_t(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)));
}

PageRecord page_record(const Data& data, const std::string& folder, int T) {
  PageRecord record;
  std::vector<int> tokens(std::min<size_t>({data.train.size(), size_t(T), 80}));
  data.train.copy(0, tokens.size(), tokens.data());
  std::string line;
  for (const int token : tokens) {
    const std::string c = data.vocabulary.decode(token);
    line += c;
    if (c == "\n") record.text = line;  // whole lines, if there are any
  }
  if (record.text.empty()) record.text = line;
  record.baselines = load_baselines(folder + "/baselines.json");
  return record;
}

void write_page(const std::string& path, const CheckpointInfo& info, const Vocabulary& vocabulary, const Layout& layout,
                const float* params, const PageRecord& record) {
  const std::pair<std::string_view, std::string> parts[] = {
      {"@page.css@", {page_css, page_css_end}},        {"@record@", record_as_json(info, vocabulary, layout, record)},
      {"@weights@", encoded_weights(layout, params)},  {"@model.js@", {page_model, page_model_end}},
      {"@worker.js@", {page_worker, page_worker_end}}, {"@page.js@", {page_script, page_script_end}},
  };
  AtomicFile file(path);
  std::string_view rest(page_html, size_t(page_html_end - page_html));
  for (const auto& [place, content] : parts) {  // in their order on the page
    const size_t at = rest.find(place);
    if (at == std::string_view::npos) fail("host/page/page.html has no ", place);
    file.write(rest.data(), at);
    file.write(content.data(), content.size());
    rest.remove_prefix(at + place.size());
  }
  file.write(rest.data(), rest.size());
  file.commit();
}

int page_command(const Config& config) {
  const ModelWeights weights(checkpoint_path(config));
  say_which(weights, config);
  const CheckpointInfo& info = weights.info();
  const Vocabulary vocabulary = vocabulary_of(weights, config.data);
  const Layout layout = parameter_layout(info.shape);
  const Buffer<float> params(layout);
  weights.load_params(params.data(), layout);
  PageRecord record;
  try {
    record = page_record(open_data(config.data, &vocabulary), config.data, info.shape.T);
  } catch (const Error& error) {
    std::fprintf(stderr, "the page begins without the text that the model was trained on: %s\n", error.what());
  }
  // metrics.jsonl in out_dir tells of the two checkpoints there, not of one from elsewhere.
  if (config.checkpoint == "last" || config.checkpoint == "best")
    record.run = read_record(config.out_dir + "/metrics.jsonl");
  make_folder(config.out_dir);
  const std::string path = config.out_dir + "/microGPT.html";
  write_page(path, info, vocabulary, layout, params.data(), record);
  std::fprintf(stderr, "wrote %s: open it in a browser\n", path.c_str());
  return 0;
}
