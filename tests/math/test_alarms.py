"""What runs for nothing is told, and what runs well is not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qadapter.alarms import flat_loss, inverted, near_uniform, shared_prompts
from qadapter.config import QConfig
from qadapter.data import Pair, prompt_digest


def digests(*prompts: str) -> NDArray[np.int64]:
    return np.array([prompt_digest(Pair(p, "yes", "no", "dev.jsonl:1")) for p in prompts], np.int64)


def test_prompts_that_are_also_trained_on_are_counted() -> None:
    def told_of(*prompts: str) -> str | None:
        return shared_prompts(digests("a", "b"), digests(*prompts), lambda i: f"dev.jsonl:{i + 1}")

    assert told_of("c") is None
    assert told_of() is None
    told = told_of("c", "b", "a")
    assert told is not None
    assert "2 of 3 pairs" in told
    assert "first is dev.jsonl:2" in told


@pytest.mark.parametrize(
    ("alpha_0", "alpha_tilde", "form", "heat"),
    [
        (0.5, 0.5, "residual", None),
        (0.01, 1.0, "residual", "100"),
        (0.01, 1.0, "raw", None),  # the authors'
        (0.2, 6.0, "raw", "5"),
    ],
)
def test_a_policy_that_begins_near_uniform_is_told_its_temperature(
    alpha_0: float, alpha_tilde: float, form: str, heat: str | None
) -> None:
    q = QConfig(alpha_0=alpha_0, alpha_tilde=alpha_tilde, parameterization=form)  # type: ignore[arg-type]
    told = near_uniform(q)
    assert told is None if heat is None else told and f"temperature {heat}," in told


@given(st.lists(st.floats(-0.5, 0.5), min_size=4, max_size=40), st.floats(0.02, 5.0))
def test_a_margin_that_grew_is_no_alarm_and_one_that_did_not_is(
    noise: list[float], grown: float
) -> None:
    quarter = len(noise) // 4
    rest = [{"rewards/margins": m} for m in noise[quarter:]]
    assert flat_loss([*rest, *[{"rewards/margins": grown}] * quarter, {"train_loss": 0.1}]) is None
    told = flat_loss([*rest, *[{"rewards/margins": 0.0}] * quarter])
    assert told is not None
    assert f"last {quarter} of {len(noise)} log lines" in told


def test_a_short_run_says_nothing_of_its_loss() -> None:
    assert flat_loss([{"rewards/margins": 0.0}] * 3) is None


@given(st.integers(1, 500), st.floats(0, 1))
def test_accuracy_is_an_alarm_only_where_chance_does_not_explain_it(n: int, share: float) -> None:
    right = round(share * n)
    told = inverted(right / n, n)
    if right * 2 >= n:
        assert told is None
    # Normal approximation, from the other side: three deviations below one half are no chance.
    elif n >= 30 and (0.5 - right / n) > 1.5 / n**0.5:
        assert told is not None
        assert "swapped" in told
