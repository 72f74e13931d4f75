// The record of a run: one JSON object a line, so that it can be followed while it grows and any program reads it.
//   {"type":"iter","iter":10,"loss":3.1,"lr":0.0003,"time_ms":41.2,"tokens_per_s":397000}
//   {"type":"eval","iter":500,"train_loss":1.75,"val_loss":1.9,"val_fixed":1.89,"sample":"KING RICHARD:\n..."}
//   {"type":"final","iter":5000,"val_fixed":1.57,"val_exact":1.57,"train_seconds":170.2}
// train_loss and val_loss are estimates from random batches. val_fixed is computed on the same validation windows every time
// and decides which weights are the best. The evaluation before the last step leaves it out, because the weights after that
// step are scored anyway, in the final line. sample is what the weights write from the same random numbers each time.
// defines: not_scored, EvalPoint, IterPoint, FinalPoint, Record, Metrics, read_record, has_final
#pragma once
#include <limits>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

constexpr double not_scored = std::numeric_limits<double>::quiet_NaN();

struct EvalPoint {
  int iter = 0;
  double train = 0, val = 0;  // of random batches
  double fixed = not_scored;  // of the fixed validation windows
  std::string sample = "";    // empty: none was written
};

struct IterPoint {
  int iter = 0;
  double loss = not_scored;
};

struct FinalPoint {
  int iter = -1;  // -1: the run has not come to its end
  double val_exact = not_scored, train_seconds = 0, val_fixed = not_scored;
};

// All that a record holds, earlier runs' lines included. A number of null reads as NaN.
struct Record {
  std::vector<EvalPoint> evals;
  std::vector<IterPoint> iters;
  FinalPoint final;  // the newest
};

class Metrics {
 public:
  // Starts a new file if first_iter is 0. Otherwise goes on with the one that is there: lines of earlier iterations
  // stay as they are, and all others, which the resumed run writes again, are dropped, as is a line torn by a crash.
  Metrics(const std::string& path, int first_iter);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // Each line is with the system when its call returns, and on the disk after flush. A number that is not finite becomes
  // null.
  void add(const nlohmann::ordered_json& line);
  void add_iter(int iter, double loss, double lr, double time_ms, double tokens_per_s);
  void add_eval(const EvalPoint& point);
  void add_final(const FinalPoint& point);
  void flush();

  const Record& record() const { return record_; }

 private:
  std::string path_;
  int file_ = -1;
  Record record_;
};

// What a record holds; nothing if there is no file.
Record read_record(const std::string& path);

// Whether a record says that its run came to the end after this many iterations.
bool has_final(const std::string& path, int iter);
