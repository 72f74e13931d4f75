#include "signals.h"

#include <csignal>

static volatile std::sig_atomic_t caught = 0, once = 1;
static constexpr int stopping[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU};

static void note(int signal) {
  caught = signal;
  // A second signal comes from somebody who is impatient, except SIGXCPU, which the system repeats every second.
  if (once) std::signal(signal, signal == SIGXCPU ? SIG_IGN : SIG_DFL);
}

void catch_signals(bool launched) {
  once = !launched;
  // A signal that is ignored (by nohup), or that a profiler inside the program waits for, stays as it is.
  for (const int signal : stopping)
    if (const auto before = std::signal(signal, note); before != SIG_DFL) std::signal(signal, before);
  std::signal(SIGPIPE, SIG_IGN);
}

int stop_signal() { return caught; }
