// A draw that equals dropout's threshold is dropped, on the device as on the CPU: one draw in
// 65,536 hits it, so that other tests never do.
#include "../kernels/attention.cuh"
#include "../kernels/attention.h"
#include "cuda.h"

TEMPLATE_TEST_CASE("attention on the device: a draw at the threshold is dropped", "[cuda]", float, bf16, fp16) {
  const int T = 32, HS = 16, q = 30;
  // A draw has one of eight places in a square of 16 x 16 weights: queries from 8 on or not, keys from 8 on or not, odd
  // or even keys.
  for (int place = 0; place < 8; place++) {
    Dropout drop = {5, 6, site::attention_dropout, 0, 0};
    const int query = q - place / 4 * 8, key = place / 2 % 2 * 8 + place % 2;
    drop.threshold = attention_draw(drop, 0, query, key, T);
    CAPTURE(query, key, drop.threshold);
    REQUIRE(drop.threshold > 1000);  // otherwise dropout would scale kept weights absurdly
    std::vector<float> qkv(T * 3 * HS), dout(T * HS);
    qkv[(key * 3 + 2) * HS] = 1;        // out (query, 0) is the weight of the key,
    dout[query * HS] = 1;               // and so is dv (key, 0); the scores and D are 0,
    qkv[(key * 3 + 1) * HS + 1] = 1;    // so dq (query, 1) is the weight times scale,
    qkv[(query * 3 + 0) * HS + 2] = 1;  // and dk (key, 2)
    const DeviceArray<TestType> in(qkv), d(dout), out(size_t(T * HS)), dqkv(qkv.size());
    const DeviceArray<float> lse(T), D(T);
    const DeviceArray<int> step(std::vector<int>{int(drop.step)});
    attention_forward(out.data(), lse.data(), nullptr, in.data(), {drop, step.data()}, 1, T, HS, 1, nullptr);
    attention_backward(dqkv.data(), D.data(), d.data(), in.data(), out.data(), lse.data(), nullptr, {drop, step.data()},
                       1, T, HS, 1, nullptr);
    CHECK(out.floats()[query * HS] == 0);
    CHECK(dqkv.floats()[(key * 3 + 2) * HS] == 0);
    CHECK(dqkv.floats()[(key * 3 + 1) * HS + 2] == 0);
    CHECK(dqkv.floats()[(query * 3 + 0) * HS + 1] == 0);
  }
}
