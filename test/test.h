// What every test includes: Catch2, whichever version is installed, and a few things to try programs and files with.
// defines: test_folder, skip, Run, run, program
#pragma once
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
#endif
#include <string>

// A fresh, empty folder, which is removed when the tests end.
std::string test_folder();

// Counts the running test case as skipped, not as passed (Catch2 2 has no such thing); the caller returns.
void skip(const std::string& reason);

// A shell command that has ended: its exit code (128 + n for a signal n) and what it printed.
struct Run {
  int code;
  std::string out, err;
};
Run run(const std::string& command_line);

// The absolute path of a program that was built: "train_gpt_cpu", "data_prep".
std::string program(const char* name);
