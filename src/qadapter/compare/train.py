"""One training of one method, from pairs to an artefact that `Policy` loads.

TRL's trainers get the very tokens that ours gets. What they train is a plain LoRA, and a plain LoRA
*is* a residual Q-adapter with α0 = α̃ = 1 (METHOD §2), so its directory gets a
`qadapter_config.json` that says so, and everything downstream is one path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from qadapter import hub
from qadapter.config import QAdapterConfig, QConfig
from qadapter.data import Pair, TokenizedPair, read_pairs, read_texts, tokenize_prompt
from qadapter.data.tokens import kept_pairs
from qadapter.errors import TrainingError
from qadapter.files import read_jsonl
from qadapter.held import anchor_rows, anchor_turn
from qadapter.judge.verdicts import plain
from qadapter.model import QAdapterModel, lora_config
from qadapter.packing import pad_rows
from qadapter.train import run_training

Params = Mapping[str, Any]

_RL_ANSWERS = 4
"""Answers of online learning to a prompt."""


@dataclass(frozen=True)
class Task:
    """What a trainer gets."""

    params: Params
    seed: int
    model: str
    """The base."""
    max_length: int
    answer_tokens: int
    """Most tokens of an answer that is made online."""
    training: Params
    """What transformers' TrainingArguments are told of batches, the same for all methods."""
    pairs: Path
    """Training pairs."""
    replay: Path | None
    """What the base samples, `{"kind", "prompt", "ids"}` a line; for Replay."""
    anchors: Path | None
    """General text; for methods with an `anchor_weight`."""
    output: Path
    """Directory to write the artefact to."""

    def anchor_weight(self) -> float:
        """Return the weight of the anchors' KL; 0 is none."""
        return float(self.params.get("anchor_weight", 0.0))


# ── ours ────────────────────────────────────────────────────────────────────────────────────────


def train_qadapter(task: Task) -> None:
    """Train a Q-adapter by `run_training`."""
    p = task.params
    made = run_training(
        QAdapterConfig(
            data=str(task.pairs),
            output_dir=str(task.output),
            model=task.model,
            alpha_0=float(p.get("alpha_0", p["alpha"])),
            alpha_tilde=float(p["alpha"]),
            beta=float(p["beta"]),
            gamma=float(p["gamma"]),
            parameterization=str(p["parameterization"]),
            objective=str(p.get("objective", "bellman")),
            lora_r=int(p.get("lora_r", 16)),
            lora_alpha=2 * int(p.get("lora_r", 16)),
            trunk=float(p["trunk"]),
            anchor_data=str(task.anchors) if task.anchor_weight() else None,
            anchor_weight=task.anchor_weight(),
            learning_rate=float(p["learning_rate"]),
            num_train_epochs=float(p["epochs"]),
            max_length=task.max_length,
            seed=task.seed,
            save_strategy="no",
            **task.training,
        )
    )
    if made.stopped_at is not None:
        raise TrainingError(f"SIGTERM ended it after step {made.stopped_at}.")


# ── TRL's ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Base:
    """The base as TRL's trainers want it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    pairs: list[TokenizedPair]
    raw: list[Pair]
    lora: Any
    base_hash: str
    ours: QAdapterConfig
    """Our defaults, which all trainers share."""


def _load(task: Task) -> _Base:
    ours = QAdapterConfig(output_dir=str(task.output), **task.training)
    dtype = torch.bfloat16 if ours.bf16 else torch.float32
    model = hub.load_base(task.model, dtype=dtype)
    tokenizer = hub.load_tokenizer(task.model)
    kept = kept_pairs(
        read_pairs(str(task.pairs)),
        tokenizer,
        {},
        end_ids=hub.end_of_turn_ids(tokenizer, model.generation_config),
        max_length=task.max_length,
    )
    raw, pairs = map(list, zip(*kept, strict=True))
    rank = int(task.params.get("lora_r", ours.lora_r))
    lora = lora_config(model, lora_r=rank, lora_alpha=2 * rank, trunk=float(task.params["trunk"]))
    return _Base(model, tokenizer, pairs, raw, lora, hub.weights_hash(model), ours)


def _settings(task: Task, base: _Base) -> dict[str, Any]:
    """Return the arguments that all trainers share with ours: batch, schedule, precision."""
    ours = base.ours
    return {
        "output_dir": str(task.output / "trl"),
        "per_device_train_batch_size": ours.per_device_train_batch_size,
        "gradient_accumulation_steps": ours.gradient_accumulation_steps,
        "learning_rate": float(task.params["learning_rate"]),
        "num_train_epochs": float(task.params["epochs"]),
        "warmup_steps": ours.warmup_steps,
        "logging_steps": ours.logging_steps,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        # The weights are in bfloat16 and the adapters in float32 already; autocast only slows it.
        "bf16": False,
        "use_cpu": not torch.accelerator.is_available(),
        "seed": task.seed,
    }


def train_dpo(task: Task) -> None:
    """Train by TRL's DPOTrainer, with SFT as a second loss where `sft_weight` is given."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):  # type: ignore[misc,unused-ignore]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # in tokens already, the same that ours sees

    base, p = _load(task), task.params
    weight = float(p.get("sft_weight", 0.0))
    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight]} if weight else {}
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    trainer = _anchored(Tokenised, task, base)(
        base.model,
        args=DPOConfig(
            **_settings(task, base),
            beta=float(p["beta"]),
            max_length=task.max_length,
            precompute_ref_log_probs=True,
            **losses,
        ),
        train_dataset=Dataset.from_list([{n: getattr(q, n) for n in names} for q in base.pairs]),
        processing_class=base.tokenizer,
        peft_config=base.lora,
    )
    _finish(task, trainer, base)


def train_sft(task: Task) -> None:
    """Train by TRL's SFTTrainer on the chosen responses, and on the base's own with `replay`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    base = _load(task)
    rows = [(q.prompt_ids, q.chosen_ids) for q in base.pairs]
    if kind := task.params.get("replay"):
        rows += _replayed(task, base, str(kind))
    sets = [
        {"input_ids": [*before, *after], "labels": [-100] * len(before) + list(after)}
        for before, after in rows
    ]
    trainer = _anchored(SFTTrainer, task, base)(
        base.model,
        args=SFTConfig(**_settings(task, base), max_length=task.max_length),
        train_dataset=Dataset.from_list(sets),
        processing_class=base.tokenizer,
        peft_config=base.lora,
    )
    _finish(task, trainer, base)


def _replayed(task: Task, base: _Base, kind: str) -> list[tuple[list[int], list[int]]]:
    """Return tokens of prompts and of what the base answered, whose end it has if it had one."""
    rows = [cast(dict[str, Any], row) for _, row in read_jsonl(str(task.replay))]
    return [
        (tokenize_prompt(row["prompt"], base.tokenizer), row["ids"])
        for row in rows
        if row["kind"] == kind
    ]


def train_rloo(task: Task) -> None:
    """Train by TRL's RLOOTrainer on a Bradley–Terry reward model of the training pairs."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    from qadapter.judge import BradleyTerryJudge

    base, p = _load(task), task.params
    # Length counts: a reward model knows nothing of being fair to it.
    judge = BradleyTerryJudge(length_controlled=False)
    judge.fit(base.raw, seed=task.seed)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        return judge.rewards(prompts, [plain(c) for c in completions])

    settings = _settings(task, base)
    size = base.ours.per_device_train_batch_size
    step = size * base.ours.gradient_accumulation_steps
    # The prompt of each pair, as many a step as the others' pairs: an epoch is as many steps. TRL
    # leaves out a step that is not full, so the first prompts are asked again until the last is.
    full = math.ceil(len(base.raw) / step) * step
    prompts = [{"prompt": pair.prompt} for pair in islice(cycle(base.raw), full)]
    settings |= {"per_device_train_batch_size": size * _RL_ANSWERS}
    trainer = RLOOTrainer(
        base.model,
        reward_funcs=reward,
        args=RLOOConfig(
            **settings,
            beta=float(p["beta"]),
            num_generations=_RL_ANSWERS,
            max_completion_length=task.answer_tokens,
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=base.tokenizer,
        peft_config=base.lora,
    )
    _finish(task, trainer, base)


def _anchored(trainer: Any, task: Task, base: _Base) -> Any:
    """Return the trainer's class with `anchor_weight` · KL(π1 ‖ π) a token added to its loss."""
    weight = task.anchor_weight()
    if not weight:
        return trainer
    rows = anchor_rows(read_texts(str(task.anchors)), base.tokenizer)
    size, turns = base.ours.per_device_train_batch_size, count()

    class Anchored(trainer):  # type: ignore[misc,unused-ignore]
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(model, *args, **kwargs)
            picked = [rows[i] for i in anchor_turn(len(rows), next(turns), size)]
            kl = weight * anchor_kl(self.accelerator.unwrap_model(model), picked)
            # Apart from the loss, which some of TRL's trainers average over micro-batches and
            # others add up.
            kl = kl / self.current_gradient_accumulation_steps
            self.accelerator.backward(kl)
            return cast(torch.Tensor, loss + kl.detach())

    return Anchored


def anchor_kl(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the mean per token of KL(π1 ‖ π) of a peft model on rows of tokens (METHOD §6)."""
    ours = QAdapterModel(model, QConfig(alpha_0=1.0, alpha_tilde=1.0))
    ids, mask = (t.to(model.device) for t in pad_rows(rows, 0))
    return ours.kl_from_base(ours.streams(ids, mask).at(mask.bool())).mean()


def _finish(task: Task, trainer: Any, base: _Base) -> None:
    """Train, and write the adapter as a Q-adapter with α0 = α̃ = 1."""
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(str(task.output), save_embedding_layers=False)
    QConfig(
        alpha_0=1.0,
        alpha_tilde=1.0,
        base_model=hub.portable_name(task.model),
        base_hash=base.base_hash,
        tokenizer_hash=hub.tokenizer_hash(base.tokenizer),
    ).save(task.output)


TRAINERS: dict[str, Callable[[Task], None]] = {
    f.__name__: f for f in (train_qadapter, train_dpo, train_sft, train_rloo)
}


def train(task: Task, trainer: str) -> None:
    """Train one method into `task.output`."""
    set_seed(task.seed)
    TRAINERS[trainer](task)
