"""The costly parts of a step, with gradients in closed form.

    linear_logsumexp ── _LinearLogsumexp      logsumexp of W·h, for V̂ (METHOD M1)
    linear_kl        ── _LinearKL             KL between two softmaxes of W·h, for anchors (§6)
    causal_attention ── _CausalAttention      attention on a CPU, whose own backward pass is slow
    lora_linear      ── _LoraLinear           a frozen linear map and its adapter

The first two are those of `qadapter.functional` from hidden states: they walk over tiles of states
and words and never hold `[states, vocabulary]`. The head is a frozen linear map without bias;
anything else (soft-capped or adapted heads) takes the path through `qadapter.functional`. Products
run in the dtype of the inputs, reductions in float32 (or float64, as the inputs).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_TILE = (512, 1024)
"""States and words of one tile of logits: two MiB in float32 stay in a core's cache."""
_ACCELERATOR_TILE = (4096, 16384)
"""Large enough to fill an accelerator, small beside its memory."""


def _slices(hidden: Tensor, weight: Tensor) -> tuple[list[slice], list[slice]]:
    """Return the tiles' runs of states and of words."""
    states, words = _CPU_TILE if hidden.device.type == "cpu" else _ACCELERATOR_TILE
    return (
        [slice(i, i + states) for i in range(0, hidden.shape[0], states)],
        [slice(i, i + words) for i in range(0, weight.shape[0], words)],
    )


class _Running:
    """Softmax over tiles of logits that come one after another (online softmax, arXiv:1805.02867).

    After all tiles `peak + log(total)` is the logsumexp, and `sums / total` is any expectation
    whose terms were added tile by tile with `add`.
    """

    def __init__(self, states: int, dtype: torch.dtype, device: torch.device) -> None:
        self.peak = torch.full((states,), -torch.inf, dtype=dtype, device=device)
        self.total = torch.zeros(states, dtype=dtype, device=device)

    def take(self, logits: Tensor, near: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Return a tile's `exp(logits − peak)`, in place, and what older sums shrink by.

        Args:
            near: what was taken off the logits of each state.
        """
        peak = torch.maximum(self.peak, logits.amax(-1) + near)
        shrink = (self.peak - peak).exp()
        weights = logits.sub_((peak - near)[:, None]).exp_()
        self.total.mul_(shrink).add_(weights.sum(-1))
        self.peak = peak
        return weights, shrink

    def logsumexp(self) -> Tensor:
        return self.peak + self.total.log()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_FIRST_WORDS = 1024
"""Words that are looked at first in half precision, for a logit near the largest."""


def _logits(h: Tensor, w: Tensor, peak: Tensor) -> tuple[Tensor, Tensor | float]:
    """Return a tile's logits less what is near the largest so far, and that, as wide as `peak`.

    A product in half precision ends in a rounding, in bfloat16 of a logit of 20 by up to 0.06. As
    a distance from the largest it loses least where its weight is most.
    """
    if h.itemsize >= 4:
        return h @ w.T, 0.0
    near = peak.to(h.dtype)
    return torch.addmm(-near[:, None], h, w.T).to(peak.dtype), near.to(peak.dtype)


def _check(weight: Tensor) -> None:
    if weight.requires_grad:
        raise ValueError("the fused path needs a frozen head; use qadapter.functional instead")


class _LinearLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        wide = _accumulator(hidden.dtype)
        out = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_grad else None
        rows, columns = _slices(hidden, weight)
        for row in rows:
            h = hidden[row]
            running = _Running(len(h), wide, h.device)
            if h.itemsize < 4:
                running.peak = (h @ weight[:_FIRST_WORDS].T).amax(-1).to(wide)
            mean = torch.zeros(h.shape, dtype=wide, device=h.device)
            for column in columns:
                w = weight[column]
                weights, shrink = running.take(*_logits(h, w, running.peak))
                if needs_grad:
                    # d logsumexp(W·h)/dh = Σ_a softmax_a · W_a: made now, while the tile is here.
                    mean.mul_(shrink[:, None]).add_(weights.to(w.dtype) @ w)
            out[row] = running.logsumexp()
            if grad is not None:
                grad[row] = mean.div_(running.total[:, None])
        if grad is not None:
            ctx.save_for_backward(grad)
        return out

    @staticmethod
    @once_differentiable  # a second derivative would silently miss the softmax's own
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * grad).to(grad.dtype), None


def linear_logsumexp(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return `logsumexp_a (W·h)_a` of each state without holding the logits.

    Args:
        hidden: `[M, D]`, final hidden states; gradients flow to them.
        weight: `[V, D]`, the frozen head, same dtype.

    Returns:
        `[M]`, float32 (float64 for float64 inputs), in nats. In bfloat16 products are rounded once,
        and SmolLM2's values are off by 0.003 (root mean square; 0.03 at most).

    Raises:
        ValueError: the head asks for a gradient.
    """
    _check(weight)
    return cast(Tensor, _LinearLogsumexp.apply(hidden, weight))


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, policy: Tensor, weight: Tensor) -> Tensor:
        wide = _accumulator(policy.dtype)
        out = torch.empty(policy.shape[0], dtype=wide, device=policy.device)
        needs_grad = ctx.needs_input_grad[1]
        grad = torch.empty_like(policy) if needs_grad else None
        rows, columns = _slices(policy, weight)
        for row in rows:
            # z_q − z_p as the product of a small difference keeps its digits in half precision,
            # where the difference of two products is mostly their rounding.
            apart = (policy[row].to(wide) - base[row].to(wide)).to(weight.dtype)
            hp = base[row].to(weight.dtype)
            p, q = (_Running(len(hp), wide, hp.device) for _ in range(2))
            gap = torch.zeros(len(hp), dtype=wide, device=hp.device)
            mean_p, mean_q = (torch.zeros(hp.shape, dtype=wide, device=hp.device) for _ in range(2))
            for column in columns:
                w = weight[column]
                zp, change = (hp @ w.T).to(wide), (apart @ w.T).to(wide)
                zq = zp + change
                weights, shrink = p.take(zp)
                # Σ_a p_a (z_p − z_q)_a, the part of the KL that the two logsumexps leave.
                gap.mul_(shrink).sub_((weights * change).sum(-1))
                if needs_grad:
                    mean_p.mul_(shrink[:, None]).add_(weights.to(w.dtype) @ w)
                weights, shrink = q.take(zq)
                if needs_grad:
                    mean_q.mul_(shrink[:, None]).add_(weights.to(w.dtype) @ w)
            out[row] = gap / p.total + q.logsumexp() - p.logsumexp()
            if grad is not None:
                grad[row] = mean_q / q.total[:, None] - mean_p / p.total[:, None]
        if grad is not None:
            ctx.save_for_backward(grad)
        return out

    @staticmethod
    @once_differentiable  # a second derivative would silently miss the softmax's own
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = ctx.saved_tensors
        return None, (grad_outputs[0][:, None] * grad).to(grad.dtype), None


