"""What a comparison is: `CompareConfig`, read from a YAML file."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from qadapter.compare.methods import METHODS, Choice, Space, has_number, why_not
from qadapter.errors import ConfigError
from qadapter.files import read_fields
from qadapter.hub import DEFAULT_BASE
from qadapter.judge import named_judge


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """One comparison; every field may stand in the YAML file.

    Raises:
        ConfigError: a value is out of its range.
    """

    train: str
    """Preference pairs; split by prompt into training, validation and judge pairs (`split`)."""
    test: str
    """Held-out preference pairs, on which the report's figures are measured."""
    text: str
    """General text (.txt, or .jsonl with `text`) for KL to the base; no method sees it."""
    output: str
    """Directory of the report and of every run behind it."""
    prompts: str | None = None
    """General prompts; the base's own answers to them are Replay's data, which needs them."""
    anchors: str | None = None
    """General text on which methods with anchors are held to the base; default what it samples."""
    suite: tuple[str, ...] = ()
    """Abilities that may be lost: a directory of the local suite (see `qadapter evaluate --suite
    local`), files of one task (.jsonl, .txt), names of lm-eval's tasks."""
    model: str = DEFAULT_BASE
    """The base."""
    methods: tuple[str, ...] = ("base", "sft", "dpo", "replay", "rloo", "qadapter")
    """Names of `qadapter.compare.METHODS`."""
    reference: str = "dpo"
    """The method whose learning is the mark for the others."""
    judges: tuple[str, ...] = ("bradley-terry",)
    """Who gives win rates: `bradley-terry`, `rule:max_words:40`,
    `openai:MODEL@URL#VARIABLE`, whose key that variable of the environment holds, …"""
    judge_criterion: str | None = None
    """What the preference asks for, in words; `openai:` judges are told it."""
    trials: int = 3
    """Settings tried for each method on the validation pairs; the first are its defaults. 0 takes
    these untried."""
    settings: dict[str, dict[str, float | str]] = field(default_factory=dict)
    """By method, settings that are given and not searched: `dpo: {beta: 0.3}`."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds of the chosen setting."""
    headline: tuple[str, ...] = ()
    """Methods trained with every seed, the others with the first alone; empty: every method. One
    that is not compared may be named, here and in `retrain`: `--methods` need not change these."""
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)
    """Points of each method's curve: its adapter's weight when decoding; 1 must be among them."""
    retrain: tuple[str, ...] = ()
    """More curves: `dpo.beta=0.05,0.5` trains DPO's chosen setting again with each β, a point each.
    """
    vary: tuple[str, ...] = ()
    """Robustness of the reference and the first Q-Adapter: `flipped=0.1`, `irrelevant=0.3`,
    `pairs=50`, or a parameter such as `lora_r=4`."""
    pairs: int = 480
    """Training pairs."""
    validation_pairs: int = 200
    """Pairs of the training file that settings are chosen on."""
    test_pairs: int = 300
    """Pairs of the test file: one of each prompt, then a second, and so on."""
    held_out_pairs: int = 0
    """Pairs of the training file to test on, too, where the test file is small: of prompts that
    training and validation leave, and that then are not the judge's."""
    text_tokens: int = 8000
    """Tokens of the general text, in windows from all of it."""
    replay_prompts: int = 200
    """General prompts that the base answers."""
    answers: int = 48
    """Distinct test prompts answered for the win rate."""
    answer_tokens: int = 96
    """Most tokens of an answer to a test prompt, and of one made by online learning."""
    suite_limit: int = 100
    """Items of each task of the suite, of a text lines from all of it; of tasks that generate, as
    many as `answers`."""
    max_length: int = 1024
    """Tokens of prompt and response."""
    per_device_train_batch_size: int = 4
    """Pairs a micro-batch, of every method."""
    gradient_accumulation_steps: int = 1
    """Micro-batches a step: with 1 pair each, 4 take less memory than one of 4, and learn nearly
    the same."""

    def __post_init__(self) -> None:
        named = {
            "reference": (self.reference,),
            "methods": self.methods,
            "headline": self.headline,
            "settings": tuple(self.settings),
        }
        for where, names in named.items():
            if unknown := [name for name in names if name not in METHODS]:
                known = ", ".join(sorted(METHODS))
                raise ConfigError(f"{where}: {unknown[0]!r} is not one of {known}.")
        replays = [name for name in self.methods if METHODS[name].has("replay")]
        if replays and not self.prompts:
            raise ConfigError(
                f"prompts: {replays[0]!r} learns the base's answers to general ones; name a file, "
                "or leave it out of the methods."
            )
        judges = [named_judge(name) for name in self.judges]
        if self.judge_criterion and not any(name.startswith("openai:") for name in self.judges):
            raise ConfigError(
                "judge_criterion: no judge is told it; name one of openai:MODEL@URL, or leave it "
                "out."
            )
        _check_once("methods", self.methods)
        _check_once("judges", self.judges)
        _check_once("judges, by name", [judge.name for judge in judges])
        if self.reference not in self.methods:
            raise ConfigError(f"reference: {self.reference!r} must be among the methods; add it.")
        s = self.strengths
        rise = all(a < b for a, b in pairwise(s))
        if 1.0 not in s or not rise or not 0 <= s[0] <= s[-1] < math.inf:
            raise ConfigError("strengths: must rise from 0 or more, with 1 among them.")
        if not self.seeds:
            raise ConfigError("seeds: is empty; give one at least.")
        if len({*self.seeds}) < len(self.seeds) or not all(0 <= n < 2**32 for n in self.seeds):
            raise ConfigError("seeds: must be different whole numbers from 0, below 2^32.")
        for name in _COUNTS:
            least = 0 if name in ("trials", "held_out_pairs") else 1
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: {getattr(self, name)} must be at least {least}.")
        for name, given in self.settings.items():
            for parameter, value in given.items():
                _check_setting(f"settings: {name}", METHODS[name].space, parameter, value)
        self._check_retrain()
        self._check_vary()

    def _check_retrain(self) -> None:
        curves = []
        for text in self.retrain:
            name, parameter, values = retrained(text)
            space = METHODS[name].space if name in METHODS else {}
            if parameter not in space or not has_number(space[parameter]):
                raise ConfigError(
                    f"retrain: {text!r} must name a method and a number that its search varies."
                )
            for value in values:
                if why := why_not(parameter, value, space):
                    raise ConfigError(f"retrain: {text!r}: {parameter} {why}.")
            curves.append(f"{name}.{parameter}")
        _check_once("retrain", curves)

    def _check_vary(self) -> None:
        variations = [named_number(text) for text in self.vary]
        for text, (name, value) in zip(self.vary, variations, strict=True):
            if name in _WHOLE and not value.is_integer():
                raise ConfigError(f"vary: {text!r} must be a whole number.")
        _check_once("vary", [f"{name}={value!r}" for name, value in variations])

    @property
    def training(self) -> dict[str, int]:
        """What every training is told, by transformers' names."""
        return {name: getattr(self, name) for name in _TRAINING}

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """Return the training seeds of a method's chosen setting."""
        return self.seeds if method in (self.headline or self.methods) else self.seeds[:1]

    @classmethod
    def read(cls, path: str | Path, *, full: bool = False, **flags: Any) -> CompareConfig:
        """Read a YAML file; `full` lays its section `full` over the rest, `flags` over both.

        A field left blank is left out. `$NAME` in a value is that variable of the environment.
        Paths are relative to where the command runs.

        Raises:
            ConfigError: the file cannot be read, or a field is unknown, missing or of a wrong kind.
        """
        fields = read_fields(path)
        fields = {name: value for name, value in fields.items() if value is not None}
        over = fields.pop("full", {})
        if full and not over:
            raise ConfigError(f"{path}: has no section `full`; leave out --full or add it.")
        if not isinstance(over, dict):
            raise ConfigError(f"{path}: `full` must hold fields and values.")
        over = {name: value for name, value in over.items() if value is not None}
        fields |= (over if full else {}) | {k: v for k, v in flags.items() if v}
        hints = get_type_hints(cls)
        for name in fields:
            if name not in hints:
                raise ConfigError(
                    f"{path}: {name!r} is not a field; the fields are {', '.join(hints)}."
                )
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is f.default_factory is dataclasses.MISSING and f.name not in fields
        ]
        if missing:
            raise ConfigError(f"{path}: {missing[0]!r} is missing; add it.")
        values = {n: _value(f"{path}: {n!r}", v, hints[n]) for n, v in fields.items()}
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


