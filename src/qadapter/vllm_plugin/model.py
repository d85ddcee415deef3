"""An exported policy out of vLLM's own layers.

As in `qadapter.standalone.model`, a decoder of L + K layers whose line of layers forks, but without
those that the mix multiplies by zero, where the strength is fixed. `forward` returns the mixed
hidden state, so all that comes after it is vLLM's: logits, sampling, log-probs, structured output.
Layers keep their numbers in the export and depend on no strength, so keys and values do not either.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pkgutil import resolve_name
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    extract_layer_index,
    maybe_prefix,
)

from qadapter.functional import mix
from qadapter.vllm_plugin import FAMILIES
from qadapter.vllm_plugin.live import Live, live_part

_DIMS = {
    "input_ids": {0: "tokens"},
    "positions": {-1: "tokens"},
    "inputs_embeds": {0: "tokens"},
}


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
        before = base[0] if base else state[0]
        for branch in self.live.branches:
            state = _forked(trunks[branch.start], before)
            for layer in self.layers[branch.first : branch.first + branch.depth]:
                state = layer(positions, *state)
            before = self.norm(*state)[0]
            adapted.append(before)
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
class _Qwen2(_Forked, Qwen2Model):
    pass


# How each family's decoder is told what its layers are. Mistral's and Qwen3's decoders are Llama's
# and Qwen2's with layers of their own.
_HOW: tuple[tuple[Any, str, Any], ...] = (
    (_Llama, "layer_type", LlamaDecoderLayer),
    (_Llama, "layer_type", MistralDecoderLayer),
    (_Qwen2, "decoder_layer_type", Qwen2DecoderLayer),
    (_Qwen2, "decoder_layer_type", Qwen3DecoderLayer),
)
_DECODERS = dict(zip(FAMILIES, _HOW, strict=True))


def _decoder(live: Live, vllm_config: VllmConfig, prefix: str) -> Any:
    """Return vLLM's decoder with the live layers at their places, and nothing at the others."""
    text = copy.copy(vllm_config.model_config.hf_config.text_config)
    # vLLM keeps what it compiled by the config, of which it is how the layers hang together.
    text.live = [live.base_layers, live.mixes_base, live.branches]
    kind, word, layer = _DECODERS[text.model_type]

    def layer_or_none(*, prefix: str, **given: Any) -> nn.Module:
        if extract_layer_index(prefix) in live.layers:
            return cast(nn.Module, layer(prefix=prefix, **given))
        return cast(nn.Module, PPMissingLayer())

    found = kind(
        vllm_config=vllm_config.with_hf_config(text), prefix=prefix, **{word: layer_or_none}
    )
    found.live = live
    return found


def _by_request(processors: Sequence[str | type] | None) -> bool:
    """Return whether one of `--logits-processors` lets requests say their strength."""
    if not processors:
        return False
    from qadapter.vllm_plugin.strengths import StrengthByRequest

    found = (resolve_name(one) if isinstance(one, str) else one for one in processors)
    return any(issubclass(one, StrengthByRequest) for one in found)


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
        self.by_request = _by_request(vllm_config.model_config.logits_processors)
        self.live = live_part(config, fixed=not self.by_request)
        self.model = _decoder(self.live, vllm_config, maybe_prefix(prefix, "model"))
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
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the policy's hidden states `[N, D]` of the N tokens of a batch (METHOD M2).

        `weights` `[N, branches + 1]` are those of each token's request, where requests say theirs.
        """
        states = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return mix(states, self.live.weights if weights is None else weights.split(1, dim=1))

    def get_model_state_cls(self) -> type[Any]:
        """Return what vLLM's model runner V2, and no other, asks for the inputs of `forward`."""
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        from qadapter.vllm_plugin.state import WeightsByRequest

        return WeightsByRequest if self.by_request else DefaultModelState

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the policy's logits `[N, V]`, up to a constant per row."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the tensors of an export.

        Raises:
            ValueError: vLLM's layers leave one out, so that the policy would be another.
        """
        placed = filter(self._has_place, weights)
        loaded: set[str] = AutoWeightsLoader(self).load_weights(placed)
        return loaded

    def _has_place(self, weight: tuple[str, Tensor]) -> bool:
        """Return whether a tensor is of a layer that is there.

        Raises:
            ValueError: it is a bias for which vLLM's layers have no place, and would pass over.
        """
        *path, module, kind = weight[0].split(".")
        if "layers" in path and int(path[path.index("layers") + 1]) not in self.live.layers:
            return False
        packed = self.packed_modules_mapping.items()
        module = next((whole for whole, parts in packed if module in parts), module)
        place = ".".join([*path, module])
        if kind == "bias" and getattr(self.get_submodule(place), kind, None) is None:
            raise ValueError(
                f"{weight[0]}: vLLM's layers of this family have no such bias; serve this policy "
                "with `qadapter serve`."
            )
        return True
