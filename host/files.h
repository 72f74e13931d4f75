// Files, written so that what was there before is lost only once the new one is safe, and read without copies.
// defines: fail_errno, read_file, open_file, write_all, flush_file, AtomicFile,
//          write_file, move_file, flush_folder, make_folder, looks_like, refuse_other,
//          Lock, fnv1a, checksum, MappedFile
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

// Raises "could not <doing>: <what errno says> (<what to do about it>)".
[[noreturn]] void fail_errno(const std::string& doing);

std::string read_file(const std::string& path);

// open(2), which a signal cannot interrupt; -1: see errno.
int open_file(const std::string& path, int flags);
// Writes all bytes, however few the system takes at a time; path: for the message.
void write_all(int file, const void* data, size_t bytes, const std::string& path);
bool flush_file(int file);  // fsync(2), in the same way

// A file that appears under its name whole or not at all: it grows under a temporary name in the same folder, and
// commit() flushes it to the disk and renames it. Until then an older file of that name stays as it is, and without
// commit() the destructor removes the temporary one. A second writer of the same path is refused.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(const void* data, size_t bytes);
  void commit();

 private:
  std::string path_, temporary_;
  int file_ = -1;  // -1: committed
};

// Writes a whole file that way.
void write_file(const std::string& path, std::string_view content);

// rename(2): the file at `to`, if there is one, is replaced.
void move_file(const std::string& from, const std::string& to);

// Brings the names in a folder, and what was renamed there, to the disk.
void flush_folder(const std::string& folder);

// Makes a folder and those above it; one that exists already is fine.
void make_folder(const std::string& path);

// Says what a file is, judging by its first bytes, for a message about a wrong file: "a zip archive, as PyTorch's .pth
// files are", "an HTML page", "text". Empty if we do not recognise it.
std::string looks_like(std::string_view bytes);

// Raises "<path> is <what it looks like>: <instead>" if it looks like something and that is not what is wanted.
void refuse_other(const std::string& path, std::string_view bytes, std::string_view wanted, const char* instead);

// Keeps other processes out of a folder while this object lives, by the system's lock on a file `lock` in it. The
// system releases the lock however we end, so a file that a killed process left behind keeps nobody out. If another
// process has the lock, the constructor raises an Error that names it.
class Lock {
 public:
  explicit Lock(const std::string& folder);
  ~Lock();
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  std::string path_;
  int file_;
};

// FNV-1a with 64 bits (Fowler, Noll, Vo) of bytes, or of the 16 bits of a token at a time. A state that is passed on
// continues a hash over several pieces.
template <class Unit>
uint64_t fnv1a(const Unit* units, size_t count, uint64_t state = 14695981039346656037ull) {
  for (size_t i = 0; i < count; i++) state = (state ^ std::make_unsigned_t<Unit>(units[i])) * 1099511628211ull;
  return state;
}

// A checksum at memory speed, for large data. Any single changed byte changes it, for certain; other damage escapes
// with a probability of about 2^-64. Against accidents, not against forgery. Part of the checkpoints' format: it must
// not change.
uint64_t checksum(const void* data, size_t bytes);

// A file's bytes, read only, as if they were in memory. Shrinking the file meanwhile ends the program (SIGBUS).
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const unsigned char* data() const { return data_; }  // nullptr if the file is empty
  size_t size() const { return size_; }

 private:
  const unsigned char* data_ = nullptr;
  size_t size_ = 0;
};
