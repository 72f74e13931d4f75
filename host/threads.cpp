#include "threads.h"

#include <omp.h>
#ifdef __linux__
#include <sched.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <set>

#include "limits.h"

int physical_cores(const std::vector<int>& processors, const std::string& root) {
  std::set<std::string> cores;  // by the list of their logical processors
  for (const int cpu : processors) {
    std::ifstream in(root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(in, siblings)) return 0;
    cores.insert(siblings);
  }
  return int(cores.size());
}

int usable_cores(const std::vector<int>& processors, const std::string& root) {
  const int cores = physical_cores(processors, root);
  return int(std::max(1.0, std::min(cores ? double(cores) : double(processors.size()), cpu_quota(root))));
}

// The logical processors that this process may use.
static std::vector<int> allowed_processors() {
  std::vector<int> processors;
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
      if (CPU_ISSET(cpu, &allowed)) processors.push_back(cpu);
#endif
  if (!processors.empty()) return processors;
  int count = omp_get_num_procs();
#ifdef __APPLE__
  int cores = 0;
  size_t size = sizeof cores;
  if (sysctlbyname("hw.physicalcpu", &cores, &size, nullptr, 0) == 0 && cores > 0) count = std::min(count, cores);
#endif
  processors.resize(size_t(count));
  std::iota(processors.begin(), processors.end(), 0);
  return processors;
}

void use_threads(int threads, bool say) {
  const int cores = usable_cores(allowed_processors());
  const char* variable = std::getenv("OMP_NUM_THREADS");
  const bool told = threads == 0 && variable && std::atoi(variable) > 0;
  if (threads == 0) threads = told ? omp_get_max_threads() : cores;
  omp_set_num_threads(threads);
  if (told && say && threads != cores)
    std::fprintf(stderr, "%d thread%s on %d core%s, because OMP_NUM_THREADS is %s; --threads %d takes one for each\n",
                 threads, threads == 1 ? "" : "s", cores, cores == 1 ? "" : "s", variable, cores);
}

// A thread that waits for others keeps its core busy for a while before it sleeps, since most waits are shorter than
// falling asleep and waking. Left alone, g++'s OpenMP does so for 5 to 15 ms and clang's for 200, which takes the core
// away from any other program and, through it, from our own threads; a millisecond is enough. clang's OpenMP reads the
// environment when it is first called; g++'s does in a constructor, which this one precedes where libgomp is part of the
// program (Makefile).
__attribute__((constructor(102))) static void wait_briefly() {
  if (std::getenv("OMP_WAIT_POLICY")) return;
  setenv("GOMP_SPINCOUNT", "3000", 0);  // g++: turns of the waiting loop, 0.03 to 0.15 ms
  setenv("KMP_BLOCKTIME", "1", 0);      // clang++: ms
}
