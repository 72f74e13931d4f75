// Runs of several processes (host/ranks.h). Most of these tests start them with mpirun, and need programs that were built
// with MPI=1: make test-mpi.
#include "../host/ranks.h"

#include <csignal>
#include <filesystem>
#include <regex>

#include "../host/checkpoint.h"
#include "../host/run_files.h"
#include "trainer.h"

namespace {

// mpirun refuses root and more processes than cores, unless it is told; containers often have both. A run that hangs is
// ended after two minutes.
std::string mpirun(int processes, const std::string& command) {
  return text("env OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 ",
              "timeout --foreground 120 mpirun -n ", processes, " ", command);
}

bool without_mpi() {
  if (!with_mpi()) skip("built without MPI=1");
  return !with_mpi();
}

const std::string eight_batches = " --batch_size=1 --gradient_accumulation_steps=8 --threads=1 --checkpoint_secs=0";

std::string command(const std::string& folder, const std::string& out, const std::string& flags = "") {
  return train_gpt + small_run + eight_batches + " --data " + folder + "/data --out_dir " + folder + out + " " + flags;
}

// What a run leaves, without the times in it.
std::map<std::string, std::string> left_by(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const char* name :
       {"ckpt_last.safetensors", "ckpt_best.safetensors", "microGPT_model.pth", "microGPT.html", "sample.txt"})
    files[name] = read_file(folder + "/" + name);
  std::string& metrics = files["metrics.jsonl"] = read_file(folder + "/metrics.jsonl");
  metrics = std::regex_replace(metrics, std::regex("\"(time_ms|tokens_per_s|train_seconds)\":[^,}]*"), "");
  return files;
}

// The command, started as so many processes, leaves these files.
void check_same_run(const std::string& surroundings, int count, const std::string& command, const std::string& out_dir,
                    const std::map<std::string, std::string>& want) {
  INFO(count << " processes");
  const Run r = run(surroundings + mpirun(count, command));
  INFO(r.err);
  REQUIRE(r.code == 0);
  CHECK(contains(r.err, text(" in each of ", count, " processes on 1 host\n")));
  for (const auto& [name, bytes] : left_by(out_dir)) {
    INFO(name);
    CHECK((bytes == want.at(name)));
  }
}

}  // namespace

TEST_CASE("A buffer is divided evenly, in whole units") {
  for (const size_t count : {0, 1, 4096, 10'000, 40'961})
    for (const int ranks : {1, 2, 3, 7, 16}) {
      size_t next = 0;
      for (const Part& part : even_parts(count, 4096, ranks)) {
        CHECK(part.first == next);
        CHECK((part.first % 4096 == 0 || part.count == 0));
        CHECK(part.count <= (count / size_t(ranks) / 4096 + 2) * 4096);
        next += part.count;
      }
      CHECK(next == count);
    }
}

TEST_CASE("A program that stands alone is a run of one rank") {
  std::vector<double> numbers = {1, 2};
  ranks().gather(numbers.data(), {{0, 2}});
  CHECK(numbers == std::vector<double>{1, 2});
  CHECK(ranks().all(3) == std::vector<int>{3});
  CHECK(ranks().all_texts("a") == std::vector<std::string>{"a"});
  CHECK(ranks().agree([] { return 4; }) == 4);
  CHECK_THROWS_WITH(ranks().agree([]() -> int { fail("no"); }), "no");
  ranks().require_same("anything", "settings");
}

TEST_CASE("Any number of processes makes the run of one", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  for (const char* flags :
       {"--dropout=0.2 --grad_clip=0.3 --eval_iters=5", "--dtype=bfloat16", "--optimizer=muon --grad_clip=0.3"}) {
    INFO(flags);
    const Run one = run(command(folder, "/one", flags));
    if (contains(one.err, "needs AVX512_BF16")) continue;
    INFO(one.err);
    REQUIRE(one.code == 0);
    const auto want = left_by(folder + "/one");
    for (const int count : {2, 3, 4, 8})
      check_same_run("", count, command(folder, "/many", flags), folder + "/many", want);
  }
}

