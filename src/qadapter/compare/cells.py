"""Cells: one training or one measurement, each in a process of its own, kept on disk by its spec.

A cell's directory holds `spec.json`, what it wrote, and at its end `result.json`; a cell with a
result is not run again. One that fails leaves `log.txt` and is tried anew the next time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from qadapter.compare.origin import origin
from qadapter.errors import DataError
from qadapter.files import read_jsonl, sha256, write_jsonl, write_text
from qadapter.stats import numbered

UNSEEN = -1000
"""Exit code of a cell whose directory is not there on the machine that was to run it."""

_FORMAT = 8
"""Of what results hold; another number makes other cells, so that none of an older one is read."""
_ASKED = 50
"""Held-out pairs that an endpoint is validated on: each is two calls."""


class CellFailed(Exception):
    """A cell that ended without a result; the message is its last word."""


@dataclass(frozen=True)
class Cell:
    """One piece of work, told by its spec."""

    root: Path
    kind: str
    """A function of `WORK`."""
    label: str
    """For people: method, seed."""
    spec: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        """Where it lives: the same for the same spec, whatever asks for it."""
        text = json.dumps([self.kind, _FORMAT, self.spec], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:10]
        label = re.sub(r"[^\w.=+-]", "-", self.label)[:80]  # a judge's has an address
        return self.root / "cells" / f"{self.kind}-{label}-{name}"

    @property
    def result(self) -> dict[str, Any] | None:
        """What it found, or None if it has not been run to its end."""
        try:
            text = (self.directory / "result.json").read_text(encoding="utf-8")
            return cast(dict[str, Any], json.loads(text))
        except (OSError, ValueError):
            return None

    def run(self, launch: Callable[[Path], int]) -> dict[str, Any]:
        """Return its result, computed in a process of its own unless it is there already.

        Args:
            launch: as the function of that name, which runs it here.

        Raises:
            CellFailed: the process ended without a result.
        """
        if (found := self.result) is not None:
            return found
        self.directory.mkdir(parents=True, exist_ok=True)
        spec = {"kind": self.kind, "label": self.label, "spec": self.spec}
        write_text(self.directory / "spec.json", json.dumps(spec, indent=1) + "\n")
        code = launch(self.directory)
        if (found := self.result) is None:
            if code == UNSEEN:
                raise CellFailed(f"{self.directory} is not on a file system that all nodes share")
            log = self.directory / "log.txt"
            said = [
                line
                for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
                if line.strip()
            ]
            raise CellFailed(f"exit code {code}: {said[-1] if said else 'no output'} (see {log})")
        return found


def launch(directory: Path, *, cwd: str | None = None) -> int:
    """Run a cell in a process of its own, which speaks into `log.txt`; return its exit code."""
    with (directory / "log.txt").open("w", encoding="utf-8") as log:
        return _launch(directory, log, cwd)


def _launch(directory: Path, log: TextIO, cwd: str | None) -> int:
    # Nothing is imported from the working directory, where a file may be named as a library is.
    words = [sys.executable, "-P", "-m", "qadapter.compare", str(directory)]
    # The pipe ends with this process, however that ends, and with the pipe the cell.
    pipe, env = subprocess.PIPE, _on_one_gpu()
    with subprocess.Popen(words, stdin=pipe, stdout=log, stderr=log, cwd=cwd, env=env) as process:
        return process.wait()


def _on_one_gpu() -> dict[str, str]:
    """Return the environment with the first GPU alone in sight.

    Given several, transformers' trainer would split each batch between them (`DataParallel`).
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return {**os.environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[0]}


# ── the work, in the cell's own process ─────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Work:
    """A cell as its own process sees it."""

    spec: dict[str, Any]
    directory: Path

    @property
    def root(self) -> Path:
        """The comparison's directory, to which its own paths in the spec are relative."""
        return self.directory.parent.parent

    def file(self, name: str) -> str:
        """Return the path of a file that the spec names."""
        return str(self.root / self.spec["files"][name]["path"])

    def answers(self) -> tuple[list[Any], list[str]]:
        """Return test prompts and the base's answers to them."""
        rows = [cast(dict[str, Any], row) for _, row in read_jsonl(self.file("answers"))]
        return [row["prompt"] for row in rows], [row["answer"] for row in rows]

    def policy(self) -> Any:
        """Return the policy of the adapter, or of an untrained one: the base."""
        from qadapter.compare.measure import load_policy

        adapter = self.spec.get("adapter")
        return load_policy(self.spec["model"], self.root / adapter if adapter else None)


