// What the trainer needs from CUDA besides kernels (kernels/runtime.cuh), and the loss scale in a checkpoint.
#include <limits>

#include "../kernels/adamw.cuh"
#include "../kernels/choices.cuh"
#include "../kernels/runtime.cuh"
#include "cuda.h"

static __global__ void add_one_kernel(int* x) {
  wait_for_inputs();
  (*x)++;
}

TEST_CASE("A buffer on the device begins as zeros; one that does not fit is refused with what lowers it", "[cuda]") {
  const Stream stream;
  const DeviceBuffer<int> buffer(1000, "numbers");
  std::vector<int> values(1000, 7);
  copy_to_host(values.data(), buffer.data(), values.size(), stream);
  CHECK((values == std::vector<int>(1000)));
  for (int& x : values) x = 3;
  copy_to_device(buffer.data(), values.data(), values.size());
  std::vector<int> back(1000);
  copy_to_host(back.data(), buffer.data(), back.size(), stream);
  CHECK((back == values));

  const double free = free_device_memory();
  const std::string error =
      error_of([&] { DeviceBuffer<float>(size_t(free), "the activations"); });  // 4 times too much
  CHECK(contains(error, "out of GPU memory: "));
  CHECK(contains(error, " MB for the activations were asked for, "));
  CHECK(contains(error, "lower --batch_size"));
  CHECK(cudaGetLastError() == cudaSuccess);  // the next launch must not find the error again
#ifdef CUDA_ON_CPU                           // a card may have other users
  CHECK(free_device_memory() == free);
#endif
}

TEST_CASE("A captured graph runs when it is launched, as often as it is", "[cuda]") {
  const Stream stream;
  const DeviceBuffer<int> count(1, "a count");
  Graph graph;
  CHECK_FALSE(graph.captured());
  graph.capture(stream, [&] { launch(add_one_kernel, {1, 1, 0, stream}, count.data()); });
  CHECK(graph.captured());
  int n = -1;
  copy_to_host(&n, count.data(), 1, stream);
  CHECK(n == 0);
  for (int i = 0; i < 3; i++) graph.launch(stream);
  copy_to_host(&n, count.data(), 1, stream);
  CHECK(n == 3);
}

TEST_CASE("Choices of kernels: an unknown card has the first of each, and a checkpoint names the others", "[cuda]") {
  const Choices before = choices();
  CHECK(choices_of(1).name().empty());
  choices() = choices_of(1);
  choose("attention_backward", 2);
  CHECK(choices().attention_backward == 2);
  CHECK(choices().attention_forward == 1);
  CHECK(choices().name() == " attention_backward 2");
  const auto message = [](const std::string& operation, int version) {
    try {
      choose(operation, version);
    } catch (const std::invalid_argument& e) { return std::string(e.what()); }
    return std::string("no error");
  };
  CHECK(contains(message("attention_backward", 3), "attention_backward has no version 3"));
  CHECK(contains(message("attention", 2), "'attention' is nothing that can be done in more than one way"));
  choose("sampling", 2);  // changes no bit of a training run
  CHECK(choices().name() == " attention_backward 2");
  choices() = before;
}

TEST_CASE("The first tensor on the device with a number that is not finite is named", "[cuda]") {
  const ModelShape shape = {65, 8, 16, 2, 2};
  const Layout layout = parameter_layout(shape);
  const DeviceBuffer<bf16> buffer(layout.size(), "parameters");
  const auto params = placed<Params<bf16>>(buffer.data(), shape);
  CHECK(first_not_finite_on_device(buffer.data(), layout, Order::forward).empty());
  const bf16 infinite = bf16(std::numeric_limits<float>::infinity());
  copy_to_device(params.fcw[1] + 5, &infinite, 1);
  copy_to_device(params.qkvw[1] + 7, &infinite, 1);
  CHECK(first_not_finite_on_device(buffer.data(), layout, Order::forward) == "qkvw of layer 1");
  CHECK(first_not_finite_on_device(buffer.data(), layout, Order::backward) == "fcw of layer 1");
}

TEST_CASE("The loss scale goes into a checkpoint and comes back as the same number", "[cuda]") {
  TrainState state = initial_state(true);
  state.loss_scale = 0x1p-20f;
  state.steps_since_overflow = 1234;
  std::map<std::string, std::string> saved;
  save_loss_scale(saved, state);
  TrainState again = initial_state(true);
  load_loss_scale(again, saved);
  CHECK(again.loss_scale == state.loss_scale);
  CHECK(again.steps_since_overflow == 1234);
  load_loss_scale(again, {});  // a checkpoint of another type has no loss scale, so nothing changes
  CHECK(again.loss_scale == state.loss_scale);
  saved["loss_scale"] = "much";
  CHECK(error_of([&] { load_loss_scale(again, saved); }) ==
        "the checkpoint's loss_scale or steps_since_overflow is no number");
}
