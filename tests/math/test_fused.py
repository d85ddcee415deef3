"""`qadapter.fused` equals `qadapter.functional`, in value and gradient, for any chunking.

Tolerances. In float64 a logit is a product of length D and a logsumexp a sum of length V; each
rounds by at most eps times its length times its largest partial sum, so the results agree within
`16·eps·(D + V)·magnitude`, where the magnitude covers |h|·|W| summed
over D. Gradients are sums over V of probabilities times W and obey the same bound.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qadapter import functional as F
from qadapter import fused

ODD = [3, 47, 31, 123]
property_test = settings(deadline=None, max_examples=25)


def tolerance(weight: Tensor, *hidden: Tensor) -> float:
    size = max([1.0, *[float((h.detach().abs() @ weight.abs().T).max()) for h in hidden if len(h)]])
    return 16 * torch.finfo(weight.dtype).eps * sum(weight.shape) * size


def inputs(
    seed: int, states: int, dim: int, vocab: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Two sets of hidden states `[M, D]` and a head `[V, D]`, giving logits of a few nats."""
    gen = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, dim, dtype=torch.float64, generator=gen) for n in (states, states)]
    weight = 2 * torch.randn(vocab, dim, dtype=torch.float64, generator=gen) / dim**0.5
    return made[0].to(dtype), made[1].to(dtype), weight.to(dtype)


def use_tiles_of(monkeypatch: pytest.MonkeyPatch, states: int, words: int) -> None:
    monkeypatch.setattr(fused, "_CPU_TILE", (states, words))


def tiles(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    rows, columns = fused._slices(hidden, weight)
    return len(rows), len(columns)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few states and words, so that every test below crosses boundaries."""
    use_tiles_of(monkeypatch, 5, 11)


def by_hand_kl(p: Tensor, q: Tensor) -> Tensor:
    logp, logq = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    return (logp.exp() * (logp - logq)).sum(-1)


@pytest.mark.parametrize(("states", "dim", "vocab"), [(3, 31, 47), (47, 3, 31), (31, 3, 123)])
def test_gradcheck_linear_logsumexp(
    states: int, dim: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles_of(monkeypatch, 2 if states == 3 else 7, 13)
    hidden, _, weight = inputs(0, states, dim, vocab)
    assert min(tiles(hidden, weight)) > 1
    assert torch.autograd.gradcheck(
        lambda h: fused.linear_logsumexp(h, weight), (hidden.requires_grad_(),)
    )


@pytest.mark.parametrize(("states", "dim", "vocab"), [(3, 31, 47), (47, 3, 31), (31, 3, 123)])
def test_gradcheck_linear_kl_in_its_second_argument(
    states: int, dim: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles_of(monkeypatch, 2 if states == 3 else 7, 13)
    p, q, weight = inputs(1, states, dim, vocab)
    assert min(tiles(q, weight)) > 1
    assert torch.autograd.gradcheck(lambda h: fused.linear_kl(p, h, weight), (q.requires_grad_(),))


@property_test
@given(
    st.sampled_from([1, *ODD]),
    st.sampled_from(ODD),
    st.sampled_from([1, *ODD]),
    st.integers(0, 10**6),
)
def test_linear_logsumexp_equals_the_oracle_and_autograd(
    states: int, dim: int, vocab: int, seed: int
) -> None:
    hidden, outer, weight = inputs(seed, states, dim, vocab)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    value = fused.linear_logsumexp(ours, weight)
    logits = theirs @ weight.T
    atol = tolerance(weight, hidden)
    expected = torch.tensor([oracle.log_sum_exp(row) for row in logits.tolist()], dtype=value.dtype)
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=atol)
    # A different weight on each state, so that a lost or misplaced one shows.
    upstream = outer[:, 0]
    value.backward(upstream)
    torch.logsumexp(logits, dim=-1).backward(upstream)
    scale = max(1.0, float(upstream.abs().max())) * max(1.0, float(weight.abs().max()))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=atol * scale)


@property_test
@given(
    st.sampled_from([1, *ODD]),
    st.sampled_from(ODD),
    st.sampled_from([1, *ODD]),
    st.integers(0, 10**6),
)
def test_linear_kl_equals_functional(states: int, dim: int, vocab: int, seed: int) -> None:
    p, q, weight = inputs(seed, states, dim, vocab)
    ours, theirs = q.clone().requires_grad_(), q.clone().requires_grad_()
    value = fused.linear_kl(p, ours, weight)
    expected = by_hand_kl(p @ weight.T, theirs @ weight.T)
    atol = tolerance(weight, p, q)
    torch.testing.assert_close(value, expected, rtol=0, atol=atol)
    assert float(value.detach().min()) >= -atol
    upstream = p[:, 0]
    value.backward(upstream)
    expected.backward(upstream)
    scale = max(1.0, float(upstream.abs().max())) * max(1.0, float(weight.abs().max()))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=atol * scale)


def test_linear_kl_of_equal_states_is_zero_and_flat() -> None:
    p, _, weight = inputs(2, 47, 31, 123)
    q = p.clone().requires_grad_()
    value = fused.linear_kl(p, q, weight)
    value.sum().backward()
    # The same numbers through the same operations: the difference is exactly zero.
    assert not value.detach().any()
    assert not q.grad.any()


@property_test
@given(st.integers(0, 10**6))
def test_linear_kl_of_close_states_survives_bfloat16(seed: int) -> None:
    """The KL of logits rounded to bfloat16 was twice the true one where two states lie close.

    Logits of magnitude 10 are rounded by 0.03; what tells the policy from its base is no larger.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(509, 64, generator=generator).bfloat16()
    base = torch.randn(31, 64, generator=generator).bfloat16()
    policy = base.float() + 0.003 * torch.randn(31, 64, generator=generator)
    logits = [h.double() @ weight.double().T for h in (base, policy)]
    expected = by_hand_kl(*logits).mean()
    found = fused.linear_kl(base.float(), policy, weight).mean()
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0)
    rounded = by_hand_kl(*(z.bfloat16().double() for z in logits)).mean()
    assert rounded > 1.2 * expected


