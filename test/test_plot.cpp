// host/plot.h: every run gets a picture, and no text becomes a command of gnuplot.
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
    data.fixed.push_back({500 * i, loss + 0.01 * i});
    for (int k = 0; k < 10; k++) data.iters.push_back({500 * i + 50 * k, loss});
    data.best = {500, 1.875};
    data.fixed_name = "exact val loss";
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
  PlotData no_iters = a_run(3), not_finite = a_run(3), nothing_finite = a_run(1), no_fixed = a_run(3);
  no_fixed.fixed = {{}};
  no_fixed.best = {};
  no_iters.iters.clear();
  not_finite.evals[1] = {500, NAN, INFINITY};
  nothing_finite.evals[0] = {0, NAN, NAN};
  nothing_finite.iters.clear();
  nothing_finite.fixed = {{}};
  nothing_finite.best = {};
  int n = 0;
  for (const PlotData& data :
       {a_run(11), a_run(2), a_run(1), a_run(0), PlotData{}, no_iters, not_finite, nothing_finite, no_fixed}) {
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

TEST_CASE("the best point is the one that was kept, on the curve that decided it", "[plot]") {
  const std::string folder = test_folder(), old = std::getenv("PATH");
  write_file(folder + "/gnuplot", "#!/bin/sh\nprintf '\\211PNG IEND\\256B`\\202'\ncat >" + folder + "/script\n");
  std::filesystem::permissions(folder + "/gnuplot", std::filesystem::perms::owner_all);
  setenv("PATH", (folder + ":" + old).c_str(), 1);
  PlotData data = a_run(3);
  data.evals[2].val = 1;  // lucky batches
  data.fixed.push_back({1509, 1.25});
  REQUIRE(draw_plot(folder + "/a.png", data));
  const std::string with = read_file(folder + "/script");
  CHECK(contains(with, "$fixed << END\n0 4.200000\n500 1.875405\n1000 1.569452\n1509 1.250000\nEND\n"));
  CHECK(contains(with, "$val << END\n0 4.200000\n500 1.885405\n1000 1.000000\nEND\n"));
  CHECK(contains(with, "'best 1.875 at iteration 500'"));
  CHECK(contains(with, "using (500):(1.875000)"));
  CHECK(contains(with, "title 'exact val loss'"));
  CHECK(contains(with, "title 'val, random batches'"));
  CHECK(contains(with, "'validation 1.250'"));
  CHECK(contains(with, "set xrange [0:1509]"));
  data.fixed = {{}};
  data.best = {};
  REQUIRE(draw_plot(folder + "/a.png", data));
  const std::string without = read_file(folder + "/script");
  setenv("PATH", old.c_str(), 1);
  CHECK(without.find("best") == std::string::npos);
  CHECK(without.find("$fixed with") == std::string::npos);
  CHECK(contains(without, "'validation 1.000'"));
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
