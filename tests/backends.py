"""What "the policy" is, said once: every way of running it must give these log-probs.

`oracle` computes them in float64 from the files alone: it adds each LoRA to the base's weights by
hand, runs whole models, and mixes their logits as METHOD M2 says. A way of running joins by one
function `(place, case, answers) -> log-probs`, tested by `check`: one that generates must find the
answers' tokens itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fakes import SIZES_FOR_VLLM, tiny_tokenizer, write_base
from models import disturbed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qadapter.config import QConfig
from qadapter.model import QAdapterModel
from qadapter.policy import Policy

TOKENS = 6
"""Of each answer."""
TOLERANCE = 5e-5
"""Of a log-prob, nats: float32 through four layers of width 128, logits of order ten."""
PROMPTS = [
    [{"role": "user", "content": text}]
    for text in ("Say 1", "What is the longest river of all, and why?", "é🙂", "a" * 50)
]
ADAPTERS: dict[str, dict[str, Any]] = {
    "deep": {"trunk": 0.25, "alpha_0": 0.5, "alpha_tilde": 0.5},
    "flat": {"trunk": 0.75, "alpha_0": 0.2, "alpha_tilde": 0.2},
    "warm": {"trunk": 0.5, "alpha_0": 0.4, "alpha_tilde": 0.6},
    "raw": {"trunk": 0.5, "alpha_0": 0.3, "alpha_tilde": 0.9, "parameterization": "raw"},
}


@dataclass(frozen=True)
class Case:
    """A policy: its adapters and the strength of each."""

    adapters: tuple[str, ...]
    strengths: tuple[float, ...]

    @property
    def strength(self) -> Any:
        """The strength as the library takes it: one number, or one each."""
        return self.strengths if len(self.strengths) > 1 else self.strengths[0]

    def policy(self, place: Path) -> Policy:
        """Return it loaded in float32."""
        return Policy.from_pretrained({name: place / name for name in self.adapters})


CASES = {
    "strength 0": Case(("deep",), (0.0,)),
    "strength 0.5": Case(("deep",), (0.5,)),
    "strength 1": Case(("deep",), (1.0,)),
    "strength 1.5": Case(("deep",), (1.5,)),
    "other temperature": Case(("warm",), (0.7,)),
    "raw": Case(("raw",), (1.0,)),
    "two adapters": Case(("deep", "flat"), (0.7, 0.4)),
}


@dataclass(frozen=True)
class Answer:
    """The policy's greedy answer to a prompt."""

    prompt: list[dict[str, str]]
    prompt_ids: list[int]
    tokens: list[int]
    log_probs: list[float]


Backend = Callable[[Path, Case, Sequence[Answer]], Sequence[Sequence[float]]]


def write(place: Path) -> None:
    """Write the base and the adapters."""
    write_base(place / "base", SIZES_FOR_VLLM)
    for number, (name, fields) in enumerate(ADAPTERS.items()):
        base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
        fields = dict(fields)
        trunk = fields.pop("trunk")
        q_config = QConfig(**fields, base_model=str(place / "base"))
        model = QAdapterModel.create(base, q_config, lora_r=4, trunk=trunk)
        disturbed(model, 0.15, seed=7 + number).save_pretrained(place / name)


def oracle(place: Path, case: Case) -> list[Answer]:
    """Return the greedy answers of the case's policy and their log-probs, in float64."""
    base = _model(place, None)
    branches = [_model(place, name) for name in case.adapters]
    told = json.loads((place / case.adapters[0] / "qadapter_config.json").read_text())
    alpha_0, alpha_tilde, tokenizer = told["alpha_0"], told["alpha_tilde"], tiny_tokenizer()
    found = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = Answer(prompt, ids, [], [])
        for _ in range(TOKENS):
            z_1, *z = (_last_logits(m, [*ids, *answer.tokens]) for m in (base, *branches))
            policy = alpha_0 * z_1
            for strength, logits in zip(case.strengths, z, strict=True):
                residual = told["parameterization"] == "residual"
                policy += strength * (alpha_tilde * (logits - z_1) if residual else logits)
            log_probs = (policy / alpha_tilde).log_softmax(0)
            answer.tokens.append(int(log_probs.argmax()))
            answer.log_probs.append(float(log_probs.max()))
        assert tokenizer.eos_token_id not in answer.tokens  # else choose another seed
        found.append(answer)
    return found


def check(backend: Backend, place: Path, case: Case, answers: Sequence[Answer]) -> None:
    """Hold a backend to the answers."""
    found = backend(place, case, answers)
    for log_probs, answer in zip(found, answers, strict=True):
        gaps = [abs(a - b) for a, b in zip(log_probs, answer.log_probs, strict=True)]
        # One by one: of all but the first, max() takes no notice where they are NaN.
        assert all(gap < TOLERANCE for gap in gaps), gaps


def of_tokens(logits: torch.Tensor, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return log-probs of tokens `[R, T]`, chosen from logits `[R, T, V]`."""
    chosen = torch.tensor(tokens)[..., None]
    found: list[list[float]] = logits.double().log_softmax(-1).gather(2, chosen)[..., 0].tolist()
    return found


@torch.no_grad()
def _last_logits(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits


@cache
def _model(place: Path, adapter: str | None) -> Any:
    """Return the base in float64, with a LoRA added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float64)
    if adapter is None:
        return model
    state = load_file(place / adapter / "adapter_model.safetensors")
    told = json.loads((place / adapter / "adapter_config.json").read_text())
    names = {key.rpartition(".lora_")[0] for key in state}
    for name in names:
        down, up = (state[f"{name}.lora_{half}.weight"].double() for half in "AB")
        module = model.get_submodule(name.removeprefix("base_model.model."))
        module.weight.data += told["lora_alpha"] / told["r"] * up @ down
    return model
