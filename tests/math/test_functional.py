"""`qadapter.functional` against METHOD: M1–M5 versus the oracle, and the identities I1–I7.

Tolerances. Everything is float64. `ulps(magnitude, terms)` bounds a sum of `terms` numbers no
larger than `magnitude`: each addition rounds by at most eps·magnitude·terms, so the error is below
eps·magnitude·terms². One factor of 16 covers exp, log and the two softmaxes below every sum.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from itertools import combinations

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qadapter import functional as F

EPS = torch.finfo(torch.float64).eps
property_test = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)


def ulps(magnitude: float, terms: int) -> float:
    return 16 * EPS * max(1.0, magnitude) * max(1, terms) ** 2


# --- Random pairs, and the padded batch made of them ---------------------------------------------


@dataclass(frozen=True)
class Sequence:
    """One response and its prompt, unpadded; logits at the n + 1 states s_0 … s_n."""

    prompt: list[int]
    tokens: list[int]
    z: Tensor
    z_1: Tensor
    terminal: bool


@dataclass(frozen=True)
class Case:
    chosen: list[Sequence]
    rejected: list[Sequence]
    vocab: int
    alpha_0: float
    alpha_tilde: float
    gamma: float
    beta: float
    residual: bool

    @property
    def sequences(self) -> list[Sequence]:
        return self.chosen + self.rejected

    @property
    def alphas(self) -> dict[str, float]:
        return {"alpha_0": self.alpha_0, "alpha_tilde": self.alpha_tilde}

    @property
    def n_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.sequences)

    def q(self, s: Sequence) -> Tensor:
        """Q̂ of METHOD §2 at each state, written out here and not taken from the code."""
        return self.alpha_tilde * (s.z - s.z_1) if self.residual else s.z

    def reward_bound(self) -> float:
        """|Q̂| + α0·|log π1| + α̃·log V, twice: no reward, and no number on its way, is larger."""
        q = max(float(self.q(s).detach().abs().max()) for s in self.sequences)
        z = max(float(s.z.detach().abs().max() + s.z_1.abs().max()) for s in self.sequences)
        logp = max(float(torch.log_softmax(s.z_1, -1).abs().max()) for s in self.sequences)
        slack = self.alpha_tilde * (z + math.log(self.vocab))
        return 2 * (q + self.alpha_0 * logp + slack) + 1

    def tolerance(self) -> float:
        """Of a reward or a return: a softmax over V below a sum over at most N tokens."""
        return ulps(self.reward_bound(), self.vocab + self.n_tokens)

    def loss_tolerance(self) -> float:
        """softplus has slope ≤ 1 in each of 2B returns; r2² has slope 2·|r2|, in N rewards."""
        slope = 2 * len(self.chosen) + 2 * self.reward_bound() * self.n_tokens
        return slope * self.tolerance()


def random_case(seed: int, shapes: list[tuple[int, int, int]], **fields: object) -> Case:
    """Random logits for pairs of (prompt, chosen, rejected) lengths; a pair shares s_0."""
    rng = random.Random(seed)
    gen = torch.Generator().manual_seed(seed)
    vocab, scale = fields["vocab"], fields.pop("scale", 2.0)
    complete = fields.pop("complete", None)
    sides: tuple[list[Sequence], list[Sequence]] = ([], [])
    for prompt_length, *lengths in shapes:
        prompt = [rng.randrange(vocab) for _ in range(prompt_length)]
        first = scale * torch.randn(2, 1, vocab, dtype=torch.float64, generator=gen)
        for side, n in zip(sides, lengths, strict=True):
            rest = scale * torch.randn(2, n, vocab, dtype=torch.float64, generator=gen)
            z, z_1 = torch.cat([first, rest], dim=1)
            tokens = [rng.randrange(vocab) for _ in range(n)]
            terminal = rng.random() < 0.5 if complete is None else complete
            side.append(Sequence(prompt, tokens, z, z_1, terminal))
    return Case(sides[0], sides[1], **fields)  # type: ignore[arg-type]


LENGTH = st.sampled_from([1, 1, 2, 3, 5, 8])


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> Case:
    fields: dict[str, object] = {
        "vocab": draw(st.sampled_from([2, 3, 7, 31])),
        "scale": draw(st.sampled_from([0.0, 0.1, 2.0, 20.0])),
        "alpha_0": draw(st.sampled_from([0.01, 0.4, 1.0, 2.5])),
        "alpha_tilde": draw(st.sampled_from([0.1, 0.7, 1.0, 3.0])),
        "gamma": draw(st.sampled_from([1.0, 0.97, 0.5])),
        "beta": draw(st.sampled_from([0.0, 0.05, 1.0])),
        "residual": draw(st.booleans()),
        "complete": draw(st.sampled_from([True, False, None])),
    }
    fields |= fixed
    shapes = draw(st.lists(st.tuples(LENGTH, LENGTH, LENGTH), min_size=1, max_size=4))
    return random_case(draw(st.integers(0, 2**32 - 1)), shapes, **fields)


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    completion_mask: Tensor
    terminal: Tensor
    z: Tensor
    z_1: Tensor


def collate(case: Case, *, extra: int = 0, left: int = 0, fill: float = math.nan) -> Batch:
    """Return the padded [2B, T] batch, with `left` padding before and `extra` more after each row.

    Logits at every position that is not a state of the response are `fill`: with NaN, a result
    that reads one of them is NaN and equals nothing.
    """
    sequences = case.sequences
    longest = max(len(s.prompt) + len(s.tokens) for s in sequences)
    length = left + longest + extra
    n = len(sequences)
    ids = torch.randint(case.vocab, (n, length), generator=torch.Generator().manual_seed(extra))
    mask = torch.zeros(n, length, dtype=torch.bool)
    z = torch.full((n, length, case.vocab), fill, dtype=torch.float64)
    z_1 = z.clone()
    for row, s in enumerate(sequences):
        start = left + len(s.prompt)
        ids[row, left:start] = torch.tensor(s.prompt)
        ids[row, start : start + len(s.tokens)] = torch.tensor(s.tokens)
        mask[row, start : start + len(s.tokens)] = True
        # s_t sits one position before the token chosen in it.
        z[row, start - 1 : start + len(s.tokens)] = s.z
        z_1[row, start - 1 : start + len(s.tokens)] = s.z_1
    return Batch(ids, mask, torch.tensor([s.terminal for s in sequences]), z, z_1)


def rewards_of(case: Case, batch: Batch) -> tuple[Tensor, F.Transitions]:
    """The chain of functional.py from padded logits to r2 of each response token."""
    tr = F.transitions(batch.completion_mask, batch.terminal)
    z, z_1 = batch.z[tr.rows, tr.columns], batch.z_1[tr.rows, tr.columns]
    logps = torch.log_softmax(z_1, dim=-1)
    q = F.residual_q(z, z_1, alpha_tilde=case.alpha_tilde) if case.residual else F.raw_q(z)
    values = F.soft_value(q, logps, **case.alphas)
    actions = batch.input_ids[tr.response, tr.action_columns]
    rewards = F.token_rewards(
        q[tr.taken, actions], values[tr.following], tr.continues, gamma=case.gamma
    )
    return rewards, tr


def sums_of(case: Case, batch: Batch) -> F.LossSums:
    rewards, tr = rewards_of(case, batch)
    return F.preference_sums(F.returns(rewards, tr.response, len(batch.input_ids)), rewards)


def oracle_responses(case: Case) -> list[oracle.Response]:
    return [
        oracle.Response(
            s.tokens,
            case.q(s).tolist(),
            [oracle.log_softmax(row) for row in s.z_1.tolist()],
            s.terminal,
        )
        for s in case.sequences
    ]


def oracle_terms(case: Case) -> oracle.Terms:
    responses = oracle_responses(case)
    half = len(responses) // 2
    pairs = list(zip(responses[:half], responses[half:], strict=True))
    return oracle.preference_terms(pairs, case.alpha_0, case.alpha_tilde, case.gamma)


# --- M1–M5 ----------------------------------------------------------------------------------------


@property_test
@given(cases())
def test_m1_soft_value_and_m2_policy(case: Case) -> None:
    for s, expected in zip(case.sequences, oracle_responses(case), strict=True):
        base_logps = torch.log_softmax(s.z_1, dim=-1)
        values = F.soft_value(case.q(s), base_logps, **case.alphas)
        logps = F.policy_logps(case.q(s), base_logps, **case.alphas)
        for t, (q, b) in enumerate(zip(expected.q, expected.base_logps, strict=True)):
            value = oracle.soft_value(q, b, case.alpha_0, case.alpha_tilde)
            probs = oracle.policy(q, b, case.alpha_0, case.alpha_tilde)
            assert abs(float(values[t]) - value) <= case.tolerance()
            # log π̃ is a value over α̃, and exp has slope ≤ 1 on it.
            torch.testing.assert_close(
                logps[t].exp(),
                torch.tensor(probs, dtype=torch.float64),
                rtol=0,
                atol=case.tolerance() / min(1.0, case.alpha_tilde),
            )


@property_test
@given(cases())
def test_gradient_of_m1_is_m2(case: Case) -> None:
    s, expected = case.sequences[0], oracle_responses(case)[0]
    q = case.q(s).clone().requires_grad_()
    F.soft_value(q, torch.log_softmax(s.z_1, dim=-1), **case.alphas).sum().backward()
    probs = [
        oracle.policy(row, b, case.alpha_0, case.alpha_tilde)
        for row, b in zip(expected.q, expected.base_logps, strict=True)
    ]
    torch.testing.assert_close(
        q.grad,
        torch.tensor(probs, dtype=torch.float64),
        rtol=0,
        atol=case.tolerance() / min(1.0, case.alpha_tilde),
    )


@property_test
@given(cases(), st.integers(0, 3), st.integers(0, 3))
def test_m4_token_rewards(case: Case, extra: int, left: int) -> None:
    rewards, tr = rewards_of(case, collate(case, extra=extra, left=left))
    expected = [
        oracle.token_rewards(r, case.alpha_0, case.alpha_tilde, case.gamma)
        for r in oracle_responses(case)
    ]
    assert tr.response.tolist() == [i for i, row in enumerate(expected) for _ in row]
    flat = torch.tensor([x for row in expected for x in row], dtype=torch.float64)
    torch.testing.assert_close(rewards, flat, rtol=0, atol=case.tolerance())


@property_test
@given(cases(), st.integers(0, 3), st.integers(0, 3))
def test_m5_loss(case: Case, extra: int, left: int) -> None:
    sums, expected = sums_of(case, collate(case, extra=extra, left=left)), oracle_terms(case)
    atol = case.loss_tolerance()
    assert int(sums.n_pairs) == expected.n_pairs
    assert int(sums.n_tokens) == expected.n_tokens
    assert abs(float(sums.bt_sum) - expected.bt_sum) <= atol
    assert abs(float(sums.r2_sq_sum) - expected.r2_sq_sum) <= atol
    assert abs(float(sums.loss(beta=case.beta)) - expected.loss(case.beta)) <= 2 * atol


@pytest.mark.parametrize("vocab", [3, 47, 31, 123])
@pytest.mark.parametrize("residual", [True, False])
def test_m5_loss_odd_shapes(vocab: int, residual: bool) -> None:
    """One batch per vocabulary, with a single-token, a truncated and a long response in it."""
    case = random_case(
        vocab,
        [(1, 1, 1), (3, 31, 47), (47, 1, 3)],
        vocab=vocab,
        alpha_0=0.4,
        alpha_tilde=0.7,
        gamma=0.97,
        beta=0.1,
        residual=residual,
    )
    loss = float(sums_of(case, collate(case)).loss(beta=case.beta))
    assert abs(loss - oracle_terms(case).loss(case.beta)) <= case.loss_tolerance()


@property_test
@given(cases(gamma=1.0, complete=True), st.integers(0, 3))
def test_m5_identical_pair_is_log_two(case: Case, extra: int) -> None:
    same = replace(case, rejected=case.chosen)
    sums = sums_of(same, collate(same, extra=extra))
    # Both returns are the same sum in the same order, so the margin is exactly zero.
    assert abs(float(sums.bt_sum) / len(case.chosen) - math.log(2)) <= ulps(1, len(case.chosen))


def test_m5_extreme_margins_stay_finite() -> None:
    """σ of ∓2000 is 0 or 1 in float64: a loss written with log(sigmoid) gives inf here."""
    rewards = torch.tensor([1000.0, -1000.0], dtype=torch.float64, requires_grad=True)
    for order, bt in (([0, 1], 0.0), ([1, 0], 2000.0)):
        ordered = rewards[order]
        sums = F.preference_sums(ordered, ordered)
        assert float(sums.bt_sum.detach()) == bt
        (grad,) = torch.autograd.grad(sums.bt_sum, rewards)
        assert bool(grad.isfinite().all())


@property_test
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.sampled_from([1.0, 0.97, 0.5]),
    st.integers(0, 10**6),
)
def test_returns_and_discounted_returns(lengths: list[int], gamma: float, seed: int) -> None:
    rng = random.Random(seed)
    rows = [[rng.gauss(0, 3) for _ in range(n)] for n in lengths]
    flat = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    response = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    plain = F.returns(flat, response, len(rows))
    discounted = F.discounted_returns(flat, response, len(rows), gamma=gamma)
    atol = ulps(float(flat.abs().max()), max(lengths))
    for i, row in enumerate(rows):
        assert abs(float(plain[i]) - math.fsum(row)) <= atol
        assert abs(float(discounted[i]) - oracle.discounted_return(row, gamma)) <= atol


def test_returns_of_a_response_without_tokens_is_zero() -> None:
    rewards, response = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2])
    assert F.returns(rewards, response, 4).tolist() == [1.0, 0.0, 6.0, 0.0]
    assert F.discounted_returns(rewards, response, 4, gamma=0.5).tolist() == [1.0, 0.0, 4.0, 0.0]


# --- Identities -----------------------------------------------------------------------------------


@property_test
@given(cases())
def test_i1_advantage_is_a_log_ratio(case: Case) -> None:
    for s in case.sequences:
        q, base_logps = case.q(s), torch.log_softmax(s.z_1, dim=-1)
        advantage = q - F.soft_value(q, base_logps, **case.alphas)[:, None]
        logps = F.policy_logps(q, base_logps, **case.alphas)
        torch.testing.assert_close(
            advantage,
            case.alpha_tilde * logps - case.alpha_0 * base_logps,
            rtol=0,
            atol=case.tolerance(),
        )


@property_test
@given(cases(gamma=1.0, complete=True))
def test_i2_next_values_telescope_to_same_state_values(case: Case) -> None:
    batch = collate(case)
    rewards, tr = rewards_of(case, batch)
    ours = F.returns(rewards, tr.response, len(batch.input_ids))
    for i, s in enumerate(case.sequences):
        q = case.q(s)
        values = F.soft_value(q, torch.log_softmax(s.z_1, dim=-1), **case.alphas)
        same_state = sum(float(q[t, a] - values[t]) for t, a in enumerate(s.tokens))
        # Both are the same sum of 2n + 1 terms, in another order.
        assert abs(float(ours[i]) - (float(values[0]) + same_state)) <= 4 * case.tolerance()


@property_test
@given(cases(gamma=1.0, complete=True, residual=True, beta=0.0, scale=2.0), st.booleans())
def test_i3_dpo_loss_and_gradient(case: Case, residual: bool) -> None:
    """With α0 = α̃ the loss and its gradient in the policy's logits are DPO's, β_DPO = α̃.

    s_0 is one state of the pair but two rows of the batch: V̂(s_0) cancels only between the two,
    so at s_0 the gradients of both rows are added, as autograd adds them in a shared model.
    """
    case = replace(case, alpha_0=case.alpha_tilde, residual=residual)
    batch = collate(case, fill=0.0)
    z = batch.z.clone().requires_grad_()
    loss = sums_of(case, replace(batch, z=z)).bt_sum
    loss.backward()
    # At α0 = α̃ the residual policy is softmax(z_θ); the raw one is π1·exp(z_θ/α̃), normalised.
    scale = case.alpha_tilde if residual else 1.0
    slack = case.loss_tolerance() / min(1.0, case.alpha_tilde)
    expected_loss = []
    for j, pair in enumerate(zip(case.chosen, case.rejected, strict=True)):
        reference = tuple([oracle.log_softmax(row) for row in s.z_1.tolist()] for s in pair)
        if residual:
            policy = tuple([oracle.log_softmax(row) for row in s.z.tolist()] for s in pair)
        else:
            policy = tuple(
                [
                    oracle.log_softmax(
                        [a / case.alpha_tilde + b for a, b in zip(row, ref, strict=True)]
                    )
                    for row, ref in zip(s.z.tolist(), refs, strict=True)
                ]
                for s, refs in zip(pair, reference, strict=True)
            )
        tokens = (pair[0].tokens, pair[1].tokens)
        margin = oracle.dpo_margin(tokens, policy, reference, case.alpha_tilde)
        expected_loss.append(oracle.minus_log_sigmoid(margin))
        # d log π̃ / dz_θ carries 1/α̃ in `raw`, nothing in `residual`: β_DPO·that = `scale`.
        grads = oracle.dpo_logit_gradient(tokens, policy, margin, scale)
        start = len(pair[0].prompt)
        rows = (z.grad[j], z.grad[len(case.chosen) + j])
        first = torch.tensor([grads[0][0], grads[1][0]], dtype=z.dtype).sum(0)
        shared = rows[0][start - 1] + rows[1][start - 1]
        torch.testing.assert_close(shared, first, rtol=0, atol=2 * slack)
        for row, side in zip(rows, grads, strict=True):
            for t in range(1, len(side)):
                want = torch.tensor(side[t], dtype=z.dtype)
                torch.testing.assert_close(row[start - 1 + t], want, rtol=0, atol=slack)
    assert abs(float(loss.detach()) - math.fsum(expected_loss)) <= slack


@property_test
@given(cases(residual=True))
def test_i4_zero_q_is_the_base(case: Case) -> None:
    """Training starts at the base: with z_θ = z_1 and α0 = α̃ nothing has changed yet."""
    still = [[replace(s, z=s.z_1) for s in side] for side in (case.chosen, case.rejected)]
    case = replace(case, chosen=still[0], rejected=still[1], alpha_0=case.alpha_tilde)
    rewards, _ = rewards_of(case, collate(case))
    sums = sums_of(case, collate(case))
    atol = case.tolerance()
    assert float(rewards.abs().max()) <= atol
    assert abs(float(sums.loss(beta=case.beta)) - math.log(2)) <= case.loss_tolerance()
    for s in case.sequences:
        base_logps = torch.log_softmax(s.z_1, dim=-1)
        logps = F.policy_logps(case.q(s), base_logps, **case.alphas)
        assert float(F.soft_value(case.q(s), base_logps, **case.alphas).abs().max()) <= atol
        torch.testing.assert_close(logps, base_logps, rtol=0, atol=atol / min(1, case.alpha_tilde))


def shaped(case: Case, seed: int) -> tuple[Case, list[Tensor]]:
    """Return the case with Q̂ + c(s), and c; s_0 is shared, so a pair has one c(s_0)."""
    gen = torch.Generator().manual_seed(seed)
    shifts: list[Tensor] = []
    for i, s in enumerate(case.sequences):
        c = 3 * torch.randn(len(s.z), dtype=torch.float64, generator=gen)
        if i >= len(case.chosen):
            c[0] = shifts[i - len(case.chosen)][0]
        shifts.append(c)
    scale = case.alpha_tilde if case.residual else 1.0
    moved = [
        replace(s, z=s.z + c[:, None] / scale) for s, c in zip(case.sequences, shifts, strict=True)
    ]
    half = len(case.chosen)
    return replace(case, chosen=moved[:half], rejected=moved[half:]), shifts


@property_test
@given(cases(), st.integers(0, 10**6))
def test_i5_shaping_moves_rewards_and_not_the_policy(case: Case, seed: int) -> None:
    other, shifts = shaped(case, seed)
    before, _ = rewards_of(case, collate(case))
    after, _ = rewards_of(other, collate(other))
    expected = []
    for s, c in zip(case.sequences, shifts, strict=True):
        for t in range(len(s.tokens)):
            ended = s.terminal and t == len(s.tokens) - 1
            expected.append(float(c[t]) - (0.0 if ended else case.gamma * float(c[t + 1])))
    change = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(after - before, change, rtol=0, atol=4 * other.tolerance())
    for s, moved in zip(case.sequences, other.sequences, strict=True):
        base_logps = torch.log_softmax(s.z_1, dim=-1)
        torch.testing.assert_close(
            F.policy_logps(case.q(s), base_logps, **case.alphas),
            F.policy_logps(other.q(moved), base_logps, **case.alphas),
            rtol=0,
            atol=4 * other.tolerance() / min(1.0, case.alpha_tilde),
        )


@property_test
@given(cases(gamma=1.0, complete=True), st.integers(0, 10**6))
def test_i5_bradley_terry_is_blind_to_shaping_and_beta_is_not(case: Case, seed: int) -> None:
    other, _ = shaped(case, seed)
    before, after = sums_of(case, collate(case)), sums_of(other, collate(other))
    atol = case.loss_tolerance() + other.loss_tolerance()
    assert abs(float(after.bt_sum - before.bt_sum)) <= atol
    # Σ r2² could only stay by coincidence: the shift is a continuous random number.
    assert abs(float(after.r2_sq_sum - before.r2_sq_sum)) > atol


END, ACTIONS, HORIZON = 2, 3, 3


def ends(state: oracle.State) -> bool:
    return len(state) == HORIZON or (len(state) > 0 and state[-1] == END)


def strings(state: oracle.State = ()) -> list[oracle.State]:
    """All 15 complete strings of at most three tokens that stop at END."""
    if ends(state):
        return [state]
    return [s for a in range(ACTIONS) for s in strings((*state, a))]


def recovered_and_optimal(
    seed: int, *, gamma: float, discounted: bool, lam: float, alpha_1: float, alpha_tilde: float
) -> float:
    """Fit tabular Q̂ to the expected M5 (β=0) over all pairs; return the policy's largest error."""
    rng = random.Random(seed)
    states = sorted({s[:t] for s in strings() for t in range(len(s))}, key=lambda s: (len(s), s))
    number = {s: i for i, s in enumerate(states)}
    n_prompts, responses = 2, strings()
    q = torch.zeros(n_prompts, len(states), ACTIONS, dtype=torch.float64, requires_grad=True)
    r1, r2, base, optimal = [], [], [], []
    for _ in range(n_prompts):
        r1.append({(s, a): rng.gauss(0, 1) for s in states for a in range(ACTIONS)})
        r2.append({(s, a): rng.gauss(0, 1) for s in states for a in range(ACTIONS)})

        def first(s: oracle.State, a: int) -> float:
            return r1[-1][s, a]

        def both(s: oracle.State, a: int) -> float:
            return lam * r1[-1][s, a] + r2[-1][s, a]

        base.append(oracle.soft_optimal_policy(first, ACTIONS, ends, alpha_1, gamma))
        optimal.append(oracle.soft_optimal_policy(both, ACTIONS, ends, alpha_tilde, gamma))
    as_table = [[[table[s] for s in states] for table in tables] for tables in (base, optimal)]
    base_logps = torch.tensor(as_table[0], dtype=torch.float64).log()
    target = torch.tensor(as_table[1], dtype=torch.float64)

    # One row a response: a prompt token, then the string; position t holds the state s_t.
    width = HORIZON + 1
    n = len(responses)
    ids = torch.zeros(n_prompts * n, width, dtype=torch.int64)
    mask = torch.zeros(n_prompts * n, width, dtype=torch.bool)
    where = torch.zeros(n_prompts * n, width, dtype=torch.int64)
    true_returns = []
    for p in range(n_prompts):
        for i, s in enumerate(responses):
            row = p * n + i
            ids[row, 1 : 1 + len(s)] = torch.tensor(s)
            mask[row, 1 : 1 + len(s)] = True
            for t in range(len(s)):
                where[row, t] = p * len(states) + number[s[:t]]
            rewards = [r2[p][s[:t], s[t]] for t in range(len(s))]
            true_returns.append(
                oracle.discounted_return(rewards, gamma) if discounted else math.fsum(rewards)
            )
    pairs = [(p * n + i, p * n + j) for p in range(n_prompts) for i, j in combinations(range(n), 2)]
    order = torch.tensor([w for w, _ in pairs] + [x for _, x in pairs])
    # E over the label of −log σ(±m) = −log σ(m) + P(rejected wins)·m.
    upset = torch.tensor(
        [oracle.sigmoid(true_returns[x] - true_returns[w]) for w, x in pairs], dtype=torch.float64
    )
    tr = F.transitions(mask, torch.ones(len(mask), dtype=torch.bool))
    alphas = {"alpha_0": lam * alpha_1, "alpha_tilde": alpha_tilde}

    def objective() -> Tensor:
        index = where[tr.rows, tr.columns]
        at = q.flatten(0, 1)[index]
        values = F.soft_value(at, base_logps.flatten(0, 1)[index], **alphas)
        taken = at[tr.taken, ids[tr.response, tr.action_columns]]
        rewards = F.token_rewards(taken, values[tr.following], tr.continues, gamma=gamma)
        total = (
            F.discounted_returns(rewards, tr.response, len(mask), gamma=gamma)
            if discounted
            else F.returns(rewards, tr.response, len(mask))
        )
        ordered = total[order]
        chosen, rejected = ordered.chunk(2)
        return F.preference_sums(ordered, rewards).bt_sum + (upset * (chosen - rejected)).sum()

    optimiser = torch.optim.LBFGS(
        [q],
        max_iter=1000,
        tolerance_grad=1e-11,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimiser.step(closure)
    learned = F.policy_logps(q.detach(), base_logps, **alphas).exp()
    return float((learned - target).abs().max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "discounted"), [(1.0, False), (0.8, True)])
