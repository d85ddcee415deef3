"""What an artefact is (`QConfig`) and what a training run is (`QAdapterConfig`)."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from qadapter.errors import ArtefactError, ConfigError
from qadapter.files import write_text

Q_CONFIG_NAME = "qadapter_config.json"

Parameterization = Literal["residual", "raw"]
Objective = Literal["bellman", "authors"]
Returns = Literal["sum", "discounted"]

_CHOICES = {
    "parameterization": ("residual", "raw"),
    "objective": ("bellman", "authors"),
    "returns": ("sum", "discounted"),
}


def _check_method(config: Any) -> None:
    for name in ("alpha_0", "alpha_tilde", "gamma", "beta"):
        value = getattr(config, name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{name}: {value!r} is not a finite number; give one.")
    for name in ("alpha_0", "alpha_tilde"):
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name}: {getattr(config, name)} must be above 0.")
    if not 0 < config.gamma <= 1:
        raise ConfigError(f"gamma: {config.gamma} must lie in (0, 1].")
    if config.beta < 0:
        raise ConfigError(f"beta: {config.beta} must not be negative.")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ConfigError(
                f"{name}: {getattr(config, name)!r} is not one of {', '.join(choices)}."
            )


@dataclass(frozen=True, kw_only=True)
class QConfig:
    """What a saved Q-adapter is; written to `qadapter_config.json` beside peft's own files.

    Raises:
        ConfigError: a value is out of its range.
    """

    alpha_0: float
    """Weight of log π1 in the policy, nats of reward (METHOD M2); λ·α1."""
    alpha_tilde: float
    """Temperature of the customised policy, nats of reward (METHOD M1)."""
    gamma: float = 1.0
    """Discount in (0, 1]."""
    beta: float = 0.0
    """Weight of the squared rewards in the loss (METHOD M5)."""
    parameterization: Parameterization = "residual"
    """How the logits spell Q̂ (METHOD §2)."""
    objective: Objective = "bellman"
    """The loss it was trained with: METHOD M5, or the authors' released one."""
    returns: Returns = "sum"
    """Whether M5 sums rewards plainly or discounted by γ."""
    base_model: str = ""
    """Portable name of the base model."""
    base_hash: str = ""
    """Identity of the base's weights, whatever dtype they are loaded in."""
    tokenizer_hash: str = ""
    """Identity of the tokenizer and its chat template."""
    base_quantization: str = ""
    """How the base's weights were quantised in training: `4bit`, `8bit` (bitsandbytes), or not."""
    qadapter_version: str = ""
    """Version of this package that wrote the file."""

    def __post_init__(self) -> None:
        _check_method(self)

    def save(self, directory: str | Path) -> None:
        """Write `qadapter_config.json` into `directory`, atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"
        write_text(Path(directory) / Q_CONFIG_NAME, text)

    @classmethod
    def load(cls, directory: str | Path) -> QConfig:
        """Read `qadapter_config.json` from `directory`.

        Raises:
            ArtefactError: it is missing, not JSON, or has unknown, missing or bad fields.
        """
        path = Path(directory) / Q_CONFIG_NAME
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(**fields)
        except FileNotFoundError as error:
            if is_export(directory):
                raise ArtefactError(
                    f"{directory}: is an export and no Q-adapter; serve it with --engine vllm, "
                    "load it with transformers, or name the adapter it was made of."
                ) from error
            raise ArtefactError(
                f"{path}: missing; {directory} is not a Q-adapter, name a directory that "
                "`qadapter train` wrote."
            ) from error
        except (OSError, ValueError, TypeError, ConfigError) as error:
            raise ArtefactError(
                f"{path}: cannot be used ({error}); train or copy again."
            ) from error


def is_export(directory: str | Path) -> bool:
    """Return whether a directory is what `qadapter export --format policy` writes."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "qadapter"


def bf16_supported(*, use_cpu: bool = False) -> bool:
    """Return whether the device, the CPU if so asked, has instructions for bfloat16."""
    if torch.cuda.is_available() and not use_cpu:
        # Emulated it is slower than float32, and torch counts that as supported.
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.mps.is_available() and not use_cpu:
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


_SAMPLING = ("random", "sequential")
_OTHERS = {
    "label_smoothing_factor": "is of a loss over labels and would do nothing here",
    "neftune_noise_alpha": "would put noise into the base, too, from which the policy is measured",
}
"""Fields of TrainingArguments that would be taken in silence, and why they are not."""
_POSITIVE = (
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
)

MANY_PAIRS = 500
"""Training pairs from which on only the last quarter of the layers is adapted unless asked."""


def usual_trunk(pairs: int) -> float:
    """Return the share of layers that stay common, unless asked, of so many training pairs.

    From few pairs the last quarter forgets more than all layers do to learn as much, and more
    than DPO; from many far less than DPO, and what it saves counts (docs/evidence.md).
    """
    return 0.75 if pairs >= MANY_PAIRS else 0.0


