"""Two branches of hidden states over one shared trunk, in training and in decoding.

The base pass runs with the adapter off; what it hands to each of its last K layers (masks,
rotary embeddings, positions) is caught, and those layers run again from the trunk's output with the
adapter on, their keys and values in cache entries of their own: layer `i` lives at `i + K`. No
weights are copied and no family needs code of its own (arXiv:2407.03856; METHOD §6).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from qadapter.attention import PackedPairs
from qadapter.errors import ModelError
from qadapter.model.streams import Streams

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_STACKED_TOKENS = 64
"""Most tokens of a decoding step that both branches run as one batch."""

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


class _CacheView:
    """A view of a cache in which the adapted branch's layer `i` lives at `i + shift`."""

    def __init__(self, cache: Any, shift: int) -> None:
        self._cache = cache
        self._shift = shift

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _BranchCache(_CacheView):
    """What the adapted branch alone sees."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(key, value, layer_idx + self._shift, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self._cache.get_seq_length(layer_idx + self._shift)


class _StackedCache(_CacheView):
    """What rows of both branches see, the base's first: each half lives in its own layer."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        (k0, k1), (v0, v1) = key.chunk(2), value.chunk(2)
        base = self._cache.update(k0, v0, layer_idx, *args, **kwargs)
        adapted = self._cache.update(k1, v1, layer_idx + self._shift, *args, **kwargs)
        return tuple(torch.cat(halves) for halves in zip(base, adapted, strict=True))


@contextmanager
def _hooked(hooks: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks at the end of the block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rounding(dtype: torch.dtype) -> float:
    """Return by what share of the largest of them two ways to the same numbers may differ."""
    # Half precision rounds every layer; in full precision only the order of sums differs.
    return 1e-4 if dtype in (torch.float32, torch.float64) else 0.02


def agree(found: Tensor, expected: Tensor) -> bool:
    """Return whether two ways to the same numbers differ by no more than they round."""
    scale = float(expected.float().abs().max().clamp(min=1.0))
    atol = scale * rounding(expected.dtype)
    return torch.allclose(found.float(), expected.float(), atol=atol, rtol=0.0)


def _twice(value: Any, rows: int) -> Any:
    """Return a layer's argument for twice the rows, if it has them.

    Raises:
        ValueError: it has neither these rows nor one for all, so what its first dimension is
            cannot be told from its length.
    """
    if isinstance(value, tuple):
        return tuple(_twice(part, rows) for part in value)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if len(value) not in (1, rows):
        raise ValueError(f"{len(value)} rows in an argument of a layer that is called with {rows}")
    return torch.cat([value, value]) if len(value) == rows else value


class Branches:
    """The part of a `QAdapterModel` that runs its layers: tokens in, `Streams` out."""

    if TYPE_CHECKING:
        peft_model: PeftModel
        config: Any
        dtype: torch.dtype
        device: torch.device
        training: bool
        _base: PreTrainedModel
        _decoder: nn.Module
        _layers: nn.ModuleList
        _norm: nn.Module
        _n_layers: int
        _first: int
        _tuned: list[Any]
        _inside: list[Any]
        _off: bool
        _rounded: dict[int, tuple[tuple[Any, ...], Tensor, Tensor]]

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
        """K, the number of layers that run twice."""
        return self._n_layers - self._first

    def streams(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        spans: Tensor | None = None,
        trunk: Tensor | None = None,
        **inputs: Any,
    ) -> Streams:
        """Return the final hidden states of both branches for `[B, T]` tokens.

        With `past_key_values` (a transformers cache of L + K layers) both branches append to it.
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
        if trunk is not None:
            return Streams(self._branch(trunk, self._arguments(inputs)), None)
        inputs |= {"past_key_values": past_key_values, "use_cache": past_key_values is not None}
        if past_key_values is not None and self._pays_to_stack(input_ids) and self.stacks:
            return self._stacked(inputs, past_key_values)
        return self._two_passes(inputs, past_key_values)

    def _two_passes(self, inputs: dict[str, Any], cache: Any) -> Streams:
        """Return both branches from a base pass and another one over its last K layers."""
        calls: _Calls = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        hooks = [
            layer.register_forward_pre_hook(catch, with_kwargs=True)
            for layer in self._layers[self._first :]
        ]
        with _hooked(hooks), torch.no_grad(), self.adapter_off():
            base = self._decoder(**inputs).last_hidden_state
        args, kwargs = calls[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        return Streams(self._branch(hidden, calls, cache), base, hidden)

    def _pays_to_stack(self, input_ids: Tensor | None) -> bool:
        few = input_ids is not None and input_ids.numel() <= _STACKED_TOKENS
        # More adapters than one may have been switched on since `stacks` was tried.
        one = len(self.peft_model.active_adapters) == 1
        return few and bool(self._inside) and one and not (torch.is_grad_enabled() or self.training)

    @cached_property
    def stacks(self) -> bool:
        """Whether one pass over rows of both branches gives what two give, tried on a small step.

        False for adapters that are more than one pair of low-rank maps, and for bases whose layers
        are called with something that is not there twice.
        """
        name = self.peft_model.active_adapters
        if len(name) != 1 or any(
            name[0] not in m.lora_A or getattr(m, "lora_variant", None) for m in self._inside
        ):
            return False
        ids = torch.arange(1, 15, device=self.device).view(2, 7)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        positions = mask.cumsum(1) - 1
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        with torch.no_grad():
            for step, states in zip((self._two_passes, self._stacked), found, strict=True):
                cache = DynamicCache(config=self.config)
                given = {"past_key_values": cache, "use_cache": True}
                # Several tokens and one: in the latter, rows are not told from flattened tokens.
                steps = (slice(3), self._two_passes), (slice(3, 6), step), (slice(6, 7), step)
                for columns, run in steps:
                    part = {
                        "input_ids": ids[:, columns],
                        "attention_mask": mask[:, : columns.stop],
                        "position_ids": positions[:, columns].clamp(min=0),
                    }
                    try:
                        streams = run({**given, **part}, cache)
                    except (AttributeError, TypeError, ValueError, RuntimeError):
                        return False
                    states += [streams.adapted, streams.base]
        two, one = (torch.cat(states, dim=1) for states in found)
        return agree(one, two)

    def _stacked(self, inputs: dict[str, Any], cache: Any) -> Streams:
        """Return both branches from one pass: from the trunk on each token is there twice.

        The weights are read once, which is most of the time where tokens are few.
        """
        rows = len(inputs["input_ids"])
        view = _StackedCache(cache, self.branch_depth)
        name = cast(str, self.peft_model.active_adapter)
        # Most arguments are the same for every layer. Kept beside what they became, so that no
        # other value gets the id of one that is gone.
        known: dict[int, tuple[Any, Any]] = {id(cache): (cache, view)}

        def twice(value: Any) -> Any:
            if id(value) not in known:
                known[id(value)] = value, _twice(value, rows)
            return known[id(value)][1]

        def stack(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if len(hidden) == 2 * rows:
                # After the first of these layers the hidden states come with all their rows.
                known[id(hidden)] = hidden, hidden
            return tuple(map(twice, args)), {k: twice(v) for k, v in kwargs.items()}

        def adapt(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if len(args[0]) != 2 * rows:
                raise ValueError(f"{len(args[0])} rows reach a linear map of a layer of {2 * rows}")
            x, out = args[0][rows:].flatten(0, -2), output[rows:]
            down, up = self._low_rank(module, name, x.dtype)
            out.view(-1, out.shape[-1]).addmm_(x @ down, up)
            return output

        hooks = [
            layer.register_forward_pre_hook(stack, with_kwargs=True)
            for layer in self._layers[self._first :]
        ]
        hooks += [module.register_forward_hook(adapt) for module in self._inside]
        with _hooked(hooks), self.adapter_off():
            states = self._decoder(**inputs).last_hidden_state
        base, adapted = states.chunk(2)
        return Streams(adapted, base)

    def _low_rank(self, module: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a LoRA layer's two maps as a step uses them, `[in, r]` and `[r, out]`.

        Rounded as `fused.lora_linear` rounds them, or the two ways drift apart layer by layer; kept
        for the next token while the parameters are the same.
        """
        low, high = module.lora_A[name].weight, module.lora_B[name].weight
        scaling = module.scaling[name]
        key = (low.data_ptr(), low._version, high.data_ptr(), high._version, scaling, dtype)
        kept = self._rounded.get(id(module))
        if kept is None or kept[0] != key:
            kept = key, low.detach().to(dtype).T, (high.detach() * scaling).to(dtype).T
            self._rounded[id(module)] = kept
        return kept[1], kept[2]

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

    def _branch(self, hidden: Tensor, calls: _Calls, past_key_values: Any = None) -> Tensor:
        """Return h_θ: the last K layers from the trunk's output, as the base was called."""
        branch = _BranchCache(past_key_values, self.branch_depth)
        swap = {id(past_key_values): branch} if past_key_values is not None else {}
        for layer, (args, kwargs) in zip(self._layers[self._first :], calls, strict=True):
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
        with torch.no_grad():
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

        False where pairs cannot be packed or the decoder does more between its layers than call
        them one after another.
        """
        if not self.packs:
            return False
        row: dict[str, Any] = {
            "input_ids": torch.tensor([[1, 2, 3, 1, 2]], device=self.device),
            "position_ids": torch.tensor([[0, 1, 2, 2, 3]], device=self.device),
            "spans": torch.tensor([[0, 2, 1, 2]], device=self.device),
        }
        with torch.no_grad():
            whole = self.streams(**row)
            try:
                alone = self.streams(**row, trunk=whole.trunk).adapted
            except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
                return False
        return torch.equal(alone, whole.adapted)

    @property
    def trunk_key(self) -> dict[str, Any]:
        """What trunk activations and base scalars depend on besides weights and tokens."""
        config = self._base.config.to_dict()
        config.pop("_name_or_path", None)
        return {
            "config": json.loads(json.dumps(config, default=str)),
            "attention": self._base.config._attn_implementation,
            "first_layer": self._first,
            "dtype": str(self.dtype),
            # Whether float32 is multiplied as such, or in TF32 or bfloat16.
            "matmul": [getattr(b.matmul, "fp32_precision", "") for b in _MATMUL_BACKENDS],
            "device": self.device.type,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }
