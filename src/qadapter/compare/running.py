"""A comparison as it runs: cells asked for by what they read, settings trained and measured."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from qadapter.compare.cells import Cell, CellFailed
from qadapter.compare.config import CompareConfig
from qadapter.compare.fanout import Fanout
from qadapter.compare.methods import METHODS, Params, starts_at_base
from qadapter.compare.origin import Origin
from qadapter.files import sha256
from qadapter.stats import share_interval

_SEARCH_TEXT_TOKENS = 4000
_SHARED = ("model", "max_length", "answer_tokens")
"""Settings that every cell depends on."""
_SUITE = ("suite", "suite_limit", "answers")
"""Settings that the capability suite depends on beside these."""
_ADAPTER = ("adapter", "weights")
"""What tells a trained adapter."""


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
class Run:
    """One comparison: where its cells lie, what they read, and how far it has come."""

    config: CompareConfig
    root: Path
    tell: Callable[[Progress], None]
    total: int
    fanout: Fanout
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Every file that cells read, with a digest, so that other data make other cells."""
    suite: tuple[str, ...] = ()
    """Names of those that the capability suite reads."""
    trunk: float = 0.0
    """Share of layers that stay common by default, from as many pairs as fit."""
    untrained: bool = False
    """Whether that suite's IFEval counts sentences by nltk's untrained model."""
    base: dict[str, str] = field(default_factory=dict)
    """Digests of a local base's files, so that another one in its place makes other cells."""
    done: int = 0
    fresh: int = 0
    """Of those done, the ones that had no result before."""
    began: float = field(default_factory=time.perf_counter)
    counting: Lock = field(default_factory=Lock)
    """Whoever counts holds it: methods may run side by side."""
    failures: list[dict[str, str]] = field(default_factory=list)
    origins: dict[Path, Origin] = field(default_factory=dict)
    """What made the result of each cell's directory, in this run or an earlier one."""
    locks: defaultdict[Path, Lock] = field(default_factory=lambda: defaultdict(Lock))
    """One a cell: two askers of the same one get the same result."""
    validations: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """What the validation of each judge found; None if it failed."""
    validating: defaultdict[str, Lock] = field(default_factory=lambda: defaultdict(Lock))
    """One a judge: it is validated once, whoever asks for its votes."""

    def cell(
        self, kind: str, label: str, *, asker: str | None = None, **spec: Any
    ) -> dict[str, Any] | None:
        """Return a cell's result with its `directory`, or None if it failed.

        `asker` says what it is for where several ask for the same; default its label.
        """
        files = {name: self.files[of] for name, of in spec.pop("files").items()}
        shared = {name: getattr(self.config, name) for name in _SHARED}
        if self.base:
            shared["base"] = self.base
        cell = Cell(self.root, kind, label, {"files": files, **shared, **spec})
        with self.locks[cell.directory]:
            return self._run(cell, f"{kind} {asker or label}")

    def _run(self, cell: Cell, label: str) -> dict[str, Any] | None:
        pace = (time.perf_counter() - self.began) / self.fresh if self.fresh else None
        left = None if pace is None else pace * (self.total - self.done)
        self.tell(Progress(self.done, self.total, label, left))
        fresh = cell.result is None
        try:
            found = cell.run(self.fanout.launch)
            self.origins[cell.directory] = found.get("made_by", {})
            return {**found, "directory": str(cell.directory)}
        except CellFailed as error:
            self.failures.append({"cell": label, "error": str(error)})
            return None
        finally:
            with self.counting:
                self.done += 1
                self.fresh += fresh

    def spare(self, cells: int) -> None:
        """Take so many off the total: they are not asked for after all."""
        with self.counting:
            self.total -= cells

    def made_by(self) -> list[dict[str, Any]]:
        """Return what made the results, most of them first, and how many each made."""
        counts = Counter(json.dumps(made, sort_keys=True) for made in self.origins.values())
        return [{"count": count, **json.loads(made)} for made, count in counts.most_common()]

    def add_written(self, kind: str, **spec: Any) -> None:
        """Let cells read what the base writes in a cell of that kind, unless that fails."""
        if made := self.cell(kind, "base", **spec):
            self.add_file(kind, Path(made["directory"]) / f"{kind}.jsonl")

    def add_file(self, name: str, path: Path) -> None:
        """Let cells read a file; those under the comparison's directory are told relative to it."""
        path = path.resolve()
        told = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        self.files[name] = {
            "path": str(told),
            "sha256": sha256(path)[:16],
        }


