// Safetensors files and the checkpoints in them. Inputs have no checksums, which would turn nearly all of them away at
// the door; other tests show that damage is found. What is accepted lies inside the file.
#include "../../../host/checkpoint.h"

#include "../../../host/config.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string path = fuzz_file("checkpoint", data, size);
  refused([&] {
    const SafetensorsFile file(path);
    unsigned sum = 0;
    for (const TensorView& tensor : file.tensors())
      for (size_t i = 0; i < tensor.bytes(); i++) sum += static_cast<const uint8_t*>(tensor.data)[i];
    must(sum + 1 != 0 || sum == ~0u);  // keeps the compiler from leaving out the reads
  });
  refused([&] {
    const Checkpoint checkpoint(path);
    const Layout layout = parameter_layout(checkpoint.info().shape);
    must(layout.count() <= size);
    const Buffer<float> params(layout), m(layout), v(layout);
    checkpoint.load_params(params.data(), layout);
    refused([&] {
      Config config;
      apply_settings(config, checkpoint.info().settings);
      must(recorded_settings(config).size() == recorded_flags().size());
    });
    checkpoint.load_moments(m.data(), v.data(), layout);
  });
  return 0;
}
