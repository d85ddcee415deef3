"""The methods of a comparison: how each is trained, what is searched, where the search starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qadapter.config import MANY_PAIRS

Value = float | int | str
Params = dict[str, Value]


@dataclass(frozen=True)
class Range:
    """Real numbers searched on a logarithmic scale."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}, logarithmic"


@dataclass(frozen=True)
class Choice:
    """Values searched without order."""

    values: tuple[Value, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


Space = Mapping[str, Range | Choice]


_ABOVE_ZERO = ("learning_rate", "epochs", "alpha", "alpha_0", "gamma", "lora_r")
_FROM_ZERO = ("anchor_weight", "sft_weight")


def has_number(space: Range | Choice) -> bool:
    """Return whether what is searched is a number."""
    return isinstance(space, Range) or all(isinstance(v, int | float) for v in space.values)


def why_not(parameter: str, value: float, space: Space) -> str | None:
    """Return why a method with that search cannot be trained with a number, or None."""
    if not math.isfinite(value):
        return "must be finite"
    # DPO's β is searched, and without it nothing is learned; ours is 0.
    positive = parameter in _ABOVE_ZERO or parameter in {*space} - {*_FROM_ZERO}
    if value < 0 or (value == 0 and positive):
        return f"must {'be above' if positive else 'not be below'} 0"
    if parameter == "gamma" and value > 1:
        return "must be at most 1"
    if parameter == "trunk" and value >= 1:
        return "must be below 1"
    return None


def starts_at_base(settings: Mapping[str, Value]) -> bool:
    """Return whether what these settings train is the base at strength 0: α0 = α̃ (METHOD M2)."""
    return settings.get("alpha_0", settings.get("alpha")) == settings.get("alpha")


@dataclass(frozen=True)
class Method:
    """One row of the report.

    Each method's search has the same number of trials and begins at `defaults`, its library's or
    ours, with one rate for every LoRA and one epoch (`qadapter`, ours as by default, has two); what
    the search leaves alone is in `fixed`.
    """

    label: str
    library: str
    about: str
    trainer: str | None
    """Name of the function of `qadapter.compare.train` that trains it; None for the base."""
    fixed: Params = field(default_factory=dict)
    space: Space = field(default_factory=dict)
    defaults: Params = field(default_factory=dict)
    knobs: tuple[str, ...] = ("lora_r",)
    """Parameters beside these that robustness may vary."""

    def has(self, parameter: str) -> bool:
        """Return whether the method is trained with a parameter of that name."""
        return parameter in {*self.fixed, *self.space, *self.knobs}

    def takes_number(self, parameter: str) -> bool:
        """Return whether the method is trained with a number of that name."""
        return self.has(parameter) and not isinstance(
            {**self.fixed, **self.defaults}.get(parameter), str
        )


_RATE = Range(5e-5, 8e-4)
_WEIGHT = Range(1.0, 300.0)
_EPOCHS = Choice((1, 2))
_PLAIN_SPACE: Space = {"learning_rate": _RATE, "epochs": _EPOCHS}
_PLAIN: Params = {"learning_rate": 2e-4, "epochs": 1}
_DPO_SPACE: Space = {"beta": Range(0.03, 1.0), "learning_rate": _RATE, "epochs": _EPOCHS}
_DPO: Params = {"beta": 0.1, "learning_rate": 2e-4, "epochs": 1}
_OURS_SPACE: Space = {
    "alpha": Range(0.03, 1.0),
    "learning_rate": _RATE,
    "epochs": _EPOCHS,
    "anchor_weight": _WEIGHT,
}
_OURS: Params = {"alpha": 0.1, "learning_rate": 2e-4, "epochs": 1, "anchor_weight": 100.0}
_OURS_FIXED: Params = {"beta": 0.0, "gamma": 1.0, "parameterization": "residual"}
_BARE_SPACE: Space = {k: v for k, v in _OURS_SPACE.items() if k != "anchor_weight"}
_BARE: Params = {k: v for k, v in _OURS.items() if k != "anchor_weight"}
_BARE_FIXED: Params = {**_OURS_FIXED, "anchor_weight": 0.0}
_ANCHOR: Space = {"anchor_weight": _WEIGHT}
# With α̃ = α0 a raw Q̂, which is the base's logits to begin with, would start far from the base: at
# 0.1, the base at temperature 1/11.
_AUTHORS: Params = {
    "parameterization": "raw",
    "trunk": 0.75,
    "beta": 0.1,
    "alpha": 1.0,
    "alpha_0": 0.01,
}


def _ours(label: str, about: str, space: Space, defaults: Params, **fixed: Value) -> Method:
    base = _OURS_FIXED if "anchor_weight" in space else _BARE_FIXED
    knobs = ("lora_r", "alpha_0")
    settings = {**base, **fixed}
    return Method(label, "qadapter", about, "train_qadapter", settings, space, defaults, knobs)


METHODS: dict[str, Method] = {
    "base": Method("Base", "none", "The aligned model as it is.", None),
    "sft": Method(
        "SFT",
        "trl.SFTTrainer",
        "Trained on the chosen responses, with adapters on all layers.",
        "train_sft",
        {"trunk": 0.0},
        _PLAIN_SPACE,
        _PLAIN,
    ),
    "sft_kl": Method(
        "SFT, KL-anchored",
        "trl.SFTTrainer",
        "SFT with KL to the base on general text.",
        "train_sft",
        {"trunk": 0.0},
        {**_PLAIN_SPACE, **_ANCHOR},
        {**_PLAIN, "anchor_weight": 100.0},
    ),
    "replay": Method(
        "Replay",
        "trl.SFTTrainer",
        "SFT on the chosen responses mixed with the base's own answers, to general prompts or to "
        "those of the pairs.",
        "train_sft",
        {"trunk": 0.0},
        {**_PLAIN_SPACE, "replay": Choice(("general", "training"))},
        {**_PLAIN, "replay": "general"},
    ),
    "dpo": Method(
        "DPO",
        "trl.DPOTrainer",
        "Direct preference optimisation with adapters on all layers.",
        "train_dpo",
        {"trunk": 0.0},
        _DPO_SPACE,
        _DPO,
    ),
    "dpo_sft": Method(
        "DPO + SFT",
        "trl.DPOTrainer",
        "DPO with SFT on the chosen responses as a second loss.",
        "train_dpo",
        {"trunk": 0.0},
        {**_DPO_SPACE, "sft_weight": Range(0.1, 3.0)},
        {**_DPO, "sft_weight": 1.0},
    ),
    "dpo_anchored": Method(
        "DPO, our anchors",
        "trl.DPOTrainer",
        "DPO with adapters on all layers, and with the anchors of Q-Adapter.",
        "train_dpo",
        {"trunk": 0.0},
        {**_DPO_SPACE, **_ANCHOR},
        {**_DPO, "anchor_weight": 100.0},
    ),
    "rloo": Method(
        "RLOO",
        "trl.RLOOTrainer",
        "Online reinforcement learning (REINFORCE leave-one-out) on a Bradley–Terry reward model "
        "of the training pairs; stands for the paper's PPO, which TRL no longer keeps.",
        "train_rloo",
        {"trunk": 0.0},
        {**_PLAIN_SPACE, "beta": Range(0.01, 0.3)},
        {**_PLAIN, "beta": 0.05},
    ),
    "qadapter": Method(
        "Q-Adapter",
        "qadapter",
        f"Ours as `qadapter train` makes it by default: β = 0.1, all layers where fewer than "
        f"{MANY_PAIRS} pairs fit, else the last quarter, and two epochs where nothing is searched.",
        "train_qadapter",
        {**_OURS_FIXED, "beta": 0.1},
        _OURS_SPACE,
        {**_OURS, "epochs": 2},
        ("lora_r", "alpha_0", "trunk"),
    ),
    "qadapter_all_layers": _ours(
        "Q-Adapter, all layers",
        "Ours on all layers: residual Q, and anchors. γ = 1 and β = 0 make its loss DPO's "
        "(METHOD I3).",
        _OURS_SPACE,
        _OURS,
        trunk=0.0,
    ),
    "qadapter_half": _ours(
        "Q-Adapter, half the layers", "Ours on half of the layers.", _OURS_SPACE, _OURS, trunk=0.5
    ),
    "qadapter_quarter": _ours(
        "Q-Adapter, last quarter",
        "Ours on the last quarter of the layers.",
        _OURS_SPACE,
        _OURS,
        trunk=0.75,
    ),
    "qadapter_bare": _ours(
        "Q-Adapter, no anchors",
        "Ours on the last quarter without anchors: DPO's loss.",
        _BARE_SPACE,
        _BARE,
        trunk=0.75,
    ),
    "qadapter_gamma": _ours(
        "Q-Adapter, γ = 0.97",
        "Ours on the last quarter with discount 0.97 and β = 1.",
        _OURS_SPACE,
        _OURS,
        trunk=0.75,
        gamma=0.97,
        beta=1.0,
    ),
    "qadapter_raw": _ours(
        "Q-Adapter, raw",
        "The authors' parameterisation, Q̂ = z_θ, and their α's, with our loss on the last quarter.",
        _PLAIN_SPACE,
        _PLAIN,
        **_AUTHORS,
    ),
    "qadapter_authors": _ours(
        "Q-Adapter, authors' loss",
        "The authors' parameterisation and α's, with their released loss, on the last quarter.",
        _PLAIN_SPACE,
        _PLAIN,
        **_AUTHORS,
        objective="authors",
    ),
}
"""By the name that stands in run.yaml."""
