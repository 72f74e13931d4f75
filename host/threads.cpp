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
#include <limits>
#include <set>

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

// The smallest quota of a group and those above it, up to `mount`.
static double quota_of_groups(const std::string& mount, std::string group) {
  double least = std::numeric_limits<double>::infinity();
  while (true) {
    double quota, period;
    if (std::ifstream both(mount + group + "/cpu.max"); both >> quota >> period)  // "max 100000": no number, no limit
      least = std::min(least, quota / period);
    std::ifstream first(mount + group + "/cpu.cfs_quota_us"), second(mount + group + "/cpu.cfs_period_us");
    if (first >> quota && second >> period && quota > 0) least = std::min(least, quota / period);
    if (group.empty()) return least;
    group.erase(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
  }
}

double cpu_quota(const std::string& root) {
  double least = std::numeric_limits<double>::infinity();
  std::ifstream in(root + "/proc/self/cgroup");  // lines NUMBER:CONTROLLERS:GROUP; version 2 has no controllers
  for (std::string line; std::getline(in, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first, second + 1 - first), group = line.substr(second + 1);
    if (controllers == "::")
      least = std::min(least, quota_of_groups(root + "/sys/fs/cgroup", group));
    else if (controllers.find("cpu:") != std::string::npos || controllers.find("cpu,") != std::string::npos)
      least = std::min(least, quota_of_groups(root + "/sys/fs/cgroup/cpu", group));
  }
  return least;
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
