"""One strength a request, on vLLM's model runner V2, its default where Triton runs.

    vllm serve OUT --logits-processors qadapter.vllm_plugin.strengths:StrengthByRequest

Requests then say `vllm_xargs: {"strength": 0.7}`. vLLM asks its logits processors whether what they
say is right, where they come in, and so this is one, though it leaves logits as they are; `state`
hands the strengths to the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from qadapter.strength import MOST

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState


class StrengthByRequest(LogitsProcessor):
    """Lets requests say their strength, and refuses what is none."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        super().__init__(vllm_config, req_states)
        model = vllm_config.model_config
        self.adapters = len(model.hf_config.branch_layers)
        ends = model.try_get_generation_config().get("eos_token_id", 0)
        self.end: int = ends[0] if isinstance(ends, list) else ends
        self.void: set[int] = set()
        """The slots of requests whose strengths are more or fewer than there are adapters."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """See that a request's strength is one, before it is taken.

        Raises:
            ValueError: it is neither a number from 0 to `MOST` nor a list of such.
        """
        strengths(sampling_params, None)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Return whether the request's answer is to end at once.

        How many adapters there are is not known where requests come in, and to raise here would
        end the answers of all others.
        """
        try:
            strengths(sampling_params, self.adapters)
        except ValueError:
            self.void.add(req_idx)
            return True
        self.void.discard(req_idx)
        return False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Return the logits `[rows, V]` as they are, but those of void requests."""
        if void := self.void.intersection(ctx.idx_mapping_np.tolist()):
            import torch

            slots = torch.tensor(sorted(void), device=logits.device)
            rows = torch.isin(ctx.expanded_idx_mapping, slots)
            logits[rows] = -torch.inf
            logits[rows, self.end] = 0.0
        return logits


def strengths(sampling_params: SamplingParams, adapters: int | None) -> list[float] | None:
    """Return what a request says: one number for each adapter, or None if nothing.

    Args:
        sampling_params: of the request; `vllm_xargs` are its `extra_args`.
        adapters: how many there are; None, if that is not known, takes any number.

    Raises:
        ValueError: it is no strength, or more or fewer than there are adapters.
    """
    asked: Any = (sampling_params.extra_args or {}).get("strength")
    if asked is None:
        return None
    several = asked if isinstance(asked, list | tuple) else [asked] * (adapters or 1)
    if not several or not all(map(_in_range, several)) or adapters not in (None, len(several)):
        count = "" if adapters is None else f" of {adapters}"
        raise ValueError(
            f"vllm_xargs: strength: {asked!r} must be a number from 0 to {MOST:g}, or a list with "
            f"one for each adapter{count}"
        )
    return [float(number) for number in several]


def _in_range(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST
