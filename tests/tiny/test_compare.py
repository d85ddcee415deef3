"""The comparison: its settings, splits, figures, trainers, and a whole run with tiny models."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_adapter
from safetensors.torch import load_file
from test_judge import Endpoint
from test_judge import serve as endpoint_server

from qadapter import files, hub
from qadapter.cli import main
from qadapter.compare import (
    METHODS,
    CompareConfig,
    Progress,
    cells,
    compare,
    fanout,
    measure,
    origin,
    running,
    search,
)
from qadapter.compare import train as training
from qadapter.compare.data import Splits, part_of, prompts_of, split, varied
from qadapter.compare.equal import add_equal_learning
from qadapter.compare.fanout import Fanout
from qadapter.compare.methods import has_number, why_not
from qadapter.compare.run import _local_files, _told_early
from qadapter.compare.running import Run, fixed, suite_at
from qadapter.compare.variations import read_variation
from qadapter.config import QAdapterConfig, usual_trunk
from qadapter.data import prompt_key, read_pairs, read_texts, tokenize_pairs, tokenize_prompt
from qadapter.errors import ConfigError, DataError, UserError
from qadapter.evaluate import evaluate_tasks
from qadapter.files import shipped
from qadapter.judge import OpenAIJudge
from qadapter.model import QAdapterModel
from qadapter.policy import Policy
from qadapter.report import tables
from qadapter.report.results import Results
from qadapter.stats import INTERVALS, KL_FLOOR, share_interval, wilson_interval
from qadapter.suite import local_suite, supply_sentences
from qadapter.trainer import QAdapterTrainer

WORDS = ["red", "green", "blue", "pink", "grey", "black", "white", "brown", "gold", "teal"]

SHIPPED = sorted((Path(__file__).parents[2] / "benchmarks" / "compare").glob("*.yaml"))


def chat(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Pairs whose chosen response is loud: a rule that any judge can learn."""
    found = []
    for i in range(start, start + count):
        word = WORDS[i % len(WORDS)]
        found.append(
            {
                "prompt": chat("user", f"Name {i}"),
                "chosen": chat("assistant", f"{word}! {word}!"),
                "rejected": chat("assistant", f"{word}. {WORDS[(i + 3) % 10]}."),
            }
        )
    return found


_LAUNCH = """\
import sys
from pathlib import Path
from qadapter.compare import cells
cells.launch(Path(sys.argv[1]))
"""


def write_rows(path: Path, found: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


@pytest.fixture
def settings(base: str, tmp_path: Path) -> dict[str, Any]:
    """A comparison that takes seconds."""
    (tmp_path / "text.txt").write_text("The ferry leaves twice a day.\n" * 20)
    (tmp_path / "prompts.txt").write_text("What is a ferry?\nWhy?\nWhere?\nWho?\n")
    return {
        "train": write_rows(tmp_path / "train.jsonl", rows(120)),
        "test": write_rows(tmp_path / "test.jsonl", rows(30, start=1000)),
        "text": str(tmp_path / "text.txt"),
        "prompts": str(tmp_path / "prompts.txt"),
        "output": str(tmp_path / "out"),
        "model": base,
        "methods": ["base", "dpo", "qadapter_half"],
        "trials": 1,
        "strengths": [0.5, 1.0],
        "pairs": 8,
        "validation_pairs": 40,
        "test_pairs": 20,
        "text_tokens": 300,
        "replay_prompts": 4,
        "answers": 4,
        "answer_tokens": 6,
        "max_length": 128,
    }


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run cells here and not in processes of their own; return the kinds of those run."""
    ran: list[str] = []

    def here(directory: Path, *_: Any) -> int:
        ran.append(directory.name.split("-")[0])
        cells.work(directory)
        return 0

    monkeypatch.setattr(cells, "_launch", here)
    return ran


@pytest.fixture
def failing_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run cells here; an error is the last word of a cell's log, as of a process of its own."""

    def here(directory: Path, log: Any, _: Any) -> int:
        try:
            cells.work(directory)
        except Exception as error:  # whatever it is, it is told
            log.write(f"{type(error).__name__}: {error}\n")
            return 1
        return 0

    monkeypatch.setattr(cells, "_launch", here)


def yaml_file(path: Path, settings: dict[str, Any]) -> str:
    path.write_text(json.dumps(settings))  # JSON is YAML
    return str(path)


# ── settings ────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_read_with_its_full_section_and_the_environment(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    settings |= {"train": "$HERE/train.jsonl", "full": {"trials": 5, "seeds": [0, 1]}}
    path = yaml_file(tmp_path / "run.yaml", settings)
    small, full = CompareConfig.read(path), CompareConfig.read(path, full=True, vary=["pairs=4"])
    assert small.train == str(tmp_path / "train.jsonl")
    assert (small.trials, small.seeds, small.vary) == (1, (0,), ())
    assert (full.trials, full.seeds, full.vary) == (5, (0, 1), ("pairs=4",))


def test_a_blank_in_the_full_section_leaves_what_stands_above(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"suite": "there", "full": {"suite": None, "trials": 3}}
    config = CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings), full=True)
    assert (config.suite, config.trials) == (("there",), 3)


def test_a_field_left_blank_is_left_out_and_a_dollar_may_be_one(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRICED", "at $3")
    judges = ["rule:contains:$", "openai:m@http://a/v1"]
    settings |= {"suite": None, "judges": judges, "judge_criterion": "under $5, $PRICED"}
    config = CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings))
    assert config.suite == ()
    assert config.judges == tuple(judges)
    assert config.judge_criterion == "under $5, at $3"


