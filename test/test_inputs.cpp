// Damaged files, strange texts, impossible flags, odd surroundings. The program either just works, or it refuses: it
// names the file or flag, exits with code 1 and touches nothing.
#ifdef __APPLE__
#include <util.h>
#else
#include <pty.h>
#endif
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>

#include "../host/text.h"
#include "trainer.h"

namespace {

const std::string data_prep = program("data_prep");

std::string some_text(size_t characters) {
  std::string text;
  while (text.size() < characters) text += "ab";
  return text.substr(0, characters);
}

}  // namespace

TEST_CASE("Inputs: every damaged file is refused by name, and nothing is touched", "[inputs]") {
  const std::string folder = prepared(), data = folder + "/data", out = folder + "/out";
  REQUIRE(train(folder, "--max_iters=3").code == 0);
  const std::string resume = train_gpt + " --init_from=resume --max_iters=5 --data " + data + " --out_dir " + out;
  const std::string anew = train_gpt + small_run + " --data " + data + " --out_dir " + folder + "/new";
  const std::string sample = train_gpt + " sample --max_new_tokens=3 --out_dir " + out;
  const std::string eval = train_gpt + " eval --data " + data + " --out_dir " + out;
  const auto cut = [](size_t n) { return [n](std::string s) { return s.substr(0, n); }; };
  const auto put = [](size_t at, char c) { return [at, c](std::string s) { return s[at] = c, s; }; };
  const auto add = [](std::string s) { return s + "xy"; };
  const auto empty = [](std::string) { return std::string(); };
  const auto noise = [](std::string) { return "\x7f\x01 not what it should be \xff" + std::string(3000, '\x9c'); };
  struct Case {
    std::string file;
    std::function<std::string(std::string)> damage;
    std::string why;
    std::vector<std::string> commands;
  };
  const std::string shard = "/data/train_000000.bin", val = "/data/val_000000.bin", vocabulary = "/data/vocab.json",
                    last = "/out/ckpt_last.safetensors";
  const Case cases[] = {
      {shard, empty, " is empty", {anew, resume, eval}},
      {shard, cut(1000), " is truncated: 1000 bytes, and the header alone has 1024", {anew}},
      {shard, cut(2000), " is truncated: 2000 bytes", {anew, eval}},
      {val, add, " is oversized", {anew, resume}},
      {shard, put(0, 'x'), " is no token shard: it starts with", {anew}},
      {val, put(4, 9), " is a shard of version 9; this program reads version 1", {anew}},
      {val, put(12, 9), " belongs to another vocabulary", {anew}},
      {val, put(1024 + 7, 1), ": token 3 (byte offset 1030) is 257, but the vocabulary has ids 0 to 1", {anew, eval}},
      {shard, noise, " is no token shard", {anew}},
      {vocabulary, empty, " is empty: run ./data_prep again", {anew, resume, eval}},
      {"/data/baselines.json", empty, " is empty: run ./data_prep again", {anew}},
      {vocabulary, cut(20), " is damaged: ", {anew}},
      {vocabulary, noise, " is damaged: ", {anew}},
      {"/data/baselines.json", cut(20), " is damaged: ", {anew, resume}},
      {last, empty, " is empty: a checkpoint of this program is needed", {resume}},
      {last, empty, " is empty: the weights of a model are needed", {sample, eval}},
      {last, cut(5), ": it has only 5 bytes", {resume, sample}},
      {last, cut(3000), "it is cut off", {resume, sample}},
      {last, cut(20000), "the file is cut off", {resume, sample}},
      {last, noise, "no safetensors file", {resume, sample, eval}},
      {last, put(30000, '\x55'), " is damaged: its checksum is ", {resume, sample, eval}},
  };
  for (const Case& c : cases) {
    const std::string path = folder + c.file, whole = read_file(path);
    write_file(path, c.damage(whole));
    fs::remove_all(folder + "/new");
    const auto before = contents(folder);
    for (const std::string& command : c.commands) {
      check_refused(command, c.why);
      check_refused(command, path);
    }
    auto after = contents(folder);
    after.erase("new");  // the program may have made this folder
    CHECK((after == before));
    write_file(path, whole);
  }
  CHECK(run(resume).code == 0);  // the run can go on
}

