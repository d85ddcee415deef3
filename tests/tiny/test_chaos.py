"""A run that is killed, full, terminated or damaged loses minutes, and says what."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qadapter import files
from qadapter.cli import main
from qadapter.trainer import QAdapterTrainer

KILLS = int(os.environ.get("QADAPTER_KILLS", "4"))
"""`make chaos` asks for 50."""
INJURIES = int(os.environ.get("QADAPTER_INJURIES", "4"))
"""`make chaos` asks for 30."""
OPTIONS = """
    --max_length 200 --learning_rate 0.01 --num_train_epochs 3 --bf16 false --lora_dropout 0.1
    --per_device_train_batch_size 2 --save_strategy steps --save_steps 2 --save_total_limit 2
    --disable_tqdm true
"""


@pytest.fixture
def words(base: str, data: str) -> list[str]:
    return ["--data", data, "--model", base, *OPTIONS.split()]


@pytest.fixture
def whole(words: list[str], tmp_path: Path) -> dict[str, torch.Tensor]:
    """The adapter of a run that nothing disturbed."""
    assert main(["train", *words, "--output", str(tmp_path / "whole")]) == 0
    return saved(tmp_path / "whole")


def saved(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_run_that_is_killed_anywhere_ends_with_the_same_adapter(
    words: list[str], whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    script = str(Path(__file__).with_name("chaos.py"))
    out = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, script, str(KILLS), "0", str(out), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "QADAPTER_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert (told["kills"], told["adapters"]) == (KILLS, 1)
    if KILLS >= 50:  # the chance that none falls there is below one in a thousand
        assert told["cache"].get("partly written", 0) > 0
    assert same(saved(out), whole)


@pytest.mark.parametrize("seed", range(INJURIES))
def test_a_damaged_checkpoint_is_passed_over_and_told(
    seed: int,
    words: list[str],
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    draw, out = random.Random(seed), tmp_path / "whole"
    newest, older = out / "checkpoint-18", out / "checkpoint-16"
    file = draw.choice(sorted(p for p in newest.iterdir() if p.is_file()))
    content = bytearray(file.read_bytes())
    if seed % 2:
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    (out / "adapter_model.safetensors").unlink()
    again = ["train", *words, "--output", str(out), "--resume_from_checkpoint"]
    capsys.readouterr()
    assert main([*again, str(newest)]) == 2
    assert file.name in capsys.readouterr().err
    assert main([*again, "true"]) == 0
    assert file.name in caplog.text
    assert f"going on from {older}: up to 2 steps are done again" in caplog.text
    assert same(saved(out), whole)
    assert files.damage(newest) is None


def test_where_no_checkpoint_is_whole_the_run_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", *words, "--output", str(out)]) == 0
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / files.MANIFEST).unlink()
    capsys.readouterr()
    assert main(["train", *words, "--output", str(out), "--resume_from_checkpoint", "true"]) == 2
    said = capsys.readouterr().err
    assert "holds no checkpoint to go on from" in said
    assert "not written to its end" in said


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, for which `mounted` sets what fits on it."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def mounted(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def size(directory: Path) -> int:
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in directory.rglob("*") if p.is_file())


@pytest.mark.parametrize("checkpoints_that_fit", [0.4, 1.3, 1.8, 2.2, 2.7])
def test_a_full_disk_is_told_and_the_last_checkpoint_stays(
    checkpoints_that_fit: float,
    words: list[str],
    whole: dict[str, torch.Tensor],
    disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, room = disk / "run", checkpoints_that_fit * size(tmp_path / "whole" / "checkpoint-18")
    mounted(disk, f"size={int(room)}")
    train = ["train", *words, "--output", str(out)]
    capsys.readouterr()
    assert main(train) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    left = sorted(out.glob("checkpoint-*"))
    assert len(left) == int(checkpoints_that_fit)
    assert all(files.damage(checkpoint) is None for checkpoint in left)
    assert sorted(out.glob("*")) == left  # nothing half-written, hidden or not
    mounted(disk, "size=64m")
    assert main([*train, *(["--resume_from_checkpoint", "true"] if left else [])]) == 0
    assert same(saved(out), whole)


def test_sigterm_ends_with_a_checkpoint_and_says_how_to_go_on(
    words: list[str],
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, loss = tmp_path / "run", QAdapterTrainer.compute_loss

    def hit(self: QAdapterTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(QAdapterTrainer, "compute_loss", hit)
        capsys.readouterr()
        assert main(["train", *words, "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "stopped after step 5; go on by\nqadapter train" in said
    assert said.strip().endswith("--resume_from_checkpoint true")
    assert not (out / "adapter_model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again = said.strip().splitlines()[-1].split()[1:]

    def never(_: str) -> Iterator[object]:
        raise AssertionError("the pairs were read from their start again")
        yield

    monkeypatch.setattr("qadapter.train.read_pairs", never)
    assert main(again) == 0
    assert same(saved(out), whole)


def test_a_read_only_output_is_told_before_training(
    words: list[str], disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (disk / "run").mkdir()
    mounted(disk, "ro")
    assert main(["train", *words, "--output", str(disk / "run")]) == 2
    said = capsys.readouterr()
    assert "cannot be written" in said.err
    assert "'loss'" not in said.out


@pytest.mark.parametrize("options", ["ro", "size=8k"])
def test_a_cache_that_cannot_be_written_is_told_before_training(
    options: str,
    words: list[str],
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("QADAPTER_CACHE", str(disk))
    mounted(disk, options)
    assert main(["train", *words, "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert "cannot be written" in said.err
    assert "'loss'" not in said.out
    assert not (tmp_path / "run").exists()
