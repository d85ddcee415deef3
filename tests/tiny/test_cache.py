"""The trunk cache: the same training, the base not run again, nothing stale or damaged used."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, tiny_base
from test_train import assert_close, random_pairs, trainer, weights
from transformers import TrainerCallback

from qadapter.cache import Kept, Layout, TrunkCache
from qadapter.data import TokenizedPair
from qadapter.errors import ConfigError, UserError
from qadapter.packing import pack_pairs
from qadapter.trainer import QAdapterTrainer

LAYOUT = Layout(width=5, dtype=torch.bfloat16, scalars=True)


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trunk"


def layer_calls(run: QAdapterTrainer) -> list[int]:
    """Train; return for every step how often the base's first layer ran."""
    calls = [0]
    layer: Any = run.model._layers[0]
    layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    steps: list[int] = []
    step = run.training_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        before = calls[0]
        out = step(*args, **kwargs)
        steps.append(calls[0] - before)
        return out

    run.training_step = counted  # type: ignore[method-assign]
    run.train()
    return steps


def losses_of(run: QAdapterTrainer) -> list[float]:
    """Train; return the loss of every step."""
    run.train()
    return losses(run)


def losses(run: QAdapterTrainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere"])
def test_training_from_the_cache_is_the_same_training(family: str, tmp_path: Path) -> None:
    runs = []
    for cached in (False, True):
        fields = {"family": family, "num_train_epochs": 3, "cache_trunk": cached}
        run = trainer(tmp_path / str(cached), random_pairs(21), **fields)
        run.train()
        runs.append(run)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)
    assert_close(weights(runs[0].model), weights(runs[1].model), atol=2e-4)


@pytest.mark.parametrize(
    "method",
    [{"alpha_0": 0.2}, {"parameterization": "raw"}, {"gamma": 0.9, "returns": "discounted"}],
)
def test_where_scalars_are_not_enough_states_are_kept(
    method: dict[str, Any], tmp_path: Path
) -> None:
    pairs = random_pairs(12)
    runs = []
    for cached in (False, True):
        run = trainer(tmp_path / str(cached), pairs, num_train_epochs=2, cache_trunk=cached)
        fields = {**run.model.q_config.__dict__, **method}
        run.model.q_config = type(run.model.q_config)(**fields)
        assert run.model.scalars_suffice == ("gamma" in method)
        run.train()
        runs.append(run)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)


def test_the_base_runs_in_the_first_epoch_only_and_not_in_a_second_run(tmp_path: Path) -> None:
    pairs = random_pairs(16)
    first = trainer(tmp_path / "a", pairs, num_train_epochs=3)
    assert layer_calls(first) == [1, 1, 0, 0, 0, 0]
    second = trainer(tmp_path / "b", pairs, num_train_epochs=1, cache_trunk=True)
    assert layer_calls(second) == [0, 0]
    assert losses(second) == pytest.approx(losses(first)[:2], abs=1e-5)


def test_the_size_is_told_before_it_is_written(
    cache_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="qadapter"):
        found = trainer(tmp_path / "a", random_pairs(8), num_train_epochs=2)
        found.train()
    (said,) = (r for r in caplog.records if "GiB" in r.message)
    size, directory = found.cache.size, found.cache.directory
    assert said.message == f"trunk cache: {size / 2**30:.2f} GiB in {directory}"
    assert directory.parent == cache_root


def test_one_epoch_writes_nothing_unless_asked(cache_root: Path, tmp_path: Path) -> None:
    trainer(tmp_path / "a", random_pairs(8)).train()
    assert not cache_root.exists()


def test_steps_that_end_in_the_first_epoch_write_nothing_whatever_the_epochs(
    cache_root: Path, tmp_path: Path
) -> None:
    """16 pairs are two micro-batches, and one step of an accumulation of three."""
    for name, fields in {
        "a": {"max_steps": 2},
        "b": {"max_steps": 1, "gradient_accumulation_steps": 3},
        "c": {"max_steps": 4, "per_device_train_batch_size": 4},
    }.items():
        trainer(tmp_path / name, random_pairs(16), num_train_epochs=3, **fields).train()
        assert not cache_root.exists(), name
    run = trainer(tmp_path / "d", random_pairs(16), num_train_epochs=1, max_steps=3)
    assert layer_calls(run) == [1, 1, 0]


