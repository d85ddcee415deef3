"""The report of a made-up comparison: it shows what the JSON holds, and says who wins."""

from __future__ import annotations

import base64
import copy
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from qadapter.errors import UserError
from qadapter.report import figures, losses, tables, write_report
from qadapter.report.results import Results
from qadapter.report.wording import fine_percent, lead, number, paragraphs, percent, ranged
from qadapter.stats import (
    INTERVALS,
    EqualLearning,
    Interval,
    by_group,
    frontier,
    mean_intervals,
    numbered,
    paired_bootstrap,
    resampled_curve,
    share_difference,
    share_interval,
    wilson_interval,
)

Outline = pytest.importorskip("matplotlib.path").Path

ITEMS, WINDOWS, TOKENS = 200, 40, 255
DIALS = (0.5, 1.0, 1.5)
DIFFICULTY = np.random.default_rng(0).permutation(ITEMS) / ITEMS
"""A method of strength x judges the pairs rightly that are easier than x."""
ROUGHNESS = np.random.default_rng(1).gamma(8.0, 1 / 8, WINDOWS)
"""How much a window of text shows of a drift."""


def point(dial: float, accuracy: float, kl: float, seed: int, task_drop: float) -> dict[str, Any]:
    rng = np.random.default_rng([seed, int(1000 * dial), int(1000 * accuracy)])
    luck = rng.normal(0, 0.02, ITEMS)
    correct = [int(x) for x in DIFFICULTY + luck < accuracy]
    windows = [float(x) for x in kl * TOKENS * ROUGHNESS]
    solved = [int(x) for x in np.random.default_rng(2).uniform(size=300) < 0.6 - task_drop]
    share = fmean(correct)
    words = [float(n) for n in np.random.default_rng(4).integers(1, 90, 40)]
    likely = [-n * (4 + task_drop) for n in words]
    return {
        "dial": dial,
        "accuracy": share,
        "accuracy_ci": list(wilson_interval(sum(correct), ITEMS)),
        "margin": 12.5 * share,
        "margin_per_token": 0.125 * share,
        "kl": sum(windows) / (WINDOWS * TOKENS),
        "perplexity": 20 + 10 * kl,
        "base_perplexity": 20.0,
        "correct": correct,
        "ranked": [1 - x for x in correct],
        "margins": [12.5 * x for x in correct],
        "margins_per_token": [0.25 * (1 - x) - 0.125 for x in correct],
        "correct_per_token": [1 - x for x in correct],
        "ranking_accuracy": 1 - share,
        "window_kl": windows,
        "window_tokens": [TOKENS] * WINDOWS,
        "kl_generations": 2 * kl,
        "greedy_changed": min(1.0, 5 * kl),
        "tasks": {
            "piqa": {"metric": "acc", "value": fmean(solved), "n": 300, "items": solved},
            "lambada": {"metric": "acc", "value": 0.6, "n": 300, "items": [1, 1, 1, 0, 0] * 60},
            "wikitext": {
                "metric": "word_perplexity",
                "value": math.exp(4 + task_drop),
                "n": len(words),
                "items": likely,
                "weights": words,
            },
        },
        "win_rates": [
            {
                "judge": "Bradley–Terry",
                "value": 0.55,
                "low": 0.51 - 0.001 * seed,
                "high": 0.59,
                "n": 100,
                "ties": 4,
                "judge_accuracy": 0.823,
                "length_delta": 3.25,
                "items": [0.9, 0.2, 0.5, 0.6, 0.55],
            }
        ],
    }


def method(
    label: str,
    library: str,
    accuracies: Sequence[float],
    kls: Sequence[float],
    *,
    seeds: int = 3,
    task_drop: float = 0.0,
    trials: int = 4,
) -> dict[str, Any]:
    space = {"learning_rate": "1e-5 to 1e-3, logarithmic"}
    found = [
        {
            "params": {"learning_rate": 1e-5 * 10**t},
            "accuracy": 0.6 + 0.01 * t,
            "kl": 0.01 * (t + 1),
            "margin": 0.5,
            "kl_of_one_nat": 0.04 * (t + 1),
            "state": "complete",
            "seconds": 61.0,
        }
        for t in range(trials - 1)
    ]
    failed = {"params": {"learning_rate": 1.0}, "accuracy": None, "kl": None, "state": "failed"}
    return {
        "label": label,
        "library": library,
        "about": f"About {label}.",
        "dial": "strength",
        "search": {
            "sampler": "TPE",
            "space": space,
            "trials": [*found, {**failed, "seconds": 3.0}],
            "best": {"learning_rate": 1e-3},
        },
        "runs": [
            {
                "seed": seed,
                "params": {"learning_rate": 1e-3, "layers": [22, 23]},
                "seconds": 125.0,
                "peak_gib": 1.75,
                "points": [
                    point(d, a, k, seed, task_drop)
                    for d, a, k in zip(DIALS, accuracies, kls, strict=True)
                ],
            }
            for seed in range(seeds)
        ],
    }


def base() -> dict[str, Any]:
    made = method("Base", "transformers", [0.5] * 3, [0.0] * 3, seeds=1)
    made["runs"][0]["points"] = made["runs"][0]["points"][:1]
    return {**made, "search": None, "about": "The model itself.", "dial": "none"}


DPO = method("DPO", "trl.DPOTrainer", [0.6, 0.7, 0.75], [0.03, 0.09, 0.2])
BETTER = method("Q-Adapter", "qadapter.QAdapterTrainer", [0.6, 0.71, 0.76], [0.01, 0.03, 0.06])
ALIKE = method("Q-Adapter", "qadapter.QAdapterTrainer", [0.6, 0.7, 0.75], [0.03, 0.09, 0.2])
WORSE = method("Q-Adapter", "qadapter.QAdapterTrainer", [0.6, 0.7, 0.75], [0.1, 0.3, 0.7])
WEAKER = method("Q-Adapter", "qadapter.QAdapterTrainer", [0.51, 0.52, 0.53], [0.001, 0.002, 0.004])


def comparison(**methods: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "qadapter compare run.yaml",
        "created": "2025-11-25T12:00:00+00:00",
        "machine": {"processor": "two cores", "memory": "8 GiB"},
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
        "config": {"reference": "dpo", "seeds": [0, 1, 2]},
        "data": {
            "train": {"path": "train.jsonl", "pairs": 480},
            "test": {"path": "test.jsonl", "pairs": ITEMS, "prompts": ITEMS},
            "general_text": {"path": "text.txt", "tokens": WINDOWS * TOKENS},
        },
        "intervals": INTERVALS,
        "pair_prompts": list(range(ITEMS)),
        "length_baseline": 0.541,
        "reference": "dpo",
        "methods": methods,
        "failures": [],
        "robustness": [],
    }


