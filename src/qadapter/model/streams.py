"""What the branches hand on: hidden states, and what the loss makes of them; and whose they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qadapter.config import QConfig


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter on a base; its branch is the base's last `depth` layers with it switched on."""

    name: str
    """To users."""
    key: str
    """To peft."""
    first: int
    """The first layer that it changes; L where it changes none but the head."""
    depth: int
    """K, how many layers run once more for it."""
    q_config: QConfig
    """What it was saved with."""


class Streams(NamedTuple):
    """Final hidden states, after the last norm, of all branches."""

    adapted: Tensor
    """`[B, T, D]`, h_θ: base and adapter; the first adapter's where there are several."""
    base_states: Tensor | None
    """`[B, T, D]`, h_1: the base alone, without gradient; None where it was not run."""
    trunk: Tensor | None = None
    """`[B, T, D]`, what enters the first layer that runs twice; only in whole batches, and with one
    adapter."""
    more: tuple[Tensor, ...] = ()
    """`[B, T, D]` each, of the second adapter and those after it."""

    @property
    def base(self) -> Tensor:
        """The base's states.

        Raises:
            ValueError: only its scalars are there.
        """
        if self.base_states is None:
            raise ValueError("the base's states were not computed, only its scalars are known")
        return self.base_states

    @property
    def branches(self) -> tuple[Tensor, ...]:
        """h_θ of each adapter."""
        return (self.adapted, *self.more)

    def map(self, change: Callable[[Tensor], Tensor]) -> Streams:
        """Return all branches changed alike."""
        base = None if self.base_states is None else change(self.base_states)
        return Streams(change(self.adapted), base, None, tuple(map(change, self.more)))

    def at(self, index: Any) -> Streams:
        """Return all branches at an index of their leading dimensions, as `[M, D]` for a mask."""
        return self.map(lambda states: states[index])

    def to(self, dtype: torch.dtype) -> Streams:
        """Return all branches in `dtype`."""
        return self.map(lambda states: states.to(dtype))

    @staticmethod
    def cat(parts: Sequence[Streams]) -> Streams:
        """Return parts that hold the base's states, one after another."""
        branches = zip(*(p.branches for p in parts), strict=True)
        first, *more = (torch.cat(states) for states in branches)
        return Streams(first, torch.cat([p.base for p in parts]), None, tuple(more))


class BaseScalars(NamedTuple):
    """All that the loss needs of the base where α0 = α̃ (METHOD §2)."""

    taken: Tensor
    """`[N]` float32, z_1(s_t, a_t), the base's logit of the action."""
    following: Tensor
    """`[N]` float32, logsumexp of z_1(s_{t+1}, ·); 0 where the response has ended."""


class QAndV(NamedTuple):
    """What the loss needs of each response token."""

    taken: Tensor
    """`[N]` float32, Q̂(s_t, a_t)."""
    following: Tensor
    """`[N]` float32, V̂(s_{t+1}); 0 where the response has ended."""
    base: BaseScalars | None = None
    """The base's part of them; None where the head is not one plain linear map."""
