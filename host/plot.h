// The picture of a run, drawn by gnuplot.
// defines: PlotData, draw_plot
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
};

// Draws the losses by iteration into a PNG. If gnuplot is missing or fails, a warning goes to stderr (once per program)
// and the result is false: a run is not to end for its picture. Only a disk that cannot be written is an Error.
bool draw_plot(const std::string& png_path, const PlotData& data);