class Page(HTMLParser):
    """The tables as rows of cells, the tags with their attributes, the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._cell: list[str] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        data = data.replace("\u00a0", " ")
        self.text += data
        if self._cell is not None:
            self._cell.append(data)

    def table(self, first: str, column: str) -> list[dict[str, str]]:
        """Return the rows of the table whose heads are `first` and, somewhere, `column`."""
        (found,) = [t for t in self.tables if t[0][0] == first and column in t[0]]
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


def written(made: dict[str, Any], directory: Path) -> Page:
    # As the runner does: through JSON.
    path = write_report(json.loads(json.dumps(made)), directory)
    assert path == directory / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    sft = method("SFT", "trl.SFTTrainer", [0.55, 0.6, 0.62], [0.1, 0.3, 0.6], task_drop=0.2)
    variant = method("Q-Adapter, raw", "qadapter.QAdapterTrainer", [0.6] * 3, [0.02] * 3)
    made = comparison(base=base(), dpo=DPO, sft=sft, qadapter=BETTER, raw=variant)
    made["failures"] = [{"cell": "ppo/seed 1", "error": "out of memory"}]
    flipped = {
        "dpo": method("DPO", "trl.DPOTrainer", [0.55, 0.6, 0.65], [0.03, 0.09, 0.2]),
        "qadapter": method("Q-Adapter", "qadapter", [0.55, 0.6, 0.65], [0.003, 0.009, 0.02]),
    }
    made["robustness"] = [
        {"variation": "10% flipped", "method": m, **fields["runs"][seed]}
        for m, fields in flipped.items()
        for seed in (0, 1)
    ]
    # A run's own judge that may not vote, and one of another method.
    for name in ("dpo", "sft"):
        for run in made["methods"][name]["runs"]:
            run["points"][1] = {**run["points"][1], "judges_refused": ["my aunt: is asleep."]}
    return made


@pytest.fixture(scope="module")
def directory(full: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    written(full, place)
    return place


@pytest.fixture(scope="module")
def page(directory: Path) -> Page:
    return Page((directory / "report.html").read_text(encoding="utf-8"))


def test_the_page_holds_its_pictures(page: Page, directory: Path) -> None:
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    names = ["frontier", "equal_learning", "tasks"]
    assert {path.name for path in directory.iterdir()} == {
        "report.html",
        *(f"{name}.png" for name in names),
    }
    for source, name in zip(sources, names, strict=True):
        assert source is not None
        head, _, content = source.partition(",")
        assert head == "data:image/png;base64"
        png = (directory / f"{name}.png").read_bytes()
        assert base64.b64decode(content) == png
        assert png.startswith(b"\x89PNG")


def test_no_picture_of_an_earlier_report_is_left(full: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "mine.png").write_bytes(b"")
    written(full, tmp_path / "again")
    less = comparison(base=base(), dpo=DPO)
    for place in ("again", "anew"):
        written(less, tmp_path / place)
    left, made = ({p.name for p in (tmp_path / place).iterdir()} for place in ("again", "anew"))
    assert left == made | {"mine.png"}
    assert "equal_learning.png" not in made


def test_the_page_loads_nothing(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert name not in ("href", "srcset", "action", "style")
            assert not name.startswith("on")
            assert name != "src" or str(value).startswith("data:")
    assert "url(" not in page.text
    assert "@import" not in page.text
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_frontier_is_the_first_picture(page: Page) -> None:
    order = [(tag, a.get("alt")) for tag, a in page.tags if tag in ("h1", "img", "table")]
    assert order[0][0] == "h1"
    assert order[1][0] == "img"
    assert "Margin on held-out pairs against KL" in str(order[1][1])


def test_the_names_of_many_tasks_stand_apart(full: dict[str, Any]) -> None:
    made = copy.deepcopy(full)
    for name in made["methods"]:
        for point in own(made, name):
            for i in range(20):
                task = f"leaderboard_bbh_logical_deduction_{i}_objects"
                point["tasks"][task] = point["tasks"]["piqa"]
    results = Results(made)
    drawn: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
        figures.draw(results)
    tasks = drawn[-1]
    tasks.canvas.draw()
    boxes = [axes.title.get_window_extent() for axes in tasks.axes if axes.axison]
    assert all(axes.get_window_extent().width > 50 for axes in tasks.axes)
    assert len(boxes) == len(results.tasks())
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i])


def test_a_region_holds_95_percent_of_the_resamples_of_a_point(full: dict[str, Any]) -> None:
    found = Results(full).methods["qadapter"]
    for dial in range(len(DIALS)):
        x, y = figures._region(found, dial)
        held = Outline(np.stack([np.log(x), y], axis=1)).contains_points(
            np.stack([np.log(found.curve.kl[1:, dial]), found.curve.learning[1:, dial]], axis=1)
        )
        assert held.mean() == pytest.approx(0.95, abs=0.02)


def own(made: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the points at dial 1, else the last, one a seed."""
    points = [run["points"] for run in made["methods"][name]["runs"]]
    return [next((p for p in run if p["dial"] == 1.0), run[-1]) for run in points]


def test_headline_figures_are_those_of_the_json(full: dict[str, Any], page: Page) -> None:
    rows = {row["Method"]: row for row in page.table("Method", "Verdict")}
    for name, fields in full["methods"].items():
        row, points = rows[fields["label"]], own(full, name)
        accuracy, kl = (fmean(p[key] for p in points) for key in ("accuracy", "kl"))
        assert row["Accuracy, own setting"].startswith(f"{percent(accuracy)} (")
        assert row["KL, own setting"].startswith(f"{number(kl)} (")
    assert {name: row["Verdict"] for name, row in rows.items()} == {
        "Base": "–",
        "DPO": "the reference",
        "SFT": "does not reach that margin",
        "Q-Adapter": "forgets less",
        "Q-Adapter, raw": "does not reach that margin",
    }
    assert rows["DPO"]["Ratio to DPO’s KL"] == "1.00 (1.00 to 1.00)"
    sft = rows["SFT"]
    assert sft["Ratio to DPO’s KL"] == "not reached"
    assert sft["Resamples that never reach it"] == "100.0%"


def test_the_ratio_is_that_of_the_votes_and_windows(full: dict[str, Any], page: Page) -> None:
    def equal(field: str) -> EqualLearning:
        curves = {
            name: resampled_curve(
                name,
                np.array([[p[field] for p in run["points"]] for run in fields["runs"]], float),
                [1] * ITEMS,
                np.array(
                    [[p["window_kl"] for p in run["points"]] for run in fields["runs"]], float
                ),
                [TOKENS] * WINDOWS,
            )
            for name, fields in full["methods"].items()
        }
        return frontier(curves, reference="dpo", reference_dial=1)["qadapter"]

    found, by_votes = equal("margins"), equal("correct").ratio
    row = next(r for r in page.table("Method", "Verdict") if r["Method"] == "Q-Adapter")
    for column, interval in (
        ("Ratio to DPO’s KL", found.ratio),
        ("KL at DPO’s margin", found.kl),
        ("Ratio at DPO’s accuracy instead", by_votes),
    ):
        low, high = number(interval.low), number(interval.high)
        assert row[column] == f"{number(interval.value)} ({low} to {high})"


