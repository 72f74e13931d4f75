#include "threads.h"

#include <omp.h>
#ifdef __linux__
#include <sched.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <fstream>
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

int default_threads() {
  int threads = omp_get_max_threads();  // OMP_NUM_THREADS, or the logical processors that this process may use
  if (std::getenv("OMP_NUM_THREADS")) return threads;
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    std::vector<int> processors;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
      if (CPU_ISSET(cpu, &allowed)) processors.push_back(cpu);
    if (const int cores = physical_cores(processors)) threads = std::min(threads, cores);
  }
#endif
#ifdef __APPLE__
  int cores = 0;
  size_t size = sizeof cores;
  if (sysctlbyname("hw.physicalcpu", &cores, &size, nullptr, 0) == 0 && cores > 0) threads = std::min(threads, cores);
#endif
  return int(std::max(1.0, std::min(double(threads), cpu_quota())));
}
