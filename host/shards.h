// A text as tokens on disk, one split (train or val) in numbered shards: <folder>/<split>_000000.bin, ...
// The layout is llm.c's, so that its readers open ours: a header of 256 int32, then 16 bits a token, little-endian.
//   header[0] 20240520   [1] version 1   [2] number of tokens   [3] vocabulary size   [4], [5] its hash, low half first
// Readers ignore slots 3 to 5, which are ours: a shard is never read with another text's vocabulary.
// defines: shard_path, ShardWriter, move_shards, Tokens
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

class AtomicFile;
class MappedFile;
class Vocabulary;

constexpr uint64_t default_shard_tokens = 100'000'000;
constexpr uint64_t max_shard_tokens = 2'147'483'647;  // the header counts with an int32

std::string shard_path(const std::string& folder, const std::string& split, size_t number);

// Writes one split. Its length must be known: a shard's header comes first and counts its tokens.
class ShardWriter {
 public:
  ShardWriter(std::string folder, std::string split, uint64_t total, const Vocabulary& vocabulary,
              uint64_t shard_tokens = default_shard_tokens);
  ~ShardWriter();
  void write(const uint16_t* tokens, size_t count);
  void finish();  // raises an Error unless `total` tokens came

 private:
  void begin();

  std::string folder_, split_;
  uint64_t left_;  // tokens to come
  uint64_t left_in_file_ = 0;
  uint64_t shard_tokens_, vocabulary_hash_;
  int vocabulary_size_;
  size_t number_ = 0;  // of the next shard
  std::unique_ptr<AtomicFile> file_;
};

// Replaces the shards of a split in one folder by those of another on the same disk; surplus old ones are removed.
void move_shards(const std::string& from, const std::string& to, const std::string& split);

// One split, memory-mapped. Opening it checks every shard and every token, and an Error names the file and what is
// wrong.
class Tokens {
 public:
  Tokens(const std::string& folder, const std::string& split, const Vocabulary& vocabulary);
  ~Tokens();
  Tokens(Tokens&&) noexcept;

  uint64_t size() const { return size_; }
  void copy(uint64_t first, size_t count, int* out) const;  // out = tokens [first, first + count)
  uint64_t fingerprint() const;      // of the tokens, however they are cut into shards; 1 to 2 ns a token
  void require_window(int T) const;  // raises an Error unless a window of T inputs and their targets fits

 private:
  struct Shard;
  std::string name_;  // "<folder>/<split>"
  std::vector<Shard> shards_;
  uint64_t size_ = 0;
};
