// Texts: UTF-8 decoding does not depend on how the text is cut, and what is accepted comes back byte for byte.
#include "../../../host/text.h"

#include <algorithm>

#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto decode = [&](size_t piece, std::string& again, std::string& error) {
    Utf8Decoder decoder("text", Utf8Decoder::Bom::keep);
    try {
      for (size_t at = 0; at < size; at += piece)
        decoder.feed(text.substr(at, piece), [&](char32_t c) { again += utf8(c); });
      decoder.finish();
    } catch (const Error& e) { error = e.what(); }
  };
  std::string whole, pieces, error, error_of_pieces;
  decode(size + 1, whole, error);
  decode(size ? 1 + data[0] % 5 : 1, pieces, error_of_pieces);
  must(error == error_of_pieces && whole == pieces);
  must(error.empty() ? whole == text : text.substr(0, whole.size()) == whole);
  if (!error.empty() || size == 0) return 0;

  std::vector<char32_t> characters;
  Utf8Decoder decoder("text", Utf8Decoder::Bom::keep);
  decoder.feed(text, [&](char32_t c) {
    characters.push_back(c);
    shown(c);
  });
  std::sort(characters.begin(), characters.end());
  characters.erase(std::unique(characters.begin(), characters.end()), characters.end());
  const Vocabulary vocabulary(characters);
  std::string decoded;
  for (const uint16_t id : vocabulary.encode(text, "text")) decoded += vocabulary.decode(id);
  must(decoded == text);
  return 0;
}
