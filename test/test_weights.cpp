// host/weights.h, pth.h, pickle.h: models in files of other programs. The files in test/pth are PyTorch's own;
// dev/check/reference.py says what is in them.
#include "../host/weights.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>

#include "../host/error.h"
#include "../host/memory.h"
#include "../host/run_files.h"
#include "test.h"

namespace {

constexpr ModelShape torch_shape = {2, 8, 4, 2, 2};
const std::string torch_files[] = {"test/pth/today.pth", "test/pth/protocol5.pth", "test/pth/legacy.pth"};

// What reference.py's pth_files puts into element i of a tensor.
float torch_value(const std::string& name, size_t i) {
  size_t sum = 0;
  for (const unsigned char byte : name) sum += byte;
  return (float((7 * sum + 3 * i) % 200) - 100) / 8;
}

void overwrite(const std::string& path, const std::string& content) {  // without fsync, because we write many
  std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
}

std::vector<float> loaded(const ModelWeights& weights) {
  const Layout layout = parameter_layout(weights.info().shape);
  const Buffer<float> params(layout);
  weights.load_params(params.data(), layout);
  std::vector<float> all;
  for (const ExportTensor& t : export_table(weights.info().shape, layout))
    all.insert(all.end(), params.data() + t.offset, params.data() + t.offset + t.size());
  return all;
}

// The tensors of a small model, for a test to change one of them before it writes them to a file.
struct SmallModel {
  ModelShape shape = {3, 4, 4, 1, 2};
  Layout layout = parameter_layout(shape);
  Buffer<float> params{layout};
  std::vector<TensorView> tensors;
  SmallModel() {
    init_parameters(params.data(), layout, 7);
    tensors = export_views(shape, layout, params.data());
  }
  TensorView& operator[](const std::string& name) {
    for (TensorView& t : tensors)
      if (t.name == name) return t;
    FAIL("no tensor " << name);
    return tensors[0];
  }
  std::string safetensors(const Metadata& metadata = {{"format", "pt"}}) const {
    const std::string path = test_folder() + "/model.safetensors";
    write_safetensors(path, tensors, metadata);
    return path;
  }
};

}  // namespace

TEST_CASE("weights: PyTorch's files hold what PyTorch put into them", "[weights]") {
  for (const std::string& path : torch_files) {
    INFO(path);
    const ModelWeights weights(path);
    CHECK(weights.info().shape == torch_shape);
    CHECK(weights.info().iteration == 0);
    CHECK(weights.info().settings ==
          std::map<std::string, std::string>{{"n_layer", "2"}, {"n_head", "2"}, {"n_embd", "4"}, {"block_size", "8"}});
    CHECK(weights.vocabulary() == nullptr);
    CHECK(weights.describe() == path);
    std::vector<float> want;
    for (const ExportTensor& t : export_table(torch_shape, parameter_layout(torch_shape)))
      for (size_t i = 0; i < t.size(); i++) want.push_back(torch_value(t.name, i));
    CHECK((loaded(weights) == want));
  }
}

TEST_CASE("weights: our own files of either kind give the same model", "[weights]") {
  const SmallModel model;
  const std::vector<float> want = loaded(ModelWeights(model.safetensors()));
  const std::string pth = test_folder() + "/model.pth";
  export_pth(pth, model.shape, model.layout, model.params.data());
  CHECK((loaded(ModelWeights(pth)) == want));
  CHECK(want[0] == model.params.data()[0]);

  CheckpointInfo info;
  info.shape = model.shape;
  Config config;
  config.n_layer = 1, config.n_head = 2, config.n_embd = 4, config.block_size = 4;
  info.settings = recorded_settings(config);
  info.iteration = 12;
  const std::string ours = test_folder() + "/ours.safetensors";
  save_checkpoint(ours, info, Vocabulary({'a', 'b', 'c'}), model.layout, model.params.data(), nullptr, nullptr);
  const ModelWeights checkpoint(ours);
  CHECK((loaded(checkpoint) == want));
  CHECK(checkpoint.info().iteration == 12);
  CHECK(checkpoint.vocabulary()->size() == 3);
  CHECK(checkpoint.describe() == ours + ", after 12 steps");
}

