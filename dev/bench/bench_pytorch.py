#!/usr/bin/env python3
"""A training step of the lecture's model and, on the CPU, its matrix products by PyTorch, in turn with our program's.

    make bench-pytorch PYTHON=python3    or  python dev/bench/bench_pytorch.py BENCH_BINARY [--threads 2] [--rounds 5]
    make bench-pytorch DEVICE=cuda       or  python dev/bench/bench_pytorch.py --device cuda [BENCH_GPU_BINARY]

Both train 10.8 M parameters with dropout 0.2 and AdamW, on batches of 8 x 256 tokens on the CPU and of 64 x 256 on a
GPU. They take turns, so that what else happens on the machine falls on all of them. `BENCH_BINARY step DTYPE` is to
print a line `lecture step, B = 8: median X ms (min .. max), Y tokens/s, ...`, and `BENCH_GPU_BINARY step bfloat16` the lines
`step bfloat16 graph median X ms (min .. max), ...` and `evaluate bfloat16 median ...`. `BENCH_BINARY products DTYPE` is to
answer each line such as `forward 2048 384 1152`, a product and its rows, inputs and outputs, with its milliseconds and
the peak in GFLOP/s that the machine sustained meanwhile.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "check"))
from reference import GPT  # noqa: E402

B, T, V, C, L, DROPOUT = 8, 256, 65, 384, 6, 0.2


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


def our_steps(binary, threads, dtype):
    """[(median, fastest, slowest)] of our program's steps in seconds; [] where the processor does not have the type."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    run = subprocess.run([binary, "step", dtype], env=environment, capture_output=True, text=True)
    if "AVX512_BF16" in run.stderr:
        return []
    printed = run.stdout
    found = re.search(rf"^lecture step, B = {B}: median ([\d.]+) ms \(([\d.]+) \.\. ([\d.]+)\)", printed, re.MULTILINE)
    if not found:
        sys.exit(f"{binary} step: no line 'lecture step, B = {B}: median ...' in what it printed:\n{printed}{run.stderr}")
    return [tuple(float(ms) / 1e3 for ms in found.groups())]


def compare_steps(options):
    """Whole steps, in turn."""
    # The fused variant must be the same model: without dropout both give the same logits.
    x = torch.randint(V, (1, T))
    with torch.no_grad():
        difference = (plain_gpt(0.0).eval()(x)[0] - fused_gpt(0.0).eval()(x)[0]).abs().max().item()
    if not difference < 1e-5:
        sys.exit(f"the variants are different models: their logits differ by {difference}")

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

    ours = {"float32": [], "bfloat16": []}
    for turn in range(options.rounds):
        print(f"\rround {turn + 1} of {options.rounds}", end="", file=sys.stderr, flush=True)
        for dtype, runs in ours.items():
            runs += our_steps(options.binary, options.threads, dtype)
        for trainer in trainers:
            trainer.seconds += [trainer.step() for _ in range(options.steps)]
    print(file=sys.stderr)

    medians = {dtype: statistics.median(run[0] for run in runs) for dtype, runs in ours.items() if runs}
    rows = [(f"microGPT, {dtype}", median, min(r[1] for r in ours[dtype]), max(r[2] for r in ours[dtype]))
            for dtype, median in medians.items()]
    rows += [("PyTorch, " + t.name, statistics.median(t.seconds), min(t.seconds), max(t.seconds)) for t in trainers]
    print(f"a step of {B} x {T} tokens, dropout {DROPOUT}, in {options.rounds} rounds")
    print(f"{'':41}{'median':>9}{'fastest':>10}{'slowest':>10}{'tokens/s':>10}   ours, of the same type, is")
    for name, median, fastest, slowest in rows:
        ours_of_type = medians.get("bfloat16" if "bf16" in name else "float32", median)
        faster = f"{median / ours_of_type:.2f} times as fast" if name.startswith("PyTorch") else ""
        print(f"{name:41}{median:7.3f} s{fastest:8.3f} s{slowest:8.3f} s{B * T / median:10.0f}   {faster}")


