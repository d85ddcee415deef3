"""The anchors' KL, from what the base makes of them once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, UNUSUAL, tiny_adapter, tiny_base

from qadapter import held
from qadapter.config import QConfig
from qadapter.held import AnchorKL, anchor_turn
from qadapter.model import QAdapterModel

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [9, 10], [12, 13, 14, 15, 16], [3, 4, 5, 6], [7, 8, 9]]


class Passes:
    """Counts the passes over the base."""

    def __init__(self, model: QAdapterModel, patch: pytest.MonkeyPatch) -> None:
        self.count, whole = 0, model._two_passes

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return whole(*args, **kwargs)

        patch.setattr(model, "_two_passes", counted)


def kl_of(model: QAdapterModel, rows: Any = ROWS, *, split: bool = False) -> AnchorKL:
    return AnchorKL(rows, model, pad_id=0, split=split)


def found(kl: AnchorKL, turn: int, count: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = kl._model
    model.zero_grad()
    value = kl(model, turn, count)
    value.backward()  # type: ignore[no-untyped-call,unused-ignore]
    parameters = model.adapter_parameters().items()
    return float(value.detach()), {n: p.grad.clone() for n, p in parameters if p.grad is not None}


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_what_is_kept_gives_the_same_value_and_gradient(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_adapter(family, effect=0.05)
    fresh, keeping = kl_of(model, split=True), kl_of(model)
    assert not fresh.keeps
    assert keeping.keeps == model.caches_trunk
    for turn in range(3):  # two a turn of five: all of them
        found(keeping, turn, 2)
    passes = Passes(model, monkeypatch)
    for turn in range(6):
        value, gradients = found(keeping, turn, 2)
        assert not passes.count or not keeping.keeps
        wanted, wanted_gradients = found(fresh, turn, 2)
        passes.count = 0
        # A sum of log-probs' differences, each rounded by some 1e-7.
        assert value == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert gradients.keys() == wanted_gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-6), name
    assert value > 0


def test_a_text_is_kept_alike_whatever_it_stands_beside() -> None:
    model = tiny_adapter()
    one, other = kl_of(model), kl_of(model)
    for turn in range(5):
        found(one, turn, 2)
    for i in reversed(range(5)):
        found(other, i, 1)
    for i in range(5):
        assert all(torch.equal(a, b) for a, b in zip(one.read(i), other.read(i), strict=True))


def test_it_takes_the_memory_that_it_says() -> None:
    rows = [[5] * 100, *([[6, 7]] * 31)]
    kl = kl_of(tiny_adapter(), rows)
    found(kl, 0, 32)
    kept = [states.untyped_storage() for i in range(32) for states in kl.read(i)]
    assert sum({s.data_ptr(): s.nbytes() for s in kept}.values()) == kl.size


@pytest.mark.parametrize("training", [False, True])
def test_reading_draws_nothing_and_leaves_the_mode(training: bool) -> None:
    model = QAdapterModel.create(
        tiny_base("llama"), QConfig(alpha_0=0.5, alpha_tilde=0.5), lora_r=4, lora_dropout=0.5
    )
    model.train(training)
    before = torch.get_rng_state()
    kl = kl_of(model)
    assert kl.keeps
    kl.read(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is training


@pytest.mark.parametrize("split", [False, True])
def test_nothing_is_kept_where_it_may_not_or_takes_too_much(
    split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_adapter()
    assert model.caches_trunk
    size = kl_of(model).size
    assert size == sum(map(len, ROWS)) * model.base_width * 8
    monkeypatch.setattr(held, "_MOST_KEPT", size if split else size - 1)
    kl, passes = kl_of(model, split=split), Passes(model, monkeypatch)
    for turn in range(4):
        found(kl, turn, 5)
    assert passes.count == 4
    monkeypatch.setattr(held, "_MOST_KEPT", size)
    assert kl_of(model).keeps


def test_it_is_a_sum_over_tokens_which_it_counts() -> None:
    model = tiny_adapter()
    alone = [found(kl_of(model, [row]), 0, 1)[0] for row in ROWS]
    kl = kl_of(model)
    assert found(kl, 0, 5)[0] == pytest.approx(sum(alone), rel=1e-4)
    assert kl.tokens(0, 5) == sum(map(len, ROWS))
    assert kl.tokens(1, 2) == len(ROWS[2]) + len(ROWS[3])


def test_each_turn_takes_the_next_and_all_come_again() -> None:
    assert [anchor_turn(5, turn, 2) for turn in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert anchor_turn(2, 1, 5) == [1, 0, 1, 0, 1]