TEST_CASE("weights: numbers of 16 and of 64 bits", "[weights]") {
  SmallModel model;
  const auto load_as = [&](const char* dtype, const void* data) {
    model["ln_f.bias"] = {"ln_f.bias", dtype, {4}, data};
    const std::vector<float> all = loaded(ModelWeights(model.safetensors()));
    // the last tensors are ln_f.weight (4), ln_f.bias (4), lm_head.weight (3, 4) and lm_head.bias (3)
    return std::vector<float>(all.end() - 19, all.end() - 15);
  };
  const uint16_t half[] = {0x0001, 0x83ff, 0x7bff, 0xb555}, brain[] = {0x3f81, 0x8001, 0x7f7f, 0xc000};
  const double wide[] = {0.1, -1e-50, 1e30, 3};
  CHECK(load_as("F16", half) == std::vector<float>{0x1p-24f, -0x1.ff8p-15f, 65504, -0x1.554p-2f});
  CHECK(load_as("BF16", brain) == std::vector<float>{0x1.02p0f, -0x1p-133f, 0x1.fep127f, -2});
  CHECK(load_as("F64", wide) == std::vector<float>{0.1f, -0.f, 1e30f, 3});
  const uint16_t infinite[] = {0, 0x7c00, 0, 0}, nan[] = {0, 0, 0, 0x7fc0};
  const double beyond[] = {0, 1e39, 0, 0};
  for (const auto& [dtype, data] :
       {std::pair<const char*, const void*>{"F16", infinite}, {"BF16", nan}, {"F64", beyond}})
    CHECK(contains(error_of([&] { load_as(dtype, data); }), "lnfb has a number that is not finite"));
  CHECK(contains(error_of([&] { load_as("I32", wide); }), "tensor ln_f.bias is I32, expected F32, F16, BF16 or F64"));
}

TEST_CASE("weights: what does not fit is said by name", "[weights]") {
  const auto refusal = [](const auto& change) {
    SmallModel model;
    change(model);
    const std::string path = model.safetensors(), error = error_of([&] { ModelWeights{path}; });
    CHECK(contains(error, path));
    return error;
  };
  const auto renamed = [&](const std::string& name, const std::string& to) {
    return refusal([&](SmallModel& m) { m[name].name = to; });
  };
  CHECK(contains(renamed("blocks.0.ln2.bias", "unused"), " has no blocks.0.ln2.bias"));
  CHECK(contains(renamed("position_embedding_table.weight", "wpe"), " has no position_embedding_table.weight"));
  CHECK(contains(renamed("token_embedding_table.weight", "transformer.wte.weight"),
                 " has no token_embedding_table.weight: it is not a model of the course's gpt.py. It has "));
  CHECK(contains(refusal([](SmallModel& m) {
                   m["lm_head.bias"].shape = {3, 1};
                 }),
                 "tensor lm_head.bias has the shape (3, 1); with the others (3) is expected"));
  CHECK(contains(refusal([](SmallModel& m) {
                   m.tensors.push_back({"ln_f.extra", "F32", {2}, m.params.data()});
                 }),
                 " has ln_f.extra, which is no tensor of the course's model"));
  CHECK(contains(refusal([](SmallModel& m) {
                   m.tensors.push_back({"ema.token_embedding_table.weight", "F32", {3, 4}, m.params.data()});
                 }),
                 " has more than one model"));
  CHECK(contains(refusal([](SmallModel& m) { m.tensors.resize(2); }), " has no blocks.0: "));
  CHECK(contains(renamed("blocks.0.ln2.bias", "blocks.900000.ln2.bias"), "too few for 900001 layers with 2 heads"));
  CHECK(contains(refusal([](SmallModel& m) {
                   for (TensorView& t : m.tensors)
                     if (const size_t at = t.name.find("heads."); at != std::string::npos)
                       t.name.replace(at, 6, "qkv.");
                 }),
                 " has no blocks.0.sa.heads.0: "));
  CHECK(contains(renamed("blocks.0.sa.heads.1.key.weight", "blocks.0.sa.heads.2.key.weight"),
                 " has 3 heads, which do not divide its 4 channels"));
  CHECK(contains(refusal([](SmallModel& m) { m["token_embedding_table.weight"].shape = {12}; }), "which is no table"));

  const std::string folder = test_folder();
  write_file(folder + "/words", "First Citizen:\n");
  CHECK(
      contains(error_of([&] { ModelWeights{folder + "/words"}; }), "words is text: the weights of a model are needed"));
  CHECK(contains(error_of([&] { ModelWeights{folder + "/none"}; }), "/none"));
}

TEST_CASE("weights: names may have something before them, and heads their masks", "[weights]") {
  SmallModel model;
  const std::vector<float> want = loaded(ModelWeights(model.safetensors()));
  for (TensorView& t : model.tensors) t.name = "model.module." + t.name;
  model.tensors.push_back({"model.module.blocks.0.sa.heads.0.tril", "F32", {4, 4}, model.params.data()});
  model.tensors.push_back({"criterion.weight", "F32", {2}, model.params.data()});
  CHECK((loaded(ModelWeights(model.safetensors())) == want));
}

TEST_CASE("weights: another text keeps its characters, and another block_size its positions", "[weights]") {
  SmallModel model;  // of "abc"
  const std::string path = model.safetensors();
  const ModelWeights weights(path);
  const Vocabulary theirs({'a', 'b', 'c'}), ours({'b', 'x', 'c', 'y'});  // ours: b, c, x, y
  const auto p = placed<Params<float>>(model.params.data(), model.shape);
  for (int i = 0; i < 3; i++) p.headb[i] = float(i + 1);  // a bias begins as 0, which would show nothing
  const ModelWeights changed(model.safetensors());

  for (const int T : {2, 4, 7}) {
    const ModelShape shape = {4, T, 4, 1, 2};
    const Layout layout = parameter_layout(shape);
    const Buffer<float> params(layout), fresh(layout);
    init_parameters(params.data(), layout, 99);
    init_parameters(fresh.data(), layout, 99);
    const TakenOver rest = take_over(params.data(), shape, ours, changed, theirs);
    CHECK(rest.fresh == std::vector<char32_t>{'x', 'y'});
    CHECK(rest.dropped == std::vector<char32_t>{'a'});

    const auto got = placed<Params<float>>(params.data(), shape), random = placed<Params<float>>(fresh.data(), shape);
    const auto same = [](const float* a, const float* b, size_t n) {
      return std::memcmp(a, b, n * sizeof(float)) == 0;
    };
    const int from[] = {1, 2, -1, -1};
    for (int id = 0; id < 4; id++) {
      CHECK(same(got.wte + 4 * id, from[id] < 0 ? random.wte + 4 * id : p.wte + 4 * from[id], 4));
      CHECK(same(got.headw + 4 * id, from[id] < 0 ? random.headw + 4 * id : p.headw + 4 * from[id], 4));
      CHECK(got.headb[id] == float(from[id] + 1));
    }
    for (int t = 0; t < T; t++) CHECK(same(got.wpe + 4 * t, t < 4 ? p.wpe + 4 * t : random.wpe + 4 * t, 4));
    CHECK(same(got.qkvw[0], p.qkvw[0], 48));
    CHECK(same(got.fcprojw[0], p.fcprojw[0], 64));
    CHECK(same(got.lnfw, p.lnfw, 4));
  }
}

TEST_CASE("weights: a file without a vocabulary takes the text's, if it has as many characters", "[weights]") {
  const std::string folder = test_folder();
  Vocabulary({'x', 'y'}).save(folder + "/vocab.json");
  const ModelWeights two(torch_files[0]), three(SmallModel().safetensors());
  CHECK(vocabulary_of(two, folder).decode(1) == "y");
  CHECK(
      contains(error_of([&] { vocabulary_of(three, folder); }), "only 3 tokens, and " + folder + "/vocab.json has 2"));
}

TEST_CASE("weights: a file does not describe more parameters than it has bytes for", "[weights]") {
  const ModelShape shape = {10, 4, 64, 3, 2};
  const std::vector<float> shared(4 * 64 * 64, 0.5f);  // the largest tensor, whose bytes are those of all others, too
  std::vector<TensorView> tensors;
  for (const ExportTensor& t : export_table(shape, parameter_layout(shape)))
    tensors.push_back({t.name, "F32", t.shape, shared.data()});
  const std::string path = test_folder() + "/shared.pth";
  write_pth(path, tensors);
  CHECK(contains(error_of([&] { ModelWeights{path}; }), " bytes cannot hold"));
}

// A file that is cut off anywhere is refused. One with another byte may be refused or not, for many bytes do not matter,
// but it does no harm.
TEST_CASE("weights: damaged files of PyTorch's do no harm", "[weights]") {
  const std::string path = test_folder() + "/damaged.pth";
  const size_t step = sanitized ? 97 : 13;
  for (const std::string& file : torch_files) {
    INFO(file);
    const std::string whole = read_file(file);
    size_t refused = 0, tried = 0;
    for (size_t n = 0; n < whole.size(); n += step) {
      overwrite(path, whole.substr(0, n));
      tried++;
      refused += error_of([&] { ModelWeights{path}; }) != "no error";
    }
    CHECK(refused == tried);
    for (size_t at = 0; at < whole.size(); at += step) {
      std::string damaged = whole;
      damaged[at] = char(damaged[at] ^ 0x41);
      overwrite(path, damaged);
      error_of([&] { loaded(ModelWeights(path)); });
    }
  }
  // In an archive a checksum guards each tensor: of today.pth the bytes of the first one.
  std::string damaged = read_file(torch_files[0]);
  const float first = torch_value("token_embedding_table.weight", 0);
  const size_t at = damaged.find(std::string(reinterpret_cast<const char*>(&first), sizeof first));
  REQUIRE(at < damaged.size());
  damaged[at] ^= 1;
  overwrite(path, damaged);
  CHECK(contains(error_of([&] { ModelWeights{path}; }), " is damaged"));
}