def test_i6_tabular_recovery(seed: int, gamma: float, discounted: bool) -> None:
    """π̃ becomes the soft-optimal policy of λ·r1 + r2, and r1 is never shown to the loss.

    At γ = 1 preferences fix the returns up to a constant per prompt, which no policy feels. With
    γ < 1 the same holds for Σ γ^t r2. A strong-Wolfe line search stops telling two losses apart
    at eps·loss (a loss of about 1e2 over 210 pairs), so Q̂ is known to about sqrt(eps·1e2) = 1e-7;
    1e-6 leaves a factor of ten, and a wrong method misses by 1e-2 or more (the next test).
    """
    error = recovered_and_optimal(
        seed, gamma=gamma, discounted=discounted, lam=0.6, alpha_1=0.5, alpha_tilde=0.8
    )
    assert error < 1e-6


def test_i6_plain_sum_does_not_recover_when_gamma_is_below_one() -> None:
    """The reason why discounted_returns is offered: M5's plain sum is exact at γ = 1 only."""
    error = recovered_and_optimal(
        0, gamma=0.8, discounted=False, lam=0.6, alpha_1=0.5, alpha_tilde=0.8
    )
    assert error > 1e-2


def per_pair(case: Case, **padding: int) -> list[tuple[float, float]]:
    """(Bradley–Terry, Σ r2²) of each pair, computed in one batch."""
    batch = collate(case, **padding)
    rewards, tr = rewards_of(case, batch)
    totals = F.returns(rewards, tr.response, len(batch.input_ids))
    squares = F.returns(rewards.square(), tr.response, len(batch.input_ids))
    n = len(case.chosen)
    return [
        (
            float(F.preference_sums(totals[[j, n + j]], rewards).bt_sum),
            float(squares[j] + squares[n + j]),
        )
        for j in range(n)
    ]