_WHOLE = ("pairs", "lora_r")
"""What robustness varies by whole numbers."""
_TRAINING = ("per_device_train_batch_size", "gradient_accumulation_steps")
_COUNTS = (
    *_TRAINING,
    "trials",
    "pairs",
    "validation_pairs",
    "test_pairs",
    "held_out_pairs",
    "text_tokens",
    "replay_prompts",
    "answers",
    "answer_tokens",
    "suite_limit",
    "max_length",
)


def retrained(text: str) -> tuple[str, str, tuple[float, ...]]:
    """Return method, parameter and values of `dpo.beta=0.05,0.5`.

    Raises:
        ConfigError: it does not read so.
    """
    what, _, values = text.partition("=")
    name, _, parameter = what.partition(".")
    if not parameter or not all(map(_is_number, values.split(","))):
        raise ConfigError(
            f"retrain: {text!r} must read METHOD.PARAMETER=NUMBER,NUMBER, as dpo.beta=0.05,0.5."
        )
    return name, parameter, tuple(map(float, values.split(",")))


def named_number(text: str) -> tuple[str, float]:
    """Return name and number of `flipped=0.1`.

    Raises:
        ConfigError: it does not read so.
    """
    name, _, value = text.partition("=")
    if not name or not _is_number(value):
        raise ConfigError(f"vary: {text!r} must read NAME=NUMBER, as flipped=0.1.")
    return name, float(value)


