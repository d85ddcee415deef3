"""Judges: the fitted one on pairs with a known preference, the asked one against a local server."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qadapter.data import Pair
from qadapter.errors import ConfigError, DataError, UserError
from qadapter.judge import (
    BradleyTerryJudge,
    Judge,
    NoVoteError,
    OpenAIJudge,
    RuleJudge,
    named_judge,
)
from qadapter.stats import wilson_interval

WORDS = ["river", "stone", "window", "garden", "letter", "music", "winter", "engine"]
PIRATE = ["arr", "matey", "ahoy", "plunder", "treasure"]
CLERK = ["hereby", "pursuant", "regarding", "aforementioned", "enclosed"]


def text(rng: random.Random, special: list[str], n: int) -> str:
    return " ".join(rng.choice(special if rng.random() < 0.3 else WORDS) for _ in range(n))


def pairs(seed: int, n: int, name: str, chosen: list[str], rejected: list[str]) -> list[Pair]:
    rng = random.Random(seed)
    return [
        Pair(
            [{"role": "user", "content": f"{name} {i}: tell me of the {rng.choice(WORDS)}."}],
            [{"role": "assistant", "content": text(rng, chosen, rng.randint(15, 40))}],
            [{"role": "assistant", "content": text(rng, rejected, rng.randint(15, 40))}],
            f"{name}.jsonl:{i + 1}",
        )
        for i in range(n)
    ]


# --- The fitted judge -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge() -> BradleyTerryJudge:
    """A judge that likes pirates, validated."""
    pytest.importorskip("sklearn")
    made = BradleyTerryJudge()
    made.fit(pairs(0, 80, "fit", PIRATE, CLERK))
    made.validate(pairs(1, 60, "held out", PIRATE, CLERK))
    return made


def answers(seed: int, n: int, special: list[str]) -> list[str]:
    rng = random.Random(seed)
    return [text(rng, special, rng.randint(15, 40)) for _ in range(n)]


def test_the_fitted_judge_finds_the_preference(judge: BradleyTerryJudge) -> None:
    assert judge.validation is not None
    assert judge.validation.pairs == 60
    assert judge.validation.accuracy > 0.9
    assert 0.3 < judge.validation.length_baseline < 0.7
    prompts = [f"prompt {i}" for i in range(50)]
    rate = judge.win_rate(prompts, answers(2, 50, PIRATE), answers(3, 50, CLERK))
    assert rate.low > 0.5
    assert rate.n == 50
    assert rate.judge_accuracy == judge.validation.accuracy
    assert rate.value == pytest.approx(sum(v for v in rate.items if v is not None) / 50)
    assert rate.low <= rate.value <= rate.high
    assert "items" not in rate.summary()
    assert json.loads(json.dumps(rate.summary()))["judge"] == judge.name


def test_rewards_are_higher_for_what_is_preferred(judge: BradleyTerryJudge) -> None:
    prompts = [f"prompt {i}" for i in range(50)]
    mine = judge.rewards(prompts, answers(2, 50, PIRATE))
    others = judge.rewards(prompts, answers(3, 50, CLERK))
    assert sum(a > b for a, b in zip(mine, others, strict=True)) > 45
    with pytest.raises(UserError, match="was not fitted"):
        BradleyTerryJudge().rewards(prompts[:1], ["arr"])


def test_the_fitted_judge_does_not_mind_the_order(judge: BradleyTerryJudge) -> None:
    prompts = ["", "two", "three"]
    mine, others = ["arr matey", "", "the same"], ["hereby", "garden\n\nengine", "the same"]
    forth, back = judge.votes(prompts, mine, others), judge.votes(prompts, others, mine)
    for a, b in zip(forth, back, strict=True):
        assert a is not None
        assert b is not None
        assert a + b == pytest.approx(1.0)
    assert forth[2] == 0.5


def test_the_fitted_judge_counts_equal_answers_as_ties(judge: BradleyTerryJudge) -> None:
    same = answers(4, 10, WORDS)
    rate = judge.win_rate(["?"] * 10, same, same)
    assert (rate.value, rate.ties, rate.length_delta) == (0.5, 10, 0.0)
    assert rate.low < 0.5 < rate.high


def test_the_same_pairs_and_seed_give_the_same_judge() -> None:
    pytest.importorskip("sklearn")
    made = []
    for _ in range(2):
        one = BradleyTerryJudge()
        one.fit(pairs(0, 30, "fit", PIRATE, CLERK), seed=3)
        made.append(one.votes(["?"] * 9, answers(5, 9, PIRATE), answers(6, 9, CLERK)))
    assert made[0] == made[1]


def test_it_may_not_vote_unfitted_or_unvalidated() -> None:
    pytest.importorskip("sklearn")
    made = BradleyTerryJudge()
    with pytest.raises(UserError, match="was not fitted"):
        made.votes(["?"], ["a"], ["b"])
    made.fit(pairs(0, 20, "fit", PIRATE, CLERK))
    with pytest.raises(UserError, match="before it is validated"):
        made.win_rate(["?"], ["a"], ["b"])
    made.validate(pairs(1, 20, "held out", PIRATE, CLERK))
    made.win_rate(["?"], ["a"], ["b"])
    made.fit(pairs(0, 20, "fit", PIRATE, CLERK))  # another fit is another judge
    with pytest.raises(UserError, match="before it is validated"):
        made.win_rate(["?"], ["a"], ["b"])


def test_it_may_not_vote_where_it_may_be_guessing() -> None:
    pytest.importorskip("sklearn")
    made = BradleyTerryJudge()
    made.fit(pairs(0, 60, "fit", WORDS, WORDS))  # nothing to learn
    validation = made.validate(pairs(1, 60, "held out", WORDS, WORDS))
    assert validation.accuracy_ci[0] <= 0.5
    with pytest.raises(NoVoteError, match=r"may be chance; fit it on more pairs") as caught:
        made.win_rate(["?"], ["a"], ["b"])
    assert f"{validation.accuracy:.1%}" in str(caught.value)


def test_it_is_validated_on_prompts_it_has_not_seen(judge: BradleyTerryJudge) -> None:
    with pytest.raises(DataError, match=r"fit\.jsonl:3: the judge was fitted on this prompt"):
        judge.validate(pairs(0, 80, "fit", PIRATE, CLERK)[2:4])


def test_pairs_of_one_prompt_are_too_few() -> None:
    pytest.importorskip("sklearn")
    one = Pair("the same", "a", "b", "x:1")
    with pytest.raises(DataError, match="two prompts at least"):
        BradleyTerryJudge().fit([one, one])


def by_length(seed: int, n: int, name: str) -> list[Pair]:
    """Return pairs whose chosen response is longer and no other way different."""
    rng = random.Random(seed)
    return [
        Pair(
            f"{name} {i}",
            text(rng, WORDS, rng.randint(30, 60)),
            text(rng, WORDS, rng.randint(10, 29)),
            f"{name}:{i}",
        )
        for i in range(n)
    ]


def test_length_alone_gives_no_vote_unless_asked_for() -> None:
    pytest.importorskip("sklearn")
    raw, controlled = BradleyTerryJudge(length_controlled=False), BradleyTerryJudge()
    for made in (raw, controlled):
        made.fit(by_length(0, 100, "fit"))
        made.validate(by_length(1, 100, "held out"))
    assert raw.validation is not None
    assert controlled.validation is not None
    assert raw.validation.accuracy > 0.95
    assert raw.validation.length_baseline == 1.0
    assert raw.win_rate(["?"], ["river stone " * 30], ["river stone"]).value > 0.5
    with pytest.raises(UserError, match="may be chance"):
        controlled.win_rate(["?"], ["river stone " * 30], ["river stone"])
    assert raw.name != controlled.name


# --- The asked judge ------------------------------------------------------------------------------


def completion(content: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@dataclass
class Endpoint:
    """A server whose reply to each request is what `reply` makes of the user's message."""

    url: str = ""
    reply: Callable[[str], tuple[int, bytes]] = lambda _: (200, completion("tie"))
    delay: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def says(self, content: Callable[[str], str | None]) -> None:
        self.reply = lambda asked: (200, completion(content(asked)))


