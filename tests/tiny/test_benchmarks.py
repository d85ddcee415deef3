"""What benchmarks take up again and what they divide by; no time is measured here."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from qadapter.compare.measure import row_figures
from qadapter.data import read_pairs, tokenize_pairs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def loaded(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a benchmark's module, which is no part of the package."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_rows_of_other_code_or_machines_are_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows had no key, and `make bench` mixed those of older code into its medians."""
    speed = loaded("speed_main", "speed/__main__.py", monkeypatch)
    ran: list[str] = []

    def noted(function: str, options: dict[str, Any]) -> dict[str, Any]:
        ran.append(function)
        return {"seconds": len(ran)}

    monkeypatch.setattr(speed, "in_process", noted)
    path, case = tmp_path / "speed.jsonl", speed.Case("growth", "a 1", "step", {"tokens": 1})
    key = speed.origin(BENCHMARKS / "speed")
    path.write_text(
        json.dumps({**speed.dataclasses.asdict(case), "repeat": 0, "result": {}}) + "\n"
    )
    assert speed.Runs(path, key).run(case, 0) == {"seconds": 1}
    assert "1 of 1 rows are left out" in capsys.readouterr().err
    again = speed.Runs(path, key)
    assert again.run(case, 0) == {"seconds": 1}
    assert again.used == again.rows
    for part, other in (("code", "f00"), ("cpu", "another"), ("versions", {"torch": "0"})):
        assert key[part] != other
        before = len(ran)
        assert speed.Runs(path, {**key, part: other}).run(case, 0) == {"seconds": before + 1}
    assert len(ran) == 4
    assert "2 of 2 rows are left out" in capsys.readouterr().err


def test_a_key_is_of_the_files_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = loaded("measured", "measured.py", monkeypatch)
    script = tmp_path / "script.py"
    script.write_text("a = 1\n")
    first = measured.origin(script)
    assert first == measured.origin(script)
    script.write_text("a = 2\n")
    second = measured.origin(script)
    assert first["code"] != second["code"]
    assert {k for k in first if first[k] != second[k]} == {"code"}


def test_a_share_of_the_peak_is_of_the_dtype_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    report = loaded("speed_report", "speed/report.py", monkeypatch)

    def row(name: str, dtype: str) -> dict[str, Any]:
        epoch = {"pairs_per_second": 1.0, "flops_per_second": 60.0}
        figures = {"epochs": [epoch], "dtype": dtype, "peak_gib": 1.0, "extra_gib": 1.0}
        return {"section": "training", "name": name, "repeat": 0, "result": figures}

    best = {"float32": {"best": 100.0}, "bfloat16": {"best": 600.0}}
    gemm = {"section": "gemm", "name": "gemm", "repeat": 0, "result": best}
    found = report.summarise([row("ours_k8", "bfloat16"), row("trl_best", "float32"), gemm])
    shares = {n: case["share_of_gemm_peak"] for n, case in found["training"].items()}
    assert shares == {"ours_k8": 0.1, "trl_best": 0.6}


def test_what_a_dry_run_said_is_set_beside_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    report = loaded("speed_report", "speed/report.py", monkeypatch)

    def row(section: str, tokens: float, peak: float) -> dict[str, Any]:
        epoch = {"pairs_per_second": 1.0, "tokens_per_second": tokens, "flops_per_second": 60.0}
        figures = {"epochs": [epoch], "dtype": "float32", "peak_gib": peak, "extra_gib": 1.0}
        return {"section": section, "name": "ours_k8", "repeat": 0, "result": figures}

    found = report.summarise([row("estimate", 100.0, 3.0), row("training", 50.0, 2.0)])
    ratios = {k: v["median"] for k, v in found["estimate"]["ours_k8"].items()}
    assert ratios == {"first_epoch": 0.5, "later_epochs": 0.5, "peak_gib": 1.5}
    lines = [line for line in report.table(found).splitlines() if "dry run" in line]
    assert len(lines) == 3
    assert all("missed" in line for line in lines)


