"""What a run will take, told before it starts: a few of its own steps are tried and scaled up."""

from __future__ import annotations

import copy
import resource
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import Trainer, TrainerCallback

from qadapter.config import QAdapterConfig
from qadapter.data import TokenizedPair
from qadapter.engines import engine
from qadapter.errors import ConfigError, UserError
from qadapter.held import AnchorKL
from qadapter.packing import Rows, flat, pack_pairs
from qadapter.train import Prepared, prepare
from qadapter.trainer import QAdapterTrainer

_TRIED = 6
"""Micro-batches that are timed, of lengths spread as the run's own."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the pairs takes."""

    seconds: float
    flops: float
    """Floating-point operations of matrix products and attention, two for a multiply-add."""

    def more(self, other: Epoch) -> Epoch:
        """Return what both take together."""
        return Epoch(self.seconds + other.seconds, self.flops + other.flops)

    def mixed(self, other: Epoch, share: float) -> Epoch:
        """Return what a pass takes of which this share goes as another one."""
        pairs = ((self.seconds, other.seconds), (self.flops, other.flops))
        return Epoch(*((1 - share) * mine + share * its for mine, its in pairs))


@dataclass(frozen=True)
class Estimate:
    """What a run will take on this machine."""

    pairs: int
    dropped: int
    tokens: int
    """Tokens of all pairs, each prompt counted once."""
    response_tokens: int
    epochs: float
    batches: int
    """Micro-batches an epoch."""
    first: Epoch
    later: Epoch | None
    """Later epochs, where the trunk comes from the cache; None where it does not."""
    cache: int
    """Bytes of the trunk cache."""
    kept: float
    """Share of the tokens whose trunk lies on disk already: the first epoch reads it."""
    peak: float
    """GiB, of the accelerator, else of the process."""

    @property
    def seconds(self) -> float:
        """Time of the whole training, without loading, evaluation and readings of budgets."""
        later = max(self.epochs - 1, 0) * (self.later or self.first).seconds
        return min(self.epochs, 1) * self.first.seconds + later


def peak_memory() -> float:
    """Return this process's peak memory so far in GiB: the accelerator's, else the host's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, except that macOS counts bytes.
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _tokens(row: Sequence[TokenizedPair]) -> int:
    return sum(pair.tokens for pair in row)


def _rows(trainer: QAdapterTrainer, pairs: Sequence[TokenizedPair]) -> Rows:
    """Return the micro-batches of the run's first epoch."""
    if isinstance(trainer.rows, Rows):
        return trainer.rows
    sampler: Any = trainer.get_train_dataloader().batch_sampler
    order, ends = array("q"), array("q")
    for index in sampler:
        order.extend(index)
        ends.append(len(order))
    return Rows(pairs, np.frombuffer(order, np.int64), np.frombuffer(ends, np.int64))


