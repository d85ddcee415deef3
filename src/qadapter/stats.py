"""Confidence intervals for the figures we print, and forgetting at equal learning."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

KL_FLOOR = 1e-6
"""Nats a token: a smaller KL is rounding of float32, and counts as none."""
RESAMPLES = 2000
"""Of every bootstrap."""
INTERVALS = (
    f"95% intervals are percentiles of {RESAMPLES:,} bootstrap resamples that redraw prompts with "
    "all their pairs, windows of text, the base’s answers, items of tasks and training seeds; one "
    "run’s share of whole votes has Wilson’s where no prompt repeats; what a task of right and "
    "wrong answers lost is resampled with an item gained and an item lost beside its own."
)
"""How the intervals here are made, in a sentence for reports."""
_BLOCK = 2**22
"""Numbers of draws held at a time."""


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


def numbered(keys: Iterable[Hashable]) -> list[int]:
    """Return a number for each key: the same for equal ones, 0, 1, … in order of appearance."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]


def by_group(values: npt.ArrayLike, groups: Iterable[Hashable]) -> tuple[Array, Array]:
    """Return the sums of values `[..., n]` over each group, `[..., G]`, and its size, `[G]`.

    Pairs of one prompt are alike, so it is prompts that are resampled, each with all its pairs
    (cluster bootstrap: Field & Welsh 2007). Groups are in order of appearance.

    Raises:
        ValueError: there is not one group a value.
    """
    items, index = np.asarray(values, np.float64), numbered(groups)
    if items.ndim == 0 or items.shape[-1] != len(index):
        raise ValueError(f"one group a value: {items.shape}, {len(index)} groups")
    sizes = np.bincount(index).astype(np.float64)
    sums = np.zeros((len(sizes), *items.shape[:-1]))
    np.add.at(sums, np.array(index, np.intp), np.moveaxis(items, -1, 0))
    return np.moveaxis(sums, 0, -1), sizes