def test_learning_figures_are_those_of_the_json(full: dict[str, Any], page: Page) -> None:
    *rows, longer = page.table("Method", "Margin, nats")
    assert [row["Method"] for row in rows] == [m["label"] for m in full["methods"].values()]
    for row, name in zip(rows, full["methods"], strict=True):
        points = own(full, name)
        assert row["Seeds"] == str(len(points))
        assert row["Margin, nats"].startswith(f"{number(fmean(p['margin'] for p in points))} (")
        by_token = [x for p in points for x in p["margins_per_token"]]
        assert row["Margin a token, nats"].startswith(f"{number(fmean(by_token))} (")
        share = fmean(x for p in points for x in p["correct_per_token"])
        assert row["Accuracy a token"].startswith(f"{percent(share)} (")
        ranking = fmean(p["ranking_accuracy"] for p in points)
        assert row["Ranking accuracy"].startswith(f"{percent(ranking)} (")
    wins = (
        "55.0% (50.8% to 59.0%); 70.0% preferred, 12 ties of 300; a judge right in 82.3%; "
        "+3.2 words"
    )
    assert rows[1]["Mean vote of Bradley–Terry"] == wins
    assert (longer["Method"], longer["Accuracy"]) == (
        "The longer response, whatever it says",
        "54.1%",
    )


def test_of_older_runs_the_margin_a_token_has_no_interval(full: dict[str, Any]) -> None:
    made = copy.deepcopy(full)
    run = made["methods"]["dpo"]["runs"][1]
    run["points"] = [
        {k: v for k, v in p.items() if k not in ("margins_per_token", "correct_per_token")}
        for p in run["points"]
    ]
    table = tables.learning(Results(made))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    (dpo,) = [row for row in rows if row["Method"] == "DPO"]
    mean = fmean(p["margin_per_token"] for p in own(made, "dpo"))
    assert (dpo["Accuracy a token"], dpo["Margin a token, nats"]) == ("–", number(mean))


def test_the_baseline_by_length_is_the_better_of_both() -> None:
    made = {**comparison(dpo=DPO), "length_baseline": 0.43}
    told = tables.learning(Results(made)).rows[-1]
    assert list(told[:3]) == ["The shorter response, whatever it says", "–", "57.0%"]


def test_the_place_of_each_adapter_is_told(full: dict[str, Any], tmp_path: Path) -> None:
    assert "Adapter" not in tables.runs(Results(full)).columns
    made = json.loads(json.dumps(full))
    for name, fields in made["methods"].items():
        for run in fields["runs"] if name != "base" else ():
            run["adapter"] = f"cells/train-{name}-seed-{run['seed']}/adapter"
    page = written(made, tmp_path)
    places = {(r["Method"], r["Seed"]): r["Adapter"] for r in page.table("Method", "Adapter")}
    assert places["Base", "0"] == "–"
    assert places["Q-Adapter", "2"] == "cells/train-qadapter-seed-2/adapter"
    assert len(places) == 13
    assert "qadapter chat" in page.text


def test_intervals_are_over_prompts(tmp_path: Path) -> None:
    """Four pairs of each prompt, alike in difficulty: every interval of learning gets wider."""
    by_difficulty = np.argsort(np.argsort(DIFFICULTY)) // 4
    made = comparison(dpo=DPO, qadapter=BETTER)
    apart = Results(made)
    made["pair_prompts"] = numbered(by_difficulty)
    results, page = Results(made), written(made, tmp_path)
    assert "Learning is measured on 200 pairs of 50 prompts." in page.text
    assert INTERVALS in page.text
    assert "resamples that redraw prompts with all their pairs" in page.text
    ours, alone = results.methods["qadapter"], apart.methods["qadapter"]
    gains = [r.accuracy_gain(r.methods["qadapter"], r.methods["dpo"]) for r in (results, apart)]
    for wide, narrow in (
        (ours.accuracy, alone.accuracy),
        (ours.margin, alone.margin),
        (ours.ranking, alone.ranking),
        gains,
    ):
        assert wide.value == pytest.approx(narrow.value)
        assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)
    correct = [p["correct"] for p in own(made, "qadapter")]
    sums, sizes = by_group([[votes] for votes in correct], made["pair_prompts"])
    assert ours.accuracy == mean_intervals(sums, sizes)[0]


def test_forgetting_figures_are_those_of_the_json(full: dict[str, Any], page: Page) -> None:
    rows = {row["Method"]: row for row in page.table("Method", "Perplexity")}
    for name, fields in full["methods"].items():
        row, points = rows[fields["label"]], own(full, name)
        for column, key in (
            ("KL on the base’s answers", "kl_generations"),
            ("Perplexity", "perplexity"),
            ("The base’s perplexity", "base_perplexity"),
        ):
            assert row[column] == number(fmean(p[key] for p in points))
        assert row["Greedy answers changed"] == percent(fmean(p["greedy_changed"] for p in points))


def test_task_figures_are_those_of_the_json(full: dict[str, Any], page: Page) -> None:
    piqa, lambada = "piqa: acc, n = 300", "lambada: acc, n = 300"
    rows = {row["Method"]: row for row in page.table("Method", piqa)}
    assert list(rows) == [fields["label"] for fields in full["methods"].values()]
    value, before = (own(full, m)[0]["tasks"]["piqa"]["value"] for m in ("sft", "base"))
    assert rows["SFT"][piqa].startswith(f"{number(value)}; drop {number(before - value)} (")
    # None of 300 changed, and one more gained and lost.
    reach = re.fullmatch(r"0\.600; drop 0 \(−(0\.\d+) to (0\.\d+)\)", rows["SFT"][lambada])
    assert reach
    assert [float(end) for end in reach.groups()] == pytest.approx([3 / 302] * 2, abs=1.1 / 302)
    assert rows["Base"][piqa] == number(before)


def test_what_is_lost_of_a_perplexity_is_the_share_it_rises_by(full: dict[str, Any]) -> None:
    made = copy.deepcopy(full)
    tasks = [p["tasks"]["wikitext"] for p in own(made, "sft")]
    before = own(made, "base")[0]["tasks"]["wikitext"]
    rng = np.random.default_rng(1)
    for task in tasks:  # the longer a document, the less is lost of a word
        lost = [math.sqrt(n) * rng.uniform(0.1, 0.3) for n in task["weights"]]
        task["items"] = [x - y for x, y in zip(before["items"], lost, strict=True)]
        task["value"] = math.exp(-sum(task["items"]) / sum(task["weights"]))
    results = Results(made)
    drop = results.drop(results.methods["sft"], "wikitext")
    assert drop is not None
    rise = math.exp(fmean(math.log(t["value"]) for t in tasks)) / before["value"] - 1
    assert drop.value == pytest.approx(rise)
    assert drop.low < rise < drop.high < 2 * rise
    table = tables.tasks(results)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    (cell,) = [r["wikitext: word_perplexity, n = 40"] for r in rows if r["Method"] == "SFT"]
    assert f"; higher by {fine_percent(rise)} (" in cell
    assert results.is_perplexity("wikitext")
    assert not results.is_perplexity("piqa")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (1.7e-18, "0"),
        (-3e-17, "0"),
        (4.2e-10, "4.20e−10"),
        (-0.0351, "−0.0351"),
        (math.nan, "nan"),
    ],
)
def test_what_rounding_leaves_is_told_as_nothing(value: float, said: str) -> None:
    assert number(value) == said


