// Every test includes this: Catch2, in whichever version is installed, and helpers that run programs and read files.
// defines: test_folder, contents, sanitized, before_test_case, skip, Run, run, Process, program, error_of, contains, find_tensor, check_close
#pragma once
#include <map>
#include <string>
#include <vector>

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
using Catch::Matchers::ContainsSubstring;
#else
#include <catch2/catch.hpp>
inline auto ContainsSubstring(const std::string& part) { return Catch::Matchers::Contains(part); }
#endif

#include "../host/error.h"
#include "../host/tensors.h"
#include "compare.h"

// Compare large arrays and files in double parentheses, CHECK((a == b)). Otherwise a failure prints them, which takes
// Catch2 minutes.

// Makes a fresh, empty folder, which goes away when the tests end.
std::string test_folder();

// The contents of every file under a folder, by relative path; "no file" for anything else.
std::map<std::string, std::string> contents(const std::string& folder);

// Whether this build has a sanitizer. It makes every try slower, and a few tries show what it can find. So tests that
// repeat something hundreds of times repeat it less often then.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool sanitized = true;
#else
constexpr bool sanitized = false;
#endif

// Called before each test case, with its tags, if it is set (test/cuda.h).
inline void (*before_test_case)(const std::string& tags) = nullptr;

// Counts the running test case as skipped, not as passed (Catch2 2 has no such thing); the caller returns.
void skip(const std::string& reason);

// A shell command that has ended: its exit code (128 + n for a signal n) and what it printed.
struct Run {
  int code;
  std::string out, err;
};
Run run(const std::string& command_line);

// A shell command that runs in the background, with signals set as in a terminal. The destructor kills it.
class Process {
 public:
  explicit Process(const std::string& command_line);
  ~Process();
  Process(const Process&) = delete;
  bool printed(const std::string& part) const;   // on stdout or stderr, by now
  void wait_for(const std::string& part) const;  // fails after a minute, or if the process ends first
  void signal(int number) const;
  int id() const { return pid_; }
  Run wait();

 private:
  bool ended() const;
  std::string out_, err_;
  int pid_;
};

// The absolute path of a program in the folder $PROGRAMS, such as "train_gpt_cpu" or "data_prep", quoted for run.
std::string program(const char* name);

// The message of the Error that body() raises.
template <class Body>
std::string error_of(Body body) {
  try {
    body();
  } catch (const Error& e) { return e.what(); }
  return "no error";
}

// Whether part is in text. In a CHECK, a failure shows both.
inline bool contains(const std::string& text, const std::string& part) {
  UNSCOPED_INFO("in \"" << text << "\" for \"" << part << "\"");
  return text.find(part) != std::string::npos;
}

// The tensor of that name; an empty one if there is none.
inline TensorSpec find_tensor(const Layout& layout, const std::string& name) {
  for (const TensorSpec& spec : layout.tensors())
    if (spec.name == name) return spec;
  return {};
}

// Fails the test if an element of got is further from want's than compare.h allows.
template <class A, class B>
void check_close(const std::vector<A>& got, const std::vector<B>& want, double tolerance) {
  REQUIRE(got.size() == want.size());
  const std::string message = mismatch(got.data(), want.data(), got.size(), tolerance);
  INFO(message);
  CHECK(message.empty());
}
