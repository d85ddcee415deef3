"""The report's tables: every figure with its interval, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from qadapter.report.results import UNVARIED, Method, Results
from qadapter.report.wording import VERDICTS, fine_percent, number, outcome, percent, ranged
from qadapter.stats import Interval, half_ties

NONE = "–"
"""Stands where nothing was measured."""


@dataclass(frozen=True)
class Table:
    """Rows of text under column heads."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def headline(results: Results) -> Table:
    """Return learning and forgetting of each method, and its forgetting at equal learning."""
    reference, name = results.reference, results.reference_label
    by_accuracy = results.equal_accuracy(reference) if reference else {}
    rows = []
    for method in results.methods.values():
        row = [method.label, ranged(method.accuracy, percent), ranged(method.kl)]
        own = results.own_ratio(method, reference) if reference and method.moves else None
        row += [ranged(own) if own else NONE, ranged(method.margin)]
        if reference is None or not method.moves:
            row += [NONE] * 5
        else:
            found = results.equal_learning(reference)[method.name]
            verdict = "the reference" if method is reference else VERDICTS[outcome(found)]
            row += [ranged(found.kl), ranged(found.ratio), percent(found.not_reached), verdict]
            row.append(ranged(by_accuracy[method.name].ratio))
        rows.append(row)
    columns = (
        "Method",
        "Accuracy, own setting",
        "KL, own setting",
        f"Ratio to {name}’s, own settings",
        "Margin, own setting",
        f"KL at {name}’s margin",
        f"Ratio to {name}’s KL",
        "Resamples that never reach it",
        "Verdict",
        f"Ratio at {name}’s accuracy instead",
    )
    return Table(columns, rows)


def points(results: Results) -> Table:
    """Return every point of every curve in the first picture."""
    rows = [
        [method.label, f"{dial:g}", ranged(accuracy, percent), ranged(margin), ranged(kl)]
        for method in results.methods.values()
        for dial, accuracy, (margin, kl) in zip(
            method.dials, method.accuracies, method.points, strict=True
        )
    ]
    return Table(("Method", "Dial", "Accuracy", "Margin", "KL"), rows)


def learning(results: Results) -> Table:
    """Return accuracy, margins and win rates at each method's own setting."""
    points = [point for m in results.methods.values() for point in m.own_points]
    judges = list(dict.fromkeys(rate["judge"] for p in points for rate in p["win_rates"]))
    rows = [
        [
            method.label,
            str(len(method.runs)),
            ranged(method.accuracy, percent),
            ranged(method.by_token[0], percent) if method.by_token else NONE,
            ranged(method.margin),
            ranged(method.by_token[1])
            if method.by_token
            else _figure(method.mean("margin_per_token")),
            ranged(method.ranking, percent),
            *(_win_rate(method, judge) for judge in judges),
        ]
        for method in results.methods.values()
    ]
    if (longer := results.comparison["length_baseline"]) is not None:
        which = "longer" if longer >= 0.5 else "shorter"
        told = [NONE, percent(max(longer, 1 - longer)), *[NONE] * (4 + len(judges))]
        rows.append([f"The {which} response, whatever it says", *told])
    figures = ("Accuracy a token", "Margin, nats", "Margin a token, nats", "Ranking accuracy")
    columns = ("Method", "Seeds", "Accuracy", *figures)
    return Table((*columns, *(f"Mean vote of {judge}" for judge in judges)), rows)


def _win_rate(method: Method, judge: str) -> str:
    """Return the mean win rate over seeds; its interval reaches from the lowest to the highest.

    Beside it stands the share of answers preferred, which is another number where votes are
    probabilities.
    """
    rates = [r for p in method.own_points for r in p["win_rates"] if r["judge"] == judge]
    if not rates:
        return NONE
    interval = Interval(
        fmean(rate["value"] for rate in rates),
        min(rate["low"] for rate in rates),
        max(rate["high"] for rate in rates),
    )
    right = rates[0]["judge_accuracy"]
    known = "a judge not validated" if right is None else f"a judge right in {percent(right)}"
    n, ties = (sum(rate[key] for rate in rates) for key in ("n", "ties"))
    votes = [vote for rate in rates for vote in rate["items"] if vote is not None]
    preferred = fmean(half_ties(vote, 0.5) for vote in votes)
    longer = fmean(rate["length_delta"] for rate in rates)
    counted = f"{percent(preferred)} preferred, {ties} ties of {n}"
    if len(rates) < len(method.runs):
        counted = f"{len(rates)} of {len(method.runs)} seeds; {counted}"
    return f"{ranged(interval, percent)}; {counted}; {known}; {longer:+.1f} words"


