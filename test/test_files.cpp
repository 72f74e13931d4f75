// host/files.h: the old file survives every failure, and every error says what went wrong and where.
#include "../host/files.h"

#include <filesystem>
#include <fstream>
#include <set>
#include <vector>

#include "../host/error.h"
#include "test.h"

namespace fs = std::filesystem;

TEST_CASE("an atomic file appears whole or not at all", "[files]") {
  const std::string path = test_folder() + "/a";
  write_file(path, "old");
  {
    AtomicFile file(path);
    file.write("ne", 2);
    CHECK(fs::exists(path + ".tmp"));
    CHECK(read_file(path) == "old");
  }  // not committed
  CHECK(read_file(path) == "old");
  CHECK_FALSE(fs::exists(path + ".tmp"));

  AtomicFile file(path);
  file.write("ne", 2);
  file.write("w", 1);
  file.commit();
  CHECK(read_file(path) == "new");
  CHECK_FALSE(fs::exists(path + ".tmp"));
}

TEST_CASE("a full disk is told, and the old file stays", "[files]") {
  if (!fs::exists("/dev/full")) return skip("needs /dev/full");
  const std::string path = test_folder() + "/a";
  write_file(path, "old");
  fs::create_symlink("/dev/full", path + ".tmp");
  CHECK_THROWS_WITH(write_file(path, "new"),
                    ContainsSubstring("could not write " + path) && ContainsSubstring("disk is full"));
  CHECK(read_file(path) == "old");
  CHECK_FALSE(fs::is_symlink(path + ".tmp"));
}

TEST_CASE("a file that cannot be written names itself and the reason", "[files]") {
  const std::string folder = test_folder();
  CHECK_THROWS_WITH(write_file(folder + "/missing/a", ""),
                    ContainsSubstring("/missing/a") && ContainsSubstring("No such file"));
  fs::create_directory(folder + "/is_folder");
  CHECK_THROWS_WITH(write_file(folder + "/is_folder", "x"),
                    ContainsSubstring("could not rename") && ContainsSubstring("a folder"));
  CHECK_FALSE(fs::exists(folder + "/is_folder.tmp"));
}

TEST_CASE("folders are made with those above them", "[files]") {
  const std::string folder = test_folder();
  make_folder(folder + "/a/b/c");
  make_folder(folder + "/a/b/c/");  // the folder exists already
  CHECK(fs::is_directory(folder + "/a/b/c"));
  write_file(folder + "/file", "");
  CHECK_THROWS_WITH(make_folder(folder + "/file/b"), ContainsSubstring(folder + "/file is a file"));
  CHECK_THROWS_WITH(make_folder(folder + "/file"), ContainsSubstring("is a file"));
}

TEST_CASE("reading: contents, empty, missing, a folder", "[files]") {
  const std::string folder = test_folder(), path = folder + "/a";
  const std::string content("line\n\0\xff", 7);
  write_file(path, content);
  CHECK(read_file(path) == content);
  const MappedFile mapped(path);
  REQUIRE(mapped.size() == content.size());
  CHECK(std::string(reinterpret_cast<const char*>(mapped.data()), mapped.size()) == content);

  write_file(folder + "/empty", "");
  CHECK(read_file(folder + "/empty").empty());
  CHECK(MappedFile(folder + "/empty").size() == 0);

  CHECK_THROWS_WITH(read_file(folder + "/none"), ContainsSubstring("/none: No such file"));
  CHECK_THROWS_WITH(MappedFile(folder + "/none"), ContainsSubstring("/none: No such file"));
  CHECK_THROWS_WITH(read_file(folder), ContainsSubstring("it is a folder"));
  CHECK_THROWS_WITH(MappedFile(folder), ContainsSubstring("it is a folder"));
}

