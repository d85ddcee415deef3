"""The two-stream model on tiny random models of every supported family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCAB, disturbed, parts, tiny_adapter, tiny_base
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from qadapter import functional
from qadapter.config import QConfig
from qadapter.errors import ArtefactError, ConfigError
from qadapter.model import QAdapterModel, Streams

TOLERANCE = 2e-5  # float32, four layers of width 32, logits of order one

families = pytest.mark.parametrize("family", list(FAMILIES))


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def full_logits(model: QAdapterModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of base + adapter and of the base, by the plain way: two whole forward passes."""
    with torch.no_grad():
        adapted = model.peft_model(input_ids=ids).logits
        with model.peft_model.disable_adapter():
            return adapted, model.peft_model(input_ids=ids).logits


def composed_logps(
    model: QAdapterModel, adapted: torch.Tensor, base: torch.Tensor, strength: float
) -> torch.Tensor:
    """log π_s by METHOD M2 from two sets of logits."""
    q = model.q_config
    if q.parameterization == "residual":
        values = functional.residual_q(adapted, base, alpha_tilde=q.alpha_tilde)
    else:
        values = functional.raw_q(adapted)
    return functional.policy_logps(
        strength * values, base.log_softmax(-1), alpha_0=q.alpha_0, alpha_tilde=q.alpha_tilde
    )


@families
def test_strength_zero_is_the_base_exactly(family: str) -> None:
    model, ids = tiny_adapter(family), tokens()
    with torch.no_grad():
        assert torch.equal(
            model(input_ids=ids, strength=0.0).logits, tiny_base(family)(input_ids=ids).logits
        )


@families
def test_strength_one_is_the_plain_peft_model_with_the_defaults(family: str) -> None:
    model, ids = tiny_adapter(family), tokens()
    adapted, base = full_logits(model, ids)
    with torch.no_grad():
        ours = model(input_ids=ids).logits
    assert (adapted - base).abs().max() > 0.05  # the adapter has an effect to be missed
    assert torch.allclose(ours, adapted, atol=TOLERANCE)


@families
@pytest.mark.parametrize(
    "fields",
    [
        {"alpha_0": 0.5, "alpha_tilde": 0.5},
        {"alpha_0": 0.2, "alpha_tilde": 0.7},
        {"alpha_0": 0.01, "alpha_tilde": 1.0, "parameterization": "raw"},
    ],
)
def test_policy_is_m2_at_every_strength(family: str, fields: dict[str, Any]) -> None:
    model, ids = tiny_adapter(family, **fields), tokens()
    adapted, base = full_logits(model, ids)
    for strength in (0.0, 0.3, 1.0, 1.7):
        with torch.no_grad():
            ours = model(input_ids=ids, strength=strength).logits.log_softmax(-1)
        expected = composed_logps(model, adapted, base, strength)
        assert torch.allclose(ours, expected, atol=TOLERANCE * 3), strength


@families
def test_cached_and_uncached_decoding_equal_a_greedy_loop_over_composed_logits(family: str) -> None:
    model, prompt = tiny_adapter(family), tokens(rows=1, length=7)
    expected = prompt
    for _ in range(14):
        logps = composed_logps(model, *full_logits(model, expected), 0.6)
        expected = torch.cat([expected, logps[:, -1].argmax(-1, keepdim=True)], dim=1)
    options: dict[str, Any] = {
        "max_new_tokens": 14,
        "do_sample": False,
        "strength": 0.6,
        "eos_token_id": None,
    }
    cached = model.generate(input_ids=prompt, **options)
    uncached = model.generate(input_ids=prompt, use_cache=False, **options)
    assert torch.equal(cached, expected)
    assert torch.equal(uncached, expected)


@families
def test_each_left_padded_row_and_its_strength_is_that_row_alone(family: str) -> None:
    model = tiny_adapter(family)
    ids, strengths = tokens(rows=3, length=9), [0.0, 0.5, 1.0]
    padding = [0, 2, 5]
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding):
        ids[row, :pad], mask[row, :pad] = 0, 0
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    batch = model.generate(input_ids=ids, attention_mask=mask, strength=strengths, **options)
    for row, pad in enumerate(padding):
        alone = model.generate(
            input_ids=ids[row : row + 1, pad:], strength=strengths[row], **options
        )
        assert torch.equal(batch[row, pad:], alone[0])


@families
@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_one_stacked_pass_is_two_passes(
    family: str, rows: int, lengths: list[int], seed: int
) -> None:
    model = tiny_adapter(family)
    assert model.stacks
    ids = tokens(rows=rows, length=sum(lengths), seed=seed)
    mask = torch.ones_like(ids)
    mask[0, : seed % sum(lengths)] = 0
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for columns, inputs in parts(ids, mask, lengths):
        with torch.no_grad():
            one = model._stacked(
                {**inputs, "past_key_values": caches[0]}, caches[0], model.adapters
            )
            two = model._two_passes(
                {**inputs, "past_key_values": caches[1]}, caches[1], model.adapters
            )
        seen = mask[:, columns].bool()
        # In float64 they are equal; RMSNorm magnifies the rounding of a state that is nearly 0.
        assert torch.allclose(one.base[seen], two.base[seen], atol=5e-4)
        assert torch.allclose(one.adapted[seen], two.adapted[seen], atol=5e-4)
        assert not torch.allclose(one.base[seen], one.adapted[seen], atol=0.01) or not seen.any()


