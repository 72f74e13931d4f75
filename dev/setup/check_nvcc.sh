#!/bin/sh
# Tries nvcc on a small program: dev/setup/check_nvcc.sh OUT NVCC FLAGS...
# If that compiles, OUT gets the options by which the linker finds CUDA's libraries, wherever this toolkit keeps them. If
# not, it says the likely reason in a sentence, and then what the compiler said.
set -eu
out=$1 nvcc=$2
shift 2

say() { printf '%s\n' "$@" >&2; }
stop() {  # stop REASON
  say "error: $1"
  [ ! -s "$out.log" ] || { say '' "$nvcc says:"; head -n 12 "$out.log" >&2; }
  say '' 'To build for the CPU alone: make NVCC= train_gpt'
  exit 1
}

cat >"$out.cu" <<'END'
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <concepts>

template <std::floating_point Real>
__global__ void roots(Real* x) {
  x[threadIdx.x] = std::sqrt(x[threadIdx.x]);
}
int main() {
  roots<<<1, 1>>>(static_cast<float*>(nullptr));
  return cudaGetLastError() != cudaSuccess;
}
END

rm -f "$out.log"
[ "$nvcc" ] || stop 'nvcc was not found; NVCC=path says where it is.'
"$nvcc" --version >"$out.log" 2>&1 || stop "$nvcc does not run; NVCC=path says where another is."
cuda=$(sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p' "$out.log")
old=$([ "$(printf '%s\n' 12.8 "$cuda" | sort -V | head -n 1)" = 12.8 ] || echo yes)
get_cuda='https://developer.nvidia.com/cuda-downloads'

if ! "$nvcc" "$@" -c "$out.cu" -o "$out.o" >"$out.log" 2>&1; then
  says() { grep -E "$1" "$out.log" >/dev/null; }
  if [ "$old" ]; then
    stop "this is CUDA $cuda; 12.8 or later is needed: $get_cuda"
  elif says 'unsupported (GNU|clang) version'; then
    newest=$(sed -n 's/.*gcc versions later than \([0-9]*\).*/\1/p' "$out.log" | head -n 1)
    stop "CUDA $cuda does not take this C++ compiler. Install one that it takes${newest:+ (g++ $newest at the latest)}, and \
name it: make CXX=g++-${newest:-VERSION} train_gpt. Or install a later CUDA: $get_cuda"
  elif says 'incompatible with (that of )?previous function'; then
    stop "CUDA $cuda does not know this C library ($(getconf GNU_LIBC_VERSION)): their mathematical functions are declared \
differently. glibc 2.41 needs CUDA 13.0 or later, glibc 2.42 needs 13.2 or later: $get_cuda"
  elif says '\.h: No such file|cicc: |ptxas: |cudafe'; then
    stop "a part of CUDA $cuda is missing. nvcc, its headers, the CUDA runtime and cuBLAS are needed; from pip: \
'cuda-toolkit[nvcc,crt,nvvm,cudart,cublas]', from conda: cuda-nvcc cuda-cudart-dev libcublas-dev."
  fi
  stop "CUDA $cuda cannot build a small program on this system ($(getconf GNU_LIBC_VERSION))."
fi
[ ! "$old" ] || say "note: this is CUDA $cuda; microGPT has been tried with none before 12.8"

# nvcc knows its folders, and says so in "LIBRARIES"; where that is wrong, they are near its folder "TOP". The folders of
# stubs hold libraries for linking alone.
"$nvcc" -dryrun -c "$out.cu" -o "$out.o" 2>&1 | awk '
  /^#\$ LIBRARIES=/ { n = split($0, f, /[ "]-L/); for (i = 2; i <= n; i++) { sub(/"? *"?$/, "", f[i]); print f[i] } }
  sub(/^#\$ TOP=/, "") { top = $0 }
  END { print top "/lib64"; print top "/lib"; print top "/targets/x86_64-linux/lib" }' | grep -v '/stubs$' >"$out.folders"
folder_of() {  # folder_of PATTERN
  while read -r folder; do
    for file in "$folder"/$1; do [ ! -e "$file" ] || { cd "$folder" && pwd && return; }; done
  done <"$out.folders"
}
rm -f "$out.log"
runtime=$(folder_of 'libcudart_static.a')
blas=$(folder_of 'libcublasLt.so*')
[ "$runtime" ] || stop "libcudart_static.a, of the CUDA runtime, is in none of: $(tr '\n' ' ' <"$out.folders")"
[ "$blas" ] || stop "libcublasLt.so, of cuBLAS, is in none of: $(tr '\n' ' ' <"$out.folders")"
for folder in "$runtime" "$blas"; do
  printf '"-L%s" -Xlinker -rpath -Xlinker "%s"\n' "$folder" "$folder"
done | uniq >"$out"