TEST_CASE("A run goes on with another number of processes", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  REQUIRE(run(command(folder, "/straight", "--dropout=0.2")).code == 0);
  const auto want = left_by(folder + "/straight");
  for (const auto& [first, second] : {std::pair{1, 4}, {4, 2}, {3, 1}}) {
    INFO(first << ", then " << second);
    const std::string out = text("/", first, second);
    REQUIRE(run(mpirun(first, command(folder, out, "--dropout=0.2 --max_iters=11"))).code == 0);
    const Run r = run(mpirun(second, train_gpt + " --threads=1 --init_from=resume --max_iters=20 --data " + folder +
                                         "/data --out_dir " + folder + out));
    INFO(r.err);
    REQUIRE(r.code == 0);
    for (const char* name : {"ckpt_last.safetensors", "microGPT_model.pth", "sample.txt"})
      CHECK((read_file(folder + out + "/" + name) == want.at(name)));
  }
}

TEST_CASE("Processes begin with weights of another run as one process does", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  REQUIRE(run(command(folder, "/first")).code == 0);
  const std::string flags = "--init_from=" + folder + "/first/microGPT_model.pth --block_size=20 --seed=3";
  const Run one = run(command(folder, "/one", flags));
  INFO(one.err);
  REQUIRE(one.code == 0);
  check_same_run("", 2, command(folder, "/many", flags), folder + "/many", left_by(folder + "/one"));
}

TEST_CASE("Processes that are more than the batches of a step divide these, and say how one process makes the same run",
          "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  const std::string flags = " --gradient_accumulation_steps=1 --batch_size=";
  const Run many = run(mpirun(3, command(folder, "/many", flags + "8")));
  INFO(many.err);
  REQUIRE(many.code == 0);
  CHECK(contains(many.err, "3 processes share a step: --batch_size 2 --gradient_accumulation_steps 4. With these two"));
  REQUIRE(run(command(folder, "/one", "--gradient_accumulation_steps=4 --batch_size=2")).code == 0);
  CHECK((left_by(folder + "/many") == left_by(folder + "/one")));
  const Run too_many = run(mpirun(3, command(folder, "/too_many", flags + "2")));
  CHECK(too_many.code == 1);
  CHECK(contains(too_many.err, "error: 3 processes cannot share the 2 windows of a step"));
}

TEST_CASE("Processes that do not fit together end, and say why", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared(), other = prepared("abc" + std::string(3000, 'c'));
  const auto refused = [&](const std::string& odd_one, const std::string& message) {
    INFO(odd_one);
    const Run r = run(mpirun(1, command(folder, "/out")) + " : -n 2 " + command(folder, "/out", odd_one));
    INFO(r.err);
    CHECK(r.code == 1);
    CHECK(contains(r.err, "error: rank 1 on "));
    CHECK(contains(r.err, message));
    CHECK(r.err.find("error: ") == r.err.rfind("error: "));  // one of them says it
    CHECK(!fs::exists(folder + "/out"));
  };
  refused("--learning_rate=0.5 --beta1=0.8",
          ": learning_rate 0.5 instead of learning_rate 0.01; beta1 0.8 instead of ");
  refused("--data=/nowhere", "/nowhere/vocab.json is missing");
  refused("--data=" + other + "/data", " in its settings: data ");
  const std::string here = command(folder, "/out", "--data data");  // a folder of this name in each working directory
  const Run r = run(mpirun(1, "--wdir " + folder + " " + here) + " : -n 1 --wdir " + other + " " + here);
  INFO(r.err);
  CHECK(r.code == 1);
  CHECK(contains(r.err, "error: rank 1 on "));
  CHECK(contains(r.err, " in its text: "));
}

TEST_CASE("A process that stops answering ends the others in time, and the last checkpoint goes on", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  const std::string flags = "--max_iters=1000000 --eval_interval=100 --comm_timeout=2";
  {
    Process mpi(mpirun(3, command(folder, "/out", flags)));
    mpi.wait_for("step 100: ");
    REQUIRE(run("pkill -STOP -n -f '[-]-out_dir " + folder + "/out'").code == 0);
    const Run r = mpi.wait();
    run("pkill -KILL -f '[-]-out_dir " + folder + "/out'");
    INFO(r.err);
    CHECK(r.code == 1);
    CHECK(contains(r.err, "no answer from rank "));
    CHECK(contains(r.err, " for 2 s (--comm_timeout)"));
  }
  const int iteration = Checkpoint(last_checkpoint(folder + "/out")).info().iteration;
  CHECK(iteration >= 100);
  const Run r = run(train_gpt + " --threads=1 --init_from=resume --max_iters=" + std::to_string(iteration + 5) +
                    " --data " + folder + "/data --out_dir " + folder + "/out");
  INFO(r.err);
  CHECK(r.code == 0);
}

TEST_CASE("A process that never starts ends the others in time", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  const Run r = run(mpirun(1, command(folder, "/out", "--comm_timeout=2")) + " : -n 1 sleep 100");
  INFO(r.err);
  CHECK(r.code == 1);
  CHECK(contains(r.err, "error: MPI did not start within 2 s: not all processes of the run have come up"));
}

TEST_CASE("SIGTERM to mpirun saves the run once", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  Process mpi(mpirun(3, command(folder, "/out", "--max_iters=1000000 --eval_interval=100 --log_interval=100000")));
  mpi.wait_for("step 100: ");
  mpi.signal(SIGTERM);
  const Run r = mpi.wait();
  INFO(r.err);
  CHECK(r.code != 0);
  CHECK(contains(r.err, "and saved; --init_from resume goes on\n"));
  CHECK(r.err.find("and saved;") == r.err.rfind("and saved;"));
  CHECK(Checkpoint(last_checkpoint(folder + "/out")).info().iteration >= 100);
}

TEST_CASE("A loss that is not finite ends all processes, and rank 0 says so", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  const Run r = run(mpirun(3, command(folder, "/out", "--learning_rate=10 --weight_decay=10 --max_iters=2000")));
  INFO(r.err);
  CHECK(r.code == 1);
  CHECK(contains(r.err, "one process that goes on from it by --init_from resume repeats these steps"));
  CHECK(r.err.find("error: ") == r.err.rfind("error: "));
}

TEST_CASE("An error of rank 0 ends all processes", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  const std::string trains = command(folder, "/out", "--n_embd=64");
  const Run r = run(mpirun(1, "sh -c \"ulimit -f 20; exec " + trains + "\" : -n 2 " + trains));  // 10 KB a file
  INFO(r.err);
  CHECK(r.code == 1);
  CHECK(contains(r.err, "error: rank 0 on "));
  CHECK(contains(r.err, "File too large"));
}

TEST_CASE("Threads of processes on one host divide its cores", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  std::string flags = command(folder, "/out", "--max_iters=1");
  flags = std::regex_replace(flags, std::regex("--threads=[0-9]+"), "");
  const Run one = run("env -u OMP_NUM_THREADS " + flags);
  std::smatch alone, shared;
  REQUIRE(std::regex_search(one.err, alone, std::regex(", ([0-9]+) threads?\n")));
  const Run two = run("env -u OMP_NUM_THREADS " + mpirun(2, "--bind-to none " + flags));
  INFO(two.err);
  REQUIRE(std::regex_search(two.err, shared, std::regex(", ([0-9]+) threads? in each of 2 processes")));
  CHECK(std::stoi(shared[1]) == std::max(1, std::stoi(alone[1]) / 2));
}

TEST_CASE("Two hosts share a run, and a cable that is cut ends it", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared(), two_hosts = "dev/check/two_hosts.sh ";
  const Run r = run(two_hosts + "0 " + command(folder, "/hosts"));
  if (r.code == 77) return skip("two hosts take root, ip, unshare and OpenMPI");
  INFO(r.err);
  REQUIRE(r.code == 0);
  CHECK(contains(r.err, " in each of 4 processes on 2 hosts\n"));
  REQUIRE(run(command(folder, "/one")).code == 0);
  CHECK((left_by(folder + "/hosts") == left_by(folder + "/one")));
  const Run cut = run("LIMIT=15 " + two_hosts + "5 " +
                      command(folder, "/cut", "--max_iters=1000000 --eval_interval=20 --comm_timeout=2"));
  INFO(cut.err);
  CHECK(cut.code != 0);
  CHECK(contains(cut.err, "no answer from rank 2 on host-b, rank 3 on host-b for 2 s (--comm_timeout)"));
  CHECK(Checkpoint(last_checkpoint(folder + "/cut")).info().iteration > 0);
}

TEST_CASE("A program that another MPI starts says so", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  const Run r = run("env -u OMPI_COMM_WORLD_SIZE PMI_SIZE=3 " + command(folder, "/out"));
  INFO(r.err);
  CHECK(r.code == 1);
  CHECK(contains(r.err, "error: 3 processes were started, but MPI sees 1"));
}