@property_test
@given(cases(), st.integers(0, 40), st.integers(0, 9), st.randoms(use_true_random=False))
def test_i7_pair_loss_ignores_padding_mates_and_order(
    case: Case, extra: int, left: int, rng: random.Random
) -> None:
    n = len(case.chosen)
    together = per_pair(case)
    order = rng.sample(range(n), n)
    mixed = replace(
        case, chosen=[case.chosen[j] for j in order], rejected=[case.rejected[j] for j in order]
    )
    shuffled = dict(zip(order, per_pair(mixed, extra=extra, left=left), strict=True))
    for j in range(n):
        alone = replace(case, chosen=[case.chosen[j]], rejected=[case.rejected[j]])
        (single,) = per_pair(alone, left=left)
        # Same arithmetic on the same rows: only the blocking of vectorised sums may differ.
        for other in (single, shuffled[j]):
            assert abs(other[0] - together[j][0]) <= case.loss_tolerance()
            assert abs(other[1] - together[j][1]) <= case.loss_tolerance()


@property_test
@given(cases())
def test_i7_sums_add_over_batches(case: Case) -> None:
    whole = sums_of(case, collate(case))
    parts = [
        sums_of(part, collate(part, extra=j))
        for j, pair in enumerate(zip(case.chosen, case.rejected, strict=True))
        for part in [replace(case, chosen=[pair[0]], rejected=[pair[1]])]
    ]
    added = F.LossSums(*[torch.stack(column).sum() for column in zip(*parts, strict=True)])
    assert int(added.n_pairs) == int(whole.n_pairs)
    assert int(added.n_tokens) == int(whole.n_tokens)
    atol = case.loss_tolerance()
    difference = added.loss(beta=case.beta) - whole.loss(beta=case.beta)
    assert abs(float(difference)) <= 2 * atol


