"""The comparison: search, seeds, robustness, and the JSON that the report is made of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from qadapter import hub
from qadapter.anchors import COUNT, MAX_TOKENS
from qadapter.compare.cells import Cell, CellFailed
from qadapter.compare.config import CompareConfig, retrained
from qadapter.compare.data import (
    DATA_VARIATIONS,
    Splits,
    part_of,
    prompts_of,
    split,
    varied,
    write_pairs,
)
from qadapter.compare.fanout import Fanout, fanout
from qadapter.compare.methods import METHODS, Choice, Method, Range
from qadapter.data import Pair, read_prompts, read_texts, tokenize_pairs
from qadapter.errors import ConfigError
from qadapter.files import check_writable, sha256, write_text
from qadapter.stats import INTERVALS, share_interval

_SEARCH_SEED = 0
_SEARCH_TEXT_TOKENS = 4000
_STARTUP = 4
"""Trials before TPE has enough to go by: the defaults, then random ones."""
_NOTHING_LEARNED = 1e6
"""Nats a token for a nat of margin: more than anything that learned."""
_SHARED = ("model", "max_length", "answer_tokens")
"""Settings that every cell depends on."""
_PACKAGES = ("qadapter", "torch", "transformers", "peft", "trl", "datasets", "lm_eval", "optuna")


@dataclass(frozen=True)
class Progress:
    """What the comparison tells while it runs."""

    done: int
    total: int
    label: str
    """The cell that begins now."""
    seconds_left: float | None
    """From the pace of the cells run so far; None before the first."""


@dataclass
class _Run:
    config: CompareConfig
    root: Path
    tell: Callable[[Progress], None]
    total: int
    fanout: Fanout
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Every file that cells read, with a digest, so that other data make other cells."""
    done: int = 0
    fresh: int = 0
    """Of those done, the ones that had no result before."""
    began: float = field(default_factory=time.perf_counter)
    failures: list[dict[str, str]] = field(default_factory=list)
    locks: defaultdict[Path, Lock] = field(default_factory=lambda: defaultdict(Lock))
    """One a cell: two askers of the same one get the same result."""

    def cell(self, kind: str, label: str, **spec: Any) -> dict[str, Any] | None:
        """Return a cell's result with its `directory`, or None if it failed."""
        files = {name: self.files[of] for name, of in spec.pop("files").items()}
        shared = {name: getattr(self.config, name) for name in _SHARED}
        cell = Cell(self.root, kind, label, {"files": files, **shared, **spec})
        with self.locks[cell.directory]:
            return self._run(cell)

    def _run(self, cell: Cell) -> dict[str, Any] | None:
        pace = (time.perf_counter() - self.began) / self.fresh if self.fresh else None
        left = None if pace is None else pace * (self.total - self.done)
        label = f"{cell.kind} {cell.label}"
        self.tell(Progress(self.done, self.total, label, left))
        fresh = cell.result is None
        try:
            return {**cell.run(self.fanout.launch), "directory": str(cell.directory)}
        except CellFailed as error:
            self.failures.append({"cell": label, "error": str(error)})
            return None
        finally:
            self.done += 1
            self.fresh += fresh

    def add_written(self, kind: str, **spec: Any) -> None:
        """Let cells read what the base writes in a cell of that kind.

        Raises:
            ConfigError: it fails; nothing could go on.
        """
        made = self.cell(kind, "base", **spec)
        if made is None:
            raise ConfigError(f"the base cannot write {kind}: {self.failures[-1]['error']}.")
        self.add_file(kind, Path(made["directory"]) / f"{kind}.jsonl")

    def add_file(self, name: str, path: Path) -> None:
        """Let cells read a file; those under the comparison's directory are told relative to it."""
        path = path.resolve()
        told = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        self.files[name] = {
            "path": str(told),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        }


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
    with fanout(ray) as ways:
        return _compare(config, tell, ways, command)


