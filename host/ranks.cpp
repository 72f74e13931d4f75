#include "ranks.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#ifdef MICROGPT_MPI
#include <fcntl.h>
// MPI's functions for C, without those for C++, which MPI 3 has dropped
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#endif

#include "machine.h"
#include "version.h"

static Ranks the_ranks;
const Ranks& ranks() { return the_ranks; }

std::vector<Part> even_parts(size_t count, size_t unit, int ranks) {
  const size_t units = (count + unit - 1) / unit;
  std::vector<Part> parts;
  for (size_t r = 0; r < size_t(ranks); r++) {
    const size_t begin = std::min(units * r / size_t(ranks) * unit, count),
                 end = std::min(units * (r + 1) / size_t(ranks) * unit, count);
    parts.push_back({begin, end - begin});
  }
  return parts;
}

int Ranks::hosts() const { return int(std::set<std::string>(hosts_.begin(), hosts_.end()).size()); }
int Ranks::on_this_host() const { return int(std::count(hosts_.begin(), hosts_.end(), hosts_[size_t(rank_)])); }
int Ranks::sharing_cores() const {
  int sharing = 0;
  for (size_t r = 0; r < hosts_.size(); r++)
    sharing += hosts_[r] == hosts_[size_t(rank_)] && processors_[r] == processors_[size_t(rank_)];
  return sharing;
}
int Ranks::number_on_host() const {
  return int(std::count(hosts_.begin(), hosts_.begin() + rank_, hosts_[size_t(rank_)]));
}
std::string Ranks::about(int rank) const { return text("rank ", rank, " on ", hosts_[size_t(rank)]); }

std::vector<std::string> Ranks::all_texts(const std::string& mine) const {
  const std::vector<size_t> lengths = all(mine.size());
  std::vector<Part> parts;
  size_t total = 0;
  for (const size_t length : lengths) {
    parts.push_back({total, length});
    total += length;
  }
  std::string together(total, ' ');
  std::copy(mine.begin(), mine.end(), together.begin() + std::ptrdiff_t(parts[size_t(rank_)].first));
  gather(together.data(), parts);
  std::vector<std::string> out;
  for (const Part& part : parts) out.push_back(together.substr(part.first, part.count));
  return out;
}

// Why this rank ends with an error, and so what it has to say.
enum class Ending {
  own,    // it has failed: it says why, and tells the others that it ends
  all,    // all ranks have failed for one reason, which rank 0 says
  ended,  // another rank has failed and has said why
  lost    // another rank does not answer: each one says so, because the missing one may be rank 0
};
static Ending ending = Ending::own;

void Ranks::fail_alike(const std::string& words) const {
  ending = Ending::all;
  fail(words);
}

std::string Ranks::first_of(const std::string& mine) const {
  const std::vector<std::string> texts = all_texts(mine);
  for (size_t r = 0; r < texts.size(); r++)
    if (!texts[r].empty()) return count() == 1 ? texts[r] : about(int(r)) + ": " + texts[r];
  return "";
}

std::string Ranks::shared_by() const {
  return count() == 1 ? ""
                      : text(" in each of ", count(), " processes on ", hosts(), hosts() == 1 ? " host" : " hosts");
}

void Ranks::fail_together(const std::string& failure) const {
  if (count() == 1) return;
  const std::vector<std::string> failures = all_texts(failure);
  for (size_t r = 0; r < failures.size(); r++) {
    if (failures[r].empty()) continue;
    fail_alike((r == 0 ? "" : about(int(r)) + ": ") + failures[r]);
  }
}

// Settings are separated by commas and line ends.
static std::vector<std::string> settings_in(const std::string& words) {
  std::vector<std::string> out(1);
  for (const char c : words)
    if (c == ',' || c == '\n')
      out.emplace_back();
    else if (c != ' ' || !out.back().empty())
      out.back() += c;
  return out;
}

void Ranks::require_same(const std::string& mine, const std::string& what) const {
  const std::vector<std::string> texts = all_texts(mine);
  const std::vector<std::string> wanted = settings_in(texts[0]);
  for (size_t r = 1; r < texts.size(); r++) {
    if (texts[r] == texts[0]) continue;
    std::string differences;
    const std::vector<std::string> got = settings_in(texts[r]);
    for (size_t i = 0; i < std::min(got.size(), wanted.size()); i++)
      if (got[i] != wanted[i]) differences += text(differences.empty() ? "" : "; ", got[i], " instead of ", wanted[i]);
    fail_alike(text(about(int(r)), " differs from ", about(0), " in its ", what, ": ", differences));
  }
}

// How many processes the launcher has started together, and the variable that says so; 0: none of the launchers that we
// know. The innermost launcher comes first: mpirun starts its helpers by srun. SLURM_STEP_NUM_TASKS counts the processes
// that srun did start; SLURM_NTASKS, which we do not ask, those that a job's script may start.
static int launched_processes(const char*& variable) {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    const char* size = std::getenv(name);
    if (!size || (name == std::string("WORLD_SIZE") && !std::getenv("RANK"))) continue;
    variable = name;
    return std::atoi(size);
  }
  return 0;
}

