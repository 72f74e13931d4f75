// How many threads the CPU's work gets when nobody says: one for each physical core that this process may use. Two on
// one core would share its vector units, which the products keep busy; more than a container's quota would be stopped.
// defines: physical_cores, default_threads
#pragma once
#include <string>
#include <vector>

// Of these logical processors' cores, how many there are; 0 if the system does not tell. root: where /sys is looked for.
int physical_cores(const std::vector<int>& processors, const std::string& root = "");

// OMP_NUM_THREADS if it is set; else at least 1.
int default_threads();
