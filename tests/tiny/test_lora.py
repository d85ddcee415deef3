"""`LoraLinear` is peft's layer in value and gradient, and leaves to peft what it does not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, tiny_base
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor

from qadapter import lora
from qadapter.lora import LoraLinear, speed_up


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A base with peft's own layers and an adapter that changes its logits."""
    names = "all-linear"
    config = LoraConfig(r=4, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(tiny_base(family).to(dtype), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.3 * drawn.to(parameter.dtype)
    return model


def pass_and_gradients(model: Any, **autocast: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.tensor([[5, 9, 1, 44, 17, 3, 8]])
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        logits = model(input_ids=ids).logits.float()
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each layer that did not go the way of peft."""
    made: list[int] = []
    plain = lora.lora_linear

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(lora, "lora_linear", counted)
    return made


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_computes_the_same(family: str, calls: list[int]) -> None:
    model = adapted(family)
    logits, gradients = pass_and_gradients(model, enabled=False)
    model.zero_grad()
    speed_up(model)
    found, found_gradients = pass_and_gradients(model, enabled=False)
    # GPT-2's linear maps are not torch's; they stay peft's.
    assert bool(calls) == (family != "gpt2")
    # float32, four layers of width 32: sums in another order.
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert found_gradients.keys() == gradients.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_under_autocast_it_rounds_no_more_than_peft(calls: list[int]) -> None:
    exact, exact_gradients = pass_and_gradients(adapted(), enabled=False)
    errors = []
    for fast in (False, True):
        model = adapted(dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        if fast:
            speed_up(model)
        found, gradients = pass_and_gradients(model)
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        away = [found - exact, *(gradients[n] - g for n, g in exact_gradients.items())]
        errors.append([float(difference.norm()) for difference in away])
    assert calls
    # The two round at different places, so one tensor may err more in one of them, but not all.
    ratios = torch.tensor(errors[1]) / torch.tensor(errors[0])
    assert float(ratios.median()) < 1.2
    assert float(ratios.max()) < 2


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Linear)]


def touch_nothing(model: Any) -> None:
    pass


def hook_the_base(model: Any) -> None:
    for layer in layers(model):
        layer.base_layer.register_forward_hook(lambda *_: None)


def watch_gradients(model: Any) -> None:
    for layer in layers(model):
        layer.lora_A["default"].register_full_backward_pre_hook(lambda *_: None)


def offload(model: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    for layer in layers(model):
        add_hook_to_module(layer.base_layer, ModelHook())


def add_a_second(model: Any) -> None:
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])


def turn_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def merge(model: Any) -> None:
    model.merge_adapter()


def unfreeze(model: Any) -> None:
    for layer in layers(model):
        layer.base_layer.weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"lora_dropout": 0.5}, touch_nothing),
        ({"use_dora": True}, touch_nothing),
        *[({}, c) for c in (hook_the_base, watch_gradients, offload, add_a_second)],
        *[({}, c) for c in (turn_off, merge, unfreeze)],
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value) or "plain",
)
def test_what_it_does_not_know_goes_the_way_of_peft(
    fields: dict[str, Any], change: Any, calls: list[int]
) -> None:
    results = []
    for fast in (False, True):
        model = adapted(**fields).train()
        if fast:
            speed_up(model)
            assert all(type(layer) is LoraLinear for layer in layers(model))
        change(model)
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(model(input_ids=torch.tensor([[5, 9, 1]])).logits)
    assert not calls
    assert torch.equal(*results)


def test_dropout_takes_the_fast_way_once_training_is_over(calls: list[int]) -> None:
    model = adapted(lora_dropout=0.5).eval()
    ids = torch.tensor([[5, 9, 1]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        speed_up(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    # peft keeps a Dropout module, which in eval mode changes nothing.
    assert calls


@pytest.mark.parametrize("shape", [(2, 3, 7), (5, 7), (7,)])
def test_what_comes_after_may_change_the_result_in_place(shape: tuple[int, ...]) -> None:
    gradients = []
    for fast in (False, True):
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(7, 5)), config)  # type: ignore[arg-type]
        if fast:
            speed_up(model)
        model(torch.ones(shape)).mul_(2).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 2
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_files_and_merging_stay_pefts(tmp_path: Any) -> None:
    model = adapted()
    ids = torch.tensor([[5, 9, 1]])
    speed_up(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(str(tmp_path))
        from peft import PeftModel

        again = PeftModel.from_pretrained(tiny_base("llama"), str(tmp_path))
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
