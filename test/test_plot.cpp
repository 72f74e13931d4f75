// host/plot.h: a picture comes out for every run, and no text becomes a command.
#include "../host/plot.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "../host/error.h"
#include "../host/files.h"
#include "test.h"

namespace {

PlotData a_run(int evals) {
  PlotData data;
  data.title = "a run";
  data.baselines = {{"uniform", 4.174}, {"unigram", 3.347}, {"bigram", 2.482}, {"trained bigram", 2.452}};
  for (int i = 0; i < evals; i++) {
    const double loss = 1.5 + 2.7 * std::exp(-2.0 * i);
    data.evals.push_back({500 * i, loss, loss + 0.02 * i});
    for (int k = 0; k < 10; k++) data.iters.push_back({500 * i + 50 * k, loss});
  }
  return data;
}

bool is_png(const std::string& path) {
  const std::string picture = read_file(path);
  const std::string size("\0\0\x04\xb0\0\0\x02\xee", 8);  // 1200 x 750, big-endian
  return picture.size() > 1000 && picture.substr(1, 3) == "PNG" && picture.substr(16, 8) == size;
}

bool gnuplot_is_missing() { return std::system("gnuplot --version >/dev/null 2>&1") != 0; }

}  // namespace

TEST_CASE("a picture of every run, however short", "[plot]") {
  if (gnuplot_is_missing()) return skip("gnuplot is not installed");
  const std::string folder = test_folder();
  PlotData no_iters = a_run(3), not_finite = a_run(3), nothing_finite = a_run(1);
  no_iters.iters.clear();
  not_finite.evals[1] = {500, NAN, INFINITY};
  nothing_finite.evals[0] = {0, NAN, NAN};
  nothing_finite.iters.clear();
  int n = 0;
  for (const PlotData& data :
       {a_run(11), a_run(2), a_run(1), a_run(0), PlotData{}, no_iters, not_finite, nothing_finite}) {
    const std::string path = folder + "/" + std::to_string(n++) + ".png";
    INFO(path);
    REQUIRE(draw_plot(path, data));
    CHECK(is_png(path));
    CHECK_FALSE(std::filesystem::exists(path + ".tmp"));
  }
}

TEST_CASE("a title, a name or a path is never a command", "[plot]") {
  if (gnuplot_is_missing()) return skip("gnuplot is not installed");
  const std::string folder = test_folder(), mark = folder + "/mark";
  for (const std::string& attack :
       {"`touch " + mark + "`", "'\nsystem('touch " + mark + "')\n#", "' . system('touch " + mark + "') . '",
        "\"; system \"touch " + mark + "\"", std::string("\\"), std::string("END"), std::string("{/=80 x_2")}) {
    PlotData data = a_run(3);
    data.title = attack;
    data.baselines = {{attack, 1.6}, {attack, 9.0}};
    INFO(attack);
    CHECK(draw_plot(folder + "/a.png", data));
    CHECK_FALSE(std::filesystem::exists(mark));
  }
  const std::string odd = folder + "/| it's `touch x`; .png";
  REQUIRE(draw_plot(odd, a_run(3)));
  CHECK(is_png(odd));
}

TEST_CASE("without gnuplot there is no picture and no error", "[plot]") {
  const std::string folder = test_folder(), old = std::getenv("PATH");
  setenv("PATH", folder.c_str(), 1);
  write_file(folder + "/a.png", "old");
  CHECK_FALSE(draw_plot(folder + "/a.png", a_run(3)));
  write_file(folder + "/gnuplot", "#!/bin/sh\nprintf '\\211PNG'; echo broken >&2; exit 1\n");
  std::filesystem::permissions(folder + "/gnuplot", std::filesystem::perms::owner_all);
  CHECK_FALSE(draw_plot(folder + "/a.png", a_run(3)));
  write_file(folder + "/gnuplot", "#!/bin/sh\nprintf '\\211PNG, the first half'\n");
  std::filesystem::permissions(folder + "/gnuplot", std::filesystem::perms::owner_all);
  CHECK_FALSE(draw_plot(folder + "/a.png", a_run(3)));
  setenv("PATH", old.c_str(), 1);
  CHECK(read_file(folder + "/a.png") == "old");
}
