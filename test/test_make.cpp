// The Makefile with fake compilers, flags and CUDA Toolkits, so that one machine plays many.
#include <sys/stat.h>

#include <filesystem>

#include "../host/files.h"
#include "test.h"

namespace {

namespace fs = std::filesystem;

// Runs make without this process's environment. What make builds goes to the folder `build`.
Run make(const std::string& build, const std::string& arguments, const std::string& environment = "") {
  return run("env -i PATH=\"$PATH\" " + environment + " make ARCH=ptx BUILD=" + build + " " + arguments);
}

void write_script(const std::string& path, const std::string& body) {
  fs::create_directories(fs::path(path).parent_path());
  write_file(path, "#!/bin/sh\n" + body);
  chmod(path.c_str(), 0755);
}

// A fake nvcc: it prints its version if asked, otherwise it runs the commands `compile`.
std::string fake_nvcc(const std::string& folder, const std::string& version, const std::string& compile) {
  write_script(folder + "/bin/nvcc",
               "[ \"$1\" = --version ] && echo 'release " + version + ", V" + version + ".1' && exit\n" + compile);
  return folder + "/bin/nvcc";
}

std::string line_with(const std::string& text, const std::string& part) {
  const size_t at = text.find(part);
  if (at == std::string::npos) return "";
  const size_t begin = text.rfind('\n', at) + 1;  // npos + 1 = 0
  return text.substr(begin, text.find('\n', at) - begin);
}

}  // namespace

TEST_CASE("A CUDA Toolkit that cannot build the GPU trainer stops make, which says why and how to do without") {
  struct Toolkit {
    std::string version, compiler_says, reason;
  };
  for (const Toolkit& t : {
           Toolkit{"11.5", "nvcc fatal   : Value 'c++20' is not defined for option 'std'", "12.8 or later is needed"},
           Toolkit{"12.0", "host_config.h:132:2: error: #error -- unsupported GNU version!", "12.8 or later is needed"},
           Toolkit{"12.8", "error: #error -- unsupported GNU version! gcc versions later than 14 are not supported!",
                   "make CXX=g++-14 train_gpt"},
           Toolkit{"13.0", "error: #error -- unsupported clang version! clang version must be less than 21",
                   "does not take this C++ compiler"},
           Toolkit{"12.9",
                   "mathcalls.h(79): error: exception specification is incompatible with that of previous "
                   "function \"cospi\"",
                   "glibc 2.41 needs CUDA 13.0 or later"},
           Toolkit{"13.2", "probe.cu:1:10: fatal error: cublasLt.h: No such file or directory", "a part of CUDA 13.2"},
           Toolkit{"13.2", "sh: 1: cicc: not found", "a part of CUDA 13.2"},
           Toolkit{"14.7", "error: something new", "CUDA 14.7 cannot build a small program"},
       }) {
    const std::string folder = test_folder();
    write_file(folder + "/says", t.compiler_says + "\n");
    const std::string nvcc = fake_nvcc(folder, t.version, "cat '" + folder + "/says' >&2\nexit 1");
    const Run r = make(folder, "NVCC=" + nvcc + " " + folder + "/cuda-ptx/train_gpt.o");
    INFO(r.err);
    CHECK(r.code == 2);  // make's own exit code
    CHECK(contains(line_with(r.err, "error: "), "CUDA " + t.version));
    CHECK(contains(line_with(r.err, "error: "), t.reason));
    CHECK(contains(r.err, "\n" + t.compiler_says + "\n"));
    CHECK(contains(r.err, "make NVCC= train_gpt\n"));
  }
  const std::string folder = test_folder();
  const Run r = make(folder, "NVCC=/no/nvcc " + folder + "/cuda-ptx/train_gpt.o");
  CHECK(r.code == 2);
  CHECK(contains(r.err, "error: /no/nvcc does not run"));
  CHECK(contains(make(folder, "NVCC= " + folder + "/cuda-ptx/dev/bench/bench_gpu").err, "error: nvcc was not found"));
}