def _check_once(where: str, names: Sequence[str]) -> None:
    """Raise ConfigError where one stands twice, and its figures would count double."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"{where}: {name!r} is there twice; give it once.")


def _check_setting(where: str, space: Space, parameter: str, value: float | str) -> None:
    """Raise ConfigError where the parameter is not searched, or cannot be of that value."""
    if not space:
        raise ConfigError(f"{where}: nothing is searched there; leave {parameter!r} out.")
    if (values := space.get(parameter)) is None:
        raise ConfigError(f"{where}: {parameter!r} is not one of {', '.join(space)}.")
    if has_number(values):
        if isinstance(value, str):
            raise ConfigError(f"{where}: {parameter} {value!r} must be a number.")
        if why := why_not(parameter, value, space):
            raise ConfigError(f"{where}: {parameter} {value:g} {why}.")
    elif isinstance(values, Choice) and value not in values.values:
        raise ConfigError(f"{where}: {parameter} {value!r} is not one of {values}.")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _value(where: str, value: Any, hint: Any) -> Any:
    """Return a YAML value as its field's type."""
    if get_origin(hint) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(where, v, get_args(hint)[0]) for v in values)
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; write names and values under it.")
        of = get_args(hint)[1]
        return {str(k): _value(f"{where}: {k!r}", v, of) for k, v in value.items()}
    kinds = get_args(hint) or (hint,)
    # To YAML 2e-4, without a point, is a text.
    if float in kinds and (type(value) is int or (isinstance(value, str) and _is_number(value))):
        try:
            value = float(value)
        except OverflowError as error:
            raise ConfigError(f"{where} is a number of {len(str(value))} digits.") from error
    if value is None and type(None) in kinds:
        return None
    if value == "":
        raise ConfigError(f"{where} is empty; give it a value, or leave it out.")
    if type(value) not in kinds:
        wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
        raise ConfigError(f"{where} is {value!r}, which is no {wanted}; change it.")
    return _expanded(where, value) if isinstance(value, str) else value


def _expanded(where: str, text: str) -> str:
    """Return a text with the variables that it names; a `$` that no name follows is one."""
    if re.search(r"\$\{[^}]*$", text):
        raise ConfigError(f"{where}: {text!r} has no }} after ${{; add it.")
    for braced, plain in re.findall(r"\$(?:\{([^}]+)\}|([A-Za-z_]\w*))", text):
        name = braced or plain
        if name not in os.environ:
            raise ConfigError(f"{where} names ${name}, a variable that is not set; set it.")
    return os.path.expandvars(text)
