"""A policy as a model of lm-eval, registered with it as `qadapter` when this module is imported.

It is lm-eval's `hf` model with the composition in place of the base: log-likelihoods, rolling
log-likelihoods and generation all run `model(…, strength=s)`. Decoding settings that a base brings
along, such as a repetition penalty, are no part of the policy and are left out, so answers of such
a base differ from those of `hf`; what a task or `--gen_kwargs` asks for is done.

    import qadapter.lm
    lm_eval.simple_evaluate("qadapter", "pretrained=DIR,strength=0.5", tasks=["piqa"])

lm-eval 0.4.13 looks for no entry points, so its own program, `lm-eval`, does not know the name;
`qadapter evaluate` is that program with the name known. Nothing is spread over several processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models import huggingface

from qadapter import hub
from qadapter.config import QConfig
from qadapter.errors import ConfigError
from qadapter.policy import Policy
from qadapter.suite import supply_sentences

_OPTIONS = {
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
}
"""The options of `HFLM` that mean something for a model that is already loaded."""


@register_model("qadapter")
class QAdapterLM(huggingface.HFLM):
    """A policy at a strength.

    Args:
        pretrained: the adapter's directory, or a policy, for which the next five are not asked.
        base, dtype, device, check_base, trust_remote_code: as `Policy.from_pretrained`.
        strength: s (METHOD §5).
        options: passed on to lm-eval's `HFLM`, those in `_OPTIONS`.

    Raises:
        ConfigError: an option is unknown or out of its range.
        ArtefactError, ModelError: as `Policy.from_pretrained`.
    """

    def __init__(
        self,
        pretrained: str | Policy,
        base: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        check_base: bool = True,
        trust_remote_code: bool = False,
        strength: float = 1.0,
        **options: Any,
    ) -> None:
        if unknown := sorted(options.keys() - _OPTIONS):
            raise ConfigError(
                f"--model_args: {unknown[0]!r} is not one of {', '.join(sorted(_OPTIONS))}."
            )
        if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
            raise ConfigError(f"strength: {strength} is not a finite number from 0.")
        supply_sentences()
        if not isinstance(pretrained, Policy):
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ConfigError(f"dtype: {dtype!r} is none; try float32 or bfloat16.")
            pretrained = Policy.from_pretrained(
                str(pretrained),
                base,
                dtype=getattr(torch, dtype),
                device=hub.pick_device(device),
                check_base=check_base,
                trust_remote_code=trust_remote_code,
            )
        with _quiet(huggingface.eval_logger):
            super().__init__(pretrained=pretrained.model, tokenizer=pretrained.tokenizer, **options)
        self.strength = strength

    def _model_call(self, inps: torch.Tensor, **_: None) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=inps, strength=self.strength).logits
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = super()._model_generate(*args, strength=self.strength, **kwargs)
        return out

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results; the Hub is not asked."""
        q_config: QConfig = self.model.q_config
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "strength": self.strength,
            "base_model": q_config.base_model,
            "base_hash": q_config.base_hash,
        }


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Leave out its warnings that a loaded model may ignore options: unknown ones are refused."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
