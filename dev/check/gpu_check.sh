#!/usr/bin/env bash
# Checks all that only a GPU can show, in eight minutes and one command, the most valuable first:
#   dev/check/gpu_check.sh [STAGE ...]   build tests step lab kernels ceilings run sanitizer ncu peer; these, if none is
#                                        named; after a change `tests step kernels run` are enough; products, by name
#                                        alone, is what can be fused to each product
#   dev/check/gpu_check.sh pack FOLDER   builds everything here, without a GPU, for a machine that cannot build: FOLDER
#                                        then has programs, libraries and data; ARCH=90 MARCH=x86-64-v3, if not set
#   PREBUILT=FOLDER dev/check/gpu_check.sh
#                                        the same stages with those programs; needs the repository's dev/ beside FOLDER
# Results go to $OUT, or to out/gpu_check. log.txt grows as the stages run. summary.md is written anew after each stage
# and holds a section for doc/performance.md. Each stage has a time limit, which LIMIT_peer=300, say, changes.
# A stage passes, fails, is refused (the machine does not let a tool work) or is not run (no GPU, no tool). The script
# ends with 0 if all passed or were refused.
# shellcheck disable=SC2317  # the stages are called by name
set -u -o pipefail
cd "$(dirname "$0")/../.." || exit 1
all_stages=(build tests step lab kernels ceilings run sanitizer ncu peer)
declare -A limit=([build]=10 [tests]=40 [step]=100 [lab]=85 [kernels]=20 [ceilings]=13 [run]=75 [sanitizer]=50 [ncu]=27
  [peer]=60 [products]=42)
[ -n "${PREBUILT:-}" ] || limit[build]=600

# The choices (kernels/choices.cuh) that a step is measured with: first the card's own, then each one to compare.
step_variants=('' 'attention_backward=2' 'attention_forward=2 attention_backward=2' 'kernel_starts=2' 'weight_gradients=2'
  'attention_forward=2 attention_backward=2 attention_masks=2')

passed=0 failed=1 refused=3 not_run=4  # exit codes of a stage
results=${OUT:-out/gpu_check}
have() { command -v "$1" >/dev/null; }
say() { printf '%s\n' "$*"; }
note() { say "$*" | tee -a "$work/$stage.note"; }       # for the summary's table
page() { tee -a "$work/$stage.md"; }                    # for the summary's section
block() { { say '```'; cat; say '```'; say; } | page; }
gpu() { nvidia-smi -L 2>/dev/null | grep GPU >/dev/null || [ -e /dev/nvidia0 ]; }
need_gpu() { gpu || { note 'no GPU'; exit "$not_run"; }; }

# ----------------------------------------------------------------------------------------------------------------------
# The programs

cxx=${CXX:-g++}
if gpu; then arch=${ARCH:-native} march=${MARCH:-native}; else arch=${ARCH:-90} march=${MARCH:-x86-64-v3}; fi
if [ -n "${PREBUILT:-}" ]; then
  train_gpt=$PREBUILT/train_gpt run_tests=$PREBUILT/run_tests bench_gpu=$PREBUILT/bench_gpu lab=$PREBUILT/lab
  data=$PREBUILT/data
else
  build=build/$(basename "$cxx")
  [ "$march" = native ] || build+=-$march
  build+=/cuda-$arch
  train_gpt=$build/train_gpt run_tests=$build/test/run_tests bench_gpu=$build/dev/bench/bench_gpu lab=$build/lab
  data=${DATA:-data}
fi
programs=("$train_gpt" "$run_tests" "$bench_gpu" "$lab")
make_programs() { make ARCH="$arch" MARCH="$march" "${programs[@]}" "$@"; }

