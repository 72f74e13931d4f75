// Text as the model sees it: UTF-8 to characters (Unicode code points), characters to token ids, and back.
// defines: Utf8Decoder, utf8, shown, with_commas, Vocabulary
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// Decodes UTF-8 that arrives in pieces, cut anywhere. What is not UTF-8 (Unicode 15, table 3-7) raises an Error with
// the byte offset and the bytes found there; `what` names the text in that message.
class Utf8Decoder {
 public:
  // A byte order mark at the start says only that the text is UTF-8; it is not a character of the text.
  enum class Bom { drop, keep };
  explicit Utf8Decoder(std::string what, Bom bom = Bom::drop) : what_(std::move(what)), bom_(bom) {}

  // Calls sink(char32_t) for each character that is complete.
  template <class Sink>
  void feed(std::string_view bytes, Sink&& sink) {
    for (const char byte : bytes) {
      const unsigned char b = static_cast<unsigned char>(byte);
      if (length_ == 0 && b < 0x80) {
        offset_++;
        sink(char32_t{b});
      } else if (add(b)) {
        const char32_t c = take();
        if (c == 0xFEFF && offset_ == 3 && bom_ == Bom::drop)
          dropped_bom_ = true;
        else
          sink(c);
      }
    }
  }
  void finish() const;  // raises an Error when the text ends inside a character
  bool dropped_bom() const { return dropped_bom_; }

 private:
  bool add(unsigned char byte);  // to the sequence; true: it is complete
  char32_t take();
  [[noreturn]] void refuse(const char* why) const;

  std::string what_;
  Bom bom_;
  bool dropped_bom_ = false;
  uint64_t offset_ = 0;  // bytes decoded, those of the sequence not counted
  unsigned char sequence_[4] = {};
  int length_ = 0, needed_ = 0;  // of the sequence that has begun
};

std::string utf8(char32_t c);

// A character for a person to look at: one that is invisible, or that changes its neighbours, is shown as \n or U+200B.
std::string shown(char32_t c);

std::string with_commas(uint64_t n);  // 1115394 -> "1,115,394"

// The characters of a text, sorted: a character's id is its place among them.
class Vocabulary {
 public:
  // Ids are stored in 16 bits, and the last one means "none".
  static constexpr int max_size = 65535;

  Vocabulary() = default;
  explicit Vocabulary(std::vector<char32_t> characters);  // in any order, each once

  int size() const { return int(characters_.size()); }
  const std::vector<char32_t>& characters() const { return characters_; }
  uint64_t hash() const;       // 64-bit FNV-1a of decode(0) + decode(1) + ...: equal vocabularies, equal ids
  int find(char32_t c) const;  // -1: none
  std::string decode(int id) const { return utf8(characters_.at(size_t(id))); }

  // Raises an Error that names the first character outside the vocabulary and its place; `what` names the text in it.
  std::vector<uint16_t> encode(std::string_view words, const char* what) const;

  // vocab.json: {"vocab_size": 65, "hash": "0123456789abcdef", "characters": ["\n", " ", ...]}
  void save(const std::string& path) const;
  static Vocabulary load(const std::string& path);

 private:
  // The end of a message about the unknown character c: the vocabulary may know it in another form, in several parts or
  // as one with the character before it.
  std::string other_form(char32_t before, char32_t c) const;

  static constexpr uint16_t none = 0xFFFF;
  std::vector<char32_t> characters_;
  std::vector<uint16_t> table_;  // id by code point, for those below 0x10000
};

std::string hash_text(uint64_t hash);  // 16 hexadecimal digits