TEST_CASE("a file is called what its first bytes say", "[files]") {
  using namespace std::string_literals;
  const std::pair<std::string, std::string> kinds[] = {
      {"", "empty"},
      {"\x40\1\0\0\0\0\0\0{\"a\":"s, "a safetensors file"},
      {"\x1F\x8B\x08\0\0\0\0\0{\"a\":"s, "a safetensors file"},  // the header's length, 559,903, begins like gzip's
      {"\x1F\x8B\x08\0\0\0\0\0\2\3"s, "compressed by gzip (unpack it first)"},
      {"\x28\xB5\x2F\xFD\4", "compressed by zstd (unpack it first)"},
      {"\xFD\x37zXZ\0"s, "compressed by xz (unpack it first)"},
      {"\x80\2c", "a pickle, as Python and PyTorch before 1.6 write them"},
      {"\x80\5c", "a pickle, as Python and PyTorch before 1.6 write them"},
      {"\x80\6c", ""},
      {"\x88\xD8\x34\1\1\0\0\0"s, "a token shard"},
      {"{\"a\": 1}", "JSON"},
      {"\xEF\xBB\xBF [1]", "JSON"},
      {"<html>", "an HTML page"},
      {"\r\n\t<!DocType HTML PUBLIC", "an HTML page"},
      {"\n\n", "text"},
      {"a <html>", "text"},
      {"caf\xE9", "text"},
      {"a\0b"s, ""},
      {"\x7F", ""},
      {std::string(600, 'a') + '\0', "text"},
  };
  for (const auto& [bytes, name] : kinds) CHECK(looks_like(bytes) == name);
  CHECK_THROWS_WITH(refuse_other("x.bin", "<html>", "JSON", "run it again"),
                    ContainsSubstring("x.bin is an HTML page: run it again"));
  CHECK_NOTHROW(refuse_other("x.bin", "{}", "JSON", ""));
  CHECK_NOTHROW(refuse_other("x.bin", "\1\2", "JSON", ""));
}

TEST_CASE("fnv1a gives the published values", "[files]") {
  CHECK(fnv1a("", 0) == 0xcbf29ce484222325ull);
  CHECK(fnv1a("a", 1) == 0xaf63dc4c8601ec8cull);
  CHECK(fnv1a("foobar", 6) == 0x85944171f73967e8ull);
  CHECK(fnv1a("bar", 3, fnv1a("foo", 3)) == 0x85944171f73967e8ull);
}

TEST_CASE("the checksum sees any changed byte, any length and any order", "[files]") {
  for (size_t size : {1, 7, 8, 31, 32, 33, 95}) {
    std::vector<unsigned char> data(size);
    for (size_t i = 0; i < size; i++) data[i] = static_cast<unsigned char>(7 * i);
    std::set<uint64_t> seen = {checksum(data.data(), size)};
    for (size_t i = 0; i < size; i++) {
      for (int flip = 1; flip < 256; flip++) {
        data[i] = static_cast<unsigned char>(data[i] ^ flip);
        seen.insert(checksum(data.data(), size));
        data[i] = static_cast<unsigned char>(data[i] ^ flip);
      }
    }
    CHECK(seen.size() == 1 + size * 255);
  }
  std::set<uint64_t> lengths;
  const std::vector<char> zeros(200);
  for (size_t size = 0; size < zeros.size(); size++) lengths.insert(checksum(zeros.data(), size));
  CHECK(lengths.size() == zeros.size());

  std::vector<uint64_t> words = {1, 2, 3, 4, 5, 6, 7, 8};
  const uint64_t before = checksum(words.data(), 64);
  std::swap(words[0], words[4]);  // two words of one lane
  CHECK(checksum(words.data(), 64) != before);
  std::swap(words[0], words[4]);
  std::swap(words[0], words[1]);  // words of different lanes
  CHECK(checksum(words.data(), 64) != before);
}

TEST_CASE("the checksum is the one that older files hold", "[files]") {
  std::string data;
  for (int i = 0; i < 75; i++) data += char(i);
  CHECK(checksum(data.data(), 0) == 0x4201ffed25caef2full);
  CHECK(checksum(data.data(), 5) == 0xcb5012c6b0fe7abcull);
  CHECK(checksum(data.data(), 75) == 0xcd0b1ce6e32844daull);
}
