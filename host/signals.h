// Ctrl-C, SIGTERM and other signals ask a program to end, or warn that the system will end it soon. They stop a run in
// good order: the current step is finished and saved. The same signal once more ends it at once. doc/reliability.md
// lists them.
// defines: catch_signals, stop_signal
#pragma once

// From now on these signals are only noted, unless they are ignored anyway (nohup), and a closed pipe is an error when
// it is written to, not the end. launched: the process is one of several of a launcher, which passes a signal on, perhaps
// more than once, and kills what does not end in time; so a signal that comes again does not end this process.
void catch_signals(bool launched = false);
int stop_signal();  // the one that came, or 0