def test_bits_are_lost_by_their_difference(full: dict[str, Any]) -> None:
    made = copy.deepcopy(full)
    for name in made["methods"]:
        for point in own(made, name):
            task = point["tasks"]["wikitext"]
            task |= {"metric": "bits_per_byte", "higher_is_better": False}
            task["value"] = -sum(task["items"]) / sum(task["weights"]) / math.log(2)
    results = Results(made)
    assert not results.is_perplexity("wikitext")
    assert results.less_is_better("wikitext")
    before = own(made, "base")[0]["tasks"]["wikitext"]["value"]
    after = fmean(p["tasks"]["wikitext"]["value"] for p in own(made, "sft"))
    drop = results.drop(results.methods["sft"], "wikitext")
    assert drop is not None
    assert drop.value == pytest.approx(after - before)
    assert drop.low < drop.value < drop.high


def test_where_less_is_better_a_rise_is_lost(full: dict[str, Any], tmp_path: Path) -> None:
    made = copy.deepcopy(full)
    for name, value in (
        ("base", 0.2),
        ("dpo", 0.35),
        ("sft", 0.1),
        ("qadapter", 0.2),
        ("raw", 0.2),
    ):
        rng = np.random.default_rng(0)
        for own_point in own(made, name):
            items = [float(x) for x in rng.uniform(0.9 * value, 1.1 * value, 50)]
            told = {"metric": "bias", "value": value, "n": 50, "items": items}
            own_point["tasks"]["stereotypes"] = {**told, "higher_is_better": False}
    results = Results(made)
    lost, won = (results.drop(results.methods[name], "stereotypes") for name in ("dpo", "sft"))
    assert lost is not None
    assert won is not None
    assert 0.13 < lost.low < lost.value < lost.high < 0.17
    assert -0.12 < won.low < won.value < won.high < -0.08
    page = written(made, tmp_path)
    column = "stereotypes: bias, n = 50"
    rows = {row["Method"]: row[column] for row in page.table("Method", column)}
    assert rows["DPO"].startswith("0.350; rise 0.1")
    assert rows["SFT"].startswith("0.100; rise −0.1")
    assert [results.less_is_better(t) for t in ("stereotypes", "piqa", "wikitext")] == [
        True,
        False,
        False,
    ]


def test_one_run_s_share_has_wilson_s_interval() -> None:
    dpo = method("DPO", "trl.DPOTrainer", [0.5, 1.1, 0.75], [0.03, 0.09, 0.2], seeds=1)
    found = Results(comparison(base=base(), dpo=dpo)).methods["dpo"]
    for interval, at in zip(found.accuracies, dpo["runs"][0]["points"], strict=True):
        assert [interval.low, interval.high] == pytest.approx(at["accuracy_ci"])
    assert found.accuracy.value == found.accuracy.high == 1.0
    assert found.accuracy.low < 0.99
    assert found.ranking.value == found.ranking.low == 0.0
    assert found.ranking.high == pytest.approx(1 - found.accuracy.low)


def test_a_judge_of_some_seeds_says_so(full: dict[str, Any]) -> None:
    made = copy.deepcopy(full)
    own(made, "dpo")[1]["win_rates"] = []
    table = tables.learning(Results(made))
    (votes,) = (i for i, name in enumerate(table.columns) if name.startswith("Mean vote"))
    told = {row[0]: row[votes] for row in table.rows}
    assert "; 2 of 3 seeds; " in told["DPO"]
    assert "seeds" not in told["SFT"]


def test_a_variation_of_what_the_reference_has_not_is_put_beside_it(full: dict[str, Any]) -> None:
    made = copy.deepcopy(full)
    (first, *_) = made["methods"]["qadapter"]["runs"]
    row = {"variation": "alpha_0=0.2", "method": "qadapter", "reference_varied": False, **first}
    # One whose reference failed has nothing to stand beside.
    failed = {**row, "variation": "10% flipped", "reference_varied": True}
    made["robustness"] = [row, failed]
    results = Results(made)
    assert results.varied_equal_learning("10% flipped") == {}
    level = results.varied_equal_learning("alpha_0=0.2")
    assert set(level) == {"qadapter", "dpo"}
    usual = results.equal_learning(results.methods["dpo"])["qadapter"].ratio.value
    assert level["qadapter"].ratio.value == pytest.approx(usual, rel=0.2)
    assert level["dpo"].ratio.value == 1.0
    table = tables.robustness(results)
    told = {row[0]: row[-1] for row in table.rows}
    assert told["10% flipped"] == "–"
    assert [row[1] for row in table.rows if row[0] == "none"] == ["Q-Adapter", "DPO"]
    assert results.varied["none"]["dpo"].runs == results.methods["dpo"].runs[:1]
    (none,) = (row[-1] for row in table.rows if tuple(row[:2]) == ("none", "Q-Adapter"))
    assert none.startswith(
        f"{number(results.varied_equal_learning('none')['qadapter'].ratio.value)} ("
    )
    assert told["alpha_0=0.2"].endswith("), to DPO as it was")


def test_tasks_at_the_margin_of_the_reference(full: dict[str, Any], tmp_path: Path) -> None:
    made = copy.deepcopy(full)
    for run in made["methods"]["qadapter"]["runs"]:
        solved = point(0.4, 0.7, 0.01, run["seed"], task_drop=0.3)["tasks"]
        run["at_reference"] = {"dial": 0.4, "tasks": solved}
    # One seed of three is not the method.
    made["methods"]["raw"]["runs"][0]["at_reference"] = made["methods"]["qadapter"]["runs"][0][
        "at_reference"
    ]
    results, page = Results(json.loads(json.dumps(made))), written(made, tmp_path)
    rows = {row["Method"]: row for row in page.table("Method", "Dial there")}
    assert {name: row["Dial there"] for name, row in rows.items()} == {
        "DPO": "1",
        "Q-Adapter": "0.4",
    }
    (beside,) = page.table("Method", "Beside")
    assert (beside["Method"], beside["Beside"]) == ("Q-Adapter", "DPO")
    theirs, ours = own(full, "dpo")[0]["tasks"]["piqa"]["value"], solved["piqa"]["value"]
    assert beside["piqa: acc, n = 300"].startswith(f"{number(theirs - ours)} (")
    share = fine_percent(math.expm1(0.3))
    assert beside["wikitext: word_perplexity, n = 40"].startswith(f"{share} (")
    before, value = own(full, "base")[0]["tasks"]["piqa"]["value"], solved["piqa"]["value"]
    cell = rows["Q-Adapter"]["piqa: acc, n = 300"]
    assert cell.startswith(f"{number(value)}; drop {number(before - value)} (")
    usual = tables.tasks(results)
    (dpo,) = [dict(zip(usual.columns, row, strict=True)) for row in usual.rows if row[0] == "DPO"]
    piqa = dpo["piqa: acc, n = 300"].replace("\u00a0", " ")
    assert rows["DPO"]["piqa: acc, n = 300"] == piqa
    told = " ".join(paragraphs(results))
    where = "with its dial at 0.4, where its mean margin is DPO’s"
    assert f"{where} (95% CI): a drop on piqa" in told
    assert f"wikitext ({fine_percent(math.expm1(0.3))}, " in told
    assert "at its own setting (95% CI): no drop shown on piqa" in told


