"""The mathematics of Q-Adapter (METHOD M1–M5; arXiv:2407.03856): tensors in, tensors out.

This is the readable specification; `qadapter.fused` gives the same results without ever holding
`[tokens, vocabulary]`. Symbols: `q` is Q̂ (the residual Q-function), `base_logps` is log π1.

Layout. B pairs give 2B responses: response `j < B` is the chosen one of pair `j`, response `B + j`
its rejected one. N response tokens of all responses lie flat, one after another; `response[i]`
says which response token `i` belongs to. Nothing here sees padding, rows or prompts, so a pair's
loss cannot depend on them (I7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Transitions(NamedTuple):
    """Where each trained action is taken and where it leads, as indices into a `[R, T]` batch.

    A response `c d <end>` after the prompt `a b`, in a row padded to six, gives

        input_ids        a b c d E .      completion_mask  0 0 1 1 1 0
        rows             [0, 0, 0, 0]     columns          [1, 2, 3, 4]      (states after b c d E)
        taken            [0, 1, 2]        following        [1, 2, 3]
        action_rows      [0, 0, 0]        action_columns   [2, 3, 4]        (c d E)
        response         [0, 0, 0]        continues        [True, True, False]

    The shift lives here and only here: the state in which token `t` is chosen is the hidden state
    at position `t - 1`, so the first response token is trained, from the prompt's last state.
    """

    rows: Tensor
    """`[M]` int64, batch row of each state."""
    columns: Tensor
    """`[M]` int64, position of each state."""
    taken: Tensor
    """`[N]` int64, index into the M states: where the action is taken, `s_t`."""
    following: Tensor
    """`[N]` int64, index into the M states: where it leads, `s_{t+1}`."""
    action_rows: Tensor
    """`[N]` int64, batch row of the action's token."""
    action_columns: Tensor
    """`[N]` int64, position of the action's token in its row."""
    response: Tensor
    """`[N]` int64, the response each token belongs to; chosen first, rejected after."""
    continues: Tensor
    """`[N]` bool, False where the action ends the response, so that V̂(s') = 0."""


def transitions(completion_mask: Tensor, terminal: Tensor) -> Transitions:
    """Return the states and actions of every response token (METHOD §1).

    Args:
        completion_mask: `[R, T]` bool, True on response tokens, the end-of-turn token included;
            each row holds one contiguous run that does not start at position 0.
        terminal: `[R]` bool, False for a response cut by a length limit: its last action
            bootstraps from V̂ at the cut.

    Raises:
        ValueError: a response is empty, in pieces, or has no prompt token before it.
    """
    mask = completion_mask.bool()
    if not bool(mask.any(dim=1).all()):
        raise ValueError("every row needs at least one response token")
    if bool(mask[:, 0].any()):
        raise ValueError("every response needs at least one prompt token before it")
    if bool(((mask[:, 1:] & ~mask[:, :-1]).sum(dim=1) != 1).any()):
        raise ValueError("a response must be one contiguous run of tokens")
    # A state at column t serves the action at t + 1 and, where t is itself an action, follows it.
    state_mask = mask.clone()
    state_mask[:, :-1] |= mask[:, 1:]
    rows, columns = state_mask.nonzero(as_tuple=True)
    index = state_mask.flatten().cumsum(0).view_as(state_mask) - 1
    response, action_columns = mask.nonzero(as_tuple=True)
    is_last = torch.ones_like(response, dtype=torch.bool)
    is_last[:-1] = response[1:] != response[:-1]
    return Transitions(
        rows=rows,
        columns=columns,
        taken=index[response, action_columns - 1],
        following=index[response, action_columns],
        action_rows=response,
        action_columns=action_columns,
        response=response,
        continues=~(is_last & terminal.bool()[response]),
    )


def packed_transitions(spans: Tensor, terminal: Tensor) -> Transitions:
    """Return the states and actions of pairs that lie in one row as prompt, chosen, rejected.

    The state after the prompt is there once and serves both responses. A pair with prompt `a b`,
    chosen `c E` and rejected `d e E` gives

        tokens           a b c E d e E
        columns          [1, 2, 3, 4, 5, 6]
        taken            [0, 1, 0, 3, 4]      following        [1, 2, 3, 4, 5]
        action_columns   [2, 3, 4, 5, 6]      response         [0, 0, 1, 1, 1]

    Args:
        spans: `[B, 4]` int64: where each pair starts, and its tokens of prompt, chosen, rejected.
        terminal: `[2B]` bool, chosen first: False for a response cut by a length limit.

    Raises:
        ValueError: a prompt or a response is empty.
    """
    if bool((spans[:, 1:] < 1).any()):
        raise ValueError("every pair needs a prompt, a chosen and a rejected token")
    start, prompt, chosen, rejected = spans.unbind(1)
    before = start + prompt - 1  # the state after the prompt
    first = torch.cat([before + 1, before + 1 + chosen])
    lengths = torch.cat([chosen, rejected])
    response = torch.repeat_interleave(torch.arange(len(lengths), device=spans.device), lengths)
    steps = (
        torch.arange(len(response), device=spans.device) - (lengths.cumsum(0) - lengths)[response]
    )
    columns = first[response] + steps
    # Where the first token is chosen is the prompt's last state, else the token before.
    at = torch.where(steps == 0, before.repeat(2)[response], columns - 1)
    states, where = torch.unique(torch.cat([at, columns]), return_inverse=True)
    taken, following = where.chunk(2)
    last = steps == lengths[response] - 1
    return Transitions(
        rows=torch.zeros_like(states),
        columns=states,
        taken=taken,
        following=following,
        action_rows=torch.zeros_like(columns),
        action_columns=columns,
        response=response,
        continues=~(last & terminal.bool()[response]),
    )


def residual_q(logits: Tensor, base_logits: Tensor, *, alpha_tilde: float) -> Tensor:
    """Return `Q̂ = α̃·(z_θ − z_1)`, the `residual` parameterisation (METHOD §2); zero at the start.

    Args:
        logits: `[..., V]`, logits of base and adapter.
        base_logits: `[..., V]`, logits of the base alone.
        alpha_tilde: temperature of the customised policy, in nats of reward per nat.
    """
    return alpha_tilde * (logits - base_logits)


def raw_q(logits: Tensor) -> Tensor:
    """Return `Q̂ = z_θ`, the `raw` parameterisation of the authors' code (METHOD §2)."""
    return logits


def soft_value(q: Tensor, base_logps: Tensor, *, alpha_0: float, alpha_tilde: float) -> Tensor:
    """Return the soft value V̂(s) in nats of reward (METHOD M1).

    `V̂(s) = α̃ · logsumexp_a[(Q̂(s,a) + α0·log π1(a|s)) / α̃]`; its gradient in Q̂ is the policy.

    Args:
        q: `[..., V]`, Q̂(s, ·).
        base_logps: `[..., V]`, log π1(·|s), normalised.

    Returns:
        `[...]`, in the dtype of `q`.
    """
    return alpha_tilde * torch.logsumexp((q + alpha_0 * base_logps) / alpha_tilde, dim=-1)


def policy_logps(q: Tensor, base_logps: Tensor, *, alpha_0: float, alpha_tilde: float) -> Tensor:
    """Return log π̃(·|s) (METHOD M2): `log softmax_a[(Q̂ + α0·log π1) / α̃]`, shape `[..., V]`."""
    return torch.log_softmax((q + alpha_0 * base_logps) / alpha_tilde, dim=-1)


def mixing_weights(
    strengths: Sequence[float | Tensor],
    *,
    alpha_0: float,
    alpha_tilde: float,
    parameterization: str,
) -> list[float | Tensor]:
    """Return the weight of each adapter's hidden state in the policy's and, last, of the base's.

    One head on the mix gives the policy's logits, up to a constant per state (METHOD M2):
    `Σ s_k·h_k + (α0/α̃ − Σ s_k)·h_1` for residual, `(Σ s_k·h_k + α0·h_1)/α̃` for raw. The sum of
    the residuals of several adapters is an approximation (METHOD §5).

    Args:
        strengths: s of each adapter; a number, or one a row, shaped to multiply hidden states.
    """
    scale = alpha_0 / alpha_tilde
    if parameterization == "residual":
        return [*strengths, scale - sum(strengths)]
    return [*(s / alpha_tilde for s in strengths), scale]


