"""How a request's strength gets to the model, on vLLM's model runner V2."""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from qadapter.vllm_plugin.strengths import strengths

_logger = init_logger(__name__)


class WeightsByRequest(DefaultModelState):
    """Keeps the weights of each request's mix (METHOD M2) and hands `forward` those of each token.

    Requests have slots, in which vLLM puts others later. What `forward` reads lies at one place,
    for a captured graph reads there again.

    Raises:
        ValueError: vLLM is to cut batches in halves, which it does not do with such inputs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.vllm_config.parallel_config.use_ubatching:
            raise ValueError(
                "StrengthByRequest: leave dual batch overlap out; it halves no weights"
            )
        self.config = self.model.config
        width = len(self.config.branch_layers) + 1
        self.of_slots = UvaBackedTensor((self.max_num_reqs, width), dtype=torch.float32)
        self.of_tokens = torch.zeros(
            self.max_num_tokens, width, dtype=torch.float32, device=self.device
        )

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Note the weights of a request that gets a slot."""
        super().add_request(req_index, new_req_data)
        asked, config = None, self.config
        if new_req_data.sampling_params is not None:
            try:
                asked = strengths(new_req_data.sampling_params, len(config.branch_layers))
            except ValueError as error:
                _logger.error("request %s gets no answer: %s", new_req_data.req_id, error)
        self.of_slots.np[req_index] = config.weights_at(asked or config.strengths)

    def apply_staged_writes(self) -> None:
        """Let the device have what was noted."""
        super().apply_staged_writes()
        self.of_slots.copy_to_uva()

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Return what `forward` is given beside tokens: the weights `[N, branches + 1]` of each."""
        given = super().prepare_inputs(input_batch, req_states)
        n, tokens = input_batch.num_reqs, input_batch.num_tokens
        ends = input_batch.query_start_loc[1 : n + 1]
        places = torch.arange(tokens, dtype=ends.dtype, device=self.device)
        request = torch.bucketize(places, ends, right=True).clamp_(max=n - 1)
        self.of_tokens[:tokens] = self.of_slots.gpu[input_batch.idx_mapping[request]]
        return {**given, "weights": self.of_tokens[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return the same place, of which a graph is captured."""
        given = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**given, "weights": self.of_tokens[:num_tokens]}
