"""Which engine runs the processes of a training run, and with what it is known to be exact.

`SUPPORT` is the table of docs/scale.md and a test holds the two together. What is not in it is
refused before the base is loaded, so that nothing is found out in the middle of a night.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, save_fsdp_optimizer
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import SCHEDULER_NAME

from qadapter.checkpoints import SealingTrainer, no_optimizer, reading
from qadapter.errors import ConfigError

if TYPE_CHECKING:
    from qadapter.config import QAdapterConfig

TESTED, UNTRIED = "tested", "not run here"

_NO_READING = (
    "it is read on one process's own model, and here none has a whole one; leave it out and turn "
    "the dial down afterwards by `qadapter tune`"
)
_HALF = "DeepSpeed would put the adapter in half precision, too; use --bf16 false, or ddp"
_NOT_TRIED = (
    "it is not tried with DeepSpeed; leave it out and turn the dial down afterwards by "
    "`qadapter tune`"
)
_NO_FP16 = "float16's loss scaling is not tried with sharded gradients; use bf16"
_WHOLE = "the quantised base is not tried in parts, and is small enough to be whole; use ddp"

_OPTIONS = (
    "float32",
    "bfloat16",
    "float16",
    "quantised base",
    "gradient checkpointing",
    "trunk cache",
    "forgetting budget",
)

SUPPORT: dict[str, dict[str, str]] = {
    "one process": dict.fromkeys(_OPTIONS, TESTED) | {"float16": UNTRIED},
    "ddp": dict.fromkeys(_OPTIONS, TESTED) | {"float16": UNTRIED},
    "fsdp2": dict.fromkeys(_OPTIONS, TESTED)
    | {"float16": _NO_FP16, "quantised base": _WHOLE, "forgetting budget": _NO_READING},
    "zero2": dict.fromkeys(_OPTIONS, TESTED)
    | dict.fromkeys(("bfloat16", "float16"), _HALF)
    | {"quantised base": _WHOLE, "forgetting budget": _NOT_TRIED},
    "zero3": dict.fromkeys(_OPTIONS, TESTED)
    | dict.fromkeys(("bfloat16", "float16"), _HALF)
    | {"quantised base": _WHOLE, "forgetting budget": _NO_READING},
}
"""Engine → option → TESTED, UNTRIED, or why it is refused. Options of a row may be combined."""


def engine(config: QAdapterConfig) -> str:
    """Return the name of the engine that a run's launcher and settings ask for.

    Raises:
        ConfigError: it is one that cannot be used.
    """
    asked = os.environ.get
    if config.deepspeed_plugin is not None:
        return f"zero{config.deepspeed_plugin.zero_stage}"
    if asked("ACCELERATE_USE_FSDP", "").lower() == "true" or config.fsdp:
        return "fsdp2"
    return "ddp" if config.world_size > 1 else "one process"


def _options(config: QAdapterConfig) -> list[str]:
    """Return the options of the table that a run uses."""
    precision = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    used = {
        "quantised base": config.quantize_base is not None,
        "gradient checkpointing": config.gradient_checkpointing,
        # As of the fewest pairs, which are not read yet.
        "trunk cache": config.wants_trunk_cache(1),
        "forgetting budget": config.max_kl is not None or config.max_drop is not None,
    }
    return [precision, *(name for name, on in used.items() if on)]


_FLAGS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "quantised base": "quantize_base",
    "trunk cache": "cache_trunk",
    "forgetting budget": "max_kl, max_drop",
}


def check(config: QAdapterConfig) -> str:
    """Return a run's engine; called before anything is loaded.

    Raises:
        ConfigError: the engine cannot do what the run asks, or its own settings would change it.
    """
    name = engine(config)
    if name not in SUPPORT:
        known = ", ".join(SUPPORT)
        raise ConfigError(f"{name}: this engine is not supported (of {known}); see docs/scale.md.")
    for option in _options(config):
        cell = SUPPORT[name][option]
        if cell not in (TESTED, UNTRIED):
            raise ConfigError(f"{_FLAGS.get(option, option)}: {name} has it not: {cell}.")
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    own = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    if mixed not in ("no", own):
        raise ConfigError(
            f"mixed_precision: the launcher's file says {mixed} and the run {own}; write 'no' "
            "there and say it by --bf16 or --fp16."
        )
    if name == "fsdp2":
        _check_fsdp(config)
    if name in ("zero2", "zero3"):
        _check_deepspeed(config)
    return name


def check_own_text(config: QAdapterConfig) -> None:
    """Refuse to let a base write general text where layers are to be split over processes.

    It lies whole in the memory of the host then, where writing would take the others' patience.

    Raises:
        ConfigError: with what to do instead.
    """
    if (name := engine(config)) in ("fsdp2", "zero3") and config.needs_own_text:
        raise ConfigError(
            f"anchor_data: under {name} the base does not write the general text that it is held "
            f"to; let `qadapter anchors F.jsonl --model {config.model} --dtype bfloat16` (and "
            "`--device cpu` where it does not fit one) write it beforehand and add --anchor_data "
            "F.jsonl, or train without by --anchor_weight 0."
        )


def load_whole(config: QAdapterConfig) -> None:
    """Let models be loaded whole, to be tried out; ZeRO-3 splits them when training starts."""
    if config.deepspeed_plugin is not None:
        unset_hf_deepspeed_config()


def _check_deepspeed(config: QAdapterConfig) -> None:
    plugin: Any = config.deepspeed_plugin
    for field in ("offload_optimizer_device", "offload_param_device"):
        if (found := getattr(plugin, field)) not in (None, "none"):
            raise ConfigError(f"{field}: is {found} and must be none: offloading is not tried.")
    own = {
        "gradient_clipping": config.max_grad_norm,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
    }
    for field, value in own.items():
        # DeepSpeed does not clip where nothing is said.
        if (found := plugin.deepspeed_config.get(field, 0.0)) not in ("auto", value):
            raise ConfigError(
                f"{field}: the launcher's file says {found} and the run {value}; write auto there."
            )
    for field, on in plugin.deepspeed_config.get("zero_optimization", {}).items():
        if field.startswith("zero_quantized") and on:
            raise ConfigError(f"{field}: would round the weights on their way; leave it out.")
    for field in ("optimizer", "scheduler"):
        if field in plugin.deepspeed_config:
            raise ConfigError(
                f"{field}: DeepSpeed's file names one, which would replace the run's; leave it out."
            )


def _check_fsdp(config: QAdapterConfig) -> None:
    if config.fsdp:
        raise ConfigError("fsdp: is set by accelerate's file; use --launch configs/fsdp.yaml.")
    needed = {
        "FSDP_VERSION": ("2", "FSDP1 cannot keep frozen and trained weights apart"),
        "FSDP_CPU_RAM_EFFICIENT_LOADING": (
            "false",
            "every process tries its base out before it trains",
        ),
        "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "the other kind is read by pickle"),
        "FSDP_ACTIVATION_CHECKPOINTING": ("false", "--gradient_checkpointing does the same"),
        "FSDP_OFFLOAD_PARAMS": ("false", "offloading is not tried"),
    }
    default = {"FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_OFFLOAD_PARAMS": "false"}
    for field, (value, why) in needed.items():
        if (found := os.environ.get(field, default.get(field, "missing"))).lower() != value.lower():
            raise ConfigError(f"{field.lower()}: is {found} and must be {value}: {why}.")


class EngineTrainer(SealingTrainer):
    """A trainer of a frozen model with few trained weights on any engine of the table."""

    @property
    def shards(self) -> bool:
        """Whether each process holds only a part of the weights."""
        return bool(self.is_fsdp_enabled or self.is_zero3)

    @property
    def is_zero3(self) -> bool:
        """Whether DeepSpeed splits the weights."""
        plugin = self.args.deepspeed_plugin
        return plugin is not None and plugin.zero_stage == 3

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold whole for the block what is read outside of its module's own forward pass.

        ZeRO-3 lets go of a weight when the module that owns it ends. The loss reads the head after
        that, and the adapter's gradients come after that.
        """
        if not (self.is_zero3 and self.deepspeed):
            yield
            return
        model = self.model
        outer = (p for module in model.outer_modules for p in module.parameters())
        held = list(dict.fromkeys([*outer, *model.adapter_parameters().values()]))
        held[0].all_gather(held)
        for parameter in held:  # as if a module were at work that never ends
            parameter.ds_active_sub_modules.add(_HELD)
        try:
            yield
        finally:
            for parameter in held:
                parameter.ds_active_sub_modules.discard(_HELD)
            held[0].partition(held)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' step on whole weights."""
        with self.gathered():
            return super().training_step(*args, **kwargs)

    @property
    def sharded(self) -> bool | str:
        """How a checkpoint holds the optimizer: whole, in parts, or in parts for so many."""
        if self.is_deepspeed_enabled:
            return f"by DeepSpeed for {self.args.world_size} processes"
        return self.shards

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; on CPUs accelerate leaves FSDP out unless it is told here."""
        check(self.args)
        super().create_accelerator_and_postprocess()
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
            return
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if not self.accelerator.is_fsdp2:
            raise ConfigError(
                f"fsdp: accelerate runs this as {state.distributed_type.value} instead; start "
                "more than one process."
            )
        plugin = state.fsdp_plugin
        # Weights keep their own precision: the base's is the run's, the adapter's is float32.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        # The loss reads the head outside the forward pass, where FSDP would not gather it.
        plugin.ignored_modules = self.model.outer_modules

    @property
    def deepspeed(self) -> Any:
        """The engine that DeepSpeed wraps the model in; None without it."""
        return self._deepspeed

    @deepspeed.setter
    def deepspeed(self, engine: Any) -> None:
        # transformers sets this between making the engine and reading a checkpoint into it.
        self._deepspeed = engine
        if engine is not None:
            engine.checkpoint_engine.load = _numbers_only
            engine.load_checkpoint = self._guarded(engine.load_checkpoint)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; transformers would say of another engine's checkpoint only that it is invalid."""
        if self.is_deepspeed_enabled and isinstance(resume_from_checkpoint, (str, Path)):
            checkpoint = Path(resume_from_checkpoint)
            self._check_same_run(checkpoint)
            if not any(checkpoint.glob("global_step*")):
                raise no_optimizer(checkpoint)
        return super().train(resume_from_checkpoint, **kwargs)

    def _guarded(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Return DeepSpeed's reader of a checkpoint for ones that hold no base and may be bad."""

        def loaded(path: str, **options: Any) -> Any:
            self._check_same_run(Path(path))
            with reading(path):
                return load(path, **{**options, "load_module_strict": False})

        return loaded

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; transformers would gather the base and write it, too."""
        if self.shards or self.is_deepspeed_enabled:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self.deepspeed.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:
                for script in Path(output_dir).glob("zero_to_*.py"):
                    script.unlink()  # DeepSpeed's own, which would run code that is in a checkpoint
        elif self.shards:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)


_HELD = -1
"""Stands for a module that holds a weight; DeepSpeed counts its own from 0."""


def _numbers_only(path: str, map_location: Any = None) -> Any:
    """Read a file of a DeepSpeed checkpoint; its own reader would run code that is in it."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)
