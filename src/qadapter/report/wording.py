"""What the figures say, in words: decided by confidence intervals, never by point estimates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from qadapter.report.results import Method, Results
from qadapter.stats import EqualLearning, Interval

Outcome = Literal["less", "more", "open", "missed"]

VERDICTS: dict[Outcome, str] = {
    "less": "forgets less",
    "more": "forgets more",
    "open": "no difference shown",
    "missed": "does not reach that margin",
}
_AGAINST_REFERENCE: dict[Outcome, str] = {
    "less": "{} forgot less",
    "open": "no difference was shown for {}",
    "more": "{} forgot more",
    "missed": "{} did not reach that margin",
}
_AGAINST_OTHERS: dict[Outcome, str] = {
    "less": "it forgets less than {}",
    "open": "no difference is shown from {}",
    "more": "it forgets more than {}",
    "missed": "it does not reach the margin of {}",
}
_ROUNDING = 1e-9
"""Sums of the same figures in another order differ by less."""
_NOTHING = 1e-12
"""Of figures that cancel less is left, and no figure that a report tells is as small."""


def outcome(found: EqualLearning) -> Outcome:
    """Return what the interval of the ratio allows to say.

    `missed` if at least 97.5% of resamples never reach the margin; `open` if 1 is inside, give or
    take rounding.
    """
    if math.isinf(found.ratio.low):
        return "missed"
    if found.ratio.high < 1 - _ROUNDING:
        return "less"
    return "more" if found.ratio.low > 1 + _ROUNDING else "open"


def number(value: float) -> str:
    """Return three digits; inf is a margin that is not reached, and what rounding leaves is 0."""
    if math.isinf(value):
        return "not reached"
    if abs(value) <= _NOTHING:
        return "0"
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def percent(value: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * value:.1f}%".replace("-", "−")


def fine_percent(value: float) -> str:
    """Return a share as a percentage of three digits, where an interval may end close to 0."""
    in_hundred = 100 * value
    if abs(in_hundred) < 1e-3:
        return "0%"
    return f"{number(in_hundred)}%" if abs(in_hundred) < 999.5 else percent(value)


def ranged(interval: Interval, told: Callable[[float], str] = number) -> str:
    """Return a figure with its interval, as `told` writes numbers; no line ends inside it."""
    if math.isinf(interval.value) and math.isinf(interval.low):
        return told(interval.value)
    return f"{told(interval.value)} ({_between(interval, told)})"


def _between(interval: Interval, told: Callable[[float], str] = number) -> str:
    return f"{told(interval.low)} to {told(interval.high)}".replace(" ", "\u00a0")


def _brief(interval: Interval, told: Callable[[float], str] = number) -> str:
    return f"{told(interval.value)}, {_between(interval, told)}"


def _listed(names: Iterable[str]) -> str:
    """Return names in quotation marks: they may have commas of their own."""
    return ", ".join(f"“{name}”" for name in names)


def lead(results: Results) -> str:
    """Return the answer to the report's question, for every Q-Adapter that has a curve."""
    if not results.methods:
        return "No method finished, so nothing can be said."
    if not results.ours:
        return "No Q-Adapter finished beside the reference, so nothing is said of it."
    if results.reference is None:
        name = results.comparison["reference"]
        return f"The reference, {name}, has no figures here that others could be put beside."
    reference = results.reference
    return (
        f"Against {reference.label}, at its margin on held-out pairs "
        f"({number(reference.margin.value)} nats), by drift from the base on general text as a "
        f"ratio to {reference.label}’s (95% CI): "
        f"{_verdicts(results, results.headlines, reference)}."
    )


def _by_ratio(results: Results, methods: Sequence[Method], reference: Method) -> list[Method]:
    """Return methods by what they forget, least first: their order in a file says nothing."""
    found = results.equal_learning(reference)
    return sorted(methods, key=lambda method: (found[method.name].ratio.value, method.label))


def _verdicts(results: Results, methods: Sequence[Method], reference: Method) -> str:
    found = results.equal_learning(reference)
    cases = [(m.label, found[m.name]) for m in _by_ratio(results, methods, reference)]
    return _grouped(cases, _AGAINST_REFERENCE)


def paragraphs(results: Results) -> list[str]:
    """Return what follows from the figures, the losses as plainly as the wins.

    All Q-Adapters against the reference; then each of those in the lead that have the most seeds;
    then the caveats.
    """
    told: list[list[str]] = []
    if results.ours and (reference := results.reference):
        most = max(len(method.runs) for method in results.headlines)
        detailed = [method for method in results.headlines if len(method.runs) == most]
        told = [
            [lead(results), *_without_curve(results, reference)],
            *(_detail(results, m, reference) for m in _by_ratio(results, detailed, reference)),
        ]
    return [" ".join(sentences) for sentences in [*told, _caveats(results)] if sentences]


def _without_curve(results: Results, reference: Method) -> list[str]:
    rest = [method for method in results.ours if method not in results.headlines]
    if not rest:
        return []
    return [f"Of those without a dial, or trained anew: {_verdicts(results, rest, reference)}."]


def _detail(results: Results, method: Method, reference: Method) -> list[str]:
    told = _learned(results, method, reference)
    found = results.equal_learning(reference)[method.name]
    if 0 < found.not_reached < 1:
        told.append(
            f"In {percent(found.not_reached)} of the resamples it does not reach "
            f"{reference.label}’s margin."
        )
    told += _beside_others(results, method)
    told += _on_answers(results, method, reference)
    return told + _kept(results, method, reference)