def test_a_stacked_pass_rounds_as_two_passes_do_in_bfloat16() -> None:
    """Else 30 layers carried them so far apart that a trained adapter was taken for another one,
    and decoding fell back to two passes: twice the time a token."""
    base = tiny_base("llama").bfloat16()
    q_config = QConfig(alpha_0=0.5, alpha_tilde=0.5)
    model = disturbed(QAdapterModel.create(base, q_config, lora_r=4, trunk=0.0).eval())
    assert {p.dtype for p in model.adapter_parameters().values()} == {torch.float32}
    assert model.stacks
    ids, caches = tokens(), [DynamicCache(config=model.config) for _ in range(2)]
    inputs = {"input_ids": ids, "use_cache": True}
    with torch.no_grad():
        one = model._stacked({**inputs, "past_key_values": caches[0]}, caches[0], model.adapters)
        two = model._two_passes({**inputs, "past_key_values": caches[1]}, caches[1], model.adapters)
    assert torch.equal(one.adapted, two.adapted)
    assert torch.equal(one.base, two.base)
    assert not torch.allclose(one.base, one.adapted, atol=0.1)


def test_what_a_stacked_pass_keeps_of_the_adapter_is_made_anew_when_it_changes() -> None:
    model, ids, seen = tiny_adapter(), tokens(), []
    parameters = list(model.adapter_parameters().values())

    def replace() -> None:
        for parameter in parameters:
            parameter.data = 2 * parameter.data

    def change_in_place() -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.7)

    for change in (lambda: None, replace, change_in_place):
        change()
        with torch.no_grad():
            whole = model(input_ids=ids).logits
            cached = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits
        torch.testing.assert_close(cached, whole, atol=TOLERANCE, rtol=0)
        assert not any(torch.allclose(whole, before, atol=0.01) for before in seen)
        seen.append(whole)


def test_an_adapter_that_is_more_than_low_rank_maps_is_not_stacked() -> None:
    model = tiny_adapter()
    model._inside[0][1].lora_variant["default"] = object()
    assert not model.stacks


def test_an_adapter_switched_on_beside_the_first_is_not_left_out() -> None:
    model, ids = tiny_adapter(), tokens()
    assert model.stacks
    model.peft_model.add_adapter("other", model.peft_model.peft_config["default"])
    disturbed(model).peft_model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        cached = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits
    assert torch.allclose(cached, expected, atol=TOLERANCE)


@pytest.mark.parametrize("share", [3e-3, 0.0])
def test_a_base_whose_packed_rows_are_only_nearly_right_does_not_pack(share: float) -> None:
    """A bias that packing misses may be small; in full precision nothing but rounding is."""
    model = tiny_adapter()
    streams = model.streams

    def nearly(*args: Any, **kwargs: Any) -> Streams:
        found = streams(*args, **kwargs)
        off = share * float(found.base.abs().max()) if "spans" in kwargs else 0.0
        return found._replace(base_states=found.base + off)

    model.streams = nearly  # type: ignore[method-assign]
    assert model.packs == (share == 0.0)


def test_an_argument_without_rows_is_not_taken_for_one_with_them() -> None:
    """MPT hands its layers a bias of one row a head, which four rows of text look like."""
    config = AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=4, vocab_size=VOCAB)
    base = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    model = disturbed(QAdapterModel.create(base, QConfig(alpha_0=1, alpha_tilde=1), lora_r=4))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ids = tokens(rows=4)
    cached, uncached = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("effect", [0.3, 0.0])
def test_a_layer_that_flattens_its_tokens_is_not_stacked(effect: float) -> None:
    """An untrained adapter, on which nothing shows, is asked too: the answer is kept."""
    base = tiny_base("llama")
    for layer in base.model.layers:
        inner = layer.mlp.forward
        # As blocks of experts do.
        layer.mlp.forward = lambda x, inner=inner: inner(x.flatten(0, 1)).view(x.shape)
    model = QAdapterModel.create(base, QConfig(alpha_0=1, alpha_tilde=1), lora_r=4, trunk=0.5)
    assert not disturbed(model, effect).stacks


def test_beams_sampling_and_streaming_run_on_the_composition() -> None:
    model, ids = tiny_adapter(), tokens()
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None}
    beams = model.generate(
        input_ids=ids, num_beams=3, do_sample=False, strength=[0.0, 1.0], **options
    )
    alone = tiny_base("llama").generate(input_ids=ids[:1], num_beams=3, do_sample=False, **options)
    assert torch.equal(beams[0], alone[0])
    torch.manual_seed(3)
    first = model.generate(input_ids=ids, do_sample=True, **options)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(input_ids=ids, do_sample=True, **options))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("parameterization", ["residual", "raw"])
