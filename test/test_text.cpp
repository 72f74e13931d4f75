// UTF-8 and vocabularies: we find everything that can be wrong in a text, and correct text survives the round trip.
#include "test.h"

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "../host/error.h"
#include "../host/files.h"
#include "../host/text.h"

using namespace std::string_literals;

// Decodes the text in pieces of `piece` bytes.
static std::u32string decode(const std::string& bytes, size_t piece = 1 << 20) {
  std::u32string out;
  Utf8Decoder decoder("the text");
  for (size_t i = 0; i < bytes.size(); i += piece) decoder.feed(bytes.substr(i, piece), [&](char32_t c) { out += c; });
  decoder.finish();
  return out;
}

TEST_CASE("utf8: every code point survives the round trip") {
  std::string bytes;
  std::u32string expected;
  for (char32_t c = 0; c <= 0x10FFFF; c++) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    bytes += utf8(c);
    expected += c;
  }
  CHECK(bytes.size() == 0x80 + 0x780 * 2 + (0xF800 - 0x800) * 3 + 0x100000 * 4);
  CHECK(decode(bytes) == expected);
}

TEST_CASE("utf8: a character may be cut anywhere between two pieces") {
  const std::string bytes = "a\u00E9\u20AC\U0001F600z";
  for (const size_t piece : {1, 2, 3, 4, 5}) CHECK(decode(bytes, piece) == U"a\u00E9\u20AC\U0001F600z");
}

TEST_CASE("utf8: what is not UTF-8 is refused with the place and the bytes") {
  struct Case {
    std::string bytes, place, why;
  };
  const Case cases[] = {
      {"ab\x80", "at byte offset 2, 80: ", "continuation byte without"},
      {"\xBF", "at byte offset 0, BF: ", "continuation byte without"},
      {"\xC3\xA9\xA9", "at byte offset 2, A9: ", "continuation byte without"},
      {"a\xC0\x80", "at byte offset 1, C0 80: ", "overlong"},
      {"\xC1\xBF", "at byte offset 0, C1 BF: ", "overlong"},
      {"\xE0\x9F\xBF", "at byte offset 0, E0 9F BF: ", "overlong"},
      {"\xF0\x8F\xBF\xBF", "at byte offset 0, F0 8F BF BF: ", "overlong"},
      {"x\xED\xA0\x80", "at byte offset 1, ED A0 80: ", "surrogate"},
      {"\xED\xBF\xBF", "at byte offset 0, ED BF BF: ", "surrogate"},
      {"\xF4\x90\x80\x80", "at byte offset 0, F4 90 80 80: ", "beyond U+10FFFF"},
      {"\xF7\xBF\xBF\xBF", "at byte offset 0, F7 BF BF BF: ", "beyond U+10FFFF"},
      {"\xF8\x88\x80\x80\x80", "at byte offset 0, F8: ", "never uses"},
      {"ok\xFF", "at byte offset 2, FF: ", "never uses"},
      {"caf\xE9 noir", "at byte offset 3, E9 20: ", "cut short"},
      {"\xE2\x82z", "at byte offset 0, E2 82 7A: ", "cut short"},
      {"\xE2\xE2\x82\xAC", "at byte offset 0, E2 E2: ", "cut short"},
      {"a\xE2\x82", "at byte offset 1, E2 82: ", "ends inside"},
      {"\xF0\x9F\x98", "at byte offset 0, F0 9F 98: ", "ends inside"},
      {"\xC3", "at byte offset 0, C3: ", "ends inside"},
  };
  for (const Case& c : cases)
    for (const size_t piece : {1, 100}) {
      const std::string message = error_of([&] { decode(c.bytes, piece); });
      CHECK(contains(message, "the text is not UTF-8: " + c.place));
      CHECK(contains(message, c.why));
    }
}

TEST_CASE("utf8: only a byte order mark at the very start is dropped") {
  std::u32string out;
  Utf8Decoder decoder("the text");
  decoder.feed("\uFEFFa\uFEFF", [&](char32_t c) { out += c; });
  CHECK(out == U"a\uFEFF");
  CHECK(decoder.dropped_bom());

  Utf8Decoder without("the text");
  without.feed("abc\uFEFF", [](char32_t) {});
  CHECK_FALSE(without.dropped_bom());

  out.clear();
  Utf8Decoder keeping("the text", Utf8Decoder::Bom::keep);
  keeping.feed("\uFEFFa", [&](char32_t c) { out += c; });
  CHECK(out == U"\uFEFFa");
}

