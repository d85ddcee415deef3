"""The weights of a Q-adapter without peft: its base's, and its base's with the adapter added."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qadapter.errors import ModelError
from qadapter.model.qadapter import QAdapterModel
from qadapter.model.stacked import hooked
from qadapter.model.streams import Adapter


def base_state(model: QAdapterModel) -> dict[str, Tensor]:
    """Return the base's tensors under their own names, none of them copied."""
    state = model.base.state_dict()
    return {n.replace(".base_layer.", "."): t for n, t in state.items() if "lora_" not in n}


def merged_state(model: QAdapterModel, adapter: Adapter) -> dict[str, Tensor]:
    """Return the base's tensors with `W + s·B·A` in the place of each `W` that the adapter changes.

    The sum is taken in float32 or wider and rounded once.

    Raises:
        ModelError: the adapter is more than low-rank maps on plain linear ones.
    """
    tuned = {n: m for n, m in model.base.named_modules() if isinstance(m, BaseTunerLayer)}
    # With one adapter, what peft has switched on is that one.
    alone = len(model.adapters) == 1
    changed = {n: m for n, m in tuned.items() if alone or adapter.key in m.lora_A}
    return base_state(model) | {
        f"{n}.weight": _merged(n, m, adapter.key, alone=alone) for n, m in changed.items()
    }


def _merged(name: str, layer: BaseTunerLayer, adapter: str, *, alone: bool) -> Tensor:
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer()
    others = alone and layer.active_adapters != [adapter]
    special = others or layer.merged or adapter in layer.lora_variant
    if special or layer.lora_bias[adapter] or type(base) not in (nn.Linear, Conv1D):
        raise ModelError(
            f"{name}: its adapter is not one pair of low-rank maps on a plain linear map and "
            "cannot be merged; serve the adapter itself."
        )
    weight = cast(Tensor, base.weight.detach())
    delta = layer.get_delta_weight(adapter).detach()
    # A half-precision weight is widened by the adapter's float32.
    merged: Tensor = (weight.to(delta.dtype) + delta).to(weight.dtype)
    return merged


@contextmanager
def widened(model: QAdapterModel, *, as_merged: bool) -> Iterator[torch.dtype]:
    """Let a Q-adapter compute in float32 or wider inside the block, and yield that dtype.

    Its own weights are there again afterwards. With `as_merged`, each adapted map is off by what
    `merged_state` rounds of it: the adapter still computes, and only the rounding is added, so
    whoever compares merged weights with this finds what else is wrong with them.
    """
    wide = torch.promote_types(model.dtype, torch.float32)
    kept = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    tuned = [m for m in model.base.modules() if isinstance(m, BaseTunerLayer)]
    hooks = [
        m.register_forward_hook(partial(_rounded, cast(Tensor, m.get_base_layer().weight).dtype))
        for m in tuned
        if as_merged
    ]
    try:
        for tensor, data in kept:
            tensor.data = data.to(wide)
        with hooked(hooks):
            yield wide
    finally:
        for tensor, data in kept:
            tensor.data = data


def _rounded(dtype: torch.dtype, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Add to a layer's output what rounding `W + s·B·A` to a dtype changes in it."""
    if layer.disable_adapters:
        return output
    base = layer.get_base_layer()
    for name in layer.active_adapters:
        if name in layer.lora_A:
            exact = base.weight + layer.get_delta_weight(name)
            change = exact.to(dtype).to(exact.dtype) - exact
            # A Conv1D holds its map the other way round.
            output = output + args[0] @ (change.T if isinstance(base, nn.Linear) else change)
    return output