@property_test
@given(st.lists(st.integers(-32, 32), min_size=4, max_size=24), st.integers(1, 3))
def test_i7_sums_add_without_any_rounding(eighths: list[int], cut: int) -> None:
    """Multiples of 1/8 square and add exactly in float64, so a mean of means would show here."""
    rewards = torch.tensor(eighths, dtype=torch.float64) / 8
    totals = torch.zeros(2, dtype=torch.float64)
    parts = [F.preference_sums(totals, rewards[:cut]), F.preference_sums(totals, rewards[cut:])]
    whole = F.preference_sums(totals, rewards)
    assert float(parts[0].r2_sq_sum + parts[1].r2_sq_sum) == float(whole.r2_sq_sum)
    assert int(parts[0].n_tokens + parts[1].n_tokens) == int(whole.n_tokens)
    assert float(whole.r2_sq_sum) == sum(x * x for x in eighths) / 64


# --- Behaviour ------------------------------------------------------------------------------------


@property_test
@given(cases(scale=0.1, complete=True, gamma=1.0, residual=True, alpha_0=1.0, alpha_tilde=1.0))
def test_swapping_chosen_and_rejected_raises_a_trained_loss(case: Case) -> None:
    # Different tokens and separate tables, so that each pair can be told apart.
    case = replace(
        case,
        chosen=[replace(s, tokens=[0] * len(s.tokens)) for s in case.chosen],
        rejected=[replace(s, tokens=[1] * len(s.tokens)) for s in case.rejected],
    )
    batch = collate(case, fill=0.0)
    z = batch.z.clone().requires_grad_()
    # Curvature ≤ ‖∇margin‖²/4 + 1 ≤ 9 at 16 tokens a pair: every step of 0.1 < 2/9 descends.
    optimiser = torch.optim.SGD([z], lr=0.1)
    first = float(sums_of(case, batch).bt_sum)
    for _ in range(60):
        optimiser.zero_grad()
        sums_of(case, replace(batch, z=z)).bt_sum.backward()
        optimiser.step()
    rewards, tr = rewards_of(case, replace(batch, z=z.detach()))
    totals = F.returns(rewards, tr.response, 2 * len(case.chosen))
    chosen, rejected = totals.chunk(2)
    trained = float(F.preference_sums(totals, rewards).bt_sum)
    swapped = float(F.preference_sums(torch.cat([rejected, chosen]), rewards).bt_sum)
    assert trained < first
    assert bool((chosen > rejected).all())
    assert swapped > trained
    # −log σ(−m) + log σ(m) = m.
    margin = float((chosen - rejected).sum())
    assert abs((swapped - trained) - margin) <= ulps(margin, 4 * len(case.chosen))


