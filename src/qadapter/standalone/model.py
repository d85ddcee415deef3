"""An exported policy as an ordinary transformers model with an ordinary cache of L + K layers.

It is the base's own decoder, built with K more layers. Each layer is called as the decoder calls
it, with its masks and positions; two kinds of hooks make the line of layers fork: one notes what
enters the base's layer L − K, the other hands that to layer L and keeps what would have gone in.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter.decoder import decoder_layers, final_norm
from qadapter.functional import mix
from qadapter.standalone.config import QAdapterPolicyConfig


class _Pass:
    """One forward pass: what was noted on its way."""

    def __init__(self) -> None:
        self.trunks: dict[int, Tensor] = {}
        """What enters the first layer of each branch."""
        self.ends: list[Tensor] = []
        """What the base's layers gave, and each branch's but the last, before the final norm."""


# Of the pass that this thread is in: a model may be called from several.
_PASS: ContextVar[_Pass] = ContextVar("qadapter_pass")

_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _note(branch: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note what enters a layer as the trunk of a branch."""
    _PASS.get().trunks[branch] = args[0] if args else kwargs["hidden_states"]


def _fork(branch: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """Keep what would enter a layer, and let it begin from the branch's trunk."""
    found = _PASS.get()
    found.ends.append(args[0] if args else kwargs["hidden_states"])
    trunk = found.trunks[branch]
    return ((trunk, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": trunk})


class QAdapterForCausalLM(PreTrainedModel, GenerationMixin):
    """A policy π_s without peft, as `qadapter export --format policy` writes it.

    `model.config.strength` may be set at any time; every cache stays valid, for no key or value
    depends on it.
    """

    config_class = QAdapterPolicyConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: QAdapterPolicyConfig) -> None:
        config.check()
        super().__init__(config)
        text = config.text_config
        self.model = AutoModel.from_config(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        embeddings = self.model.get_input_embeddings()
        name = next(n for n, m in self.model.named_modules() if m is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        layers = decoder_layers(self.model, text.num_hidden_layers)
        # Held without registering it a second time as a submodule.
        self.__dict__["_norm"] = final_norm(self.model, layers)
        start = config.base_layers
        for branch, depth in enumerate(config.branch_layers):
            note, fork = partial(_note, branch), partial(_fork, branch)
            layers[config.base_layers - depth].register_forward_pre_hook(note, with_kwargs=True)
            layers[start].register_forward_pre_hook(fork, with_kwargs=True)
            start += depth
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return the policy's next-token logits `[B, T, V]` at `config.strength` (METHOD M2).

        Raises:
            ValueError: `config.strength` is not one finite number from 0, or one an adapter.
        """
        weights = self.config.weights_at(self.config.strengths)
        inside = _PASS.set(_Pass())
        try:
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
            ends = _PASS.get().ends
        finally:
            _PASS.reset(inside)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # The decoder itself has normed the last branch.
        normed = [self._norm(end[:, keep]) for end in ends]
        base, *adapted = [*normed, out.last_hidden_state[:, keep]]
        if len(adapted) == len(self.config.branch_layers):
            mixed = mix([*adapted, base], weights)
        else:  # `assistant_early_exit` drafts with the first layers alone
            mixed = out.last_hidden_state[:, keep]
        logits = self.lm_head(mixed)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        found = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values
        )
        return cast(tuple[Any, ...], found.to_tuple()) if return_dict is False else found


AutoModelForCausalLM.register(QAdapterPolicyConfig, QAdapterForCausalLM)