def _compare(
    config: CompareConfig, tell: Callable[[Progress], None], ways: Fanout, command: str
) -> Path:
    root = Path(config.output).resolve()
    parts = split(config)
    fit = _within_max_length(config, parts)
    general = {"text": config.text, "prompts": config.prompts}
    # Told before anything runs, and not hours later.
    part_of(read_texts(config.text), "report")
    read_prompts(config.prompts)
    if config.anchors:
        general["anchors"] = config.anchors
        read_texts(config.anchors)
        if sha256(config.anchors) == sha256(config.text):
            raise ConfigError(
                "anchors: is `text` too, where methods with anchors would look better than they "
                "are; give another text."
            )
    trained = [n for n in config.methods if METHODS[n].trainer]
    # Methods with anchors that are told no text are held to what the base writes.
    anchored = any(_has(METHODS[n], "anchor_weight") for n in trained)
    writes = anchored and not config.anchors
    varied_methods = [n for n in (config.reference, "qadapter") if n in trained]
    variations = [_variation(text, parts.train, varied_methods) for text in config.vary]
    curves = [retrained(text) for text in config.retrain]
    total = (
        1
        + int(writes)
        + 2 * sum(config.trials + len(config.seeds_of(name)) for name in trained)
        + int("base" in config.methods)
        + 2 * sum(len(config.seeds_of(n)) * len(values) for n, _, values in curves)
        + 2 * len(variations) * len(varied_methods)
    )
    run = _Run(config, root, tell, total, ways)
    for name, pairs in vars(parts).items():
        file = root / "data" / f"{name}.jsonl"
        write_pairs(file, pairs)
        run.add_file(name, file)
    for name, path in general.items():
        run.add_file(name, Path(path))
    names = ("prompts", "train", "test")
    run.add_written(
        "answers",
        files={name: name for name in names},
        replay_prompts=config.replay_prompts,
        answers=config.answers,
    )
    if writes:
        run.add_written("anchors", files={}, count=COUNT, seed=0, most=MAX_TOKENS)
    told = ways.map(lambda name: _method(run, name, METHODS[name]), config.methods)
    methods = dict(zip(config.methods, told, strict=True))
    rows = ways.map(
        lambda pair: _robust(run, pair[1], methods[pair[1]], pair[0]),
        [(variation, name) for variation in variations for name in varied_methods],
    )
    robustness = [row for row in rows if row]
    told = ways.map(lambda curve: _retrained(run, curve[0], methods[curve[0]], *curve[1:]), curves)
    for (name, parameter, _), curve in zip(curves, told, strict=True):
        methods[f"{name}.{parameter}"] = curve
    return _write(run, parts, fit, methods, robustness, command)


# ── one method ──────────────────────────────────────────────────────────────────────────────────


def _method(run: _Run, name: str, method: Method) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    told: dict[str, Any] = {
        "label": method.label,
        "library": method.library,
        "about": method.about,
        "dial": "the adapter's weight when decoding, without retraining",
        "search": None,
        "runs": runs,
    }
    if method.trainer is None:
        found = _points(run, name, None, strengths=(1.0,), split="test", whole=True)
        if found:
            runs.append({"seed": 0, "params": {}, "seconds": 0.0, "peak_gib": 0.0, **found})
        return told
    told["search"] = search = _search(run, name, method)
    if search["best"] is None:
        return told
    options: dict[str, Any] = {"strengths": run.config.strengths, "split": "test", "whole": True}

    def of(seed: int) -> dict[str, Any] | None:
        return _tried(run, name, search["best"], seed, f"{name} seed {seed}", **options)

    seeds = run.config.seeds_of(name)
    for seed, found in zip(seeds, run.fanout.map(of, seeds), strict=True):
        if found:
            runs.append({"seed": seed, "params": search["best"], **found})
    return told


def _retrained(
    run: _Run, name: str, told: Mapping[str, Any], parameter: str, values: Sequence[float]
) -> dict[str, Any]:
    """Return a method's curve along a parameter: its runs, and its chosen setting with others."""
    curve = {
        **told,
        "label": f"{told['label']}, {parameter} retrained",
        "dial": f"{parameter}, trained anew for each value",
        "search": None,
        "runs": [],
    }
    for chosen in told["runs"]:
        own, seed = float(chosen["params"][parameter]), chosen["seed"]
        points = {own: next(p for p in chosen["points"] if p["dial"] == 1.0)}
        for value in sorted({*values} - {own}):
            params = {**chosen["params"], parameter: value}
            label = f"{name} {parameter}={value:g} seed {seed}"
            if found := _tried(run, name, params, seed, label, split="test", long=True):
                points[value] = {**found["points"][0], "tasks": {}, "win_rates": []}
        curve["own_dial"] = own
        along = [{**points[value], "dial": value} for value in sorted(points)]
        curve["runs"].append({**chosen, "points": along})
    return curve


