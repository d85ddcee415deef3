"""Two processes give what one gives, on every engine of docs/scale.md; the rest is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qadapter import engines, hub, ranks
from qadapter.cli import main
from qadapter.config import QAdapterConfig
from qadapter.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHARED = (
    "--max_length 200 --learning_rate 0.01 --num_train_epochs 2 --bf16 false --trunk 0.5 "
    "--logging_steps 1 --disable_tqdm true --save_steps 3 --per_device_eval_batch_size 5 "
    "--anchor_weight 0"
)
FLEET = {
    "one": ("", 1, "--per_device_train_batch_size 4 --cache_trunk false"),
    "ddp": ("ddp", 2, "--per_device_train_batch_size 2 --cache_trunk true"),
    "fsdp": (
        "fsdp",
        2,
        "--per_device_train_batch_size 2 --cache_trunk true --gradient_checkpointing true",
    ),
}
HALF = "--bf16 true --max_steps 3 --warmup_steps 0 --save_strategy no --cache_trunk false"
FLEET |= {
    f"{name}, bf16": (engine, processes, f"--per_device_train_batch_size {rows} {HALF}")
    for name, engine, processes, rows in [
        ("one", "", 1, 4),
        ("ddp", "ddp", 2, 2),
        ("fsdp", "fsdp", 2, 2),
    ]
}
"""Engine, processes and words; both of two see the global batches of the one."""


def started(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    program = Path(__file__).with_name("fleet.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def told(ended: dict[str, Any]) -> str:
    """Return all that a job said, which pytest would cut."""
    return "\n".join(
        f"{name}: {what if name == 'codes' else what[-4000:]}" for name, what in ended.items()
    )


@pytest.fixture(scope="module")
def runs(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each engine's run, and for two processes the same run cut in the middle and gone on with."""
    work = tmp_path_factory.mktemp("engines")
    words = ["train", "--data", data, "--eval_data", data, "--model", base, *SHARED.split()]
    # Of unlike lengths, so that means of means would differ.
    (work / "anchors.txt").write_text("".join("some text\n" + "text " * i for i in range(9)))
    words += ["--anchor_data", str(work / "anchors.txt"), "--anchor_weight", "2"]

    def job(name: str, out: Path, *more: str) -> dict[str, Any]:
        engine, processes, own = FLEET[name]
        given = [*words, *own.split(), "--output", str(out), *more]
        return {"words": given, "processes": processes, "engine": engine}

    found = {name: work / name for name in FLEET}
    for ended in started([job(name, out) for name, out in found.items()]):
        assert not any(ended["codes"]), told(ended)
    again = []
    for name in ("ddp", "fsdp"):
        cut = work / f"{name}, resumed"
        shutil.copytree(found[name] / "checkpoint-3", cut / "checkpoint-3")
        found[cut.name] = cut
        again.append(job(name, cut, "--resume_from_checkpoint", "true"))
    for ended in started(again):
        assert not any(ended["codes"]), told(ended)
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run / "adapter_model.safetensors")
    return found


def logged(run: Path) -> list[dict[str, float]]:
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if "loss" in line]


def figures(run: Path) -> dict[str, float]:
    rows = re.findall(r"\| (\w\S+) \| ([\d.e+-]+) \|", (run / "README.md").read_text())
    return {name: float(value) for name, value in rows}


def close(one: Path, other: Path, limit: float) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, atol=limit, rtol=0.0)


@pytest.mark.fleet
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(runs: dict[str, Path], engine: str) -> None:
    # Adam divides by the gradient's own size, so rounding of near-zero gradients is magnified.
    close(runs["one"], runs[engine], 1e-4)
    whole = max(float(t.abs().max()) for t in weights(runs["one"]).values())
    assert whole > 0.1  # so that the limit above is small beside what was learned


@pytest.mark.fleet
def test_two_processes_are_held_to_what_the_first_lets_the_base_write(
    base: str, data: str, tmp_path: Path
) -> None:
    words = ["train", "--data", data, "--model", base, *SHARED.split(), "--save_strategy", "no"]
    jobs = []
    for name, processes, rows in (("ddp", 2, 2), ("", 1, 4)):
        out, cache = tmp_path / f"out{processes}", tmp_path / f"cache{processes}"
        own = ["--per_device_train_batch_size", str(rows), "--anchor_weight", "2"]
        job = {"words": [*words, *own, "--output", str(out)], "processes": processes}
        jobs.append(job | {"engine": name, "env": {"QADAPTER_CACHE": str(cache)}})
    for ended in started(jobs):
        assert not any(ended["codes"]), told(ended)
    assert len(list((tmp_path / "cache2" / "anchors").iterdir())) == 1
    close(tmp_path / "out1", tmp_path / "out2", 1e-4)


