"""Evaluation by lm-eval: each of its tasks on the composed policy, and its program with our model.

lm-eval is an extra and takes seconds to import; importing this module does not.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import numbers
import os
import random
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any

import numpy as np
import torch
import yaml

from qadapter import hub
from qadapter.config import QConfig
from qadapter.errors import ConfigError, UserError, needs
from qadapter.files import sha256
from qadapter.model.adapter import FILES, find_weights
from qadapter.policy import Policy
from qadapter.suite import LOCAL_SUITE, local_suite, supply_sentences, untrained_sentences

PAPER_SUITE = ("mmlu", "mmlu_pro", "gsm8k", "bbh", "ifeval")
"""The five benchmarks of arXiv:2407.03856 as lm-eval names them; their data come from the Hub."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskScore:
    """What a policy scores on one task, or on one group of tasks."""

    task: str
    """Its name."""
    metric: str
    """lm-eval's name of the first metric that the task lists."""
    value: float
    """The metric over all items, as lm-eval aggregates them."""
    stderr: float | None
    """Its standard error, where lm-eval has one."""
    n: int
    """Documents."""
    higher_is_better: bool
    """Direction of the metric."""
    items: tuple[float, ...]
    """The metric of each document, in order (a group's tasks one after another), for paired tests.

    For perplexities the log-likelihood of each document, in nats. Empty where the metric has no
    number for a single document, such as BLEU or F1."""
    weights: tuple[float, ...] = ()
    """For perplexities the words (or bytes) of each document by which they are taken, or 1 where
    they are taken by documents; else empty."""


def evaluate_tasks(
    policy: Policy,
    tasks: Sequence[str | dict[str, Any]],
    *,
    strength: float = 1.0,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    num_fewshot: int | None = None,
) -> list[TaskScore]:
    """Return the score of each task at a strength, in order; a group of tasks gives one score.

    Random states are as lm-eval seeds them, and afterwards as they were; the model is left in eval
    mode. Progress goes to stderr.

    Args:
        tasks: lm-eval's names of tasks, groups or tags, paths of its YAML files, or task
            configurations, such as those of `local_suite`.
        limit: only the first so many documents of each task; the local suite shuffles a text's.
        batch_size: requests run at a time.
        apply_chat_template: make each prompt a conversation, its few-shot examples earlier turns.
        num_fewshot: examples before each prompt; default what the task says. As in lm-eval, a task
            that says 0 keeps it.

    Raises:
        ConfigError: lm-eval is not installed, has no such task, or cannot run it with these
            settings or data.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: {limit} must be at least 1.")
    if not tasks:
        return []
    # What lm-eval prints as it goes is not the caller's output.
    with _told(), _seeded(policy.model.device), redirect_stdout(sys.stderr):
        with needs("eval", "evaluate"):
            from lm_eval import evaluate
            from lm_eval.tasks import TaskManager

            from qadapter.lm import QAdapterLM

        lm = QAdapterLM(policy, strength=strength, batch_size=batch_size)
        # Reading the thousands of tasks that come with lm-eval takes longer than a small task.
        manager = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))
        # A copy: loading changes configurations.
        parts = [manager.load([copy.deepcopy(task)]) for task in tasks]
        whole = {k: {n: x for part in parts for n, x in part[k].items()} for k in parts[0]}
        for task in whole["tasks"].values():
            _set_fewshot(task, num_fewshot)
        with _unforked():
            found = evaluate(
                lm,
                whole,
                limit=limit,
                bootstrap_iters=1000,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
            )
    say_which_sentences()
    return [score for part in parts for score in _scores(part, found)]


def load_task(task: str) -> dict[str, Any]:
    """Return what lm-eval knows by a name, or a YAML file of its: tasks by name, a group's all.

    Raises:
        ConfigError: lm-eval is not installed, has no such task, or cannot get its data.
    """
    with _told():
        with needs("eval", "evaluate"):
            from lm_eval.tasks import TaskManager
        supply_sentences()
        found: dict[str, Any] = TaskManager().load([task])["tasks"]
        return found


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples by lm-eval's own rule."""
    usual = task.get_config("num_fewshot")
    if usual is None or (num_fewshot is not None and usual != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=1234)


