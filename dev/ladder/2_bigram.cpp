// Rung 2, the bigram again, trained: a table of V x V logits, a row for each character, on which gradient descent
// arrives at what counting gives at once (rung 1). The first network of the ladder, and the smallest: a lookup.
// Karpathy's lecture "Let's build GPT", bigram.py.
#include "layers.h"
#include "rung.h"
#include "rungs.h"

namespace bigram {

// clang-format off
#define PARAMETERS_OF_BIGRAM(ONE, EACH_LAYER) ONE(table, V, V)
#define ACTIVATIONS_OF_BIGRAM(ONE, EACH_LAYER) ONE(logits, rows, V)
// clang-format on
DEFINE_POINTERS(Parameters, PARAMETERS_OF_BIGRAM)
DEFINE_POINTERS(Activations, ACTIVATIONS_OF_BIGRAM)

template <class Real>
struct Net {
  static constexpr bool every_position = true;
  int V, T;

  Layout param_layout, act_layout;
  Buffer<Real> params{param_layout}, grads{param_layout}, acts{act_layout};
  Parameters<Real> w{params.data(), param_layout}, dw{grads.data(), param_layout};
  Activations<Real> a{acts.data(), act_layout};

  Net(int vocabulary, int window, int batch)
      : V(vocabulary), T(window), param_layout(parameters(V)), act_layout(activations(V, size_t(batch) * T)) {}

  static Layout parameters(size_t V) {
    Layout layout;
    PARAMETERS_OF_BIGRAM(ADD_ONE, ADD_EACH_LAYER)
    return layout;
  }
  static Layout activations(size_t V, size_t rows) {
    Layout layout;
    ACTIVATIONS_OF_BIGRAM(ADD_ONE, ADD_EACH_LAYER)
    return layout;
  }

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
  ladder::require_memory(config, Net::parameters(V), Net::activations(V, rows), V, window);

  Net net(V, window, config.batch_size);
  ladder::fill_normal(net.w.table, size_t(V) * V, 1, config.seed, 0);
  ladder::Result result;
  result.rung = "bigram";
  result.title = "Bigram, trained";
  result.rows = {ladder::train(net, config, data, "bigram, trained")};

  // What counting reaches: with one added for validation, and the optimum for the text trained on.
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
