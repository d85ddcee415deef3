"""The forgetting budget: training that ends inside it, and the largest strength inside it."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor
from transformers import TrainerCallback

from qadapter.data import spread
from qadapter.errors import ArtefactError, ConfigError, TrainingError
from qadapter.evaluate import TaskScore, evaluate_tasks
from qadapter.model import QAdapterModel
from qadapter.policy import KLCurve, Policy
from qadapter.stats import bootstrap
from qadapter.suite import suite_tasks

_log = logging.getLogger(__name__)

_CHECKS = 10
"""Readings of a run, evenly spread."""
_TOKENS = 4096
"""Of general text, in one reading while training."""
_PARTS = 256
"""Of the way back to the last weights inside: a power of two, found in eight readings."""
_STRENGTHS = 1000
"""Between 0 and `tune`'s largest: found in ten passes of the head."""


@dataclass(frozen=True)
class Reading:
    """One budget, read off a policy."""

    budget: str
    """The setting, such as `max_kl`."""
    limit: float
    value: float
    short: str
    """The value with its unit, for people."""
    basis: str
    """Its spread and what it was read on."""
    figures: dict[str, float]
    """The same for logs."""

    @property
    def inside(self) -> bool:
        """Whether the value is at most the limit; one that is not a number is outside."""
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.short}, {self.basis}"


class Meter(Protocol):
    """What reads one budget."""

    def read(self, policy: Policy) -> Reading:
        """Return the policy's reading at strength 1."""


class KLMeter:
    """Reads KL(π1 ‖ π̃), nats a token, on general text.

    Args:
        limit: the budget.
        texts: joined, of which 4,096 tokens are read, in rows evenly spread.
        source: what the text is, for people.
    """

    def __init__(self, limit: float, texts: Sequence[str], source: str) -> None:
        self._limit, self._texts, self._source = limit, texts, source
        self._rows: list[list[int]] = []

    def read(self, policy: Policy) -> Reading:
        """Return the reading; its 95% interval is over rows, since tokens of one text are alike."""
        self._rows = self._rows or thinned(policy.text_rows(self._texts), _TOKENS)
        curve = policy.kl_curve(self._rows)
        by_row = curve.by_row(1.0)
        value = _agreed(curve.mean(by_row))
        spread = ""
        if found := interval(curve, by_row):
            spread = f"95% {found[0]:.4g}–{found[1]:.4g}, "
        short = f"KL {value:.4g} nats a token"
        basis = f"{spread}on {curve.tokens:,} tokens of {self._source}"
        return Reading("max_kl", self._limit, value, short, basis, {"budget_kl": value})


class DropMeter:
    """Reads how many percentage points the policy scores below its base on a task.

    Args:
        limit: the budget.
        task: as `suite.suite_tasks` takes it: a file, or lm-eval's name of a task.
        items: the task's first so many items are scored, the same for both.

    Raises:
        DataError: the file cannot be read or has other rows.
        ConfigError: it is a directory.
    """

    def __init__(self, limit: float, task: str, items: int) -> None:
        self._limit, self._source, self._items = limit, task, items
        if Path(task).is_dir() or (Path(task).name != task and not Path(task).is_file()):
            raise ConfigError(f"drop_task: {task} is no file; name one, or a task of lm-eval's.")
        self._tasks = suite_tasks([task])
        self._base: TaskScore | None = None

    def _score(self, policy: Policy, strength: float) -> TaskScore:
        score, *more = evaluate_tasks(policy, self._tasks, strength=strength, limit=self._items)
        if more:
            raise ConfigError(
                f"drop_task: {self._source} is several tasks, {score.task}, {more[0].task}, …; "
                "name one of them."
            )
        if score.n < 2:
            raise ConfigError(
                f"drop_task: {self._source} has one item, too few for a standard error; give more."
            )
        if not (score.higher_is_better and score.items and all(0 <= i <= 1 for i in score.items)):
            raise ConfigError(
                f"drop_task: {self._source} is scored by {score.metric}, which is no share of "
                "right answers; name a multiple-choice or last-word task."
            )
        return score

    def read(self, policy: Policy) -> Reading:
        """Return the reading, with the standard error of the difference item by item."""
        if self._base is None:
            self._base = self._score(policy, 0.0)
        base, now = self._base, self._score(policy, 1.0)
        lost = [100 * (b - p) for b, p in zip(base.items, now.items, strict=True)]
        value, error = _agreed(fmean(lost)), _agreed(stdev(lost) / math.sqrt(len(lost)))
        short = f"drop {value:.2f} ± {error:.2f} points"
        basis = (
            f"paired standard error, {now.metric} {base.value:.1%} to {now.value:.1%} on "
            f"{len(lost):,} items of {self._source}"
        )
        figures = {"budget_drop": value, "budget_drop_se": error}
        return Reading("max_drop", self._limit, value, short, basis, figures)


