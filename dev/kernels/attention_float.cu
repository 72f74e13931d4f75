// Causal attention with dropout, forward and then backward, in float32: what a layer's attention costs in a step with
// --dtype float32 or tf32. kernels/attention.h has the equations.
//
// Together they move 302 MB, which an H100 copies in 101 us. The products of a layer are 11 GFLOP, which take the float
// units 0.22 ms; they do everything else as well.
//
// The kernels are all in the trainer (kernels/attention_float.cuh, attention_tf32.cuh). No card takes versions 2 and 3
// yet: they are choice 2 in kernels/choices.cuh, version 1 is choice 1.
//
//   1  without tensor cores          A warp has one query, or one key, and the float units multiply. Every dot product
//                                    ends with a sum over lanes.
//   2  three products of TF32        The tensor cores take TF32 numbers, which have 11 of a float's 24 bits. We write
//                                    each float as high + low, both TF32, and a product of floats as high high + high
//                                    low + low high. That is nearly as exact.
//   3  one product of TF32           Only high high. It is enough for --dtype tf32, which rounds its other products in
//                                    the same way.
#include "../../kernels/attention.cuh"
#include "../../kernels/attention.h"
#include "lab.cuh"

namespace {

void describe(lab::Lab& lab, const lab::Sizes& s) {
  const int B = s.B, T = s.T, C = s.C, NH = s.NH;
  const size_t count = size_t(s.rows()) * C, queries = size_t(B) * NH * T;
  const Dropout drop = {5, 6, site::attention_dropout + 2, dropout_threshold(0.2), 3};
  const lab::Array<float> qkv = lab.noise<float>(3 * count, 1, 1, true), dout = lab.noise<float>(count, 2, 1, true),
                          out = lab.output<float>(count), lse = lab.output<float>(queries),
                          D = lab.output<float>(queries), dqkv = lab.output<float>(3 * count);
  const lab::Array<int> step = lab.input(std::vector<int>{6});
  const auto expect = [&](double tolerance) {
    if (!lab.checks()) return;
    std::vector<double> want(count), sums(queries), gradient(3 * count);
    reference::attention_forward(want.data(), sums.data(), qkv.values().data(), drop, B, T, C, NH);
    reference::attention_backward(gradient.data(), dout.values().data(), qkv.values().data(), want.data(), sums.data(),
                                  drop, B, T, C, NH);
    out.expect(want, tolerance);
    lse.expect(sums, tolerance);
    dqkv.expect(gradient, tolerance);
  };
  lab.needs(12.0 * sizeof(float) * double(count) + 12.0 * double(queries), 7.0 * B * T * (T + 1) * C);
  const auto version = [&](const lab::Version& which, int kernels, bool tf32) {
    lab.version(which, [=](int set, cudaStream_t stream) {
      const lab::Chosen chosen(choices().attention_float, kernels);
      const DeviceDropout dropout = lab::on_device(drop, step[set]);
      attention_forward(out[set], lse[set], nullptr, qkv[set], dropout, B, T, C, NH, stream, tf32);
      attention_backward(dqkv[set], D[set], dout[set], qkv[set], out[set], lse[set], nullptr, dropout, B, T, C, NH,
                         stream, tf32);
    });
  };
  // A score is a sum of up to 128 floats. exp turns its error into a relative error of the weight, and a second sum
  // follows.
  expect(32 * rounding_of<float>);
  version({1, "without tensor cores", 3500, 1}, 1, false);
  version({2, "tensor cores, three products of TF32", 670, 2}, 2, false);
  // The kernels also round q, k, v and dout by up to 2^-11 of each number; the reference does not. A gradient has the
  // errors of all four, in two products one after the other: we have seen up to eight such units.
  expect(12 * 0x1p-11);
  version({3, "tensor cores, one product of TF32", 270}, 2, true);
}
const lab::Listed listed({"attention_float", describe, {{2, 31, 48, 3}, {1, 1, 64, 1}, {1, 70, 128, 2}}});

}  // namespace
