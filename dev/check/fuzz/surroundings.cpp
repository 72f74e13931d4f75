// What the program reads from its surroundings: Linux's files about control groups and processors, and the locale in
// the environment. Eight strings, each ended by NUL: seven files and the locale.
#include <algorithm>
#include <cmath>
#include <map>

#include "../../../host/machine.h"
#include "../../../host/progress.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string root = fuzz_folder();
  static const char* const files[] = {
      "/proc/self/cgroup",
      "/sys/fs/cgroup/cpu.max",
      "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
      "/sys/fs/cgroup/cpu/cpu.cfs_period_us",
      "/sys/fs/cgroup/memory.max",
      "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list",
      "/sys/devices/system/cpu/cpu1/topology/thread_siblings_list",
  };
  static const bool once = [&] {
    for (const char* file : files)
      std::filesystem::create_directories(std::filesystem::path(root + file).parent_path());
    return true;
  }();
  must(once);
  static std::map<const char*, std::string> written;  // saves time: we do not write the same again
  for (const char* file : files) {
    const uint8_t* end = std::find(data, data + size, 0);
    const std::string content(data, end);
    if (!written.count(file) || written[file] != content) fuzz_file(file + 1, data, content.size());
    written[file] = content;
    size -= size_t(end - data);
    data = end;
    if (size > 0) data++, size--;
  }
  must(!std::isnan(cpu_quota(root)));
  must(!std::isnan(memory_limit(root)));
  const int cores = physical_cores({0, 1}, root);
  must(cores >= 0 && cores <= 2);

  const std::string rest(reinterpret_cast<const char*>(data), size);
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    std::string variable = name + ("=" + rest);
    putenv(variable.data());  // setenv would keep every value that there ever was
    ProgressBar bar("fuzz", 1, "it");
    bar.update(0);
    unsetenv(name);
  }
  return 0;
}
