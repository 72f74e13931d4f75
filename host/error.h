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

// What went wrong, where, and what to do about it, as one sentence or two. Ends the program with exit code 1.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Its arguments, printed one after the other.
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

// Gives standard streams that are closed to /dev/null, the output to its reading end: else the next file that is opened
// would take their number, and what is printed would go into a checkpoint.
inline void hold_standard_streams() {
  for (const int stream : {0, 1, 2})
    if (fcntl(stream, F_GETFD) == -1 && open("/dev/null", stream == 2 ? O_WRONLY : O_RDONLY) != stream) {}
}

// A thread's stack is as large as the first thread's may grow, and also holds what libraries keep for each thread, 112 KB
// of it with cuBLASLt; ours take 30 KB, gnuplot 100. Less would end in a segmentation fault.
inline void require_stack() {
  rlimit stack{};
  if (getrlimit(RLIMIT_STACK, &stack) == 0 && stack.rlim_cur < 256 << 10)
    fail("the stack may grow to ", stack.rlim_cur >> 10, " KB only: allow 256 KB or more, with ulimit -s");
}

// Runs a program's body; an error becomes one line on stderr and exit code 1. What is printed goes out line by line, into
// a file too: one that takes both streams has the lines in the order in which they were printed.
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