@pytest.fixture(name="endpoint")
def endpoint_(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    yield from serve(monkeypatch)


@pytest.fixture(name="elsewhere")
def elsewhere_(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    yield from serve(monkeypatch)


def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.requests.append({"path": self.path, **body})
            self.answer(body["messages"][1]["content"])

        def do_GET(self) -> None:  # where a redirected POST ends up
            self.answer("")

        def answer(self, asked: str) -> None:
            made.keys.append(self.headers.get("Authorization"))
            time.sleep(made.delay)
            status, content = made.reply(asked)
            self.send_response(status)
            for name, value in made.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the client's patience ended
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def asked(endpoint: Endpoint, **options: Any) -> OpenAIJudge:
    settings = {"api_key_env": None, "pause": 0.001, "retries": 2, "timeout": 5.0, **options}
    return OpenAIJudge(endpoint.url, "some-model", **settings)


def prefers_good(question: str) -> str:
    first = question.split("<reply_A>")[1].split("</reply_A>")[0]
    second = question.split("<reply_B>")[1].split("</reply_B>")[0]
    return "tie" if ("good" in first) == ("good" in second) else "A" if "good" in first else "B"


def test_both_orders_must_agree(endpoint: Endpoint) -> None:
    endpoint.says(prefers_good)
    judge = asked(endpoint)
    rate = judge.win_rate(["1", "2", "3"], ["good", "bad", "good"], ["bad", "good", "good"])
    assert rate.items == (1.0, 0.0, 0.5)
    assert (rate.value, rate.n, rate.ties, rate.unread) == (0.5, 3, 1, 0)
    assert rate.judge == "some-model"
    assert rate.judge_accuracy is None
    assert len(endpoint.requests) == 6


def test_a_taste_for_the_first_place_is_a_tie(endpoint: Endpoint) -> None:
    endpoint.says(lambda _: "A")
    rate = asked(endpoint).win_rate(["1", "2"], ["a b c", "b"], ["c", "d"])
    assert rate.items == (0.5, 0.5)
    assert rate.length_delta == 1.0


@pytest.mark.parametrize(
    ("said", "vote"),
    [
        ("A.", 1.0),
        ("**B**", 0.0),
        ("“A”\n", 1.0),
        ("'TiE'.", 0.5),
        ("Answer: A", 1.0),
        ("[[B]]", 0.0),
        ("(A)", 1.0),
        ("`tie`", 0.5),
        ("**Answer:** B.", 0.0),
        ("\n<think>B?\nNo: <b> A.</think>\n\n**A**", 1.0),
        ("<think></think>tie", 0.5),
    ],
)
def test_what_stands_around_a_verdict_is_no_matter(
    endpoint: Endpoint, said: str, vote: float
) -> None:
    other = {1.0: "B", 0.0: "A", 0.5: "tie"}[vote]
    endpoint.says(lambda asked: said if asked.index("good") < asked.index("bad") else other)
    assert asked(endpoint).votes(["?"], ["good"], ["bad"]) == [vote]


@pytest.mark.parametrize(
    "said",
    [
        "A is better.",
        "",
        "a",
        "b.",
        "A or B",
        "A. B",
        "AB",
        "C",
        "Answer: a",
        "I say A",
        "<think>A",
        "A<think></think>",
        "<think></think>",
        "<think>A</think>B</think>A",
        "<think>…</think><think>…</think>A",
        None,
    ],
)
def test_what_is_not_a_verdict_is_not_guessed_at(endpoint: Endpoint, said: str | None) -> None:
    endpoint.says(lambda asked: said if "bad" in asked else " B\n" if "1" in asked else "tie")
    rate = asked(endpoint).win_rate(["0", "1"], ["bad", "x"], ["x", "y"])
    assert rate.items == (None, 0.5)
    assert (rate.n, rate.unread) == (1, 1)
    with pytest.raises(NoVoteError, match="no readable verdict on any of 1 pairs"):
        asked(endpoint).win_rate(["0"], ["bad"], ["x"])


def test_one_unreadable_order_is_enough(endpoint: Endpoint) -> None:
    endpoint.says(lambda asked: "A" if asked.index("good") < asked.index("bad") else "Hm")
    rate = asked(endpoint).votes(["?"], ["good"], ["bad"])
    assert rate == [None]


def test_what_is_asked(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " sk-secret\n")
    talk = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes é?"}]
    judge = asked(endpoint, api_key_env="MY_KEY", criterion="short answers")
    judge.votes([talk], ["one \ud800"], ["two"])
    assert endpoint.keys == ["Bearer sk-secret"] * 2
    for request in endpoint.requests:
        assert request["path"] == "/v1/chat/completions"
        assert request["model"] == "some-model"
        assert request["temperature"] == 0
        system, user = request["messages"]
        assert "short answers" in system["content"]
        assert "[user] Hello?\n[assistant] Yes é?" in user["content"]
    first, second = (request["messages"][1]["content"] for request in endpoint.requests)
    assert first.index("one") < first.index("two")
    assert second.index("two") < second.index("one")


def test_no_key_is_sent_where_none_is_named(endpoint: Endpoint) -> None:
    asked(endpoint).votes(["?"], ["a"], ["b"])
    assert endpoint.keys == [None, None]


def test_another_host_is_not_handed_the_key(
    endpoint: Endpoint, elsewhere: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    endpoint.reply = lambda _: (302, b"")
    endpoint.headers = {"Location": elsewhere.url}
    asked(endpoint, api_key_env="MY_KEY").votes(["?"], ["a"], ["b"])
    assert endpoint.keys == ["Bearer sk-secret"] * 2
    assert elsewhere.keys == [None, None]


def test_a_server_that_stumbles_is_asked_again(endpoint: Endpoint) -> None:
    replies = iter([(500, b"oops"), (429, b"slow down"), (200, completion("A"))])
    endpoint.reply = lambda _: next(replies, (200, completion("B")))
    assert asked(endpoint).votes(["?"], ["a"], ["b"]) == [1.0]
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (500, b"out of\n memory", "HTTP 500 out of memory"),
        (200, b"<html>", "no chat completion"),
        (200, b'{"choices": []}', "no chat completion"),
        (200, b"[1]", "no chat completion"),
    ],
)
def test_a_server_that_keeps_failing_ends_it(
    endpoint: Endpoint, status: int, body: bytes, told: str
) -> None:
    endpoint.reply = lambda _: (status, body)
    prompts = [*map(str, range(30))]
    with pytest.raises(UserError, match="failed 3 times, the last with") as caught:
        asked(endpoint, workers=1).votes(prompts, ["a"] * 30, ["b"] * 30)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    # Others may have begun when the first failed; most are not asked.
    assert 3 <= len(endpoint.requests) <= 45


def test_a_refusal_is_not_repeated_and_the_key_not_shown(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    endpoint.reply = lambda _: (401, b"no such key: sk-secret")
    with pytest.raises(UserError, match="HTTP 401 no such key: …; mend") as caught:
        asked(endpoint, api_key_env="MY_KEY").votes(["?"], ["a"], ["b"])
    assert "sk-secret" not in str(caught.value)
    assert len(endpoint.requests) == 1


def test_a_silent_server_times_out(endpoint: Endpoint) -> None:
    endpoint.delay = 0.5
    with pytest.raises(UserError, match=r"failed 2 times, the last with .*timed out"):
        asked(endpoint, timeout=0.05, retries=1).votes(["?"], ["a"], ["b"])


def test_nobody_there_is_told() -> None:
    judge = OpenAIJudge("http://127.0.0.1:9/v1", "m", None, pause=0.001, retries=1)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1/chat/completions: failed 2 times"):
        judge.votes(["?"], ["a"], ["b"])


def test_settings_of_the_asked_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"\$NO_KEY: holds no key"):
        OpenAIJudge("http://localhost/v1", "m", "NO_KEY")
    monkeypatch.setenv("NO_KEY", "two words")
    with pytest.raises(ConfigError, match=r"\$NO_KEY: holds no key"):
        OpenAIJudge("http://localhost/v1", "m", "NO_KEY")
    wrong = ["localhost:8000", "file:///etc/passwd", "http://", "http://a b/v1", "http://a/é"]
    wrong += ["http://[::1/v1", "http://localhost:abc/v1", "http://a\x01b/v1"]
    for address in wrong:
        with pytest.raises(ConfigError, match="not an address"):
            OpenAIJudge(address, "m", None)


def test_a_judges_name_says_where_its_key_is(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    for name in (endpoint.url, f"{endpoint.url}#MY_KEY"):
        named_judge(f"openai:some-model@{name}", "short answers").votes(["?"], ["a"], ["b"])
    assert endpoint.keys == [None, None, "Bearer sk-mine", "Bearer sk-mine"]
    for request in endpoint.requests:
        assert request["path"] == "/v1/chat/completions"
        assert "short answers" in request["messages"][0]["content"]


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://api.openai.com/v1", "sk-openai"),
        ("https://eu.api.openai.com:443/v1", "sk-openai"),
        ("https://api.openai.com/v1#MY_KEY", "sk-mine"),
        ("http://api.openai.com/v1", ""),
        ("https://api.openai.com.example/v1", ""),
        ("https://notopenai.com/v1", ""),
        ("https://example/openai.com/v1", ""),
        ("https://api.openai.com@example/v1", ""),
        ("https://api.openai.com:443@example/v1", ""),
    ],
)
def test_openais_key_goes_to_openai_unasked_and_to_nobody_else(
    monkeypatch: pytest.MonkeyPatch, url: str, sent: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    judge = named_judge(f"openai:gpt@{url}")
    assert isinstance(judge, OpenAIJudge)
    assert judge._request("?").unredirected_hdrs.get("Authorization", "") == (
        f"Bearer {sent}" if sent else ""
    )


def test_a_judges_name_without_its_key_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"\$OPENAI_API_KEY: holds no key"):
        named_judge("openai:gpt@https://api.openai.com/v1")
    with pytest.raises(ConfigError, match=r"\$MY_KEY: holds no key"):
        named_judge("openai:gpt@http://localhost/v1#MY_KEY")
    for name in ("openai:gpt@http://localhost/v1#", "openai:gpt@#MY_KEY", "openai:@http://a/v1"):
        with pytest.raises(ConfigError, match=r"is none; give .*openai:MODEL@URL#VARIABLE"):
            named_judge(name)


