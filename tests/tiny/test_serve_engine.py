"""The engine: what an answer is does not depend on what it is batched with."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import Queue
from typing import Any

import pytest
import torch
from fakes import WORDS, text_tokenizer, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, UNUSUAL, tiny_adapter
from serving import until
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qadapter.policy import Policy
from qadapter.serve.answer import Answer, Piece, Token
from qadapter.serve.asking import Desk, Limits
from qadapter.serve.batch import Batch
from qadapter.serve.engine import Engine, EngineBusy, EngineClosed, Request
from qadapter.serve.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def policy(adapter: str) -> Policy:
    return Policy.from_pretrained(adapter)


@pytest.fixture
def engine(policy: Policy) -> Iterator[Engine]:
    engine = Engine(policy, max_batch=4, max_queue=64)
    yield engine
    engine.close()


def answer(engine: Engine, requests: Sequence[Request]) -> list[list[Piece]]:
    """Return the pieces of each answer, all asked for at once."""
    queues: list[Queue[Piece]] = [Queue() for _ in requests]
    engine.submit([replace(r, emit=queue.put) for r, queue in zip(requests, queues, strict=True)])
    found = []
    for queue in queues:
        pieces = [queue.get(timeout=60)]
        while pieces[-1].finish is None:
            pieces.append(queue.get(timeout=60))
        found.append(pieces)
    return found


def request(prompt: Sequence[int], **options: Any) -> Request:
    return Request(prompt, **{"emit": print, "max_tokens": 12, **options})


def random_requests(n: int, vocabulary: int, **options: Any) -> list[Request]:
    draw = random.Random(0)
    return [
        request(
            [draw.randrange(4, vocabulary) for _ in range(draw.randrange(1, 40))],
            max_tokens=draw.randrange(1, 24),
            strength=draw.choice([0.0, 0.5, 1.0, 2.0]),
            **options,
        )
        for _ in range(n)
    ]


def ids(pieces: Sequence[Piece]) -> list[int]:
    return [token.id for piece in pieces for token in piece.tokens]


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_greedy_answers_are_those_of_generate_alone(family: str) -> None:
    model = tiny_adapter(family)
    tokenizer = tiny_tokenizer()
    policy = Policy(model, tokenizer)
    policy.end_ids = frozenset({2})
    engine = Engine(policy, max_batch=3)
    requests = random_requests(9, 97)
    try:
        found = answer(engine, requests)
    finally:
        engine.close()
    for asked, pieces in zip(requests, found, strict=True):
        out = model.generate(
            input_ids=torch.tensor([asked.prompt]),
            attention_mask=torch.ones(1, len(asked.prompt), dtype=torch.int64),
            strength=asked.strength,
            max_new_tokens=asked.max_tokens,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )[0, len(asked.prompt) :].tolist()
        ended = out[-1] == 2
        assert ids(pieces) == (out[:-1] if ended else out)
        assert pieces[-1].finish == ("stop" if ended else "length")
        assert pieces[-1].generated == len(out)


def test_no_row_gets_where_long_rope_turns_all_rows_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
    rope |= {"rope_theta": 10000.0, **sizes}
    monkeypatch.setitem(FAMILIES, "phi3", {"rope_parameters": rope, **sizes})
    policy = Policy(tiny_adapter("phi3"), tiny_tokenizer())
    policy.end_ids = frozenset({2})
    engine = Engine(policy, max_batch=4)
    desk = Desk(engine, strength=1.0, limits=Limits())
    try:
        assert (policy.context, desk.context) == (128, 32)
        # Beyond it, one row changes what the others answer; up to it, none does.
        asked = [request(list(range(5, 8)), max_tokens=20), request([*range(20, 32)] * 3)]
        alone = [ids(answer(engine, [r])[0]) for r in asked]
        assert [ids(pieces) for pieces in answer(engine, asked)] != alone
        asked[1] = replace(asked[1], prompt=asked[1].prompt[:20])
        alone = [ids(answer(engine, [r])[0]) for r in asked]
        assert [ids(pieces) for pieces in answer(engine, asked)] == alone
    finally:
        engine.close()


def test_sampled_answers_and_log_probs_do_not_depend_on_the_batch(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qadapter.serve.engine._PREFILL", 60)  # some prompts are read alone
    requests = [
        replace(r, seed=i, temperature=1.3, top_p=0.9, logprobs=True, top_logprobs=3, compare=True)
        for i, r in enumerate(random_requests(8, 200))
    ]
    together = answer(engine, requests)
    for asked, pieces in zip(requests, together, strict=True):
        (alone,) = answer(engine, [asked])
        assert ids(pieces) == ids(alone)
        for one, other in zip(pieces, alone, strict=True):
            for a, b in zip(one.tokens, other.tokens, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
                assert a.base_logprob == pytest.approx(b.base_logprob, abs=1e-4)
                assert [t.bytes for t in a.top] == [t.bytes for t in b.top]


def test_log_probs_are_the_policys_and_the_bases(engine: Engine, policy: Policy) -> None:
    asked = request(list(range(5, 20)), strength=0.7, logprobs=True, top_logprobs=2, compare=True)
    (pieces,) = answer(engine, [asked])
    tokens = [token for piece in pieces for token in piece.tokens]
    row = torch.tensor([[*asked.prompt, *(t.id for t in tokens)]])
    with torch.no_grad():
        at = slice(len(asked.prompt) - 1, -1)
        ours, base = (
            policy.model(input_ids=row, strength=s).logits[0, at].log_softmax(-1) for s in (0.7, 0)
        )
    for i, token in enumerate(tokens):
        assert token.logprob == pytest.approx(float(ours[i, token.id]), abs=1e-4)
        assert token.base_logprob == pytest.approx(float(base[i, token.id]), abs=1e-4)
        likely = [t.logprob for t in token.top]
        assert likely == pytest.approx(ours[i].topk(2).values.tolist(), abs=1e-4)


def test_a_cancelled_request_leaves_and_the_others_stay_right(engine: Engine) -> None:
    kept = request(list(range(5, 30)), max_tokens=40)
    (alone,) = answer(engine, [kept])
    reached, cancelled, queue = threading.Event(), threading.Event(), Queue[Piece]()

    def held(_: Piece) -> None:
        reached.set()
        assert cancelled.wait(60)

    gone = request(list(range(9, 90)), emit=held, max_tokens=170)
    other, ticket = engine.submit([replace(kept, emit=queue.put), gone])
    assert reached.wait(60)
    ticket.cancel()
    cancelled.set()
    pieces = [queue.get(timeout=60)]
    while pieces[-1].finish is None:
        pieces.append(queue.get(timeout=60))
    assert ids(pieces) == ids(alone)
    assert ticket.answer.generated < 170
    assert not other.cancelled
    answer(engine, [request([5])])
    until(lambda: engine.running == engine.waiting == 0)


def test_the_queue_is_bounded_all_or_none_and_closing_finishes_what_was_taken(
    policy: Policy,
) -> None:
    engine = Engine(policy, max_batch=1, max_queue=2)
    hold, queue = threading.Event(), Queue[Piece]()
    engine.submit([request([5], emit=lambda _: hold.wait(60), max_tokens=2)])
    until(lambda: engine.waiting == 0)
    with pytest.raises(EngineBusy):
        engine.submit([request([6])] * 3)
    engine.submit([request([6], emit=queue.put)] * 2)
    with pytest.raises(EngineBusy):
        engine.submit([request([6])])
    engine.close(wait=False)
    with pytest.raises(EngineClosed):
        engine.submit([request([6])])
    assert not engine.idle
    hold.set()
    engine.close()
    assert engine.idle
    assert sum(queue.get_nowait().finish is not None for _ in range(queue.qsize())) == 2


def test_who_leaves_the_queue_frees_a_place_at_once(policy: Policy) -> None:
    engine = Engine(policy, max_batch=1, max_queue=2)
    hold = threading.Event()
    engine.submit([request([5], emit=lambda _: hold.wait(60), max_tokens=2)])
    until(lambda: engine.waiting == 0)
    for _ in range(3):
        tickets = engine.submit([request([6])] * 2)
        assert engine.waiting == 2
        for ticket in tickets:
            ticket.cancel()
        assert engine.waiting == 0
    assert len(engine._waiting) == 2
    hold.set()
    engine.close()


def test_a_failed_step_is_told_and_the_next_request_answered(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(policy)
    with monkeypatch.context() as patch:
        patch.setattr(policy.model, "policy_logits", lambda *_: 1 / 0)
        (failed,) = answer(engine, [request([5])])
    (good,) = answer(engine, [request([5])])
    engine.close()
    assert [p.finish for p in failed] == ["error"]
    assert good[-1].finish in ("stop", "length")


@pytest.mark.parametrize("when", ["it starts", "it steps", "it joins"])
def test_what_fails_takes_no_other_requests_with_it(
    adapter: str, second: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    policy = Policy.from_pretrained({"tiny": adapter, "deep": second})
    tiny, deep = policy.model.adapters
    good = request([5, 6, 7], adapters=(tiny,), max_tokens=30)
    bad = request([9, 9], adapters=(deep,) if when == "it steps" else (tiny,), max_tokens=30)
    if when == "it joins":
        good, bad = replace(good, adapters=(deep,)), replace(bad, adapters=(tiny,))
    inner, join = Batch.logits, Batch.join
    engine = Engine(policy, max_batch=4)
    (alone,) = answer(engine, [good])
    until(lambda: engine.running == 0)  # else the two below might begin together
    begun: Queue[Piece] = Queue()
    out: Queue[Piece] = Queue()
    gate = threading.Event()

    def logits(batch: Batch, strengths: Any, *, base: Any) -> Any:
        gate.wait(60)
        reads = batch._next.shape[1] > 1
        if [9, 9] in batch._next.tolist() and when == "it starts":
            raise MemoryError
        if batch._adapters == (deep,) and not reads and when == "it steps":
            raise MemoryError
        return inner(batch, strengths, base=base)

    def joined(batch: Batch, other: Batch) -> None:
        if when == "it joins":
            raise MemoryError
        join(batch, other)

    monkeypatch.setattr(Batch, "logits", logits)
    monkeypatch.setattr(Batch, "join", joined)
    engine.submit([replace(good, emit=out.put)])
    until(lambda: engine.running == 1)  # held before its first token
    engine.submit([replace(bad, emit=begun.put)])
    if when == "it joins":
        monkeypatch.setattr("qadapter.serve.engine._PREFILL", 1)  # the next is read after it
        engine.submit([replace(bad, emit=begun.put)])
    gate.set()
    pieces = [out.get(timeout=60)]
    while pieces[-1].finish is None:
        pieces.append(out.get(timeout=60))
    assert ids(pieces) == ids(alone)
    wanted = 2 if when == "it joins" else 1
    ends = 0
    while ends < wanted:
        piece = begun.get(timeout=60)
        ends += piece.finish is not None
        assert piece.finish in (None, "error")
    monkeypatch.undo()
    (after,) = answer(engine, [good])
    assert ids(after) == ids(alone)
    engine.close()


TOKENIZER = tiny_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
TEXTS = text_tokenizer()


@given(
    text=st.text(alphabet="ab é🙂\n", max_size=12),
    stop=st.lists(st.text(alphabet="ab é🙂", min_size=1, max_size=3), max_size=3),
    cut=st.integers(1, 30),
)
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stop: list[str], cut: int) -> None:
    made = [*TOKENIZER(text)["input_ids"], 1]
    answer = Answer(VOCABULARY, stop, frozenset({1}), cut)
    pieces: list[Piece] = []
    for token in made:
        piece = answer.add(Token(token, VOCABULARY.text(token)))
        pieces += [piece] if piece else []
        if answer.finished:
            break
    whole = TOKENIZER.decode(made[: answer.generated], skip_special_tokens=True)
    found = [i for s in stop if (i := whole.find(s)) >= 0]
    assert "".join(p.text for p in pieces) == whole[: min(found, default=len(whole))]
    assert all(p.finish is None for p in pieces[:-1])
    ended = found or made[answer.generated - 1] == 1
    assert pieces[-1].finish == ("stop" if ended else "length")
    tokens = [t for p in pieces for t in p.tokens]
    assert [t.id for t in tokens] == [t for t in made if t != 1][: len(tokens)]
    if not found:
        assert len(tokens) == answer.generated - (made[answer.generated - 1] == 1)


def streamed(tokenizer: Any, prompt: Sequence[int], made: Sequence[int]) -> list[Piece]:
    answer = Answer(Vocabulary(tokenizer), (), frozenset({1}), len(made) + 1, prompt)
    return [piece for token in [*made, 1] if (piece := answer.add(Token(token, "")))]


OF_TEXTS = [TEXTS.convert_tokens_to_ids(word) for word in ["<s>", "<unk>", *WORDS]]
OF_BYTES = [TEXTS.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "€é🙂".encode()]


@given(
    prompt=st.lists(st.sampled_from(OF_TEXTS), max_size=4),
    made=st.lists(st.sampled_from(OF_TEXTS + OF_BYTES), max_size=12),
)
def test_pieces_of_tokens_that_are_text_are_the_whole_decoding_after_the_prompt(
    prompt: list[int], made: list[int]
) -> None:
    """A first space was lost, and so was one after a special token or an unfinished byte."""
    before, whole = (
        TEXTS.decode(row, skip_special_tokens=True) for row in (prompt, [*prompt, *made])
    )
    assert before + "".join(p.text for p in streamed(TEXTS, prompt, made)) == whole


@given(
    prompt=st.text(alphabet="ab é🙂", max_size=5),
    made=st.lists(st.integers(4, 259), max_size=12),
)
def test_pieces_of_any_bytes_are_the_whole_decoding(prompt: str, made: list[int]) -> None:
    ids = TOKENIZER(prompt)["input_ids"]
    text = "".join(p.text for p in streamed(TOKENIZER, ids, made))
    assert prompt + text == TOKENIZER.decode([*ids, *made])


def test_an_answer_that_ends_a_character_of_its_prompt_has_that_character() -> None:
    first, *rest = TOKENIZER("é!")["input_ids"]
    assert "".join(p.text for p in streamed(TOKENIZER, [first], rest)) == "é!"


def test_a_token_begins_behind_the_bytes_before_it() -> None:
    """One that only ended a character, or what was to be none, had that one's place."""
    smile = [TEXTS.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    world = TEXTS.convert_tokens_to_ids("▁world")
    broken = TOKENIZER("€x")["input_ids"]
    for tokenizer, made, expected in (
        (TEXTS, [*smile, world], [0, 0, 0, 0, 1]),
        (TEXTS, [world, *smile, world, world], [0, 5, 5, 5, 5, 6, 12]),
        (TOKENIZER, broken, [0, 0, 0, 1]),
        (TOKENIZER, [broken[0], broken[-1]], [0, 1]),
    ):
        pieces = streamed(tokenizer, [], made)
        assert [token.offset for piece in pieces for token in piece.tokens] == expected
    answer = Answer(Vocabulary(TEXTS), (" w",), frozenset({1}), 9)
    (piece,) = [piece for i in [*smile, world] if (piece := answer.add(Token(i, "")))]
    assert (piece.text, [token.id for token in piece.tokens]) == ("🙂", smile)


def test_a_token_is_its_bytes_in_every_vocabulary() -> None:
    ids = TOKENIZER("a é🙂\n")["input_ids"]
    assert [VOCABULARY.raw(i) for i in ids] == [bytes([b]) for b in "a é🙂\n".encode()]
    assert [VOCABULARY.text(i) for i in ids[:4]] == ["a", " ", "bytes:\\xc3", "bytes:\\xa9"]
    assert VOCABULARY.text(1) == "<|im_end|>"
    assert VOCABULARY.text(9999) == ""  # heads are often longer than vocabularies
    of_texts = Vocabulary(TEXTS)
    names = ["▁Hello", "▁", "é", "<0x0A>", "<0xE2>", "</s>"]
    found = [of_texts.text(TEXTS.convert_tokens_to_ids(name)) for name in names]
    assert found == [" Hello", " ", "é", "\n", "bytes:\\xe2", "</s>"]


def test_what_another_decoder_makes_of_one_token_is_its_text() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "say": 1, "##ing": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    found = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
    assert [found.text(i) for i in (1, 2)] == ["say", "##ing"]
