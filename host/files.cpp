#include "files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

#include "error.h"

namespace {

const char* hint(int error) {
  switch (error) {
    case ENOSPC:
      return " (the disk is full: free some space or choose a folder on another disk)";
    case EDQUOT:
      return " (your quota is used up: remove something or choose a folder on another disk)";
    case EFBIG:
      return " (files may not grow that large here: raise ulimit -f, or choose a folder on another file system)";
    case EACCES:
    case EPERM:
      return " (check who owns it and what its permissions allow)";
    case EROFS:
      return " (choose a folder on a disk that can be written)";
    case ENOENT:
      return " (check the path: relative ones start at the folder you are in)";
    case EISDIR:
      return " (a folder has this name: move it or choose another name)";
    case ENOTDIR:
      return " (a file stands where the path needs a folder)";
    default:
      return "";
  }
}

// Opens to read, and tells the size. Refuses everything that has no size, a folder first of all.
int open_regular(const std::string& path, size_t* size) {
  const int file = open_file(path, O_RDONLY | O_NONBLOCK);  // a FIFO must not make us wait
  if (file < 0) fail_errno("open " + path);
  struct stat info {};
  if (fstat(file, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(file);
    fail("could not open ", path, ": it is ", S_ISDIR(info.st_mode) ? "a folder" : "no regular file");
  }
  *size = size_t(info.st_size);
  return file;
}

// Opens or makes a file to write and takes the system's lock on it; -1 and EWOULDBLOCK: another process has it.
int open_locked(const std::string& path) {
  for (;;) {
    const int file = open_file(path, O_RDWR | O_CREAT);
    if (file < 0) return -1;
    int result;
    do result = flock(file, LOCK_EX | LOCK_NB);
    while (result != 0 && errno == EINTR);
    // Its last owner may have renamed or removed it before we had the lock: then ours is not the file of that name. A
    // file system without locks keeps nobody out.
    struct stat ours {
    }, named{};
    const bool taken = result != 0 && errno == EWOULDBLOCK;
    if (!taken && fstat(file, &ours) == 0 && stat(path.c_str(), &named) == 0 && ours.st_ino == named.st_ino &&
        ours.st_dev == named.st_dev)
      return file;
    const int error = taken ? EWOULDBLOCK : errno;
    close(file);
    errno = error;
    if (taken) return -1;
  }
}

}  // namespace

void fail_errno(const std::string& doing) {
  const int error = errno;
  fail("could not ", doing, ": ", std::strerror(error), hint(error));
}

std::string read_file(const std::string& path) {
  size_t size = 0;
  const int file = open_regular(path, &size);
  std::string content(size, '\0');
  size_t done = 0;
  while (done < size) {
    const ssize_t n = read(file, content.data() + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int error = errno;
      close(file);
      errno = error;
      fail_errno("read " + path);
    }
    if (n == 0) break;  // it has shrunk since
    done += size_t(n);
  }
  close(file);
  content.resize(done);
  return content;
}

int open_file(const std::string& path, int flags) {
  int file;
  do file = open(path.c_str(), flags | O_CLOEXEC, 0666);
  while (file < 0 && errno == EINTR);
  return file;
}

void write_all(int file, const void* data, size_t bytes, const std::string& path) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    // macOS refuses more than 2 GiB at once.
    const ssize_t n = ::write(file, next, bytes < (size_t{1} << 30) ? bytes : size_t{1} << 30);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno("write " + path);
    next += n;
    bytes -= size_t(n);
  }
}

bool flush_file(int file) {
#ifdef F_FULLFSYNC
  if (fcntl(file, F_FULLFSYNC) == 0) return true;  // macOS: its fsync stops at the drive's own memory
#endif
  int result;
  do result = fsync(file);
  while (result != 0 && errno == EINTR);
  return result == 0;
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)), temporary_(path_ + ".tmp") {
  file_ = open_locked(temporary_);
  if (file_ < 0 && errno == EWOULDBLOCK)
    fail("could not write ", path_, ": another process is writing it (wait for it, or choose another folder)");
  if (file_ < 0) fail_errno("write " + temporary_);
  if (ftruncate(file_, 0) != 0 && errno != EINVAL) {  // what a killed process left; a device has no length
    const int error = errno;
    close(file_);
    errno = error;
    fail_errno("write " + temporary_);
  }
}

AtomicFile::~AtomicFile() {
  if (file_ < 0) return;
  unlink(temporary_.c_str());
  close(file_);
}

void AtomicFile::write(const void* data, size_t bytes) { write_all(file_, data, bytes, path_); }

void AtomicFile::commit() {
  // The order matters: were the file renamed before its bytes are on the disk, a power cut could leave the name with
  // half of them, and the old file gone.
  if (!flush_file(file_)) fail_errno("write " + path_);
  move_file(temporary_, path_);
  close(file_);  // all is on the disk: what close could say is of no interest any more
  file_ = -1;    // and nothing is left for the destructor
  const std::string folder = std::filesystem::path(path_).parent_path().string();
  flush_folder(folder.empty() ? "." : folder);
}

void move_file(const std::string& from, const std::string& to) {
  if (rename(from.c_str(), to.c_str()) != 0) fail_errno("rename " + from + " to " + to);
}

void flush_folder(const std::string& folder) {
  const int handle = open_file(folder, O_RDONLY);
  if (handle < 0) return;  // a folder that can be written but not read: its turn comes with the system's next flush
  // Some file systems have no such call for folders.
  const bool done = flush_file(handle) || errno == EINVAL || errno == ENOTSUP;
  const int error = errno;
  close(handle);
  errno = error;
  if (!done) fail_errno("write the folder " + folder);
}