def test_methods_made_anew_are_put_beside_others_scored_on_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish = loaded("publish_comparison", "publish_comparison.py", monkeypatch)
    monkeypatch.setenv("QADAPTER_DATA", "/data")
    new = {
        "suite": ["/data/capability"],
        "test_pairs": 3,
        "held_out_pairs": 0,
        "methods": ["replay"],
        "seeds": [0],
    }

    def method(beta: float, *seeds: int, **more: Any) -> dict[str, Any]:
        return {"runs": [{"seed": n, "params": {"beta": beta}, **more} for n in seeds]}

    old: dict[str, Any] = {"config": {"suite": "$QADAPTER_DATA/capability", "test_pairs": 3}}
    old |= {"pair_prompts": [0, 1], "methods": {"dpo": method(1.0, 0), "replay": method(2.0, 0, 1)}}
    made = {
        "config": new,
        "pair_prompts": [0, 1],
        "methods": {"replay": method(3.0, 0)},
        "failures": [],
    }
    made |= {"cells": [{"count": 7}]}
    (tmp_path / "comparison.json").write_text(json.dumps(made))
    # What made those that are replaced goes, though it may not say of which seeds they are.
    before = [{"count": 1}, {"count": 2, "methods": ["replay"]}]
    output = tmp_path / "out.json"
    output.write_text(json.dumps(old | {"cells": before}))
    words = ["publish", str(tmp_path), str(output), "--methods", "replay"]
    monkeypatch.setattr(sys, "argv", words)
    for _ in range(2):
        publish.main()
        found = json.loads(output.read_text())
        cells = [{"count": 1}, {"count": 7, "methods": ["replay"], "seeds": [0]}]
        # Of another setting none is left.
        methods = {"dpo": method(1.0, 0), "replay": method(3.0, 0)}
        assert found == old | {"methods": methods, "cells": cells}
    # Runs of other seeds at the same setting stay.
    more = {"config": new | {"seeds": [2, 1]}, "methods": {"replay": method(3.0, 2, 1, new=True)}}
    (tmp_path / "comparison.json").write_text(json.dumps(made | more))
    publish.main()
    found = json.loads(output.read_text())
    assert found["methods"]["replay"]["runs"] == [
        *method(3.0, 0)["runs"],
        *method(3.0, 1, 2, new=True)["runs"],
    ]
    assert found["cells"] == [*cells, {"count": 7, "methods": ["replay"], "seeds": [2, 1]}]
    for changed, message in (
        ({"config": new | {"test_pairs": 4}}, "the two differ in test_pairs"),
        ({"pair_prompts": [0, 0]}, "the two differ in pair_prompts"),
        ({"failures": [{"cell": "train replay"}]}, "train replay failed"),
        ({"methods": {"dpo": method(1.0, 0)}}, "replay is not in the comparison"),
    ):
        (tmp_path / "comparison.json").write_text(json.dumps(made | changed))
        with pytest.raises(SystemExit):
            publish.main()
        assert message in capsys.readouterr().err
        assert json.loads(output.read_text()) == found


def test_text_of_people_is_taken_by_turns_of_subjects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exam = loaded("exam_text", "exam_text.py", monkeypatch)
    archive, long = tmp_path / "mmlu.zip", "x" * exam.LEAST
    with ZipFile(archive, "w") as made:
        for subject, count in (("law", 4), ("high_school_biology", 2)):
            rows = [f'"{subject} {i}, {long}",yes,no,A\n' for i in range(count)]
            made.writestr(f"data/val/{subject}_val.csv", "".join([*rows, rows[0], "Why?,a,b,A\n"]))
        made.writestr("data/dev/law_dev.csv", f'"law 9, {long}",yes,no,A\n')
    texts = exam.questions(archive)
    assert len({*texts}) == len(texts) == 6
    assert Counter(text.split()[0] for text in texts[:4]) == {"law": 2, "high_school_biology": 2}
    assert all(len(text) > exam.LEAST for text in texts)
    assert "law 9" not in {text.split(",")[0] for text in texts}
    assert exam.questions(archive) == texts


def test_a_text_is_cut_at_headings_of_the_first_order(monkeypatch: pytest.MonkeyPatch) -> None:
    by_article = loaded("article_perplexity", "article_perplexity.py", monkeypatch)
    lines = ["before", " = One = ", "a", " = = Part = = ", "b", " = Two = Three = ", " = no", "c"]
    assert by_article.articles(lines) == [lines[1:5], lines[5:]]


