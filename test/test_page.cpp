// The page with the model in it (host/page.h, host/page/), without a browser. test/page_in_browser.py opens it in one:
// make test-page.
#define MICROGPT_NO_MAIN
#include "../train_gpt_cpu.cpp"

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <regex>

#include "../host/page.h"
#include "../host/run_files.h"
#include "test.h"
#include "trainer.h"

using Json = nlohmann::json;

namespace {

float from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return float(half >> 15 ? -size : size);
}

bool has_node() { return run("node --version").code == 0; }

// What stands on the page in an element of that id.
std::string part_of(const std::string& page, const std::string& id) {
  const size_t begin = page.find("id=\"" + id + "\">") + id.size() + 6;
  return page.substr(begin, page.find("</script>", begin) - begin);
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) n++;
  return n;
}

// A model with random weights that 16 bits hold, and a vocabulary of V characters from `first` on.
struct Random {
  ModelShape shape;
  Layout layout = parameter_layout(shape);
  Buffer<float> params{layout};
  Vocabulary vocabulary;
  CheckpointInfo info;

  Random(const ModelShape& s, char32_t first) : shape(s) {
    init_parameters(params.data(), layout, 5);
    for (size_t i = 0; i < layout.size(); i++)  // larger than at the start of a run: what the model says is clear
      params.data()[i] = from_half(to_half(4 * params.data()[i] + 0.01f * float(int(i % 7) - 3)));
    std::vector<char32_t> characters = {U'\n'};
    while (int(characters.size()) < s.V) characters.push_back(first + char32_t(characters.size()));
    vocabulary = Vocabulary(characters);
    info.shape = shape;
    Config config;
    config.n_layer = s.L, config.n_head = s.NH, config.n_embd = s.C, config.block_size = s.T;
    info.settings = recorded_settings(config);
  }
  void save(const std::string& folder) const {
    fs::create_directories(folder);
    save_checkpoint(last_checkpoint(folder), info, vocabulary, layout, params.data(), nullptr, nullptr);
  }
};

std::vector<float> logits_of(const Random& r, const std::vector<int>& tokens) {
  cpu::GPT<float> m(r.shape, 1);
  std::copy_n(r.params.data(), r.layout.size(), m.params_memory.data());
  forward(m, tokens.data(), 1, int(tokens.size()));
  return {m.a.logits, m.a.logits + tokens.size() * size_t(r.shape.V)};
}

// What could break a page, or run on it; and numbers that are missing.
PageRecord hostile_record() {
  PageRecord record;
  record.text = "</script><!--\"'\\\u2028 \U0001F600 \u202Eabc";
  record.text.push_back('\0');
  record.run.evals = {{0, 4.2, NAN, not_scored, "</script><script>alert(1)</script>"}, {1, NAN, 4.1, 4.05, "<b>"}};
  for (int i = 0; i < 5000; i++) record.run.iters.push_back({i, 4.0});
  record.run.final = {9, 4.0, 12.5, 4.05};
  record.baselines = {{"</script>", 4.25}};
  return record;
}

}  // namespace

TEST_CASE("Numbers of 16 bits are the nearest ones", "[page]") {
  // Each of them stays itself, and of two the even one is taken for the middle between them.
  for (int half = 0; half < 0x7c00; half++) {
    const float x = from_half(uint16_t(half)), next = half == 0x7bff ? 65536 : from_half(uint16_t(half + 1));
    const float middle = (x + next) / 2;
    const int up = half == 0x7bff ? half : half + 1;
    const bool right = to_half(x) == half && to_half(-x) == (half | 0x8000) &&
                       to_half(middle) == (half % 2 == 0 ? half : up) && to_half(std::nextafter(middle, 0.f)) == half &&
                       to_half(std::nextafter(middle, 1e9f)) == up;
    if (!right) FAIL("0x" << std::hex << half);
  }
  CHECK(to_half(1e30f) == 0x7bff);
  CHECK(to_half(-INFINITY) == 0xfbff);
}

TEST_CASE("The page holds model and record, and nothing in them breaks it", "[page]") {
  const Random r({70, 4, 6, 2, 3}, 0x2028);
  const PageRecord record = hostile_record();
  const std::string path = test_folder() + "/page.html";
  write_page(path, r.info, r.vocabulary, r.layout, r.params.data(), record);
  const std::string page = read_file(path);
  CHECK(count(page, "</script>") == 4);
  CHECK(count(page, "<script") == 4);
  CHECK(!std::regex_search(page, std::regex("@[a-z]+[.a-z]*@")));  // all of the template's places are filled
  CHECK(page.find('\0') == std::string::npos);

  const Json json = Json::parse(part_of(page, "record"));
  CHECK(json["text"] == record.text);
  CHECK(json["shape"] == Json({{"V", 70}, {"T", 4}, {"C", 6}, {"L", 2}, {"NH", 3}}));
  CHECK(json["characters"].size() == 70);
  CHECK(json["characters"][0] == 10);
  CHECK(json["characters"][1] == 0x2029);
  CHECK(json["run"]["evals"][0]["sample"] == "</script><script>alert(1)</script>");
  CHECK(json["run"]["evals"][0]["fixed"].is_null());
  CHECK(json["run"]["iters"].size() <= 1000);
  CHECK(json["run"]["final"]["val_exact"] == 4.0);
  CHECK(json["baselines"][0]["loss"] == 4.25);
  CHECK(json["settings"]["n_embd"] == "6");
  CHECK(json["tensors"][4] == Json({{"name", "qkvw"}, {"layers", 2}, {"shape", {18, 6}}}));
}