def _scores(part: dict[str, Any], found: dict[str, Any]) -> Iterator[TaskScore]:
    """Yield the scores of one loaded name: of its group if that has one, else of each task."""
    group = next(iter(part["groups"]), None)
    if group is not None and group in found.get("groups", {}):
        yield _score(group, found["groups"][group], part["tasks"], found)
    else:
        for name, task in part["tasks"].items():
            yield _score(name, found["results"][name], {name: task}, found)


def _score(
    name: str, result: dict[str, Any], tasks: dict[str, Any], found: dict[str, Any]
) -> TaskScore:
    from lm_eval.api.metrics import perplexity

    first, task = next(iter(tasks.items()))
    wanted = next(iter(task.aggregation()), None)
    keys = [key for key in result if "," in key and "_stderr," not in key]
    key = next((key for key in keys if key.split(",")[0] == wanted), keys[0])
    metric, filtered = key.split(",", 1)
    stderr = result.get(f"{metric}_stderr,{filtered}")
    samples = [
        sample[metric]
        for one in tasks
        for sample in found["samples"][one]
        if sample["filter"] == filtered
    ]
    # Perplexities: a log-likelihood and what it is divided by.
    pairs = [v for v in samples if isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], float)]
    by_weight = bool(samples) and len(pairs) == len(samples)
    items = [_item(value[0] if by_weight else value) for value in samples]
    weights = [float(weight) for _, weight in pairs] if by_weight else []
    if task.aggregation().get(metric) is perplexity:
        weights = [1.0] * len(items)  # of log-likelihoods, one a document
    return TaskScore(
        task=name,
        metric=metric,
        value=float(result[key]),
        stderr=stderr if isinstance(stderr, float) else None,
        n=sum(found["n-samples"][one]["effective"] for one in tasks),
        higher_is_better=bool(found["higher_is_better"][first].get(metric, True)),
        items=tuple(item for item in items if item is not None) if None not in items else (),
        weights=tuple(weights),
    )


def _item(value: Any) -> float | None:
    return float(value) if isinstance(value, numbers.Real | np.bool_) else None


@contextmanager
def _told() -> Iterator[None]:
    """Turn what lm-eval, datasets, jinja2 and each task raise of their own into a ConfigError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # ends the line of a progress bar held there
        said = " ".join(str(error).split())[:400]
        raise ConfigError(
            f"lm-eval cannot run this ({type(error).__name__}: {said}); mend what it names, or see "
            "where it happened by `qadapter --debug …`."
        ) from error


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Seed as lm-eval's program does, and give the caller its random states back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _unforked() -> Iterator[None]:
    """Have lm-eval bootstrap in this process.

    Forks of a training inherit how it hears SIGTERM, by which lm-eval's pool ends them, and hang.
    """
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@cache
def _warn_of_sentences() -> None:
    _log.warning(
        "IFEval counts sentences by nltk's untrained tokenizer, which ends one after every full "
        "stop: punkt_tab is not on this machine; `python -m nltk.downloader punkt_tab` gets it."
    )


def say_which_sentences() -> None:
    """Warn, once a process, if IFEval counts sentences by nltk's untrained model."""
    if untrained_sentences():
        _warn_of_sentences()


# ── lm-eval's program ───────────────────────────────────────────────────────────────────────────


