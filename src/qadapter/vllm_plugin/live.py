"""Which layers of an exported policy count where its strength is fixed."""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any, NamedTuple

from qadapter.decoder import by_layer
from qadapter.functional import mixing_weights
from qadapter.standalone.config import QAdapterPolicyConfig


class Branch(NamedTuple):
    """A line of layers beside the base's."""

    start: int
    """The base's layer before which it begins."""
    depth: int
    """How many layers it has."""


class Live(NamedTuple):
    """What is left of an export once all is taken away that the mix multiplies by zero."""

    layers: list[int]
    """Their places in the export: the base's first ones, then each branch's."""
    base_layers: int
    """How many of them are the base's."""
    branches: list[Branch]
    weights: list[float]
    """Of each branch's hidden state in the policy's and, where it counts, last the base's."""

    @property
    def mixes_base(self) -> bool:
        """Whether the base's hidden state is a part of the mix."""
        return len(self.weights) > len(self.branches)

    def shortened(self, config: Any) -> Any:
        """Return the decoder's config with these layers alone."""
        short = copy.deepcopy(config)
        for name in by_layer(config):
            setattr(short, name, [getattr(config, name)[i] for i in self.layers])
        short.num_hidden_layers = len(self.layers)
        # vLLM keeps compiled decoders by their configs; how the layers hang together is of them.
        short.base_layers, short.branches = self.base_layers, [list(b) for b in self.branches]
        return short


def live_part(config: QAdapterPolicyConfig) -> Live:
    """Return the layers that a policy needs at its config's strength.

    At strength 1 with α0 = α̃ the base's last K layers have weight zero in M2, and what is left is
    the adapted model alone (METHOD §2); at strength 0 it is the base.
    """
    *weights, of_base = mixing_weights(
        config.strengths,
        alpha_0=config.alpha_0,
        alpha_tilde=config.alpha_tilde,
        parameterization=config.parameterization,
    )
    depths: list[int] = list(config.branch_layers)
    firsts = accumulate(depths, initial=config.base_layers)
    counted = [
        (first, Branch(config.base_layers - depth, depth), float(weight))
        for first, depth, weight in zip(firsts, depths, weights, strict=False)
        if weight
    ]
    branches = [branch for _, branch, _ in counted]
    mixed = [weight for _, _, weight in counted]
    if of_base or not counted:
        base_layers = config.base_layers
        mixed.append(float(of_base))
    else:
        base_layers = max(branch.start for branch in branches)
    layers = [*range(base_layers)]
    for first, branch, _ in counted:
        layers += range(first, first + branch.depth)
    return Live(layers, base_layers, branches, mixed)
