#include "signals.h"

#include <csignal>

static volatile std::sig_atomic_t caught = 0;
static constexpr int stopping[] = {SIGINT, SIGTERM, SIGHUP};

static void note(int signal) {
  caught = signal;
  for (const int any : stopping) std::signal(any, SIG_DFL);
}

void catch_signals() {
  for (const int signal : stopping)
    if (std::signal(signal, note) == SIG_IGN) std::signal(signal, SIG_IGN);
  std::signal(SIGPIPE, SIG_IGN);
}

int stop_signal() { return caught; }
