"""From hidden states of a batch of pairs to its loss: functional and fused, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qadapter import functional
from qadapter.config import QConfig
from qadapter.functional import LossSums, Transitions
from qadapter.model import QAdapterModel, Streams


@dataclass(frozen=True)
class PairLoss:
    """One batch's loss as sums, and each response's return."""

    sums: LossSums
    returns: Tensor
    """`[2B]` float32, R of each response, chosen first (METHOD M5)."""
    rewards: Tensor
    """`[N]` float32, r2 of each response token (METHOD M4)."""
    response: Tensor
    """`[N]` int64, the row each token belongs to."""


def batch_transitions(q_config: QConfig, batch: Mapping[str, Tensor]) -> Transitions:
    """Return the states and actions that the objective trains in a `PairBatch`."""
    if q_config.objective == "authors":
        return functional.authors_transitions(batch["completion_mask"])
    return functional.transitions(batch["completion_mask"], batch["terminal"])


def response_states(streams: Streams, completion_mask: Tensor) -> Streams:
    """Return the `[N, D]` states in which response tokens are chosen: one to the left of them."""
    return streams.at(completion_mask.roll(-1, dims=1))


def pair_loss(
    model: QAdapterModel, streams: Streams, batch: Mapping[str, Tensor], *, strength: float = 1.0
) -> PairLoss:
    """Return the loss of a `PairBatch` from its hidden states `[2B, T, D]` (METHOD M5).

    At a strength other than 1, Q̂ is scaled by it (METHOD §5). The objective, γ and the
    parameterisation are the model's `q_config`.
    """
    q = model.q_config
    ids = batch["input_ids"]
    moves = batch_transitions(q, batch)
    states = streams.at((moves.rows, moves.columns))
    actions = ids[moves.response, moves.action_columns]
    values = model.q_and_v(states, actions, moves.taken, moves.following, strength=strength)
    rewards = functional.token_rewards(
        values.taken, values.following, moves.continues, gamma=q.gamma
    )
    n = ids.shape[0]
    if q.objective == "authors":
        returns = functional.authors_returns(rewards, moves.response, n, padded_length=ids.shape[1])
    elif q.returns == "discounted":
        returns = functional.discounted_returns(rewards, moves.response, n, gamma=q.gamma)
    else:
        returns = functional.returns(rewards, moves.response, n)
    sums = functional.preference_sums(returns, rewards)
    return PairLoss(sums, returns, rewards, moves.response)