Lock::Lock(const std::string& folder) : path_(folder + "/lock"), file_(open_locked(path_)) {
  if (file_ < 0 && errno == EWOULDBLOCK) {
    std::string owner = read_file(path_);
    fail(folder, " is in use", owner.empty() ? "" : " by ", owner, ": wait for it, stop it, or choose another folder");
  }
  if (file_ < 0) fail_errno("write " + path_);
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  const std::string owner = text("process ", getpid(), " on ", host);
  if (ftruncate(file_, 0) != 0 || ::write(file_, owner.data(), owner.size()) < 0) {}  // no more than a help for people
}

Lock::~Lock() {
  unlink(path_.c_str());
  close(file_);
}

void write_file(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content.data(), content.size());
  file.commit();
}

void make_folder(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::path above;
  for (const fs::path& part : fs::path(path)) {
    above /= part;
    const fs::file_status status = fs::status(above, error);
    if (fs::exists(status) && !fs::is_directory(status))
      fail("could not make the folder ", path, ": ", above.string(), " is a file (move it or choose another folder)");
  }
  fs::create_directories(path, error);
  if (error && !fs::is_directory(path)) {
    errno = error.value();
    fail_errno("make the folder " + path);
  }
}

std::string looks_like(std::string_view bytes) {
  using namespace std::string_view_literals;
  if (bytes.empty()) return "empty";
  // The length of a header, a number of 64 bits that is never large, and the header, which is JSON.
  if (bytes.size() > 8 && bytes.substr(4, 5) == "\0\0\0\0{"sv) return "a safetensors file";
  if (bytes.size() > 1 && bytes[0] == '\x80' && bytes[1] >= 2 && bytes[1] <= 5)
    return "a pickle, as Python and PyTorch before 1.6 write them";
  static constexpr std::pair<std::string_view, const char*> known[] = {
      {"PK\3\4", "a zip archive, as PyTorch's .pth files are"},
      {"\x88\xD8\x34\x01", "a token shard"},  // ours and llm.c's: 20240520
      {"\x1F\x8B", "compressed by gzip (unpack it first)"},
      {"\xFD\x37zXZ", "compressed by xz (unpack it first)"},
      {"\x28\xB5\x2F\xFD", "compressed by zstd (unpack it first)"},
      {"%PDF-", "a PDF document (take its text out first, for example with pdftotext)"},
      {"\xFF\xFE", "text in UTF-16 (convert it first: iconv -f utf-16 -t utf-8)"},
      {"\xFE\xFF", "text in UTF-16 (convert it first: iconv -f utf-16 -t utf-8)"},
      {"version https://git-lfs.github.com/spec/", "a Git LFS pointer (git lfs pull gets the file itself)"},
  };
  for (const auto& [first, what] : known)
    if (bytes.starts_with(first)) return what;

  bytes = bytes.substr(0, 512);
  if (bytes.starts_with("\xEF\xBB\xBF")) bytes.remove_prefix(3);
  const auto binary = [](unsigned char c) { return (c < ' ' && !std::isspace(c)) || c == 0x7F || c == 0xFF; };
  if (std::any_of(bytes.begin(), bytes.end(), binary)) return "";
  std::string start(bytes.substr(std::min(bytes.find_first_not_of(" \t\r\n"), bytes.size())));
  std::transform(start.begin(), start.end(), start.begin(), [](unsigned char c) { return char(std::tolower(c)); });
  for (const char* tag : {"<!doctype html", "<html", "<head"})
    if (start.starts_with(tag)) return "an HTML page";
  return start.starts_with('{') || start.starts_with('[') ? "JSON" : "text";
}

void refuse_other(const std::string& path, std::string_view bytes, std::string_view wanted, const char* instead) {
  const std::string what = looks_like(bytes);
  if (!what.empty() && what != wanted) fail(path, " is ", what, ": ", instead);
}

uint64_t checksum(const void* data, size_t bytes) {
  static_assert(std::endian::native == std::endian::little, "files hold little-endian words");
  const unsigned char* p = static_cast<const unsigned char*>(data);
  // With either argument held fixed, a step is a bijection of the other: what differs once, differs to the end. The
  // word is multiplied before it is added and the sum rotated before it is multiplied, because a product carries
  // nothing downwards: without that a flip of a high bit is undone by one flip of a certain lower bit in the next word.
  constexpr uint64_t odd1 = 0x9E3779B97F4A7C15ull, odd2 = 0xD6E8FEB86659FD93ull;
  const auto step = [](uint64_t state, uint64_t word) { return std::rotl(state + word * odd2, 31) * odd1; };
  // Four chains, so that the multiplier's latency does not set the pace.
  uint64_t lane[4] = {1, 2, 3, 4}, word[4];
  size_t left = bytes;
  for (; left >= sizeof word; left -= sizeof word, p += sizeof word) {
    std::memcpy(word, p, sizeof word);
    for (int i = 0; i < 4; i++) lane[i] = step(lane[i], word[i]);
  }
  uint64_t state = bytes;  // data that only grew by zeros is other data
  for (uint64_t chain : lane) state = step(state, chain);
  for (; left > 0; left--) state = step(state, *p++);
  state = (state ^ state >> 32) * odd2;
  return state ^ state >> 29;
}

MappedFile::MappedFile(const std::string& path) {
  const int file = open_regular(path, &size_);
  void* mapping = size_ == 0 ? nullptr : mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  const int error = errno;
  close(file);
  errno = error;
  if (mapping == MAP_FAILED) fail_errno("read " + path);
  data_ = static_cast<const unsigned char*>(mapping);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<unsigned char*>(data_), size_);
}
