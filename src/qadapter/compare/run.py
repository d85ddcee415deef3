"""The comparison: each method searched and run over seeds, and the JSON of its report."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from glob import glob
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from qadapter import hub
from qadapter.anchors import COUNT, MAX_TOKENS
from qadapter.compare.config import CompareConfig, retrained
from qadapter.compare.data import Splits, part_of, prompts_of, split, write_pairs
from qadapter.compare.equal import add_equal_learning
from qadapter.compare.fanout import Fanout, fanout
from qadapter.compare.methods import METHODS, Method, starts_at_base
from qadapter.compare.origin import origin
from qadapter.compare.running import Progress, Run, after_measuring, fixed, points, tried
from qadapter.compare.search import searched, trials_of
from qadapter.compare.variations import read_variation, retrained_curve, robust
from qadapter.config import usual_trunk
from qadapter.data import (
    WINDOW,
    Pair,
    read_prompts,
    read_texts,
    text_windows,
)
from qadapter.data.tokens import kept_pairs
from qadapter.errors import ConfigError
from qadapter.evaluate import load_task, say_which_sentences
from qadapter.files import alone_in, check_writable, read_jsonl, sha256, write_text
from qadapter.stats import INTERVALS
from qadapter.suite import is_yaml, suite_tasks, untrained_sentences, yaml_files

_SENTENCE = 50
"""Characters of a line that two texts do not share by chance; an ideograph is three."""
_SHARED = 0.05
"""Part of a text, in such characters of its lines, that is not another's by chance."""
_LABEL = re.compile(r"^(?:<[^<>\s]{1,40}>\s*)*(?:[A-Za-z]+:\s+)?")
"""Of a line, tokens that begin a text, and who says it or what it is."""
_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
"""Of datasets' own: what they read `data_files` and `data_dir` say."""
_REPLAY_TOKENS = 256
"""Most tokens of an answer that Replay learns."""
_SENTENCES = {"sentences of IFEval": "one after every full stop (nltk's punkt_tab is missing)"}
"""Told of a suite with IFEval where they are another model's than lm-eval's."""


def compare(
    config: CompareConfig,
    tell: Callable[[Progress], None],
    *,
    command: str,
    ray: str | None = None,
) -> Path:
    """Run what is not done yet and write `comparison.json`; return its path.

    Args:
        tell: hears of every cell that begins; on Ray from several threads.
        command: that made the comparison, for the report.
        ray: address of a cluster to run cells on (see `fanout`); None runs them here.

    Raises:
        UserError: data or settings cannot be used, or Ray is not reached; nothing is run.
    """
    check_writable(config.output)
    origin()  # the code as it begins
    with alone_in(config.output), fanout(ray) as ways:
        return _compare(config, tell, ways, command)