class OurProducts:
    """Our program, which times a product whenever it is asked to."""

    def __init__(self, binary, threads, dtype):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.program = subprocess.Popen([binary, "products", dtype], env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def time(self, which, inputs, outputs):
        """(seconds, sustained peak in GFLOP/s); None where the processor does not have the type."""
        try:
            self.program.stdin.write(f"{which} {B * T} {inputs} {outputs}\n")
            self.program.stdin.flush()
            ms, peak = map(float, self.program.stdout.readline().split())
            return ms / 1e3, peak
        except (BrokenPipeError, ValueError):
            message = self.program.stderr.read()
            if "AVX512_BF16" in message:
                return None
            sys.exit(f"{self.program.args}: no time of a product: {message}")


def pytorch_product(which, inputs, outputs, dtype):
    """PyTorch's same product, as a function. Its bfloat16 operands and results are bfloat16 in memory already; ours are
    float32 there and are rounded on the way."""
    x, y = torch.randn(B * T, inputs, dtype=dtype), torch.randn(B * T, outputs, dtype=dtype)
    w = torch.randn(outputs, inputs, dtype=dtype)
    return {
        "forward": lambda: torch.mm(x, w.t(), out=y),
        "dX": lambda: torch.mm(y, w, out=x),
        "dW": lambda: torch.addmm(w, y.t(), x, out=w),  # added to the gradient that is there, as ours is
    }[which]


def median_seconds(work, runs=5):
    work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compare_products(options):
    """The products of a step's linear layers without anything around them. The two take turns at each product in each
    round, now the one first, now the other, and what counts is the median of the rounds' ratios."""
    rounds = 3 * options.rounds  # a round takes seconds
    layers = {"qkv": (C, 3 * C, L), "attproj": (C, C, L), "fc": (C, 4 * C, L), "fcproj": (4 * C, C, L), "head": (C, V, 1)}
    products = [(layer, which) for layer in layers for which in ("forward", "dX", "dW")]
    for dtype in "float32", "bfloat16":
        ours = OurProducts(options.binary, options.threads, dtype)
        if ours.time("forward", C, V) is None:
            continue
        times = {product: [] for product in products}  # of each round: ours, the peak, PyTorch's
        for turn in range(rounds):
            print(f"\r{dtype} products, round {turn + 1} of {rounds}", end="", file=sys.stderr, flush=True)
            shift = turn * len(products) // rounds
            for number, product in enumerate(products[shift:] + products[:shift]):
                (inputs, outputs, _), which = layers[product[0]], product[1]
                theirs = pytorch_product(which, inputs, outputs, getattr(torch, dtype))
                first = median_seconds(theirs) if (turn + number) % 2 else None
                time.sleep(0.02)  # PyTorch's threads wait busily for a while
                answer = ours.time(which, inputs, outputs)
                times[product].append((*answer, first or median_seconds(theirs)))
        print(file=sys.stderr)
        ours.program.stdin.close()

        print(f"\nproducts of {B * T} rows, {dtype}, in {rounds} rounds, of which the middle half is in brackets; shares are of the sustained"
              f" peak, {statistics.median(peak for runs in times.values() for _, peak, _ in runs):.0f} GFLOP/s")
        print(f"{'':17}{'microGPT':>18}{'PyTorch':>18}   ours is")

        def row(name, gflop, runs):
            ratios = sorted(theirs / mine for mine, _, theirs in runs)
            low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            line = f"{name:17}"
            for i in 0, 2:
                rate = statistics.median(gflop / run[i] for run in runs)
                line += f"{rate:8.0f} GF/s {statistics.median(100 * gflop / run[i] / run[1] for run in runs):3.0f} %"
            print(f"{line}   {statistics.median(ratios):.3f} times as fast ({low:.3f} .. {high:.3f})")

        gflops = {layer: 2e-9 * B * T * inputs * outputs for layer, (inputs, outputs, _) in layers.items()}
        for layer, which in products:
            row(f"{layer} {which}", gflops[layer], times[layer, which])
        totals = []  # of each round: the seconds of all products of a step, each as often as a step calls it
        for turn in range(rounds):
            calls = [(layers[layer][2], runs[turn]) for (layer, _), runs in times.items()]
            totals.append((sum(n * run[0] for n, run in calls), statistics.median(run[1] for _, run in calls),
                           sum(n * run[2] for n, run in calls)))
        row("all of a step", sum(3 * layers[layer][2] * gflop for layer, gflop in gflops.items()), totals)


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(r"model name\s*: (.*)", file.read())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU. The text and its batches are there from the beginning, and nothing waits for a step to end, so that PyTorch
# has no work that ours is spared.

GPU_B = 64


class GpuTrainer:
    """One variant: seconds of a step and of an evaluation batch, each the mean over a turn, and those of its start."""

    def __init__(self, name, model, text, precision, autocast=False, compile_mode=None, steps=100):
        self.name, self.text, self.precision, self.autocast, self.steps = name, text, precision, autocast, steps
        self.compiled = compile_mode is not None
        self.model = model.to(text.device)
        self.run = torch.compile(self.model, mode=compile_mode) if self.compiled else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True
        )
        self.step_seconds, self.eval_seconds, self.start_seconds = [], [], None

    def batch(self):
        starts = torch.randint(len(self.text) - T, (GPU_B, 1), device=self.text.device)
        at = starts + torch.arange(T, device=self.text.device)
        return self.text[at], self.text[at + 1]

    def loss(self):
        if self.compiled:  # the graph of the step before may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.text.device.type, torch.bfloat16, enabled=self.autocast):
            return self.run(*self.batch())[1]

    def step(self):
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def train(self, steps):
        self.model.train()
        return self.measured(self.step, steps)

    def evaluate(self, batches):
        self.model.eval()
        total = torch.zeros((), device=self.text.device)
        with torch.no_grad():
            return self.measured(lambda: total.add_(self.loss()), batches)

    def measured(self, work, times):
        """The seconds that one call of work takes."""
        torch.set_float32_matmul_precision(self.precision)  # high: TF32
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def start(self):
        """Compiles, and whatever else happens only once."""
        begin = time.perf_counter()
        self.train(5)
        self.evaluate(3)
        self.train(5)
        self.start_seconds = time.perf_counter() - begin

    def turn(self):
        for _ in range(3):
            self.step_seconds.append(self.train(self.steps))
        self.eval_seconds.append(self.evaluate(self.steps))


