#!/usr/bin/env bash
# A run of everything that the CPU program does, in a few seconds, under a tool: dev/check/short_run.sh PROGRAMS TOOL...
# PROGRAMS: the folder with train_gpt_cpu and data_prep. In the environment, SHAPE: flags of the model, DTYPES: its types.
# `make test-memcheck` and `make test-threads` call it.
set -eu
programs=$(cd "$1" && pwd)
shift
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
cd "$work"
for _ in $(seq 100); do printf 'To be, or not to be: that is the question: %s\n' "$(seq -s ' ' 30)"; done >input.txt
printf '\\x%x' $(seq 33 126) | xargs -0 printf >>input.txt  # every character there is in ASCII
"$@" "$programs/data_prep" input.txt --out data
shape="--preset=lecture ${SHAPE:---n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=3} --eval_interval=2 --eval_iters=1"
for dtype in ${DTYPES:-float32}; do
  "$@" "$programs/train_gpt_cpu" $shape --dtype=$dtype --grad_clip=1 --max_iters=4 --threads=2 --out_dir "$dtype"
  "$@" "$programs/train_gpt_cpu" --init_from=resume --checkpoint_secs=0.001 --max_iters=7 --threads=2 --out_dir "$dtype"
  "$@" "$programs/train_gpt_cpu" sample --start=To --max_new_tokens=20 --top_k=5 --out_dir "$dtype"
  "$@" "$programs/train_gpt_cpu" eval --eval_iters=1 --out_dir "$dtype"
  "$@" "$programs/train_gpt_cpu" export --checkpoint=best --out_dir "$dtype"
done
echo "a short run under $1: no complaint"