def _agreed(value: float) -> float:
    """Return the first process's value in all of them, so that all decide alike."""
    state = PartialState()
    if state.num_processes == 1:
        return value
    return float(broadcast(torch.tensor(value, dtype=torch.float64, device=state.device)))


def interval(curve: KLCurve, by_row: Sequence[float]) -> tuple[float, float] | None:
    """Return the mean's 95% interval over rows, or None of a single row."""
    if len(by_row) < 2:
        return None
    found = bootstrap(np.multiply(by_row, curve.lengths), curve.lengths)
    return found.low, found.high


def thinned(rows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Return rows of about so many tokens together, evenly spread over all rows."""
    return spread(rows, tokens // len(rows[0]))


def hold_out(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the texts that may be trained on, and every fifth, or of many about 64, that may not.

    Raises:
        ConfigError: fewer than two are there.
    """
    if len(texts) < 2:
        raise ConfigError(
            "anchor_data: one text is too few to hold some out for max_kl; add --budget_text F."
        )
    stride = max(5, len(texts) // 64)
    return [t for i, t in enumerate(texts) if i % stride], list(texts[::stride])


@dataclass(frozen=True)
class _Check:
    step: int
    readings: tuple[Reading, ...]

    @property
    def over(self) -> list[Reading]:
        return [reading for reading in self.readings if not reading.inside]


class Budget(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Reads budgets while a policy trains, and ends the run with weights that were read inside.

    Read before the first step, ten times a run, at its end, and before each evaluation and
    checkpoint, so that no checkpoint of the run is outside. Where one is passed, the adapter goes
    back on the straight line to the last weights inside, to the point nearest to the budget that
    bisection finds and reads inside, and training stops. A reading of KL runs 4,096 tokens forward,
    one of a task its items; going back takes eight readings.

    Args:
        policy: the model in training, with its tokenizer.
        meters: one a budget.

    Raises:
        ConfigError: the policy is over a budget before the first step.
        TrainingError: no weights but the untrained ones are inside.
    """

    def __init__(self, policy: Policy, meters: Sequence[Meter]) -> None:
        self._policy, self._meters = policy, meters
        self.log: Callable[[dict[str, float]], None] = lambda figures: None
        """Where figures go; the trainer puts its own log here."""
        self._inside = _Check(0, ())
        self._weights: dict[str, Tensor] = {}
        self._passed: _Check | None = None
        self._steps = 0, 0

    # ── the run's events ────────────────────────────────────────────────────────────────────────

    def on_train_begin(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        self._passed = None
        found = self._read(state.global_step)
        for reading in found.over:
            raise ConfigError(f"{reading.budget} {reading.limit:g}: {_refusal(found, reading)}")
        self._note(control, found)
        self._keep(found)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = -(-state.max_steps // _CHECKS)
        due = state.global_step % every == 0 or state.global_step >= state.max_steps
        if due or control.should_evaluate or control.should_save:
            self._check(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_evaluate or control.should_save:
            self._check(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Early stopping ends between two checks, and may have put back an older checkpoint.
        self._check(args, state, control, again=args.load_best_model_at_end)
        self._steps = state.global_step, state.max_steps
        if self._passed is not None and state.is_world_process_zero:
            _log.warning("%s", self.summary())

    # ── what it comes to ────────────────────────────────────────────────────────────────────────

    @property
    def passed(self) -> bool:
        """Whether a budget was passed, which has ended the run."""
        return self._passed is not None

    def summary(self) -> str:
        """Return in a sentence whether a budget was passed, when, and what the adapter has now."""
        steps, of = self._steps
        now = "; ".join(map(str, self._inside.readings))
        if self._passed is None:
            names = " and ".join(f"{r.budget} {r.limit:g}" for r in self._inside.readings)
            return f"{names} not reached in {steps} of {of} steps: {now}"
        over = " and ".join(f"{r.budget} {r.limit:g} ({r.short})" for r in self._passed.over)
        return f"step {self._passed.step} of {of} passed {over}; stopped and went back to {now}"

    def figures(self) -> dict[str, float]:
        """Return the adapter's readings as numbers, with the step that passed a budget."""
        figures = {k: v for reading in self._inside.readings for k, v in reading.figures.items()}
        return figures if self._passed is None else {**figures, "budget_step": self._passed.step}

    # ── readings and weights ────────────────────────────────────────────────────────────────────

    def _read(self, step: int) -> _Check:
        with _evaluating(self._policy.model):
            return _Check(step, tuple(meter.read(self._policy) for meter in self._meters))

    def _note(self, control: Any, check: _Check) -> None:
        due = control.should_log
        self.log({k: v for reading in check.readings for k, v in reading.figures.items()})
        control.should_log = due  # the loss's own turn, which any log ends

    def _keep(self, check: _Check) -> None:
        self._inside, self._weights = check, self._now()

    def _now(self) -> dict[str, Tensor]:
        parameters = self._policy.model.adapter_parameters()
        return {name: p.detach().clone() for name, p in parameters.items()}

    def _check(self, args: Any, state: Any, control: Any, *, again: bool = False) -> None:
        if self._inside.step == state.global_step and not again:
            return
        found = self._read(state.global_step)
        self._note(control, found)
        if not found.over:
            self._keep(found)
            return
        self._passed = self._passed or found
        self._go_back(found)
        self._note(control, self._inside)
        control.should_training_stop = True
        # As at the end of any run, so that these weights are among those to choose the best from.
        control.should_evaluate |= args.eval_strategy == "steps"
        # A run that this ends is done, and leaves no checkpoint that SIGTERM alone has asked for.
        control.should_save &= args.save_strategy != "no"
        control.should_save |= args.save_strategy == "steps"

    def _go_back(self, outside: _Check) -> None:
        start, end = self._weights, self._now()
        readings = {0: self._inside.readings}

        def put(part: int) -> None:
            for name, parameter in self._policy.model.adapter_parameters().items():
                # At 0 a weight that is infinite at the end must not count.
                between = torch.lerp(start[name], end[name], part / _PARTS) if part else start[name]
                parameter.data.copy_(between)

        def over(part: int) -> bool:
            put(part)
            check = self._read(outside.step)
            readings[part] = check.readings
            return bool(check.over)

        # Of inside (False) and outside (True) it ends between neighbours, whatever lies beyond.
        part = bisect_right(range(1, _PARTS), False, key=over)
        if part == 0 and self._inside.step == 0:
            reading = outside.over[0]
            raise TrainingError(
                f"{reading.budget} {reading.limit:g}: step {outside.step} is far over it "
                f"({reading.short}), and so is 1/{_PARTS} of the way there from the untrained "
                f"adapter; lower learning_rate or raise {reading.budget}."
            )
        put(part)
        self._keep(_Check(outside.step, readings[part]))


def _refusal(found: _Check, reading: Reading) -> str:
    if found.step:
        return (
            f"the checkpoint of step {found.step} is over it already ({reading.short}); resume "
            f"from an earlier one or raise {reading.budget}."
        )
    return (
        f"the untrained policy is over it already ({reading.short}), because with this "
        "parameterization and these alphas it is not the base; use parameterization=residual and "
        "alpha_0 = alpha_tilde."
    )


@contextmanager
def _evaluating(model: QAdapterModel) -> Iterator[None]:
    """Put the model into eval mode for the block, without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class Tuned:
    """The largest strength inside a budget."""

    strength: float
    kl: float
    """Mean KL(π1 ‖ π_s) per token at it, nats."""
    kl_ci: tuple[float, float] | None
    """95% bootstrap interval over rows of text; None of a single row."""
    tokens: int
    """Predicted tokens."""
    max_kl: float
    max_strength: float
    kl_at_max: float
    """At the largest strength asked about."""


def tune(
    policy: Policy,
    texts: Sequence[str],
    *,
    max_kl: float,
    max_strength: float = 1.0,
    max_tokens: int = 10_000,
) -> Tuned:
    """Return the largest strength with KL(π1 ‖ π_s) ≤ `max_kl` on general text, without training.

    It is exact among the thousandths of `max_strength`: with α0 = α̃ the KL is convex in s ≥ 0 with
    its least value, 0, at s = 0 (see `KLCurve`), so it never falls as s grows, and bisection finds
    the last thousandth inside. The text's states are computed once; each of at most eleven
    strengths runs the head alone.

    Args:
        max_tokens: of the text, in windows evenly spread over it.

    Raises:
        ArtefactError: α0 ≠ α̃, so that strength 0 is not the base and less of it is not safer; or
            the KL at `max_strength` is not finite.
        DataError: the texts hold fewer than two tokens.
    """
    q = policy.model.q_config
    if q.alpha_0 != q.alpha_tilde:
        raise ArtefactError(
            f"alpha_0 {q.alpha_0} is not alpha_tilde {q.alpha_tilde}, so strength 0 is not the "
            "base, nor less strength sure to be nearer to it; train with equal ones to tune."
        )
    curve = policy.kl_curve(thinned(policy.text_rows(texts), max_tokens))

    def strength(step: int) -> float:
        return round(step * max_strength / _STRENGTHS, 6)  # as it is printed, so as it is used

    @cache
    def by_row(step: int) -> list[float]:
        return curve.by_row(strength(step))

    def kl(step: int) -> float:
        return curve.mean(by_row(step))

    # Where it is finite there, it is below, too.
    if not math.isfinite(kl(_STRENGTHS)):
        raise ArtefactError(
            f"the KL at strength {max_strength:g} is {kl(_STRENGTHS):g}: the adapter's weights are "
            "not finite, or max_strength is too large; train again, or lower it."
        )
    chosen = _STRENGTHS
    if kl(_STRENGTHS) > max_kl:
        chosen = bisect_right(range(1, _STRENGTHS), max_kl, key=kl)
    return Tuned(
        strength(chosen),
        kl(chosen),
        interval(curve, by_row(chosen)),
        curve.tokens,
        max_kl,
        max_strength,
        kl(_STRENGTHS),
    )