def test_each_q_adapter_stands_beside_each_other_method(full: dict[str, Any]) -> None:
    made = copy.deepcopy(full)
    items: dict[str, list[dict[str, Any]]] = {"dpo": [], "sft": [], "qadapter": []}
    for name, kept in items.items():
        for run in made["methods"][name]["runs"]:
            rng = np.random.default_rng([7, len(name), run["seed"]])
            tasks = copy.deepcopy(point(0.4, 0.7, 0.01, run["seed"], task_drop=0.1)["tasks"])
            tasks["piqa"]["items"] = rng.integers(0, 2, 300).tolist()
            tasks["wikitext"]["items"] = (-5 - rng.uniform(size=40)).tolist()
            kept.append(tasks)
            if name == "dpo":
                run["points"][1]["tasks"] = tasks  # at its own setting it has its own margin
            else:
                run["at_reference"] = {"dial": 0.4, "tasks": tasks}
    table = tables.beside_baselines(Results(made))
    assert table is not None
    rows = {tuple(row[:2]): row for row in table.rows}
    assert {*rows} == {("Q-Adapter", "DPO"), ("Q-Adapter", "SFT")}
    for name, label in (("dpo", "DPO"), ("sft", "SFT")):
        theirs, ours = (
            {task: [t[task]["items"] for t in items[n]] for task in ("piqa", "wikitext")}
            for n in (name, "qadapter")
        )
        weights = items[name][0]["wikitext"]["weights"]
        less = share_difference(theirs["piqa"], ours["piqa"])
        nats = paired_bootstrap(theirs["wikitext"], ours["wikitext"], weights)
        higher = Interval(*map(math.expm1, (nats.value, nats.low, nats.high)))
        cells = dict(zip(table.columns, rows["Q-Adapter", label], strict=True))
        assert cells["piqa: acc, n = 300"] == ranged(less)
        assert cells["wikitext: word_perplexity, n = 40"] == ranged(higher, fine_percent)


def test_tasks_of_unlike_weights_are_not_put_beside_each_other() -> None:
    task = point(1.0, 0.7, 0.01, 0, task_drop=0.1)["tasks"]["wikitext"]
    assert losses.lost([task], [task]) == Interval(0, 0, 0)
    for unlike in (
        {**task, "weights": task["weights"][::-1]},
        {**task, "items": task["items"][:-1]},
        {k: v for k, v in task.items() if k != "weights"},
    ):
        assert losses.lost([task], [unlike]) is None


def test_a_share_close_to_zero_keeps_its_digits() -> None:
    shares = (0.0003, -0.00012, 0.0, 1e-7, 0.2, 9.99, 12.345)
    told = ["0.0300%", "−0.0120%", "0%", "0%", "20.0%", "999%", "1234.5%"]
    assert [*map(fine_percent, shares)] == told


def test_figures_a_token_are_means_over_seeds_and_by_votes(full: dict[str, Any]) -> None:
    def told(made: dict[str, Any]) -> dict[str, str]:
        table = tables.learning(Results(made))
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        return next(row for row in rows if row["Method"] == "DPO")

    many, one = told(full), copy.deepcopy(comparison(dpo=DPO))
    for field, column, as_told in (
        ("margins_per_token", "Margin a token, nats", number),
        ("correct_per_token", "Accuracy a token", percent),
    ):
        values = [[p[field]] for p in own(full, "dpo")]
        (interval,) = mean_intervals(values, np.ones(ITEMS))
        assert many[column] == ranged(interval, as_told)
    # Of one seed the votes have Wilson's interval.
    del one["methods"]["dpo"]["runs"][1:]
    votes = own(one, "dpo")[0]["correct_per_token"]
    alone = Interval(fmean(votes), *share_interval(votes, range(ITEMS)))
    assert told(one)["Accuracy a token"] == ranged(alone, percent)


def test_how_settings_were_chosen_is_told_where_any_were_tried(page: Page, tmp_path: Path) -> None:
    said = "within one standard error of the method’s best accuracy"
    assert said in " ".join(page.text.split())
    made = comparison(base=base(), dpo={**DPO, "search": {**DPO["search"], "trials": []}})
    assert said not in " ".join(written(made, tmp_path).text.split())


def test_every_point_of_the_curves_is_shown(full: dict[str, Any], page: Page) -> None:
    rows = page.table("Method", "Dial")
    assert len(rows) == sum(len(m["runs"][0]["points"]) for m in full["methods"].values())
    found = {(row["Method"], row["Dial"]): row for row in rows}
    for i, dial in enumerate(("0.5", "1", "1.5")):
        row, points = found["DPO", dial], [run["points"][i] for run in DPO["runs"]]
        assert row["Accuracy"].startswith(f"{percent(fmean(p['accuracy'] for p in points))} (")
        assert row["KL"].startswith(f"{number(fmean(p['kl'] for p in points))} (")


