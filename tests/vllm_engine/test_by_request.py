"""One strength a request, on vLLM's model runner V2, whose Triton kernels Python runs here."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
from engines import NEEDS_VLLM, difference, prompts, tiny_policy
from on_v2 import ENVIRONMENT, asked
from servers import post, serving

from qadapter.export import export_policy
from qadapter.vllm_plugin import BY_REQUEST

pytestmark = NEEDS_VLLM

TOLERANCE = 1e-4


@pytest.mark.parametrize("options", [{}, {"enforce_eager": False, "tensor_parallel_size": 2}])
def test_requests_of_one_batch_have_their_own_strengths(
    exported: Any, options: dict[str, Any]
) -> None:
    """Of prompts in chunks, some with cached prefixes that another strength has read."""
    policy, directory = exported("llama")
    rows = prompts(32)
    strengths = [None if i % 4 == 0 else (i % 7) / 3 for i in range(len(rows))]
    found = asked(directory, rows, strengths, **options)
    for answer, strength in zip(found, strengths, strict=True):
        own = 0.7 if strength is None else strength
        assert difference(policy, [answer], strength=own) < TOLERANCE
        assert difference(policy, [answer], strength=own + 0.01) > 2 * TOLERANCE


def test_a_request_says_a_strength_for_each_adapter(tmp_path: Path) -> None:
    policy = tiny_policy("qwen2", trunk=0.75)
    tiny_policy("qwen2", trunk=0.5).model.save_pretrained(tmp_path / "deep")
    policy.add(tmp_path / "deep", "deep")
    export_policy(policy, tmp_path / "out", strength=(1.0, 0.5))
    strengths = [None, [0.0, 0.0], [0.3, 1.2], 0.4, [1.0, 0.0], [0.0, 1.0]]
    found = asked(tmp_path / "out", prompts(len(strengths)), strengths)
    each = [(1.0, 0.5), (0.0, 0.0), (0.3, 1.2), (0.4, 0.4), (1.0, 0.0), (0.0, 1.0)]
    for answer, strength in zip(found, each, strict=True):
        assert difference(policy, [answer], strength=strength) < TOLERANCE


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
            assert "must be a finite number from 0" in refused.value.read().decode()
