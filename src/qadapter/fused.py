"""The costly parts of `qadapter.functional`, from hidden states, with gradients in closed form.

Both functions walk over tiles of states and words and never hold `[states, vocabulary]`. The head
is a frozen linear map without bias; anything else (soft-capped or adapted heads) takes the path
through `qadapter.functional`. Products run in the dtype of the inputs, reductions in float32 (or
float64, as the inputs).

    linear_logsumexp ── _LinearLogsumexp      logsumexp of W·h, for V̂ (METHOD M1)
    linear_kl        ── _LinearKL             KL between two softmaxes of W·h, for anchors (§6)
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

    def take(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return a tile's `exp(logits − peak)`, in place, and what older sums shrink by."""
        peak = torch.maximum(self.peak, logits.amax(-1))
        shrink = (self.peak - peak).exp()
        weights = logits.sub_(peak[:, None]).exp_()
        self.total.mul_(shrink).add_(weights.sum(-1))
        self.peak = peak
        return weights, shrink

    def logsumexp(self) -> Tensor:
        return self.peak + self.total.log()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
            mean = torch.zeros(h.shape, dtype=wide, device=h.device)
            for column in columns:
                w = weight[column]
                weights, shrink = running.take((h @ w.T).to(wide))
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
        `[M]`, float32 (float64 for float64 inputs), in nats.

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
            hp, hq = base[row], policy[row]
            p, q = (_Running(len(hp), wide, hp.device) for _ in range(2))
            gap = torch.zeros(len(hp), dtype=wide, device=hp.device)
            mean_p, mean_q = (torch.zeros(hp.shape, dtype=wide, device=hp.device) for _ in range(2))
            for column in columns:
                w = weight[column]
                zp, zq = (hp @ w.T).to(wide), (hq @ w.T).to(wide)
                difference = zp - zq
                weights, shrink = p.take(zp)
                # Σ_a p_a (z_p − z_q)_a, the part of the KL that the two logsumexps leave.
                gap.mul_(shrink).add_((weights * difference).sum(-1))
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
        q_hidden: `[M, D]`, same dtype.
        weight: `[V, D]`, the frozen head.

    Returns:
        `[M]`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: the head or `p_hidden` asks for a gradient.
    """
    _check(weight)
    if p_hidden.requires_grad:
        raise ValueError("linear_kl differentiates its second argument only; detach the first")
    return cast(Tensor, _LinearKL.apply(p_hidden, q_hidden, weight))
