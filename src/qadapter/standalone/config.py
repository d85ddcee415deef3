"""What an exported policy is: the base's config with more layers, and how its states are mixed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

MODEL_TYPE = "qadapter"
_SETTABLE = {"strength", "alpha_0", "alpha_tilde", "architectures", "dtype", "quantization_config"}
"""The policy's settings, and what an engine notes in a config by itself."""


def _finite(value: Any) -> bool:
    """Return whether it is a number, and one that a float can be."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class QAdapterPolicyConfig(PreTrainedConfig):
    """Config of a `QAdapterForCausalLM`.

    Of a decoder with L layers and one adapter on the last K, `text_config` says L + K layers: first
    the base's own, then the adapted ones, which start from what enters the base's layer L − K. The
    layers of further adapters follow, each adapter's from its own K.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    text_config: Any = None
    """The base's config, with the branches' layers counted in `num_hidden_layers`."""
    branch_layers: Any = None
    """`[K, …]`: how many of the last layers each adapter changes."""
    base_layers: Any = None
    """L, the number of the base's own layers; of exports that do not say it, what is left over."""
    strength: Any = 1.0
    """s, one number or one an adapter (METHOD §5); may be set on a loaded model."""
    alpha_0: float = 1.0
    """Weight of log π1 in the policy (METHOD M2)."""
    alpha_tilde: float = 1.0
    """Temperature of the policy (METHOD M2); of several residual adapters only α0/α̃ counts."""
    parameterization: str = "residual"
    """How the logits spell Q̂ (METHOD §2)."""
    tie_word_embeddings: bool = False
    """As the base's."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:  # transformers compares a config with one of defaults
            self.text_config = {"model_type": "llama", "num_hidden_layers": 2}
            self.branch_layers = [1]
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
        if self.base_layers is None and self._counted:
            self.base_layers = self.text_config.num_hidden_layers - sum(self.branch_layers)
        self.check()

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set fields, as vLLM's `--hf-overrides` does; `check` says whether they may be so.

        Raises:
            ValueError: one is not in `_SETTABLE`, and would be another policy or of no effect.
        """
        if others := [name for name in config_dict if name not in _SETTABLE]:
            raise ValueError(
                f"{others[0]}: is no setting of an exported policy; leave it as exported, and set "
                "strength, alpha_0 or alpha_tilde"
            )
        super().update(config_dict)

    @property
    def _counted(self) -> bool:
        depths = self.branch_layers
        return isinstance(depths, list | tuple) and bool(depths) and all(map(_count, depths))

    def check(self) -> None:
        """See that the fields fit together; loading a model sets some after the config is made.

        Raises:
            ValueError: they do not, and would be no policy or another one.
        """
        if not isinstance(self.text_config, PreTrainedConfig):
            raise ValueError("text_config: is the base's and cannot be set; export the policy anew")
        total, most = self.text_config.num_hidden_layers, self.base_layers
        if not self._counted or not _count(most) or most + sum(self.branch_layers) != total:
            raise ValueError(
                f"branch_layers: {self.branch_layers!r} with {most!r} layers of the base are not "
                f"the {total} that there are; leave them as exported"
            )
        if max(self.branch_layers) > most:
            raise ValueError(
                f"branch_layers: {self.branch_layers!r} are more than the {most} of the base; "
                "leave them as exported"
            )
        if self.parameterization not in ("residual", "raw"):
            raise ValueError(
                f"parameterization: {self.parameterization!r} is neither 'residual' nor 'raw'; "
                "leave it as exported"
            )
        if not _finite(self.alpha_tilde) or self.alpha_tilde <= 0:
            raise ValueError(f"alpha_tilde: {self.alpha_tilde!r} must be a finite number above 0")
        if not _finite(self.alpha_0) or self.alpha_0 <= 0:
            raise ValueError(f"alpha_0: {self.alpha_0!r} must be a finite number above 0")
        _ = self.strengths

    @property
    def strengths(self) -> list[float]:
        """`strength` as one number an adapter.

        Raises:
            ValueError: it is not, or one is negative or not finite.
        """
        adapters = len(self.branch_layers)
        several = isinstance(self.strength, list | tuple)
        found = list(self.strength) if several else [self.strength] * adapters
        if len(found) != adapters or not all(_finite(s) and s >= 0 for s in found):
            raise ValueError(
                f"strength: {self.strength!r} must be a finite number from 0, or a list with one "
                f"for each of {adapters} adapters (METHOD §5)"
            )
        return found

    def weights_at(self, strengths: Sequence[float]) -> list[float]:
        """Return the weight of each branch's hidden state and, last, of the base's (METHOD M2)."""
        from qadapter.functional import mixing_weights

        weights = mixing_weights(
            strengths,
            alpha_0=self.alpha_0,
            alpha_tilde=self.alpha_tilde,
            parameterization=self.parameterization,
        )
        return [float(weight) for weight in weights]


AutoConfig.register(MODEL_TYPE, QAdapterPolicyConfig)
