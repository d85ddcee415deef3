"""All branches of a decoding step in one pass: from where it forks, each token is there once more.

The weights are read once, which is most of the time where tokens are few. Rows are the base's, then
those of each branch in the order in which they fork; a branch that adapts fewer layers joins later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from qadapter.model.streams import Adapter, Streams

if TYPE_CHECKING:
    from peft import PeftModel

_STACKED_TOKENS = 64
"""Most tokens of a decoding step that all branches run as one batch."""


class CacheView:
    """A cache whose layers another one finds in other places."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _StackedCache(CacheView):
    """What rows of all branches see, the base's first: each part lives in its own layer."""

    def __init__(self, cache: Any, shifts: dict[int, list[int]]) -> None:
        super().__init__(cache)
        self._shifts = shifts

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        shifts = [0, *self._shifts.get(layer_idx, ())]
        parts = zip(shifts, key.chunk(len(shifts)), value.chunk(len(shifts)), strict=True)
        held = [self._cache.update(k, v, layer_idx + s, *args, **kwargs) for s, k, v in parts]
        return held[0] if len(held) == 1 else tuple(map(torch.cat, zip(*held, strict=True)))


@contextmanager
def hooked(hooks: Sequence[Any]) -> Iterator[None]:
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


def _times(value: Any, rows: int, copies: int) -> Any:
    """Return a layer's argument for so many times the rows, if it has them.

    Raises:
        ValueError: it has neither these rows nor one for all, so what its first dimension is
            cannot be told from its length.
    """
    if isinstance(value, tuple):
        return tuple(_times(part, rows, copies) for part in value)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if len(value) not in (1, rows):
        raise ValueError(f"{len(value)} rows in an argument of a layer that is called with {rows}")
    return torch.cat([value] * copies) if len(value) == rows else value


class Stacked:
    """The part of a `QAdapterModel` that runs all branches in one pass, where that pays and works.

    It does not for adapters that are more than one pair of low-rank maps, nor for bases whose
    layers are called with something that cannot be there twice.
    """

    if TYPE_CHECKING:
        peft_model: PeftModel
        adapters: tuple[Adapter, ...]
        device: torch.device
        training: bool
        adapter_off: Any
        lengthened: Any
        _two_passes: Any
        _base: Any
        _decoder: nn.Module
        _layers: nn.ModuleList
        _n_layers: int
        _inside: list[tuple[int, Any]]
        _rounded: dict[tuple[int, str], tuple[tuple[Any, ...], Tensor, Tensor]]
        _stackable: dict[tuple[Adapter, ...], bool]

    def _pays_to_stack(self, input_ids: Tensor | None) -> bool:
        few = input_ids is not None and input_ids.numel() <= _STACKED_TOKENS
        # By peft, more adapters than one may have been switched on since `_stacks` was tried.
        one = len(self.peft_model.active_adapters) == 1
        return few and bool(self._inside) and one and not (torch.is_grad_enabled() or self.training)

    @property
    def stacks(self) -> bool:
        """Whether one pass over rows of all branches gives what a pass for each gives."""
        return self._stacks(self.adapters)

    def _stacks(self, adapters: tuple[Adapter, ...]) -> bool:
        """Return it for these adapters, tried once on a small step."""
        if adapters not in self._stackable:
            self._stackable[adapters] = self._try_stacking(adapters)
        return self._stackable[adapters]

    def _try_stacking(self, adapters: tuple[Adapter, ...]) -> bool:
        plain = all(
            hasattr(m, "lora_A") and not getattr(m, "lora_variant", None) for _, m in self._inside
        )
        if not plain or len(self.peft_model.active_adapters) != 1:
            return False
        ids = torch.arange(1, 15, device=self.device).view(2, 7)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        positions = mask.cumsum(1) - 1
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        with torch.no_grad():
            for step, states in zip((self._two_passes, self._stacked), found, strict=True):
                cache = DynamicCache(config=self.lengthened(self._base.config, adapters))
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
                        streams = run({**given, **part}, cache, adapters)
                    except (AttributeError, TypeError, ValueError, RuntimeError):
                        return False
                    states += [*streams.branches, streams.base]
        two, one = (torch.cat(states, dim=1) for states in found)
        return agree(one, two)

    def _stacked(
        self, inputs: dict[str, Any], cache: Any, adapters: tuple[Adapter, ...]
    ) -> Streams:
        """Return all branches from one pass."""
        rows = len(inputs["input_ids"])
        order = sorted(adapters, key=lambda adapter: adapter.first)
        forked = {i: [a for a in order if a.first <= i] for i in range(self._n_layers)}
        shifts = cache_shifts(adapters)
        view = _StackedCache(cache, {i: [shifts[a] for a in at] for i, at in forked.items()})
        # Most arguments are the same for every layer. Kept beside what they became, so that no
        # other value gets the id of one that is gone.
        known: dict[tuple[int, int], tuple[Any, Any]] = {}

        def copied(value: Any, copies: int) -> Any:
            if value is cache:
                return view
            key = id(value), copies
            if key not in known:
                known[key] = value, _times(value, rows, copies)
            return known[key][1]

        def stack(
            index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            copies = 1 + len(forked[index])
            before = 1 + len(forked.get(index - 1, ()))
            if len(hidden) != before * rows:
                raise ValueError(f"{len(hidden)} rows reach a layer of {before * rows}")
            # Only the first layers of branches find fewer rows than they want.
            whole = hidden
            if copies > before:
                whole = torch.cat([hidden, *[hidden[:rows]] * (copies - before)])
            known[id(hidden), copies] = hidden, whole
            return (
                tuple(copied(a, copies) for a in args),
                {k: copied(v, copies) for k, v in kwargs.items()},
            )

        def adapt(
            branches: list[Adapter], module: Any, args: tuple[Any, ...], output: Tensor
        ) -> Tensor:
            if len(args[0]) != (1 + len(branches)) * rows:
                raise ValueError(f"{len(args[0])} rows reach a linear map of a stacked layer")
            for place, adapter in enumerate(branches, start=1):
                if adapter.key in module.lora_A:
                    part = slice(place * rows, (place + 1) * rows)
                    x, out = args[0][part].flatten(0, -2), output[part]
                    down, up = self._low_rank(module, adapter.key, x.dtype)
                    out.view(-1, out.shape[-1]).addmm_(x @ down, up)
            return output

        hooks = [
            self._layers[i].register_forward_pre_hook(partial(stack, i), with_kwargs=True)
            for i, branches in forked.items()
            if branches
        ]
        hooks += [
            module.register_forward_hook(partial(adapt, forked[i]))
            for i, module in self._inside
            if forked[i]
        ]
        off: AbstractContextManager[None] = self.adapter_off()
        with hooked(hooks), off:
            states = self._decoder(**inputs).last_hidden_state
        base, *parts = states.chunk(1 + len(order))
        of = dict(zip(order, parts, strict=True))
        first, *more = (of[adapter] for adapter in adapters)
        return Streams(first, base, None, tuple(more))

    def _low_rank(self, module: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a LoRA layer's two maps as a step uses them, `[in, r]` and `[r, out]`.

        Rounded as `fused.lora_linear` rounds them, or the two ways drift apart layer by layer; kept
        for the next token while the parameters are the same.
        """
        low, high = module.lora_A[name].weight, module.lora_B[name].weight
        scaling = module.scaling[name]
        key = (low.data_ptr(), low._version, high.data_ptr(), high._version, scaling, dtype)
        kept = self._rounded.get((id(module), name))
        if kept is None or kept[0] != key:
            kept = key, low.detach().to(dtype).T, (high.detach() * scaling).to(dtype).T
            self._rounded[id(module), name] = kept
        return kept[1], kept[2]


def cache_shifts(adapters: Sequence[Adapter]) -> dict[Adapter, int]:
    """Return how many places behind the base's a layer of each branch lives in the cache.

    The base's L layers come first, then each branch's, one branch after another.
    """
    shifts, total = {}, 0
    for adapter in adapters:
        total += adapter.depth
        shifts[adapter] = total
    return shifts
