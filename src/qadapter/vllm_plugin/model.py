"""An exported policy out of vLLM's own layers.

The base's decoder, whose last layers base and branches go through together (`shared`). `forward`
returns the mixed hidden state, so all that comes after it is vLLM's: logits, sampling, log-probs,
structured output. Keys and values depend on no strength, and prefixes are cached as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.mistral import MistralModel
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3Model
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from qadapter.functional import mix, mixing_weights
from qadapter.standalone.config import BRANCHES
from qadapter.vllm_plugin import FAMILIES
from qadapter.vllm_plugin.shared import Attentions, let_branch, load_branch

_DIMS = {"input_ids": 0, "positions": -1, "inputs_embeds": 0}


class _Forked:
    """A decoder of vLLM's whose last layers are also those of branches."""

    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    depths: dict[int, int]
    """K of each branch by its number, the deepest first: the order of their rows."""

    def fork(self, depths: Sequence[int], ranks: Sequence[int]) -> None:
        """Let branches of these depths go through the base's layers.

        Of the layers that the decoder was made with for each branch, their attention is kept.
        """
        end = len(self.layers) - sum(depths)
        starts = dict(enumerate(accumulate([end, *depths[:-1]])))
        self.depths = dict(sorted(enumerate(depths), key=lambda of: -of[1]))
        for index in range(end - max(depths), end):
            layer: Any = self.layers[index]
            inside = [branch for branch, depth in self.depths.items() if index >= end - depth]
            own: list[Any] = [self.layers[starts[b] + index - end + depths[b]] for b in inside]
            layer.self_attn.attn = Attentions([of.self_attn.attn for of in (layer, *own)])
            for name, module in layer.named_modules():
                if isinstance(module, LinearBase):
                    parts = _parts(name.rpartition(".")[2])
                    let_branch(module, {b: ranks[b] for b in inside}, len(parts))
        self.layers = self.layers[:end]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the final hidden states `[N, D]` of each branch and, last, of the base."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        starts = [len(self.layers) - depth for depth in self.depths.values()]
        residual, n, where = None, 1, positions
        for index, layer in enumerate(self.layers):
            if joining := starts.count(index):
                hidden = _joined(hidden, n, joining)
                residual = None if residual is None else _joined(residual, n, joining)
                n += joining
                where = positions.repeat(n)
            hidden, residual = layer(where, hidden, residual)
        final, _ = self.norm(hidden, residual)
        base, *adapted = final.view(n, -1, final.shape[-1]).unbind()
        found = dict(zip(self.depths, adapted, strict=True))
        return (*(found[branch] for branch in sorted(found)), base)


def _joined(states: Tensor, n: int, joining: int) -> Tensor:
    """Return n streams of states, and as many more as join, which begin as the base's is."""
    base = states.view(n, -1, states.shape[-1])[0]
    return torch.cat([states, *[base] * joining])


_PACKED: dict[str, dict[str, Any]] = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
}
"""Maps that vLLM holds in one, by their names in transformers, and its names for them."""


def _parts(module: str) -> list[Any]:
    """Return vLLM's names of the maps that it holds in one."""
    return list(_PACKED[module].values()) if module in _PACKED else [None]


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
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {n: [*of] for n, of in _PACKED.items()}

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
        if config.branch_ranks is None:
            raise ValueError(
                "branch_ranks: this export lacks its adapters' low-rank maps, as one does that was "
                "saved again; run `qadapter export` anew."
            )
        self.config = config
        self.weights = mixing_weights(
            config.strengths,
            alpha_0=config.alpha_0,
            alpha_tilde=config.alpha_tilde,
            parameterization=config.parameterization,
        )
        self.model: Any = _DECODERS[text.model_type](
            vllm_config=vllm_config.with_hf_config(text), prefix=maybe_prefix(prefix, "model")
        )
        self.model.fork(config.branch_layers, config.branch_ranks)
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
        return mix(states, self.weights)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the policy's logits `[N, V]`, up to a constant per row."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the tensors of an export.

        Raises:
            ValueError: vLLM's layers leave one out, so that the policy would be another.
        """
        maps: dict[str, Tensor] = {}
        loaded: set[str] = AutoWeightsLoader(self).load_weights(self._own(weights, maps))
        for name in [n for n in maps if n.endswith(".lora_A")]:
            _, branch, layer, *path, module, _ = name.split(".")
            whole, part = next(
                ((whole, of[module]) for whole, of in _PACKED.items() if module in of),
                (module, None),
            )
            into = self.model.layers[int(layer)].get_submodule(".".join([*path, whole]))
            both = maps[name], maps[name.removesuffix("A") + "B"]
            load_branch(into, int(branch), _parts(whole), part, *both)
        # A map that an adapter leaves alone stays zero.
        return loaded | {n for n, _ in self.named_parameters() if ".branch_" in n}

    def _own(
        self, weights: Iterable[tuple[str, Tensor]], maps: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the base's tensors, and put those of the branches into `maps`."""
        merged = len(self.model.layers)
        for name, tensor in weights:
            if name.startswith(BRANCHES):
                maps[name] = tensor
            # The branches' merged layers are for transformers.
            elif not (name.startswith("model.layers.") and int(name.split(".")[2]) >= merged):
                yield self._placed((name, tensor))

    def _placed(self, weight: tuple[str, Tensor]) -> tuple[str, Tensor]:
        """Return a tensor that has a place here; vLLM passes over biases that have none."""
        *path, module, kind = weight[0].split(".")
        packed = self.packed_modules_mapping.items()
        module = next((whole for whole, parts in packed if module in parts), module)
        place = ".".join([*path, module])
        if kind == "bias" and getattr(self.get_submodule(place), kind, None) is None:
            raise ValueError(
                f"{weight[0]}: vLLM's layers of this family have no such bias; serve this policy "
                "with `qadapter serve`."
            )
        return weight
