#!/bin/sh
# Prints how many compilers make may start at once: one for each processor, or as many as memory has room for. Memory is
# what the machine has free, and what each control group that we are in (a container's, a batch job's) allows. To
# compile a trainer takes 0.6 GB, with nvcc 0.75 GB. Tests give another folder than / as ROOT: dev/setup/jobs.sh [ROOT]
root=${1:-}
groups=$root/sys/fs/cgroup
{
  getconf _NPROCESSORS_ONLN
  {
    awk '/^MemAvailable/ { printf "%.0f\n", 1024 * $2 }' "$root/proc/meminfo"
    # The limit of a group may be its parent's. In version 1 of control groups memory has a tree of its own.
    cut -d : -f 3- "$root/proc/self/cgroup" | while read -r group; do
      while cat "$groups$group/memory.max" "$groups/memory$group/memory.limit_in_bytes"; [ "$group" ]; do
        group=${group%/*}
      done
    done
  } | awk '$1 + 0 > 0 { printf "%.0f\n", $1 < 8e8 ? 1 : int($1 / 8e8) }'
} 2>/dev/null | sort -n | head -n 1
