#include "text.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "error.h"
#include "files.h"

bool Utf8Decoder::add(unsigned char byte) {
  sequence_[length_++] = byte;
  if (length_ == 1) {
    if (byte < 0xC0) refuse("a continuation byte without a character to continue");
    if (byte > 0xF7) refuse("a byte that UTF-8 never uses");
    needed_ = byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
  } else if (byte < 0x80 || byte > 0xBF) {
    refuse("a character that is cut short");
  }
  return length_ == needed_;
}

char32_t Utf8Decoder::take() {
  char32_t c = sequence_[0] & (0xFF >> (needed_ + 1));
  for (int i = 1; i < needed_; i++) c = c << 6 | (sequence_[i] & 0x3F);
  constexpr char32_t smallest[5] = {0, 0, 0x80, 0x800, 0x10000};
  if (c < smallest[needed_]) refuse("an overlong form of a character that needs fewer bytes");
  if (c >= 0xD800 && c <= 0xDFFF) refuse("a surrogate, half a character of UTF-16");
  if (c > 0x10FFFF) refuse("a code point beyond U+10FFFF");
  offset_ += uint64_t(needed_);
  length_ = 0;
  return c;
}

void Utf8Decoder::finish() const {
  if (length_ > 0) refuse("the text ends inside a character");
}

void Utf8Decoder::refuse(const char* why) const {
  std::string bytes;
  for (int i = 0; i < length_; i++) {
    char hex[8];
    std::snprintf(hex, sizeof hex, "%s%02X", i == 0 ? "" : " ", sequence_[i]);
    bytes += hex;
  }
  fail(what_, " is not UTF-8: at byte offset ", offset_, ", ", bytes, ": ", why,
       " (convert it first, for example with iconv -f latin1 -t utf-8)");
}

std::string utf8(char32_t c) {
  const auto tail = [c](int shift) { return char(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) return {char(c)};
  if (c < 0x800) return {char(0xC0 | c >> 6), tail(0)};
  if (c < 0x10000) return {char(0xE0 | c >> 12), tail(6), tail(0)};
  return {char(0xF0 | c >> 18), tail(12), tail(6), tail(0)};
}

static std::string code_point(char32_t c) {
  char name[16];
  std::snprintf(name, sizeof name, "U+%04X", unsigned(c));
  return name;
}

std::string shown(char32_t c) {
  if (c == '\n') return "\\n";
  if (c == '\r') return "\\r";
  if (c == '\t') return "\\t";
  // Controls, then the spaces, joiners and marks that change the direction of a line or the form of a neighbour.
  const bool invisible = c < 0x20 || (c >= 0x7F && c <= 0xA0) || c == 0xAD || (c >= 0x300 && c <= 0x36F) ||
                         (c >= 0x2000 && c <= 0x200F) || (c >= 0x2028 && c <= 0x202F) || (c >= 0x205F && c <= 0x206F) ||
                         c == 0x3000 || (c >= 0xFE00 && c <= 0xFE0F) || c == 0xFEFF;
  return invisible ? code_point(c) : utf8(c);
}

Vocabulary::Vocabulary(std::vector<char32_t> characters) : characters_(std::move(characters)) {
  if (characters_.size() > size_t{max_size})
    fail(characters_.size(), " distinct characters are too many: a token has 16 bits, so at most ", max_size,
         " fit (normalise the text, or leave out what is rare)");
  std::sort(characters_.begin(), characters_.end());
  if (!characters_.empty()) table_.assign(std::min<size_t>(characters_.back() + 1, 0x10000), none);
  for (size_t id = 0; id < characters_.size(); id++)
    if (characters_[id] < table_.size()) table_[characters_[id]] = uint16_t(id);
}

uint64_t Vocabulary::hash() const {
  std::string all;
  for (const char32_t c : characters_) all += utf8(c);
  return fnv1a(all.data(), all.size());
}

int Vocabulary::find(char32_t c) const {
  if (c < table_.size()) return table_[c] == none ? -1 : table_[c];
  const auto place = std::lower_bound(characters_.begin(), characters_.end(), c);
  return place == characters_.end() || *place != c ? -1 : int(place - characters_.begin());
}

// Accents, each with pairs of a letter and the same letter with it: what European languages need. Canonical
// decompositions of Unicode 15, of letters with one accent.
static constexpr std::pair<char32_t, std::u32string_view> accented[] = {
    {0x300, U"AÀEÈIÌOÒUÙaàeèiìoòuùЕЀИЍеѐиѝ"},
    {0x301, U"AÁEÉIÍOÓUÚYÝaáeéiíoóuúyýCĆcćLĹlĺNŃnńRŔrŕSŚsśZŹzźΑΆΕΈΗΉΙΊΟΌΥΎΩΏϊΐαάεέηήιίϋΰοόυύωώГЃКЌгѓкќ"},
    {0x302, U"AÂEÊIÎOÔUÛaâeêiîoôuûCĈcĉGĜgĝHĤhĥJĴjĵSŜsŝWŴwŵYŶyŷ"},
    {0x303, U"AÃNÑOÕaãnñoõIĨiĩUŨuũ"},
    {0x304, U"AĀaāEĒeēIĪiīOŌoōUŪuū"},
    {0x306, U"AĂaăEĔeĕGĞgğIĬiĭOŎoŏUŬuŭУЎИЙийуў"},
    {0x307, U"CĊcċEĖeėGĠgġIİZŻzż"},
    {0x308, U"AÄEËIÏOÖUÜaäeëiïoöuüyÿYŸΙΪΥΫιϊυϋЕЁІЇеёії"},
    {0x30A, U"AÅaåUŮuů"},
    {0x30B, U"OŐoőUŰuű"},
    {0x30C, U"CČcčDĎdďEĚeěLĽlľNŇnňRŘrřSŠsšTŤtťZŽzžAǍaǎ"},
    {0x31B, U"OƠoơUƯuư"},
    {0x326, U"SȘsșTȚtț"},
    {0x327, U"CÇcçGĢgģKĶkķLĻlļNŅnņRŖrŗSŞsşTŢtţ"},
    {0x328, U"AĄaąEĘeęIĮiįUŲuų"},
};

std::string Vocabulary::other_form(char32_t before, char32_t c) const {
  const auto has = [this](char32_t part) { return find(part) >= 0; };
  bool in_parts = c >= 0x1EA0 && c <= 0x1EF9 && has(0x323);  // Vietnamese, which has two accents on a letter
  bool as_one = false;
  for (const auto& [accent, pairs] : accented)
    for (size_t i = 0; i < pairs.size(); i += 2) {
      in_parts |= c == pairs[i + 1] && has(pairs[i]) && has(accent);
      as_one |= c == accent && before == pairs[i] && has(pairs[i + 1]);
    }
  // Korean: a syllable is a consonant, a vowel and perhaps another consonant, numbered in this order.
  constexpr char32_t syllables = 0xAC00, first = 0x1100, vowel = 0x1161, last = 0x11A7, end = syllables + 19 * 21 * 28;
  if (c >= syllables && c < end) {
    const char32_t n = c - syllables;
    in_parts = has(first + n / 588) && has(vowel + n % 588 / 28) && (n % 28 == 0 || has(last + n % 28));
  }
  for (char32_t n = 0; n < 588 && c >= first && c < first + 19; n++) as_one |= has(syllables + (c - first) * 588 + n);
  if (!in_parts && !as_one) return "";
  return in_parts ? "; but the vocabulary has it in parts, the Unicode form NFD (uconv -x nfd converts to it)"
                  : "; but the vocabulary has it and its neighbour as one, the Unicode form NFC (uconv -x nfc converts "
                    "to it)";
}

std::vector<uint16_t> Vocabulary::encode(std::string_view words, const char* what) const {
  std::vector<uint16_t> ids;
  // A byte order mark that belongs to the vocabulary is a character like any other.
  Utf8Decoder decoder(what, find(0xFEFF) < 0 ? Utf8Decoder::Bom::drop : Utf8Decoder::Bom::keep);
  decoder.feed(words, [&](char32_t c) {
    const int id = find(c);
    if (id < 0)
      fail(what, ": character ", ids.size() + 1, ", '", shown(c), "' (", code_point(c),
           "), is not in the vocabulary: it does not occur in the text the vocabulary was made from",
           other_form(ids.empty() ? 0 : characters_[ids.back()], c));
    ids.push_back(uint16_t(id));
  });
  decoder.finish();
  return ids;
}

std::string with_commas(uint64_t n) {
  std::string digits = std::to_string(n);
  for (int place = int(digits.size()) - 3; place > 0; place -= 3) digits.insert(size_t(place), 1, ',');
  return digits;
}

std::string hash_text(uint64_t hash) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(hash));
  return digits;
}

