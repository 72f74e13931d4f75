// host/pth.h: the archive's records and its pickle, read without PyTorch.
#include "../host/pth.h"

#include <zip.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

#include "../host/error.h"
#include "../host/files.h"
#include "test.h"

using Json = nlohmann::ordered_json;

namespace {

std::map<std::string, std::string> unzip(const std::string& path) {
  std::map<std::string, std::string> records;
  int error = 0;
  zip_t* archive = zip_open(path.c_str(), ZIP_RDONLY | ZIP_CHECKCONS, &error);
  REQUIRE(archive != nullptr);
  for (zip_int64_t i = 0; i < zip_get_num_entries(archive, 0); i++) {
    zip_stat_t info;
    REQUIRE(zip_stat_index(archive, zip_uint64_t(i), 0, &info) == 0);
    CHECK(info.comp_method == ZIP_CM_STORE);
    std::string content(info.size, '\0');
    zip_file_t* file = zip_fopen_index(archive, zip_uint64_t(i), 0);
    REQUIRE(file != nullptr);
    REQUIRE(zip_fread(file, content.data(), info.size) == zip_int64_t(info.size));
    CHECK(zip_fclose(file) == 0);
    records[info.name] = content;
  }
  zip_discard(archive);
  return records;
}

// The pickle as JSON. A call is {"call": name, "args": [...]}, plus "items" if the pickle adds items to the result. A
// persistent id is {"id": [...]}.
Json unpickle(const std::string& bytes) {
  std::vector<Json> stack;
  std::vector<size_t> marks;
  size_t at = 0;
  const auto number = [&](int size) {
    uint64_t value = 0;
    for (int i = 0; i < size; i++) value |= uint64_t(static_cast<unsigned char>(bytes.at(at++))) << 8 * i;
    return value;
  };
  const auto line = [&] {
    const size_t end = bytes.find('\n', at);
    const std::string word = bytes.substr(at, end - at);
    at = end + 1;
    return word;
  };
  const auto pop_to_mark = [&] {
    Json values = Json::array();
    for (size_t i = marks.back(); i < stack.size(); i++) values.push_back(stack[i]);
    stack.resize(marks.back());
    marks.pop_back();
    return values;
  };
  const auto pop = [&] {
    Json top = stack.back();
    stack.pop_back();
    return top;
  };
  for (;;) {
    switch (const char op = bytes.at(at++)) {
      case '\x80':
        REQUIRE(number(1) == 2);
        break;
      case 'c': {
        const std::string module = line();
        stack.push_back(module + "." + line());
        break;
      }
      case 'X': {
        const size_t size = number(4);
        stack.push_back(bytes.substr(at, size));
        at += size;
        break;
      }
      case 'J':
        stack.push_back(int32_t(number(4)));
        break;
      case '\x8a': {
        REQUIRE(number(1) == 9);
        stack.push_back(number(8));
        REQUIRE(number(1) == 0);
        break;
      }
      case '\x89':
        stack.push_back(false);
        break;
      case '(':
        marks.push_back(stack.size());
        break;
      case ')':
        stack.push_back(Json::array());
        break;
      case 't':
        stack.push_back(pop_to_mark());
        break;
      case 'Q':
        stack.push_back({{"id", pop()}});
        break;
      case 'R': {
        const Json arguments = pop();
        stack.push_back({{"call", pop()}, {"args", arguments}});
        break;
      }
      case 'u': {
        const Json items = pop_to_mark();
        stack.back()["items"] = items;
        break;
      }
      case '.':
        REQUIRE(at == bytes.size());
        REQUIRE(stack.size() == 1);
        return stack[0];
      default:
        FAIL("unexpected opcode " << int(op) << " at " << at - 1);
    }
  }
}

}  // namespace

