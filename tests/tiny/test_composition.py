"""Several adapters on one base: their residuals add, whichever way they are run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, parts, tiny_adapter, tiny_base
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, DynamicCache

from qadapter import functional
from qadapter.cli import main
from qadapter.cli.terminal import printable
from qadapter.data import read_pairs
from qadapter.errors import ArtefactError, ConfigError
from qadapter.model import QAdapterModel
from qadapter.policy import Policy

TOLERANCE = 6e-5  # float32, four layers of width 32, logits of order one, of three branches

# Of different depths, forking in either order, of one weight of the base.
DEEP: dict[str, Any] = {"trunk": 0.5, "alpha_0": 0.2, "alpha_tilde": 0.5}
FLAT: dict[str, Any] = {"trunk": 0.75, "effect": 0.5, "alpha_0": 0.36, "alpha_tilde": 0.9}


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def composed(
    family: str, place: Path, *made: dict[str, Any]
) -> tuple[QAdapterModel, list[QAdapterModel]]:
    """Return adapters on one base, and each on a base of its own."""
    alone = [tiny_adapter(family, **fields) for fields in made]
    for i, model in enumerate(alone):
        model.save_pretrained(place / f"a{i}")
    both = QAdapterModel.from_pretrained(place / "a0", tiny_base(family)).eval()
    for i in range(1, len(made)):
        both.add(place / f"a{i}", f"a{i}")
    return both, alone


def expected_logps(
    alone: list[QAdapterModel], ids: torch.Tensor, strengths: list[float]
) -> torch.Tensor:
    """(α0/α̃)·log π1 + Σ s_k·Q̂_k/α̃_k, normalised, by plain passes of each model."""
    total: Any = 0.0
    with torch.no_grad():
        for model, strength in zip(alone, strengths, strict=True):
            q = model.q_config
            z = model.peft_model(input_ids=ids).logits.double()
            with model.peft_model.disable_adapter():
                base = model.peft_model(input_ids=ids).logits.double()
            values = z
            if q.parameterization == "residual":
                values = functional.residual_q(z, base, alpha_tilde=q.alpha_tilde)
            total = total + strength * values / q.alpha_tilde
    q = alone[0].q_config
    return (total + q.alpha_0 / q.alpha_tilde * base.log_softmax(-1)).log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "order"),
    [("mistral", (DEEP, FLAT)), ("gemma2", (FLAT, DEEP)), ("llama", (FLAT, DEEP))],
)
def test_residuals_add_each_in_its_own_temperature(
    family: str, order: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    both, alone = composed(family, tmp_path, *order)
    ids = tokens()
    for strengths in ([1.0, 1.0], [0.7, 0.4], [0.0, 1.3], [0.0, 0.0]):
        with torch.no_grad():
            ours = both(input_ids=ids, strength=strengths).logits.log_softmax(-1)
            alike = both(input_ids=ids, strength=[strengths] * 2).logits.log_softmax(-1)
        expected = expected_logps(alone, ids, strengths).float()
        assert torch.allclose(ours, expected, atol=TOLERANCE)
        assert torch.allclose(ours, alike, atol=1e-6)
    # Both have an effect to be missed.
    (one, other), base = both.streams(ids).branches, both.streams(ids).base
    assert min(float((h - base).abs().max()) for h in (one, other)) > 0.05


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_one_at_1_and_the_other_at_0_is_the_one_alone(family: str, tmp_path: Path) -> None:
    both, alone = composed(family, tmp_path, DEEP, FLAT)
    ids = tokens()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for strengths, model in (([1.0, 0.0], alone[0]), ([0.0, 1.0], alone[1])):
        with torch.no_grad():
            ours = both(input_ids=ids, strength=strengths).logits
            theirs = model(input_ids=ids).logits
        assert torch.allclose(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-6)
        found = both.generate(input_ids=ids, strength=strengths, **options)
        assert torch.equal(found, model.generate(input_ids=ids, **options))


@pytest.mark.parametrize("parameterization", ["residual", "raw"])
def test_two_equal_ones_at_a_half_are_one_at_1(parameterization: str, tmp_path: Path) -> None:
    fields = {**DEEP, "parameterization": parameterization}
    both, (one, _) = composed("llama", tmp_path, fields, fields)
    ids = tokens()
    with torch.no_grad():
        ours = both(input_ids=ids, strength=[0.5, 0.5]).logits
        assert torch.allclose(ours, one(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_cached_decoding_is_a_greedy_loop_over_the_composition(family: str, tmp_path: Path) -> None:
    both, alone = composed(family, tmp_path, FLAT, DEEP, {**DEEP, "trunk": 0.0, "effect": 0.2})
    assert both.stacks
    strengths = [[1.0, 0.3, 0.5], [0.2, 1.0, 0.0]]
    ids = expected = tokens(rows=2, length=7)
    for _ in range(5):
        rows = [
            expected_logps(alone, expected[i : i + 1], s)[0, -1] for i, s in enumerate(strengths)
        ]
        expected = torch.cat([expected, torch.stack(rows).argmax(-1, keepdim=True)], dim=1)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for use_cache in (True, False):
        found = both.generate(input_ids=ids, strength=strengths, use_cache=use_cache, **options)
        assert torch.equal(found, expected)
    beams = both.generate(input_ids=ids, strength=strengths[0], num_beams=3, **options)
    one = both.generate(input_ids=ids[:1], strength=strengths[0], num_beams=3, **options)
    assert torch.equal(beams[:1], one)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> QAdapterModel:
    deepest = {**DEEP, "trunk": 0.0, "effect": 0.2}
    return composed("mistral", tmp_path_factory.mktemp("three"), FLAT, deepest, DEEP)[0]


@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    some=st.sets(st.integers(0, 2), min_size=1),
)
def test_one_pass_over_some_of_the_branches_is_a_pass_for_each(
    three: QAdapterModel, rows: int, lengths: list[int], seed: int, some: set[int]
) -> None:
    adapters = tuple(three.adapters[i] for i in sorted(some, key=lambda i: (seed + i) % 3))
    assert three._stacks(adapters)
    ids = torch.randint(
        3, VOCAB, (rows, sum(lengths)), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.ones_like(ids)
    mask[0, : seed % sum(lengths)] = 0
    config = three.lengthened(three.base.config, adapters)
    caches = [DynamicCache(config=config) for _ in range(2)]
    for columns, inputs in parts(ids, mask, lengths):
        with torch.no_grad():
            one, two = (
                run({**inputs, "past_key_values": cache}, cache, adapters)
                for run, cache in zip((three._stacked, three._two_passes), caches, strict=True)
            )
        seen = mask[:, columns].bool()
        states = [(*s.branches, s.base) for s in (one, two)]
        for ours, theirs in zip(*states, strict=True):
            assert torch.allclose(ours[seen], theirs[seen], atol=5e-4)
    assert len(caches[0].layers) == 4 + sum(adapter.depth for adapter in adapters)


@pytest.mark.parametrize(
    ("family", "parameterization"), [("llama", "raw"), ("llama", "residual"), ("gemma2", "raw")]
)
def test_q_and_v_are_those_of_the_sum(family: str, parameterization: str, tmp_path: Path) -> None:
    fields = {"alpha_0": 0.3, "alpha_tilde": 0.8, "parameterization": parameterization}
    both, alone = composed(family, tmp_path, {**DEEP, **fields}, {**FLAT, **fields})
    ids, strengths = tokens(rows=1, length=8), (0.7, 0.4)
    with torch.no_grad():
        z = [model.peft_model(input_ids=ids).logits[0] for model in alone]
        with alone[0].peft_model.disable_adapter():
            base = alone[0].peft_model(input_ids=ids).logits[0]
        streams = both.streams(ids).at(0)
        taken, following = torch.arange(3, 7), torch.arange(4, 8)
        ends = torch.tensor([True, True, True, False])
        ours = both.q_and_v(streams, ids[0, 4:8], taken, following, ends, strength=strengths)
        kl = both.kl_from_base(streams, strengths)
    values: Any = sum(
        s * (functional.residual_q(x, base, alpha_tilde=0.8) if "res" in parameterization else x)
        for s, x in zip(strengths, z, strict=True)
    )
    alphas = {"alpha_0": 0.3, "alpha_tilde": 0.8}
    value = functional.soft_value(values, base.log_softmax(-1), **alphas)
    assert torch.allclose(ours.taken, values[taken, ids[0, 4:8]], atol=2e-4)
    assert torch.allclose(ours.following, value[following] * ends, atol=2e-4)
    logps = functional.policy_logps(values, base.log_softmax(-1), **alphas)
    expected = (base.softmax(-1) * (base.log_softmax(-1) - logps)).sum(-1)
    assert torch.allclose(kl, expected, atol=2e-4)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> QAdapterModel:
    """A model that adapters are added to in vain."""
    return composed("llama", tmp_path_factory.mktemp("flat"), FLAT)[0]


@pytest.fixture(scope="module")
def deepest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of all layers."""
    place = tmp_path_factory.mktemp("deepest") / "new"
    tiny_adapter(**{**DEEP, "trunk": 0.0}).save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"alpha_0": 0.5}, "another weight of the base"),
        ({"parameterization": "raw"}, "of one parameterization compose"),
        ({"base_hash": "other"}, "trained on another base"),
        ({"tokenizer_hash": "other"}, "another tokenizer or chat template"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts the head, which does not compose"),
    ],
)
def test_what_has_no_common_sum_is_refused(
    fields: dict[str, Any], told: str, flat: QAdapterModel, deepest: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    if "target_modules" in fields:
        tiny_adapter(**DEEP, **fields).save_pretrained(new)
    else:
        shutil.copytree(deepest, new)
        config = new / "qadapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises((ArtefactError, ConfigError), match=told):
        flat.add(new, "new")


def test_raw_ones_of_other_temperatures_are_refused(tmp_path: Path) -> None:
    raw = {"trunk": 0.5, "parameterization": "raw"}
    both, _ = composed("llama", tmp_path, {**raw, "alpha_0": 0.5, "alpha_tilde": 1.0})
    tiny_adapter(**raw, alpha_0=0.25, alpha_tilde=0.5).save_pretrained(tmp_path / "new")
    with pytest.raises(ConfigError, match="with the other's alphas"):
        both.add(tmp_path / "new", "new")


@pytest.mark.parametrize(
    "damage", ["cut", "lacks", "nan", "norm", "head", "more than LoRA", "no json", "none"]
)
def test_an_adapter_that_fails_to_load_or_leaves_changes_nothing(
    damage: str, flat: QAdapterModel, deepest: Path, tmp_path: Path
) -> None:
    """Deeper than the first, so that maps of layers are wrapped which were not before."""
    both, new, ids = flat, tmp_path / "new", tokens()
    shutil.copytree(deepest, new)
    config, weights = new / "adapter_config.json", new / "adapter_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage in ("lacks", "nan"):
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        name = max(state)
        state[name] = state[name] * float("nan")
        if damage == "lacks":
            del state[name]
        save_file(state, weights)
    elif damage in ("norm", "head"):
        # The first is no linear map, which peft finds out in the middle; the second's is not there.
        fields = json.loads(config.read_text())
        name = "input_layernorm" if damage == "norm" else "lm_head"
        config.write_text(json.dumps(fields | {"target_modules": ["q_proj", name]}))
    elif damage == "more than LoRA":
        fields = json.loads(config.read_text()) | {"modules_to_save": ["embed_tokens"]}
        config.write_text(json.dumps(fields))
    elif damage == "no json":
        config.write_text("{")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        before = both(input_ids=ids).logits
    said = both.generate(input_ids=ids, **options)
    if damage == "none":
        both.remove(both.add(new, "new"))
    else:
        with pytest.raises(ArtefactError):
            both.add(new, "new")
    assert [adapter.name for adapter in both.adapters] == ["adapter"]
    assert not [n for n, _ in both.named_parameters() if "more1" in n]
    with torch.no_grad():
        assert torch.equal(both(input_ids=ids).logits, before)
    assert torch.equal(both.generate(input_ids=ids, **options), said)
    assert both.config.num_hidden_layers == 4 + 1
    wrapped = [n for n, m in both.base.named_modules() if isinstance(m, BaseTunerLayer)]
    assert wrapped
    assert all(".layers.3." in name for name in wrapped)


# ── commands ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def policy(adapter: str, second: str) -> Policy:
    return Policy.from_pretrained({"tiny": adapter, "deep": second})


def test_score_and_generate_take_several(
    adapter: str, second: str, data: str, policy: Policy, tmp_path: Path, capsys: Any
) -> None:
    def score(*words: str) -> dict[str, Any]:
        assert main(["score", *words, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    both = score(adapter, second, data, "--strength", "1,0")
    one = score(adapter, data)
    assert both.pop("strength") == [1.0, 0.0]
    assert one.pop("strength") == 1.0
    assert both == {k: pytest.approx(v, abs=1e-4) for k, v in one.items()}
    mixed = score(adapter, f"b={second}", data, "--strength", "1.0,0.5")
    assert abs(mixed["margin"] - one["margin"]) > 0.1

    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("Say 1\nSay 2\n")
    words = ["--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "8"]
    assert main(["generate", adapter, second, "--strength", "1.0,0.5", *words]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    asked = [[{"role": "user", "content": f"Say {i}"}] for i in (1, 2)]
    expected = policy.answer(asked, strength=(1.0, 0.5), max_new_tokens=8)
    assert [row["response"] for row in rows] == expected
    assert [row["strength"] for row in rows] == [[1.0, 0.5]] * 2


def test_chat_takes_several_and_a_strength_for_each(
    adapter: str, second: str, policy: Policy, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines = iter(["Say 3", "/strength 1", "/strength 0,2", "/strength 1,2,3", "/reset", "Say 3"])

    def ask(prompt: str) -> str:
        print(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    words = ["chat", adapter, second, "--strength", "1.0,0.5", "--max-new-tokens", "8"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for strength in ((1.0, 0.5), (0.0, 2.0)):
        asked = [[{"role": "user", "content": "Say 3"}]]
        (said,) = policy.answer(asked, strength=strength, max_new_tokens=8)
        assert printable(said) in printed
    assert "[1,0.5] >" in printed
    assert "[0,2] >" in printed
    assert "/strength: strength: 3 numbers (1,2,3) for 2 adapters (adapter, second)" in printed


def test_explain_colours_the_rewards_of_the_sum(
    adapter: str, second: str, data: str, policy: Policy, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    words = ["explain", adapter, second, data, "--output", str(page), "--strength", "0.5,1"]
    assert main([*words, "--max-pairs", "1"]) == 0
    score = policy.score(list(read_pairs(data))[:1], strength=(0.5, 1.0))
    html = page.read_text()
    assert "Strength 0.5,1." in html
    assert f"chosen: R = {score.chosen_rewards[0]:+.3f} nats" in html


def test_rewards_of_two_kinds_have_no_sum(
    adapter: str, second: str, data: str, tmp_path: Path, capsys: Any
) -> None:
    other = tmp_path / "other"
    shutil.copytree(second, other)
    config = other / "qadapter_config.json"
    fields = json.loads(config.read_text()) | {"gamma": 0.9}
    config.write_text(json.dumps(fields))
    assert main(["score", adapter, str(other), data]) == 2
    told = capsys.readouterr().err
    assert "other: was trained with gamma 0.9 and adapter with 1.0" in told


def test_several_are_exported_as_one_policy(
    adapter: str, second: str, policy: Policy, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "out"
    words = ["export", adapter, second, str(output), "--strength", "0.7,0.4"]
    assert main(words) == 0
    found = AutoModelForCausalLM.from_pretrained(output)
    assert found.config.branch_layers == [1, 2]
    assert found.config.strength == [0.7, 0.4]
    ids = torch.arange(4, 40)[None]
    for strength in ([0.7, 0.4], [1.0, 0.0], [0.2, 1.5]):
        found.config.strength = strength
        with torch.no_grad():
            theirs = found.eval()(input_ids=ids).logits
            ours = policy.model(input_ids=ids, strength=strength).logits
        assert torch.allclose(theirs, ours, atol=1e-4)
    for name in ("merged", "peft", "gguf"):
        assert main(["export", adapter, second, str(tmp_path / name), "--format", name]) == 2
        assert f"--format {name}: is one adapter's" in capsys.readouterr().err
        assert not (tmp_path / name).exists()


def test_how_far_a_sum_is_from_training_on_both() -> None:
    """docs/method.md: Σ s_k·V_k − V is a covariance under the base, and from 0 at Σ s_k = 1."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, 97, generator=generator, dtype=torch.float64).log_softmax(-1)
    one, other = torch.randn(2, 50, 97, generator=generator, dtype=torch.float64)
    other = other + 0.5 * one
    alphas = {"alpha_0": 0.4, "alpha_tilde": 0.4}

    def value(q: torch.Tensor) -> torch.Tensor:
        return functional.soft_value(q, base, **alphas)

    a, b = 1e-3 * one, 1e-3 * other
    mean = [(base.exp() * x).sum(-1, keepdim=True) for x in (a, b)]
    covariance = (base.exp() * (a - mean[0]) * (b - mean[1])).sum(-1) / 0.4**2
    bracket = value(a) + value(b) - value(a + b)
    assert covariance.abs().min() > 0
    assert torch.allclose(bracket, -0.4 * covariance, rtol=0.02)
    for s in (0.2, 0.5):
        gap = s * value(one) + (1 - s) * value(other) - value(s * one + (1 - s) * other)
        assert (gap > 0).all()