# The packed libraries are for these programs alone: Python and the profilers have their own. We take the compiler's
# only where the machine has none, or older ones. cuBLASLt, half a gigabyte, is the machine's own: the program itself
# says which file it looks for, if it finds none.
libraries() {
  local folder library path=$PREBUILT/lib
  LD_LIBRARY_PATH=$path ldd "$train_gpt" 2>&1 | grep -E '(libstdc|libgcc|libgomp|GLIBCXX).*not found' >/dev/null &&
    path+=:$PREBUILT/lib/compiler
  library=$(LD_LIBRARY_PATH=$path "$train_gpt" --version 2>/dev/null | grep -o '(libcublasLt\.so[^:]*' | tr -d '(')
  for folder in /usr/local/cuda*/lib64 /usr/local/cuda*/targets/*/lib \
    $(python3 -c 'import glob, nvidia; print(*(f for p in nvidia.__path__ for f in glob.glob(p + "/*/lib")))' 2>&1); do
    [ -n "$library" ] && [ -e "$folder/$library" ] && path+=:$folder && break
  done
  say "$path"
}
start() {  # start PROGRAM ARGUMENTS...: with those libraries
  [ -n "${PREBUILT:-}" ] || { "$@"; return; }
  : "${library_path:=$(libraries)}"
  LD_LIBRARY_PATH=$library_path "$@"
}
need_programs() {
  need_gpu
  local program
  for program; do [ -x "$program" ] || { note "$program was not built"; exit "$not_run"; }; done
}

