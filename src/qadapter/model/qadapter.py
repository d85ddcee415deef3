"""The model that users meet: a frozen base, a LoRA adapter and the policy they make together."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter import hub
from qadapter.attention import let_pack
from qadapter.config import QConfig
from qadapter.decoder import decoder_layers
from qadapter.errors import ArtefactError, ConfigError, ModelError, TrainingError
from qadapter.files import whole_files
from qadapter.lora import speed_up
from qadapter.model.adapter import check_state, find_weights, lora_config, save_plain
from qadapter.model.branches import Branches
from qadapter.model.composed import Composed, describe, tuned_modules
from qadapter.model.heads import Heads
from qadapter.model.stacked import agree
from qadapter.model.streams import Streams

_log = logging.getLogger(__name__)

Strengths = float | Sequence[float] | Sequence[Sequence[float]] | Tensor
"""s: a number; of one adapter one a row, `[B]`; of A adapters one each, `[A]`, or `[B, A]`."""


def _checked_strength(
    strength: Any, adapters: int, rows: int | None = None
) -> float | tuple[float, ...] | Tensor:
    """Return a strength as one number, one for each of several adapters, or a tensor by rows.

    Raises:
        ValueError: one is negative or not finite, or there are too many or too few.
    """
    if not isinstance(strength, int | float):
        strength = torch.as_tensor(strength, dtype=torch.float32)
    numbers = torch.as_tensor(strength)
    if not bool((numbers.isfinite() & (numbers >= 0)).all()):
        raise ValueError(f"strength: {strength} must be finite and not negative (METHOD §5)")
    if numbers.dim() == 0:
        return float(strength)
    shape = tuple(numbers.shape)
    if adapters > 1 and shape == (adapters,):
        # No tensor: transformers would give each beam of a row one of its own.
        return tuple(numbers.tolist())
    row = () if adapters == 1 else (adapters,)
    if shape != (shape[0] if rows is None else rows, *row):
        wanted = "one number or one a row"
        if adapters > 1:
            wanted = f"one number, or one for each of {adapters} adapters, or so many a row"
        raise ValueError(f"strength: {shape} given, need {wanted}")
    return cast(Tensor, strength)


def _end_base_dropout(peft_model: nn.Module) -> None:
    """Let the base compute in training what it does in use: π1 is one policy, and is kept on disk.

    Attention's dropout is no module of its own in most families, but a rate beside its maps.
    """
    for name, module in peft_model.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in [n for n, v in vars(module).items() if "drop" in n and isinstance(v, float)]:
            setattr(module, rate, 0.0)


class QAdapterModel(Composed, Branches, Heads, PreTrainedModel, GenerationMixin):
    """A frozen base, a LoRA adapter and the policy they make together (METHOD M2).

    `model(**inputs, strength=s)` and `model.generate(**inputs, strength=s)` work on the composition
    `π_s ∝ exp[(s·Q̂ + α0·log π1)/α̃]`; `strength` is a number or one number a row. Build one with
    `QAdapterModel.create` (untrained) or `QAdapterModel.from_pretrained` (saved); `add` puts more
    saved adapters beside it, and then their residuals add: `strength` is one number for all, or
    one for each adapter, or a list of those for each row.
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
        layers = decoder_layers(decoder, n_layers)
        tuned, inside = tuned_modules(base, layers)
        adapter = describe("adapter", peft_model.active_adapters[0], q_config, inside, n_layers)
        super().__init__(self.lengthened(base.config, [adapter]))
        self.peft_model = peft_model
        self.q_config = q_config
        self.adapters = (adapter,)
        # Without a base's penalties and temperatures: with them `generate` would not be the policy,
        # and servers, which read them or not, would each say something else.
        self.generation_config = hub.token_ids(base.generation_config)
        # What engines that split a model take as one piece.
        self._no_split_modules = [type(layers[0]).__name__]
        self._n_layers = n_layers
        self._rounded, self._stackable = {}, {}
        self._off = False
        self._tuned, self._inside = tuned, inside
        # Held without registering them a second time as submodules.
        self.__dict__["_base"] = base
        self.__dict__["_decoder"] = decoder
        self.__dict__["_layers"] = layers
        self._softcap = getattr(base.config, "final_logit_softcapping", None)
        self._path = next(n for n, m in base.named_modules() if m is decoder).split(".")
        self._scaled_head = False
        self.shares_trunk = True
        """Whether the branches begin from a common trunk; else each passes through all layers."""
        _end_base_dropout(peft_model)
        self._choose_streams()
        self._plain_head = self._has_plain_head()

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
        lora = lora_config(
            base,
            lora_r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,
            layers_to_transform=layers_to_transform,
            trunk=trunk,
        )
        names = sorted(cast("set[str]", lora.target_modules))
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
        # What a decoder of another build raises when it is taken apart or called; told as one.
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
        weights = find_weights(directory)
        if base is None:
            asked = q_config.base_quantization if check_base else ""
            base = hub.load_base(
                q_config.base_model, dtype=dtype, device=device, quantization=asked
            )
        if (now := hub.quantization_of(base)) != q_config.base_quantization:
            _log.warning(
                "%s: was trained on a base held in %s and is served on one in %s: the policy is "
                "another one, by as much as rounding moved the base; which base it is cannot be "
                "checked",
                directory,
                q_config.base_quantization or "full precision",
                now or "full precision",
            )
        elif check_base and q_config.base_hash and hub.weights_hash(base) != q_config.base_hash:
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
        check_state(weights, state, peft_model)
        return cls(peft_model, q_config)

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, **_: Any
    ) -> None:
        """Write the adapter's files: a plain peft directory with `qadapter_config.json`.

        Each file appears whole or not at all; other files of the directory stay. Where an engine
        has split the weights, all processes must come here and the main one writes.

        Raises:
            TrainingError: a weight is not finite; nothing is written.
            ConfigError: it holds several adapters; each has a directory of its own.
            UserError: the directory cannot be written or the disk is full.
        """
        if len(self.adapters) > 1:
            raise ConfigError(
                f"{save_directory}: {len(self.adapters)} adapters are no adapter of their own; "
                "export them by --format policy."
            )
        state = self.adapter_state()
        if not all(bool(t.isfinite().all()) for t in state.values()):
            raise TrainingError(
                f"{save_directory}: the adapter's weights are no longer finite and are not saved; "
                "go back to an older checkpoint and try a lower learning_rate or bf16=false."
            )
        if not is_main_process:
            return
        with whole_files(save_directory) as partial:
            save_plain(self.peft_model, partial, state)
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
            check_state(Path(directory), state, self.peft_model)
            self._set_adapter(state)
        except ArtefactError:
            raise
        except Exception as error:  # safetensors and peft each raise their own
            raise ArtefactError(
                f"{directory}: adapter weights cannot be loaded ({error}); use an older checkpoint."
            ) from error

    def _set_adapter(self, state: dict[str, Tensor]) -> None:
        split = [p for p in self.adapter_parameters().values() if hasattr(p, "ds_id")]
        if split:
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters(split, modifier_rank=0):
                set_peft_model_state_dict(self.peft_model, state)
            return
        if not any(isinstance(p, DTensor) for p in self.adapter_parameters().values()):
            set_peft_model_state_dict(self.peft_model, state)
            return
        with torch.no_grad():
            for name, held in get_peft_model_state_dict(
                self.peft_model, save_embedding_layers=False
            ).items():
                full = state[name].to(held.device, held.dtype)
                held.copy_(distribute_tensor(full, held.device_mesh, held.placements))

    def _choose_streams(self) -> None:
        """Choose how head and streams are computed: as fast as reproduces the base's own logits.

        What a family does beyond the usual (a logit scale, a second norm, a state that the branch's
        view of the cache does not shift) is found before it can be trained or served wrongly.

        Raises:
            ModelError: no way does.
        """
        ids = torch.arange(1, 5, device=self.device)[None]
        with torch.no_grad(), self.adapter_off():
            states = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
            logits = self._base(input_ids=ids, use_cache=False).logits
            self._scaled_head = not agree(self.head(states), logits)
            if agree(self.head(states), logits):
                if self._reproduces(ids, logits):
                    return
                (adapter,) = self.adapters
                self.shares_trunk = False
                self._have((dataclasses.replace(adapter, first=0, depth=self._n_layers),))
                if self._reproduces(ids, logits):
                    _log.warning(
                        "%s: its decoder cannot be split into a shared trunk and two branches, so "
                        "base and policy pass through all layers each: a token costs %d layers, "
                        "where it would %d, and no trunk is kept",
                        self.base_name,
                        2 * self._n_layers,
                        self._n_layers + adapter.depth,
                    )
                    return
        raise ModelError(
            f"{self.base_name}: this architecture is not supported (its own logits are not "
            "reproduced, with a cache and without); choose another base."
        )

    def _reproduces(self, ids: Tensor, logits: Tensor) -> bool:
        """Return whether the streams have these logits, read at once and in two steps."""
        cache = DynamicCache(config=self.config)
        try:
            steps = [self.streams(part, past_key_values=cache) for part in ids.split(3, dim=1)]
            found = self.streams(ids).adapted, torch.cat([step.adapted for step in steps], dim=1)
            return all(agree(self.head(states), logits) for states in found)
        except torch.OutOfMemoryError:
            raise
        # What a decoder of another build raises when it is taken apart or called.
        except (ModelError, AttributeError, LookupError, TypeError, ValueError, RuntimeError):
            return False

    @property
    def base(self) -> PreTrainedModel:
        """The base, its adapted maps wrapped by peft."""
        return self._base

    # ── transformers' interface ─────────────────────────────────────────────────────────────────

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        strength: Strengths = 1.0,
        logits_to_keep: int | Tensor = 0,
        output_streams: bool = False,
        labels: None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Streams | tuple[Any, ...]:
        """Return the policy's next-token logits `[B, T, V]` at `strength` (METHOD M2).

        Args:
            strength: s, one number or `[B]`; of A adapters one number, `[A]` or `[B, A]`. 0 is the
                base (α0 = α̃), 1 the trained policy, other values approximate retraining with
                another weight, token by token; so do sums of several adapters.
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
        checked = _checked_strength(strength, len(self.adapters), len(streams.base))
        logits = self.policy_logits(streams.at((slice(None), keep)), checked)
        out = CausalLMOutputWithPast(logits=cast(Any, logits), past_key_values=past_key_values)
        return cast(tuple[Any, ...], out.to_tuple()) if return_dict is False else out

    def generate(self, *args: Any, strength: Strengths = 1.0, **kwargs: Any) -> Any:
        """Run transformers' `generate` on the policy; `strength` as in `forward`.

        Raises:
            ValueError: a strength is negative or not finite, or classifier-free guidance is asked
                for, whose second pass knows no strength.
        """
        config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("guidance_scale", getattr(config, "guidance_scale", None)) not in (None, 1):
            raise ValueError("guidance_scale: not supported on a Q-adapter; use strength instead")
        strength = _checked_strength(strength, len(self.adapters))
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

    def adapter_state(self) -> dict[str, Tensor]:
        """Return a copy of the adapter's whole weights by name; of split ones all must ask."""
        return {n: hub.whole(p).clone() for n, p in self.adapter_parameters().items()}

    @property
    def outer_modules(self) -> list[nn.Module]:
        """What is not in the layers: embeddings, the final norm and the head."""
        around = [m for m in self._decoder.children() if m is not self._layers]
        return [*around, self.get_output_embeddings()]

    def base_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter that is not the adapter's."""
        return ((n, p) for n, p in self.peft_model.named_parameters() if "lora_" not in n)
