// Errors that a person can cause or meet: one exception type, one way to raise it, one place to print it.
// defines: Error, text, fail, run_main
#pragma once
#include <fcntl.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

// Says what went wrong, where, and what to do about it, in a sentence or two. It ends the program with exit code 1.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Prints its arguments one after the other, into a string.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(text(parts...));
}

// Opens /dev/null in the place of each standard stream that is closed: otherwise the next file that is opened would
// take its number, and what we print would go into a checkpoint. Standard output gets a /dev/null that can only be
// read, so that run_main notices that nothing could be printed.
inline void hold_standard_streams() {
  for (const int stream : {0, 1, 2})
    if (fcntl(stream, F_GETFD) == -1 && open("/dev/null", stream == 2 ? O_WRONLY : O_RDONLY) != stream) {}
}

// Each thread gets a stack of the size that ulimit -s sets. Libraries keep what is theirs in a thread there too, 112 KB
// of it with cuBLASLt. Our functions need 30 KB, and gnuplot needs 100. A smaller stack would end in a segmentation
// fault.
inline void require_stack() {
  rlimit stack{};
  if (getrlimit(RLIMIT_STACK, &stack) == 0 && stack.rlim_cur < 256 << 10)
    fail("the stack may grow to ", stack.rlim_cur >> 10, " KB only: allow 256 KB or more, with ulimit -s");
}

// Runs a program's body; an error becomes one line on stderr and exit code 1. Output is written line by line, even into
// a file: so a file that takes both streams has their lines in the order in which they were printed.
template <class Body>
int run_main(Body body) {
  hold_standard_streams();
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  std::signal(SIGXFSZ, SIG_IGN);  // a file that outgrows ulimit -f is an error like a full disk, not the end
  try {
    require_stack();
    const int code = body();
    if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return code;
    std::fprintf(stderr, "error: not everything could be written to standard output; every file is whole\n");
  } catch (const std::bad_alloc&) { std::fprintf(stderr, "error: out of memory\n"); } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
  }
  return 1;
}
