"""Layers of vLLM's that the base and its branches go through together.

A branch is the base's last layers with a low-rank map beside each linear one. So one pass holds the
tokens of the base and, below them, those of each branch: `[n·N, D]`, n streams of N tokens. Every
linear map reads its weight once for all of them, and each branch adds its own map to its rows;
attention alone is a stream's own, with keys and values of its own.

The maps are put into what applies a layer's weights, where vLLM has split inputs and outputs over
ranks already and has not summed them yet: so tensor parallelism and quantised bases are vLLM's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.utils import set_weight_attrs


class Attentions(nn.Module):
    """An attention for each stream."""

    def __init__(self, each: Sequence[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(each)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return `[n·N, …]` of queries, keys and values of as many rows."""
        n = len(self.each)
        parts = zip(*(x.reshape(n, -1, x.shape[-1]) for x in (query, key, value)), strict=True)
        return torch.cat([attend(*part) for attend, part in zip(self.each, parts, strict=True)])


def let_branch(module: LinearBase, ranks: dict[int, int], parts: int) -> None:
    """Give a linear map the low-rank maps of the branches that go through it, zero so far.

    Args:
        ranks: of each branch by its number, in the order of their rows after the base's.
        parts: maps that vLLM holds in this one, such as those of queries, keys and values.
    """
    names = []
    for branch, rank in ranks.items():
        down = nn.Parameter(
            torch.zeros(parts * rank, module.input_size_per_partition), requires_grad=False
        )
        up = nn.Parameter(
            torch.zeros(module.output_size_per_partition, parts * rank), requires_grad=False
        )
        split = isinstance(module, RowParallelLinear)
        set_weight_attrs(*((down, {"input_dim": 1}) if split else (up, {"output_dim": 0})))
        names.append((f"branch_{branch}_down", f"branch_{branch}_up"))
        for name, parameter in zip(names[-1], (down, up), strict=True):
            module.register_parameter(name, parameter)
    method = copy.copy(module.quant_method)
    whole = method.apply

    def apply(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = whole(layer, x, bias)
        n = 1 + len(names)
        rows, sums = x.reshape(n, -1, x.shape[-1]), out.view(n, -1, out.shape[-1])
        for i, (down, up) in enumerate(names, start=1):
            sums[i].add_(linear(linear(rows[i], getattr(layer, down)), getattr(layer, up)))
        return out

    method.apply = apply
    module.quant_method = method


def load_branch(
    module: Any, branch: int, parts: Sequence[Any], part: Any, down: Tensor, up: Tensor
) -> None:
    """Load one of a branch's low-rank maps `[r, in]`, `[out, r]` into its place beside a map.

    Args:
        parts: vLLM's names of the maps that it holds in this one; one that is None for a map alone.
        part: the one of them that this is beside.
    """
    into_down, into_up = (getattr(module, f"branch_{branch}_{name}") for name in ("down", "up"))
    rank, at = len(into_down) // len(parts), list(parts).index(part)
    place = slice(at * rank, at * rank + len(down))
    if isinstance(module, RowParallelLinear):
        whole = down.new_zeros(rank, down.shape[1])
        whole[: len(down)] = down
        module.weight_loader(into_down, whole)
        into_up.data[:, place].copy_(up)
        return
    into_down.data[place].copy_(down)
    # Zero where the other maps' parts are: rows of this map take nothing from them.
    whole = up.new_zeros(len(up), into_up.shape[1])
    whole[:, place] = up
    module.weight_loader(into_up, whole, *([] if part is None else [part]))
