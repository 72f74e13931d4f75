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
  const auto add = [&](const auto& entry) {
    const std::string kind = entry.path().extension().string();
    if (kind == ".h" || kind == ".cpp" || kind == ".cu" || kind == ".cuh" || kind == ".py")
      all += read_file(entry.path().string());
  };
  for (const auto& entry : fs::directory_iterator(".")) add(entry);
  for (const char* folder : {"kernels", "host", "dev", "test"})
    for (const auto& entry : fs::recursive_directory_iterator(folder)) add(entry);
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

TEST_CASE("Code on the page of the ladder is that of its sources") {
  const std::string page = read_file("doc/ladder.md");
  const std::regex excerpt("`([^`]+)`, `([^`]+)`:\n\n```cpp\n([^`]+)\n```");
  int excerpts = 0;
  for (std::sregex_iterator at(page.begin(), page.end(), excerpt), end; at != end; ++at) {
    const std::string path = (*at)[1], name = (*at)[2], code = (*at)[3];
    INFO(path << ", " << name);
    CHECK((read_file(path).find(code + "\n") != std::string::npos));
    CHECK(code.substr(0, code.find('{')).find(" " + name + "(") != std::string::npos);
    excerpts++;
  }
  CHECK(excerpts > 8);
  size_t blocks = 0;  // none stands there without its place
  for (size_t at = page.find("```cpp"); at != std::string::npos; at = page.find("```cpp", at + 1)) blocks++;
  CHECK(blocks == size_t(excerpts));
  for (const auto& entry : fs::directory_iterator("dev/ladder"))
    if (std::isdigit(entry.path().filename().string()[0]))
      CHECK(page.find("`" + entry.path().string() + "`") != std::string::npos);
}

TEST_CASE("The page of flags has the program's own text") {
  const std::string page = read_file("doc/flags.md"), help = help_text("train");
  CHECK(page.find(help) != std::string::npos);
}