TEST_CASE("CUDA's libraries are found wherever a toolkit keeps them, in folders of any name") {
  struct Folders {
    std::string libraries, nvcc_says;  // where the libraries are, and what nvcc says about that
    std::string nvcc_top = "bin/..";   // what nvcc takes for the toolkit's folder
  };
  for (const Folders& l : {Folders{"lib64", "\"-Lbin/../lib64/stubs\" \"-Lbin/../lib64\""},  // NVIDIA's
                           Folders{"lib", "\"-Lbin/../lib64/stubs\" \"-Lbin/../lib64\""},    // pip's, as of 13.0
                           Folders{"lib", "\"-Lbin/../lib/stubs\" \"-Lbin/../lib\""},        // pip's, as of 13.5
                           Folders{"targets/x86_64-linux/lib", "\"-Lbin/../lib\""},          // conda's
                           Folders{"targets/x86_64-linux/lib",                               // conda-forge's
                                   "\"-Lbin/../targets/x86_64-linux/lib/stubs\" "
                                   "\"-Lbin/../targets/x86_64-linux/lib\"",
                                   "bin/../targets/x86_64-linux"},
                           Folders{"apart", "-Lapart/stubs -Lapart "}}) {  // a Linux distribution's
    const std::string top = test_folder() + "/it's 100 %C, #1";
    fs::create_directories(top + "/" + l.libraries + "/stubs");
    for (const char* name : {"/libcudart_static.a", "/libcublasLt.so.13", "/stubs/libcublasLt.so"})
      write_file(top + "/" + l.libraries + name, "");
    std::string says = l.nvcc_says;
    for (size_t at = 0; (at = says.find("-L", at)) != std::string::npos; at += 2) says.insert(at + 2, top + "/");
    write_file(top + "/says", "#$ TOP=" + top + "/" + l.nvcc_top + "\n#$ LIBRARIES=  " + says + "\n");
    const std::string nvcc = fake_nvcc(top, "13.0", "[ \"$1\" != -dryrun ] || cat \"${0%bin/nvcc}says\" >&2");
    const std::string build = test_folder(), file = build + "/cuda-ptx/libraries";
    const Run r = make(build, "NVCC=\"" + nvcc + "\" " + file);
    INFO(l.libraries << "\n" << r.err);
    CHECK(r.code == 0);
    const std::string found = top + "/" + l.libraries;
    CHECK(read_file(file) == "\"-L" + found + "\" -Xlinker -rpath -Xlinker \"" + found + "\"\n");
#ifdef __linux__
    fs::remove(found + "/libcublasLt.so.13");
    const Run linked = run("cd \"" + found + "\" && echo 'int found() { return 7; }' | " +
                           "c++ -x c++ -shared -fPIC - -o libcublasLt.so && cd " + build +
                           " && echo 'int found(); int main() { return found(); }' | "
                           "c++ -x c++ - @cuda-ptx/libraries -lcublasLt -o linked && ./linked");
    INFO(linked.err);
    CHECK(linked.code == 7);
#endif
    const std::string again = test_folder();
    for (const char* name : {"/libcublasLt.so", "/libcudart_static.a"}) {  // one of them is missing
      fs::remove(found + name);
      const Run missing = make(again, "NVCC=\"" + nvcc + "\" " + again + "/cuda-ptx/libraries");
      CHECK(missing.code == 2);
      CHECK(contains(missing.err, "error: " + std::string(name + 1)));
    }
  }
}