@property_test
@given(cases(scale=2.0, gamma=0.97), st.integers(0, 3), st.integers(0, 3))
def test_which_states_are_trained(case: Case, extra: int, left: int) -> None:
    """The prompt's last state and each state that chooses a token are trained; no other is, except
    the cut's of a truncated response. (The authors skip the first token; METHOD §4.2.)
    """
    batch = collate(case, extra=extra, left=left, fill=0.0)
    z = batch.z.clone().requires_grad_()
    sums_of(case, replace(batch, z=z)).r2_sq_sum.backward()
    touched = (z.grad != 0).any(dim=-1)
    for row, s in enumerate(case.sequences):
        start = left + len(s.prompt)
        n_states = len(s.tokens) + (0 if s.terminal else 1)
        expected = torch.zeros_like(touched[row])
        expected[start - 1 : start - 1 + n_states] = True
        assert touched[row].tolist() == expected.tolist()


@property_test
@given(cases(scale=2.0, gamma=1.0, complete=True), st.integers(0, 3))
def test_bradley_terry_trains_the_first_and_the_end_token(case: Case, extra: int) -> None:
    batch = collate(case, extra=extra, fill=0.0)
    z = batch.z.clone().requires_grad_()
    rewards, tr = rewards_of(case, replace(batch, z=z))
    totals = F.returns(rewards, tr.response, len(case.sequences))
    totals.sum().backward()  # not bt_sum: its slope underflows to 0 where a margin is huge
    scale = case.alpha_tilde if case.residual else 1.0
    atol = case.tolerance() / min(1.0, case.alpha_tilde)
    for row, (s, r) in enumerate(zip(case.sequences, oracle_responses(case), strict=True)):
        start = len(s.prompt)
        for t, token in enumerate(s.tokens):
            # Each Q̂(s_t, a_t) adds; V̂ subtracts its policy, but at s_0, which no action precedes.
            want = torch.zeros(case.vocab, dtype=z.dtype)
            want[token] = scale
            if t:
                probs = oracle.policy(r.q[t], r.base_logps[t], case.alpha_0, case.alpha_tilde)
                want -= scale * torch.tensor(probs, dtype=z.dtype)
            torch.testing.assert_close(z.grad[row, start - 1 + t], want, rtol=0, atol=scale * atol)
        assert not z.grad[row, : start - 1].any()
        assert not z.grad[row, start - 1 + len(s.tokens) :].any()


def test_transitions_docstring_example() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    tr = F.transitions(mask, torch.tensor([True]))
    assert tr.rows.tolist() == [0, 0, 0, 0]
    assert tr.columns.tolist() == [1, 2, 3, 4]
    assert tr.taken.tolist() == [0, 1, 2]
    assert tr.following.tolist() == [1, 2, 3]
    assert tr.action_columns.tolist() == [2, 3, 4]
    assert tr.response.tolist() == [0, 0, 0]
    assert tr.continues.tolist() == [True, True, False]
    cut = F.transitions(mask, torch.tensor([False]))
    assert cut.continues.tolist() == [True, True, True]


@property_test
@given(cases(), st.integers(0, 3), st.integers(0, 3))
def test_transitions_index_every_token_once(case: Case, extra: int, left: int) -> None:
    batch = collate(case, extra=extra, left=left)
    tr = F.transitions(batch.completion_mask, batch.terminal)
    expected = [
        (row, left + len(s.prompt) + t, not (s.terminal and t == len(s.tokens) - 1))
        for row, s in enumerate(case.sequences)
        for t in range(len(s.tokens))
    ]
    action = [tr.response.tolist(), tr.action_columns.tolist(), tr.continues.tolist()]
    assert list(zip(*action, strict=True)) == expected
    for rows in (tr.rows[tr.taken], tr.rows[tr.following]):
        assert rows.tolist() == tr.response.tolist()
    assert tr.columns[tr.taken].tolist() == (tr.action_columns - 1).tolist()
    assert tr.columns[tr.following].tolist() == tr.action_columns.tolist()
    assert len(tr.rows) == sum(len(s.tokens) + 1 for s in case.sequences)