namespace {

// The value of a pickle, as text.
std::string shown_pickle(const Pickled& p) {
  using Kind = Pickled::Kind;
  if (p.kind == Kind::none) return "None";
  if (p.kind == Kind::integer) return std::to_string(p.integer);
  if (p.kind == Kind::text) return "'" + p.text + "'";
  std::string items;
  for (const Pickled* item : p.items) items += (items.empty() ? "" : " ") + shown_pickle(*item);
  if (p.kind == Kind::sequence) return "(" + items + ")";
  if (p.kind == Kind::dict) return "{" + items + "}";
  if (p.kind == Kind::outside) return "outside" + items;
  return p.text + items;
}

std::string read_pickle(std::string_view bytes) {
  Unpickler unpickler("it", {"m.f"});
  return error_of([&] {
    const std::string value = shown_pickle(unpickler.read(bytes));
    fail(value, bytes.empty() ? "" : ", and more");
  });
}

}  // namespace

TEST_CASE("weights: a pickle is read, and nothing in it is executed", "[weights]") {
  using namespace std::string_view_literals;
  const std::pair<std::string_view, const char*> pickles[] = {
      {"N."sv, "None"},
      {"\x80\x04\x95\0\0\0\0\0\0\0\0K\x07."sv, "7"},
      {"J\xff\xff\xff\xff."sv, "-1"},
      {"M\x01\x02."sv, "513"},
      {"\x8a\0."sv, "0"},
      {"\x8a\x01\xff."sv, "-1"},
      {"\x8a\x08\0\0\0\0\0\0\0\x80."sv, "-9223372036854775808"},
      {"\x8a\x09"
       "abcdefghi."sv,
       "'abcdefghi'"},
      {"\x88\x88(\x88\x87."sv, "uses what it never made"},
      {"\x88\x89G12345678\x87."sv, "(1 0 None)"},
      {"X\x02\0\0\0hi."sv, "'hi'"},
      {"(\x8c\x01"
       "aU\x01"
       "bt."sv,
       "('a' 'b')"},
      {"](K\1K\2eK\3a."sv, "(1 2 3)"},
      {"}\x8c\x01"
       "aK\1s(K\2Nu."sv,
       "{'a' 1 2 None}"},
      {"\x8c\x01"
       "aq\0h\0h\0\x87."sv,
       "('a' 'a' 'a')"},
      {"K\1\x94K\2r\1\0\0\0j\0\0\0\0\x87."sv, "(1 2 1)"},
      {"cm\nf\n(K\1tR."sv, "m.f(1)"},
      {"\x8c\x01m\x8c\x01"
       "f\x93)R."sv,
       "m.f()"},
      {"ccollections\nOrderedDict\n)R(K\1K\2u}b."sv, "{1 2}"},
      {"(K\1tQ."sv, "outside(1)"},
      {"N.N."sv, "None, and more"},
      {"cos\nsystem\n(X\x02\0\0\0lstR."sv, "it: it holds an object of the kind os.system, which only Python can build"},
      {"\x8c\x02os\x8c\x06system\x93."sv, "os.system"},
      {"ccollections\nOrderedDict\n(K\1tR."sv, "in a way that PyTorch does not"},
      {"K\1)R."sv, "calls what is no function"},
      {"cm\nf\nK\1R."sv, "calls what is no function"},
      {"}K\1a."sv, "puts items where they do not belong"},
      {"}(K\1u."sv, "puts items where they do not belong"},
      {"]K\1K\2s."sv, "puts items where they do not belong"},
      {"Nr\xff\xff\xff\xff."sv, "leaves out numbers"},
      {"h\0."sv, "uses what it never made"},
      {"."sv, "uses what it never made"},
      {"t."sv, "uses what it never made"},
      {"N(0."sv, "has an instruction, 48, that no state dict needs"},
      {""sv, "cut off"},
      {"N"sv, "cut off"},
      {"X\xff\xff\xff\xffhi."sv, "cut off"},
      {"cos"sv, "cut off"},
  };
  for (const auto& [bytes, want] : pickles) CHECK(contains(read_pickle(bytes), want));
}