def harness_parser() -> argparse.ArgumentParser:
    """Return lm-eval's own parser of a run, to which a command may add flags.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    with needs("eval", "evaluate"):
        from lm_eval._cli.run import Run
    commands = argparse.ArgumentParser().add_subparsers()
    Run.create(commands)
    parser: argparse.ArgumentParser = commands.choices["run"]
    return parser


def run_harness(
    options: argparse.Namespace,
    model: dict[str, Any],
    *,
    suite: str | None = None,
    suite_data: str | None = None,
) -> None:
    """Do what lm-eval's program does with parsed options, on the policy that `model` describes.

    Args:
        options: what `harness_parser` parsed; the model is left to us.
        model: arguments of `QAdapterLM`.
        suite: "local" or "paper"; default "local" where its data are given and no task is one of
            it.
        suite_data: directory of the local suite's files.

    Raises:
        UserError: an option, a task, the adapter or its data cannot be used.
    """
    with _told():
        with needs("eval", "evaluate"):
            from lm_eval._cli.run import Run
            from lm_eval.config.evaluate_config import EvaluatorConfig
            from lm_eval.utils import setup_logging

            import qadapter.lm  # noqa: F401  # which lm-eval then knows
        setup_logging()
        QConfig.load(model["pretrained"])  # before lm-eval reads its thousands of tasks
        written = EvaluatorConfig.load_yaml_config(options.config) if options.config else {}
        _set_model(options, written, model)
        names = _task_names(options.tasks or written.get("tasks") or [], suite, suite_data)
        local = local_suite(suite_data or "", [name for name in names if name in LOCAL_SUITE])
        with TemporaryDirectory() as directory:
            for config in local:
                text = yaml.dump(config, Dumper=_TaskDumper)
                (Path(directory) / f"{config['task']}.yaml").write_text(text, encoding="utf-8")
            theirs = options.include_path or written.get("include_path")
            options.include_path = [path for path in (theirs, directory) if path]
            options.tasks = names
            Run._execute(options)
    say_which_sentences()


def _set_model(options: argparse.Namespace, written: dict[str, Any], model: dict[str, Any]) -> None:
    """Make the adapter the model of lm-eval's options, of which some may stand in its YAML file."""
    if options.model or "model" in written:
        raise ConfigError("--model: the model is the adapter; leave it out.")
    if options.limit is not None and options.limit <= 0:
        raise ConfigError(f"--limit: {options.limit:g} must be above 0.")
    more = {**(written.get("model_args") or {}), **(options.model_args or {})}
    if taken := sorted(more.keys() & model.keys()):
        raise ConfigError(f"--model_args: {taken[0]!r} has a flag of its own; use that.")
    options.model = "qadapter"
    options.model_args = {**more, **{k: v for k, v in model.items() if v is not None}}
    # lm-eval's own default is a GPU, there or not.
    options.device = str(hub.pick_device(options.device or written.get("device")))
    # Its cache of answers would answer for every adapter and strength.
    if use_cache := options.use_cache or written.get("use_cache"):
        directory = find_weights(model["pretrained"]).parent
        files = [sha256(directory / name) for name in FILES]
        told = json.dumps([files, options.model_args], sort_keys=True, default=str)
        options.use_cache = f"{use_cache}_{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _task_names(asked: str | list[str], suite: str | None, suite_data: str | None) -> list[str]:
    names = asked.split(",") if isinstance(asked, str) else list(asked)
    if suite is None and suite_data and not set(names) & set(LOCAL_SUITE):
        suite = "local"
    names += {"local": LOCAL_SUITE, "paper": PAPER_SUITE, None: ()}[suite]
    if not names:
        raise ConfigError(
            "--tasks: none given; name some, or give --suite-data D, or --suite paper."
        )
    local = next((name for name in names if name in LOCAL_SUITE), None)
    if local and not suite_data:
        raise ConfigError(f"{local}: reads a local file; say where by --suite-data D.")
    if suite_data and not local:
        raise ConfigError("--suite-data: belongs to --suite local; leave one out.")
    return list(dict.fromkeys(names))


class _TaskDumper(yaml.SafeDumper):
    """YAML as lm-eval reads it: a function is `!function module.name`."""


_TaskDumper.add_representer(
    FunctionType,
    lambda dumper, f: dumper.represent_scalar("!function", f"{f.__module__}.{f.__qualname__}"),
)