def tried(
    run: Run,
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
    """Train a method and measure it; return its points, its cost and where its adapter lies.

    None if either cell failed, or the base did not write what it reads. `whole` measures
    everything, `long` drift on as much text. Where strength 0 is not the base, strengths are no
    dial from it, and 1 alone is measured.
    """
    method = METHODS[name]
    params = {**fixed(run, name), **params}
    strengths = strengths if starts_at_base(params) else (1.0,)
    files = {"train": train}
    if params.get("anchor_weight"):
        files["anchors"] = "anchors"
    if "replay" in params:
        files["replay"] = "replay"
    if not {*files.values()} <= {*run.files}:
        run.spare(2 + whole * after_measuring(run.config))
        return None
    trained = run.cell(
        "train",
        f"{name} seed {seed}",
        asker=label,
        files=files,
        trainer=method.trainer,
        params=params,
        seed=seed,
        training=run.config.training,
    )
    if trained is None:
        run.spare(1 + whole * after_measuring(run.config))
        return None
    path = str(Path(trained["directory"], "adapter").relative_to(run.root))
    adapter = {"adapter": path, "weights": trained["weights"]}
    options = {"whole": whole, "long": whole or long}
    found = points(run, label, adapter, strengths=strengths, split=split, **options)
    cost = {k: trained[k] for k in ("seconds", "peak_gib")}
    return found and {**adapter, **cost, **found}


def fixed(run: Run, name: str) -> Params:
    """Return what a method never searches; which layers, too, where those are as by default.

    By the comparison's own pairs, so that a variation of them varies nothing else.
    """
    method = METHODS[name]
    return {**method.fixed, **({"trunk": run.trunk} if "trunk" in method.knobs else {})}


def after_measuring(config: CompareConfig) -> int:
    """Return how many cells follow a whole measurement: verdicts on its answers, and the suite."""
    return len(config.judges) + bool(config.suite)


def suite_at(run: Run, label: str, adapter: Mapping[str, Any], strength: float) -> dict[str, Any]:
    """Return the capability suite's scores of an adapter, or of the base, at a strength.

    By task; empty without a suite, or if the cell failed. `adapter` is as `points` takes it.
    """
    if not run.config.suite:
        return {}
    found = run.cell(
        "suite",
        label,
        files={name: name for name in run.suite},
        strength=strength,
        untrained=run.untrained,
        **{name: adapter.get(name) for name in _ADAPTER},
        **{n: getattr(run.config, n) for n in _SUITE},
    )
    tasks: dict[str, Any] = found["tasks"] if found else {}
    return tasks


def points(
    run: Run,
    label: str,
    adapter: Mapping[str, Any],
    *,
    strengths: Sequence[float],
    split: str,
    whole: bool,
    long: bool = True,
) -> dict[str, Any] | None:
    """Measure the base, or an adapter, on a split; None if the cell failed.

    `adapter` is where it lies, relative to the comparison, and a digest of its `weights`, so that
    one that was trained anew is measured anew; without them it is the base.
    """
    config = run.config
    files = {"pairs": split, "text": "text"}
    more: dict[str, Any] = {
        "text_tokens": config.text_tokens if long else _SEARCH_TEXT_TOKENS,
        "text_part": "search" if split == "validation" else "report",
    }
    if whole:
        files["answers"] = "answers"
        more["answers_at"] = list(strengths)
    found = run.cell(
        "measure",
        label,
        files=files,
        strengths=list(strengths),
        whole=whole,
        **{name: adapter.get(name) for name in _ADAPTER},
        **more,
    )
    if found is None:
        run.spare(whole * after_measuring(run.config))
        return None
    for point in found["points"]:
        point["accuracy_ci"] = share_interval(point["correct"], found["prompts"])
        if whole and point["dial"] == 1.0:
            point |= _judged(run, label, found["directory"])
            point["tasks"] = suite_at(run, label, adapter, 1.0)
    return {name: found[name] for name in ("points", "length_baseline", "prompts")}


def _judged(run: Run, label: str, measured: str) -> dict[str, list[Any]]:
    """Return what the judges say of the answers that a measurement made, but those that failed."""
    place = str(Path(measured).relative_to(run.root))
    told = [_verdict(run, label, place, judge) or {} for judge in run.config.judges]
    return {
        "win_rates": [found["win_rate"] for found in told if "win_rate" in found],
        "judges_refused": [found["refused"] for found in told if "refused" in found],
    }


def _verdict(run: Run, label: str, measured: str, judge: str) -> dict[str, Any] | None:
    """Return a judge's win rate, or why it gives none; None if its cell or validation failed."""
    found = _validated(run, judge)
    if found is None or "refused" in found:
        run.spare(1)
        return found
    files = {name: name for name in ("judge", "answers")}
    digest = sha256(run.root / measured / "result.json")[:16]
    more = {"measured": measured, "points": digest, "validation": found["validation"]}
    more |= _told(run, judge)
    return run.cell("judge", f"{label} by {judge}", files=files, **more)


def _validated(run: Run, judge: str) -> dict[str, Any] | None:
    """Return what a judge's validation found, which all its votes share; None if it failed."""
    with run.validating[judge]:
        if judge not in run.validations:
            files = {name: name for name in ("judge", "validation")}
            run.validations[judge] = run.cell("validate", judge, files=files, **_told(run, judge))
        return run.validations[judge]


def _told(run: Run, judge: str) -> dict[str, str | None]:
    """Return what makes a judge: its name, and for an endpoint what the preference asks for."""
    endpoint = judge.startswith("openai:")
    return {"judge": judge, **({"criterion": run.config.judge_criterion} if endpoint else {})}