def refused(results: Results) -> Table:
    """Return the judges that give no verdict, and why."""
    reasons: dict[str, list[str]] = {}
    for method in results.methods.values():
        for point in method.own_points:
            for reason in point.get("judges_refused", ()):
                reasons.setdefault(reason, []).append(method.label)
    rows = [[reason, ", ".join(dict.fromkeys(labels))] for reason, labels in reasons.items()]
    return Table(("Judge that gives no win rate", "Methods"), rows)


def forgetting(results: Results) -> Table:
    """Return drift from the base at own settings; on its answers at the reference's margin, too."""
    reference, rows = results.reference, []
    level = results.equal_on_answers(reference) if reference else {}
    for method in results.methods.values():
        changed, at_answers = method.mean("greedy_changed"), method.on_answers
        rows.append(
            [
                method.label,
                ranged(method.kl),
                ranged(at_answers.kl[method.own])
                if at_answers
                else _figure(method.mean("kl_generations")),
                ranged(level[method.name].ratio) if method.name in level else NONE,
                NONE if changed is None else percent(changed),
                _figure(method.mean("perplexity")),
                _figure(method.mean("base_perplexity")),
            ]
        )
    columns = (
        "Method",
        "KL on general text",
        "KL on the base’s answers",
        f"The same at {results.reference_label}’s margin, ratio to its",
        "Greedy answers changed",
        "Perplexity",
        "The base’s perplexity",
    )
    return Table(columns, rows)


def tasks(results: Results) -> Table:
    """Return each task's figure and its drop below the base's, at each method's own setting."""
    rows = [
        [method.label, *_tasks(results, method, level=False)] for method in results.methods.values()
    ]
    return Table(("Method", *_task_heads(results)), rows)


def level_tasks(results: Results) -> Table | None:
    """Return the same at the reference's margin; None unless a method was measured there."""
    if not any(method.at_reference for method in results.methods.values()):
        return None
    rows = [
        [method.label, f"{points[0]['dial']:g}", *_tasks(results, method, level=True)]
        for method in results.methods.values()
        if (points := results.level(method))
    ]
    return Table(("Method", "Dial there", *_task_heads(results)), rows)


def beside_baselines(results: Results) -> Table | None:
    """Return what each Q-Adapter has less of each task than each other method, at equal learning.

    At the reference's margin; None unless a Q-Adapter and another were measured there.
    """
    names, heads, rows = results.tasks(), _task_heads(results), []
    baselines = [*([results.reference] if results.reference else []), *results.others]
    for method in results.headlines:
        for other in baselines:
            found = [results.lost_beside(method, other, task) for task in names]
            if any(found):
                told = zip(found, map(results.is_perplexity, names), strict=True)
                cells = [
                    NONE if lost is None else ranged(lost, fine_percent if share else number)
                    for lost, share in told
                ]
                rows.append([method.label, other.label, *cells])
    return Table(("Method", "Beside", *heads), rows) if rows else None


def _task_heads(results: Results) -> list[str]:
    found = {task: results.task(task) for task in results.tasks()}
    return [f"{name}: {task['metric']}, n = {task['n']}" for name, task in found.items()]


def _tasks(results: Results, method: Method, *, level: bool) -> list[str]:
    """Return the method's cell of each task: the mean over seeds, and what was lost."""
    points, cells = results.level(method) if level else method.own_points, []
    for task in results.tasks():
        found = [p["tasks"][task]["value"] for p in points if task in p["tasks"]]
        cell = number(fmean(found)) if found else NONE
        if method.name != "base" and (drop := results.drop(method, task, level=level)):
            if results.is_perplexity(task):
                cell += f"; higher by {ranged(drop, fine_percent)}"
            else:
                cell += f"; {'rise' if results.less_is_better(task) else 'drop'} {ranged(drop)}"
        cells.append(cell)
    return cells


def tuning(results: Results) -> Table:
    """Return how each method's settings were found."""
    rows = []
    for name, fields in results.comparison["methods"].items():
        search = fields["search"]
        row = [fields["label"], fields["library"], fields["about"], fields["dial"]]
        row.append(_settings(fields["fixed"]) if "fixed" in fields else NONE)
        if search is None:
            row += ["not searched", NONE, NONE, NONE]
        elif not search["trials"]:
            whole = set(search["best"]) == {*results.given(name)}
            found = "given" if whole else "not searched" + _given(results, name)
            row += [found, "0", _settings(search["best"]), NONE]
        else:
            trials = search["trials"]
            failed = sum(trial["state"] == "failed" for trial in trials)
            row += [
                f"{search['sampler']}: {_settings(search['space'])}{_given(results, name)}",
                f"{len(trials)}" + (f", {failed} failed" if failed else ""),
                _settings(search["best"]),
                f"{sum(trial['seconds'] for trial in trials):,.0f} s",
            ]
        rows.append(row)
    columns = ("Method", "Library", "What it is", "Its dial", "Never searched")
    return Table((*columns, "Search", "Trials", "Best", "Took"), rows)


