#!/usr/bin/env bash
# Cost as work grows: a float32 step of the lecture's model with one of its sizes changed at a time.
#   dev/bench/bench_scaling.sh BENCH [T|C|L|B|V|threads ...]   all six in 3 minutes, or those named
# Writes doc/cpu_scaling.csv, where the rows of a size that is not measured stay as they are, and draws
# doc/cpu_scaling.png. Work per token is arithmetic, so the share of the peak says it all: where it falls, the cost grows
# faster than the work. Each row comes from a process of its own; its memory is the most that the process ever had.
set -eu
shopt -s inherit_errexit  # a benchmark that fails ends the script
cd "$(dirname "$0")/../.."
bench=${1:?usage: dev/bench/bench_scaling.sh BENCH [T|C|L|B|V|threads ...]}
shift
[ $# -gt 0 ] || set -- T C L B V threads
csv=doc/cpu_scaling.csv picture=doc/cpu_scaling.png
commit=$(git describe --tags --always 2>/dev/null || echo unknown)
git diff --quiet HEAD -- '*.h' '*.cpp' 2>/dev/null || commit+=-changed
columns=series,commit,dtype,T,C,L,V,B,threads,ms,fastest_ms,slowest_ms,tokens_per_s,gflops,sustained_peak,fastest_peak
columns+=,share_of_sustained,memory_mb,planned_mb

# point SERIES SIZE=...: a row. If its fastest peak is a tenth above the sustained one, others used the machine, and we
# measure it again, twice at most.
point() {
  local row
  for _ in 1 2 3; do
    row="$1,$commit,$("$bench" point "${@:2}")"
    echo "$row" | awk -F, '{ exit !($16 < 1.1 * $15) }' && break
  done
  echo "$row"
}

measure() {  # measure SERIES
  local n cores
  case $1 in
    T) for n in 64 128 256 512 1024 2048; do point T T=$n B=$((2048 / n)); done ;;  # as many tokens in each step
    C) for n in 64 128 256 384 512 768 1024; do point C C=$n; done ;;
    L) for n in 1 2 4 6 12; do point L L=$n; done ;;
    B) for n in 1 2 4 8 16 32; do point B B=$n; done ;;
    V) for n in 65 256 1024 4096 20000; do point V V=$n; done ;;
    threads)
      cores=$("$bench" point T=64 C=64 L=1 B=1 | cut -d, -f7)
      for ((n = 1; n < cores; n *= 2)); do point threads threads=$n; done
      point threads threads="$cores" ;;
    *) echo "bench_scaling: no such size: $1" >&2; return 1 ;;
  esac
}

for series; do
  rows=$(measure "$series")
  { echo "$columns"; [ ! -f $csv ] || tail -n +2 $csv | grep -v "^$series," || :; echo "$rows"; } >$csv.new
  mv $csv.new $csv
  echo "$rows" | awk -F, '{ printf "%-8s T %4d  C %4d  L %2d  B %2d  V %5d  threads %2d  %9.2f ms  %7d tokens/s  " \
    "%5.1f %% of the sustained peak of %.0f GFLOP/s  %5.0f MB, planned %5.0f\n",
    $1, $4, $5, $6, $8, $7, $9, $10, $13, $17, $15, $18, $19 }'
done

# "Intel(R) Xeon(R) Processor" names half a dozen of them, so the picture does not name the machine: the page does.
gnuplot <<END
set terminal pngcairo size 1500,760 font 'Sans,13' background rgb 'white'
set output '$picture'
set datafile separator ','
set multiplot layout 2,4 margins 0.035,0.95,0.07,0.87 spacing 0.088,0.16
set label 1 "A float32 step of the lecture's model, one size changed at a time" at screen 0.012,0.965 font ',16'
set label 2 'share of the sustained peak in %, left' at screen 0.55,0.965 textcolor rgb '#0072B2'
set label 3 'tokens a second, right' at screen 0.80,0.965 textcolor rgb '#D55E00'
set border 11 lc rgb '#404040'
set grid y lc rgb '#E8E8E8' lt 1 lw 1
set tics nomirror out scale 0.6 font ',12'
set yrange [0:100]; set ytics 20 textcolor rgb '#0072B2'
set logscale y2; set y2range [100:1000000]; set y2tics 10 textcolor rgb '#D55E00'; set format y2 '%.0s%c'
set autoscale xfix; set format x '%.0f'
unset key
array name[6] = ['T', 'C', 'L', 'B', 'V', 'threads']
array at[6] = [4, 5, 6, 8, 7, 9]
array words[6] = ['T, context (2048 tokens a step)', 'C, channels', 'L, layers', 'B, sequences', 'V, vocabulary', 'threads']
do for [i = 1:6] {
  set title words[i]
  set xtics auto; set xrange [*:*]; set logscale x 2
  if (i == 3) { set xtics (1, 2, 4, 6, 12) }
  if (i == 5) { set xtics (65, 256, 1024, 4096, 20000); set xrange [64:20500] }
  if (system(sprintf("grep -c '^%s,' $csv || :", name[i])) + 0 > 0) {
    plot '$csv' using (strcol(1) eq name[i] ? column(at[i]) : NaN):17 with linespoints pt 7 lw 2 lc rgb '#0072B2', \
         '' using (strcol(1) eq name[i] ? column(at[i]) : NaN):13 axes x1y2 with linespoints pt 5 lw 1.5 lc rgb '#D55E00'
  }
  unset label
}
unset y2tics; set border 3; set xtics auto
set title 'memory in MB: planned across, used up'
set logscale xy 10; set xrange [10:10000]; set yrange [10:10000]
set ytics autofreq textcolor rgb '#404040'; set format '%.0f'
plot '$csv' using 19:18 with points pt 7 lc rgb '#0072B2', x lc rgb '#707070' dt 2
END
