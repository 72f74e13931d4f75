// Token shards: the bytes that other programs read, reading across shards, and every kind of damage.
#include "test.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "../host/error.h"
#include "../host/files.h"
#include "../host/shards.h"
#include "../host/text.h"

namespace fs = std::filesystem;

static const Vocabulary& alphabet() {
  static const Vocabulary vocabulary({U'a', U'b', U'c', U'd', U'e', U'f', U'g'});
  return vocabulary;
}

static std::vector<uint16_t> some_tokens(size_t count) {
  std::vector<uint16_t> tokens(count);
  for (size_t i = 0; i < count; i++) tokens[i] = uint16_t(i * i / 3 % 7);
  return tokens;
}

static void write_split(const std::string& folder, const std::vector<uint16_t>& tokens, uint64_t shard_tokens,
                        size_t piece = 1 << 20, const char* split = "train") {
  ShardWriter writer(folder, split, tokens.size(), alphabet(), shard_tokens);
  for (size_t i = 0; i < tokens.size(); i += piece) writer.write(&tokens[i], std::min(piece, tokens.size() - i));
  writer.finish();
}

TEST_CASE("shards: the layout is what llm.c reads") {
  const std::string folder = test_folder();
  const std::vector<uint16_t> tokens = some_tokens(10);
  write_split(folder, tokens, 100);
  const std::string bytes = read_file(folder + "/train_000000.bin");
  REQUIRE(bytes.size() == 256 * 4 + 10 * 2);
  int32_t header[256];
  std::memcpy(header, bytes.data(), sizeof header);
  CHECK(header[0] == 20240520);
  CHECK(header[1] == 1);
  CHECK(header[2] == 10);
  CHECK(header[3] == 7);
  CHECK((uint64_t(uint32_t(header[5])) << 32 | uint32_t(header[4])) == alphabet().hash());
  for (int i = 6; i < 256; i++) CHECK(header[i] == 0);
  CHECK(std::memcmp(bytes.data() + sizeof header, tokens.data(), 20) == 0);
}

TEST_CASE("shards: copies cross any number of borders") {
  const std::vector<uint16_t> tokens = some_tokens(23);
  for (const uint64_t shard_tokens : {1, 2, 5, 22, 23, 24})
    for (const size_t piece : {1, 3, 100}) {
      const std::string folder = test_folder();
      write_split(folder, tokens, shard_tokens, piece);
      const Tokens split(folder, "train", alphabet());
      REQUIRE(split.size() == 23);
      CHECK(fs::exists(shard_path(folder, "train", (23 - 1) / shard_tokens)));
      CHECK_FALSE(fs::exists(shard_path(folder, "train", (23 - 1) / shard_tokens + 1)));
      for (size_t first = 0; first <= 23; first++)
        for (size_t count = 0; first + count <= 23; count++) {
          std::vector<int> out(count + 1, -1);
          split.copy(first, count, out.data());
          REQUIRE(std::equal(out.begin(), out.end() - 1, tokens.data() + first));
          REQUIRE(out.back() == -1);
        }
    }
}

TEST_CASE("shards: what lies outside the split cannot be copied") {
  const std::string folder = test_folder();
  write_split(folder, some_tokens(8), 5);
  const Tokens split(folder, "train", alphabet());
  int out[16];
  CHECK(contains(error_of([&] { split.copy(4, 5, out); }), "/train: tokens 4 to 9 were asked for, but there are 8"));
  CHECK(contains(error_of([&] { split.copy(9, 0, out); }), "there are 8"));
  CHECK(contains(error_of([&] { split.copy(~uint64_t{0}, 2, out); }), "there are 8"));
}

TEST_CASE("shards: the fingerprint is that of the tokens alone") {
  const std::vector<uint16_t> tokens = some_tokens(23);
  const auto fingerprint = [](const std::vector<uint16_t>& of, uint64_t shard_tokens) {
    const std::string folder = test_folder();
    write_split(folder, of, shard_tokens);
    return Tokens(folder, "train", alphabet()).fingerprint();
  };
  const uint64_t whole = fingerprint(tokens, 100);
  CHECK(fingerprint(tokens, 7) == whole);
  std::vector<uint16_t> other = tokens;
  other[22] ^= 1;
  CHECK(fingerprint(other, 100) != whole);
  other = tokens;
  std::swap(other[3], other[4]);
  REQUIRE(other != tokens);
  CHECK(fingerprint(other, 100) != whole);
  other = tokens;
  other.push_back(0);
  CHECK(fingerprint(other, 100) != whole);
}

TEST_CASE("shards: splits do not mix, and other files are left alone") {
  const std::string folder = test_folder();
  write_split(folder, some_tokens(9), 4);
  write_split(folder, some_tokens(3), 4, 100, "val");
  for (const char* name : {"/train_000000.bin.tmp", "/train_00001.bin", "/train_abcdef.bin", "/xtrain_000001.bin"})
    write_file(folder + name, "not a shard");
  CHECK(Tokens(folder, "train", alphabet()).size() == 9);
  CHECK(Tokens(folder, "val", alphabet()).size() == 3);
}

TEST_CASE("shards: moving replaces a split and removes its surplus shards") {
  const std::string from = test_folder(), to = test_folder();
  write_split(to, some_tokens(20), 4);
  write_split(to, some_tokens(3), 4, 100, "val");
  write_split(from, some_tokens(6), 4);
  move_shards(from, to, "train");
  CHECK(Tokens(to, "train", alphabet()).size() == 6);
  CHECK_FALSE(fs::exists(to + "/train_000002.bin"));
  CHECK(Tokens(to, "val", alphabet()).size() == 3);
  CHECK(fs::is_empty(from));
}