TEST_CASE("The page's model says what the trainer's says, and writes what it writes", "[page]") {
  if (!has_node()) return skip("there is no node");
  const ModelShape shapes[] = {{65, 16, 24, 2, 3}, {1, 5, 4, 1, 1}, {300, 7, 10, 3, 2}, {5, 1, 6, 1, 2}};
  for (const ModelShape& s : shapes) {
    INFO("V " << s.V << ", T " << s.T << ", C " << s.C);
    const std::string folder = test_folder();
    const Random r(s, 0x4e00);
    r.save(folder);
    const Run made = run(train_gpt + " page --data /nowhere --out_dir " + folder);
    INFO(made.err);
    REQUIRE(made.code == 0);
    CHECK(contains(made.err, "the page begins without the text that the model was trained on: "));

    Json request = {
        {"prompt", {0}}, {"count", 200}, {"temperature", 0}, {"top_k", 0}, {"seed", "18446744073709551615"}};
    std::vector<std::vector<int>> texts;
    for (int k = 0; k < 10; k++) {
      texts.emplace_back();
      for (int t = 0; t < std::max(1, s.T - k); t++) texts.back().push_back((k * 31 + t * t * 7 + t) % s.V);
    }
    request["texts"] = texts;
    const auto in_node = [&] {
      write_file(folder + "/request.json", request.dump());
      const Run node = run("node test/page_in_node.js " + folder + "/microGPT.html < " + folder + "/request.json");
      INFO(node.err);
      REQUIRE(node.code == 0);
      return Json::parse(node.out);
    };
    const auto program_writes = [&](const std::string& flags) {
      const Run sampled = run(train_gpt + " sample --dtype float32 --max_new_tokens 200 --out_dir " + folder + flags);
      REQUIRE(sampled.code == 0);
      std::vector<uint16_t> tokens = r.vocabulary.encode(sampled.out, "the sample");
      tokens.pop_back();  // the newline at its end
      return std::vector<int>(tokens.begin(), tokens.end());
    };

    const Json likeliest = in_node();
    for (size_t k = 0; k < texts.size(); k++) {
      const std::vector<float> want = logits_of(r, texts[k]), got = likeliest["logits"][k];
      REQUIRE(got.size() == want.size());
      double worst = 0;
      for (size_t i = 0; i < want.size(); i++) worst = std::max(worst, double(std::fabs(got[i] - want[i])));
      CHECK(worst < 2e-3);
    }
    CHECK((likeliest["written"].get<std::vector<int>>() == program_writes(" --temperature 0")));
    // Without `exact` it is the same until the window is full. Then the newer half goes on alone.
    std::vector<int> quick = likeliest["quick"], text = {0};
    CHECK(std::equal(quick.begin(), quick.begin() + s.T, likeliest["written"].begin()));
    text.insert(text.end(), quick.begin(), quick.begin() + s.T);
    const std::vector<int> newer(text.end() - std::max(1, s.T - s.T / 2), text.end());
    const std::vector<float> logits = logits_of(r, newer);
    CHECK(quick[size_t(s.T)] == choose_token(logits.data() + logits.size() - size_t(s.V), s.V, {0, 0, 0.5}));
    request["seed"] = "4886718345678901234", request["temperature"] = 0.9, request["top_k"] = 20;
    const Json drawn = in_node();
    for (int i = 0; i < 20; i++)
      CHECK(drawn["uniform"][size_t(i)] ==
            unit_open(random4(4886718345678901234u, uint32_t(i), site::sampler, 0).word[0]));
    CHECK((drawn["written"].get<std::vector<int>>() ==
           program_writes(" --temperature 0.9 --top_k 20 --seed 4886718345678901234")));
  }
}

