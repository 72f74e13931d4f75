#include "signals.h"

#include <csignal>

static volatile std::sig_atomic_t caught = 0;
static constexpr int stopping[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU};

static void note(int signal) {
  caught = signal;
  // The system repeats SIGXCPU every second, which is not a person's impatience.
  std::signal(signal, signal == SIGXCPU ? SIG_IGN : SIG_DFL);
}

void catch_signals() {
  // One that is ignored (nohup), or that a profiler loaded into the program waits for, is left to them.
  for (const int signal : stopping)
    if (const auto before = std::signal(signal, note); before != SIG_DFL) std::signal(signal, before);
  std::signal(SIGPIPE, SIG_IGN);
}

int stop_signal() { return caught; }
