"""Training: ours, the authors' way of computing, and TRL's DPOTrainer, on the same pairs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measuring import Memory, name_of
from torch import Tensor, nn

from qadapter import functional, hub
from qadapter.config import QAdapterConfig, QConfig
from qadapter.data import Pair, TokenizedPair, read_pairs, read_texts, tokenize_pairs
from qadapter.estimate import Clock, estimate, step_flops
from qadapter.model import QAdapterModel, Streams
from qadapter.objective import PairLoss
from qadapter.packing import PairCollator
from qadapter.policy import Policy
from qadapter.train import prepare
from qadapter.trainer import QAdapterTrainer

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
TRAIN = DATA / "preference/dsp_entertainment.train.jsonl"
HELD_OUT = DATA / "preference/dsp_entertainment.dev.jsonl"
TEXT = DATA / "capability/wikitext2.valid.txt"
LAYERS = 30
BATCH = 4
WARMUP = 0.1
"""Share of the steps, where the result is judged; none where only the time is."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ── pairs ───────────────────────────────────────────────────────────────────────────────────────


def length(pair: TokenizedPair) -> int:
    """Return a pair's tokens, its prompt counted once."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def fitting(pairs: Sequence[Pair]) -> list[TokenizedPair]:
    """Return those of the pairs that fit 1024 tokens."""
    config = QAdapterConfig(output_dir=tempfile.gettempdir())
    tokenizer = hub.load_tokenizer(config.model)
    end_ids = hub.end_of_turn_ids(tokenizer, hub.load_generation_config(config.model))
    return tokenize_pairs(pairs, tokenizer, end_ids=end_ids, max_length=config.max_length)[0]


def train_pairs(count: int) -> list[TokenizedPair]:
    """Return the first `count` training pairs that fit."""
    return fitting(list(islice(read_pairs(str(TRAIN)), 2 * count)))[:count]


def held_out_pairs(count: int) -> list[Pair]:
    """Return the first `count` held-out pairs, those that do not fit among them."""
    return list(islice(read_pairs(str(HELD_OUT)), count))


def picked(pairs: int, of: int) -> list[TokenizedPair]:
    """Return a warm-up batch and `pairs` of the `of` pairs after it, lengths spread as theirs."""
    every = train_pairs(BATCH + of)
    warm, rest = every[:BATCH], every[BATCH:]
    by_length = sorted(range(len(rest)), key=lambda i: length(rest[i]))
    chosen = {by_length[(2 * i + 1) * len(rest) // (2 * pairs)] for i in range(pairs)}
    return warm + [rest[i] for i in sorted(chosen)]


def rows(pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
    """Return the pairs in batches, in order."""
    return [list(pairs[i : i + BATCH]) for i in range(0, len(pairs), BATCH)]


def middle(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Return the timed batch of middle length."""
    timed = sorted(rows(pairs)[1:], key=lambda row: sum(map(length, row)))
    return timed[len(timed) // 2]


# ── ours, and the authors' way of computing ─────────────────────────────────────────────────────


class TwoPassTrainer(QAdapterTrainer):
    """The same loss, computed as the authors do: padded rows, two passes, all logits in float32."""

    def __init__(self, *args: Any, pad_id: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, pad_id=pad_id, **kwargs)
        self.data_collator = PairCollator(pad_id)

    def _pair_loss(
        self, model: nn.Module, inner: QAdapterModel, inputs: Mapping[str, Tensor]
    ) -> PairLoss:
        q = inner.q_config
        ids, mask = inputs["input_ids"], inputs["attention_mask"]

        def logits() -> Tensor:
            # Past the wrapped `forward`, so autocast is asked for here.
            with self.accelerator.autocast():
                out = inner.peft_model(input_ids=ids, attention_mask=mask, use_cache=False)
            return out.logits.float()

        adapted = logits()
        with torch.no_grad(), inner.adapter_off():
            base = logits()
        alphas = {"alpha_0": q.alpha_0, "alpha_tilde": q.alpha_tilde}
        values = functional.residual_q(adapted, base, alpha_tilde=q.alpha_tilde)
        soft = functional.soft_value(values, base.log_softmax(-1), **alphas)
        moves = functional.transitions(inputs["completion_mask"], inputs["terminal"])
        at, columns = moves.action_rows, moves.action_columns
        rewards = functional.token_rewards(
            values[at, columns - 1, ids[at, columns]],
            soft[at, columns],
            moves.continues,
            gamma=q.gamma,
        )
        returns = functional.returns(rewards, moves.response, len(ids))
        sums = functional.preference_sums(returns, rewards)
        states = Streams(adapted.new_empty(0), None)
        return PairLoss(sums, returns, rewards, moves.response, states, moves.taken, None, columns)


def our_config(
    directory: str,
    *,
    layers: int,
    pairs: int,
    epochs: int,
    seed: int,
    two_pass: bool = False,
    warmup: float = 0.0,
) -> QAdapterConfig:
    """Return the settings of a run on the first `pairs` pairs, adapters on the last `layers`."""
    return QAdapterConfig(
        data=str(TRAIN),
        output_dir=directory,
        layers_to_transform=list(range(LAYERS - layers, LAYERS)),
        max_pairs=pairs,
        per_device_train_batch_size=BATCH,
        num_train_epochs=epochs,
        warmup_steps=warmup,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
        cache_trunk=False if two_pass else None,
        anchor_weight=0,  # which the others have not
    )


def our_trainer(
    directory: str,
    pairs: Sequence[TokenizedPair],
    *,
    layers: int,
    epochs: int,
    seed: int,
    two_pass: bool = False,
    warmup: float = 0.0,
    callbacks: Sequence[Any] = (),
) -> QAdapterTrainer:
    """Return a trainer of these pairs, in order, with adapters on the last `layers` layers."""
    config = our_config(
        directory,
        layers=layers,
        pairs=BATCH,  # only read to be checked: the pairs are given below
        epochs=epochs,
        seed=seed,
        two_pass=two_pass,
        warmup=warmup,
    )
    run = prepare(config)
    options: dict[str, Any] = {"train_dataset": list(pairs), "callbacks": list(callbacks)}
    if two_pass:
        trainer: QAdapterTrainer = TwoPassTrainer(run.model, config, pad_id=run.pad_id, **options)
    else:
        trainer = run.trainer(config, **options)
    trainer.cache_root = Path(directory) / "trunk"
    return trainer


def foretold(*, layers: int, pairs: int, seed: int) -> dict[str, Any]:
    """Return what a dry run says of the pairs that `ours` trains on: pace, operations, memory."""
    with tempfile.TemporaryDirectory() as directory:
        config = our_config(directory, layers=layers, pairs=BATCH + pairs, epochs=2, seed=seed)
        told = estimate(config)
    epochs = [told.first, told.later or told.first]
    return {
        "epochs": [
            {
                "tokens_per_second": told.tokens / epoch.seconds,
                "flops_per_second": epoch.flops / epoch.seconds,
            }
            for epoch in epochs
        ],
        "peak_gib": told.peak,
        "kept": told.kept,
    }


def pace(seconds: Sequence[float], pairs: Sequence[TokenizedPair]) -> dict[str, Any]:
    """Return an epoch's pace without its first step, which warms up."""
    timed, total = pairs[BATCH:], sum(seconds[1:])
    return {
        "pairs_per_second": len(timed) / total,
        "tokens_per_second": sum(map(length, timed)) / total,
        "seconds": total,
        "step_seconds": list(seconds),
    }


def ours(
    *,
    layers: int,
    pairs: int,
    of: int,
    epochs: int,
    seed: int,
    flops: bool,
    two_pass: bool = False,
) -> dict[str, Any]:
    """Train for some epochs; return the pace of each, memory and, if asked, operations."""
    chosen = picked(pairs, of)
    with tempfile.TemporaryDirectory() as directory:
        clock = Clock()
        trainer = our_trainer(
            directory,
            chosen,
            layers=layers,
            epochs=epochs,
            seed=seed,
            two_pass=two_pass,
            callbacks=[clock],
        )
        memory = Memory()
        trainer.train()
        figures = memory.figures()
        steps = len(rows(chosen))
        paces = [
            pace(clock.seconds[i * steps : (i + 1) * steps], chosen)
            for i in range(len(clock.seconds) // steps)
        ]
        batch, cached = middle(chosen), trainer.cache is not None
        for i, epoch in reversed(list(enumerate(paces if flops else []))):
            trainer.cache = trainer.cache if i else None
            _add_flops(epoch, trainer, trainer.data_collator(batch), batch)
        dtype = name_of(trainer.model.dtype)
    return {"epochs": paces, "cached": cached, "dtype": dtype, "pairs": pairs, **figures}


def _add_flops(
    epoch: dict[str, Any], trainer: Any, inputs: Any, batch: Sequence[TokenizedPair]
) -> None:
    """Add the operations counted in one batch, and a second: those scaled by tokens."""
    epoch["flops_per_step"] = step_flops(trainer, inputs)
    per_token = epoch["flops_per_step"] / sum(map(length, batch))
    epoch["flops_per_second"] = per_token * epoch["tokens_per_second"]


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────


def trl_trainer(
    directory: str,
    pairs: Sequence[TokenizedPair],
    *,
    layers: int,
    weights: str,
    autocast: bool,
    precompute: bool,
    seed: int,
    warmup: float = 0.0,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Return TRL's DPOTrainer on the same tokens, in order; `precompute_seconds` is its own."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):  # type: ignore[misc,unused-ignore]
        precompute_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenised already

        def _precompute_ref_logps(self, *args: Any) -> Any:
            start = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            self.precompute_seconds += time.perf_counter() - start
            return dataset

    name = QAdapterConfig(output_dir=directory).model
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    config = DPOConfig(
        output_dir=directory,
        gradient_checkpointing=False,
        bf16=autocast,
        precompute_ref_log_probs=precompute,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-4,
        warmup_steps=warmup,
        max_length=1024,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        num_train_epochs=1,
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=LINEAR,
        layers_to_transform=list(range(LAYERS - layers, LAYERS)),
    )
    return Trainer(
        hub.load_base(name, dtype=getattr(torch, weights)),
        args=config,
        train_dataset=Dataset.from_list([{n: getattr(p, n) for n in names} for p in pairs]),
        processing_class=hub.load_tokenizer(name),
        peft_config=lora,
        callbacks=list(callbacks),
    )


def trl(*, pairs: int, of: int, flops: bool, **options: Any) -> dict[str, Any]:
    """Train with DPOTrainer; return the pace of the first epoch and of later ones, and memory.

    A later epoch differs only by the reference's log-probabilities, where they were made before.
    """
    chosen = picked(pairs, of)
    memory = Memory()
    with tempfile.TemporaryDirectory() as directory:
        clock = Clock()
        trainer = trl_trainer(directory, chosen, callbacks=[clock], **options)
        trainer.train()
        figures = memory.figures()
        later = pace(clock.seconds, chosen)
        # The warm-up batch has its part in the precomputation.
        share = sum(map(length, chosen[BATCH:])) / sum(map(length, chosen))
        extra = trainer.precompute_seconds * share / (len(clock.seconds) - 1)
        first = pace([s + extra for s in clock.seconds], chosen)
        if flops:
            batch = middle(chosen)
            examples = [trainer.train_dataset[chosen.index(pair)] for pair in batch]
            _add_flops(later, trainer, trainer.data_collator(examples), batch)
    return {
        "epochs": [first, later],
        # Of the matrix products: autocast runs those of float32 weights in bfloat16.
        "dtype": "bfloat16" if options["autocast"] else options["weights"],
        "precompute_seconds": trainer.precompute_seconds,
        "pairs": pairs,
        **figures,
    }


# ── quality ─────────────────────────────────────────────────────────────────────────────────────


def quality_ours(
    *, layers: int, two_pass: bool, pairs: int, held_out: int, text_tokens: int, seed: int
) -> dict[str, Any]:
    """Train on pairs once; return accuracy on held-out pairs and KL to the base on other text."""
    with tempfile.TemporaryDirectory() as directory:
        chosen = train_pairs(pairs)
        trainer = our_trainer(
            directory, chosen, layers=layers, epochs=1, seed=seed, two_pass=two_pass, warmup=WARMUP
        )
        loss = trainer.train().training_loss
        trainer.model.save_pretrained(directory)
        found = judged(directory, held_out=held_out, text_tokens=text_tokens)
    return {**found, "train_loss": loss, "pairs": len(chosen)}


def quality_trl(*, pairs: int, held_out: int, text_tokens: int, **options: Any) -> dict[str, Any]:
    """Return the same of DPOTrainer: a plain LoRA is a Q-adapter with α0 = α̃ = 1 (METHOD §2)."""
    with tempfile.TemporaryDirectory() as directory:
        chosen = train_pairs(pairs)
        trainer = trl_trainer(directory, chosen, warmup=WARMUP, **options)
        loss = trainer.train().training_loss
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(directory, save_embedding_layers=False)
        name = QAdapterConfig(output_dir=directory).model
        QConfig(alpha_0=1.0, alpha_tilde=1.0, base_model=name).save(directory)
        found = judged(directory, held_out=held_out, text_tokens=text_tokens)
    return {**found, "train_loss": loss, "pairs": len(chosen)}


def judged(directory: str, *, held_out: int, text_tokens: int) -> dict[str, Any]:
    """Return what an adapter learned and how far it drifted, in float32.

    In bfloat16 the rounding of both branches blurs a response's log-ratio by as much as it differs.
    """
    policy = Policy.from_pretrained(directory, dtype=torch.float32)
    score = policy.score(held_out_pairs(held_out))
    drift = policy.drift(read_texts(str(TEXT)), max_tokens=text_tokens)
    return {
        "accuracy": score.accuracy,
        "accuracy_ci": score.accuracy_ci,
        "held_out": score.pairs,
        "kl_text": drift.kl,
    }
