// Ctrl-C and SIGTERM end a run in good order: the current step is finished and saved. A second one ends it at once.
// defines: catch_signals, stop_signal
#pragma once

// From now on SIGINT, SIGTERM and SIGHUP are only noted, unless they are ignored anyway (nohup), and a closed pipe is an
// error when it is written to, not the end.
void catch_signals();
int stop_signal();  // the one that came, or 0
