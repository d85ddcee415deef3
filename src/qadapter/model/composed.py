"""Several adapters on one base, each with a branch of its own: added, told apart, taken away.

Their policy is M2 with the residuals' sum, each in units of its own temperature (METHOD §5):

    log π_s = (α0/α̃)·log π1 + Σ_k s_k·Q̂_k/α̃_k − const

which needs one α0/α̃, the base's weight, that all of them were trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from qadapter.config import QConfig
from qadapter.decoder import by_layer
from qadapter.errors import ArtefactError, ConfigError, ModelError, UserError
from qadapter.lora import speed_up
from qadapter.model.adapter import check_state, find_weights
from qadapter.model.streams import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tuned_modules(
    base: PreTrainedModel, layers: nn.ModuleList
) -> tuple[list[Any], list[tuple[int, Any]]]:
    """Return the modules that peft wrapped, and those in the decoder's layers with their layer.

    Raises:
        ModelError: some are neither there nor the head.
    """
    tuned = [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
    inside = [
        (i, m)
        for i, layer in enumerate(layers)
        for m in layer.modules()
        if isinstance(m, BaseTunerLayer)
    ]
    head = isinstance(base.get_output_embeddings(), BaseTunerLayer)
    if len(tuned) - len(inside) - int(head):
        raise ModelError(
            "the adapter changes modules outside the decoder layers and the head "
            "(embeddings?); adapt linear maps of the layers instead."
        )
    return tuned, inside


def describe(
    name: str, key: str, q_config: QConfig, inside: Sequence[tuple[int, Any]], n_layers: int
) -> Adapter:
    """Return an adapter that peft has put into some of these modules."""
    # One that adapts the head alone has its last layer run twice all the same.
    touched = [i for i, m in inside if key in getattr(m, "lora_A", (key,))]
    first = min(touched, default=n_layers - 1)
    return Adapter(name, key, first, n_layers - first, q_config)


def check_composes(
    where: str | Path, new: QConfig, there: QConfig, *, check_base: bool = True
) -> None:
    """Raise unless two adapters' residuals add on one base.

    Raises:
        ArtefactError: they were trained on other bases or with other tokenizers or templates.
        ConfigError: what they were trained as has no common sum.
    """
    if check_base and new.base_hash != there.base_hash:
        raise ArtefactError(
            f"{where}: was trained on another base ({new.base_model!r}) than the adapter before it "
            f"({there.base_model!r}); adapters compose on one base only."
        )
    if check_base and new.tokenizer_hash != there.tokenizer_hash:
        raise ArtefactError(
            f"{where}: was trained with another tokenizer or chat template than the adapter before "
            "it; retrain one of them, or pass --no-check-base if you know better."
        )
    if new.parameterization != there.parameterization:
        raise ConfigError(
            f"{where}: its parameterization is {new.parameterization} and that of the adapter "
            f"before it {there.parameterization}; adapters of one parameterization compose."
        )
    weights = [q.alpha_0 / q.alpha_tilde for q in (new, there)]
    # Each raw one brings the base along once more, by 1/α̃.
    raw = new.parameterization == "raw" and new.alpha_tilde != there.alpha_tilde
    if abs(weights[0] - weights[1]) > 1e-9 * max(weights) or raw:
        raise ConfigError(
            f"{where}: was trained for another weight of the base (alpha_0 {new.alpha_0:g}, "
            f"alpha_tilde {new.alpha_tilde:g}) than the adapter before it ({there.alpha_0:g}, "
            f"{there.alpha_tilde:g}), and their sum can have only one; retrain one of them with "
            + ("the other's alphas." if raw else "the other's alpha_0 / alpha_tilde.")
        )


_SPECIAL = (
    "alora_invocation_tokens",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
)
"""Settings of peft's that make more of LoRA than a pair of maps beside each linear one."""


def _lora_config(directory: str | Path) -> LoraConfig:
    """Return the peft config of an adapter that is nothing but LoRA on linear maps.

    Raises:
        ArtefactError: it is damaged, or more than that.
    """
    path = Path(directory) / "adapter_config.json"
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # json and peft each raise their own
        raise ArtefactError(f"{path}: is damaged ({error}); copy or train again.") from error
    plain = type(config) is LoraConfig and config.bias == "none"
    if not plain or any(getattr(config, name, None) for name in _SPECIAL):
        raise ArtefactError(f"{path}: is more than plain LoRA, which does not compose.")
    config.inference_mode = True
    # Some ways to begin change the base's weights; these are overwritten in any case.
    config.init_lora_weights = True
    return config


