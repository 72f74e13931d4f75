// What doc/reliability.md promises: runs that are killed, disks that fail, signals, two runs in one folder, numbers that
// are not finite. After each, the run resumes from its files and ends with the same bytes as a run without trouble.
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <map>
#include <random>

#include "../host/checkpoint.h"
#include "trainer.h"

namespace {

const std::string faulty = program("train_gpt_faulty");

// All files that a finished run left, with the measured times cut from its record.
std::map<std::string, std::string> left_in(const std::string& folder) {
  std::map<std::string, std::string> files = contents(folder);
  std::string record;
  for (nlohmann::json line : lines_of(folder + "/metrics.jsonl")) {
    for (const char* time : {"time_ms", "tokens_per_s", "train_seconds"}) line.erase(time);
    record += line.dump() + "\n";
  }
  files["metrics.jsonl"] = record;
  return files;
}

void check_equal(const std::map<std::string, std::string>& got, const std::map<std::string, std::string>& want) {
  std::string names, expected;
  for (const auto& [name, content] : got) names += name + " ";
  for (const auto& [name, content] : want) expected += name + " ";
  CHECK(names == expected);
  CHECK(got.at("metrics.jsonl") == want.at("metrics.jsonl"));
  for (const auto& [name, content] : want) {
    INFO(name);
    CHECK((got.count(name) && got.at(name) == content));
  }
}

double seconds_of(const std::string& command) {
  const auto start = std::chrono::steady_clock::now();
  REQUIRE(run(command).code == 0);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The checkpoints in `out`, if there are any, load; loading checks every byte.
void check_loads(const std::string& out) {
  for (const char* name : {"/ckpt_last.safetensors", "/ckpt_best.safetensors"})
    if (fs::exists(out + name)) CHECK_NOTHROW(Checkpoint(out + name));
}

}  // namespace

TEST_CASE("A run that is killed a hundred times ends in the bytes of one that is not", "[reliability]") {
  const std::string folder = prepared(), data = " --data " + folder + "/data";
  const std::string flags = small_run + data + " --max_iters=600 --eval_interval=50 --checkpoint_secs=0.01 --threads=1";
  const double whole = seconds_of(train_gpt + flags + " --out_dir " + folder + "/whole");
  const auto want = left_in(folder + "/whole");

  const std::string out = folder + "/out", to_out = " --out_dir " + out;
  const std::string resume = train_gpt + " --init_from=resume --checkpoint_secs=0.01 --threads=1" + data + to_out;
  std::mt19937 random(1);
  std::uniform_real_distribution<double> moment(0, whole / 3);
  const int enough = sanitized ? 10 : 100;
  int resumed = 0;
  for (int kills = 0; kills < enough;) {
    const bool begun = fs::exists(out + "/ckpt_last.safetensors");
    Process process(begun ? resume : train_gpt + flags + to_out);
    usleep(useconds_t(1e6 * moment(random)));
    process.signal(SIGKILL);
    const Run r = process.wait();
    INFO(r.err);
    const bool complete = r.code == 1 && r.err.find("has done its 600 iterations") != std::string::npos;
    REQUIRE((complete || r.code == 0 || r.code == 128 + SIGKILL));
    if (complete || r.code == 0) {  // the run ended before the kill: start another one
      fs::remove(out + "/lock");
      check_equal(left_in(out), want);
      fs::remove_all(out);
      continue;
    }
    kills++;
    resumed += begun;
    check_loads(out);
  }
  CHECK(resumed > enough / 2);
  const Run r = run(fs::exists(out + "/ckpt_last.safetensors") ? resume : train_gpt + flags + to_out);
  INFO(r.err);
  CHECK((r.code == 0 || r.err.find("has done its 600 iterations") != std::string::npos));
  fs::remove(out + "/lock");
  check_equal(left_in(out), want);
}

// MICROGPT_EXHAUSTIVE=1 tries every fault at every call, which takes ten times as long. Without it we skip most writes
// in the middle of a file, and faults that are alike take turns.
TEST_CASE("Every call that writes a file fails once: what is saved loads, and the run goes on", "[reliability]") {
#ifdef __APPLE__
  return skip("macOS does not let a program stand before the system's calls");
#endif
  const bool exhaustive = std::getenv("MICROGPT_EXHAUSTIVE");
  const std::string folder = prepared(), data = " --data " + folder + "/data";
  // A fake gnuplot, which is fast.
  make_folder(folder + "/bin");
  write_file(folder + "/bin/gnuplot", "#!/bin/sh\nprintf '\\211PNGIEND\\256B`\\202'\ncat >/dev/null\n");
  fs::permissions(folder + "/bin/gnuplot", fs::perms::owner_all);
  const std::string path = "PATH=" + folder + "/bin:$PATH ";
  // First a run without faults, so that there is something to lose; then we resume it with the faults.
  REQUIRE(run(path + train_gpt + small_run + data + " --max_iters=8 --eval_interval=4 --threads=1 --out_dir " + folder +
              "/past")
              .code == 0);
  const std::string resume = " --init_from=resume --max_iters=11 --threads=1" + data + " --out_dir " + folder;
  const auto begin = [&](const std::string& out) {
    fs::remove_all(folder + out);
    fs::copy(folder + "/past", folder + out, fs::copy_options::recursive);
    return resume + out;
  };
  REQUIRE(run(path + "FAULT_LOG=" + folder + "/calls " + faulty + begin("/whole")).code == 0);
  const auto want = left_in(folder + "/whole");
  std::vector<std::string> calls = {""};
  std::ifstream log(folder + "/calls");
  for (std::string line; std::getline(log, line);) calls.push_back(line);
  REQUIRE(calls.size() > 60);  // checkpoints of two evaluations and of the end, record, model, picture, sample

  size_t last_write = 0;
  for (size_t n = 1; n < calls.size(); n++)
    if (calls[n].rfind("write", 0) == 0) last_write = n;

  std::map<std::string, int> seen;
  for (size_t n = 1; n < calls.size(); n++) {
    const std::string kind = calls[n].substr(0, calls[n].find(' '));
    if (sanitized && n % 4) continue;
    if (!exhaustive && n + 1 < calls.size() && calls[n] == calls[n - 1] && calls[n] == calls[n + 1] && n % 16) continue;
    std::vector<std::string> faults = {"EIO", "ENOSPC", "EDQUOT", "power", "EINTR", "short", "kill", "torn"};
    if (!exhaustive) faults = {faults[n % 3], faults[3 + n % 5]};
    for (const std::string& fault : faults) {
      if ((fault == "short" || fault == "torn") && n > last_write) continue;
      const Run r = run(path + "FAULT=" + std::to_string(n) + ":" + fault + " " + faulty + begin("/out"));
      INFO(fault << " at call " << n << ", " << calls[n] << ": " << r.err);
      seen[fault]++;
      if (fault == "short" || fault == "EINTR") {
        CHECK(r.code == 0);
      } else if (fault[0] != 'E') {
        CHECK(r.code == 128 + SIGKILL);
      } else if (kind == "write" && contains(calls[n], "/lock")) {
        CHECK(r.code == 0);  // only people read what is in the lock
      } else {
        CHECK(r.code == 1);
        CHECK(contains(r.err, "error: could not "));
        CHECK(contains(r.err, fault == "EIO"      ? "Input/output error"
                              : fault == "ENOSPC" ? "(the disk is full: free some space"
                                                  : "(your quota is used up: remove something"));
        if (contains(r.err, "step 10")) CHECK(contains(r.err, "is whole, --init_from resume goes on at iteration "));
      }
      check_loads(folder + "/out");
      if (r.code != 0) {
        const Run again = run(path + train_gpt + resume + "/out");
        INFO(again.err);
        // If the record has its last line, only the fsync was missing: the run is complete.
        const bool complete = again.err.find("has done its 11 iterations") != std::string::npos;
        if (complete) fs::remove(folder + "/out/lock");
        CHECK(again.code == (complete ? 1 : 0));
      }
      check_equal(left_in(folder + "/out"), want);
    }
  }
  for (const char* fault : {"EIO", "ENOSPC", "EDQUOT", "EINTR", "short", "kill", "torn", "power"})
    CHECK(seen[fault] > (sanitized ? 0 : 5));
}

TEST_CASE("Signals finish the step, save, and say so by the exit code; the run then goes on to the same end",
          "[reliability]") {
  const std::string folder = prepared(), data = " --data " + folder + "/data";
  const int steps = sanitized ? 600 : 3000;
  const std::string flags =
      small_run + data + text(" --max_iters=", steps, " --eval_interval=", steps / 3, " --log_interval=", steps / 3);
  REQUIRE(run(train_gpt + flags + " --out_dir " + folder + "/whole").code == 0);
  const auto want = left_in(folder + "/whole");
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU}) {
    const std::string out = folder + "/" + std::to_string(number);
    Process process(train_gpt + flags + " --out_dir " + out);
    process.wait_for("iter 0");
    process.signal(number);
    const Run r = process.wait();
    INFO(r.err);
    CHECK(r.code == 128 + number);
    CHECK(contains(r.err, text("stopped before iteration ", Checkpoint(out + "/ckpt_last.safetensors").info().iteration,
                               " and saved")));
    REQUIRE(run(train_gpt + " --init_from=resume" + data + " --out_dir " + out).code == 0);
    check_equal(left_in(out), want);
  }
}

