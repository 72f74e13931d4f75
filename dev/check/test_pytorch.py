#!/usr/bin/env python3
"""Compares the programs with PyTorch: the exported model, its exact loss, the random numbers, whole training steps.

    make test-pytorch PYTHON=python3

runs it from the repository's root. With MICROGPT_TEXT=FILE, 20 steps of the lecture's model on that text as well.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch

from reference import GPT, read_safetensors

SEED = (7 << 32) + 42  # beyond 32 bits, for both words of the key
SMALL = dict(n_layer=2, n_head=3, n_embd=48, block_size=32, batch_size=8)

passed = failed = 0


def check(what, holds, detail=""):
    global passed, failed
    passed, failed = passed + bool(holds), failed + (not holds)
    print(("passed  " if holds else "FAILED  ") + what + (f": {detail}" if detail else ""), flush=True)


def run(*arguments):
    """Runs a program and returns what it printed; numbers and folders may be among the arguments."""
    done = subprocess.run([str(a) for a in arguments], capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def flags(**values):
    return [f"--{name}={value}" for name, value in values.items()]


# ----------------------------------------------------------------------------------------------------------------------
# What the programs leave behind


def read_tokens(data, split):
    """The tokens of a split: 256 int32 of header, then 16 bits each; a long split has several files."""
    parts = []
    for path in sorted(Path(data).glob(f"{split}_*.bin")):
        header = np.fromfile(path, "<i4", 256)
        tokens = np.fromfile(path, "<u2", offset=1024)
        assert header[0] == 20240520 and header[1] == 1 and header[2] == len(tokens), path
        parts.append(tokens.astype(np.int64))
    return np.concatenate(parts)


def metrics(out, kind):
    lines = (json.loads(line) for line in open(out / "metrics.jsonl"))
    return [line for line in lines if line["type"] == kind]


def windows(tokens, starts, T):
    """x and y (B, T): the windows that begin at `starts`, and each of their tokens' successors."""
    at = np.asarray(starts)[:, None] + np.arange(T)
    return torch.from_numpy(tokens[at]), torch.from_numpy(tokens[at + 1])


# ----------------------------------------------------------------------------------------------------------------------
# Our random numbers a second time, from their description (host/random.h)

SITE_INIT, SITE_BATCH = 1 << 24, 2 << 24


def philox4x32_10(counter, key):
    """Four counter words (arrays) and two key words to four random words; all in uint64, of which 32 bits are used."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2  # of 32-bit numbers: never beyond 64 bits
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(key[0]), p1 & low
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(key[1]), p0 & low
        key = (key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random4(seed, step, site, index):
    index = np.asarray(index, np.uint64)
    counter = np.broadcast_arrays(index & np.uint64(0xFFFFFFFF), index >> np.uint64(32), step, site)
    return philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))


def window_starts(seed, step, B, n):
    """The starts of a batch's windows: uniform in [0, n), by the high half of 64 random bits times n."""
    high, low, _, _ = random4(seed, step, SITE_BATCH, np.arange(B))
    return [(int(h) << 32 | int(l)) * n >> 64 for h, l in zip(high, low)]


