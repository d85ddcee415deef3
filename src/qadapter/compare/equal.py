"""The capability suite where a method has learned as much as the reference, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qadapter.compare.running import Run, suite_at
from qadapter.stats import dial_at


def add_equal_learning(run: Run, methods: Mapping[str, Any]) -> None:
    """Give the runs of each method the suite at the reference's margin, as `at_reference`.

    That holds `tasks` and `dial`, the adapter's weight at which the mean margin over seeds is the
    reference's (`dial_at`). Methods whose dial does not pass it have none, nor has a run whose
    measurement failed; nobody has one where the reference learned nothing.
    """
    reference = methods[run.config.reference]["runs"]
    if not (run.config.suite and reference):
        return
    target = fmean(_own(found)["margin"] for found in reference)
    if target <= 0:
        return
    asked = []
    for name, told in methods.items():
        dial = _dial(told["runs"], target) if name != run.config.reference else None
        asked += [(name, found, dial) for found in told["runs"] if dial is not None]
    run.total += sum(dial != 1.0 for _, _, dial in asked)

    def add(one: tuple[str, dict[str, Any], float]) -> None:
        name, found, dial = one
        label = f"{name} seed {found['seed']} strength {dial:g}"
        own = dial == 1.0
        tasks = _own(found)["tasks"] if own else suite_at(run, label, found, dial)
        if tasks:
            found["at_reference"] = {"dial": dial, "tasks": tasks}

    run.fanout.map(add, asked)


def _own(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a run measured as it was trained."""
    return next(point for point in found["points"] if point["dial"] == 1.0)


def _dial(runs: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """Return the weight at which runs have the target for mean margin, in three digits."""
    if not runs:
        return None
    dials = [point["dial"] for point in runs[0]["points"]]
    margins, kl = (
        [fmean(point[key] for point in at) for at in zip(*(r["points"] for r in runs), strict=True)]
        for key in ("margin", "kl")
    )
    found = dial_at(dials, margins, kl, target)
    return None if found is None else float(f"{found:.3g}")
