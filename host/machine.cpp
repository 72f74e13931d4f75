// Built for any processor of the family, unlike the kernels: check_cpu must run on a processor that lacks their
// instructions.
#include "machine.h"

#include <omp.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <numeric>
#include <set>

// ---------------------------------------------------------------------------------------------------------------------
// Control groups

// Control groups form a tree, and a process is bound by its own group and by every group above: the smallest limit
// counts. limit(folder) reads the limit of one group. In version 1 every controller ("cpu", "memory") has a tree of its
// own.
template <class Limit>
static double least_of_groups(const std::string& root, const std::string& controller, Limit limit) {
  double least = std::numeric_limits<double>::infinity();
  std::ifstream in(root + "/proc/self/cgroup");  // lines NUMBER:CONTROLLERS:GROUP; version 2 has no controllers
  for (std::string line; std::getline(in, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool version2 = controllers == ",,";
    if (!version2 && controllers.find("," + controller + ",") == std::string::npos) continue;
    const std::string mount = root + "/sys/fs/cgroup" + (version2 ? "" : "/" + controller);
    for (std::string group = line.substr(second + 1);;) {
      least = std::min(least, limit(mount + group));
      if (group.empty()) break;
      group.erase(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
    }
  }
  return least;
}

// False if there is no such file, or if it says "max", which is no number and no limit.
static bool read(const std::string& path, double& number) {
  std::ifstream in(path);
  return bool(in >> number);
}

double cpu_quota(const std::string& root) {
  return least_of_groups(root, "cpu", [](const std::string& group) {
    double quota, period;
    if (std::ifstream both(group + "/cpu.max"); both >> quota >> period) return quota / period;
    if (read(group + "/cpu.cfs_quota_us", quota) && read(group + "/cpu.cfs_period_us", period) && quota > 0)
      return quota / period;
    return std::numeric_limits<double>::infinity();
  });
}

double memory_limit(const std::string& root) {
  return least_of_groups(root, "memory", [](const std::string& group) {
    double bytes;
    if (read(group + "/memory.max", bytes) || read(group + "/memory.limit_in_bytes", bytes)) return bytes;
    return std::numeric_limits<double>::infinity();
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads

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

std::vector<int> allowed_processors() {
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

void use_threads(int threads, bool say, int sharing) {
  const int cores = std::max(1, usable_cores(allowed_processors()) / sharing);
  const char* variable = std::getenv("OMP_NUM_THREADS");
  const bool told = threads == 0 && variable && std::atoi(variable) > 0;
  if (threads == 0) threads = told ? omp_get_max_threads() : cores;
  omp_set_num_threads(threads);
  if (told && say && threads != cores)
    std::fprintf(stderr, "%d thread%s on %d core%s, because OMP_NUM_THREADS is %s; --threads %d takes one for each\n",
                 threads, threads == 1 ? "" : "s", cores, cores == 1 ? "" : "s", variable, cores);
}

// A thread that waits for others keeps its core busy for a while before it sleeps, since most waits are shorter than
// falling asleep and waking. g++'s OpenMP does so for 5 to 15 ms and clang's for 200. That takes the core away from
// other programs and, through them, from our own threads; a millisecond is enough. OpenMP reads these variables when it
// starts: clang's at the first call, g++'s in a constructor, which runs after this one where libgomp is part of the
// program (Makefile).
__attribute__((constructor(102))) static void wait_briefly() {
  if (std::getenv("OMP_WAIT_POLICY")) return;
  setenv("GOMP_SPINCOUNT", "3000", 0);  // g++: turns of the waiting loop, 0.03 to 0.15 ms
  setenv("KMP_BLOCKTIME", "1", 0);      // clang++: ms
}

// ---------------------------------------------------------------------------------------------------------------------
// Instruction sets

// Stops a program on a processor that lacks an instruction set which its kernels were built for, with a sentence
// instead of an illegal instruction. This must run before every other constructor.
#if defined(__x86_64__) && defined(__GNUC__)
namespace {

void say(const char* words) {
  if (write(2, words, std::strlen(words)) < 0) _exit(1);
}

__attribute__((constructor(101))) void check_cpu() {
  __builtin_cpu_init();
  const char* missing = nullptr;
  if (built_for.fma && !__builtin_cpu_supports("fma")) missing = "FMA";
  if (built_for.avx2 && !__builtin_cpu_supports("avx2")) missing = "AVX2";
  if (built_for.avx512 && !__builtin_cpu_supports("avx512f")) missing = "AVX-512";
  if (built_for.avx512_bf16 && !__builtin_cpu_supports("avx512bf16")) missing = "AVX512_BF16";
  if (!missing) return;
  say("error: this program was built for a processor with ");
  say(missing);
  say(", which this one lacks. Build it here: make clean train_gpt, or there with MARCH=x86-64\n");
  _exit(1);
}

}  // namespace
#endif
