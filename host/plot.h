// Pictures, drawn by gnuplot: above all the curves of a run.
// defines: PlotData, draw_plot, draw_picture, quoted, train_colour, val_colour, ...
#pragma once
#include <string>
#include <vector>

#include "metrics.h"
#include "ngram.h"

struct PlotData {
  std::vector<EvalPoint> evals;
  std::vector<IterPoint> iters;
  std::vector<Baseline> baselines;
  std::string title;
  std::vector<IterPoint> fixed = {};  // the loss of the fixed validation windows, where it was computed
  std::string fixed_name = "";        // what the legend calls that loss
  IterPoint best = {};                // the lowest, whose weights are kept
};

// Draws the losses by iteration into a PNG. If gnuplot is missing or fails, a warning goes to stderr (once per program)
// and the result is false: a run is not to end for its picture. Only a disk that cannot be written is an Error.
bool draw_plot(const std::string& png_path, const PlotData& data);

// Draws a PNG from any commands of gnuplot, with the same promise. The size is in pixels.
bool draw_picture(const std::string& png_path, int width, int height, const std::string& commands);

// A string, in the quotes of a gnuplot command.
std::string quoted(const std::string& words);

// Colours of Okabe and Ito (2008), which colour-blind people tell apart.
constexpr const char *train_colour = "#0072B2", *val_colour = "#D55E00", *third_colour = "#009E73",
                     *fourth_colour = "#CC79A7", *batch_colour = "#B4C0CA", *grey = "#707070";
