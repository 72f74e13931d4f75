// What the control groups of this process, its container's, allow it: versions 1 and 2. Infinity: nothing limits it.
// root: where /proc and /sys are looked for.
// defines: cpu_quota, memory_limit
#pragma once
#include <string>

double cpu_quota(const std::string& root = "");     // so many processors' time (docker --cpus)
double memory_limit(const std::string& root = "");  // in bytes (docker --memory)
