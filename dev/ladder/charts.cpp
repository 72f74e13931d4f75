#include "charts.h"

#include <cmath>

#include "../../host/error.h"
#include "../../host/plot.h"

namespace ladder {

bool draw_panels(const std::string& png_path, int width, int height, int columns, const std::vector<Panel>& panels) {
  std::string blocks, plots;
  int number = 0;
  for (const Panel& panel : panels) {
    plots += text("reset\nset border 3 lc rgb '#404040'\nset tics nomirror out scale 0.6 font ',11'\n",
                  "set grid lc rgb '#E8E8E8' lt 1 lw 1\nset key top right samplen 2 font ',11'\n", "set title ",
                  quoted(panel.title), "\nset xlabel ", quoted(panel.xlabel), "\nset ylabel ", quoted(panel.ylabel),
                  "\n", panel.settings);
    std::string curves;
    for (const Curve& curve : panel.curves) {
      blocks += text("$d", ++number, " << END\n");
      bool any = false;
      for (const auto& [x, y] : curve.points) {
        if (!std::isfinite(x) || !std::isfinite(y)) continue;
        blocks += text(x, " ", y, "\n");
        any = true;
      }
      blocks += "END\n";
      if (!any) continue;  // gnuplot refuses an empty curve
      curves += text(curves.empty() ? "plot " : ", ", "$d", number, " ", curve.style, " ",
                     curve.name.empty() ? "notitle" : "title " + quoted(curve.name));
    }
    plots += (curves.empty() ? "plot NaN notitle" : curves) + "\n";
  }
  const size_t rows = (panels.size() + size_t(columns) - 1) / size_t(columns);
  return draw_picture(png_path, width, height,
                      text(blocks, "set multiplot layout ", rows, ",", columns, "\n", plots, "unset multiplot\n"));
}

Points histogram(const float* values, size_t count, double low, double high, int bins) {
  Points points;
  for (int i = 0; i < bins; i++) points.push_back({low + (i + 0.5) * (high - low) / bins, 0});
  for (size_t i = 0; i < count; i++) {
    const double bin = std::floor((values[i] - low) / (high - low) * bins);
    if (bin >= 0 && bin < bins) points[size_t(bin)].second += 1.0 / double(count);
    if (values[i] == high) points.back().second += 1.0 / double(count);
  }
  return points;
}

}  // namespace ladder
