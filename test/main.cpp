// Runs the test cases, then counts them: "N passed, N failed, N skipped".
#define CATCH_CONFIG_RUNNER
#include "test.h"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
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
  void testCaseStarting(const Catch::TestCaseInfo& test_case) override {
    skipping = false;
    if (before_test_case) before_test_case(test_case.tagsAsString());
  }
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

std::map<std::string, std::string> contents(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder))
    files[fs::relative(entry.path(), folder).string()] = entry.is_regular_file() ? content(entry.path()) : "no file";
  return files;
}

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

Process::Process(const std::string& command_line) {
  const std::string folder = test_folder();
  out_ = folder + "/stdout";
  err_ = folder + "/stderr";
  pid_ = fork();
  if (pid_ != 0) return;
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU, SIGXFSZ})
    std::signal(number, SIG_DFL);
  const std::string command = "exec " + command_line + " >" + out_ + " 2>" + err_;
  execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
  _exit(127);
}

Process::~Process() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

bool Process::ended() const {
  siginfo_t info{};
  return waitid(P_PID, id_t(pid_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == pid_;
}

bool Process::printed(const std::string& part) const {
  return content(out_).find(part) != std::string::npos || content(err_).find(part) != std::string::npos;
}

void Process::wait_for(const std::string& part) const {
  for (int i = 0; !printed(part); i++) {
    if (i == 60000 || (ended() && !printed(part))) FAIL("waited for '" << part << "' in vain: " << content(err_));
    usleep(1000);
  }
}

void Process::signal(int number) const { kill(pid_, number); }

Run Process::wait() {
  int status = 0;
  waitpid(pid_, &status, 0);
  pid_ = -1;
  return {WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status), content(out_), content(err_)};
}

std::string program(const char* name) {
  const char* folder = std::getenv("PROGRAMS");
  const std::string path = (fs::absolute(folder ? folder : ".") / name).string();
  std::string word;  // quoted, so that the shell sees one word whatever the folder is called
  for (const char c : path) word += c == '\'' ? "'\\''" : std::string(1, c);
  return "'" + word + "'";
}

int main(int argc, char** argv) {
  const int result = Catch::Session().run(argc, argv);
  fs::remove_all(root());
  std::printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return result;
}
