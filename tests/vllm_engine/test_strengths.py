"""One strength a request, on vLLM's model runner V2, whose Triton kernels Python runs here."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import BY_REQUEST, NEEDS_VLLM, difference, prompts, tiny_policy
from on_v2 import ENVIRONMENT, ask
from servers import post, serving

from qadapter.export import export_policy

pytestmark = NEEDS_VLLM

TOLERANCE = 1e-4


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (32, {}),
        (20, {"enforce_eager": False, "tensor_parallel_size": 2}),
        # Too few blocks for all at once: some wait, and are read again.
        (20, {"num_gpu_blocks_override": 9, "tokens": 16}),
    ],
)
def test_requests_of_one_batch_have_their_own_strengths(
    exported: Any, n: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Of prompts in chunks, some with cached prefixes that another strength has read."""
    policy, directory = exported("llama")
    rows = prompts(n)
    strengths = [None if i % 4 == 0 else (i % 7) / 3 for i in range(n)]
    found = ask(tmp_path, directory, rows, strengths, **options)
    for answer, strength in zip(found.answers, strengths, strict=True):
        own = 0.7 if strength is None else strength
        assert difference(policy, [answer], strength=own) < TOLERANCE
        assert difference(policy, [answer], strength=own + 0.01) > 2 * TOLERANCE
    assert ("num_gpu_blocks_override" in options) == (found.preemptions > 0)


def test_a_request_says_a_strength_for_each_adapter(tmp_path: Path) -> None:
    policy = tiny_policy("qwen2", trunk=0.75)
    tiny_policy("qwen2", trunk=0.5).model.save_pretrained(tmp_path / "deep")
    policy.add(tmp_path / "deep", "deep")
    export_policy(policy, tmp_path / "out", strength=(1.0, 0.5))
    asked = [None, [0.0, 0.0], [0.3, 1.2], 0.4, [1.0, 0.0], [0.0, 1.0]]
    each = [(1.0, 0.5), (0.0, 0.0), (0.3, 1.2), (0.4, 0.4), (1.0, 0.0), (0.0, 1.0)]
    # One or three numbers are for other policies: such an answer ends at once.
    rows = prompts(len(asked) + 2)
    found = ask(tmp_path, tmp_path / "out", rows, [*asked, [1.0], [1.0, 0.5, 1.0]]).answers
    for answer, strength in zip(found, each, strict=False):
        assert difference(policy, [answer], strength=strength) < TOLERANCE
    for answer in found[len(each) :]:
        assert set(answer.outputs[0].token_ids) <= set(policy.end_ids)


@pytest.mark.parametrize(
    "asked",
    [
        True,
        -1,
        100.5,
        float("nan"),
        float("inf"),
        10**400,
        "0.7",
        [],
        ["a"],
        [True],
        [[1]],
        {"a": 1},
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_strength_is_refused_before_it_is_taken(asked: Any) -> None:
    from qadapter.vllm_plugin.strengths import StrengthByRequest

    with pytest.raises(ValueError, match="must be a number from 0 to 100"):
        StrengthByRequest.validate_params(SimpleNamespace(extra_args={"strength": asked}))


@pytest.mark.parametrize("asked", [None, {}, {"strength": None}, {"strength": [0, 100]}])
def test_what_is_one_is_taken(asked: Any) -> None:
    from qadapter.vllm_plugin.strengths import StrengthByRequest

    StrengthByRequest.validate_params(SimpleNamespace(extra_args=asked))


def test_the_server_takes_a_strength_and_refuses_what_is_none(tmp_path: Path) -> None:
    policy = tiny_policy("llama", base_at=tmp_path / "base")
    policy.model.save_pretrained(tmp_path / "mine")
    words = [str(tmp_path / "mine"), "--base", str(tmp_path / "base"), "--no-check-base"]
    words += [
        "--max-context",
        "128",
        f"--vllm-args=--enforce-eager --logits-processors {BY_REQUEST}",
    ]
    with serving(words, tmp_path, ENVIRONMENT) as port:
        message = [{"role": "user", "content": "Say 1"}]
        body = {"model": "mine", "messages": message, "max_tokens": 8, "temperature": 0}
        for strength in (0.0, 0.5, 2.0):
            said = post(port, body | {"vllm_xargs": {"strength": strength}})
            expected = policy.answer([message], strength=strength, max_new_tokens=8)[0]
            assert said["choices"][0]["message"]["content"].strip() == expected
        for strength in (-1, "much", []):
            with pytest.raises(urllib.error.HTTPError, match="400") as refused:
                post(port, body | {"vllm_xargs": {"strength": strength}})
            assert "must be a number from 0 to 100" in refused.value.read().decode()
