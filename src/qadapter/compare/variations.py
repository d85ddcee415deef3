"""What a comparison varies beside its methods: the pairs, a parameter, a parameter trained anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.compare.config import named_number
from qadapter.compare.data import DATA_VARIATIONS, Splits, varied, write_pairs
from qadapter.compare.methods import METHODS, why_not
from qadapter.compare.running import Run, tried
from qadapter.data import Pair
from qadapter.errors import ConfigError

Variation = tuple[str, str, float, list[Any] | None]
"""Its text, name and value, and its pairs where it changes them."""


def read_variation(
    text: str, parts: Splits, methods: Sequence[str], fits: Sequence[Pair]
) -> Variation:
    """Return what `NAME=NUMBER` asks for.

    Args:
        fits: the training pairs that fit into `max_length`, of which a share is a share of what is
            trained on.

    Raises:
        ConfigError: it changes neither the pairs nor a parameter of those methods.
    """
    name, value = named_number(text)
    if name in DATA_VARIATIONS:
        # Their answers are not judged, so more pairs may be the judge's.
        pairs = parts.pool if name == "pairs" else fits
        return text, name, value, varied(pairs, name, value)
    able = [METHODS[method] for method in methods if METHODS[method].takes_number(name)]
    if not able:
        raise ConfigError(
            f"vary: {name!r} is neither of {', '.join(DATA_VARIATIONS)} nor a number that "
            f"{' or '.join(methods)} is trained with."
        )
    for method in able:
        if why := why_not(name, value, method.space):
            raise ConfigError(f"vary: {text!r}: {name} {why} for {method.label}.")
    return text, name, value, None


def robust(
    run: Run, name: str, told: Mapping[str, Any], variation: Variation
) -> dict[str, Any] | None:
    """Return a method's curve under a variation of its chosen setting; None if it has none.

    Where the reference has no such parameter, it says that it stands beside the unvaried one.
    """
    text, what, value, pairs = variation
    best = (told["search"] or {}).get("best")
    if best is None or (pairs is None and not METHODS[name].takes_number(what)):
        run.spare(2)
        return None
    train, params = "train", dict(best)
    if pairs is None:
        params[what] = value
    else:
        train = f"train.{text.replace('=', '-')}"
        path = run.root / "data" / f"{train}.jsonl"
        write_pairs(path, pairs)
        run.add_file(train, path)
    seed, label = run.config.seeds[0], f"{name} {text}"
    options: dict[str, Any] = {"strengths": run.config.strengths, "split": "test", "long": True}
    found = tried(run, name, params, seed, label, train=train, **options)
    beside = pairs is not None or METHODS[run.config.reference].takes_number(what)
    row = {"variation": text, "method": name, "seed": seed, "reference_varied": beside}
    return found and {**row, **found}


def retrained_curve(
    run: Run, name: str, told: Mapping[str, Any], parameter: str, values: Sequence[float]
) -> dict[str, Any]:
    """Return a method's curve along a parameter: its runs, and its chosen setting with others."""
    curve = {
        **told,
        "label": f"{told['label']}, {parameter} retrained",
        "dial": f"{parameter}, trained anew for each value",
        "search": None,
        "runs": [],
    }
    run.spare(2 * len(values) * (len(run.config.seeds_of(name)) - len(told["runs"])))
    for chosen in told["runs"]:
        own, seed = float(chosen["params"][parameter]), chosen["seed"]
        run.spare(2 * (len(values) - len({*values} - {own})))
        points = {own: next(p for p in chosen["points"] if p["dial"] == 1.0)}
        for value in sorted({*values} - {own}):
            params = {**chosen["params"], parameter: value}
            label = f"{name} {parameter}={value:g} seed {seed}"
            if found := tried(run, name, params, seed, label, split="test", long=True):
                points[value] = {**found["points"][0], "tasks": {}, "win_rates": []}
        curve["own_dial"] = own
        along = [{**points[value], "dial": value} for value in sorted(points)]
        curve["runs"].append({**chosen, "points": along})
    return curve
