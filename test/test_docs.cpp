// Every file that the documentation names exists, and every other name stands where the text says.
#include <cctype>
#include <filesystem>
#include <regex>
#include <sstream>

#include "../host/config.h"
#include "../host/files.h"
#include "test.h"

namespace {

namespace fs = std::filesystem;

struct Word {
  std::string text, before;  // the `code`, and the text between the code before it and this one
};

// Every `code` in a piece of text.
std::vector<Word> code_words(const std::string& text) {
  std::vector<Word> words;
  const std::regex code("([^`]*)`([^`]+)`");
  for (std::sregex_iterator at(text.begin(), text.end(), code), end; at != end; ++at)
    words.push_back({(*at)[2], std::regex_replace((*at)[1].str(), std::regex("\\s+"), " ")});
  return words;
}

// The programs write out/ and data/; files in them are not part of the tree.
bool is_file_of_the_tree(const std::string& word) {
  static const std::regex file(R"([\w./]+\.(h|cpp|cu|cuh|py|sh|md)|(kernels|host|dev|test)/)");
  return std::regex_match(word, file);
}

bool has_word(const std::string& source, const std::string& word) {
  return std::regex_search(source, std::regex("\\b" + word + "\\b"));
}

// A page's paragraphs, items of lists, rows of tables and headings, without its blocks of code.
std::vector<std::string> pieces_of(const std::string& page) {
  std::vector<std::string> pieces = {""};
  std::istringstream in(std::regex_replace(read_file(page), std::regex("```[^`]*```"), ""));
  for (std::string line; std::getline(in, line);) {
    static const std::regex begins(R"((\||#|- |\d+\. ).*)");
    if (line.empty() || std::regex_match(line, begins)) pieces.push_back("");
    pieces.back() += line + "\n";
  }
  return pieces;
}

// A function's source: from the first line that has its name and `(` and is not a statement, to the closing brace.
std::string function_in(const std::string& path, const std::string& name) {
  std::istringstream in(read_file(path));
  const std::regex head("( *)[A-Za-z][^;=]*\\b" + name + "\\([^;]*");
  std::string body, indent;
  for (std::string line; std::getline(in, line);) {
    std::smatch match;
    if (body.empty() && !std::regex_match(line, match, head)) continue;
    if (body.empty()) indent = match[1];
    body += line + "\n";
    if (line == indent + "}") return body;
  }
  return "";
}

std::vector<std::string> cells_of(const std::string& row) {
  std::vector<std::string> cells;
  std::istringstream in(row);
  for (std::string cell; std::getline(in, cell, '|');) cells.push_back(cell);
  return cells;
}

std::vector<std::string> pages() {
  std::vector<std::string> all = {"README.md", "CONTRIBUTING.md", "dev/cuda_on_cpu/README.md"};
  for (const auto& entry : fs::directory_iterator("doc"))
    if (entry.path().extension() == ".md") all.push_back(entry.path().string());
  return all;
}

const std::regex symbol(R"([A-Za-z_]\w+(::\w+)?)");

// The names in a table whose columns are functions, headed "`forward` in `train_gpt.cu`", stand in those functions.
int check_columns(const std::vector<std::string>& pieces) {
  int checked = 0;
  std::vector<std::string> functions;  // by column; "" if the column is not a function
  for (const std::string& piece : pieces) {
    if (piece.empty() || piece[0] != '|') {
      functions.clear();
      continue;
    }
    const std::vector<std::string> cells = cells_of(piece);
    if (functions.empty()) {
      for (const std::string& cell : cells) {
        static const std::regex head(" `(\\w+)` in `([^`]+)` ");
        std::smatch match;
        const bool is_function = std::regex_match(cell, match, head);
        functions.push_back(is_function ? function_in(match[2], match[1]) : "");
        if (is_function) CHECK(!functions.back().empty());
      }
      continue;
    }
    for (size_t i = 0; i < cells.size() && i < functions.size(); i++)
      for (const Word& word : code_words(functions[i].empty() ? "" : cells[i]))
        if (std::regex_match(word.text, symbol)) {
          INFO(piece << "names `" << word.text << "` in column " << i);
          CHECK(has_word(functions[i], word.text));
          checked++;
        }
  }
  return checked;
}

// If a file stands beside a name, as in "`name` in `file`" or "(`name`, `file`)", that file has the name. Otherwise one
// of the files that the paragraph names has it, or one that the section names before.
int check_symbols(const std::vector<std::string>& pieces) {
  int checked = 0;
  std::vector<std::string> section;  // files
  for (const std::string& piece : pieces) {
    if (piece[0] == '#') section.clear();
    const std::vector<Word> words = code_words(piece);
    std::vector<std::string> files;
    for (const Word& word : words)
      if (is_file_of_the_tree(word.text) && fs::is_regular_file(word.text)) files.push_back(word.text);
    section.insert(section.end(), files.begin(), files.end());
    for (size_t i = 0; i < words.size(); i++) {
      std::string name = words[i].text;
      static const std::regex member(R"(w\.(\w+)(\[l\])?)"), beside(",? in |,? at the end of | \\(|, ");
      std::smatch match;
      if (std::regex_match(name, match, member)) name = match[1];
      if (is_file_of_the_tree(name) || !std::regex_match(name, symbol)) continue;
      std::vector<std::string> where = files.empty() ? section : files;
      if (i + 1 < words.size() && is_file_of_the_tree(words[i + 1].text) &&
          std::regex_match(words[i + 1].before, beside))
        where = {words[i + 1].text};
      std::string source, names;
      for (const std::string& file : where) {
        source += read_file(file);
        names += " " + file;
      }
      INFO("`" << name << "` is not in" << names << ", says:\n" << piece);
      CHECK(has_word(source, name));
      checked++;
    }
  }
  return checked;
}

}  // namespace