pack() {
  local folder=$1 program library
  # Compressed, they are a quarter as large; the driver unpacks them.
  NVCC_APPEND_FLAGS='-Xfatbin -compress-all' make_programs || exit 1
  [ -s "$data/vocab.json" ] || make data || exit 1
  mkdir -p "$folder/lib/compiler" "$folder/data" || exit 1
  for program in "${programs[@]}"; do
    strip --strip-debug -o "$folder/$(basename "$program")" "$program" || exit 1
  done
  # We leave out the C library, which belongs to the other machine's kernel and loader, and what comes with its driver
  # or CUDA.
  ldd "${programs[@]}" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
    grep -vE '/(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|cuda|nvidia.*))\.so' |
    while read -r library; do
      case $library in
        */libstdc++* | */libgcc_s* | */libgomp*) cp -L "$library" "$folder/lib/compiler/" ;;
        *) cp -L "$library" "$folder/lib/" ;;
      esac
    done
  cp "$data"/*.bin "$data"/*.json "$folder/data/"
  [ ! -e "$data/input.txt" ] || cp "$data/input.txt" "$folder/data/"
  commit >"$folder/commit"
  say "$folder: $(du -sh "$folder" | cut -f 1), for sm_$arch and $march; next: PREBUILT=$folder dev/check/gpu_check.sh"
}
commit() {
  if [ -n "${PREBUILT:-}" ]; then cat "$PREBUILT/commit" 2>/dev/null && return; fi
  git describe --always --dirty 2>/dev/null || say unknown
}

# ----------------------------------------------------------------------------------------------------------------------
# The stages

stage_build() {
  if [ -n "${PREBUILT:-}" ]; then
    need_programs "${programs[@]}"
    if start ldd "${programs[@]}" 2>&1 | grep 'not found'; then
      note 'a library is missing'
      exit "$failed"
    fi
    note "prebuilt, $(commit)"
    return
  fi
  make_programs data || { note 'make failed'; exit "$failed"; }
  note "sm_$arch, $march, $(commit)"
}

counts() { grep -E '^[0-9]+ passed, [0-9]+ failed' "$1" | tail -n 1; }

stage_tests() {
  need_programs "$run_tests"
  start "$run_tests" '-#' '[cuda]~[#test_lab]' 2>&1 | tee "$work/tests.log"  # the lab has a stage of its own
  local status=${PIPESTATUS[0]}
  note "$(counts "$work/tests.log" | grep . || say "no counts, exit code $status")"
  case $(counts "$work/tests.log") in '' | 0*) exit "$failed" ;; esac
  [ "$status" = 0 ] || exit "$failed"
}

bench() {  # bench COMMAND TITLE: what bench_gpu prints goes to the log and the summary
  need_programs "$bench_gpu"
  start "$bench_gpu" "$1" | tee "$work/$1.log" || exit "$failed"
  { say "#### $2"; say; } | page
  block <"$work/$1.log"
}

stage_products() {
  bench products Products
  note "$(grep -cE '/[0-9?]+/[0-9?]+ ' "$work/products.log") lines, $(grep -c 'failed:' "$work/products.log") failed"
}

# The types that are used most come first, the others if there is time for them.
stage_step() {
  need_programs "$bench_gpu"
  local variant dtype status
  {
    status=$passed
    for variant in "${step_variants[@]}"; do
      [ $((seconds - SECONDS)) -gt 17 ] || { say "left out, the time is up: $variant"; continue; }
      say "--- step bfloat16 $variant"
      # shellcheck disable=SC2086
      start "$bench_gpu" step bfloat16 $variant || status=$failed
    done
    [ $((seconds - SECONDS)) -le 12 ] || start "$bench_gpu" start bfloat16 || status=$failed
    [ $((seconds - SECONDS)) -le 11 ] || start "$bench_gpu" sample bfloat16 || status=$failed
    local -A takes=([tf32 attention_float=2]=20 [float32 attention_float=2]=20 [float16]=20 [tf32]=22 [float32]=24)
    for dtype in 'tf32 attention_float=2' 'float32 attention_float=2' float16 tf32 float32; do
      [ $((seconds - SECONDS)) -gt "${takes[$dtype]}" ] || { say "left out, the time is up: $dtype"; continue; }
      say "--- step $dtype"
      # shellcheck disable=SC2086
      start "$bench_gpu" step $dtype || status=$failed
    done
    exit "$status"
  } | tee "$work/step.log"
  status=${PIPESTATUS[0]}
  { say '#### A training step, an evaluation batch'; say; } | page
  block <"$work/step.log"
  note "$(grep -m 1 -E '^step .* graph' "$work/step.log" | tr -s ' ')"
  exit "$status"
}

# Every version of every operation. What won goes to kernels/choices_table.h: lab choose lab.csv.
stage_lab() {
  need_programs "$lab"
  rm -f "$results/lab.csv"
  LAB_CSV=$results/lab.csv start "$lab" all 20 | tee "$work/lab.log"
  local status=${PIPESTATUS[0]}
  { say '#### The lab: every kernel from naive to shipped'; say; } | page
  block <"$work/lab.log"
  note "$(wc -l <"$results/lab.csv") lines, $(grep -E '^[0-9]+ operations' "$work/lab.log" || say 'not finished')"
  [ "$status" = 0 ] || exit "$failed"
}

stage_kernels() {
  bench kernels 'Kernel by kernel'
  note "$(grep '^a step:' "$work/kernels.log")"
}

stage_ceilings() {
  bench ceilings Ceilings
  note "$(grep '^copy' "$work/ceilings.log" | tr -s ' ')"
}

# The whole run twice. The second takes the first one's algorithms for the products, and so must write the same bytes.
stage_run() {
  need_programs "$train_gpt"
  local i begin out status file worst=$passed text=no shakespeare
  shakespeare=$(sed -n 's/^sha256=//p' dev/setup/get_text.sh)
  have sha256sum && [ "$(sha256sum "$data/input.txt" 2>/dev/null | cut -d ' ' -f 1)" = "$shakespeare" ] && text=yes
  for i in 1 2; do
    out=$work/run$i
    mkdir -p "$out"
    [ "$i" = 1 ] || cp "$work/run1/matmul_algorithms.txt" "$out/" || worst=$failed
    begin=$EPOCHREALTIME
    # RUN_FLAGS: to try this script where five thousand steps take too long
    # shellcheck disable=SC2086
    start "$train_gpt" --device cuda --preset lecture --data "$data" --out_dir "$out" ${RUN_FLAGS:-} >"$out/stdout"
    status=$?
    awk -v begin="$begin" -v end="$EPOCHREALTIME" 'BEGIN { printf "%.2f\n", end - begin }' >"$out/wall"
    grep -E '^(step|val exact)' "$out/stdout"
    [ "$status" = 0 ] || { note "run $i: exit code $status"; exit "$failed"; }
    { grep -o '"train_seconds":[0-9.]*' "$out/metrics.jsonl" | cut -d : -f 2; say 0; } | head -n 1 >"$out/train"
    grep -o '"time_ms":[0-9.]*' "$out/metrics.jsonl" | cut -d : -f 2 | sort -n |
      awk '{ t[NR] = $1 } END { print t[int((NR + 1) / 2)] }' >"$out/ms"
    note "run $i: $(cat "$out/wall") s from process start to end, $(cat "$out/train") s from first to last step" \
      "with evaluations, $(cat "$out/ms") ms a step (median)"
  done
  cp "$work/run1/metrics.jsonl" "$work/run1/matmul_algorithms.txt" "$results/"
  for file in ckpt_last.safetensors ckpt_best.safetensors microGPT_model.pth sample.txt; do
    cmp "$work/run1/$file" "$work/run2/$file" || { note "run 1 and run 2: $file differs"; worst=$failed; }
  done
  [ "$worst" = "$failed" ] || note 'both runs wrote the same checkpoints, bit for bit'
  { say '#### The whole run, twice'; say; } | page
  sed 's/^/- /' "$work/run.note" | page
  { say; say '| step | train | in | val | in |'; say '|---|---|---|---|---|'; } | page
  awk -v text="$text" '
    FNR == NR { if ($1 !~ /^#/) { tl[$1] = $2; th[$1] = $3; vl[$1] = $4; vh[$1] = $5 } next }
    /^step [0-9]+:/ {
      step = $2 + 0; train = $5 + 0; val = $8 + 0
      if (text == "no" || !(step in tl)) { printf "| %d | %.4f | | %.4f | |\n", step, train, val; next }
      seen++
      in_train = train >= tl[step] && train <= th[step]; in_val = val >= vl[step] && val <= vh[step]
      if (!in_train || !in_val) outside = outside " " step
      printf "| %d | %.4f | %s to %s%s | %.4f | %s to %s%s |\n", step, train, tl[step], th[step],
        in_train ? "" : ": OUTSIDE", val, vl[step], vh[step], in_val ? "" : ": OUTSIDE"
    }
    END { print seen + 0 outside > "/dev/stderr" }' dev/check/bands.txt "$work/run1/stdout" 2>"$work/bands" | page
  { say; grep '^val exact' "$work/run1/stdout" | sed 's/^v/V/; s/$/, run 1/'; say; } | page
  if [ "$text" = no ]; then
    note 'losses not compared with dev/check/bands.txt: the text is not Tiny Shakespeare'
  elif [ "$(cat "$work/bands")" = 11 ]; then
    note 'all losses lie within the bands of dev/check/bands.txt'
  else
    note "losses outside of the bands of dev/check/bands.txt, or missing: compared, outside: $(cat "$work/bands")"
    worst=$failed
  fi
  exit "$worst"
}

# Before we believe a tool, it has to find the errors of a kernel that has some. Errors in the library's kernels are not
# ours. racecheck ends itself ("failed to handle a hardware exception") in every process that computes products by
# cuBLASLt, even if it is told to look only at a kernel without shared memory: so it checks our kernels in the tests
# without products. initcheck sees little of them: all memory is filled before it is used, with NaN in the tests, with
# zeros in the trainer.
library_kernels='cublas|cutlass|nvjet|splitKreduce|globalKernel'
stage_sanitizer() {
  need_programs "$run_tests" "$bench_gpu"
  local sanitizer=compute-sanitizer tool part worst=$passed
  have "$sanitizer" || sanitizer=/usr/local/cuda/bin/compute-sanitizer
  have "$sanitizer" || { note 'compute-sanitizer was not found'; exit "$not_run"; }

  left() { say $((seconds - SECONDS - 6)); }
  look() {  # look NAME TOOL PROGRAM...: in the background
    local name=$2-$1 at_most
    at_most=$(left)
    {
      start timeout --kill-after=2 "$at_most" "$sanitizer" --tool "$2" --kernel-name kns=_kernel --error-exitcode 9 \
        "${@:3}" >"$work/$name.log" 2>&1
      say $? >"$work/$name.status"
      say "$name: $(verdict "$name")"
    } &
  }
  verdict() {
    local log=$work/$1.log status found
    status=$(cat "$work/$1.status" 2>/dev/null) || { say 'not run, the time was up'; return; }
    if grep 'Internal Sanitizer Error' "$log" >/dev/null; then  # whatever code it ends with
      say "own failure: $(grep -m 1 -A 2 'Internal Sanitizer Error' "$log" | tr -d = | tr -s ' \n' ' ' | cut -c 1-250)"
      return
    fi
    case $status in
      0) if grep -E 'SUMMARY: 0 ' "$log" >/dev/null; then say clean; else say 'own failure: no summary'; fi ;;
      9)
        found=$(grep -E '^=+ .* at .*\(' "$log" | grep -vE "Host Frame|$library_kernels" | head -n 1 | tr -d =)
        if [ -n "$found" ]; then
          say "ERRORS: $(grep SUMMARY "$log" | tail -n 1 | tr -d =), first $(cut -c 1-160 <<<"$found")"
        else
          say "clean but for the library's own $(grep -oE "$library_kernels" "$log" | sort -u | paste -s -d ' ')"
        fi
        ;;
      124) say 'not finished' ;;
      *) say "FAILED, exit code $status: $(grep -E '^=+ .*(rror|xception|nternal)' "$log" | head -n 1)" ;;
    esac
  }

  # racecheck is slow: a process for each file of tests. What both others look at in one process comes in two parts too.
  local parts=(adamw attention column_sums crossentropy dropout embedding layernorm sampler)
  for tool in memcheck racecheck initcheck; do
    look planted "$tool" "$bench_gpu" planted
    look products "$tool" "$run_tests" '-#' '[matmul]'
    look step "$tool" "$bench_gpu" profile bfloat16 --batch_size 2
    [ "$tool" = racecheck ] || look tests "$tool" "$run_tests" '-#' '[cuda]~[matmul]~[#test_cuda_model]~[#test_lab]'
  done
  for part in "${parts[@]}"; do look "$part" racecheck "$run_tests" '-#' "[cuda][#test_cuda_$part]"; done
  wait

  { say '#### Sanitizers'; say; } | page
  for tool in memcheck racecheck initcheck; do
    case $(verdict "$tool-planted") in
      ERRORS*) note "$tool sees planted errors" ;;
      *) note "$tool is refused, it does not find planted errors: $(verdict "$tool-planted")"; worst=$refused ;;
    esac
    for part in tests "${parts[@]}" products step; do
      [ ! -e "$work/$tool-$part.log" ] ||
        note "$tool, $part: $(verdict "$tool-$part") $(counts "$work/$tool-$part.log")"
    done
  done
  sed 's/^/- /' "$work/sanitizer.note" | page
  if grep 'own failure' "$work/sanitizer.note" >/dev/null; then worst=$refused; fi
  if grep -E 'ERRORS|FAILED|not (finished|run)' "$work/sanitizer.note" >/dev/null; then worst=$failed; fi
  head -n 60 "$work"/*check-*.log >"$results/sanitizer.txt" 2>&1
  exit "$worst"
}

# What limits the kernels of a step; a model of one layer has them all. We know the library's products by their order,
# not by their names: head dX, head dW, then fcproj dX. --clock-control none: the clocks that training has.
stage_ncu() {
  need_programs "$bench_gpu"
  local ncu=ncu path
  for path in /opt/nvidia/nsight-compute/*/ncu /usr/local/cuda/bin/ncu; do
    have "$ncu" || [ ! -x "$path" ] || ncu=$path
  done
  have "$ncu" || { note 'ncu was not found'; exit "$not_run"; }
  local sections=() section
  for section in SpeedOfLight SchedulerStats WarpStateStats Occupancy LaunchStats MemoryWorkloadAnalysis; do
    sections+=(--section "$section")
  done
  mkdir -p "$work/ncu"  # where the run was made, its products' algorithms need not be found again
  cp "$results/matmul_algorithms.txt" "$work/ncu/" 2>/dev/null
  start timeout --kill-after=2 $((seconds - 3)) "$ncu" --profile-from-start off --clock-control none "${sections[@]}" \
    --launch-count 60 --page raw --csv --print-units base "$bench_gpu" profile bfloat16 --n_layer 1 \
    --out_dir "$work/ncu" >"$results/ncu.csv" 2>&1
  local status=$?
  if grep -E 'ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to initialize|not supported' "$results/ncu.csv"; then
    note 'the machine does not let it count'
    exit "$refused"
  fi
  if ! "${PYTHON:-python3}" dev/bench/ncu_table.py "$results/ncu.csv" | tee "$work/ncu.log"; then
    tail -n 20 "$results/ncu.csv"
    note "no table, exit code $status"
    exit "$failed"
  fi
  { say '#### What limits the kernels'; say; } | page
  block <"$work/ncu.log"
  note "$(($(wc -l <"$work/ncu.log") - 1)) kernels"
}