def test_tuning_failures_robustness_and_origin_are_shown(full: dict[str, Any], page: Page) -> None:
    rows = [row for row in full["robustness"] if row["method"] == "dpo"]
    varied = [run["points"][1] for run in rows]
    tuning = {row["Method"]: row for row in page.table("Method", "Search")}
    assert tuning["Base"]["Search"] == "not searched"
    assert tuning["DPO"]["Library"] == "trl.DPOTrainer"
    assert tuning["DPO"]["What it is"] == "About DPO."
    assert tuning["DPO"]["Search"] == "TPE: learning_rate 1e-5 to 1e-3, logarithmic"
    assert tuning["DPO"]["Trials"] == "4, 1 failed"
    assert tuning["DPO"]["Best"] == "learning_rate 0.001"
    assert tuning["DPO"]["Took"] == "186 s"
    trials = [row for row in page.table("Method", "State") if row["Method"] == "SFT"]
    assert [row["State"] for row in trials] == ["complete"] * 3 + ["failed"]
    assert trials[1]["Settings"] == "learning_rate 0.0001"
    assert [row["KL of one nat"] for row in trials] == ["0.0400", "0.0800", "0.120", "–"]
    assert (trials[1]["Accuracy"], trials[1]["KL"]) == ("61.0%", "0.0200")
    assert (trials[3]["Accuracy"], trials[3]["KL"]) == ("–", "–")
    assert page.table("Cell", "Error") == [{"Cell": "ppo/seed 1", "Error": "out of memory"}]
    before, unvaried, first, second = page.table("Variation", "Seeds")
    usual = Results(full).varied["none"]["dpo"]
    assert usual.runs == Results(full).methods["dpo"].runs[:2]
    for row, points in ((before, [run["points"][1] for run in DPO["runs"][:2]]), (first, varied)):
        assert (row["Method"], row["Seeds"]) == ("DPO", "2")
        assert row["Accuracy"].startswith(f"{percent(fmean(p['accuracy'] for p in points))} (")
        assert row["Margin"].startswith(f"{number(fmean(p['margin'] for p in points))} (")
        assert row["KL"].startswith(f"{number(fmean(p['kl'] for p in points))} (")
    assert [row["Variation"] for row in (before, unvaried)] == ["none", "none"]
    assert [row["Variation"] for row in (first, second)] == ["10% flipped", "10% flipped"]
    ratio = "Ratio to DPO’s KL, varied alike"
    assert first[ratio] == "1.00 (1.00 to 1.00)"
    assert second["Method"] == "Q-Adapter"
    assert second[ratio].startswith("0.100 (")
    refused = page.table("Judge that gives no win rate", "Methods")
    assert [list(row.values()) for row in refused] == [["my aunt: is asleep.", "DPO, SFT"]]
    runs = page.table("Method", "Peak memory")
    assert len(runs) == 13
    assert runs[1]["Settings"] == "learning_rate 0.001, layers [22, 23]"
    origin = {row["What"]: row["Value"] for row in page.table("What", "Value")}
    assert origin["Command"] == "qadapter compare run.yaml"
    assert origin["Seeds"] == "0, 1, 2"
    assert origin["Data: train"] == "path train.jsonl, pairs 480"
    assert origin["Version: torch"] == "2.13.0"
    assert origin["Machine: processor"] == "two cores"


# --- Words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "told"),
    [
        (BETTER, "“Q-Adapter” ({}) forgot less."),
        (ALIKE, "no difference was shown for “Q-Adapter” ({})."),
        (WORSE, "“Q-Adapter” ({}) forgot more."),
        (WEAKER, "“Q-Adapter” did not reach that margin."),
    ],
)
def test_the_lead_says_who_wins(ours: dict[str, Any], told: str) -> None:
    results = Results(comparison(dpo=DPO, qadapter=ours))
    assert lead(results).startswith("Against DPO, at its margin on held-out pairs (")
    assert lead(results).endswith(f": {told.format(ratio(results, 'qadapter'))}")
    assert paragraphs(results)[0] == lead(results)


def ratio(results: Results, name: str) -> str:
    """Return the ratio to the reference at its margin, with its interval."""
    assert results.reference is not None
    found = results.equal_learning(results.reference)[name].ratio
    between = f"{number(found.low)} to {number(found.high)}".replace(" ", "\u00a0")
    return f"{number(found.value)}, {between}"


def test_the_words_name_every_q_adapter_in_whatever_order() -> None:
    better, worse, weaker, alike = (
        {**one, "label": label}
        for one, label in ((BETTER, "A"), (WORSE, "B"), (WEAKER, "C"), (ALIKE, "D {}"))
    )
    alike = {**alike, "runs": alike["runs"][:1]}
    fixed = {
        **alike,
        "label": "E",
        "runs": [{**r, "points": r["points"][1:2]} for r in alike["runs"]],
    }
    anew = {**better, "label": "F"}
    ours = {"a": better, "a.beta": anew, "b": worse, "c": weaker, "d": alike, "e": fixed}
    results = Results(comparison(base=base(), dpo=DPO, **ours))
    a, b, d, e = (ratio(results, name) for name in "abde")
    assert lead(results).endswith(
        f": “A” ({a}) forgot less; no difference was shown for “D {{}}” ({d}); "
        f"“B” ({b}) forgot more; “C” did not reach that margin."
    )
    first, *each, caveats = paragraphs(results)
    rest = "Of those without a dial, or trained anew:"
    rest += f" “F” ({a}) forgot less; no difference was shown for “E” ({e})."
    assert first == f"{lead(results)} {rest}"
    # One a method, of those with the most seeds.
    assert [told.split()[0] for told in each] == ["“A”", "“B”", "“C”"]
    assert "fewer than three seeds" in caveats
    turned = dict(reversed(ours.items()))
    assert paragraphs(Results(comparison(base=base(), dpo=DPO, **turned))) == paragraphs(results)


@pytest.mark.parametrize("times", [0.25, 3.0])
def test_drift_on_the_bases_own_answers_is_told_without_an_interval(times: float) -> None:
    ours = copy.deepcopy(BETTER)
    for run in ours["runs"]:
        run["points"][1]["kl_generations"] = times * 0.18
    told = " ".join(paragraphs(Results(comparison(dpo=DPO, qadapter=ours))))
    assert (
        f"On the base’s own answers it drifts {number(times)} times as far as DPO "
        f"({number(times * 0.18)} against 0.180 nats a token, each at its own setting), means over "
        "seeds without an interval."
    ) in told


def test_drift_on_the_bases_own_answers_is_compared_at_the_references_margin() -> None:
    """Of one curve of margins, one method goes twice as far on those answers."""
    made = comparison(base=base(), dpo=copy.deepcopy(DPO), q=copy.deepcopy(DPO))
    made["methods"]["q"] |= {"label": "Q", "library": "qadapter"}
    for name, times in (("dpo", 1.0), ("q", 2.0), ("base", 0.0)):
        for run in made["methods"][name]["runs"]:
            for p in run["points"]:
                p["answer_tokens"] = [10, 20, 30, 40]
                p["answer_kl"] = [times * p["kl"] * n for n in p["answer_tokens"]]
                p["kl_generations"] = times * p["kl"]
    results = Results(made)
    dpo, q = results.methods["dpo"], results.methods["q"]
    level = results.equal_on_answers(dpo)
    assert {*level} == {"dpo", "q"}
    assert level["dpo"].ratio.value == pytest.approx(1.0)
    assert level["q"].ratio.value == pytest.approx(2.0)
    assert q.on_answers is not None
    far = q.on_answers.kl[q.own]
    assert far.value == pytest.approx(2 * dpo.kl.value)
    table = tables.forgetting(results)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    ratio = "The same at DPO’s margin, ratio to its"
    assert rows["Q"]["KL on the base’s answers"] == ranged(far)
    assert rows["Q"][ratio] == ranged(level["q"].ratio)
    assert rows["Base"][ratio] == "–"
    assert f"at DPO’s margin the ratio is {ranged(level['q'].ratio)}." in " ".join(
        paragraphs(results)
    )
    # Other answers, of one run or of all, are not put beside these.
    for runs in (made["methods"]["q"]["runs"][:1], made["methods"]["q"]["runs"]):
        for run in runs:
            for p in run["points"]:
                p["answer_tokens"] = [10, 20, 30, 41]
        found = Results(made)
        assert {*found.equal_on_answers(found.methods["dpo"])} == {"dpo"}
        assert "nats a token, each at its own setting), means" in " ".join(paragraphs(found))
    # Nor is anything where the reference has none.
    del made["methods"]["dpo"]["runs"][0]["points"][0]["answer_tokens"]
    found = Results(made)
    assert found.equal_on_answers(found.methods["dpo"]) == {}


