"""A run of training, from files to a saved artefact."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from qadapter import alarms, engines, files, hub, ranks
from qadapter.anchors import own_texts
from qadapter.budget import Budget, DropMeter, KLMeter, Meter, hold_out
from qadapter.checkpoints import newest_sound
from qadapter.config import QAdapterConfig
from qadapter.data import Sources, TokenTable, file_identity, read_pairs, read_texts, token_table
from qadapter.errors import ArtefactError, ConfigError
from qadapter.files import alone_in, check_writable, write_text
from qadapter.held import anchor_rows
from qadapter.model import QAdapterModel
from qadapter.policy import Policy
from qadapter.trainer import QAdapterTrainer

_log = logging.getLogger(__name__)

OWN = "the base's own texts"
"""What anchors are told to come from where no file is named."""
OWN_FILE = "own_texts.jsonl"
"""Where checkpoints hold them: a run goes on with the same ones."""


def _tell(alarm: str | None) -> None:
    if alarm:
        _log.warning("%s", alarm)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run says of itself."""

    directory: Path
    pairs: int
    dropped: dict[str, Sources]
    metrics: dict[str, float]
    trainable: int
    """Number of adapter parameters."""
    layers: int
    """Number of adapted layers."""
    budget: str | None = None
    """What became of the forgetting budget, in a sentence; None where there was none."""
    stopped_at: int | None = None
    """The step after which SIGTERM ended the run, in its last checkpoint; None where it did not."""


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, read and checked, before its first step."""

    model: QAdapterModel
    train_set: TokenTable
    eval_set: TokenTable | None
    anchors: list[list[int]]
    pad_id: int
    dropped: dict[str, Sources]
    """Sources of the training pairs that were left out, by reason."""
    budget: Budget | None = None
    checkpoint: str | None = None
    """From which to go on."""
    passed: Sequence[str] = ()
    """What is told of newer checkpoints that are damaged."""
    own: Sequence[str] = ()
    """The base's own texts, where the run reads some."""

    @property
    def tables(self) -> list[TokenTable]:
        """Return the pairs that lie in files until they are closed."""
        return [table for table in (self.train_set, self.eval_set) if table is not None]

    def close(self) -> None:
        """Remove the files of the pairs, but for those that were kept."""
        for table in self.tables:
            table.close()

    def trainer(self, config: QAdapterConfig, **kwargs: Any) -> QAdapterTrainer:
        """Return a trainer of these; `kwargs` are passed on to it."""
        trainer = QAdapterTrainer(
            self.model,
            config,
            **{
                "train_dataset": self.train_set,
                "eval_dataset": self.eval_set,
                "pad_id": self.pad_id,
                "anchors": self.anchors,
                "budget": self.budget,
                **kwargs,
            },
        )
        if self.own:
            trainer.beside = {OWN_FILE: files.jsonl({"text": text} for text in self.own)}
        return trainer


