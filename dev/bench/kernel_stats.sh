#!/usr/bin/env bash
# Registers, stack, spills and static shared memory of every kernel of train_gpt.cu, as ptxas reports them:
#   dev/bench/kernel_stats.sh [ARCH ...]        90 if none is named; needs nvcc (NVCC=path), no GPU
#   SOURCE=dev/kernels/adamw.cu dev/bench/kernel_stats.sh    of another file, whose kernels may spill
# Dynamic shared memory is set at launch and does not show here. Exits with 1, and names the kernel, if one of the
# trainer's spills that is not in the list below.
set -eu
cd "$(dirname "$0")/../.."

# Kernels that may spill, and why: a regular expression of "architecture name" and the reason.
allowed=(
  '75 attention_backward_keys_kernel<fp16, 128, (true|false)>'
  '8 and 24 bytes; a warp has 16 keys of 128 channels, and no card has more than 255 registers for a thread'
  '75 attention_backward_once_kernel<fp16, (true|false)>'
  'it never runs there: Turing has too little shared memory for it'
  '80 residual_layernorm_forward_kernel<RowShape<128, 2>, true, bf16>'
  '4 bytes, in the variant for more than 1024 channels'
  '75 residual_layernorm_forward_kernel<RowShape<16, 3>, true, fp16>'
  '4 bytes, for which a seventh block fits on every multiprocessor'
  '(100|120) attention_forward_kernel<(bf16|fp16), 64, (true|false)>'
  'up to 16 bytes, for which a third block fits on every multiprocessor'
  '(100|120) attention_forward_head_kernel<(bf16|fp16), 64, (true|false)>'
  'up to 60 bytes, in a version that none of these cards takes yet'
  '[0-9]+ attention_(forward|backward_queries|backward_keys)_tf32_kernel<64, (true|false), 3>'
  'up to 36 bytes, for which a third block (a second one in backward_keys) fits on every multiprocessor'
  '100 attention_backward_keys_tf32_kernel<128, false, 3>'
  '4 bytes; a warp has sums of 16 keys and values of 128 channels'
  '100 embedding_backward_kernel<float>'
  '8 bytes, in float32 only'
)

nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
command -v "$nvcc" >/dev/null || { echo 'kernel_stats: nvcc was not found; NVCC=path says where it is' >&2; exit 1; }
archs=("$@")
[ ${#archs[@]} -gt 0 ] || archs=(90)
source=${SOURCE:-train_gpt.cu}
folder=build/kernel_stats/$(basename "$source" .cu)
mkdir -p "$folder"

compile() {  # compile ARCH: what ptxas says goes to $folder/sm_ARCH.log
  "$nvcc" -std=c++20 -O3 -arch="sm_$1" -Xptxas -v -cubin "$source" \
    -o "$folder/sm_$1.cubin" >"$folder/sm_$1.log" 2>&1 && return
  grep -E 'error|fatal|Terminated' "$folder/sm_$1.log" >&2 || :
  echo "kernel_stats: sm_$1 did not compile, see $folder/sm_$1.log" >&2
  return 1
}

# One line a kernel: name, registers, stack, spilled stores and loads, static shared memory; tabs between them.
table() {
  awk '
    /Compiling entry function/ { split($0, part, "\047"); name = part[2] }
    /bytes stack frame/ {
      for (i = 1; i < NF; i++) if ($i == "bytes") {
        if ($(i + 1) == "stack") stack = $(i - 1)
        if ($(i + 2) == "stores,") stores = $(i - 1)
        if ($(i + 2) == "loads") loads = $(i - 1)
      }
    }
    /Used [0-9]+ registers/ {
      smem = 0
      for (i = 1; i < NF; i++) {
        if ($i == "Used") registers = $(i + 1)
        if ($(i + 1) == "bytes" && $(i + 2) ~ /^smem/) smem = $i
      }
      if (name != "") print name "\t" registers "\t" stack "\t" stores "\t" loads "\t" smem
      name = ""
    }' "$1" | c++filt | sed -E '
      s/^void //
      s/\(anonymous namespace\):://g
      s/__nv_bfloat16/bf16/g; s/__half/fp16/g
      s/\(int\)//g; s/\(bool\)0/false/g; s/\(bool\)1/true/g
      s/^([^\t]*>)\([^\t]*\)\t/\1\t/
      s/^([^\t<]*)\([^\t]*\)\t/\1\t/' | sort
}

status=0
jobs=$(getconf _NPROCESSORS_ONLN)
for arch in "${archs[@]}"; do
  while [ "$(jobs -pr | wc -l)" -ge "$jobs" ]; do sleep 0.2; done
  compile "$arch" &
done
for job in $(jobs -p); do wait "$job" || status=1; done

for arch in "${archs[@]}"; do
  [ -s "$folder/sm_$arch.cubin" ] || continue
  table "$folder/sm_$arch.log" >"$folder/sm_$arch.txt"
  printf 'sm_%s, %d kernels\n%9s %7s %9s %7s  %s\n' "$arch" "$(wc -l <"$folder/sm_$arch.txt")" \
    registers stack spills smem kernel
  while IFS=$'\t' read -r name registers stack stores loads smem; do
    note=
    if [ $((stores + loads)) -gt 0 ]; then
      note='   <- spills, and is not allowed to'
      for ((i = 0; i < ${#allowed[@]}; i += 2)); do
        [[ "$arch $name" =~ ^${allowed[i]}$ ]] && note="   <- ${allowed[i + 1]}" && break
      done
      case $note in *'not allowed'*) status=1 failures="${failures:-}sm_$arch $name"$'\n' ;; esac
    fi
    printf '%9d %7d %9s %7d  %s%s\n' "$registers" "$stack" "$stores/$loads" "$smem" "$name" "$note"
  done <"$folder/sm_$arch.txt"
  echo
done
[ "$source" = train_gpt.cu ] || exit 0
[ -z "${failures:-}" ] || printf 'kernels that spill:\n%s' "$failures" >&2
exit $status
