"""Every way of running a policy gives the one policy that `backends.oracle` computes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import (
    CASES,
    TOKENS,
    TOLERANCE,
    Answer,
    Backend,
    Case,
    check,
    of_tokens,
    oracle,
    write,
)
from serving import Running
from transformers import AutoModelForCausalLM

from qadapter.cache import Kept, Layout, TrunkCache
from qadapter.compare.measure import row_figures
from qadapter.data import TokenizedPair
from qadapter.export import export_merged, export_policy
from qadapter.lm import QAdapterLM
from qadapter.model import QAdapterModel, Streams
from qadapter.objective import batch_streams, batch_transitions, packable
from qadapter.packing import pack_pairs, pad_rows
from qadapter.policy import Policy


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("backends")
    write(directory)
    return directory


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, list[Answer]]:
    return {name: oracle(place, case) for name, case in CASES.items()}


def tokens_of(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def eager(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    ids, mask = pad_rows([[*a.prompt_ids, *a.tokens] for a in answers], 1, left=True)
    model = case.policy(place).model
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, strength=case.strength).logits
    return of_tokens(logits[:, -TOKENS - 1 : -1], tokens_of(answers))


def pairs_of(answers: Sequence[Answer]) -> list[TokenizedPair]:
    """Return pairs whose chosen response is the answer, and the rejected one longer."""
    return [
        TokenizedPair(a.prompt_ids, a.tokens, [*a.tokens[::-1], 5], False, False, "answers:1")
        for a in answers
    ]


def of_pairs(
    policy: Policy, streams: Streams, batch: Any, case: Case, answers: Sequence[Answer]
) -> list[list[float]]:
    """Return log-probs of the chosen responses' tokens."""
    moves = batch_transitions(policy.model.q_config, batch)
    states = streams.at((moves.rows, moves.columns)).at(moves.taken)
    with torch.no_grad():
        logits = policy.model.policy_logits(states, case.strength)
    chosen = moves.response < len(answers)
    return of_tokens(logits[chosen].unflatten(0, (len(answers), TOKENS)), tokens_of(answers))


def packed(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    policy, batch = case.policy(place), pack_pairs(pairs_of(answers))
    assert packable(policy.model)
    with torch.no_grad():
        streams = batch_streams(policy.model, batch)
    return of_pairs(policy, streams, batch, case, answers)


def cached_trunk(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    policy, pairs = case.policy(place), pairs_of(answers)
    model: QAdapterModel = policy.model
    layout = Layout(model.base_width, model.dtype, scalars=False)
    options: dict[str, Any] = {"limit": 2**30}
    cache = TrunkCache(place / "trunk", model.trunk_key, pairs, layout, **options)
    with torch.no_grad():
        streams = batch_streams(model, pack_pairs(pairs))
        assert streams.trunk is not None
        cache.write(pack_pairs(pairs), Kept(streams.trunk[0], streams.base[0]))
    again = pairs[::-1]  # what a batch is made of is found in any order
    batch = pack_pairs(again)
    kept = TrunkCache(place / "trunk", model.trunk_key, pairs, layout, **options).read(batch)
    assert kept is not None
    known = {**batch, "trunk": kept.trunk[None], "base_states": kept.base[None]}
    with torch.no_grad():
        streams = batch_streams(model, known)
    return of_pairs(policy, streams, batch, case, answers[::-1])[::-1]


def generate(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    return generated(case.policy(place).model, answers, strength=case.strength)


def generated(model: Any, answers: Sequence[Answer], **options: Any) -> list[list[float]]:
    ids, mask = pad_rows([answer.prompt_ids for answer in answers], 1, left=True)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert out.sequences[:, ids.shape[1] :].tolist() == tokens_of(answers)
    return of_tokens(torch.stack(out.logits, 1), tokens_of(answers))


def exported(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    directory = place / f"export {case}"
    export_policy(case.policy(place), directory, strength=case.strength)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return generated(model, answers)


def merged(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    export_merged(case.policy(place), place / "merged")
    model = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    return generated(model, answers)


def server(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    policy = case.policy(place)
    running = Running(policy)
    strength: Any = case.strength
    if len(case.adapters) > 1:
        strength = dict(zip(case.adapters, case.strengths, strict=True))
    try:
        found = []
        for answer in answers:
            options = {"max_tokens": TOKENS, "logprobs": True, "strength": strength}
            reply = running.chat(messages=answer.prompt, **options).json()
            said = reply["choices"][0]["logprobs"]["content"]
            raw = b"".join(bytes(token["bytes"]) for token in said)
            text = policy.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            assert raw.decode(errors="replace") == text
            found.append([token["logprob"] for token in said])
        return found
    finally:
        running.stop()


def comparison(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    """What `qadapter compare` measures is a row's sum, here of one token."""
    rows = [[*a.prompt_ids, *a.tokens[: i + 1]] for a in answers for i in range(TOKENS)]
    starts = [len(row) - 1 for row in rows]
    found = row_figures(case.policy(place), rows, starts, [case.strengths[0]]).policy[0]
    sums: list[list[float]] = found.unflatten(0, (len(answers), TOKENS)).tolist()
    return sums


def harness(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    """lm-eval's log-likelihood, of one token at a time."""
    model = QAdapterLM(case.policy(place), strength=case.strengths[0], batch_size=3)
    asked = [
        (("", ""), [*a.prompt_ids, *a.tokens[:i]], [a.tokens[i]])
        for a in answers
        for i in range(TOKENS)
    ]
    found = [float(log_prob) for log_prob, _ in model._loglikelihood_tokens(asked, True)]
    return [found[i : i + TOKENS] for i in range(0, len(found), TOKENS)]


def two_processes(place: Path, case: Case, answers: Sequence[Answer]) -> list[list[float]]:
    """Split over two processes by FSDP2, each of which answers for half of the prompts."""
    here = Path(__file__)
    config = here.parents[2] / "configs" / "fsdp.yaml"
    asked = {"place": str(place), "case": [case.adapters, case.strengths]}
    asked |= {"rows": [[*a.prompt_ids, *a.tokens] for a in answers]}
    words = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    words += ["--num_processes", "2", str(here.with_name("backend_ranks.py"))]
    done = subprocess.run(
        [sys.executable, *words, json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


ALONE = [name for name, case in CASES.items() if len(case.adapters) == 1]
BACKENDS: dict[str, tuple[Backend, list[str]]] = {
    "eager": (eager, [*CASES]),
    "packed": (packed, [*CASES]),
    "cached trunk": (cached_trunk, ALONE),
    "generate": (generate, [*CASES]),
    "export": (exported, [*CASES]),
    "merged export": (merged, ["strength 1"]),
    "server": (server, [*CASES]),
    "comparison": (comparison, ALONE),
    "lm-eval": (harness, ALONE),
}
"""Each way of running, and the cases that it can run; vLLM's are in `tests/vllm_engine`."""


@pytest.mark.parametrize(
    ("backend", "case"), [(name, case) for name, (_, cases) in BACKENDS.items() for case in cases]
)
def test_a_backend_gives_the_policy(
    backend: str, case: str, place: Path, expected: dict[str, list[Answer]]
) -> None:
    check(BACKENDS[backend][0], place, CASES[case], expected[case])


@pytest.mark.fleet
def test_two_processes_give_the_policy(place: Path, expected: dict[str, list[Answer]]) -> None:
    for case in ("strength 1.5", "other temperature"):
        check(two_processes, place, CASES[case], expected[case])


@pytest.mark.parametrize("name", CASES)
def test_a_hundredth_of_strength_would_show(
    name: str, place: Path, expected: dict[str, list[Answer]]
) -> None:
    case = CASES[name]
    for i, strength in enumerate(case.strengths):
        moved = [*case.strengths[:i], strength + 0.01, *case.strengths[i + 1 :]]
        other = oracle(place, replace(case, strengths=tuple(moved)))
        gaps = [
            abs(a - b)
            for one, two in zip(expected[name], other, strict=True)
            for a, b in zip(one.log_probs, two.log_probs, strict=True)
        ]
        assert max(gaps) > 10 * TOLERANCE


@pytest.mark.parametrize("off", [1e-3, -1e-3, math.nan])
def test_one_log_prob_that_is_off_fails(
    off: float, place: Path, expected: dict[str, list[Answer]]
) -> None:
    answers = expected["strength 1"]

    def wrong(*_: Any) -> list[list[float]]:
        found = [list(answer.log_probs) for answer in answers]
        found[-1][-1] += off
        return found

    with pytest.raises(AssertionError):
        check(wrong, place, CASES["strength 1"], answers)


def test_the_cases_differ(expected: dict[str, list[Answer]]) -> None:
    answers = [tuple(tuple(a.tokens) for a in found) for found in expected.values()]
    assert len(set(answers)) == len(CASES)
