// How many threads the CPU's work gets when nobody says: one for each physical core that this process may use. Two on
// one core would share its vector units, which the products keep busy; more than a container's quota would be stopped.
// Slow cores beside fast ones (hybrid processors) count like them: the products' and attention's tasks go to whichever
// thread is free, and only the other tenth of a step is divided evenly.
// Programs that are linked with this file also wait for their threads less busily than OpenMP would (threads.cpp).
// defines: physical_cores, usable_cores, use_threads
#pragma once
#include <string>
#include <vector>

// Of these logical processors' cores, how many there are; 0 if the system does not tell. root: where /sys is looked for.
int physical_cores(const std::vector<int>& processors, const std::string& root = "");

// How many threads these logical processors keep busy: one for each core, within the quota; at least 1.
int usable_cores(const std::vector<int>& processors, const std::string& root = "");

// Makes OpenMP use so many threads; 0: as many as OMP_NUM_THREADS says, else one for each usable core. OMP_NUM_THREADS
// wins because somebody set it, but often that was a container's image: if it is not the number of cores, a line on
// stderr says so. say: whether it may.
void use_threads(int threads, bool say = true);
