"""Confidence intervals for the figures we print, and forgetting at equal learning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

KL_FLOOR = 1e-6
"""Nats a token: a smaller KL is rounding of float32, and counts as none."""


def half_ties(a: float, b: float) -> float:
    """Return 1 where `a` is more than `b`, 0 where less, 0.5 where equal."""
    return float(a > b) + 0.5 * float(a == b)


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
    # p is always inside; rounding may say otherwise at 0 and 1.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% confidence interval; a bound is inf where the figure has none."""

    value: float
    low: float
    high: float


def _weights(rng: np.random.Generator, n: int, n_resamples: int) -> Array:
    """Return what each of `n` units weighs in a mean, `[1 + n_resamples, n]`; rows add up to 1.

    Row 0 is the sample itself, so that an estimate and its resamples are computed alike. A
    resample draws n − 1 of n with replacement: the variance of its mean is then the unbiased
    s²/n, where drawing n gives (n − 1)/n of that, a third too little at three seeds (Rao & Wu
    1988).
    """
    draws = max(n - 1, 1)
    drawn = rng.multinomial(draws, np.full(n, 1 / n), size=n_resamples) / draws
    return np.vstack([np.full((1, n), 1 / n), drawn])


def _interval(values: Array) -> Interval:
    """Return `values[0]` with the 2.5% and 97.5% order statistics of the rest.

    Order statistics, rounded outwards: between a number and inf nothing can be interpolated.
    """
    resampled = np.sort(values[1:])
    last = len(resampled) - 1
    low, high = resampled[math.floor(0.025 * last)], resampled[math.ceil(0.975 * last)]
    return Interval(float(values[0]), float(low), float(high))


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, *, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return mean(a) − mean(b) over the same items, with a percentile bootstrap interval.

    An item is drawn for both sides at once, so what makes it easy or hard for both cancels. Where
    a side has several seeds, those are drawn too, for each side by itself: the runs of two methods
    have nothing in common but a number.

    Args:
        a: `[n]`, or `[seeds, n]`.
        b: the same items; the number of seeds may differ.

    Raises:
        ValueError: the items differ in number, or there are none.
    """
    left, right = (np.atleast_2d(np.asarray(x, np.float64)) for x in (a, b))
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1] or not left.size:
        raise ValueError(f"items must be the same on both sides: {left.shape}, {right.shape}")
    # Taken from both sides it cancels, and equal items differ by exactly 0 rather than by rounding.
    shared = right[0]
    rng = np.random.default_rng(seed)
    items = _weights(rng, left.shape[1], n_resamples)
    means = (
        np.einsum("rs,rs->r", _weights(rng, len(side), n_resamples), items @ (side - shared).T)
        for side in (left, right)
    )
    return _interval(next(means) - next(means))


@dataclass(frozen=True, eq=False)
class Curve:
    """What a method learned and what it forgot, at each value of its dial.

    Raises:
        ValueError: the two arrays are not three-dimensional with the same seeds and dial.
    """

    learning: Array
    """`[seeds, dial, items]`: a held-out pair's margin, or 1 where it is judged rightly."""
    forgetting: Array
    """`[seeds, dial, windows]`: sum of KL(π1 ‖ π̃) over the tokens of a window of text, nats."""

    def __post_init__(self) -> None:
        a, b = self.learning.shape, self.forgetting.shape
        if len(a) != 3 or len(b) != 3 or a[:2] != b[:2] or 0 in (*a, *b):
            raise ValueError(f"learning {a} and forgetting {b} want the same seeds and dial")


