"""One strength a request, on vLLM's model runner V2, its default where Triton runs.

    vllm serve OUT --logits-processors qadapter.vllm_plugin.by_request:StrengthByRequest

Requests then say `vllm_xargs: {"strength": 0.7}`. vLLM asks its logits processors whether what they
say is right, where they come in, and so this is one, though it does nothing to logits; `state` then
hands the strengths to the model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

FIELD = "strength"
"""Its name among a request's `vllm_xargs`, which are `SamplingParams.extra_args` in Python."""


class StrengthByRequest(LogitsProcessor):
    """Lets requests say their strength, and refuses what is none; the name is what turns it on."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """See that a request's strength is one, before it is taken.

        Raises:
            ValueError: it is not a finite number from 0, nor a list of them.
        """
        asked = asked_strength(sampling_params)
        if asked is None:
            return
        several = asked if isinstance(asked, list | tuple) else [asked]
        if not several or not all(map(_from_zero, several)):
            raise ValueError(
                f"vllm_xargs: strength: {asked!r} must be a finite number from 0, or a list with "
                "one for each adapter (METHOD §5)"
            )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Return that the request's logits are left as they are."""
        return False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Return the logits as they are."""
        return logits


def asked_strength(sampling_params: SamplingParams | None) -> Any:
    """Return what a request says of its strength, None if nothing."""
    return None if sampling_params is None else (sampling_params.extra_args or {}).get(FIELD)


def _from_zero(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf
