"""vLLM gives the one policy that `backends.oracle` computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from backends import CASES, TOKENS, Answer, Case, check, oracle, write
from engines import NEEDS_VLLM, engine
from engines import answers as engine_answers

from qadapter.export import export_policy

pytestmark = NEEDS_VLLM


def vllm(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    directory = place / "exported"
    export_policy(case.policy(place), directory, strength=case.strength)
    with engine(directory) as llm:
        rows = [answer.prompt_ids for answer in answers]
        found = [answer.outputs[0] for answer in engine_answers(llm, rows, logprobs=1)]
    assert [list(said.token_ids) for said in found] == [answer.tokens for answer in answers]
    assert all(len(said.logprobs) == TOKENS for said in found)
    return [
        [at[token].logprob for token, at in zip(said.token_ids, said.logprobs, strict=True)]
        for said in found
    ]


# The strengths of one adapter are overridden in test_serving.py.
@pytest.mark.parametrize("name", ["raw", "two adapters"])
def test_vllm_gives_the_policy(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    check(vllm, tmp_path, CASES[name], oracle(tmp_path, CASES[name]))
