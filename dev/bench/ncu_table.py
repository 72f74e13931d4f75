#!/usr/bin/env python3
"""What limits each kernel: a table of what `ncu --page raw --csv` printed.

    python dev/bench/ncu_table.py FILE

Lines that the profiled program printed itself are skipped; a figure that ncu did not measure is left empty.
"""

import csv
import re
import sys

# Column, and the names that it has had in versions of ncu.
COLUMNS = {
    "us": ["gpu__time_duration.sum"],
    "issue %": ["smsp__issue_active.avg.pct_of_peak_sustained_active", "smsp__issue_active.avg.per_cycle_active"],
    "sm %": ["sm__throughput.avg.pct_of_peak_sustained_elapsed"],
    "dram %": [
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ],
    "l2 %": ["lts__throughput.avg.pct_of_peak_sustained_elapsed", "lts__t_sectors.avg.pct_of_peak_sustained_elapsed"],
    "warps %": ["sm__warps_active.avg.pct_of_peak_sustained_active"],
    "regs": ["launch__registers_per_thread"],
    "blocks": ["launch__grid_size"],
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
TO_US = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1, "us": 1, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6}


def short(name):
    cutlass = re.search(r"cutlass[0-9x]*_(\w+)", name)
    return cutlass[1] if cutlass else re.sub(r"[<(].*", "", name).removeprefix("void ").rpartition("::")[2]


def number(text):
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def main():
    with open(sys.argv[1], errors="replace") as file:
        lines = [line for line in file if line.startswith('"')]
    rows = list(csv.reader(lines))
    heads = [i for i, row in enumerate(rows) if row[0] == "ID"]
    if not heads:
        sys.exit(f"{sys.argv[1]}: ncu printed no table")
    head, units = rows[heads[0]], rows[heads[0] + 1]
    print(f"{'':41}" + "".join(f"{name:>8}" for name in COLUMNS) + "  warps stalled an issue, by")
    for row in rows[heads[0] + 2 :]:
        if len(row) != len(head):
            continue
        of = {name: (number(value), unit) for name, value, unit in zip(head, row, units)}
        line = f"{short(row[head.index('Kernel Name')])[:40]:41}"
        for column, names in COLUMNS.items():
            name = next((n for n in names if of.get(n, (None,))[0] is not None), None)
            value, unit = of[name] if name else (None, "")
            if value is not None and column == "us":
                value *= TO_US.get(unit, 1)
            if value is not None and name.endswith("per_cycle_active"):
                value *= 100
            digits = 0 if column in ("regs", "blocks") else 1
            line += f"{'' if value is None else f'{value:.{digits}f}':>8}"
        stalls = [(of[n][0], STALL.fullmatch(n)[1]) for n in of if STALL.fullmatch(n) and of[n][0] is not None]
        top = sorted((s for s in stalls if s[1] != "selected"), reverse=True)[:3]
        print(line + "  " + ", ".join(f"{name} {value:.1f}" for value, name in top))


if __name__ == "__main__":
    main()
