// The lab's program.
//   lab                        lists all operations and their versions
//   lab OPERATION ...          checks every version against the CPU's layer and, on a GPU, times it
//   lab all [SECONDS]          all operations, each in a process of its own with a time limit (60): an illegal address
//                              or a kernel that never ends then spoils only its own operation
//   lab choose CARD.csv ...    prints kernels/choices_table.h: for each card in these results, the fastest versions
// Results go to the file that LAB_CSV names (lab.csv), a line for each version as soon as it is timed.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <map>
#include <sstream>

#include "../../host/error.h"
#include "../../host/version.h"
#include "../../kernels/choices.cuh"
#include "../bench/measure.cuh"
#include "lab.cuh"
#ifndef CUDA_ON_CPU
#include "../../kernels/matmul.cuh"
#endif

namespace {

using lab::Operation;
using lab::Result;

// What the card can do: the floor of every operation follows from it.
struct Ceilings {
  double bandwidth = 0, flops = 0;  // bytes and operations a second
};
Ceilings ceilings([[maybe_unused]] bool products, [[maybe_unused]] bool floats) {
  Ceilings out;
  const Stream stream;
  out.bandwidth = copy_bandwidth(stream).best();
#ifndef CUDA_ON_CPU
  if (products)
    out.flops = 1e12 * (floats ? Matmul(true, stream).measure_peak<float>()  // TF32
                               : Matmul(false, stream).measure_peak<bf16>());
#endif
  return out;
}

Operation operation(const std::string& name) {
  std::string known;
  for (const Operation& op : lab::operations()) {
    if (op.name == name) return op;
    known += " " + op.name;
  }
  fail("'", name, "' is none of the lab's operations:", known);
}

int list_all() {
  for (const Operation& op : lab::operations()) {
    std::printf("%s\n", op.name.c_str());
    for (const Result& r : lab::list(op)) std::printf("  %2d  %s\n", r.version.number, r.version.idea);
  }
  return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Results as lines of a CSV file

const char* const columns =
    "date,commit,card,capability,operation,version,choice,cold_us,cold_min,cold_max,hot_us,alone_us,bytes,flops,"
    "copy_GBs,peak_TFLOPs,registers,local_bytes,error,expected_us";

void add_to_csv(const Operation& op, const Result& r, const Ceilings& limit) {
  const char* const path = std::getenv("LAB_CSV");
  const std::string file = path ? path : "lab.csv";
  const bool fresh = !std::ifstream(file).good();
  std::ofstream out(file, std::ios::app);
  if (!out) fail("cannot write ", file);
  const cudaDeviceProp card = current_card();
  char date[16];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%F", std::gmtime(&now));
  if (fresh) out << columns << "\n";
  out << date << ',' << commit() << ',' << card.name << ',' << 10 * card.major + card.minor << ',' << op.name << ','
      << r.version.number << ',' << r.version.choice << ',' << r.cold << ',' << r.cold_min << ',' << r.cold_max << ','
      << r.hot << ',' << r.alone << ',' << r.bytes << ',' << r.flops << ',' << limit.bandwidth / 1e9 << ','
      << limit.flops / 1e12 << ',' << r.registers << ',' << r.local_bytes << ',' << r.error << ','
      << r.version.expected_us << std::endl;
  if (!out) fail("cannot write ", file);
}

// ---------------------------------------------------------------------------------------------------------------------

void print_result(const Result& r, const Ceilings& limit) {
  const double floor = std::max(r.bytes / limit.bandwidth, limit.flops > 0 ? r.flops / limit.flops : 0) * 1e6;
  std::printf("%3d  %-46s %8.2f (%7.2f ..%7.2f) %8.2f %8.2f %7.0f %8.1f %5.0f%% %5d %6d %7.2f %9.4g%s\n",
              r.version.number, r.version.idea, r.cold, r.cold_min, r.cold_max, r.hot, r.alone, r.bytes / r.cold / 1e3,
              r.flops / r.cold / 1e6, 100 * floor / r.cold, r.registers, r.local_bytes, r.error, r.version.expected_us,
              r.version.choice ? text("  choice ", r.version.choice).c_str() : "");
  std::fflush(stdout);
}

int run_one(const Operation& op) {
  std::vector<Result> results = lab::check(op);
  bool right = true;
  for (const Result& r : results) {
    std::printf("%s %d, %s: %s, %.2f of the error allowed%s%s\n", op.name.c_str(), r.version.number, r.version.idea,
                r.wrong.empty() ? "right" : "WRONG", r.error, r.wrong.empty() ? "" : ": ", r.wrong.c_str());
    right = right && r.wrong.empty();
  }
  std::fflush(stdout);
  if (!right) return 1;
#ifdef CUDA_ON_CPU
  const bool timed = std::getenv("LAB_TIMES");  // what an emulated card takes means nothing; it shows that this runs
  const lab::Sizes sizes = op.checked.front();
#else
  const bool timed = true;
  const lab::Sizes sizes = lab::lecture;
#endif
  if (!timed) {
    std::printf("%s: no times without a GPU\n", op.name.c_str());
    return 0;
  }
  print_card();
  print_clocks();
  const Ceilings limit = ceilings(results.front().flops > 0, op.name == "attention_float");
  std::printf("%d x %d, %d channels; copy %.0f GB/s, products %.0f TFLOP/s\n", sizes.B, sizes.T, sizes.C,
              limit.bandwidth / 1e9, limit.flops / 1e12);
  std::printf("%3s  %-46s %8s %18s %8s %8s %7s %8s %6s %5s %6s %7s %9s\n", "", "", "cold us", "(min .. max)", "hot",
              "alone", "GB/s", "TFLOP/s", "floor", "regs", "local", "error", "expected");
  lab::time(op, sizes, results, [&](const Result& r) {
    print_result(r, limit);
    add_to_csv(op, r, limit);
  });
  print_clocks();
  return 0;
}

// This process never touches the GPU: an error there would stay with it.
int run_all(const char* self, unsigned seconds) {
  int failed = 0;
  for (const Operation& op : lab::operations()) {
    std::printf("--- %s\n", op.name.c_str());
    std::fflush(stdout);
    const pid_t child = fork();
    if (child < 0) fail("cannot start a process");
    if (child == 0) {
      alarm(seconds);  // it stays set when the program is replaced, and ends the process
      execl("/proc/self/exe", self, op.name.c_str(), static_cast<char*>(nullptr));
      _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (status == 0) continue;
    failed++;
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM)
      std::printf("%s: not finished in %u s\n", op.name.c_str(), seconds);
    else
      std::printf("%s: failed, status %d\n", op.name.c_str(), status);
  }
  std::printf("%zu operations, %d failed\n", lab::operations().size(), failed);
  return failed > 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// The table of kernels/choices.cuh. For each card and operation, the choice with the least time on cold arrays.

int choose(const std::vector<std::string>& files) {
  std::map<int, std::map<std::string, std::pair<double, int>>> best;  // capability -> operation -> time, choice
  for (const std::string& file : files) {
    std::ifstream in(file);
    if (!in) fail("cannot read ", file);
    std::string line;
    std::getline(in, line);
    if (line != columns) fail(file, " has other columns than this program writes");
    while (std::getline(in, line)) {
      std::vector<std::string> cell;
      std::istringstream cells(line);
      for (std::string one; std::getline(cells, one, ',');) cell.push_back(one);
      if (cell.size() < 8) fail(file, ": a line is too short: ", line);
      const int choice = std::atoi(cell[6].c_str());
      const double us = std::atof(cell[7].c_str());
      if (choice == 0) continue;
      auto [at, fresh] = best[std::atoi(cell[3].c_str())].try_emplace(cell[4], us, choice);
      if (!fresh && us < at->second.first) at->second = {us, choice};
    }
  }
  std::printf(
      "// Printed by dev/kernels/main.cu (lab choose) from the times of each card: see choices.cuh.\n"
      "// What the lab does not race, bench_gpu does (step bfloat16 kernel_starts=2); its winners are entered by "
      "hand.\n"
      "// capability, {the versions, in the order of struct Choices}\n");
  best[0];  // all other cards
  for (const auto& [capability, winners] : best) {
    std::printf("{%d, {", capability);
    const char* comma = "";
    const Choices first;
    Choices::each(first, [&](const char* name, int version, bool) {
      const auto found = winners.find(name);
      std::printf("%s%d", comma, found == winners.end() ? version : found->second.second);
      comma = ", ";
    });
    std::printf("}},\n");
  }
  return 0;
}

int run(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.empty()) return list_all();
  if (arguments[0] == "all") return run_all(argv[0], arguments.size() > 1 ? unsigned(std::atoi(argv[2])) : 60);
  if (arguments[0] == "choose") return choose({arguments.begin() + 1, arguments.end()});
  int failed = 0;
  for (const std::string& name : arguments) failed += run_one(operation(name)) != 0;
  return failed > 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_main([&] { return run(argc, argv); });
}