TEST_CASE("Inputs: something else stands where a file should be", "[inputs]") {
  const std::string folder = prepared(), data = folder + "/data", out = folder + "/out";
  REQUIRE(train(folder, "--max_iters=3").code == 0);
  const std::string resume = train_gpt + " --init_from=resume --max_iters=5 --data " + data + " --out_dir " + out;
  const std::string sample = train_gpt + " sample --max_new_tokens=3 --out_dir " + out;
  struct Case {
    std::string path, command;
  };
  for (const auto& [path, command] :
       {Case{out + "/ckpt_last.safetensors", resume}, Case{out + "/ckpt_last.safetensors", sample},
        Case{out + "/metrics.jsonl", resume}, Case{data + "/train_000000.bin", resume},
        Case{data + "/vocab.json", resume}, Case{data + "/baselines.json", resume}}) {
    const std::string kept = path + ".kept";
    fs::rename(path, kept);
    fs::create_directory(path);
    check_refused(command, path);
    fs::remove(path);
    REQUIRE(mkfifo(path.c_str(), 0600) == 0);
    check_refused(command, path);  // it does not wait until somebody writes to the pipe
    fs::remove(path);
    fs::rename(kept, path);
  }
  fs::create_directory(folder + "/prompt");
  check_refused(sample + " --start=FILE:" + folder + "/prompt", folder + "/prompt: it is a folder");
  check_refused(sample + " --start=FILE:" + folder + "/none", folder + "/none");
  check_refused(sample + " --start=FILE:", "could not open");
  for (const std::string name : {"/ckpt_last.safetensors.tmp", "/lock"}) {  // a run must write to both
    fs::create_directories(folder + "/blocked" + name);
    check_refused(train_gpt + small_run + " --data " + data + " --out_dir " + folder + "/blocked", name);
    fs::remove_all(folder + "/blocked");
  }
  CHECK(run(resume).code == 0);
}

TEST_CASE("Inputs: a file of another kind is called what it is", "[inputs]") {
  const std::string folder = prepared(), data = folder + "/data", out = folder + "/out";
  REQUIRE(train(folder, "--max_iters=3").code == 0);
  const std::string resume = train_gpt + " --init_from=resume --max_iters=5 --data " + data + " --out_dir " + out;
  const std::string sample = train_gpt + " sample --out_dir " + out + " --checkpoint ";
  const std::string last = out + "/ckpt_last.safetensors", pth = out + "/microGPT_model.pth";
  const std::string html = "\n<!DOCTYPE html>\n<html><body>404</body></html>\n",
                    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
                    gzip("\x1f\x8b\x08\0\0\0\0\0\0\x03KLJ", 13),
                    pickle = "\x80\x02\x8a\nl\xfc\x9c" + std::string(99, '\0');
  const std::pair<std::string, std::string> kinds[] = {
      {read_file(pth), "a zip archive, as PyTorch's .pth files are"},
      {pickle, "a pickle"},
      {html, "an HTML page"},
      {pointer, "a Git LFS pointer (git lfs pull gets the file itself)"},
      {gzip, "compressed by gzip"},
      {"To be, or not to be", "text"},
  };
  check_refused(sample + data + "/train_000000.bin", "/train_000000.bin is a token shard: the weights of a model are");
  check_refused(sample + data + "/vocab.json", "/vocab.json is JSON: the weights of a model are needed");
  write_file(folder + "/pickle", pickle);
  check_refused(sample + folder + "/pickle", folder + "/pickle: its pickle has an instruction, 0, that");
  std::string zip = read_file(pth);
  for (size_t at; (at = zip.find("data.pkl")) != std::string::npos;) zip[at] = 'x';
  write_file(folder + "/zip", zip);
  check_refused(sample + folder + "/zip",
                "/zip is a zip archive, but not one that torch.save wrote: it has no data.pkl");
  check_refused(sample + out, out + ": it is a folder");
  for (const std::string& path : {last, data + "/val_000000.bin", data + "/vocab.json", data + "/baselines.json"}) {
    const std::string kept = read_file(path);
    for (const auto& [content, name] : kinds) {
      write_file(path, content);
      check_refused(resume, path + " is " + name);
    }
    write_file(path, kept);
  }
  CHECK(run(resume).code == 0);
}

TEST_CASE("Inputs: a folder that cannot be written", "[inputs]") {
  const std::string folder = prepared(), flags = small_run + " --data " + folder + "/data --out_dir ";
  if (fs::exists("/proc/self")) check_refused(train_gpt + flags + "/proc/none", "could not make the folder /proc/none");
  check_refused("FAULT=1:EROFS " + program("train_gpt_faulty") + flags + folder + "/out",
                "Read-only file system (choose a folder on a disk that can be written)");
  if (geteuid() == 0) return;  // permissions do not stop root
  fs::create_directory(folder + "/closed");
  fs::permissions(folder + "/closed", fs::perms::owner_read | fs::perms::owner_exec);
  check_refused(train_gpt + flags + folder + "/closed", "Permission denied (check who owns it");
}

