"""`qadapter.stats` against walks over the data in plain Python, and against simulations.

Tolerances. A mean of n numbers in float64 is within n·eps of the oracle's, relative to its largest
term; 1e-9 covers every case here. A curve is traced by the oracle in `STEPS` steps a piece, so its
least KL is too large by at most the rise of one step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadapter import stats
from qadapter.stats import (
    Curve,
    EqualLearning,
    Interval,
    bootstrap,
    by_group,
    frontier,
    mean_intervals,
    paired_bootstrap,
    resampled_curve,
    share_difference,
    share_interval,
    wilson_interval,
)

STEPS = 2000
property_test = settings(deadline=None, max_examples=40)
TOKENS = np.full(60, 100.0)


@dataclass
class Study:
    """What one method's runs measured, before any resampling."""

    learning: Any
    """`[seeds, dial, pairs]`, each pair of a prompt of its own."""
    forgetting: Any
    """`[seeds, dial, windows]`"""


def curve(
    accuracy: list[float],
    kl: list[float],
    *,
    seeds: int = 1,
    items: int = 100,
    noise: float = 0.3,
    draw: int = 0,
) -> Study:
    """Return a study with exactly these accuracies and KLs per token, the same for every seed.

    The first `round(accuracy·items)` pairs are right; KL varies over windows by `noise`, relative.
    """
    rng = np.random.default_rng(draw)
    right = [(np.arange(items) < round(a * items)).astype(float) for a in accuracy]
    spread = 1 + noise * rng.uniform(-1, 1, len(TOKENS))
    windows = [k * spread / spread.mean() * TOKENS for k in kl]
    return Study(np.stack([np.stack(right)] * seeds), np.stack([np.stack(windows)] * seeds))


def scaled(original: Study, factor: float) -> Study:
    return Study(original.learning, original.forgetting * factor)


def at_equal_learning(
    methods: dict[str, Study], *, reference: str, reference_dial: int, **options: int
) -> dict[str, EqualLearning]:
    curves = {
        name: resampled_curve(
            name, s.learning, np.ones(s.learning.shape[2]), s.forgetting, TOKENS, **options
        )
        for name, s in methods.items()
    }
    return frontier(curves, reference=reference, reference_dial=reference_dial)


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


def test_that_no_item_changed_is_no_proof_that_none_does() -> None:
    same = np.random.default_rng(0).integers(0, 2, 100)
    for seeds in (same, [same] * 3):
        found = share_difference(same, seeds)
        assert found.value == 0.0
        assert found.low == pytest.approx(-3 / 102, abs=0.011)
        assert found.high == pytest.approx(3 / 102, abs=0.011)


def test_a_difference_of_shares_is_that_of_means() -> None:
    a, b = np.random.default_rng(1).integers(0, 2, (2, 1000))
    found, plain = share_difference(a, b), paired_bootstrap(a, b)
    assert found.value == plain.value == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.01)
    assert share_difference([1], [0]).value == 1.0


@pytest.mark.parametrize(("lost", "won"), [(0.01, 0.0), (0.03, 0.0)])
def test_a_difference_of_shares_covers_where_few_items_change(lost: float, won: float) -> None:
    """Of the plain bootstrap's a third has no width where one item of 100 changes, and misses."""
    rng, hits, plain = np.random.default_rng(2), 0, 0
    for _ in range(120):
        b = rng.integers(0, 2, 100)
        luck = rng.uniform(size=100)
        a = np.where(b == 1, luck >= 2 * lost, luck < 2 * won).astype(int)
        hits += inside(share_difference(a, b), won - lost)
        plain += inside(paired_bootstrap(a, b), won - lost)
    # Of 0.95 the standard error is 0.02.
    assert hits >= 0.91 * 120
    assert hits >= plain


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


# --- Units drawn whole ----------------------------------------------------------------------------


def walked(values: list[float], groups: list[int], seed: int, n_resamples: int) -> Interval:
    """Return mean and interval by going through the pairs of each prompt drawn, one by one."""
    prompts: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        prompts.setdefault(group, []).append(value)
    units = list(prompts.values())
    rng, means = np.random.default_rng(seed), []
    for _ in range(n_resamples):
        drawn = rng.multinomial(max(len(units) - 1, 1), [1 / len(units)] * len(units))
        pairs = [x for unit, times in zip(units, drawn, strict=True) for x in unit * int(times)]
        means.append(math.fsum(pairs) / len(pairs))
    means.sort()
    low, high = means[math.floor(0.025 * 199)], means[math.ceil(0.975 * 199)]
    return Interval(math.fsum(values) / len(values), low, high)