class _Resampler:
    """Resampled learning and KL of curves; items and windows are drawn for all of them at once.

    The seeds of a method are drawn from its name, so its figures do not depend on which other
    methods are compared.
    """

    def __init__(self, items: int, tokens: npt.ArrayLike, *, n_resamples: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.n_resamples, self.seed = n_resamples, seed
        self.items = _weights(rng, items, n_resamples)
        self.tokens = np.asarray(tokens, np.float64)
        self.windows = _weights(rng, len(self.tokens), n_resamples)

    def __call__(self, name: str, curve: Curve) -> tuple[Array, Array]:
        """Return learning and KL per token, each `[1 + n_resamples, dial]`; row 0 is the sample."""
        n_items, n_windows = curve.learning.shape[2], curve.forgetting.shape[2]
        if (n_items, n_windows) != (self.items.shape[1], self.windows.shape[1]):
            raise ValueError(f"{name}: has other items or windows than the rest")
        rng = np.random.default_rng([self.seed, *name.encode()])
        seeds = _weights(rng, len(curve.learning), self.n_resamples)
        learning = self._mean(self.items, curve.learning, seeds)
        kl = self._mean(self.windows, curve.forgetting, seeds)
        kl /= (self.windows @ self.tokens)[:, None]
        return learning, np.where(kl < KL_FLOOR, 0.0, kl)

    @staticmethod
    def _mean(units: Array, values: Array, seeds: Array) -> Array:
        by_seed = np.tensordot(units, values, axes=([1], [2]))
        mean: Array = np.einsum("rsd,rs->rd", by_seed, seeds)
        return mean


def point_intervals(
    name: str, curve: Curve, tokens: npt.ArrayLike, *, n_resamples: int = 2000, seed: int = 0
) -> list[tuple[Interval, Interval]]:
    """Return learning and KL per token at each value of the dial, resampled as `frontier` does."""
    sample = _Resampler(curve.learning.shape[2], tokens, n_resamples=n_resamples, seed=seed)
    learning, kl = sample(name, curve)
    return [(_interval(a), _interval(k)) for a, k in zip(learning.T, kl.T, strict=True)]


@dataclass(frozen=True)
class EqualLearning:
    """What a method forgets where it has learned as much as the reference."""

    ratio: Interval
    """Its KL over the reference's; inf where that learning is not reached."""
    kl: Interval
    """Its KL per token, nats; inf where that learning is not reached."""
    not_reached: float
    """Share of resamples in which no value of the dial reaches the reference's learning."""


def frontier(
    curves: Mapping[str, Curve],
    tokens: npt.ArrayLike,
    *,
    reference: str,
    reference_dial: int,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, EqualLearning]:
    """Return each method's forgetting at equal learning, with percentile bootstrap intervals.

    In each resample the target is the reference's learning at its own setting. A method's curve
    runs straight from one value of the dial to the next, in dial order, through (learning, KL);
    its forgetting is the least KL on it at which the learning is the target or more. Why so:

    - Items, windows and seeds are all drawn anew, the first two for all methods at once, since
      they are the same pairs and the same text; the seeds for each method by itself. The target
      is drawn with them: that it is an estimate is part of the interval.
    - The reference may use its own dial too: its forgetting is the least KL on its own curve.
      Against its own setting alone, a dial would look like a method.
    - Where the target is never reached the ratio is inf, and stays in the interval: with more than
      2.5% of such resamples its upper end is inf.
    - A method with more values on its dial has more chances of a low KL; give all the same number.
    - A KL below `KL_FLOOR` counts as none, and none over none as 1: where the reference learned
      nothing beyond the base, nobody forgets less than it.
    - With three seeds the spread between them is itself hardly known: where it far outweighs that
      between items, a 95% interval holds the truth about 85% of the time, and 97% where it does
      not (simulated in tests/math/test_stats.py).

    Args:
        curves: methods by name, on the same items and windows. A dial that starts at the base has
            the base for its first value.
        tokens: `[windows]`, predicted tokens of each window.
        reference: the method whose learning is the target.
        reference_dial: the index of its own setting on its dial.

    Raises:
        ValueError: a method has other items or windows than the reference.
    """
    items = curves[reference].learning.shape[2]
    sample = _Resampler(items, tokens, n_resamples=n_resamples, seed=seed)
    learning, kl = sample(reference, curves[reference])
    target = learning[:, reference_dial]
    own = _least_kl(learning, kl, target)
    found = {}
    for name, curve in curves.items():
        forgotten = _least_kl(*sample(name, curve), target)
        found[name] = EqualLearning(
            ratio=_interval(_ratio(forgotten, own)),
            kl=_interval(forgotten),
            not_reached=float(np.isinf(forgotten[1:]).mean()),
        )
    return found


def _least_kl(learning: Array, kl: Array, target: Array) -> Array:
    """Return the least KL at which a curve's learning is the target or more, else inf.

    Shapes: curves `[R, dial]`, target and result `[R]`. On a straight piece the least is at one
    of its ends, or where it crosses the target.
    """
    # Sums of the same votes in another order may differ in the last digit.
    reached = learning >= target[:, None] - 1e-9
    at_points = np.where(reached, kl, np.inf).min(axis=1)
    before, after = learning[:, :-1], learning[:, 1:]
    crosses = reached[:, :-1] != reached[:, 1:]
    rise = np.where(crosses, after - before, 1.0)
    share = np.clip((target[:, None] - before) / rise, 0.0, 1.0)
    crossing = np.where(crosses, kl[:, :-1] + share * (kl[:, 1:] - kl[:, :-1]), np.inf)
    least: Array = np.minimum(at_points, crossing.min(axis=1, initial=np.inf))
    return least


def _ratio(kl: Array, reference: Array) -> Array:
    """Return KL over the reference's; 1 where both are 0, inf where only the reference's is."""
    ratio = np.where(kl > 0, np.inf, 1.0)
    return np.divide(kl, reference, out=ratio, where=reference > 0)


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
