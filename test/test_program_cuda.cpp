// The GPU trainer as you use it, on CUDA-on-CPU: which device it takes, what it says, and runs that move from one
// device to the other and back. CUDA_ON_CPU_DEVICES and CUDA_ON_CPU_MEMORY (bytes) describe the GPU that it finds.
#include <csignal>

#include "../host/machine.h"
#include "trainer.h"

namespace {

const std::string on_gpu = program("train_gpt_on_cpu"), on_cpu = program("train_gpt_cpu");
const std::string tiny =
    " --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --max_iters=12 --eval_interval=6 --eval_iters=2"
    " --log_interval=4 --dropout=0.1 --learning_rate=1e-2 --preset=lecture";

Run train_with(const std::string& what, const std::string& folder, const std::string& out, const std::string& flags) {
  return run(what + " --data " + folder + "/data --out_dir " + folder + out + flags);
}

// The losses in the lines "step ..." and "val exact", in order.
std::vector<double> losses_of(const std::string& out) {
  std::vector<double> losses;
  std::istringstream lines(out);
  for (std::string line; std::getline(lines, line);) {
    int step;
    double train, val;
    if (std::sscanf(line.c_str(), "step %d: train loss %lf, val loss %lf", &step, &train, &val) == 3) {
      losses.push_back(train);
      losses.push_back(val);
    } else if (std::sscanf(line.c_str(), "val exact: %lf", &val) == 1) {
      losses.push_back(val);
    }
  }
  return losses;
}

}  // namespace

TEST_CASE("The GPU trainer trains, samples, saves and says on what") {
  const std::string folder = prepared();
  const Run gpu = train_with(on_gpu, folder, "/gpu", tiny + " --dtype=float32"),
            cpu = train_with(on_cpu, folder, "/cpu", tiny + " --dtype=float32");
  INFO(gpu.err);
  REQUIRE(gpu.code == 0);
  CHECK(contains(gpu.err, "float32 on CUDA on the CPU"));
  CHECK(contains(gpu.err, "memory: parameters"));
  const std::vector<double> got = losses_of(gpu.out), want = losses_of(cpu.out);
  REQUIRE(got.size() == 7);
  REQUIRE(want.size() == 7);
  for (size_t i = 0; i < 7; i++) CHECK(got[i] == Approx(want[i]).margin(2e-4));
  CHECK(got.back() < 0.1);
  CHECK(read_file(folder + "/gpu/sample.txt") == read_file(folder + "/cpu/sample.txt"));
  CHECK(contains(read_file(folder + "/gpu/matmul_algorithms.txt"), "algorithms of matrix products"));
  CHECK(train_with(on_gpu, folder, "/gpu", " eval").code == 1);  // refused: a command must come first
  const Run eval = run(on_gpu + " eval --data " + folder + "/data --out_dir " + folder + "/gpu");
  CHECK(losses_of(eval.out).back() == Approx(got.back()).margin(1e-3));  // eval uses bfloat16 by default
  const Run sample = run(on_gpu + " sample --out_dir " + folder + "/gpu --start=ab --max_new_tokens=20");
  CHECK(contains(sample.out, "abababab"));

  // The next run puts this one aside. The measured algorithms stay, and go along.
  CHECK(contains(train_with(on_gpu, folder, "/gpu", tiny + " --dtype=float32").err, "/gpu/run_1 now"));
  const std::string table = "/matmul_algorithms.txt";
  CHECK(read_file(folder + "/gpu/run_1" + table) == read_file(folder + "/gpu" + table));
}

TEST_CASE("Every sample on a GPU is the CPU's, however many there are and however long they are") {
  const std::string folder = prepared();
  REQUIRE(train_with(on_gpu, folder, "/out", tiny + " --dtype=float32").code == 0);
  // The window has 16 tokens, a batch 4 windows, and the host waits for 64 tokens at a time.
  for (const std::string flags :
       {"--max_new_tokens=1", "--max_new_tokens=64 --temperature=2", "--max_new_tokens=65 --temperature=3 --top_k=2",
        "--num_samples=3 --max_new_tokens=5 --temperature=4", "--start=abab --num_samples=9 --max_new_tokens=70"}) {
    const std::string what = " sample --dtype=float32 --out_dir " + folder + "/out " + flags;
    const Run gpu = run(on_gpu + what), cpu = run(on_cpu + what);
    INFO(flags << gpu.err);
    CHECK(gpu.code == 0);
    CHECK(!cpu.out.empty());
    CHECK(gpu.out == cpu.out);
  }
}