@pytest.mark.fleet
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_log_is_that_of_all_processes(runs: dict[str, Path], engine: str) -> None:
    ones, twos = logged(runs["one"]), logged(runs[engine])
    assert len(ones) == len(twos) == 6
    for one, two in zip(ones, twos, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/token_rms"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


@pytest.mark.fleet
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_in_bfloat16_they_learn_alike_within_its_rounding(
    runs: dict[str, Path], engine: str
) -> None:
    """Rows of other lengths round otherwise, and Adam's first steps take signs of gradients."""
    one, two = (figures(runs[f"{name}, bf16"]) for name in ("one", engine))
    assert one["train_loss"] < 0.6  # it fell from log 2
    for name in ("train_loss", "eval_loss", "eval_rewards/margins"):
        assert two[name] == pytest.approx(one[name], rel=0.05, abs=0.005), name


@pytest.mark.fleet
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_evaluation_counts_each_pair_once(runs: dict[str, Path], engine: str) -> None:
    """Twelve pairs in batches of five over two processes: the sampler repeats eight of them."""
    one, two = figures(runs["one"]), figures(runs[engine])
    names = {name for name in one if re.match("eval_(loss|kl|rewards)", name)}
    assert {"eval_loss", "eval_kl", "eval_rewards/margins"} <= names
    for name in names:
        assert two[name] == pytest.approx(one[name], rel=2e-3), name


@pytest.mark.fleet
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_cut_run_goes_on_to_the_same_adapter(runs: dict[str, Path], engine: str) -> None:
    close(runs[engine], runs[f"{engine}, resumed"], 0.0)


@pytest.mark.fleet
def test_one_process_goes_on_from_two_where_their_checkpoint_is_whole(
    runs: dict[str, Path],
    base: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "--data", data, "--eval_data", data, "--model", base, *SHARED.split()]
    words += ["--anchor_data", str(runs["one"].parent / "anchors.txt"), "--anchor_weight", "2"]
    words += [*FLEET["one"][2].split(), "--output", str(tmp_path / "out")]
    again = [*words, "--resume_from_checkpoint"]
    assert main([*again, str(runs["fsdp"] / "checkpoint-3")]) == 2
    assert "is of a run with sharded True and not False" in capsys.readouterr().err
    assert main([*again, str(runs["ddp"] / "checkpoint-3")]) == 0
    close(runs["one"], tmp_path / "out", 1e-4)


@pytest.mark.fleet
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_checkpoint_holds_the_adapter_alone(
    runs: dict[str, Path], engine: str, base: str
) -> None:
    checkpoint = runs[engine] / "checkpoint-6"
    assert weights(checkpoint).keys() == weights(runs["one"]).keys()
    size = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
    adapter = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert size < 5 * adapter + 100_000
    assert not list(checkpoint.rglob("*.distcp"))


def test_another_engine_than_the_table_has_is_refused(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)  # what other tests' launches left

    def refused(words: str, **env: str) -> str:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        config = QAdapterConfig(
            data=data, output_dir=str(tmp_path), **dict(w.split("=") for w in words.split())
        )
        with pytest.raises(ConfigError) as told:
            engines.check(config)
        return str(told.value)

    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    assert refused("", **fsdp).startswith("fsdp_version: is 1 and must be 2")
    assert refused("", FSDP_VERSION="2").startswith("fsdp_cpu_ram_efficient_loading: is missing")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    sharded = refused("", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")
    assert sharded.startswith("fsdp_state_dict_type: is SHARDED_STATE_DICT and must be FULL")
    mixed = refused("", ACCELERATE_MIXED_PRECISION="fp16")
    assert mixed.startswith("mixed_precision: the launcher's file says fp16 and the run ")


def test_every_refusal_of_the_table_is_made_before_anything_loads(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was asked for")

    monkeypatch.setattr(hub, "load_base", loaded)
    monkeypatch.setattr(hub, "load_tokenizer", loaded)
    asked = {
        "float16": ["--bf16", "false"],
        "forgetting budget": ["--max_kl", "0.1", "--budget_text", data],
        "quantised base": ["--quantize_base", "4bit"],
        "float32": ["--bf16", "false"],
        "bfloat16": ["--bf16", "true"],
        "gradient checkpointing": ["--gradient_checkpointing", "true"],
        "trunk cache": ["--cache_trunk", "true"],
    }
    for engine, row in engines.SUPPORT.items():
        for option, cell in row.items():
            if cell in (engines.TESTED, engines.UNTRIED):
                continue
            words = ["train", "--data", data, "--output", str(tmp_path / "out"), *asked[option]]
            with monkeypatch.context() as patch:
                patch.setattr(engines, "engine", lambda _, name=engine: name)
                if option == "float16":  # which transformers allows on accelerators alone
                    patch.setattr(engines, "_options", lambda _: ["float16"])
                assert main(words) == 2, (engine, option)
    assert not (tmp_path / "out").exists()


def test_the_table_of_the_documents_is_the_one_that_refuses() -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    table = text.partition("## What goes with what\n\n")[2].partition("\n\n")[0]
    head, _, *body = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    told = {
        engine: {row[0]: row[column] for row in body}
        for column, engine in enumerate(head)
        if column
    }
    known = (engines.TESTED, engines.UNTRIED)
    coded = {
        engine: {option: cell if cell in known else "refused" for option, cell in row.items()}
        for engine, row in engines.SUPPORT.items()
    }
    assert told == coded
    for cell in {c for row in engines.SUPPORT.values() for c in row.values()} - set(known):
        assert cell in " ".join(text.split()), cell


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_accelerate_takes_the_shipped_files(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(file))  # which raises on keys that it does not know
    fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert config.distributed_type.value == fields["distributed_type"]
    known = vars(launch_command_parser().parse_args(["none"]))
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(fields.get(section, {})) <= set(known)


@pytest.mark.fleet
@pytest.mark.parametrize("processes", ["2", "1"])
def test_a_refusal_is_one_sentence_from_all_processes(
    processes: str, base: str, data: str, tmp_path: Path
) -> None:
    """The launcher itself, its exit code, and that only one process tells."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    words = ["--data", str(bad), "--model", base, "--output", str(tmp_path / "out")]
    launch = ["--launch", str(ROOT / "configs" / "ddp.yaml"), "--processes", processes]
    done = subprocess.run(
        [sys.executable, "-m", "qadapter.cli", "train", *launch, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"qadapter: {bad}:1: ")
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_signals_to_the_launcher_are_no_traceback(
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import psutil
    from torch.distributed.elastic.multiprocessing.api import SignalException

    words = ["train", "--data", data, "--output", str(tmp_path / "out")]
    words += ["--launch", str(ROOT / "configs" / "ddp.yaml")]

    def interrupted(_: Any) -> None:
        raise SignalException("got signal", sigval=signal.SIGINT)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", interrupted)
    assert main(words) == 130
    assert capsys.readouterr().err == "qadapter: stopped\n"
    monkeypatch.setenv(ranks.LAUNCHED, "1")
    monkeypatch.setattr("qadapter.train.run_training", raising(KeyboardInterrupt()))
    assert main(words) == 130
    assert capsys.readouterr().err == ""
    monkeypatch.delenv(ranks.LAUNCHED)

    # A process that ends while SIGTERM is handed on is no reason not to hand it to the next.
    heard: list[int] = []
    gone = SimpleNamespace(send_signal=raising(psutil.NoSuchProcess(1)))
    there = SimpleNamespace(send_signal=heard.append)
    monkeypatch.setattr(psutil.Process, "children", lambda _: [gone, there])
    terminated = "accelerate.commands.launch.launch_command"
    monkeypatch.setattr(terminated, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert main(words) == 0
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize("port", ["1", None])
def test_a_process_whose_store_is_gone_tells_what_it_knows(
    port: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "_PATIENCE", timedelta(milliseconds=50))
    monkeypatch.setattr("qadapter.cli.training.train", raising(ConfigError("beta: is bad.")))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "qadapter: beta: is bad.\n"
    # A connection that broke is the end of another process, which has told.
    monkeypatch.setattr("qadapter.cli.training.train", raising(RuntimeError("closed by peer")))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == ""


def raising(error: BaseException) -> Any:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    return fails


@pytest.mark.fleet
def test_a_launch_file_that_accelerate_does_not_take_is_told(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", data, "--output", str(tmp_path / "out"), "--launch"]
    assert main([*words, str(tmp_path / "none.yaml")]) == 2
    assert "name one such as configs/ddp.yaml" in capsys.readouterr().err
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("distributed_type: FSDP\nno_such_key: 1\n")
    assert main([*words, str(wrong)]) == 2
    assert f"{wrong}: accelerate does not take it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("offload_optimizer_device", "", "cpu"),
        ("gradient_clipping", "gradient_clipping", 0.5),
        ("gradient_clipping", "gradient_clipping", 0.0),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", 3),
        ("optimizer", "optimizer", {"type": "Lamb"}),
        ("zero_quantized_weights", "zero_optimization", {"zero_quantized_weights": True}),
    ],
)
def test_a_deepspeed_file_that_would_change_the_run_is_refused(
    word: str, field: str, value: Any, tmp_path: Path
) -> None:
    def checked(device: str, own: dict[str, Any]) -> str:
        config = QAdapterConfig(output_dir=str(tmp_path), bf16=False)
        auto = {"gradient_clipping": "auto", "gradient_accumulation_steps": "auto"}
        config.deepspeed_plugin = SimpleNamespace(
            zero_stage=2,
            offload_optimizer_device=device,
            offload_param_device="none",
            deepspeed_config=auto | own,
        )
        return engines.check(config)

    assert checked("none", {}) == "zero2"
    with pytest.raises(ConfigError, match=f"^{word}: "):
        checked("none" if field else value, {field: value} if field else {})