def our_gpu_step(binary):
    """Median, fastest and slowest in seconds, of a step as a graph and of an evaluation batch, by our program."""
    command = [binary, "step", "bfloat16"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = []
    for what in "step bfloat16 graph", "evaluate bfloat16":
        found = re.search(rf"^{what} +median +([\d.]+) ms \(([\d.]+) \.\. ([\d.]+)\)", printed, re.MULTILINE)
        if not found:
            sys.exit(f"{' '.join(command)}: no line '{what} median ...' in what it printed:\n{printed}")
        results.append([float(ms) / 1e3 for ms in found.groups()])
    return results


def main_gpu(options):
    begin = time.perf_counter()
    device = torch.device("cuda")
    torch.manual_seed(1)
    text = torch.randint(V, (1_000_000,), device=device)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    variants = [  # name, model, and what else a GpuTrainer wants
        ("head by head, fp32", plain_gpt, dict(precision="highest", steps=20)),
        ("head by head, TF32", plain_gpt, dict(precision="high", steps=40)),
        ("fused attention, bf16 autocast", fused_gpt, dict(precision="high", autocast=True)),
        ("the same, torch.compile", fused_gpt, dict(precision="high", autocast=True, compile_mode="default")),
        ("the same, CUDA graphs", fused_gpt, dict(precision="high", autocast=True, compile_mode="reduce-overhead")),
    ]
    if options.fused_only:
        variants = [v for v in variants if v[1] is fused_gpt]
    trainers, ours = [], []
    for name, model, settings in variants:
        if "compile_mode" in settings and (options.no_compile or time.perf_counter() - begin > 0.6 * options.budget):
            print(f"left out: {name}")
            continue
        trainer = GpuTrainer(name, model(DROPOUT), text, **settings)
        try:
            trainer.start()
        except Exception as error:
            if not trainer.compiled:
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            print(f"left out: {name}, which does not work here: {reason.strip()}")
            continue
        print(f"{name}: the first steps took {trainer.start_seconds:.1f} s", file=sys.stderr)
        trainers.append(trainer)

    rounds, longest = 0, 0
    while rounds < options.rounds and (rounds == 0 or time.perf_counter() - begin + longest < options.budget):
        round_begin = time.perf_counter()
        if options.binary:
            ours.append(our_gpu_step(options.binary))
        for trainer in trainers:
            trainer.turn()
        longest = max(longest, time.perf_counter() - round_begin)
        rounds += 1

    def row(name, steps, evals, start, faster):
        ms = [1e3 * statistics.median(steps), 1e3 * min(steps), 1e3 * max(steps), 1e3 * statistics.median(evals)]
        tokens = GPU_B * T / statistics.median(steps)
        print(f"{name:41}{ms[0]:9.3f}{ms[1]:9.3f}{ms[2]:9.3f}{tokens:11.0f}{ms[3]:9.3f}{start:>9}  {faster}")

    print(f"a step of {GPU_B} x {T} tokens, dropout {DROPOUT}, in {rounds} rounds")
    columns = ["median", "fastest", "slowest", "tokens/s", "evaluate", "start, s"]
    print(f"{'in ms':41}" + "".join(f"{c:>{11 if c == 'tokens/s' else 9}}" for c in columns) + "  ours is")
    if ours:
        row("microGPT, bf16", [ms for run in ours for ms in run[0]], [run[1][0] for run in ours], "", "")
        our_median = statistics.median(run[0][0] for run in ours)
    for t in trainers:
        faster = f"{statistics.median(t.step_seconds) / our_median:.2f} times as fast" if ours else ""
        row("PyTorch, " + t.name, t.step_seconds, t.eval_seconds, f"{t.start_seconds:.1f}", faster)
    return 0


# ----------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", metavar="BENCH_BINARY", nargs="?")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
                        help="of both on the CPU; the default is OMP_NUM_THREADS, or one for each processor")
    parser.add_argument("--rounds", type=int, help="turns that each one gets: 5 on the CPU, 3 on a GPU")
    parser.add_argument("--steps", type=int, default=2, help="steps of PyTorch's in one turn on the CPU")
    parser.add_argument("--only", choices=["steps", "products"], help="on the CPU, half of it")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which is slow to begin")
    parser.add_argument("--fused-only", action="store_true", help="on a GPU, leave out attention head by head")
    parser.add_argument("--budget", type=float, default=600, help="seconds: on a GPU no round begins that exceeds them")
    options = parser.parse_args()
    if options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("no GPU: this PyTorch sees none")
        options.rounds = options.rounds or 3
        return main_gpu(options)
    if not options.binary:
        parser.error("the following arguments are required: BENCH_BINARY")
    options.rounds = options.rounds or 5
    torch.set_num_threads(options.threads)

    load = os.getloadavg()[0]  # of others, as a rule: figures from a busy machine say little
    print(f"{processor()}, {options.threads} threads, PyTorch {torch.__version__}, load before {load:.1f}")
    if options.only != "products":
        compare_steps(options)
    if options.only != "steps":
        compare_products(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
