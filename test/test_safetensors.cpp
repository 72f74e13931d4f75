// host/safetensors.h: tensors survive a round trip, files of other programs open, and no damage goes unnoticed.
#include "../host/safetensors.h"

#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>

#include "../host/error.h"
#include "test.h"

namespace {

// A file as another program may have written it, right or wrong.
std::string raw_file(const std::string& header, size_t data_bytes) {
  const std::string path = test_folder() + "/raw.safetensors";
  uint64_t length = header.size();
  std::string content(reinterpret_cast<const char*>(&length), sizeof length);
  write_file(path, content + header + std::string(data_bytes, '\1'));
  return path;
}

// Without fsync, because the tests write many small files.
void overwrite(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
}

const float weights[6] = {1, 2, 3, 4, 5, 6};
const double moments[2] = {0.5, -0.5};
const std::vector<TensorView> small = {{"w", "F32", {2, 3}, weights}, {"m", "F64", {2}, moments}};
const Metadata facts = {{"iter", "12"}, {"vocab", "\n\"\xc3\xa9"}};

}  // namespace

TEST_CASE("safetensors come back as they were written", "[safetensors]") {
  const std::string folder = test_folder(), path = folder + "/a.safetensors";
  std::vector<TensorView> tensors = small;
  tensors.push_back({"scalar", "F32", {}, weights + 2});
  tensors.push_back({"empty", "F32", {0, 5}, nullptr});
  write_safetensors(path, tensors, facts);

  const SafetensorsFile file(path);
  CHECK(file.metadata() == facts);
  REQUIRE(file.tensors().size() == 4);
  const TensorView &w = file.find("w"), &m = file.find("m"), &scalar = file.find("scalar");
  CHECK(w.shape == std::vector<size_t>{2, 3});
  CHECK(std::memcmp(w.data, weights, sizeof weights) == 0);
  CHECK(m.dtype == "F64");
  CHECK(std::memcmp(m.data, moments, sizeof moments) == 0);
  CHECK(reinterpret_cast<uintptr_t>(m.data) % 8 == 0);
  CHECK(scalar.shape.empty());
  CHECK(*static_cast<const float*>(scalar.data) == 3);
  CHECK(file.find("empty").bytes() == 0);
  CHECK(file.maybe("none") == nullptr);
  CHECK_THROWS_WITH(file.find("none"), ContainsSubstring(path) && ContainsSubstring("no tensor named none"));

  write_safetensors(folder + "/b.safetensors", tensors, facts);
  CHECK(read_file(path) == read_file(folder + "/b.safetensors"));
}

TEST_CASE("safetensors: every flipped bit is refused", "[safetensors]") {
  const std::string path = test_folder() + "/a.safetensors";
  write_safetensors(path, small, facts);
  const std::string good = read_file(path);
  size_t accepted = 0;
  for (size_t i = 0; i < good.size(); i += sanitized ? 7 : 1) {
    for (int flip : {1, 2, 4, 8, 16, 32, 64, 128, 255, int(static_cast<unsigned char>(good[i])) ^ '\t'}) {
      std::string bad = good;
      bad[i] = char(bad[i] ^ flip);
      if (bad == good) continue;
      overwrite(path, bad);
      try {
        SafetensorsFile file(path);
        UNSCOPED_INFO("byte " << i << " xor " << flip);
        accepted++;
      } catch (const Error&) {}
    }
  }
  CHECK(accepted == 0);
  overwrite(path, good);
  CHECK_NOTHROW(SafetensorsFile(path));
}

TEST_CASE("safetensors: every shorter or longer file is refused", "[safetensors]") {
  const std::string path = test_folder() + "/a.safetensors";
  write_safetensors(path, small, facts);
  const std::string good = read_file(path);
  for (size_t size = 0; size < good.size(); size++) {
    overwrite(path, good.substr(0, size));
    INFO("cut to " << size << " of " << good.size());
    CHECK_THROWS_AS(SafetensorsFile(path), Error);
  }
  overwrite(path, good + '\0');
  CHECK_THROWS_WITH(SafetensorsFile(path), ContainsSubstring("tensors end at"));
}

TEST_CASE("safetensors: damage names the tensor", "[safetensors]") {
  const std::string path = test_folder() + "/a.safetensors";
  write_safetensors(path, small, facts);
  std::string bad = read_file(path);
  bad.back() = char(bad.back() ^ 1);  // F64 comes first, so the last byte belongs to w
  overwrite(path, bad);
  CHECK_THROWS_WITH(SafetensorsFile(path),
                    ContainsSubstring(path) && ContainsSubstring("tensor w is damaged: its checksum is"));
}