def test_a_margin_that_is_not_reached_on_the_bases_answers_is_told() -> None:
    made = comparison(dpo=copy.deepcopy(DPO), q=copy.deepcopy(DPO))
    made["methods"]["q"] |= {"label": "Q", "library": "qadapter"}
    for name, weaker in (("dpo", 1.0), ("q", 0.1)):
        for run in made["methods"][name]["runs"]:
            for p in run["points"]:
                p["margins"] = [weaker * m for m in p["margins"]]
                p["answer_tokens"], p["answer_kl"] = [10, 20], [p["kl"], p["kl"]]
    told = " ".join(paragraphs(Results(made)))
    assert "each at its own setting); it does not reach DPO’s margin." in told


def test_what_is_never_searched_is_told_where_it_is_known() -> None:
    made = comparison(dpo=copy.deepcopy(DPO), q=copy.deepcopy(BETTER))
    made["methods"]["q"]["fixed"] = {"beta": 0.0, "trunk": 0.5}
    table = tables.tuning(Results(made))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["Q-Adapter"]["Never searched"] == "beta 0, trunk 0.5"
    assert rows["DPO"]["Never searched"] == "–"


def test_that_ours_as_by_default_has_two_epochs_is_told() -> None:
    search = {"sampler": None, "space": {}, "trials": [], "best": {"epochs": 2}}
    methods = {n: {**copy.deepcopy(DPO), "search": search} for n in ("dpo", "qadapter")}
    made = comparison(**methods)
    assert "at one rate and one epoch (“Q-Adapter” at two)." in " ".join(paragraphs(Results(made)))
    made["config"]["settings"] = {"qadapter": {"epochs": 1}}
    assert "at two" not in " ".join(paragraphs(Results(made)))


