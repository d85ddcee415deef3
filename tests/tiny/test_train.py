"""Training on tiny random models: exact accumulation, exact resume, what must be refused."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import FAMILIES, UNUSUAL, VOCAB, tiny_base
from torch.utils._python_dispatch import TorchDispatchMode

from qadapter import attention, functional, fused
from qadapter.config import QAdapterConfig, QConfig, bf16_supported
from qadapter.data import TokenizedPair
from qadapter.errors import ConfigError, ModelError, TrainingError
from qadapter.fused import causal_attention
from qadapter.model import QAdapterModel
from qadapter.objective import batch_streams, packable, pair_loss
from qadapter.packing import PairCollator, pack_pairs
from qadapter.trainer import QAdapterTrainer


def random_pairs(n: int, seed: int = 0) -> list[TokenizedPair]:
    """Pairs of odd lengths whose chosen responses favour low token ids."""
    draw = random.Random(seed)

    def response(low: int, high: int) -> list[int]:
        return [draw.randrange(low, high) for _ in range(draw.randrange(1, 9))] + [2]

    return [
        TokenizedPair(
            prompt_ids=[draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 7))],
            chosen_ids=response(3, 40),
            rejected_ids=response(50, VOCAB),
            chosen_terminal=True,
            rejected_terminal=draw.random() < 0.7,
            source=f"memory:{i}",
        )
        for i in range(n)
    ]


def untrained(
    family: str = "llama", seed: int = 3, dtype: torch.dtype = torch.float32, **fields: Any
) -> QAdapterModel:
    base = tiny_base(family).to(dtype)
    torch.manual_seed(seed)
    q_config = QConfig(**{"alpha_0": 0.5, "alpha_tilde": 0.5, "beta": 0.1, **fields})
    return QAdapterModel.create(base, q_config, lora_r=4, trunk=0.5)


def settings(directory: Path, **fields: Any) -> QAdapterConfig:
    return QAdapterConfig(
        **{
            "output_dir": str(directory),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "num_train_epochs": 1,
            "beta": 0.1,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "warmup_steps": 0,
            "seed": 1,
            **fields,
        }
    )


def trainer(directory: Path, pairs: list[TokenizedPair], **fields: Any) -> QAdapterTrainer:
    family, extra = fields.pop("family", "llama"), {}
    for name in ("anchors", "eval_dataset"):
        if name in fields:
            extra[name] = fields.pop(name)
    method = {k: fields[k] for k in ("gamma", "beta", "objective") if k in fields}
    return QAdapterTrainer(
        untrained(family, **method), settings(directory, **fields), train_dataset=pairs, **extra
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.adapter_parameters().items()}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=atol), name


def gradients(model: QAdapterModel, batch: Any) -> dict[str, torch.Tensor]:
    pair_loss(model, batch_streams(model, batch), batch).sums.loss(
        beta=model.q_config.beta
    ).backward()
    return {n: p.grad for n, p in model.adapter_parameters().items() if p.grad is not None}


def test_the_untrained_loss_is_log_two_and_its_accuracy_one_half(tmp_path: Path) -> None:
    run = trainer(tmp_path, random_pairs(8), eval_dataset=random_pairs(9, seed=4))
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    # Rewards are exactly zero up to rounding, so the accuracy is about chance, not a claim.
    assert abs(metrics["eval_rewards/margins"]) < 1e-5
    assert metrics["eval_kl"] == pytest.approx(0.0, abs=1e-6)


def test_the_evaluation_does_not_depend_on_the_batches(tmp_path: Path) -> None:
    pairs = random_pairs(9, seed=4)
    losses = []
    for size in (1, 4, 9):
        run = trainer(
            tmp_path, random_pairs(2), eval_dataset=pairs, per_device_eval_batch_size=size
        )
        for i, parameter in enumerate(run.model.adapter_parameters().values()):
            torch.manual_seed(i)
            parameter.data.normal_(0, 0.3)
        losses.append(run.evaluate())
    for name in ("eval_loss", "eval_kl", "eval_rewards/margins", "eval_rewards/token_rms"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-4)
        assert losses[0][name] == pytest.approx(losses[2][name], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_training_learns_pairs_it_sees(tmp_path: Path, family: str) -> None:
    pairs = random_pairs(32)
    run = trainer(tmp_path, pairs, family=family, num_train_epochs=6, eval_dataset=pairs)
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_rewards/accuracies"] > 0.9
    assert metrics["eval_rewards/margins"] > 0.5
    assert metrics["eval_kl"] > 1e-3  # moved, where the untrained test finds 0


def test_one_batch_of_eight_is_eight_batches_of_one(tmp_path: Path) -> None:
    pairs = random_pairs(24)
    one = trainer(tmp_path / "a", pairs)
    one.train()
    many = trainer(
        tmp_path / "b", pairs, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    many.train()
    assert one.state.global_step == many.state.global_step == 3
    # Adam divides by the root of the second moment, so rounding grows to about 1e-3 of the rate.
    assert_close(weights(one.model), weights(many.model), atol=2e-4)


def test_accumulated_loss_is_the_loss_of_the_whole_window(tmp_path: Path) -> None:
    pairs = random_pairs(8)
    one = trainer(tmp_path / "a", pairs)
    one.train()
    many = trainer(
        tmp_path / "b", pairs, per_device_train_batch_size=3, gradient_accumulation_steps=3
    )
    many.train()
    first, second = (
        next(r["loss"] for r in t.state.log_history if "loss" in r) for t in (one, many)
    )
    assert first == pytest.approx(second, abs=1e-4)


def test_padding_and_batch_mates_do_not_matter() -> None:
    pairs = random_pairs(3)
    model = untrained()
    for i, parameter in enumerate(model.adapter_parameters().values()):
        torch.manual_seed(i)
        parameter.data.normal_(0, 0.3)
    together = pair_loss_of(model, pairs)
    apart = [pair_loss_of(model, [p]) for p in pairs]
    assert together.sums.bt_sum.item() == pytest.approx(
        sum(a.sums.bt_sum.item() for a in apart), abs=1e-5
    )
    assert together.sums.r2_sq_sum.item() == pytest.approx(
        sum(a.sums.r2_sq_sum.item() for a in apart), rel=1e-4
    )
    other_pad = pair_loss_of(model, pairs, pad_id=11)
    assert torch.allclose(together.returns, other_pad.returns, atol=1e-5)


def pair_loss_of(model: QAdapterModel, pairs: list[TokenizedPair], pad_id: int = 0) -> Any:
    batch = PairCollator(pad_id)(pairs)
    with torch.no_grad():
        streams = model.streams(batch["input_ids"], batch["attention_mask"])
        return pair_loss(model, streams, batch)


def test_no_gradient_reaches_the_base() -> None:
    model = untrained()
    gradients(model, PairCollator(0)(random_pairs(4)))
    assert all(p.grad is None for _, p in model.base_parameters())


def test_gradient_checkpointing_computes_layers_again_and_changes_nothing() -> None:
    batch = PairCollator(0)(random_pairs(5))
    found, calls = [], []
    for checkpointing in (False, True):
        model, called = untrained(), 0

        def count(*_: Any) -> None:
            nonlocal called
            called += 1

        model.base.get_decoder().layers[-1].mlp.register_forward_pre_hook(count)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        found.append(gradients(model, batch))
        calls.append(called)
    assert_close(*found, atol=1e-6)
    assert calls[1] == calls[0] + 1


class _Wide(TorchDispatchMode):
    """Notes the rows of the largest tensor that is as wide as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for found in out if isinstance(out, tuple) else (out,):
            if isinstance(found, torch.Tensor) and found.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, found.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize(("family", "held"), [("llama", False), ("gemma2", True)])
