// Models in files of other programs: PyTorch's archives and pickles, and safetensors without our metadata. What is accepted
// is a whole model. The pickle inside an archive has a checksum around it, so it is also given the bytes as they are.
#include "../../../host/weights.h"

#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string path = fuzz_file("weights", data, size);
  refused([&] { PthFile{path}; });
  refused([&] {
    const ModelWeights weights(path);
    const ModelShape& shape = weights.info().shape;
    const Layout layout = parameter_layout(shape);
    must(layout.count() <= size / 2);
    const Buffer<float> params(layout);
    weights.load_params(params.data(), layout);
    must(all_finite(params.data(), layout));
    const ModelShape other = {1, shape.T + 1, shape.C, shape.L, shape.NH};
    const Layout other_layout = parameter_layout(other);
    const Buffer<float> taken(other_layout);
    std::vector<char32_t> characters;
    for (int id = 0; id < shape.V; id++) characters.push_back(char32_t(id));
    take_over(taken.data(), other, Vocabulary({'\0'}), weights, Vocabulary(characters));
    must(all_finite(taken.data(), other_layout));
  });
  refused([&] {
    std::string_view bytes(reinterpret_cast<const char*>(data), size);
    Unpickler("it", {"torch.Size"}).read(bytes);
    must(bytes.size() < size);
  });
  return 0;
}
