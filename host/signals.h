// Ctrl-C, SIGTERM and what else asks a program to end, or warns that it soon will be, end a run in good order: the
// current step is finished and saved. The same signal once more ends it at once. doc/reliability.md has all signals.
// defines: catch_signals, stop_signal
#pragma once

// From now on these signals are only noted, unless they are ignored anyway (nohup), and a closed pipe is an error when
// it is written to, not the end.
void catch_signals();
int stop_signal();  // the one that came, or 0