TEST_CASE("Inputs: texts of all kinds", "[inputs]") {
  const std::string folder = test_folder(), out = " --out " + folder + "/data";
  const auto prepare = [&](const std::string& text) {
    write_file(folder + "/text", text);
    return run(data_prep + " " + folder + "/text" + out);
  };
  // Line ends, empty lines and NUL stay. A byte order mark goes, and data_prep says so.
  const std::string odd = "\xEF\xBB\xBF\r\n\n\n" + std::string(1, '\0') + "a\r\nb\n\n";
  const Run r = prepare(odd);
  CHECK(r.code == 0);
  CHECK(contains(r.out, "11 characters, 14 bytes, a byte order mark at the start left out"));
  const Vocabulary vocabulary = Vocabulary::load(folder + "/data/vocab.json");
  CHECK(vocabulary.characters() == std::vector<char32_t>{0, '\n', '\r', 'a', 'b'});
  CHECK(read_file(folder + "/data/train_000000.bin").substr(1024) ==
        std::string("\2\0\1\0\1\0\1\0\0\0\3\0\2\0\1\0\4\0", 18));

  std::string many;
  for (char32_t c = 0x10000; c < 0x10000 + 70000; c++) many += utf8(c);
  check_refused(data_prep + " /dev/null" + out, "/dev/null is empty");
  write_file(folder + "/text", many);
  check_refused(data_prep + " " + folder + "/text" + out, "70000 distinct characters are too many");
  write_file(folder + "/text", std::string(5000, 'a'));
  check_refused(data_prep + " " + folder + "/text" + out, "has only one character, 'a'");

  // From an unnamed pipe, then from a named one.
  REQUIRE(run("printf abcabcabcabc | " + data_prep + " /dev/stdin" + out).code == 0);
  const std::string want = read_file(folder + "/data/train_000000.bin");
  REQUIRE(mkfifo((folder + "/fifo").c_str(), 0600) == 0);
  REQUIRE(run("printf abcabcabcabc > " + folder + "/fifo & " + data_prep + " " + folder + "/fifo" + out).code == 0);
  CHECK((read_file(folder + "/data/train_000000.bin") == want));

  // In the shortest text that is long enough, the tenth that becomes val has T + 1 characters.
  const std::string flags = train_gpt + small_run + " --max_iters=2 --data " + folder + "/data --out_dir " + folder;
  REQUIRE(prepare(some_text(17)).code == 0);
  check_refused(flags + "/a", "train has 15 tokens, and a window of --block_size 16 needs 17");
  REQUIRE(prepare(some_text(169)).code == 0);
  CHECK(run(flags + "/b").code == 0);
  REQUIRE(prepare(some_text(160)).code == 0);
  check_refused(flags + "/c", "val has 16 tokens, and a window of --block_size 16 needs 17");
}

TEST_CASE("Inputs: sizes beyond any machine are refused with the memory that they would need", "[inputs]") {
  const std::string folder = prepared(),
                    run_it = train_gpt + small_run + " --data " + folder + "/data --out_dir " + folder;
  for (const std::string flags :
       {"--n_embd=1000000000", "--n_embd=1000000", "--batch_size=2000000000", "--batch_size=20000000",
        "--n_layer=2000000000", "--n_embd=2000000000 --n_layer=2000000000",
        "--block_size=150 --batch_size=100000000"}) {
    INFO(flags);
    check_refused(run_it + "/out " + flags, "this run needs ");
    check_refused(run_it + "/out " + flags, " of memory");
    check_refused(run_it + "/out " + flags, "--n_embd");
  }
  check_refused(run_it + "/out --gradient_accumulation_steps=2000000000", "is more than 2147483647 windows a step");
  CHECK(!fs::exists(folder + "/out"));
  check_refused(run_it + "/out --n_embd=99999999999", "--n_embd is a whole number from 1 to 2000000000");
  check_refused(run_it + "/out --block_size=2000000000", "a window of --block_size 2000000000 needs 2000000001");
#if !defined(__SANITIZE_ADDRESS__)  // AddressSanitizer takes terabytes of addresses
  check_refused("ulimit -v 300000; " + run_it + "/small --n_embd=2048 --threads=1", "of memory");
#endif
}