@pytest.mark.parametrize("parameterisation", ["residual", "raw"])
@property_test
@given(
    st.sampled_from([0.01, 0.7, 2.0]),
    st.sampled_from([0.3, 0.7, 2.0]),
    st.integers(0, 10**6),
)
def test_m1_from_hidden_states(
    parameterisation: str, alpha_0: float, alpha_tilde: float, seed: int
) -> None:
    """V̂ of functional.soft_value from two fused logsumexps, value and gradient.

    The argument of M1's logsumexp is linear in the two logits, up to α0·logsumexp(z_1):
    residual (α̃·z_θ + (α0 − α̃)·z_1)/α̃, raw (z_θ + α0·z_1)/α̃; a head without bias then makes it
    W times the same mixture of hidden states.
    """
    h, h_1, weight = inputs(seed, 31, 47, 123)
    ours, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
    if parameterisation == "residual":
        mixed = ours + (alpha_0 / alpha_tilde - 1) * h_1
        q = F.residual_q(theirs @ weight.T, h_1 @ weight.T, alpha_tilde=alpha_tilde)
    else:
        mixed = (ours + alpha_0 * h_1) / alpha_tilde
        q = F.raw_q(theirs @ weight.T)
    value = alpha_tilde * fused.linear_logsumexp(mixed, weight)
    value = value - alpha_0 * fused.linear_logsumexp(h_1, weight)
    base_logps = torch.log_softmax(h_1 @ weight.T, dim=-1)
    expected = F.soft_value(q, base_logps, alpha_0=alpha_0, alpha_tilde=alpha_tilde)
    atol = tolerance(weight, mixed, h, h_1) * (1 + alpha_0 + alpha_tilde)
    torch.testing.assert_close(value, expected, rtol=0, atol=atol)
    value.sum().backward()
    expected.sum().backward()
    scale = max(1.0, float(weight.abs().max())) / min(1.0, alpha_tilde)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=atol * scale)


def test_gradient_of_the_value_is_the_policy_times_the_head() -> None:
    """∂V̂/∂Q̂ = π̃ (METHOD §3): with the identity as head, the gradient is the policy itself."""
    logits, _, _ = inputs(3, 31, 47, 47)
    logits.requires_grad_()
    fused.linear_logsumexp(logits, torch.eye(47, dtype=torch.float64)).sum().backward()
    zeros = [0.0] * 47
    policy = [oracle.policy(row, zeros, 0.0, 1.0) for row in logits.tolist()]
    expected = torch.tensor(policy, dtype=torch.float64)
    atol = tolerance(torch.eye(47, dtype=torch.float64), logits)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("states", [1, 7, 46, 47, 1000])
