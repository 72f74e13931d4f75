// host/machine.h: finds cores and quotas in files of Linux, here in copies of those files.
#include "../host/machine.h"

#include <cmath>
#include <filesystem>

#include "../host/files.h"
#include "test.h"

static void put(const std::string& path, const std::string& content) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  write_file(path, content);
}

TEST_CASE("threads: two logical processors of one core count once", "[threads]") {
  const std::string root = test_folder();
  const char* siblings[] = {"0,4\n", "1,5\n", "2-3\n", "2-3\n", "0,4\n", "1,5\n"};
  for (int cpu = 0; cpu < 6; cpu++)
    put(root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list", siblings[cpu]);
  CHECK(physical_cores({0, 1, 2, 3, 4, 5}, root) == 3);
  CHECK(physical_cores({0, 4}, root) == 1);
  CHECK(physical_cores({1, 2}, root) == 2);
  CHECK(physical_cores({0, 6}, root) == 0);  // the system does not know CPU 6

  // One thread per core, within the quota.
  CHECK(usable_cores({0, 1, 2, 3, 4, 5}, root) == 3);
  CHECK(usable_cores({4}, root) == 1);
  CHECK(usable_cores({0, 6}, root) == 2);
  put(root + "/proc/self/cgroup", "0::/a\n");
  for (const auto& [quota, cores] : {std::pair{"200000 100000\n", 2}, {"50000 100000\n", 1}, {"900000 100000\n", 3}}) {
    put(root + "/sys/fs/cgroup/a/cpu.max", quota);
    CHECK(usable_cores({0, 1, 2, 3, 4, 5}, root) == cores);
  }
}

TEST_CASE("threads: the smallest quota on the way to the root counts", "[threads]") {
  const std::string root = test_folder(), groups = root + "/sys/fs/cgroup";
  CHECK(std::isinf(cpu_quota(root)));  // no control groups at all

  put(root + "/proc/self/cgroup", "0::/a/b\n");  // version 2
  put(groups + "/cpu.max", "max 100000\n");
  put(groups + "/a/b/cpu.max", "max 100000\n");
  CHECK(std::isinf(cpu_quota(root)));
  put(groups + "/a/cpu.max", "250000 100000\n");
  CHECK(cpu_quota(root) == 2.5);
  put(groups + "/a/b/cpu.max", "50000 100000\n");
  CHECK(cpu_quota(root) == 0.5);
  put(groups + "/a/b/cpu.max", "800000 100000\n");
  CHECK(cpu_quota(root) == 2.5);

  for (const char* controllers : {"cpu,cpuacct", "cpuacct,cpu", "cpu"}) {  // version 1: -1 is no limit
    put(root + "/proc/self/cgroup", "9:name=systemd:/\n1:cpuset:/c\n2:" + std::string(controllers) + ":/docker/c\n");
    put(groups + "/cpu/cpu.cfs_quota_us", "-1\n");
    CHECK(std::isinf(cpu_quota(root)));
    put(groups + "/cpu/cpu.cfs_quota_us", "300000\n");  // a container sees its own group at the root
    put(groups + "/cpu/cpu.cfs_period_us", "100000\n");
    CHECK(cpu_quota(root) == 3);
  }
}

TEST_CASE("threads: the smallest memory limit on the way to the root counts", "[threads]") {
  const std::string root = test_folder(), groups = root + "/sys/fs/cgroup";
  CHECK(std::isinf(memory_limit(root)));
  put(root + "/proc/self/cgroup", "0::/a/b\n");
  put(groups + "/memory.max", "max\n");
  CHECK(std::isinf(memory_limit(root)));
  put(groups + "/a/memory.max", "3000000000\n");
  put(groups + "/a/b/memory.max", "5000000000\n");
  CHECK(memory_limit(root) == 3e9);
  put(root + "/proc/self/cgroup", "4:cpu:/\n3:memory:/docker/c\n");
  put(groups + "/memory/memory.limit_in_bytes", "2000000000\n");
  CHECK(memory_limit(root) == 2e9);
}
