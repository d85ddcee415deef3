"""Tiny policies for vLLM, engines on their exports, and how far their answers are from ours."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import SIZES_FOR_VLLM, VOCABULARY, tiny_tokenizer
from models import disturbed
from transformers import AutoConfig, AutoModelForCausalLM

from qadapter.config import QConfig
from qadapter.model import QAdapterModel
from qadapter.policy import Policy
from qadapter.strength import Strength

NEEDS_VLLM = pytest.mark.skipif(
    find_spec("vllm") is None,
    reason="vLLM is not installed here; `make test-vllm` has an environment with it",
)
BY_REQUEST = "qadapter.vllm_plugin.strengths:StrengthByRequest"
"""What vLLM's `--logits-processors` is given so that each request says its strength."""
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # So that of an engine that dies its last words are left in what a test prints, and little else.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONFAULTHANDLER": "1",
} | os.environ


def tiny_policy(
    family: str,
    *,
    trunk: float = 0.5,
    base_at: Path | None = None,
    sizes: Mapping[str, Any] = SIZES_FOR_VLLM,
    **fields: Any,
) -> Policy:
    """Return a policy on a random base, written if asked, whose adapter has a visible effect."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, tie_word_embeddings=family == "qwen2")
    base = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    if base_at is not None:
        base.save_pretrained(base_at)
        tiny_tokenizer().save_pretrained(base_at)
    q_config = QConfig(**{"alpha_0": 0.5, "alpha_tilde": 0.5, **fields})
    model = QAdapterModel.create(base, q_config, lora_r=4, trunk=trunk)
    return Policy(disturbed(model, 0.15), tiny_tokenizer())


def prompts(n: int = 50) -> list[list[int]]:
    """Return prompts of 1 to 60 tokens, of which every other one begins as the first does."""
    numbers = random.Random(0)
    found = [[numbers.randrange(4, VOCABULARY) for _ in range(60)] for _ in range(n)]
    shared = found[0][:48]
    return [
        (shared + row if i % 2 else row)[: numbers.randint(50, 60) if i % 2 else 1 + i]
        for i, row in enumerate(found)
    ]


@contextmanager
def engine(directory: Path | str, **options: Any) -> Iterator[Any]:
    """Yield an engine that has to chunk its prompts, batch them, and take their prefixes up."""
    from vllm import LLM

    small: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "block_size": 32,
        "max_logprobs": VOCABULARY,
        "enforce_eager": True,
    }
    llm = LLM(str(directory), **{**small, **options})
    try:
        yield llm
    finally:
        # Killed after five seconds otherwise, and vLLM stumbles over a process gone meanwhile.
        llm.llm_engine.engine_core.shutdown(timeout=60)
        del llm
        gc.collect()


def answers(llm: Any, rows: Sequence[Sequence[int]], *, logprobs: int, tokens: int = 6) -> Any:
    """Return vLLM's greedy answers to rows of tokens."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs, detokenize=False
    )
    inputs = [{"prompt_token_ids": list(row)} for row in rows]
    return llm.generate(inputs, params, use_tqdm=False)


def gaps(policy: Policy, found: Any, *, strength: Strength) -> torch.Tensor:
    """Return by how much each log-prob of the answers is off the policy's, nats `[N]`."""
    off = []
    for answer in found:
        (said,) = answer.outputs
        ours = log_probs(policy, answer, strength=strength)
        for row, theirs in zip(ours, said.logprobs, strict=True):
            off += [at.logprob - float(row[token]) for token, at in theirs.items()]
    return torch.tensor(off, dtype=torch.float64)


def log_probs(policy: Policy, answer: Any, *, strength: Strength) -> torch.Tensor:
    """Return the policy's log-probs `[T, V]` at the T tokens of one of vLLM's answers, nats."""
    (said,) = answer.outputs
    ids = torch.tensor([[*answer.prompt_token_ids, *said.token_ids]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids, strength=strength).logits
    return logits[0, len(answer.prompt_token_ids) - 1 : -1].double().log_softmax(-1)


def difference(policy: Policy, found: Any, *, strength: Strength) -> float:
    """Return how far the answers' log-probs are at most from the policy's, nats."""
    return float(gaps(policy, found, strength=strength).abs().max())
