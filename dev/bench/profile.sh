#!/usr/bin/env bash
# One training step under NVIDIA's profilers: dev/bench/profile.sh BENCH_GPU [KERNEL] [FOLDER]
# Prints the command lines, so that they can be changed by hand, and runs those that can be run here: a timeline (Nsight
# Systems), the bytes and times of every kernel, and one kernel in detail (Nsight Compute). doc/profiling.md says how to
# read them. Ends with 0 if something was profiled, 3 if the machine refuses it, 4 if there is no profiler or no GPU.
set -u
bench=${1:?usage: dev/bench/profile.sh BENCH_GPU [KERNEL] [FOLDER]}
kernel=${2:-attention_forward_kernel}
folder=${3:-out/profile}
mkdir -p "$folder"
step=("$bench" profile bfloat16)

find_tool() {  # find_tool NAME: its path, or the name alone
  local path found=$1
  for path in /opt/nvidia/nsight-*/*/"$1" /usr/local/cuda/bin/"$1"; do [ -x "$path" ] && found=$path; done
  command -v "$1" || echo "$found"
}
nsys=$(find_tool nsys) ncu=$(find_tool ncu)

# The step lies between cudaProfilerStart and cudaProfilerStop. --clock-control none: the clocks that training has, not
# the base clocks. The five metrics are read in a few passes; --set full repeats the kernel some 40 times.
# shellcheck disable=SC2054  # the commas belong to the options
timeline=("$nsys" profile --trace=cuda,nvtx,cublas --capture-range=cudaProfilerApi --capture-range-end=stop
  --force-overwrite=true --output="$folder/step" "${step[@]}")
tables=("$nsys" stats --force-export=true --report=nvtx_gpu_proj_sum --report=cuda_gpu_kern_sum "$folder/step.nsys-rep")
metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum
metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active
all=("$ncu" --profile-from-start off --clock-control none --metrics "$metrics" --print-summary per-kernel --csv
  "${step[@]}")
one=("$ncu" --profile-from-start off --clock-control none --set full --import-source yes
  --kernel-name "regex:$kernel" --launch-count 1 --force-overwrite --export "$folder/kernel" "${step[@]}")
report=("$ncu" --import "$folder/kernel.ncu-rep" --page details)

show() {
  local word
  printf '\n$'
  for word; do [[ $word == *[!A-Za-z0-9_.,:=/-]* ]] && word="'$word'"; printf ' %s' "$word"; done
  printf '\n'
}
profiled=0 refused=0
attempt() {  # attempt COMMAND...: shows it, and runs it if the program and a GPU are there
  show "$@"
  if [ -z "$gpu" ]; then echo 'not run: no GPU'; return 1; fi
  if ! command -v "$1" >/dev/null; then echo "not run: $(basename "$1") was not found"; return 1; fi
  if "$@" >"$folder/last.log" 2>&1 && ! grep -q '==ERROR==' "$folder/last.log"; then
    cat "$folder/last.log"
    profiled=1
  else
    cat "$folder/last.log"
    # ncu may not read counters, or the runtime has none; or nsys cannot make its report
    grep -qE 'ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to initialize|not supported|No kernels were profiled' \
      "$folder/last.log" && refused=1
    echo "refused or failed: $(basename "$1"), see above"
    return 1
  fi
}

gpu=$(nvidia-smi -L 2>/dev/null | grep GPU || ls /dev/nvidia0 2>/dev/null)
attempt "${all[@]}" || :
if attempt "${one[@]}"; then attempt "${report[@]}"; else show "${report[@]}"; fi
if attempt "${timeline[@]}"; then attempt "${tables[@]}"; else show "${tables[@]}"; fi
rm -f "$folder/last.log"
[ $profiled = 1 ] && exit 0
[ $refused = 1 ] && exit 3
[ -n "$gpu" ] && command -v "$ncu" "$nsys" >/dev/null && exit 1
exit 4