TEST_CASE("safetensors: a file of another program opens", "[safetensors]") {
  const SafetensorsFile file(raw_file(
      R"({ "b": {"data_offsets":[3,7], "shape":[1], "dtype":"F32"}, "a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},
           "__metadata__": {"format":"pt"} }   )",
      7));
  CHECK(file.metadata() == Metadata{{"format", "pt"}});
  REQUIRE(file.tensors().size() == 2);
  CHECK(file.tensors()[0].name == "a");
  CHECK(file.find("b").bytes() == 4);
  CHECK(SafetensorsFile(raw_file("{}", 0)).tensors().empty());
}

TEST_CASE("safetensors: no header is believed", "[safetensors]") {
  const auto refuses = [](const std::string& header, size_t data_bytes, const std::string& why) {
    INFO(header.substr(0, 200));
    CHECK_THROWS_WITH(SafetensorsFile(raw_file(header, data_bytes)), ContainsSubstring(why));
  };
  const auto tensor = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"("a":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
  };
  refuses("", 0, "no valid JSON");
  refuses("[]", 0, "no JSON object");
  refuses("{", 0, "no valid JSON (byte 1");
  refuses("{}x", 0, "no valid JSON");
  refuses("{\"\xff\":1}", 0, "no valid JSON");
  refuses(R"({"a":[[[[]]]]})", 0, "nested too deeply");
  refuses("{\"a\":" + std::string(1'000'000, '['), 0, "nested too deeply");
  refuses("{\"a\":" + std::string(1'000'000, '[') + std::string(1'000'000, ']') + "}", 0, "nested too deeply");
  refuses("{" + tensor("F32", "[1]", "[0,4]") + "," + tensor("F32", "[1]", "[0,4]") + "}", 4, "two entries named 'a'");
  refuses(R"({"a":1e999})", 0, "a number beyond all limits");
  refuses(R"({"a":1})", 0, "a is no JSON object");
  refuses(R"({"a":{}})", 0, "a lacks a type");
  refuses(R"({"__metadata__":{"k":1}})", 0, "k is no text");
  refuses("{" + tensor("F33", "[1]", "[0,4]") + "}", 4, "unknown type 'F33'");
  refuses("{" + tensor("F32", "[-1]", "[0,4]") + "}", 4, "no whole number");
  refuses("{" + tensor("F32", "[1.0]", "[0,4]") + "}", 4, "no whole number");
  refuses("{" + tensor("F32", "[1e40]", "[0,4]") + "}", 4, "no whole number");
  refuses("{" + tensor("F32", "[99999999999999999999]", "[0,4]") + "}", 4, "no whole number");
  refuses("{" + tensor("F32", "[1]", "[4,0]") + "}", 4, "before it begins");
  refuses("{" + tensor("F32", "[1]", "[0,4,8]") + "}", 4, "two offsets");
  refuses("{" + tensor("F32", "[2]", "[0,8]") + "}", 4, "cut off");
  refuses("{" + tensor("F32", "[2]", "[0,4]") + "}", 4, "need 8");
  refuses("{" + tensor("F32", "[4611686018427387905]", "[0,4]") + "}", 4, "overflows");  // 4 (2^62 + 1) wraps to 4
  refuses("{" + tensor("F32", "[4294967296,4294967296]", "[0,0]") + "}", 0, "overflows");
  refuses("{" + tensor("F32", "[1]", "[4,8]") + "}", 8, "begins at byte 4");  // a hole
  refuses("{" + tensor("F32", "[1]", "[0,4]") + "}", 8, "tensors end at 4");
  refuses("{" + tensor("F32", "[1]", "[0,4]") + R"(,"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})", 5,
          "b begins at byte 3");  // an overlap

  // The file is shorter than the length that it gives for its header.
  for (uint64_t length : {uint64_t{17}, uint64_t{1} << 40, std::numeric_limits<uint64_t>::max()}) {
    const std::string path = test_folder() + "/a";
    overwrite(path, std::string(reinterpret_cast<const char*>(&length), sizeof length) + std::string(16, ' '));
    CHECK_THROWS_WITH(SafetensorsFile(path), ContainsSubstring("announce a header of"));
  }
}

TEST_CASE("safetensors: a writer's mistakes are refused", "[safetensors]") {
  const std::string path = test_folder() + "/a";
  CHECK_THROWS_WITH(write_safetensors(path, {small[0], small[0]}, {}), ContainsSubstring("two tensors are named 'w'"));
  CHECK_THROWS_WITH(write_safetensors(path, small, {{"checksum.w", "0"}}), ContainsSubstring("reserved"));
  CHECK_THROWS_WITH(write_safetensors(path, {{"w", "X9", {1}, weights}}, {}), ContainsSubstring("unknown type"));
}
