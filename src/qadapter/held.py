"""Anchors in training: general texts on which the residual is pulled to zero (METHOD §6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from qadapter.errors import DataError
from qadapter.model import QAdapterModel, Streams
from qadapter.packing import pad_rows

_MOST_KEPT = 2**30
"""Bytes of memory that what the base makes of all anchors may take."""


def anchor_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 128
) -> list[list[int]]:
    """Return token ids of texts, each cut to `max_tokens`; texts of under two tokens are left out.

    Raises:
        DataError: nothing is left.
    """
    rows = [cast(list[int], tokenizer(t)["input_ids"])[:max_tokens] for t in texts]
    rows = [r for r in rows if len(r) > 1]
    if not rows:
        raise DataError("anchor_data: no text of at least two tokens; give longer texts.")
    return rows


def anchor_turn(anchors: int, turn: int, count: int) -> list[int]:
    """Return which anchors a micro-batch has: so many a turn, from the first again after all."""
    return [(turn * count + i) % anchors for i in range(count)]


class AnchorKL:
    """The sum over tokens of KL(π1 ‖ π̃) on a few anchors a turn (METHOD §6).

    A sum, for its mean is over all the micro-batches of a step, of all processes.

    The base never changes, so what it makes of a text, the trunk and its final states, is computed
    once and kept in memory where that takes little.

    Args:
        rows: token ids of the texts.
        pad_id: a token for what fills a row up.
        keep: whether anything may be kept: not where layers are split over processes, which run
            them all together or not at all.
    """

    def __init__(self, rows: Sequence[Sequence[int]], pad_id: int, *, keep: bool) -> None:
        self._rows, self._pad_id, self._keep = rows, pad_id, keep
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def tokens(self, turn: int, count: int) -> int:
        """Return how many tokens `count` anchors of a turn have."""
        return sum(len(self._rows[i]) for i in anchor_turn(len(self._rows), turn, count))

    def __call__(
        self, model: Callable[..., Streams], inner: QAdapterModel, turn: int, count: int
    ) -> Tensor:
        """Return the sum, a scalar, of `count` anchors; `model` may be a wrapped `inner`."""
        picked = anchor_turn(len(self._rows), turn, count)
        ids, mask = pad_rows([self._rows[i] for i in picked], self._pad_id)
        row = {"input_ids": ids.to(inner.device), "attention_mask": mask.to(inner.device)}
        if all(i in self._kept for i in picked):
            trunk, base = (
                pad_sequence(list(states), batch_first=True).to(inner.device)
                for states in zip(*(self._kept[i] for i in picked), strict=True)
            )
            streams = model(**row, trunk=trunk, output_streams=True)._replace(base_states=base)
        else:
            streams = model(**row, output_streams=True)
            if self._may_keep(inner):
                # Autocast hands both on in float32; as it entered the layers the trunk was not.
                both = cast(Tensor, streams.trunk).to(inner.dtype), streams.base
                for i, states, taken in zip(picked, zip(*both, strict=True), mask, strict=True):
                    trunk, base = (s[: int(taken.sum())].detach().cpu() for s in states)
                    self._kept[i] = trunk, base
        return inner.kl_from_base(streams.at(row["attention_mask"].bool())).sum()

    def _may_keep(self, model: QAdapterModel) -> bool:
        bytes_of_both = torch.finfo(model.dtype).bits // 8 + 4
        need = sum(map(len, self._rows)) * model.base_width * bytes_of_both
        return self._keep and need <= _MOST_KEPT and model.caches_trunk
