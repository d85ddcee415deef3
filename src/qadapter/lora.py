"""peft's LoRA layers, computed without passes over activations that change nothing.

peft casts a layer's input to the adapter's dtype and back, and scales and adds the adapter's part
in passes of their own. `fused.lora_linear` is the same map in four matrix products. Everything else
about the layers, from their initialisation to their files, stays peft's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from qadapter.fused import lora_linear


def _is_called_plainly(module: nn.Module) -> bool:
    """Return whether calling the module is its product alone.

    Offloading and sharding engines fetch weights in hooks, or in a `forward` of their own.
    """
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return not any(hooks) and "forward" not in module.__dict__


class LoraLinear(Linear):
    """A linear map with one plain adapter; anything else goes the way of peft."""

    def _plain_adapter(self) -> str | None:
        """Return the name of the one active adapter, if it is nothing but `s·B·A`."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = str(self.active_adapters[0])
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return None
        dropout = self.lora_dropout[name]
        if self.training and not isinstance(dropout, nn.Identity):
            return None
        parts = self.base_layer, self.lora_A[name], self.lora_B[name]
        return name if all(_is_called_plainly(part) for part in parts) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `W·x + s·B·A·x`, `[..., out_features]`, in the base's dtype."""
        if self._disable_adapters and not (args or kwargs or self.merged):
            return cast(Tensor, self.base_layer(x))
        name = self._plain_adapter()
        weight = self.base_layer.weight
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if args or kwargs or name is None or dtype != weight.dtype or weight.requires_grad:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        scaling = float(self.scaling[name])
        return lora_linear(x.to(dtype), weight, self.base_layer.bias, down, up, scaling=scaling)


def speed_up(model: nn.Module) -> None:
    """Let the plain LoRA layers of a peft model compute as `LoraLinear`, in place.

    Quantised and other special base layers stay as they are.
    """
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LoraLinear