@pytest.mark.parametrize("name", ["trunk.bin", "base.bin", "sums.bin"])
def test_a_damaged_part_is_computed_again(name: str, cache_root: Path, tmp_path: Path) -> None:
    pairs = random_pairs(16)
    first = trainer(tmp_path / "a", pairs, cache_trunk=True)
    first.train()
    (directory,) = cache_root.iterdir()
    raw = bytearray((directory / name).read_bytes())
    raw[0] ^= 1
    (directory / name).write_bytes(raw)
    again = trainer(tmp_path / "b", pairs, cache_trunk=True)
    # One of the two batches holds the damaged pair.
    assert sorted(layer_calls(again)) == [0, 1]
    assert losses(again) == pytest.approx(losses(first), abs=1e-5)
    assert layer_calls(trainer(tmp_path / "c", pairs, cache_trunk=True)) == [0, 0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: os.truncate(d / "trunk.bin", 7),
        lambda d: (d / "sums.bin").unlink(),
        lambda d: (d / "key.json").write_bytes(b"\xff{"),
        lambda d: (d / "key.json").write_text("{}"),
    ],
)
def test_a_damaged_directory_is_made_anew(damage: Any, cache_root: Path, tmp_path: Path) -> None:
    pairs = random_pairs(16)
    trainer(tmp_path / "a", pairs, cache_trunk=True).train()
    (directory,) = cache_root.iterdir()
    damage(directory)
    assert layer_calls(trainer(tmp_path / "b", pairs, cache_trunk=True)) == [1, 1]
    assert layer_calls(trainer(tmp_path / "c", pairs, cache_trunk=True)) == [0, 0]


@pytest.mark.parametrize("name", ["trunk.bin", "base.bin", "sums.bin"])
def test_what_another_process_cuts_off_in_a_run_is_computed_again(
    name: str, cache_root: Path, tmp_path: Path
) -> None:
    """The files were mapped into memory, and reading a page that is gone ended the process."""
    pairs = random_pairs(16)
    expected = losses_of(trainer(tmp_path / "a", pairs, num_train_epochs=3, cache_trunk=False))
    run = trainer(tmp_path / "b", pairs, num_train_epochs=3)

    class Cut(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                (directory,) = cache_root.iterdir()
                os.truncate(directory / name, 0)

    run.add_callback(Cut())
    assert layer_calls(run) == [1, 1, 1, 1, 0, 0]
    assert losses(run) == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_disk_that_fills_up_is_told(tmp_path: Path) -> None:
    pairs = random_pairs(2)
    cache, batch = opened(tmp_path, pairs, 2**30), pack_pairs(pairs)
    tokens = batch["input_ids"].shape[1]
    with open("/dev/full", "r+b", buffering=0) as full:
        cache._trunk._file = full
        with pytest.raises(UserError, match=r"cache_trunk: .* cannot be used \(No space left"):
            cache.write(batch, Kept(torch.zeros(tokens, 5), torch.zeros(tokens, 2)))


def changed(tmp_path: Path, what: str) -> QAdapterTrainer:
    """Return a run like `trainer(…, random_pairs(8))` but for one thing."""
    pairs = random_pairs(8)
    if what == "a token":
        pairs[3].chosen_ids[0] += 1
    if what == "an end":
        pairs[3] = TokenizedPair(
            *(getattr(pairs[3], n) for n in ("prompt_ids", "chosen_ids", "rejected_ids")),
            chosen_terminal=False,
            rejected_terminal=pairs[3].rejected_terminal,
            source="",
        )
    fields = {"bf16": True} if what == "precision" else {}
    run = trainer(tmp_path / what, pairs, cache_trunk=True, **fields)
    if what == "a weight":
        next(p for n, p in run.model.base_parameters() if "layers.0" in n).data[0, 0] += 1e-3
    return run


@pytest.mark.parametrize(
    "what", ["a token", "an end", "precision", "a weight", "the products", "the seed"]
)
def test_anything_that_matters_has_a_cache_of_its_own(
    what: str, cache_root: Path, tmp_path: Path
) -> None:
    trainer(tmp_path / "first", random_pairs(8), cache_trunk=True).train()
    run = changed(tmp_path, what)
    if what == "the products":  # of float32, as the setting tf32 makes them
        torch.set_float32_matmul_precision("high")
    if what == "the seed":  # which does not matter
        run.args.seed = 5
    try:
        run.train()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(list(cache_root.iterdir())) == (1 if what == "the seed" else 2)


def test_other_weights_of_the_same_shape_have_their_own(cache_root: Path, tmp_path: Path) -> None:
    pairs = random_pairs(8)
    run = trainer(tmp_path / "a", pairs, cache_trunk=True)
    run.train()
    other = trainer(tmp_path / "b", pairs, cache_trunk=True)
    other.model._base.load_state_dict(
        {n.replace(".base_layer", ""): p for n, p in tiny_base("llama", 9).state_dict().items()},
        strict=False,
    )
    other.train()
    assert len(list(cache_root.iterdir())) == 2


def test_a_limit_too_small_is_refused_or_told(
    cache_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"cache_trunk_gib": 1e-6, "num_train_epochs": 2}
    with pytest.raises(ConfigError, match=r"cache_trunk: these pairs need .* cache_trunk_gib"):
        trainer(tmp_path, random_pairs(8), cache_trunk=True, **fields).train()
    trainer(tmp_path, random_pairs(8), **fields).train()
    assert "training without a trunk cache" in caplog.text
    assert not cache_root.exists()


def test_what_cannot_use_a_cache_says_so(tmp_path: Path) -> None:
    run = trainer(tmp_path, random_pairs(8), objective="authors", cache_trunk=True)
    with pytest.raises(ConfigError, match="cannot start from a kept trunk"):
        run.train()


def test_a_base_that_packs_but_cannot_start_from_a_trunk_is_told(
    cache_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, random_pairs(8), num_train_epochs=2)
    run.model.__dict__["caches_trunk"] = False
    run.train()
    assert "this base cannot start from one" in caplog.text
    assert not cache_root.exists()


def opened(root: Path, pairs: list[TokenizedPair], limit: int, **key: Any) -> TrunkCache:
    return TrunkCache(root, key, pairs, LAYOUT, limit=limit)


def test_the_oldest_make_room(tmp_path: Path) -> None:
    pairs = random_pairs(30)
    size = opened(tmp_path, pairs, 2**30).size
    assert size == sum(f.stat().st_size for f in tmp_path.rglob("*.bin"))
    limit = 3 * size + 3000  # three of them with their key files
    for age, name in enumerate("abcd"):
        cache = opened(tmp_path, pairs, limit, name=name)
        os.utime(cache.directory, (age, age))
    opened(tmp_path, pairs, limit, name="b")  # used again, so the youngest
    kept = {opened(tmp_path, pairs, limit, name=n).directory for n in "cd"}
    opened(tmp_path, pairs, limit, name="e")
    left = set(tmp_path.iterdir())
    assert kept <= left
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) <= limit


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(ConfigError, match="GiB left"):
        opened(tmp_path, random_pairs(8), 2**30)
    assert not list(tmp_path.iterdir())


