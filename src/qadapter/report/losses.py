"""What was lost on a task between two sides, each of a seed or several, over the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qadapter.stats import Interval, paired_bootstrap, share_difference

Task = Mapping[str, Any]
"""A task's scores as `comparison.json` has them: by item, with weights where they are sums."""


def is_perplexity(task: Task) -> bool:
    """Return whether a task's figure is a perplexity, the lower the better."""
    return bool(task.get("weights")) and task.get("metric") != "bits_per_byte"


def less_is_better(task: Task) -> bool:
    """Return whether a task's figure is neither a perplexity nor the higher the better."""
    return not (is_perplexity(task) or task.get("higher_is_better", True))


def lost(before: Sequence[Task], after: Sequence[Task]) -> Interval | None:
    """Return how much less `after` has of a task than `before`; of it, both have a seed each.

    Where less is better it is how much more; of a perplexity the share by which it is the higher;
    of bits a byte how many more. None where the items differ in number or in weight.
    """
    had, has = ([task["items"] for task in side] for side in (before, after))
    first = before[0]
    weights = first.get("weights") or []
    same = all((task.get("weights") or []) == weights for task in (*before, *after))
    if not had[0] or not same or len({len(items) for items in (*had, *has)}) > 1:
        return None
    if weights:
        # Nats a word, a byte, or a document: the logarithm of perplexity.
        nats = paired_bootstrap(had, has, weights)
        told = math.expm1 if is_perplexity(first) else _bits
        return Interval(*map(told, (nats.value, nats.low, nats.high)))
    better, worse = (has, had) if less_is_better(first) else (had, has)
    right_or_wrong = np.isin([*had, *has], (0.0, 1.0)).all()
    return (share_difference if right_or_wrong else paired_bootstrap)(better, worse)


def _bits(nats: float) -> float:
    return nats / math.log(2)
