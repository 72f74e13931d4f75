// data_prep as you run it: what it writes and what it refuses. A refusal leaves every file as it was.
#include "test.h"

#include <sys/stat.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "../host/files.h"
#include "../host/ngram.h"
#include "../host/shards.h"
#include "../host/text.h"

namespace fs = std::filesystem;
using namespace std::string_literals;

static Run data_prep(const std::string& arguments) { return run(program("data_prep") + " " + arguments); }

// The text that a folder's shards hold.
static std::string text_in(const std::string& folder) {
  const Vocabulary vocabulary = Vocabulary::load(folder + "/vocab.json");
  std::string all;
  for (const char* split : {"train", "val"}) {
    const Tokens tokens(folder, split, vocabulary);
    std::vector<int> ids(tokens.size());
    tokens.copy(0, ids.size(), ids.data());
    for (const int id : ids) all += vocabulary.decode(id);
  }
  return all;
}

static std::string some_letters(const std::string& letters, size_t length) {
  std::string text;
  for (size_t i = 0; i < length; i++) text += letters[i * i % 17 % letters.size()];
  return text;
}

TEST_CASE("data_prep: the first nine tenths train, the rest validates") {
  const std::string folder = test_folder(), text = folder + "/my.txt", out = folder + "/new/data";
  write_file(text, "na\u00EFve \u20AC\U0001F600\r\n");  // 10 characters + 1
  const Run r = data_prep(text + " --out " + out);
  CHECK(r.code == 0);
  CHECK(r.err ==
        "\\r is a character of this vocabulary: the text has line ends of Windows (tr -d '\\r' takes it out)\n");
  CHECK(contains(r.out, text + ": 10 characters, 16 bytes\n"));
  CHECK(contains(r.out, "vocabulary: 10 characters: \\n\\r aenv\u00EF\u20AC\U0001F600\n"));
  CHECK(contains(r.out, "train: 9 tokens in " + out + "/train_000000.bin\n"));
  CHECK(contains(r.out, "val: 1 tokens in " + out + "/val_000000.bin\n"));
  CHECK(text_in(out) == read_file(text));  // with the line end
  CHECK(contents(out).size() == 4);        // two shards, vocab.json, baselines.json
}

TEST_CASE("data_prep: shards, flags in both forms, and nothing left of an earlier run") {
  const std::string folder = test_folder(), text = folder + "/my.txt", out = folder + "/data";
  std::string many;
  for (int i = 0; i < 101; i++) many += char('a' + i * i % 17);
  write_file(text, many);
  Run r = data_prep("--shard_tokens=7 --out=" + out + " " + text);
  CHECK(r.code == 0);
  CHECK(contains(r.out, "train: 90 tokens in " + out + "/train_000000.bin and 12 more\n"));
  CHECK(contains(r.out, "val: 11 tokens in " + out + "/val_000000.bin and 1 more\n"));
  CHECK(text_in(out) == many);
  CHECK(load_baselines(out + "/baselines.json").size() == 4);

  r = data_prep(text + " --out " + out + " --shard_tokens 50");
  CHECK(r.code == 0);
  CHECK(text_in(out) == many);
  CHECK(contents(out).size() == 2 + 1 + 2);
  const auto first = contents(out);
  CHECK(data_prep(text + " --out " + out + " --shard_tokens 50").code == 0);
  CHECK(contents(out) == first);  // equal texts, equal files
}

TEST_CASE("data_prep: a text that comes once, through a pipe") {
  const std::string folder = test_folder(), out = folder + "/data", fifo = folder + "/fifo";
  Run r = run("printf 'hello pipe' | " + program("data_prep") + " /dev/stdin --out " + out);
  CHECK(r.code == 0);
  CHECK(r.err == "");
  CHECK(text_in(out) == "hello pipe");
  CHECK(contents(out).size() == 4);  // the copy is gone

  REQUIRE(mkfifo(fifo.c_str(), 0600) == 0);
  r = run("(printf 'hello fifo' > " + fifo + " &) && " + program("data_prep") + " " + fifo + " --out " + out);
  CHECK(r.code == 0);
  CHECK(text_in(out) == "hello fifo");
}

TEST_CASE("data_prep: a text of another kind is prepared, and it is said") {
  const std::string folder = test_folder(), out = folder + "/data", text = folder + "/my.txt";
  const std::string page = "\uFEFF\n <HTML lang=en>a page", old_mac = "a\rb\r", json = "{\"text\": 1}";
  for (const auto& [content, notice] :
       {std::pair{page, text + " begins like an HTML page, and its tags count as text\n"},
        {old_mac, "the text has line ends of old Macs (tr '\\r' '\\n' changes them)\n"},
        {json, ""s},
        {"[Enter <html>]\n"s, ""s}}) {
    write_file(text, content);
    const Run r = data_prep(text + " --out " + out);
    CHECK(r.code == 0);
    CHECK((notice.empty() ? r.err.empty() : contains(r.err, notice)));
    CHECK(text_in(out) == content.substr(content == page ? 3 : 0));
  }
}

TEST_CASE("data_prep: a text longer than the pieces it is read in") {
  const std::string folder = test_folder(), text = folder + "/my.txt", out = folder + "/data";
  std::string many = "\uFEFFx";  // x shifts all by one byte, so that a piece of 2^20 bytes ends inside a character
  while (many.size() < 3'000'000) many += "\u20AC\u00E9\U0001F600a";
  write_file(text, many);
  const Run r = data_prep(text + " --out " + out);
  CHECK(r.code == 0);
  CHECK(contains(r.out, "a byte order mark at the start left out"));
  CHECK(text_in(out) == many.substr(3));
}

TEST_CASE("data_prep: what cannot be prepared is refused, and nothing is touched") {
  const std::string folder = test_folder(), out = folder + "/data", text = folder + "/my.txt";
  write_file(text, "the good text");
  REQUIRE(data_prep(text + " --out " + out).code == 0);
  const auto before = contents(out);

  std::string too_many;
  for (char32_t c = 0x10000; c < 0x20000; c++) too_many += utf8(c);
  const std::string late = std::string(2'000'000, 'a') + "b\xE9";
  struct Case {
    std::string content, why;
  };
  const Case cases[] = {
      {"", text + " is empty"},
      {"\uFEFF", text + " is empty"},
      {"aaaa", text + " has only one character, 'a'"},
      {"caf\xE9 noir", text + " is not UTF-8: at byte offset 3, E9 20: "},
      {"caf\xC3", text + " is not UTF-8: at byte offset 3, C3: the text ends inside a character"},
      {"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
       text + " is a Git LFS pointer (git lfs pull"},
      {"\xFF\xFEh\0i\0"s, text + " is text in UTF-16 (convert it first: iconv -f utf-16 -t utf-8): a text in UTF-8 "},
      {"PK\3\4\x14", text + " is a zip archive"},
      {"%PDF-1.7\n", text + " is a PDF document"},
      {"\x1F\x8B\x08\0"s, text + " is compressed by gzip (unpack it first)"},
      {late, text + " is not UTF-8: at byte offset 2000001"},
      {too_many, "65536 distinct characters are too many"},
  };
  for (const Case& c : cases) {
    write_file(text, c.content);
    const Run r = data_prep(text + " --out " + out);
    CHECK(r.code == 1);
    CHECK(r.out == "");
    CHECK(contains(r.err, "error: " + c.why));
    CHECK(contents(out) == before);
  }
  write_file(text, too_many.substr(4));
  CHECK(data_prep(text + " --out " + folder + "/largest").code == 0);

  const auto refusal = [&](const std::string& arguments) {
    const Run r = data_prep(arguments);
    CHECK(r.code == 1);
    CHECK(r.out == "");
    CHECK(contents(out) == before);
    return r.err;
  };
  write_file(text, "the good text");
  const std::string to_out = " --out " + out;
  CHECK(contains(refusal(folder + "/none.txt" + to_out), "error: " + folder + "/none.txt is missing"));
  CHECK(contains(refusal(folder + to_out), "error: " + folder + " is a folder"));
  CHECK(contains(refusal(text + " --out " + text), text + " is a file"));
  CHECK(contains(refusal(text + " " + text + to_out), "two texts"));
  CHECK(contains(refusal(text + to_out + " --shard_token 5"), "unknown flag --shard_token: there are"));
  CHECK(contains(refusal(text + to_out + " -x"), "'-x' is not a flag"));
  CHECK(contains(refusal(text + " --out"), "--out"));
  CHECK(contains(refusal(text + " --out="), "--out is a folder, not ''"));
  for (const char* bad : {"0", "-1", "many", "1e6", "2147483648", "99999999999999999999"})
    CHECK(contains(refusal(text + to_out + " --shard_tokens " + bad),
                   "--shard_tokens is a whole number from 1 to 2147483647, not '"s + bad + "'"));
}

TEST_CASE("data_prep: an interrupted preparation is noticed, and the next one cleans up") {
  const std::string folder = test_folder(), out = folder + "/data", text = folder + "/my.txt";
  make_folder(out + "/data_prep.tmp");
  write_file(out + "/data_prep.tmp/train_000003.bin", "half");
  CHECK_THROWS(Vocabulary::load(out + "/vocab.json"));
  write_file(text, "the good text");
  CHECK(data_prep(text + " --out " + out).code == 0);
  CHECK(contents(out).size() == 4);
}

TEST_CASE("data_prep: no vocabulary stands beside a mixture of two texts") {
  const std::string folder = test_folder(), out = folder + "/data", text = folder + "/my.txt";
  write_file(text, "abcabcabc");
  REQUIRE(data_prep(text + " --out " + out).code == 0);
  // Both texts have the same characters, so the hash cannot tell them apart. A folder is in the val shard's way.
  fs::remove(out + "/val_000000.bin");
  make_folder(out + "/val_000000.bin/in_the_way");
  write_file(text, "cbacbacba");
  const Run r = data_prep(text + " --out " + out);
  CHECK(r.code == 1);
  CHECK(contains(r.err, out + "/val_000000.bin"));
  CHECK_FALSE(fs::exists(out + "/vocab.json"));
  CHECK_FALSE(fs::exists(out + "/data_prep.tmp"));
}

TEST_CASE("data_prep: help") {
  for (const char* flag : {"--help", "-h"}) {
    const Run r = data_prep(flag);
    CHECK(r.code == 0);
    CHECK(r.err == "");
    for (const char* part : {"usage:", "--out", "--shard_tokens", "data/input.txt"}) CHECK(contains(r.out, part));
  }
  const Run version = data_prep("--version");
  CHECK(version.code == 0);
  CHECK(version.out.substr(0, 9) == "microGPT ");
}

TEST_CASE("data_prep: Tiny Shakespeare") {
  const char* text = std::getenv("MICROGPT_TEXT");
  if (!text) {
    skip("MICROGPT_TEXT does not name Tiny Shakespeare");
    return;
  }
  const std::string out = test_folder();
  const Run r = data_prep(text + " --out "s + out);
  CHECK(r.code == 0);
  CHECK(contains(r.out, ": 1,115,394 characters, 1,115,394 bytes\n"));
  CHECK(contains(r.out, "vocabulary: 65 characters: \\n !$&',-.3:;?ABC"));
  CHECK(contains(r.out, "train: 1,003,854 tokens"));
  CHECK(contains(r.out, "val: 111,540 tokens"));
  CHECK(contains(r.out, "uniform 4.1744, unigram 3.3473, bigram 2.4819, 5-gram 1.6688\n"));
  CHECK(text_in(out) == read_file(text));
}