def _compare(
    config: CompareConfig, tell: Callable[[Progress], None], ways: Fanout, command: str
) -> Path:
    parts = split(config)
    suite = _told_early(config)
    fitting = _fitting(config)
    kept = {name: fitting(pairs) for name, pairs in vars(parts).items() if name != "judge"}
    fit = {name: len(pairs) for name, pairs in kept.items()}
    trained = [n for n in config.methods if METHODS[n].trainer]
    ours = [n for n in trained if METHODS[n].library == "qadapter" and n != config.reference]
    varied_methods = [n for n in (config.reference, *ours[:1]) if n in trained]
    variations = [
        read_variation(text, parts, varied_methods, kept["train"]) for text in config.vary
    ]
    fit_varied = {text: len(fitting(pairs)) for text, *_, pairs in variations if pairs is not None}
    curves = [curve for curve in map(retrained, config.retrain) if curve[0] in config.methods]
    # Methods with anchors that are told no text are held to what the base writes.
    writes = not config.anchors and any(METHODS[n].has("anchor_weight") for n in trained)
    replays = any("replay" in METHODS[n].space for n in trained)
    total = _cells(config, trained, curves) + 2 * len(variations) * len(varied_methods)
    total += writes + replays
    untrained = bool(config.suite) and untrained_sentences()
    root, trunk = Path(config.output).resolve(), usual_trunk(fit["train"])
    run = Run(config, root, tell, total, ways, trunk=trunk, untrained=untrained)
    _add_files(run, parts, suite)
    # Cells of their own, so that whoever adds a method keeps what is done.
    if writes:
        run.add_written("anchors", files={}, count=COUNT, seed=0, most=MAX_TOKENS)
    if replays:
        read = {name: name for name in ("prompts", "train")}
        run.add_written("replay", files=read, prompts=config.replay_prompts, most=_REPLAY_TOKENS)
    told = ways.map(lambda name: _method(run, name, METHODS[name]), config.methods)
    methods = dict(zip(config.methods, told, strict=True))
    rows = ways.map(
        lambda pair: robust(run, pair[1], methods[pair[1]], pair[0]),
        [(varied, name) for varied in variations for name in varied_methods],
    )
    robustness = [
        {"within_max_length": fit_varied.get(row["variation"], fit["train"]), **row}
        for row in rows
        if row
    ]
    told = ways.map(
        lambda curve: retrained_curve(run, curve[0], methods[curve[0]], *curve[1:]), curves
    )
    add_equal_learning(run, methods)
    for (name, parameter, _), curve in zip(curves, told, strict=True):
        methods[f"{name}.{parameter}"] = curve
    return _write(run, parts, fit, methods, robustness, command)


def _told_early(config: CompareConfig) -> dict[str, str]:
    """Read what would else fail hours later; return the suite's files, each by a name.

    Raises:
        UserError: a file is not there or does not serve, or the base does not read as much.
    """
    text = read_texts(config.text)
    context = hub.load_context(config.model)
    hub.check_max_length(config.max_length, context)
    windows = text_windows(
        part_of(text, "report"),
        hub.load_tokenizer(config.model),
        window=min(WINDOW, context or WINDOW),
        max_tokens=config.text_tokens,
    )
    if len(windows) < 2:
        raise ConfigError(
            f"text: the half that is reported is one window of {len(windows[0])} tokens, which "
            "shows no spread; give more text, or raise text_tokens."
        )
    if config.prompts:
        read_prompts(config.prompts)
    tasks = suite_tasks(config.suite)
    files, loaded = _suite_files(tasks)
    if tasks:
        say_which_sentences()
    if config.anchors:
        held = _lines(read_texts(config.anchors))
        measured = {config.text: _lines(text)}
        measured |= {path: _lines(_task_texts(path)) for path in files.values()}
        measured |= {name: _lines(_asked(task)) for name, task in loaded.items()}
        for path, lines in measured.items():
            shared = held & lines
            longest = max(shared, key=_length, default="")
            least = min(sum(map(_length, held)), sum(map(_length, lines)))
            much = sum(map(_length, shared)) >= _SHARED * least
            if shared and (much or _length(longest) >= _SENTENCE):
                raise ConfigError(
                    f"anchors: {config.anchors} shares text with {path}, as {longest[:60]!r}, "
                    "where methods with anchors would look better than they are; give another."
                )
    return files


def _lines(texts: Iterable[str]) -> set[str]:
    """Return the different lines of texts that are not blank, without `<s>` or `Question:` before.

    By it one file may differ from another that has the same questions.
    """
    lines = {line.strip() for text in texts for line in text.splitlines()}
    return {_LABEL.sub("", line) for line in lines} - {""}


def _length(line: str) -> int:
    """Return how long a line is, by which seventeen ideographs are as long as fifty letters."""
    return sum(3 if east_asian_width(character) in "WF" else 1 for character in line)


def _task_texts(path: str) -> Iterator[str]:
    """Yield what a file of the suite has a policy read: a text's, or the fields of rows."""
    if path.endswith(".txt"):
        yield from read_texts(path)
    elif path.endswith(".jsonl"):
        for _, row in read_jsonl(path):
            yield from _row_texts(row)


