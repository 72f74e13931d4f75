#include "shards.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "error.h"
#include "files.h"
#include "text.h"

namespace fs = std::filesystem;

static_assert(std::endian::native == std::endian::little, "shards are little-endian");

namespace {

constexpr int32_t magic = 20240520, version = 1;
constexpr size_t header_bytes = 256 * sizeof(int32_t);

// The numbers of a split's shards in a folder, ascending.
std::vector<size_t> shard_numbers(const std::string& folder, const std::string& split) {
  std::vector<size_t> numbers;
  if (!fs::is_directory(folder)) return numbers;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string(), start = split + "_";
    if (name.size() != start.size() + 10 || !name.starts_with(start) || !name.ends_with(".bin")) continue;
    const std::string digits = name.substr(start.size(), 6);
    if (digits.find_first_not_of("0123456789") == std::string::npos) numbers.push_back(std::stoul(digits));
  }
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

}  // namespace

std::string shard_path(const std::string& folder, const std::string& split, size_t number) {
  char digits[24];
  std::snprintf(digits, sizeof digits, "%06zu", number);
  return folder + "/" + split + "_" + digits + ".bin";
}

// ---------------------------------------------------------------------------------------------------------------------
// writing

ShardWriter::ShardWriter(std::string folder, std::string split, uint64_t total, const Vocabulary& vocabulary,
                         uint64_t shard_tokens)
    : folder_(std::move(folder)),
      split_(std::move(split)),
      left_(total),
      shard_tokens_(shard_tokens),
      vocabulary_hash_(vocabulary.hash()),
      vocabulary_size_(vocabulary.size()) {
  if (shard_tokens < 1 || shard_tokens > max_shard_tokens)
    fail("a shard of ", shard_tokens, " tokens is impossible: 1 to ", max_shard_tokens, " fit");
  if ((total - 1) / shard_tokens >= 1'000'000)
    fail(total, " tokens in shards of ", shard_tokens, " make more than a million files: raise --shard_tokens");
}

ShardWriter::~ShardWriter() = default;

void ShardWriter::begin() {
  left_in_file_ = std::min(left_, shard_tokens_);
  int32_t header[256] = {magic,
                         version,
                         int32_t(left_in_file_),
                         vocabulary_size_,
                         int32_t(vocabulary_hash_),
                         int32_t(vocabulary_hash_ >> 32)};
  file_ = std::make_unique<AtomicFile>(shard_path(folder_, split_, number_++));
  file_->write(header, sizeof header);
}

void ShardWriter::write(const uint16_t* tokens, size_t count) {
  if (count > left_) fail(folder_, "/", split_, ": more tokens than were announced");
  while (count > 0) {
    if (!file_) begin();
    const size_t piece = size_t(std::min<uint64_t>(count, left_in_file_));
    file_->write(tokens, piece * sizeof *tokens);
    tokens += piece;
    count -= piece;
    left_ -= piece;
    left_in_file_ -= piece;
    if (left_in_file_ > 0) continue;
    file_->commit();
    file_.reset();
  }
}

void ShardWriter::finish() {
  if (left_ > 0) fail(folder_, "/", split_, ": ", left_, " tokens fewer than were announced");
}

void move_shards(const std::string& from, const std::string& to, const std::string& split) {
  const std::vector<size_t> fresh = shard_numbers(from, split), old = shard_numbers(to, split);
  for (const size_t number : fresh) move_file(shard_path(from, split, number), shard_path(to, split, number));
  for (const size_t number : old)
    if (!std::binary_search(fresh.begin(), fresh.end(), number)) fs::remove(shard_path(to, split, number));
}

// ---------------------------------------------------------------------------------------------------------------------
// reading

struct Tokens::Shard {
  std::unique_ptr<MappedFile> file;
  const uint16_t* tokens;
  uint64_t first, count;  // its place in the split
};