TEST_CASE("shards: a writer keeps to what was announced") {
  const std::string folder = test_folder();
  const std::vector<uint16_t> tokens = some_tokens(6);
  {
    ShardWriter writer(folder, "train", 5, alphabet());
    CHECK(contains(error_of([&] { writer.write(tokens.data(), 6); }), "more tokens than were announced"));
    writer.write(tokens.data(), 4);
    CHECK(contains(error_of([&] { writer.finish(); }), "1 tokens fewer"));
  }
  CHECK(fs::is_empty(folder));  // no half-written file stays
  CHECK(contains(error_of([&] { ShardWriter(folder, "train", 5, alphabet(), 0); }), "1 to 2147483647"));
  CHECK(contains(error_of([&] { ShardWriter(folder, "train", 5, alphabet(), 1ull << 31); }), "1 to 2147483647"));
  CHECK(
      contains(error_of([&] { ShardWriter(folder, "train", 1'000'001, alphabet(), 1); }), "more than a million files"));
}

TEST_CASE("shards: a damaged shard is refused by name and left as it is") {
  struct Case {
    size_t offset;  // where we write `value`, as an int32; in bytes
    int32_t value;
    std::string why;
  };
  const Case cases[] = {
      {0, 20240521, " is no token shard: it starts with 20240521 instead of 20240520"},
      {0, 1179011410, " is no token shard"},
      {4, 2, " is a shard of version 2; this program reads version 1"},
      {8, 0, " holds 0 tokens"},
      {8, -1, " holds -1 tokens"},
      {8, 5, " is truncated: 1032 bytes, but its header's 5 tokens make 1034"},
      {8, 3, " is oversized: 1032 bytes, but its header's 3 tokens make 1030"},
      {12, 8, " belongs to another vocabulary: 8 characters"},
      {16, 1, " belongs to another vocabulary: 7 characters with hash "},
      {20, 1, " belongs to another vocabulary: 7 characters with hash 00000001"},
      {1024, 7, ": token 0 (byte offset 1024) is 7, but the vocabulary has ids 0 to 6"},
      {1028, 65535 << 16, ": token 3 (byte offset 1030) is 65535"},
  };
  const std::string folder = test_folder(), path = folder + "/train_000001.bin";
  write_split(folder, some_tokens(8), 4);
  const std::string good = read_file(path);
  for (const Case& c : cases) {
    std::string bad = good;
    std::memcpy(&bad[c.offset], &c.value, sizeof c.value);
    write_file(path, bad);
    CHECK(contains(error_of([&] { Tokens(folder, "train", alphabet()); }), path + c.why));
    CHECK(read_file(path) == bad);
  }
  const auto refusal = [&](const std::string& content) {
    write_file(path, content);
    return error_of([&] { Tokens(folder, "train", alphabet()); });
  };
  CHECK(contains(refusal(""), path + " is empty: run ./data_prep again"));
  CHECK(contains(refusal(good.substr(0, 1023)), path + " is truncated: 1023 bytes, and the header alone has 1024"));
  CHECK(contains(refusal(good.substr(0, 1031)), path + " is truncated: 1031 bytes"));
  CHECK(contains(refusal(good + "x"), path + " is oversized: 1033 bytes"));
  CHECK(refusal(good) == "no error");
}

TEST_CASE("shards: a missing shard is refused") {
  const std::string folder = test_folder();
  CHECK(contains(error_of([&] { Tokens(folder, "train", alphabet()); }), folder + "/train_000000.bin is missing"));
  CHECK(contains(error_of([&] { Tokens(folder + "/none", "val", alphabet()); }), "/none/val_000000.bin is missing"));
  write_split(folder, some_tokens(12), 4);
  fs::remove(folder + "/train_000001.bin");
  CHECK(contains(error_of([&] { Tokens(folder, "train", alphabet()); }), folder + "/train_000001.bin is missing"));
  fs::remove(folder + "/train_000000.bin");
  CHECK(contains(error_of([&] { Tokens(folder, "train", alphabet()); }), folder + "/train_000000.bin is missing"));
}

TEST_CASE("shards: a bad token is found wherever it is in a large shard") {
  const size_t count = 4'200'000;  // more than the check reads at once
  for (const size_t place : {size_t{0}, size_t{4'194'303}, size_t{4'194'304}, count - 1}) {
    const std::string folder = test_folder();
    std::vector<uint16_t> tokens(count, 6);
    write_split(folder, tokens, count);
    CHECK(Tokens(folder, "train", alphabet()).size() == count);
    tokens[place] = 7;
    write_split(folder, tokens, count);
    CHECK(contains(error_of([&] { Tokens(folder, "train", alphabet()); }), ": token " + std::to_string(place) + " "));
  }
}

TEST_CASE("shards: a split must hold a window and its last target") {
  const std::string folder = test_folder();
  write_split(folder, some_tokens(9), 4);
  const Tokens split(folder, "train", alphabet());
  split.require_window(8);
  const std::string message = error_of([&] { split.require_window(9); });
  CHECK(contains(message, folder + "/train has 9 tokens, and a window of --block_size 9 needs 10"));
}