def test_transitions_refuses_an_empty_response() -> None:
    mask = torch.tensor([[False, True], [False, False]])
    with pytest.raises(ValueError, match="at least one response token"):
        F.transitions(mask, torch.tensor([True, True]))


def test_transitions_refuses_a_response_without_prompt() -> None:
    mask = torch.tensor([[False, True], [True, True]])
    with pytest.raises(ValueError, match="at least one prompt token"):
        F.transitions(mask, torch.tensor([True, True]))


def test_preference_sums_refuses_an_odd_number_of_responses() -> None:
    with pytest.raises(ValueError, match="chosen and B rejected"):
        F.preference_sums(torch.zeros(3), torch.zeros(5))


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_gradcheck_rewards_from_q(gamma: float) -> None:
    """From Q̂ through V̂, r2 and R to both terms of M5, terminal and truncated in one batch."""
    gen = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    tr = F.transitions(mask, torch.tensor([True, False]))
    q = torch.randn(len(tr.rows), 3, dtype=torch.float64, generator=gen, requires_grad=True)
    base = torch.log_softmax(torch.randn(q.shape, dtype=torch.float64, generator=gen), dim=-1)
    actions = torch.tensor([0, 2, 1, 1])

    def chain(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = F.soft_value(q, base, alpha_0=0.4, alpha_tilde=0.7)
        rewards = F.token_rewards(
            q[tr.taken, actions], values[tr.following], tr.continues, gamma=gamma
        )
        sums = F.preference_sums(F.returns(rewards, tr.response, 2), rewards)
        return rewards, sums.bt_sum, sums.loss(beta=0.3)

    assert torch.autograd.gradcheck(chain, (q,))


# --- The authors' released loss -------------------------------------------------------------------


@property_test
@given(cases(residual=False), st.integers(1, 4), st.integers(0, 2))
def test_authors_loss(case: Case, extra: int, left: int) -> None:
    batch = collate(case, extra=extra, left=left, fill=0.25)
    length = batch.input_ids.shape[1]
    tr = F.authors_transitions(batch.completion_mask)
    z, base = batch.z, torch.log_softmax(batch.z_1, dim=-1)
    q = F.raw_q(z[tr.rows, tr.columns])
    values = F.soft_value(q, base[tr.rows, tr.columns], **case.alphas)
    actions = batch.input_ids[tr.response, tr.action_columns]
    rewards = F.token_rewards(
        q[tr.taken, actions], values[tr.following], tr.continues, gamma=case.gamma
    )
    totals = F.authors_returns(rewards, tr.response, len(z), padded_length=length)
    loss = F.preference_sums(totals, rewards).loss(beta=case.beta)
    expected, expected_returns = oracle.authors_loss(
        batch.input_ids.tolist(),
        batch.completion_mask.tolist(),
        z.tolist(),
        [[oracle.log_softmax(v) for v in row] for row in batch.z_1.tolist()],
        case.alpha_0,
        case.alpha_tilde,
        case.gamma,
        case.beta,
    )
    torch.testing.assert_close(
        totals, torch.tensor(expected_returns, dtype=z.dtype), rtol=0, atol=case.tolerance()
    )
    assert abs(float(loss) - expected) <= case.loss_tolerance()


def test_authors_mask_skips_the_first_token_and_trains_one_after_the_end() -> None:
    tr = F.authors_transitions(torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]))
    # Row 1 ends at the padded length: its only token is never trained.
    assert tr.response.tolist() == [0, 0, 0]
    assert tr.action_columns.tolist() == [3, 4, 5]
    assert tr.columns.tolist() == [2, 3, 4]
    assert tr.taken.tolist() == tr.following.tolist() == [0, 1, 2]
    assert bool(tr.continues.all())