def close(a: Interval, b: Interval) -> bool:
    pairs = zip((a.value, a.low, a.high), (b.value, b.low, b.high), strict=True)
    return all(abs(x - y) <= 1e-9 for x, y in pairs)


clustered = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, -3.25]), st.integers(0, 8)), min_size=1, max_size=31
)
options = {"n_resamples": 200, "seed": 5}


@property_test
@given(clustered)
def test_a_cluster_bootstrap_against_a_walk_over_the_pairs(pairs: list[tuple[float, int]]) -> None:
    values, groups = [v for v, _ in pairs], [g for _, g in pairs]
    found = bootstrap(*by_group(values, groups), **options)
    assert close(found, walked(values, groups, 5, 200))


@property_test
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=31), st.randoms(use_true_random=False))
def test_with_one_pair_a_prompt_it_is_the_plain_bootstrap(values: list[float], mix: Any) -> None:
    names = [f"prompt {i}" for i in range(len(values))]
    mix.shuffle(names)
    found = bootstrap(*by_group(values, names), **options)
    assert found == bootstrap(values, np.ones(len(values)), **options)
    assert close(found, walked(values, list(range(len(values))), 5, 200))
    assert close(found, paired_bootstrap(values, np.zeros(len(values)), **options))


@property_test
@given(clustered, st.integers(2, 5))
def test_pairs_that_stand_there_m_times_tell_no_more(
    pairs: list[tuple[float, int]], times: int
) -> None:
    values, groups = [v for v, _ in pairs], [g for _, g in pairs]
    once = bootstrap(*by_group(values, groups), **options)
    assert close(once, bootstrap(*by_group(values * times, groups * times), **options))
    # As if each were a prompt of its own, m copies make it narrower: the mistake that this mends.
    if once.high - once.low > 0.2:
        alone = bootstrap(values * times * 9, np.ones(len(values) * times * 9), **options)
        assert alone.high - alone.low < once.high - once.low


@property_test
@given(clustered)
def test_a_paired_difference_is_the_bootstrap_of_differences(
    pairs: list[tuple[float, int]],
) -> None:
    left, groups = np.array([v for v, _ in pairs]), [g for _, g in pairs]
    right = np.roll(left, 1)
    sums, sizes = by_group([left, right], groups)
    found = paired_bootstrap(*sums, sizes, **options)
    assert close(found, bootstrap(*by_group(left - right, groups), **options))


def test_each_value_of_a_dial_has_the_interval_that_it_has_alone() -> None:
    sums, sizes = np.random.default_rng(0).normal(size=(1, 3, 12)), np.arange(1.0, 13.0)
    found = mean_intervals(sums, sizes, **options)
    for i, interval in enumerate(found):
        assert close(interval, bootstrap(sums[0, i], sizes, **options))


def test_blocks_of_draws_are_drawn_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=47)
    whole = bootstrap(values, np.ones(47))
    monkeypatch.setattr(stats, "_BLOCK", 47 * 123)
    assert close(bootstrap(values, np.ones(47)), whole)


@pytest.mark.parametrize(("prompts", "least"), [(5, 0.80), (15, 0.905), (80, 0.905)])
def test_prompts_cover_the_true_accuracy_where_pairs_do_not(prompts: int, least: float) -> None:
    """Four pairs a prompt, of hard and easy prompts: 95% by prompts, under 90% by pairs.

    400 trials: the standard error is 1.1 points at 95%, 2.0 at 80%.
    """
    rng, hits, by_pairs = np.random.default_rng(3), 0, 0
    for trial in range(400):
        easy = rng.beta(0.6, 0.3, prompts)
        votes = (rng.uniform(size=(prompts, 4)) < easy[:, None]).astype(float).ravel()
        groups = np.repeat(np.arange(prompts), 4)
        found = bootstrap(*by_group(votes, groups), n_resamples=400, seed=trial)
        hits += inside(found, 2 / 3)
        low, high = wilson_interval(votes.sum(), len(votes))
        by_pairs += low <= 2 / 3 <= high
    assert least <= hits / 400 <= 0.995
    assert by_pairs / 400 < 0.85


