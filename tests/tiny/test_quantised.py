"""A base held in four or eight bits: trained on, recorded, loaded again, told where it is not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from fakes import SIZES, write_base
from safetensors.torch import load_file
from test_engines import started, told

from qadapter import hub
from qadapter.cli import main
from qadapter.config import QConfig
from qadapter.errors import ModelError
from qadapter.model import QAdapterModel
from qadapter.policy import Policy

WORDS = (
    "--max_length 200 --learning_rate 0.01 --num_train_epochs 2 --bf16 false --trunk 0.5 "
    "--save_strategy no --disable_tqdm true"
)


@pytest.fixture(scope="module")
def held(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on a base in 4 bits by one process and by two, and in 8 bits."""
    pytest.importorskip("bitsandbytes")
    work = tmp_path_factory.mktemp("held")
    train = ["train", "--data", data, "--model", base, *WORDS.split()]
    ways = {
        "4bit": (1, "--quantize_base 4bit --per_device_train_batch_size 4"),
        "4bit, ddp": (
            2,
            "--quantize_base 4bit --per_device_train_batch_size 2 --gradient_checkpointing true",
        ),
        "8bit": (1, "--quantize_base 8bit --per_device_train_batch_size 4"),
    }
    jobs = [
        {"words": [*train, *own.split(), "--output", str(work / name)], "processes": processes}
        for name, (processes, own) in ways.items()
    ]
    for ended in started(jobs):
        assert not any(ended["codes"]), told(ended)
    return {name: work / name for name in ways}


def test_two_processes_learn_what_one_learns(held: dict[str, Path]) -> None:
    one, two = (load_file(held[n] / "adapter_model.safetensors") for n in ("4bit", "4bit, ddp"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_artefact_is_loaded_as_it_was_trained(
    held: dict[str, Path], bits: str, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert QConfig.load(held[bits]).base_quantization == bits
    policy = Policy.from_pretrained(held[bits])
    assert hub.quantization_of(policy.model.base) == bits
    ids = torch.arange(3, 12)[None]
    policy_logits = policy.model(input_ids=ids).logits
    assert not [r for r in caplog.records if r.name.startswith("qadapter")]
    with caplog.at_level(logging.WARNING, "qadapter"):
        full = Policy.from_pretrained(held[bits], check_base=False)
    assert f"held in {bits} and is served on one in full precision" in caplog.text
    assert hub.quantization_of(full.model.base) == ""
    other = full.model(input_ids=ids).logits
    assert 0 < float((policy_logits - other).abs().max()) < 0.5


def test_a_base_held_otherwise_is_told(
    held: dict[str, Path], base: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = hub.load_base(base, dtype=torch.float32, quantization="8bit")
    QAdapterModel.from_pretrained(held["4bit"], loaded)
    assert "held in 4bit and is served on one in 8bit" in caplog.text


def test_gradients_pass_through_four_bits_after_an_evaluation(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    wide = SIZES | {"hidden_size": 64, "intermediate_size": 128}  # a processor could repack it
    write_base(tmp_path, wide)
    loaded = hub.load_base(str(tmp_path), dtype=torch.float32, quantization="4bit")
    up = loaded.get_decoder().layers[0].mlp.up_proj
    weight = functional.dequantize_4bit(up.weight.data, up.weight.quant_state)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(up(states), states @ weight.T)
    states.requires_grad_()
    up(states).sum().backward()
    torch.testing.assert_close(states.grad, weight.sum(dim=0).expand(5, 64))


def test_exports_of_it_are_refused(
    held: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("policy", "merged", "peft"):
        assert main(["export", str(held["4bit"]), str(tmp_path / form), "--format", form]) == 2
        assert "the policy's base is held in 4bit" in capsys.readouterr().err
        assert not (tmp_path / form).exists()


def test_without_bitsandbytes_it_is_refused_by_name(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'qadapter\[quant\]'"):
        hub.load_base(base, dtype=torch.float32, quantization="4bit")


def test_other_bits_are_refused(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", data, "--model", base, "--output", str(tmp_path / "out")]
    assert main(["train", *words, "--quantize_base", "3bit"]) == 2
    assert "quantize_base: '3bit' is not one of 4bit, 8bit" in capsys.readouterr().err
