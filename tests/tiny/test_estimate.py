"""`qadapter train --dry-run` counts what the run then does, and leaves nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qadapter import held
from qadapter.cache import TrunkCache
from qadapter.cli import main
from qadapter.config import QAdapterConfig
from qadapter.errors import ConfigError
from qadapter.estimate import Clock, Estimate, estimate
from qadapter.packing import pack_pairs
from qadapter.train import prepare
from qadapter.trainer import QAdapterTrainer


@pytest.fixture(autouse=True)
def own_trunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for trunk caches in which no other test leaves one."""
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path / "own"))
    return tmp_path / "own" / "trunk"


def config_for(base: str, data: str, output: Path, **fields: Any) -> QAdapterConfig:
    fixed: dict[str, Any] = {"max_length": 200, "bf16": False, "trunk": 0.5, "num_train_epochs": 2}
    fixed |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "anchor_weight": 0}
    return QAdapterConfig(data=data, model=base, output_dir=str(output), **{**fixed, **fields})


def trainer_of(config: QAdapterConfig, cache: Path, *callbacks: Any) -> QAdapterTrainer:
    trainer = prepare(config).trainer(config, callbacks=list(callbacks))
    trainer.cache_root = cache
    return trainer


def counted(config: QAdapterConfig, cache: Path, epochs: float) -> float:
    """Return the operations of the matrix products of a whole run of so many epochs."""
    config.num_train_epochs = epochs
    trainer = trainer_of(config, cache)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.train()
    return float(counter.get_total_flops())


@pytest.fixture
def found(base: str, data: str, tmp_path: Path) -> Estimate:
    return estimate(config_for(base, data, tmp_path / "out"))


def test_pairs_and_tokens_are_the_runs_own(
    found: Estimate, base: str, data: str, tmp_path: Path
) -> None:
    run = prepare(config_for(base, data, tmp_path / "out"))
    prompts = sum(len(p.prompt_ids) for p in run.train_set)
    responses = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in run.train_set)
    assert (found.pairs, found.dropped) == (len(run.train_set), 0)
    assert (found.tokens, found.response_tokens) == (prompts + responses, responses)


def test_batches_and_cache_are_the_runs_own(
    found: Estimate, base: str, data: str, tmp_path: Path
) -> None:
    clock = Clock()
    trainer = trainer_of(config_for(base, data, tmp_path / "out"), tmp_path / "cache", clock)
    trainer.train()
    assert len(clock.seconds) == found.epochs * found.batches
    assert trainer.cache is not None
    written = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())
    # Beside the numbers the cache keeps a header.
    assert found.cache <= written <= found.cache + 4096 + found.cache // 10


def test_operations_are_those_that_the_run_then_does(
    found: Estimate, base: str, data: str, tmp_path: Path
) -> None:
    first = counted(config_for(base, data, tmp_path / "out"), tmp_path / "cache", 1)
    both = counted(config_for(base, data, tmp_path / "out"), tmp_path / "cache2", 2)
    assert found.later is not None
    # Scaled by tokens from a few steps, while attention grows with their square.
    assert found.first.flops == pytest.approx(first, rel=0.25)
    assert found.later.flops == pytest.approx(both - first, rel=0.25)
    assert found.later.flops < 0.9 * found.first.flops


