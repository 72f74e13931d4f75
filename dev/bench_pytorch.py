#!/usr/bin/env python3
"""A training step of the lecture's model by PyTorch on the CPU, in turn with the same step by our benchmark program.

    make bench-pytorch PYTHON=python3          or  python dev/bench_pytorch.py BENCH_BINARY [--threads 2] [--rounds 5]

Both train 10.8 M parameters on batches of 8 x 256 tokens with dropout 0.2 and AdamW. They take turns, so that what
else happens on the machine falls on all of them. `BENCH_BINARY step` is to print a line
`lecture step, B = 8: median X ms (min .. max), Y tokens/s, ...`.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from reference import GPT

B, T, V, DROPOUT = 8, 256, 65, 0.2


class FusedAttention(nn.Module):
    """All heads at once, by the function that PyTorch has for it. With dropout the CPU's version of it still makes the
    (T, T) matrices; without, it would not."""

    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.n_head, self.p = n_head, dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.p if self.training else 0.0)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


def fused_gpt(dropout):
    """The lecture's model with that attention, and the weights that the plain model with the same seed has."""
    torch.manual_seed(1)
    model = GPT(V, dropout=dropout)
    for block in model.blocks:
        plain = block.sa
        n_embd = plain.proj.in_features
        block.sa = FusedAttention(n_embd, len(plain.heads), dropout)
        block.sa.proj = plain.proj
        with torch.no_grad():
            block.sa.qkv.weight.copy_(
                torch.cat([getattr(h, part).weight for part in ("query", "key", "value") for h in plain.heads])
            )
    return model


def plain_gpt(dropout):
    torch.manual_seed(1)
    return GPT(V, dropout=dropout)


class Trainer:
    """One variant: its model, its optimizer and the times of its steps in seconds."""

    def __init__(self, name, model, autocast=False):
        self.name, self.model, self.autocast, self.seconds = name, model, autocast, []
        parameters = dict(lr=1e-4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
        try:
            self.optimizer = torch.optim.AdamW(model.parameters(), fused=True, **parameters)
        except RuntimeError:  # a PyTorch that has it for GPUs only
            self.optimizer = torch.optim.AdamW(model.parameters(), **parameters)

    def step(self):
        x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(x, y)[1]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()
        return time.perf_counter() - start


def our_step(binary, threads):
    """Median, fastest and slowest step, in seconds, by a run of our program."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    printed = subprocess.run([binary, "step"], env=environment, capture_output=True, text=True, check=True).stdout
    found = re.search(rf"^lecture step, B = {B}: median ([\d.]+) ms \(([\d.]+) \.\. ([\d.]+)\)", printed, re.MULTILINE)
    if not found:
        sys.exit(f"{binary} step: no line 'lecture step, B = {B}: median ...' in what it printed:\n{printed}")
    return [float(ms) / 1e3 for ms in found.groups()]


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(r"model name\s*: (.*)", file.read())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", metavar="BENCH_BINARY")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
                        help="of both; the default is OMP_NUM_THREADS, or one for each processor")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each one gets")
    parser.add_argument("--steps", type=int, default=2, help="steps of PyTorch's in one turn")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which is slow to begin")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    # The fused variant must be the same model: without dropout both give the same logits.
    x = torch.randint(V, (1, T))
    with torch.no_grad():
        difference = (plain_gpt(0.0).eval()(x)[0] - fused_gpt(0.0).eval()(x)[0]).abs().max().item()
    if not difference < 1e-5:
        sys.exit(f"the variants are different models: their logits differ by {difference}")

    load = os.getloadavg()[0]  # of others, as a rule: figures from a busy machine say little
    print(f"{processor()}, {options.threads} threads, PyTorch {torch.__version__}, load before {load:.1f}")
    trainers = [
        Trainer("head by head, eager", plain_gpt(DROPOUT)),
        Trainer("fused attention, eager", fused_gpt(DROPOUT)),
        Trainer("fused attention, bf16 autocast", fused_gpt(DROPOUT), autocast=True),
    ]
    if not options.no_compile:
        trainers.insert(2, Trainer("fused attention, torch.compile", torch.compile(fused_gpt(DROPOUT))))
    for trainer in list(trainers):
        try:
            for _ in range(2):
                trainer.step()
        except Exception as error:
            if "compile" not in trainer.name:
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            print(f"skipped torch.compile, which does not work here: {reason.strip()}")
            trainers.remove(trainer)

    ours = []
    for turn in range(options.rounds):
        print(f"\rround {turn + 1} of {options.rounds}", end="", file=sys.stderr, flush=True)
        ours.append(our_step(options.binary, options.threads))
        for trainer in trainers:
            trainer.seconds += [trainer.step() for _ in range(options.steps)]
    print(file=sys.stderr)

    our_median = statistics.median(run[0] for run in ours)
    rows = [("microGPT, fp32", our_median, min(run[1] for run in ours), max(run[2] for run in ours))]
    rows += [("PyTorch, " + t.name, statistics.median(t.seconds), min(t.seconds), max(t.seconds)) for t in trainers]
    print(f"a step of {B} x {T} tokens, dropout {DROPOUT}, in {options.rounds} rounds")
    print(f"{'':41}{'median':>9}{'fastest':>10}{'slowest':>10}{'tokens/s':>10}   ours is")
    for name, median, fastest, slowest in rows:
        print(f"{name:41}{median:7.3f} s{fastest:8.3f} s{slowest:8.3f} s{B * T / median:10.0f}"
              f"   {median / our_median:.2f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