// Refuses a token that no model of V characters has a row for: an embedding read out of bounds would not even crash.
static void check_tokens(const std::string& path, const uint16_t* tokens, uint64_t count, int V) {
  constexpr uint64_t block = 1 << 22;
  for (uint64_t begin = 0; begin < count; begin += block) {
    const uint64_t end = std::min(begin + block, count);
    uint16_t largest = 0;
    for (uint64_t i = begin; i < end; i++) largest = std::max(largest, tokens[i]);
    if (largest >= V) {
      const uint64_t i = uint64_t(std::find_if(tokens + begin, tokens + end, [V](int t) { return t >= V; }) - tokens);
      fail(path, ": token ", i, " (byte offset ", header_bytes + 2 * i, ") is ", tokens[i],
           ", but the vocabulary has ids 0 to ", V - 1, " (run ./data_prep again)");
    }
    // We give back the pages that we looked at: gigabytes of text would count as memory in use. We round inwards, to
    // the largest page size there is, because the mapping's neighbours must stay: their content may be in no file.
    constexpr uintptr_t page = 65536;
    const uintptr_t low = (uintptr_t(tokens + begin) + page - 1) / page * page,
                    high = uintptr_t(tokens + end) / page * page;
    if (low < high) madvise(reinterpret_cast<void*>(low), high - low, MADV_DONTNEED);
  }
}

Tokens::Tokens(const std::string& folder, const std::string& split, const Vocabulary& vocabulary)
    : name_(folder + "/" + split) {
  const std::vector<size_t> numbers = shard_numbers(folder, split);
  if (numbers.empty()) fail(shard_path(folder, split, 0), " is missing (run ./data_prep to prepare a text)");
  const uint64_t expected_hash = vocabulary.hash();
  for (size_t n = 0; n < numbers.size(); n++) {
    const std::string path = shard_path(folder, split, n);
    if (numbers[n] != n) fail(path, " is missing, but there are later ones (run ./data_prep again)");
    auto file = std::make_unique<MappedFile>(path);
    refuse_other(path, {reinterpret_cast<const char*>(file->data()), file->size()}, "a token shard",
                 "run ./data_prep again");
    if (file->size() < header_bytes)
      fail(path, " is truncated: ", file->size(), " bytes, and the header alone has ", header_bytes,
           " (run ./data_prep again)");
    int32_t header[6];
    std::memcpy(header, file->data(), sizeof header);
    const auto [found_magic, found_version, count, size, low, high] = header;
    if (found_magic != magic)
      fail(path, " is no token shard: it starts with ", found_magic, " instead of ", magic,
           " (run ./data_prep on the text; nanoGPT's .bin files have no header at all)");
    if (found_version != version)
      fail(path, " is a shard of version ", found_version, "; this program reads version ", version,
           " (run ./data_prep again)");
    if (count < 1) fail(path, " holds ", count, " tokens by its header: at least 1 is needed (run ./data_prep again)");
    const uint64_t bytes = header_bytes + 2 * uint64_t(count);
    if (file->size() != bytes)
      fail(path, file->size() < bytes ? " is truncated: " : " is oversized: ", file->size(),
           " bytes, but its header's ", count, " tokens make ", bytes, " (run ./data_prep again)");
    const uint64_t hash = uint64_t(uint32_t(high)) << 32 | uint32_t(low);
    if (size != vocabulary.size() || hash != expected_hash)
      fail(path, " belongs to another vocabulary: ", size, " characters with hash ", hash_text(hash), " instead of ",
           vocabulary.size(), " with ", hash_text(expected_hash), " (run ./data_prep again)");
    const uint16_t* tokens = reinterpret_cast<const uint16_t*>(file->data() + header_bytes);
    check_tokens(path, tokens, uint64_t(count), vocabulary.size());
    shards_.push_back({std::move(file), tokens, size_, uint64_t(count)});
    size_ += uint64_t(count);
  }
}

Tokens::~Tokens() = default;
Tokens::Tokens(Tokens&&) noexcept = default;

void Tokens::copy(uint64_t first, size_t count, int* out) const {
  if (first > size_ || count > size_ - first)
    fail(name_, ": tokens ", first, " to ", first + count, " were asked for, but there are ", size_);
  auto shard = std::upper_bound(shards_.begin(), shards_.end(), first,
                                [](uint64_t position, const Shard& s) { return position < s.first + s.count; });
  for (; count > 0; ++shard) {
    const size_t piece = size_t(std::min<uint64_t>(count, shard->first + shard->count - first));
    out = std::copy_n(shard->tokens + (first - shard->first), piece, out);
    first += piece;
    count -= piece;
  }
}

uint64_t Tokens::fingerprint() const {
  uint64_t state = fnv1a<uint16_t>(nullptr, 0);
  for (const Shard& shard : shards_) state = fnv1a(shard.tokens, shard.count, state);
  return state;
}

void Tokens::require_window(int T) const {
  if (size_ < uint64_t(T) + 1)
    fail(name_, " has ", size_, " tokens, and a window of --block_size ", T, " needs ", uint64_t(T) + 1,
         " (with the last target): choose a smaller --block_size or a longer text");
}
