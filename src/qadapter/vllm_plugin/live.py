"""Which layers of an exported policy count where its strength is fixed."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from qadapter.standalone.config import QAdapterPolicyConfig


class Branch(NamedTuple):
    """A line of layers beside the base's, which begins where the base's layer `start` does."""

    start: int
    first: int
    """Its own first layer."""
    depth: int


class Live(NamedTuple):
    """What is left of an export without the layers that the mix multiplies by zero.

    Layers have their numbers in the export, where the branches' follow the base's.
    """

    base_layers: int
    """How many of the base's layers, from the first, are run."""
    branches: list[Branch]
    weights: list[float]
    """Of each branch's hidden state in the policy's and, where it counts, last the base's."""

    @property
    def mixes_base(self) -> bool:
        """Whether the base's hidden state is a part of the mix."""
        return len(self.weights) > len(self.branches)

    @property
    def layers(self) -> set[int]:
        """The layers that are run."""
        own = (range(b.first, b.first + b.depth) for b in self.branches)
        return set(range(self.base_layers)).union(*own)


def live_part(config: QAdapterPolicyConfig, *, fixed: bool) -> Live:
    """Return the layers that a policy needs.

    At strength 1 with α0 = α̃ the base's last K layers have weight zero in M2, and what is left is
    the adapted model alone (METHOD §2); at strength 0 it is the base.

    Args:
        config: of the policy.
        fixed: whether the config's strength is everyone's; any layer may count otherwise.
    """
    *weights, base = config.weights_at(config.strengths)
    depths: list[int] = list(config.branch_layers)
    firsts = accumulate(depths, initial=config.base_layers)
    counted = [
        (Branch(config.base_layers - depth, first, depth), weight)
        for first, depth, weight in zip(firsts, depths, weights, strict=False)
        if weight or not fixed
    ]
    branches = [branch for branch, _ in counted]
    mixed = [weight for _, weight in counted]
    # Strengths that sum to α0/α̃ may miss it by their rounding.
    if fixed and counted and abs(base) <= 1e-12 * config.alpha_0 / config.alpha_tilde:
        return Live(max(branch.start for branch in branches), branches, mixed)
    return Live(config.base_layers, branches, [*mixed, base])
