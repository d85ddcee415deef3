"""Forgetting budgets: what is kept is inside by a measurement of our own, and near the budget."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import FAMILIES, VOCAB, tiny_adapter
from safetensors.torch import load_file
from transformers import TrainerCallback

from qadapter import files, hub
from qadapter.budget import Budget, DropMeter, Reading, hold_out, interval, thinned, tune
from qadapter.cli import main
from qadapter.config import QAdapterConfig
from qadapter.data import read_texts
from qadapter.errors import ArtefactError, ConfigError, TrainingError
from qadapter.evaluate import TaskScore
from qadapter.model import Streams
from qadapter.policy import KLCurve, Policy
from qadapter.suite import file_task
from qadapter.train import prepare
from qadapter.trainer import QAdapterTrainer

SAID = "the ferry leaves twice a day in summer and once in winter, when few people cross"
LIMIT = 0.004
"""Nats a token; a run without a budget goes far past it."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """General text of some 1,700 tokens: less than one reading takes, so all of it is read."""
    path = tmp_path_factory.mktemp("text") / "general.txt"
    lines = [SAID[3 * i :] + f", {i} of them, " + SAID[: 2 * i] for i in range(20)]
    path.write_text("\n".join(lines))
    return str(path)


def train(base: str, data: str, output: Path, *words: str) -> int:
    fixed = "--max_length 200 --learning_rate 0.01 --disable_tqdm true --bf16 false --trunk 0.5"
    fixed += " --anchor_weight 0"
    options = ["--data", data, "--model", base, "--output", str(output), *fixed.split()]
    return main(["train", *options, *" ".join(words).split()])


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence of a refusal."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("qadapter: ")
    return last


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


def drift(adapter: Path, text: str, strength: float = 1.0) -> float:
    """Measure KL the plain way: whole logits in float64, one row at a time."""
    policy = Policy.from_pretrained(adapter)
    ids = policy.tokenizer("\n".join(read_texts(text)))["input_ids"]
    total, n = 0.0, 0
    for start in range(0, len(ids), 256):
        row = torch.tensor([ids[start : start + 256]])
        with torch.no_grad():
            logp, logq = (
                policy.model(input_ids=row, strength=s).logits[0, :-1].double().log_softmax(-1)
                for s in (0.0, strength)
            )
        total += float((logp.exp() * (logp - logq)).sum())
        n += row.shape[1] - 1
    return total / n


def states_of(output: Path) -> list[dict[str, Any]]:
    """Return the log lines that the last checkpoint of a run holds."""
    last = max(output.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    found: list[dict[str, Any]] = json.loads((last / "trainer_state.json").read_text())[
        "log_history"
    ]
    return found


# ── training ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory, base: str, data: str) -> Path:
    """A run without a budget, with checkpoints on the way."""
    out = tmp_path_factory.mktemp("free") / "out"
    options = "--num_train_epochs 6 --save_strategy steps --save_steps 6 --logging_steps 1"
    assert train(base, data, out, options) == 0
    return out


def test_a_run_stops_at_its_budget_and_keeps_weights_inside_and_near_it(
    base: str,
    data: str,
    text: str,
    free: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert drift(free, text) > 2 * LIMIT  # so that keeping to it is no accident
    out = tmp_path / "out"
    options = f"--num_train_epochs 6 --save_strategy no --max-kl {LIMIT} --budget-text {text}"
    assert train(base, data, out, options) == 0
    assert 0.9 * LIMIT < drift(out, text) <= LIMIT * (1 + 1e-4)
    printed = capsys.readouterr().out
    (line,) = [s for s in printed.splitlines() if s.startswith("budget  ")]
    assert f"of 18 passed max_kl {LIMIT:g} (KL " in line
    assert "stopped and went back to KL 0.003" in line
    assert f"tokens of {text}" in line
    card = (out / "README.md").read_text()
    assert "Forgetting budget: " + line.removeprefix("budget  ") + "." in card
    assert "| budget_kl | 0.003" in card
    step = int(line.split("step ")[1].split()[0])
    assert 0 < step < 18
    assert f"| budget_step | {step} |" in card


def test_a_budget_that_is_not_reached_changes_nothing(
    base: str, data: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Dropout draws random numbers, which a reading must leave alone.
    options = "--num_train_epochs 2 --save_strategy no --lora_dropout 0.2"
    assert train(base, data, tmp_path / "free", options) == 0
    limited = f"--max_kl 50 --budget_text {text}"
    assert train(base, data, tmp_path / "limited", options, limited) == 0
    assert same(tmp_path / "free", tmp_path / "limited")
    assert "max_kl 50 not reached in 6 of 6 steps: KL " in capsys.readouterr().out


def test_the_first_step_may_be_too_far(
    base: str, data: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--learning_rate 0.05 --warmup_steps 0 --save_strategy no --num_train_epochs 2"
    limit = 1e-3
    assert train(base, data, tmp_path, options, f"--max_kl {limit} --budget_text {text}") == 0
    assert "step 1 of 6 passed max_kl 0.001" in capsys.readouterr().out
    assert 0.5 * limit < drift(tmp_path, text) <= limit * (1 + 1e-3)


def test_no_checkpoint_is_outside_and_readings_are_logged_where_they_were_made(
    base: str, data: str, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = f"--num_train_epochs 6 --max_kl {LIMIT} --budget_text {text} --logging_steps 1"
    slow = "--learning_rate 0.003 --save_strategy steps --save_steps 3"
    assert train(base, data, out, options, slow) == 0
    checkpoints = sorted(out.glob("checkpoint-*"))
    assert len(checkpoints) > 1
    assert all(drift(path, text) <= LIMIT * (1 + 1e-4) for path in checkpoints)
    last = max(checkpoints, key=lambda p: int(p.name[11:]))
    assert same(out, last)  # the weights it went back to are a checkpoint too
    lines = states_of(out)
    read = [row["step"] for row in lines if "budget_kl" in row]
    every = {0, *range(2, 19, 2), *range(3, 19, 3)}
    assert read[:-1] == sorted(step for step in every if step <= read[-1])
    assert read[-1] == read[-2]  # past the budget, and back
    assert [row["step"] for row in lines if "loss" in row] == list(range(1, read[-1] + 1))


def test_a_resumed_run_ends_with_the_same_adapter(
    base: str, data: str, text: str, tmp_path: Path
) -> None:
    budget_words = f"--max_kl {LIMIT} --budget_text {text} --save_strategy steps --save_steps 2"
    options = ("--num_train_epochs 6", budget_words)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(base, data, whole, *options) == 0
    first = whole / "checkpoint-2"
    assert not same(first, whole)
    assert train(base, data, resumed, *options, f"--resume_from_checkpoint {first}") == 0
    assert same(whole, resumed)


def test_a_checkpoint_that_is_outside_is_not_gone_on_from(
    base: str,
    data: str,
    text: str,
    free: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = f"--num_train_epochs 6 --max_kl {LIMIT} --budget_text {text} --save_strategy no"
    last = free / "checkpoint-18"
    resume = f"--resume_from_checkpoint {last}"
    assert train(base, data, tmp_path / "out", options, resume) == 2
    assert f"max_kl {LIMIT}: the checkpoint of step 18 is over it already (KL " in told(capsys)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_accumulated_gradients_and_epochs_of_checkpoints(
    base: str, data: str, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = f"--num_train_epochs 6 --max_kl {LIMIT} --budget_text {text} --save_strategy epoch"
    small = "--per_device_train_batch_size 1 --gradient_accumulation_steps 4"
    assert train(base, data, out, options, small) == 0
    assert 0.8 * LIMIT < drift(out, text) <= LIMIT * (1 + 1e-4)
    for path in out.glob("checkpoint-*"):
        assert drift(path, text) <= LIMIT * (1 + 1e-4)


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_the_best_checkpoint_is_chosen_among_those_inside(
    strategy: str, base: str, data: str, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    watch = f"--eval_data {data} --eval_strategy {strategy} --save_strategy {strategy}"
    every = "--eval_steps 3 --save_steps 3" if strategy == "steps" else ""
    best = "--load_best_model_at_end true --metric_for_best_model rewards/margins"
    best += " --greater_is_better true --early_stopping_patience 3"
    options = f"--num_train_epochs 6 --max_kl {LIMIT} --budget_text {text}"
    assert train(base, data, out, watch, every, best, options) == 0
    assert 0.8 * LIMIT < drift(out, text) <= LIMIT * (1 + 1e-4)
    # Margins grow all along, so the best is the last: the one that went back.
    last = max(out.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert same(out, last)


def test_a_best_checkpoint_from_before_there_was_a_budget_is_taken_back(
    base: str, data: str, text: str, tmp_path: Path
) -> None:
    """The run that is resumed had no budget, and the best of its checkpoints is far outside."""
    watch = f"--eval_data {data} --eval_strategy steps --eval_steps 3 --save_strategy steps"
    watch += " --save_steps 3 --load_best_model_at_end true --metric_for_best_model loss"
    watch += " --learning_rate 0.003"
    out = tmp_path / "out"
    assert train(base, data, out, "--num_train_epochs 6", watch) == 0
    outside = drift(out, text)
    first = out / "checkpoint-3"
    state = json.loads((first / "trainer_state.json").read_text())
    state |= {"best_metric": -1.0, "best_global_step": 18}
    state |= {"best_model_checkpoint": str(out / "checkpoint-18")}
    (first / "trainer_state.json").write_text(json.dumps(state))
    files.seal(first)
    limit = 2 * drift(first, text)
    assert outside > 1.5 * limit
    options = f"--max_kl {limit} --budget_text {text} --resume_from_checkpoint {first}"
    # It stops again after few steps, none of them as good.
    resumed = tmp_path / "resumed"
    assert train(base, data, resumed, "--max_steps 4", watch, options) == 0
    assert drift(first, text) < drift(resumed, text) <= limit * (1 + 1e-4)


def test_an_untrained_policy_that_is_not_the_base_is_refused_before_training(
    base: str, data: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = f"--parameterization raw --max_kl 1e-6 --budget_text {text} --save_strategy no"
    assert train(base, data, out, options) == 2
    said = told(capsys)
    assert "max_kl 1e-06: the untrained policy is over it already (KL " in said
    assert "use parameterization=residual" in said
    assert not out.exists()


class Scripted:
    """A meter that says what it is told to, by how far the adapter is from its start."""

    def __init__(self, *values: float) -> None:
        self.values, self.calls = list(values), 0

    def read(self, policy: Policy) -> Reading:
        value = self.values[min(self.calls, len(self.values) - 1)]
        self.calls += 1
        return Reading("max_drop", 1.0, value, f"drop {value}", "a script", {"budget_drop": value})


def scripted(base: str, data: str, out: Path, *values: float) -> tuple[QAdapterTrainer, Budget]:
    config = QAdapterConfig(
        data=data,
        model=base,
        output_dir=str(out),
        max_length=200,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        num_train_epochs=4,
        anchor_weight=0,
    )
    run = prepare(config)
    found = Budget(Policy(run.model, hub.load_tokenizer(base)), [Scripted(*values)])
    return run.trainer(config, budget=found), found


def test_nothing_inside_but_the_untrained_adapter_is_an_error(
    base: str, data: str, tmp_path: Path
) -> None:
    run, _ = scripted(base, data, tmp_path, 0.0, math.nan)
    with pytest.raises(TrainingError, match=r"max_drop 1: step 2 is far over it.*1/256 of the way"):
        run.train()


def test_nothing_nearer_than_the_last_weights_inside_keeps_those(
    base: str, data: str, tmp_path: Path
) -> None:
    run, found = scripted(base, data, tmp_path, 0.0, 0.5, 2.0)
    kept = []
    run.add_callback(Photograph(kept, step=2))
    # Even where the way leads to weights that are no numbers.
    run.callback_handler.callbacks.insert(0, Break(step=4))
    run.train()
    assert run.state.global_step == 4
    now = run.model.adapter_parameters()
    assert all(torch.equal(now[name], p) for name, p in kept[0].items())
    assert found.summary() == (
        "step 4 of 12 passed max_drop 1 (drop 2.0); stopped and went back to drop 0.5, a script"
    )
    assert found.figures() == {"budget_drop": 0.5, "budget_step": 4}


class Break(TrainerCallback):  # type: ignore[misc]
    """Makes a weight infinite at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if state.global_step == self.step:
            next(iter(model.adapter_parameters().values())).data.view(-1)[0] = math.inf


