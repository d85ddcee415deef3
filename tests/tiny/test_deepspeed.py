"""DeepSpeed's ZeRO-2 on two processes gives what one process gives, and reads no code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engines import SHARED, close, figures, logged, started, told, weights
from test_security import Bomb

from qadapter.files import seal

ONE = "--per_device_train_batch_size 4 --cache_trunk false"
TWO = (
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 2 --cache_trunk true "
    "--gradient_checkpointing true"
)
"""Both see the same global batches."""


@pytest.fixture(scope="module")
def runs(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run of one process, of two, and that of two cut in the middle and gone on with."""
    pytest.importorskip("deepspeed")
    work = tmp_path_factory.mktemp("deepspeed")
    words = ["train", "--data", data, "--eval_data", data, "--model", base, *SHARED.split()]

    def job(name: str, engine: str, own: str) -> dict[str, Any]:
        given = [*words, "--output", str(work / name), *own.split()]
        return {"words": given, "processes": 2 if engine else 1, "engine": engine}

    zero2 = "deepspeed_zero2"
    for ended in started([job("one", "", ONE), job("zero2", zero2, TWO)]):
        assert not any(ended["codes"]), told(ended)
    for name in ("resumed", "bombed"):
        shutil.copytree(work / "zero2/checkpoint-3", work / name / "checkpoint-3")
    (bombed,) = (work / "bombed/checkpoint-3").glob("*/*rank_1*optim_states.pt")
    torch.save({"optimizer_state_dict": Bomb(work / "exploded")}, bombed)
    seal(work / "bombed/checkpoint-3")
    on = f"{TWO} --resume_from_checkpoint true"
    resumed, refused = started([job("resumed", zero2, on), job("bombed", zero2, on)])
    assert not any(resumed["codes"]), told(resumed)
    assert refused["codes"] == [2, 2], told(refused)
    assert "it holds more than numbers" in told(refused)
    for name in ("zero2", "one"):
        shutil.copytree(work / name / "checkpoint-3", work / f"{name}, other" / "checkpoint-3")
    fewer = job("zero2, other", zero2, f"{on} --gradient_accumulation_steps 4") | {"processes": 1}
    plain = job("zero2, other", "", f"{ONE} --resume_from_checkpoint true")
    ended = started([fewer, plain, job("one, other", zero2, on)])
    for one, codes in zip(ended, ([2], [2], [2, 2]), strict=True):
        assert one["codes"] == codes, told(one)
        assert "sharded" in told(one), told(one)
        assert "by DeepSpeed for " in told(one)
    return {path.name: path for path in (*work.iterdir(), work / "exploded")}


def test_two_processes_learn_what_one_learns(runs: dict[str, Path]) -> None:
    # Adam divides by the gradient's own size, so rounding of near-zero gradients is magnified.
    close(runs["one"], runs["zero2"], 1e-4)
    assert {t.dtype for t in weights(runs["zero2"]).values()} == {torch.float32}
    ones, twos = logged(runs["one"]), logged(runs["zero2"])
    assert len(ones) == len(twos) == 6
    for one, two in zip(ones, twos, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/token_rms"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name
    one, two = figures(runs["one"]), figures(runs["zero2"])
    for name in ("eval_loss", "eval_kl", "eval_rewards/margins"):
        assert two[name] == pytest.approx(one[name], rel=2e-3), name


def test_the_optimizer_is_split_and_no_checkpoint_holds_the_base(runs: dict[str, Path]) -> None:
    (states,) = (runs["zero2"] / "checkpoint-3").glob("global_step3")
    sizes = {path.name: path.stat().st_size for path in states.iterdir()}
    assert len([name for name in sizes if "optim_states" in name]) == 2
    adapter = (runs["zero2"] / "adapter_model.safetensors").stat().st_size
    assert sizes["mp_rank_00_model_states.pt"] < 2 * adapter
    assert not list(states.parent.rglob("*.py"))


def test_a_cut_run_goes_on_to_the_same_adapter(runs: dict[str, Path]) -> None:
    close(runs["zero2"], runs["resumed"], 0.0)


def test_code_in_a_checkpoint_is_not_run(runs: dict[str, Path]) -> None:
    """What was said of it is asserted where the runs are made."""
    assert not runs["exploded"].exists()