def test_a_share_has_the_interval_that_its_votes_allow() -> None:
    votes = [1.0, 0.0, 0.5, 1.0]
    assert share_interval(votes, range(4)) == wilson_interval(2.5, 4)
    # Two prompts that agree with themselves: as many votes as prompts, whatever stands there twice.
    assert share_interval([1.0] * 4, [7, 7, 8, 8]) == wilson_interval(2, 2)
    mixed = bootstrap([1.0, 1.5], [2, 2])
    assert share_interval(votes, ["a", "a", "b", "b"]) == (mixed.low, mixed.high)
    likely = [0.55, 0.6, 0.58, 0.61]
    found = bootstrap(likely, np.ones(4))
    assert share_interval(likely, range(4)) == (found.low, found.high)


# --- Forgetting at equal learning -----------------------------------------------------------------


def test_the_reference_and_a_copy_of_it_have_ratio_one() -> None:
    dpo = curve([0.5, 0.6, 0.7], [0.0, 0.02, 0.1], seeds=3)
    found = at_equal_learning({"dpo": dpo, "copy": dpo}, reference="dpo", reference_dial=2)
    assert found["dpo"].ratio == Interval(1.0, 1.0, 1.0)
    assert found["copy"].ratio.value == 1.0
    assert inside(found["copy"].ratio, 1.0)
    assert found["copy"].not_reached == 0.0


def test_a_copy_with_seeds_of_its_own_has_ratio_one_within_its_interval() -> None:
    rng = np.random.default_rng(3)

    def run(seed: int) -> Study:
        made = curve([0.5, 0.6, 0.7], [0.0, 0.02, 0.1], seeds=3)
        factor = np.exp(0.2 * rng.normal(size=(3, 1, 1)))
        return Study(made.learning, made.forgetting * factor)

    found = at_equal_learning({"dpo": run(0), "copy": run(1)}, reference="dpo", reference_dial=2)
    ratio = found["copy"].ratio
    assert ratio.low < 1 < ratio.high


def test_a_third_of_the_kl_at_each_dial_is_a_third() -> None:
    dpo = curve([0.5, 0.6, 0.7], [0.01, 0.02, 0.1])
    methods = {"dpo": dpo, "ours": scaled(dpo, 1 / 3)}
    ratio = at_equal_learning(methods, reference="dpo", reference_dial=2)["ours"].ratio
    for value in (ratio.value, ratio.low, ratio.high):
        assert abs(value - 1 / 3) <= 1e-9


def test_never_reaching_is_infinite_and_said() -> None:
    methods = {
        "dpo": curve([0.5, 0.9], [0.0, 0.1]),
        "weak": curve([0.5, 0.6], [0.0, 0.001]),
        "near": curve([0.5, 0.88], [0.0, 0.05]),
    }
    found = at_equal_learning(methods, reference="dpo", reference_dial=1)
    weak = found["weak"]
    assert weak.ratio == weak.kl == Interval(math.inf, math.inf, math.inf)
    assert weak.not_reached == 1.0
    # Pairs 88 and 89 make the difference: a resample that draws neither reaches the target.
    near = found["near"]
    assert near.ratio.value == near.ratio.high == math.inf
    assert near.ratio.low < math.inf
    assert 0.5 < near.not_reached < 1


def test_between_two_points_the_root_of_kl_is_a_straight_line() -> None:
    methods = {
        "dpo": curve([0.5, 0.7], [0.0, 0.1]),
        "ours": curve([0.5, 0.6, 0.8], [0.0, 0.01, 0.09]),
    }
    found = at_equal_learning(methods, reference="dpo", reference_dial=1)["ours"]
    assert abs(found.kl.value - 0.04) <= 1e-9
    assert abs(found.ratio.value - 0.4) <= 1e-9


@property_test
@given(st.floats(0.1, 9.0), st.lists(st.floats(0.05, 4.0), min_size=1, max_size=4), st.floats(0, 1))
def test_what_learns_with_its_weight_and_forgets_with_the_square_is_read_exactly(
    slope: float, steps: list[float], share: float
) -> None:
    dials = np.cumsum([0.0, *steps])
    made = Curve(slope * dials[None], 1e-3 * dials[None] ** 2)
    at = share * dials[-1]
    assert stats._least_kl(made, np.array([slope * at]))[0] == pytest.approx(1e-3 * at**2, abs=1e-9)


def test_a_curve_that_turns_back_keeps_its_least_kl() -> None:
    # Accuracy falls at the end, and the last point is below the target: the crossings count.
    methods = {
        "dpo": curve([0.7], [0.2]),
        "ours": curve([0.5, 0.9, 0.6], [0.0, 0.08, 0.5]),
    }
    found = at_equal_learning(methods, reference="dpo", reference_dial=0)["ours"]
    assert abs(found.kl.value - 0.02) <= 1e-9


def test_the_reference_may_use_its_own_dial() -> None:
    # At its own setting (0.2) it forgets twice what it would at the same accuracy before (0.1).
    dpo = curve([0.5, 0.7, 0.7], [0.0, 0.1, 0.2])
    methods = {"dpo": dpo, "ours": curve([0.5, 0.7], [0.0, 0.1])}
    found = at_equal_learning(methods, reference="dpo", reference_dial=2)
    assert found["dpo"].kl.value == pytest.approx(0.1, abs=1e-9)
    assert found["ours"].ratio.value == pytest.approx(1.0, abs=1e-9)


def test_where_the_reference_learned_nothing_nobody_forgets_less() -> None:
    methods = {
        "dpo": curve([0.5, 0.5], [1e-9, 0.1]),
        "base": curve([0.5], [-1e-9]),
        "costly": curve([0.6], [0.1]),
    }
    found = at_equal_learning(methods, reference="dpo", reference_dial=1)
    assert found["base"].ratio == Interval(1.0, 1.0, 1.0)
    assert found["costly"].ratio.value == pytest.approx(0.1 / stats.KL_FLOOR)
    assert found["costly"].not_reached == 0.0


def test_below_the_floor_nobody_forgets_less() -> None:
    kl = np.array([0.0, 1e-9, 9e-7, 2e-6])
    assert stats._ratio(kl[:3], np.array([5e-7, 1e-8, 0.0])).tolist() == [1.0, 1.0, 1.0]
    assert stats._ratio(kl[3:], np.array([5e-7])) == pytest.approx([2.0])
    assert stats._ratio(kl[1:2], np.array([2e-6])) == pytest.approx([5e-4])


def test_a_method_does_not_change_with_its_company() -> None:
    dpo = curve([0.5, 0.7], [0.0, 0.1], seeds=3)
    ours, other = scaled(dpo, 0.4), scaled(dpo, 2.0)
    options: dict[str, Any] = {"reference": "dpo", "reference_dial": 1, "n_resamples": 200}
    alone = at_equal_learning({"dpo": dpo, "ours": ours}, **options)
    among = at_equal_learning({"other": other, "ours": ours, "dpo": dpo}, **options)
    assert alone["ours"] == among["ours"]


def test_windows_weigh_by_their_tokens() -> None:
    made = resampled_curve(
        "any", np.ones((1, 1, 5)), np.ones(5), np.array([[[10.0, 90.0]]]), [100, 300]
    )
    ((accuracy, kl),) = made.intervals()
    assert accuracy == Interval(1.0, 1.0, 1.0)
    assert kl.value == pytest.approx(100 / 400, abs=1e-12)
    assert (kl.low, kl.high) == pytest.approx((10 / 100, 90 / 300))


