// Runs the test cases, then counts them: "N passed, N failed, N skipped".
#define CATCH_CONFIG_RUNNER
#include "test.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace {

namespace fs = std::filesystem;

int passed = 0, failed = 0, skipped = 0;
bool skipping = false;

#if __has_include(<catch2/catch_all.hpp>)
using ListenerBase = Catch::EventListenerBase;
#else
using ListenerBase = Catch::TestEventListenerBase;
#endif

struct Counter : ListenerBase {
  using ListenerBase::ListenerBase;
  void testCaseStarting(const Catch::TestCaseInfo&) override { skipping = false; }
  void testCaseEnded(const Catch::TestCaseStats& stats) override {
    if (stats.totals.assertions.failed > 0)
      failed++;
    else if (skipping)
      skipped++;
    else
      passed++;
  }
};
CATCH_REGISTER_LISTENER(Counter)

fs::path root() {
  static const fs::path path = [] {
    std::string name = (fs::temp_directory_path() / "microgpt_test_XXXXXX").string();
    if (!mkdtemp(name.data())) std::abort();
    return fs::path(name);
  }();
  return path;
}

std::string content(const fs::path& path) {
  std::ostringstream out;
  out << std::ifstream(path, std::ios::binary).rdbuf();
  return out.str();
}

}  // namespace

std::string test_folder() {
  static int number = 0;
  const fs::path path = root() / std::to_string(number++);
  fs::create_directory(path);
  return path.string();
}

void skip(const std::string& reason) {
  skipping = true;
  std::printf("skipped: %s\n", reason.c_str());
}

Run run(const std::string& command_line) {
  const fs::path out = root() / "stdout", err = root() / "stderr";
  const int status = std::system(("{ " + command_line + "\n} >" + out.string() + " 2>" + err.string()).c_str());
  const int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  return {code, content(out), content(err)};
}

std::string program(const char* name) {
  const char* folder = std::getenv("PROGRAMS");
  return (fs::absolute(folder ? folder : ".") / name).string();
}

int main(int argc, char** argv) {
  const int result = Catch::Session().run(argc, argv);
  fs::remove_all(root());
  std::printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return result;
}
