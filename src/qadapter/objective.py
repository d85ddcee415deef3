"""From hidden states of a batch of pairs to its loss: functional and fused, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from qadapter import functional
from qadapter.config import QConfig
from qadapter.functional import LossSums, Transitions
from qadapter.model import BaseScalars, QAdapterModel, Streams
from qadapter.strength import Strength


@dataclass(frozen=True)
class PairLoss:
    """One batch's loss as sums, and each response's return."""

    sums: LossSums
    returns: Tensor
    """`[2B]` float32, R of each response, chosen first (METHOD M5)."""
    rewards: Tensor
    """`[N]` float32, r2 of each response token (METHOD M4)."""
    response: Tensor
    """`[N]` int64, the response each token belongs to."""
    states: Streams
    """`[M, D]`, the states that the batch's transitions name."""
    taken: Tensor
    """`[N]` int64, index of the state in which each response token is chosen."""
    base: BaseScalars | None
    """The base's part of the rewards, where two scalars a token are all of it."""
    columns: Tensor
    """`[N]` int64, where in its row each response token stands."""


def batch_transitions(q_config: QConfig, batch: Mapping[str, Tensor]) -> Transitions:
    """Return the states and actions that the objective trains in a packed or padded batch."""
    if "spans" in batch:
        return functional.packed_transitions(batch["spans"], batch["terminal"])
    if q_config.objective == "authors":
        return functional.authors_transitions(batch["completion_mask"])
    return functional.transitions(batch["completion_mask"], batch["terminal"])


def packable(model: QAdapterModel) -> bool:
    """Return whether pairs may be packed: the base can, and the objective knows no padding."""
    return model.q_config.objective != "authors" and model.packs


def batch_streams(model: Callable[..., Streams], batch: Mapping[str, Tensor]) -> Streams:
    """Return the hidden states `[R, T, D]` of a batch of pairs; `model` may be a wrapped one."""
    names = ("input_ids", "attention_mask", "position_ids", "spans", "trunk")
    streams = model(**{n: batch[n] for n in names if n in batch}, output_streams=True)
    return streams._replace(base_states=batch["base_states"]) if "base_states" in batch else streams


def pair_loss(
    model: QAdapterModel, streams: Streams, batch: Mapping[str, Tensor], *, strength: Strength = 1.0
) -> PairLoss:
    """Return the loss of a batch of pairs from its hidden states `[R, T, D]` (METHOD M5).

    At a strength other than 1, Q̂ is scaled by it, and of several adapters summed (METHOD §5). The
    objective, γ and the parameterisation are the model's `q_config`.

    Args:
        batch: a `PackedBatch`, or a `PairBatch` (which the `authors` objective needs). A packed one
            may carry what is known of the base: `trunk` and `base_states`, `[1, T, D]` each, or
            `base_scalars`, `[T, 2]` float32, `BaseScalars` at the response tokens' columns.
    """
    q = model.q_config
    ids = batch["input_ids"]
    moves = batch_transitions(q, batch)
    states = streams.at((moves.rows, moves.columns))
    known = None
    if "base_scalars" in batch:
        known = BaseScalars(*batch["base_scalars"][moves.action_columns].unbind(1))
    values = model.q_and_v(
        states,
        ids[moves.action_rows, moves.action_columns],
        moves.taken,
        moves.following,
        moves.continues,
        base=known,
        strength=strength,
    )
    rewards = functional.token_rewards(
        values.taken, values.following, moves.continues, gamma=q.gamma
    )
    n = len(batch["terminal"])
    if q.objective == "authors":
        returns = functional.authors_returns(rewards, moves.response, n, padded_length=ids.shape[1])
    elif q.returns == "discounted":
        returns = functional.discounted_returns(rewards, moves.response, n, gamma=q.gamma)
    else:
        returns = functional.returns(rewards, moves.response, n)
    sums = functional.preference_sums(returns, rewards)
    return PairLoss(
        sums,
        returns,
        rewards,
        moves.response,
        states,
        moves.taken,
        values.base,
        moves.action_columns,
    )
