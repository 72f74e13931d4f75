// What the documentation names must exist: files, and names in the sources.
#include <cctype>
#include <filesystem>
#include <regex>

#include "../host/config.h"
#include "../host/files.h"
#include "test.h"

namespace {

namespace fs = std::filesystem;

std::string all_sources() {
  std::string all;
  for (const char* folder : {".", "kernels", "host", "dev", "test"})
    for (const auto& entry : fs::directory_iterator(folder)) {
      const std::string kind = entry.path().extension().string();
      if (kind == ".h" || kind == ".cpp" || kind == ".cu" || kind == ".cuh" || kind == ".py")
        all += read_file(entry.path().string());
    }
  return all;
}

// Every `code` in the text outside of code blocks.
std::vector<std::string> code_words(const std::string& text) {
  std::vector<std::string> words;
  const std::string plain = std::regex_replace(text, std::regex("```[^`]*```"), "");
  const std::regex code("`([^`]+)`");
  for (std::sregex_iterator at(plain.begin(), plain.end(), code), end; at != end; ++at) words.push_back((*at)[1]);
  return words;
}

// out/ and data/ are written by the programs, and their files are not part of the tree.
bool is_file_of_the_tree(const std::string& word) {
  static const std::regex file(R"([\w./]+\.(h|cpp|cu|cuh|py|sh|md)|(kernels|host|dev|test)/)");
  return std::regex_match(word, file);
}

}  // namespace

TEST_CASE("The documentation names only files and symbols that exist") {
  const std::string sources = all_sources();
  int files = 0, symbols = 0;
  std::vector<std::string> pages = {"README.md"};
  for (const auto& entry : fs::directory_iterator("doc"))
    if (entry.path().extension() == ".md") pages.push_back(entry.path().string());
  for (const std::string& page : pages)
    for (const std::string& word : code_words(read_file(page))) {
      INFO(page << " names `" << word << "`");
      static const std::regex symbol(R"([A-Za-z_]\w*(::\w+)?)"), member(R"(w\.(\w+)(\[l\])?)");
      std::smatch match;
      if (is_file_of_the_tree(word)) {
        CHECK(fs::exists(word));
        files++;
      } else if (std::regex_match(word, match, member)) {
        CHECK(std::regex_search(sources, std::regex("(ONE|EACH_LAYER)\\(" + match[1].str() + ",")));
        symbols++;
      } else if (page == "doc/tour.md" && word.size() > 1 && std::regex_match(word, symbol)) {
        CHECK(std::regex_search(sources, std::regex("\\b" + word + "\\b")));
        symbols++;
      }
    }
  CHECK(files > 20);
  CHECK(symbols > 40);
}

TEST_CASE("The README's table of flags is the program's own") {
  const std::string readme = read_file("README.md"), help = help_text("train");
  CHECK(readme.find(help) != std::string::npos);
}