TEST_CASE("a state dict holds its tensors, and shared data once", "[pth]") {
  const std::string folder = test_folder(), path = folder + "/a.pth";
  const std::vector<float> weight = {1, 2, 3, 4, 5, 6}, tril = {1, 0, 1, 1};
  const std::vector<TensorView> tensors = {{"wte.weight", "F32", {3, 1, 2}, weight.data()},
                                           {"heads.0.tril", "F32", {2, 2}, tril.data()},
                                           {"heads.1.tril", "F32", {2, 2}, tril.data()},
                                           {"first", "F32", {}, tril.data() + 3}};
  write_pth(path, tensors);

  const auto records = unzip(path);
  REQUIRE(records.size() == 6);
  CHECK(records.at("archive/version") == "3\n");
  CHECK(records.at("archive/byteorder") == "little");
  const auto holds = [&](const char* record, const float* data, size_t n) {
    return records.at(record) == std::string(reinterpret_cast<const char*>(data), n * sizeof(float));
  };
  CHECK(holds("archive/data/0", weight.data(), 6));
  CHECK(holds("archive/data/1", tril.data(), 4));
  CHECK(holds("archive/data/2", tril.data() + 3, 1));

  const Json dict = unpickle(records.at("archive/data.pkl"));
  CHECK(dict["call"] == "collections.OrderedDict");
  const auto tensor = [](const char* key, size_t elements, const char* shape, const char* stride) {
    const Json id = {"storage", "torch.FloatStorage", key, "cpu", elements};
    const Json hooks = {{"call", "collections.OrderedDict"}, {"args", Json::array()}};
    return Json{{"call", "torch._utils._rebuild_tensor_v2"},
                {"args", {{{"id", id}}, 0, Json::parse(shape), Json::parse(stride), false, hooks}}};
  };
  const Json items = dict["items"];
  REQUIRE(items.size() == 8);
  CHECK(items[0] == "wte.weight");
  CHECK(items[1] == tensor("0", 6, "[3,1,2]", "[2,2,1]"));
  CHECK(items[2] == "heads.0.tril");
  CHECK(items[3] == tensor("1", 4, "[2,2]", "[2,1]"));
  CHECK(items[4] == "heads.1.tril");
  CHECK(items[5] == items[3]);
  CHECK(items[7] == tensor("2", 1, "[]", "[]"));

  write_pth(folder + "/b.pth", tensors);
  CHECK(read_file(path) == read_file(folder + "/b.pth"));
  CHECK_THROWS_WITH(write_pth(path, {{"w", "F64", {1}, weight.data()}}), ContainsSubstring("tensor w is F64"));
  CHECK_THROWS_WITH(write_pth(folder + "/none/a.pth", tensors), ContainsSubstring("/none/a.pth"));
}

TEST_CASE("every record's data starts at a multiple of 64 bytes", "[pth]") {
  const std::string path = test_folder() + "/a.pth";
  const std::vector<float> data(100, 1.5f);
  std::vector<TensorView> tensors;
  for (size_t n = 1; n < 70; n++) tensors.push_back({std::string(n, 'n'), "F32", {n}, data.data() + n % 30});
  write_pth(path, tensors);

  // Walks over the local headers: signature, ..., flags at 6, sizes at 18 and 22, lengths of name and extra field
  // at 26.
  const std::string zip = read_file(path);
  const auto number = [&](size_t at, size_t size) {
    uint32_t value = 0;
    std::memcpy(&value, zip.data() + at, size);
    return value;
  };
  size_t at = 0, records = 0;
  while (number(at, 4) == 0x04034b50) {
    const size_t begin = at + 30 + number(at + 26, 2) + number(at + 28, 2);
    CHECK(begin % 64 == 0);
    CHECK(number(at + 6, 2) == 0);
    CHECK(number(at + 10, 4) == 33u << 16);  // always 1980-01-01 00:00, so that equal models give equal files
    CHECK(number(at + 18, 4) == number(at + 22, 4));
    at = begin + number(at + 18, 4);
    records++;
  }
  CHECK(records == 33);                // 30 storages
  CHECK(number(at, 4) == 0x02014b50);  // the central directory
}