def linear_kl(p_hidden: Tensor, q_hidden: Tensor, weight: Tensor) -> Tensor:
    """Return `KL(softmax(W·h_p) ‖ softmax(W·h_q))` of each state, in nats.

    The gradient flows to `q_hidden` only, as `W·(π_q − π_p)`: with the base as p and the policy as
    q this is the anchor of METHOD §6.

    Args:
        p_hidden: `[M, D]`, no gradient.
        q_hidden: `[M, D]`, same dtype, which may be wider than the head's.
        weight: `[V, D]`, the frozen head, in whose dtype products run.

    Returns:
        `[M]`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: the head or `p_hidden` asks for a gradient.
    """
    _check(weight)
    if p_hidden.requires_grad:
        raise ValueError("linear_kl differentiates its second argument only; detach the first")
    return cast(Tensor, _LinearKL.apply(p_hidden, q_hidden, weight))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = down.to(x.dtype), (up * scaling).to(x.dtype)
        inner = rows @ a.T
        # Not a view of anything, so that what comes after may change it in place.
        out = x.new_empty(*x.shape[:-1], len(weight))
        flat = out.view(-1, len(weight))
        if bias is None:
            torch.mm(rows, weight.T, out=flat)
        else:
            torch.addmm(bias, rows, weight.T, out=flat)
        torch.addmm(flat, inner, b.T, out=flat)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scaling, ctx.dtypes = scaling, (down.dtype, up.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        shape = grad_outputs[0].shape
        grad = grad_outputs[0].reshape(-1, shape[-1])
        grad_inner = grad @ b
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            torch.addmm(grad_x, grad_inner, a, out=grad_x)
            grad_x = grad_x.view(*shape[:-1], weight.shape[1])
        grad_down = (grad_inner.T @ rows).to(ctx.dtypes[0])
        grad_up = (grad.T @ inner).to(ctx.dtypes[1]) * ctx.scaling
        return grad_x, None, None, grad_down, grad_up, None


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, *, scaling: float
) -> Tensor:
    """Return `W·x + bias + s·B·A·x`, a frozen linear map and its adapter (arXiv:2106.09685).

    Products run in the dtype of `x`, whatever the adapter's; the adapter's part is added inside a
    product, so no pass over the outputs is left.

    Args:
        x: `[..., I]`.
        weight: `[O, I]`, W, frozen, in the dtype of `x`.
        bias: `[O]` or None, frozen.
        down: `[r, I]`, A, in any dtype.
        up: `[O, r]`, B, in any dtype.
        scaling: s.

    Returns:
        `[..., O]`, in the dtype of `x`; gradients flow to `x`, A and B.

    Raises:
        ValueError: the weight or bias asks for a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("lora_linear takes a frozen weight and bias; freeze the base model")
    return cast(Tensor, _LoraLinear.apply(x, weight, bias, down, up, scaling))


_BLOCK = 128
"""Queries and keys of one block of attention: all products have one of a few shapes, for each of
which the CPU's library makes a kernel of its own, and a few heads' scores stay in cache."""


def _whole_blocks(x: Tensor) -> Tensor:
    """Return `[..., T, d]` with zeros after the last, up to a whole number of blocks."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % _BLOCK))


