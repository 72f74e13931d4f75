// Rung 1, models that count: the probability of a character after one or two others is how often it followed them in
// the text. No other table of probabilities makes the text more likely (maximum likelihood). What never happened in the
// text still may, so we add one to every count (Laplace). Shannon, "A Mathematical Theory of Communication", 1948,
// section 3; Karpathy's makemore lectures.
#include <cmath>

#include "rung.h"
#include "rungs.h"

#include "../../host/ngram.h"
#include "../../host/plot.h"

namespace counted {

// Counts characters of V kinds after `order` characters of context. Before the text begins there are newlines.
class Model {
 public:
  Model(int vocabulary, int context_length) : V(vocabulary), order(context_length) {
    size_t contexts = 1;
    for (int i = 0; i < order; i++) contexts *= size_t(V);
    counts_.resize(contexts * size_t(V));
  }

  void count(const std::vector<int>& text) {
    each(text, [&](size_t context, int next) { counts_[context * size_t(V) + size_t(next)]++; });
  }

  // P(next | context) = (count + added) / (sum of the counts + added * V)
  double probability(size_t context, int next, double added) const {
    const double* row = &counts_[context * size_t(V)];
    double sum = 0;
    for (int v = 0; v < V; v++) sum += row[v];
    return (row[next] + added) / (sum + added * V);
  }

  double loss(const std::vector<int>& text, double added) const {
    std::vector<double> logs(counts_.size(), 1);  // 1: not computed yet
    double total = 0;
    each(text, [&](size_t context, int next) {
      double& l = logs[context * size_t(V) + size_t(next)];
      if (l > 0) l = std::log(probability(context, next, added));
      total -= l;
    });
    return total / double(text.size() - 1);
  }

  const float* next_logits(const int* context, int n, int) {
    size_t id = 0;
    for (int i = order; i >= 1; i--) id = id * size_t(V) + size_t(i <= n ? context[n - i] : 0);
    logits_.clear();
    for (int v = 0; v < V; v++) logits_.push_back(float(std::log(probability(id, v, 1))));
    return logits_.data();
  }

  const int V, order;

 private:
  // Calls visit(context, next) for every character of the text but its first.
  template <class Visit>
  void each(const std::vector<int>& text, Visit visit) const {
    const size_t contexts = counts_.size() / size_t(V);
    size_t context = size_t(text[0]);
    for (size_t i = 1; i < text.size(); i++) {
      visit(context, text[i]);
      context = (context * size_t(V) + size_t(text[i])) % contexts;
    }
  }

  std::vector<double> counts_;
  std::vector<float> logits_;
};

// The table of the bigram's probabilities: a row for what is read, a column for what follows.
inline bool draw_table(const std::string& path, const Model& bigram, const Vocabulary& vocabulary) {
  const int V = bigram.V;
  if (V > 300) return false;  // nobody could read it
  std::string commands = "$table << END\n", xtics, ytics;
  for (int b = 0; b < V; b++)
    for (int c = 0; c < V; c++)
      commands += text(c, " ", b, " ", bigram.probability(size_t(b), c, 1), c + 1 == V ? "\n\n" : "\n");
  for (int v = 0; v < V; v++) {
    const std::string tic = text(v ? ", " : "", quoted(shown(vocabulary.characters()[size_t(v)])), " ", v);
    xtics += tic, ytics += tic;
  }
  const int font = V <= 70 ? 9 : 5;
  commands += text("END\nset title 'probability of the next character'\nset xtics (", xtics, ") scale 0 font ',", font,
                   "'\nset ytics (", ytics, ") scale 0 font ',", font, "'\nset xlabel 'next'\nset ylabel 'read'\n",
                   "set xrange [-0.5:", V - 0.5, "]\nset yrange [", V - 0.5, ":-0.5]\nset size ratio 1\n",
                   "set palette defined (0 'white', 0.1 '#BFD9EA', 0.4 '", train_colour, "', 1 '#002B45')\n",
                   "set cbrange [0:1]\nplot $table with image notitle\n");
  return draw_picture(path, 1200, 1100, commands);
}

}  // namespace counted

void counted_rung(const ladder::Arguments& arguments) {
  Config config;
  int order = 2;
  if (!ladder::read_flags("counted", arguments, config, {{"order", &order, 1, 3, {}, "characters of context at most"}},
                          {"data", "out_dir", "seed"}))
    return;
  const Data data = ladder::open_text(config, order);
  const int V = data.vocabulary.size();
  MemoryPlan plan;
  plan.add("counts", 16 * std::pow(double(V), order + 1));
  plan.require({usable_memory(), "this machine has"}, "lower --order");
  make_folder(config.out_dir);
  std::vector<int> train(data.train.size()), val(data.val.size());
  data.train.copy(0, train.size(), train.data());
  data.val.copy(0, val.size(), val.data());

  ladder::Result result;
  result.rung = "counted";
  result.title = "Counted";
  const char* const names[] = {"bigram", "trigram", "4-gram"};
  for (int n = 1; n <= order; n++) {
    const auto start = std::chrono::steady_clock::now();
    counted::Model model(V, n);
    model.count(train);
    ladder::Row row;
    row.name = text(names[n - 1], ", counted");
    row.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    row.parameters = std::pow(double(V), n + 1);
    row.train = model.loss(train, 1);
    row.val = model.loss(val, 1);
    const double optimum = model.loss(train, 0);
    result.notes.push_back(text("No table of ", names[n - 1], "s has a lower loss on the text counted than ",
                                ladder::decimals(optimum, 4), "; one added to every count makes that ",
                                ladder::decimals(row.train, 4), "."));
    if (n == 1) {
      row.reference = "val 2.4819";
      if (counted::draw_table(config.out_dir + "/bigram.png", model, data.vocabulary))
        result.pictures = {{"bigram.png", "What follows what."}};
      if (ladder::has_targets(config, data))
        result.checks = {{text("counted bigram, val ", ladder::decimals(row.val, 4), ", is 2.4819"),
                          std::fabs(row.val - 2.4819) < 5e-5},
                         {text("its optimum in training, ", ladder::decimals(optimum, 4), ", is 2.4519"),
                          std::fabs(optimum - 2.4519) < 5e-5}};
    }
    std::printf("%s: train %.4f, val %.4f\n", row.name.c_str(), row.train, row.val);
    result.rows.push_back(row);
    if (n == order) result.sample = ladder::sample_text(model, data, config.seed, n);
  }
  // Longer contexts are too rare to be counted alone: each leans on the next shorter one.
  ladder::Row row;
  row.name = "5-gram, Witten and Bell";
  const auto start = std::chrono::steady_clock::now();
  row.val = witten_bell_loss(train, val, V, 5);
  row.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  row.parameters = ladder::not_measured;
  row.reference = "val 1.669";
  std::printf("%s: val %.4f\n", row.name.c_str(), row.val);
  if (ladder::has_targets(config, data))
    result.checks.push_back(
        {text("5-gram, val ", ladder::decimals(row.val, 3), ", is 1.669"), std::fabs(row.val - 1.669) < 5e-4});
  result.rows.push_back(row);
  ladder::save_result(config.out_dir, result);
}
