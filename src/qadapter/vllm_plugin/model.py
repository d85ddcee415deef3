"""An exported policy out of vLLM's own layers.

As in `qadapter.standalone.model`, a decoder of L + K layers whose line of layers forks, but without
those that the mix multiplies by zero, for here the strength is fixed. `forward` returns the mixed
hidden state, so all that comes after it is vLLM's: logits, sampling, log-probs, structured output.
Keys and values depend on no strength, and prefixes are cached as ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.mistral import MistralModel
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3Model
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from qadapter.functional import mix
from qadapter.vllm_plugin import FAMILIES
from qadapter.vllm_plugin.live import Live, live_part

_DIMS = {"input_ids": 0, "positions": -1, "inputs_embeds": 0}


class _Forked:
    """A decoder of vLLM's whose last layers are branches, each from the trunk of its own."""

    live: Live
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the final hidden states `[N, D]` of each branch and, if mixed in, of the base."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        end = self.live.base_layers
        starts = {branch.start for branch in self.live.branches}
        trunks: dict[int, _State] = {}
        state: _State = (hidden, None)
        for index in range(end + 1):
            if index in starts:
                # vLLM's layers add to the residual in place.
                trunks[index] = _forked(state, state[0])
            if index < end:
                state = self.layers[index](positions, *state)
        base = [self.norm(*state)[0]] if self.live.mixes_base else []
        adapted: list[Tensor] = []
        first, before = end, base[0] if base else state[0]
        for branch in self.live.branches:
            state = _forked(trunks[branch.start], before)
            for layer in self.layers[first : first + branch.depth]:
                state = layer(positions, *state)
            before = self.norm(*state)[0]
            adapted.append(before)
            first += branch.depth
        return (*adapted, *base)


_State = tuple[Tensor, Tensor | None]
"""What goes from one of vLLM's layers to the next: hidden states and the residual, `[N, D]`."""


@torch.library.custom_op("qadapter::fork", mutates_args=())
def _fork(trunk: Tensor, before: Tensor) -> Tensor:
    """Return a copy of the trunk, to be made after what came before in another line of layers.

    Without it torch 2.13's inductor fuses operations of two lines, and finds, when it starts, that
    they now wait for each other.
    """
    return trunk.clone()


@_fork.register_fake
def _(trunk: Tensor, before: Tensor) -> Tensor:
    return torch.empty_like(trunk)


def _forked(state: _State, before: Tensor) -> _State:
    hidden, residual = state
    return _fork(hidden, before), None if residual is None else _fork(residual, before)


@support_torch_compile(dynamic_arg_dims=_DIMS)
class _Llama(_Forked, LlamaModel):
    pass


@support_torch_compile(dynamic_arg_dims=_DIMS)
class _Mistral(_Forked, MistralModel):
    pass


@support_torch_compile(dynamic_arg_dims=_DIMS)
class _Qwen2(_Forked, Qwen2Model):
    pass


@support_torch_compile(dynamic_arg_dims=_DIMS)
class _Qwen3(_Forked, Qwen3Model):
    pass


_DECODERS = dict(zip(FAMILIES, (_Llama, _Mistral, _Qwen2, _Qwen3), strict=True))


class QAdapterForCausalLM(nn.Module, SupportsQuant):
    """A policy π_s; `--hf-overrides '{"strength": 0.7}'` sets s.

    Raises:
        ValueError: the base is of a family that is not in `_DECODERS`, or what was overridden is
            no policy (see `QAdapterPolicyConfig.check`).
    """

    hf_to_vllm_mapper = LlamaModel.hf_to_vllm_mapper
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        config.check()
        text = config.text_config
        if text.model_type not in _DECODERS:
            raise ValueError(
                f"{text.model_type}: the vLLM plugin of qadapter knows {', '.join(_DECODERS)}; "
                "serve this policy with `qadapter serve`."
            )
        self.config = config
        self.live = live_part(config)
        self.model: Any = _DECODERS[text.model_type](
            vllm_config=vllm_config.with_hf_config(self.live.shortened(text)),
            prefix=maybe_prefix(prefix, "model"),
        )
        self.model.live = self.live
        self.lm_head = ParallelLMHead(
            text.vocab_size,
            text.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if text.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(text.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings `[N, D]` of N tokens."""
        embedded: Tensor = self.model.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the policy's hidden states `[N, D]` of the N tokens of a batch (METHOD M2)."""
        states = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return mix(states, self.live.weights)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the policy's logits `[N, V]`, up to a constant per row."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the tensors of an export.

        Raises:
            ValueError: vLLM's layers leave one out, so that the policy would be another.
        """
        placed = (self._placed(*weight) for weight in weights)
        loaded: set[str] = AutoWeightsLoader(self).load_weights(w for w in placed if w is not None)
        return loaded

    def _placed(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Return a tensor under its name here; None for one of a layer that is left out.

        Raises:
            ValueError: it is a bias that has no place, which vLLM would pass over.
        """
        words = name.split(".")
        if "layers" in words:
            at = words.index("layers") + 1
            if int(words[at]) not in self.live.layers:
                return None
            words[at] = str(self.live.layers.index(int(words[at])))
        *path, module, kind = words
        packed = self.packed_modules_mapping.items()
        module = next((whole for whole, parts in packed if module in parts), module)
        place = ".".join([*path, module])
        if kind == "bias" and getattr(self.get_submodule(place), kind, None) is None:
            raise ValueError(
                f"{name}: vLLM's layers of this family have no such bias; serve this policy "
                "with `qadapter serve`."
            )
        return ".".join(words), tensor