def test_arrays_that_do_not_fit_are_refused() -> None:
    dpo, pairs = curve([0.5, 0.7], [0.0, 0.1]), np.ones(100)
    with pytest.raises(ValueError, match="one size a unit"):
        resampled_curve("dpo", dpo.learning, pairs[1:], dpo.forgetting, TOKENS)
    with pytest.raises(ValueError, match="one size a unit"):
        resampled_curve("dpo", dpo.learning, pairs, dpo.forgetting, TOKENS[1:])
    with pytest.raises(ValueError, match="same seeds and dial"):
        resampled_curve("dpo", dpo.learning, pairs, dpo.forgetting[:, :1], TOKENS)
    with pytest.raises(ValueError, match="one group a value"):
        by_group([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="at least one vote"):
        share_interval([], [])


# --- The oracle: one resample at a time, a curve in small steps -----------------------------------


def traced_least_kl(accuracy: list[float], kl: list[float], target: float) -> float:
    least = math.inf
    points = list(zip(accuracy, kl, strict=True))
    for (a0, k0), (a1, k1) in zip(points, points[1:] + points[-1:], strict=True):
        for step in range(STEPS + 1):
            t = step / STEPS
            if a0 + t * (a1 - a0) >= target - 1e-9:
                least = min(least, (math.sqrt(k0) + t * (math.sqrt(k1) - math.sqrt(k0))) ** 2)
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
    curve = Curve(np.array([accuracy]), np.array([kl]))
    found = stats._least_kl(curve, np.array([target / 20]))[0]
    expected = traced_least_kl(accuracy, kl, target / 20)
    # A step of √KL, twice the largest of which is the most that KL changes with it.
    step = 2 * max(kl) / STEPS
    assert found == expected or abs(found - expected) <= step + 1e-9


@property_test
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=6),
    st.integers(0, 20),
)
def test_the_dial_of_a_target_is_where_the_curve_passes_it_at_the_least_kl(
    points: list[tuple[int, int]], target: int
) -> None:
    learned, kl = [a / 20 for a, _ in points], [k / 100 for _, k in points]
    dials = [0.5 * i**1.5 for i in range(len(points))]
    found = stats.dial_at(dials, learned, kl, target / 20)
    passes = len(points) > 1 and min(learned) <= target / 20 <= max(learned)
    assert (found is not None) == passes
    if found is None:
        return
    assert np.interp(found, dials, learned) == pytest.approx(target / 20, abs=1e-9)
    grid = np.linspace(0, dials[-1], 4001)
    near = np.abs(np.interp(grid, dials, learned) - target / 20) <= 1e-9
    if near.any():
        root = np.sqrt(kl)
        assert np.interp(found, dials, root) <= np.interp(grid, dials, root)[near].min() + 1e-9


@property_test
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 50)), min_size=2, max_size=6),
    st.floats(0.0, 1.0),
)
def test_along_a_rising_curve_the_dial_is_the_frontiers(
    steps: list[tuple[int, int]], share: float
) -> None:
    learned, kl = (np.cumsum([step[i] for step in steps]) / 20 for i in (0, 1))
    target = learned[0] + share * (learned[-1] - learned[0])
    dials = list(range(len(steps)))
    found = stats.dial_at(dials, list(learned), list(kl), target)
    assert found is not None
    least = stats._least_kl(Curve(learned[None], kl[None]), np.array([target]))
    assert np.interp(found, dials, np.sqrt(kl)) ** 2 == pytest.approx(least[0], abs=1e-6)


@st.composite
def studies(draw: st.DrawFn) -> dict[str, Study]:
    n_items = draw(st.sampled_from([1, 3, 31]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    methods = {}
    for name in ("dpo", "ours"):
        seeds, dial = draw(st.sampled_from([1, 3])), draw(st.integers(1, 4))
        methods[name] = Study(
            rng.choice([0.0, 0.5, 1.0], size=(seeds, dial, n_items)),
            rng.uniform(0.5, 5.0, size=(seeds, dial, len(TOKENS))),
        )
    return methods


@property_test
@given(studies())
def test_point_estimates_against_loops(methods: dict[str, Study]) -> None:
    last = methods["dpo"].learning.shape[1] - 1
    found = at_equal_learning(methods, reference="dpo", reference_dial=last, n_resamples=50)
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
        near = abs(found[name].kl.value - expected) <= 2 * max(kl) / STEPS + 1e-9
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

        def run(factor: float, difficulty: Any = difficulty, windows: Any = windows) -> Study:
            luck = rng.normal(0, 0.1, size=(3, len(strengths), 200))
            right = (strengths[None, :, None] + luck > difficulty).astype(float)
            return Study(right, factor * windows * np.exp(rng.normal(0, 0.02, (3, 1, 1))))

        methods = {"dpo": run(1.0), "ours": run(0.4)}
        found = at_equal_learning(
            methods, reference="dpo", reference_dial=2, n_resamples=200, seed=trial
        )
        hits += inside(found["ours"].ratio, 0.4)
    assert 0.86 <= hits / trials <= 1.0


@pytest.mark.parametrize("successes", [0, 0.5, 3, 10])
def test_wilson_interval_solves_its_own_equation(successes: float) -> None:
    """Its bounds are the p for which the observed share is z standard errors away (Wilson 1927)."""
    n, z = 10, 1.959964
    for bound in wilson_interval(successes, n):
        if 0 < bound < 1:
            away = abs(successes / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert away == pytest.approx(z)