@pytest.mark.parametrize("most", [2**30, 0])
def test_operations_with_anchors_are_those_that_the_run_then_does(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(held, "_MOST_KEPT", most)
    fields = {"anchor_weight": 10.0, "cache_trunk": False}
    found = estimate(config_for(base, data, tmp_path / "out", **fields))
    first = counted(config_for(base, data, tmp_path / "out", **fields), tmp_path / "cache", 1)
    both = counted(config_for(base, data, tmp_path / "out", **fields), tmp_path / "cache", 2)
    without = estimate(config_for(base, data, tmp_path / "out", cache_trunk=False))
    assert found.first.flops == pytest.approx(first, rel=0.1)
    assert found.seconds > 0
    again = estimate(config_for(base, data, tmp_path / "out", **fields, num_train_epochs=2))
    assert again.later is None
    assert 2 * again.first.flops == pytest.approx(both, rel=0.1)
    assert found.first.flops > 1.2 * without.first.flops


def test_more_epochs_take_more_time_by_the_later_ones(found: Estimate) -> None:
    assert found.later is not None
    assert found.seconds == pytest.approx(found.first.seconds + found.later.seconds)
    assert found.first.seconds > 0
    assert found.peak > 0


def test_a_limit_of_steps_overrules_the_epochs(base: str, data: str, tmp_path: Path) -> None:
    found = estimate(config_for(base, data, tmp_path / "out", max_steps=1))
    assert found.epochs == pytest.approx(1 / found.batches)
    assert found.seconds == pytest.approx(found.first.seconds / found.batches)
    assert (found.later, found.cache) == (None, 0)
    # Of three micro-batches, a step takes two and the next the one that is left.
    fields = {"max_steps": 2, "gradient_accumulation_steps": 2}
    assert estimate(config_for(base, data, tmp_path / "out", **fields)).epochs == 1


def test_one_epoch_has_no_later_ones(base: str, data: str, tmp_path: Path) -> None:
    found = estimate(config_for(base, data, tmp_path / "out", num_train_epochs=1))
    assert (found.later, found.cache) == (None, 0)
    assert found.seconds == found.first.seconds


def test_the_first_pass_reads_nothing_that_it_wrote_itself(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few micro-batches some are tried twice; read from the cache, they would look cheap."""
    found: list[bool] = []
    read = TrunkCache.read

    def noted(self: TrunkCache, batch: Any) -> Any:
        kept = read(self, batch)
        found.append(kept is not None)
        return kept

    monkeypatch.setattr(TrunkCache, "read", noted)
    assert estimate(config_for(base, data, tmp_path / "out")).batches == 3
    first, later = found[:7], found[7:14]
    assert (any(first), all(later)) == (False, True)


def test_a_cache_that_the_run_may_not_write_is_not_counted_on(
    base: str, data: str, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"per_device_train_batch_size": 1}
    whole = estimate(config_for(base, data, tmp_path / "out", **fields))
    # Enough for what is tried, and not for all.
    fields["cache_trunk_gib"] = 0.9 * whole.cache / 2**30
    found = estimate(config_for(base, data, tmp_path / "out", **fields))
    assert (found.later, found.cache) == (None, 0)
    with pytest.raises(ConfigError, match="cache_trunk_gib"):
        estimate(config_for(base, data, tmp_path / "out", cache_trunk=True, **fields))
    fields["num_train_epochs"] = 1
    with pytest.raises(ConfigError, match="cache_trunk_gib"):
        estimate(config_for(base, data, tmp_path / "out", cache_trunk=True, **fields))


def test_a_cache_that_the_disk_has_no_room_for_is_not_counted_on(
    base: str, data: str, tmp_path: Path, own_trunks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    own_trunks.mkdir(parents=True)

    def usage(path: Any) -> Any:
        mine = own_trunks in (Path(path), *Path(path).parents)
        return real(path)._replace(free=10) if mine else real(path)

    monkeypatch.setattr("shutil.disk_usage", usage)
    found = estimate(config_for(base, data, tmp_path / "out"))
    assert (found.later, found.cache) == (None, 0)
    with pytest.raises(ConfigError, match="GiB left"):
        estimate(config_for(base, data, tmp_path / "out", cache_trunk=True))


def test_a_cache_that_lies_there_is_counted_on(
    base: str, data: str, tmp_path: Path, own_trunks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(base, data, tmp_path / "out")
    run = trainer_of(config, own_trunks)
    run.train()
    again = counted(config, own_trunks, 2)
    found = estimate(config_for(base, data, tmp_path / "out"))
    assert found.kept == 1
    assert found.later is not None
    assert found.first.flops + found.later.flops == pytest.approx(again, rel=0.25)
    assert found.first == found.later
    words = f"train --data {data} --model {base} --output {tmp_path / 'out'} --max_length 200"
    options = "--bf16 false --trunk 0.5 --num_train_epochs 2 --dry-run"
    assert main([*words.split(), *options.split()]) == 0
    assert "GiB, 100% of it on disk already" in capsys.readouterr().out

    pairs = list(cast(Any, run.train_dataset))
    assert run.cache is not None
    run.cache.forget(cast(Any, pack_pairs(pairs[:5])))
    part = estimate(config_for(base, data, tmp_path / "out"))
    gone = sum(p.tokens for p in pairs[:5]) / sum(p.tokens for p in pairs)
    assert part.kept == pytest.approx(1 - gone)
    assert part.later is not None
    assert part.later.flops < part.first.flops < counted(config, tmp_path / "fresh", 1)
    other = estimate(config_for(base, data, tmp_path / "out", trunk=0.25))
    assert other.kept == 0


def test_nothing_is_written(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = f"train --data {data} --model {base} --output {out} --max_length 200 --dry-run"
    assert main(words.split()) == 0
    assert not out.exists()
    told = capsys.readouterr().out
    assert "12 (0 dropped)" in told
    assert "no run was started" in told


def test_bad_data_is_told_as_in_a_run(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b"}\n')
    words = f"train --data {data} --model {base} --output {tmp_path / 'out'} --dry-run"
    assert main(words.split()) == 2
    assert f"{data}:1" in capsys.readouterr().err


def test_several_processes_are_refused_before_anything_loads(
    base: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each told figures of its own rows as the run's, and DeepSpeed takes one trainer a process."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    words = f"train --data {data} --model {base} --output {tmp_path / 'out'} --dry-run"
    assert main(words.split()) == 2
    told = "--dry-run: tries a run's steps in one process and not on fsdp2; leave out --launch."
    assert capsys.readouterr().err == f"qadapter: {told}\n"
    assert not (tmp_path / "out").exists()
