"""What a method forgets of the base's own answers, along its dial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qadapter.stats import Array, Curve, Interval, resampled_curve


@dataclass(frozen=True, eq=False)
class OnAnswers:
    """KL on the base's own answers beside what was learned."""

    curve: Curve
    """Margins, nats, and KL."""
    kl: Sequence[Interval]
    """KL per token, nats, at each value of the dial."""
    tokens: Sequence[int]
    """Of each answer."""


def on_answers(
    name: str,
    runs: Sequence[Mapping[float, Mapping[str, Any]]],
    dials: Sequence[float],
    margins: Array,
    pairs: Array,
) -> OnAnswers | None:
    """Return that of a method, or None where not all runs have it on the same answers.

    Older runs have none, nor has one where the base said nothing.

    Args:
        name: seeds are drawn from it, as for `resampled_curve`.
        runs: points by dial, one mapping a seed.
        margins: `[seeds, dial, prompts]`, their sum over the pairs of each, nats.
        pairs: `[prompts]`, how many each has.
    """
    found = [run[dial] for run in runs for dial in dials]
    tokens = found[0].get("answer_tokens")
    if not tokens or any(point.get("answer_tokens") != tokens for point in found):
        return None
    far = np.array([[run[d]["answer_kl"] for d in dials] for run in runs], np.float64)
    curve = resampled_curve(name, margins, pairs, far, tokens)
    return OnAnswers(curve, [kl for _, kl in curve.intervals()], tokens)
