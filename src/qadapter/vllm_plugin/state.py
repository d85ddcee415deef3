"""How a request's strength gets to the model, on vLLM's model runner V2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from qadapter.errors import ConfigError
from qadapter.strength import each
from qadapter.vllm_plugin.by_request import asked_strength
from qadapter.vllm_plugin.live import weights_at

_logger = init_logger(__name__)


class WeightsByRequest(DefaultModelState):
    """Keeps the weights of each request's mix (METHOD M2) and hands `forward` those of each token.

    Requests have slots, in which vLLM puts others later. What `forward` reads lies at one place,
    for a captured graph reads there again.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = self.model.config
        width = len(self.config.branch_layers) + 1

        def table(rows: int) -> Tensor:
            return torch.zeros(rows, width, dtype=torch.float32, device=self.device)

        self.of_slots, self.of_tokens = table(self.max_num_reqs), table(self.max_num_tokens)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Note the weights of a request that gets a slot."""
        super().add_request(req_index, new_req_data)
        weights = self._weights(asked_strength(new_req_data.sampling_params))
        self.of_slots[req_index] = torch.tensor(weights, dtype=torch.float32)

    def _weights(self, asked: Any) -> list[float]:
        config = self.config
        if asked is None:
            return weights_at(config, config.strengths)
        names = [str(number + 1) for number in range(len(config.branch_layers))]
        try:
            return weights_at(config, each(asked, names))
        except ConfigError as error:
            # What is refused where requests come in knows of no adapters. To fail here would end
            # the answers of all others.
            _logger.error("the answer to this request is noise: %s", error)
            return [0.0] * (len(names) + 1)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Return what `forward` is given beside tokens: the weights `[N, branches + 1]` of each."""
        given = super().prepare_inputs(input_batch, req_states)
        n, tokens = input_batch.num_reqs, input_batch.num_tokens
        ends = input_batch.query_start_loc[1 : n + 1]
        request = torch.bucketize(torch.arange(tokens, device=self.device), ends, right=True)
        self.of_tokens[:tokens] = self.of_slots[input_batch.idx_mapping.long()[request]]
        return {**given, "weights": self.of_tokens[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return the same place, of which a graph is captured."""
        given = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**given, "weights": self.of_tokens[:num_tokens]}