TEST_CASE("Inputs: surroundings that a run does not depend on", "[inputs]") {
  const std::string folder = prepared(), flags = small_run + " --data " + folder + "/data --out_dir " + folder;
  REQUIRE(run(train_gpt + flags + "/want").code == 0);
  int n = 0;
  for (const std::string before :
       {"LC_ALL=de_DE.UTF-8 LANG=de_DE.UTF-8 ", "env -i PATH=\"$PATH\" ", "TMPDIR=/nowhere ", "TERM=dumb COLUMNS=0 ",
        "OMP_NUM_THREADS=many ", "OMP_NUM_THREADS=0 ", "FAULT_CLOCK=1 ", "cd / && "}) {
    const std::string out = "/" + std::to_string(n++);
    const bool faulty = before.find("FAULT") != std::string::npos;
    const Run r = run(before + (faulty ? program("train_gpt_faulty") : train_gpt) + flags + out + " </dev/null");
    INFO(before << r.err);
    CHECK(r.code == 0);
    for (const char* name : {"/ckpt_last.safetensors", "/microGPT_model.pth", "/training_plot.png", "/sample.txt"})
      CHECK((read_file(folder + out + name) == read_file(folder + "/want" + name)));
    for (const nlohmann::json& line : lines_of(folder + out + "/metrics.jsonl"))
      for (const char* time : {"time_ms", "train_seconds"})
        if (line.contains(time)) CHECK((line[time].get<double>() > 0 && line[time].get<double>() < 600));
  }
  const std::string odd = folder + "/a b 'c' \"d\" $(e) `f` ü\n";
  REQUIRE(run(train_gpt + small_run + " --data " + folder + "/data --out_dir " + folder + "/want2").code == 0);
  setenv("ODD", odd.c_str(), 1);
  CHECK(run(train_gpt + small_run + " --data " + folder + "/data --out_dir \"$ODD\"").code == 0);
  CHECK((read_file(odd + "/training_plot.png") == read_file(folder + "/want/training_plot.png")));
}

TEST_CASE("Inputs: the progress bar keeps to a terminal that changes its size", "[inputs]") {
  const std::string folder = prepared();
  const std::string command = train_gpt + small_run + " --max_iters=1000000 --eval_interval=1000000 --data " + folder +
                              "/data --out_dir " + folder + "/out >" + folder + "/stdout";
  winsize size{};
  size.ws_row = 24;
  size.ws_col = 70;
  int terminal = -1;
  const pid_t child = forkpty(&terminal, nullptr, nullptr, &size);
  REQUIRE(child >= 0);
  if (child == 0) {
    execl("/bin/sh", "sh", "-c", ("exec " + command).c_str(), nullptr);
    _exit(127);
  }
  std::string seen;
  size_t narrow_from = 0;
  const auto bars = [&](size_t from) {  // the progress lines: from the start of a line to the code that clears its rest
    std::vector<std::string> found;
    for (size_t at = seen.find("\rtrain", from); at != std::string::npos; at = seen.find("\rtrain", at + 1)) {
      const size_t end = seen.find("\033[K", at);
      if (end != std::string::npos) found.push_back(seen.substr(at + 1, end - at - 1));
    }
    return found;
  };
  const auto width = [](const std::string& line) {
    size_t n = 0;
    Utf8Decoder decoder("line");
    decoder.feed(line, [&](char32_t) { n++; });
    return n;
  };
  char piece[4096];
  for (ssize_t n; (n = read(terminal, piece, sizeof piece)) > 0;) {
    seen.append(piece, size_t(n));
    if (narrow_from == 0 && bars(0).size() > 3) {
      size.ws_col = 30;
      ioctl(terminal, TIOCSWINSZ, &size);
      narrow_from = seen.size();
    }
    if (narrow_from == 0) continue;
    // Bars that were drawn before the window shrank may still arrive.
    const std::vector<std::string> since = bars(narrow_from);
    if (since.size() > 10000 || (since.size() > 4 && width(since[since.size() - 4]) < 30)) break;
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(terminal);
  REQUIRE(narrow_from > 0);
  const std::vector<std::string> wide = bars(0), narrow = bars(narrow_from);
  CHECK(width(wide[0]) > 40);
  CHECK(width(wide[0]) < 70);
  size_t i = 0;
  while (i < narrow.size() && width(narrow[i]) >= 30) i++;
  REQUIRE(i + 3 < narrow.size());
  for (; i < narrow.size(); i++) CHECK(width(narrow[i]) < 30);
}
