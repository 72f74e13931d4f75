// Linked into the shipped program, this file makes the system fail: it counts the calls that write files, and fails one
// of them as FAULT says.
//   FAULT=12:ENOSPC   the 12th call fails with this errno: ENOSPC, EDQUOT, EROFS, EIO, or EINTR at the next call
//                     that is not rename, which never gives EINTR
//   FAULT=12:short    the first write from there on takes only half of its bytes
//   FAULT=12:torn     the same write takes half of its bytes, then the process is killed
//   FAULT=12:kill     the process is killed before the 12th call
//   FAULT=12:power    the same, and the disk forgets all bytes that no fsync has brought to it
//   FAULT_CLOCK=1     the time of day goes back an hour each time the program asks for it
//   FAULT_LOG=path    logs each call as a line: its name and the path of its file
#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

template <class Function>
Function* real(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

struct File {
  std::string path;
  off_t safe = 0;  // how many bytes are on the disk
};

std::mutex mutex;
std::map<int, File>& files() {  // open for writing, by descriptor
  static std::map<int, File> open_files;
  return open_files;
}
std::vector<std::pair<int, off_t>> forgotten;  // files that the program closed before all bytes were on the disk
int calls = 0;

void lose_power() {
  for (const auto& [file, f] : files()) forgotten.push_back({file, f.safe});
  for (const auto& [file, safe] : forgotten)
    if (ftruncate(file, safe) != 0) {}
}

// Counts a call and returns the fault that it shall suffer, or "".
std::string fault_of(const char* call, const std::string& path) {
  static const std::string fault = std::getenv("FAULT") ? std::getenv("FAULT") : "";
  static const char* log = std::getenv("FAULT_LOG");
  calls++;
  if (log) {
    const std::string line = std::string(call) + " " + path + "\n";
    const int file = real<int(const char*, int, ...)>("open")(log, O_WRONLY | O_CREAT | O_APPEND, 0666);
    real<ssize_t(int, const void*, size_t)>("write")(file, line.data(), line.size());
    real<int(int)>("close")(file);
  }
  const std::string what = fault.substr(fault.find(':') + 1);
  static bool done = false;
  const bool for_it = what == "short" || what == "torn" ? std::strcmp(call, "write") == 0
                      : what == "EINTR"                 ? std::strcmp(call, "rename") != 0
                                                        : true;
  if (fault.empty() || done || !for_it || calls < std::atoi(fault.c_str())) return "";
  done = true;
  if (what == "power") lose_power();
  if (what == "power" || what == "kill") {
    kill(getpid(), SIGKILL);
    pause();
  }
  static const std::map<std::string, int> errors = {
      {"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT}, {"EROFS", EROFS}, {"EINTR", EINTR}};
  const auto error = errors.find(what);
  errno = error == errors.end() ? EIO : error->second;
  return what;
}

bool is_error(const std::string& fault) { return !fault.empty() && fault[0] == 'E'; }

int open_file(const char* path, int flags, mode_t mode) {
  const bool ours = (flags & O_ACCMODE) != O_RDONLY && std::strncmp(path, "/dev/", 5) != 0;
  const std::lock_guard hold(mutex);
  if (ours && is_error(fault_of("open", path))) return -1;
  const int file = real<int(const char*, int, ...)>("open")(path, flags, mode);
  if (file >= 0 && ours) files()[file] = {path, lseek(file, 0, SEEK_END)};
  if (file >= 0 && ours) lseek(file, 0, SEEK_SET);
  return file;
}

}  // namespace

extern "C" {

int open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = flags & O_CREAT ? mode_t(va_arg(rest, int)) : 0;
  va_end(rest);
  return open_file(path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = flags & O_CREAT ? mode_t(va_arg(rest, int)) : 0;
  va_end(rest);
  return open_file(path, flags, mode);
}

ssize_t write(int file, const void* data, size_t bytes) {
  static auto* next = real<ssize_t(int, const void*, size_t)>("write");
  const std::lock_guard hold(mutex);
  const auto found = files().find(file);
  if (found == files().end()) return next(file, data, bytes);
  const std::string fault = fault_of("write", found->second.path);
  if (is_error(fault)) return -1;
  if (fault == "short" || fault == "torn") bytes = (bytes + 1) / 2;
  const ssize_t done = next(file, data, bytes);
  if (fault == "torn") kill(getpid(), SIGKILL);
  return done;
}

int fsync(int file) {
  const std::lock_guard hold(mutex);
  const auto found = files().find(file);
  if (is_error(fault_of("fsync", found == files().end() ? "a folder" : found->second.path))) return -1;
  if (found != files().end()) found->second.safe = lseek(file, 0, SEEK_END);
  return 0;  // a real fsync would only make the tests slow
}

int rename(const char* from, const char* to) {
  const std::lock_guard hold(mutex);
  if (is_error(fault_of("rename", to))) return -1;
  return real<int(const char*, const char*)>("rename")(from, to);
}

int clock_gettime(clockid_t clock, timespec* now) {
  static auto* next = real<int(clockid_t, timespec*)>("clock_gettime");
  static const bool backwards = std::getenv("FAULT_CLOCK");
  static std::atomic<int> hours = 0;
  const int result = next(clock, now);
  if (backwards && clock == CLOCK_REALTIME) now->tv_sec -= 3600 * ++hours;
  return result;
}

int close(int file) {
  static auto* next = real<int(int)>("close");
  const std::lock_guard hold(mutex);
  const auto found = files().find(file);
  if (found != files().end()) {
    if (found->second.safe < lseek(file, 0, SEEK_END)) forgotten.push_back({dup(file), found->second.safe});
    files().erase(found);
  }
  return next(file);
}
}