TEST_CASE("The documentation names only files that exist") {
  int files = 0;
  for (const std::string& page : pages())
    for (const std::string& piece : pieces_of(page))
      for (const Word& word : code_words(piece)) {
        INFO(page << " names `" << word.text << "`");
        if (!is_file_of_the_tree(word.text)) continue;
        CHECK((fs::exists(word.text) || fs::exists(fs::path(page).parent_path() / word.text)));
        files++;
      }
  CHECK(files > 20);
}

TEST_CASE("A link of the documentation leads to a file, and to a heading in it") {
  const auto anchor_of = [](const std::string& heading) {
    std::string out;
    for (const char c : heading.substr(heading.find(' ') + 1))
      if (std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_')
        out += char(std::tolower(c));
      else if (c == ' ')
        out += '-';
    return out;
  };
  int links = 0;
  for (const std::string& page : pages()) {
    const std::string text = std::regex_replace(read_file(page), std::regex("```[^`]*```"), "");
    static const std::regex link(R"(\]\(([^)#:]*)(#[^)]*)?\))");
    for (std::sregex_iterator at(text.begin(), text.end(), link), end; at != end; ++at) {
      INFO(page << " has the link " << (*at)[0]);
      const fs::path target = (*at)[1].length() ? fs::path(page).parent_path() / (*at)[1].str() : fs::path(page);
      CHECK(fs::exists(target));
      links++;
      if (!(*at)[2].matched || !fs::is_regular_file(target)) continue;
      bool found = false;
      for (const std::string& piece : pieces_of(target.string()))
        if (piece[0] == '#') found = found || "#" + anchor_of(piece.substr(0, piece.find('\n'))) == (*at)[2];
      CHECK(found);
    }
  }
  CHECK(links > 20);
}

TEST_CASE("Names in the tour and on the page of the GPU stand where those pages say") {
  CHECK(check_columns(pieces_of("doc/tour.md")) > 20);
  CHECK(check_symbols(pieces_of("doc/tour.md")) > 40);
  CHECK(check_symbols(pieces_of("doc/gpu.md")) > 10);
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
  size_t blocks = 0;  // no block may stand on the page without its place
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