@pytest.mark.parametrize("anchors", [False, True])
def test_the_logits_of_all_tokens_are_never_held(
    family: str, held: bool, anchors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_CPU_TILE", (5, VOCAB))  # all words, so that the width tells them
    fields: dict[str, Any] = {"anchors": [[3, 4, 5, 6, 7, 8, 9]] * 8} if anchors else {}
    run = trainer(tmp_path, random_pairs(8), family=family, **fields)
    batch = run.data_collator(random_pairs(8))
    with _Wide(VOCAB) as wide:
        run.training_step(run.model, dict(batch))
    if held:  # its head caps the logits, so they are held whole
        assert wide.rows > 60
    else:  # five states, and the head itself, turned round
        assert wide.rows == run.model.base.config.hidden_size == 32


def scattered(family: str = "llama", **fields: Any) -> QAdapterModel:
    """Return an adapter far from zero, so that both streams and their difference matter."""
    model = untrained(family, **fields)
    for i, parameter in enumerate(model.adapter_parameters().values()):
        torch.manual_seed(i)
        parameter.data.normal_(0, 0.3)
    return model


def losses_and_gradients(model: QAdapterModel, batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = pair_loss(model, batch_streams(model, batch), batch)
    out.sums.loss(beta=0.3).backward()
    grads = {n: p.grad.clone() for n, p in model.adapter_parameters().items() if p.grad is not None}
    return out, grads


def assert_packing_is_exact(family: str, pairs: list[TokenizedPair]) -> None:
    """Compare in float64, but families with RMS norms compute those in float32 even so."""
    tolerance = 1e-9 if family.startswith("gpt") else 1e-5
    model = scattered(family).double()
    padded, expected = losses_and_gradients(model, PairCollator(0)(pairs))
    packed, found = losses_and_gradients(model, pack_pairs(pairs))
    assert torch.equal(packed.response, padded.response)
    for ours, theirs in ((packed.rewards, padded.rewards), (packed.returns, padded.returns)):
        assert torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance)
    assert packed.sums.n_tokens == padded.sums.n_tokens
    assert expected.keys() == found.keys()
    assert expected
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert torch.allclose(found[name], gradient, atol=tolerance * scale, rtol=0), name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_pairs_give_the_loss_and_gradients_of_padded_ones(family: str) -> None:
    assert packable(untrained(family))
    assert_packing_is_exact(family, random_pairs(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_exact_with_our_own_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for half precision, where exactness could not be seen; so it is made to run in full."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return causal_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "_takes_fused", lambda *_: True)
    monkeypatch.setattr(attention, "causal_attention", counted)
    assert_packing_is_exact(family, random_pairs(5))
    # Soft-caps want eager attention, and windows are shorter than these pairs.
    assert (calls > 0) == (family not in ("mistral", "gemma2", "gemma3_text"))


def test_attention_that_ours_does_not_compute_is_left_to_the_base() -> None:
    query = torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    value, plain = torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16), {"scaling": 0.5, "dropout": 0.0}
    assert attention._takes_fused(query, value, plain)
    assert not attention._takes_fused(query.detach(), value, plain)
    assert not attention._takes_fused(query.float(), value, plain)
    assert not attention._takes_fused(query, value[..., :2], plain)
    for other in ({"scaling": None}, {"dropout": 0.1}, {"position_bias": value}):
        assert not attention._takes_fused(query, value, {**plain, **other})


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5
    ),
    terminal=st.lists(st.booleans(), min_size=10, max_size=10),
    family=st.sampled_from(["gpt_neox", "llama", "mistral"]),
    seed=st.integers(0, 99),
)
@hypothesis_settings(max_examples=30, deadline=None)
def test_packing_is_exact_for_every_shape(
    sizes: list[tuple[int, int, int]], terminal: list[bool], family: str, seed: int
) -> None:
    draw = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(n)]

    pairs = [
        TokenizedPair(ids(p), ids(c), ids(r), terminal[2 * i], terminal[2 * i + 1], "memory")
        for i, (p, c, r) in enumerate(sizes)
    ]
    assert_packing_is_exact(family, pairs)


