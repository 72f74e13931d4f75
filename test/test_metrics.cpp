// host/metrics.h: a run's record, and how a resumed run continues it.
#include "../host/metrics.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "../host/error.h"
#include "../host/files.h"
#include "test.h"

TEST_CASE("metrics are one JSON object a line", "[metrics]") {
  const std::string path = test_folder() + "/metrics.jsonl";
  write_file(path, "of an earlier run\n");
  Metrics metrics(path, 0);
  metrics.add_eval({0, 4.25, 4.5});
  metrics.add_iter(0, 4.125, 3e-4, 12.5, 1000);
  metrics.add_iter(10, std::numeric_limits<double>::quiet_NaN(), 3e-4, 12.5, 1.0 / 3);
  metrics.add_eval({10, 3.25, 3.5, 3.375, "a \"line\"\n"});
  metrics.add_final({11, 1.5, 2.5});
  metrics.add_final({11, 1.5, 2.5, 1.25});
  CHECK(read_file(path) ==  // `metrics` still exists: a running run's record is complete, too
        R"({"type":"eval","iter":0,"train_loss":4.25,"val_loss":4.5}
{"type":"iter","iter":0,"loss":4.125,"lr":0.0003,"time_ms":12.5,"tokens_per_s":1000.0}
{"type":"iter","iter":10,"loss":null,"lr":0.0003,"time_ms":12.5,"tokens_per_s":0.3333333333333333}
{"type":"eval","iter":10,"train_loss":3.25,"val_loss":3.5,"val_fixed":3.375,"sample":"a \"line\"\n"}
{"type":"final","iter":11,"val_exact":1.5,"train_seconds":2.5}
{"type":"final","iter":11,"val_fixed":1.25,"val_exact":1.5,"train_seconds":2.5}
)");
  REQUIRE(metrics.record().evals.size() == 2);
  CHECK(metrics.record().evals[0].val == 4.5);
  CHECK(std::isnan(metrics.record().evals[0].fixed));
  CHECK(metrics.record().evals[1].fixed == 3.375);
  REQUIRE(metrics.record().iters.size() == 2);
  CHECK(metrics.record().iters[0].loss == 4.125);
  CHECK(std::isnan(metrics.record().iters[1].loss));

  const Record read = read_record(path);
  REQUIRE(read.evals.size() == 2);
  CHECK(read.evals[0].sample.empty());
  CHECK(read.evals[1].sample == "a \"line\"\n");
  CHECK(read.iters.size() == 2);
  CHECK(read.final.iter == 11);
  CHECK(read.final.val_fixed == 1.25);
  CHECK(read_record(path + "/none").final.iter == -1);
}

TEST_CASE("a resumed run keeps the lines before its first iteration", "[metrics]") {
  const std::string path = test_folder() + "/metrics.jsonl";
  const std::string kept =
      "{\"type\":\"eval\", \"iter\":0, \"train_loss\":4.0, \"val_loss\":4.5}\n"
      "{\"type\":\"iter\",\"iter\":10,\"loss\":null}\n"
      "{\"type\":7,\"iter\":19}\n";
  const std::string dropped =
      "{\"type\":\"iter\",\"iter\":20,\"loss\":2.0}\n"
      "{\"type\":\"final\"}\n"
      "not JSON\n[1]\n{\"iter\":\"x\"}\n{\"iter\":-1e300}\n\n";
  write_file(path, dropped + kept + "{\"type\":\"iter\",\"iter\":12,\"lo");  // a line cut off in the middle
  {
    Metrics metrics(path, 20);
    CHECK(read_file(path) == kept);
    REQUIRE(metrics.record().evals.size() == 1);
    CHECK(metrics.record().evals[0].train == 4.0);
    REQUIRE(metrics.record().iters.size() == 1);
    CHECK(std::isnan(metrics.record().iters[0].loss));
    metrics.add({{"type", "iter"}, {"iter", 20}, {"loss", 2.5}});
    CHECK(metrics.record().iters.size() == 2);
  }
  CHECK(read_file(path) == kept + "{\"type\":\"iter\",\"iter\":20,\"loss\":2.5}\n");
  CHECK(Metrics(path, 30).record().iters.back().loss == 2.5);
}

TEST_CASE("metrics start without an earlier file, and say where they cannot", "[metrics]") {
  const std::string folder = test_folder();
  Metrics metrics(folder + "/metrics.jsonl", 100);
  CHECK(metrics.record().evals.empty());
  CHECK_THROWS_WITH(Metrics(folder + "/none/metrics.jsonl", 0), ContainsSubstring("/none/metrics.jsonl"));
}
