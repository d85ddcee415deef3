"""From hidden states to what the method needs: logits, KL, Q̂ and V̂ (METHOD M1, M2, §2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from qadapter import functional, fused
from qadapter.config import QConfig
from qadapter.model.streams import BaseScalars, QAndV, Streams
from qadapter.strength import each

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _wide(x: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 where it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _placed(values: Tensor, where: Tensor) -> Tensor:
    """Return `[N]` zeros with `values` where the mask `[N]` is True."""
    return values.new_zeros(len(where)).masked_scatter(where, values)


def _each(strength: float | Sequence[float] | Tensor, streams: Streams) -> list[float | Tensor]:
    """Return s of each branch: a number, or one a row, shaped to multiply its states.

    Raises:
        ValueError: a tensor with one number a row of text does not say whose they are.
    """
    n = len(streams.branches)
    if isinstance(strength, Tensor):
        by_branch = strength if strength.dim() == 2 else strength[:, None]
        if by_branch.shape[1] != n:
            raise ValueError(f"strength: {by_branch.shape[1]} a row, for {n} adapters")
        shape = (-1,) + (1,) * (streams.adapted.dim() - 1)
        by_branch = by_branch.to(streams.adapted.device, torch.float32)
        return [column.reshape(shape) for column in by_branch.unbind(1)]
    return list(each(strength, [str(i) for i in range(1, n + 1)]))


class _Known(nn.Module):
    """Stands in a base for its decoder, whose final hidden states are known already."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self._states = states

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=cast(Any, self._states))


def _with_states(module: nn.Module, path: Sequence[str], states: Tensor) -> nn.Module:
    """Return a module that has these final states in the place of the decoder at `path`."""
    name, *rest = path
    inner = module._modules[name]
    shell = copy.copy(module)
    known = _with_states(cast(nn.Module, inner), rest, states) if rest else _Known(states)
    shell._modules = {**module._modules, name: known}
    return shell