def test_a_base_that_cannot_pack_is_told_and_padded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = untrained()
    decoder = model._decoder
    forward = decoder.forward
    decoder.forward = lambda *a, packed_pairs=None, **k: forward(*a, **k)
    assert not packable(model)
    run = QAdapterTrainer(model, settings(tmp_path), train_dataset=random_pairs(8))
    assert "LlamaForCausalLM: its attention cannot take packed pairs" in caplog.text
    assert "completion_mask" in next(iter(run.get_train_dataloader()))


def test_resume_gives_the_same_adapter_bit_for_bit(tmp_path: Path) -> None:
    pairs, anchors = random_pairs(24), [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole = trainer(tmp_path / "whole", pairs, anchors=anchors, **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", pairs, anchors=anchors, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    a, b = weights(whole.model), weights(resumed.model)
    assert whole.state.global_step == resumed.state.global_step == 6
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_resume_is_bit_for_bit_beside_anchors_of_any_length_and_with_dropout(
    tmp_path: Path,
) -> None:
    # Five anchors, two a turn: in the second round each stands beside another.
    pairs, anchors = random_pairs(24), [[3 + i % 9 for i in range(n)] for n in (9, 40, 5, 70, 17)]
    options = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 1}

    def run(name: str) -> QAdapterTrainer:
        base = tiny_base("llama")
        torch.manual_seed(3)
        q_config = QConfig(alpha_0=0.5, alpha_tilde=0.5)
        model = QAdapterModel.create(base, q_config, lora_r=4, lora_dropout=0.1, trunk=0.5)
        fields = settings(tmp_path / name, **options, per_device_train_batch_size=2)
        return QAdapterTrainer(model, fields, train_dataset=pairs, anchors=anchors)

    whole, resumed = run("whole"), run("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    a, b = weights(whole.model), weights(resumed.model)
    assert whole.state.global_step == resumed.state.global_step == 12
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_checkpoint_holds_no_pickled_arguments(tmp_path: Path) -> None:
    run = trainer(tmp_path, random_pairs(8), save_strategy="steps", save_steps=1)
    run.train()
    names = {p.name for p in (tmp_path / "checkpoint-1").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "training_args.bin" not in names


def test_anchors_hold_the_policy_back(tmp_path: Path) -> None:
    pairs = random_pairs(32)
    anchors = [[p.prompt_ids[0], *p.chosen_ids, *p.rejected_ids] for p in pairs]
    drift = {}
    for weight in (0.0, 30.0):
        run = trainer(
            tmp_path / str(weight), pairs, anchors=anchors, anchor_weight=weight, num_train_epochs=3
        )
        run.train()
        logs = [r["kl"] for r in run.state.log_history if "kl" in r]
        assert logs[0] == pytest.approx(0.0, abs=1e-6)
        drift[weight] = logs[-1]
    assert drift[30.0] < 0.5 * drift[0.0]


def test_the_authors_objective_runs_and_differs(tmp_path: Path) -> None:
    batch = PairCollator(0)(random_pairs(4))
    ours, theirs = untrained(), untrained(objective="authors")
    for model in (ours, theirs):
        for i, parameter in enumerate(model.adapter_parameters().values()):
            torch.manual_seed(i)
            parameter.data.normal_(0, 0.3)
    streams = theirs.streams(batch["input_ids"], batch["attention_mask"])
    moves = functional.authors_transitions(batch["completion_mask"])
    theirs_out, ours_out = (pair_loss(m, streams, batch) for m in (theirs, ours))
    assert theirs_out.rewards.shape == moves.response.shape
    assert not torch.allclose(theirs_out.returns, ours_out.returns, atol=1e-3)
    run = trainer(tmp_path, random_pairs(8), objective="authors")
    run.train()


def test_a_zero_learning_rate_is_an_error_not_a_result(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="did not change"):
        trainer(tmp_path, random_pairs(8), learning_rate=0.0).train()


def test_a_frozen_adapter_is_refused(tmp_path: Path) -> None:
    model = untrained()
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        QAdapterTrainer(model, settings(tmp_path), train_dataset=random_pairs(2))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, random_pairs(8))
    next(iter(run.model.adapter_parameters().values())).data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss is nan.*learning_rate"):
        run.train()


def test_an_optimizer_without_the_whole_adapter_is_refused(tmp_path: Path) -> None:
    model = untrained()
    names = list(model.adapter_parameters())
    some = [p for n, p in model.adapter_parameters().items() if n != names[3]]
    run = QAdapterTrainer(
        model,
        settings(tmp_path),
        train_dataset=random_pairs(8),
        optimizers=(torch.optim.AdamW(some), None),
    )
    with pytest.raises(TrainingError, match=f"lacks 1 of {len(names)} adapter weights, first") as e:
        run.train()
    assert names[3] in str(e.value)


def test_an_adapter_in_half_precision_is_refused(tmp_path: Path) -> None:
    model = untrained()
    for parameter in model.adapter_parameters().values():
        parameter.data = parameter.data.bfloat16()
    with pytest.raises(TrainingError, match="half precision, in which small updates"):
        QAdapterTrainer(model, settings(tmp_path), train_dataset=random_pairs(2))


@pytest.mark.parametrize("alike", [True, False])
def test_a_loss_that_stays_at_log_two_is_told(
    alike: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = random_pairs(8)
    if alike:  # chosen and rejected are one, so nothing tells them apart
        same = [{"rejected_ids": p.chosen_ids, "rejected_terminal": True} for p in pairs]
        pairs = [dataclasses.replace(p, **fields) for p, fields in zip(pairs, same, strict=True)]
    anchors = [[3, 4, 5, 6]]  # or nothing but weight decay would change the adapter
    model = untrained()
    options = {"num_train_epochs": 12, "logging_steps": 1, "anchor_weight": 1.0}
    run = QAdapterTrainer(
        model, settings(tmp_path, **options), train_dataset=pairs, anchors=anchors
    )
    with caplog.at_level("WARNING"):
        run.train()
    assert ("did not fall from log 2" in caplog.text) == alike


def test_an_adapter_that_is_switched_off_is_not_taken_for_the_policy() -> None:
    model = untrained()
    ids = torch.arange(3, 9)[None]
    model.peft_model.base_model.disable_adapter_layers()
    for call in (model, model.streams):
        with pytest.raises(ModelError, match="adapter is switched off"):
            call(input_ids=ids)
    model.peft_model.base_model.enable_adapter_layers()
    assert model(input_ids=ids).logits.shape[1] == ids.shape[1]


def test_a_base_that_changes_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, random_pairs(8))
    name, parameter = next(iter(run.model.base_parameters()))

    class Vandal(__import__("transformers").TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            parameter.data.view(-1)[0] += 1

    run.add_callback(Vandal())
    with pytest.raises(TrainingError, match="base's weights changed"):
        run.train()
    assert name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha_tilde", 0.0),
        ("alpha_0", -1.0),
        ("gamma", 0.0),
        ("gamma", 1.1),
        ("beta", -0.1),
        ("beta", float("nan")),
        ("parameterization", "other"),
        ("trunk", 1.0),
        ("lora_r", 0),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        settings(tmp_path, **{field: value})


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing_kwargs: with use_reentrant"):
        settings(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": True})
    settings(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_has_it_not(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert bf16_supported() == native
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": not native})
    assert bf16_supported(use_cpu=True) != native
    assert settings(tmp_path, use_cpu=True, bf16=None).bf16 != native


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_filled_by_tokens_hold_every_pair_once(family: str, tmp_path: Path) -> None:
    pairs = random_pairs(40)
    run = trainer(tmp_path, pairs, family=family, tokens_per_batch=60, num_train_epochs=2)
    loader = run.get_train_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert max(batch["input_ids"].shape[1] for batch in batches) <= 60
        found = sorted(
            tuple(batch["input_ids"][0, start : start + sum(lengths)].tolist())
            for batch in batches
            for start, *lengths in batch["spans"].tolist()
        )
        assert found == sorted(
            (*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids) for pair in pairs
        )
    metrics = run.train().metrics
    assert run.state.global_step == 2 * len(loader)
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(
        2 * len(pairs), rel=0.01
    )


def test_rows_in_sequence_keep_the_order_of_the_pairs(tmp_path: Path) -> None:
    pairs = random_pairs(40)
    fields = {"tokens_per_batch": 60, "train_sampling_strategy": "sequential"}
    batches = list(trainer(tmp_path, pairs, **fields).get_train_dataloader())
    assert len(batches) > 5
    rows = [ids for b in batches for ids in b["input_ids"][0].tolist()]
    assert rows == [i for p in pairs for i in (*p.prompt_ids, *p.chosen_ids, *p.rejected_ids)]


def test_how_rows_are_filled_does_not_change_a_whole_step(tmp_path: Path) -> None:
    pairs = random_pairs(16)
    whole = trainer(tmp_path / "a", pairs, per_device_train_batch_size=16)
    rows = trainer(
        tmp_path / "b", pairs, tokens_per_batch=50, gradient_accumulation_steps=16, max_steps=1
    )
    assert len(rows.get_train_dataloader()) > 3
    whole.train()
    rows.train()
    assert rows.state.global_step == 1
    assert_close(weights(whole.model), weights(rows.model), atol=2e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens_per_batch": 9}, r"tokens_per_batch: 9 is less than the \d+ tokens of memory:\d+"),
        ({"tokens_per_batch": 60, "objective": "authors"}, "cannot pack pairs"),
        ({"tokens_per_batch": 0}, "tokens_per_batch: 0 must be at least 1"),
    ],
)
def test_a_token_budget_that_cannot_be_kept_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, random_pairs(40), **fields)


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_every_family_trains_on_a_base_in_bfloat16(family: str, tmp_path: Path) -> None:
    pairs, anchors = random_pairs(24), [[3, 4, 5, 6], [7, 8, 9]]
    model = untrained(family, dtype=torch.bfloat16)
    fields = {"bf16": True, "num_train_epochs": 3, "anchor_weight": 0.1}
    fields |= {"eval_strategy": "epoch", "eval_data": "held-out.jsonl"}
    run = QAdapterTrainer(
        model,
        settings(tmp_path, **fields),
        train_dataset=pairs,
        eval_dataset=pairs,
        anchors=anchors,
    )
    run.train()
    found = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert found[-1] < found[0]
    assert {p.dtype for p in model.adapter_parameters().values()} == {torch.float32}