def _search(run: _Run, name: str, method: Method) -> dict[str, Any]:
    """Search the method's settings on the validation pairs, by Optuna's TPE.

    It begins with the method's defaults, each number of epochs in turn. Two aims, accuracy and a
    low `kl_of_one_nat`. Chosen is, of the settings whose accuracy is within one standard error of
    the best, the one with the least of it: a search for accuracy alone would pick among equals by
    noise, and so make any method's forgetting a matter of luck.
    """
    if run.config.trials == 0:
        return {"sampler": None, "space": {}, "trials": [], "best": dict(method.defaults)}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=_SEARCH_SEED, n_startup_trials=_STARTUP),
    )
    for epochs in getattr(method.space.get("epochs"), "values", (None,)):
        study.enqueue_trial({**method.defaults, **({"epochs": epochs} if epochs else {})})
    trials = []
    for i in range(run.config.trials):
        trial = study.ask({k: _distribution(v) for k, v in method.space.items()})
        params = {k: _rounded(v) for k, v in trial.params.items()}
        if found := _tried(run, name, params, _SEARCH_SEED, f"{name} trial {i}"):
            point = found["points"][0]
            figures = {k: point[k] for k in ("accuracy", "accuracy_ci", "kl", "margin")}
            figures["kl_of_one_nat"] = kl_of_one_nat(point["kl"], point["margin"])
            study.tell(trial, (point["accuracy"], figures["kl_of_one_nat"]))
            trials.append(
                {"params": params, "state": "complete", "seconds": found["seconds"], **figures}
            )
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            trials.append({"params": params, "state": "failed", "seconds": 0.0})
    return {
        "sampler": f"optuna TPESampler, the first {_STARTUP} trials without it",
        "space": {k: str(v) for k, v in method.space.items()},
        "trials": trials,
        "best": one_standard_error(trials),
    }


def kl_of_one_nat(kl: float, margin: float) -> float:
    """Return KL/margin², what a margin of one nat costs along the dial.

    To second order KL grows with the square of the adapter's weight where the margin grows with the
    weight, so the size that a setting happens to be trained to hardly matters to it. KL alone would
    choose the most timid settings, and a method would be judged by how far those can be turned up.
    What learned nothing, or the contrary, costs `_NOTHING_LEARNED`.
    """
    return min(kl / margin**2, _NOTHING_LEARNED) if margin > 0 else _NOTHING_LEARNED


def one_standard_error(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the settings with the least `kl_of_one_nat` within one SE of the best accuracy.

    The standard error is what the accuracy lies above its 95% interval's lower end, over 1.96.
    """
    done = [t for t in trials if t["state"] == "complete"]
    if not done:
        return None
    best = max(done, key=lambda t: t["accuracy"])
    mark = best["accuracy"] - (best["accuracy"] - best["accuracy_ci"][0]) / 1.96
    good = (t for t in done if t["accuracy"] >= mark)
    return dict(min(good, key=lambda t: t["kl_of_one_nat"])["params"])


def _distribution(space: Range | Choice) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(space, Range):
        return FloatDistribution(space.low, space.high, log=True)
    return CategoricalDistribution(space.values)


def _rounded(value: Any) -> Any:
    """Return a searched number in three digits, as the report shows it."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _tried(
    run: _Run,
    name: str,
    params: Mapping[str, Any],
    seed: int,
    label: str,
    *,
    train: str = "train",
    split: str = "validation",
    strengths: Sequence[float] = (1.0,),
    whole: bool = False,
    long: bool = False,
) -> dict[str, Any] | None:
    """Train a method and measure it; return its points and cost, or None if either cell failed.

    `whole` measures everything, `long` drift on as much text.
    """
    method = METHODS[name]
    params = {**method.fixed, **params}
    files = {"train": train}
    if params.get("anchor_weight"):
        files["anchors"] = "anchors"
    if "replay" in params:
        files["answers"] = "answers"
    trained = run.cell(
        "train",
        f"{name} seed {seed}",
        files=files,
        trainer=method.trainer,
        params=params,
        seed=seed,
        rl_prompts=run.config.rl_prompts,
        common_trunk=run.config.trunk,
    )
    if trained is None:
        return None
    adapter, options = trained["directory"], {"whole": whole, "long": whole or long}
    found = _points(run, label, adapter, strengths=strengths, split=split, **options)
    return found and {**{k: trained[k] for k in ("seconds", "peak_gib")}, **found}


