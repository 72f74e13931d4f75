// Pictures of the rungs: panels side by side, drawn by gnuplot in one file.
// defines: Points, Curve, Panel, draw_panels, histogram
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace ladder {

using Points = std::vector<std::pair<double, double>>;

struct Curve {
  std::string name;  // empty: not in the legend
  Points points;
  std::string style;  // gnuplot's: "with lines lw 2 lc rgb '#0072B2'"
};

struct Panel {
  std::string title, xlabel, ylabel;
  std::vector<Curve> curves;
  std::string settings = "";  // gnuplot's, for this panel alone: "set logscale y\n"
};

// Puts `columns` panels in a row. Returns false if there is no gnuplot, and says so once.
bool draw_panels(const std::string& png_path, int width, int height, int columns, const std::vector<Panel>& panels);

// The share of the values in each of `bins` intervals of [low, high], at its middle; those outside are left out.
Points histogram(const float* values, size_t count, double low, double high, int bins);

}  // namespace ladder
