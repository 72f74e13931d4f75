#include "signals.h"

#include <csignal>
#include <initializer_list>

static volatile std::sig_atomic_t caught = 0;

static void note(int signal) {
  caught = signal;
  std::signal(signal, SIG_DFL);
}

void catch_signals() {
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) std::signal(signal, note);
}

int stop_signal() { return caught; }
