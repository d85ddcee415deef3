"""The report's pictures; the owner of matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np

from qadapter.report.results import Method, Results
from qadapter.stats import Array, Interval

# Okabe and Ito's colours, without the yellow that white swallows; shapes tell them apart as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_GREY = "#555555"
_CHI2_95 = 5.991
"""χ² of two degrees of freedom at 95%."""
_PANELS = 5
"""Tasks side by side."""
_TITLE = 16
"""Characters of a task's name above its panel in a line."""


PICTURES = ("frontier", "equal_learning", "tasks")
"""Names of all pictures."""


def draw(results: Results) -> dict[str, bytes]:
    """Return those of `PICTURES` that the results allow, as PNG, by name."""
    moving = [method for method in results.methods.values() if method.moves]
    found = {}
    if moving:
        found["frontier"] = _frontier(results, moving)
        if results.reference in moving and len(moving) > 1:
            found["equal_learning"] = _equal_learning(results, results.reference, moving)
        tasks = [
            task
            for task in results.tasks()
            if any(results.drop(method, task) is not None for method in moving)
        ]
        if tasks:
            found["tasks"] = _tasks(results, tasks, moving)
    return found


def _styles(results: Results, methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    """Return colour and marker of each method; Q-Adapters have full lines, the others dashes."""
    # The first colours differ most: they go to the first Q-Adapter and the reference.
    first = [results.ours[0] if results.ours else None, results.reference]
    methods = sorted(methods, key=lambda m: first.index(m) if m in first else len(first))
    return {
        method.name: {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": "-" if method.ours else "--",
        }
        for i, method in enumerate(methods)
    }


def _plain(text: str) -> str:
    """Return text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no window

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
        one.set_axisbelow(True)
    return figure, axes


def _plain_numbers(axes: Any) -> None:
    """Mark a logarithmic axis, whose ends are known, at a few places of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0, 3.0) if decades < 5 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _png(figure: Any) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=160, metadata={"Software": None})
    return held.getvalue()


def _frontier(results: Results, methods: Sequence[Method]) -> bytes:
    """Draw margin against KL, one curve a method along its dial, with a 95% region a point."""
    figure, ((axes,),) = _figure(9.0, 5.0)
    styles = _styles(results, methods)
    for method in methods:
        style = styles[method.name]
        shown = [i for i, (_, kl) in enumerate(method.points) if kl.value > 0]
        y, x = ([method.points[i][which].value for i in shown] for which in (0, 1))
        axes.plot(x, y, markersize=5, label=_plain(method.label), **style)
        for i in shown:
            axes.fill(*_region(method, i), color=style["color"], alpha=0.15, lw=0, zorder=1)
        if method.own in shown:  # its own setting stands out
            at = shown.index(method.own)
            ring = {"s": 130, "facecolors": "none", "edgecolors": style["color"], "zorder": 3}
            axes.scatter([x[at]], [y[at]], **ring)
    axes.set_xscale("log")
    _plain_numbers(axes)
    axes.set_xlabel("forgetting: KL to the base on general text, nats a token  (less is better)")
    axes.set_ylabel("learning: mean margin on held-out pairs, nats")
    if results.reference is not None:
        label = f"margin of {_plain(results.reference.label)}"
        axes.axhline(results.reference.margin.value, color=_GREY, lw=1, label=label)
    if results.base is not None:
        axes.axhline(0.0, color=_GREY, lw=1, ls=":", label="the base, KL 0")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return _png(figure)


def _region(method: Method, dial: int) -> tuple[Array, Array]:
    """Return the outline of a point's 95% region in KL and margin.

    The ellipse of normal resamples, with KL in logarithms as the axis has it.
    """
    kl, value = method.curve.kl[1:, dial], method.points[dial][1].value
    # A resampled KL may be 0, which no logarithmic axis shows.
    cloud = np.stack([np.log(np.maximum(kl, value / 30)), method.curve.learning[1:, dial]])
    spread, axes = np.linalg.eigh(np.cov(cloud))
    around = np.linspace(0, 2 * np.pi, 73)
    radii = np.sqrt(_CHI2_95 * np.maximum(spread, 0.0))[:, None]
    x, y = axes @ (radii * np.stack([np.cos(around), np.sin(around)]))
    return np.exp(np.log(value) + x), method.points[dial][0].value + y


def _bars(intervals: Sequence[Interval]) -> list[list[float]]:
    """Return the lengths of error bars, below and above."""
    below = [max(0.0, one.value - one.low) for one in intervals]
    return [below, [max(0.0, one.high - one.value) for one in intervals]]


def _equal_learning(results: Results, reference: Method, methods: Sequence[Method]) -> bytes:
    """Draw each method's KL over the reference's at equal margin; an arrow is not reached."""
    styles = _styles(results, methods)
    rows = [method for method in methods if method is not reference]
    found = results.equal_learning(reference)
    ratios = [found[method.name].ratio for method in rows]
    ends = [x for r in ratios for x in (r.value, r.low, r.high) if 0 < x < math.inf]
    left, right = min([*ends, 0.5]) / 1.5, max([*ends, 2.0]) * 1.5
    figure, ((axes,),) = _figure(9.0, 1.4 + 0.36 * len(rows))
    axes.axvline(1.0, color=_GREY, lw=1)
    for y, (method, ratio) in enumerate(zip(rows, ratios, strict=True)):
        colour, marker = styles[method.name]["color"], styles[method.name]["marker"]
        low, high = max(ratio.low, left), min(ratio.high, right)
        if low < right:
            axes.plot([low, high], [y, y], color=colour)
        if ratio.value < math.inf:
            axes.plot([max(ratio.value, left)], [y], color=colour, marker=marker)
        if ratio.high == math.inf:
            axes.plot([right], [y], color=colour, marker=">", clip_on=False)
            axes.annotate(
                "not reached", (right, y), (8, 0), textcoords="offset points", va="center"
            )
    axes.set(xscale="log", xlim=(left, right), ylim=(len(rows) - 0.5, -0.5))
    _plain_numbers(axes)
    axes.set_yticks(range(len(rows)), [_plain(method.label) for method in rows])
    name = _plain(reference.label)
    axes.set_xlabel(f"KL to the base over {name}’s, at {name}’s margin  (below 1 forgets less)")
    return _png(figure)


def _tasks(results: Results, tasks: Sequence[str], methods: Sequence[Method]) -> bytes:
    """Draw each task's drop below the base with its interval, one panel a task."""
    styles = _styles(results, methods)
    rows = math.ceil(len(tasks) / _PANELS)
    height = rows * (1.1 + 0.3 * len(methods)) + 0.3
    figure, grid = _figure(9.0, height, rows, min(len(tasks), _PANELS))
    for axes in grid.flat[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(grid.flat, tasks, strict=False):
        axes.axvline(0.0, color=_GREY, lw=1)
        for y, method in enumerate(methods):
            drop = results.drop(method, task)
            if drop is not None:
                colour, marker = styles[method.name]["color"], styles[method.name]["marker"]
                bars = _bars([drop])
                axes.errorbar([drop.value], [y], xerr=bars, color=colour, marker=marker, capsize=2)
        unit = "\n(share higher)" if results.is_perplexity(task) else ""
        unit = "\n(rise)" if results.less_is_better(task) else unit
        lines = wrap(task.replace("_", " "), _TITLE, break_long_words=False)
        name = "_\n".join(lines).replace(" ", "_")
        axes.set_title(_plain(name) + unit, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(methods)), [_plain(method.label) for method in methods])
    grid[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    figure.supxlabel("drop below the base  (0 is nothing lost)", fontsize=10)
    return _png(figure)