def _draws(rng: np.random.Generator, n: int, n_resamples: int) -> Iterator[Array]:
    """Yield how often each of `n` units is drawn, `[rows, n]`: in the sample once, then resampled.

    The sample comes first, so that an estimate and its resamples are computed alike. A resample
    draws n − 1 of n with replacement: the variance of its mean is then the unbiased s²/n, where
    drawing n gives (n − 1)/n of that, a third too little at three seeds (Rao & Wu 1988).
    """
    yield np.ones((1, n))
    rows = max(1, _BLOCK // n)
    for done in range(0, n_resamples, rows):
        size = min(rows, n_resamples - done)
        yield rng.multinomial(max(n - 1, 1), np.full(n, 1 / n), size=size).astype(np.float64)


def _means(rng: np.random.Generator, sums: Array, sizes: npt.ArrayLike, n_resamples: int) -> Array:
    """Return means over the items of the units drawn, `[1 + n_resamples, ...]`; row 0: the sample.

    Args:
        sums: `[..., units]`, over the items of each.
        sizes: `[units]`, how many items or tokens it has.
    """
    counts = np.asarray(sizes, np.float64)
    if not sums.size or sums.shape[-1:] != counts.shape:
        raise ValueError(f"one size a unit: {sums.shape}, {counts.shape}")
    columns = sums.reshape(-1, len(counts)).T
    means = [
        drawn @ columns / (drawn @ counts)[:, None]
        for drawn in _draws(rng, len(counts), n_resamples)
    ]
    return np.vstack(means).reshape(-1, *sums.shape[:-1])


def _over_seeds(rng: np.random.Generator, means: Array) -> Array:
    """Return the mean over drawn seeds: `[1 + n_resamples, seeds, ...]` without its seeds."""
    n = means.shape[1]
    weights = _means(rng, np.eye(n), np.ones(n), len(means) - 1)
    mean: Array = np.einsum("rs...,rs->r...", means, weights)
    return mean


def _interval(values: Array) -> Interval:
    """Return `values[0]` with the 2.5% and 97.5% order statistics of the rest.

    Order statistics, rounded outwards: between a number and inf nothing can be interpolated.
    """
    resampled = np.sort(values[1:])
    last = len(resampled) - 1
    low, high = resampled[math.floor(0.025 * last)], resampled[math.ceil(0.975 * last)]
    return Interval(float(values[0]), float(low), float(high))


def mean_intervals(
    sums: npt.ArrayLike, sizes: npt.ArrayLike, *, n_resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Return the mean over items, units and seeds resampled, at each value of a dial.

    Args:
        sums: `[seeds, dial, units]`, over the items of each unit.
        sizes: `[units]`, its items.
    """
    rng = np.random.default_rng(seed)
    means = _over_seeds(rng, _means(rng, np.asarray(sums, np.float64), sizes, n_resamples))
    return [_interval(column) for column in means.T]


def bootstrap(
    sums: npt.ArrayLike, sizes: npt.ArrayLike, *, n_resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean over items with a percentile bootstrap interval, units drawn whole.

    A unit is what is independent of the rest: a prompt with its pairs (see `by_group`), a row of
    text with its tokens. Of very few units the interval is too narrow: of five it holds the truth
    about 86% of the time, of 15 about 94% (simulated in tests/math/test_stats.py).

    Args:
        sums: `[units]`, over the items of each.
        sizes: `[units]`, its items.

    Raises:
        ValueError: the two differ in number, or there are none.
    """
    one = np.asarray(sums, np.float64)[None, None]
    return mean_intervals(one, sizes, n_resamples=n_resamples, seed=seed)[0]


def share_interval(votes: npt.ArrayLike, groups: Iterable[Hashable]) -> tuple[float, float]:
    """Return the 95% interval of the mean of votes between 0 and 1, groups of them drawn whole.

    Where each group has one vote of 0, ½ or 1, it is Wilson's, which has a width even where all are
    alike; for probabilities, which lie closer together than votes, that would be several times too
    wide. Where the means of all groups are alike, no resample differs: there it is Wilson's of as
    many votes as there are groups.

    Raises:
        ValueError: there is not one group a vote, or no vote.
    """
    sums, sizes = by_group(votes, groups)
    if not len(sizes):
        raise ValueError("an interval needs at least one vote")
    shares = sums / sizes
    plain = len(sizes) == np.size(votes) and bool(np.isin(shares, (0.0, 0.5, 1.0)).all())
    if plain or np.ptp(shares) == 0:
        return wilson_interval(float(shares.sum()), len(shares))
    found = bootstrap(sums, sizes)
    return found.low, found.high


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    sizes: npt.ArrayLike | None = None,
    *,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return mean(a) − mean(b) over the same items, with a percentile bootstrap interval.

    A unit is drawn for both sides at once, so what makes it easy or hard for both cancels. Where
    a side has several seeds, those are drawn too, for each side by itself: the runs of two methods
    have nothing in common but a number.

    Args:
        a: `[units]`, or `[seeds, units]`: sums over the items of each.
        b: the same units; the number of seeds may differ.
        sizes: `[units]`, items of each; default one.

    Raises:
        ValueError: the units differ in number, or there are none.
    """
    left, right = (np.atleast_2d(np.asarray(x, np.float64)) for x in (a, b))
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1] or not left.size:
        raise ValueError(f"items must be the same on both sides: {left.shape}, {right.shape}")
    # Taken from both sides it cancels, and equal items differ by exactly 0 rather than by rounding.
    both = np.vstack([left, right]) - right[0]
    rng = np.random.default_rng(seed)
    means = _means(rng, both, np.ones(left.shape[1]) if sizes is None else sizes, n_resamples)
    ours, theirs = np.split(means, [len(left)], axis=1)
    return _interval(_over_seeds(rng, ours) - _over_seeds(rng, theirs))


def share_difference(a: npt.ArrayLike, b: npt.ArrayLike) -> Interval:
    """Return mean(a) − mean(b) of answers right or wrong to the same items, with its 95% interval.

    Where few items are answered otherwise few resamples differ, and where none is, none does, which
    is no proof that none ever will be. So two more are drawn with them, one that a alone has right
    and one that b alone has, as Agresti & Min (2005) add to a table of such pairs: of 100 items of
    which none is answered otherwise, the interval reaches three points to either side.

    Args:
        a: `[items]`, or `[seeds, items]`, each 0 or 1.
        b: the same items; the number of seeds may differ.

    Raises:
        ValueError: the items differ in number, or there are none.
    """
    left, right = (np.atleast_2d(np.asarray(x, np.float64)) for x in (a, b))
    value = paired_bootstrap(left, right, n_resamples=1).value
    more = [
        np.tile(answers, (len(x), 1)) for x, answers in ((left, [1.0, 0.0]), (right, [0.0, 1.0]))
    ]
    found = paired_bootstrap(np.hstack([left, more[0]]), np.hstack([right, more[1]]))
    return Interval(value, found.low, found.high)


@dataclass(frozen=True, eq=False)
class Curve:
    """What a method learned and what it forgot along its dial, in the sample and in resamples."""

    learning: Array
    """`[1 + resamples, dial]`, mean over held-out pairs; row 0 is the sample."""
    kl: Array
    """`[1 + resamples, dial]`, KL(π1 ‖ π̃) per token of text, nats; 0 below `KL_FLOOR`."""

    def intervals(self) -> list[tuple[Interval, Interval]]:
        """Return learning and KL at each value of the dial."""
        points = zip(self.learning.T, self.kl.T, strict=True)
        return [(_interval(learned), _interval(kl)) for learned, kl in points]


def resampled_curve(
    name: str,
    learning: Array,
    pairs: npt.ArrayLike,
    window_kl: Array,
    tokens: npt.ArrayLike,
    *,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Curve:
    """Return a method's curve in the sample and in resamples.

    Prompts and windows are drawn alike for all methods that are measured on the same ones. Seeds
    are drawn alike for learning and KL, and from the method's name, so that its figures do not
    depend on which other methods are compared.

    Args:
        learning: `[seeds, dial, prompts]`, sum over the pairs of each of, say, their margins.
        pairs: `[prompts]`, how many it has.
        window_kl: `[seeds, dial, windows]`, sum of KL(π1 ‖ π̃) over the tokens of a window, nats.
        tokens: `[windows]`, predicted tokens of each.

    Raises:
        ValueError: the arrays do not fit each other, or are empty.
    """
    if learning.ndim != 3 or window_kl.ndim != 3 or learning.shape[:2] != window_kl.shape[:2]:
        raise ValueError(f"the same seeds and dial: {learning.shape}, {window_kl.shape}")
    rng = np.random.default_rng(seed)
    by_unit = [
        _means(rng, learning, pairs, n_resamples),
        _means(rng, window_kl, tokens, n_resamples),
    ]
    learned, kl = (
        _over_seeds(np.random.default_rng([seed, *name.encode()]), means) for means in by_unit
    )
    return Curve(learned, np.where(kl < KL_FLOOR, 0.0, kl))


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
    curves: Mapping[str, Curve], *, reference: str, reference_dial: int
) -> dict[str, EqualLearning]:
    """Return each method's forgetting at equal learning, with percentile bootstrap intervals.

    In each resample the target is the reference's learning at its own setting. A method's curve
    runs straight from one value of the dial to the next, in dial order, through (learning, √KL);
    its forgetting is the least KL on it at which the learning is the target or more. Why so:

    - To second order the margin grows with the adapter's weight and KL with its square, so along
      that dial √KL runs nearly straight, where KL itself would be read too high, halfway from the
      base to the next value twice what it is. On other dials, and for accuracy, it is a convention.
    - Prompts, windows and seeds are all drawn anew, the first two for all methods at once, since
      they are the same pairs and the same text; the seeds for each method by itself (see
      `resampled_curve`). The target is drawn with them: that it is an estimate is part of the
      interval.
    - The reference may use its own dial too: its forgetting is the least KL on its own curve.
      Against its own setting alone, a dial would look like a method.
    - Where the target is never reached the ratio is inf, and stays in the interval: with more than
      2.5% of such resamples its upper end is inf.
    - A method with more values on its dial has more chances of a low KL; give all the same number.
    - A KL below `KL_FLOOR` counts as none, and none over none as 1: where the reference learned
      nothing beyond the base, nobody forgets less than it. Some over none is some over the floor.
    - With three seeds the spread between them is itself hardly known: where it far outweighs that
      between prompts, a 95% interval holds the truth about 85% of the time, and 97% where it does
      not (simulated in tests/math/test_stats.py).

    Args:
        curves: methods by name, on the same pairs and windows. A dial that starts at the base has
            the base for its first value.
        reference: the method whose learning is the target.
        reference_dial: the index of its own setting on its dial.
    """
    target = curves[reference].learning[:, reference_dial]
    own = _least_kl(curves[reference], target)
    found = {}
    for name, curve in curves.items():
        forgotten = _least_kl(curve, target)
        found[name] = EqualLearning(
            ratio=_interval(_ratio(forgotten, own)),
            kl=_interval(forgotten),
            not_reached=float(np.isinf(forgotten[1:]).mean()),
        )
    return found


def dial_at(
    dials: Sequence[float], learning: Sequence[float], kl: Sequence[float], target: float
) -> float | None:
    """Return where on its dial a curve has learned the target, no more, and at the least KL.

    The curve is that of `frontier`, straight in √KL from one value of the dial to the next; None
    where it does not pass the target.
    """
    places = []
    points = zip(dials, learning, np.sqrt(np.maximum(kl, 0.0)), strict=True)
    for (dial, learned, far), (next_dial, next_learned, next_far) in pairwise(points):
        if min(learned, next_learned) <= target <= max(learned, next_learned):
            rise = next_learned - learned
            share = (target - learned) / rise if rise else float(next_far < far)
            places.append((far + share * (next_far - far), dial + share * (next_dial - dial)))
    return min(places)[1] if places else None


def _least_kl(curve: Curve, target: Array) -> Array:
    """Return the least KL at which a curve's learning is the target or more, else inf.

    Shapes: curve `[R, dial]`, target and result `[R]`. On a straight piece the least is at one
    of its ends, or where it crosses the target.
    """
    learning, kl, root = curve.learning, curve.kl, np.sqrt(curve.kl)
    # Sums of the same votes in another order may differ in the last digit.
    reached = learning >= target[:, None] - 1e-9
    at_points = np.where(reached, kl, np.inf).min(axis=1)
    before, after = learning[:, :-1], learning[:, 1:]
    crosses = reached[:, :-1] != reached[:, 1:]
    rise = np.where(crosses, after - before, 1.0)
    share = np.clip((target[:, None] - before) / rise, 0.0, 1.0)
    crossed = (root[:, :-1] + share * (root[:, 1:] - root[:, :-1])) ** 2
    crossing = np.where(crosses, crossed, np.inf)
    least: Array = np.minimum(at_points, crossing.min(axis=1, initial=np.inf))
    return least


def _ratio(kl: Array, reference: Array) -> Array:
    """Return KL over the reference's, at least the floor; 1 where both are below the floor."""
    none = np.maximum(kl, reference) < KL_FLOOR
    ratio: Array = np.where(none, 1.0, kl / np.maximum(reference, KL_FLOOR))
    return ratio