def prepare(config: QAdapterConfig) -> Prepared:
    """Read data, tokenizer and base, and put an untrained adapter on it.

    Nothing is written but to the user cache: pairs, and texts of the base's own where it is to be
    held to some and none are named.

    Raises:
        UserError: any of its kinds.
    """
    # On a CPU each new length of row makes new kernels; a thousand kept ones take a gigabyte.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if not config.data:
        raise ConfigError("data: missing; name a file of preference pairs with --data.")
    if not config.output_dir:
        raise ConfigError("output_dir: missing; name a directory with --output.")
    engines.check(config)
    engines.check_own_text(config)
    engines.load_whole(config)
    check_writable(config.output_dir)
    checkpoint, passed = _checkpoint(config)
    set_seed(config.seed)
    with ranks.first_alone():
        hub.resolve_base(config.model)
    tokenizer = hub.load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    tokenizer_hash = hub.tokenizer_hash(tokenizer)
    limits: dict[str, Any] = {
        "end_ids": hub.end_of_turn_ids(
            tokenizer,
            hub.load_generation_config(config.model, trust_remote_code=config.trust_remote_code),
        ),
        "max_length": config.max_length,
        "truncate": config.truncate,
    }

    def table(path: str, most: int | None = None) -> tuple[TokenTable, dict[str, Sources]]:
        if identity := file_identity(path):
            identity += [most, tokenizer_hash]
        with ranks.first_alone():
            return token_table(
                islice(read_pairs(path), most), tokenizer, identity=identity, **limits
            )

    train_set, dropped = table(config.data, config.max_pairs)
    eval_set = None
    if config.eval_data:
        eval_set = held_out = table(config.eval_data)[0]
        _tell(alarms.shared_prompts(train_set.prompts, held_out.prompts, held_out.source))
    drop = _drop_meter(config)
    measured = read_texts(config.budget_text) if config.budget_text else []
    general = None if config.needs_own_text else _general(config, [], measured)
    # The base comes after the data: a bad row is told in a second, not in a minute.
    base = hub.load_base(
        config.model,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        trust_remote_code=config.trust_remote_code,
        quantization=config.quantize_base or "",
    )
    hub.check_max_length(config.max_length, hub.context_of(base.config))
    base_hash = hub.weights_hash(base)
    own: list[str] = []
    if general is None:
        own = _own(config, checkpoint, base, tokenizer, base_hash)
        general = _general(config, own, measured)
    anchors = anchor_rows(general.anchors, tokenizer) if config.anchored else []
    q_config = config.q_config(
        base_model=hub.portable_name(config.model),
        base_hash=base_hash,
        base_quantization=hub.quantization_of(base),
        tokenizer_hash=tokenizer_hash,
    )
    _tell(alarms.near_uniform(q_config))
    trunk = config.trunk_for(len(train_set))
    if config.trunk is None and config.layers_to_transform is None and not trunk:
        _log.info(
            "adapting all layers, for %d pairs are few; --trunk 0.75 is faster", len(train_set)
        )
    model = QAdapterModel.create(
        base,
        q_config,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        layers_to_transform=config.layers_to_transform,
        trunk=trunk,
    )
    pad_id = cast(int, tokenizer.pad_token_id)
    # Made in any case: it ends training mode, in which trying the model out would draw dropout.
    policy = Policy(model, tokenizer)
    meters: list[Meter] = []
    if config.max_kl is not None:
        meters.append(KLMeter(config.max_kl, general.measured, general.source))
    meters += drop
    budget = Budget(policy, meters) if meters else None
    return Prepared(
        model, train_set, eval_set, anchors, pad_id, dropped, budget, checkpoint, passed, own
    )


class _General(NamedTuple):
    """The general text of a run."""

    anchors: list[str]
    measured: list[str]
    """What max_kl is read on, none of which is trained on."""
    source: str
    """Where that comes from, as told."""


def _general(config: QAdapterConfig, own: list[str], measured: list[str]) -> _General:
    """Return a run's general text, `own` and `measured` where it names none."""
    texts = read_texts(config.anchor_data) if config.anchor_data else own
    if config.max_kl is None or config.budget_text:
        return _General(texts, measured, config.budget_text or "")
    anchors, measured = hold_out(texts)
    source = f"{len(measured)} texts held out of {config.anchor_data or OWN}"
    return _General(anchors, measured, source)


def _drop_meter(config: QAdapterConfig) -> list[Meter]:
    if config.max_drop is None or config.drop_task is None:
        return []
    return [DropMeter(config.max_drop, config.drop_task, config.drop_limit)]


def _own(
    config: QAdapterConfig,
    checkpoint: str | None,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base_hash: str,
) -> list[str]:
    """Return the base's own texts: those of the run that goes on, else written, or written before.

    The same in every process; the first of all reads or writes them, on the device that will train.
    """

    def made() -> list[str]:
        if checkpoint and (kept := Path(checkpoint) / OWN_FILE).is_file():
            return read_texts(str(kept))
        if not hub.quantization_of(base):  # or it lies there already
            base.to(cast(Any, config.device))
        return own_texts(base, tokenizer, base_hash=base_hash)

    return ranks.from_first(made)


@contextmanager
def _settings_told() -> Iterator[None]:
    """Turn what transformers says of a setting, which it checks only in use, into a ConfigError."""
    try:
        yield
    except (ArithmeticError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"training cannot go on with these settings: {error}") from error


def run_training(config: QAdapterConfig) -> TrainResult:
    """Train from `config.data` to a saved artefact in `config.output_dir`.

    Raises:
        UserError: any of its kinds, before anything is written where that is possible.
    """
    with closing(prepare(config)) as run:
        if ranks.number():
            return _trained(run, config)
        with alone_in(cast(str, config.output_dir)):
            return _trained(run, config)


