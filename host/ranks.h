// A run of several processes. `mpirun -n 4 ./train_gpt` starts four; MPI calls them ranks and numbers them from 0. Each
// computes a part of every step and of every evaluation, and rank 0 alone prints and writes files. A program that was
// started by itself is a run of one rank, and nothing here does anything then. So is one that was built without MPI=1.
//
// No result depends on how many ranks there are. Gradients are added in the order of one tree (host/tree.h), losses in
// the order of their batches. MPI only carries bytes: a sum of its own would depend on the number of ranks, on the size
// and on the network.
//
// All ranks call the same functions in the same order, and each waits for what the others send. If one is missing, the
// others end: doc/scale.md says after what time, and with which words.
// defines: Ranks, ranks, mpi_text, with_ranks, own_batches, even_parts
#pragma once
#include <exception>
#include <functional>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "config.h"
#include "error.h"
#include "tree.h"

class Ranks {
 public:
  int rank() const { return rank_; }
  int count() const { return int(hosts_.size()); }
  bool first() const { return rank_ == 0; }
  int hosts() const;          // how many different ones
  int on_this_host() const;   // how many ranks
  int sharing_cores() const;  // how many ranks of this host, this one included, may use the same processors as this one
  int number_on_host() const;  // how many ranks before this one run on its host
  std::string host() const { return hosts_[size_t(rank_)]; }
  std::string about(int rank) const;           // "rank 2 on node7"
  double timeout() const { return timeout_; }  // seconds

  // data (of T): afterwards each rank has all of it, where rank r had the elements parts[r].
  template <class T>
  void gather(T* data, const std::vector<Part>& parts) const {
    std::vector<Message> out, in;
    for (int r = 0; r < count(); r++) {
      if (r == rank_) continue;
      out.push_back(message(r, data, parts[size_t(rank_)]));
      in.push_back(message(r, data, parts[size_t(r)]));
    }
    exchange(out, in);
  }
  // The same for rank 0 alone. The others have only `mine`, their own elements; rank 0 has its own in data already.
  template <class T>
  void gather_on_first(T* data, const T* mine, const std::vector<Part>& parts) const {
    std::vector<Message> out, in;
    if (!first()) out.push_back(message(0, const_cast<T*>(mine), {0, parts[size_t(rank_)].count}));
    for (int r = 1; r < count() && first(); r++) in.push_back(message(r, data, parts[size_t(r)]));
    exchange(out, in);
  }
  // Rank r gets the elements parts[r] of every rank's data: received (count(), parts[rank()].count) has them rank by
  // rank, but for its own.
  template <class T>
  void scatter(T* received, T* data, const std::vector<Part>& parts) const {
    std::vector<Message> out, in;
    const size_t own = parts[size_t(rank_)].count;
    for (int r = 0; r < count(); r++) {
      if (r == rank_) continue;
      out.push_back(message(r, data, parts[size_t(r)]));
      in.push_back(message(r, received, {size_t(r) * own, own}));
    }
    exchange(out, in);
  }
  // Every rank's value, by rank.
  template <class T>
  std::vector<T> all(T mine) const {
    std::vector<T> out(hosts_.size(), mine);
    std::vector<Part> parts;
    for (size_t r = 0; r < out.size(); r++) parts.push_back({r, 1});
    gather(out.data(), parts);
    return out;
  }
  std::vector<std::string> all_texts(const std::string& mine) const;

  // Runs body on every rank. If it fails on some, it fails on all, with the message of the first of them. So a rank that
  // cannot begin keeps nobody waiting.
  // What body returns must be movable; body itself must not exchange anything.
  template <class Body>
  auto agree(Body body) const {
    std::optional<Result<Body>> result;
    std::string failure;
    try {
      if constexpr (std::is_void_v<decltype(body())>)
        body();
      else
        result.emplace(body());
    } catch (const std::exception& e) {
      if (count() == 1) throw;
      failure = dynamic_cast<const std::bad_alloc*>(&e) ? "out of memory" : e.what();
    }
    fail_together(failure);
    if constexpr (!std::is_void_v<decltype(body())>) return std::move(*result);
  }

  // For a failure that every rank has found: rank 0 alone says it.
  [[noreturn]] void fail_alike(const std::string& words) const;
  // When this rank has waited in vain, for a message or for what a card does: fails, and says which ranks are silent.
  [[noreturn]] void lost() const;

  // The first of the ranks' texts that is not empty, with its rank; empty: all are.
  std::string first_of(const std::string& mine) const;
  std::string shared_by() const;  // " in each of 4 processes on 1 host"; empty for one process

  // Fails on every rank if `mine` is not the same text on all. what: for the message, "settings".
  void require_same(const std::string& mine, const std::string& what) const;

 private:
  template <class Body>
  using Result = std::conditional_t<std::is_void_v<std::invoke_result_t<Body>>, int, std::invoke_result_t<Body>>;
  friend int with_ranks(const Config&, const std::function<int()>&);
  struct Message {
    int rank;  // to which, or from which
    void* data;
    size_t bytes;
  };
  template <class T>
  static Message message(int rank, T* data, const Part& part) {
    return {rank, data + part.first, part.count * sizeof(T)};
  }
  void exchange(const std::vector<Message>& out, const std::vector<Message>& in) const;
  void fail_together(const std::string& failure) const;
  void start(const Config& config, int expected);
  std::vector<bool> greet(int tag, double seconds) const;
  std::string silent_ranks() const;

  int rank_ = 0;
  double timeout_ = 60;                                        // seconds: so long a rank waits for others
  std::vector<std::string> hosts_ = {""}, processors_ = {""};  // by rank: its host, the processors that it may use
};

const Ranks& ranks();
std::string mpi_text();  // ", with MPI (Open MPI v4.1.4)", for --version; empty: built without MPI

// Runs body, the program after its flags are known. A training run that MPI has started as one of several begins and
// ends together with the others. Without MPI this refuses to be one of several.
int with_ranks(const Config& config, const std::function<int()>& body);

// The batches of a step that this rank computes.
inline Part own_batches(const Config& config) {
  return tree_part(ranks().rank(), ranks().count(), config.gradient_accumulation_steps);
}

// 0 ... count - 1, divided among the ranks in their order, as evenly as multiples of `unit` allow.
std::vector<Part> even_parts(size_t count, size_t unit, int ranks);
