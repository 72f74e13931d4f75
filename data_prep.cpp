// Prepares a text for training: ./data_prep my.txt
// Reads it twice, once for its characters and once for their ids, in pieces: memory does not grow with the text.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "host/error.h"  // defines: fail, run_main
#include "host/files.h"  // defines: AtomicFile, Lock, fail_errno, flush_folder, looks_like, make_folder, move_file, refuse_other
#include "host/flags.h"     // defines: Flag, help_line, parse_flags
#include "host/ngram.h"     // defines: compute_baselines, save_baselines
#include "host/progress.h"  // defines: ProgressBar
#include "host/shards.h"    // defines: ShardWriter, Tokens, move_shards, shard_path
#include "host/text.h"      // defines: Utf8Decoder, Vocabulary, shown, with_commas
#include "host/version.h"   // defines: version_text

namespace fs = std::filesystem;

struct Options {
  std::string text = "data/input.txt", out = "data";
  int shard_tokens = int(default_shard_tokens);
  bool help = false, version = false;
};

static std::vector<Flag> flags(Options& options) {
  return {
      {"out", &options.out, 0, 0, {}, "folder that the files go into"},
      {"shard_tokens", &options.shard_tokens, 1, double(max_shard_tokens), {}, "characters in one file at most"},
  };
}

static std::string help_text() {
  Options defaults;
  std::string help = R"(usage: ./data_prep [TEXT] [--flag value | --flag=value ...]

Turns a UTF-8 text into what the trainers read: the first nine tenths of its characters to train on, the rest to
validate, the vocabulary, and the losses of n-gram models to compare with. Line ends are kept as they are. TEXT is any
file or pipe, /dev/stdin too; without it, data/input.txt.

flags, with their defaults:
)";
  for (const Flag& flag : flags(defaults)) help += help_line(flag);
  return help + "\n  --version says which commit this was built from, and by which compiler\n";
}

static Options parse(int argc, char** argv) {
  Options options;
  bool text_given = false;
  const auto unknown = [](const std::string& name) {
    fail("unknown flag --", name, ": there are --out, --shard_tokens, --help and --version");
  };
  const auto take_text = [&](const std::string& path) {
    if (text_given) fail("two texts are given, ", options.text, " and ", path, ": one at a time (see --help)");
    options.text = path;
    text_given = true;
  };
  const auto given = parse_flags({argv + std::min(argc, 1), argv + argc}, flags(options), unknown, take_text);
  if (options.out.empty()) fail("--out is a folder, not '' (see --help)");
  options.help = given.count("help");
  options.version = given.count("version");
  return options;
}

// A folder in the output folder where we make everything before any of it replaces an older file: a failure on the way
// leaves the older files as they were. The folder that a killed run left behind is removed.
struct Workshop {
  std::string path;
  Lock lock;
  explicit Workshop(const std::string& out) : path(out + "/data_prep.tmp"), lock((make_folder(out), out)) {
    fs::remove_all(path);
    make_folder(path);
  }
  ~Workshop() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
  Workshop(const Workshop&) = delete;
  Workshop& operator=(const Workshop&) = delete;
};

// A text that can be read twice.
class Source {
 public:
  explicit Source(const std::string& path) : path_(path) {
    open(path);
    struct stat info {};
    if (fstat(fileno(file_.get()), &info) != 0) fail_errno("read " + path);
    if (S_ISDIR(info.st_mode)) fail(path, " is a folder: a text file is needed");
    regular_ = S_ISREG(info.st_mode);
    size_ = uint64_t(info.st_size);
  }
  bool regular() const { return regular_; }
  uint64_t size() const { return size_; }  // in bytes

  // A pipe gives its bytes only once: we copy them to a file and read that.
  void spool(const std::string& path) {
    AtomicFile copy(path);
    size_ = 0;
    read([&](std::string_view bytes) {
      copy.write(bytes.data(), bytes.size());
      size_ += bytes.size();
    });
    copy.commit();
    open(path);
    regular_ = true;
  }

  // Calls sink(bytes) for each piece, from the start.
  template <class Sink>
  void read(Sink&& sink) {
    std::vector<char> piece(1 << 20);
    if (regular_) std::rewind(file_.get());
    while (const size_t bytes = std::fread(piece.data(), 1, piece.size(), file_.get()))
      sink(std::string_view(piece.data(), bytes));
    if (std::ferror(file_.get())) fail_errno("read " + path_);
  }

 private:
  void open(const std::string& path) {
    file_.reset(std::fopen(path.c_str(), "rb"));
    if (!file_ && errno == ENOENT) fail(path, " is missing: give another text, or fetch one with `make data`");
    if (!file_) fail_errno("open " + path);
  }

  std::string path_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_{nullptr, std::fclose};
  bool regular_ = false;
  uint64_t size_ = 0;
};

static void report(const Options& options, const Vocabulary& vocabulary, uint64_t train_size, uint64_t val_size,
                   const std::vector<Baseline>& baselines) {
  constexpr size_t most_shown = 120;
  std::string list;
  for (const char32_t c : vocabulary.characters()) {
    if (list.size() > most_shown) {
      list += " ...";
      break;
    }
    list += shown(c);
  }
  std::printf("vocabulary: %s characters: %s\n", with_commas(uint64_t(vocabulary.size())).c_str(), list.c_str());
  for (const char* split : {"train", "val"}) {
    const uint64_t size = split == std::string("train") ? train_size : val_size;
    const uint64_t more = (size - 1) / uint64_t(options.shard_tokens);
    std::printf("%s: %s tokens in %s%s\n", split, with_commas(size).c_str(), shard_path(options.out, split, 0).c_str(),
                more > 0 ? text(" and ", more, " more").c_str() : "");
  }
  std::printf("baselines, nats per character of val:");
  for (const Baseline& b : baselines) std::printf("%s %s %.4f", &b == &baselines[0] ? "" : ",", b.name.c_str(), b.loss);
  std::printf("\n");
}