stage_peer() {
  need_gpu
  local python=${PYTHON:-python3} wrapper=$work/bench_gpu
  if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    note "$python has no PyTorch that sees the GPU"
    exit "$not_run"
  fi
  if [ -x "$bench_gpu" ]; then
    printf '#!/bin/sh\nexec env %q %q "$@"\n' "LD_LIBRARY_PATH=${PREBUILT:+$(libraries):}${LD_LIBRARY_PATH:-}" \
      "$(realpath "$bench_gpu")" >"$wrapper"
    chmod +x "$wrapper"
  else
    wrapper=
  fi
  PYTHONUNBUFFERED=1 "$python" dev/bench/bench_pytorch.py --device cuda --fused-only --budget $((seconds - 25)) \
    ${wrapper:+"$wrapper"} |
    tee "$work/peer.log" || exit "$failed"
  { say '#### Beside PyTorch'; say; } | page
  block <"$work/peer.log"
  note "$(grep -c '^PyTorch' "$work/peer.log") variants of PyTorch"
}

# ----------------------------------------------------------------------------------------------------------------------

summary() {  # what the stages left in $work, as Markdown
  local device s
  device=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
  say "### ${device:-no GPU}, $(date -u +%Y-%m-%d), commit $(commit)"
  say
  say '| stage | result | seconds | |'
  say '|---|---|---|---|'
  for s in "${stages[@]}"; do
    say "| $s | $(cat "$work/$s.result" 2>/dev/null || say 'not run') | $(cat "$work/$s.seconds" 2>/dev/null) |" \
      "$(sed 's/|/\\|/g' "$work/$s.note" 2>/dev/null | paste -s -d ';' | sed 's/;/; /g') |"
  done
  say
  for s in "${stages[@]}"; do cat "$work/$s.md" 2>/dev/null; done
}

