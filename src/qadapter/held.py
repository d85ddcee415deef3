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
    once and kept in memory where that takes little. It is computed of each text alone, so it does
    not depend on which texts a turn has, nor on where a run began.

    Args:
        rows: token ids of the texts.
        model: whose KL it is; it is tried out here, and not in the middle of training.
        pad_id: a token for what fills a row up.
        split: whether layers are split over processes, which run them all together or not at all;
            nothing is kept then.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], model: QAdapterModel, *, pad_id: int, split: bool
    ) -> None:
        self._rows, self._model, self._pad_id = rows, model, pad_id
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        fits = bool(rows) and not split and self.size <= _MOST_KEPT
        self.keeps = fits and model.caches_trunk
        """Whether what the base makes of the texts is kept."""

    def __len__(self) -> int:
        return len(self._rows)

    def forget(self) -> None:
        """Let the base read all of them again."""
        self._kept.clear()

    @property
    def size(self) -> int:
        """Bytes that all of it takes."""
        width, trunk = self._model.base_width, torch.finfo(self._model.dtype).bits // 8
        return sum(map(len, self._rows)) * width * (trunk + torch.float32.itemsize)

    def tokens(self, turn: int, count: int) -> int:
        """Return how many tokens `count` anchors of a turn have."""
        return sum(len(self._rows[i]) for i in anchor_turn(len(self._rows), turn, count))

    def __call__(self, model: Callable[..., Streams], turn: int, count: int) -> Tensor:
        """Return the sum, a scalar, of `count` anchors; `model` is ours, wrapped or not."""
        picked, device = anchor_turn(len(self._rows), turn, count), self._model.device
        ids, mask = (t.to(device) for t in pad_rows([self._rows[i] for i in picked], self._pad_id))
        row = {"input_ids": ids, "attention_mask": mask}
        if self.keeps:
            trunk, base = (
                pad_sequence(list(states), batch_first=True).to(device)
                for states in zip(*map(self.read, picked), strict=True)
            )
            streams = model(**row, trunk=trunk, output_streams=True)._replace(base_states=base)
        else:
            streams = model(**row, output_streams=True)
        return self._model.kl_from_base(streams.at(mask.bool())).sum()

    def read(self, i: int) -> tuple[Tensor, Tensor]:
        """Return what the base makes of a text: its trunk and its final states, `[T, D]` each."""
        if i not in self._kept:
            ids = torch.tensor([list(self._rows[i])], device=self._model.device)
            with self._model.evaluating():
                streams = self._model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), output_streams=True
                )
            # Autocast hands both on in float32; as it entered the layers the trunk was not.
            trunk = cast(Tensor, streams.trunk)[0].to(self._model.dtype)
            self._kept[i] = trunk.cpu().clone(), streams.base[0].cpu().clone()
        return self._kept[i]