TEST_CASE("nvcc is looked for on the path, in CUDA's folders, and among Python's packages, the latest first") {
  const std::string folder = test_folder(), packages = folder + "/site-packages";
  for (const char* name : {"cu12", "cu13"}) fake_nvcc(packages + "/nvidia/" + name, "13.0", "");
  fake_nvcc(packages + "/nvidia/apart", "13.0", "");
  fake_nvcc(folder + "/cuda", "13.0", "");
  const auto found = [&](const std::string& environment, const std::string& arguments) {
    const Run r = run("env -i " + environment + " make ARCH=ptx BUILD=" + folder + " " + arguments + " -pn help");
    INFO(r.err);
    return line_with(r.out, "NVCC := ");
  };
  const std::string path = "PATH=/usr/bin:/bin", python = " PYTHONPATH=" + packages;
  CHECK(found("PATH=" + folder + "/cuda/bin:/usr/bin:/bin", "") == "NVCC := " + folder + "/cuda/bin/nvcc");
  if (run("env " + path + " sh -c 'command -v nvcc'").code == 0) return skip("there is an nvcc in /usr/bin");
  CHECK(found(path + python + " CUDA_HOME=" + folder + "/cuda", "") == "NVCC := " + folder + "/cuda/bin/nvcc");
  CHECK(found(path + python, "CUDA_FOLDERS=" + folder + "/cuda") == "NVCC := " + folder + "/cuda/bin/nvcc");
  CHECK(found(path, "CUDA_FOLDERS=") == "NVCC := ");
  if (run("env " + path + " python3 --version").code != 0) return skip("there is no python3 in /usr/bin");
  CHECK(found(path + python, "CUDA_FOLDERS=") == "NVCC := " + packages + "/nvidia/cu13/bin/nvcc");
}

TEST_CASE("A C++ compiler that was chosen is nvcc's too; otherwise nvcc has its own") {
  const std::string build = test_folder(), goal = "-n NVCC=/cuda/bin/nvcc " + build + "/cuda-ptx/train_gpt.o";
  const auto nvcc_line = [&](const Run& r) { return line_with(r.out, "-c train_gpt.cu"); };
  CHECK(contains(nvcc_line(make(build, goal)), "\"/cuda/bin/nvcc\" "));
  CHECK(nvcc_line(make(build, goal)).find("-ccbin") == std::string::npos);
  CHECK(contains(nvcc_line(make(build, "CXX=g++-12 " + goal)), " -ccbin g++-12 "));
  CHECK(contains(nvcc_line(make(build, goal, "CXX=/conda/bin/c++")), " -ccbin /conda/bin/c++ "));
  CHECK(contains(nvcc_line(make(build, "CXX='ccache g++-12 -m64' " + goal)), " -ccbin g++-12 "));
  CHECK(contains(run("env -i PATH=\"$PATH\" make -n CXX='ccache g++' NVCC= train_gpt_cpu").out, " build/g++/"));
}

TEST_CASE("Flags of the environment reach the compilers, but for the instruction set, and ours come last") {
  const std::string build = test_folder();
  const std::string conda =
      "CPPFLAGS='-DNDEBUG -isystem /conda/include' CXXFLAGS='-O2 -march=nocona -mtune=haswell -I/mine' "
      "LDFLAGS=-L/conda/lib";
  const Run r =
      make(build, "-n NVCC=/cuda/bin/nvcc MARCH=x86-64-v3 train_gpt_cpu " + build + "/cuda-ptx/train_gpt", conda);
  const std::string kernels = line_with(r.out, "-c train_gpt_cpu.cpp");
  CHECK(contains(kernels, " -DNDEBUG -isystem /conda/include -O2 -I/mine "));
  CHECK(kernels.find(" -O3 ") > kernels.find(" -O2 "));
  CHECK(kernels.find(" -std=c++20 ") > kernels.find(" -O2 "));
  CHECK(r.out.find("nocona") == std::string::npos);
  CHECK(r.out.find("haswell") == std::string::npos);
  CHECK(contains(line_with(r.out, "-c train_gpt.cu"), " -isystem=/conda/include -I/mine "));
  CHECK(contains(line_with(r.out, "-o " + build + "/train_gpt_cpu\n"), " -L/conda/lib "));
  CHECK(contains(line_with(r.out, "-o " + build + "/cuda-ptx/train_gpt\n"), " -L/conda/lib "));
}

TEST_CASE("The program's version is the commit it is built from, in a clone and in an archive") {
  const std::string build = test_folder();
  const Run described = run("env -i PATH=\"$PATH\" git describe --tags --always --dirty");
  const Run r = make(build, "-n NVCC= " + build + "/host/version.o");
  const std::string compiled = line_with(r.out, "-c host/version.cpp");
  if (!std::filesystem::exists(".git") || described.code != 0) {
    CHECK(contains(compiled, "-DMICROGPT_VERSION='\"\"' "));
    return skip("needs a clone, and git");
  }
  CHECK(contains(compiled, "-DMICROGPT_VERSION='\"" + line_with(described.out, "") + "\"' "));
  CHECK(contains(run("git archive HEAD host/version.cpp | tar -xO").out,
                 "archived = \"" + line_with(run("git log -1 --format=%h").out, "") + "\";"));
}

