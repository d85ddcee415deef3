"""Branches of hidden states over one shared trunk, in training and in decoding.

The base pass runs with the adapter off; what it hands to each of its last K layers (masks,
rotary embeddings, positions) is caught, and those layers run again from the trunk's output with the
adapter on, their keys and values in cache entries of their own: layer `i` lives at `i + K`. No
weights are copied and no family needs code of its own (arXiv:2407.03856; METHOD §6). Several
adapters have a branch each, of its own depth, beside the one of the base. Where a decoder cannot be
taken apart so, each branch is a pass over all its layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qadapter import hub
from qadapter.attention import PackedPairs
from qadapter.decoder import by_layer, final_norm
from qadapter.errors import ModelError
from qadapter.model.stacked import CacheView, Stacked, agree, cache_shifts, hooked
from qadapter.model.streams import Adapter, Streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MATMUL_BACKENDS: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)

_Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""The arguments of each decoder layer in turn."""


class _PassThrough(nn.Module):
    """A decoder layer that only notes with what it was called."""

    def __init__(self, layer: nn.Module, calls: _Calls) -> None:
        super().__init__()
        # Not registered: the layer belongs to its decoder.
        self.__dict__["_layer"], self.__dict__["_calls"] = layer, calls

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._calls.append(((hidden_states, *args), kwargs))
        return hidden_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