@dataclass(kw_only=True, repr=False)  # a repr of its own would show hub_token
class QAdapterConfig(TrainingArguments):
    """What a training run is: transformers' TrainingArguments and the fields below.

    Raises:
        ConfigError: a value is out of its range.
    """

    data: str = field(
        default="", metadata={"help": "Preference pairs: file, directory or Hub name."}
    )
    eval_data: str | None = field(default=None, metadata={"help": "Held-out preference pairs."})
    model: str = field(
        default="smollm2-135m-instruct-q4_1",
        metadata={"help": "Base model: the embedded default, a directory, or a Hub name."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let a base run the Python code that comes with it."}
    )
    quantize_base: str | None = field(
        default=None, metadata={"help": "Hold the base in 4bit (NF4) or 8bit, by bitsandbytes."}
    )
    alpha_0: float = field(default=0.1, metadata={"help": "Weight of the base's log-probs (M2)."})
    alpha_tilde: float = field(default=0.1, metadata={"help": "Temperature of the policy (M1)."})
    gamma: float = field(default=1.0, metadata={"help": "Discount in (0, 1]."})
    beta: float = field(default=0.1, metadata={"help": "Weight of squared token rewards (M5)."})
    parameterization: str = field(
        default="residual", metadata={"help": "How logits spell Q: residual or raw."}
    )
    objective: str = field(
        default="bellman", metadata={"help": "bellman (M5), or authors: their released loss."}
    )
    returns: str = field(
        default="sum", metadata={"help": "Return of a response: sum, or discounted by gamma."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's own scaling numerator."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout inside LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Module names to adapt; default every linear map."}
    )
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Layers to adapt, by index; overrides trunk."}
    )
    trunk: float | None = field(
        default=None,
        metadata={
            "help": "Share of the layers, from the first, left alone and run only once; default "
            f"0.75, and 0 where fewer than {MANY_PAIRS:,} pairs are trained on."
        },
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Fill micro-batches with pairs up to so many tokens; overrides "
            "per_device_train_batch_size."
        },
    )
    cache_trunk: bool | None = field(
        default=None,
        metadata={
            "help": "Keep what the base makes of each pair on disk and read it from the second "
            "epoch on; default where there is one."
        },
    )
    cache_trunk_gib: float = field(
        default=16.0, metadata={"help": "Most that all such caches may take, GiB."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens of prompt and response."})
    max_pairs: int | None = field(default=None, metadata={"help": "Use only the first N pairs."})
    truncate: bool = field(
        default=False, metadata={"help": "Cut long responses (non-terminal) instead of dropping."}
    )
    anchor_data: str | None = field(
        default=None,
        metadata={
            "help": "General text on which the policy is held to its base; default texts that the "
            "base writes by itself."
        },
    )
    anchor_weight: float = field(
        default=100.0, metadata={"help": "Weight of the anchors' KL; 0 trains without them."}
    )
    max_kl: float | None = field(
        default=None,
        metadata={"help": "Stop inside this KL of base and policy, nats a token of general text."},
    )
    budget_text: str | None = field(
        default=None,
        metadata={
            "help": "General text that max_kl is measured on; default a part of the anchors that "
            "is then not trained on."
        },
    )
    max_drop: float | None = field(
        default=None, metadata={"help": "Stop inside this loss on drop_task, percentage points."}
    )
    drop_task: str | None = field(
        default=None,
        metadata={"help": "What max_drop is measured on: a file of items, or an lm-eval task."},
    )
    drop_limit: int = field(default=500, metadata={"help": "Items of drop_task, from the first."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better one."}
    )

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the pairs."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Pairs a micro-batch."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Pairs an eval batch."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps, or share below 1."})
    logging_steps: float = field(default=5, metadata={"help": "Log every so many steps."})
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers: tensorboard, trackio, wandb, …, all or none."},
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Train in bfloat16; default where the device has it."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off: the columns are the pair."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Kept off: every trained weight is used in every step."}
    )

    def __post_init__(self) -> None:
        _check_method(self)
        if self.quantize_base not in (None, "4bit", "8bit"):
            raise ConfigError(f"quantize_base: {self.quantize_base!r} is not one of 4bit, 8bit.")
        if self.trunk is not None and not 0 <= self.trunk < 1:
            raise ConfigError(f"trunk: {self.trunk} must lie in [0, 1).")
        if self.lora_r < 1:
            raise ConfigError(f"lora_r: {self.lora_r} must be at least 1.")
        if self.max_length < 2:
            raise ConfigError(f"max_length: {self.max_length} must be at least 2.")
        if not 0 <= self.anchor_weight < math.inf:
            raise ConfigError(f"anchor_weight: {self.anchor_weight} must be from 0 and finite.")
        if not 0 <= self.cache_trunk_gib < math.inf:
            raise ConfigError(f"cache_trunk_gib: {self.cache_trunk_gib} must be from 0 and finite.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: {self.lora_dropout} must lie in [0, 1).")
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate: {self.learning_rate} must be from 0 and finite.")
        for name in ("max_pairs", "tokens_per_batch"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ConfigError(f"{name}: {count} must be at least 1.")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be at least 1.")
        if self.seed < 0:
            raise ConfigError(f"seed: {self.seed} must not be negative.")
        if not self.eval_data and (str(self.eval_strategy) != "no" or self.eval_on_start):
            raise ConfigError("eval_strategy: there is nothing to evaluate on; add --eval_data F.")
        if self.train_sampling_strategy not in _SAMPLING:
            raise ConfigError(
                f"train_sampling_strategy: {self.train_sampling_strategy!r} is not one of "
                f"{', '.join(_SAMPLING)}; leave it out, for packed pairs like lengths gain nothing."
            )
        for name, why in _OTHERS.items():
            if getattr(self, name):
                raise ConfigError(f"{name}: {why}; leave it out.")
        self._check_trackers()
        self._check_budget()
        if self.early_stopping_patience is not None:
            self._check_early_stopping(self.early_stopping_patience)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_supported(use_cpu=self.use_cpu)
        # Where there is nothing else, transformers still wants to be told before it allows bf16.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        try:
            super().__post_init__()
        except (ImportError, LookupError, OSError, TypeError, ValueError) as error:
            raise ConfigError(f"a training setting cannot be used: {error}") from error
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError(
                "gradient_checkpointing_kwargs: with use_reentrant no gradient reaches an adapter "
                "whose inputs need none, as a frozen base's; leave it out, or set it false."
            )

    def _check_trackers(self) -> None:
        from transformers import integrations

        asked = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        for name in set(asked) - {"none", "all"}:
            if name not in integrations.INTEGRATION_TO_CALLBACK:
                known = ", ".join(sorted(integrations.INTEGRATION_TO_CALLBACK))
                raise ConfigError(f"report_to: {name!r} is no tracker; use one of {known}.")
            if name not in integrations.get_available_reporting_integrations():
                raise ConfigError(f"report_to: {name} is not installed; run `pip install {name}`.")

    def _check_budget(self) -> None:
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise ConfigError(f"max_kl: {self.max_kl} must be above 0 and finite.")
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise ConfigError(f"max_drop: {self.max_drop} must be from 0 and finite.")
        if self.budget_text and self.max_kl is None:
            raise ConfigError("budget_text: nothing is measured on it; add --max_kl 0.05.")
        if self.budget_text and self.anchor_data and _same(self.budget_text, self.anchor_data):
            raise ConfigError(
                "budget_text: is anchor_data too, on which the policy is held to its base; leave "
                "budget_text out, and a part of anchor_data is kept for it."
            )
        if (self.max_drop is None) != (self.drop_task is None):
            raise ConfigError(
                "max_drop and drop_task belong together; add --max_drop 1.0 or --drop_task F."
            )
        if self.drop_limit < 2:
            raise ConfigError(f"drop_limit: {self.drop_limit} must be at least 2.")
        if self.max_drop is not None and self.alpha_0 != self.alpha_tilde:
            raise ConfigError(
                f"max_drop: alpha_0 {self.alpha_0} is not alpha_tilde {self.alpha_tilde}, so "
                "strength 0 is not the base to compare with; make them equal or use max_kl."
            )

    def _check_early_stopping(self, patience: int) -> None:
        if patience < 1:
            raise ConfigError(f"early_stopping_patience: {patience} must be at least 1.")
        if not self.eval_data or self.eval_strategy == "no" or not self.load_best_model_at_end:
            raise ConfigError(
                "early_stopping_patience needs held-out pairs and a best checkpoint to go back to; "
                "add --eval_data F --eval_strategy epoch --save_strategy epoch "
                "--load_best_model_at_end true."
            )

    def trunk_for(self, pairs: int) -> float:
        """Return the share of layers that stay common where so many pairs are trained on."""
        return usual_trunk(pairs) if self.trunk is None else self.trunk

    def epochs(self, batches: int) -> float:
        """Return how often a run passes over so many micro-batches."""
        if self.max_steps <= 0:
            return self.num_train_epochs
        # transformers lets max_steps, where it is given, overrule the epochs.
        return float(self.max_steps / math.ceil(batches / self.gradient_accumulation_steps))

    def wants_trunk_cache(self, batches: int) -> bool:
        """Return whether a trunk cache is asked for, or pays: the second epoch reads it."""
        return self.epochs(batches) > 1 if self.cache_trunk is None else self.cache_trunk

    @property
    def anchored(self) -> bool:
        """Whether the policy is held to its base on general text.

        Unasked only where the untrained policy is the base (METHOD M2): anchors would pull another
        α0/α̃, or raw logits, away from what was asked for.
        """
        untrained = self.parameterization == "residual" and self.alpha_0 == self.alpha_tilde
        return self.anchor_weight > 0 and (self.anchor_data is not None or untrained)

    @property
    def needs_own_text(self) -> bool:
        """Whether the base writes general text: for anchors, or for max_kl to be measured on."""
        measured = self.max_kl is not None and self.budget_text is None
        return self.anchor_data is None and (self.anchored or measured)

    def q_config(self, **identity: str) -> QConfig:
        """Return the artefact's part of this run; `identity` fills base and tokenizer fields."""
        names = {f.name for f in dataclasses.fields(QConfig)}
        shared = {n: getattr(self, n) for n in names if hasattr(self, n)}
        return QConfig(**{**shared, **identity})
