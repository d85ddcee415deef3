"""The demo: train on the pairs that the package ships; show what was learned and what was kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import pipeline

from qadapter import hub
from qadapter.config import QAdapterConfig
from qadapter.data import read_pairs, read_texts
from qadapter.files import shipped
from qadapter.policy import Drift, Policy, Score
from qadapter.train import TrainResult, run_training

PROMPTS = (
    "What is a telescope for?",
    "How do I keep my feet warm in winter?",
    "Why do we laugh?",
    "Give me advice about learning to draw.",
    "Tell me about the Alps.",
)
"""Questions that are in neither shipped file."""
STRENGTHS = (0.0, 0.5, 1.0)


def train_demo(directory: str | Path) -> TrainResult:
    """Train on the shipped pairs into `directory`.

    The anchors, paragraphs beside those that `measure` reads, hold the rest in place, at less than
    the usual weight: few pairs are to show in the answers.
    """
    return run_training(
        QAdapterConfig(
            output_dir=str(directory),
            data=shipped("demo.train.jsonl"),
            anchor_data=shipped("anchors.txt"),
            anchor_weight=30.0,
            trunk=0.75,
            learning_rate=5e-4,
            num_train_epochs=2,
            save_strategy="no",
        )
    )


@dataclass(frozen=True)
class Answers:
    """One question, answered greedily by the base and by the policy at each of `STRENGTHS`."""

    prompt: str
    base: str
    policy: tuple[str, ...]


def ask(policy: Policy, *, max_new_tokens: int = 96) -> list[Answers]:
    """Return the answers to `PROMPTS`; the base answers through transformers' own pipeline."""
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    base = hub.load_base(
        policy.model.q_config.base_model, dtype=policy.model.dtype, device=policy.model.device
    )
    ask_base = pipeline("text-generation", model=base, tokenizer=policy.tokenizer)
    said = ask_base(
        messages, max_new_tokens=max_new_tokens, do_sample=False, return_full_text=False
    )
    answers = policy.answer(
        messages * len(STRENGTHS),
        strength=[s for s in STRENGTHS for _ in PROMPTS],
        max_new_tokens=max_new_tokens,
    )
    return [
        Answers(
            prompt, cast(Any, out)[0]["generated_text"].strip(), tuple(answers[i :: len(PROMPTS)])
        )
        for i, (prompt, out) in enumerate(zip(PROMPTS, said, strict=True))
    ]


def measure(policy: Policy) -> tuple[Score, list[Drift]]:
    """Return the score on the held-out pairs, and the drift on general text at each strength."""
    score = policy.score(list(read_pairs(shipped("demo.dev.jsonl"))))
    texts = read_texts(shipped("general.txt"))
    return score, [policy.drift(texts, strength=s) for s in STRENGTHS]
