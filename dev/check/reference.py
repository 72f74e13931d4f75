#!/usr/bin/env python3
"""The model in PyTorch, to check ours against: small, plain, and with the same names in its state dict.

    python dev/check/reference.py fixture test/fixture.safetensors
    python dev/check/reference.py pth test/pth

write, for tests on machines without PyTorch, weights, a batch, and what PyTorch makes of them; and files of torch.save.
Everything else here is imported by test_pytorch.py and bench_pytorch.py.
"""

import json
import struct
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Head(nn.Module):
    """One head of causal self-attention: (B, T, n_embd) -> (B, T, head_size)."""

    def __init__(self, n_embd, head_size, block_size, dropout):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        # Row q has ones up to column q: what a query may look at. No parameter, but part of the state dict.
        self.register_buffer("tril", torch.ones(block_size, block_size).tril())

    def forward(self, x):
        T = x.shape[1]
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, T, T), of variance 1 if q and k have it
        scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.dropout(scores.softmax(dim=-1)) @ v


class SelfAttention(nn.Module):
    """n_head heads side by side, then a linear layer in which they mix."""

    def __init__(self, n_embd, n_head, block_size, dropout):
        super().__init__()
        head_size = n_embd // n_head
        self.heads = nn.ModuleList(Head(n_embd, head_size, block_size, dropout) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class FeedForward(nn.Module):
    """What happens at each position by itself: up to four times the channels, ReLU, and down again."""

    def __init__(self, n_embd, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout)
        )

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    """Attention, then the feed-forward net, each adding its part to the residual stream."""

    def __init__(self, n_embd, n_head, block_size, dropout):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd)
        self.sa = SelfAttention(n_embd, n_head, block_size, dropout)
        self.ln2 = nn.LayerNorm(n_embd)
        self.ffwd = FeedForward(n_embd, dropout)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size=256, n_embd=384, n_head=6, n_layer=6, dropout=0.2):
        super().__init__()
        self.block_size = block_size
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(Block(n_embd, n_head, block_size, dropout) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x, y=None):
        """x (B, T) tokens, y (B, T) their successors: the logits (B, T, V) and the mean loss, None without y."""
        positions = torch.arange(x.shape[1], device=x.device)
        stream = self.token_embedding_table(x) + self.position_embedding_table(positions)
        logits = self.lm_head(self.ln_f(self.blocks(stream)))
        return logits, None if y is None else F.cross_entropy(logits.flatten(0, 1), y.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# safetensors, as host/safetensors.h describes the format

DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, array in tensors.items():
        dtype = next(key for key, value in DTYPES.items() if np.dtype(value) == array.dtype)
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(array.tobytes())


def read_safetensors(path):
    with open(path, "rb") as file:
        content = file.read()
    data = 8 + struct.unpack_from("<Q", content)[0]
    tensors = {}
    for name, entry in json.loads(content[8:data]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            flat = np.frombuffer(content[data + begin : data + end], DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# The fixture


def fixture():
    """All in float64, so that an error in a formula stands out from rounding. The weights are ten times as large as a
    fresh model's, for gradients that matter and attention that is not uniform, and no bias is zero. T is shorter than
    block_size. The weights are numpy's random numbers, the same everywhere; what is computed from them may differ in
    the last bits from one processor to another, and would from one number of threads to another."""
    torch.set_num_threads(1)
    B, T, V = 3, 13, 65
    random = np.random.default_rng(1)
    model = GPT(V, block_size=16, n_embd=48, n_head=3, n_layer=2, dropout=0).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm_weight = name.startswith("ln_f.weight") or ".ln" in name and name.endswith("weight")
            values = random.normal(1 if norm_weight else 0, 0.2, parameter.shape)
            # rounded to float32, so that a float32 model starts from the very same weights
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    x = torch.from_numpy(random.integers(0, V, (B, T)))
    y = torch.from_numpy(random.integers(0, V, (B, T)))

    out = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    logits, loss = model(x, y)
    loss.backward()
    out |= {"x": x.numpy(), "y": y.numpy(), "logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    out |= {"grad." + name: p.grad.numpy().copy() for name, p in model.named_parameters()}

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    losses = []  # after 1, 2, ..., 10 steps
    for _ in range(10):
        optimizer.step()
        optimizer.zero_grad()
        loss = model(x, y)[1]
        loss.backward()
        losses.append(loss.item())
    out["losses"] = np.array(losses)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Files of torch.save


def pth_files(folder):
    """A small model in the formats that PyTorch writes and has written. Element i of a tensor whose name's bytes have the
    sum n is ((7 n + 3 i) % 200 - 100) / 8, which every type has exactly."""
    model = GPT(2, block_size=8, n_embd=4, n_head=2, n_layer=2)
    state = model.state_dict()
    for name, tensor in state.items():
        if not name.endswith("tril"):
            values = [((7 * sum(name.encode()) + 3 * i) % 200 - 100) / 8 for i in range(tensor.numel())]
            tensor.copy_(torch.tensor(values).view(tensor.shape))
    torch.save(state, f"{folder}/today.pth")

    # with another order of the elements in memory; as parameters, without the masks
    parameters = {name: nn.Parameter(p.detach().bfloat16()) for name, p in model.named_parameters()}
    name = "blocks.1.ffwd.net.0.weight"
    parameters[name] = nn.Parameter(parameters[name].detach().T.contiguous().T)
    torch.save(parameters, f"{folder}/protocol5.pth", pickle_protocol=5)

    # as training loops save it, with an optimizer that has made a step
    half = {"module._orig_mod." + name: tensor.half() for name, tensor in state.items()}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=int), torch.zeros(1, 8, dtype=int))[1].backward()
    optimizer.step()
    whole = {"iter": 3, "lr": 1e-3, "model": half, "optimizer": optimizer.state_dict()}
    torch.save(whole, f"{folder}/legacy.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("fixture", "pth"):
        sys.exit("usage: python dev/check/reference.py fixture FILE | pth FOLDER")
    if sys.argv[1] == "fixture":
        write_safetensors(sys.argv[2], fixture())
    else:
        pth_files(sys.argv[2])
