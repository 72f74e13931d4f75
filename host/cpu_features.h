// Which instruction sets the kernels were built for: data, so that asking executes none of them.
// defines: CpuFeatures, built_for
#pragma once

struct CpuFeatures {
  bool fma, avx2, avx512, avx512_bf16;
};
extern const CpuFeatures built_for;
