"""Base model and LoRA as two streams of hidden states over one shared trunk.

The base pass runs with the adapter off; what it hands to each of its last K layers (masks,
rotary embeddings, positions) is caught, and those layers run again from the trunk's output with the
adapter on, their keys and values in cache entries of their own: layer `i` lives at `i + K`. No
weights are copied and no family needs code of its own (arXiv:2407.03856; METHOD §6).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter import functional, fused, hub
from qadapter.attention import PackedPairs, let_pack
from qadapter.config import QConfig
from qadapter.errors import ArtefactError, ConfigError, ModelError, TrainingError
from qadapter.files import whole_files
from qadapter.lora import speed_up

_STACKED_TOKENS = 64
"""Most tokens of a decoding step that both branches run as one batch."""

_Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""The arguments of each decoder layer in turn."""


class Streams(NamedTuple):
    """Final hidden states, after the last norm, of both branches."""

    adapted: Tensor
    """`[B, T, D]`, h_θ: base and adapter."""
    base_states: Tensor | None
    """`[B, T, D]`, h_1: the base alone, without gradient; None where it was not run."""
    trunk: Tensor | None = None
    """`[B, T, D]`, what enters the first layer that runs twice; only in whole batches."""

    @property
    def base(self) -> Tensor:
        """The base's states.

        Raises:
            ValueError: only its scalars are there.
        """
        if self.base_states is None:
            raise ValueError("the base's states were not computed, only its scalars are known")
        return self.base_states

    def at(self, index: Any) -> Streams:
        """Return both branches at an index of their leading dimensions, as `[M, D]` for a mask."""
        base = self.base_states
        return Streams(self.adapted[index], None if base is None else base[index])

    def to(self, dtype: torch.dtype) -> Streams:
        """Return both branches in `dtype`."""
        base = self.base_states
        return Streams(self.adapted.to(dtype), None if base is None else base.to(dtype))


class BaseScalars(NamedTuple):
    """All that the loss needs of the base where α0 = α̃ (METHOD §2)."""

    taken: Tensor
    """`[N]` float32, z_1(s_t, a_t), the base's logit of the action."""
    following: Tensor
    """`[N]` float32, logsumexp of z_1(s_{t+1}, ·); 0 where the response has ended."""


class QAndV(NamedTuple):
    """What the loss needs of each response token."""

    taken: Tensor
    """`[N]` float32, Q̂(s_t, a_t)."""
    following: Tensor
    """`[N]` float32, V̂(s_{t+1}); 0 where the response has ended."""
    base: BaseScalars | None = None
    """The base's part of them; None where the head is not one plain linear map."""


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


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Return whether two ways to the same numbers differ by no more than they round."""
    scale = float(expected.float().abs().max().clamp(min=1.0))
    # Half precision rounds every layer; in full precision only the order of sums differs.
    share = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.02
    return torch.allclose(found.float(), expected.float(), atol=scale * share, rtol=0.0)


def _twice(value: Any, rows: int) -> Any:
    """Return a layer's argument for twice the rows, if it has them."""
    if isinstance(value, tuple):
        return tuple(_twice(part, rows) for part in value)
    if isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows:
        return torch.cat([value, value])
    return value