class Photograph(TrainerCallback):  # type: ignore[misc]
    """Keeps the adapter as it was at a step."""

    def __init__(self, kept: list[dict[str, torch.Tensor]], step: int) -> None:
        self.kept, self.step = kept, step

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.kept.append({n: p.detach().clone() for n, p in model.adapter_parameters().items()})


def test_going_back_takes_eight_readings_at_most(base: str, data: str, tmp_path: Path) -> None:
    run, found = scripted(base, data, tmp_path, 0.0, 0.5, 2.0)
    run.train()
    (meter,) = found._meters
    assert meter.calls == 3 + 8


@pytest.mark.parametrize("step", [3, 7])
def test_a_run_that_sigterm_ends_leaves_nothing_outside_its_budget(
    base: str,
    data: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    loss = QAdapterTrainer.compute_loss

    def hit(self: QAdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1 and self.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, **kwargs)

    # Of 90 steps every ninth is one to read the budget at.
    options = f"--max_steps 90 --save_strategy no --max_kl {LIMIT} --budget_text {text}"
    with monkeypatch.context() as patch:
        patch.setattr(QAdapterTrainer, "compute_loss", hit)
        assert train(base, data, tmp_path / "out", options) == 0
    printed = capsys.readouterr().out
    (adapter,) = (tmp_path / "out").glob("**/adapter_model.safetensors")
    assert drift(adapter.parent, text) <= LIMIT * (1 + 1e-4)
    if step == 3:  # before the budget
        assert adapter.parent.name == "checkpoint-3"
        assert "stopped after step 3; go on by" in printed
    else:  # past it, so the run is done
        assert adapter.parent == tmp_path / "out"
        assert "step 7 of 90 passed max_kl" in printed


@pytest.mark.fleet
def test_two_processes_decide_alike(base: str, data: str, text: str, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = str(Path(__file__).with_name("two_processes.py"))
    words = [base, data, text, str(tmp_path), str(LIMIT)]
    done = subprocess.run(
        [sys.executable, *torchrun, program, *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes, equal: True | step 4 of 18 passed max_kl 0.004 (KL " in done.stdout
    assert "went back to KL 0.003" in done.stdout


def test_a_trainer_without_its_budget_is_refused(
    base: str, data: str, text: str, tmp_path: Path
) -> None:
    config = QAdapterConfig(
        data=data, model=base, output_dir=str(tmp_path), max_length=200, bf16=False
    )
    run = prepare(config)
    config.max_kl = 0.1
    with pytest.raises(ConfigError, match="pass budget="):
        run.trainer(config)


def test_a_dry_run_takes_no_notice(
    base: str, data: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--max_kl 1e-9 --budget_text {text} --dry-run"
    assert train(base, data, tmp_path / "out", words) == 0
    assert "no run was started" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# ── points on a task ────────────────────────────────────────────────────────────────────────────


def right(adapter: Path, items: list[dict[str, Any]], strength: float) -> list[bool]:
    """Answer multiple choices the plain way: the sum of log-probabilities of each choice."""
    policy = Policy.from_pretrained(adapter)
    found = []
    for item in items:
        sums = []
        for choice in item["choices"]:
            prompt = policy.tokenizer(item["query"] + "\nAnswer:")["input_ids"]
            ids = torch.tensor([[*prompt, *policy.tokenizer(" " + choice)["input_ids"]]])
            with torch.no_grad():
                logits = policy.model(input_ids=ids, strength=strength).logits[0, :-1]
            taken = logits.double().log_softmax(-1).gather(-1, ids[0, 1:, None])
            sums.append(float(taken[len(prompt) - 1 :].sum()))
        found.append(max(range(2), key=sums.__getitem__) == item["gold"])
    return found


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory, free: Path) -> str:
    """Forty choices that the base makes rightly, so that every change of mind is a loss."""
    draw = random.Random(0)

    def word() -> str:
        return "".join(draw.choices("abcdefgh", k=4))

    rows = [{"query": f"Which, {i}?", "choices": [word(), word()], "gold": 0} for i in range(40)]
    for row, well in zip(rows, right(free, rows, 0.0), strict=True):
        row["gold"] = 0 if well else 1
    path = tmp_path_factory.mktemp("items") / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lost(adapter: Path, items: str) -> float:
    """Measure the points lost on the first thirty items."""
    rows = [json.loads(line) for line in Path(items).read_text().splitlines()][:30]
    base, policy = (sum(right(adapter, rows, strength)) for strength in (0.0, 1.0))
    assert base == 30
    return 100 * (base - policy) / 30


def test_a_run_stops_before_it_loses_more_points_than_it_may(
    base: str,
    data: str,
    items: str,
    free: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert lost(free, items) > 12
    options = f"--num_train_epochs 6 --save_strategy no --max-drop 10 --drop-task {items}"
    assert train(base, data, tmp_path / "out", options, "--drop-limit 30") == 0
    kept = lost(tmp_path / "out", items)
    assert 0 < kept <= 10
    printed = capsys.readouterr().out
    (line,) = [s for s in printed.splitlines() if s.startswith("budget  ")]
    # Of thirty items all of which the base had right, so their spread follows from their share.
    error = 100 * math.sqrt(kept / 100 * (1 - kept / 100) / 29)
    assert (
        f"went back to drop {kept:.2f} ± {error:.2f} points, paired standard error, acc 100" in line
    )
    assert line.endswith(f"on 30 items of {items}")


def test_two_budgets_are_both_kept(
    base: str, data: str, text: str, items: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--num_train_epochs 6 --save_strategy no --max_kl {LIMIT} --budget_text {text}"
    more = f"--max_drop 10 --drop_task {items} --drop_limit 30"
    assert train(base, data, tmp_path / "out", options, more) == 0
    assert drift(tmp_path / "out", text) <= LIMIT * (1 + 1e-4)
    assert lost(tmp_path / "out", items) <= 10
    printed = capsys.readouterr().out
    assert " nats a token, 95% " in printed
    assert "; drop " in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {name} |" in card for name in ("budget_kl", "budget_drop", "budget_drop_se"))


def test_scoring_a_task_leaves_training_as_it_is(
    base: str, data: str, items: str, tmp_path: Path
) -> None:
    options = "--num_train_epochs 2 --save_strategy no --lora_dropout 0.2"
    assert train(base, data, tmp_path / "free", options) == 0
    limited = f"--max_drop 100 --drop_task {items} --drop_limit 4"
    assert train(base, data, tmp_path / "limited", options, limited) == 0
    assert same(tmp_path / "free", tmp_path / "limited")


def test_a_last_word_task_is_read_while_training(
    base: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """lm-eval bootstraps its perplexity, in processes that would outlive a training's SIGTERM."""
    rows = [{"context": SAID[: 20 + i], "continuation": SAID[20 + i : 22 + i]} for i in range(4)]
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Whether such a process hangs is a matter of luck; that there is one is not.
    monkeypatch.setattr("multiprocessing.Pool", None)
    options = f"--max_steps 2 --save_strategy no --max_drop 100 --drop_task {path}"
    assert train(base, data, tmp_path / "out", options) == 0
    assert "max_drop 100 not reached in 2 of 2 steps" in capsys.readouterr().out


def test_several_tasks_under_one_name_are_no_budget(
    adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(*_: Any, **__: Any) -> list[TaskScore]:
        return [TaskScore(name, "acc", 0.5, None, 2, True, (0.0, 1.0)) for name in ("one", "two")]

    monkeypatch.setattr("qadapter.budget.evaluate_tasks", both)
    with pytest.raises(ConfigError, match="a_tag is several tasks, one, two, …; name one of them"):
        DropMeter(1.0, "a_tag", 10).read(Policy.from_pretrained(adapter))


def test_a_file_is_known_by_its_name_or_its_rows(tmp_path: Path) -> None:
    choice = '{"query": "q", "choices": ["a", "b"], "gold": 0}\n'
    words = '{"context": "a b", "continuation": "c"}\n'
    cases = {
        "piqa.jsonl": (choice, "local_piqa"),
        "own.jsonl": (choice, "own"),
        "last.jsonl": (words, "last"),
        "lambada.dev.jsonl": (words, "local_lambada"),
        "wikitext2.valid.txt": ("A ferry.\n", "local_perplexity"),
        "novel.txt": ("A ferry.\n", "novel"),
    }
    for name, (row, task) in cases.items():
        (tmp_path / name).write_text(row)
        found = file_task(tmp_path / name)
        assert found["task"] == task
        assert found["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / name)}}


# ── text ────────────────────────────────────────────────────────────────────────────────────────


@given(n=st.integers(2, 2000))
def test_texts_are_trained_on_or_held_out(n: int) -> None:
    texts = [str(i) for i in range(n)]
    kept, held_out = hold_out(texts)
    assert kept
    assert sorted(kept + held_out) == sorted(texts)
    assert n / 5 <= len(held_out) <= n / 5 + 1 or 60 <= len(held_out) <= 128
    assert set(kept).isdisjoint(held_out)


def test_anchors_that_are_held_out_are_not_trained_on(
    base: str, data: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--anchor_data {text} --anchor_weight 5 --max_kl 50 --save_strategy no"
    assert train(base, data, tmp_path / "out", options) == 0
    assert f"tokens of 4 texts held out of {text}" in capsys.readouterr().out
    config = QAdapterConfig(
        data=data,
        model=base,
        output_dir=str(tmp_path),
        max_length=200,
        bf16=False,
        anchor_data=text,
        max_kl=50,
    )
    run = prepare(config)
    texts = read_texts(text)
    tokenizer = hub.load_tokenizer(base)
    anchors = [tokenizer(t)["input_ids"][:128] for i, t in enumerate(texts) if i % 5]
    assert run.anchors == anchors


@given(n=st.integers(1, 300), width=st.integers(2, 9), tokens=st.integers(1, 999))
def test_rows_are_thinned_evenly(n: int, width: int, tokens: int) -> None:
    rows = [[i] * width for i in range(n)]
    found = [row[0] for row in thinned(rows, tokens)]
    assert found == sorted(set(found))
    assert len(found) == max(1, min(n, tokens // width))
    gaps = [b - a for a, b in pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


# ── settings ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max_kl 0 --budget_text F", "max_kl: 0.0 must be above 0"),
        ("--max_kl nan --budget_text F", "max_kl: nan must be above 0"),
        ("--max-kl 0.05 --budget-text missing.txt", "missing.txt: cannot be read"),
        ("--budget_text F", "budget_text: nothing is measured on it"),
        ("--max_kl 1 --budget_text F --anchor_data ./F", "budget_text: is anchor_data too"),
        ("--max_kl 1 --anchor_data short.txt", "anchor_data: one text is too few to hold some"),
        ("--max_drop 1", "max_drop and drop_task belong together"),
        ("--drop_task piqa", "max_drop and drop_task belong together"),
        ("--max_drop -1 --drop_task piqa", "max_drop: -1.0 must be from 0"),
        ("--max_drop 1 --drop_task piqa --drop_limit 1", "drop_limit: 1 must be at least 2"),
        ("--max_drop 1 --drop_task missing.jsonl", "missing.jsonl: cannot be read"),
        ("--max_drop 1 --drop_task odd.jsonl", "odd.jsonl: has neither 'choices' nor"),
        ("--max_drop 1 --drop_task .", "drop_task: . is no file; name one"),
        ("--max_drop 1 --drop_task F.txt", "F.txt is scored by word_perplexity, which is no share"),
        ("--max_drop 1 --drop_task no_such_task", "no_such_task"),
        ("--max_drop 1 --drop_task one.jsonl", "one.jsonl has one item, too few for a standard"),
        ("--max_drop 1 --drop_task piqa --alpha_0 0.2", "alpha_0 0.2 is not alpha_tilde 0.1"),
    ],
)
def test_settings_that_cannot_be_kept_are_told_in_a_sentence(
    words: str,
    message: str,
    base: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("F").write_text("some text\nand more\n")
    Path("F.txt").write_text("some text\nand more\n")
    Path("short.txt").write_text("some text\n")
    Path("odd.jsonl").write_text('{"text": "some"}\n')
    Path("one.jsonl").write_text('{"context": "a b", "continuation": "c"}\n')
    assert train(base, data, tmp_path / "out", words) == 2
    assert message in told(capsys)
    assert not (tmp_path / "out").exists()


# ── tune ────────────────────────────────────────────────────────────────────────────────────────


def test_tune_finds_what_a_fine_grid_search_finds(adapter: str, text: str) -> None:
    policy = Policy.from_pretrained(adapter)
    texts = read_texts(text)
    curve = policy.kl_curve(policy.text_rows(texts))
    grid = [curve(k / 1000) for k in range(1001)]
    assert all(b >= a - 1e-6 for a, b in pairwise(grid))
    for limit in (grid[3], grid[250] * 1.0001, grid[777], 0.9 * grid[1000]):
        found = tune(policy, texts, max_kl=limit)
        assert found.strength == max(k for k, kl in enumerate(grid) if kl <= limit) / 1000
        assert found.kl == grid[round(found.strength * 1000)] <= limit
        assert found.kl_at_max == grid[1000]
        assert found.kl_ci is not None
        assert found.kl_ci[0] <= found.kl <= found.kl_ci[1]
        assert found.tokens == curve.tokens
    assert tune(policy, texts, max_kl=2 * grid[1000]).strength == 1.0
    assert tune(policy, texts, max_kl=0.0).strength == 0.0
    wider = tune(policy, texts, max_kl=1.5 * grid[1000], max_strength=2.0)
    assert 1.0 < wider.strength < 2.0
    assert wider.kl <= 1.5 * grid[1000] < curve(wider.strength + 0.0021)


def test_tune_runs_the_model_once_and_the_head_eleven_times(
    adapter: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.from_pretrained(adapter)
    passes, strengths = [], []
    streams, by_row = policy.model.streams, KLCurve.by_row

    def counted(*args: Any, **kwargs: Any) -> Streams:
        passes.append(args[0].shape)
        return streams(*args, **kwargs)

    def noted(self: KLCurve, strength: float) -> list[float]:
        strengths.append(strength)
        return by_row(self, strength)

    monkeypatch.setattr(policy.model, "streams", counted)
    monkeypatch.setattr(KLCurve, "by_row", noted)
    found = tune(policy, read_texts(text), max_kl=0.01)
    assert sum(rows for rows, _ in passes) == math.ceil(found.tokens / 255)
    assert len(strengths) <= 11


def test_the_commands_answer_is_inside_by_a_plain_measurement(
    adapter: str, base: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = drift(Path(adapter), text) / 3
    words = ["tune", adapter, "--max-kl", str(limit), "--text", text]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["strength"] < 1
    assert found["kl"] == pytest.approx(drift(Path(adapter), text, found["strength"]), rel=1e-3)
    assert found["kl"] <= limit < drift(Path(adapter), text, found["strength"] + 0.002)
    assert found["next"] == f"qadapter chat {adapter} --strength {found['strength']:g}"
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"strength {found['strength']:g}, the largest up to 1")
    assert found["next"] in printed
    assert f"read on  {found['tokens']:,} tokens of {text}" in printed
    # No digit is lost that the measurement had.
    far = [*words[:3], "1e9", *words[4:], "--max-strength", "123.4567"]
    assert main(far) == 0
    assert capsys.readouterr().out.startswith("strength 123.4567, the largest up to 123.4567 ")
    loading = ["--base", base, "--no-check-base"]
    assert main([*words, *loading, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["next"]
    assert said.startswith(f"qadapter chat {adapter} --base {base} --no-check-base --strength 0.")


def test_what_tune_refuses_is_told_in_a_sentence(
    adapter: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    config = json.loads((other / "qadapter_config.json").read_text())
    (other / "qadapter_config.json").write_text(json.dumps({**config, "alpha_0": 0.25}))
    (tmp_path / "empty.txt").write_text("x")
    cases = [
        ([str(other), "--text", text], "alpha_0 0.25 is not alpha_tilde 0.5"),
        ([adapter, "--text", "missing.txt"], "missing.txt: cannot be read"),
        ([adapter, "--text", str(tmp_path / "empty.txt")], "fewer than two tokens"),
        ([adapter, "--text", text, "--max-strength", "3e38"], "the KL at strength 3e+38 is nan"),
    ]
    for words, message in cases:
        assert main(["tune", *words, "--max-kl", "0.1"]) == 2
        assert message in told(capsys)
    with pytest.raises(ArtefactError):
        tune(Policy.from_pretrained(other), read_texts(text), max_kl=0.1)


def test_one_row_of_text_has_no_interval(
    adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The ferry leaves twice a day.\n")
    words = ["tune", adapter, "--max-kl", "0.001", "--text", str(short)]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kl_ci"] is None
    assert main(words) == 0
    assert "without an interval" in capsys.readouterr().out


def curve_of(family: str, seed: int, **fields: Any) -> KLCurve:
    model = tiny_adapter(family, **fields)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (3, 11), generator=generator)
    with torch.no_grad():
        streams = model.streams(ids, torch.ones_like(ids))
    predicting = streams.at((slice(None), slice(-1))).at(torch.ones(3, 10).bool())
    return KLCurve(model, predicting, (10, 10, 10))


@pytest.mark.parametrize("parameterization", ["residual", "raw"])
@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 999), points=st.lists(st.floats(0, 3), min_size=3, max_size=3))
@hypothesis_settings(max_examples=5, deadline=None)
def test_kl_is_convex_and_does_not_fall_along_the_strength(
    family: str, parameterization: str, seed: int, points: Sequence[float]
) -> None:
    curve = curve_of(family, seed, parameterization=parameterization)
    a, b, c = sorted(points)
    low, middle, high = curve(a), curve(b), curve(c)
    # Float32 rounds logits, and a KL is a difference of their logsumexps.
    slack = 1e-5 * (1 + high)
    assert curve(0.0) == pytest.approx(0.0, abs=slack)
    assert low - slack <= middle <= high + slack
    if c > a:
        share = (b - a) / (c - a)
        assert middle <= (1 - share) * low + share * high + slack


def test_unequal_alphas_move_the_least_kl_away_from_zero() -> None:
    """Why such artefacts are refused: more strength can be nearer to the base."""
    base = curve_of("llama", 0).streams.base
    model = tiny_adapter("llama", alpha_0=0.25, parameterization="raw")
    # Q̂ = z_1 here, so strength 0.25 gives back what α0 took away: (0.25 + 0.25) / 0.5 = 1.
    curve = KLCurve(model, Streams(base, base), (30,))
    assert curve(0.25) == pytest.approx(0.0, abs=1e-5)
    assert curve(0.0) > 1e-3


def test_rows_of_text_weigh_in_the_interval_by_their_tokens() -> None:
    whole = curve_of("llama", 0)
    curve = KLCurve(whole.model, whole.streams, (*[1000] * 19, 1))
    found = interval(curve, [1.0] * 19 + [99.0])
    assert found is not None
    assert found[0] == pytest.approx(1.0)
    assert 1.0 <= found[1] < 1.1  # among equals that row would be one of twenty: 15 at the end
    assert interval(curve, [1.0]) is None
