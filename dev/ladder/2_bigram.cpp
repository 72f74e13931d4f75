// Rung 2, the bigram again, trained: a table of V x V logits, a row for each character. Gradient descent arrives at the
// table that counting gives at once (rung 1). The first network of the ladder, and the smallest: a lookup.
// Karpathy's lecture "Let's build GPT", bigram.py.
#include "layers.h"
#include "rung.h"
#include "rungs.h"

namespace bigram {

template <class Real>
struct Parameters {
  Real* table;
  void place(Arena& a, size_t V) { a(table, "table", {V, V}); }
};
template <class Real>
struct Activations {
  Real* logits;
  void place(Arena& a, size_t V, size_t rows) { a(logits, "logits", {rows, V}); }
};

template <class Real>
struct Net {
  static constexpr bool every_position = true;
  int V, T;

  size_t max_rows;
  Layout param_layout = layout_of<Parameters<Real>>(size_t(V)),
         act_layout = layout_of<Activations<Real>>(size_t(V), max_rows);
  Buffer<Real> params{param_layout}, grads{param_layout}, acts{act_layout};
  Parameters<Real> w = placed<Parameters<Real>>(params.data(), size_t(V)),
                   dw = placed<Parameters<Real>>(grads.data(), size_t(V));
  Activations<Real> a = placed<Activations<Real>>(acts.data(), size_t(V), max_rows);

  Net(int vocabulary, int window, int batch) : V(vocabulary), T(window), max_rows(size_t(batch) * window) {}

  double multiply_adds() const { return 0; }  // nothing is multiplied

  Real* forward(const int* x, int B, int n, const ladder::Mode&) {
    lookup_forward(a.logits, x, w.table, B * n, V);
    return a.logits;
  }

  void backward(const int* x, const Real* dlogits, int B, int n, const ladder::Mode&) {
    lookup_backward(dw.table, dlogits, x, B * n, V);
  }
};

}  // namespace bigram

void bigram_rung(const ladder::Arguments& arguments) {
  Config config;
  config.batch_size = 64;
  config.max_iters = 4000;
  config.eval_interval = 200;
  config.eval_iters = 50;
  config.learning_rate = 0.03;
  config.decay_lr = true;
  config.min_lr = 0;
  config.weight_decay = 0;
  int window = 32;
  if (!ladder::read_flags("bigram", arguments, config,
                          {{"block_size", &window, 1, 100000, {}, "characters of a batch's row"}}))
    return;
  const Data data = ladder::open_text(config, window);
  const int V = data.vocabulary.size();
  const size_t rows = size_t(config.batch_size) * window;
  using Net = bigram::Net<float>;
  ladder::require_memory(config, layout_of<bigram::Parameters<float>>(size_t(V)),
                         layout_of<bigram::Activations<float>>(size_t(V), rows), V, window);

  Net net(V, window, config.batch_size);
  ladder::fill_normal(net.w.table, size_t(V) * V, 1, config.seed, 0);
  ladder::Result result;
  result.rung = "bigram";
  result.title = "Bigram, trained";
  result.rows = {ladder::train(net, config, data, "bigram, trained")};

  // The losses that counting reaches: with one added on the validation text, with nothing added (its optimum) on the
  // training text.
  std::vector<int> train(data.train.size()), val(data.val.size());
  data.train.copy(0, train.size(), train.data());
  data.val.copy(0, val.size(), val.data());
  const double counted_val = bigram_loss(train, val, V), counted_train = bigram_loss(train, train, V, 0);
  ladder::Row& row = result.rows[0];
  row.reference =
      text("train ", ladder::decimals(counted_train, 4), ", val ", ladder::decimals(counted_val, 4), " (counted)");
  result.checks = {{text("train loss ", ladder::decimals(row.train, 4), " within 0.005 of the counted optimum ",
                         ladder::decimals(counted_train, 4)),
                    std::fabs(row.train - counted_train) < 0.005}};
  result.pictures = {{"training_plot.png", "It comes down to the line of the counted bigram and stays there."}};
  ladder::LanguageModel<Net> model(net, config, data);
  result.sample = ladder::sample_text(model, data, config.seed, window);
  ladder::save_result(config.out_dir, result);
}
