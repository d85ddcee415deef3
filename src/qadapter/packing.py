"""Tokenised pairs to batches: one packed row, or padded rows (TRL's key names)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qadapter.data import TokenizedPair, pair_lengths
from qadapter.errors import ConfigError


class PackedBatch(TypedDict):
    """B pairs in one row without padding, each as prompt, chosen, rejected.

    Two pairs, `5 6 → 7 2 or 8 9 2` and `5 → 3 2 or 4 2`:

        input_ids        [[5, 6, 7, 2, 8, 9, 2, 5, 3, 2, 4, 2]]
        position_ids     [[0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1, 2]]
        spans            [[0, 2, 2, 3], [7, 1, 2, 2]]
        terminal         [True, True, True, True]                   (chosen first)
    """

    input_ids: Tensor
    """`[1, T]` int64."""
    position_ids: Tensor
    """`[1, T]` int64; the rejected response goes on from the prompt."""
    spans: Tensor
    """`[B, 4]` int64: start, and tokens of prompt, chosen and rejected."""
    terminal: Tensor
    """`[2B]` bool, False for a response cut by the length limit."""


class PairBatch(TypedDict):
    """B pairs as 2B rows, the B chosen ones first, padded on the right to T tokens.

    One pair, prompt `5 6`, chosen `7 2`, rejected `8 9 2`, pad 2:

        input_ids        [[5, 6, 7, 2, 2], [5, 6, 8, 9, 2]]
        attention_mask   [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
        completion_mask  [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
        terminal         [True, True]
    """

    input_ids: Tensor
    """`[2B, T]` int64."""
    attention_mask: Tensor
    """`[2B, T]` int64, from lengths and never from the pad id, which is often a real token."""
    completion_mask: Tensor
    """`[2B, T]` bool, the response's tokens with its end-of-turn token."""
    terminal: Tensor
    """`[2B]` bool, False for a response cut by the length limit."""


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `attention_mask`, `[R, T]` int64, padded on the right, or the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if left else slice(len(row))
        ids[i, at] = torch.tensor(row, dtype=torch.int64)
        mask[i, at] = 1
    return ids, mask


def pack_pairs(pairs: Sequence[TokenizedPair]) -> PackedBatch:
    """Return the pairs as one packed row; see `PackedBatch` for its layout."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[list[int]] = []
    for pair in pairs:
        prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
        spans.append([len(ids), len(prompt), len(chosen), len(rejected)])
        ids += [*prompt, *chosen, *rejected]
        positions += range(len(prompt) + len(chosen))
        positions += range(len(prompt), len(prompt) + len(rejected))
    terminal = [p.chosen_terminal for p in pairs] + [p.rejected_terminal for p in pairs]
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        spans=torch.tensor(spans),
        terminal=torch.tensor(terminal),
    )


@dataclass(frozen=True)
class Rows(Sequence[list[TokenizedPair]]):
    """Rows of pairs, by the pairs' indices; the pairs are read when a row is asked for."""

    pairs: Sequence[TokenizedPair]
    order: NDArray[np.int64]
    """Index of each pair, row after row."""
    ends: NDArray[np.int64]
    """End of each row in `order`."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens of each row, without reading it."""
        whole = pair_lengths(self.pairs)[self.order].cumsum()
        return np.diff(whole[self.ends - 1], prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> list[TokenizedPair]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[TokenizedPair]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Return one row, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return [self.pairs[int(i)] for i in self.order[start : self.ends[index]]]


def fill_rows(pairs: Sequence[TokenizedPair], tokens: int, *, seed: int | None) -> Rows:
    """Return the pairs in rows of at most so many tokens, each filled in turn.

    They are shuffled by the seed; with None they stay in their own order.

    Raises:
        ConfigError: a pair alone has more.
    """
    order = np.arange(len(pairs))
    if seed is not None:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).numpy()
    lengths = pair_lengths(pairs)[order]
    if (longest := int(lengths.max(initial=0))) > tokens:
        pair = pairs[int(order[lengths.argmax()])]
        raise ConfigError(
            f"tokens_per_batch: {tokens} is less than the {longest} tokens of {pair.source}; "
            "raise it, or lower max_length."
        )
    total, ends = lengths.cumsum(), [0]
    while ends[-1] < len(order):
        before = int(total[ends[-1] - 1]) if ends[-1] else 0
        ends.append(int(total.searchsorted(before + tokens, side="right")))
    return Rows(pairs, order, np.array(ends[1:], np.int64))


def flat(items: Sequence[TokenizedPair | list[TokenizedPair]]) -> list[TokenizedPair]:
    """Return the pairs of pairs and rows of pairs."""
    return [p for item in items for p in (item if isinstance(item, list) else [item])]


def collate_rows(
    collate: Callable[[Sequence[TokenizedPair]], Mapping[str, Any]],
    items: Sequence[TokenizedPair | list[TokenizedPair]],
) -> Mapping[str, Any]:
    """Return pairs, or rows of `fill_rows`, as one batch made by `collate`."""
    return collate(flat(items))


@dataclass(frozen=True)
class PairCollator:
    """Make a padded `PairBatch` of tokenised pairs."""

    pad_id: int

    def __call__(self, pairs: Sequence[TokenizedPair]) -> PairBatch:
        """Return the batch; see `PairBatch` for its layout."""
        responses = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
        prompts = [p.prompt_ids for p in pairs] * 2
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        ids, mask = pad_rows(rows, self.pad_id)
        completion = torch.zeros_like(mask, dtype=torch.bool)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            completion[i, len(prompt) : len(row)] = True
        terminal = [p.chosen_terminal for p in pairs] + [p.rejected_terminal for p in pairs]
        return PairBatch(
            input_ids=ids,
            attention_mask=mask,
            completion_mask=completion,
            terminal=torch.tensor(terminal),
        )
