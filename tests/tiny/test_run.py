"""Runs of `qadapter train` that end early, break, or use what transformers' Trainer brings."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qadapter import files, hub
from qadapter.checkpoints import newest_sound
from qadapter.cli import main
from qadapter.config import QAdapterConfig
from qadapter.model import QAdapterModel
from qadapter.train import prepare
from qadapter.trainer import QAdapterTrainer


def train(base: str, data: str, output: Path, *words: str) -> int:
    fixed = "--max_length 200 --learning_rate 0.01 --disable_tqdm true --bf16 false --trunk 0.5"
    fixed += " --anchor_weight 0"
    options = ["--data", data, "--model", base, "--output", str(output), *fixed.split()]
    return main(["train", *options, *" ".join(words).split()])


def swapped(data: str, directory: Path) -> str:
    """Write the pairs with chosen and rejected exchanged."""
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    rows = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    path = directory / "swapped.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence on stderr."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("qadapter: ")
    return last


def test_early_stopping_goes_back_to_the_best_checkpoint(
    base: str, data: str, tmp_path: Path
) -> None:
    # What is learned from the pairs is wrong for the swapped ones, more so every epoch.
    watch = "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end true"
    metric = "--metric_for_best_model rewards/margins --greater_is_better true"
    watch += " --alpha_0 0.5 --alpha_tilde 0.5"
    options = (watch, metric, "--num_train_epochs 6 --early_stopping_patience 2 --eval_data")
    assert train(base, data, tmp_path / "out", *options, swapped(data, tmp_path)) == 0
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert len(checkpoints) == 3  # the first, and two that were not better
    margins = json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
    margins = [row["eval_rewards/margins"] for row in margins if "eval_rewards/margins" in row]
    assert margins == sorted(margins, reverse=True)
    best, kept, last = (
        load_file(d / "adapter_model.safetensors")
        for d in (checkpoints[0], tmp_path / "out", checkpoints[-1])
    )
    assert all(torch.equal(best[name], kept[name]) for name in best)
    assert any(not torch.equal(last[name], kept[name]) for name in kept)
    # A run that is cut after one that was not better waits for one more, and not for two.
    shutil.rmtree(checkpoints[-1])
    words = (*options, swapped(data, tmp_path), "--resume_from_checkpoint true")
    assert train(base, data, tmp_path / "out", *words) == 0
    assert set((tmp_path / "out").glob("checkpoint-*")) == set(checkpoints)


def test_a_run_tells_of_shared_prompts_swapped_labels_and_a_hot_start(
    base: str, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("--num_train_epochs 3 --save_strategy no --alpha_0 0.01 --alpha_tilde 1.0",)
    assert train(base, data, tmp_path / "out", *words, "--eval_data", swapped(data, tmp_path)) == 0
    warned = [r.getMessage() for r in caplog.records if r.name == "qadapter.train"]
    shared, hot, wrong = (w for w in warned if "trunk cache" not in w)
    assert "12 of 12 pairs have a prompt that is also in data" in shared
    assert "begins as the base at temperature 100," in hot
    assert "clearly below one half: chosen and rejected may be swapped" in wrong


def test_several_gpus_in_one_process_are_refused(
    base: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(QAdapterConfig, "n_gpu", property(lambda _: 2))
    assert train(base, data, tmp_path / "out") == 2
    assert "2 GPUs are seen by one process" in told(capsys)
    assert not (tmp_path / "out").exists()


def test_early_stopping_without_evaluation_is_refused(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, data, tmp_path / "out", "--early_stopping_patience 2") == 2
    assert "--eval_data F --eval_strategy epoch" in told(capsys)
    assert not (tmp_path / "out").exists()


def test_tensorboard_sees_the_metrics(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    options = "--report_to tensorboard --logging_steps 1 --save_strategy no"
    assert train(base, data, tmp_path / "out", options) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/rewards/accuracies", "train/rewards/margins"} <= tags


@pytest.mark.parametrize(
    ("name", "message"), [("wand", "'wand' is no tracker"), ("swanlab", "pip install swanlab")]
)
def test_a_tracker_that_is_not_there_is_told_first(
    name: str,
    message: str,
    base: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(base, data, tmp_path / "out", "--report_to", name) == 2
    assert message in told(capsys)
    assert not (tmp_path / "out").exists()


def test_a_run_in_bfloat16_learns_and_keeps_its_adapter_in_float32(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--bf16 true --num_train_epochs 6 --save_strategy no"
    assert train(base, data, tmp_path / "out", options) == 0
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    capsys.readouterr()
    assert main(["score", str(tmp_path / "out"), data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.9


def test_the_loss_curve_in_bfloat16_is_that_of_float32(
    base: str, data: str, tmp_path: Path
) -> None:
    def losses(**settings: Any) -> torch.Tensor:
        config = QAdapterConfig(
            data=data,
            model=base,
            output_dir=str(tmp_path / "out"),
            max_length=200,
            learning_rate=0.01,
            num_train_epochs=6,
            logging_steps=1,
            save_strategy="no",
            cache_trunk=False,
            disable_tqdm=True,
            **settings,
        )
        trainer = prepare(config).trainer(config)
        trainer.train()
        return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])

    exact, half = losses(bf16=False), losses(bf16=True)
    other = losses(bf16=False, seed=43)
    assert len(exact) == 18
    assert exact[-3:].mean() < exact[:3].mean() / 2
    # Another seed is the noise: rounding must stay well under it, and must be there to be seen.
    gap = (half - exact).abs().mean()
    assert 0 < gap < (other - exact).abs().mean() / 3


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--learning_rate 1e25 --warmup_steps 0 --max_grad_norm 0 --save_steps 1"
    code = train(
        base, data, tmp_path / "out", options, "--save_strategy steps --num_train_epochs 9"
    )
    assert code == 2
    assert "learning_rate" in told(capsys)
    checkpoints = list((tmp_path / "out").glob("checkpoint-*/adapter_model.safetensors"))
    assert checkpoints
    for path in checkpoints:
        assert all(bool(t.isfinite().all()) for t in load_file(path).values())
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(adapter: str, tmp_path: Path) -> None:
    from qadapter.errors import TrainingError

    model = QAdapterModel.from_pretrained(adapter)
    next(iter(model.adapter_parameters().values())).data[0, 0] = float("inf")
    with pytest.raises(TrainingError, match="no longer finite"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def limited(size: int, words: list[str]) -> int:
    """Run a command while no file may grow past `size` bytes, which is what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        return main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_half_written(
    base: str, data: str, adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("Say 1\n")
    out = tmp_path / "run"
    train_words = ["--data", data, "--model", base, "--output", str(out), "--bf16", "false"]
    train_words += ["--max_length", "200", "--save_strategy", "no", "--disable_tqdm", "true"]
    prompts = str(tmp_path / "p.txt")
    # First the pairs' own file does not fit, then only the adapter does not.
    commands: list[tuple[str, int, list[str]]] = [
        ("run", 40, ["train", *train_words]),
        ("run", 30_000, ["train", *train_words]),
        ("a.jsonl", 40, ["generate", adapter, "--prompts", prompts, "--output"]),
        ("a.html", 40, ["explain", adapter, data, "--output"]),
    ]
    for name, size, words in commands:
        words = words if name == "run" else [*words, str(tmp_path / name)]
        assert limited(size, words) == 2, name
        assert "cannot be written" in told(capsys)
        files = [p for p in (tmp_path / name).rglob("*") if p.is_file()]
        assert not (tmp_path / name).is_file()
        assert files == []
    assert {p.name for p in tmp_path.iterdir()} <= {"p.txt", "run"}  # no temporary files either


def test_check_cuts_responses_where_training_does(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Gemma's way: the end of a turn is in the generation settings and is not the tokenizer's eos.
    other = tmp_path / "base"
    shutil.copytree(base, other)
    tokenizer = hub.load_tokenizer(base)
    settings = json.loads((other / "generation_config.json").read_text())
    newline = tokenizer("\n")["input_ids"][0]
    (other / "generation_config.json").write_text(
        json.dumps({**settings, "eos_token_id": [1, newline]})
    )
    assert hub.end_of_turn_ids(tokenizer, hub.load_generation_config(str(other))) == {1, newline}
    (other / "generation_config.json").unlink()
    assert hub.end_of_turn_ids(tokenizer, hub.load_generation_config(str(other))) == {1}

    def chosen_lengths(model: str) -> list[int]:
        assert main(["check", data, "--model", model, "--max-length", "200"]) == 0
        (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("  chosen")]
        least, *_, most = line.split()[1:]  # percentiles between are rounded
        return [int(least), int(most)]

    (other / "generation_config.json").write_text(
        json.dumps({**settings, "eos_token_id": [1, newline]})
    )
    # ChatML closes a turn with <|im_end|> and a newline, which now ends the turn as well.
    assert chosen_lengths(str(other)) == [n + 1 for n in chosen_lengths(base)]


def test_the_authors_preset_is_what_it_says(base: str, data: str, tmp_path: Path) -> None:
    preset = Path(__file__).parents[2] / "examples" / "authors.yaml"
    options = ("--config", str(preset), "--save_strategy no")
    assert train(base, data, tmp_path / "out", *options) == 0
    saved = json.loads((tmp_path / "out" / "qadapter_config.json").read_text())
    assert (saved["objective"], saved["parameterization"]) == ("authors", "raw")
    assert (saved["alpha_0"], saved["alpha_tilde"]) == (0.01, 1.0)


def test_code_that_comes_with_a_base_runs_only_when_asked(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "base"
    shutil.copytree(base, other)
    config: dict[str, Any] = json.loads((other / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (other / "config.json").write_text(json.dumps(config))
    (other / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert train(str(other), data, tmp_path / "out", "--save_strategy no") == 2
    assert "--trust-remote-code" in told(capsys)
    options = "--save_strategy no --trust_remote_code true"
    assert train(str(other), data, tmp_path / "out", options) == 0
    assert main(["score", str(tmp_path / "out"), data]) == 2
    assert main(["score", str(tmp_path / "out"), data, "--trust-remote-code"]) == 0


# --- Going on from what another run left ----------------------------------------------------------


@pytest.fixture(scope="module")
def cut(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that was lost after its third."""
    out = tmp_path_factory.mktemp("cut") / "out"
    assert train(base, data, out, "--save_strategy steps --save_steps 3 --num_train_epochs 2") == 0
    shutil.rmtree(out / "checkpoint-6")
    (out / "adapter_model.safetensors").unlink()
    return out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data SWAPPED", "of a run with pairs (data, max_length, truncate) "),
        ("--max_pairs 8", "of a run with pairs (data, max_length, truncate) "),
        ("--beta 0.5", "of a run with beta 0.1 and not 0.5;"),
        ("--seed 7", "of a run with seed 42 and not 7;"),
        ("--learning_rate 0.02", "of a run with learning_rate 0.01 and not 0.02;"),
        ("--per_device_train_batch_size 2", "of a run with pairs of a step 4 and not 2;"),
        ("--lora_alpha 8 --lora_dropout 0.1", "lora_alpha 32 and not 8, lora_dropout 0.0 and"),
        ("--anchor_data TEXT --anchor_weight 1", "of a run with anchors "),
        ("--max_steps 2", "3 steps are done and the run has only 2;"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    words: str,
    message: str,
    cut: Path,
    base: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text("a line of text\n")
    words = words.replace("SWAPPED", swapped(data, tmp_path))
    words = words.replace("TEXT", str(tmp_path / "text.txt"))
    fixed = "--num_train_epochs 2 --resume_from_checkpoint"
    out = tmp_path / "out"
    assert train(base, data, out, fixed, str(cut / "checkpoint-3"), words) == 2
    assert message in told(capsys)
    assert not out.exists()


def test_pairs_in_another_place_and_other_micro_batches_are_the_same_run(
    cut: Path, base: str, data: str, tmp_path: Path
) -> None:
    other = shutil.copy(data, tmp_path / "moved.jsonl")
    words = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --num_train_epochs 3"
    resume = ("--resume_from_checkpoint", str(cut / "checkpoint-3"))
    assert train(base, str(other), tmp_path / "out", words, *resume) == 0


def test_a_run_does_not_begin_among_the_checkpoints_of_another(
    cut: Path, base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(cut, tmp_path / "out"))
    words = ("--save_strategy steps --save_steps 1 --max_steps 2 --save_total_limit 1",)
    assert train(base, data, out, *words) == 2
    assert f"{out / 'checkpoint-3'} is of an earlier run" in told(capsys)
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-3"]
    (out / "checkpoint-3" / "manifest.json").unlink()  # cut while it was written: no loss
    assert train(base, data, out, *words) == 0
    # The older of what is left is the new run's last one, and it stays.
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_two_runs_do_not_write_to_one_directory(
    base: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(files, "_PAUSE", 0)
    with files.alone_in(tmp_path / "out"):
        assert train(base, data, tmp_path / "out", "--save_strategy no") == 2
        assert f"{tmp_path / 'out'}: another run writes to it" in told(capsys)
        assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "out").exists()
    assert train(base, data, tmp_path / "out", "--save_strategy no") == 0


def test_a_checkpoint_without_its_optimizer_is_refused(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--save_strategy steps --save_steps 2 --save_only_model true"
    assert train(base, data, tmp_path / "out", words) == 0
    assert train(base, data, tmp_path / "out", words, "--resume_from_checkpoint true") == 2
    assert "holds no state of the optimizer" in told(capsys)


# --- Which checkpoints stay -----------------------------------------------------------------------

BEST = (
    "--save_strategy steps --save_steps 1 --eval_strategy steps --eval_steps 1 --max_steps 6",
    "--warmup_steps 0",
    "--load_best_model_at_end true --metric_for_best_model rewards/margins",
    "--greater_is_better true --save_total_limit 1 --eval_data",
)
"""With the pairs swapped, no checkpoint is better than the first."""


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SIGTERM come in that step."""
    loss = QAdapterTrainer.compute_loss

    def hit(self: QAdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(QAdapterTrainer, "compute_loss", hit)


def test_a_stopped_run_keeps_the_checkpoint_to_go_on_from_beside_the_best(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", (*BEST, swapped(data, tmp_path))
    with monkeypatch.context() as patch:
        stopped_at(4, patch)
        assert train(base, data, out, *words) == 0
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    # Named otherwise it is the same directory, and the best one in it still is.
    monkeypatch.chdir(tmp_path)
    assert train(base, data, Path("out"), *words, "--resume_from_checkpoint true") == 0
    kept, best = (load_file(d / "adapter_model.safetensors") for d in (out, out / "checkpoint-1"))
    assert all(torch.equal(best[name], kept[name]) for name in best)


def test_a_best_checkpoint_that_was_damaged_since_is_not_gone_back_to(
    base: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, words, best = tmp_path / "out", (*BEST, swapped(data, tmp_path)), QAdapterTrainer._best

    def damaged(self: QAdapterTrainer) -> Path | None:
        found = best(self)
        if found is not None and self.state.global_step == 6:
            weights = found / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        return found

    monkeypatch.setattr(QAdapterTrainer, "_best", damaged)
    assert train(base, data, out, *words) == 2
    assert "checkpoint-1: adapter_model.safetensors is damaged" in told(capsys)
    assert not (out / "adapter_model.safetensors").exists()
    last = "--resume_from_checkpoint true --load_best_model_at_end false"
    assert train(base, data, out, *words, last) == 0


def test_where_no_number_limits_them_all_checkpoints_stay(
    base: str, data: str, tmp_path: Path
) -> None:
    words = "--save_strategy steps --save_steps 1 --max_steps 3 --save_total_limit -1"
    assert train(base, data, tmp_path / "out", words) == 0
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 3


def test_a_damaged_newer_checkpoint_does_not_push_out_the_sound_one(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", "--save_strategy steps --save_steps 2 --num_train_epochs 2"
    assert train(base, data, out, words) == 0
    (out / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    resume = f"{words} --save_total_limit 1 --resume_from_checkpoint true"
    with monkeypatch.context() as patch:
        stopped_at(5, patch)
        assert train(base, data, out, resume) == 0
    assert newest_sound(out)[0] == out / "checkpoint-5"
