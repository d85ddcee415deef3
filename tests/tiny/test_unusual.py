"""Families whose head is scaled or whose decoder cannot be split: slower, told, and exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import tiny_tokenizer
from models import UNUSUAL, WHOLE, disturbed, tiny_adapter, tiny_base
from peft import PeftModel, get_peft_model
from test_cache import cache_root as cache_root
from test_model import composed_logps, full_logits, tokens
from test_train import losses_and_gradients, random_pairs, scattered, trainer

from qadapter.config import QConfig
from qadapter.data import TokenizedPair
from qadapter.errors import ConfigError, ModelError
from qadapter.export import export_policy
from qadapter.model import QAdapterModel
from qadapter.objective import packable
from qadapter.packing import PairCollator, pack_pairs
from qadapter.policy import Policy

unusual = pytest.mark.parametrize("family", list(UNUSUAL))


def plain(model: QAdapterModel, family: str) -> Any:
    """Return the same base and adapter as peft alone makes them: nothing of ours is in it."""
    lora = copy.deepcopy(model.peft_model.peft_config["default"])
    made = get_peft_model(tiny_base(family), lora).double()
    ours = model.adapter_parameters()
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = ours[name].detach().clone()
    return made


def by_hand(
    model: PeftModel, pairs: list[TokenizedPair], alpha: float, beta: float
) -> torch.Tensor:
    """METHOD M5 for α0 = α̃ and γ = 1, from two whole passes over padded rows and full logits."""
    responses = [(p, r) for p in pairs for r in (p.chosen_ids, p.rejected_ids)]
    longest = max(len(p.prompt_ids) + len(r) for p, r in responses)
    ids = torch.zeros(len(responses), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (pair, response) in enumerate(responses):
        whole = [*pair.prompt_ids, *response]
        ids[row, : len(whole)], mask[row, : len(whole)] = torch.tensor(whole), 1
    adapted = model(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids, attention_mask=mask).logits
    apart = alpha * (adapted - base)
    value = alpha * (adapted.logsumexp(-1) - base.logsumexp(-1))
    sums, squares = [], []
    ends = [e for p in pairs for e in (p.chosen_terminal, p.rejected_terminal)]
    for row, ((pair, response), terminal) in enumerate(zip(responses, ends, strict=True)):
        total = torch.zeros((), dtype=torch.float64)
        for t, token in enumerate(response):
            at = len(pair.prompt_ids) + t  # the state before it is one column to the left
            ended = terminal and t == len(response) - 1
            reward = apart[row, at - 1, token] - (0 if ended else value[row, at])
            total = total + reward
            squares.append(reward**2)
        sums.append(total)
    margins = torch.stack(sums[::2]) - torch.stack(sums[1::2])
    return -margins.sigmoid().log().mean() + beta * torch.stack(squares).mean()


@unusual
@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradients_are_those_of_two_whole_padded_passes(family: str, packed: bool) -> None:
    pairs = random_pairs(5)
    model = scattered(family).double()
    expected = plain(model, family)
    loss = by_hand(expected, pairs, alpha=0.5, beta=0.3)
    loss.backward()
    gradients = {n: p.grad for n, p in expected.named_parameters() if p.grad is not None}
    assert packable(model)
    out, found = losses_and_gradients(
        model, pack_pairs(pairs) if packed else PairCollator(0)(pairs)
    )
    # Some norms and products run in float32 even so.
    assert out.sums.loss(beta=0.3).item() == pytest.approx(loss.item(), abs=1e-5)
    assert found.keys() == gradients.keys()
    assert found
    for name, gradient in gradients.items():
        assert gradient is not None
        scale = max(1.0, float(gradient.abs().max()))
        assert torch.allclose(found[name], gradient, atol=1e-5 * scale, rtol=0), name


@unusual
def test_a_decoder_that_cannot_be_split_is_told_in_one_line(
    family: str, caplog: pytest.LogCaptureFixture, cache_root: Path, tmp_path: Path
) -> None:
    run = trainer(tmp_path, random_pairs(8), family=family, num_train_epochs=2)
    run.train()
    said = [r.message for r in caplog.records if r.levelname == "WARNING"]
    if family not in WHOLE:
        assert said == []
        assert cache_root.exists()
        return
    (line,) = said
    assert "cannot be split into a shared trunk" in line
    assert "costs 8 layers, where it would 6, and no trunk is kept" in line
    assert not cache_root.exists()
    with pytest.raises(ConfigError, match="cannot start from a kept trunk"):
        trainer(tmp_path, random_pairs(8), family=family, cache_trunk=True).train()


@unusual
@pytest.mark.parametrize("fields", [{}, {"alpha_0": 0.2, "alpha_tilde": 0.7}])
def test_cached_and_uncached_decoding_equal_a_greedy_loop(
    family: str, fields: dict[str, Any]
) -> None:
    model, prompt = tiny_adapter(family, **fields), tokens(rows=1, length=7)
    expected = prompt
    for _ in range(10):
        logps = composed_logps(model, *full_logits(model, expected), 0.6)
        expected = torch.cat([expected, logps[:, -1].argmax(-1, keepdim=True)], dim=1)
    options: dict[str, Any] = {"do_sample": False, "strength": 0.6, "eos_token_id": None}
    for use_cache in (True, False):
        found = model.generate(prompt, max_new_tokens=10, use_cache=use_cache, **options)
        assert torch.equal(found, expected)
    ids = tokens()
    with torch.no_grad():
        ours = model(input_ids=ids, strength=1.7).logits.log_softmax(-1)
    adapted, base = full_logits(model, ids)
    assert (adapted - base).abs().max() > 0.01  # the adapter has an effect to be missed
    assert torch.allclose(ours, composed_logps(model, adapted, base, 1.7), atol=6e-5)


@unusual
def test_each_left_padded_row_is_that_row_alone(family: str) -> None:
    model, ids, strengths = tiny_adapter(family), tokens(rows=3), [0.0, 0.5, 1.0]
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 2, 5)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batch = model.generate(ids, attention_mask=mask, strength=strengths, **options)
    for row, pad in enumerate((0, 2, 5)):
        alone = model.generate(ids[row : row + 1, pad:], strength=strengths[row], **options)
        assert torch.equal(batch[row, pad:], alone[0])


@unusual
def test_saved_loaded_and_added_to_itself_it_is_the_same_policy(
    family: str, tmp_path: Path
) -> None:
    model, ids = tiny_adapter(family), tokens()
    with torch.no_grad():
        expected = model(input_ids=ids, strength=0.8).logits.log_softmax(-1)
    model.save_pretrained(tmp_path / "adapter")
    again = QAdapterModel.from_pretrained(tmp_path / "adapter", tiny_base(family)).eval()
    again.add(tmp_path / "adapter", "twice")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        found = again(input_ids=ids, strength=[0.5, 0.3]).logits.log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-4)
    both = [m.generate(ids, strength=s, **options) for m, s in ((model, 0.8), (again, [0.5, 0.3]))]
    assert torch.equal(*both)


@unusual
def test_an_export_that_would_be_another_policy_is_refused(family: str, tmp_path: Path) -> None:
    model = tiny_adapter(family)
    policy = Policy(model, tiny_tokenizer())
    with pytest.raises(ModelError, match="use --format merged"):
        export_policy(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_scaled_by_little_is_seen() -> None:
    torch.manual_seed(0)
    base = tiny_base("granite")
    base.config.logits_scaling = 1.01
    model = disturbed(QAdapterModel.create(base, QConfig(alpha_0=1, alpha_tilde=1), lora_r=4))
    ids = tokens()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, full_logits(model, ids)[0], atol=1e-6)