def test_what_makes_room_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(30)
    old = opened(tmp_path, pairs, 2**30, name="old")
    free = type("Usage", (), {"free": old.size // 2})()
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(ConfigError, match="GiB left"):
        opened(tmp_path, pairs, 3 * old.size, name="new")
    assert old.directory.exists()  # its room would not be needed by the limit
    opened(tmp_path, pairs, old.size + 3000, name="new")
    assert not old.directory.exists()


def test_a_cache_that_another_run_removes_while_it_is_opened_is_told(
    cache_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    touch = os.utime

    def late(path: Path) -> None:
        shutil.rmtree(path)
        touch(path)

    monkeypatch.setattr("os.utime", late)
    with pytest.raises(UserError, match="cannot be used"):
        opened(tmp_path / "a", random_pairs(8), 2**30)
    trainer(tmp_path / "b", random_pairs(8), num_train_epochs=2).train()
    assert "training without a trunk cache" in caplog.text


def test_a_cache_that_another_run_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    is_dir = Path.is_dir

    def late(path: Path) -> bool:
        found = is_dir(path)
        if found and path.name == "gone":
            path.rmdir()
        return found

    monkeypatch.setattr(Path, "is_dir", late)
    assert opened(tmp_path, random_pairs(8), 2**30).directory.is_dir()


@given(st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True), st.data())
def test_what_was_written_is_read_in_any_company(
    tmp_path_factory: pytest.TempPathFactory, written: list[int], data: st.DataObject
) -> None:
    pairs = random_pairs(12)
    cache = opened(tmp_path_factory.mktemp("cache"), pairs, 2**30)
    parts = {}
    for i in written:
        tokens = sum(pack_pairs([pairs[i]])["spans"][0, 1:].tolist())
        parts[i] = Kept(torch.randn(tokens, 5).bfloat16(), torch.randn(tokens, 2))
    kept = Kept(*(torch.cat(x) for x in zip(*parts.values(), strict=True)))
    cache.write(pack_pairs([pairs[i] for i in written]), kept)
    asked = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=12))
    found = cache.read(pack_pairs([pairs[i] for i in asked]))
    if not set(asked) <= set(written):
        assert found is None
        return
    assert found is not None
    assert torch.equal(found.trunk, torch.cat([parts[i].trunk for i in asked]))
    assert torch.equal(found.base, torch.cat([parts[i].base for i in asked]))