// ---------------------------------------------------------------------------------------------------------------------
// The GPU trainer, with a card for each process (dev/cuda_on_cpu) and NCCL between them (dev/cuda_on_cpu/nccl.h).

namespace {

const std::string on_gpus = "env CUDA_ON_CPU_DEVICES='90 90 90 90' ";

std::string gpu_command(const std::string& folder, const std::string& out, const std::string& flags = "") {
  return program("train_gpt_on_cpu") + small_run +
         " --n_layer=2 --batch_size=1 --gradient_accumulation_steps=4 --max_iters=5 " +
         "--eval_interval=3 --n_head=1 --checkpoint_secs=0 --device=cuda --data " + folder + "/data --out_dir " +
         folder + out + " " + flags;
}

}  // namespace

TEST_CASE("Any number of GPUs makes the run of one", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  for (const char* flags : {"--dtype=float32 --dropout=0.2 --grad_clip=0.3", "--dtype=bfloat16", "--dtype=float16",
                            "--dtype=bfloat16 --optimizer=muon"}) {
    INFO(flags);
    const Run one = run(on_gpus + gpu_command(folder, "/one", flags));
    INFO(one.err);
    REQUIRE(one.code == 0);
    const auto want = left_by(folder + "/one");
    const bool all = contains(flags, "float32");  // the exchange is the same for every type
    for (const int count : all ? std::vector<int>{2, 3, 4} : std::vector<int>{4})
      check_same_run(on_gpus + text("CUDA_ON_CPU_SEED=", count, " "), count, gpu_command(folder, "/many", flags),
                     folder + "/many", want);
  }
}

TEST_CASE("A run on several GPUs goes on with one, and on CPUs", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  const std::string flags = "--dtype=float32 --dropout=0.2 ", resume = " --init_from=resume --max_iters=5 ";
  REQUIRE(run(on_gpus + gpu_command(folder, "/straight", flags)).code == 0);
  REQUIRE(run(on_gpus + mpirun(4, gpu_command(folder, "/parts", flags + "--max_iters=4"))).code == 0);
  fs::copy(folder + "/parts", folder + "/on_cpus", fs::copy_options::recursive);
  const Run r = run(on_gpus + gpu_command(folder, "/parts", flags + resume));
  INFO(r.err);
  REQUIRE(r.code == 0);
  CHECK((read_file(folder + "/parts/ckpt_last.safetensors") == read_file(folder + "/straight/ckpt_last.safetensors")));
  const Run cpus =
      run(mpirun(2, train_gpt + resume + "--threads=1 --data " + folder + "/data --out_dir " + folder + "/on_cpus"));
  INFO(cpus.err);
  CHECK(cpus.code == 0);
}

TEST_CASE("Processes on GPUs: one card for two, a call left out, and a process that stops", "[mpi]") {
  if (without_mpi()) return;
  const std::string folder = prepared();
  const auto refused = [&](const std::string& surroundings, int count, const std::string& message) {
    INFO(surroundings);
    const Run r = run(surroundings + " " + mpirun(count, gpu_command(folder, "/out", "--dtype=float32")));
    INFO(r.err);
    CHECK(r.code == 1);
    CHECK(contains(r.err, message));
  };
  refused("env CUDA_ON_CPU_DEVICES=90", 2, "error: rank 0 and rank 1 have the same card (");
  refused("env CUDA_ON_CPU_DEVICES=", 2, "error: --device cuda: rank 0 on ");
  refused(on_gpus + "CUDA_ON_CPU_NCCL_SKIP='1 2' CUDA_ON_CPU_NCCL_SECONDS=3", 2, "NCCL would hang");
  // NCCL waits for ever, and the trainer notices.
  Process mpi(on_gpus + "CUDA_ON_CPU_NCCL_SECONDS=1000 " +
              mpirun(2, gpu_command(folder, "/stopped", "--max_iters=1000000 --comm_timeout=2")));
  mpi.wait_for("step 3: ");
  REQUIRE(run("pkill -STOP -n -f '[-]-out_dir " + folder + "/stopped'").code == 0);
  const Run r = mpi.wait();
  run("pkill -KILL -f '[-]-out_dir " + folder + "/stopped'");
  INFO(r.err);
  CHECK(r.code == 1);
  CHECK(contains(r.err, "no answer from rank "));
}
