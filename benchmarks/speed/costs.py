"""What the machine can do, where a step's time goes, and how a step grows."""

from __future__ import annotations

import tempfile
import time
from statistics import median
from typing import Any

import torch
from measuring import Memory, name_of, own_dtype
from torch.profiler import ProfilerActivity, profile
from training import our_trainer, picked, rows

from qadapter import fused
from qadapter.data import TokenizedPair

_GROUPS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn", "matmul"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "softmax and exp": ("exp", "softmax", "log", "amax", "max", "sigmoid", "softplus"),
    "copies and casts": (
        *("copy", "_to_copy", "to", "clone", "contiguous", "cat", "index", "gather", "stack"),
        *("repeat", "scatter", "select", "slice", "empty", "zero", "fill", "pad", "resize"),
    ),
    "elementwise": (
        *("add", "sub", "mul", "div", "neg", "silu", "pow", "rsqrt", "mean", "sum", "where"),
        *("tril", "triu", "cos", "sin", "adam", "masked", "clamp", "square", "sqrt", "norm"),
    ),
}


def gemm(*, sizes: list[int], repeats: int) -> dict[str, Any]:
    """Return the best operations a second of square products, of each dtype the machine has."""
    out: dict[str, Any] = {}
    for dtype in {own_dtype(): None, torch.float32: None}:
        speeds = {}
        for size in sizes:
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            times = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                a @ b
                times.append(time.perf_counter() - start)
            speeds[str(size)] = 2 * size**3 / median(times[1:])
        out[name_of(dtype)] = {"best": max(speeds.values()), "sizes": speeds}
    return out


def _group(name: str) -> str:
    """Return an operator's group: the first that has a word its name starts with."""
    short = name.removeprefix("aten::").lstrip("_")
    for group, words in _GROUPS.items():
        if any(short.startswith(word.lstrip("_")) for word in words):
            return group
    if any(word in short for word in ("attention", "dot_product")):
        return "attention"
    return "other"


def shares(profiler: Any) -> dict[str, Any]:
    """Return the shares of the processor's time of each group and of the longest operators."""
    events = profiler.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    groups = dict.fromkeys([*_GROUPS, "other"], 0.0)
    for event in events:
        groups[_group(event.key)] += event.self_cpu_time_total / total
    longest = sorted(events, key=lambda e: -e.self_cpu_time_total)[:15]
    return {
        "shares": groups,
        "longest": {e.key: e.self_cpu_time_total / total for e in longest},
    }


def profiled(*, pairs: int, seed: int, cached: bool) -> dict[str, Any]:
    """Return where the time of steps with adapters on 8 layers goes, of a first or cached epoch."""
    chosen = picked(pairs, pairs)
    with tempfile.TemporaryDirectory() as directory:
        seen = chosen if cached else chosen[:4]
        trainer = our_trainer(directory, seen, layers=8, epochs=2 if cached else 1, seed=seed)
        trainer.train()
        if cached and trainer.cache is None:
            raise RuntimeError("no trunk was kept")
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for row in rows(chosen)[1:]:
                trainer.training_step(trainer.model, trainer.data_collator(row))
    return shares(profiler)


def step(*, tokens: int, layers: int, seed: int, steps: int) -> dict[str, Any]:
    """Return time and memory of one training step on two made-up pairs of so many tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(1000, 40_000, (count,), generator=generator).tolist()

    part = tokens // 4
    pairs = [
        TokenizedPair(ids(tokens - 2 * part), ids(part), ids(part), True, True, "made up")
        for _ in range(2)
    ]
    with tempfile.TemporaryDirectory() as directory:
        trainer = our_trainer(directory, pairs, layers=layers, epochs=1, seed=seed)
        memory = Memory()
        trainer.train()
        figures = memory.figures()
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            trainer.training_step(trainer.model, trainer.data_collator(pairs))
            times.append(time.perf_counter() - start)
    return {"seconds": median(times), "raw": times, **figures}


def vocabulary(*, words: int, states: int, seed: int, steps: int) -> dict[str, Any]:
    """Return time and memory of the soft value, forward and backward, beside its weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(words, 576, dtype=own_dtype()).normal_(generator=generator)
    hidden = torch.randn(states, 576, generator=generator).to(own_dtype()).requires_grad_()
    # Once on few words, so that the library's own buffers do not count as the vocabulary's.
    fused.linear_logsumexp(hidden, weight[:2048]).sum().backward()
    memory = Memory()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        fused.linear_logsumexp(hidden, weight).sum().backward()
        times.append(time.perf_counter() - start)
    return {"seconds": median(times), "raw": times, **memory.figures()}


def run_of(*, pairs: int, seed: int) -> dict[str, Any]:
    """Return the time and memory of a run of so many pairs with adapters on 8 layers."""
    chosen = picked(pairs, pairs)[4:]
    with tempfile.TemporaryDirectory() as directory:
        trainer = our_trainer(directory, chosen, layers=8, epochs=1, seed=seed)
        memory = Memory()
        start = time.perf_counter()
        trainer.train()
        return {"seconds": time.perf_counter() - start, **memory.figures()}