class Heads:
    """The part of a `QAdapterModel` after its layers: `Streams` in, figures of the method out."""

    if TYPE_CHECKING:
        q_config: QConfig
        adapter_off: Callable[[], AbstractContextManager[None]]
        _base: PreTrainedModel
        _path: list[str]
        _softcap: float | None
        _scaled_head: bool
        _plain_head: bool

    @property
    def scalars_suffice(self) -> bool:
        """Whether the loss needs of the base only `BaseScalars` (METHOD §2)."""
        q = self.q_config
        plain = q.parameterization == "residual" and q.alpha_0 == q.alpha_tilde
        return plain and self.head_weight is not None

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of final hidden states `[..., D]`, soft-capped where the base does."""
        # accelerate hands autocast outputs back in float32; the head wants its own dtype.
        hidden = hidden.to(cast(Tensor, self._base.get_output_embeddings().weight).dtype)
        if self._scaled_head:
            # Whatever the base does beyond its linear map, it does itself.
            row = hidden.reshape(1, -1, hidden.shape[-1])
            ids = torch.zeros(row.shape[:2], dtype=torch.int64, device=row.device)
            out = _with_states(self._base, self._path, row)(input_ids=ids, use_cache=False)
            return cast(Tensor, out.logits.view(*hidden.shape[:-1], out.logits.shape[-1]))
        logits = cast(Tensor, self._base.get_output_embeddings()(hidden))
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    @property
    def head_weight(self) -> Tensor | None:
        """`[V, D]` where the head is a plain linear map, so one head serves a mix; else None."""
        return cast(Tensor, self._base.get_output_embeddings().weight) if self._plain_head else None

    def _has_plain_head(self) -> bool:
        """Return whether the head is; asked once, for engines change the class of modules."""
        head = self._base.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None
        return plain and not (self._softcap or self._scaled_head)

    def mix(self, streams: Streams, strength: float | Sequence[float] | Tensor) -> Tensor:
        """Return the hidden state whose logits are the policy's, up to a constant per position.

        `s·h_θ + (α0/α̃ − s)·h_1` for residual, `(s·h_θ + α0·h_1)/α̃` for raw (METHOD M2); sums over
        the adapters where there are several (see `functional.mixing_weights`).

        Args:
            strength: s, one number; or one for each adapter; or a tensor, `[B]` with one a row, or
                `[B, A]` with one for each row and adapter.
        """
        q = self.q_config
        weights = functional.mixing_weights(
            _each(strength, streams),
            alpha_0=q.alpha_0,
            alpha_tilde=q.alpha_tilde,
            parameterization=q.parameterization,
        )
        if streams.base_states is None and weights == [1.0, 0.0]:
            return streams.adapted
        return functional.mix([*streams.branches, streams.base], weights)

    def policy_logits(
        self, streams: Streams, strength: float | Sequence[float] | Tensor = 1.0
    ) -> Tensor:
        """Return logits of π_s for final hidden states `[B, T, D]` (or `[M, D]`): `[B, T, V]`.

        `strength` as in `mix`.
        """
        if self.head_weight is not None:
            return self.head(self.mix(streams, strength))
        with self.adapter_off():
            base_logits = self.head(streams.base)
        # A head for each: the same mix, of logits.
        logits = Streams(self.head(streams.adapted), base_logits)
        return self.mix(logits._replace(more=tuple(map(self.head, streams.more))), strength)

    def kl_from_base(self, streams: Streams, strength: float | Sequence[float] = 1.0) -> Tensor:
        """Return KL(π1 ‖ π_s) in nats at M states `[M, D]`; gradients flow to the policy."""
        weight = self.head_weight
        if weight is not None:
            # Not in the head's dtype yet: a mix of close states would lose what tells them apart.
            wide = streams.map(_wide)
            return fused.linear_kl(wide.base, self.mix(wide, strength), weight)
        with torch.no_grad(), self.adapter_off():
            logp = _wide(self.head(streams.base)).log_softmax(-1)
        logq = _wide(self.policy_logits(streams, strength)).log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1)

    def q_and_v(
        self,
        streams: Streams,
        actions: Tensor,
        taken: Tensor,
        following: Tensor,
        continues: Tensor,
        *,
        base: BaseScalars | None = None,
        strength: float | Sequence[float] = 1.0,
    ) -> QAndV:
        """Return s·Q̂(s_t, a_t) and V̂(s_{t+1}) of N response tokens from M states (METHOD M1, §2).

        V̂ is 0 where a response has ended; it is computed nowhere else but where it is used. Of
        several adapters it is Σ s_k·Q̂_k (METHOD §5), in units of the first one's α̃.

        Args:
            streams: final hidden states `[M, D]` of both branches.
            actions: `[N]` int64 token ids.
            taken: `[N]` indices of the states in which the actions are taken.
            following: `[N]` indices of the states they lead to.
            continues: `[N]` bool, False where the action ends its response.
            base: the base's scalars, where they are known (see `scalars_suffice`).
        """
        weight = self.head_weight
        if weight is None:
            return self._q_and_v_two_heads(streams, actions, taken, following, continues, strength)
        q = self.q_config
        streams = streams.to(weight.dtype)  # as in `head`
        # At least float32 from here on: rewards are differences of close numbers.
        rows = _wide(weight[actions])
        z_thetas = [(_wide(states[taken]) * rows).sum(-1) for states in streams.branches]
        later = streams.at(following[continues])
        lse_mix = fused.linear_logsumexp(self.mix(later, strength), weight)
        if base is None:
            with torch.no_grad():
                z_base = (_wide(streams.base[taken]) * rows).sum(-1)
                lse_base = fused.linear_logsumexp(later.base, weight)
            base = BaseScalars(z_base, _placed(lse_base, continues))
        scale = q.alpha_0 / q.alpha_tilde
        value = q.alpha_tilde * (lse_mix - scale * base.following[continues])
        values = [
            q.alpha_tilde * (z - base.taken) if q.parameterization == "residual" else z
            for z in z_thetas
        ]
        q_taken = functional.mix(values, _each(strength, streams))
        return QAndV(q_taken, _placed(value, continues), base)

    def _q_and_v_two_heads(
        self,
        streams: Streams,
        actions: Tensor,
        taken: Tensor,
        following: Tensor,
        continues: Tensor,
        strength: float | Sequence[float],
    ) -> QAndV:
        q = self.q_config
        logits = [_wide(self.head(states)) for states in streams.branches]
        with torch.no_grad(), self.adapter_off():
            base_logits = _wide(self.head(streams.base))
        by_branch = [
            functional.residual_q(z, base_logits, alpha_tilde=q.alpha_tilde)
            if q.parameterization == "residual"
            else functional.raw_q(z)
            for z in logits
        ]
        values = functional.mix(by_branch, _each(strength, streams))
        soft = functional.soft_value(
            values,
            base_logits.log_softmax(-1),
            alpha_0=q.alpha_0,
            alpha_tilde=q.alpha_tilde,
        )
        return QAndV(values[taken, actions], _placed(soft[following[continues]], continues))