def _grouped(cases: Sequence[tuple[str, EqualLearning]], told: Mapping[Outcome, str]) -> str:
    """Return one part an outcome, as `told`, with “A” (0.3, 0.2 to 0.4), “B” (…) for its braces."""
    parts = []
    for key, verdict in told.items():
        names = [
            _listed([label]) if key == "missed" else f"{_listed([label])} ({_brief(found.ratio)})"
            for label, found in cases
            if outcome(found) == key
        ]
        if names:
            parts.append(verdict.format(", ".join(names)))
    return "; ".join(parts)


def _beside_others(results: Results, method: Method) -> list[str]:
    cases = [
        (other.label, results.equal_learning(other)[method.name])
        for other in results.others
        if other.moves
    ]
    if not cases:
        return []
    return [
        "Beside each other method, at that method’s own margin (ratio of drifts, 95% CI), "
        f"{_grouped(cases, _AGAINST_OTHERS)}."
    ]


def _learned(results: Results, method: Method, reference: Method) -> list[str]:
    gain = results.accuracy_gain(method, reference)
    if gain.low > _ROUNDING:
        verdict = "it learns more"
    elif gain.high < -_ROUNDING:
        verdict = "it learns less"
    else:
        verdict = "no difference in learning is shown"
    drift = ranged(results.own_ratio(method, reference))
    return [
        f"{_listed([method.label])} beside {reference.label}, each at its own setting: {verdict}, "
        f"{percent(method.accuracy.value)} of held-out pairs against "
        f"{percent(reference.accuracy.value)}, a difference of {ranged(gain, percent)}; "
        f"its drift is {drift} times {reference.label}’s."
    ]


def _on_answers(results: Results, method: Method, reference: Method) -> list[str]:
    ours, theirs = (m.mean("kl_generations") for m in (method, reference))
    if ours is None or not theirs:
        return []
    level = results.equal_on_answers(reference).get(method.name)
    there = f"at {reference.label}’s margin the ratio is {ranged(level.ratio)}" if level else ""
    if level and math.isinf(level.ratio.value):
        there = f"it does not reach {reference.label}’s margin"
    return [
        f"On the base’s own answers it drifts {number(ours / theirs)} times as far as "
        f"{reference.label} ({number(ours)} against {number(theirs)} nats a token, each at its own "
        f"setting){f'; {there}' if there else ', means over seeds without an interval'}."
    ]


def _kept(results: Results, method: Method, reference: Method) -> list[str]:
    dial = method.at_reference[0]["dial"] if method.at_reference else None
    told = []
    if dial not in (None, method.dials[method.own]):
        where = f"with its dial at {dial:g}, where its mean margin is {reference.label}’s"
        told += _drops(results, method, where, level=True)
    told += _drops(results, method, "at its own setting", level=False)
    return told or ["No task was measured on it and on the base."]


def _drops(results: Results, method: Method, where: str, *, level: bool) -> list[str]:
    drops = {task: results.drop(method, task, level=level) for task in results.tasks()}
    known = {task: drop for task, drop in drops.items() if drop is not None}
    if not known:
        return []

    unit = {task: fine_percent if results.is_perplexity(task) else number for task in known}

    def of(tasks: Iterable[str]) -> str:
        return ", ".join(
            f"{task}{', of which less is better' * results.less_is_better(task)} "
            f"({_brief(known[task], unit[task])})"
            for task in tasks
        )

    lost = [task for task, d in known.items() if d.low > _ROUNDING]
    gained = [task for task, d in known.items() if d.high < -_ROUNDING]
    same = [task for task in known if task not in (*lost, *gained)]
    parts = [
        f"a drop on {of(lost)}" if lost else "",
        f"a gain on {of(gained)}" if gained else "",
        f"no drop shown on {of(same)}" if same else "",
    ]
    told = "; ".join(part for part in parts if part)
    return [f"On the tasks, {where} (95% CI): {told}."]


def _caveats(results: Results) -> list[str]:
    told = []
    seeds = {len(m.runs) for m in results.methods.values() if m.name != "base"}
    if seeds and min(seeds) < 3:
        told.append(
            "Some methods have fewer than three seeds, so their intervals know little or nothing "
            "of how runs differ."
        )
    budgets = set()
    given = []
    for name, method in results.comparison["methods"].items():
        settings = results.given(name)
        if settings:
            given.append(f"{_listed([method['label']])} ({', '.join(settings)})")
        if (search := method["search"]) and set(search["best"] or ()) != set(settings):
            budgets.add(len(search["trials"]))
    if given:
        told.append(
            f"Settings were given for {', '.join(given)}, and not searched: how they were found, "
            "and with what trouble, is not known here."
        )
    if budgets == {0}:
        but = ", but for what was given" if given else ""
        ours = results.comparison["methods"].get("qadapter")
        two = " (“Q-Adapter” at two)" if ours and "epochs" not in results.given("qadapter") else ""
        told.append(
            "No method was tuned here: each has its library's defaults, or ours, at one rate and "
            f"one epoch{two}{but}."
        )
    if len(budgets) > 1:
        told.append(
            f"The tuning budgets differ, from {min(budgets)} to {max(budgets)} trials: a method "
            "tuned less than another is at a disadvantage here."
        )
    if n := sum(count for count, _ in results.otherwise_made):
        told.append(
            f"{n} {'result' if n == 1 else 'results'} behind this came from another machine or "
            "version, which is named below."
        )
    if results.unlike:
        told.append(f"Left out, since scored on other pairs or text: {', '.join(results.unlike)}.")
    if n := len(results.comparison["failures"]):
        told.append(f"{n} {'cell' if n == 1 else 'cells'} failed; they are listed below.")
    return told