def _answers(work: _Work) -> dict[str, Any]:
    """Write the base's greedy answers to test prompts."""
    from qadapter.compare.data import prompts_of
    from qadapter.compare.measure import answers_of, with_room
    from qadapter.data import read_pairs

    spec, policy = work.spec, work.policy()
    room, there = spec["answer_tokens"], prompts_of(read_pairs(work.file("test")))
    mend = "lower answer_tokens, or give other pairs as test"
    most = spec["answers"]
    prompts = with_room(policy, there, room, within=policy.context, most=most, mend=mend)
    made = answers_of(policy, prompts, strength=0.0, max_new_tokens=room)
    rows = zip(prompts, policy.texts(made), strict=True)
    write_jsonl(
        work.directory / "answers.jsonl", ({"prompt": p, "answer": answer} for p, answer in rows)
    )
    return {"answers": len(prompts)}


def _replay(work: _Work) -> dict[str, Any]:
    """Write what the base samples to general and training prompts, in tokens.

    What Replay learns is to be what the base says; greedy answers are sharper than it is. A prompt
    and its answer are a row of training, of at most `max_length` tokens, of which an answer has
    room for a quarter at least.
    """
    from transformers import set_seed

    from qadapter.compare.data import prompts_of
    from qadapter.compare.measure import answers_of, with_room
    from qadapter.data import read_pairs, read_prompts, tokenize_prompt

    spec, policy, rows = work.spec, work.policy(), []
    asked = {
        "general": read_prompts(work.file("prompts")),
        "training": prompts_of(read_pairs(work.file("train"))),
    }
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    length, count = spec["max_length"], spec["prompts"]
    most, quarter = min(spec["most"], length), math.ceil(length / 4)
    mend = "raise max_length, or give shorter prompts"
    set_seed(0)
    for kind, there in asked.items():
        prompts = with_room(policy, there, quarter, within=length, most=count, mend=mend)
        made = answers_of(policy, prompts, strength=0.0, max_new_tokens=most, **sampled)
        for prompt, ids in zip(prompts, made, strict=True):
            room = length - len(tokenize_prompt(prompt, policy.tokenizer))
            rows.append({"kind": kind, "prompt": prompt, "ids": ids[:room]})
    write_jsonl(work.directory / "replay.jsonl", rows)
    return {kind: sum(row["kind"] == kind for row in rows) for kind in asked}


def _anchors(work: _Work) -> dict[str, Any]:
    """Write general text that the base samples."""
    import torch

    from qadapter import hub
    from qadapter.anchors import free_texts

    name = work.spec["model"]
    base = hub.load_base(name, dtype=torch.float32, device=hub.pick_device())
    texts = free_texts(base, hub.load_tokenizer(name), work.spec["count"], seed=work.spec["seed"])
    write_jsonl(work.directory / "anchors.jsonl", ({"text": text} for text in texts))
    return {"texts": work.spec["count"]}


def _train(work: _Work) -> dict[str, Any]:
    """Train one method into the cell's directory `adapter`."""
    from qadapter.compare.train import Task, train
    from qadapter.estimate import peak_memory

    spec = work.spec
    names = ("params", "seed", "model", "max_length", "answer_tokens", "training")
    task = Task(
        **{name: spec[name] for name in names},
        pairs=Path(work.file("train")),
        replay=Path(work.file("replay")) if "replay" in spec["files"] else None,
        anchors=Path(work.file("anchors")) if "anchors" in spec["files"] else None,
        output=work.directory / "adapter",
    )
    shutil.rmtree(task.output, ignore_errors=True)  # what a training left that was ended
    start = time.perf_counter()
    train(task, spec["trainer"])
    seconds = time.perf_counter() - start
    weights = sha256(task.output / "adapter_model.safetensors")[:16]
    return {"seconds": seconds, "peak_gib": peak_memory(), "weights": weights}


def _measure(work: _Work) -> dict[str, Any]:
    """Measure an adapter, or the base, on a split: a point for each strength."""
    from qadapter.compare import measure
    from qadapter.compare.data import part_of
    from qadapter.data import read_pairs, read_texts, tokenize_pairs

    spec, policy = work.spec, work.policy()
    strengths = [float(s) for s in spec["strengths"]]
    pairs, _ = tokenize_pairs(
        read_pairs(work.file("pairs")),
        policy.tokenizer,
        end_ids=policy.end_ids,
        max_length=spec["max_length"],
    )
    points = measure.preference(policy, pairs, strengths)
    texts = part_of(read_texts(work.file("text")), spec["text_part"])
    drifts = measure.drift(policy, texts, strengths, max_tokens=spec["text_tokens"])
    for point, far, strength in zip(points, drifts, strengths, strict=True):
        point |= {**far, "dial": strength}
    if spec["whole"]:
        found = measure.on_answers(policy, *work.answers(), spec["answers_at"])
        for on_answers, strength in zip(found, spec["answers_at"], strict=True):
            points[strengths.index(strength)] |= on_answers
        points[strengths.index(1.0)] |= _answered(work, policy)
    return {
        "points": points,
        "length_baseline": measure.length_baseline(pairs),
        "prompts": numbered(tuple(pair.prompt_ids) for pair in pairs),
    }


