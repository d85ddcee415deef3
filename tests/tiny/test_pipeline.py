"""From tokens and files to numbers: losses, KL and figures against the oracle's plain Python."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from models import tiny_adapter, tiny_base
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qadapter.config import QAdapterConfig, QConfig
from qadapter.data import Pair, TokenizedPair, read_pairs, tokenize_pairs
from qadapter.explain import explain_html
from qadapter.model import QAdapterModel
from qadapter.objective import batch_streams, pair_loss
from qadapter.packing import PairCollator, pack_pairs
from qadapter.policy import Policy
from qadapter.stats import wilson_interval
from qadapter.train import TrainResult, run_training
from qadapter.trainer import QAdapterTrainer

TWO_TEMPERATURES = {"alpha_0": 0.3, "alpha_tilde": 0.7}
PAIRS = [  # odd and even lengths, one token alone, responses cut by the length limit
    TokenizedPair([5, 6, 7], [11, 12, 2], [61, 62, 63, 64, 2], True, True, "memory:0"),
    TokenizedPair([8], [13], [65, 66], True, False, "memory:1"),
    TokenizedPair([9, 10, 9, 10, 9], [14, 15, 16, 17, 18, 19, 20], [67], False, True, "memory:2"),
    TokenizedPair([30, 31], [21, 22, 23, 24], [21, 22, 68], False, False, "memory:3"),
]


class Expected(NamedTuple):
    """What the oracle says of pairs: chosen responses first, rejected after."""

    returns: list[float]
    rewards: list[float]
    terms: oracle.Terms
    kl: float
    """Mean KL(π1 ‖ π_s) over the states in which a response token is chosen."""


def sides(pair: TokenizedPair) -> tuple[tuple[list[int], bool], tuple[list[int], bool]]:
    return (pair.chosen_ids, pair.chosen_terminal), (pair.rejected_ids, pair.rejected_terminal)


def seen(
    plain: Any, prompt: list[int], ids: list[int], terminal: bool, q: QConfig, strength: float
) -> oracle.Response:
    """Return a response with its states from two whole forward passes, alone and unpadded."""
    row = torch.tensor([[*prompt, *ids]])
    with torch.no_grad():
        adapted = plain(input_ids=row).logits[0, len(prompt) - 1 :].double().tolist()
        with plain.disable_adapter():
            base = plain(input_ids=row).logits[0, len(prompt) - 1 :].double().tolist()
    if q.parameterization == "raw":
        values = [[strength * z for z in state] for state in adapted]
    else:
        values = [
            [strength * q.alpha_tilde * (z - z1) for z, z1 in zip(*states, strict=True)]
            for states in zip(adapted, base, strict=True)
        ]
    return oracle.Response(ids, values, [oracle.log_softmax(z1) for z1 in base], terminal)


def kl_from_base(response: oracle.Response, q: QConfig) -> list[float]:
    """Return KL(π1 ‖ π_s) in each state but the last."""
    return [
        math.fsum(
            math.exp(logp) * (logp - math.log(p))
            for logp, p in zip(
                base, oracle.policy(values, base, q.alpha_0, q.alpha_tilde), strict=True
            )
        )
        for values, base in zip(response.q[:-1], response.base_logps[:-1], strict=True)
    ]


def expected(
    plain: Any, pairs: Sequence[TokenizedPair], q: QConfig, strength: float = 1.0
) -> Expected:
    responses = [
        seen(plain, pair.prompt_ids, *sides(pair)[side], q, strength)
        for side in (0, 1)
        for pair in pairs
    ]
    both = list(zip(responses[: len(pairs)], responses[len(pairs) :], strict=True))
    terms = oracle.preference_terms(both, q.alpha_0, q.alpha_tilde, q.gamma)
    rewards = [oracle.token_rewards(r, q.alpha_0, q.alpha_tilde, q.gamma) for r in responses]
    returns = [math.fsum(r) for r in rewards]
    if q.returns == "discounted":
        returns = [oracle.discounted_return(r, q.gamma) for r in rewards]
        margins = (w - r for w, r in zip(returns[: len(pairs)], returns[len(pairs) :], strict=True))
        bt_sum = math.fsum(map(oracle.minus_log_sigmoid, margins))
        terms = oracle.Terms(bt_sum, terms.n_pairs, terms.r2_sq_sum, terms.n_tokens)
    kl = [x for r in responses for x in kl_from_base(r, q)]
    return Expected(returns, [x for r in rewards for x in r], terms, math.fsum(kl) / len(kl))


def plain_peft(model: QAdapterModel, base: Any, directory: Path) -> Any:
    """Return the adapter on another copy of its base, which knows nothing of two streams."""
    model.save_pretrained(directory)
    return PeftModel.from_pretrained(base, str(directory)).eval()


@pytest.mark.parametrize("batched", [pack_pairs, PairCollator(0)], ids=["packed", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "fields",
    [
        {**TWO_TEMPERATURES, "gamma": 1.0},
        {**TWO_TEMPERATURES, "gamma": 0.9},
        {**TWO_TEMPERATURES, "gamma": 0.9, "returns": "discounted"},
        {**TWO_TEMPERATURES, "gamma": 0.9, "parameterization": "raw"},
    ],
    ids=["residual", "gamma", "discounted", "raw"],
)
def test_the_loss_is_the_oracles(
    tmp_path: Path, family: str, fields: dict[str, Any], batched: Callable[[Any], Any]
) -> None:
    model = tiny_adapter(family, **fields)
    plain = plain_peft(model, tiny_base(family), tmp_path)
    close = {"rel": 2e-5, "abs": 2e-5}  # sums of eight float32 rewards of order one
    if family == "gpt2":  # the others' RMS norms and soft-caps stay float32 even so
        close = {"rel": 0.0, "abs": 1e-9}
        model.double()
        plain.double()
    for strength in (1.0, 0.6):
        batch = batched(PAIRS)
        with torch.no_grad():
            out = pair_loss(model, batch_streams(model, batch), batch, strength=strength)
        want = expected(plain, PAIRS, model.q_config, strength)
        assert out.returns.tolist() == pytest.approx(want.returns, **close)
        assert out.rewards.tolist() == pytest.approx(want.rewards, **close)
        assert (int(out.sums.n_pairs), int(out.sums.n_tokens)) == (4, want.terms.n_tokens)
        assert float(out.sums.loss(beta=0.3)) == pytest.approx(want.terms.loss(0.3), **close)
        kl = model.kl_from_base(out.states.at(out.taken), strength)
        assert float(kl.mean()) == pytest.approx(want.kl, **close)


def settings(directory: Path, **fields: Any) -> QAdapterConfig:
    fixed: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "warmup_steps": 0,
        "logging_steps": 1,
        "seed": 1,
    }
    return QAdapterConfig(**{"output_dir": str(directory), **fixed, **fields})


def test_evaluation_reports_the_oracles_figures(tmp_path: Path) -> None:
    model = tiny_adapter("llama", **TWO_TEMPERATURES, gamma=0.9, beta=0.3)
    want = expected(plain_peft(model, tiny_base("llama"), tmp_path), PAIRS, model.q_config)
    config = settings(tmp_path, per_device_eval_batch_size=4)
    found = QAdapterTrainer(model, config, eval_dataset=PAIRS).evaluate()
    margins = [w - r for w, r in zip(want.returns[:4], want.returns[4:], strict=True)]
    figures = {
        "eval_loss": want.terms.loss(0.3),
        "eval_kl": want.kl,
        "eval_rewards/chosen": math.fsum(want.returns[:4]) / 4,
        "eval_rewards/rejected": math.fsum(want.returns[4:]) / 4,
        "eval_rewards/margins": math.fsum(margins) / 4,
        "eval_rewards/accuracies": sum(m > 0 for m in margins) / 4,
        "eval_rewards/token_rms": math.sqrt(want.terms.r2_sq_sum / want.terms.n_tokens),
    }
    assert 0 < figures["eval_rewards/accuracies"] < 1
    assert {k: found[k] for k in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)
    config = settings(tmp_path, per_device_eval_batch_size=3)
    uneven = QAdapterTrainer(model, config, eval_dataset=PAIRS).evaluate()
    del figures["eval_loss"]  # transformers averages batches by their pairs, M5 by its tokens
    assert {k: uneven[k] for k in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)


def test_score_reports_the_oracles_figures(
    adapter: str, base: str, data: str, tmp_path: Path
) -> None:
    policy, pairs = Policy.from_pretrained(adapter), list(read_pairs(data))[:5]
    plain = plain_peft(policy.model, AutoModelForCausalLM.from_pretrained(base), tmp_path)
    tokens, _ = tokenize_pairs(pairs, policy.tokenizer, end_ids=policy.end_ids, max_length=200)
    for strength in (1.0, 0.5):
        want = expected(plain, tokens, policy.model.q_config, strength)
        found = policy.score(pairs, strength=strength, max_length=200, batch_size=3)
        rewards = [*found.chosen_rewards, *found.rejected_rewards]
        assert rewards == pytest.approx(want.returns, rel=1e-4, abs=1e-4)
        assert found.kl == pytest.approx(want.kl, rel=1e-3)
        margin = (math.fsum(want.returns[:5]) - math.fsum(want.returns[5:])) / 5
        assert found.margin == pytest.approx(margin, rel=1e-4)
        # The same pairs again are no news, as they would be to an interval over pairs.
        again = policy.score(pairs * 4, strength=strength, max_length=200)
        assert (again.pairs, again.prompts) == (20, 5)
        low, high = wilson_interval(20 * again.accuracy, 20)
        assert again.accuracy_ci[1] - again.accuracy_ci[0] > 1.3 * (high - low)


def pairs_of(*responses: tuple[str, str]) -> list[Pair]:
    return [Pair("Say: ", chosen, rejected, "memory") for chosen, rejected in responses]


def test_the_length_baseline_prefers_the_longer_response(adapter: str) -> None:
    pairs = pairs_of(("aaaa", "b"), ("aaa", "bb"), ("aa", "bb"), ("a", "bbb"))
    assert Policy.from_pretrained(adapter).score(pairs).length_baseline == 2.5 / 4


def test_explain_colours_rewarded_tokens_blue_and_penalised_ones_orange(adapter: str) -> None:
    policy = Policy.from_pretrained(adapter)
    pairs = pairs_of(("yes yes", "<no>"))
    (tokens,), _ = tokenize_pairs(pairs, policy.tokenizer, end_ids=policy.end_ids, max_length=99)
    page = explain_html(policy, pairs)
    span = r'<span title="(\S+) nats, 1 token" style="background: rgba\((.+?), ([\d.]+)\)">(.*?)<'
    spans = re.findall(span, page, flags=re.DOTALL)
    rewards = policy.judge([tokens]).rewards.tolist()
    assert [float(title) for title, *_ in spans] == pytest.approx(rewards, abs=1e-4)
    words = policy.tokenizer.batch_decode([[t] for t in tokens.chosen_ids + tokens.rejected_ids])
    assert [unescape(text) for *_, text in spans] == words
    assert min(rewards) < -0.01 < 0.01 < max(rewards)
    blue, orange = "37, 99, 235", "234, 120, 12"
    assert [hue for _, hue, *_ in spans] == [blue if r > 0 else orange for r in rewards]
    by_size = sorted(zip(map(abs, rewards), [float(a) for *_, a, _ in spans], strict=True))
    assert [alpha for _, alpha in by_size] == sorted(alpha for _, alpha in by_size)
    assert "Blue is rewarded, orange penalised" in page


@pytest.mark.parametrize(("rows", "steps"), [(8, 1), (3, 3), (1, 8)])
def test_the_anchors_share_of_the_loss_does_not_depend_on_micro_batches(
    tmp_path: Path, rows: int, steps: int
) -> None:
    pairs, anchors = PAIRS * 2, [[5, 11, 61, 12, 30], [9, 10], [40, 8, 7]]
    model = tiny_adapter("llama", beta=0.3)
    q, plain = model.q_config, plain_peft(model, tiny_base("llama"), tmp_path)
    # A policy's KL on all of a text: every token of it but the last is followed by a state.
    responses = [seen(plain, a[:1], [*a[1:], 0], False, q, 1.0) for a in anchors]
    sums = [math.fsum(kl_from_base(response, q)) for response in responses]
    drawn = [i % 3 for i in range(rows * steps)]
    kl = math.fsum(sums[i] for i in drawn) / sum(len(anchors[i]) for i in drawn)
    config = settings(
        tmp_path,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=steps,
        anchor_weight=20.0,
        beta=0.3,
    )
    run = QAdapterTrainer(model, config, train_dataset=pairs, anchors=anchors)
    run.train()
    first = run.state.log_history[0]
    assert first["kl"] == pytest.approx(kl, rel=1e-3)
    assert kl > 0.01
    loss = expected(plain, pairs, q).terms.loss(0.3) + 20.0 * kl
    assert first["loss"] == pytest.approx(loss, rel=1e-4)


def run(base: str, data: str, directory: Path, **fields: Any) -> TrainResult:
    fixed = {"model": base, "data": data, "max_length": 200, "learning_rate": 0.01}
    return run_training(settings(directory, **{**fixed, **fields}))


def saved(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def layers_of(weights: dict[str, torch.Tensor]) -> set[int]:
    return {int(name.split(".layers.")[1].split(".")[0]) for name in weights}


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"layers_to_transform": [1, 2]}, {1, 2}),
        ({"trunk": 0.5}, {2, 3}),
        ({"trunk": 0.75}, {3}),
    ],
)
def test_a_run_adapts_the_layers_it_is_told(
    base: str, data: str, tmp_path: Path, fields: dict[str, Any], layers: set[int]
) -> None:
    run(base, data, tmp_path, **fields)
    assert layers_of(saved(tmp_path)) == layers


@pytest.mark.parametrize(
    ("many", "fields", "layers", "told"),
    [
        (7, {}, {0, 1, 2, 3}, True),
        (6, {}, {3}, False),
        (7, {"trunk": 0.75}, {3}, False),
        (7, {"layers_to_transform": [1]}, {1}, False),
    ],
)
def test_few_pairs_adapt_all_layers(
    base: str,
    data: str,
    tmp_path: Path,
    many: int,
    fields: dict[str, Any],
    layers: set[int],
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("qadapter.config.MANY_PAIRS", many)
    with caplog.at_level("INFO", logger="qadapter"):
        # Of nine pairs the long ones are dropped: those that are trained on count.
        result = run(base, data, tmp_path, max_length=70, max_pairs=9, **fields)
    assert (result.pairs, result.layers) == (6, len(layers))
    assert layers_of(saved(tmp_path)) == layers
    assert f"in {len(layers)} layers" in (tmp_path / "README.md").read_text()
    assert ("adapting all layers, for 6 pairs are few" in caplog.text) == told


def test_how_many_pairs_are_few(tmp_path: Path) -> None:
    config = settings(tmp_path)
    assert (config.trunk_for(499), config.trunk_for(500)) == (0.0, 0.75)
    assert settings(tmp_path, trunk=0.5).trunk_for(499) == 0.5


def test_a_run_has_the_rank_modules_and_method_it_is_told(
    base: str, data: str, tmp_path: Path
) -> None:
    lora = {"lora_r": 3, "lora_alpha": 7, "lora_dropout": 0.25}
    method = {**TWO_TEMPERATURES, "gamma": 0.9, "beta": 0.2, "returns": "discounted"}
    method["parameterization"] = "raw"
    run(base, data, tmp_path, **lora, **method, lora_target_modules=["q_proj", "up_proj"])
    weights = saved(tmp_path)
    ranks = {min(t.shape) for t in weights.values()}
    assert ranks == {3}
    assert {name.split(".")[-3] for name in weights} == {"q_proj", "up_proj"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [config[k] for k in ("r", "lora_alpha", "lora_dropout")] == list(lora.values())
    config = json.loads((tmp_path / "qadapter_config.json").read_text())
    assert {k: config[k] for k in method} == method


def test_truncate_keeps_long_pairs_cut(base: str, data: str, tmp_path: Path) -> None:
    # 24 tokens of prompt; rejected responses of 20, 39 and 58, a third of the pairs each.
    limits = {"max_length": 70, "max_pairs": 9}
    whole = run(base, data, tmp_path / "dropped", **limits)
    assert (whole.pairs, {k: len(v) for k, v in whole.dropped.items()}) == (6, {"too long": 3})
    cut = run(base, data, tmp_path / "cut", **limits, truncate=True)
    assert (cut.pairs, cut.dropped) == (9, {})


def test_the_seed_decides_the_run_and_nothing_else_does(
    base: str, data: str, tmp_path: Path
) -> None:
    found = []
    for i, seed in enumerate((1, 1, 2)):
        torch.manual_seed(1000 + i)
        run(
            base,
            data,
            tmp_path / str(i),
            seed=seed,
            per_device_train_batch_size=12,
            num_train_epochs=1,
        )
        found.append(saved(tmp_path / str(i)))
    first, again, other = found
    assert all(torch.equal(again[n], t) for n, t in first.items())
    # One step does not move A, whose gradient is zero while B is: it is as it was drawn.
    drawn = [n for n in first if "lora_A" in n]
    assert drawn
    assert all(not torch.allclose(other[n], first[n], atol=1e-2) for n in drawn)


def test_anchor_data_holds_the_policy_back(base: str, data: str, tmp_path: Path) -> None:
    text = "<script>no</script> yes yes"
    (tmp_path / "text.txt").write_text(f"{text}\n" * 3)
    options: dict[str, Any] = {"num_train_epochs": 4, "anchor_weight": 30.0}
    run(base, data, tmp_path / "free", **options)
    run(base, data, tmp_path / "held", **options, anchor_data=str(tmp_path / "text.txt"))
    free, held = (
        Policy.from_pretrained(tmp_path / name).drift([text]).kl for name in ("free", "held")
    )
    assert held < 0.5 * free


def test_a_resumed_run_goes_on_where_the_checkpoint_stopped(
    base: str, data: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    run(base, data, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    run(base, data, tmp_path / "rest", **options, resume_from_checkpoint=checkpoint)
    assert {p.name for p in (tmp_path / "rest").glob("checkpoint-*")} == {
        "checkpoint-4",
        "checkpoint-6",
    }
    whole, rest = saved(tmp_path / "whole"), saved(tmp_path / "rest")
    assert all(torch.equal(rest[n], t) for n, t in whole.items())