// What the first pass finds out about a text.
struct Survey {
  Vocabulary vocabulary;
  uint64_t characters = 0, bytes = 0;
  bool html = false, dropped_bom = false;
};

// First pass: what the text is, which characters there are, and how many.
static Survey survey(Source& source, const std::string& name, ProgressBar& progress) {
  Survey found;
  std::vector<bool> seen(0x110000, false);
  Utf8Decoder decoder(name);
  source.read([&](std::string_view bytes) {
    if (found.bytes == 0) {
      const std::string what = looks_like(bytes);
      found.html = what == "an HTML page";
      if (!found.html && what != "JSON") refuse_other(name, bytes, "text", "a text in UTF-8 is needed");
    }
    decoder.feed(bytes, [&](char32_t c) {
      seen[c] = true;
      found.characters++;
    });
    progress.update(found.bytes += bytes.size());
  });
  decoder.finish();
  found.dropped_bom = decoder.dropped_bom();
  std::vector<char32_t> distinct;
  for (char32_t c = 0; c < seen.size(); c++)
    if (seen[c]) distinct.push_back(c);
  if (distinct.empty()) fail(name, " is empty: a text is needed");
  if (distinct.size() == 1)
    fail(name, " has only one character, '", shown(distinct[0]), "': there is nothing to predict");
  found.vocabulary = Vocabulary(std::move(distinct));
  return found;
}

// Second pass: the characters' ids, the first nine tenths to train, the rest to validate.
static void write_tokens(Source& source, const Survey& found, const std::string& folder, const Options& options,
                         ProgressBar& progress) {
  const uint64_t characters = found.characters, train_size = characters * 9 / 10, val_size = characters - train_size;
  const uint64_t shard_tokens = uint64_t(options.shard_tokens);
  ShardWriter train_writer(folder, "train", train_size, found.vocabulary, shard_tokens);
  ShardWriter val_writer(folder, "val", val_size, found.vocabulary, shard_tokens);
  Utf8Decoder decoder(options.text);
  std::vector<uint16_t> tokens;
  uint64_t written = 0, bytes_read = found.bytes;
  source.read([&](std::string_view bytes) {
    tokens.clear();
    decoder.feed(bytes, [&](char32_t c) {
      const int id = found.vocabulary.find(c);
      if (id < 0) fail(options.text, " changed while it was read");
      tokens.push_back(uint16_t(id));
    });
    if (tokens.size() > characters - written) fail(options.text, " changed while it was read");
    const size_t to_train = size_t(std::min<uint64_t>(tokens.size(), train_size - std::min(train_size, written)));
    train_writer.write(tokens.data(), to_train);
    val_writer.write(tokens.data() + to_train, tokens.size() - to_train);
    written += tokens.size();
    progress.update(bytes_read += bytes.size());
  });
  if (written < characters) fail(options.text, " changed while it was read");
  train_writer.finish();
  val_writer.finish();
}

// Puts the new files in the place of the old ones. The vocabulary goes first and comes last, so that none
// stands beside a mixture of old and new files: without one the trainers refuse the folder.
static void replace_files(const std::string& from, const std::string& to) {
  fs::remove(to + "/vocab.json");
  flush_folder(to);
  move_shards(from, to, "train");
  move_shards(from, to, "val");
  flush_folder(to);
  for (const char* name : {"/baselines.json", "/vocab.json"}) move_file(from + name, to + name);
  flush_folder(to);
}

static int prepare(const Options& options) {
  Source source(options.text);
  const Workshop workshop(options.out);
  if (!source.regular()) source.spool(workshop.path + "/text");
  ProgressBar progress("data_prep", 2 * source.size(), "B");
  const Survey found = survey(source, options.text, progress);
  write_tokens(source, found, workshop.path, options, progress);
  progress.finish();

  const Vocabulary& vocabulary = found.vocabulary;
  const Tokens train(workshop.path, "train", vocabulary), val(workshop.path, "val", vocabulary);
  const std::vector<Baseline> baselines = compute_baselines(train, val, vocabulary.size());
  save_baselines(workshop.path + "/baselines.json", baselines);
  vocabulary.save(workshop.path + "/vocab.json");
  replace_files(workshop.path, options.out);

  std::printf("%s: %s characters, %s bytes%s\n", options.text.c_str(), with_commas(found.characters).c_str(),
              with_commas(found.bytes).c_str(), found.dropped_bom ? ", a byte order mark at the start left out" : "");
  report(options, vocabulary, train.size(), val.size(), baselines);
  if (found.html)
    std::fprintf(stderr, "%s begins like an HTML page, and its tags count as text\n", options.text.c_str());
  if (vocabulary.find('\r') >= 0)
    std::fprintf(
        stderr, "\\r is a character of this vocabulary: the text has line ends of %s\n",
        vocabulary.find('\n') >= 0 ? "Windows (tr -d '\\r' takes it out)" : "old Macs (tr '\\r' '\\n' changes them)");
  return 0;
}

int main(int argc, char** argv) {
  return run_main([&] {
    const Options options = parse(argc, argv);
    if (!options.help && !options.version) return prepare(options);
    std::fputs((options.help ? help_text() : version_text()).c_str(), stdout);
    return 0;
  });
}