def _answered(work: _Work, policy: Any) -> dict[str, Any]:
    """Return what the policy's own answers at strength 1 show."""
    from qadapter.compare import measure

    prompts, base = work.answers()
    ids = measure.answers_of(
        policy, prompts, strength=1.0, max_new_tokens=work.spec["answer_tokens"]
    )
    made = policy.texts(ids)
    changed = sum(a != b for a, b in zip(made, base, strict=True))
    return {
        "answers": made,
        "greedy_changed": changed / len(made),
    }


def _fitted_judge(work: _Work) -> Any:
    """Return the judge that the spec names, fitted if it learns: the same each time."""
    from qadapter.data import read_pairs
    from qadapter.judge import BradleyTerryJudge, named_judge

    judge = named_judge(work.spec["judge"], work.spec.get("criterion"))
    if isinstance(judge, BradleyTerryJudge):
        judge.fit(list(read_pairs(work.file("judge"))))
    return judge


def _validate(work: _Work) -> dict[str, Any]:
    """Return how well a judge tells chosen from rejected, or why it cannot be told."""
    from qadapter.data import read_pairs
    from qadapter.judge import NoVoteError, OpenAIJudge

    judge, held_out = _fitted_judge(work), list(read_pairs(work.file("validation")))
    if isinstance(judge, OpenAIJudge):
        held_out = held_out[:_ASKED]
    try:
        return {"validation": dataclasses.asdict(judge.validate(held_out))}
    except NoVoteError as error:
        return {"refused": str(error)}


def _judge(work: _Work) -> dict[str, Any]:
    """Return the win rate by a judge that was validated, or why it may not vote.

    Answers are those of a measurement, which a judge that cannot be reached leaves as it is.
    """
    from qadapter.judge import NoVoteError, Validation

    measured = work.root / work.spec["measured"] / "result.json"
    points = json.loads(measured.read_text(encoding="utf-8"))["points"]
    made = next(point["answers"] for point in points if point["dial"] == 1.0)
    prompts, base = work.answers()
    judge = _fitted_judge(work)
    judge.validation = Validation(**work.spec["validation"])
    try:
        return {"win_rate": dataclasses.asdict(judge.win_rate(prompts, made, base))}
    except NoVoteError as error:
        return {"refused": str(error)}


def _suite(work: _Work) -> dict[str, Any]:
    """Measure the capability suite at one strength.

    Tasks of log-likelihood as lm-eval asks them, without a template; those that generate as
    conversations, if the base has a template for them, as many as the answers made for the win
    rate, and on files twice as long.

    Raises:
        DataError: IFEval's sentences here are another model's than where the comparison began.
    """
    from qadapter.evaluate import evaluate_tasks, load_task
    from qadapter.suite import suite_tasks, untrained_sentences

    spec, policy, scores = work.spec, work.policy(), []
    for task in suite_tasks(spec["suite"]):
        if isinstance(task, str):
            made = any(t.OUTPUT_TYPE == "generate_until" for t in load_task(task).values())
        elif made := task["output_type"] == "generate_until":
            limits = {**task["generation_kwargs"], "max_gen_toks": 2 * spec["answer_tokens"]}
            task = {**task, "generation_kwargs": limits}
        limit = spec["answers"] if made else spec["suite_limit"]
        chat = made and bool(policy.tokenizer.chat_template)
        scores += evaluate_tasks(
            policy, [task], strength=spec["strength"], limit=limit, apply_chat_template=chat
        )
    if untrained_sentences() is not spec["untrained"]:
        raise DataError("nltk's punkt_tab is on one of the machines and not on another.")
    return {"tasks": {score.task: dataclasses.asdict(score) for score in scores}}


WORK = {
    "answers": _answers,
    "replay": _replay,
    "anchors": _anchors,
    "train": _train,
    "measure": _measure,
    "validate": _validate,
    "judge": _judge,
    "suite": _suite,
}


def work(directory: Path) -> None:
    """Do what the `spec.json` of a cell's directory says, and write its result.

    Raises:
        DataError: a file is no longer the one that the spec names.
    """
    found = json.loads((directory / "spec.json").read_text(encoding="utf-8"))
    asked = _Work(found["spec"], directory)
    for name, file in asked.spec["files"].items():
        if not sha256(asked.file(name)).startswith(file["sha256"]):
            raise DataError(f"{asked.file(name)}: changed meanwhile; run the comparison again.")
    made_by = origin()  # the code as it begins
    result = WORK[found["kind"]](asked) | {"made_by": made_by}
    write_text(directory / "result.json", json.dumps(result, allow_nan=False) + "\n")