def _given(results: Results, name: str) -> str:
    return "".join(f"; {setting} was given" for setting in results.given(name))


def trials(results: Results) -> Table:
    """Return every trial of every search."""
    rows = []
    for fields in results.comparison["methods"].values():
        for trial in (fields["search"] or {}).get("trials", ()):
            good = trial["state"] == "complete"
            rows.append(
                [
                    fields["label"],
                    _settings(trial["params"]),
                    percent(trial["accuracy"]) if good else NONE,
                    *(number(trial[f]) if good else NONE for f in ("kl", "margin")),
                    number(trial["kl_of_one_nat"]) if good and trial["margin"] > 0 else NONE,
                    trial["state"],
                    f"{trial['seconds']:,.0f} s",
                ]
            )
    figures = ("Accuracy", "KL", "Margin", "KL of one nat")
    return Table(("Method", "Settings", *figures, "State", "Took"), rows)


def runs(results: Results) -> Table:
    """Return every run of the comparison: what it took, its settings, where its adapter lies."""
    found = [
        (fields["label"], run)
        for fields in results.comparison["methods"].values()
        for run in fields["runs"]
    ]
    placed = any("adapter" in run for _, run in found)
    rows = [
        [
            label,
            str(run["seed"]),
            f"{run['seconds']:,.0f} s",
            f"{run['peak_gib']:.1f} GiB",
            _settings(run["params"]),
            *[run.get("adapter", NONE)] * placed,
        ]
        for label, run in found
    ]
    return Table(("Method", "Seed", "Took", "Peak memory", "Settings", *["Adapter"] * placed), rows)


def failures(results: Results) -> Table:
    """Return the cells that failed, and why."""
    rows = [[failure["cell"], failure["error"]] for failure in results.comparison["failures"]]
    return Table(("Cell", "Error"), rows)


def robustness(results: Results) -> Table:
    """Return learning, forgetting and forgetting at equal learning under each variation."""
    rows, drawn = [], results.comparison["robustness"]
    fit = {
        row["variation"]: row["within_max_length"] for row in drawn if "within_max_length" in row
    }
    if "within_max_length" in (train := results.comparison["data"]["train"]):
        fit[UNVARIED] = train["within_max_length"]
    for variation, methods in results.varied.items():
        level = results.varied_equal_learning(variation)
        for name, method in methods.items():
            seeds = str(len(method.runs))
            figures = [ranged(method.accuracy, percent), ranged(method.margin), ranged(method.kl)]
            ratio = ranged(level[name].ratio) if level and method.moves else NONE
            if ratio != NONE and results.beside_unvaried(variation):
                ratio += f", to {results.reference_label} as it was"
            pairs = f"{fit[variation]:,}" if variation in fit else NONE
            rows.append([variation, method.label, seeds, pairs, *figures, ratio])
    columns = ("Variation", "Method", "Seeds", "Training pairs", "Accuracy", "Margin", "KL")
    return Table((*columns, f"Ratio to {results.reference_label}’s KL, varied alike"), rows)


def made(results: Results) -> Table:
    """Return where the figures come from: data, machine, versions."""
    found = results.comparison
    seeds = sorted({run["seed"] for fields in found["methods"].values() for run in fields["runs"]})
    rows = [
        ["Command", found["command"]],
        ["Written", found["created"]],
        ["Seeds", ", ".join(map(str, seeds)) or NONE],
        *([f"Data: {name}", _settings(fields)] for name, fields in found["data"].items()),
        *([f"Machine: {name}", str(value)] for name, value in found["machine"].items()),
        *([f"Version: {name}", str(value)] for name, value in found["versions"].items()),
        *([f"{n} results made by", _settings(o)] for n, o in results.otherwise_made),
    ]
    return Table(("What", "Value"), rows)


def _figure(value: float | None) -> str:
    return NONE if value is None else number(value)


def _settings(fields: Mapping[str, Any] | None) -> str:
    def told(value: object) -> str:
        if isinstance(value, str):
            return value
        return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)

    return ", ".join(f"{name} {told(value)}" for name, value in (fields or {}).items()) or "none"


def pretty(config: Mapping[str, Any]) -> str:
    """Return a configuration as indented JSON."""
    return json.dumps(config, indent=2, ensure_ascii=False)