def mix(states: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """Return `Σ w·h` over hidden states `[..., D]`, in their dtype.

    Summed in float32 or wider, so that at strength 1 (α0 = α̃) the base's part is exactly zero, and
    at 0 the adapter's.
    """
    wide = torch.promote_types(states[0].dtype, torch.float32)
    mixed = weights[0] * states[0].to(wide)
    for weight, state in zip(weights[1:], states[1:], strict=True):
        mixed = mixed + weight * state.to(wide)
    return mixed.to(states[0].dtype)


def token_rewards(
    q_taken: Tensor, next_values: Tensor, continues: Tensor, *, gamma: float
) -> Tensor:
    """Return `r2(s_t, a_t) = Q̂(s_t, a_t) − γ·V̂(s_{t+1})` for each response token (METHOD M4).

    Args:
        q_taken: `[N]`, Q̂(s_t, a_t).
        next_values: `[N]`, V̂(s_{t+1}); ignored where the response has ended.
        continues: `[N]` bool, False where the action is terminal and V̂(s_{t+1}) = 0.
        gamma: discount in (0, 1].
    """
    return q_taken - gamma * torch.where(continues, next_values, torch.zeros_like(next_values))


def returns(rewards: Tensor, response: Tensor, n_responses: int) -> Tensor:
    """Return the undiscounted sum of rewards of each response, `R` of METHOD M5, shape `[2B]`."""
    return rewards.new_zeros(n_responses).index_add(0, response, rewards)


def discounted_returns(
    rewards: Tensor, response: Tensor, n_responses: int, *, gamma: float
) -> Tensor:
    """Return `Σ_t γ^t r2(s_t, a_t)` of each response, the alternative to M5's plain sum, `[2B]`.

    Tokens of one response must be in order; `t` counts from 0 at its first token.
    """
    lengths = torch.bincount(response, minlength=n_responses)
    starts = lengths.cumsum(0) - lengths
    steps = torch.arange(len(response), device=response.device) - starts[response]
    return returns(rewards * gamma ** steps.to(rewards.dtype), response, n_responses)


class LossSums(NamedTuple):
    """Sums and counts of METHOD M5, so that batches add exactly and nothing is a mean of means."""

    bt_sum: Tensor
    """Scalar: Σ over pairs of −log σ(R_w − R_l), in nats."""
    n_pairs: Tensor
    """Scalar int64."""
    r2_sq_sum: Tensor
    """Scalar: Σ over response tokens of r2²."""
    n_tokens: Tensor
    """Scalar int64."""

    def loss(self, *, beta: float) -> Tensor:
        """Return `bt_sum / n_pairs + β · r2_sq_sum / n_tokens` (METHOD M5)."""
        return self.bt_sum / self.n_pairs + beta * self.r2_sq_sum / self.n_tokens


def preference_sums(returns: Tensor, rewards: Tensor) -> LossSums:
    """Return the sums of the Bradley–Terry and regularisation terms (METHOD M5).

    Args:
        returns: `[2B]`, R of each response, chosen first, rejected after.
        rewards: `[N]`, r2 of every response token.

    Raises:
        ValueError: the number of responses is odd.
    """
    if returns.shape[0] % 2:
        raise ValueError("returns must hold B chosen and B rejected responses")
    chosen, rejected = returns.chunk(2)
    # softplus(−m) = −log σ(m), without overflow.
    bt = torch.nn.functional.softplus(rejected - chosen)
    return LossSums(
        bt_sum=bt.sum(),
        n_pairs=torch.tensor(chosen.shape[0], device=returns.device),
        r2_sq_sum=rewards.square().sum(),
        n_tokens=torch.tensor(rewards.shape[0], device=returns.device),
    )


def authors_transitions(completion_mask: Tensor) -> Transitions:
    """Return the states and actions that the authors' released code trains (METHOD §4, 1 and 2).

    Their response mask is not shifted: the mask at position `t` selects the action at `t + 1`, so
    the first response token is never trained and the token after the end (padding, often) is; and
    the value is taken at the same state, not the next. For comparison only.
    """
    mask = completion_mask.bool()[:, :-1]
    rows, columns = mask.nonzero(as_tuple=True)
    index = torch.arange(len(rows), device=rows.device)
    return Transitions(
        rows=rows,
        columns=columns,
        taken=index,
        following=index,
        action_rows=rows,
        action_columns=columns + 1,
        response=rows,
        continues=torch.ones_like(rows, dtype=torch.bool),
    )


def authors_returns(
    rewards: Tensor, response: Tensor, n_responses: int, *, padded_length: int
) -> Tensor:
    """Return each response's reward sum over the padded length, as the authors do (METHOD §4.3).

    Args:
        padded_length: T of the batch; their arrays hold T − 1 transitions.
    """
    return returns(rewards, response, n_responses) / (padded_length - 1)
