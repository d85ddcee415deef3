"""A comparison as read from its JSON, with the intervals that every part of the report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from qadapter.report import losses
from qadapter.report.answers import OnAnswers, on_answers
from qadapter.stats import (
    KL_FLOOR,
    Array,
    Curve,
    EqualLearning,
    Interval,
    by_group,
    frontier,
    mean_intervals,
    numbered,
    paired_bootstrap,
    resampled_curve,
    share_interval,
)

Point = Mapping[str, Any]
"""What one run measured at one value of its dial."""
UNVARIED = "none"
"""The variation that changes nothing."""


@dataclass(frozen=True, eq=False)
class Method:
    """A method with its finished runs, at the values of the dial that all of them have."""

    name: str
    label: str
    ours: bool
    """Whether it is a Q-Adapter, by its library."""
    dials: tuple[float, ...]
    own: int
    """The index of its own setting in `dials`."""
    runs: tuple[Mapping[float, Point], ...]
    """Points by dial, one mapping a seed."""
    curve: Curve
    """Margins, nats, and KL: accuracy hardly sees the size of a change, so it is no axis."""
    right: Array
    """`[seeds, dial, prompts]`, how many pairs of each are judged rightly."""
    window_kl: Array
    """`[seeds, dial, windows]`, summed KL to the base over the tokens of each, nats."""
    points: Sequence[tuple[Interval, Interval]]
    """Mean margin and KL per token on general text, at each value of the dial."""
    accuracies: Sequence[Interval]
    """Share of held-out pairs judged rightly, at each value of the dial."""
    ranking: Interval
    """Share of held-out pairs whose chosen response is the likelier a token, at its own setting."""
    by_token: tuple[Interval, Interval] | None
    """Accuracy and mean margin of log-ratios a token, at its own setting; None of older runs."""
    on_answers: OnAnswers | None
    """KL on the base's own answers; None of older runs, and where the base said nothing."""
    at_reference: Sequence[Point]
    """Dial and tasks of each seed at the reference's margin; empty where they were not measured."""

    @property
    def accuracy(self) -> Interval:
        """Share of held-out pairs judged rightly, at its own setting."""
        return self.accuracies[self.own]

    @property
    def margin(self) -> Interval:
        """Mean margin on held-out pairs, nats, at its own setting."""
        return self.points[self.own][0]

    @property
    def kl(self) -> Interval:
        """KL to the base per token of general text, nats, at its own setting."""
        return self.points[self.own][1]

    @property
    def own_points(self) -> list[Point]:
        """What each seed measured at the method's own setting."""
        return [run[self.dials[self.own]] for run in self.runs]

    @property
    def moves(self) -> bool:
        """Whether it leaves the base anywhere on its dial."""
        return any(kl.value > 0 for _, kl in self.points)

    def mean(self, field: str) -> float | None:
        """Return the mean of a figure over seeds at its own setting; None where one lacks it."""
        values = [point[field] for point in self.own_points]
        return None if None in values else fmean(values)


