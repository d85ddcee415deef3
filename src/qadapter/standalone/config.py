"""What an exported policy is: the base's config with more layers, and how its states are mixed."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

MODEL_TYPE = "qadapter"


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

    @property
    def base_layers(self) -> int:
        """L, the number of the base's own layers."""
        return int(self.text_config.num_hidden_layers - sum(self.branch_layers))

    @property
    def strengths(self) -> list[float]:
        """`strength` as one number an adapter.

        Raises:
            ValueError: it is not, or one is negative or not finite.
        """
        one = isinstance(self.strength, int | float)
        found = [self.strength] * len(self.branch_layers) if one else list(self.strength)
        if len(found) != len(self.branch_layers) or not all(0 <= s < math.inf for s in found):
            raise ValueError(
                f"strength: {self.strength} must be a finite number from 0, or one for each of "
                f"{len(self.branch_layers)} adapters (METHOD §5)"
            )
        return found


AutoConfig.register(MODEL_TYPE, QAdapterPolicyConfig)