@pytest.mark.parametrize("adapters", [["A", "1"], ["A", "1", "x", "--adapters", "A", "1", "y"]])
def test_adapters_without_a_place_or_a_name_of_their_own_are_refused(
    adapters: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_article = loaded("article_perplexity", "article_perplexity.py", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["it", "--output", "x.json", "--adapters", *adapters])
    with pytest.raises(SystemExit) as ended:
        by_article.main()
    assert ended.value.code == 2
    assert "a name of its own" in capsys.readouterr().err


def test_what_turns_round_with_the_preference_is_told_from_what_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swapped = loaded("swapped_preference", "swapped_preference.py", monkeypatch)
    sizes = np.array([10, 20, 30, 40])
    text = swapped.Rows([], sizes, "word")
    turns, stays = 0.03 * sizes, np.array([0.1, 0.3, 0.2, 0.4])
    told = swapped.shares(text, [stays + turns] * 2, [stays - turns] * 2)
    assert [*told] == ["as they are", "swapped", "turns round", "stays"]
    for end in ("value", "low", "high"):
        assert told["turns round"][end] == pytest.approx(np.expm1(0.03))
    assert told["stays"]["value"] == pytest.approx(np.expm1(0.01))
    assert told["stays"]["low"] < told["stays"]["value"] < told["stays"]["high"]
    assert told["as they are"]["value"] == pytest.approx(np.expm1(0.04))
    assert told["swapped"]["value"] == pytest.approx(np.expm1(-0.02))


def test_a_swapped_training_is_measured_by_what_it_preferred(
    monkeypatch: pytest.MonkeyPatch, base: str, data: str
) -> None:
    """On a tiny policy: each way's margin has the sign of its training, and KL is above 0."""
    swapped = loaded("swapped_preference", "swapped_preference.py", monkeypatch)
    policy = swapped.load_policy(base, None)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5, generator=torch.manual_seed(0))
    pairs = list(read_pairs(data))
    assert [(p.chosen, p.rejected) for p in swapped.turned(pairs)] == [
        (p.rejected, p.chosen) for p in pairs
    ]
    held_out, _ = tokenize_pairs(pairs, policy.tokenizer, end_ids=policy.end_ids, max_length=200)
    other, _ = tokenize_pairs(
        swapped.turned(pairs), policy.tokenizer, end_ids=policy.end_ids, max_length=200
    )
    one = swapped.margins(policy, held_out, "as they are", swapped.STRENGTHS)
    assert one[0] == 0
    assert one[2] != 0
    turned = swapped.margins(policy, other, "swapped", swapped.STRENGTHS)
    assert turned == pytest.approx(one)
    way, scale = ("as they are", one[2]) if one[2] > 0 else ("swapped", -one[2])
    # Of two policies, one the base: half of the margin, half of the KL.
    monkeypatch.setattr(swapped, "MARGIN", scale / 2)
    texts = {"lines": swapped.alone(policy, ["one two three", "four five"])}
    assert texts["lines"].sizes.tolist() == [3, 2]
    assert all(row[0] == policy.tokenizer.bos_token_id for row in texts["lines"].rows)
    told, rises = swapped.measured([policy, swapped.load_policy(base, None)], held_out, texts, way)
    assert told["strength"] == pytest.approx(1.0)
    found = row_figures(policy, texts["lines"].rows, [1, 1], [1.0])
    assert rises["lines"][0] == pytest.approx((found.base - found.policy[0]).numpy())
    assert rises["lines"][1].tolist() == [0, 0]
    assert told["kl"]["lines"]["value"] == pytest.approx(float(found.kl.sum()) / 5 / 2)
    assert told["kl"]["lines"]["value"] > 0
    assert told["margin"] == scale / 2
    both = [policy, swapped.load_policy(base, None)]
    at, rises = swapped.measured(both, held_out, texts, way, 0.5)
    half = swapped.margins(policy, held_out, way, [0.5])
    found = row_figures(policy, texts["lines"].rows, [1, 1], [0.5])
    assert at["strength"] == 0.5
    assert at["margins"] == [half, [0.0]]
    assert at["margin"] == pytest.approx(half[0] / 2)
    assert rises["lines"][0] == pytest.approx((found.base - found.policy[0]).numpy())
    assert at["kl"]["lines"]["value"] == pytest.approx(float(found.kl.sum()) / 5 / 2)


