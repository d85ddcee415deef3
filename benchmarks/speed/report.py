"""From raw runs to medians, paired ratios, slopes, a table and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import linear_regression, median
from typing import Any

Row = dict[str, Any]
STATES = 512
"""Of which the soft value is taken in `growth`."""
Values = dict[int, Any]
"""A figure of each repeat."""


def spread(values: Values) -> dict[str, Any]:
    """Return the median, least, most, and all values."""
    numbers = list(values.values())
    return {
        "median": median(numbers),
        "min": min(numbers),
        "max": max(numbers),
        "values": numbers,
    }


def ratio(values: Values, to: Values) -> dict[str, Any] | None:
    """Return `spread` of the ratios of the same repeats, None where there are none."""
    paired = {r: v / to[r] for r, v in values.items() if r in to}
    return spread(paired) if paired else None


def _pick(rows: list[Row], section: str, get: Callable[[Row], Any]) -> dict[str, Values]:
    """Return a figure of each case of a section, by repeat."""
    out: dict[str, Values] = {}
    for row in rows:
        if row["section"] == section and "error" not in row["result"]:
            out.setdefault(row["name"], {})[row["repeat"]] = get(row["result"])
    return out


def _training(rows: list[Row]) -> dict[str, Any]:
    """Return pairs a second, memory and operations, and their ratios to TRL's best."""
    first = _pick(rows, "training", lambda r: r["epochs"][0]["pairs_per_second"])
    later = _pick(rows, "training", lambda r: r["epochs"][-1]["pairs_per_second"])
    peak = _pick(rows, "training", lambda r: r["peak_gib"])
    extra = _pick(rows, "training", lambda r: r["extra_gib"])
    flops = _pick(rows, "training", lambda r: r["epochs"][0].get("flops_per_second"))
    dtype = _pick(rows, "training", lambda r: r["dtype"])
    best = first.get("trl_best", {})
    out: dict[str, Any] = {}
    for name in first:
        out[name] = {
            "first_epoch": spread(first[name]),
            "later_epochs": spread(later[name]),
            "peak_gib": spread(peak[name]),
            "extra_gib": spread(extra[name]),
            "first_to_trl": ratio(first[name], best),
            "later_to_trl_first": ratio(later[name], best),
            "later_to_trl_later": ratio(later[name], later.get("trl_best", {})),
            "peak_to_trl": ratio(peak[name], peak.get("trl_best", {})),
            "extra_to_trl": ratio(extra[name], extra.get("trl_best", {})),
            "dtype": next(iter(dtype[name].values())),
            "flops_per_second": flops[name].get(0),
        }
    return out


def _decoding(rows: list[Row]) -> dict[str, Any]:
    """Return times a token and of the first, and their ratios to the base's, by batch size."""
    runs = _pick(rows, "decoding", lambda r: r["batches"]).get("decoding", {})
    out: dict[str, Any] = {}
    for figure in ("token_ms", "first_ms", "tokens_per_second"):
        values: dict[tuple[str, str], Values] = {}
        for repeat, kinds in runs.items():
            for kind, batches in kinds.items():
                for batch, figures in batches.items():
                    values.setdefault((kind, batch), {})[repeat] = figures[figure]
        for (kind, batch), of in values.items():
            place = out.setdefault(kind, {}).setdefault(batch, {})
            place[figure] = spread(of)
            place[f"{figure}_to_base"] = ratio(of, values["base", batch])
    return out


def _estimate(rows: list[Row]) -> dict[str, Any]:
    """Return what dry runs said, as shares of what was then measured in the same repeat."""
    out: dict[str, Any] = {}
    figures: dict[str, Callable[[Row], Any]] = {
        # A dry run says how long; the inverse of its pace is that.
        "first_epoch": lambda r: 1 / r["epochs"][0]["tokens_per_second"],
        "later_epochs": lambda r: 1 / r["epochs"][-1]["tokens_per_second"],
        "peak_gib": lambda r: r["peak_gib"],
    }
    names = {row["name"] for row in rows if row["section"] == "estimate"}
    rows = [row for row in rows if row["name"] in names]
    for figure, get in figures.items():
        told, measured = (_pick(rows, section, get) for section in ("estimate", "training"))
        for name, values in told.items():
            out.setdefault(name, {})[figure] = ratio(values, measured.get(name, {}))
    return out


def slope(x: list[float], y: list[float]) -> float | None:
    """Return the exponent of `y ~ x^slope`, None where it cannot be fitted."""
    if len(x) < 2 or min(y) <= 0:
        return None
    return linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def _growth(rows: list[Row]) -> dict[str, Any]:
    """Return time and memory against each size, with their exponents."""
    out: dict[str, Any] = {}
    for row in rows:
        if row["section"] != "growth" or "error" in row["result"]:
            continue
        axis, x = row["name"].split()
        place = out.setdefault(axis, {"x": [], "seconds": [], "extra_gib": [], "peak_gib": []})
        place["x"].append(int(x))
        for name in ("seconds", "extra_gib", "peak_gib"):
            place[name].append(row["result"][name])
    for place in out.values():
        place["slopes"] = {
            name: slope(place["x"], place[name]) for name in ("seconds", "extra_gib", "peak_gib")
        }
    return out


def _single(rows: list[Row], section: str) -> dict[str, Any]:
    """Return the results of a section that is run once."""
    return {r["name"]: r["result"] for r in rows if r["section"] == section}


def _gemm(rows: list[Row]) -> dict[str, Any]:
    """Return the best operations a second by dtype."""
    runs = _pick(rows, "gemm", lambda r: {name: of["best"] for name, of in r.items()})
    by_repeat = runs.get("gemm", {})
    names = next(iter(by_repeat.values()), {})
    return {n: spread({i: best[n] for i, best in by_repeat.items()}) for n in names}


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Return all that the JSON holds beside the raw runs."""
    summary = {
        "training": _training(rows),
        "estimate": _estimate(rows),
        "gemm": _gemm(rows),
        "decoding": _decoding(rows),
        "growth": _growth(rows),
        "profile": _single(rows, "profile"),
        "quality": _single(rows, "quality"),
        "errors": {
            f"{r['section']}: {r['name']}": r["result"]["error"]
            for r in rows
            if "error" in r["result"]
        },
    }
    for case in summary["training"].values():
        flops, peak = case["flops_per_second"], _at(summary, "gemm", case["dtype"], "median")
        case["share_of_gemm_peak"] = flops / peak if flops and peak else None
    return summary


# ── the table ───────────────────────────────────────────────────────────────────────────────────


def _at(summary: Any, *path: str) -> Any:
    """Return what stands at a path, None where something is missing."""
    for name in path:
        summary = summary.get(name) if isinstance(summary, dict) else None
    return summary


def bars(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None, str, float]]:
    """Return what was wanted: its name, what was measured, the side, the limit."""

    def training(name: str, figure: str) -> Any:
        return _at(summary, "training", name, figure)

    def alone(value: float | None) -> dict[str, Any] | None:
        return None if value is None else spread({0: value})

    rows = [
        ("pairs/s, first epoch, to TRL's best", training("ours_k8", "first_to_trl"), "≥", 6.0),
        (
            "pairs/s, cached epoch, to TRL's best first",
            training("ours_k8", "later_to_trl_first"),
            "≥",
            12.0,
        ),
        (
            "pairs/s, all layers, to TRL's best",
            training("ours_k30", "first_to_trl"),
            "≥",
            2.5,
        ),
        ("peak memory, to TRL's best", training("ours_k8", "peak_to_trl"), "≤", 1 / 3),
        (
            "share of the GEMM peak, first epoch",
            alone(training("ours_k8", "share_of_gemm_peak")),
            "≥",
            0.5,
        ),
    ]
    for name, limit in (("policy_k8", 1.25), ("policy_k30", 1.7)):
        for batch, figures in (_at(summary, "decoding", name) or {}).items():
            label = f"ms a token to the base, {name}, batch {batch}"
            rows.append((label, figures["token_ms_to_base"], "≤", limit))
    for name, told in summary["estimate"].items():
        for figure, values in told.items():
            off = values and spread({i: abs(v - 1) for i, v in enumerate(values["values"])})
            label = f"a dry run's error, {name}, {figure.replace('_', ' ')}"
            rows.append((label, off, "≤", 0.25))
    words = _at(summary, "growth", "words")
    if words and len(words["x"]) > 1:
        # Both are a few MiB, whose ratio is noise: their difference is told in whole logits'.
        logits = STATES * (words["x"][-1] - words["x"][0]) * 4 / 2**30
        grown = max(words["extra_gib"][-1] - words["extra_gib"][0], 0.0)
        label = "growth of the soft value's memory with the vocabulary, to that of float32 logits"
        rows.append((label, alone(grown / logits), "≤", 0.05))
    return rows


def table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of measured against wanted."""
    lines = ["| what | measured | range | wanted | |", "|---|---|---|---|---|"]
    for name, value, side, limit in bars(summary):
        if value is None:
            lines.append(f"| {name} | not run | | {side} {limit:.3g} | |")
            continue
        met = value["median"] >= limit if side == "≥" else value["median"] <= limit
        lines.append(
            f"| {name} | {value['median']:.3g} | {value['min']:.3g}–{value['max']:.3g} "
            f"| {side} {limit:.3g} | {'met' if met else 'missed'} |"
        )
    for name, result in summary["quality"].items():
        if "error" not in result:
            lines.append(
                f"| held-out accuracy and KL on other text, {name} | {result['accuracy']:.3f}, "
                f"{result['kl_text']:.4f} | | | |"
            )
    return "\n".join(lines)


# ── the figure ──────────────────────────────────────────────────────────────────────────────────

_BARS = (
    ("ours, K=8, cached", "ours_k8", "later_epochs"),
    ("ours, K=8, first epoch", "ours_k8", "first_epoch"),
    ("ours, all layers", "ours_k30", "first_epoch"),
    ("TRL, last 8 layers", "trl_k8", "first_epoch"),
    ("TRL, best", "trl_best", "first_epoch"),
    ("authors' way", "authors_k30", "first_epoch"),
)


def _bars(axes: Any, summary: dict[str, Any], bars: list[tuple[str, Any]], label: str) -> None:
    """Draw horizontal bars with their range, the first on top."""
    shown = [(name, value) for name, value in bars if value]
    for i, (name, value) in enumerate(reversed(shown)):
        middle = value["median"]
        error = [[middle - value["min"]], [value["max"] - middle]]
        colour = "tab:blue" if name.startswith("ours") else "tab:gray"
        axes.barh(i, middle, xerr=error, color=colour, capsize=2)
        axes.annotate(f" {middle:.2g}", (value["max"], i), va="center", fontsize=8)
    axes.set(yticks=range(len(shown)), yticklabels=[name for name, _ in reversed(shown)])
    axes.set(xlabel=label)
    axes.margins(x=0.15)


def draw(summary: dict[str, Any], path: str) -> None:
    """Draw pace, memory, decoding and growth."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "qadapter", "font.size": 9, "axes.spines.top": False}
    figure, ((speed, memory), (decoding, growth)) = plt.subplots(
        2, 2, figsize=(9, 5.6), layout="constrained"
    )
    training = summary["training"]
    paces = [(label, _at(training, name, what)) for label, name, what in _BARS]
    _bars(speed, summary, paces, "pairs a second")
    peaks = [(t, _at(training, n, "peak_gib")) for t, n, what in _BARS if what == "first_epoch"]
    _bars(memory, summary, peaks, "peak memory, GiB")
    for name, figures in summary["decoding"].items():
        ratios = {int(b): f["token_ms_to_base"] for b, f in figures.items()}
        points = [(b, r["median"]) for b, r in ratios.items() if r]
        if points:
            decoding.plot(*zip(*points, strict=True), marker="o", label=name.replace("_", " "))
    decoding.set(xscale="log", xlabel="batch", ylabel="time a token, to the base")
    for axis, values in summary["growth"].items():
        start = values["x"][0], values["seconds"][0]
        x = [v / start[0] for v in values["x"]]
        y = [v / start[1] for v in values["seconds"]]
        exponent = values["slopes"]["seconds"]
        label = axis if exponent is None else f"{axis}, exponent {exponent:.2f}"
        growth.plot(x, y, marker="o", label=label)
    growth.set(xscale="log", yscale="log", xlabel="times as large", ylabel="times as long")
    for axes in (decoding, growth):
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    for axes in figure.axes:
        axes.spines["right"].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