def test_any_judge_can_be_validated(endpoint: Endpoint) -> None:
    endpoint.says(prefers_good)
    judge: Judge = asked(endpoint)
    held_out = [Pair("1", "good", "bad and long", "x:1"), Pair("2", "good", "good too", "x:2")]
    found = judge.validate(held_out)
    assert (found.accuracy, found.pairs, found.length_baseline) == (0.75, 2, 0.0)
    assert judge.win_rate(["?"], ["good"], ["bad"]).judge_accuracy == 0.75


def test_what_stands_there_several_times_makes_no_judge_surer(endpoint: Endpoint) -> None:
    endpoint.says(prefers_good)
    judge = asked(endpoint)
    pairs = [Pair("1", "good", "bad", "x:1"), Pair("2", "good", "good too", "x:2")]
    once, twelve = judge.validate(pairs), judge.validate(pairs * 6)
    assert (once.pairs, once.prompts, twelve.pairs, twelve.prompts) == (2, 2, 12, 2)
    # Two prompts, of which a resample draws one: 1 or 0.5.
    assert twelve.accuracy_ci == (0.5, 1.0)
    sure = judge.validate([pairs[0]] * 12)
    assert sure.accuracy_ci == wilson_interval(1, 1)
    chat = [[{"role": "user", "content": "?"}]]
    rate = judge.win_rate(chat * 12, ["good"] * 12, ["bad"] * 12)
    assert (rate.n, (rate.low, rate.high)) == (12, wilson_interval(1, 1))


# --- Rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        ("shorter", "one two", "one two three"),
        ("longer", "one two three", "one two"),
        ("max_words:2", "one two", "one two three"),
        ("min_words:3", "one two three", "one two"),
        ("contains:Dear Sir", "… DEAR SIR …", "Dear Madam"),
        ("lacks:a: b", "a; b", "A: B"),
        ("json", ' {"a": [1, null]}\n', "{'a': 1}"),
        ("json", "1", "NaN"),
        ("json", "[]", "[" * 100_000),
        ("one_sentence", "It is 3.5 metres (or so!).", "Yes. It is."),
        ("one_sentence", "No end", "Line\nline"),
        ("one_sentence", "They said “no.”", "They said “no.” Then left"),
        ("one_sentence", "好。", "好。好。"),
        ("one_sentence", "x", " "),
    ],
)
def test_rules(rule: str, kept: str, broken: str) -> None:
    judge = RuleJudge(rule)
    prompts = ["?"] * 3
    rate = judge.win_rate(prompts, [kept, broken, kept], [broken, kept, kept])
    assert rate.items == (1.0, 0.0, 0.5)
    assert rate.judge == rule
    assert (rate.value, rate.ties) == (0.5, 1)


def test_a_rule_that_always_wins_keeps_a_width() -> None:
    rate = RuleJudge("shorter").win_rate(["?"] * 5, ["a"] * 5, ["a b"] * 5)
    assert (rate.value, rate.high) == (1.0, 1.0)
    assert rate.low < 0.7
    assert rate.length_delta == -1.0


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "Shorter",
        "shorter:2",
        "max_words",
        "max_words:",
        "max_words:0",
        "max_words:-1",
        "max_words: 4",
        "max_words:4.0",
        "max_words:٤",
        "contains",
        "contains: ",
        "regex:a",
        "json:",
    ],
)
def test_what_is_no_rule(rule: str) -> None:
    with pytest.raises(ConfigError, match=r"not a rule; give one like these: shorter, longer"):
        RuleJudge(rule)


def test_nothing_to_judge_is_told() -> None:
    with pytest.raises(UserError, match="any of 0 pairs"):
        RuleJudge("shorter").win_rate([], [], [])
    with pytest.raises(ValueError, match="zip"):
        RuleJudge("shorter").win_rate(["?"], ["a"], [])