def _parts(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of `dtype` that together are `x`, up to the rounding of float32."""
    parts = []
    for _ in range(3 if dtype in (torch.float16, torch.bfloat16) else 1):
        parts.append(x.to(dtype))
        x = x - parts[-1]
    return parts


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        groups, lead = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
        mask = None
        if lead:
            shape = query.shape[2], key.shape[2]
            mask = torch.full(shape, -torch.inf, dtype=query.dtype).triu_(lead + 1)
        k, v = (t.repeat_interleave(groups, 1) for t in (key, value))
        # What scaled_dot_product_attention runs here; itself it does not return the logsumexp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, k, v, 0.0, lead == 0, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(query, key, value, lse)
        ctx.scale = scale
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, lse = ctx.saved_tensors
        _, heads, queries, width = query.shape
        _, kv_heads, keys, _ = key.shape
        split = (kv_heads, heads // kv_heads, queries, -1)
        # q·k − logsumexp as one product: near its largest, where rounding would hurt, it is near 0.
        wide = _accumulator(query.dtype)
        parts = _parts(lse.reshape(split).to(wide) / -ctx.scale, query.dtype)
        q = _whole_blocks(torch.cat([query.reshape(split), *parts], dim=-1))
        k = _whole_blocks(torch.cat([key[0], key.new_ones(kv_heads, keys, len(parts))], dim=-1))
        v = _whole_blocks(value[0])
        # A query beyond the last has no gradient, a key beyond the last no weight: both count not.
        grad = _whole_blocks(grad_outputs[0].reshape(split))
        grad_q = torch.empty_like(grad)
        grad_k, grad_v = (torch.zeros(v.shape, dtype=wide) for _ in range(2))
        lead = keys - queries
        rows = (kv_heads, split[1] * _BLOCK, -1)
        # One allocation for all blocks: fresh memory costs more than the products that fill it.
        room = q.new_empty(2, kv_heads * split[1] * _BLOCK * k.shape[1])
        for start in range(0, queries, _BLOCK):
            seen = min(-(-(lead + start + _BLOCK) // _BLOCK) * _BLOCK, k.shape[1])
            block = slice(start, start + _BLOCK)
            q_block, grad_block = (t[:, :, block].reshape(rows) for t in (q, grad))
            p, grad_p = (r[: heads * _BLOCK * seen].view(*rows[:2], seen) for r in room)
            keys_seen = k[:, :seen].transpose(1, 2)
            torch.baddbmm(p, q_block, keys_seen, beta=0, alpha=ctx.scale, out=p).exp_()
            p.view(heads, _BLOCK, seen).tril_(lead + start)
            grad_v[:, :seen] += torch.bmm(p.transpose(1, 2), grad_block)
            torch.bmm(grad_block, v[:, :seen].transpose(1, 2), out=grad_p)
            grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype, grad_input=grad_p)
            out = torch.bmm(grad_s, k[:, :seen, :width])
            grad_q[:, :, block] = out.view(kv_heads, split[1], _BLOCK, width)
            grad_k[:, :seen] += torch.bmm(grad_s.transpose(1, 2), q_block[..., :width])
        return (
            grad_q[:, :, :queries].reshape(query.shape).mul_(ctx.scale),
            grad_k.mul_(ctx.scale)[None, :, :keys].to(key.dtype),
            grad_v[None, :, :keys].to(key.dtype),
            None,
        )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Return attention of the last queries of one causal sequence, on a CPU.

    `scaled_dot_product_attention` in value and gradient. Its own backward pass multiplies small
    blocks without the matrix unit; this one leaves the products to GEMMs, a block of queries at a
    time, and remakes the weights from the forward pass's logsumexp (arXiv:2205.14135).

    Args:
        query: `[1, H, Q, d]`; query i sees the keys up to the position `S − Q + i`.
        key: `[1, G, S, d]`, where G divides H: each key serves H / G neighbouring heads.
        value: `[1, G, S, d]`.
        scale: of the products.

    Returns:
        `[1, H, Q, d]`, in the inputs' dtype.
    """
    return cast(Tensor, _CausalAttention.apply(query, key, value, scale))