TEST_CASE("A library that is missing is named, and make deps with it") {
  const std::string folder = test_folder();
  write_script(folder + "/c++", "echo 'error: #error CLI11 is missing' >&2; exit 1");
  const Run r = make(folder, "CXX=" + folder + "/c++ NVCC= " + folder + "/openmp");
  CHECK(r.code == 2);
  CHECK(contains(r.out + r.err, "CLI11 is missing"));
  CHECK(contains(r.out, "`make deps` installs what is missing"));
}

TEST_CASE("make runs as many compilers as there are processors, or as memory has room for, or as it is told") {
#ifdef __APPLE__
  return skip("macOS has no control groups, and its make shows other flags");
#endif
  const std::string root = test_folder();
  const auto put = [&](const std::string& path, const std::string& content) {
    fs::create_directories(fs::path(root + path).parent_path());
    write_file(root + path, content + "\n");
  };
  const auto jobs = [&] { return std::stoi(run("dev/setup/jobs.sh " + root).out); };
  const int processors = std::stoi(run("getconf _NPROCESSORS_ONLN").out);
  CHECK(jobs() == processors);  // no file says how much memory there is
  put("/proc/meminfo", "MemFree: 9 kB\nMemAvailable: 99000000000 kB");
  CHECK(jobs() == processors);
  put("/proc/meminfo", "MemFree: 99000000000 kB\nMemAvailable: 1048576 kB");
  CHECK(jobs() == 1);
  put("/proc/meminfo", "MemAvailable: 99000000 kB");
  // A limit counts wherever it is set: on our container, on our control group or on a group above it. The two versions
  // of control groups keep it in different files.
  put("/proc/self/cgroup", "9:memory:/a/b\n8:cpu,cpuacct:/c\n0::/d/e:f");
  for (const std::string limit : {"/memory.max", "/d/memory.max", "/d/e:f/memory.max", "/memory/memory.limit_in_bytes",
                                  "/memory/a/memory.limit_in_bytes", "/memory/a/b/memory.limit_in_bytes"}) {
    INFO(limit);
    put("/sys/fs/cgroup" + limit, "1073741824");
    CHECK(jobs() == 1);
    put("/sys/fs/cgroup" + limit, limit.find("max") != std::string::npos ? "max" : "9223372036854771712");
    CHECK(jobs() == processors);
  }
  put("/sys/fs/cgroup/d/memory.max", "1600000000");
  CHECK(jobs() == std::min(2, processors));

  const auto flag = [&](const std::string& environment, const std::string& arguments = "") {
    const Run r = make(root, arguments + " NVCC= -pn help", environment);
    const std::string flags = line_with(r.out, "MAKEFLAGS = ");
    INFO(flags);
    return std::stoi(flags.substr(flags.find(" -j") + 3));
  };
  CHECK(flag("", "JOBS=3") == 3);
  CHECK(flag("MAKEFLAGS=-j5") == 5);
  CHECK(flag("", "-j7") == 7);

  // Two fake compilers: `waits` waits until a second one begins, `looks` fails if another one runs.
  const std::string files = " NVCC= " + root + "/host/flags.o " + root + "/host/plot.o CXX=" + root;
  write_file(root + "/openmp", "");
  write_script(root + "/waits",
               "cd " + root + " && echo >>begun\n" +
                   "for _ in $(seq 200); do [ $(wc -l <begun) -ge 2 ] && exit; sleep 0.1; done; exit 1");
  write_script(root + "/looks", "mkdir " + root + "/busy || exit 1; sleep 0.2; rmdir " + root + "/busy");
  CHECK(make(root, "-j64 JOBS=2" + files + "/waits").code == 0);
  CHECK(make(root, "-j64 JOBS=1" + files + "/looks").code == 0);
}