void Vocabulary::save(const std::string& path) const {
  nlohmann::ordered_json json = {{"vocab_size", size()}, {"hash", hash_text(hash())}};
  nlohmann::ordered_json& list = json["characters"] = nlohmann::ordered_json::array();
  for (const char32_t c : characters_) list.push_back(utf8(c));
  write_file(path, json.dump(1) + "\n");
}

Vocabulary Vocabulary::load(const std::string& path) {
  if (!std::filesystem::exists(path))
    fail(path, " is missing: no text was prepared here, or its preparation was interrupted (run ./data_prep)");
  const std::string content = read_file(path);
  refuse_other(path, content, "JSON", "run ./data_prep again");
  try {
    const nlohmann::json json = nlohmann::json::parse(content);
    std::vector<char32_t> characters;
    for (const std::string one : json.at("characters")) {
      const size_t before = characters.size();
      Utf8Decoder decoder("a character", Utf8Decoder::Bom::keep);
      decoder.feed(one, [&](char32_t c) { characters.push_back(c); });
      decoder.finish();
      if (characters.size() != before + 1) fail("\"", one, "\" is not one character");
      if (before > 0 && characters[before] <= characters[before - 1]) fail("the characters are not in ascending order");
    }
    if (characters.empty()) fail("it has no characters");
    const nlohmann::json& vocab_size = json.at("vocab_size");
    if (!vocab_size.is_number_unsigned() || vocab_size.get<size_t>() != characters.size())
      fail(characters.size(), " characters, but vocab_size is ", vocab_size.dump());
    Vocabulary vocabulary(std::move(characters));
    const std::string hash = json.at("hash"), expected = hash_text(vocabulary.hash());
    if (hash != expected) fail("the characters have the hash ", expected, ", but the file says ", hash);
    return vocabulary;
  } catch (const nlohmann::json::exception& e) {
    fail(path, " is damaged: ", e.what(), " (run ./data_prep again)");
  } catch (const Error& e) { fail(path, " is damaged: ", e.what(), " (run ./data_prep again)"); }
}
