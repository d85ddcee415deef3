"""The parts of any family's decoder that two branches need: its layers and what follows them."""

from __future__ import annotations

from typing import Any

from torch import nn

from qadapter.errors import ModelError


def decoder_layers(decoder: nn.Module, n_layers: int) -> nn.ModuleList:
    """Return the decoder's list of layers.

    Raises:
        ModelError: it has none of that length.
    """
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == n_layers:
            return child
    raise ModelError(
        f"{type(decoder).__name__}: no list of {n_layers} layers was found; "
        "Q-Adapter needs a decoder with one list of layers, choose another base."
    )


def final_norm(decoder: nn.Module, layers: nn.ModuleList) -> nn.Module:
    """Return the module after the list of layers; whoever uses it has to put it to the test."""
    children = list(decoder.children())
    after = children[[child is layers for child in children].index(True) + 1 :]
    if not after:
        raise ModelError(
            f"{type(decoder).__name__}: no final norm after its layers; choose another base."
        )
    return after[0]


def by_layer(config: Any) -> list[str]:
    """Return a config's fields that hold one value for each layer (`layer_types` and the like)."""
    return [
        name
        for name, value in vars(config).items()
        if "layer" in name and isinstance(value, list) and len(value) == config.num_hidden_layers
    ]
