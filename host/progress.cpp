#include "progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace {

// Characters, not bytes: UTF-8 continues a character with bytes of the form 10xxxxxx.
bool begins_character(char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }

size_t characters(const std::string& s) { return size_t(std::count_if(s.begin(), s.end(), begins_character)); }

std::string shortened(const std::string& s, size_t width) {
  size_t end = 0, n = 0;
  while (end < s.size() && (n += begins_character(s[end])) <= width) end++;
  return s.substr(0, end);
}

std::string print(const char* format, double value) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, format, value);
  return buffer;
}

std::string rate_text(double rate, const std::string& unit) {
  if (rate <= 0) return "? " + unit + "/s";
  if (rate < 1) return print("%.2f s/", 1 / rate) + unit;
  const std::string number = rate < 10    ? print("%.2f", rate)
                             : rate < 100 ? print("%.1f", rate)
                             : rate < 1e4 ? print("%.0f", rate)
                             : rate < 1e6 ? print("%.1fk", rate / 1e3)
                                          : print("%.1fM", rate / 1e6);
  return number + " " + unit + "/s";
}

// Eighths of a character in Unicode, whole characters in ASCII.
std::string bar_text(double share, size_t width, bool utf8) {
  static const char* const eighths[8] = {" ", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const size_t parts = utf8 ? 8 : 1, filled = size_t(share * double(width * parts));
  std::string bar;
  for (size_t i = 0; i < width; i++) {
    if ((i + 1) * parts <= filled)
      bar += utf8 ? "█" : "#";
    else
      bar += i * parts < filled ? eighths[filled % parts] : " ";
  }
  return bar;
}

bool locale_is_utf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {  // in the order in which they override each other
    const char* value = std::getenv(name);
    if (value == nullptr || *value == '\0') continue;
    std::string locale = value;
    std::transform(locale.begin(), locale.end(), locale.begin(), [](unsigned char c) { return char(std::tolower(c)); });
    return locale.find("utf-8") != std::string::npos || locale.find("utf8") != std::string::npos;
  }
  return false;
}

size_t terminal_width() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace

std::string duration(double seconds) {
  if (!std::isfinite(seconds)) return "?";
  const long long s = std::llround(std::clamp(seconds, 0.0, 1e15));
  char buffer[64];
  if (s < 3600)
    std::snprintf(buffer, sizeof buffer, "%02lld:%02lld", s / 60, s % 60);
  else
    std::snprintf(buffer, sizeof buffer, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
  return buffer;
}

std::string progress_line(const ProgressState& state, size_t width, bool utf8) {
  const double share = state.total == 0 ? 1 : std::min(1.0, double(state.done) / double(state.total));
  const double left = state.total > state.done ? double(state.total - state.done) : 0;
  // 99.9 % is not finished: rounded down.
  const std::string front = state.label + print(" %3.0f%%", std::floor(share * 100));
  const std::string remaining = left == 0 ? "00:00" : state.rate > 0 ? duration(left / state.rate) : "?";
  const std::string note = state.note.empty() ? "" : ", " + state.note;
  const std::string back = std::to_string(state.done) + "/" + std::to_string(state.total) + " [" +
                           duration(state.elapsed) + "<" + remaining + ", " + rate_text(state.rate, state.unit) + note +
                           "]";
  const size_t needed = characters(front) + characters(back) + 3;  // "|", "| "
  constexpr size_t shortest_bar = 4, longest_bar = 40;
  if (needed + shortest_bar > width) return shortened(front + " " + back, width);
  return front + "|" + bar_text(share, std::min(width - needed, longest_bar), utf8) + "| " + back;
}

ProgressBar::ProgressBar(std::string label, uint64_t total, std::string unit)
    : terminal_(isatty(STDERR_FILENO) == 1), utf8_(locale_is_utf8()), start_(std::chrono::steady_clock::now()) {
  state_.label = std::move(label);
  state_.total = total;
  state_.unit = std::move(unit);
}

ProgressBar::~ProgressBar() {
  if (shown_) std::fputc('\n', stderr);  // left early, by an error: its message gets a line of its own
}

void ProgressBar::update(uint64_t done, const std::string& note) {
  if (!terminal_) return;
  state_.done = done;
  state_.note = note;
  const auto now = std::chrono::steady_clock::now();
  if (!begun_) {
    begun_ = true;
    last_done_ = done;
    last_draw_ = now;
  } else {
    const double seconds = std::chrono::duration<double>(now - last_draw_).count();
    if (shown_ && seconds < 0.1 && done < state_.total) return;
    // The rate is a mean over about the last ten seconds.
    const double keep = std::exp(-seconds / 10);
    recent_done_ = recent_done_ * keep + double(done - std::min(done, last_done_));
    recent_ = recent_ * keep + seconds;
    if (recent_ > 0) state_.rate = recent_done_ / recent_;
    last_done_ = done;
    last_draw_ = now;
  }
  draw();
}

void ProgressBar::draw() {
  state_.elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  // The last column stays free: some terminals wrap as soon as it is written.
  const std::string line = progress_line(state_, terminal_width() - 1, utf8_);
  std::fprintf(stderr, "\r%s\033[K", line.c_str());
  std::fflush(stderr);
  shown_ = true;
}

void ProgressBar::clear() {
  if (!shown_) return;
  std::fputs("\r\033[K", stderr);
  std::fflush(stderr);
  shown_ = false;
}

void ProgressBar::finish() {
  if (!begun_) return;  // not on a terminal, or there was nothing to do
  draw();
  std::fputc('\n', stderr);
  shown_ = begun_ = false;
}
