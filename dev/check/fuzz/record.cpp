// The record of a run, metrics.jsonl, that a resumed run goes on with; and baselines.json.
#include "../../../host/metrics.h"
#include "../../../host/ngram.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string path = fuzz_file("metrics.jsonl", data, size);
  refused([&] { load_baselines(path); });
  refused([&] {
    has_final(path, 7);
    Metrics metrics(path, 5);
    const std::string kept = read_file(path);
    for (const EvalPoint& e : metrics.record().evals) must(e.iter >= 0 && e.iter < 5);
    metrics.add_iter(5, 1.0, 0.1, 1, 1);
    must(read_file(path).substr(0, kept.size()) == kept);
    const Metrics again(path, 6);
    must(again.record().iters.size() == metrics.record().iters.size() &&
         again.record().evals.size() == metrics.record().evals.size());
  });
  return 0;
}
