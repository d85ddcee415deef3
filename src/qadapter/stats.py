"""Confidence intervals for the figures we print."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(successes: float, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion, 95% by default (Wilson 1927).

    Raises:
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError("an interval needs at least one observation")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean_interval(
    values: Sequence[float], weights: Sequence[float], *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95% percentile interval of a weighted mean, whole items redrawn (Efron 1979).

    Raises:
        ValueError: there are fewer than two items, of which no spread can be seen.
    """
    if len(values) < 2:
        raise ValueError("an interval needs at least two items")
    value, weight = np.asarray(values, float), np.asarray(weights, float)
    # How often each item was drawn: a redrawn mean is then one product.
    shares = np.full(len(value), 1 / len(value))
    counts = np.random.default_rng(seed).multinomial(len(value), shares, size=draws)
    means = counts @ (value * weight) / (counts @ weight)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
