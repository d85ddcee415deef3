"""`qadapter.stats` against walks over the data in plain Python, and against simulations.

Tolerances. A mean of n numbers in float64 is within n·eps of the oracle's, relative to its largest
term; 1e-9 covers every case here. A curve is traced by the oracle in `STEPS` steps a piece, so its
least KL is too large by at most the rise of one step.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadapter import stats
from qadapter.stats import Curve, Interval, frontier, paired_bootstrap, point_intervals

STEPS = 2000
property_test = settings(deadline=None, max_examples=40)
TOKENS = np.full(60, 100.0)


def curve(
    accuracy: list[float],
    kl: list[float],
    *,
    seeds: int = 1,
    items: int = 100,
    noise: float = 0.3,
    draw: int = 0,
) -> Curve:
    """Return a curve with exactly these accuracies and KLs per token, the same for every seed.

    The first `round(accuracy·items)` pairs are right; KL varies over windows by `noise`, relative.
    """
    rng = np.random.default_rng(draw)
    right = [(np.arange(items) < round(a * items)).astype(float) for a in accuracy]
    spread = 1 + noise * rng.uniform(-1, 1, len(TOKENS))
    windows = [k * spread / spread.mean() * TOKENS for k in kl]
    return Curve(np.stack([np.stack(right)] * seeds), np.stack([np.stack(windows)] * seeds))


def scaled(original: Curve, factor: float) -> Curve:
    return Curve(original.learning, original.forgetting * factor)


def inside(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


# --- Differences over the same items --------------------------------------------------------------


def test_paired_bootstrap_is_the_difference_of_means() -> None:
    found = paired_bootstrap([1, 0, 1, 1], [0, 0, 1, 0])
    assert found.value == 0.5
    assert found.low <= 0.5 <= found.high
    assert found == paired_bootstrap([1, 0, 1, 1], [0, 0, 1, 0])
    items = np.random.default_rng(0).normal(size=31)
    zeros = np.zeros(31)
    assert paired_bootstrap(items, zeros) != paired_bootstrap(items, zeros, seed=1)


def test_paired_bootstrap_of_equal_differences_has_no_width() -> None:
    items = np.random.default_rng(0).normal(0, 100, 47)
    found = paired_bootstrap(items + 1, items)
    for value in (found.value, found.low, found.high):
        assert abs(value - 1) <= 1e-9


def test_paired_bootstrap_of_equal_items_is_exactly_zero() -> None:
    items = np.random.default_rng(0).uniform(size=300)
    assert paired_bootstrap(items, [items] * 3) == Interval(0.0, 0.0, 0.0)
    assert paired_bootstrap([items] * 3, [items] * 7) == Interval(0.0, 0.0, 0.0)


def test_paired_bootstrap_averages_seeds_before_items() -> None:
    found = paired_bootstrap([[0.0, 2.0], [4.0, 6.0]], [[1.0, 1.0]])
    assert found.value == 2.0
    # A resample is one seed of two and one item of two: from 0 − 1 to 6 − 1.
    assert (found.low, found.high) == (-1.0, 5.0)


@pytest.mark.parametrize(
    ("a", "b"), [([1, 2], [1]), ([], []), ([[[1.0]]], [1.0]), ([[1, 2], [1, 2]], [1, 2, 3])]
)
def test_paired_bootstrap_refuses_other_items(a: Any, b: Any) -> None:
    with pytest.raises(ValueError, match="items must be the same"):
        paired_bootstrap(a, b)


def covered(n: int, seeds: int, seed_sd: float, trials: int = 400) -> float:
    """Return how often the interval holds a true difference of 0.3, on correlated normal items."""
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(trials):
        shared = rng.normal(0, 1, n)
        b = shared + rng.normal(0, 0.5, n)
        a = 0.3 + shared + rng.normal(0, 0.5, (seeds, n)) + rng.normal(0, seed_sd, (seeds, 1))
        hits += inside(paired_bootstrap(a, b, n_resamples=400, seed=trial), 0.3)
    return hits / trials


def test_paired_bootstrap_covers_the_true_difference() -> None:
    # 400 trials at 95%: the standard error is 1.1 points, so a false alarm is 1 in 10,000 below.
    assert 0.905 <= covered(n=60, seeds=1, seed_sd=0.0) <= 0.995


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "least"), [(3, 0.05, 0.92), (3, 0.3, 0.79), (5, 0.3, 0.88)]
)
def test_paired_bootstrap_covers_with_few_seeds_that_differ(
    seeds: int, seed_sd: float, least: float
) -> None:
    # Items alone leave a standard error of 0.06. Where seeds differ by five times that, three of
    # them are too few for a percentile: about 85%.
    assert least <= covered(n=60, seeds=seeds, seed_sd=seed_sd) <= 0.995


def test_the_width_is_that_of_the_standard_error() -> None:
    # n − 1 draws: 2·1.96·s/√n, within what 20,000 resamples leave open (2%, four deviations).
    for n in (20, 300):
        items = np.random.default_rng(n).normal(size=n)
        found = paired_bootstrap(items, np.zeros(n), n_resamples=20_000)
        expected = 2 * 1.959964 * items.std(ddof=1) / math.sqrt(n)
        assert abs((found.high - found.low) / expected - 1) < 0.05


# --- Forgetting at equal learning -----------------------------------------------------------------


def test_the_reference_and_a_copy_of_it_have_ratio_one() -> None:
    dpo = curve([0.5, 0.6, 0.7], [0.0, 0.02, 0.1], seeds=3)
    found = frontier({"dpo": dpo, "copy": dpo}, TOKENS, reference="dpo", reference_dial=2)
    assert found["dpo"].ratio == Interval(1.0, 1.0, 1.0)
    assert found["copy"].ratio.value == 1.0
    assert inside(found["copy"].ratio, 1.0)
    assert found["copy"].not_reached == 0.0


def test_a_copy_with_seeds_of_its_own_has_ratio_one_within_its_interval() -> None:
    rng = np.random.default_rng(3)

    def run(seed: int) -> Curve:
        made = curve([0.5, 0.6, 0.7], [0.0, 0.02, 0.1], seeds=3)
        factor = np.exp(0.2 * rng.normal(size=(3, 1, 1)))
        return Curve(made.learning, made.forgetting * factor)

    found = frontier({"dpo": run(0), "copy": run(1)}, TOKENS, reference="dpo", reference_dial=2)
    ratio = found["copy"].ratio
    assert ratio.low < 1 < ratio.high


def test_a_third_of_the_kl_at_each_dial_is_a_third() -> None:
    dpo = curve([0.5, 0.6, 0.7], [0.01, 0.02, 0.1])
    methods = {"dpo": dpo, "ours": scaled(dpo, 1 / 3)}
    ratio = frontier(methods, TOKENS, reference="dpo", reference_dial=2)["ours"].ratio
    for value in (ratio.value, ratio.low, ratio.high):
        assert abs(value - 1 / 3) <= 1e-9


def test_never_reaching_is_infinite_and_said() -> None:
    methods = {
        "dpo": curve([0.5, 0.9], [0.0, 0.1]),
        "weak": curve([0.5, 0.6], [0.0, 0.001]),
        "near": curve([0.5, 0.88], [0.0, 0.05]),
    }
    found = frontier(methods, TOKENS, reference="dpo", reference_dial=1)
    weak = found["weak"]
    assert weak.ratio == weak.kl == Interval(math.inf, math.inf, math.inf)
    assert weak.not_reached == 1.0
    # Pairs 88 and 89 make the difference: a resample that draws neither reaches the target.
    near = found["near"]
    assert near.ratio.value == near.ratio.high == math.inf
    assert near.ratio.low < math.inf
    assert 0.5 < near.not_reached < 1


def test_between_two_points_is_a_straight_line() -> None:
    methods = {
        "dpo": curve([0.5, 0.7], [0.0, 0.1]),
        "ours": curve([0.5, 0.6, 0.8], [0.0, 0.01, 0.05]),
    }
    found = frontier(methods, TOKENS, reference="dpo", reference_dial=1)["ours"]
    assert abs(found.kl.value - 0.03) <= 1e-9
    assert abs(found.ratio.value - 0.3) <= 1e-9


def test_a_curve_that_turns_back_keeps_its_least_kl() -> None:
    # Accuracy falls at the end, and the last point is below the target: the crossings count.
    methods = {
        "dpo": curve([0.7], [0.2]),
        "ours": curve([0.5, 0.9, 0.6], [0.0, 0.08, 0.5]),
    }
    found = frontier(methods, TOKENS, reference="dpo", reference_dial=0)["ours"]
    assert abs(found.kl.value - 0.04) <= 1e-9


def test_the_reference_may_use_its_own_dial() -> None:
    # At its own setting (0.2) it forgets twice what it would at the same accuracy before (0.1).
    dpo = curve([0.5, 0.7, 0.7], [0.0, 0.1, 0.2])
    methods = {"dpo": dpo, "ours": curve([0.5, 0.7], [0.0, 0.1])}
    found = frontier(methods, TOKENS, reference="dpo", reference_dial=2)
    assert found["dpo"].kl.value == pytest.approx(0.1, abs=1e-9)
    assert found["ours"].ratio.value == pytest.approx(1.0, abs=1e-9)


def test_where_the_reference_learned_nothing_nobody_forgets_less() -> None:
    methods = {
        "dpo": curve([0.5, 0.5], [1e-9, 0.1]),
        "base": curve([0.5], [-1e-9]),
        "costly": curve([0.6], [0.1]),
    }
    found = frontier(methods, TOKENS, reference="dpo", reference_dial=1)
    assert found["base"].ratio == Interval(1.0, 1.0, 1.0)
    assert found["costly"].ratio.value == math.inf
    assert found["costly"].not_reached == 0.0


def test_a_method_does_not_change_with_its_company() -> None:
    dpo = curve([0.5, 0.7], [0.0, 0.1], seeds=3)
    ours, other = scaled(dpo, 0.4), scaled(dpo, 2.0)
    options: dict[str, Any] = {"reference": "dpo", "reference_dial": 1, "n_resamples": 200}
    alone = frontier({"dpo": dpo, "ours": ours}, TOKENS, **options)
    among = frontier({"other": other, "ours": ours, "dpo": dpo}, TOKENS, **options)
    assert alone["ours"] == among["ours"]


def test_windows_weigh_by_their_tokens() -> None:
    tokens = [100, 300]
    made = Curve(np.ones((1, 1, 5)), np.array([[[10.0, 90.0]]]))
    ((accuracy, kl),) = point_intervals("any", made, tokens)
    assert accuracy == Interval(1.0, 1.0, 1.0)
    assert kl.value == pytest.approx(100 / 400, abs=1e-12)
    assert (kl.low, kl.high) == pytest.approx((10 / 100, 90 / 300))


def test_other_items_or_windows_are_refused() -> None:
    dpo = curve([0.5, 0.7], [0.0, 0.1])
    fewer = curve([0.5, 0.7], [0.0, 0.1], items=99)
    with pytest.raises(ValueError, match="fewer: has other items"):
        frontier({"dpo": dpo, "fewer": fewer}, TOKENS, reference="dpo", reference_dial=1)
    with pytest.raises(ValueError, match="dpo: has other items"):
        frontier({"dpo": dpo}, TOKENS[1:], reference="dpo", reference_dial=1)
    with pytest.raises(ValueError, match="same seeds and dial"):
        Curve(dpo.learning, dpo.forgetting[:, :1])


# --- The oracle: one resample at a time, a curve in small steps -----------------------------------


def traced_least_kl(accuracy: list[float], kl: list[float], target: float) -> float:
    least = math.inf
    points = list(zip(accuracy, kl, strict=True))
    for (a0, k0), (a1, k1) in zip(points, points[1:] + points[-1:], strict=True):
        for step in range(STEPS + 1):
            t = step / STEPS
            if a0 + t * (a1 - a0) >= target - 1e-9:
                least = min(least, k0 + t * (k1 - k0))
    return least


@property_test
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=6),
    st.integers(0, 20),
)
def test_least_kl_against_a_walk_along_the_curve(
    points: list[tuple[int, int]], target: int
) -> None:
    accuracy, kl = [a / 20 for a, _ in points], [k / 100 for _, k in points]
    found = stats._least_kl(np.array([accuracy]), np.array([kl]), np.array([target / 20]))[0]
    expected = traced_least_kl(accuracy, kl, target / 20)
    step = max([abs(p - q) for p, q in pairwise(kl)], default=0.0) / STEPS
    assert found == expected or abs(found - expected) <= step + 1e-9


@st.composite
def studies(draw: st.DrawFn) -> dict[str, Curve]:
    n_items = draw(st.sampled_from([1, 3, 31]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    methods = {}
    for name in ("dpo", "ours"):
        seeds, dial = draw(st.sampled_from([1, 3])), draw(st.integers(1, 4))
        methods[name] = Curve(
            rng.choice([0.0, 0.5, 1.0], size=(seeds, dial, n_items)),
            rng.uniform(0.5, 5.0, size=(seeds, dial, len(TOKENS))),
        )
    return methods


@property_test
@given(studies())
def test_point_estimates_against_loops(methods: dict[str, Curve]) -> None:
    last = methods["dpo"].learning.shape[1] - 1
    found = frontier(methods, TOKENS, reference="dpo", reference_dial=last, n_resamples=50)
    traced = {}
    for name, made in methods.items():
        seeds, dial, n_items = made.learning.shape
        accuracy, kl = [], []
        for d in range(dial):
            votes = [made.learning[s, d, i] for s in range(seeds) for i in range(n_items)]
            sums = [made.forgetting[s, d].sum() / TOKENS.sum() for s in range(seeds)]
            accuracy.append(math.fsum(votes) / len(votes))
            kl.append(math.fsum(sums) / seeds)
        traced[name] = (accuracy, kl)
    target = traced["dpo"][0][last]
    for name, (accuracy, kl) in traced.items():
        expected = traced_least_kl(accuracy, kl, target)
        near = abs(found[name].kl.value - expected) <= max(kl) / STEPS + 1e-9
        assert found[name].kl.value == expected or near
    assert found["dpo"].ratio == Interval(1.0, 1.0, 1.0)
    for result in found.values():
        assert result.ratio.low <= result.ratio.high
        assert (result.ratio.high == math.inf) >= (result.not_reached > 0.03)


def test_frontier_covers_the_true_ratio() -> None:
    """Two methods, true accuracies on the same line, true KLs at 0.4 of each other's: 95% ± 3.3.

    An item has a difficulty; a method of strength x judges it rightly where x exceeds it.
    """
    rng = np.random.default_rng(11)
    strengths, trials, hits = np.array([0.45, 0.6, 0.75, 0.9]), 200, 0
    for trial in range(trials):
        difficulty = rng.uniform(size=(1, 1, 200))
        windows = rng.gamma(4.0, 1.0, size=(1, 1, len(TOKENS))) * strengths[None, :, None]

        def run(factor: float, difficulty: Any = difficulty, windows: Any = windows) -> Curve:
            luck = rng.normal(0, 0.1, size=(3, len(strengths), 200))
            right = (strengths[None, :, None] + luck > difficulty).astype(float)
            return Curve(right, factor * windows * np.exp(rng.normal(0, 0.02, (3, 1, 1))))

        methods = {"dpo": run(1.0), "ours": run(0.4)}
        found = frontier(
            methods, TOKENS, reference="dpo", reference_dial=2, n_resamples=200, seed=trial
        )
        hits += inside(found["ours"].ratio, 0.4)
    assert 0.86 <= hits / trials <= 1.0


@pytest.mark.parametrize("successes", [0, 0.5, 3, 10])
def test_wilson_interval_solves_its_own_equation(successes: float) -> None:
    """Its bounds are the p for which the observed share is z standard errors away (Wilson 1927)."""
    n, z = 10, 1.959964
    for bound in stats.wilson_interval(successes, n):
        if 0 < bound < 1:
            away = abs(successes / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert away == pytest.approx(z)
