// Stops a program on a processor that lacks an instruction set which its kernels were built for, with a sentence
// instead of an illegal instruction. The check runs before every other constructor and is built for any processor.
#include <unistd.h>
#include <cstring>

#include "cpu_features.h"

#if defined(__x86_64__) && defined(__GNUC__)
namespace {

void say(const char* text) {
  if (write(2, text, std::strlen(text)) < 0) _exit(1);
}

__attribute__((constructor(101))) void check_cpu() {
  __builtin_cpu_init();
  const char* missing = nullptr;
  if (built_for.fma && !__builtin_cpu_supports("fma")) missing = "FMA";
  if (built_for.avx2 && !__builtin_cpu_supports("avx2")) missing = "AVX2";
  if (built_for.avx512 && !__builtin_cpu_supports("avx512f")) missing = "AVX-512";
  if (built_for.avx512_bf16 && !__builtin_cpu_supports("avx512bf16")) missing = "AVX512_BF16";
  if (!missing) return;
  say("error: this program was built for a processor with ");
  say(missing);
  say(", which this one lacks. Build it here: make clean train_gpt, or there with MARCH=x86-64\n");
  _exit(1);
}

}  // namespace
#endif
