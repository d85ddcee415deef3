"""What a run logs of its pairs, kept by pair, so that means over several processes are exact."""

from __future__ import annotations

import math
from itertools import chain, zip_longest

import torch
from torch import Tensor

from qadapter.objective import PairLoss


class Figures:
    """The pairs seen since the last log.

    One row a pair: its two returns, the sum of its squared token rewards, its response tokens, and
    the sum over them of KL(π1 ‖ π̃), in nats.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._anchors: list[tuple[float, int]] = []

    def add(self, out: PairLoss, kl: Tensor | None = None) -> None:
        """Keep a batch's pairs; `kl` is `[N]`, nats of each response token."""
        chosen, rejected = out.returns.detach().chunk(2)
        pairs = out.response % len(chosen)  # chosen first, then the rejected in the same order

        def summed(values: Tensor) -> Tensor:
            return torch.zeros_like(chosen).index_add_(0, pairs, values.detach().to(chosen.dtype))

        squares, tokens = summed(out.rewards.square()), summed(torch.ones_like(out.rewards))
        far = torch.full_like(chosen, math.nan) if kl is None else summed(kl)
        self._batches.append(torch.stack([chosen, rejected, squares, tokens, far], dim=1).cpu())

    def add_anchors(self, kl: Tensor, tokens: int) -> None:
        """Keep the sum of KL over the tokens of a micro-batch's anchors."""
        self._anchors.append((float(kl), tokens))

    def take(self, pairs: int | None = None, *, beta: float = 0.0) -> dict[str, float]:
        """Return the means over all processes, and forget; each process must call it.

        Args:
            pairs: how many there are; samplers fill the last turn with the first pairs again.
            beta: METHOD M5's, for `loss`.
        """
        from accelerate.utils import gather_object

        batches, anchors = zip(*gather_object([(self._batches, self._anchors)]), strict=True)
        self._batches, self._anchors = [], []
        # Turn by turn, as the sampler dealt them out: so they are in the data's order.
        turns = chain.from_iterable(zip_longest(*batches))
        rows = torch.cat([batch for batch in turns if batch is not None])[:pairs].double()
        chosen, rejected, squares, tokens, kl = rows.unbind(1)
        margins = chosen - rejected
        # A tie is half right, so an untrained adapter scores 0.5 and not 0.
        right = (margins > 0).double() + 0.5 * (margins == 0).double()
        square = float(squares.sum() / tokens.sum())
        means = {
            "loss": float(torch.nn.functional.softplus(-margins).mean()) + beta * square,
            "rewards/chosen": float(chosen.mean()),
            "rewards/rejected": float(rejected.mean()),
            "rewards/accuracies": float(right.mean()),
            "rewards/margins": float(margins.mean()),
            "rewards/token_rms": math.sqrt(square),
        }
        if not bool(kl.isnan().any()):
            means["kl"] = float(kl.sum() / tokens.sum())
        if pulled := list(chain.from_iterable(anchors)):
            means["kl"] = math.fsum(kl for kl, _ in pulled) / sum(n for _, n in pulled)
        return means