def test_rounding_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resampled means of equal votes differed by 8.7e-19, and it "learned more"."""
    results = Results(comparison(base=base(), dpo=DPO, qadapter=BETTER))
    for low, high in ((8.7e-19, 0.14), (-0.14, -8.7e-19)):
        found = Interval((low + high) / 2, low, high)
        monkeypatch.setattr(results, "accuracy_gain", lambda *_, found=found: found)
        monkeypatch.setattr(results, "drop", lambda *_, found=found, **__: found)
        told = " ".join(paragraphs(results))
        assert "no difference in learning is shown" in told
        assert "no drop shown on piqa" in told
        assert "a drop on" not in told
        assert "a gain on" not in told


def test_a_point_estimate_below_one_is_no_win() -> None:
    """The estimate is at two thirds, but the intervals of few, rough windows hold 1."""
    ours = json.loads(json.dumps(ALIKE))
    rng = np.random.default_rng(4)
    for run in ours["runs"]:
        for p in run["points"]:
            factors = rng.choice([0.0, 4.0], p=[0.8, 0.2], size=WINDOWS)
            factors *= 0.67 * sum(p["window_kl"]) / (factors @ p["window_kl"])
            p["window_kl"] = [float(x) for x in factors * p["window_kl"]]
    for run in ours["runs"][1:]:  # seeds alike, so that only the windows differ
        for p, first in zip(run["points"], ours["runs"][0]["points"], strict=True):
            p["window_kl"] = first["window_kl"]
    results = Results(comparison(dpo=DPO, qadapter=ours))
    assert results.reference is not None
    ratio = results.equal_learning(results.reference)["qadapter"].ratio
    assert ratio.value < 0.9
    assert ratio.high > 1
    assert "no difference was shown for “Q-Adapter”" in lead(results)


def test_a_copy_of_the_reference_neither_wins_nor_loses_by_rounding() -> None:
    one = method("DPO", "trl.DPOTrainer", [0.6, 0.7, 0.75], [0.03, 0.09, 0.2], seeds=1)
    copy = json.loads(json.dumps({**one, "library": "qadapter.QAdapterTrainer"}))
    for run in copy["runs"]:  # a third and three times that, for the last digits
        for p in run["points"]:
            p["window_kl"] = [3 * (x / 3) for x in p["window_kl"]]
    results = Results(comparison(dpo=one, qadapter=copy))
    assert "no difference was shown for “DPO”" in lead(results)


def test_the_paragraph_tells_losses_beside_wins(full: dict[str, Any]) -> None:
    told = " ".join(paragraphs(Results(full)))
    assert (
        "at that method’s own margin (ratio of drifts, 95% CI), it forgets less than “SFT” ("
        in told
    )
    assert "no drop shown on piqa (0, −0.00" in told.replace("\u00a0", " ")
    assert "no difference in learning is shown" in told
    assert "“Q-Adapter, raw” did not reach that margin." in told
    assert "1 cell failed" in told
    forgetful = method("Q-Adapter", "qadapter.QAdapterTrainer", [0.4] * 3, [0.1] * 3, task_drop=0.2)
    told = " ".join(paragraphs(Results(comparison(base=base(), dpo=DPO, qadapter=forgetful))))
    assert "a drop on piqa (0." in told
    assert "it learns less, " in told
    better = method("Q-Adapter", "qadapter.QAdapterTrainer", [0.9] * 3, [0.1] * 3, task_drop=-0.2)
    told = " ".join(paragraphs(Results(comparison(base=base(), dpo=DPO, qadapter=better))))
    assert "a gain on piqa (−0." in told
    assert "it learns more, " in told


def test_caveats_are_told() -> None:
    one = method("Q-Adapter", "qadapter.QAdapterTrainer", [0.6] * 3, [0.1] * 3, seeds=1, trials=9)
    told = " ".join(paragraphs(Results(comparison(dpo=DPO, qadapter=one))))
    assert "fewer than three seeds" in told
    assert "The tuning budgets differ, from 4 to 9 trials" in told
    assert "fewer than three" not in " ".join(paragraphs(Results(comparison(dpo=DPO, q=BETTER))))
    untuned = {"sampler": None, "space": {}, "trials": [], "best": {"beta": 0.1}}
    results = Results(comparison(dpo={**DPO, "search": untuned}, q={**BETTER, "search": untuned}))
    assert "No method was tuned" in " ".join(paragraphs(results))
    assert "No method was tuned" not in told


def test_results_of_another_version_are_told() -> None:
    made = comparison(dpo=DPO, q=BETTER)
    here = {"machine": made["machine"], "versions": made["versions"]}
    made["cells"] = [{"count": 7, **here}]
    assert "another machine" not in " ".join(paragraphs(Results(made)))
    older = {**here, "versions": {**made["versions"], "torch": "2.12.0"}}
    made["cells"] += [{"count": 4, **older}, {"count": 1}]
    results = Results(made)
    said = "5 results behind this came from another machine or version"
    assert said in " ".join(paragraphs(results))
    rows = dict(tables.made(results).rows[-2:])
    assert rows["4 results made by"] == "versions: torch 2.12.0"
    assert "machine: processor unknown" in rows["1 results made by"]


def tuned(best: dict[str, float], given: dict[str, Any], trials: int) -> tuple[str, str]:
    """Return the caveats and what is said of DPO's search, Q-Adapter's being of four trials."""
    search = {"sampler": "TPE", "space": {"beta": "0 to 1"}, "trials": [], "best": best}
    search["trials"] = DPO["search"]["trials"][:1] * trials
    made = comparison(dpo={**DPO, "search": search}, q=BETTER)
    made["config"]["settings"] = given
    results = Results(made)
    table = tables.tuning(results)
    row = next(row for row in table.rows if row[0] == "DPO")
    return " ".join(paragraphs(results)), row[table.columns.index("Search")]


def test_settings_that_were_given_are_told() -> None:
    best = {"beta": 0.1, "epochs": 2}
    said = "Settings were given for “DPO” ({}), and not searched"
    told, search = tuned(best, {"dpo": {"beta": 0.1, "epochs": 2}, "q": {}}, 0)
    assert said.format("beta, epochs") in told
    assert "for “Q-Adapter”" not in told
    # Nobody knows how much trouble went into these.
    assert "budgets" not in told
    assert search == "given"
    # The rest was searched less, or not at all.
    told, search = tuned(best, {"dpo": {"epochs": 2}}, 4)
    assert said.format("epochs") in told
    assert "budgets" not in told
    assert search == "TPE: beta 0 to 1; epochs was given"
    told, search = tuned(best, {"dpo": {"epochs": 2}}, 0)
    assert "The tuning budgets differ, from 0 to 4 trials" in told
    assert search == "not searched; epochs was given"


# --- What may be missing, and what may be hostile -------------------------------------------------


def test_text_is_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('1')</script> $x_{$ & \"quoted\""
    made = comparison(base=base(), dpo={**DPO, "label": hostile}, qadapter=BETTER)
    made["command"] = made["machine"]["memory"] = made["config"]["note"] = hostile
    made["failures"] = [{"cell": hostile, "error": "</td></table><img src=x onerror=alert(1)>"}]
    made["methods"]["qadapter"] = json.loads(json.dumps(BETTER))
    for run in made["methods"]["qadapter"]["runs"]:
        for p in run["points"]:
            p["tasks"][hostile] = p["tasks"].pop("piqa")
            p["win_rates"][0]["judge"] = hostile
    page = written(made, tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.table("Method", "Verdict")[1]["Method"] == hostile
    assert page.table("Cell", "Error")[0]["Cell"] == hostile
    assert f"Mean vote of {hostile}" in page.table("Method", "Margin, nats")[0]
    assert page.text.count("alert('1')") > 5


@pytest.mark.parametrize("failed", [False, True])
def test_without_any_method_the_page_says_so(tmp_path: Path, failed: bool) -> None:
    made = comparison(dpo={**DPO, "runs": [], "search": None}) if failed else comparison()
    made["failures"] = [{"cell": "dpo/seed 0", "error": "boom"}] * failed
    page = written(made, tmp_path)
    assert "No method finished, so nothing can be said." in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert ("boom" in page.text) == failed
    assert ("None." in page.text) != failed


def test_without_the_reference_nothing_is_put_beside_it(tmp_path: Path) -> None:
    page = written(comparison(dpo={**DPO, "runs": []}, qadapter=BETTER), tmp_path)
    assert "The reference, dpo, has no figures here" in page.text
    assert page.table("Method", "Verdict")[0]["Verdict"] == "–"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "frontier.png"}


def test_without_a_q_adapter_nothing_is_claimed(tmp_path: Path) -> None:
    page = written(comparison(base=base(), dpo=DPO), tmp_path)
    assert "No Q-Adapter finished beside the reference, so nothing is said of it." in page.text
    assert page.table("Method", "Verdict")[1]["Verdict"] == "the reference"


def test_the_base_alone(tmp_path: Path) -> None:
    page = written(comparison(base=base()), tmp_path)
    assert [row["Method"] for row in page.table("Method", "Verdict")] == ["Base"]


def test_without_the_base_its_place_is_a_dial_at_which_nothing_moves(tmp_path: Path) -> None:
    made = copy.deepcopy(comparison(dpo=DPO, qadapter=BETTER))
    for method in made["methods"].values():
        for run in method["runs"]:
            still = point(0.0, 0.5, 0.0, run["seed"], 0.0)
            # As `qadapter compare` leaves all points but those of the own setting.
            for name in ("tasks", "win_rates", "kl_generations", "greedy_changed"):
                del still[name]
            run["points"].insert(0, still)
    page = written(made, tmp_path)
    assert [row["Method"] for row in page.table("Method", "Verdict")] == ["DPO", "Q-Adapter"]
    assert "No task was measured on it and on the base." in page.text


def test_only_dials_of_all_seeds_count() -> None:
    partly = json.loads(json.dumps(BETTER))
    del partly["runs"][1]["points"][0]
    made = Results(comparison(dpo=DPO, qadapter=partly)).methods["qadapter"]
    assert made.dials == (1.0, 1.5)
    assert made.dials[made.own] == 1.0
    del partly["runs"][0]["points"][1:]
    results = Results(comparison(dpo=DPO, qadapter=partly))
    assert list(results.methods) == ["dpo"]


def test_a_method_may_name_its_own_dial() -> None:
    made = comparison(dpo=DPO, later={**BETTER, "own_dial": 1.5}, gone={**BETTER, "own_dial": 7.0})
    found = Results(made).methods
    assert {name: m.dials[m.own] for name, m in found.items()} == {
        "dpo": 1.0,
        "later": 1.5,
        "gone": 1.5,
    }


def test_scores_on_other_pairs_are_not_compared(tmp_path: Path) -> None:
    other = json.loads(json.dumps(BETTER))
    for run in other["runs"]:
        for p in run["points"]:
            p["correct"] = p["correct"][1:]
    page = written(comparison(dpo=DPO, q=ALIKE, other={**other, "label": "Odd one"}), tmp_path)
    assert "Left out, since scored on other pairs or text: Odd one." in page.text
    assert "Odd one" not in [row["Method"] for row in page.table("Method", "Verdict")]


def test_a_figure_that_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    made = comparison(dpo=DPO, qadapter=json.loads(json.dumps(BETTER)))
    for run in made["methods"]["qadapter"]["runs"]:
        for p in run["points"]:
            p |= {"kl_generations": None, "greedy_changed": None, "tasks": {}, "win_rates": []}
    page = written(made, tmp_path)
    row = page.table("Method", "Perplexity")[1]
    assert (row["KL on the base’s answers"], row["Greedy answers changed"]) == ("–", "–")
    assert page.table("Method", "Margin, nats")[1]["Mean vote of Bradley–Terry"] == "–"
    assert "No task was measured on it and on the base." in page.text


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(comparison(), tmp_path / "file")