def test_packed_transitions_docstring_example() -> None:
    tr = F.packed_transitions(torch.tensor([[0, 2, 2, 3]]), torch.tensor([True, False]))
    assert tr.rows.tolist() == [0] * 6
    assert tr.columns.tolist() == [1, 2, 3, 4, 5, 6]
    assert tr.taken.tolist() == [0, 1, 0, 3, 4]
    assert tr.following.tolist() == [1, 2, 3, 4, 5]
    assert tr.action_columns.tolist() == [2, 3, 4, 5, 6]
    assert tr.response.tolist() == [0, 0, 1, 1, 1]
    assert tr.continues.tolist() == [True, False, True, True, True]


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4
    )
)
def test_packed_transitions_against_a_walk_over_the_tokens(
    sizes: list[tuple[int, int, int]],
) -> None:
    spans, start = [], 0
    for prompt, chosen, rejected in sizes:
        spans.append([start, prompt, chosen, rejected])
        start += prompt + chosen + rejected
    tr = F.packed_transitions(torch.tensor(spans), torch.ones(2 * len(sizes), dtype=torch.bool))
    found = list(
        zip(
            tr.response.tolist(),
            tr.columns[tr.taken].tolist(),
            tr.columns[tr.following].tolist(),
            tr.action_columns.tolist(),
            tr.continues.tolist(),
            strict=True,
        )
    )
    expected = []
    for side in (0, 1):
        for pair, (begin, prompt, chosen, rejected) in enumerate(spans):
            at = begin + prompt - 1
            first = begin + prompt + side * chosen
            length = (chosen, rejected)[side]
            for token in range(first, first + length):
                response = pair + side * len(spans)
                expected.append((response, at, token, token, token < first + length - 1))
                at = token
    assert found == expected
    assert len(set(tr.columns.tolist())) == len(tr.columns)


@pytest.mark.parametrize("empty", [1, 2, 3])
def test_packed_transitions_refuse_an_empty_part(empty: int) -> None:
    span = [0, 2, 2, 2]
    span[empty] = 0
    with pytest.raises(ValueError, match="needs a prompt"):
        F.packed_transitions(torch.tensor([span]), torch.tensor([True, True]))
