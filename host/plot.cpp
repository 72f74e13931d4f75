#include "plot.h"

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "error.h"
#include "files.h"

extern char** environ;

// A gnuplot string. Within single quotes gnuplot expands nothing, neither escapes nor `commands`; an apostrophe becomes
// the typographic one, since gnuplot does not understand a doubled one everywhere.
std::string quoted(const std::string& words) {
  std::string out = "'";
  for (char c : words) {
    if (static_cast<unsigned char>(c) < ' ') c = ' ';  // a line's end would end the command
    if (c == '\'')
      out += "’";
    else
      out += c;
  }
  return out + "'";
}

namespace {

std::string decimals(double value, int digits = 3) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.*f", digits, value);
  return buffer;
}

struct Range {
  double low = INFINITY, high = -INFINITY;
  void include(double value) {
    if (!std::isfinite(value)) return;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  double span() const { return high - low; }
  bool contains(double value) const { return low <= value && value <= high; }
};

int last_iter(const PlotData& data) {
  int last = 0;
  for (const EvalPoint& e : data.evals) last = std::max(last, e.iter);
  for (const IterPoint& i : data.iters) last = std::max(last, i.iter);
  for (const IterPoint& i : data.fixed) last = std::max(last, i.iter);
  return last;
}

// What is worth looking at. An untrained model starts at ln V, far above everything that follows, and falls steeply: if
// that first moment set the scale, the rest would be squeezed into the lowest third. So it leaves the picture at the
// top. Baselines widen the range only if they are near.
Range loss_range(const PlotData& data) {
  const double settled = data.evals.size() > 2 ? 0.05 * last_iter(data) : 0;
  Range curves;
  for (const EvalPoint& e : data.evals)
    if (e.iter >= settled) curves.include(e.train), curves.include(e.val);
  for (const auto* points : {&data.iters, &data.fixed})
    for (const IterPoint& i : *points)
      if (i.iter >= settled) curves.include(i.loss);
  if (curves.low > curves.high)  // nothing finite
    for (const Baseline& b : data.baselines) curves.include(b.loss);
  if (curves.low > curves.high) curves = {0, 5};

  Range all = curves;
  const double near = std::max(0.3 * curves.span(), 0.2);
  for (const Baseline& b : data.baselines)
    if (b.loss > curves.low - near && b.loss < curves.high + near) all.include(b.loss);
  const double margin = std::max(0.07 * all.span(), 0.15);
  return {all.low - margin, all.high + margin};
}

// A name and value in the right margin, at the end of the line it belongs to.
struct Label {
  std::string words;
  double height;
  std::string style;
};

// Sorts labels from bottom to top and moves those that would overlap, until all are `distance` apart.
void spread(std::vector<Label>& labels, double distance) {
  std::sort(labels.begin(), labels.end(), [](const Label& a, const Label& b) { return a.height < b.height; });
  for (int round = 0; round < 100; round++)  // two neighbours share a push, which may bring on the next: a few rounds
    for (size_t i = 1; i < labels.size(); i++) {
      const double push = (distance - (labels[i].height - labels[i - 1].height)) / 2;
      if (push > 0) labels[i - 1].height -= push, labels[i].height += push;
    }
}

// What every picture of a run has in common, in gnuplot's words. Title and legend stand outside the plot, where no
// curve can meet them. (These commands are part of the program: it is not to need its sources where it runs.)
constexpr const char* look =
    R"(set key at graph 1, graph 1.025 right bottom horizontal maxrows 1 samplen 2.5 textcolor rgb '#707070' font ',11'
set xlabel 'iteration'
set ylabel 'loss (nats per character)' offset -0.5,0
set border 3 lc rgb '#404040'
set tics nomirror out scale 0.6
set grid lc rgb '#E8E8E8' lt 1 lw 1
set lmargin 9
set rmargin 18
set tmargin 4
set style textbox opaque noborder fillcolor rgb 'white' margins 0.5,0.3
)";
const std::string small = text("font ',11' tc rgb '", grey, "'");

// What a curve shows of a point. A point whose number is not finite is left out.
double loss_of(const IterPoint& p) { return p.loss; }
double train_of(const EvalPoint& p) { return p.train; }
double val_of(const EvalPoint& p) { return p.val; }

template <class Point>
bool any(const std::vector<Point>& points, double (*value)(const Point&)) {
  return std::any_of(points.begin(), points.end(), [&](const Point& p) { return std::isfinite(value(p)); });
}

// The numbers of a curve, in two columns: $name << END, a line "iteration loss" for each point, END.
template <class Point>
std::string columns(const char* name, const std::vector<Point>& points, double (*value)(const Point&)) {
  std::string s = text("$", name, " << END\n");
  for (const Point& p : points)
    if (std::isfinite(value(p))) s += text(p.iter, " ", decimals(value(p), 6), "\n");
  return s + "END\n";
}

// Lines end in their name and value, which no legend has to explain. Baselines out of range are told, not drawn.
std::string baselines_and_labels(const PlotData& data, const Range& range) {
  std::string s, above, below;
  std::vector<Label> labels;
  for (const Baseline& b : data.baselines) {
    if (!std::isfinite(b.loss)) continue;
    const std::string words = b.name + " " + decimals(b.loss);
    if (range.contains(b.loss)) {
      labels.push_back({words, b.loss, small});
      s += text("set arrow from graph 0, first ", decimals(b.loss, 6), " to graph 1, first ", decimals(b.loss, 6),
                " nohead back lw 1.2 dt (12,8) lc rgb '", grey, "'\n");
    } else {
      std::string& list = b.loss > range.high ? above : below;
      list += (list.empty() ? "" : ", ") + words;
    }
  }
  const auto label_end = [&](const char* name, double loss, const char* colour) {
    if (range.contains(loss)) labels.push_back({text(name, " ", decimals(loss)), loss, text("tc rgb '", colour, "'")});
  };
  if (!data.evals.empty()) {
    label_end("train", data.evals.back().train, train_colour);
    label_end("validation", any(data.fixed, loss_of) ? data.fixed.back().loss : data.evals.back().val, val_colour);
  }
  spread(labels, 0.04 * range.span());
  for (const Label& l : labels)
    s += text("set label ", quoted(l.words), " at graph 1.016, first ", decimals(l.height, 6), " left ", l.style, "\n");
  const auto note = [&](const std::string& what, const std::string& where) {
    s += text("set label ", quoted(what), " at graph ", where, " right ", small, "\n");
  };
  if (!above.empty()) note("above: " + above, "0.995, 0.975");
  if (!below.empty()) note("below: " + below, "0.995, 0.025");
  return s;
}

// Says beside the best point what it is, on the side where there is room.
std::string best_label(const IterPoint& best, int last) {
  const char* side = best.iter < 0.15 * last   ? "left offset 1,-1.4"
                     : best.iter > 0.85 * last ? "right offset -1,-1.4"
                                               : "center offset 0,-1.4";
  return text("set label ", quoted(text("best ", decimals(best.loss), " at iteration ", best.iter)), " at ", best.iter,
              ",", decimals(best.loss, 6), " ", side, " front boxed tc rgb '", val_colour, "'\n");
}

// The command that draws everything. A curve without a single point is left out: gnuplot refuses it.
std::string plot_command(const PlotData& data) {
  const bool fixed = any(data.fixed, loss_of);
  const IterPoint& best = data.best;
  std::string curves;
  const auto curve = [&](const std::string& what) { curves += (curves.empty() ? "plot " : ", \\\n     ") + what; };
  if (any(data.iters, loss_of))
    curve(text("$batches with lines lw 1 lc rgb '", batch_colour, "' title 'each training batch'"));
  if (any(data.evals, train_of))
    curve(text("$train with linespoints lw 2.5 pt 7 ps 0.9 lc rgb '", train_colour, "' title 'train, random batches'"));
  if (any(data.evals, val_of))
    curve(text("$val with linespoints lw ", fixed ? "1.2 pt 6 ps 0.7" : "2.5 pt 7 ps 0.9", " lc rgb '", val_colour,
               "' title 'val, random batches'"));
  if (fixed)
    curve(text("$fixed with linespoints lw 2.5 pt 7 ps 0.9 lc rgb '", val_colour, "' title ", quoted(data.fixed_name)));
  if (std::isfinite(best.loss))
    curve(text("'+' using (", best.iter, "):(", decimals(best.loss, 6),
               ") every ::::0 with points pt 6 ps 2.2 lw 2.5 lc rgb '", val_colour, "' notitle"));
  if (curves.empty()) curve("NaN notitle");
  return curves + "\n";
}

std::string script(const PlotData& data) {
  const Range range = loss_range(data);
  const int last = std::max(last_iter(data), 1);
  std::string s = columns("batches", data.iters, loss_of) + columns("train", data.evals, train_of) +
                  columns("val", data.evals, val_of) + columns("fixed", data.fixed, loss_of);
  s += look;
  s += text("set label ", quoted(data.title), " at graph 0, 1.05 left font ',15'\n");
  s += text("set xrange [0:", last, "]\nset yrange [", decimals(range.low), ":", decimals(range.high), "]\n");
  s += text("set format y '", range.span() > 1 ? "%.1f" : "%.2f", "'\n", last < 10 ? "set xtics 1\n" : "");
  s += baselines_and_labels(data, range);
  if (std::isfinite(data.best.loss)) s += best_label(data.best, last);
  return s + plot_command(data);
}

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using TemporaryFile = std::unique_ptr<std::FILE, Close>;  // without a name, gone when closed

TemporaryFile temporary_file() {
  TemporaryFile file(std::tmpfile());
  if (file == nullptr) fail_errno("make a temporary file");
  return file;
}

std::string content(std::FILE* file) {
  std::string all(65536, '\0');
  std::rewind(file);
  size_t size = 0;
  while (const size_t n = std::fread(all.data() + size, 1, all.size() - size, file)) {
    size += n;
    if (size == all.size()) all.resize(2 * size);
  }
  all.resize(size);
  return all;
}

// Runs gnuplot on a script and returns the picture, which it writes to its standard output: so neither a shell nor
// gnuplot ever sees a path. Files instead of pipes: a gnuplot that dies early cannot kill us by SIGPIPE.
std::string run_gnuplot(const std::string& commands) {
  const TemporaryFile in = temporary_file(), out = temporary_file(), messages = temporary_file();
  if (std::fwrite(commands.data(), 1, commands.size(), in.get()) != commands.size() || std::fflush(in.get()) != 0)
    fail_errno("write a temporary file");
  std::rewind(in.get());

  std::vector<char*> environment;
  std::string locale = "LC_ALL=C";
  for (char** e = environ; *e != nullptr; e++)
    if (std::strncmp(*e, "LC_ALL=", 7) != 0) environment.push_back(*e);
  environment.push_back(locale.data());
  environment.push_back(nullptr);

  std::string name = "gnuplot";
  char* arguments[] = {name.data(), nullptr};
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_adddup2(&files, fileno(in.get()), STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&files, fileno(out.get()), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&files, fileno(messages.get()), STDERR_FILENO);
  pid_t child = 0;
  const int error = posix_spawnp(&child, name.c_str(), &files, nullptr, arguments, environment.data());
  posix_spawn_file_actions_destroy(&files);
  if (error == ENOENT) fail("gnuplot is not installed");
  if (error != 0) fail("gnuplot does not start: ", std::strerror(error));
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}

  const std::string picture = content(out.get());
  const bool begun = picture.starts_with("\x89PNG"), whole = picture.ends_with("IEND\xAE\x42\x60\x82");
  const bool satisfied = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  if (!satisfied || !begun || !whole) {
    std::string said = content(messages.get());
    std::replace(said.begin(), said.end(), '\n', ' ');
    if (WIFSIGNALED(status)) said = strsignal(WTERMSIG(status));
    if (satisfied && begun) said = "its picture is cut off";  // a full disk or ulimit -f, of which it says nothing
    fail("gnuplot failed: ", said.empty() ? "no message" : said);
  }
  return picture;
}

}  // namespace

bool draw_picture(const std::string& png_path, int width, int height, const std::string& commands) {
  std::string start = "set encoding utf8\n";        // the environment says LC_ALL=C, so that numbers have points
  for (const char* terminal : {"png", "pngcairo"})  // the last one there is remains
    start += text("if (strstrt(GPVAL_TERMINALS, ' ", terminal, " ') > 0) set terminal ", terminal, " noenhanced size ",
                  width, ",", height, " font 'Sans,13' background rgb 'white'\n");
  std::string picture;
  try {
    picture = run_gnuplot(start + commands);
  } catch (const Error& e) {
    static bool warned = false;
    if (!warned) std::fprintf(stderr, "warning: no picture %s: %s\n", png_path.c_str(), e.what());
    warned = true;
    return false;
  }
  write_file(png_path, picture);
  return true;
}

bool draw_plot(const std::string& png_path, const PlotData& data) {
  return draw_picture(png_path, 1200, 750, script(data));
}