def test_q_and_v_from_hidden_states_equal_the_specification(
    family: str, parameterization: str
) -> None:
    fields = {"alpha_0": 0.3, "alpha_tilde": 0.8, "parameterization": parameterization}
    model, ids = tiny_adapter(family, **fields), tokens(rows=1, length=8)
    adapted, base = full_logits(model, ids)
    streams = model.streams(ids)
    taken, following = torch.arange(3, 7), torch.arange(4, 8)
    states = Streams(streams.adapted[0], streams.base[0])
    goes_on = torch.tensor([True, True, True, False])
    ours = model.q_and_v(states, ids[0, 4:8], taken, following, goes_on)
    q = (
        functional.residual_q(adapted, base, alpha_tilde=0.8)
        if parameterization == "residual"
        else functional.raw_q(adapted)
    )
    value = functional.soft_value(q, base.log_softmax(-1), alpha_0=0.3, alpha_tilde=0.8)
    assert torch.allclose(ours.taken, q[0, taken, ids[0, 4:8]], atol=1e-4)
    assert torch.allclose(ours.following, value[0, following] * goes_on, atol=1e-4)


@families
def test_gradients_equal_those_of_two_whole_passes(family: str) -> None:
    model, ids = tiny_adapter(family), tokens(rows=1, length=8)
    states, actions = torch.arange(7), ids[0, 1:]
    streams = model.streams(ids)
    flat = Streams(streams.adapted[0, :7], streams.base[0, :7])
    ours = model.q_and_v(flat, actions, states, states, torch.ones(7, dtype=torch.bool))
    (ours.taken.sum() - 0.7 * ours.following.square().sum()).backward()
    found = {n: p.grad.clone() for n, p in model.adapter_parameters().items()}
    model.zero_grad()
    adapted = model.peft_model(input_ids=ids).logits[0, :7]
    with torch.no_grad(), model.peft_model.disable_adapter():
        base = model.peft_model(input_ids=ids).logits[0, :7]
    q = functional.residual_q(adapted, base, alpha_tilde=0.5)
    value = functional.soft_value(q, base.log_softmax(-1), alpha_0=0.5, alpha_tilde=0.5)
    (q[states, actions].sum() - 0.7 * value.square().sum()).backward()
    for name, parameter in model.adapter_parameters().items():
        assert parameter.grad is not None
        assert torch.allclose(found[name], parameter.grad, atol=1e-4, rtol=1e-3), name


@families
def test_the_base_drops_nothing_in_training(family: str) -> None:
    config = copy.deepcopy(tiny_base(family).config)
    for key in [k for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)]:
        setattr(config, key, 0.5)
    base = AutoModelForCausalLM.from_config(config).float().requires_grad_(False)
    model = QAdapterModel.create(base, QConfig(alpha_0=1, alpha_tilde=1), lora_r=4, trunk=0.5)
    ids = tokens()
    expected = model.eval().streams(ids)
    found = model.train().streams(ids)
    assert torch.equal(found.base, expected.base)
    assert torch.equal(found.adapted, expected.adapted)


def test_an_adapted_head_needs_two_heads_and_gets_them() -> None:
    model, ids = tiny_adapter(target_modules=["q_proj", "lm_head"], alpha_0=0.2), tokens()
    assert model.head_weight is None
    adapted, base = full_logits(model, ids)
    with torch.no_grad():
        ours = model(input_ids=ids, strength=0.6).logits.log_softmax(-1)
    assert torch.allclose(ours, composed_logps(model, adapted, base, 0.6), atol=TOLERANCE * 3)


@families
def test_save_load_same_logits(family: str, tmp_path: Any) -> None:
    model, ids = tiny_adapter(family), tokens()
    model.save_pretrained(tmp_path / "adapter")
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "qadapter_config.json"}
    again = QAdapterModel.from_pretrained(tmp_path / "adapter", tiny_base(family))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_damaged_or_missing_weights_are_refused(tmp_path: Any) -> None:
    directory = tmp_path / "adapter"
    tiny_adapter().save_pretrained(directory)
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtefactError, match="damaged"):
        QAdapterModel.from_pretrained(directory, tiny_base("llama"))
    weights.unlink()
    with pytest.raises(ArtefactError, match="missing"):
        QAdapterModel.from_pretrained(directory, tiny_base("llama"))


def test_another_base_is_refused_unless_told(tmp_path: Any) -> None:
    from qadapter import hub

    base_hash = hub.weights_hash(tiny_base("llama"))
    tiny_adapter(base_hash=base_hash).save_pretrained(tmp_path / "adapter")
    other = tiny_base("llama", seed=5)
    with pytest.raises(ArtefactError, match="another base"):
        QAdapterModel.from_pretrained(tmp_path / "adapter", other)
    QAdapterModel.from_pretrained(tmp_path / "adapter", other, check_base=False)


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="layers_to_transform"):
        QAdapterModel.create(
            tiny_base("llama"), QConfig(alpha_0=1, alpha_tilde=1), layers_to_transform=[9]
        )