case ${1:-} in
  pack) pack "${2:?usage: dev/check/gpu_check.sh pack FOLDER}" && exit 0 ;;
  stage)  # one stage, in a process that a time limit can end
    stage=$2 seconds=$3 work=$4
    "stage_$stage"
    exit $?
    ;;
esac
[ $# -gt 0 ] && stages=("$@") || stages=("${all_stages[@]}")
for stage in "${stages[@]}"; do
  [ -n "${limit[$stage]:-}" ] || { say "'$stage' is none of: ${all_stages[*]} products" >&2; exit 1; }
done
mkdir -p "$results" || exit 1
results=$(realpath "$results")
export OUT=$results
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
: >"$results/log.txt"
ended=0
for stage in "${stages[@]}"; do
  variable=LIMIT_$stage
  seconds=${!variable:-${limit[$stage]}} began=$SECONDS
  say "=== $stage (at most $seconds s)" | tee -a "$results/log.txt"
  timeout --kill-after=5 "$seconds" "$0" stage "$stage" "$seconds" "$work" 2>&1 | tee -a "$results/log.txt"
  status=${PIPESTATUS[0]}
  case $status in
    "$passed") result=passed ;;
    "$refused") result=refused ;;
    "$not_run") result='not run' ended=1 ;;
    124 | 137) result="failed: not finished in $seconds s" ended=1 ;;
    *) result=failed ended=1 ;;
  esac
  say "$result" >"$work/$stage.result"
  say $((SECONDS - began)) >"$work/$stage.seconds"
  summary >"$results/summary.md"
done
say
say "=== summary, also in $results/summary.md"
sed -n '/^| stage/,/^$/p' "$results/summary.md"
exit "$ended"