def _wide(x: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 where it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _placed(values: Tensor, where: Tensor) -> Tensor:
    """Return `[N]` zeros with `values` where the mask `[N]` is True."""
    return values.new_zeros(len(where)).masked_scatter(where, values)


def _decoder_layers(decoder: nn.Module, n_layers: int) -> nn.ModuleList:
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == n_layers:
            return child
    raise ModelError(
        f"{type(decoder).__name__}: no list of {n_layers} layers was found; "
        "Q-Adapter needs a decoder with one list of layers, choose another base."
    )


def _final_norm(decoder: nn.Module, layers: nn.ModuleList) -> nn.Module:
    """Return the module after the list of layers; `_check_streams` puts it to the test."""
    children = list(decoder.children())
    after = children[[child is layers for child in children].index(True) + 1 :]
    if not after:
        raise ModelError(
            f"{type(decoder).__name__}: no final norm after its layers; choose another base."
        )
    return after[0]


def _check_adapter_config(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path}: missing; train or copy the adapter again.") from error
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: is damaged ({error}); copy or train again.") from error


def _check_state(path: Path, state: dict[str, Tensor], model: PeftModel) -> None:
    """Raise ArtefactError unless the tensors are this adapter's, all there, and finite."""
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    strange, missing = sorted(set(state) - expected), sorted(expected - set(state))
    if strange or missing:
        name, what = (missing[0], "lacks") if missing else (strange[0], "has a foreign")
        raise ArtefactError(
            f"{path}: {what} {name!r}; it is another adapter or cut, copy it again."
        )
    if bad := [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise ArtefactError(f"{path}: {bad[0]!r} is not finite; use an older checkpoint.")


def _checked_strength(strength: Any, rows: int | None = None) -> float | Tensor:
    """Return a strength as a float or a tensor of one a row.

    Raises:
        ValueError: one is negative or not finite, or their number is not the number of rows.
    """
    if not isinstance(strength, (int, float)):
        strength = torch.as_tensor(strength, dtype=torch.float32)
        if strength.dim() == 0:
            strength = float(strength)
    wrong = torch.as_tensor(strength)
    if not bool((wrong.isfinite() & (wrong >= 0)).all()):
        raise ValueError(f"strength: {strength} must be finite and not negative (METHOD §5)")
    if isinstance(strength, Tensor) and (
        strength.dim() != 1 or (rows is not None and len(strength) != rows)
    ):
        raise ValueError(f"strength: {tuple(strength.shape)} given, need one number or one a row")
    return cast("float | Tensor", strength)


def _linear_names(layer: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    names = {
        n.rsplit(".", 1)[-1] for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)
    }
    return sorted(names)


class QAdapterModel(PreTrainedModel, GenerationMixin):
    """A frozen base, a LoRA adapter and the policy they make together (METHOD M2).

    `model(**inputs, strength=s)` and `model.generate(**inputs, strength=s)` work on the composition
    `π_s ∝ exp[(s·Q̂ + α0·log π1)/α̃]`; `strength` is a number or one number a row. Build one with
    `QAdapterModel.create` (untrained) or `QAdapterModel.from_pretrained` (saved).
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    main_input_name = "input_ids"

    def __init__(self, peft_model: PeftModel, q_config: QConfig) -> None:
        base = cast(PreTrainedModel, peft_model.get_base_model())
        let_pack(base)
        speed_up(peft_model)
        decoder = base.get_decoder()
        n_layers = int(base.config.num_hidden_layers)
        layers = _decoder_layers(decoder, n_layers)
        tuned = {n: m for n, m in peft_model.named_modules() if isinstance(m, BaseTunerLayer)}
        inside = [
            i
            for i, layer in enumerate(layers)
            for m in layer.modules()
            if isinstance(m, BaseTunerLayer)
        ]
        head = base.get_output_embeddings()
        outside = len(tuned) - len(inside) - int(isinstance(head, BaseTunerLayer))
        if outside:
            raise ModelError(
                "the adapter changes modules outside the decoder layers and the head "
                "(embeddings?); adapt linear maps of the layers instead."
            )
        first = min(inside) if inside else n_layers - 1
        depth = n_layers - first
        config = copy.deepcopy(base.config)
        config.num_hidden_layers = n_layers + depth
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = list(config.layer_types) + list(config.layer_types[first:])
        super().__init__(config)
        self.peft_model = peft_model
        self.q_config = q_config
        self.generation_config = copy.deepcopy(base.generation_config)
        self._n_layers, self._first = n_layers, first
        self._tuned = list(tuned.values())
        self._inside = [m for m in self._tuned if m is not head]
        # Held without registering them a second time as submodules.
        self.__dict__["_base"] = base
        self.__dict__["_decoder"] = decoder
        self.__dict__["_layers"] = layers
        self.__dict__["_norm"] = _final_norm(decoder, layers)
        self._softcap = getattr(base.config, "final_logit_softcapping", None)
        for name, module in peft_model.named_modules():
            if isinstance(module, nn.Dropout) and "lora_" not in name:
                module.p = 0.0
        self._check_streams()

    # ── construction ────────────────────────────────────────────────────────────────────────────

    @classmethod
    def create(
        cls,
        base: PreTrainedModel,
        q_config: QConfig,
        *,
        lora_r: int = 16,
        lora_alpha: int = 32,
        lora_dropout: float = 0.0,
        target_modules: Sequence[str] | None = None,
        layers_to_transform: Sequence[int] | None = None,
        trunk: float = 0.75,
    ) -> QAdapterModel:
        """Return an untrained Q-adapter on `base`: Q̂ ≡ 0, so the policy is the base.

        Args:
            target_modules: names of linear maps to adapt; default all inside a layer.
            layers_to_transform: layers to adapt; default the last `1 − trunk` of them.
            trunk: share of layers, from the first, that stay common to both streams.

        Raises:
            ConfigError: a layer or module does not exist.
            ModelError: the base's architecture does not give the two streams.
        """
        n_layers = int(base.config.num_hidden_layers)
        layers = _decoder_layers(base.get_decoder(), n_layers)
        chosen = (
            list(layers_to_transform)
            if layers_to_transform is not None
            else list(range(min(round(trunk * n_layers), n_layers - 1), n_layers))
        )
        if not chosen or not all(0 <= i < n_layers for i in chosen):
            raise ConfigError(
                f"layers_to_transform: {chosen} must name layers between 0 and {n_layers - 1}."
            )
        names = (
            list(target_modules)
            if target_modules is not None
            else _linear_names(layers[chosen[-1]])
        )
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=names,
            layers_to_transform=chosen,
        )
        try:
            peft_model = get_peft_model(base, lora)
        except ValueError as error:
            raise ConfigError(
                f"lora_target_modules: {names} cannot be adapted ({error})."
            ) from error
        tuned = [n for n, m in peft_model.named_modules() if isinstance(m, BaseTunerLayer)]
        for name in names:
            if not any(n.endswith(name) for n in tuned):
                raise ConfigError(
                    f"lora_target_modules: {name!r} names no linear map of the adapted layers or "
                    "the head; leave it out."
                )
        try:
            return cls(cast(PeftModel, peft_model), q_config)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(
                f"{type(base).__name__}: this architecture is not supported ({error}); "
                "choose another base."
            ) from error

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        base: PreTrainedModel | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        check_base: bool = True,
        is_trainable: bool = False,
    ) -> QAdapterModel:
        """Load a saved Q-adapter, on its own base or on the one given.

        Raises:
            ArtefactError: the directory is incomplete or damaged, or its base is another one
                (`check_base=False` overrides).
            ModelError: the base cannot be found.
        """
        q_config = QConfig.load(directory)
        weights = Path(directory) / "adapter_model.safetensors"
        _check_adapter_config(Path(directory) / "adapter_config.json")
        if not weights.is_file():
            raise ArtefactError(f"{weights}: missing; train or copy the adapter again.")
        if base is None:
            base = hub.load_base(q_config.base_model, dtype=dtype, device=device)
        if check_base and q_config.base_hash and hub.weights_hash(base) != q_config.base_hash:
            raise ArtefactError(
                f"{directory}: was trained on another base than {base.name_or_path!r}; load "
                f"{q_config.base_model!r}, or pass check_base=False if you know better."
            )
        try:
            state = load_peft_weights(str(directory), device="cpu")
            peft_model = PeftModel.from_pretrained(base, str(directory), is_trainable=is_trainable)
        except Exception as error:  # safetensors, json and peft each raise their own
            raise ArtefactError(
                f"{weights}: cannot be loaded ({error}); the file is damaged, copy or train again."
            ) from error
        _check_state(weights, state, peft_model)
        return cls(peft_model, q_config)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the adapter's files: a plain peft directory with `qadapter_config.json`.

        Each file appears whole or not at all; other files of the directory stay.

        Raises:
            TrainingError: a weight is not finite; nothing is written.
            UserError: the directory cannot be written or the disk is full.
        """
        if not all(bool(p.isfinite().all()) for p in self.adapter_parameters().values()):
            raise TrainingError(
                f"{save_directory}: the adapter's weights are no longer finite and are not saved; "
                "go back to an older checkpoint and try a lower learning_rate or bf16=false."
            )
        with whole_files(save_directory) as partial:
            self.peft_model.save_pretrained(
                str(partial), safe_serialization=True, save_embedding_layers=False
            )
            # peft's template says nothing true about this adapter
            (partial / "README.md").unlink(missing_ok=True)
            dataclasses.replace(self.q_config, qadapter_version=version("qadapter")).save(partial)

    def load_adapter(self, directory: str | Path) -> None:
        """Load the adapter weights of a checkpoint of this same model.

        Raises:
            ArtefactError: the weights are missing, damaged, or of another adapter.
        """
        try:
            if not Path(directory).is_dir():  # peft would ask the Hub for it
                raise FileNotFoundError("no such directory")
            state = load_peft_weights(str(directory), device="cpu")
            _check_state(Path(directory), state, self.peft_model)
            set_peft_model_state_dict(self.peft_model, state)
        except ArtefactError:
            raise
        except Exception as error:  # safetensors and peft each raise their own
            raise ArtefactError(
                f"{directory}: adapter weights cannot be loaded ({error}); use an older checkpoint."
            ) from error

    def _check_streams(self) -> None:
        """Raise ModelError unless the streams reproduce the base's own logits, cached or not.

        Catches a family whose final norm or head does more than ours (a logit scale, a second
        norm), or whose layers keep a state that the branch's view of the cache does not shift,
        before it can be trained or served wrongly.
        """
        ids = torch.arange(1, 5, device=self.device)[None]
        with torch.no_grad(), self.adapter_off():
            ours = self.head(self.streams(ids).adapted)
            theirs = self._base(input_ids=ids, use_cache=False).logits
            cache = DynamicCache(config=self.config)
            steps = [self.streams(part, past_key_values=cache) for part in ids.split(3, dim=1)]
            cached = self.head(torch.cat([step.adapted for step in steps], dim=1))
        for found, what in ((ours, "its head or final norm"), (cached, "its cache")):
            if not _agree(found, theirs):
                raise ModelError(
                    f"{type(self._base).__name__}: this architecture is not supported ({what}); "
                    "choose another base."
                )

    # ── streams ─────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Run the base alone inside the block."""
        # peft's own switch also walks over every parameter: a tenth of a token's time in decoding.
        was = [layer._disable_adapters for layer in self._tuned]
        for layer in self._tuned:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, disabled in zip(self._tuned, was, strict=True):
                layer._disable_adapters = disabled

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
        """
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
        adapted = bool(self._inside) and not self._inside[0].disable_adapters
        return few and adapted and not (torch.is_grad_enabled() or self.training)

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
        ids = torch.arange(1, 9, device=self.device).view(2, 4)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        positions = mask.cumsum(1) - 1
        found = []
        with torch.no_grad():
            for step in (self._two_passes, self._stacked):
                cache = DynamicCache(config=self.config)
                given = {"past_key_values": cache, "use_cache": True}
                for columns, run in ((slice(3), self._two_passes), (slice(3, 4), step)):
                    part = {
                        "input_ids": ids[:, columns],
                        "attention_mask": mask[:, : columns.stop],
                        "position_ids": positions[:, columns].clamp(min=0),
                    }
                    try:
                        streams = run({**given, **part}, cache)
                    except (AttributeError, TypeError, ValueError, RuntimeError):
                        return False
                found.append(torch.cat([streams.adapted, streams.base]))
        two, one = found
        return _agree(one, two)

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
            # After the first of these layers the hidden states come with all their rows.
            return tuple(map(twice, args)), {k: twice(v) for k, v in kwargs.items()}

        def adapt(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            low, high = module.lora_A[name], module.lora_B[name]
            change = high(low(args[0][rows:].to(low.weight.dtype)))
            output[rows:] += change.mul_(module.scaling[name])
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
        expected = torch.cat([alone[0], alone[1][2:]]).float()
        scale = float(expected.abs().max().clamp(min=1.0))
        return torch.allclose(row.float(), expected, atol=scale * 0.02, rtol=0.0)

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
            "device": self.device.type,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }

    @property
    def scalars_suffice(self) -> bool:
        """Whether the loss needs of the base only `BaseScalars` (METHOD §2)."""
        q = self.q_config
        plain = q.parameterization == "residual" and q.alpha_0 == q.alpha_tilde
        return plain and self.head_weight is not None

    # ── heads ───────────────────────────────────────────────────────────────────────────────────

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of final hidden states `[..., D]`, soft-capped where the base does."""
        logits = cast(Tensor, self._base.get_output_embeddings()(hidden))
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    @property
    def head_weight(self) -> Tensor | None:
        """`[V, D]` where the head is a plain linear map, so one head serves a mix; else None."""
        head = self._base.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and not self._softcap
        return head.weight if plain else None

    def mix(self, streams: Streams, strength: float | Tensor) -> Tensor:
        """Return the hidden state whose logits are the policy's, up to a constant per position.

        `s·h_θ + (α0/α̃ − s)·h_1` for residual, `(s·h_θ + α0·h_1)/α̃` for raw (METHOD M2).
        """
        q = self.q_config
        if q.parameterization == "residual":
            weights = strength, q.alpha_0 / q.alpha_tilde - strength
        else:
            weights = strength / q.alpha_tilde, q.alpha_0 / q.alpha_tilde
        if streams.base_states is None and weights == (1.0, 0.0):
            return streams.adapted
        # Mixed in float32: at strength 1 the base's part is exactly zero, at 0 the adapter's.
        mixed = weights[0] * _wide(streams.adapted) + weights[1] * _wide(streams.base)
        return mixed.to(streams.adapted.dtype)

    def policy_logits(self, streams: Streams, strength: float | Tensor = 1.0) -> Tensor:
        """Return logits of π_s for final hidden states `[B, T, D]` (or `[M, D]`): `[B, T, V]`."""
        if isinstance(strength, Tensor):
            shape = (-1,) + (1,) * (streams.adapted.dim() - 1)
            strength = strength.to(streams.adapted.device, torch.float32).reshape(shape)
        if self.head_weight is not None:
            return self.head(self.mix(streams, strength))
        with self.adapter_off():
            base_logits = self.head(streams.base)
        # Two heads: the same mix, of logits.
        return self.mix(Streams(self.head(streams.adapted), base_logits), strength)

    def kl_from_base(self, streams: Streams, strength: float = 1.0) -> Tensor:
        """Return KL(π1 ‖ π_s) in nats at M states `[M, D]`; gradients flow to the policy."""
        weight = self.head_weight
        if weight is not None:
            streams = streams.to(weight.dtype)
            return fused.linear_kl(streams.base, self.mix(streams, strength), weight)
        with torch.no_grad(), self.adapter_off():
            logp = _wide(self.head(streams.base)).log_softmax(-1)
        logq = _wide(self.policy_logits(streams, strength)).log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1)

    def q_and_v(
        self,
        streams: Streams,
        actions: Tensor,
        taken: Tensor,
        following: Tensor,
        continues: Tensor,
        *,
        base: BaseScalars | None = None,
        strength: float = 1.0,
    ) -> QAndV:
        """Return s·Q̂(s_t, a_t) and V̂(s_{t+1}) of N response tokens from M states (METHOD M1, §2).

        V̂ is 0 where a response has ended; it is computed nowhere else but where it is used.

        Args:
            streams: final hidden states `[M, D]` of both branches.
            actions: `[N]` int64 token ids.
            taken: `[N]` indices of the states in which the actions are taken.
            following: `[N]` indices of the states they lead to.
            continues: `[N]` bool, False where the action ends its response.
            base: the base's scalars, where they are known (see `scalars_suffice`).
        """
        weight = self.head_weight
        if weight is None:
            return self._q_and_v_two_heads(streams, actions, taken, following, continues, strength)
        q = self.q_config
        # accelerate hands autocast outputs back in float32; the head wants its own dtype.
        streams = streams.to(weight.dtype)
        # At least float32 from here on: rewards are differences of close numbers.
        rows = _wide(weight[actions])
        z_theta = (_wide(streams.adapted[taken]) * rows).sum(-1)
        later = streams.at(following[continues])
        lse_mix = fused.linear_logsumexp(self.mix(later, strength), weight)
        if base is None:
            with torch.no_grad():
                z_base = (_wide(streams.base[taken]) * rows).sum(-1)
                lse_base = fused.linear_logsumexp(later.base, weight)
            base = BaseScalars(z_base, _placed(lse_base, continues))
        scale = q.alpha_0 / q.alpha_tilde
        value = q.alpha_tilde * (lse_mix - scale * base.following[continues])
        q_taken = (
            q.alpha_tilde * (z_theta - base.taken) if q.parameterization == "residual" else z_theta
        )
        return QAndV(strength * q_taken, _placed(value, continues), base)

    def _q_and_v_two_heads(
        self,
        streams: Streams,
        actions: Tensor,
        taken: Tensor,
        following: Tensor,
        continues: Tensor,
        strength: float,
    ) -> QAndV:
        q = self.q_config
        logits = _wide(self.head(streams.adapted))
        with torch.no_grad(), self.adapter_off():
            base_logits = _wide(self.head(streams.base))
        if q.parameterization == "residual":
            values = functional.residual_q(logits, base_logits, alpha_tilde=q.alpha_tilde)
        else:
            values = functional.raw_q(logits)
        values = strength * values
        soft = functional.soft_value(
            values,
            base_logits.log_softmax(-1),
            alpha_0=q.alpha_0,
            alpha_tilde=q.alpha_tilde,
        )
        return QAndV(values[taken, actions], _placed(soft[following[continues]], continues))

    # ── transformers' interface ─────────────────────────────────────────────────────────────────

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        strength: float | Sequence[float] | Tensor = 1.0,
        logits_to_keep: int | Tensor = 0,
        output_streams: bool = False,
        labels: None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Streams | tuple[Any, ...]:
        """Return the policy's next-token logits `[B, T, V]` at `strength` (METHOD M2).

        Args:
            strength: s, one number or `[B]`; 0 is the base (α0 = α̃), 1 the trained policy, other
                values approximate retraining with another weight, token by token.
            logits_to_keep: as in transformers: only the last so many positions.
            output_streams: return the hidden states `Streams` instead, for the loss.

        Raises:
            ValueError: a strength is negative, not finite, or not one a row; or labels are given,
                since a Q-adapter is trained on pairs, by `QAdapterTrainer`.
        """
        if labels is not None:
            raise ValueError("labels: a Q-adapter has no such loss; train it with QAdapterTrainer")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        streams = self.streams(input_ids, attention_mask, past_key_values, **kwargs)
        if output_streams:
            return streams
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        checked = _checked_strength(strength, len(streams.base))
        logits = self.policy_logits(streams.at((slice(None), keep)), checked)
        out = CausalLMOutputWithPast(logits=cast(Any, logits), past_key_values=past_key_values)
        return cast(tuple[Any, ...], out.to_tuple()) if return_dict is False else out

    def generate(
        self, *args: Any, strength: float | Sequence[float] | Tensor = 1.0, **kwargs: Any
    ) -> Any:
        """Run transformers' `generate` on the policy; `strength` is a number or one a row.

        Raises:
            ValueError: a strength is negative or not finite, or classifier-free guidance is asked
                for, whose second pass knows no strength.
        """
        config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("guidance_scale", getattr(config, "guidance_scale", None)) not in (None, 1):
            raise ValueError("guidance_scale: not supported on a Q-adapter; use strength instead")
        strength = _checked_strength(strength)
        return super().generate(*args, strength=strength, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's token embeddings."""
        return cast(nn.Module, self._base.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        """Return the base's head."""
        return cast(nn.Module, self._base.get_output_embeddings())

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute activations of the branch in the backward pass, to save memory."""
        self._base.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._base.gradient_checkpointing_disable()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by name.

        Raises:
            TrainingError: there are none.
        """
        found = {n: p for n, p in self.peft_model.named_parameters() if "lora_" in n}
        if not found:
            raise TrainingError("nothing to train: the model has no adapter; check lora settings.")
        return found

    def base_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter that is not the adapter's."""
        return ((n, p) for n, p in self.peft_model.named_parameters() if "lora_" not in n)