class Results:
    """The finished methods of a comparison and what follows from them.

    Args:
        comparison: what `comparison.json` holds.
    """

    def __init__(self, comparison: Mapping[str, Any]) -> None:
        self.comparison = comparison
        self.methods: dict[str, Method] = {}
        """The finished ones, on the same pairs and text."""
        self.unlike: list[str] = []
        """Labels of methods left out because their pairs or text are others."""
        self._prompts = numbered(comparison["pair_prompts"])
        self._tokens: list[int] = []
        for name, fields in comparison["methods"].items():
            if (method := self._method(name, fields)) is not None:
                self.methods[name] = method
        self.varied = self._varied()
        """By variation: the methods trained under it, and those of the same seeds as `UNVARIED`."""
        self._equal: dict[str, dict[str, EqualLearning]] = {}
        self._drops: dict[tuple[str, str, bool], Interval | None] = {}

    @property
    def otherwise_made(self) -> list[tuple[int, dict[str, str]]]:
        """By what else than this report's machine and versions results were made.

        Their number, and what differs.
        """
        found = []
        for made in self.comparison.get("cells", ()):
            other = {
                f"{kind}: {name}": there
                for kind in ("machine", "versions")
                for name, here in self.comparison[kind].items()
                if (there := made.get(kind, {}).get(name, "unknown")) != here
            }
            if other:
                found.append((made["count"], other))
        return found

    def given(self, name: str) -> Mapping[str, Any]:
        """Return the settings of a method that the comparison gave and did not search."""
        settings: Mapping[str, Any] = self.comparison["config"].get("settings", {})
        found: Mapping[str, Any] = settings.get(name, {})
        return found

    def _varied(self) -> dict[str, dict[str, Method]]:
        methods = self.comparison["methods"]
        runs: dict[tuple[str, str], list[Any]] = {}
        for row in self.comparison["robustness"]:
            runs.setdefault((row["variation"], row["method"]), []).append(row)
        seeds: dict[str, set[int]] = {}
        for (_, name), rows in runs.items():
            seeds.setdefault(name, set()).update(row["seed"] for row in rows)
        # What does not have the parameter stands beside as it was.
        alone = [row["seed"] for row in self.comparison["robustness"] if _beside_unvaried(row)]
        if alone:
            seeds.setdefault(self.comparison["reference"], set(alone))
        for name, drawn in seeds.items():
            runs[UNVARIED, name] = [run for run in methods[name]["runs"] if run["seed"] in drawn]
        varied: dict[str, dict[str, Method]] = {UNVARIED: {}} if runs else {}
        for (variation, name), rows in runs.items():
            method = self._method(name, {**methods[name], "runs": rows})
            if method is not None:
                varied.setdefault(variation, {})[name] = method
        return varied

    def _method(self, name: str, fields: Mapping[str, Any]) -> Method | None:
        runs = [{p["dial"]: p for p in run["points"]} for run in fields["runs"] if run["points"]]
        dials = tuple(d for d in runs[0] if all(d in run for run in runs)) if runs else ()
        if not dials:
            return None
        found = [run[d] for run in runs for d in dials]
        self._tokens = self._tokens or list(found[0]["window_tokens"])
        shape = len(self._prompts), self._tokens
        if any((len(p["correct"]), list(p["window_tokens"])) != shape for p in found):
            self.unlike.append(fields["label"])
            return None
        level = [run["at_reference"] for run in fields["runs"] if "at_reference" in run]
        own = fields.get("own_dial", 1.0)
        at = dials.index(own) if own in dials else len(dials) - 1
        *by_pair, far = (
            np.array([[run[d][field] for d in dials] for run in runs], np.float64)
            for field in ("margins", "correct", "ranked", "window_kl")
        )
        (margins, right, ranked), pairs = by_group(by_pair, self._prompts)
        curve = resampled_curve(_runs_of(name), margins, pairs, far, self._tokens)
        return Method(
            name=name,
            label=fields["label"],
            ours=fields["library"].split(".")[0] == "qadapter",
            dials=dials,
            own=at,
            runs=tuple(runs),
            curve=curve,
            right=right,
            window_kl=far,
            points=curve.intervals(),
            accuracies=self._shares(runs, dials, "correct", right),
            ranking=self._shares(runs, (dials[at],), "ranked", ranked[:, [at]])[0],
            by_token=self._by_token(runs, dials[at]),
            on_answers=on_answers(_runs_of(name), runs, dials, margins, pairs),
            at_reference=level if len(level) == len(runs) else (),
        )

    def _by_token(
        self, runs: Sequence[Mapping[float, Point]], dial: float
    ) -> tuple[Interval, Interval] | None:
        fields = "margins_per_token", "correct_per_token"
        if any(field not in run[dial] for run in runs for field in fields):
            return None
        sums = [np.array([[run[dial][f]] for run in runs], np.float64) for f in fields]
        (margins, right), pairs = by_group(sums, self._prompts)
        return self._shares(runs, (dial,), fields[1], right)[0], mean_intervals(margins, pairs)[0]

    def _shares(
        self, runs: Sequence[Mapping[float, Point]], dials: Sequence[float], field: str, sums: Array
    ) -> list[Interval]:
        """Return the share of pairs with a vote, at each dial; `sums` are its votes by prompt.

        Where all are ties it is the base beside itself, which is no draw.
        """
        found = mean_intervals(sums, np.bincount(self._prompts))
        if len(runs) == 1:
            votes = [runs[0][dial][field] for dial in dials]
            found = [
                i if {*v} == {0.5} else Interval(i.value, *share_interval(v, self._prompts))
                for i, v in zip(found, votes, strict=True)
            ]
        return found

    @property
    def scored(self) -> str:
        """What learning is measured on, for people."""
        return f"{len(self._prompts):,} pairs of {len(set(self._prompts)):,} prompts"

    @property
    def reference(self) -> Method | None:
        """The method whose margin is the target, if it finished."""
        return self.methods.get(self.comparison["reference"])

    @property
    def reference_label(self) -> str:
        """What people call the reference, finished or not."""
        reference = self.reference
        return reference.label if reference else str(self.comparison["reference"])

    @property
    def ours(self) -> list[Method]:
        """The Q-Adapters but the reference."""
        reference = self.comparison["reference"]
        return [m for m in self.methods.values() if m.ours and _runs_of(m.name) != reference]

    @property
    def headlines(self) -> list[Method]:
        """Those of `ours` with more than one value on the dial; all of them where none has.

        Each method once: a curve of it trained anew is no other method.
        """
        ours = [method for method in self.ours if _runs_of(method.name) == method.name]
        return [method for method in ours if len(method.dials) > 1] or ours

    @property
    def others(self) -> list[Method]:
        """What is neither a Q-Adapter, nor the reference, nor the base; each method once."""
        not_these = (self.comparison["reference"], "base")
        return [
            m
            for m in self.methods.values()
            if not (m.ours or m.name in not_these) and _runs_of(m.name) == m.name
        ]

    @property
    def base(self) -> Point | None:
        """What was measured of the base: its own method, else a dial at which nothing moves."""
        if "base" in self.methods:
            return self.methods["base"].own_points[0]
        points = (p for m in self.methods.values() for run in m.runs for p in run.values())
        # Beside a method's own setting tasks are not measured.
        still = [{"tasks": {}, **point} for point in points if point["kl"] < KL_FLOOR]
        return max(still, key=lambda point: len(point["tasks"]), default=None)

    def equal_learning(self, reference: Method) -> dict[str, EqualLearning]:
        """Return what each method forgets at the margin of `reference`."""
        if reference.name not in self._equal:
            self._equal[reference.name] = _equal_learning(self.methods, reference)
        return self._equal[reference.name]

    def equal_on_answers(self, reference: Method) -> dict[str, EqualLearning]:
        """Return the same of the KL on the base's own answers; of those that have the very same."""
        if not (theirs := reference.on_answers):
            return {}
        curves = {
            name: method.on_answers.curve
            for name, method in self.methods.items()
            if method.on_answers
            and method.on_answers.tokens == theirs.tokens
            and (method.moves or method is reference)
        }
        return frontier(curves, reference=reference.name, reference_dial=reference.own)

    def varied_equal_learning(self, variation: str) -> dict[str, EqualLearning]:
        """Return the same of the methods under a variation; empty without the reference.

        A reference that has no such parameter is the unvaried one (`beside_unvaried`).
        """
        methods, name = self.varied[variation], self.comparison["reference"]
        there = self.varied[UNVARIED] if self.beside_unvaried(variation) else methods
        reference = there.get(name)
        return _equal_learning({**methods, name: reference}, reference) if reference else {}

    def beside_unvaried(self, variation: str) -> bool:
        """Return whether it varies what the reference does not have."""
        rows = self.comparison["robustness"]
        return any(_beside_unvaried(row) for row in rows if row["variation"] == variation)

    def equal_accuracy(self, reference: Method) -> dict[str, EqualLearning]:
        """Return what each method forgets at the reference's accuracy, which sees no sizes."""
        pairs = np.bincount(self._prompts)
        curves = {
            name: resampled_curve(
                _runs_of(name), method.right, pairs, method.window_kl, self._tokens
            )
            for name, method in self.methods.items()
        }
        return frontier(curves, reference=reference.name, reference_dial=reference.own)

    def accuracy_gain(self, method: Method, other: Method) -> Interval:
        """Return the difference in accuracy, each at its own setting, over the same pairs."""
        ours, theirs = method.right[:, method.own], other.right[:, other.own]
        return paired_bootstrap(ours, theirs, np.bincount(self._prompts))

    def own_ratio(self, method: Method, other: Method) -> Interval:
        """Return the ratio of KL, each at its own setting, over the same text."""
        curves = {}
        for name, m in (("method", method), ("other", other)):
            far = m.curve.kl[:, [m.own]]
            curves[name] = Curve(np.ones_like(far), far)  # learned alike, by fiat
        return frontier(curves, reference="other", reference_dial=0)["method"].ratio

    def tasks(self) -> list[str]:
        """Return the tasks that any method was measured on, in order of appearance."""
        points = (point for method in self.methods.values() for point in method.own_points)
        return list(dict.fromkeys(task for point in points for task in point["tasks"]))

    def level(self, method: Method) -> Sequence[Point]:
        """Return tasks of each seed at the reference's margin; the reference has its own there."""
        return method.own_points if method is self.reference else method.at_reference

    def drop(self, method: Method, task: str, *, level: bool = False) -> Interval | None:
        """Return what the method lost on a task, over the same items; None without the base's.

        It is the base's figure less the method's, or the method's less the base's where less is
        better; of a perplexity (`is_perplexity`) the share by which the method's is the higher.

        Args:
            level: at the reference's margin, and not at the method's own setting.
        """
        key = method.name, task, level
        if key not in self._drops:
            points = self.level(method) if level else method.own_points
            self._drops[key] = self._drop([self.base] if self.base else [], points, task)
        return self._drops[key]

    def lost_beside(self, method: Method, other: Method, task: str) -> Interval | None:
        """Return what the method has less than another at the reference's margin, as `drop`."""
        return self._drop(self.level(other), self.level(method), task)

    def task(self, task: str) -> Mapping[str, Any]:
        """Return what a method that was measured on a task scored there."""
        points = (point for method in self.methods.values() for point in method.own_points)
        return next((p["tasks"][task] for p in points if task in p["tasks"]), {})

    def is_perplexity(self, task: str) -> bool:
        """Return whether a task's figure is a perplexity, the lower the better."""
        return losses.is_perplexity(self.task(task))

    def less_is_better(self, task: str) -> bool:
        """Return whether a task's figure is neither a perplexity nor the higher the better."""
        return losses.less_is_better(self.task(task))

    def _drop(self, others: Sequence[Point], points: Sequence[Point], task: str) -> Interval | None:
        if not others or not points or any(task not in p["tasks"] for p in (*others, *points)):
            return None
        return losses.lost(*([p["tasks"][task] for p in side] for side in (others, points)))


def _beside_unvaried(row: Mapping[str, Any]) -> bool:
    return not row.get("reference_varied", True)


def _runs_of(name: str) -> str:
    """Return the method whose runs begin a curve: DPO's that of `dpo.beta`, one of them its own."""
    return name.partition(".")[0]


def _equal_learning(methods: Mapping[str, Method], reference: Method) -> dict[str, EqualLearning]:
    """Return what each method forgets at the margin of `reference`."""
    curves = {name: method.curve for name, method in methods.items()}
    return frontier(curves, reference=reference.name, reference_dial=reference.own)
