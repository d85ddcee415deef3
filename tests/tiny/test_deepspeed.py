"""DeepSpeed's ZeRO-2 and 3 on two processes give what one process gives, and read no code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fleet import CONFIGS
from test_engines import SHARED, close, figures, logged, started, told, weights
from test_security import Bomb

from qadapter.files import seal

ONE = "--per_device_train_batch_size 4 --cache_trunk false"
TWO = (
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 2 --cache_trunk true "
    "--gradient_checkpointing true"
)
"""Both see the same global batches."""


BEST = (
    "--eval_strategy steps --eval_steps 3 --load_best_model_at_end true --anchor_weight 2 "
    "--metric_for_best_model rewards/margins --greater_is_better false"
)
"""Anchors, and back to the middle of the run: margins grow."""


def torn(work: Path) -> str:
    """Return a launcher's file of ZeRO-3 that lets go of small weights, too.

    Below a hundred thousand numbers DeepSpeed keeps a weight whole, and all of a tiny base's are.
    """
    auto = dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto")
    auto |= dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (work / "torn.json").write_text(json.dumps(auto | {"zero_optimization": zero}))
    shipped = yaml.safe_load((CONFIGS / "deepspeed_zero3.yaml").read_text())
    own = {"deepspeed_config_file": str(work / "torn.json"), "zero3_init_flag": False}
    del shipped["mixed_precision"]  # which the other file says
    (work / "torn.yaml").write_text(yaml.safe_dump(shipped | {"deepspeed_config": own}))
    return str(work / "torn")


@pytest.fixture(scope="module", params=["deepspeed_zero2", "deepspeed_zero3"])
def runs(
    request: Any, base: str, data: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The run of one process, of two, and that of two cut in the middle and gone on with."""
    pytest.importorskip("deepspeed")
    work, split = tmp_path_factory.mktemp(request.param), request.param
    words = ["train", "--data", data, "--eval_data", data, "--model", base, *SHARED.split()]
    (work / "anchors.txt").write_text("".join("some text\n" + "text " * i for i in range(9)))
    best = f"{BEST} --anchor_data {work / 'anchors.txt'}"

    def job(name: str, engine: str, own: str) -> dict[str, Any]:
        given = [*words, "--output", str(work / name), *own.split()]
        return {"words": given, "processes": 2 if engine else 1, "engine": engine}

    asked = {"one": ("", ONE), "two": (split, TWO)}
    asked |= {"one, best": ("", f"{ONE} {best}")}
    asked |= {"two, best": (torn(work) if split == "deepspeed_zero3" else split, f"{TWO} {best}")}
    for ended in started([job(name, *given) for name, given in asked.items()]):
        assert not any(ended["codes"]), told(ended)
    for name in ("resumed", "bombed"):
        shutil.copytree(work / "two/checkpoint-3", work / name / "checkpoint-3")
    (bombed,) = (work / "bombed/checkpoint-3").glob("*/*rank_1*optim_states.pt")
    torch.save({"optimizer_state_dict": Bomb(work / "exploded")}, bombed)
    seal(work / "bombed/checkpoint-3")
    on = f"{TWO} --resume_from_checkpoint true"
    resumed, refused = started([job("resumed", split, on), job("bombed", split, on)])
    assert not any(resumed["codes"]), told(resumed)
    assert refused["codes"] == [2, 2], told(refused)
    assert "it holds more than numbers" in told(refused)
    for name in ("two", "one"):
        shutil.copytree(work / name / "checkpoint-3", work / f"{name}, other" / "checkpoint-3")
    fewer = job("two, other", split, f"{on} --gradient_accumulation_steps 4") | {"processes": 1}
    plain = job("two, other", "", f"{ONE} --resume_from_checkpoint true")
    ended = started([fewer, plain, job("one, other", split, on)])
    for one, codes in zip(ended, ([2], [2], [2, 2]), strict=True):
        assert one["codes"] == codes, told(one)
        assert "sharded" in told(one), told(one)
        assert "by DeepSpeed for " in told(one)
    return {path.name: path for path in (*work.iterdir(), work / "exploded")}


def test_two_processes_learn_what_one_learns(runs: dict[str, Path]) -> None:
    # Adam divides by the gradient's own size, so rounding of near-zero gradients is magnified.
    close(runs["one"], runs["two"], 1e-4)
    assert {t.dtype for t in weights(runs["two"]).values()} == {torch.float32}
    ones, twos = logged(runs["one"]), logged(runs["two"])
    assert len(ones) == len(twos) == 6
    for one, two in zip(ones, twos, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/token_rms"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name
    one, two = figures(runs["one"]), figures(runs["two"])
    for name in ("eval_loss", "eval_kl", "eval_rewards/margins"):
        assert two[name] == pytest.approx(one[name], rel=2e-3), name


def test_anchors_and_the_best_checkpoint_are_those_of_one(runs: dict[str, Path]) -> None:
    close(runs["one, best"], runs["two, best"], 1e-4)
    close(runs["two, best"] / "checkpoint-3", runs["two, best"], 0.0)


def test_the_optimizer_is_split_and_no_checkpoint_holds_the_base(runs: dict[str, Path]) -> None:
    (states,) = (runs["two"] / "checkpoint-3").glob("global_step3")
    sizes = {path.name: path.stat().st_size for path in states.iterdir()}
    assert len([name for name in sizes if "optim_states" in name]) == 2
    adapter = (runs["two"] / "adapter_model.safetensors").stat().st_size
    models = [size for name, size in sizes.items() if "model_states" in name]
    # In stage 3 each process has a part of the weights, and writes of those that it trains.
    assert len(models) == (2 if "zero3" in str(states) else 1)
    assert max(models) < 2 * adapter
    assert not list(states.parent.rglob("*.py"))


def test_a_cut_run_goes_on_to_the_same_adapter(runs: dict[str, Path]) -> None:
    close(runs["two"], runs["resumed"], 0.0)


def test_code_in_a_checkpoint_is_not_run(runs: dict[str, Path]) -> None:
    """What was said of it is asserted where the runs are made."""
    assert not runs["exploded"].exists()