def _points(
    run: _Run,
    label: str,
    trained: str | None,
    *,
    strengths: Sequence[float],
    split: str,
    whole: bool,
    long: bool = True,
) -> dict[str, Any] | None:
    config = run.config
    files = {"pairs": split, "text": "text"}
    more: dict[str, Any] = {
        "text_tokens": config.text_tokens if long else _SEARCH_TEXT_TOKENS,
        "text_part": "search" if split == "validation" else "report",
    }
    if whole:
        files |= {name: name for name in ("judge", "validation", "answers")}
        names = ("suite", "suite_limit", "answers", "judges")
        more |= {n: getattr(config, n) for n in names}
    found = run.cell(
        "measure",
        label,
        files=files,
        adapter=str(Path(trained, "adapter").relative_to(run.root)) if trained else None,
        strengths=list(strengths),
        whole=whole,
        **more,
    )
    if found is None:
        return None
    for point in found["points"]:
        point["accuracy_ci"] = share_interval(point["correct"], found["prompts"])
    return {name: found[name] for name in ("points", "length_baseline", "prompts")}


# ── robustness ──────────────────────────────────────────────────────────────────────────────────


_Variation = tuple[str, str, float, list[Any] | None]
"""Its text, name and value, and its pairs where it changes them."""


def _variation(text: str, train: Sequence[Any], methods: Sequence[str]) -> _Variation:
    name, _, value = text.partition("=")
    if name in DATA_VARIATIONS:
        return text, name, float(value), varied(train, name, float(value))
    if not any(_has(METHODS[method], name) for method in methods):
        raise ConfigError(
            f"vary: {name!r} is neither of {', '.join(DATA_VARIATIONS)} nor a parameter of "
            f"{' or '.join(methods)}."
        )
    return text, name, float(value), None


def _has(method: Method, parameter: str) -> bool:
    return parameter in {*method.fixed, *method.space, *method.knobs}


def _robust(
    run: _Run,
    name: str,
    told: Mapping[str, Any],
    variation: _Variation,
) -> dict[str, Any] | None:
    text, what, value, pairs = variation
    best = (told["search"] or {}).get("best")
    if best is None or (pairs is None and not _has(METHODS[name], what)):
        return None
    train, params = "train", dict(best)
    if pairs is None:
        params[what] = value
    else:
        train = f"train.{text.replace('=', '-')}"
        path = run.root / "data" / f"{train}.jsonl"
        write_pairs(path, pairs)
        run.add_file(train, path)
    seed = run.config.seeds[0]
    found = _tried(run, name, params, seed, f"{name} {text}", split="test", train=train)
    if not found:
        return None
    point = found["points"][0]
    figures = {k: point[k] for k in ("accuracy", "accuracy_ci", "kl", "margin")}
    return {"variation": text, "method": name, "seed": seed, **figures}


# ── the JSON ────────────────────────────────────────────────────────────────────────────────────


def _write(
    run: _Run,
    parts: Splits,
    fit: Mapping[str, int],
    methods: Mapping[str, Any],
    robustness: Sequence[Any],
    command: str,
) -> Path:
    config = run.config
    runs = [found for method in methods.values() for found in method["runs"]]
    # The same of every run, since all are measured on the same pairs.
    told = [(found.pop("length_baseline"), found.pop("prompts")) for found in runs]
    baseline, prompts = told[0] if told else (None, [])
    out = {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": {name: version(name) for name in _PACKAGES},
        "config": dataclasses.asdict(config),
        "data": {
            name: {
                "path": config.test if name == "test" else config.train,
                "pairs": len(pairs),
                "prompts": len(prompts_of(pairs)),
                "within_max_length": fit[name],
            }
            for name, pairs in vars(parts).items()
        }
        | {"general_text": {"path": config.text, "tokens": config.text_tokens}},
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


def _within_max_length(config: CompareConfig, parts: Splits) -> dict[str, int]:
    """Return how many pairs of each part fit; every method leaves the others out."""
    tokenizer = hub.load_tokenizer(config.model)
    settings = hub.load_generation_config(config.model)
    end_ids = hub.end_of_turn_ids(tokenizer, settings)

    def kept(pairs: Sequence[Pair]) -> int:
        most = config.max_length
        return len(tokenize_pairs(pairs, tokenizer, end_ids=end_ids, max_length=most)[0])

    return {name: kept(pairs) for name, pairs in vars(parts).items()}


def _machine() -> dict[str, str]:
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return {
        "cpus": str(os.cpu_count()),
        "processor": platform.processor() or platform.machine(),
        "device": str(device),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
