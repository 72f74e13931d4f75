// Ctrl-C and SIGTERM end a run in good order: the current step is finished and saved. A second Ctrl-C ends it at once.
// defines: catch_signals, stop_signal
#pragma once

void catch_signals();  // from now on SIGINT, SIGTERM and SIGHUP are only noted
int stop_signal();     // the one that came, or 0