TEST_CASE("A second Ctrl-C ends the run at once, other signals do not, and what is ignored stays ignored",
          "[reliability]") {
  const std::string folder = prepared(), data = " --data " + folder + "/data";
  // A step of this model takes a second, or some with a sanitizer.
  const std::string slow = " --preset=lecture --n_layer=" + std::string(sanitized ? "8" : "40") +
                           " --n_embd=64 --n_head=2 --block_size=150 --batch_size=200" + data +
                           " --eval_iters=1 --max_iters=1000000 --out_dir " + folder;
  {
    Process process(train_gpt + slow + "/slow");
    process.wait_for("iter 0");  // a step has begun: before the first, an evaluation may be over any moment
    process.signal(SIGINT);
    usleep(50'000);
    process.signal(SIGINT);
    const Run r = process.wait();
    CHECK(r.code == 128 + SIGINT);
    CHECK(r.err.find("stopped before") == std::string::npos);  // it did not finish the step
  }
  {  // Slurm warns before it ends a job, and the system signals more than once that the time is over
    Process process(train_gpt + slow + "/warned");
    process.wait_for("iter 0");
    for (const int number : {SIGUSR1, SIGXCPU, SIGXCPU, SIGTERM}) {
      process.signal(number);
      usleep(20'000);
    }
    const Run r = process.wait();
    CHECK(r.code == 128 + SIGTERM);
    CHECK(contains(r.err, "stopped before iteration "));
  }
  Process process("nohup sh -c \"trap '' USR1; exec \"'" + train_gpt + small_run + data +
                  " --max_iters=300 --out_dir " + folder + "/nohup'");
  process.wait_for("iter 0");
  process.signal(SIGHUP);
  process.signal(SIGUSR1);
  CHECK(process.wait().code == 0);
}

TEST_CASE("A file that outgrows its limit is an error like a full disk", "[reliability]") {
  const std::string folder = prepared(), out = folder + "/out", last = out + "/ckpt_last.safetensors";
  REQUIRE(train(folder).code == 0);
  const std::string kept = read_file(last);
  const std::string resume =
      train_gpt + " --init_from=resume --max_iters=30 --data " + folder + "/data --out_dir " + out;
  const std::string hint = "File too large (files may not grow that large here: raise ulimit -f";
  check_refused("ulimit -f 100; " + resume, hint);  // 100 blocks are 50 or 100 KB, a third of the checkpoint
  CHECK((read_file(last) == kept));
  check_refused("ulimit -f 1; " + program("data_prep") + " " + folder + "/input.txt --out " + folder + "/data", hint);
  CHECK(run("ulimit -f 1; " + train_gpt + " sample --max_new_tokens=9000 --out_dir " + out + " >" + folder + "/text")
            .code == 1);
  for (const auto& [name, content] : contents(folder)) CHECK(name.find("tmp") == std::string::npos);
  REQUIRE(run(resume).code == 0);
  CHECK((read_file(last) != kept));
}

TEST_CASE("A small stack is enough, or it is said that it is not", "[reliability]") {
  const std::string folder = prepared(), flags = small_run + " --data " + folder + "/data --out_dir " + folder;
  check_refused("ulimit -s 128; " + train_gpt + flags + "/128", "the stack may grow to 128 KB only: allow 256 KB");
  check_refused("ulimit -s 128; " + program("data_prep") + " " + folder + "/input.txt --out " + folder, "128 KB only");
  CHECK(!fs::exists(folder + "/128"));
#if !defined(__SANITIZE_ADDRESS__)  // AddressSanitizer needs more
  CHECK(run("ulimit -s 256; " + train_gpt + flags + "/256").code == 0);
  CHECK(fs::exists(folder + "/256/training_plot.png"));
  CHECK(run("ulimit -s 256; " + train_gpt + " sample --max_new_tokens=3 --out_dir " + folder + "/256").code == 0);
#endif
  if (run("ulimit -s unlimited").code == 0)
    CHECK(run("ulimit -s unlimited; " + train_gpt + flags + "/unlimited").code == 0);
}

TEST_CASE("Without MPI one of several processes refuses to train, and nothing is touched", "[reliability]") {
  if (with_mpi()) return skip("built with MPI=1");
  const std::string folder = prepared(), flags = small_run + " --data " + folder + "/data --out_dir " + folder;
  for (const std::string several :
       {"OMPI_COMM_WORLD_SIZE=2", "PMI_SIZE=3", "SLURM_STEP_NUM_TASKS=4 SLURM_NTASKS=4", "WORLD_SIZE=8 RANK=0"}) {
    check_refused(several + " " + train_gpt + flags + "/out", several.substr(0, several.find('=')) + " is ");
    check_refused(several + " " + train_gpt + flags + "/out", "make train_gpt MPI=1");
    CHECK(!fs::exists(folder + "/out"));
  }
  // A job's script that may start four processes, mpirun with a single process, and one of torchrun's variables alone.
  CHECK(run("SLURM_NTASKS=4 SLURM_PROCID=0 WORLD_SIZE=2 " + train_gpt + flags + "/one").code == 0);
  CHECK(run("OMPI_COMM_WORLD_SIZE=1 SLURM_STEP_NUM_TASKS=2 " + train_gpt + flags + "/two").code == 0);
  CHECK(run("WORLD_SIZE=2 RANK=1 " + train_gpt + " sample --max_new_tokens=3 --out_dir " + folder + "/one").code == 0);
}

TEST_CASE("Two runs do not share a folder, and a killed one leaves it free", "[reliability]") {
  const std::string folder = prepared(), out = folder + "/out";
  const std::string flags =
      small_run + " --data " + folder + "/data --max_iters=1000000 --eval_interval=1000000 --checkpoint_secs=0.01";
  Process first(train_gpt + flags + " --out_dir " + out);
  while (!fs::exists(out + "/ckpt_last.safetensors")) first.wait_for("iter 1000:");
  const std::string best = read_file(out + "/ckpt_best.safetensors");
  check_refused(train_gpt + flags + " --out_dir " + out, "/out is in use by process ");
  check_refused(train_gpt + flags + " --init_from=resume --out_dir " + out, "/out is in use by process ");
  CHECK((read_file(out + "/ckpt_best.safetensors") == best));
  CHECK(run(train_gpt + " sample --max_new_tokens=3 --out_dir " + out).code == 0);  // sample only reads
  first.signal(SIGKILL);
  first.wait();
  CHECK(fs::exists(out + "/lock"));
  CHECK(Checkpoint(out + "/ckpt_last.safetensors").info().iteration > 100);  // not from an evaluation
  const int next = Checkpoint(out + "/ckpt_last.safetensors").info().iteration + 1;
  const Run r = run(train_gpt + " --init_from=resume --max_iters=" + std::to_string(next) + " --data " + folder +
                    "/data --out_dir " + out);
  INFO(r.err);
  CHECK(r.code == 0);
  CHECK(!fs::exists(out + "/lock"));
}

TEST_CASE("A new run in the folder of an old one puts its files aside", "[reliability]") {
  const std::string folder = prepared();
  REQUIRE(train(folder).code == 0);
  const auto old = left_in(folder + "/out");
  const Run r = train(folder, "--seed=2");
  CHECK(r.code == 0);
  CHECK(contains(r.err, "held another run of 20 iterations: it is in " + folder + "/out/run_1"));
  check_equal(left_in(folder + "/out/run_1"), old);
  REQUIRE(train(folder, "--seed=3").code == 0);
  CHECK(fs::exists(folder + "/out/run_2/ckpt_last.safetensors"));
  check_equal(left_in(folder + "/out/run_1"), old);
}

TEST_CASE("A run that was stopped after its last step finishes when it goes on", "[reliability]") {
  const std::string folder = prepared(), resume = " --init_from=resume --data " + folder + "/data --out_dir " + folder;
  REQUIRE(train(folder).code == 0);
  const auto want = left_in(folder + "/out");
  // What a kill between the last checkpoint and the end leaves.
  std::string record = read_file(folder + "/out/metrics.jsonl");
  write_file(folder + "/out/metrics.jsonl", record.substr(0, record.find("{\"type\":\"final\"")));
  for (const char* name : {"/out/sample.txt", "/out/training_plot.png", "/out/microGPT_model.pth"})
    fs::remove(folder + name);
  REQUIRE(run(train_gpt + resume + "/out").code == 0);
  check_equal(left_in(folder + "/out"), want);
  check_refused(train_gpt + resume + "/out", "has done its 20 iterations; raise --max_iters");
  check_equal(left_in(folder + "/out"), want);
  check_refused(train_gpt + resume + "/out --max_iters=19", "has done 20 iterations, more than --max_iters 19");
}

TEST_CASE("Ctrl-C while the text at the end is made leaves that for later", "[reliability]") {
  const std::string folder = prepared(), data = " --data " + folder + "/data --out_dir " + folder + "/out";
  Process process(train_gpt + small_run + " --n_embd=64 --max_iters=1 --eval_iters=1 --threads=1 --n_layer=" +
                  (sanitized ? "20" : "60") + data);
  process.wait_for("trained in");
  process.signal(SIGINT);
  const Run r = process.wait();
  INFO(r.err);
  CHECK(r.code == 130);
  CHECK(!fs::exists(folder + "/out/sample.txt"));
  CHECK(run(train_gpt + " --init_from=resume" + data).code == 0);
  CHECK(read_file(folder + "/out/sample.txt").size() == 501);
}

TEST_CASE("A loss that is not finite ends the run, keeps the last good checkpoint and names the tensor",
          "[reliability]") {
  const std::string folder = prepared(), last = folder + "/out/ckpt_last.safetensors";
  const Run r = train(folder, "--learning_rate=10 --weight_decay=10 --max_iters=400 --eval_interval=1000 --beta2=0");
  INFO(r.err);
  CHECK(r.code == 1);
  CHECK(contains(r.err, "is not finite"));
  CHECK(contains(r.err, "it began in iteration "));
  CHECK(contains(r.err, " with "));
  CHECK(contains(r.err, last + " is the last good state"));
  CHECK(Checkpoint(last).info().iteration == 0);

  // One tensor of the checkpoint makes the next step overflow: either the forward pass, or only the update. Then the
  // weights must not reach a checkpoint before the next loss shows the damage.
  REQUIRE(train(folder, "--max_iters=3 --dtype=float32", "/made").code == 0);
  const std::string made = folder + "/made/ckpt_last.safetensors", good = read_file(made);
  enum class Spoil { weights, m, v };
  const auto go_on_with = [&](const char* tensor, Spoil what, const std::string& flags) {
    write_file(made, good);
    {
      const Checkpoint checkpoint(made);
      const Layout layout = parameter_layout(checkpoint.info().shape);
      const Snapshot s{Buffer<float>(layout), Buffer<float>(layout), Buffer<float>(layout)};
      checkpoint.load_params(s.params.data(), layout);
      checkpoint.load_moments(s.m.data(), s.v.data(), layout);
      const TensorSpec spec = find_tensor(layout, tensor);
      for (size_t i = spec.offset; i < spec.offset + spec.slice; i++) {
        const float huge = i % 2 ? -3e38f : 3e38f;
        if (what == Spoil::weights) s.params.data()[i] = huge;
        if (what == Spoil::m) s.m.data()[i] = huge, s.v.data()[i] = 0;
        if (what == Spoil::v) s.v.data()[i] = INFINITY;
      }
      save_checkpoint(made, checkpoint.info(), checkpoint.vocabulary(), layout, s.params.data(), s.m.data(),
                      s.v.data());
    }
    const Run end = train(folder, "--init_from=resume --dtype=float32 " + flags, "/made");
    CHECK(end.code == 1);
    CHECK(Checkpoint(made).info().iteration == 3);
    return end.err;
  };
  std::string message = go_on_with("headw", Spoil::weights, "--max_iters=9");
  CHECK(contains(message, "the loss of iteration 3 is not finite"));
  CHECK(contains(message, "it began in iteration 3 with logits"));
  message = go_on_with("headw", Spoil::weights, "--max_iters=4");  // its last iteration begins with an evaluation
  CHECK(contains(message, "the evaluation before iteration 3 are not finite; the weights are finite, but too large"));
  message = go_on_with("lnfw", Spoil::m, "--max_iters=4");  // an evaluation follows at once
  CHECK(contains(message, "the loss after iteration 3 is not finite"));
  CHECK(contains(message, "it began in iteration 3 with the weights lnfw"));
  message = go_on_with("lnfw", Spoil::v, "--max_iters=9");  // no loss shows it, but the next checkpoint does
  CHECK(contains(message, "the weights after iteration 7 are not finite"));
  CHECK(contains(message, "it began in iteration 3 with AdamW's v of lnfw"));
}

TEST_CASE("Output that nobody takes does not end a run, but is said", "[reliability]") {
  const std::string folder = prepared();
  const std::string flags = small_run + " --data " + folder + "/data --max_iters=200 --out_dir " + folder;
  // The pipe closes after the first line, but that does not kill the run.
  const Run r = run("(" + train_gpt + flags + "/pipe; echo code $? >&2) | head -n 1");
  CHECK(contains(r.err, "not everything could be written to standard output; every file is whole"));
  CHECK(contains(r.err, "code 1\n"));
  CHECK(left_in(folder + "/pipe").size() == 7);
  const Run closed = run(train_gpt + flags + "/closed >&-");
  CHECK(closed.code == 1);
  check_equal(left_in(folder + "/closed"), left_in(folder + "/pipe"));
  // The output does not go into a file that got the descriptor of the closed stream.
  CHECK(run("FAULT=100:kill " + faulty + flags + "/killed >&-").code == 128 + SIGKILL);
  CHECK(read_file(folder + "/killed/lock").find("step") == std::string::npos);
  if (fs::exists("/dev/full")) {
    CHECK(run(train_gpt + flags + "/full > /dev/full").code == 1);
    CHECK(run(train_gpt + " sample --out_dir " + folder + "/full > /dev/full").code == 1);
    CHECK(run(program("data_prep") + " " + folder + "/input.txt --out " + folder + "/data2 > /dev/full").code == 1);
  }
  CHECK(run(train_gpt + " sample --max_new_tokens=100000 --out_dir " + folder + "/pipe | head -c 3").out.size() == 3);
}

// Stands in for a run that takes a day.
TEST_CASE("A long run keeps its memory and its open files", "[reliability]") {
  if (!fs::exists("/proc/self/statm")) return skip("needs /proc");
  const int steps = sanitized ? 20'000 : 200'000;
  const std::string folder = prepared(), out = folder + "/out";
  Process process(
      train_gpt + " --preset=lecture --n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=1" +
      " --eval_interval=100 --eval_iters=1 --log_interval=100 --checkpoint_secs=0.01 --threads=1 --dtype=float32" +
      " --max_iters=" + std::to_string(steps) + " --data " + folder + "/data --out_dir " + out);
  const std::string proc = "/proc/" + std::to_string(process.id());
  process.wait_for("step " + std::to_string(steps / 10) + ":");
  const auto look = [&](double& megabytes, int& files) {
    std::ifstream in(proc + "/statm");
    double size, resident;
    if (!(in >> size >> resident)) return false;
    megabytes = resident * double(sysconf(_SC_PAGESIZE)) / 1e6;
    std::error_code error;
    files = int(std::distance(fs::directory_iterator(proc + "/fd", error), fs::directory_iterator()));
    return !error;
  };
  double first = 0, last = 0, largest = 0;
  int files = 0, most = 0;
  REQUIRE(look(first, files));
  // We stop looking before the end, where export, plot and sample take memory of their own.
  while (!process.printed("step " + std::to_string(steps / 100 * 100 - 100) + ":") && look(last, files)) {
    largest = std::max(largest, last);
    most = std::max(most, files);
    usleep(20'000);
  }
  CHECK(process.wait().code == 0);
  CHECK(most <= 12);  // 0, 1, 2, the record, the lock, two shards, two of a checkpoint, and three more
  INFO(first << " MB, at most " << largest << " MB");
#if !defined(__SANITIZE_ADDRESS__)  // AddressSanitizer keeps freed memory
  CHECK(largest - first < 1);
#endif
}