class _BranchCache(CacheView):
    """A view of a cache in which a branch's layer `i` lives at `i + shift`."""

    def __init__(self, cache: Any, shift: int) -> None:
        super().__init__(cache)
        self._shift = shift

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(key, value, layer_idx + self._shift, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self._cache.get_seq_length(layer_idx + self._shift)

    # The two that a whole decoder asks for its masks.
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> Any:
        return self._cache.get_mask_sizes(query_length, layer_idx + self._shift)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self._cache.get_query_offset(layer_idx + self._shift)


class Branches(Stacked):
    """The part of a `QAdapterModel` that runs its layers: tokens in, `Streams` out."""

    if TYPE_CHECKING:
        config: Any
        dtype: torch.dtype
        eval: Callable[[], Any]
        modules: Callable[[], Iterator[nn.Module]]
        shares_trunk: bool
        _base: PreTrainedModel
        _tuned: list[Any]
        _off: bool

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Run the base alone inside the block."""
        # peft's own switch also walks over every parameter: a tenth of a token's time in decoding.
        was, meant = [layer._disable_adapters for layer in self._tuned], self._off
        self._off = True
        for layer in self._tuned:
            layer._disable_adapters = True
        try:
            yield
        finally:
            self._off = meant
            for layer, disabled in zip(self._tuned, was, strict=True):
                layer._disable_adapters = disabled

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the block without gradient and dropout, so that it moves no random numbers."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:  # a base in evaluation stays so where its adapter trains
                module.training = training

    @contextmanager
    def _only(self, adapter: Adapter) -> Iterator[None]:
        """Run this adapter's branch inside the block; of one alone peft knows by itself."""
        if len(self.adapters) == 1:
            yield
            return
        was = [layer._active_adapter for layer in self._tuned]
        for layer in self._tuned:
            layer._active_adapter = [adapter.key]
        try:
            yield
        finally:
            for layer, active in zip(self._tuned, was, strict=True):
                layer._active_adapter = active

    @property
    def base_name(self) -> str:
        """Name of the base's class."""
        return type(self._base).__name__

    @property
    def base_width(self) -> int:
        """D, numbers of a hidden state."""
        return int(self._base.config.hidden_size)

    @property
    def branch_depth(self) -> int:
        """K, the number of layers that run more than once."""
        return max(adapter.depth for adapter in self.adapters)

    @cached_property
    def _norm(self) -> nn.Module:
        return final_norm(self._decoder, self._layers)

    @property
    def _first(self) -> int:
        return self._n_layers - self.branch_depth

    @staticmethod
    def lengthened(config: Any, adapters: Sequence[Adapter]) -> Any:
        """Return a base's config with the layers of these adapters' branches after its own."""
        config = copy.deepcopy(config)
        for name in by_layer(config):
            own = getattr(config, name)
            setattr(config, name, [*own, *(of for a in adapters for of in own[-a.depth :])])
        config.num_hidden_layers += sum(adapter.depth for adapter in adapters)
        return config

    def streams(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        spans: Tensor | None = None,
        trunk: Tensor | None = None,
        adapters: tuple[Adapter, ...] | None = None,
        **inputs: Any,
    ) -> Streams:
        """Return the final hidden states of all branches for `[B, T]` tokens.

        With `past_key_values` (a transformers cache of L + K layers, or L + ΣK for several
        adapters) all branches append to it. `adapters` are some of the model's; default all.
        With `spans` (see `packing.PackedBatch`) the one row holds packed pairs. With `trunk`, the
        `Streams.trunk` of an earlier pass over the same tokens, the base is not run at all and only
        the adapted branch is returned. The base branch never carries a gradient.

        Raises:
            ModelError: peft's switch of the adapter is off.
        """
        if not self._off and any(layer._disable_adapters for layer in self._tuned):
            raise ModelError(
                "the adapter is switched off, so this would be the base alone; switch it on by "
                "peft_model.enable_adapter_layers(), or ask for strength 0."
            )
        if spans is not None:
            inputs["packed_pairs"] = PackedPairs(spans)
            # Any mask of four dimensions keeps transformers from making one of [T, T].
            attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        adapters = adapters or self.adapters
        if trunk is not None:
            return Streams(self._branch(trunk, self._arguments(inputs)), None)
        inputs |= {"past_key_values": past_key_values, "use_cache": past_key_values is not None}
        few = past_key_values is not None and self._pays_to_stack(input_ids)
        if few and self._stacks(adapters):
            return self._stacked(inputs, past_key_values, adapters)
        return self._two_passes(inputs, past_key_values, adapters)

    def _two_passes(
        self, inputs: dict[str, Any], cache: Any, adapters: tuple[Adapter, ...]
    ) -> Streams:
        """Return all branches from a base pass and another over its last K layers for each."""
        if not self.shares_trunk:
            return self._whole_passes(inputs, cache, adapters)
        calls: _Calls = []
        first = min(adapter.first for adapter in adapters)

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        hooks = [
            layer.register_forward_pre_hook(catch, with_kwargs=True)
            for layer in self._layers[first:]
        ]
        with hooked(hooks), torch.no_grad(), self.adapter_off():
            base = self._decoder(**inputs).last_hidden_state
        shifts, states = cache_shifts(adapters), []
        for adapter in adapters:
            mine = calls[adapter.first - first :]
            args, kwargs = mine[0]
            trunk = args[0] if args else kwargs["hidden_states"]
            with self._only(adapter):
                states.append(self._branch(trunk, mine, cache, shifts[adapter]))
        one = len(adapters) == 1
        return Streams(states[0], base, trunk if one else None, tuple(states[1:]))

    def _whole_passes(
        self, inputs: dict[str, Any], cache: Any, adapters: tuple[Adapter, ...]
    ) -> Streams:
        """Return all branches from a pass over all layers for each."""
        with torch.no_grad(), self.adapter_off():
            base = self._decoder(**inputs).last_hidden_state
        shifts, states = cache_shifts(adapters), []
        for adapter in adapters:
            view = None if cache is None else _BranchCache(cache, shifts[adapter])
            with self._only(adapter):
                found = self._decoder(**{**inputs, "past_key_values": view})
            states.append(found.last_hidden_state)
        return Streams(states[0], base, None, tuple(states[1:]))

    def _arguments(self, inputs: dict[str, Any]) -> _Calls:
        """Return what the base hands to each of its last K layers, without running any."""
        calls: _Calls = []
        shell = copy.copy(self._decoder)
        layers = nn.ModuleList(_PassThrough(layer, calls) for layer in self._layers)
        shell._modules = {
            name: layers if module is self._layers else module
            for name, module in self._decoder._modules.items()
        }
        with torch.no_grad():
            shell(**inputs, use_cache=False)
        return calls[self._first :]

    def _branch(
        self, hidden: Tensor, calls: _Calls, past_key_values: Any = None, shift: int = 0
    ) -> Tensor:
        """Return h_θ: the last K layers from the trunk's output, as the base was called."""
        branch = _BranchCache(past_key_values, shift)
        swap = {id(past_key_values): branch} if past_key_values is not None else {}
        for layer, (args, kwargs) in zip(self._layers[-len(calls) :], calls, strict=True):
            rest = tuple(swap.get(id(a), a) for a in args[1:])
            kwargs = {k: swap.get(id(v), v) for k, v in kwargs.items() if k != "hidden_states"}
            out = layer(hidden, *rest, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return cast(Tensor, self._norm(hidden))

    @cached_property
    def packs(self) -> bool:
        """Whether packed pairs give the same streams as each response alone, tried on a small row.

        False where the base's attention does not hand on what packing needs.
        """
        prompt, chosen, rejected = [1, 2], [3, 1], [2, 3, 1]
        ids = torch.tensor([[*prompt, *chosen, *rejected]], device=self.device)
        positions = torch.tensor([[0, 1, 2, 3, 2, 3, 4]], device=self.device)
        spans = torch.tensor([[0, 2, 2, 3]], device=self.device)
        with self.evaluating():
            try:
                row = self.streams(ids, position_ids=positions, spans=spans).base[0]
            except (TypeError, ValueError, RuntimeError):  # an argument or a shape it does not take
                return False
            alone = [
                self.streams(torch.tensor([[*prompt, *part]], device=self.device)).base[0]
                for part in (chosen, rejected)
            ]
        return agree(row, torch.cat([alone[0], alone[1][2:]]))

    @cached_property
    def caches_trunk(self) -> bool:
        """Whether the branch can start from a kept trunk, tried on a small packed row.

        False where pairs cannot be packed, there are several adapters, or the decoder does more
        between its layers than call them one after another.
        """
        if not (self.shares_trunk and self.packs and len(self.adapters) == 1):
            return False
        row: dict[str, Any] = {
            "input_ids": torch.tensor([[1, 2, 3, 1, 2]], device=self.device),
            "position_ids": torch.tensor([[0, 1, 2, 2, 3]], device=self.device),
            "spans": torch.tensor([[0, 2, 1, 2]], device=self.device),
        }
        with self.evaluating():
            whole = self.streams(**row)
            try:
                alone = self.streams(**row, trunk=whole.trunk).adapted
            except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
                return False
        return torch.equal(alone, whole.adapted)

    @property
    def trunk_key(self) -> dict[str, Any]:
        """What trunk activations and base scalars depend on besides weights and tokens."""
        return {
            "config": hub.config_key(self._base),
            "attention": self._base.config._attn_implementation,
            "first_layer": self._first,
            "dtype": str(self.dtype),
            # Whether float32 is multiplied as such, or in TF32 or bfloat16.
            "matmul": [getattr(b.matmul, "fp32_precision", "") for b in _MATMUL_BACKENDS],
            "device": self.device.type,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }
