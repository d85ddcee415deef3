"""LoRA on the last layers of a base, by peft; and whether a saved adapter fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapter.config import Q_CONFIG_NAME
from qadapter.decoder import decoder_layers
from qadapter.errors import ArtefactError, ConfigError


def _linear_names(layer: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    names = {
        n.rsplit(".", 1)[-1] for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)
    }
    return sorted(names)


def lora_config(
    base: PreTrainedModel,
    *,
    lora_r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    trunk: float = 0.75,
) -> LoraConfig:
    """Return peft's config of an adapter on `base`; arguments as of `QAdapterModel.create`.

    Raises:
        ConfigError: a layer does not exist.
        ModelError: the base has no list of layers.
    """
    n_layers = int(base.config.num_hidden_layers)
    layers = decoder_layers(base.get_decoder(), n_layers)
    chosen = (
        list(layers_to_transform)
        if layers_to_transform is not None
        else list(range(min(round(trunk * n_layers), n_layers - 1), n_layers))
    )
    if not chosen or not all(0 <= i < n_layers for i in chosen):
        raise ConfigError(
            f"layers_to_transform: {chosen} must name layers between 0 and {n_layers - 1}."
        )
    names = (
        list(target_modules) if target_modules is not None else _linear_names(layers[chosen[-1]])
    )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=names,
        layers_to_transform=chosen,
    )


FILES = ("adapter_config.json", "adapter_model.safetensors", Q_CONFIG_NAME)
"""What is read of a saved Q-adapter's directory."""


def find_weights(directory: str | Path) -> Path:
    """Return the weights' file of a saved adapter, its `adapter_config.json` being there as well.

    Raises:
        ArtefactError: one is missing, or the config is no JSON.
    """
    config = Path(directory) / "adapter_config.json"
    weights = Path(directory) / "adapter_model.safetensors"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{config}: missing; train or copy the adapter again.") from error
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{config}: is damaged ({error}); copy or train again.") from error
    if not weights.is_file():
        raise ArtefactError(f"{weights}: missing; train or copy the adapter again.")
    return weights


def check_state(
    path: Path, state: dict[str, Tensor], model: PeftModel, key: str = "default"
) -> None:
    """Raise ArtefactError unless the tensors are this adapter's, all there, and finite.

    Args:
        key: peft's name of the adapter.
    """
    named = {"adapter_name": key, "save_embedding_layers": False}
    expected = set(get_peft_model_state_dict(model, **named))
    strange, missing = sorted(set(state) - expected), sorted(expected - set(state))
    if strange or missing:
        name, what = (missing[0], "lacks") if missing else (strange[0], "has a foreign")
        raise ArtefactError(
            f"{path}: {what} {name!r}; it is another adapter or cut, copy it again."
        )
    if bad := [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise ArtefactError(f"{path}: {bad[0]!r} is not finite; use an older checkpoint.")


def save_plain(model: PeftModel, directory: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the adapter's own two files, as peft reads them; `state` stands for its parameters."""
    model.save_pretrained(
        str(directory), safe_serialization=True, save_embedding_layers=False, state_dict=state
    )
    # peft's template says nothing true about this adapter
    (directory / "README.md").unlink(missing_ok=True)


def load_plain(base: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Return a base with a plain LoRA on it, as anyone with peft loads it."""
    model: PreTrainedModel = PeftModel.from_pretrained(base, str(directory))
    return model
