#include "limits.h"

#include <algorithm>
#include <fstream>
#include <limits>

// The least of what limit(folder) says of the groups that this process is in and of all above them. controller: the one
// whose hierarchy counts in version 1.
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

static bool read(const std::string& path, double& number) {  // "max": no number, no limit
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
