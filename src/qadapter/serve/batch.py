"""Rows that are decoded together: their keys and values, joined and dropped between tokens.

Rows are aligned on the right. With prompts `a b c` and `d` after two and one tokens of answer:

    a b c x y
    · · · d x      · is masked, and zero in the cache

Every row ends in the last column, so one step appends one column to all of them, and a sliding
window, which counts columns, sees the same tokens as it would in the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from qadapter.model import Adapter, QAdapterModel
from qadapter.packing import pad_rows

_ROOM = 64
"""Columns made at once; growing copies all that is there."""


class _Roomy(DynamicLayer):
    """Keys and values in buffers with room on their right: a step writes one column, copies none.

    `keys` and `values` are views of the columns in use. It holds what a sliding window no longer
    sees, too: the model's masks leave that out.
    """

    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, H, T, D]` keys and values, and return all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.hold(key_states[:, :, :0], value_states[:, :, :0])
        start, more = self.keys.shape[2], key_states.shape[2]
        if start + more > self._room[0].shape[2]:
            self.hold(self.keys, self.values, more=more)
        for buffer, new in zip(self._room, (key_states, value_states), strict=True):
            buffer[:, :, start : start + more] = new
        self.keys, self.values = (buffer[:, :, : start + more] for buffer in self._room)
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor, more: int = 0) -> None:
        """Put these in new buffers with room for `more` columns and some."""
        used = keys.shape[2]
        self._room = tuple(
            t.new_empty(*t.shape[:2], used + more + _ROOM, t.shape[3]) for t in (keys, values)
        )
        for buffer, old in zip(self._room, (keys, values), strict=True):
            buffer[:, :, :used] = old
        self.keys, self.values = (buffer[:, :, :used] for buffer in self._room)


def _right(states: Tensor, columns: int) -> Tensor:
    """Return the last `columns` of `[B, H, T, D]`, zeros on the left where there are fewer."""
    missing = columns - states.shape[2]
    if missing <= 0:
        return states[:, :, -missing:]
    shape = (*states.shape[:2], missing, states.shape[3])
    return torch.cat([states.new_zeros(shape), states], dim=2)


class Batch:
    """Token rows with their place in the model's cache.

    Args:
        prompts: rows of tokens; each is read at the first call of `logits`.
        adapters: those of the model that have a branch here.
    """

    def __init__(
        self,
        model: QAdapterModel,
        prompts: Sequence[Sequence[int]],
        adapters: tuple[Adapter, ...],
    ) -> None:
        self._model, self._adapters = model, adapters
        ids, mask = pad_rows(prompts, 0, left=True)
        self._next, self._mask = ids.to(model.device), mask.to(model.device)
        layers = model.base.config.num_hidden_layers + sum(a.depth for a in adapters)
        self._cache = Cache(layers=[_Roomy() for _ in range(layers)])

    def __len__(self) -> int:
        return len(self._mask)

    @torch.no_grad()
    def logits(
        self, strengths: Sequence[Sequence[float]], *, base: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Read the tokens that were not read yet; return logits of the ones to come, float32.

        Args:
            strengths: of each row, s of each adapter.
            base: rows whose base logits are wanted, too.

        Returns:
            `[B, V]` of the policy, and `[len(base), V]` of the base.
        """
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        streams = self._model.streams(
            self._next,
            self._mask,
            self._cache,
            position_ids=positions[:, -self._next.shape[1] :],
            adapters=self._adapters,
        ).at((slice(None), -1))
        logits = self._model.policy_logits(streams, torch.tensor(strengths)).float()
        with self._model.adapter_off():
            return logits, self._model.head(streams.base[list(base)]).float()

    def append(self, tokens: Sequence[int]) -> None:
        """Append one token to each row."""
        self._next = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, of which there are some, and columns that none of them needs."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._mask.device)
        self._next, mask = self._next[index], self._mask[index]
        used = int(mask.sum(1).max())
        self._mask = mask[:, mask.shape[1] - used :]
        for layer in self._cache.layers:
            # One column of the mask is not read yet.
            layer.hold(*(_right(t[index], used - 1) for t in (layer.keys, layer.values)))

    def join(self, other: Batch) -> None:
        """Add another batch's rows after these; both have read all but their last tokens."""
        columns = max(self._mask.shape[1], other._mask.shape[1])
        pad = torch.nn.functional.pad
        self._mask = torch.cat(
            [pad(b._mask, (columns - b._mask.shape[1], 0)) for b in (self, other)]
        )
        self._next = torch.cat([self._next, other._next])
        for mine, its in zip(self._cache.layers, other._cache.layers, strict=True):
            mine.hold(
                *(
                    torch.cat([_right(t, columns - 1) for t in pair])
                    for pair in ((mine.keys, its.keys), (mine.values, its.values))
                )
            )
