"""What the two branches hand on: hidden states, and what the loss makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Streams(NamedTuple):
    """Final hidden states, after the last norm, of both branches."""

    adapted: Tensor
    """`[B, T, D]`, h_θ: base and adapter."""
    base_states: Tensor | None
    """`[B, T, D]`, h_1: the base alone, without gradient; None where it was not run."""
    trunk: Tensor | None = None
    """`[B, T, D]`, what enters the first layer that runs twice; only in whole batches."""

    @property
    def base(self) -> Tensor:
        """The base's states.

        Raises:
            ValueError: only its scalars are there.
        """
        if self.base_states is None:
            raise ValueError("the base's states were not computed, only its scalars are known")
        return self.base_states

    def at(self, index: Any) -> Streams:
        """Return both branches at an index of their leading dimensions, as `[M, D]` for a mask."""
        base = self.base_states
        return Streams(self.adapted[index], None if base is None else base[index])

    def to(self, dtype: torch.dtype) -> Streams:
        """Return both branches in `dtype`."""
        base = self.base_states
        return Streams(self.adapted.to(dtype), None if base is None else base.to(dtype))


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