TEST_CASE("vocabulary: ids are places in sorted order") {
  const Vocabulary v({U'b', U'\n', U'\U0001F600', U'a', U'\u20AC'});
  CHECK(v.size() == 5);
  CHECK(v.decode(0) == "\n");
  CHECK(v.decode(4) == "\U0001F600");
  CHECK(v.find(U'a') == 1);
  CHECK(v.find(U'\u20AC') == 3);
  CHECK(v.find(U'\U0001F600') == 4);
  CHECK(v.find(U'c') == -1);
  CHECK(v.find(U'\u20AD') == -1);
  CHECK(v.find(U'\U0001F601') == -1);
  CHECK(v.encode("b\u20ACa", "text") == std::vector<uint16_t>{2, 3, 1});
  CHECK(v.encode("", "text").empty());
  CHECK(Vocabulary().find(U'a') == -1);
}

TEST_CASE("vocabulary: its hash is FNV-1a of the characters' UTF-8") {
  CHECK(Vocabulary().hash() == 0xCBF29CE484222325);        // the offset basis
  CHECK(Vocabulary({U'a'}).hash() == 0xAF63DC4C8601EC8C);  // the published value for "a"
  CHECK(Vocabulary({U'o', U'b', U'f'}).hash() == fnv1a("bfo", 3));
  CHECK(Vocabulary({U'\u00E9'}).hash() == fnv1a("\u00E9", 2));
}

TEST_CASE("vocabulary: an unknown character is named with its place") {
  const Vocabulary v({U'a', U'\u00E9'});
  CHECK(contains(error_of([&] { v.encode("\u00E9ab", "--start"); }), "--start: character 3, 'b' (U+0062), is not"));
  CHECK(contains(error_of([&] { v.encode("\n", "--start"); }), "character 1, '\\n' (U+000A)"));
  CHECK(contains(error_of([&] { v.encode("a\U0001F600", "--start"); }), "character 2, '\U0001F600' (U+1F600)"));
  CHECK(contains(error_of([&] { v.encode("a\xE9", "--start"); }), "--start is not UTF-8: at byte offset 1"));
  CHECK(v.encode("\uFEFFa", "--start") == std::vector<uint16_t>{0});
  CHECK(Vocabulary({U'a', U'\uFEFF'}).encode("\uFEFFa", "--start") == std::vector<uint16_t>{1, 0});
}

TEST_CASE("vocabulary: a prompt in the other Unicode form is told so, and only then") {
  const auto said = [](const std::vector<char32_t>& characters, const std::string& prompt) {
    const std::string message = error_of([&] { Vocabulary(characters).encode(prompt, "--start"); });
    CHECK(contains(message, "is not in the vocabulary"));
    const size_t hint = message.find("; but the vocabulary has it ");
    return hint == std::string::npos ? "" : message.substr(hint);
  };
  const std::string has = "; but the vocabulary has it ", none;
  const std::string nfd = has + "in parts, the Unicode form NFD (uconv -x nfd converts to it)";
  const std::string nfc = has + "and its neighbour as one, the Unicode form NFC (uconv -x nfc converts to it)";
  CHECK(said({U'e', 0x301}, "\u00E9") == nfd);
  CHECK(said({U'e', 0x300}, "\u00E9") == none);  // the vocabulary lacks the accent, too
  CHECK(said({0x301}, "\u00E9") == none);
  CHECK(said({U'e', 0x301, 0xE9}, "\u00E8") == none);
  CHECK(said({0x3B1, 0x301}, "\u03AC") == nfd);
  CHECK(said({0x438, 0x306}, "\u0439") == nfd);
  CHECK(said({U'e', 0x302, 0x323}, "\u1EC7") == nfd);
  CHECK(said({U'e', 0x302}, "\u00DF") == none);
  CHECK(said({U'e', 0xE9}, "ee\u0301") == nfc);
  CHECK(said({U'a', U'e', 0xE9}, "a\u0301") == none);
  CHECK(said({U'e', 0xE9}, "\u0301") == none);
  CHECK(said({U'u', 0x16F}, "u\u030A") == nfc);
  CHECK(said({0x1112, 0x1161, 0x11AB}, "\uD55C") == nfd);
  CHECK(said({0x1112, 0x1161}, "\uD55C") == none);
  CHECK(said({0x1112, 0x1161}, "\uD558") == nfd);
  CHECK(said({0xD55C}, "\u1112\u1161\u11AB") == nfc);
  CHECK(said({0xD55C}, "\u1100\u1161") == none);
  CHECK(said({U'a'}, "\U0001F600") == none);
}

