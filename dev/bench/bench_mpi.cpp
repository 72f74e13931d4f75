// How long the parts of a step take in a run of several processes: make bench-mpi. A step of the lecture model has eight
// windows, in two batches of four. One process computes both with all threads; two compute one each, with half of them.
// Rank 0 prints medians over the steps.
#define MICROGPT_NO_MAIN
#include "../../train_gpt_cpu.cpp"

#include <chrono>
#include <cstdio>
#include <cstdlib>

namespace {

using namespace cpu;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

int measure(const Config& config, int steps) {
  const ModelShape shape{65, 256, 384, 6, 6};
  const int B = config.batch_size, T = shape.T;
  GPT<float> m(shape, B);
  const Part batches = own_batches(config);
  m.prepare_training(int(batches.count));
  init_parameters(m.params_memory.data(), m.param_layout, 1);
  std::vector<int> x(size_t(B) * T), y(x.size());
  for (size_t i = 0; i < x.size(); i++) x[i] = int(i * i % 65), y[i] = int((i + 1) * (i + 1) % 65);

  std::vector<double> compute, exchange, update, gather, step;
  for (int i = -1; i < steps; i++) {  // the first is not counted
    ranks().all(0);                   // begin together
    const double begin = now();
    sum_tree(
        int(batches.first), int(batches.count), 0,
        [&](int number, int level) {
          const Dropout drop = {1, uint32_t(i + 1), 0, dropout_threshold(0.2), number * B};
          zero_gradients(m, level);
          m.use_gradients(level);
          forward(m, x.data(), B, T, drop);
          loss_sum(m, y.data(), B, T);
          backward(m, x.data(), y.data(), B, T, 1.0 / (8 * T), drop);
        },
        [&](int level) { add(m.grads(level), m.grads(level + 1), m.param_layout.size()); });
    const double computed = now();
    sum_over_ranks(m);
    const double exchanged = now();
    adamw_update(m.params_memory.data() + m.own.first, m.m_memory.data(), m.v_memory.data(), m.grads() + m.own.first,
                 m.own.count, {3e-4, 0.9, 0.999, 1e-8, 0.01, i + 2, 1});
    const double updated = now();
    ranks().gather(m.params_memory.data(), m.shares);
    const double end = now();
    if (i < 0) continue;
    compute.push_back(computed - begin);
    exchange.push_back(exchanged - computed);
    update.push_back(updated - exchanged);
    gather.push_back(end - updated);
    step.push_back(end - begin);
  }
  std::printf("%d process%s of %d thread%s: step %6.1f ms: batches %6.1f, exchange %5.1f, update %5.1f, gather %5.1f\n",
              ranks().count(), ranks().count() == 1 ? "" : "es", omp_get_max_threads(),
              omp_get_max_threads() == 1 ? "" : "s", 1e3 * median(step), 1e3 * median(compute), 1e3 * median(exchange),
              1e3 * median(update), 1e3 * median(gather));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_main([&] {
    Config config;
    config.command = "train";
    config.batch_size = 4;
    config.gradient_accumulation_steps = 2;
    return with_ranks(config, [&] {
      use_threads(argc > 1 ? std::atoi(argv[1]) : 0, false, ranks().sharing_cores());
      return measure(config, argc > 2 ? std::atoi(argv[2]) : 6);
    });
  });
}
