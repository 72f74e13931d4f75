#!/usr/bin/env python3
"""Which share of the lines and branches do the tests run? A table by file, from what gcov counted.

    python3 dev/check/coverage.py BUILD [--missed FILE]

BUILD is a folder that was compiled with --coverage and whose programs have run; `make coverage` calls this script.
--missed lists the lines of FILE that never ran. A template counts once: a line ran if it ran in any instance of it.
The numbers are of optimized code, in which a line may be merged with its neighbour; read them as a map, not as a score.
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

OURS = re.compile(r"(kernels|host)/[^/]+|train_gpt\.cu|train_gpt_cpu\.cpp|data_prep\.cpp")


def counted(build):
    """What gcov says of every object, as dictionaries."""
    objects = sorted(str(path.resolve()) for path in build.rglob("*.gcda"))
    if not objects:
        sys.exit(f"{build}: nothing was counted there")
    with tempfile.TemporaryDirectory() as folder:
        for i in range(0, len(objects), 20):
            subprocess.run([os.environ.get("GCOV", "gcov"), "--json-format", "--branch-probabilities", "--hash-filenames",
                            "--preserve-paths", *objects[i : i + 20]],
                           cwd=folder, stdout=subprocess.DEVNULL, check=True)
        for path in sorted(Path(folder).glob("*.gcov.json.gz")):
            with gzip.open(path) as file:
                yield json.load(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--missed", default="")
    arguments = parser.parse_args()
    root = Path.cwd()
    lines = defaultdict(lambda: defaultdict(int))  # file -> line -> how often it ran
    branches = defaultdict(lambda: defaultdict(int))  # file -> (line, number) -> how often it was taken
    for report in counted(arguments.build):
        for file in report["files"]:
            name = os.path.relpath(os.path.join(report["current_working_directory"], file["file"]), root)
            if not OURS.fullmatch(name):
                continue
            for line in file["lines"]:
                number = line["line_number"]
                lines[name][number] += line["count"]
                # The source does not show the branches that exceptions take out of calls.
                shown = [b for b in line["branches"] if not b["throw"]]
                for i, branch in enumerate(shown):
                    branches[name][number, i] += branch["count"]
    if arguments.missed:
        text = (root / arguments.missed).read_text().split("\n")
        for number, count in sorted(lines[arguments.missed].items()):
            if not count:
                print(f"{number:5} {text[number - 1]}")
        return

    def row(name, counts, taken):
        def share(numbers):
            ran = sum(n > 0 for n in numbers)
            return f"{ran:6} of {len(numbers):5} {100 * ran / max(1, len(numbers)):6.1f} %"
        print(f"{name:34}{share(counts)}  {share(taken)}")

    print(f"{'':34}{'lines that ran':>23}  {'branches taken':>23}")
    for name in sorted(lines):
        row(name, lines[name].values(), branches[name].values())
    row("together", [n for f in lines.values() for n in f.values()], [n for f in branches.values() for n in f.values()])


if __name__ == "__main__":
    main()