TEST_CASE("Where cuBLASLt has no algorithm for a product, the GPU trainer says so and computes it itself") {
  const std::string folder = prepared();
  for (const std::string dtype : {"float32", "bfloat16"}) {
    const std::string flags = tiny + " --dtype=" + dtype;
    const Run r = train_with("CUDA_ON_CPU_NO_ALGORITHMS=1 " + on_gpu, folder, "/none_" + dtype, flags);
    INFO(r.err);
    REQUIRE(r.code == 0);
    CHECK(
        contains(r.err, "cuBLASLt has no algorithm for " + dtype + " TN m 96 n 64 k 32 ld 32 32 96: a simple kernel"));
    const std::vector<double> got = losses_of(r.out),
                              want = losses_of(train_with(on_gpu, folder, "/all_" + dtype, flags).out);
    REQUIRE(got.size() == 7);
    REQUIRE(want.size() == 7);
    for (size_t i = 0; i < 7; i++) CHECK(got[i] == Approx(want[i]).margin(dtype == "float32" ? 2e-4 : 5e-2));
  }
}

TEST_CASE("Runs in every type repeat, and resume, byte for byte") {
  const std::string folder = prepared();
  for (const std::string dtype : {"bfloat16", "float16", "tf32"}) {
    const std::string whole = "/" + dtype, again = whole + "_again", parts = whole + "_parts";
    const std::string flags = tiny + " --dtype=" + dtype;
    const Run r = train_with(on_gpu, folder, whole, flags);
    INFO(r.err);
    REQUIRE(r.code == 0);
    CHECK(contains(r.err, dtype + " on CUDA"));
    REQUIRE(train_with(on_gpu, folder, again, flags).code == 0);
    REQUIRE(train_with(on_gpu, folder, parts, flags + " --max_iters=7").code == 0);
    REQUIRE(train_with(on_gpu, folder, parts, " --init_from=resume --max_iters=12 --dtype=" + dtype).code == 0);
    const std::string checkpoint = read_file(folder + whole + "/ckpt_last.safetensors");
    CHECK((checkpoint == read_file(folder + again + "/ckpt_last.safetensors")));
    CHECK((checkpoint == read_file(folder + parts + "/ckpt_last.safetensors")));
  }
}

TEST_CASE("A run that goes on in another type says so, and that its products are others") {
  const std::string folder = prepared();
  REQUIRE(train_with(on_gpu, folder, "/out", tiny + " --dtype=float32 --max_iters=6").code == 0);
  const Run r = train_with(on_gpu, folder, "/out", " --init_from=resume --max_iters=12 --dtype=bfloat16");
  INFO(r.err);
  CHECK(r.code == 0);
  CHECK(contains(r.err, "going on in another type: float32 -> bfloat16\n"));
  CHECK(contains(r.err, "the kernels are not the same as before ("));
  CHECK(contains(r.err, "the run goes on, but not bit for bit\n"));
}

TEST_CASE("A run goes on on another device") {
  const std::string folder = prepared();
  REQUIRE(train_with(on_gpu, folder, "/a", tiny + " --dtype=float32 --max_iters=6").code == 0);
  const Run to_cpu = train_with(on_gpu, folder, "/a", " --init_from=resume --max_iters=12 --device=cpu");
  INFO(to_cpu.err);
  CHECK(to_cpu.code == 0);
  CHECK(contains(to_cpu.err, "going on at iteration 6"));
  REQUIRE(train_with(on_cpu, folder, "/b", tiny + " --max_iters=6 --dtype=float32").code == 0);
  const Run to_gpu = train_with(on_gpu, folder, "/b", " --init_from=resume --max_iters=12 --dtype=float32");
  CHECK(to_gpu.code == 0);
  const std::vector<double> a = losses_of(to_cpu.out), b = losses_of(to_gpu.out);
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); i++) CHECK(a[i] == Approx(b[i]).margin(2e-4));
}

