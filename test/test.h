// What every test includes: Catch2, whichever version is installed, and a few things to try programs and files with.
// defines: test_folder, contents, skip, Run, run, Process, program, error_of, contains
#pragma once
#include <map>
#include <string>

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

// Large arrays and files are compared in double parentheses, CHECK((a == b)): a failure would print them otherwise, which
// takes Catch2 minutes.

// A fresh, empty folder, which is removed when the tests end.
std::string test_folder();

// Every file under a folder, by its path from there; what is no file, as "no file".
std::map<std::string, std::string> contents(const std::string& folder);

// Counts the running test case as skipped, not as passed (Catch2 2 has no such thing); the caller returns.
void skip(const std::string& reason);

// A shell command that has ended: its exit code (128 + n for a signal n) and what it printed.
struct Run {
  int code;
  std::string out, err;
};
Run run(const std::string& command_line);

// A shell command that runs meanwhile, with every signal as a person's terminal leaves it. Killed when it goes.
class Process {
 public:
  explicit Process(const std::string& command_line);
  ~Process();
  Process(const Process&) = delete;
  bool printed(const std::string& part) const;   // on stdout or stderr, by now
  void wait_for(const std::string& part) const;  // fails the test after a minute, or if the process ends without
  void signal(int number) const;
  int id() const { return pid_; }
  Run wait();

 private:
  bool ended() const;
  std::string out_, err_;
  int pid_;
};

// The absolute path of a program that was built, in the folder $PROGRAMS: "train_gpt_cpu", "data_prep". Quoted for run.
std::string program(const char* name);

// The message of the Error that body() raises.
template <class Body>
std::string error_of(Body body) {
  try {
    body();
  } catch (const Error& e) { return e.what(); }
  return "no error";
}

// For CHECKs: whether part is in text; a failure shows both.
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
