"""What a run may do without failing and yet for nothing: each is told in one sentence, or None.

None of these stops a run: each can be meant. What cannot be is refused where it occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadapter.config import QConfig
from qadapter.stats import wilson_interval

_HOT = 2.0
"""Temperature of the base past which the untrained policy is told to be near-uniform."""
_FEW_LOGS = 4
"""Log lines under which a run is too short to say that its loss stays."""


def near_uniform(q: QConfig) -> str | None:
    """Return what happens where α̃ is so much greater than α0 that the base is drowned.

    Before training Q̂ = 0 (residual), so the policy is the base at temperature α̃/α0; in `raw` form
    Q̂ = z1 and it is α̃/(1 + α0) (METHOD M2).
    """
    heat = q.alpha_tilde / (q.alpha_0 + (1.0 if q.parameterization == "raw" else 0.0))
    if heat <= _HOT:
        return None
    return (
        f"alpha_0 {q.alpha_0:g} is small beside alpha_tilde {q.alpha_tilde:g}: the policy begins "
        f"as the base at temperature {heat:.3g}, whose samples are near noise, and has to learn "
        "language again from the pairs; set both alike to begin as the base itself."
    )


def shared_prompts(
    train: NDArray[np.int64], held_out: NDArray[np.int64], source: Callable[[int], str]
) -> str | None:
    """Return how many held-out pairs have a prompt that is trained on, both as `prompt_digest`.

    Args:
        source: gives the place of a held-out pair.
    """
    shared = np.flatnonzero(np.isin(held_out, train))
    if not len(shared):
        return None
    return (
        f"eval_data: {len(shared)} of {len(held_out)} pairs have a prompt that is also in data "
        f"(the first is {source(int(shared[0]))}); the evaluation flatters, take them out."
    )


def flat_loss(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Return that the loss did not leave log 2, from a trainer's log lines.

    Judged by the margin, which β and anchors do not enter: while it is 0, the preference loss is
    log 2 (METHOD M5).
    """
    margins = [line["rewards/margins"] for line in history if "rewards/margins" in line]
    if len(margins) < _FEW_LOGS:
        return None
    last = margins[-(len(margins) // 4) :]
    if fmean(last) > 0.01:
        return None
    return (
        f"the loss did not fall from log 2: over the last {len(last)} of {len(margins)} log lines "
        f"chosen is ahead of rejected by {fmean(last):.2g}. Likely causes: learning_rate too low "
        "or far too high, too few steps, anchor_weight or beta too strong, or labels that "
        "contradict each other."
    )


def inverted(accuracy: float, pairs: int) -> str | None:
    """Return that held-out accuracy is below one half by more than chance (95%, Wilson)."""
    high = wilson_interval(accuracy * pairs, pairs)[1]
    if high >= 0.5:
        return None
    return (
        f"held-out accuracy is {accuracy:.0%} of {pairs} pairs, clearly below one half: chosen and "
        "rejected may be swapped in one of the files."
    )
