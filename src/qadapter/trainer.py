"""Training: METHOD M5 on `transformers.Trainer`."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qadapter import alarms, files, hub, ranks
from qadapter.budget import Budget
from qadapter.cache import Kept, Layout, TrunkCache, share_kept
from qadapter.config import QAdapterConfig
from qadapter.data import (
    TokenizedPair,
    pairs_digest,
)
from qadapter.engines import EngineTrainer
from qadapter.errors import ConfigError, TrainingError, UserError
from qadapter.figures import Figures
from qadapter.held import AnchorKL
from qadapter.model import BaseScalars, QAdapterModel
from qadapter.objective import (
    PairLoss,
    batch_streams,
    batch_transitions,
    packable,
    pair_loss,
)
from qadapter.packing import PairCollator, collate_rows, fill_rows, pack_pairs

_log = logging.getLogger(__name__)

_TOLD_ONLY = ("base_model", "qadapter_version")
"""Fields of QConfig that may differ where the policy does not."""
_KEPT_ALIKE = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "anchor_weight",
    "bf16",
    "data_seed",
    "fp16",
    "learning_rate",
    "lr_scheduler_type",
    "max_grad_norm",
    "optim",
    "seed",
    "tokens_per_batch",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
)
"""Settings that transformers would take from the checkpoint unsaid, or change in midway."""
_TRIM_EVERY = 4
"""Micro-batches between two trims: often enough to bound the heap, too seldom to cost a percent."""


class _TrimHeap(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Gives freed memory back to the system, where the C library is glibc.

    Rows all differ in length, so the holes they leave in its heap do not fit the next ones, and the
    process grows to twice what lives in it.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None) if os.name == "posix" else None
        self._trim = getattr(libc, "malloc_trim", None)
        self._count = 0

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._count += 1
        if self._trim and self._count % _TRIM_EVERY == 0:
            self._trim(0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.on_substep_end()


class _ChecksTheStart(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Refuse a checkpoint past the run's end, and an optimizer that lacks a part of the adapter.

    Engines that shard have optimizers of their own.
    """

    def __init__(self, trainer: QAdapterTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        if state.global_step > state.max_steps:
            raise ConfigError(
                f"resume_from_checkpoint: {state.global_step} steps are done and the run has only "
                f"{state.max_steps}; raise max_steps or num_train_epochs, or name an older one."
            )
        trainer = self._trainer
        if trainer.shards or trainer.is_deepspeed_enabled or optimizer is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        adapter = cast(QAdapterModel, trainer.model).adapter_parameters()
        missing = [n for n, p in adapter.items() if p.requires_grad and id(p) not in held]
        if missing:
            raise TrainingError(
                f"the optimizer lacks {len(missing)} of {len(adapter)} adapter weights, first "
                f"{missing[0]}; make it of model.adapter_parameters(), or pass none."
            )


class QAdapterTrainer(EngineTrainer):
    """transformers' Trainer with the Q-adapter loss, exact over gradient accumulation and ranks.

    Args:
        model: a `QAdapterModel`.
        args: a `QAdapterConfig`.
        train_dataset: a sequence of `TokenizedPair`.
        eval_dataset: the same, or None.
        pad_id: token id that fills rows; its value never matters.
        anchors: token ids of general texts on which the residual is pulled to zero (METHOD §6).
            None are made here: `qadapter.train.prepare` lets the base write some.
        budget: what ends the run before the policy is too far from its base, on this same model.

    Raises:
        ConfigError: settings contradict each other, or ask for a budget that is not given.
        TrainingError: nothing is trainable; the loss is not finite; after training, the adapter
            did not change or the base did.
    """

    def __init__(
        self,
        model: QAdapterModel,
        args: QAdapterConfig,
        *,
        train_dataset: Sequence[TokenizedPair] | None = None,
        eval_dataset: Sequence[TokenizedPair] | None = None,
        pad_id: int = 0,
        anchors: Sequence[Sequence[int]] = (),
        budget: Budget | None = None,
        **kwargs: Any,
    ) -> None:
        if not any(p.requires_grad for p in model.adapter_parameters().values()):
            raise TrainingError(
                "nothing to train: every adapter weight is frozen; load it with is_trainable=True."
            )
        half = [n for n, p in model.adapter_parameters().items() if p.itemsize < 4]
        if half:
            raise TrainingError(
                f"{half[0]} is in half precision, in which small updates are rounded away; keep "
                "the adapter in float32 (only the base may be in bfloat16)."
            )
        if args.n_gpu > 1:  # transformers would scatter one packed row over them
            raise ConfigError(
                f"{args.n_gpu} GPUs are seen by one process; start one for each by `accelerate "
                "launch` or torchrun, or show it one by CUDA_VISIBLE_DEVICES."
            )
        if args.tokens_per_batch and not packable(model):
            raise ConfigError(
                "tokens_per_batch: this base or objective cannot pack pairs; "
                "use per_device_train_batch_size."
            )
        if budget is None and not (args.max_kl is None and args.max_drop is None):
            raise ConfigError(
                "max_kl, max_drop: the trainer was given nothing to read them on; pass budget=, as "
                "`qadapter.train.prepare(config).trainer(config)` does."
            )
        if model.q_config.objective != "authors" and not model.packs:
            _log.warning(
                "%s: its attention cannot take packed pairs; rows are padded, every prompt is "
                "computed twice, and no trunk is kept",
                model.base_name,
            )
        collate = pack_pairs if packable(model) else PairCollator(pad_id)
        super().__init__(
            model=model,
            args=args,
            data_collator=cast(Any, partial(collate_rows, collate)),
            train_dataset=cast(Any, train_dataset),
            eval_dataset=cast(Any, eval_dataset),
            **kwargs,
        )
        self.add_callback(_ChecksTheStart(self))
        if model.device.type == "cpu":
            self.add_callback(_TrimHeap())
        if budget is not None:
            budget.log = self.log
            self.add_callback(budget)
        # Both say: compute_loss has already divided by the whole accumulation window.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._anchors = anchors
        self.anchor_kl = AnchorKL(anchors, model, pad_id=pad_id, split=self.shards)
        self._micro_step = self._anchor_tokens = 0
        self.cache: TrunkCache | None = None
        """Opened when training starts, where the settings and the base allow."""
        self.cache_root = files.cache_dir() / "trunk"
        self.rows: Sequence[list[TokenizedPair]] = []
        """Micro-batches filled beforehand; empty where the sampler makes them."""
        if args.tokens_per_batch and train_dataset is not None:
            in_order = args.train_sampling_strategy == "sequential"
            seed = None if in_order else args.seed
            self.rows = fill_rows(train_dataset, args.tokens_per_batch, seed=seed)
        self._figures = {"train": Figures(), "eval": Figures()}

    # ── batches ────────────────────────────────────────────────────────────────────────────────

    def get_train_dataloader(self) -> Any:
        """Return the batches: so many pairs each, or rows filled up to `tokens_per_batch`."""
        if not self.rows:
            return super().get_train_dataloader()
        return self._get_dataloader(
            self.rows, "Training", 1, sampler_fn=self._get_train_sampler, is_training=True
        )

    def num_examples(self, dataloader: Any) -> int:
        """Return the pairs in a dataloader."""
        rows = dataloader.dataset
        return len(self.train_dataset) if rows is self.rows else super().num_examples(dataloader)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the pairs of one step; of filled rows, their mean."""
        if not self.rows:
            return int(super().get_total_train_batch_size(args))
        pairs = len(cast(Any, self.train_dataset)) / len(self.rows)
        return int(pairs * args.gradient_accumulation_steps * args.world_size + 0.5)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of one step and `[pairs, trained tokens]` in all of them."""
        samples = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in samples:
            counts[0] += len(batch["terminal"]) // 2
            counts[1] += len(batch_transitions(self.model.q_config, batch).response)
        world = self.accelerator.num_processes
        if world > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        self._micro_step = 0
        if self._anchors:
            self._anchor_tokens = sum(
                self.anchor_kl.tokens(self._turn(i, rank), self.args.per_device_train_batch_size)
                for i in range(len(samples))
                for rank in range(world)
            )
        return samples, counts

    # ── loss ────────────────────────────────────────────────────────────────────────────────────

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the batch's share of the loss of the whole accumulation window (METHOD M5)."""
        inner = cast(QAdapterModel, self.accelerator.unwrap_model(model))
        out = self._pair_loss(model, inner, inputs)
        sums = out.sums
        if isinstance(num_items_in_batch, Tensor):
            pairs, tokens = num_items_in_batch.unbind()
        else:
            pairs, tokens = sums.n_pairs, sums.n_tokens
        loss = sums.bt_sum / pairs + inner.q_config.beta * sums.r2_sq_sum / tokens
        if model.training:
            self._figures["train"].add(out)
        else:
            self._figures["eval"].add(out, inner.kl_from_base(out.states.at(out.taken)))
        if self._anchors and model.training:
            kl, tokens_here = self._held(model)
            self._figures["train"].add_anchors(kl.detach(), tokens_here)
            whole = isinstance(num_items_in_batch, Tensor)
            of_step = self._anchor_tokens if whole else tokens_here
            loss = loss + self.args.anchor_weight * kl / of_step
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"step {self.state.global_step}: the loss is {loss.item()}; checkpoints up to here "
                f"are kept in {self.args.output_dir}, try a lower learning_rate or bf16=false."
            )
        # DDP averages gradients over ranks, but ours are already shares of one global sum.
        loss = loss * self.accelerator.num_processes if model.training else loss
        return (loss, None) if return_outputs else loss

    def _pair_loss(
        self, model: nn.Module, inner: QAdapterModel, inputs: dict[str, Any]
    ) -> PairLoss:
        """Return the batch's loss, its trunk from the cache or, if it is not there, into it."""
        cache = self.cache if model.training else None
        if cache is None:
            return pair_loss(inner, batch_streams(model, inputs), inputs)
        kept = cache.read(inputs)
        if self.shards and not ranks.all_agree(self.accelerator, kept is not None):
            kept = None  # split layers run in all processes or in none
        if kept is not None:
            trunk, base = (t.to(inner.device, non_blocking=True) for t in kept)
            known = {"base_scalars": base} if cache.scalars else {"base_states": base[None]}
            inputs = {**inputs, "trunk": trunk[None], **known}
            return pair_loss(inner, batch_streams(model, inputs), inputs)
        streams = batch_streams(model, inputs)
        out = pair_loss(inner, streams, inputs)
        trunk = cast(Tensor, streams.trunk).detach()[0]
        if cache.scalars:
            # Each response token's two scalars stand at its own column of the row.
            base = torch.zeros(len(trunk), 2, device=trunk.device)
            base[out.columns] = torch.stack(cast(BaseScalars, out.base), dim=1).float()
        else:
            base = streams.base[0]
        cache.write(inputs, Kept(trunk, base))
        return out

    @property
    def layout(self) -> Layout:
        """What the trunk cache holds of a token."""
        model = cast(QAdapterModel, self.model)
        return Layout(model.base_width, model.dtype, model.scalars_suffice)

    def _cache_key(self, base_hash: str) -> dict[str, Any]:
        model = cast(QAdapterModel, self.model)
        # "no", "bf16" or "fp16": what autocast does to the base's layers.
        autocast = self.accelerator.mixed_precision
        return {"weights": base_hash, "autocast": autocast, **model.trunk_key}

    def share_kept(self) -> float:
        """Return the share of the pairs' tokens of which the trunk lies on disk already.

        Raises:
            UserError: none lies there, and it may not or cannot be written.
        """
        base = hub.exact_weights_hash(cast(QAdapterModel, self.model).base_parameters())
        pairs = cast(Sequence[TokenizedPair], self.train_dataset)
        limit, key = self._cache_limit, self._cache_key(base)
        return share_kept(self.cache_root, key, pairs, self.layout, limit=limit)

    @property
    def _cache_limit(self) -> int:
        return int(cast(QAdapterConfig, self.args).cache_trunk_gib * 2**30)

    def _open_cache(self, base_hash: str) -> TrunkCache | None:
        """Return the trunk cache that the settings ask for, if this base can use one."""
        model, args = cast(QAdapterModel, self.model), cast(QAdapterConfig, self.args)
        asked = args.cache_trunk
        if not args.wants_trunk_cache(len(self.get_train_dataloader())):
            return None
        if not (packable(model) and model.caches_trunk):
            if asked:
                raise ConfigError(
                    "cache_trunk: this base or objective cannot start from a kept trunk; "
                    "set cache_trunk=false."
                )
            # What cannot pack, or has no trunk, has been told when it was made.
            if packable(model) and model.shares_trunk:
                _log.warning("training without a trunk cache: this base cannot start from one")
            return None
        try:
            with args.main_process_first(desc="trunk cache"):
                return TrunkCache(
                    self.cache_root,
                    self._cache_key(base_hash),
                    cast(Sequence[TokenizedPair], self.train_dataset),
                    self.layout,
                    limit=self._cache_limit,
                )
        except UserError as error:
            if asked:
                raise
            _log.warning("training without a trunk cache: %s", error)
            return None

    def _held(self, model: nn.Module) -> tuple[Tensor, int]:
        """Return the sum of KL(π1 ‖ π̃) over the tokens of this micro-batch's anchors, and those."""
        turn = self._turn(self._micro_step, self.accelerator.process_index)
        self._micro_step += 1
        count = self.args.per_device_train_batch_size
        return self.anchor_kl(model, turn, count), self.anchor_kl.tokens(turn, count)

    def _turn(self, micro_step: int, rank: int) -> int:
        """Return a micro-batch's number, from the step, so that a resumed run goes on with it."""
        micro_steps = self.state.global_step * self.args.gradient_accumulation_steps + micro_step
        return int(micro_steps * self.accelerator.num_processes + rank)

    # ── figures ─────────────────────────────────────────────────────────────────────────────────

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to a training log line."""
        if "loss" in logs:
            means = self._figures["train"].take()
            del means["loss"]  # Trainer's own has the anchors' part
            logs = {**logs, **means}
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return an evaluation batch's loss; its figures are gathered on the side."""
        with torch.no_grad(), self.gathered():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' loop and add `rewards/…`, so early stopping can watch them."""
        self._figures["eval"] = Figures()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        # Exact over all pairs and tokens, where the loop's own is a mean of means of batches.
        means = self._figures["eval"].take(
            output.num_samples, beta=cast(QAdapterModel, self.model).q_config.beta
        )
        output.metrics.update({f"{prefix}_{k}": v for k, v in means.items()})
        return output

    # ── files ───────────────────────────────────────────────────────────────────────────────────

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # transformers' hook for what a checkpoint of the model holds: ours is the peft directory,
        # and no pickled training_args.bin.
        directory = output_dir or cast(str, self.args.output_dir)
        model = cast(QAdapterModel, self.model)
        model.save_pretrained(directory, is_main_process=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._check_same_run(Path(resume_from_checkpoint))
        cast(QAdapterModel, self.model).load_adapter(resume_from_checkpoint)

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must share to go on from it: pairs, method, LoRA, optimizer."""
        model, settings = cast(QAdapterModel, self.model), self.args.to_dict()
        named = {n: v for n, v in asdict(model.q_config).items() if n not in _TOLD_ONLY}
        rows = 1 if self.rows else self.args.per_device_train_batch_size
        accumulated = self.args.gradient_accumulation_steps * self.args.world_size
        lora = model.peft_model.active_peft_config
        return named | {
            "pairs (data, max_length, truncate)": self._pairs_digest[:16],
            "pairs of a step": rows * accumulated,
            "anchors": hashlib.sha256(json.dumps(self._anchors).encode()).hexdigest()[:16],
            "layers (trunk, layers_to_transform)": lora.layers_to_transform,
            "lora_r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "lora_dropout": lora.lora_dropout,
            "sharded": self.sharded,
            **{name: settings[name] for name in _KEPT_ALIKE},
        }

    @cached_property
    def _pairs_digest(self) -> str:
        return pairs_digest(cast(Sequence[TokenizedPair], self.train_dataset))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then prove that the adapter changed and the base did not."""
        model = cast(QAdapterModel, self.model)
        adapter = model.adapter_state()
        base = hub.exact_weights_hash(model.base_parameters())
        cache = self._open_cache(base)
        self.cache = cache if ranks.all_agree(self.accelerator, cache is not None) else None
        result = super().train(*args, **kwargs)
        if hub.exact_weights_hash(model.base_parameters()) != base:
            raise TrainingError("the base's weights changed during training; do not use this run.")
        if self.stopped:  # perhaps before the warm-up's first step that moves anything
            return result
        now = model.adapter_state()
        if all(torch.equal(now[n], p) for n, p in adapter.items()):
            raise TrainingError(
                "the adapter did not change; raise num_train_epochs or learning_rate, or lower "
                "warmup_steps (a resumed run that was already finished has nothing left to do)."
            )
        if alarm := alarms.flat_loss(self.state.log_history):
            _log.warning("%s", alarm)
        return result