def test_both_ways_are_turned_to_the_margin_that_their_seeds_have_on_average(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swapped = loaded("swapped_preference", "swapped_preference.py", monkeypatch)
    curves = [[scale * at * swapped.MARGIN for at in swapped.STRENGTHS] for scale in (1.0, 1.5)]
    assert swapped.dial(curves) == pytest.approx(0.8)
    with pytest.raises(SystemExit, match=r"no margin of .*; give --strength"):
        swapped.dial([[0.0] * len(swapped.STRENGTHS)])


def an_output(method: str, seeds: list[int], turns: float, stays: float) -> dict[str, Any]:
    """Return what swapped_preference.py writes, of rows whose noise both ways and methods share."""
    sizes = [10, 20, 30, 40]
    noise = np.random.default_rng(0).normal(size=4)
    texts = []
    for name, scale in (("lines", 1), ("novels", 2)):
        rises = {
            way: [(noise + scale * np.array(sizes) * (stays + sign * turns)).tolist()] * len(seeds)
            for way, sign in {"as they are": 1, "swapped": -1}.items()
        }
        texts.append({"text": name, "sha256": f"of {name}", "sizes": sizes, "rises": rises})
    ways = {"as they are": {"margin": 4.2}, "swapped": {"margin": 0.5}}
    return {"method": method, "seeds": seeds, "ways": ways, "texts": texts}


def test_two_methods_differ_in_what_turns_round_and_in_what_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = loaded("swapped_difference", "swapped_difference.py", monkeypatch)
    one, other = an_output("one", [0, 1, 2], 0.05, 0.02), an_output("other", [3, 4], 0.01, 0.05)
    other["texts"].reverse()
    found = apart.differences(one, other)
    assert [*found] == ["lines", "novels"]
    wanted = {"as they are": 0.01, "swapped": -0.07, "turns round": 0.04, "stays": -0.03}
    for name, scale in (("lines", 1), ("novels", 2)):
        assert [*found[name]] == [*wanted]
        for part, nats in wanted.items():
            for end in ("value", "low", "high"):
                assert found[name][part][end] == pytest.approx(np.expm1(scale * nats))
    files = []
    for report in (one, other):
        files.append(str(tmp_path / f"{report['method']}.json"))
        Path(files[-1]).write_text(json.dumps(report))
    monkeypatch.setattr(sys, "argv", ["it", *files])
    apart.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "one, 3 seeds: as they are 4.20 nats, swapped 0.50 nats, turns 2.35",
        "other, 2 seeds: as they are 4.20 nats, swapped 0.50 nats, turns 2.35",
    ]
    assert lines[5].split() == ["lines", "stays", "-2.955%", "(-2.955%", "to", "-2.955%)"]


def _without(field: str) -> Any:
    return lambda report: [text.pop(field) for text in report["texts"]]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_without("rises"), "rises"),
        (_without("sha256"), "lacks rows"),
        (lambda report: report["seeds"].append(9), "lacks rows"),
        (lambda report: report.pop("texts"), "texts"),
        (lambda report: report["texts"].clear(), "lacks rows"),
        (lambda report: report["texts"].pop(), "different text"),
        (lambda report: report["texts"][0].update(sha256="x"), "different text"),
        (lambda report: report["ways"].pop("swapped"), "swapped"),
        (lambda report: report["ways"]["swapped"].pop("margin"), "margin"),
        (lambda report: report.pop("method"), "method"),
    ],
)
def test_outputs_that_do_not_belong_together_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Any,
    told: str,
) -> None:
    apart = loaded("swapped_difference", "swapped_difference.py", monkeypatch)
    one, other = an_output("one", [0], 0.05, 0.02), an_output("other", [0], 0.01, 0.05)
    spoil(other)
    files = [str(tmp_path / name) for name in ("one.json", "other.json")]
    for file, report in zip(files, (one, other), strict=True):
        Path(file).write_text(json.dumps(report))
    monkeypatch.setattr(sys, "argv", ["it", *files])
    with pytest.raises(SystemExit) as ended:
        apart.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_methods_measured_on_other_windows_are_not_put_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish = loaded("publish_comparison", "publish_comparison.py", monkeypatch)

    def comparison(base: float, seed: int) -> dict[str, Any]:
        run = {"seed": seed, "params": {}, "points": [{"base_perplexity": base}]}
        methods = {"dpo": {"search": None, "runs": [run]}}
        config = {"seeds": [seed], "pairs": 8}
        return {
            "config": config,
            "pair_prompts": [0],
            "methods": methods,
            "failures": [],
            "cells": [],
        }

    old = comparison(26.868, 0)
    assert len(publish.merged(old, comparison(26.869, 1), ["dpo"])["methods"]["dpo"]["runs"]) == 2
    with pytest.raises(ValueError, match="the two differ in the windows of the text"):
        publish.merged(old, comparison(31.2, 1), ["dpo"])