def _trained(run: Prepared, config: QAdapterConfig) -> TrainResult:
    directory = Path(cast(str, config.output_dir))
    with _settings_told():
        trainer = run.trainer(config, callbacks=_callbacks(config))
        for sentence in run.passed:
            _tell(sentence)
        # Before an engine splits them.
        trainable = sum(p.numel() for p in run.model.adapter_parameters().values())
        layers = len(run.model.peft_model.active_peft_config.layers_to_transform)
        result = trainer.train(resume_from_checkpoint=run.checkpoint)
        metrics = dict(result.metrics)
        pairs = len(run.train_set)
        outcome = TrainResult(directory, pairs, run.dropped, metrics, trainable, layers)
        # What a budget has ended at the same step is done.
        if trainer.stopped and not (run.budget and run.budget.passed):
            for table in run.tables:
                table.keep()
            return replace(outcome, stopped_at=trainer.state.global_step)
        if run.eval_set:
            metrics.update(trainer.evaluate())
            right = metrics["eval_rewards/accuracies"]
            _tell(alarms.inverted(right, len(run.eval_set)))
        if run.budget:
            metrics.update(run.budget.figures())
    trainer.save_model(str(directory))
    outcome = replace(outcome, budget=run.budget.summary() if run.budget else None)
    if trainer.is_world_process_zero():
        write_text(directory / "README.md", model_card(config, outcome))
    return outcome


def _checkpoint(config: QAdapterConfig) -> tuple[str | None, list[str]]:
    """Return the checkpoint to resume from, and what is told of newer ones that are damaged.

    It is the one named, or for `true` the run's last that is whole.

    Raises:
        ConfigError: there is none, or a run that begins anew would mix with one.
        ArtefactError: the one named is damaged.
    """
    asked = config.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        there, _ = newest_sound(Path(cast(str, config.output_dir)))
        if there is not None:
            raise ConfigError(
                f"output_dir: {there} is of an earlier run; go on from it by "
                "--resume_from_checkpoint true, remove it, or name another --output."
            )
        return None, []
    if str(asked).lower() == "true":
        directory = Path(cast(str, config.output_dir))
        last, passed = newest_sound(directory)
        if last is None:
            why = f" ({'; '.join(passed)})" if passed else ""
            raise ConfigError(
                f"resume_from_checkpoint: {directory} holds no checkpoint to go on from{why}; "
                "leave it out to start anew."
            )
        return str(last), passed
    if not (Path(asked) / "trainer_state.json").is_file():
        raise ConfigError(f"resume_from_checkpoint: {asked} is no checkpoint; name a checkpoint-N.")
    if wrong := files.damage(Path(asked)):
        raise ArtefactError(f"resume_from_checkpoint: {asked}: {wrong}; name an older one.")
    return str(asked), []


def _callbacks(config: QAdapterConfig) -> list[Any]:
    from transformers import EarlyStoppingCallback

    patience = config.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience)]


def model_card(config: QAdapterConfig, result: TrainResult) -> str:
    """Return the artefact's README: what it is, how it was made, its figures, how to use it."""
    figures = "\n".join(f"| {k} | {v:.4g} |" for k, v in sorted(result.metrics.items()))
    drops = ", ".join(f"{len(v)} {k}" for k, v in result.dropped.items()) or "none"
    budget = f"\n\nForgetting budget: {result.budget}." if result.budget else ""
    source = f"`{config.anchor_data}`" if config.anchor_data else OWN
    anchors = f"{config.anchor_weight:g} on {source}" if config.anchored else "none"
    head = f"---\nlibrary_name: peft\nbase_model: {config.model}\ntags: [qadapter, lora]\n---\n"
    return (
        f"{head}\n# Q-adapter on {config.model}\n\n"
        f"Trained by `qadapter train` on {result.pairs} preference pairs from `{config.data}` "
        f"(dropped: {drops}), seed {config.seed}.\n\n"
        f"alpha_0 {config.alpha_0}, alpha_tilde {config.alpha_tilde}, gamma {config.gamma}, "
        f"beta {config.beta}, {config.parameterization}; anchors {anchors}; "
        f"{result.trainable:,} trained parameters in {result.layers} layers."
        f"{budget}\n\n| figure | value |\n|---|---|\n{figures}\n\n"
        f"Use it: `qadapter chat {config.output_dir}`.\n"
    )