TEST_CASE("get_text: keeps what exists, checks what comes, falls back, and leaves nothing half done") {
  // The script finds our curl and bible in the folder bin first. Our curl writes something and exits with a given code.
  const std::string folder = test_folder(), bin = folder + "/bin", out = folder + "/data/input.txt";
  const auto fake = [&](const char* name, const std::string& body) {
    make_folder(bin);
    write_file(bin + "/" + name, "#!/bin/sh\n" + body + "\n");
    fs::permissions(bin + "/" + name, fs::perms::owner_all);
  };
  const auto get_text = [&] {
    const Run r = run("PATH=" + bin + ":$PATH sh dev/setup/get_text.sh " + out);
    CHECK_FALSE(fs::exists(out + ".part"));
    return r;
  };
  const std::string to_output = "while [ \"$1\" != -o ]; do shift; done; ";
  fake("bible", "echo 'Ge1:1 In the beginning'; echo 'Ge1:2 And the earth'");

  fake("curl", to_output + "echo half > \"$2\"; exit 28");
  Run r = get_text();
  CHECK(r.code == 1);  // two verses are no Bible
  CHECK(contains(r.err, "could not download https://raw.githubusercontent.com/karpathy/char-rnn/"));
  CHECK(contains(r.err, "printed 2 verses instead of 31102"));
  CHECK_FALSE(fs::exists(out));

  fake("bible", "yes 'Ge1:1 In the beginning' | head -n 31101; echo '1Jn2:1 My little children'");
  r = get_text();
  CHECK(r.code == 0);
  CHECK(contains(r.err, "King James Bible, NOT Tiny Shakespeare"));
  const std::string bible = read_file(out);
  CHECK(bible.starts_with("In the beginning\nIn the"));
  CHECK(bible.ends_with("beginning\n\nMy little children\n"));

  write_file(out, "mine");
  r = get_text();
  CHECK(r.code == 0);
  CHECK(read_file(out) == "mine");

  fs::remove(out);
  fake("curl", to_output + "echo 'a login page' > \"$2\"");
  r = get_text();
  CHECK(r.code == 0);
  CHECK(contains(r.err, "is not Tiny Shakespeare: its sha256 is"));
  CHECK(contains(r.err, "King James Bible"));
  CHECK(read_file(out) == bible);
}

TEST_CASE("data_prep: every call that writes a file fails once, and no mixture of two texts is left", "[reliability]") {
#ifdef __APPLE__
  return skip("macOS does not let a program stand before the system's calls");
#endif
  const std::string folder = test_folder(), out = folder + "/data";
  const std::string old_text = some_letters("abc", 150), new_text = some_letters("abcd", 250);
  write_file(folder + "/old.txt", old_text);
  write_file(folder + "/new.txt", new_text);
  const std::string flags = " --shard_tokens=50 --out " + out, anew = " " + folder + "/new.txt" + flags;
  const auto begin = [&] {
    fs::remove_all(out);
    REQUIRE(data_prep(folder + "/old.txt" + flags).code == 0);
  };
  begin();
  REQUIRE(run("FAULT_LOG=" + folder + "/calls " + program("data_prep_faulty") + anew).code == 0);
  const auto want = contents(out);
  std::vector<std::string> calls = {""};
  std::ifstream log(folder + "/calls");
  for (std::string line; std::getline(log, line);) calls.push_back(line);
  REQUIRE(calls.size() > 30);

  const std::vector<std::string> faults = {"EIO", "ENOSPC", "EINTR", "kill", "power"};
  int kept = 0, replaced = 0, refused = 0;
  for (size_t n = 1; n < calls.size(); n++)
    for (size_t f = 0; f < faults.size(); f++) {
      if (sanitized && (n + f) % faults.size() != 0) continue;
      const std::string& fault = faults[f];
      begin();
      const Run r = run("FAULT=" + std::to_string(n) + ":" + fault + " " + program("data_prep_faulty") + anew);
      INFO(fault << " at call " << n << ", " << calls[n] << ": " << r.err);
      const bool for_people = calls[n].starts_with("write") && contains(calls[n], "/lock");
      CHECK(r.code == (fault == "EINTR" || (for_people && fault[0] == 'E') ? 0 : fault[0] == 'E' ? 1 : 128 + SIGKILL));
      if (r.code == 1) CHECK(contains(r.err, "error: could not "));
      const std::string error = error_of([&] {
        const std::string found = text_in(out);
        (found == old_text ? kept : replaced)++;
        CHECK((found == old_text || found == new_text));
      });
      if (error != "no error") {
        refused++;
        CHECK(contains(error, "vocab.json is missing"));
      }
      REQUIRE(data_prep(anew.substr(1)).code == 0);
      CHECK((contents(out) == want));
    }
  const int least = sanitized ? 3 : 20;
  CHECK((kept > least && replaced > least && refused > least));
}
