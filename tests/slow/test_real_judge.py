"""The fitted judge on real pairs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qadapter.data import Pair, prompt_key, read_pairs
from qadapter.judge import BradleyTerryJudge

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data")) / "preference"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no pairs in {DATA}; set QADAPTER_DATA"),
]


def halves(name: str) -> tuple[list[Pair], list[Pair]]:
    """Return the training pairs in two halves that share no prompt."""
    pairs = list(read_pairs(str(DATA / f"{name}.train.jsonl")))
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(prompt_key, pairs)))}
    fit = [pair for pair in pairs if prompts[prompt_key(pair)] % 2]
    return fit, [pair for pair in pairs if not prompts[prompt_key(pair)] % 2]


def test_entertainment_is_learned_from_half_of_the_pairs() -> None:
    pytest.importorskip("sklearn")
    fit, held_out = halves("dsp_entertainment")
    judge = BradleyTerryJudge()
    judge.fit(fit)
    validation = judge.validate(held_out)
    assert validation.accuracy_ci[0] > 0.65
    assert validation.accuracy > validation.length_baseline + 0.1