@pytest.mark.parametrize("words", [1, 13, 122, 123, 1000])
def test_tiling_changes_nothing(states: int, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q, weight = inputs(4, 47, 31, 123)

    def both() -> list[Tensor]:
        h = q.clone().requires_grad_()
        values = fused.linear_logsumexp(h, weight), fused.linear_kl(p, h, weight)
        grads = [torch.autograd.grad((v * p[:, 0]).sum(), h)[0] for v in values]
        return [*values, *grads]

    use_tiles_of(monkeypatch, 47, 123)
    whole = both()
    use_tiles_of(monkeypatch, states, words)
    assert tiles(q, weight) == (-(-47 // states), -(-123 // words))
    # A GEMM may block another number of rows otherwise: rounding only, times |upstream|·|W|.
    atol = tolerance(weight, p, q) * float(p.abs().max()) * max(1.0, float(weight.abs().max()))
    for a, b in zip(both(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_against_float64(dtype: torch.dtype) -> None:
    """Results come in float32, gradients in the dtype of the states.

    Inputs are rounded first, then both sides see the same numbers. A product of length D rounded
    once to `dtype` from a float32 (or wider) accumulator is off by eps(dtype)·|logit|, plus
    D·eps(float32)·Σ|h·W|; a logsumexp moves by no more than its logits, plus V·eps(float32). The
    gradient softmax·W has two such roundings more; softmax moves by twice its logits.
    """
    p, q, weight = inputs(5, 47, 31, 123, dtype)
    exact_p, exact_q, exact_w = p.double(), q.double(), weight.double()
    wide = exact_q.clone().requires_grad_()
    logits = wide @ exact_w.T
    magnitude = float((exact_q.abs() @ exact_w.abs().T).max())
    magnitude = max(magnitude, float((exact_p.abs() @ exact_w.abs().T).max()))
    size = max(float(logits.detach().abs().max()), float((exact_p @ exact_w.T).abs().max()))
    logit_error = torch.finfo(dtype).eps * size
    logit_error += torch.finfo(torch.float32).eps * (31 + 123) * magnitude
    for ours, theirs, slope in (
        (lambda h: fused.linear_logsumexp(h, weight), torch.logsumexp(logits, -1), 1.0),
        # KL is a mean of log-ratios of size up to 2·size, under a p that moves too.
        (
            lambda h: fused.linear_kl(p, h, weight),
            by_hand_kl(exact_p @ exact_w.T, logits),
            4 + 8 * size,
        ),
    ):
        h = q.clone().requires_grad_()
        value = ours(h)
        assert value.dtype == torch.float32
        error = (value.detach().double() - theirs.detach()).abs().max()
        assert float(error) <= slope * logit_error
        value.sum().backward()
        (expected,) = torch.autograd.grad(theirs.sum(), wide, retain_graph=True)
        assert h.grad.dtype == dtype
        top = float(exact_w.abs().max())
        bound = 4 * top * (logit_error + 2 * torch.finfo(dtype).eps)
        assert float((h.grad.double() - expected).abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_half_precision_rounds_distances_and_not_logits(dtype: torch.dtype, seed: int) -> None:
    """Rounded logits of 20 to 30 put the values off by some 0.03 nats, which over the tokens of a
    response is as much as margins differ. Rounded is only how far each is from one near the top.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5000, 64, generator=generator).to(dtype)
    hidden = (0.8 * torch.randn(300, 64, generator=generator)).to(dtype)
    exact = hidden.double() @ weight.double().T
    expected = exact.logsumexp(-1)
    assert 18 < float(exact.amax(-1).mean()) < 30
    ours = (fused.linear_logsumexp(hidden, weight).double() - expected).square().mean().sqrt()
    rounded = (exact.to(dtype).double().logsumexp(-1) - expected).square().mean().sqrt()
    assert ours < 0.3 * rounded
    assert ours < torch.finfo(dtype).eps  # 0.008 nats in bfloat16


def test_large_logits_do_not_overflow() -> None:
    """exp(±1000) is inf or 0 even in float64; the difference to the largest is what counts."""
    weight = torch.eye(3, dtype=torch.float64)
    h = torch.tensor(
        [[1000.0, 0.0, -1000.0], [-1000.0, -1000.0, -1000.0]], dtype=torch.float64
    ).requires_grad_()
    value = fused.linear_logsumexp(h, weight)
    value.sum().backward()
    expected = torch.tensor([oracle.log_sum_exp(row) for row in h.tolist()], dtype=h.dtype)
    atol = tolerance(weight, h)
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=atol)
    probs = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=h.dtype)
    torch.testing.assert_close(h.grad, probs, rtol=0, atol=atol)


def test_no_states_give_no_values() -> None:
    p, q, weight = inputs(6, 0, 31, 47)
    q.requires_grad_()
    for value in (fused.linear_logsumexp(q, weight), fused.linear_kl(p, q, weight)):
        assert value.shape == (0,)
        (grad,) = torch.autograd.grad(value.sum(), q)
        assert grad.shape == (0, 31)


def test_value_is_the_same_without_a_gradient() -> None:
    p, q, weight = inputs(7, 47, 31, 123)
    leaf = q.clone().requires_grad_()
    for fn in (
        lambda h: fused.linear_logsumexp(h, weight),
        lambda h: fused.linear_kl(p, h, weight),
    ):
        plain = fn(q)
        assert not plain.requires_grad
        assert torch.equal(plain, fn(leaf).detach())


def test_a_head_that_asks_for_a_gradient_is_refused() -> None:
    p, q, weight = inputs(8, 3, 31, 47)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="frozen head"):
        fused.linear_logsumexp(q, weight)
    with pytest.raises(ValueError, match="frozen head"):
        fused.linear_kl(p, q, weight)


def test_linear_kl_refuses_a_first_argument_that_asks_for_a_gradient() -> None:
    p, q, weight = inputs(9, 3, 31, 47)
    with pytest.raises(ValueError, match="detach the first"):
        fused.linear_kl(p.requires_grad_(), q, weight)


def attention_inputs(
    seed: int, queries: int, lead: int, kv_heads: int, groups: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Queries, keys, values and an output's gradient, laid out as models lay them out."""
    gen = torch.Generator().manual_seed(seed)
    shapes = [(queries, kv_heads * groups), *[(queries + lead, kv_heads)] * 2]
    made = [torch.randn(1, n, h, width, dtype=torch.float64, generator=gen) for n, h in shapes]
    made[0] *= 3  # weights of some keys near one, of others near zero
    made.append(torch.randn(made[0].shape, dtype=torch.float64, generator=gen))
    return tuple(t.to(dtype).transpose(1, 2) for t in made)


def by_hand_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The definition, one head, one query at a time."""
    groups, lead = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    heads = []
    for head in range(query.shape[1]):
        k, v = key[0, head // groups], value[0, head // groups]
        rows = []
        for i, q in enumerate(query[0, head]):
            seen = lead + i + 1
            weights = torch.softmax(scale * (k[:seen] @ q), -1)
            rows.append(weights @ v[:seen])
        heads.append(torch.stack(rows))
    return torch.stack(heads)[None]


def attention_and_gradients(function: object, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    *leaves, grad = tensors
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves, 0.3)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("block", [4, 128])
@property_test
@given(
    seed=st.integers(0, 2**16),
    queries=st.integers(1, 11),
    lead=st.integers(0, 9),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
)
def test_causal_attention_is_its_definition_in_value_and_gradient(
    block: int, seed: int, queries: int, lead: int, kv_heads: int, groups: int
) -> None:
    tensors = attention_inputs(seed, queries, lead, kv_heads, groups, 5, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_BLOCK", block)
        ours = attention_and_gradients(
            lambda q, k, v, s: fused.causal_attention(q, k, v, scale=s), tensors
        )
    for found, expected in zip(
        ours, attention_and_gradients(by_hand_attention, tensors), strict=True
    ):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-11, rtol=1e-9)


def test_causal_attention_passes_gradcheck() -> None:
    query, key, value, _ = attention_inputs(0, 6, 3, 2, 2, 4, torch.float64)
    leaves = tuple(t.detach().requires_grad_() for t in (query, key, value))
    assert torch.autograd.gradcheck(
        lambda q, k, v: fused.causal_attention(q, k, v, scale=0.5), leaves
    )


@pytest.mark.parametrize(("queries", "lead"), [(1, 0), (47, 0), (123, 31), (131, 300)])
def test_bfloat16_attention_rounds_no_more_than_torchs_own(queries: int, lead: int) -> None:
    """The weights are remade from rounded scores; near the largest the rounding must not show."""
    tensors = attention_inputs(1, queries, lead, 3, 3, 64, torch.bfloat16)

    def torchs(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        mask = torch.ones(queries, queries + lead, dtype=torch.bool).tril(lead)
        key, value = (t.repeat_interleave(3, 1) for t in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale
        )

    exact = attention_and_gradients(torchs, tuple(t.double() for t in tensors))
    ours = attention_and_gradients(
        lambda q, k, v, s: fused.causal_attention(q, k, v, scale=s), tensors
    )
    for found, other, truth in zip(
        ours, attention_and_gradients(torchs, tensors), exact, strict=True
    ):
        errors = [float((t.double() - truth).norm()) for t in (found, other)]
        # One rounding to bfloat16, of everything, is the least that any way can do.
        least = float(truth.norm()) * 2.0**-9
        assert errors[0] <= 1.5 * errors[1] + least


# ── a linear map and its adapter ────────────────────────────────────────────────────────────────


def lora_inputs(
    seed: int, rows: tuple[int, ...], sizes: tuple[int, int, int], bias: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """x, W, the bias, A and B of a map of `inputs` to `outputs` with an adapter of a rank."""
    gen = torch.Generator().manual_seed(seed)
    wide, high, rank = sizes
    shapes = (*rows, wide), (high, wide), (high,), (rank, wide), (high, rank)
    x, w, b, down, up = (torch.randn(*s, dtype=torch.float64, generator=gen) for s in shapes)
    return x, w, b if bias else None, down, up


@property_test
@given(
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    bias=st.booleans(),
    wants_x=st.booleans(),
    scaling=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_lora_linear_is_its_definition_in_value_and_gradient(
    rows: list[int],
    sizes: tuple[int, int, int],
    bias: bool,
    wants_x: bool,
    scaling: float,
    seed: int,
) -> None:
    x, w, b, down, up = lora_inputs(seed, tuple(rows), sizes, bias)
    leaves = [t.requires_grad_() for t in ((x, down, up) if wants_x else (down, up))]
    found = fused.lora_linear(x, w, b, down, up, scaling=scaling)
    # The whole map as one matrix, which neither side ever forms in training.
    expected = torch.einsum("...i,oi->...o", x, w + scaling * up @ down)
    if b is not None:
        expected = expected + b
    weights = torch.randn(found.shape, dtype=found.dtype)
    grads = [torch.autograd.grad((out * weights).sum(), leaves) for out in (found, expected)]
    # Sums of at most 45 products of numbers below 10 in size, and of as many rows.
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-10)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-10)


def test_lora_linear_passes_gradcheck() -> None:
    x, w, b, down, up = lora_inputs(3, (2, 3), (5, 4, 2), True)
    leaves = [t.requires_grad_() for t in (x, down, up)]
    assert torch.autograd.gradcheck(
        lambda x, down, up: fused.lora_linear(x, w, b, down, up, scaling=0.7), leaves
    )


def test_lora_linear_keeps_the_adapters_gradients_in_the_adapters_dtype() -> None:
    x, w, _, down, up = lora_inputs(4, (40,), (32, 24, 4), False)
    exact = [t.clone().requires_grad_() for t in (down, up)]
    fused.lora_linear(x, w, None, *exact, scaling=2.0).square().sum().backward()
    half = [t.float().requires_grad_() for t in (down, up)]
    out = fused.lora_linear(x.bfloat16(), w.bfloat16(), None, *half, scaling=2.0)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    for found, expected in zip(half, exact, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert found.grad.dtype == torch.float32
        # bfloat16 keeps 8 bits; sums of many rounded terms stay within a few times that.
        error = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert float(error) < 2**-6


def test_lora_linear_refuses_a_weight_that_asks_for_a_gradient() -> None:
    x, w, b, down, up = lora_inputs(5, (2,), (3, 3, 1), True)
    with pytest.raises(ValueError, match="frozen"):
        fused.lora_linear(x, w.requires_grad_(), b, down, up, scaling=1.0)