def normals(seed, tensor, first, count):
    """N(0, 1): Box and Muller's two from each two words. `first` counts in fours."""
    words = random4(seed, 0, SITE_INIT + tensor, first + np.arange((count + 3) // 4))
    u = [(w.astype(np.float64) + 0.5) * 2.0**-32 for w in words]
    out = []
    for a, b in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = np.sqrt(-2 * np.log(a)), 2 * np.pi * b
        out += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(out, axis=-1).ravel()[:count]


def initial_weights(seed, V, T, C, L, NH):
    """What training starts from, by name. The tensors are numbered in the order of the table in host/tensors.h; there
    the queries, keys and values of a layer are one tensor, (3, NH, head size, C)."""
    table = [
        ("token_embedding_table.weight", (V, C)),
        ("position_embedding_table.weight", (T, C)),
        ("blocks.{l}.ln1.weight", 1.0, C),
        ("blocks.{l}.ln1.bias", 0.0, C),
        ("blocks.{l}.sa.heads", (3 * C, C)),
        ("blocks.{l}.sa.proj.weight", (C, C)),
        ("blocks.{l}.sa.proj.bias", 0.0, C),
        ("blocks.{l}.ln2.weight", 1.0, C),
        ("blocks.{l}.ln2.bias", 0.0, C),
        ("blocks.{l}.ffwd.net.0.weight", (4 * C, C)),
        ("blocks.{l}.ffwd.net.0.bias", 0.0, 4 * C),
        ("blocks.{l}.ffwd.net.2.weight", (C, 4 * C)),
        ("blocks.{l}.ffwd.net.2.bias", 0.0, C),
        ("ln_f.weight", 1.0, C),
        ("ln_f.bias", 0.0, C),
        ("lm_head.weight", (V, C)),
        ("lm_head.bias", 0.0, V),
    ]
    weights = {}
    for number, (name, *what) in enumerate(table):
        for l in range(L if "{l}" in name else 1):
            key = name.replace("{l}", str(l))
            if len(what) == 2:
                weights[key] = np.full(what[1], what[0], np.float32)
                continue
            shape = what[0]
            count = shape[0] * shape[1]
            values = 0.02 * normals(seed, number, l * ((count + 3) // 4), count)
            weights[key] = values.astype(np.float32).reshape(shape)
            if key.endswith("heads"):
                stacked = weights.pop(key).reshape(3, NH, C // NH, C)
                for h in range(NH):
                    for part, part_name in enumerate(("query", "key", "value")):
                        weights[f"{key}.{h}.{part_name}.weight"] = stacked[part, h]
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# The checks


def made_up_text():
    """About 40 kB that can be learned a little: invented words, in several scripts, always the same ones."""
    random = np.random.default_rng(7)
    syllables = "ba de ki lo mu na pe ri so tu chä ère ñol λό ша 日本 🌊".split()
    words = ["".join(random.choice(syllables, random.integers(1, 4))) for _ in range(200)]
    lines = []
    for _ in range(700):
        line = " ".join(random.choice(words, random.integers(4, 10)))
        lines.append(line[0].upper() + line[1:] + random.choice([".", "!", " —"]))
    return "\n".join(lines) + "\n"


def prepare(text_file, data):
    run("./data_prep", text_file, "--out", data)
    characters = json.load(open(data / "vocab.json", encoding="utf-8"))["characters"]
    return characters, read_tokens(data, "train"), read_tokens(data, "val")


def test_tokens(text, characters, train, val):
    check("vocabulary: the text's characters, sorted", characters == sorted(set(text)), f"{len(characters)} of them")
    decoded = "".join(characters[t] for t in np.concatenate([train, val]))
    check("tokens: train and val decode to the text, split at nine tenths",
          decoded == text and len(train) == len(text) * 9 // 10)


def exact_loss(model, tokens):
    """Every token but the first scored once, in windows that do not overlap; what is left over is the last window."""
    T, targets, at, total = model.block_size, len(tokens) - 1, 0, 0.0
    while at < targets:
        B, n = min(64, (targets - at) // T), T
        if B == 0:
            B, n = 1, targets - at
        x, y = windows(tokens, range(at, at + B * n, n), n)
        with torch.no_grad():
            total += model(x, y)[1].item() * y.numel()
        at += B * n
    return total / targets


def test_export(data, out, val, V):
    printed = run("./train_gpt_cpu", *flags(preset="lecture", data=data, out_dir=out, dropout=0.1, max_iters=200,
                                            dtype="float32", learning_rate=3e-3, eval_interval=100, eval_iters=2,
                                            seed=SEED, **SMALL))
    state = torch.load(out / "microGPT_model.pth", weights_only=True)
    model = GPT(V, *(SMALL[name] for name in ("block_size", "n_embd", "n_head", "n_layer")), dropout=0.1)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    check("export: names, shapes and types of the model's own state dict", found == expected, f"{len(state)} tensors")
    masks = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("tril")}
    model.load_state_dict(state, strict=True)
    check("export: load_state_dict(strict=True), with the masks that were there",
          all(torch.equal(model.state_dict()[name], mask) for name, mask in masks.items()))

    checkpoint = read_safetensors(out / "ckpt_last.safetensors")
    weights = {name: array for name, array in checkpoint.items() if not name.startswith("adamw.")}
    exported = {name: tensor.numpy() for name, tensor in state.items() if not name.endswith("tril")}
    check("ckpt_last: the exported weights, bit for bit",
          weights.keys() == exported.keys()
          and all(np.array_equal(weights[name].view(np.uint32), exported[name].view(np.uint32)) for name in weights))
    check("ckpt_last: AdamW's moments of every tensor",
          all(checkpoint[f"adamw.{moment}.{name}"].shape == weights[name].shape for name in weights for moment in "mv"))

    model.eval().double()  # only our own rounding counts
    ours, theirs = metrics(out, "final")[-1]["val_exact"], exact_loss(model, val)
    check("val exact: within 1e-5 of PyTorch's", abs(ours - theirs) <= 1e-5,
          f"{ours:.7f}, PyTorch {theirs:.7f}, difference {abs(ours - theirs):.1e}")
    shown = re.search(r"^val exact: (\d+\.\d{4}) ", printed, re.MULTILINE)
    check("val exact: printed with four decimals", shown and abs(float(shown[1]) - ours) <= 0.50001e-4)
    check("training taught the model something", ours < np.log(V) - 0.5, f"{ours:.4f}, uniform {np.log(V):.4f}")


def test_round_trip(data, out, folder, train, val, V):
    """A model of ours that PyTorch trains further and that comes back, in each format that torch.save has had."""
    model = GPT(V, *(SMALL[name] for name in ("block_size", "n_embd", "n_head", "n_layer")), dropout=0)
    model.load_state_dict(torch.load(out / "microGPT_model.pth", weights_only=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = exact_loss(model, val)
    for step in range(50):
        x, y = windows(train, window_starts(SEED, step, 8, len(train) - model.block_size), model.block_size)
        optimizer.zero_grad()
        model(x, y)[1].backward()
        optimizer.step()
    after = exact_loss(model, val)
    check("round trip: PyTorch's steps taught the model something", after < before - 0.01, f"{before:.4f} to {after:.4f}")

    state = model.state_dict()
    wrapped = {"step": 50, "model": {"module." + name: t for name, t in state.items()}, "rest": optimizer.state_dict()}
    for what, saved, options in (("a state dict", state, {}),
                                 ("a dictionary of the old format", wrapped, dict(_use_new_zipfile_serialization=False)),
                                 ("protocol 4", wrapped, dict(pickle_protocol=4))):
        path = folder / "back.pth"
        torch.save(saved, path, **options)
        common = flags(data=data, dtype="float32", batch_size=8, eval_iters=1)
        printed = run("./train_gpt_cpu", "eval", "--checkpoint", path, *common)
        shown = float(re.search(r"^val exact: (\d+\.\d{4}) ", printed, re.MULTILINE)[1])
        run("./train_gpt_cpu", "--init_from", path, *common,
            *flags(preset="lecture", out_dir=folder / "back", dropout=0, max_iters=40, learning_rate=1e-3, seed=SEED))
        first, last = metrics(folder / "back", "eval")[0]["val_fixed"], metrics(folder / "back", "final")[-1]["val_exact"]
        check(f"round trip: {what}: the loss goes on where it was",
              abs(shown - after) <= 1e-4 and abs(first - after) <= 1e-5 and last < after,
              f"{after:.5f} in PyTorch, {first:.5f} here, {last:.5f} after 40 steps more")


def test_steps(what, data, folder, train, V, preset, n_layer, n_head, n_embd, block_size, batch_size):
    """20 steps of ours and of PyTorch's AdamW, both float32 and without dropout, from the same weights on the same
    batches. The first loss agrees to rounding. Later ones may part by more, up to about 1e-4, as those of float32 and
    float64 in PyTorch do: where a sum falls so near zero that the two round it to different sides, ReLU passes a
    gradient in one and not in the other, and AdamW's first steps are as large for a tiny gradient as for any."""
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
    common = dict(preset=preset, data=data, dtype="float32", dropout=0, batch_size=batch_size, eval_iters=1, seed=SEED,
                  **shape)
    adamw = dict(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99)

    # One step at a learning rate of zero leaves the initial weights in the checkpoint.
    run("./train_gpt_cpu", *flags(**common, out_dir=folder / "initial", max_iters=1, learning_rate=0, weight_decay=0))
    checkpoint = read_safetensors(folder / "initial" / "ckpt_last.safetensors")
    weights = {name: array for name, array in checkpoint.items() if not name.startswith("adamw.")}
    documented = initial_weights(SEED, V, block_size, n_embd, n_layer, n_head)
    # two mathematical libraries may round a logarithm or a cosine differently: one unit in float32's last place
    largest = max(np.abs(weights[name] - documented[name]).max() for name in weights)
    check(f"{what}: initial weights by numpy's Philox and Box-Muller",
          weights.keys() == documented.keys() and largest <= 1e-8, f"largest difference {largest:.1e}")

    out = folder / "steps"
    run("./train_gpt_cpu", *flags(**common, **adamw, out_dir=out, max_iters=20, log_interval=1))
    ours = {line["iter"]: line["loss"] for line in metrics(out, "iter")}

    model = GPT(V, block_size, n_embd, n_head, n_layer, dropout=0)
    state = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("tril") for name in missing), (missing, unexpected)
    optimizer = torch.optim.AdamW(model.parameters(), lr=adamw["learning_rate"], eps=1e-8,
                                  betas=(adamw["beta1"], adamw["beta2"]), weight_decay=adamw["weight_decay"])
    theirs = []
    for step in range(20):
        starts = window_starts(SEED, step, batch_size, len(train) - block_size)
        loss = model(*windows(train, starts, block_size))[1]
        theirs.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    complete = sorted(ours) == list(range(20))
    differences = [abs(ours[step] - theirs[step]) for step in range(20)] if complete else [np.inf]
    check(f"{what}: the losses of 20 steps within 2e-3 of PyTorch's, the first within 1e-5",
          max(differences) <= 2e-3 and differences[0] <= 1e-5,
          f"{theirs[0]:.4f} to {theirs[-1]:.4f}, first difference {differences[0]:.1e}, "
          f"largest {max(differences):.1e} at step {int(np.argmax(differences))}")


def muon_step(parameters, momenta, learning_rate, weight_decay, momentum=0.95):
    """Jordan et al.'s Muon with Liu et al.'s scale, a matrix at a time, as torch would write it."""
    for p, m in zip(parameters, momenta):
        m.mul_(momentum).add_(p.grad, alpha=1 - momentum)
        x = momentum * m + (1 - momentum) * p.grad
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        p.mul_(1 - learning_rate * weight_decay).sub_(0.2 * learning_rate * max(p.shape) ** 0.5 * x)


def test_muon(data, folder, train, V):
    """20 steps of ours and of PyTorch's, with Muon for the matrices inside the layers, as they are in the state dict: the
    queries, keys and values of each head are three of them."""
    shape = {name: SMALL[name] for name in ("block_size", "n_embd", "n_head", "n_layer")}
    common = flags(data=data, preset="lecture", dtype="float32", dropout=0, eval_iters=1, seed=SEED, weight_decay=0.1,
                   **SMALL)
    run("./train_gpt_cpu", *common, *flags(out_dir=folder / "initial", max_iters=1, learning_rate=0))
    weights = read_safetensors(folder / "initial" / "ckpt_last.safetensors")
    run("./train_gpt_cpu", *common, *flags(out_dir=folder / "muon", max_iters=20, log_interval=1, optimizer="muon",
                                           learning_rate=6e-3, beta2=0.99))
    ours = [line["loss"] for line in metrics(folder / "muon", "iter")]

    model = GPT(V, *shape.values(), dropout=0)
    model.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in weights.items() if not n.startswith("adamw.")},
                          strict=False)
    hidden = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimizer = torch.optim.AdamW(rest, lr=6e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    momenta = [torch.zeros_like(p) for p in hidden]
    theirs = []
    for step in range(20):
        starts = window_starts(SEED, step, SMALL["batch_size"], len(train) - model.block_size)
        loss = model(*windows(train, starts, model.block_size))[1]
        theirs.append(loss.item())
        model.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            muon_step(hidden, momenta, 6e-3, 0.1)
    differences = [abs(a - b) for a, b in zip(ours, theirs)] if len(ours) == 20 else [np.inf]
    check("Muon: the losses of 20 steps within 2e-3 of PyTorch's, the first within 1e-5",
          max(differences) <= 2e-3 and differences[0] <= 1e-5,
          f"{theirs[0]:.4f} to {theirs[-1]:.4f}, largest difference {max(differences):.1e}")


def attempt(what, test, *arguments, **named):
    """A test that cannot be carried out is one that failed; the others go on."""
    try:
        return test(*arguments, **named)
    except Exception:
        check(what, False, traceback.format_exc())
        return None


def main():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))

    # The test vector of the paper's authors for a counter and a key of ones (Random123, kat_vectors).
    ones = 0xFFFFFFFF
    check("Philox4x32-10: a published test vector", [int(w) for w in philox4x32_10([ones] * 4, (ones, ones))]
          == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD])

    with tempfile.TemporaryDirectory(prefix="microgpt_") as folder:
        folder = Path(folder)
        text = made_up_text()
        (folder / "text").write_text(text, encoding="utf-8", newline="")
        prepared = attempt("data_prep", prepare, folder / "text", folder / "data")
        if prepared:
            characters, train, val = prepared
            V = len(characters)
            attempt("tokens", test_tokens, text, characters, train, val)
            attempt("export", test_export, folder / "data", folder / "out", val, V)
            attempt("round trip", test_round_trip, folder / "data", folder / "out", folder, train, val, V)
            attempt("Muon", test_muon, folder / "data", folder, train, V)
            attempt("steps", test_steps, "small model", folder / "data", folder / "small", train, V, "lecture", **SMALL)

        path = os.environ.get("MICROGPT_TEXT")
        if path:
            prepared = attempt("data_prep", prepare, path, folder / "lecture_data")
            if prepared:
                characters, train, _ = prepared
                attempt("steps", test_steps, "lecture", folder / "lecture_data", folder / "lecture", train,
                        len(characters), "lecture", n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=4)
        else:
            print("skipped the lecture's model: MICROGPT_TEXT=FILE names a text for it")

    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