def _row_texts(row: Any) -> Iterator[str]:
    """Yield the texts of a task's row, however deep they lie, and its fields together."""
    values = [*row.values()] if isinstance(row, dict) else row if isinstance(row, list) else []
    fields = [value for value in values if isinstance(value, str)]
    yield from (*fields, " ".join(fields))  # LAMBADA's passages are in two
    for value in values:
        if not isinstance(value, str):
            yield from _row_texts(value)


def _asked(task: Any) -> Iterator[str]:
    """Yield what a task of lm-eval's asks."""
    if task.has_test_docs() or task.has_validation_docs():
        for row in task.eval_docs:
            yield from _row_texts(row)


def _suite_files(
    tasks: Sequence[str | dict[str, Any]],
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return what a suite's tasks read here, and lm-eval's own ones by name.

    What lm-eval gets from the Hub is got now.

    Raises:
        ConfigError: lm-eval cannot load a task, or two are of one name.
    """
    files: dict[str, str] = {}
    everything: dict[str, Any] = {}
    names: list[str] = []
    for task in tasks:
        if isinstance(task, dict):
            names.append(task["task"])
            files[f"suite:{task['task']}"] = task["dataset_kwargs"]["data_files"]["test"]
            continue
        everything |= (loaded := load_task(task))
        # A group is scored as one, by its own name.
        names += [*loaded] if task in loaded or is_yaml(task) else [*loaded, task]
        for name, one in loaded.items():
            files |= {f"suite:{name}:{path}": path for path in _local_files(one)}
        if is_yaml(task):
            files |= {f"suite:{path}": str(path) for path in yaml_files(task)}
    if again := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ConfigError(f"suite: two tasks are named {again}; leave one out, or rename it.")
    return files, everything


def _local_files(task: Any) -> Iterator[str]:
    """Yield the files here that a task of lm-eval's reads."""
    kwargs = task.get_config("dataset_kwargs") or {}
    data = kwargs.get("data_files") or ()
    named = [*data.values()] if isinstance(data, dict) else [data]
    flat = [path for one in named for path in (one if isinstance(one, list | tuple) else [one])]
    path = task.get_config("dataset_path")
    here = bool(path) and path not in _BUILDERS and Path(path).is_dir()
    places = [path] if here else [kwargs.get("data_dir")] if path in _BUILDERS else []
    for place in (*flat, *places):
        for found in sorted(glob(place, recursive=True)) if isinstance(place, str) else ():
            inside = sorted(Path(found).rglob("*")) if Path(found).is_dir() else [Path(found)]
            yield from (str(path) for path in inside if path.is_file())


def _cells(
    config: CompareConfig,
    trained: Sequence[str],
    curves: Sequence[tuple[str, str, Sequence[float]]],
) -> int:
    """Return how many cells methods, curves, judges' validations and the base's answers are."""
    whole = 1 + after_measuring(config)
    return (
        1
        + len(config.judges)
        + 2 * sum(trials_of(config, name, METHODS[name]) for name in trained)
        + sum((1 + whole) * len(config.seeds_of(name)) for name in trained)
        + whole * int("base" in config.methods)
        + 2 * sum(len(config.seeds_of(n)) * len(values) for n, _, values in curves)
    )


def _add_files(run: Run, parts: Splits, suite: Mapping[str, str]) -> None:
    """Let cells read pairs, texts, the suite, and the base's answers."""
    config = run.config
    for name, pairs in vars(parts).items():
        file = run.root / "data" / f"{name}.jsonl"
        write_pairs(file, pairs)
        run.add_file(name, file)
    given = {"text": config.text, "prompts": config.prompts, "anchors": config.anchors, **suite}
    for name, path in given.items():
        if path:
            run.add_file(name, Path(path))
    run.suite = tuple(suite)
    run.base = _digests(config.model)
    run.add_written("answers", files={"test": "test"}, answers=config.answers)
    if "answers" not in run.files:
        raise ConfigError(f"the base cannot answer: {run.failures[-1]['error']}.")


def _method(run: Run, name: str, method: Method) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    told: dict[str, Any] = {
        "label": method.label,
        "library": method.library,
        "about": method.about,
        "fixed": fixed(run, name),
        "dial": "the adapter's weight when decoding, without retraining",
        "search": None,
        "runs": runs,
    }
    if method.trainer is None:
        found = points(run, name, {}, strengths=(1.0,), split="test", whole=True)
        if found:
            runs.append({"seed": 0, "params": {}, "seconds": 0.0, "peak_gib": 0.0, **found})
        return told
    told["search"] = search = searched(run, name, method)
    seeds = run.config.seeds_of(name)
    if search["best"] is None:
        run.spare(len(seeds) * (2 + after_measuring(run.config)))
        return told
    if not starts_at_base({**told["fixed"], **search["best"]}):
        told["dial"] = "none: its strength 0 is not the base, for α0 is not α̃"
    options: dict[str, Any] = {"strengths": run.config.strengths, "split": "test", "whole": True}

    def of(seed: int) -> dict[str, Any] | None:
        return tried(run, name, search["best"], seed, f"{name} seed {seed}", **options)

    for seed, found in zip(seeds, run.fanout.map(of, seeds), strict=True):
        if found:
            runs.append({"seed": seed, "params": search["best"], **found})
    return told


# ── the JSON ──────────────────────────────────────────────────────────────────────────────────────


def _write(
    run: Run,
    parts: Splits,
    fit: Mapping[str, int],
    methods: Mapping[str, Any],
    robustness: Sequence[dict[str, Any]],
    command: str,
) -> Path:
    config = run.config
    runs = [found for method in methods.values() for found in method["runs"]]
    runs += robustness
    tested = [config.test, *[config.train] * bool(config.held_out_pairs)]
    # The same of every run, since all are measured on the same pairs.
    told = [(found.pop("length_baseline"), found.pop("prompts")) for found in runs]
    baseline, prompts = told[0] if told else (None, [])
    measured = (sum(run["points"][0]["window_tokens"]) for run in runs)
    out = {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **origin(),
        "cells": run.made_by(),
        "config": dataclasses.asdict(config),
        "data": {
            name: {
                "path": ", ".join(tested) if name == "test" else config.train,
                "pairs": len(pairs),
                "prompts": len(prompts_of(pairs)),
                **({"within_max_length": fit[name]} if name in fit else {}),
            }
            for name, pairs in vars(parts).items()
        }
        | {"general_text": {"path": config.text, "tokens": next(measured, 0)}}
        | ({"suite": _SENTENCES} if run.untrained else {}),
        "intervals": INTERVALS,
        "pair_prompts": prompts,
        "length_baseline": baseline,
        "reference": config.reference,
        "methods": methods,
        "failures": sorted(run.failures, key=lambda failure: failure["cell"]),
        "robustness": robustness,
    }
    path = run.root / "comparison.json"
    write_text(path, json.dumps(out, indent=1, allow_nan=False) + "\n")
    return path


def _fitting(config: CompareConfig) -> Callable[[Sequence[Pair]], list[Pair]]:
    """Return what says which of pairs fit into `max_length`; methods leave the others out."""
    tokenizer = hub.load_tokenizer(config.model)
    settings = hub.load_generation_config(config.model)
    end_ids = hub.end_of_turn_ids(tokenizer, settings)

    def fitting(pairs: Sequence[Pair]) -> list[Pair]:
        most = config.max_length
        kept = kept_pairs(pairs, tokenizer, {}, end_ids=end_ids, max_length=most)
        return [pair for pair, _ in kept]

    return fitting


def _digests(model: str) -> dict[str, str]:
    """Return digests of a local base's files, by name; of others the name says what they are."""
    files = sorted(f for f in Path(model).glob("[!.]*") if f.is_file() and f.suffix != ".md")
    return {file.name: sha256(file)[:16] for file in files}
