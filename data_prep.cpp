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
#include "host/ngram.h"     // defines: compute_baselines, save_baselines
#include "host/progress.h"  // defines: ProgressBar
#include "host/shards.h"    // defines: ShardWriter, Tokens, move_shards, shard_path
#include "host/text.h"      // defines: Utf8Decoder, Vocabulary, shown, with_commas
#include "host/version.h"   // defines: version_text

namespace fs = std::filesystem;

constexpr const char* usage =
    R"(usage: ./data_prep [TEXT] [--out DIR] [--shard_tokens N]

Turns a UTF-8 text into what the trainers read: the first nine tenths of its characters to train on, the rest to
validate, the vocabulary, and the losses of n-gram models to compare with. Line ends are kept as they are.

  TEXT              any UTF-8 text, /dev/stdin too (default: data/input.txt)
  --out DIR         where the files go (default: data)
  --shard_tokens N  characters in one file at most, 1 to 2147483647 (default: 100000000)
  --help            this text
  --version         the commit that this was built from, and the compiler
)";

struct Options {
  std::string text = "data/input.txt", out = "data";
  uint64_t shard_tokens = default_shard_tokens;
  bool help = false, version = false;
};

static uint64_t parse_shard_tokens(const std::string& value) {
  const bool number =
      !value.empty() && value.size() <= 10 && value.find_first_not_of("0123456789") == std::string::npos;
  const uint64_t n = number ? std::stoull(value) : 0;
  if (n < 1 || n > max_shard_tokens)
    fail("--shard_tokens ", value, ": a number from 1 to ", max_shard_tokens, " is needed");
  return n;
}

static Options parse(int argc, char** argv) {
  Options options;
  bool text_given = false;
  for (int i = 1; i < argc; i++) {
    std::string flag = argv[i], value;
    if (flag == "--help" || flag == "-h") {
      options.help = true;
      continue;
    }
    if (flag == "--version") {
      options.version = true;
      continue;
    }
    if (!flag.starts_with("-")) {
      if (text_given) fail("two texts are given, ", options.text, " and ", flag, ": one at a time (see --help)");
      options.text = flag;
      text_given = true;
      continue;
    }
    const size_t equals = flag.find('=');
    const std::string name = flag.substr(0, equals);
    if (name != "--out" && name != "--shard_tokens")
      fail("unknown flag ", name, ": there are --out, --shard_tokens, --help and --version");
    if (equals != std::string::npos)
      value = flag.substr(equals + 1);
    else if (++i < argc)
      value = argv[i];
    if (value.empty()) fail(name, " needs a value (see --help)");
    if (name == "--out")
      options.out = value;
    else
      options.shard_tokens = parse_shard_tokens(value);
  }
  return options;
}

// A folder in the output folder where everything is made before any of it replaces what is there: a failure on the way
// leaves the older files as they were. One that a killed run left behind is removed.
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

  // A pipe gives its bytes only once: they are copied, and read from there.
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
    const uint64_t more = (size - 1) / options.shard_tokens;
    std::printf("%s: %s tokens in %s%s\n", split, with_commas(size).c_str(), shard_path(options.out, split, 0).c_str(),
                more > 0 ? text(" and ", more, " more").c_str() : "");
  }
  std::printf("baselines, nats per character of val:");
  for (const Baseline& b : baselines) std::printf("%s %s %.4f", &b == &baselines[0] ? "" : ",", b.name.c_str(), b.loss);
  std::printf("\n");
}

static int prepare(const Options& options) {
  Source source(options.text);
  const Workshop workshop(options.out);
  if (!source.regular()) source.spool(workshop.path + "/text");
  ProgressBar progress("data_prep", 2 * source.size(), "B");
  uint64_t bytes_read = 0;

  // First pass: what the text is, which characters there are, and how many.
  bool html = false;
  std::vector<bool> seen(0x110000, false);
  uint64_t characters = 0;
  Utf8Decoder counter(options.text);
  source.read([&](std::string_view bytes) {
    if (bytes_read == 0) {
      const std::string what = looks_like(bytes);
      html = what == "an HTML page";
      if (!html && what != "JSON") refuse_other(options.text, bytes, "text", "a text in UTF-8 is needed");
    }
    counter.feed(bytes, [&](char32_t c) {
      seen[c] = true;
      characters++;
    });
    progress.update(bytes_read += bytes.size());
  });
  counter.finish();
  const uint64_t text_bytes = bytes_read;
  std::vector<char32_t> distinct;
  for (char32_t c = 0; c < seen.size(); c++)
    if (seen[c]) distinct.push_back(c);
  if (distinct.empty()) fail(options.text, " is empty: a text is needed");
  if (distinct.size() == 1)
    fail(options.text, " has only one character, '", shown(distinct[0]), "': there is nothing to predict");
  const Vocabulary vocabulary(std::move(distinct));

  // Second pass: their ids, the first nine tenths to train, the rest to validate.
  const uint64_t train_size = characters * 9 / 10, val_size = characters - train_size;
  ShardWriter train_writer(workshop.path, "train", train_size, vocabulary, options.shard_tokens);
  ShardWriter val_writer(workshop.path, "val", val_size, vocabulary, options.shard_tokens);
  Utf8Decoder encoder(options.text);
  std::vector<uint16_t> tokens;
  uint64_t written = 0;
  source.read([&](std::string_view bytes) {
    tokens.clear();
    encoder.feed(bytes, [&](char32_t c) {
      const int id = vocabulary.find(c);
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
  progress.finish();

  const Tokens train(workshop.path, "train", vocabulary), val(workshop.path, "val", vocabulary);
  const std::vector<Baseline> baselines = compute_baselines(train, val, vocabulary.size());
  save_baselines(workshop.path + "/baselines.json", baselines);
  vocabulary.save(workshop.path + "/vocab.json");

  // No vocabulary stands beside a mixture of old and new files: it goes first and comes last, and without one the
  // trainers refuse the folder.
  fs::remove(options.out + "/vocab.json");
  flush_folder(options.out);
  move_shards(workshop.path, options.out, "train");
  move_shards(workshop.path, options.out, "val");
  flush_folder(options.out);
  for (const char* name : {"/baselines.json", "/vocab.json"}) move_file(workshop.path + name, options.out + name);
  flush_folder(options.out);

  std::printf("%s: %s characters, %s bytes%s\n", options.text.c_str(), with_commas(characters).c_str(),
              with_commas(text_bytes).c_str(),
              counter.dropped_bom() ? ", a byte order mark at the start left out" : "");
  report(options, vocabulary, train_size, val_size, baselines);
  if (html) std::fprintf(stderr, "%s begins like an HTML page, and its tags count as text\n", options.text.c_str());
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
    std::fputs(options.help ? usage : version_text().c_str(), stdout);
    return 0;
  });
}