TEST_CASE("Without a GPU it trains on the CPU and says why, unless a GPU was asked for") {
  const std::string folder = prepared();
  const std::string no_gpu = "CUDA_ON_CPU_DEVICES=0 " + on_gpu;
  const Run r = train_with(no_gpu, folder, "/out", tiny);
  CHECK(r.code == 0);
  CHECK(contains(r.err, "on the CPU: no CUDA device"));
  CHECK(contains(r.err, " GFLOP/s a core: ") == built_for.avx512_bf16);
  const Run refused = train_with(no_gpu, folder, "/refused", tiny + " --device=cuda");
  CHECK(refused.code == 1);
  CHECK(contains(refused.err, "error: --device cuda: no CUDA device"));
  const Run asked = train_with(on_gpu, folder, "/cpu", tiny + " --device=cpu");
  CHECK(asked.code == 0);
  CHECK(!contains(asked.err, "on the CPU:"));
  const Run type = train_with(no_gpu, folder, "/type", tiny + " --dtype=float16");
  CHECK(type.code == 1);
  CHECK(contains(type.err, "--dtype float16 needs a GPU"));
}

TEST_CASE("A GPU that does nothing, or is hidden, or has no cuBLASLt: the CPU, and why, or an error that says it") {
  const std::string folder = prepared();
  const std::vector<std::pair<std::string, std::string>> machines = {
      {"CUDA_ON_CPU_DRIVER=0", "no CUDA device: no NVIDIA driver was found"},
      {"CUDA_ON_CPU_DRIVER=12040",
       "no CUDA device: the driver knows CUDA 12.4, this program needs 13.0; update the driver"},
      {"CUDA_ON_CPU_DEVICES=90 CUDA_VISIBLE_DEVICES=", "no CUDA device: none is visible with CUDA_VISIBLE_DEVICES=''"},
      {"CUDA_ON_CPU_DEVICES=90 CUDA_VISIBLE_DEVICES=-1",
       "no CUDA device: none is visible with CUDA_VISIBLE_DEVICES='-1'"},
      {"CUDA_ON_CPU_DEVICES=61", "card 0 on the CPU has compute capability 6.1, 7.5 (Turing) or later is needed"},
      {"CUDA_ON_CPU_DEVICES=90:2", "card 0 on the CPU: no memory is free"},
      {"CUDA_ON_CPU_DEVICES=90:46", "card 0 on the CPU: it is busy or closed"},
      {"CUDA_ON_CPU_DEVICES=90:209", "card 0 on the CPU: the program was built for other cards"},
      {"CUDA_ON_CPU_DEVICES=90:222",
       "card 0 on the CPU: the driver, of CUDA 13.0, is older than this program's compiler"},
      {"CUDA_ON_CPU_DEVICES='61 90:719'", "or later is needed; card 1 on the CPU: unspecified launch failure"},
      {"CUDA_ON_CPU_CUBLASLT=libcublasLt.so.0", "cuBLASLt cannot be loaded (libcublasLt.so.0: "},
  };
  const std::string short_run = tiny + " --max_iters=1 --eval_iters=1 --threads=1";
  for (const auto& [machine, why] : machines) {
    INFO(machine);
    const std::string program = "env -u CUDA_VISIBLE_DEVICES " + machine + " " + on_gpu;
    const Run refused = train_with(program, folder, "/out", short_run + " --device=cuda");
    CHECK(refused.code == 1);
    CHECK(contains(refused.err, "error: --device cuda: "));
    CHECK(contains(refused.err, why));
    CHECK_FALSE(fs::exists(folder + "/out"));
    const Run r = train_with(program, folder, "/out", short_run);
    CHECK(r.code == 0);
    CHECK(r.err.substr(0, 12) == "on the CPU: ");
    CHECK(contains(r.err.substr(0, r.err.find('\n')), why));
    fs::remove_all(folder + "/out");
  }
}