TEST_CASE("A run ends by writing its page, and each evaluation a sample", "[page]") {
  const std::string folder = prepared();
  const Run r = train(folder);
  INFO(r.err);
  REQUIRE(r.code == 0);
  CHECK(contains(r.err, "microGPT.html"));
  const std::string page = read_file(folder + "/out/microGPT.html");
  const Json json = Json::parse(part_of(page, "record"));
  std::vector<std::string> samples;
  for (const Json& line : lines_of(folder + "/out/metrics.jsonl"))
    if (line["type"] == "eval") {
      samples.push_back(line["sample"]);
      CHECK(samples.back().size() == 200);
      CHECK(contains(r.err, "it writes: "));
    }
  REQUIRE(samples.size() == 3);
  CHECK(samples[0] != samples[1]);
  for (size_t i = 0; i < 3; i++) CHECK(json["run"]["evals"][i]["sample"] == samples[i]);
  CHECK(json["iteration"] == 20);
  CHECK(json["run"]["final"]["iter"] == 20);
  CHECK(json["baselines"].size() == 4);
  CHECK(json["text"].get<std::string>().size() > 3);

  // The command writes the same page again, from the files.
  REQUIRE(run(train_gpt + " page --data " + folder + "/data --out_dir " + folder + "/out").code == 0);
  CHECK((read_file(folder + "/out/microGPT.html") == page));

  // Samples change nothing but the record.
  const Run quiet = train(folder, "--sample_chars=0 --page=false", "/quiet");
  REQUIRE(quiet.code == 0);
  CHECK(!fs::exists(folder + "/quiet/microGPT.html"));
  CHECK(quiet.err.find("it writes") == std::string::npos);
  CHECK(read_file(folder + "/quiet/metrics.jsonl").find("sample") == std::string::npos);
  CHECK((read_file(folder + "/quiet/microGPT_model.pth") == read_file(folder + "/out/microGPT_model.pth")));
}

TEST_CASE("A browser shows the page, and every control works", "[page]") {
  const char* const python[] = {"python3", "/usr/bin/python3"};
  const auto has_selenium = [](const std::string& p) { return run(p + " -c 'import selenium'").code == 0; };
  const auto found = std::find_if(std::begin(python), std::end(python), has_selenium);
  if (found == std::end(python) || run("chromium --version").code != 0 || run("chromedriver --version").code != 0)
    return skip("there is no chromium, chromedriver or selenium: make deps test-page installs them");
  const std::string folder = prepared();
  REQUIRE(train(folder, "--n_layer=2").code == 0);
  fs::copy(folder + "/out/microGPT.html", folder + "/run.html");
  const auto page_of = [&](const Random& r, const std::string& name) {
    r.save(folder + "/" + name);
    const std::string out = " --out_dir " + folder + "/" + name;
    REQUIRE(run(train_gpt + " page --data /nowhere" + out).code == 0);
    fs::copy(folder + "/" + name + "/microGPT.html", folder + "/" + name + ".html");
    return run(train_gpt + " sample --dtype float32 --temperature 0 --max_new_tokens 200" + out).out;
  };
  page_of(Random({5000, 8, 8, 1, 2}, 0x4e00), "large");
  page_of(Random({1, 8, 8, 2, 1}, 0), "one");
  const Random strange({70, 4, 6, 2, 3}, 0x2028);
  write_page(folder + "/hostile.html", strange.info, strange.vocabulary, strange.layout, strange.params.data(),
             hostile_record());
  const Random r({65, 16, 24, 2, 3}, 0x4e00);
  const std::string greedy = page_of(r, "random");
  Json want = {{"prompt", "\n"}, {"greedy", greedy.substr(0, greedy.size() - 1)}};
  for (int k = 0; k < 10; k++) {
    std::vector<int> tokens;
    for (int t = 0; t < r.shape.T - k; t++) tokens.push_back((k * 31 + t * t * 7 + t) % r.shape.V);
    want["texts"].push_back(tokens);
    want["logits"].push_back(logits_of(r, tokens));
  }
  write_file(folder + "/want.json", want.dump());
  const char* const screenshots = std::getenv("SCREENSHOTS");
  const Run browser = run(text(*found, " test/page_in_browser.py ", folder, " ", screenshots ? screenshots : ""));
  INFO(browser.out << browser.err);
  CHECK(browser.code == 0);
}

TEST_CASE("No page comes of a file that is no checkpoint, and an older page stays", "[page]") {
  const std::string folder = test_folder();
  Random({5, 4, 6, 1, 2}, U'a').save(folder);
  const std::string checkpoint = read_file(last_checkpoint(folder)), page = folder + "/microGPT.html";
  write_file(page, "an older page");
  const auto refused = [&](const std::string& flags, const std::string& message) {
    const Run r = run(train_gpt + " page --out_dir " + folder + flags);
    CHECK(r.code == 1);
    CHECK(contains(r.err, message));
    CHECK(read_file(page) == "an older page");
  };
  refused(" --checkpoint best", "ckpt_best.safetensors");
  refused(" --dtype float32", "--dtype is a flag of train, sample, eval, not of page");
  write_file(folder + "/damaged", checkpoint.substr(0, checkpoint.size() - 3));
  refused(" --checkpoint " + folder + "/damaged", "damaged");
  write_file(folder + "/zip", "PK\3\4" + std::string(100, 'x'));
  refused(" --checkpoint " + folder + "/zip", "a zip archive");
  const Run full = run("ulimit -f 1; " + train_gpt + " page --out_dir " + folder);
  CHECK(full.code == 1);
  CHECK(contains(full.err, "microGPT.html"));
  CHECK(read_file(page) == "an older page");
  CHECK(!fs::exists(page + ".tmp"));
}
