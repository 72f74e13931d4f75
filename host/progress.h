// A line on stderr that shows how far a long task has come:
//   train  42%|████████▍           | 420/1000 [00:12<00:17, 33.1 it/s, loss 2.31]
// defines: ProgressBar, ProgressState, progress_line, duration
#pragma once
#include <chrono>
#include <cstdint>
#include <string>

// What the line shows. rate is in units per second; 0: not known yet.
struct ProgressState {
  std::string label;
  uint64_t done = 0, total = 0;
  std::string unit, note;
  double elapsed = 0, rate = 0;  // seconds, units per second
};

// The line, at most `width` characters wide.
std::string progress_line(const ProgressState& state, size_t width, bool utf8);

// "02:13", "1:02:13"
std::string duration(double seconds);

// Silent unless stderr is a terminal; draws about ten times a second, however often it is updated.
class ProgressBar {
 public:
  ProgressBar(std::string label, uint64_t total, std::string unit);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  // The first update only says where the task starts: a resumed run does not count the past as its own speed.
  void update(uint64_t done, const std::string& note = "");
  void clear();   // before other lines are printed; the next update draws again
  void finish();  // draws for the last time and leaves the line

 private:
  void draw();

  ProgressState state_;
  bool terminal_, utf8_;
  bool shown_ = false, begun_ = false;
  std::chrono::steady_clock::time_point start_, last_draw_;
  uint64_t last_done_ = 0;               // at last_draw_
  double recent_done_ = 0, recent_ = 0;  // units and seconds, those long past weighted less
};