TEST_CASE("vocabulary: 65,535 characters fit, one more does not") {
  std::vector<char32_t> characters;
  for (char32_t c = 0x10000; characters.size() < 65535; c++) characters.push_back(c);
  const Vocabulary v(characters);
  CHECK(v.find(characters.back()) == 65534);
  characters.push_back(U'a');
  CHECK(contains(error_of([&] { Vocabulary{characters}; }), "65536 distinct characters are too many"));

  characters.clear();
  for (char32_t c = 1; characters.size() < 65535; c++)
    if (c < 0xD800 || c > 0xDFFF) characters.push_back(c);
  CHECK(Vocabulary(characters).find(characters.back()) == 65534);
}

TEST_CASE("vocabulary: what has no shape is shown by name") {
  CHECK(shown(U'a') == "a");
  CHECK(shown(U' ') == " ");
  CHECK(shown(U'\t') == "\\t");
  CHECK(shown(0x1B) == "U+001B");
  CHECK(shown(0x200B) == "U+200B");
  CHECK(shown(0x202E) == "U+202E");
  CHECK(shown(U'\u00E9') == "\u00E9");
}

TEST_CASE("vocabulary: vocab.json survives the round trip") {
  const std::string path = test_folder() + "/vocab.json";
  const Vocabulary v({0, U'\n', U'"', U'\\', U'a', 0x7F, U'\u00E9', U'\u2028', U'\uFEFF', U'\U0010FFFF'});
  v.save(path);
  const Vocabulary loaded = Vocabulary::load(path);
  CHECK(loaded.characters() == v.characters());
  CHECK(loaded.hash() == v.hash());
}

TEST_CASE("vocabulary: a damaged vocab.json is refused") {
  const std::string path = test_folder() + "/vocab.json";
  CHECK(contains(error_of([&] { Vocabulary::load(path); }), path + " is missing"));

  Vocabulary({U'a', U'b'}).save(path);
  const std::string good = read_file(path);
  struct Case {
    std::string from, to, why;
  };
  const Case cases[] = {
      {"}", "", "parse error"},
      {"\"a\"", "\"\xFF\"", "parse error"},
      {"\"vocab_size\": 2", "\"vocab_size\": 3", "2 characters, but vocab_size is 3"},
      {"\"vocab_size\": 2", "\"vocab_size\": 2.5", "2 characters, but vocab_size is 2.5"},
      {"\"vocab_size\": 2", "\"vocab_size\": 5e57", "2 characters, but vocab_size is 5e+57"},
      {"\"vocab_size\"", "\"size\"", "vocab_size"},
      {"\"hash\"", "\"hush\"", "hash"},
      {"\"a\"", "\"c\"", "not in ascending order"},
      {"\"a\"", "\"b\"", "not in ascending order"},
      {"\"a\"", "\"A\"", "but the file says"},
      {"\"a\"", "\"aa\"", "\"aa\" is not one character"},
      {"\"a\"", "\"\"", "\"\" is not one character"},
      {"\"a\"", "7", "type must be string"},
      {good, "[]", "cannot use at() with array"},
      {good, R"({"vocab_size": 0, "hash": "cbf29ce484222325", "characters": []})", "no characters"},
  };
  for (const Case& c : cases) {
    std::string bad = good;
    bad.replace(bad.find(c.from), c.from.size(), c.to);
    write_file(path, bad);
    const std::string message = error_of([&] { Vocabulary::load(path); });
    CHECK(contains(message, path + " is damaged: "));
    CHECK(contains(message, c.why));
    CHECK(read_file(path) == bad);
  }
}