def _has_adapters(layer: Any) -> bool:
    return any(len(getattr(layer, name)) for name in layer.adapter_layer_names)


class Composed:
    """The part of a `QAdapterModel` that adds adapters to the first and takes them away."""

    if TYPE_CHECKING:
        peft_model: PeftModel
        q_config: QConfig
        config: Any
        training: bool
        adapters: tuple[Adapter, ...]
        shares_trunk: bool
        lengthened: Callable[..., Any]
        _base: PreTrainedModel
        _layers: nn.ModuleList
        _n_layers: int
        _tuned: list[Any]
        _inside: list[tuple[int, Any]]
        _rounded: dict[Any, Any]
        _stackable: dict[Any, bool]

    def rename(self, name: str) -> None:
        """Name the one adapter."""
        (adapter,) = self.adapters
        self.adapters = (replace(adapter, name=name),)

    def add(self, directory: str | Path, name: str, *, check_base: bool = True) -> Adapter:
        """Load one more saved adapter of the same base; nothing is changed if that fails.

        Raises:
            ArtefactError: it is incomplete or damaged, or of another base or tokenizer.
            ConfigError: its residual cannot be added to the others'.
        """
        q_config = QConfig.load(directory)
        check_composes(directory, q_config, self.q_config, check_base=check_base)
        weights = find_weights(directory)
        config = _lora_config(directory)
        taken = [int(a.key.removeprefix("more")) for a in self.adapters[1:]]
        key = f"more{max(taken, default=0) + 1}"
        try:
            state = load_peft_weights(str(directory), device="cpu")
            self.peft_model.add_adapter(key, config)
            check_state(weights, state, self.peft_model, key)
            set_peft_model_state_dict(self.peft_model, state, adapter_name=key)
            self._see_modules()
            if isinstance(self._base.get_output_embeddings(), BaseTunerLayer):
                raise ArtefactError(
                    f"{directory}: it or the adapter before it adapts the head, which does not "
                    "compose; retrain without."
                )
            _, inside = tuned_modules(self._base, self._layers)
        except Exception as error:  # safetensors, json and peft each raise their own
            self._forget(key)
            if isinstance(error, UserError):
                raise
            raise ArtefactError(
                f"{weights}: cannot be loaded ({error}); the file is damaged, copy or train again."
            ) from error
        adapter = describe(name, key, q_config, inside, self._n_layers)
        if not self.shares_trunk:
            adapter = replace(adapter, first=0, depth=self._n_layers)
        self._have((*self.adapters, adapter))
        return adapter

    def remove(self, adapter: Adapter) -> None:
        """Take away an adapter that was added.

        Raises:
            ValueError: it is the first, or not there.
        """
        if adapter not in self.adapters[1:]:
            raise ValueError(f"{adapter.name}: was not added to this model")
        self._forget(adapter.key)
        # Its key may be given again.
        self._rounded = {k: v for k, v in self._rounded.items() if k[1] != adapter.key}
        self._stackable = {k: v for k, v in self._stackable.items() if adapter not in k}
        self._have(tuple(a for a in self.adapters if a is not adapter))

    def _forget(self, key: str) -> None:
        """Leave nothing of an adapter: maps that only it had changed are the base's own again."""
        self._see_modules()
        self.peft_model.peft_config.pop(key, None)
        for parent in list(self._base.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BaseTunerLayer):
                    child.delete_adapter(key)
                    if not _has_adapters(child):
                        setattr(parent, name, child.get_base_layer())
        self._see_modules()

    def _see_modules(self) -> None:
        """Look anew at what peft has wrapped, with the first adapter as peft's active one."""
        first = self.adapters[0].key
        speed_up(self.peft_model)
        self._tuned = [m for m in self._base.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self._tuned:
            layer._active_adapter = [first]
        self.peft_model.base_model.active_adapter = first
        # What peft makes is ready for training.
        self.peft_model.train(self.training)

    def _have(self, adapters: tuple[Adapter, ...]) -> None:
        self._tuned, self._inside = tuned_modules(self._base, self._layers)
        self.adapters = adapters
        longer = self.lengthened(self._base.config, adapters)
        for name in ("num_hidden_layers", *by_layer(longer)):
            setattr(self.config, name, getattr(longer, name))
