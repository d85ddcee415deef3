"""Nothing that is loaded may run: weights come from safetensors, whatever lies beside them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import qadapter
from qadapter import files, hub
from qadapter.cli import main
from qadapter.errors import ArtefactError, ModelError
from qadapter.policy import Policy


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


def plant(mark: Path, path: Path) -> None:
    """Write a pickle that torch would take for weights."""
    torch.save({"weight": Bomb(mark)}, path)


def test_the_bomb_goes_off(mark: Path, tmp_path: Path) -> None:
    plant(mark, tmp_path / "bomb.bin")
    torch.load(tmp_path / "bomb.bin", weights_only=False)
    assert mark.exists()


def test_no_source_unpickles_or_evaluates() -> None:
    # Only the name of the error, which tells of a refusal, may come from pickle.
    unsafe = re.compile(
        r"import (pickle|dill|joblib|marshal|shelve|cloudpickle)"
        r"|from (pickle|dill|joblib|marshal|shelve|cloudpickle) import (?!UnpicklingError$)"
        r"|torch\.load(?!\(.*weights_only=True\))|pickle\.|\b(eval|exec)\(|read_pickle|allow_pickle|unpickle"
        r"|yaml\.(load|unsafe|full)|weights_only=False|shell=True|os\.system"
    )
    for line in (
        "from pickle import loads",
        "from pickle import UnpicklingError, loads",
        "torch.load(path)",
    ):
        assert unsafe.search(line)
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in Path(qadapter.__file__).parent.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if unsafe.search(line) and not re.search(r"\.eval\(", line)
    ]
    assert found == []


def test_an_adapter_in_a_pickle_is_refused(adapter: str, mark: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    plant(mark, copy / "adapter_model.bin")
    Policy.from_pretrained(copy)  # beside the real weights it is not looked at
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtefactError):
        Policy.from_pretrained(copy)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_base_in_a_pickle_is_refused(name: str, base: str, mark: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    plant(mark, copy / name)
    with pytest.raises(ModelError):
        hub.load_base(str(copy), dtype=torch.float32)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_bomb_does_not_run_it(
    name: str,
    base: str,
    data: str,
    mark: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "--data", data, "--model", base, "--output", str(tmp_path / "run")]
    words += ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2"]
    words += ["--disable_tqdm", "true", "--max_length", "200", "--bf16", "false"]
    assert main(words) == 0
    plant(mark, tmp_path / "run" / "checkpoint-1" / name)
    files.seal(tmp_path / "run" / "checkpoint-1")  # who plants can seal as well
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    capsys.readouterr()
    assert main([*words, "--resume_from_checkpoint", "true"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint-1: the state of optimizer, scheduler or random numbers" in said
    assert "it holds more than numbers" in said
    assert "Traceback" not in said
    assert not mark.exists()


# --- No name leads out of its directory -----------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.write_bytes(b"secret")
    return path


@pytest.mark.parametrize("way", ["up", "whole", "link", "linked directory"])
def test_a_checkpoints_seal_cannot_name_what_lies_outside(
    way: str, outside: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "inside").write_bytes(b"1")
    files.seal(checkpoint)
    assert files.damage(checkpoint) is None
    name = {"up": "../../outside", "whole": str(outside), "link": "link"}.get(way, "up/outside")
    if way == "link":
        (checkpoint / name).symlink_to(outside)
    elif way == "linked directory":
        (checkpoint / "up").symlink_to(tmp_path, target_is_directory=True)
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()
    (checkpoint / files.MANIFEST).write_text(json.dumps({name: digest}))
    assert files.damage(checkpoint) == f"{name} leads out of the directory"


def test_a_seal_of_nothing_is_no_seal(tmp_path: Path) -> None:
    (tmp_path / files.MANIFEST).write_text("{}")
    assert files.damage(tmp_path) == f"{files.MANIFEST} names no file"


@pytest.mark.parametrize("whole", [False, True])
def test_a_converted_bases_manifest_cannot_name_what_lies_outside(
    whole: bool, outside: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "outside").write_bytes(outside.read_bytes())
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps({"outside": digest}))
    assert hub.verify_manifest(directory)
    name = str(outside) if whole else "../outside"
    (directory / "manifest.json").write_text(json.dumps({name: digest}))
    assert not hub.verify_manifest(directory)
