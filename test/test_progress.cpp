// host/progress.h: the progress line, which depends only on the numbers it shows.
#include "../host/progress.h"

#include <cmath>

#include "test.h"

namespace {

ProgressState state(uint64_t done, uint64_t total) { return {"train", done, total, "it", "loss 2.31", 12, 33.1}; }

size_t characters(const std::string& s) {
  size_t n = 0;
  for (char c : s) n += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return n;
}

}  // namespace

TEST_CASE("a progress line tells share, count, times, rate and note", "[progress]") {
  CHECK(progress_line(state(420, 1000), 80, false) ==
        "train  42%|#########              | 420/1000 [00:12<00:18, 33.1 it/s, loss 2.31]");
  CHECK(progress_line(state(420, 1000), 76, true) ==
        "train  42%|███████▉           | 420/1000 [00:12<00:18, 33.1 it/s, loss 2.31]");
  CHECK(progress_line(state(1000, 1000), 76, true) ==
        "train 100%|██████████████████| 1000/1000 [00:12<00:00, 33.1 it/s, loss 2.31]");
  CHECK(progress_line({"load", 0, 7, "B", "", 0, 0}, 50, false) ==
        "load   0%|                  | 0/7 [00:00<?, ? B/s]");
}

TEST_CASE("a progress line fits any width", "[progress]") {
  for (bool utf8 : {false, true})
    for (uint64_t done : {0, 1, 333, 999, 1000, 1001})
      for (size_t width = 0; width < 200; width++)
        CHECK(characters(progress_line(state(done, 1000), width, utf8)) <= width);
  CHECK(progress_line(state(420, 1000), 30, true) == "train  42% 420/1000 [00:12<00:");
}

TEST_CASE("progress neither overstates nor divides by zero", "[progress]") {
  CHECK(progress_line(state(999, 1000), 0, false).empty());
  CHECK(progress_line(state(9999, 10000), 80, false).find(" 99%|") != std::string::npos);
  CHECK(progress_line(state(5, 4), 80, false).find("100%|") != std::string::npos);
  CHECK(progress_line(state(0, 0), 80, false).find("0/0") != std::string::npos);
}

TEST_CASE("rates read well over ten orders of magnitude", "[progress]") {
  const auto rate = [](double r) {
    ProgressState s = state(1, 2);
    s.rate = r;
    const std::string line = progress_line(s, 100, false);
    const size_t begin = line.find(", ") + 2;
    return line.substr(begin, line.find(", ", begin) - begin);
  };
  CHECK(rate(0.25) == "4.00 s/it");
  CHECK(rate(2.5) == "2.50 it/s");
  CHECK(rate(1234) == "1234 it/s");
  CHECK(rate(12345) == "12.3k it/s");
  CHECK(rate(7.25e6) == "7.2M it/s");
}

TEST_CASE("durations", "[progress]") {
  CHECK(duration(0) == "00:00");
  CHECK(duration(133) == "02:13");
  CHECK(duration(3599.6) == "1:00:00");
  CHECK(duration(3733) == "1:02:13");
  CHECK(duration(360000) == "100:00:00");
  CHECK(duration(-1) == "00:00");
  CHECK(duration(NAN) == "?");
}
