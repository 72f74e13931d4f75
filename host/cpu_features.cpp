// Compiled with the kernels' flags. It holds only data: code of this file could not run where the check is needed.
#include "machine.h"

#ifdef __FMA__
constexpr bool fma = true;
#else
constexpr bool fma = false;
#endif
#ifdef __AVX2__
constexpr bool avx2 = true;
#else
constexpr bool avx2 = false;
#endif
#ifdef __AVX512F__
constexpr bool avx512 = true;
#else
constexpr bool avx512 = false;
#endif

#ifdef __AVX512BF16__
constexpr bool avx512_bf16 = true;
#else
constexpr bool avx512_bf16 = false;
#endif

extern const CpuFeatures built_for = {fma, avx2, avx512, avx512_bf16};