#ifndef MICROGPT_MPI
// ---------------------------------------------------------------------------------------------------------------------
// Built without MPI: one rank.

void Ranks::exchange(const std::vector<Message>&, const std::vector<Message>&) const {}
void Ranks::lost() const { fail("a rank is lost"); }
std::string mpi_text() { return ""; }

int with_ranks(const Config& config, const std::function<int()>& body) {
  const char* variable = "";
  if (const int size = launched_processes(variable); size > 1 && config.command == "train")
    fail(variable, " is ", size,
         ", but this program was built without MPI: a training run is one process then. Build it ",
         "with make train_gpt MPI=1, or start it without mpirun, srun or torchrun (runs that have nothing to do with ",
         "each other, each with an --out_dir of its own, start with that unset: env -u ", variable, " ./train_gpt)");
  return body();
}

#else
// ---------------------------------------------------------------------------------------------------------------------
// Built with MPI.

namespace {

using Clock = std::chrono::steady_clock;

constexpr int data_tag = 1, farewell_tag = 2, alive_tag = 3;

std::string mpi_error(int code) {
  char words[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, words, &length);
  return {words, size_t(length)};
}

std::string mpi_version() {
  char words[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  MPI_Get_library_version(words, &length);
  std::string first = std::string(words).substr(0, std::string(words).find_first_of(",\n"));
  std::replace(first.begin(), first.end(), '\t', ' ');
  return first;
}

// Ends the process if MPI has not started after so many seconds. It waits for every process of the run, and one that
// never starts would keep the others waiting for ever.
class StartLimit {
 public:
  explicit StartLimit(double seconds)
      : thread_([this, seconds] {
          for (const auto end = Clock::now() + std::chrono::duration<double>(seconds); !done_; usleep(10'000)) {
            if (Clock::now() < end) continue;
            std::fprintf(stderr,
                         "error: MPI did not start within %.0f s: not all processes of the run have come up "
                         "(--comm_timeout sets the limit)\n",
                         seconds);
            _exit(1);
          }
        }) {}
  ~StartLimit() {
    done_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> done_ = false;
  std::thread thread_;
};

int loud_stderr = -1;  // a copy of standard error, in ranks that keep quiet

// Ranks other than 0 print nothing, but for the error that ends them.
void keep_quiet() {
  loud_stderr = dup(2);
  const int nothing = open("/dev/null", O_WRONLY);
  if (loud_stderr < 0 || nothing < 0 || dup2(nothing, 1) < 0 || dup2(nothing, 2) < 0)
    fail("/dev/null cannot be opened");
  close(nothing);
}
void speak_up() {
  std::fflush(stderr);
  if (loud_stderr >= 0) dup2(loud_stderr, 2);
}

}  // namespace

// The one thing that ranks do together. A message of more than a gigabyte goes in pieces, since MPI counts in ints. What
// arrives late is waited for, as long as something arrives within the time limit.
void Ranks::exchange(const std::vector<Message>& out, const std::vector<Message>& in) const {
  if (count() == 1) return;
  std::vector<MPI_Request> requests;
  std::vector<int> from;  // by request: the other rank
  const auto post = [&](const std::vector<Message>& messages, const auto& call) {
    constexpr size_t most = size_t{1} << 30;
    for (const Message& m : messages)
      for (size_t at = 0; at < m.bytes; at += most) {
        MPI_Request request = MPI_REQUEST_NULL;
        const int code = call(static_cast<char*>(m.data) + at, int(std::min(m.bytes - at, most)), m.rank, &request);
        if (code != MPI_SUCCESS) fail(about(m.rank), " cannot be reached: ", mpi_error(code));
        requests.push_back(request);
        from.push_back(m.rank);
      }
  };
  post(in, [](void* data, int bytes, int rank, MPI_Request* request) {
    return MPI_Irecv(data, bytes, MPI_BYTE, rank, data_tag, MPI_COMM_WORLD, request);
  });
  post(out, [](void* data, int bytes, int rank, MPI_Request* request) {
    return MPI_Isend(data, bytes, MPI_BYTE, rank, data_tag, MPI_COMM_WORLD, request);
  });

  const auto cancel = [&] {  // MPI must not write into buffers that are about to be freed
    for (MPI_Request& request : requests)
      if (request != MPI_REQUEST_NULL) MPI_Cancel(&request);
  };
  const auto give_up = [&](Ending how, const std::string& words) {
    cancel();
    ending = how;
    fail(words);
  };
  const int n = int(requests.size());
  std::vector<int> done(requests.size());
  std::vector<MPI_Status> states(requests.size());
  auto deadline = Clock::now() + std::chrono::duration<double>(timeout_);
  for (int left = n, turns = 0; left > 0; turns++) {
    int finished = 0;
    const int code = MPI_Testsome(n, requests.data(), &finished, done.data(), states.data());
    if (code != MPI_SUCCESS) {
      for (int i = 0; i < finished; i++)
        if (states[size_t(i)].MPI_ERROR != MPI_SUCCESS)
          give_up(Ending::lost, text(about(from[size_t(done[size_t(i)])]),
                                     " cannot be reached: ", mpi_error(states[size_t(i)].MPI_ERROR)));
      give_up(Ending::lost, mpi_error(code));
    }
    if (finished > 0) {
      left -= finished;
      deadline = Clock::now() + std::chrono::duration<double>(timeout_);
      continue;
    }
    int said = 0;
    MPI_Status status;
    MPI_Iprobe(MPI_ANY_SOURCE, farewell_tag, MPI_COMM_WORLD, &said, &status);
    if (said) give_up(Ending::ended, text(about(status.MPI_SOURCE), " has ended"));
    if (Clock::now() > deadline) {
      cancel();
      lost();
    }
    // The others may need this core. At first they are about to answer, later they are computing.
    if (turns > 2000)
      usleep(50);
    else if (turns > 100)
      sched_yield();
  }
}

// A message without content to each other rank. For some time we go on calling MPI, which sends while it is called, and
// note who sends the same: by rank.
std::vector<bool> Ranks::greet(int tag, double seconds) const {
  std::vector<bool> heard(size_t(count()), false);
  heard[size_t(rank_)] = true;
  for (int r = 0; r < count(); r++)
    if (MPI_Request request; r != rank_) MPI_Isend(nullptr, 0, MPI_BYTE, r, tag, MPI_COMM_WORLD, &request);
  for (const auto end = Clock::now() + std::chrono::duration<double>(seconds); Clock::now() < end; usleep(1000)) {
    int there = 0;
    MPI_Status status;
    MPI_Iprobe(MPI_ANY_SOURCE, tag, MPI_COMM_WORLD, &there, &status);
    if (!there) continue;
    MPI_Recv(nullptr, 0, MPI_BYTE, status.MPI_SOURCE, tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    heard[size_t(status.MPI_SOURCE)] = true;
  }
  return heard;
}

// Which ranks are missing, after this one has waited in vain? Those for which it waits may be waiting themselves, for
// others. Such ranks reach the end of their patience at about the same time, and then all tell that they are alive.
std::string Ranks::silent_ranks() const {
  const std::vector<bool> alive = greet(alive_tag, 1 + 0.05 * timeout_);
  std::string names;
  for (int r = 0; r < count(); r++)
    if (!alive[size_t(r)]) names += (names.empty() ? "" : ", ") + about(r);
  return names.empty() ? "any rank" : names;
}

void Ranks::lost() const {
  const std::string silent = silent_ranks();
  ending = Ending::lost;
  fail("no answer from ", silent, " for ", timeout_, " s (--comm_timeout)");
}

std::string mpi_text() { return ", with MPI (" + mpi_version() + ")"; }

void Ranks::start(const Config& config, int expected) {
  timeout_ = config.comm_timeout;
  {
    const StartLimit limit(timeout_);
    int level = 0;
    if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level) != MPI_SUCCESS) fail("MPI does not start");
  }
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  int size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (size != expected) {
    ending = Ending::lost;
    fail(expected, " processes were started, but MPI sees ", size, ": this program was built for another MPI (",
         mpi_version(), ") than the one that started it; with srun, --mpi=pmix or --mpi=pmi2 may be missing");
  }
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  hosts_.assign(size_t(size), text("a host not known yet"));
  hosts_ = all_texts(host);
  std::string processors;
  for (const int cpu : allowed_processors()) processors += text(cpu, " ");
  processors_ = all_texts(processors);
  if (!first()) keep_quiet();
  const long cores = sysconf(_SC_NPROCESSORS_ONLN);
  if (first() && allowed_processors().size() == 1 && cores > on_this_host())
    std::fprintf(stderr, "each process may use one of the %ld processors here; mpirun --bind-to none gives it more\n",
                 cores);
}

// Returns when all ranks have come so far, or are not to be waited for.
static void wait_for_all() {
  try {
    the_ranks.all_texts("");
  } catch (const std::exception&) {}
}

int with_ranks(const Config& config, const std::function<int()>& body) {
  const char* variable = "";
  const int size = launched_processes(variable);
  if (size <= 1 || config.command != "train") return body();
  if (variable == std::string("WORLD_SIZE"))
    fail("torchrun starts processes that do not know MPI: start them with mpirun or srun");
  try {
    the_ranks.start(config, size);
    const int code = body();
    MPI_Finalize();
    return code;
  } catch (const std::exception& e) {
    // mpirun ends the other ranks as soon as one has ended, so whoever has something to say says it before any of them goes.
    const std::string error = (ending == Ending::own ? the_ranks.about(the_ranks.rank()) + ": " : "") + e.what();
    if (ending == Ending::own || ending == Ending::lost) speak_up();
    std::fprintf(stderr, "error: %s\n", error.c_str());  // heard from ranks that speak, see keep_quiet
    if (ending == Ending::own) the_ranks.greet(farewell_tag, 0.1);
    if (ending == Ending::all) wait_for_all();
    return 1;
  }
}
#endif