def test_what_yaml_cannot_make_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("output: 2026-13-45\n")
    assert main(["compare", str(tmp_path / "run.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.yaml: cannot be read as YAML (month must be in 1..12" in line


@pytest.mark.parametrize("name", ["text", "prompts", "anchors"])
def test_a_missing_file_is_told_before_anything_runs(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = yaml_file(tmp_path / "run.yaml", settings | {name: str(tmp_path / "none.txt")})
    assert main(["compare", path]) == 2
    said = capsys.readouterr().err
    assert "none.txt" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("out/cells/*"))


def test_text_that_drift_is_measured_on_is_no_anchor(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "copy.txt").write_bytes(Path(settings["text"]).read_bytes())
    path = yaml_file(tmp_path / "run.yaml", settings | {"anchors": str(tmp_path / "copy.txt")})
    assert main(["compare", path]) == 2
    assert "copy.txt shares text with" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/cells/*"))
    # Nor is a text of which one line is measured, be it by the suite; a heading may be in both.
    long = "What a perplexity is taken of, and what is long enough to be no heading."
    other = "".join(f"What no other text holds, number {i}.\n" for i in range(20))
    measured = other.replace("no other text", "the suite")
    (tmp_path / "own.txt").write_text(f"= Ранние годы и образование =\n\n{long}\n{measured}")
    settings |= {"anchors": str(tmp_path / "copy.txt"), "suite": str(tmp_path / "own.txt")}
    path = yaml_file(tmp_path / "run.yaml", settings)
    (tmp_path / "copy.txt").write_text(f"= Death =\n\n  {long}\n{other}")
    assert main(["compare", path]) == 2
    said = capsys.readouterr().err
    assert f"own.txt, as {long[:60]!r}, where methods with anchors would look better" in said
    (tmp_path / "copy.txt").write_text(f"= Ранние годы и образование =\n{other}")
    assert list(_told_early(CompareConfig.read(path))) == ["suite:own"]
    # Short lines are no chance where they are many, as in dialogues, in code and in Chinese.
    (tmp_path / "copy.txt").write_text(f"The ferry leaves twice a day.\n{other[:300]}")
    assert main(["compare", path]) == 2
    assert "text.txt, as 'The ferry leaves twice a day.', where" in capsys.readouterr().err
    # Nor is it chance where all that is measured stands among much else.
    much = "".join(f"Much that no other text holds, {i}.\n" for i in range(900))
    (tmp_path / "copy.txt").write_text(f"The ferry leaves twice a day.\n{much}")
    assert main(["compare", path]) == 2
    assert "text.txt, as 'The ferry leaves twice a day.', where" in capsys.readouterr().err
    # What a task of rows asks is measured, too, be it in two fields.
    row = {"context": "The keeper opened the", "continuation": "door, which was green and heavy"}
    (tmp_path / "lambada.jsonl").write_text(json.dumps(row) + "\n")
    path = yaml_file(tmp_path / "run.yaml", settings | {"suite": str(tmp_path / "lambada.jsonl")})
    (tmp_path / "copy.txt").write_text(f"{' '.join(row.values())}\n{other}")
    assert main(["compare", path]) == 2
    assert "lambada.jsonl, as 'The keeper opened the door" in capsys.readouterr().err
    # So is what stands under a label, after a token of beginning or in a list.
    ask = "How is a heavy door kept from slamming where the wind comes in?"
    row = {"query": f"Question: {ask}", "choices": [long, "By a stone."], "gold": 0}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    path = yaml_file(tmp_path / "run.yaml", settings | {"suite": str(tmp_path / "piqa.jsonl")})
    for before in ("", "Student: ", "<s> ", "<|im_start|>Student: ", "<s><|user|>\t"):
        (tmp_path / "copy.txt").write_text(f"{before}{ask}\n{other}")
        assert main(["compare", path]) == 2
        assert f"piqa.jsonl, as {ask[:60]!r}" in capsys.readouterr().err
    (tmp_path / "copy.txt").write_text(f"{long}\n{other}")
    assert main(["compare", path]) == 2
    assert f"piqa.jsonl, as {long[:60]!r}" in capsys.readouterr().err


def test_what_the_base_or_the_text_does_not_allow_is_told_before_any_cell(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, said in [
        ({"max_length": 300}, "max_length: 300 exceeds the model's context of 256; lower it."),
        ({"text_tokens": 100}, "is one window of 256 tokens, which shows no spread; give more"),
    ]:
        assert main(["compare", yaml_file(tmp_path / "run.yaml", settings | change)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
        assert not list((tmp_path / "out").glob("cells/*"))


def test_settings_are_searched_on_other_text_than_is_reported() -> None:
    lines = [f"line {i}" for i in range(7)]
    assert part_of(lines, "report") + part_of(lines, "search") == lines
    with pytest.raises(DataError, match="holds one line"):
        part_of(lines[:1], "report")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trails": 3}, "'trails' is not a field"),
        ({"trials": "many"}, "'trials' is 'many', which is no int"),
        ({"trials": -1}, "trials: -1 must be at least 0"),
        ({"train": None}, "'train' is missing"),
        ({"train": "$NOT_SET_ANYWHERE/f"}, "a variable that is not set"),
        ({"train": "${NOT_SET_ANYWHERE}/f"}, "a variable that is not set"),
        ({"train": "${HOME/f"}, "'train': '${HOME/f' has no } after ${; add it"),
        ({"methods": ["base", "magic"]}, "'magic' is not one of"),
        ({"methods": ["dpo", "replay"], "prompts": None}, "prompts: 'replay' learns the base's"),
        ({"reference": "sft"}, "'sft' must be among the methods"),
        ({"strengths": [0.5]}, "with 1 among them"),
        ({"strengths": [0, 1, 10**400]}, "'strengths' is a number of 401 digits"),
        ({"suite": ""}, "'suite' is empty; give it a value, or leave it out"),
        ({"output": ""}, "'output' is empty"),
        ({"strengths": [1.0, 0.5]}, "strengths: must rise"),
        ({"seeds": []}, "seeds: is empty"),
        ({"seeds": [0, 0]}, "seeds: must be different"),
        ({"seeds": [-1]}, "seeds: must be different whole numbers from 0"),
        ({"headline": ["magic"]}, "headline: 'magic' is not one of"),
        ({"retrain": ["dpo.beta"]}, "must read METHOD.PARAMETER=NUMBER,NUMBER"),
        ({"retrain": ["magic.epochs=1,2"]}, "must name a method"),
        ({"retrain": ["dpo.gamma=1,2"]}, "must name a method and a number that its search"),
        ({"retrain": ["replay.replay=1,2"]}, "must name a method and a number that its search"),
        ({"retrain": ["dpo.beta=1", "dpo.beta=2"]}, "'dpo.beta' is there twice; give it once"),
        ({"vary": ["flipped"]}, "must read NAME=NUMBER"),
        ({"vary": ["magic=2"]}, "'magic' is neither of flipped"),
        ({"vary": ["flipped=1.5"]}, "no share"),
        ({"vary": ["lora_r=4.5"]}, "'lora_r=4.5' must be a whole number"),
        ({"vary": ["flipped=nan"]}, "must read NAME=NUMBER"),
        (
            {"vary": ["irrelevant=0.5"], "pairs": 2},
            "takes responses from two pairs of other prompts",
        ),
        ({"pairs": 80}, "no pairs are left for the judge"),
        ({"pairs": 500}, "holds fewer than the 540 pairs"),
        ({"full": [1]}, "`full` must hold fields"),
        ({"vary": ["lora_r=0"]}, "vary: 'lora_r=0': lora_r must be above 0"),
        ({"vary": ["trunk=1"]}, "vary: 'trunk=1': trunk must be below 1"),
        ({"vary": ["gamma=1.1"]}, "vary: 'gamma=1.1': gamma must be at most 1"),
        ({"vary": ["gamma=0"]}, "vary: 'gamma=0': gamma must be above 0"),
        ({"vary": ["beta=0"]}, "vary: 'beta=0': beta must be above 0 for DPO"),
        ({"vary": ["beta=-1"]}, "vary: 'beta=-1': beta must be above 0 for DPO"),
        ({"vary": ["parameterization=1"]}, "'parameterization' is neither of flipped"),
        ({"vary": ["flipped=0.1", "flipped=0.10"]}, "vary: 'flipped=0.1' is there twice"),
        ({"judges": ["rule:shorter", "rule:shorter"]}, "judges: 'rule:shorter' is there twice"),
        (
            {"judges": ["openai:m@http://a/v1", "openai:m@http://b/v1"]},
            "judges, by name: 'm' is there twice",
        ),
        ({"methods": ["dpo", "dpo"]}, "methods: 'dpo' is there twice; give it once"),
        ({"retrain": ["dpo.beta=0.1,0"]}, "'dpo.beta=0.1,0': beta must be above 0"),
        ({"retrain": ["dpo.beta=-0.1"]}, "'dpo.beta=-0.1': beta must be above 0"),
        ({"held_out_pairs": -1}, "held_out_pairs: -1 must be at least 0"),
        ({"settings": ["dpo"]}, "'settings' is ['dpo']; write names and values under it"),
        ({"settings": {"magic": {}}}, "settings: 'magic' is not one of"),
        ({"settings": {"dpo": 2}}, "'settings': 'dpo' is 2; write names"),
        ({"settings": {"dpo": {"gamma": 1}}}, "settings: dpo: 'gamma' is not one of beta, learn"),
        ({"settings": {"base": {"beta": 1}}}, "settings: base: nothing is searched"),
        ({"settings": {"dpo": {"epochs": 0}}}, "settings: dpo: epochs 0 must be above 0"),
        ({"settings": {"replay": {"replay": "all"}}}, "settings: replay: replay 'all' is not one"),
        ({"settings": {"dpo": {"beta": "low"}}}, "settings: dpo: beta 'low' must be a number"),
        ({"settings": {"dpo": {"beta": 0}}}, "settings: dpo: beta 0 must be above 0"),
        ({"judges": ["my aunt"]}, "'my aunt' is none"),
        ({"judges": ["rule:shortest"]}, "'shortest'"),
        ({"judges": ["openai:gpt@nowhere"]}, "not an address"),
        ({"judge_criterion": "brevity"}, "judge_criterion: no judge is told it"),
    ],
)
def test_bad_settings_are_told_in_one_sentence(
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    said: str,
) -> None:
    path = yaml_file(tmp_path / "run.yaml", settings | change)
    assert main(["compare", path]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "cells").exists()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_what_is_shipped_can_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QADAPTER_DATA", "data")
    config = CompareConfig.read(file)
    assert config.train.startswith("data/preference/")
    if "\nfull:\n" in file.read_text():
        full = CompareConfig.read(file, full=True)
        assert full.trials > config.trials
        assert len(full.seeds) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_setting(value: float) -> None:
    for method in METHODS.values():
        for parameter, space in method.space.items():
            if has_number(space):
                assert why_not(parameter, value, method.space) == "must be finite"


@pytest.mark.parametrize("parameter", ["anchor_weight", "beta"])
def test_what_may_be_left_out_may_be_0(parameter: str) -> None:
    assert METHODS["qadapter_half"].takes_number(parameter)
    assert why_not(parameter, 0.0, METHODS["qadapter_half"].space) is None


def test_every_method_starts_its_search_inside_its_space() -> None:
    for method in METHODS.values():
        assert set(method.defaults) == set(method.space)
        assert not set(method.fixed) & set(method.space)
        for name, value in method.defaults.items():
            space = method.space[name]
            values = getattr(space, "values", None)
            assert value in values if values else space.low <= value <= space.high


def search_of(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str = "dpo"
) -> dict[str, Any]:
    """Return a method's search, in which nothing is trained."""
    point = {"accuracy": 0.7, "accuracy_ci": (0.6, 0.8), "kl": 0.1, "margin": 1.0}
    found = {"points": [point], "seconds": 1.0}
    monkeypatch.setattr(search, "tried", lambda *_, **__: found)
    config = CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings))
    return search.searched(cast(Run, SimpleNamespace(config=config)), name, METHODS[name])


def test_replay_is_tried_on_both_kinds_of_prompts(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"trials": 4}
    one, two = (
        [t["params"] for t in search_of(settings, tmp_path, monkeypatch, name)["trials"]]
        for name in ("replay", "sft")
    )
    kinds = [(1, "general"), (2, "training"), (1, "training"), (2, "general")]
    assert [(p["epochs"], p["replay"]) for p in one] == kinds
    # As many rates as any other: the default at one and two epochs, and two random ones.
    for trials in (one, two):
        rates = [p["learning_rate"] for p in trials]
        assert rates[:2] == [2e-4] * 2
        assert len({*rates}) == 3


def test_no_setting_is_tried_twice_while_others_come(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_rounded", lambda v: v if type(v) is int else float(f"{v:.0e}"))
    settings |= {"trials": 10, "settings": {"dpo": {"beta": 0.3}}}
    told: list[Any] = []
    tell = search._tell

    def telling(*args: Any) -> None:
        told.append(args)
        tell(*args)

    monkeypatch.setattr(search, "_tell", telling)
    for askings, some_again in ((1, True), (10, False)):
        told.clear()
        monkeypatch.setattr(search, "_ASKINGS", askings)
        trials = search_of(settings, tmp_path, monkeypatch)["trials"]
        assert len(trials) == 10
        assert (len({str(t["params"]) for t in trials}) < 10) is some_again
        # What came again is told as it was found, so that the study goes elsewhere.
        assert (len(told) > 10) is not some_again
    # Where there are no others it ends all the same.
    settings |= {"trials": 3, "settings": {"dpo": {"beta": 0.3, "learning_rate": 1e-4}}}
    epochs = [t["params"]["epochs"] for t in search_of(settings, tmp_path, monkeypatch)["trials"]]
    assert (len(epochs), epochs[:2]) == (3, [1, 2])


@pytest.mark.parametrize("failing", [0, 1])
def test_time_left_is_told_by_the_pace_of_cells_without_a_result(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    clock, said = [100.0], []
    monkeypatch.setattr(running.time, "perf_counter", lambda: clock[0])

    class FakeCell:
        def __init__(self, root: Path, kind: str, label: str, spec: dict[str, Any]) -> None:
            self.directory, self.label, self.spec = root / label, label, spec
            self.result = {} if label == "0" else None  # of an earlier run

        def run(self, _: Any) -> dict[str, Any]:
            clock[0] += 0.0 if self.result == {} else 30.0
            if failing and self.label == "1":
                raise cells.CellFailed("no")
            return {}

    monkeypatch.setattr(running, "Cell", FakeCell)
    config = CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings))
    run = Run(config, tmp_path, said.append, 5, cast(Fanout, SimpleNamespace(launch=None)))
    run.began = clock[0]
    for i in range(4):
        run.cell("measure", str(i), files={})
    told = [(at.done, at.total, at.seconds_left) for at in said]
    assert told == [(0, 5, None), (1, 5, None), (2, 5, 90.0), (3, 5, 60.0)]
    assert [failure["cell"] for failure in run.failures] == ["measure 1"] * failing


def test_given_settings_are_not_searched(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"trials": 3, "settings": {"dpo": {"beta": "3e-1", "epochs": 2}}}
    found = search_of(settings, tmp_path, monkeypatch)
    assert set(found["space"]) == {"learning_rate"}
    tried = [trial["params"] for trial in found["trials"]]
    assert tried[0] == {"beta": 0.3, "epochs": 2, "learning_rate": 2e-4}
    assert len({params["learning_rate"] for params in tried}) == 3
    assert {(params["beta"], params["epochs"]) for params in tried} == {(0.3, 2)}
    # As the search would have them: 2.0 would make another cell.
    assert type(tried[0]["epochs"]) is int


@pytest.mark.parametrize("trials", [0, 3])
def test_where_everything_is_given_nothing_is_tried(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: int
) -> None:
    best = {"beta": 0.3, "epochs": 2, "learning_rate": 1e-4}
    settings |= {"trials": trials, "settings": {"dpo": best}}
    found = search_of(settings, tmp_path, monkeypatch)
    assert found == {"sampler": None, "space": {}, "trials": [], "best": best}


# ── splits ──────────────────────────────────────────────────────────────────────────────────────


def test_no_prompt_is_in_two_splits(settings: dict[str, Any], tmp_path: Path) -> None:
    # Two pairs of each prompt, so that a split by pairs would tear them apart.
    twice = [{**row, "chosen": chat("assistant", f"so {i}")} for i in range(2) for row in rows(60)]
    settings["train"] = write_rows(tmp_path / "twice.jsonl", twice)
    config = CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings))
    parts = split(config)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (8, 40, 20)
    groups = [parts.train, parts.validation, parts.judge, parts.test]
    seen = Counter(key for group in groups for key in {prompt_key(p) for p in group})
    assert set(seen.values()) == {1}
    assert sum(map(len, groups)) == 120 + 20
    assert split(config) == parts


def test_pairs_of_the_training_file_are_held_out_beside_the_test_file(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    before = split(CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings)))
    settings["held_out_pairs"] = 30
    parts = split(CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings)))
    assert (parts.train, parts.validation) == (before.train, before.validation)
    assert parts.test[:20] == before.test
    assert parts.test[20:] + parts.judge == before.judge
    assert len(parts.test) == 50


def test_holding_out_leaves_training_as_it_is(settings: dict[str, Any], tmp_path: Path) -> None:
    # Several pairs a prompt: the judge gets less, and no other prompt is trained on.
    settings |= {"train": write_rows(tmp_path / "four.jsonl", of_four(100)), "pairs": 10}
    before = split(CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings)))
    settings["held_out_pairs"] = 40
    parts = split(CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings)))
    assert (parts.train, parts.validation) == (before.train, before.validation)
    assert len(parts.test) == 20 + 40
    groups = [parts.train, parts.validation, parts.judge, parts.test]
    seen = Counter(key for group in groups for key in {prompt_key(p) for p in group})
    assert set(seen.values()) == {1}
    # Where one pair of each prompt does not do, more of them.
    settings["held_out_pairs"] = 150
    parts = split(CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings)))
    assert (parts.train, len(parts.test)) == (before.train, 20 + 150)
    settings["held_out_pairs"] = 200
    with pytest.raises(DataError, match=r"left for the judge.*`held_out_pairs`, or name other"):
        split(CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings)))


def test_a_variation_trains_on_more_pairs_than_the_rest(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"train": write_rows(tmp_path / "four.jsonl", of_four(100)), "held_out_pairs": 20}
    path = yaml_file(tmp_path / "run.yaml", settings)
    parts = split(CompareConfig.read(path))

    def trained(text: str) -> list[Any]:
        return read_variation(text, parts, ["dpo"], parts.train[:4])[3] or []

    assert trained("pairs=4") == parts.train[:4]
    more, judges = trained("pairs=40"), {prompt_key(p) for p in parts.judge}
    assert more[:8] == parts.train
    # One pair of each of the judge's prompts, and none of those that are measured.
    assert len({prompt_key(p) for p in more[8:]}) == 32
    assert {prompt_key(p) for p in more[8:]} <= judges
    every = 8 + len(parts.judge)
    assert len({p.source for p in trained(f"pairs={every}")}) == every
    with pytest.raises(DataError, match=f"pairs={every + 1} must lie between 1 and {every}"):
        trained(f"pairs={every + 1}")
    # A share is one of what is trained on, which are the pairs that fit.
    flipped = trained("flipped=0.5")
    assert [p.prompt for p in flipped] == [p.prompt for p in parts.train[:4]]
    assert sum(a != b for a, b in zip(flipped, parts.train, strict=False)) == 2


def test_more_pairs_than_the_training_file_can_hold_out(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["held_out_pairs"] = 73
    said = "fewer than the 121 pairs that `pairs`, `validation_pairs`, `held_out_pairs` ask"
    with pytest.raises(DataError, match=said):
        split(CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings)))


def of_four(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Return four pairs of each prompt, one after the other, as DSP has them."""
    return [
        {**row, "chosen": chat("assistant", f"so {i}")}
        for row in rows(count, start)
        for i in range(4)
    ]


def turns(pairs: list[Any]) -> list[str]:
    return [pair.chosen[0]["content"] for pair in pairs]


def prompts_in(parts: Splits) -> list[int]:
    return [len(prompts_of(pairs)) for pairs in (parts.train, parts.validation, parts.judge)]


def test_every_split_is_spread_over_prompts(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train"] = write_rows(tmp_path / "four.jsonl", of_four(100))
    settings["test"] = write_rows(tmp_path / "four.test.jsonl", of_four(16, start=1000))
    config = CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings))
    parts = split(config)
    # 48 prompts of one pair each leave the other half to the judge, with all their pairs.
    assert prompts_in(parts) == [8, 40, 52]
    assert (len(parts.train), len(parts.validation), len(parts.judge)) == (8, 40, 208)
    # Of the test file: all 16 prompts in its order, then four of them again.
    asked = [p.prompt[0]["content"] for p in parts.test]  # type: ignore[index]
    assert asked == [f"Name {1000 + i}" for i in [*range(16), *range(4)]]
    assert turns(parts.test) == ["so 0"] * 16 + ["so 1"] * 4


def test_as_few_pairs_of_a_prompt_as_leave_half_to_the_judge(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"train": write_rows(tmp_path / "four.jsonl", of_four(100)), "pairs": 85}
    parts = split(CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings)))
    # 85 + 40 pairs: one each wants 125 prompts, two 43 + 20, three 29 + 14.
    assert prompts_in(parts) == [
        29,
        14,
        57,
    ]
    assert turns(parts.train) == ["so 0"] * 29 + ["so 1"] * 29 + ["so 2"] * 27
    settings["pairs"] = 350
    parts = split(CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings)))
    assert prompts_in(parts) == [88, 10, 2]


def test_a_test_file_of_one_prompt_shows_no_spread(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["test"] = write_rows(tmp_path / "one.jsonl", of_four(1, start=1000))
    with pytest.raises(DataError, match=r"one\.jsonl: has one prompt"):
        split(CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings)))


def test_a_prompt_of_the_test_file_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    # Also beyond the first `test_pairs`.
    settings["test"] = write_rows(
        tmp_path / "shared.jsonl", rows(20, start=1000) + rows(4, start=117)
    )
    config = CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings))
    said = r"train\.jsonl:118: its prompt is in .*shared\.jsonl too, as are 3 of the 120 prompts"
    with pytest.raises(DataError, match=said):
        split(config)


def test_the_guide_names_every_field_and_method_and_its_example_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    guide = (SHIPPED[0].parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    told: set[str] = set()
    for name in (*CompareConfig.__dataclass_fields__, *METHODS):
        assert f"`{name}`" in guide or f"{name}, " in guide or f"{name}: " in guide, name
    for row in re.findall(r"^\| (`.+?) \| ([\d., ]+) \|", guide, flags=re.MULTILINE):
        names = re.findall(r"`(\w+)`", row[0])
        values = [float(value.replace(",", "")) for value in row[1].split(", ")]
        defaults = [CompareConfig.__dataclass_fields__[name].default for name in names]
        assert values == (list(defaults[0]) if names == ["strengths"] else defaults)
        told |= {*names}
    assert {"pairs", "held_out_pairs", "answer_tokens", "max_length", "trials"} <= told
    example = guide.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "run.yaml").write_text(example)
    config = CompareConfig.read(tmp_path / "run.yaml")
    assert config.suite == ("capability", "my_task.jsonl", "gsm8k")


def test_variations_of_the_training_pairs(settings: dict[str, Any]) -> None:
    pairs = list(read_pairs(settings["train"]))
    flipped = varied(pairs, "flipped", 0.3)
    turned = [a for a, b in zip(pairs, flipped, strict=True) if a != b]
    assert len(turned) == 36
    assert all(
        (a.chosen, a.rejected) == (b.rejected, b.chosen)
        for a, b in zip(pairs, flipped, strict=True)
        if a != b
    )
    strange = {prompt_key(p): p for p in varied(pairs, "irrelevant", 0.5)}
    said = {pair.chosen[0]["content"] for pair in pairs}
    changed = [p for p in pairs if strange.get(prompt_key(p), p) != p]
    dropped = len(pairs) - len(strange)  # two responses alike
    assert len(changed) + dropped == 60
    assert len(changed) > 40
    for pair in changed:
        found = strange[prompt_key(pair)]
        assert found.prompt == pair.prompt
        assert found.chosen != found.rejected
        assert {found.chosen[0]["content"], found.rejected[0]["content"]} <= said
    assert varied(pairs, "pairs", 7) == pairs[:7]


def test_an_irrelevant_pair_has_no_response_to_its_own_prompt(settings: dict[str, Any]) -> None:
    """With several pairs a prompt, another pair's response may be to the same one."""
    pairs = list(read_pairs(settings["train"]))[:6]
    many = [
        replace(p, chosen=f"yes {p.prompt} {i}", rejected=f"no {p.prompt} {i}")
        for p in pairs
        for i in range(5)
    ]
    found = varied(many, "irrelevant", 1.0)
    assert len(found) == 30
    for pair in found:
        assert str(pair.prompt) not in f"{pair.chosen} {pair.rejected}"
    with pytest.raises(DataError, match="two pairs of other prompts"):
        varied(many[:6], "irrelevant", 1.0)


def test_a_prompt_of_several_pairs_is_asked_once(settings: dict[str, Any]) -> None:
    pairs = list(read_pairs(settings["train"]))
    again = [replace(pair, chosen="another answer") for pair in pairs]
    mixed = [pair for both in zip(pairs, again, strict=True) for pair in both]
    found = prompts_of(mixed)
    assert len(found) == len({prompt_key(pair) for pair in pairs}) < len(mixed)
    assert found == prompts_of(pairs)
    assert found[0] == pairs[0].prompt


# ── figures ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"parameterization": "raw", "alpha_0": 0.3, "alpha_tilde": 0.7},
        {"family": "gemma2"},  # a soft-capped head, so two heads
    ],
)
def test_figures_of_rows_equal_those_from_whole_logits(fields: dict[str, Any]) -> None:
    model = tiny_adapter(**fields)
    policy = Policy.__new__(Policy)
    policy.model = model
    generator = torch.Generator().manual_seed(3)
    lengths, starts, strengths = [5, 17, 9, 30], [1, 11, 8, 2], [0.0, 0.5, 1.0, 1.7]
    found_rows = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]
    found = measure.row_figures(policy, found_rows, starts, strengths)
    for i, (row, at) in enumerate(zip(found_rows, starts, strict=True)):
        ids = torch.tensor([row])
        targets, where = ids[0, at:], slice(at - 1, len(row) - 1)
        with torch.no_grad():
            with model.adapter_off():
                base = model._base(input_ids=ids).logits[0].double().log_softmax(-1)[where]
            assert found.tokens[i] == len(targets)
            expected = base.gather(1, targets[:, None]).sum()
            torch.testing.assert_close(found.base[i], expected, atol=1e-4, rtol=1e-4)
            for s, strength in enumerate(strengths):
                logits = model(input_ids=ids, strength=strength).logits[0].double()
                logp = logits.log_softmax(-1)[where]
                expected = logp.gather(1, targets[:, None]).sum()
                torch.testing.assert_close(found.policy[s, i], expected, atol=1e-4, rtol=1e-4)
                assert found.kl is not None
                kl = (base.exp() * (base - logp)).sum()
                torch.testing.assert_close(found.kl[s, i], kl, atol=1e-4, rtol=1e-3)


def test_log_ratios_order_pairs_as_returns_do(adapter: str, base: str, data: str) -> None:
    # METHOD I1 and I2: at γ = 1 and α0 = α̃ they are the same, up to α̃.
    policy, pairs = Policy.from_pretrained(adapter, base), list(read_pairs(data))
    tokens, _ = tokenize_pairs(pairs, policy.tokenizer, end_ids=policy.end_ids, max_length=200)
    (point,) = measure.preference(policy, tokens, [1.0])
    score = policy.score(pairs, max_length=200)
    assert point["accuracy"] == score.accuracy
    margin = policy.model.q_config.alpha_tilde * point["margin"]
    assert margin == pytest.approx(score.margin, rel=1e-3)


def test_drift_is_that_of_the_policy(adapter: str, base: str) -> None:
    policy = Policy.from_pretrained(adapter, base)
    texts = ["The ferry leaves twice a day in summer."] * 12
    (half, whole) = measure.drift(policy, texts, [0.5, 1.0], max_tokens=300)
    expected = policy.drift(texts, max_tokens=300)
    assert whole["kl"] == pytest.approx(expected.kl, rel=1e-4)
    assert whole["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert whole["base_perplexity"] == pytest.approx(expected.base_perplexity, rel=1e-4)
    assert 0 < half["kl"] < whole["kl"]
    assert sum(whole["window_kl"]) / sum(whole["window_tokens"]) == pytest.approx(whole["kl"])


def test_where_the_base_says_nothing_nothing_drifts_on_it(adapter: str, base: str) -> None:
    policy = measure.load_policy(base, Path(adapter))
    asked = [chat("user", "Why?"), chat("user", "Who?")]
    nothing = {"kl_generations": None, "answer_kl": [], "answer_tokens": []}
    assert measure.on_answers(policy, asked, ["", ""], [0.5, 1.0]) == [nothing] * 2
    none, half, whole = measure.on_answers(policy, asked, ["", "me and you"], [0.0, 0.5, 1.0])
    assert none["kl_generations"] == 0.0
    assert 0 < half["kl_generations"] < whole["kl_generations"]
    (told,), (tokens,) = whole["answer_kl"], whole["answer_tokens"]
    assert tokens == len(policy.tokenizer("me and you")["input_ids"])
    assert whole["kl_generations"] == pytest.approx(told / tokens)


# ── trainers ────────────────────────────────────────────────────────────────────────────────────


def task(settings: dict[str, Any], directory: Path, **params: Any) -> training.Task:
    said = [
        {"kind": kind, "prompt": chat("user", f"q{i}"), "ids": [9 + i, 7, 8, 0]}
        for i in range(6)
        for kind in ("general", "training")
    ]
    return training.Task(
        params={"trunk": 0.5, "learning_rate": 1e-2, "epochs": 1, **params},
        seed=0,
        model=settings["model"],
        max_length=128,
        answer_tokens=6,
        training={"per_device_train_batch_size": 4},
        pairs=Path(write_rows(directory / "pairs.jsonl", rows(8))),
        replay=Path(write_rows(directory / "replay.jsonl", said)),
        anchors=Path(shipped("anchors.txt")),
        output=directory / "adapter",
    )


@pytest.mark.parametrize(
    ("trainer", "params"),
    [
        ("train_dpo", {"beta": 0.1, "trunk": 0.0}),
        ("train_dpo", {"beta": 0.1, "sft_weight": 1.0}),
        ("train_dpo", {"beta": 0.1, "anchor_weight": 3.0}),
        ("train_sft", {}),
        ("train_sft", {"anchor_weight": 3.0}),
        ("train_sft", {"replay": "training"}),
        ("train_rloo", {"beta": 0.05, "trunk": 0.0}),
        ("train_qadapter", {**METHODS["qadapter_half"].fixed, **METHODS["qadapter_half"].defaults}),
        ("train_qadapter", {**METHODS["qadapter_authors"].fixed, "lora_r": 4.0}),
    ],
)
def test_what_a_trainer_leaves_is_a_policy_that_differs_from_the_base(
    settings: dict[str, Any], tmp_path: Path, trainer: str, params: dict[str, Any]
) -> None:
    done = task(settings, tmp_path, **{"learning_rate": 1e-2, **params})
    training.train(done, trainer)
    policy = Policy.from_pretrained(done.output)
    ids = torch.tensor([policy.tokenizer("Name 3")["input_ids"]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits
        base = hub.load_base(settings["model"], dtype=torch.float32)(input_ids=ids).logits
    assert (logits.log_softmax(-1) - base.log_softmax(-1)).abs().max() > 1e-3
    layers = {name.split("layers.")[1][0] for name in policy.model.adapter_parameters()}
    assert layers == {str(i) for i in range(round(4 * done.params["trunk"]), 4)}


def test_the_default_method_is_what_train_makes_by_default(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[QAdapterConfig] = []

    def trained(config: QAdapterConfig) -> Any:
        asked.append(config)
        return SimpleNamespace(stopped_at=None)

    monkeypatch.setattr(training, "run_training", trained)
    done, run = task(settings, tmp_path), equal_run(settings, tmp_path)
    for pairs in (8, 5000):
        run.trunk = usual_trunk(pairs)
        params = {**fixed(run, "qadapter"), **METHODS["qadapter"].defaults}
        training.train(replace(done, params=params), "train_qadapter")
        assert asked[-1].trunk == QAdapterConfig(output_dir=asked[-1].output_dir).trunk_for(pairs)
    assert "trunk" not in fixed(run, "dpo_sft").keys() - METHODS["dpo_sft"].fixed.keys()
    config = asked[0]
    usual = QAdapterConfig(output_dir=config.output_dir)
    apart = {f.name for f in fields(usual) if getattr(config, f.name) != getattr(usual, f.name)}
    # Its data, what all methods have alike, and where anchors come from; of the method nothing.
    assert apart <= {
        "anchor_data",
        "data",
        "logging_dir",
        "max_length",
        "model",
        "per_device_train_batch_size",
        "save_strategy",
        "seed",
        "trunk",
    }


def test_online_learning_is_rewarded_for_what_is_preferred(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []
    monkeypatch.setattr(training, "_finish", lambda _, trainer, __: trainers.append(trainer))
    training.train(task(settings, tmp_path, beta=0.05), "train_rloo")
    (reward,) = trainers[0].reward_funcs
    new = rows(20, start=100)
    asked = [row["prompt"] for row in new for _ in range(2)]
    made = [row[side] for row in new for side in ("chosen", "rejected")]
    found = reward(prompts=asked, completions=made)
    won = sum(a > b for a, b in zip(found[::2], found[1::2], strict=True))
    assert won >= 18
    # Each answer has the reward of its own, wherever it stands.
    turned = reward(prompts=asked[::-1], completions=made[::-1])
    assert turned[::-1] == pytest.approx(found)


@pytest.mark.parametrize(
    ("trainer", "params"),
    [
        ("train_dpo", {"beta": 0.1, "anchor_weight": 30.0}),
        ("train_sft", {"anchor_weight": 30.0}),
        ("train_qadapter", {**METHODS["qadapter_half"].fixed, **METHODS["qadapter_half"].defaults}),
    ],
)
def test_steps_of_two_micro_batches_are_steps_of_one(
    settings: dict[str, Any], tmp_path: Path, trainer: str, params: dict[str, Any]
) -> None:
    """With less memory the same is learned, to Adam's eye for small gradients."""
    ways = {
        "whole": {"per_device_train_batch_size": 4},
        "halves": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "less": {"per_device_train_batch_size": 2},
    }
    found = {}
    for name, way in ways.items():
        (tmp_path / name).mkdir()
        done = task(settings, tmp_path / name, **{**params, "learning_rate": 1e-3, "epochs": 3})
        training.train(replace(done, training=way), trainer)
        found[name] = load_file(done.output / "adapter_model.safetensors")
    halves, less = (
        math.hypot(*(float((found[name][k] - v).norm()) for k, v in found["whole"].items()))
        for name in ("halves", "less")
    )
    assert halves < 0.04 * less


@pytest.mark.parametrize(("pairs", "accumulated"), [(8, 1), (6, 1), (2 * 3, 4)])
@pytest.mark.parametrize(
    ("trainer", "params"), [("train_dpo", {"beta": 0.1}), ("train_rloo", {"beta": 0.05})]
)
def test_an_epoch_is_as_many_steps_for_every_method(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainer: str,
    params: dict[str, Any],
    pairs: int,
    accumulated: int,
) -> None:
    steps = []
    finish = training._finish

    def counted(done: training.Task, trainer: Any, base: Any) -> None:
        finish(done, trainer, base)
        steps.append(trainer.state.global_step)

    monkeypatch.setattr(training, "_finish", counted)
    done = task(settings, tmp_path, epochs=2, **params)
    # Two pairs of each prompt: it is pairs that count.
    write_rows(done.pairs, [row for row in rows(pairs // 2) for _ in range(2)])
    told = {**done.training, "gradient_accumulation_steps": accumulated}
    training.train(replace(done, training=told), trainer)
    assert steps == [2 * math.ceil(pairs / (4 * accumulated))]


@pytest.mark.parametrize(
    ("trainer", "more"),
    [
        ("train_dpo", {"sft_weight": 1.0}),
        ("train_dpo", {"anchor_weight": 30.0}),
        ("train_sft", {"replay": "training"}),
        ("train_sft", {"replay": "general"}),
        ("train_sft", {"anchor_weight": 30.0}),
        ("train_qadapter", {"gamma": 0.9}),
        ("train_qadapter", {"parameterization": "raw", "anchor_weight": 0.0}),
    ],
)
def test_what_a_method_is_told_changes_what_it_learns(
    settings: dict[str, Any], tmp_path: Path, trainer: str, more: dict[str, Any]
) -> None:
    plain: dict[str, Any] = {"beta": 0.1}
    if trainer == "train_qadapter":
        plain = {**METHODS["qadapter_bare"].fixed, **METHODS["qadapter_bare"].defaults}
    learned = []
    for name, params in (("with", plain | more), ("without", plain)):
        directory = tmp_path / name
        directory.mkdir()
        done = task(settings, directory, **{**params, "learning_rate": 1e-3, "epochs": 3})
        training.train(done, trainer)
        learned.append(load_file(done.output / "adapter_model.safetensors"))
    far = max(float((a - learned[1][name]).abs().max()) for name, a in learned[0].items())
    assert far > 1e-5


@pytest.mark.parametrize("trainer", ["train_dpo", "train_sft"])
def test_trainers_of_trl_get_the_tokens_that_ours_gets(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(training, "_finish", lambda _, made, __: seen.append(made))
    done = task(settings, tmp_path, beta=0.1)
    training.train(done, trainer)
    tokenizer = hub.load_tokenizer(settings["model"])
    end_ids = hub.end_of_turn_ids(tokenizer, hub.load_generation_config(settings["model"]))
    pairs, _ = tokenize_pairs(
        read_pairs(str(done.pairs)), tokenizer, end_ids=end_ids, max_length=128
    )
    rows = {(*p.prompt_ids, *answer) for p in pairs for answer in (p.chosen_ids, p.rejected_ids)}
    if trainer == "train_sft":
        rows = {(*p.prompt_ids, *p.chosen_ids) for p in pairs}
    found = set()
    for batch in seen[0].get_train_dataloader():
        found |= {
            tuple(row[mask.bool()].tolist())
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }
    assert found == rows


def test_an_adapter_of_trl_is_the_policy_that_peft_makes_of_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    done = task(settings, tmp_path, beta=0.1, trunk=0.0)
    training.train(done, "train_dpo")
    ids = torch.arange(3, 40)[None]
    plain = PeftModel.from_pretrained(
        hub.load_base(settings["model"], dtype=torch.float32), str(done.output)
    )
    with torch.no_grad():
        theirs = plain(input_ids=ids).logits
        ours = QAdapterModel.from_pretrained(done.output)(input_ids=ids).logits
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_anchors_of_trl_trainers_are_those_of_ours(family: str) -> None:
    model = tiny_adapter(family)
    # So that gemma2's soft cap at 30 does something to logits.
    model.peft_model.get_base_model().get_output_embeddings().weight.data *= 50
    found = [[5, 6, 7, 8, 9], [9, 8, 7], [11, 12, 13, 14, 15, 16, 17]]
    kl = training.anchor_kl(model.peft_model, found)
    states = []
    for row in found:
        states.append(model.kl_from_base(model.streams(torch.tensor([row])).at(0)))
    torch.testing.assert_close(kl, torch.cat(states).mean(), atol=1e-5, rtol=1e-4)
    kl.backward()
    assert any(
        p.grad is not None and p.grad.abs().max() > 0 for p in model.adapter_parameters().values()
    )


def test_anchored_training_drifts_less(settings: dict[str, Any], tmp_path: Path) -> None:
    drifts = {}
    for weight in (0.0, 100.0):
        directory = tmp_path / f"{weight:g}"
        directory.mkdir()
        done = task(settings, directory, beta=0.1, anchor_weight=weight, epochs=3)
        training.train(done, "train_dpo")
        policy = Policy.from_pretrained(done.output)
        drifts[weight] = policy.drift(read_texts(str(done.anchors))).kl
    assert drifts[100.0] < 0.7 * drifts[0.0]


# ── a whole run ─────────────────────────────────────────────────────────────────────────────────


def test_the_setting_with_least_kl_of_a_nat_within_one_standard_error_is_chosen() -> None:
    trials = [
        {"state": "complete", "params": {"a": 1}, "accuracy": 0.80, "kl_of_one_nat": 0.9},
        {"state": "complete", "params": {"a": 2}, "accuracy": 0.77, "kl_of_one_nat": 0.1},
        {"state": "complete", "params": {"a": 3}, "accuracy": 0.60, "kl_of_one_nat": 0.0},
        {"state": "failed", "params": {"a": 4}},
    ]

    def chosen(prompts: int, pairs: int) -> Any:
        right = [1.0] * round(0.8 * prompts) + [0.0] * round(0.2 * prompts)
        ci = share_interval(right * pairs, [*range(prompts)] * pairs)
        return search.one_standard_error([{**t, "accuracy_ci": ci} for t in trials])

    # One standard error of 0.80 is 0.04 on 100 prompts and 0.013 on 1000, whatever pairs they have.
    assert chosen(100, 1) == chosen(100, 10) == {"a": 2}
    assert chosen(1000, 1) == {"a": 1}
    assert search.one_standard_error(trials[3:]) is None


@given(st.floats(1e-8, 1.0), st.floats(0.02, 10.0), st.floats(1.0, 3.0))
def test_kl_of_one_nat_does_not_know_how_far_a_setting_is_turned_up(
    kl: float, margin: float, turned: float
) -> None:
    found = search.kl_of_one_nat(kl, margin)
    assert found == pytest.approx(kl / margin / margin)
    assert search.kl_of_one_nat(kl * turned**2, margin * turned) == pytest.approx(found)


@given(st.floats(0.0, 10.0), st.floats(0.0, 10.0), st.floats(-10.0, 0.0), st.floats(1e-3, 10.0))
def test_what_learned_nothing_or_the_contrary_is_never_cheaper(
    kl: float, other_kl: float, wrong: float, right: float
) -> None:
    assert search.kl_of_one_nat(kl, wrong) >= search.kl_of_one_nat(other_kl, right)
    assert search.kl_of_one_nat(kl, wrong) > search.kl_of_one_nat(1.0, 0.01)


def test_a_comparison_is_made_and_resumed_and_reported(
    settings: dict[str, Any],
    tmp_path: Path,
    in_process: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    judges = ["bradley-terry", "rule:contains:!"]
    settings["test"] = write_rows(tmp_path / "four.test.jsonl", of_four(8, start=1000))
    path = yaml_file(tmp_path / "run.yaml", settings | {"seeds": [0, 1], "judges": judges})
    assert main(["compare", path, "--vary", "flipped=0.5", "lora_r=2"]) == 0
    # dpo and qadapter: a search cell, which is also seed 0's, seed 1, and two variations.
    wanted = {"answers": 1, "anchors": 1, "train": 8, "measure": 1 + 2 * (1 + 2 + 2)}
    # Two judges of the base, and of two methods with two seeds each.
    wanted |= {"validate": 2, "judge": 2 * 5}
    assert Counter(in_process) == wanted
    said = capsys.readouterr().out
    assert "train dpo seed 0" in said
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["failures"] == []
    here = {"machine": found["machine"], "versions": found["versions"]}
    assert found["cells"] == [{"count": sum(wanted.values()), **here}]
    assert [r["seed"] for r in found["methods"]["dpo"]["runs"]] == [0, 1]
    point = found["methods"]["qadapter_half"]["runs"][0]["points"][-1]
    assert point["dial"] == 1.0
    assert len(point["correct"]) == len(point["margins"]) == 20
    assert point["accuracy"] == sum(point["correct"]) / 20
    assert point["ranking_accuracy"] == pytest.approx(sum(point["ranked"]) / 20)
    by_token = point["margins_per_token"]
    assert point["margin_per_token"] == pytest.approx(sum(by_token) / 20, abs=1e-6)
    assert point["correct_per_token"] == [1 if m > 0 else 0 for m in by_token]
    assert point["accuracy_per_token"] == sum(point["correct_per_token"]) / 20
    assert found["pair_prompts"] == [*range(8), *range(8), *range(4)]
    test = {"path": settings["test"], "pairs": 20, "prompts": 8, "within_max_length": 20}
    assert found["data"]["test"] == test
    assert "suite" not in found["data"]
    assert found["intervals"] == INTERVALS
    assert point["accuracy_ci"] == list(share_interval(point["correct"], found["pair_prompts"]))
    assert point["accuracy_ci"] != list(wilson_interval(sum(point["correct"]), 20))
    assert point["kl"] > 0
    for run in found["methods"]["qadapter_half"]["runs"]:
        half, whole = run["points"]
        assert half["answer_tokens"] == whole["answer_tokens"]
        assert len(half["answer_tokens"]) == len(half["answer_kl"]) == len(whole["answers"])
        assert 0 < half["kl_generations"] < whole["kl_generations"]
    never = {"beta": 0.0, "gamma": 1.0, "parameterization": "residual", "trunk": 0.5}
    assert found["methods"]["qadapter_half"]["fixed"] == never
    for row in found["robustness"]:
        assert row["variation"] in ("flipped=0.5", "lora_r=2")
        assert [p["dial"] for p in row["points"]] == [0.5, 1.0]
        assert row["points"][0]["window_tokens"] == point["window_tokens"]
        assert row["within_max_length"] == 8
    assert [row["method"] for row in found["robustness"]] == ["dpo", "qadapter_half"] * 2
    table = tables.robustness(Results(found))
    assert [row[:3] for row in table.rows[:2]] == [
        ["none", "DPO", "1"],
        ["none", "Q-Adapter, half the layers", "1"],
    ]
    assert len(table.rows) == 6
    # The rule is the pairs' own, so it tells chosen from rejected every time; what bytes a random
    # model makes of it is no matter.
    rates = {rate["judge"]: rate for rate in point["win_rates"]}
    assert rates["contains:!"]["judge_accuracy"] == 1.0
    assert len(rates) + len(point["judges_refused"]) == 2
    base = found["methods"]["base"]["runs"][0]["points"][0]
    assert base["kl"] == 0
    assert base["greedy_changed"] == 0
    assert (tmp_path / "out" / "report.html").is_file()

    in_process.clear()
    assert main(["compare", path, "--vary", "flipped=0.5", "lora_r=2"]) == 0
    assert in_process == []
    # Another method's cells are all that it adds.
    settings |= {"methods": [*settings["methods"], "sft"], "judges": judges}
    path = yaml_file(tmp_path / "run.yaml", settings)
    assert main(["compare", path]) == 0
    assert Counter(in_process) == {"train": 1, "measure": 2, "judge": 2}

    in_process.clear()
    settings |= {"seeds": [0, 1, 2], "headline": ["dpo"]}
    path = yaml_file(tmp_path / "run.yaml", settings)
    assert main(["compare", path, "--methods", "base", "dpo", "qadapter_half"]) == 0
    assert Counter(in_process) == {"train": 1, "measure": 1, "judge": 2}
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {n: len(m["runs"]) for n, m in found["methods"].items()} == {
        "base": 1,
        "dpo": 3,
        "qadapter_half": 1,
    }
    assert found["command"].endswith("run.yaml --methods base dpo qadapter_half")


def curve(*margins: float, seed: int = 0) -> dict[str, Any]:
    """Return a run whose dial goes 0, 1, 2 with these margins."""
    points = [
        {"dial": float(i), "margin": m, "kl": m * m, "tasks": {"t": {"items": [i]}}}
        for i, m in enumerate(margins)
    ]
    return {"seed": seed, "adapter": f"cells/{margins}", "points": points}


def equal_run(settings: dict[str, Any], tmp_path: Path, failing: str = "") -> Run:
    """Return a comparison whose suite cells tell their strength, or fail for one adapter."""

    def launched(directory: Path) -> int:
        spec = json.loads((directory / "spec.json").read_text())["spec"]
        if spec["adapter"] == failing:
            (directory / "log.txt").write_text("out of luck\n")
            return 1
        tasks = {"tasks": {"t": {"items": [spec["strength"]]}}}
        (directory / "result.json").write_text(json.dumps(tasks))
        return 0

    (tmp_path / "suite").mkdir(exist_ok=True)
    config = CompareConfig.read(
        yaml_file(tmp_path / "run.yaml", settings | {"suite": str(tmp_path / "suite")})
    )
    run = Run(config, tmp_path / "out", lambda _: None, 0, Fanout(launched), suite=("suite:t",))
    run.add_file("suite:t", tmp_path / "run.yaml")
    return run


def test_what_is_measured_at_the_margin_of_the_reference(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    twice = [curve(0, 2, 8), curve(0, 6, 8, seed=1)]
    methods = {
        "dpo": {"runs": [curve(0, 2, 3), curve(0, 2, 3, seed=1)]},
        "far": {"runs": twice},
        "own": {"runs": [curve(0, 2, 3)]},
        "short": {"runs": [curve(0, 0.5, 1)]},
        "beyond": {"runs": [curve(3, 4, 5)]},
        "failed": {"runs": []},
    }
    run = equal_run(settings, tmp_path, failing=twice[1]["adapter"])
    add_equal_learning(run, methods)
    there = {n: [r.get("at_reference") for r in told["runs"]] for n, told in methods.items()}
    # At the mean margin of both seeds, 4 at dial 1; and one cell failed.
    assert there["far"] == [{"dial": 0.5, "tasks": {"t": {"items": [0.5]}}}, None]
    assert there["own"] == [{"dial": 1.0, "tasks": {"t": {"items": [1]}}}]
    assert there["dpo"] == [None, None]
    assert there["short"] == there["beyond"] == [None]
    assert run.done == run.total == 2
    assert [f["cell"] for f in run.failures] == ["suite far seed 1 strength 0.5"]


def test_nobody_has_the_margin_of_what_learned_nothing(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    for margins in ((0.0, 0.0, 0.0), (0.0, -1.0, -2.0)):
        methods = {"dpo": {"runs": [curve(*margins)]}, "ours": {"runs": [curve(-3.0, 1.0, 2.0)]}}
        run = equal_run(settings, tmp_path)
        add_equal_learning(run, methods)
        assert "at_reference" not in methods["ours"]["runs"][0]
        assert run.total == 0


def test_a_suite_that_reads_no_file_here_is_measured(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """As of lm-eval's tasks alone, whose data come from the Hub."""
    run = equal_run(settings, tmp_path)
    run.suite, run.files = (), {}
    assert suite_at(run, "dpo seed 0", {"adapter": "out/dpo"}, 0.5) == {"t": {"items": [0.5]}}


@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_a_suite_s_answers_are_a_conversation_s_if_the_base_has_a_template(
    suite: Path, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    asked = {}

    def recorded(policy: Any, tasks: Any, *, apply_chat_template: bool, **_: Any) -> list[Any]:
        asked[tasks[0]["task"]] = apply_chat_template
        return []

    policy = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=template))
    monkeypatch.setattr("qadapter.evaluate.evaluate_tasks", recorded)
    limits = {"suite_limit": 3, "answers": 2, "answer_tokens": 4}
    spec = {"suite": [str(suite)], "strength": 1.0, "untrained": supply_sentences(), **limits}
    cells.WORK["suite"](SimpleNamespace(spec=spec, policy=lambda: policy))
    assert asked.pop("local_ifeval") is (template is not None)
    assert {*asked.values()} == {False}


@pytest.mark.usefixtures("one_index")
def test_the_suite_is_measured_at_the_margin_of_the_reference(
    settings: dict[str, Any], tmp_path: Path, suite: Path, in_process: list[str]
) -> None:
    """Of the greater margin the part that is the other's."""
    settings |= {"suite": str(suite), "suite_limit": 2, "answers": 2, "strengths": [0.0, 1.0, 2.0]}
    comparisons = []
    for reference in ("dpo", "qadapter_all_layers"):
        names = ["base", "dpo", "qadapter_all_layers"]
        changed = {"methods": names, "reference": reference, "pairs": 32, "trials": 0}
        assert main(["compare", yaml_file(tmp_path / "run.yaml", settings | changed)]) == 0
        comparisons.append(json.loads((tmp_path / "out" / "comparison.json").read_text()))
        # That IFEval's sentences are another model's than lm-eval's is told with the data.
        assert ("suite" in comparisons[-1]["data"]) is supply_sentences()
    run_of = {n: comparisons[0]["methods"][n]["runs"][0] for n in ("dpo", "qadapter_all_layers")}
    ones = {name: run["points"][1]["margin"] for name, run in run_of.items()}
    less, more = sorted(ones, key=lambda name: ones[name])
    assert 0 < ones[less] < 0.99 * ones[more]
    towards_less = next(c for c in comparisons if c["reference"] == less)["methods"]
    assert "at_reference" not in towards_less[less]["runs"][0]
    (run,) = towards_less[more]["runs"]
    there = run["at_reference"]
    # Straight from the base, whose margin is 0, to its own.
    assert there["dial"] == pytest.approx(ones[less] / ones[more], rel=0.01)
    assert 0 < there["dial"] < 1
    policy = Policy.from_pretrained(tmp_path / "out" / run["adapter"], dtype=torch.float32)
    asked = local_suite(suite, ["local_piqa", "local_perplexity"])
    for score in evaluate_tasks(policy, asked, strength=there["dial"], limit=2):
        found = there["tasks"][score.task]["items"]
        assert found == pytest.approx(list(score.items), abs=1e-4)
        if score.task == "local_perplexity":
            assert found != pytest.approx(run["points"][1]["tasks"][score.task]["items"], abs=1e-4)
    # Of the base and both methods as trained, and where a method is turned down.
    assert Counter(in_process)["suite"] == 3 + sum(
        "at_reference" in run
        for c in comparisons
        for method in c["methods"].values()
        for run in method["runs"]
    )


def test_a_retrained_curve_has_its_method_s_own_point_among_the_others(
    settings: dict[str, Any],
    tmp_path: Path,
    in_process: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Of a method that is not compared nothing is trained anew.
    retrain = ["dpo.beta=0.1,1.0", "sft.epochs=1,2"]
    del settings["prompts"]  # which Replay alone needs
    settings |= {"methods": ["base", "dpo"], "retrain": retrain, "headline": ["dpo", "sft"]}
    path = yaml_file(tmp_path / "run.yaml", settings)
    assert main(["compare", path]) == 0
    (*_, (done, total)) = re.findall(r"^\[(\d+)/(\d+)\] ", capsys.readouterr().out, flags=re.M)
    assert done == total  # nothing is waited for that is there already
    # The search's default β is 0.1: that point is there already.
    wanted = {"answers": 1, "train": 2, "measure": 1 + 2 + 1, "validate": 1, "judge": 2}
    assert Counter(in_process) == wanted
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    curve = comparison["methods"]["dpo.beta"]
    measured = sum(curve["runs"][0]["points"][0]["window_tokens"])
    assert 0 < measured < settings["text_tokens"]  # the text is shorter
    assert comparison["data"]["general_text"]["tokens"] == measured
    assert curve["own_dial"] == 0.1
    trained, other = curve["runs"][0]["points"]
    assert (trained["dial"], other["dial"]) == (0.1, 1.0)
    own = comparison["methods"]["dpo"]["runs"][0]["points"][-1]
    assert {**trained, "dial": 1.0} == own
    assert other["margins"] != trained["margins"]
    assert other["window_tokens"] == trained["window_tokens"]
    results = Results(comparison)
    assert results.methods["dpo.beta"].dials == (0.1, 1.0)
    # No method beside itself.
    assert results.others == []
    ours = json.loads(json.dumps(comparison))
    ours["methods"] = {
        f"qadapter{name.removeprefix('dpo')}": {**fields, "library": "qadapter"}
        for name, fields in ours["methods"].items()
        if name != "base"
    }
    assert Results({**ours, "reference": "qadapter"}).ours == []
    assert "DPO, beta retrained" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_not_the_base_at_strength_0_has_no_dial(
    settings: dict[str, Any],
    tmp_path: Path,
    in_process: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    methods = ["base", "dpo", "qadapter_half", "qadapter_raw", "qadapter_authors"]
    settings |= {"methods": methods, "strengths": [0.0, 1.0], "vary": ["alpha_0=0.3"]}
    assert main(["compare", yaml_file(tmp_path / "run.yaml", settings)]) == 0
    # DPO has no α0 to vary: no cells of that are waited for.
    (*_, (done, total)) = re.findall(r"^\[(\d+)/(\d+)\] ", capsys.readouterr().out, flags=re.M)
    assert done == total
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert comparison["failures"] == []
    found = comparison["methods"]
    for name in ("dpo", "qadapter_half"):
        start, own = found[name]["runs"][0]["points"]
        assert (start["dial"], own["dial"]) == (0.0, 1.0)
        assert start["kl"] < KL_FLOOR
    for name in ("qadapter_raw", "qadapter_authors"):
        (point,) = found[name]["runs"][0]["points"]
        assert point["dial"] == 1.0
        assert found[name]["dial"].startswith("none")
    row = next(r for r in comparison["robustness"] if r["method"] == "qadapter_half")
    (point,) = row["points"]
    assert point["dial"] == 1.0
    # And it is not: a dial from there would begin beside the base.
    adapter = tmp_path / "out" / row["adapter"]
    policy = Policy.from_pretrained(str(adapter), settings["model"])
    (start,) = measure.drift(policy, [Path(settings["text"]).read_text()], [0.0], max_tokens=300)
    assert start["kl"] > 100 * KL_FLOOR


@pytest.mark.usefixtures("failing_in_process")
@pytest.mark.parametrize("says", ["perhaps", None])
def test_a_judge_that_gives_no_verdict_is_told_and_one_that_is_down_asked_again(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    says: str | None,
) -> None:
    def asked(judge: OpenAIJudge, _: str) -> str:
        if says is None:
            raise UserError(f"{judge.url}: failed 5 times")
        return says

    monkeypatch.setattr(OpenAIJudge, "_ask", asked)
    judges = ["rule:contains:!", "openai:gpt@http://127.0.0.1:1/v1"]
    settings |= {"methods": ["base"], "reference": "base", "judges": judges}
    path = yaml_file(tmp_path / "run.yaml", settings)
    code, page = main(["compare", path]), (tmp_path / "out" / "report.html").read_text()
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (run,) = found["methods"]["base"]["runs"]
    # The other judge's verdict stands.
    assert [rate["judge"] for rate in run["points"][0]["win_rates"]] == ["contains:!"]
    if says is None:
        assert code == 2
        said = f"failed validate {judges[1]}: exit code 1: UserError: http"
        assert said in capsys.readouterr().err
        assert run["points"][0]["judges_refused"] == []
        assert len(list(tmp_path.glob("out/cells/judge-*/result.json"))) == 1
        return
    assert code == 0
    assert "Judge that gives no win rate" in page
    assert "gpt: no readable verdict on any of 40 pairs" in page


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    yield from endpoint_server(monkeypatch)


def test_a_judge_is_validated_once_and_told_what_the_preference_asks_for(
    settings: dict[str, Any], tmp_path: Path, in_process: list[str], endpoint: Endpoint
) -> None:
    """Every vote validated its endpoint anew: with 23 of them 2,300 calls instead of 100."""
    endpoint.says(lambda asked: "A" if "!" in asked.split("</reply_A>")[0] else "B")
    judges = ["rule:contains:!", f"openai:some-model@{endpoint.url}"]
    settings |= {"methods": ["base", "dpo"], "trials": 0, "judges": judges}
    config = CompareConfig.read(yaml_file(tmp_path / "run.yaml", settings))
    for criterion in ("loud words", "louder words"):
        in_process.clear()
        endpoint.requests.clear()
        told: list[Progress] = []
        path = compare(replace(config, judge_criterion=criterion), told.append, command="")
        found = json.loads(path.read_text())
        assert found["failures"] == []
        assert [(p.done, p.total) for p in told] == [(i, len(told)) for i in range(len(told))]
        # Two calls each: 40 validation pairs, and 4 answers of each method.
        assert len(endpoint.requests) == 2 * (40 + 2 * 4)
        for request in endpoint.requests:
            assert request["messages"][0]["content"].endswith(f"\nThe reader wants: {criterion}")
        for method in found["methods"].values():
            rates = {r["judge"]: r for r in method["runs"][0]["points"][-1]["win_rates"]}
            assert rates["some-model"]["judge_accuracy"] == 1.0
            assert rates["contains:!"]["judge_accuracy"] == 1.0
    # Who is not told the criterion does not vote anew.
    assert Counter(in_process) == {"validate": 1, "judge": 2}


@pytest.mark.usefixtures("failing_in_process")
def test_a_failed_cell_is_reported_and_the_rest_go_on(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("out of luck")

    sound = training.TRAINERS["train_dpo"]
    monkeypatch.setitem(training.TRAINERS, "train_dpo", broken)
    path = yaml_file(tmp_path / "run.yaml", settings)
    assert main(["compare", path]) == 2
    err = capsys.readouterr().err
    assert "failed train dpo trial 0: exit code 1: RuntimeError: out of luck" in err
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["methods"]["dpo"]["runs"] == []
    assert found["methods"]["dpo"]["search"]["trials"][0]["state"] == "failed"
    assert len(found["methods"]["qadapter_half"]["runs"]) == 1
    # Tried anew the next time.
    monkeypatch.setitem(training.TRAINERS, "train_dpo", sound)
    assert main(["compare", path]) == 0
    again = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert again["failures"] == []
    assert len(again["methods"]["dpo"]["runs"]) == 1


@pytest.mark.usefixtures("one_index")
@pytest.mark.parametrize("trials", [0, 1])
def test_what_the_base_cannot_write_is_missed_by_who_reads_it_and_a_suite_by_nobody(
    settings: dict[str, Any],
    tmp_path: Path,
    suite: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing_in_process: None,
    capsys: pytest.CaptureFixture[str],
    trials: int,
) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("out of luck")

    sound = dict(cells.WORK)
    for kind in ("anchors", "suite"):
        monkeypatch.setitem(cells.WORK, kind, broken)
    changed = {"suite": str(suite), "suite_limit": 1, "trials": 0, "judges": []}
    changed |= {"methods": ["base", "qadapter_half", "dpo"], "trials": trials}
    path = yaml_file(tmp_path / "run.yaml", settings | changed)
    assert main(["compare", path]) == 2
    said = capsys.readouterr()
    for cell in ("anchors base", "suite base", "suite dpo seed 0"):
        assert f"failed {cell}: exit code 1: RuntimeError: out of luck" in said.err
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(found["failures"]) == 3
    assert found["methods"]["qadapter_half"]["runs"] == []
    (run,) = found["methods"]["dpo"]["runs"]
    assert run["points"][-1]["tasks"] == {}
    assert run["points"][-1]["greedy_changed"] >= 0
    (*_, (done, total)) = re.findall(r"^\[(\d+)/(\d+)\] ", said.out, flags=re.M)
    assert done == total  # nothing is waited for that is not asked for
    # Tried anew the next time, and then nothing is missing.
    for kind in ("anchors", "suite"):
        monkeypatch.setitem(cells.WORK, kind, sound[kind])
    assert main(["compare", path]) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    for name in ("base", "dpo", "qadapter_half"):
        assert "local_piqa" in found["methods"][name]["runs"][0]["points"][-1]["tasks"]


def test_a_log_that_is_no_utf_8_is_a_failure_as_any(tmp_path: Path) -> None:
    def launched(directory: Path) -> int:
        (directory / "log.txt").write_bytes(b"caf\xe9 closed\n")
        return 1

    with pytest.raises(cells.CellFailed, match="exit code 1: caf\ufffd closed"):
        cells.Cell(tmp_path, "train", "x", {"files": {}}).run(launched)


def test_files_that_a_task_of_lm_evals_reads(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text("{}\n")
    a, b, c = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl"))

    def read(path: str = "json", **kwargs: Any) -> list[str]:
        fields = {"dataset_path": path, "dataset_kwargs": kwargs}
        return [*_local_files(SimpleNamespace(get_config=fields.get))]

    assert read(data_files=a) == [a]
    assert read(data_files=[b, a]) == [b, a]
    assert read(data_files={"train": a, "test": [b, c]}) == [a, b, c]
    assert read(data_files=str(tmp_path / "[bc].jsonl")) == [b, c]
    assert read(data_dir=str(tmp_path)) == read(str(tmp_path)) == [a, b, c]
    assert read("piqa", data_dir=str(tmp_path)) == []  # of the Hub's
    assert read("piqa", data_files={"test": "https://hub/x.jsonl"}) == []


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "_PACKAGES", ("torch", "no-such-package"))
    with pytest.raises(ConfigError, match=r"no-such-package is not installed.*qadapter\[compare"):
        origin.origin.__wrapped__()


class _Ray:
    """A cluster whose tasks last until they are cancelled."""

    def __init__(self) -> None:
        self.asked: list[Event] = []
        self.exceptions = SimpleNamespace(RayError=OSError)
        self.begun = Event()
        self.shut = False

    def cluster_resources(self) -> dict[str, float]:
        return {}

    def remote(self, **_: Any) -> Any:
        def asked(*_: Any) -> Event:
            self.asked.append(Event())
            return self.asked[-1]

        return lambda _: SimpleNamespace(remote=asked)

    def get(self, task: Event) -> int:
        self.begun.set()
        assert task.wait(60)
        raise OSError("cancelled")

    def cancel(self, task: Event, *, force: bool) -> None:
        assert force
        task.set()

    def shutdown(self) -> None:
        self.shut = True


def test_an_error_ends_what_ray_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods' threads went on with their next cells for hours, and were waited for."""
    ray = _Ray()
    monkeypatch.setattr(fanout, "_connected", lambda _: ray)
    failed = []

    def method(ways: Fanout) -> None:
        for number in range(5):
            try:
                ways.launch(tmp_path / str(number))
            except cells.CellFailed as error:
                failed.append(str(error))

    with pytest.raises(KeyboardInterrupt), fanout.fanout("local") as ways:  # noqa: PT012
        assert ways.pool is not None
        asking = ways.pool.submit(method, ways)
        assert ray.begun.wait(60)
        raise KeyboardInterrupt
    assert len(ray.asked) == 1
    assert failed == ["Ray: cancelled"]
    assert isinstance(asking.exception(0), fanout._EndedError)
    assert ray.shut


@pytest.mark.fleet
def test_on_ray_the_results_are_those_of_one_after_another(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray says to those it starts
    settings |= {"methods": ["base", "qadapter_half"], "reference": "qadapter_half"}
    path = yaml_file(tmp_path / "run.yaml", settings)
    assert main(["compare", path, "--ray", "local", "--output", str(tmp_path / "ray")]) == 0

    def here(directory: Path, *_: Any) -> int:
        cells.work(directory)
        return 0

    monkeypatch.setattr(cells, "_launch", here)
    assert main(["compare", path]) == 0
    found = [
        json.loads((tmp_path / name / "comparison.json").read_text())["methods"]
        for name in ("ray", "out")
    ]
    for methods in found:
        runs = methods["qadapter_half"]["runs"]
        assert len(runs) == 1
        for told in (*runs, *methods["qadapter_half"]["search"]["trials"]):
            del told["seconds"]
            told.pop("peak_gib", None)
    assert found[0] == found[1]


def test_a_result_of_another_format_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = cells.Cell(tmp_path, "measure", "x", {"files": {}})
    cell.run(lambda directory: (directory / "result.json").write_text("{}"))
    assert cell.result == {}
    monkeypatch.setattr(cells, "_FORMAT", cells._FORMAT + 1)
    assert cell.result is None


def test_a_cell_that_its_machine_does_not_see_has_failed(tmp_path: Path) -> None:
    assert fanout._launch_there(str(tmp_path / "nowhere"), str(tmp_path)) == cells.UNSEEN
    cell = cells.Cell(tmp_path, "train", "x", {"files": {}})
    with pytest.raises(cells.CellFailed, match="not on a file system that all nodes share"):
        cell.run(lambda _: cells.UNSEEN)


def test_a_cluster_that_is_not_there_is_told(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = yaml_file(tmp_path / "run.yaml", settings)
    assert main(["compare", path, "--ray", "127.0.0.1:1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--ray 127.0.0.1:1: cannot be reached" in line
    assert not (tmp_path / "out" / "cells").exists()


def test_an_endless_strength_is_refused() -> None:
    with pytest.raises(ConfigError, match="strengths: must rise from 0"):
        CompareConfig(
            train="a", test="b", text="c", prompts="d", output="e", strengths=(0.0, 1.0, math.inf)
        )


def test_a_suite_that_cannot_be_read_is_told_before_anything_runs(
    settings: dict[str, Any], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "suite"
    shutil.copytree(suite, broken)
    (broken / "piqa.jsonl").write_text("{}\n")
    path = yaml_file(tmp_path / "run.yaml", settings | {"suite": str(broken)})
    assert main(["compare", path]) == 2
    assert "piqa.jsonl:1: 'query' must be a text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("one_index")
def test_anchors_are_not_what_a_task_of_lm_evals_asks(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = "Which of the two bridges over the river was built by the monks?"
    (tmp_path / "asked.csv").write_text(f"ask,answer\n{ask},the older\n")
    say = {"task": "say", "dataset_path": "csv", "output_type": "generate_until"}
    say |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "asked.csv")}}}
    say |= {"test_split": "test", "doc_to_text": "ask", "doc_to_target": "answer"}
    say |= {"metric_list": [{"metric": "exact_match"}]}
    own = "".join(f"What no other text holds, number {i}.\n" for i in range(20))
    (tmp_path / "copy.txt").write_text(f"Q: {ask}\n{own}")
    settings |= {"anchors": str(tmp_path / "copy.txt")}
    settings |= {"suite": yaml_file(tmp_path / "say.yaml", say)}
    path = yaml_file(tmp_path / "run.yaml", settings)
    assert main(["compare", path]) == 2
    assert f"copy.txt shares text with say, as {ask[:60]!r}, where" in capsys.readouterr().err
    (tmp_path / "copy.txt").write_text(own)
    _told_early(CompareConfig.read(path))


@pytest.mark.usefixtures("one_index")
def test_a_suite_of_files_and_tasks_of_ones_own(
    settings: dict[str, Any],
    suite: Path,
    tmp_path: Path,
    in_process: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One file of the local suite, one of another name, and a task that lm-eval reads from YAML."""
    own = tmp_path / "text.jsonl"  # as the file of general text is named in the cells
    own.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' * 5)
    say = {"task": "say", "dataset_path": "json", "output_type": "generate_until"}
    say |= {"dataset_kwargs": {"data_files": {"test": str(own)}}, "test_split": "test"}
    say |= {
        "doc_to_text": "query",
        "doc_to_target": "x",
        "metric_list": [{"metric": "exact_match"}],
    }
    say |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 2}}
    asked = [str(suite / "piqa.jsonl"), str(own), yaml_file(tmp_path / "say.yaml", say)]
    changed = {"methods": ["base", "dpo"], "trials": 0, "suite": asked, "suite_limit": 3}
    changed |= {"answers": 2, "judges": []}
    path = yaml_file(tmp_path / "run.yaml", settings | changed)
    assert main(["compare", path]) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    for name in ("base", "dpo"):
        (run,) = found["methods"][name]["runs"]
        (point,) = (point for point in run["points"] if point["dial"] == 1.0)
        assert {k: v["n"] for k, v in point["tasks"].items()} == {
            "local_piqa": 3,
            "text": 3,
            "say": 2,
        }
    capsys.readouterr()
    in_process.clear()
    (tmp_path / "say.yaml").write_text(json.dumps(say | {"doc_to_text": "{{query}}?"}))
    assert main(["compare", path]) == 0
    assert Counter(in_process) == {"suite": 2}
    # What the task's file reads is watched, too: what it includes, and a function's file.
    # As lm-eval reads it: from where a link leads, and included at the top alone.
    functions = tmp_path / "real" / "functions"
    functions.mkdir(parents=True)
    say |= {"metadata": {"version": 1.0, "include": True}}
    (functions / "ask.py").write_text("def ask(doc):\n    return doc['query']\n")
    (tmp_path / "real" / "shared.yaml").write_text("doc_to_text: !function functions.ask.ask\n")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "shared.yaml").symlink_to(tmp_path / "real" / "shared.yaml")
    including = {k: v for k, v in say.items() if k != "doc_to_text"} | {
        "include": "../linked/shared.yaml"
    }
    (tmp_path / "say.yaml").unlink()
    (tmp_path / "say.yaml").symlink_to(yaml_file(tmp_path / "real" / "told.yaml", including))
    for change in ("\n", "# another\n"):
        for changed_file in (functions / "ask.py", tmp_path / "real" / "shared.yaml"):
            with changed_file.open("a") as file:
                file.write(change)
            in_process.clear()
            assert main(["compare", path]) == 0
            assert Counter(in_process) == {"suite": 2}
    with own.open("a") as file:  # read by both of the tasks
        file.write('{"query": "r", "choices": ["a", "b"], "gold": 0}\n')
    in_process.clear()
    assert main(["compare", path]) == 0
    assert Counter(in_process) == {"suite": 2}
    capsys.readouterr()
    for entry, message in (
        ("no_such_task", "lm-eval cannot run this"),
        (str(tmp_path / "nowhere"), "nowhere: is not a directory"),
        (str(tmp_path / "nowhere.jsonl"), "nowhere.jsonl"),
        (str(own), "suite: two tasks are named text"),
        (str(tmp_path / "say.yaml"), "suite: two tasks are named say"),
    ):
        first = [str(own), str(shutil.copy(own, tmp_path / "say.jsonl"))]
        path = yaml_file(tmp_path / "run.yaml", settings | {"suite": [*first, entry]})
        assert main(["compare", path]) == 2
        assert message in capsys.readouterr().err


def test_replay_learns_what_the_base_samples_to_its_end(
    settings: dict[str, Any], tmp_path: Path, in_process: list[str]
) -> None:
    """Not greedy answers, nor ones that were cut as if they ended there; asked for Replay alone."""
    changed = {"methods": ["base", "dpo"], "trials": 0, "judges": [], "max_length": 80}
    assert main(["compare", yaml_file(tmp_path / "run.yaml", settings | changed)]) == 0
    assert "replay" not in in_process
    in_process.clear()
    changed |= {"methods": ["base", "dpo", "replay"]}
    assert main(["compare", yaml_file(tmp_path / "run.yaml", settings | changed)]) == 0
    assert Counter(in_process) == {"replay": 1, "train": 1, "measure": 1}
    (file,) = (tmp_path / "out" / "cells").glob("replay-*/replay.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert Counter(row["kind"] for row in found) == {"general": 4, "training": 4}
    base = measure.load_policy(settings["model"], None)
    prompts = [row["prompt"] for row in found]
    greedy = measure.answers_of(base, prompts, strength=0.0, max_new_tokens=80)
    assert all(row["ids"] != ids for row, ids in zip(found, greedy, strict=True))
    ended = [row["ids"][-1] in base.end_ids for row in found]
    lengths = [len(tokenize_prompt(prompt, base.tokenizer)) for prompt in prompts]
    for row, end, before in zip(found, ended, lengths, strict=True):
        assert not base.end_ids & {*row["ids"][:-1]}
        assert before <= 60
        assert end or before + len(row["ids"]) == 80


@pytest.mark.usefixtures("one_index")
def test_an_adapter_that_was_trained_anew_is_measured_anew(
    settings: dict[str, Any], tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"methods": ["base", "dpo"], "trials": 0, "judges": ["rule:contains:!"]}
    path = yaml_file(tmp_path / "run.yaml", settings | changed)
    assert main(["compare", path]) == 0
    (cell,) = (tmp_path / "out" / "cells").glob("train-dpo-*")

    def again() -> list[str]:
        in_process.clear()
        (cell / "result.json").unlink()
        assert main(["compare", path]) == 0
        return list(in_process)

    assert again() == ["train"]  # the same to the last bit
    trained = cells.WORK["train"]

    def otherwise(work: Any) -> dict[str, Any]:
        work.spec["seed"] += 1
        return trained(work)

    monkeypatch.setitem(cells.WORK, "train", otherwise)
    assert again() == ["train", "measure", "judge"]


@pytest.mark.usefixtures("failing_in_process")
def test_a_training_that_sigterm_ended_is_done_anew(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = {"methods": ["base", "qadapter_half"], "reference": "qadapter_half", "judges": []}
    path = yaml_file(tmp_path / "run.yaml", settings | changed | {"trials": 0})
    loss = QAdapterTrainer.compute_loss

    def hit(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(QAdapterTrainer, "compute_loss", hit)
        assert main(["compare", path]) == 2
    assert "SIGTERM ended it after step 1" in capsys.readouterr().err
    assert main(["compare", path]) == 0


@pytest.mark.usefixtures("in_process")
def test_sentences_of_another_model_than_elsewhere_are_refused(suite: Path, base: str) -> None:
    policy = measure.load_policy(base, None)
    limits = {"suite_limit": 1, "answers": 1, "answer_tokens": 2}
    spec = {"suite": [str(suite)], "strength": 1.0, **limits, "untrained": supply_sentences()}
    work = SimpleNamespace(policy=lambda: policy, spec=spec)
    assert "local_ifeval" in cells.WORK["suite"](work)["tasks"]
    spec["untrained"] = not supply_sentences()
    with pytest.raises(DataError, match="punkt_tab is on one of the machines"):
        cells.WORK["suite"](work)


@pytest.mark.usefixtures("in_process")
def test_replay_learns_whole_rows_of_prompts_that_leave_room(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL would leave out, unasked, a row whose prompt fills `max_length`."""
    import trl

    given: list[list[int]] = []
    train = trl.SFTTrainer.train

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        given.extend([i for i in row["labels"] if i != -100] for row in self.train_dataset)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "train", recorded)
    short = ["Why?", "Where?"]
    Path(settings["prompts"]).write_text("\n".join(["Much too long for it " * 3, *short]))
    changed = {"methods": ["base", "dpo", "replay"], "trials": 0, "judges": [], "max_length": 80}
    assert main(["compare", yaml_file(tmp_path / "run.yaml", settings | changed)]) == 0
    (file,) = (tmp_path / "out" / "cells").glob("replay-*/replay.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    general = [row for row in found if row["kind"] == "general"]
    assert [row["prompt"][0]["content"] for row in general] == short
    pairs = json.loads((tmp_path / "out" / "comparison.json").read_text())["data"]["train"]
    assert len(given) == pairs["within_max_length"] + len(short)
    assert given[-len(short) :] == [row["ids"] for row in general]


def test_a_prompt_without_room_for_an_answer_is_passed_over(base: str) -> None:
    policy = measure.load_policy(base, None)
    prompts = ["Why " * 9, "Why?", "Where " * 9, "Who?", "What?"]

    def kept(room: int, most: int) -> list[Any]:
        return measure.with_room(policy, prompts, room, within=30, most=most, mend="ask less")

    tokens = [len(tokenize_prompt(prompt, policy.tokenizer)) for prompt in prompts]
    assert max(tokens[1], tokens[3]) < 20 < min(tokens[0], tokens[2])
    assert kept(10, 2) == ["Why?", "Who?"]
    assert kept(10, 9) == ["Why?", "Who?", "What?"]
    with pytest.raises(DataError, match="leaves 30 of 30 tokens for an answer; ask less"):
        kept(30, 2)


def test_two_comparisons_do_not_write_to_one_place(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(files, "_TRIES", 1)
    path = yaml_file(tmp_path / "run.yaml", settings)
    with files.alone_in(tmp_path / "out"):
        assert main(["compare", path]) == 2
        assert "another run writes to it" in capsys.readouterr().err
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("failing_in_process")
def test_data_that_change_under_a_cell_are_told(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, find = Path(settings["text"]), cells._launch

    def here(directory: Path, *more: Any) -> int:
        text.write_text("Another text.\n" * 20)
        return find(directory, *more)

    monkeypatch.setattr(cells, "_launch", here)
    path = yaml_file(tmp_path / "run.yaml", settings | {"methods": ["base", "dpo"], "trials": 0})
    assert main(["compare", path]) == 2
    failures = json.loads((tmp_path / "out" / "comparison.json").read_text())["failures"]
    assert {failure["cell"] for failure in failures} == {"measure base", "measure dpo seed 0"}
    for failure in failures:
        assert "text.txt: changed meanwhile; run the comparison again" in failure["error"]


def test_another_suite_or_another_base_makes_other_cells(
    settings: dict[str, Any], suite: Path, tmp_path: Path, in_process: list[str]
) -> None:
    other = tmp_path / "suite"
    shutil.copytree(suite, other)
    settings |= {"methods": ["base", "dpo"], "trials": 0, "suite": str(other), "suite_limit": 1}
    path = yaml_file(tmp_path / "run.yaml", settings)
    assert main(["compare", path]) == 0
    in_process.clear()
    with (other / "piqa.jsonl").open("a") as file:
        file.write('{"query": "Question: x", "choices": ["a", "b"], "gold": 0}\n')
    assert main(["compare", path]) == 0
    assert Counter(in_process) == {"suite": 2}
    in_process.clear()
    rebuilt = {"answers": 1, "train": 1, "measure": 2, "suite": 2, "validate": 1, "judge": 2}
    base = tmp_path / "base"
    shutil.copytree(settings["model"], base)  # with the times that it has there
    assert main(["compare", yaml_file(tmp_path / "run.yaml", settings | {"model": str(base)})]) == 0
    assert Counter(in_process) == rebuilt
    in_process.clear()
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    assert main(["compare", yaml_file(tmp_path / "run.yaml", settings | {"model": str(base)})]) == 0
    assert Counter(in_process) == rebuilt


def test_a_cell_ends_with_whoever_started_it(tmp_path: Path) -> None:
    cell, data = tmp_path / "out" / "cells" / "train-x", tmp_path / "data"
    cell.mkdir(parents=True)
    os.mkfifo(data)  # whose end the cell waits for
    spec = {"files": {"train": {"path": "../data", "sha256": "0"}}}
    (cell / "spec.json").write_text(json.dumps({"kind": "train", "spec": spec}))
    words = [sys.executable, "-c", _LAUNCH, str(cell)]
    with subprocess.Popen(words) as parent:
        try:
            for left in reversed(range(3000)):
                try:
                    pipe = os.open(data, os.O_WRONLY | os.O_NONBLOCK)
                    break
                except OSError:  # nobody reads it yet
                    assert left
                    assert parent.poll() is None
                    time.sleep(0.1)
        finally:
            parent.kill()

    def write_on() -> None:
        for _ in range(600):
            os.write(pipe, b"x")
            time.sleep(0.1)

    with pytest.raises(BrokenPipeError):
        write_on()
    os.close(pipe)
    assert not (cell / "result.json").exists()


def test_a_cell_imports_nothing_from_where_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('mine')\n")
    monkeypatch.chdir(tmp_path)
    cell = cells.Cell(tmp_path, "train", "x", {"files": {}, "model": "nothing here"})
    with pytest.raises(cells.CellFailed, match=r"exit code 1: KeyError"):
        cell.run(cells.launch)


@pytest.mark.parametrize(("visible", "told"), [(None, "0"), ("2,3", "2"), ("", "")])
def test_a_cell_sees_one_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, told: str
) -> None:
    seen = tmp_path / "seen"
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" > {seen}\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cells.launch(tmp_path) == 0
    assert seen.read_text() == f"{told}\n"


def test_a_cell_runs_in_a_process_of_its_own_and_tells_its_last_word(tmp_path: Path) -> None:
    cell = cells.Cell(tmp_path, "train", "x", {"files": {}, "model": "nothing here"})
    with pytest.raises(cells.CellFailed, match=r"exit code 1: KeyError"):
        cell.run(cells.launch)
    assert cell.result is None
