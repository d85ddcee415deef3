"""Attention over packed pairs: chosen and rejected see their prompt and not each other.

One row holds pairs one after another, each as prompt, chosen, rejected. A pair's prompt is there
once, and its rejected response begins again at the position after the prompt:

    tokens      p0 p1 c0 c1 r0 | p0 c0 r0 r1
    positions    0  1  2  3  2 |  0  1  1  2

Attention runs pair by pair through the base's own function, on slices: first prompt and chosen,
plainly causal, then the rejected tokens over prompt and themselves. Nothing is padded, no mask
spans two pairs, and soft-caps and sliding windows stay the base's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from qadapter.fused import causal_attention

_PREFIX = "qadapter_"


class PackedPairs:
    """Where each pair of a packed row lies, and the masks its attention needs, made once a batch.

    Args:
        spans: `[B, 4]` int64: start, and tokens of prompt, chosen and rejected.
    """

    def __init__(self, spans: Tensor) -> None:
        self.spans: list[list[int]] = spans.tolist()
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def mask(
        self, queries: tuple[int, ...], keys: tuple[int, ...], window: int | None, like: Tensor
    ) -> Tensor:
        """Return the bool mask `[1, 1, Q, K]` of causal attention between runs of positions.

        Args:
            queries: start and end of the queries' positions.
            keys: the same for the keys, which may come in several runs.
            window: how far back a query sees, itself included; None is all the way.
        """
        key = (queries, keys, window)
        if key not in self._masks:
            q = torch.arange(*queries, device=like.device)[:, None]
            runs = zip(keys[::2], keys[1::2], strict=True)
            k = torch.cat([torch.arange(a, b, device=like.device) for a, b in runs])[None]
            seen = k <= q
            if window is not None:
                seen &= q - k < window
            self._masks[key] = seen[None, None]
        return self._masks[key]


def _takes_fused(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Return whether `fused.causal_attention` computes this, and does so faster."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    # In float32, and without a gradient, torch's own is as fast.
    if query.device.type != "cpu" or not half or not query.requires_grad:
        return False
    # What it does not know stays with the base's own function.
    known = options.get("position_bias") is None and not options.get("dropout")
    plain = options.get("scaling") is not None and value.shape[-1] == query.shape[-1]
    return known and plain


def _attend(
    inner: Callable[..., Any], additive: bool, module: Any, qkv: tuple[Tensor, ...], **options: Any
) -> Tensor:
    """Return the attention of a packed row, pair by pair, as `inner` computes it."""
    packed: PackedPairs = options.pop("packed_pairs")
    query, key, value = qkv
    window = options.get("sliding_window")
    fused_sdpa = not additive and _takes_fused(query, value, options)
    pieces = []

    def run(q: slice, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        if fused_sdpa and (window is None or window >= k.shape[2]):
            out = causal_attention(query[:, :, q], k, v, scale=options["scaling"])
            pieces.append(out.transpose(1, 2))
            return
        if mask is not None and additive:
            blocked = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, blocked)
        pieces.append(inner(module, query[:, :, q], k, v, mask, **options)[0])

    for start, prompt, chosen, rejected in packed.spans:
        first, middle, last = prompt + chosen, start + prompt + chosen, start + prompt + chosen
        last += rejected
        whole = slice(start, middle)
        plain = not additive and (window is None or window >= first)
        mask = None if plain else packed.mask((0, first), (0, first), window, query)
        run(whole, key[:, :, whole], value[:, :, whole], mask)
        k, v = (
            torch.cat([t[:, :, start : start + prompt], t[:, :, middle:last]], dim=2)
            for t in (key, value)
        )
        end = prompt + rejected
        run(slice(middle, last), k, v, packed.mask((prompt, end), (0, end), window, query))
    return torch.cat(pieces, dim=1)


def _sdpa(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    if "packed_pairs" not in options:
        return sdpa_attention_forward(module, q, k, v, mask, **options)
    return _attend(sdpa_attention_forward, False, module, (q, k, v), **options), None


def _eager(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    # transformers' families each have their own eager function, beside their attention class.
    inner = cast(Any, sys.modules[type(module).__module__]).eager_attention_forward
    if "packed_pairs" not in options:
        return inner(module, q, k, v, mask, **options)
    return _attend(inner, True, module, (q, k, v), **options), None


for _name, _function, _mask in (("sdpa", _sdpa, sdpa_mask), ("eager", _eager, eager_mask)):
    AttentionInterface.register(_PREFIX + _name, _function)
    AttentionMaskInterface.register(_PREFIX + _name, _mask)


def let_pack(base: PreTrainedModel) -> None:
    """Let a base's attention take `packed_pairs`; without them it computes what it did before.

    Bases that run neither transformers' `sdpa` nor its `eager` attention are left as they are.
    """
    name = base.config._attn_implementation
    if name in ("sdpa", "eager"):
        base.set_attn_implementation(_PREFIX + name)