class Clock(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Times every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


class _Afresh(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Keeps a pass over `rows` from reading what it wrote itself, where they share pairs."""

    def __init__(self, rows: list[list[TokenizedPair]]) -> None:
        self.rows = rows
        self.trainer: QAdapterTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        cache = self.trainer.cache if self.trainer else None
        if cache is not None and state.global_step < len(self.rows):
            cache.forget(cast(Any, pack_pairs(self.rows[state.global_step])))


def _kept(trainer: QAdapterTrainer) -> float | None:
    """Return the share of the trunk that lies on disk; None if it may not be written there.

    Raises:
        UserError: it is asked for and may not.
    """
    try:
        return trainer.share_kept()
    except UserError:
        if cast(QAdapterConfig, trainer.args).cache_trunk:
            raise
        return None


def _spread(rows: Rows) -> list[list[TokenizedPair]]:
    """Return the largest row and some whose lengths are spread as all are."""
    by_size = rows.tokens.argsort(kind="stable")
    middles = [by_size[(2 * i + 1) * len(rows) // (2 * _TRIED)] for i in range(_TRIED)]
    return [rows[int(i)] for i in (by_size[-1], *middles)]


def _few(anchors: list[list[int]], count: int) -> list[list[int]]:
    """Return one micro-batch of anchors, of lengths spread as all are.

    Where they are kept the base reads them in the step that warms up; `_reading` is for the others.
    """
    if not anchors:
        return []
    by_size = sorted(anchors, key=len)
    return [by_size[(2 * i + 1) * len(anchors) // (2 * count)] for i in range(count)]


def _reading(anchors: AnchorKL, count: float) -> Epoch:
    """Return what the base takes to read `count` anchors once; nothing where none are kept."""
    if not (anchors.keeps and count):
        return Epoch(0.0, 0.0)

    def read_all() -> None:
        anchors.forget()
        for i in range(len(anchors)):
            anchors.read(i)

    start = time.perf_counter()
    read_all()
    seconds = time.perf_counter() - start
    with _counted() as counter:
        read_all()
    share = count / len(anchors)
    return Epoch(seconds * share, counter.get_total_flops() * share)


@contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    """Count the operations of the block: matrix products, two for a multiply-add."""

    def products(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # In plain products every part of the base's own attention is counted, on any device. Ours
    # calls torch's attention for CPUs, for which torch has no count, but one for its products.
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping={cpu_attention: products}) as counter,
    ):
        yield counter


def step_flops(trainer: Trainer, inputs: dict[str, Any]) -> int:
    """Return the operations of one training step: matrix products, two for a multiply-add."""
    with _counted() as counter:
        trainer.training_step(cast(nn.Module, trainer.model), inputs)
    return int(counter.get_total_flops())


def estimate(config: QAdapterConfig) -> Estimate:
    """Return what `run_training(config)` will take, from a few of its own steps; no run is left.

    Time and operations are those of the steps tried, scaled by tokens; memory is the peak with the
    run's largest micro-batch.

    Raises:
        UserError: as `run_training` would before its first step, but for a budget that the
            untrained policy is over; or several processes, of which each would try its own rows.
    """
    if (name := engine(config)) != "one process":
        raise ConfigError(
            f"--dry-run: tries a run's steps in one process and not on {name}; leave out --launch."
        )
    with closing(prepare(config)) as run, tempfile.TemporaryDirectory() as directory:
        elsewhere = copy.copy(config)
        elsewhere.output_dir = directory  # transformers' Trainer makes it at once
        trainer = run.trainer(elsewhere)
        rows = _rows(trainer, run.train_set)
        kept = _kept(trainer) if config.wants_trunk_cache(len(rows)) else None
        return _tried(config, run, rows, Path(directory), kept, trainer.anchor_kl)


def _tried(
    config: QAdapterConfig,
    run: Prepared,
    rows: Rows,
    directory: Path,
    kept: float | None,
    whole_anchors: AnchorKL,
) -> Estimate:
    """`kept` as `_kept` has it, `whole_anchors` the run's own."""
    spread = _spread(rows)
    short = copy.copy(config)
    settings = {
        "output_dir": str(directory),
        "num_train_epochs": 2,
        "max_steps": -1,
        "gradient_accumulation_steps": 1,
        "cache_trunk": config.cache_trunk if kept is not None else False,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": [],
        "disable_tqdm": True,
        "max_kl": None,
        "max_drop": None,
    }
    for name, value in settings.items():
        setattr(short, name, value)
    clock, afresh = Clock(), _Afresh(spread)
    hooks, anchors = [afresh, clock], _few(run.anchors, config.per_device_train_batch_size)
    trainer = run.trainer(
        short, train_dataset=flat(spread), anchors=anchors, budget=None, callbacks=hooks
    )
    trainer.rows, trainer.cache_root, afresh.trainer = spread, directory, trainer
    trainer.anchor_kl.keeps = whole_anchors.keeps
    trainer.train()
    peak = peak_memory()
    if not torch.cuda.is_available():  # they are kept by the host
        peak += (whole_anchors.size if whole_anchors.keeps else 0) / 2**30
    cached = trainer.cache is not None
    share = kept if cached and kept else 0.0
    batch = trainer.data_collator(spread[len(spread) // 2])
    flops = [step_flops(trainer, dict(batch))]
    tokens, whole = _tokens(spread[len(spread) // 2]), int(rows.tokens.sum())
    trainer.cache = None
    flops.insert(0, step_flops(trainer, dict(batch)))
    # The first step of each pass, the largest row, warms up and is not timed.
    timed = sum(_tokens(row) for row in spread[1:])
    passes = [clock.seconds[1 : len(spread)], clock.seconds[len(spread) + 1 :]]
    first, later = (
        Epoch(sum(seconds) / timed * whole, count / tokens * whole)
        for seconds, count in zip(passes, flops, strict=True)
    )
    first = first.mixed(later, share)
    # An epoch has so many anchors, until all were there.
    turns, epochs = len(anchors) * len(rows), config.epochs(len(rows))
    once = min(turns, len(run.anchors))
    first = first.more(_reading(trainer.anchor_kl, once))
    if epochs > 1:
        more = min(turns * epochs, len(run.anchors)) - once
        later = later.more(_reading(trainer.anchor_kl, more / (epochs - 1)))
    pairs = run.train_set
    return Estimate(
        pairs=len(pairs),
        dropped=sum(len(v) for v in run.dropped.values()),
        tokens=whole,
        response_tokens=sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs),
        epochs=epochs,
        batches=len(rows),
        first=first,
        later=later if cached else None,
        cache=trainer.layout.size(whole) if cached else 0,
        kept=share,
        peak=peak,
    )