TEST_CASE("The first GPU that does something is used, and those before it are named") {
  const std::string folder = prepared();
  const std::string program = "env -u CUDA_VISIBLE_DEVICES CUDA_ON_CPU_DEVICES='61 90:46 75 90' " + on_gpu;
  const Run r = train_with(program, folder, "/out", tiny + " --max_iters=1 --device=cuda");
  CHECK(r.code == 0);
  CHECK(contains(r.err,
                 "card 0 on the CPU has compute capability 6.1, 7.5 (Turing) or later is needed; "
                 "card 1 on the CPU: it is busy or closed"));
  CHECK(contains(r.err, "; card 2 on the CPU is used instead\n"));
  CHECK(contains(r.err, "float16 on card 2 on the CPU"));  // Turing has no bfloat16
  CHECK_FALSE(contains(r.err, "card 3"));
}

TEST_CASE("The flag --version says what there is, whatever is missing") {
  const Run all = run("env -u CUDA_VISIBLE_DEVICES CUDA_ON_CPU_DEVICES='61:46 75' " + on_gpu + " --version");
  CHECK(all.code == 0);
  CHECK(all.err == "");
  for (const char* part : {"microGPT ", "CPU kernels: vectors of ", "CUDA runtime 13.0, driver 13.0\n",
                           "card 0: card 0 on the CPU, compute capability 6.1, 17 GB\n",
                           "card 1: card 1 on the CPU, compute capability 7.5, 17 GB\n"})
    CHECK(contains(all.out, part));
  const Run none = run("CUDA_ON_CPU_DRIVER=0 CUDA_ON_CPU_CUBLASLT=libcublasLt.so.0 " + on_gpu + " --version");
  CHECK(none.code == 0);
  for (const char* part :
       {"driver none\n", "cuBLASLt cannot be loaded", "\nno CUDA device: no NVIDIA driver was found\n"})
    CHECK(contains(none.out, part));
}

TEST_CASE("What a GPU cannot do is refused before it begins") {
  const std::string folder = prepared();
  const auto refused = [&](const std::string& what, const std::string& flags, const std::string& part) {
    const Run r = train_with(what, folder, "/out", tiny + flags);
    INFO(r.err);
    CHECK(r.code == 1);
    CHECK(contains(r.err, part));
  };
  refused(on_gpu, " --n_head=1 --n_embd=48", "head size");
  refused(on_gpu, " --n_head=2 --n_embd=16", "head size");
  refused(on_gpu, " --n_head=32 --n_embd=4096", "n_embd");
  refused(on_gpu, " --batch_size=65536",
          "batch_size 65536 with windows of 16 tokens: the GPU's kernels take up to 65535");
  refused(on_gpu, " --batch_size=64528 --block_size=65", "4194240 tokens at once; --gradient_accumulation_steps");
  refused("CUDA_ON_CPU_MEMORY=300000 " + on_gpu, "", "on this GPU there are free");
  for (const std::string dtype : {"bfloat16", "tf32"})
    refused("CUDA_ON_CPU_DEVICES=75 " + on_gpu, " --dtype=" + dtype,
            "--dtype " + dtype + ": card 0 on the CPU has no " + dtype +
                " arithmetic (compute capability 8.0 has); --dtype float16 or float32");
}

TEST_CASE("On a GPU a run without an end begins at once, and Ctrl-C ends it") {
  const std::string folder = prepared();
  Process process(on_gpu + tiny + " --max_iters=2000000000 --data " + folder + "/data --out_dir " + folder + "/out");
  process.wait_for("iter 0: loss");
  process.signal(SIGINT);
  CHECK(process.wait().code == 130);
}

TEST_CASE("On a GPU, too, a number that is not finite is traced to its tensor, and the last good checkpoint stays") {
  const std::string folder = prepared();
  for (const std::string dtype : {"float32", "bfloat16"}) {
    const Run r =
        train_with(on_gpu, folder, "/" + dtype,
                   tiny + " --dtype=" + dtype +
                       " --learning_rate=10 --weight_decay=10 --beta2=0 --max_iters=200 --eval_interval=1000");
    INFO(r.err);
    CHECK(r.code == 1);
    CHECK(contains(r.err, "not finite"));
    CHECK(contains(r.err, "it began in iteration "));
    CHECK(contains(r.err, " with "));
    CHECK(run(on_cpu + " sample --max_new_tokens=5 --out_dir " + folder + "/" + dtype).code == 0);
  }
}
