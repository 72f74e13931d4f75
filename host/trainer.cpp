#include "trainer.h"

#include <cmath>
#include <limits>

#include "error.h"
#include "ranks.h"

void plan_training(MemoryPlan& plan, double params, const Config& config) {
  const int W = ranks().count();
  plan.add("their gradients", params * (1 + tree_levels(int(own_batches(config).count))));
  if (W > 1) plan.add("gradients from other processes", params);
  plan.add("AdamW's m and v", 2 * params / W);
}

void require_imaginable(const Config& config, const ModelShape& s, double available) {
  const double windows = double(config.batch_size) * config.gradient_accumulation_steps;
  if (windows > std::numeric_limits<int>::max())
    fail("--batch_size ", config.batch_size, " times --gradient_accumulation_steps ",
         config.gradient_accumulation_steps, " is more than ", std::numeric_limits<int>::max(), " windows a step");
  const double C = s.C, rows = double(config.batch_size) * s.T;
  const double params = C * (2.0 * s.V + s.T) + 12 * C * C * s.L;
  const double bytes = 4 * (params + rows * (10 * C * s.L + s.V));
  if (bytes < 1e15 && rows <= std::numeric_limits<int>::max()) return;
  fail("this run needs more than ", std::ceil(bytes / 1e9), " GB of memory, ", std::floor(available / 1e9),
       " GB are there; lower --batch_size and --block_size (", rows, " positions in a batch, at most ",
       std::numeric_limits<int>::max(), ") or --n_embd and --n_layer (", params, " parameters)");
}

MemoryPlan possible_plan(const TrainerType& type, const Config& config, const ModelShape& shape, const Data* data,
                         bool training) {
  const AvailableMemory memory = type.memory();
  require_imaginable(config, shape, memory.bytes);
  MemoryPlan plan = type.plan(config, shape, data, training);
  plan.require(memory);
  return plan;
}
