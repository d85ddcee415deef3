"""The anchors' KL, from what the base makes of them once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, UNUSUAL, tiny_adapter

from qadapter import held
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


def found(
    kl: AnchorKL, model: QAdapterModel, turn: int, count: int
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    value = kl(model, model, turn, count)
    value.backward()  # type: ignore[no-untyped-call,unused-ignore]
    gradients = {
        n: p.grad.clone() for n, p in model.adapter_parameters().items() if p.grad is not None
    }
    return float(value.detach()), gradients


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_what_is_kept_gives_the_same_value_and_gradient(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_adapter(family, effect=0.05)
    fresh, keeping = AnchorKL(ROWS, 0, keep=False), AnchorKL(ROWS, 0, keep=True)
    first = [found(keeping, model, turn, 2) for turn in range(3)]  # two a turn of five: all of them
    passes = Passes(model, monkeypatch)
    for turn in range(6):
        value, gradients = found(keeping, model, turn, 2)
        assert not passes.count or not model.caches_trunk
        wanted, wanted_gradients = found(fresh, model, turn, 2)
        passes.count = 0
        assert value == pytest.approx(wanted, rel=1e-4, abs=1e-7)
        assert gradients.keys() == wanted_gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-6), name
    assert value > 0
    assert first[0][0] == pytest.approx(found(fresh, model, 0, 2)[0], rel=1e-4)


@pytest.mark.parametrize(("most", "keep"), [(0, True), (2**30, False)])
def test_nothing_is_kept_where_it_may_not_or_takes_too_much(
    most: int, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "_MOST_KEPT", most)
    model = tiny_adapter()
    assert model.caches_trunk
    kl, passes = AnchorKL(ROWS, 0, keep=keep), Passes(model, monkeypatch)
    for turn in range(4):
        kl(model, model, turn, 5)
    assert passes.count == 4


def test_the_bound_counts_both_states_of_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_adapter()
    assert model.caches_trunk  # which is tried out once, by passes of its own
    need = 2 * sum(map(len, ROWS)) * model.base_width * 4
    for most, runs in ((need, 1), (need - 1, 2)):
        monkeypatch.setattr(held, "_MOST_KEPT", most)
        kl = AnchorKL(ROWS, 0, keep=True)
        with monkeypatch.context() as patch:
            passes = Passes(model, patch)
            kl(model, model, 0, 5)
            kl(model, model, 1, 5)
            assert passes.count == runs


def test_it_is_a_sum_over_tokens_which_it_counts() -> None:
    model = tiny_adapter()
    kl = AnchorKL(ROWS, 0, keep=False)
    alone = [found(AnchorKL([row], 0, keep=False), model, 0, 1)[0] for row in ROWS]
    assert found(kl, model, 0, 5)[0] == pytest.approx(sum(alone), rel=1e-4)
    assert kl.tokens(0, 5) == sum(map(len, ROWS))
    assert kl.tokens(1, 2) == len(ROWS[2]) + len(ROWS[3])


def test_each_turn_takes_the_next_and_all_come_again() -> None:
    assert [anchor_turn(5, turn, 2) for turn in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert anchor_turn(2, 1, 5) == [1, 0, 1, 0, 1]
