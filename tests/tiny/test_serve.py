"""The server over HTTP: OpenAI's shapes, limits, the key, clients that leave, a quiet end."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest
from fastapi.exceptions import RequestValidationError
from serving import LIMITS, MESSAGES, Running, until

from qadapter.cli import main
from qadapter.policy import Policy
from qadapter.serve import on_vllm, schema
from qadapter.serve.answer import Piece
from qadapter.serve.asking import Asked
from qadapter.serve.gate import JsonLines


@pytest.fixture(scope="module")
def policy(adapter: str) -> Policy:
    return Policy.from_pretrained({"tiny": adapter})


@pytest.fixture(scope="module")
def running(policy: Policy) -> Iterator[Running]:
    running = Running(policy, max_batch=4, max_queue=8)
    yield running
    running.stop()


def events(response: httpx2.Response) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_chat_answers_as_the_policy_does_at_each_strength(running: Running, policy: Policy) -> None:
    for strength in (0, 0.5, 1, [2.0]):
        found = running.chat(strength=strength, max_tokens=20).json()
        number = strength[0] if isinstance(strength, list) else strength
        (expected,) = policy.answer([MESSAGES], strength=number, max_new_tokens=20)
        (choice,) = found["choices"]
        assert choice["message"]["content"].strip() == expected
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] in ("stop", "length")
        usage = found["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert found["object"] == "chat.completion"
    assert found["model"] == "tiny"


def test_a_stream_is_the_answer_in_chunks_and_counts_when_asked(running: Running) -> None:
    whole = running.chat(logprobs=True, top_logprobs=2).json()
    found = events(
        running.chat(
            stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2
        )
    )
    *chunks, last = found
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert [d["role"] for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    choice = whole["choices"][0]
    assert "".join(d["content"] for d in deltas) == choice["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    streamed = [t for c in chunks for t in c["choices"][0]["logprobs"]["content"]]
    assert [t["token"] for t in streamed] == [t["token"] for t in choice["logprobs"]["content"]]
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert len({c["id"] for c in found}) == 1
    assert running.chat(stream=True).headers["cache-control"] == "no-cache"
    for token in streamed:
        assert token["logprob"] <= 0
        assert len(token["top_logprobs"]) == 2
        assert token["top_logprobs"][0]["logprob"] >= token["logprob"]
    assert any(token["token"].startswith("bytes:\\x") for token in streamed)
    told = b"".join(bytes(token["bytes"]) for token in streamed)
    assert told.decode(errors="replace") == choice["message"]["content"]
    assert running.chat(stream=True).text.count('"usage":null') == len(
        events(running.chat(stream=True))
    )


def test_n_answers_seeds_and_stops(running: Running) -> None:
    options = {"temperature": 1.5, "seed": 7, "n": 3}
    first, second = (running.chat(**options).json() for _ in range(2))
    texts = [c["message"]["content"] for c in first["choices"]]
    assert texts == [c["message"]["content"] for c in second["choices"]]
    assert len(set(texts)) == 3
    assert (
        running.chat(temperature=1.5, seed=8).json()["choices"][0]["message"]["content"] == texts[1]
    )
    (whole,) = running.chat().json()["choices"]
    text = whole["message"]["content"]
    stop = text[4:6]
    (cut,) = running.chat(stop=[stop, "never"]).json()["choices"]
    assert cut["message"]["content"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert running.chat(stop=stop).json()["choices"] == [cut]


def test_completions_take_texts_and_tokens_and_tell_log_probs(
    running: Running, policy: Policy
) -> None:
    ids = policy.tokenizer("Say", add_special_tokens=False)["input_ids"]
    found = [
        running.client.post(
            "/v1/completions",
            json={"prompt": prompt, "temperature": 0, "logprobs": 2, "max_tokens": 8},
        ).json()["choices"]
        for prompt in ("Say", ["Say", "Sing"], ids, [ids, ids])
    ]
    (expected,) = policy.answer(["Say"], max_new_tokens=8)
    assert [len(choices) for choices in found] == [1, 2, 1, 2]
    first = found[0][0]
    assert first["text"].strip() == expected
    assert all(choices[0]["text"] == first["text"] for choices in found)
    logprobs = first["logprobs"]
    assert logprobs["text_offset"][0] == 0
    assert (
        len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"])
    )
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert [max(top, key=top.get) for top in logprobs["top_logprobs"]] == logprobs["tokens"]
    chunks = events(
        running.client.post(
            "/v1/completions", json={"prompt": "Say", "temperature": 0, "stream": True}
        )
    )
    assert "".join(c["choices"][0]["text"] for c in chunks).startswith(first["text"][:4])


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"strength": -1}, 400, "strength"),
        ({"strength": [1.0, 0.5]}, 400, "strength"),
        ({"max_tokens": 65}, 400, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, None),
        ({"messages": []}, 400, "messages"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"n": 13}, 400, "n"),
    ],
)
def test_what_cannot_be_answered_is_told_in_openais_shape(
    running: Running, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = running.chat(**body)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"] or "").split(".")[0] == (param or "")
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_bodies_that_are_no_json_too_large_or_of_broken_text(running: Running) -> None:
    path, headers = "/v1/chat/completions", {"content-type": "application/json"}
    half = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    for content in (b"{", b"[]", b"null", b'{"\\ud800": 1}', half, b"\xff", b"[" * 5000):
        response = running.client.post(path, content=content, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["message"]
    large = b" " * (LIMITS.max_body + 1)
    chunks = (large[i : i + 999] for i in range(0, len(large), 999))
    for content in (large, chunks):
        response = running.client.post(path, content=content, headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
    assert running.client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert running.client.get(path).status_code == 405


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"stop": ["a"] * 17}, "stop: List should have at most 16 items"),
        ({"strength": []}, "strength: List should have at least 1 item"),
        ({"strength": [1, -1]}, "strength.1: Input should be greater than or equal to 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "0.type: Input"),
        ({"strength": "1"}, "strength: Input should be a valid number"),
    ],
    ids=str,
)
def test_what_is_nearly_right_is_told_as_such(
    running: Running, body: dict[str, Any], message: str
) -> None:
    """Of a field of several types the first was told, "should be a valid string" of a list."""
    assert message in running.chat(**body).json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b'{"prompt": "x"}'])
def test_a_body_that_is_not_called_json_is_told_how(running: Running, content: bytes) -> None:
    response = running.client.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


CHAT_NULLS = [
    "model",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "user",
    "strength",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "presence_penalty",
    "frequency_penalty",
    "response_format",
]
TEXT_NULLS = [
    "n",
    "stream",
    "temperature",
    "top_p",
    "logprobs",
    "echo",
    "best_of",
    "presence_penalty",
]


def test_null_is_a_fields_default(running: Running) -> None:
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 9}
    expected = running.chat(**options).json()["choices"]
    for name in CHAT_NULLS:
        response = running.chat(**{**options, name: None})
        assert response.status_code == 200, (name, response.text)
        if name not in ("seed", "max_tokens"):
            assert response.json()["choices"] == expected
    body = {"prompt": "Say", "seed": 3}
    expected = running.client.post("/v1/completions", json=body).json()["choices"]
    for name in TEXT_NULLS:
        found = running.client.post("/v1/completions", json={**body, name: None})
        assert found.json()["choices"] == expected, name
    stream = running.chat(stream=True, stream_options={"include_usage": None})
    assert '"total_tokens"' not in stream.text


@pytest.mark.parametrize(
    ("path", "neutral", "other"),
    [
        ("chat/completions", {"presence_penalty": 0}, {"presence_penalty": 0.1}),
        ("chat/completions", {"frequency_penalty": 0.0}, {"frequency_penalty": -1}),
        (
            "chat/completions",
            {"response_format": {"type": "text"}},
            {"response_format": {"type": "json_object"}},
        ),
        ("completions", {"echo": False}, {"echo": True}),
        ("completions", {"best_of": 1}, {"best_of": 2}),
        ("completions", {"seed": -1}, {"seed": 2**63}),
        ("completions", {"seed": 2**40}, {"seed": -(2**63) - 1}),
        ("completions", {"seed": 2**63 - 1, "n": 2}, {"seed": 0.5}),
    ],
)
def test_what_changes_nothing_is_taken_and_what_we_do_not_do_is_refused(
    running: Running, path: str, neutral: dict[str, Any], other: dict[str, Any]
) -> None:
    for body, status in ((neutral, 200), (other, 400)):
        content = {"prompt": "Say"} if path == "completions" else {"messages": MESSAGES}
        response = running.client.post(f"/v1/{path}", json={**content, "max_tokens": 2, **body})
        assert response.status_code == status, response.text
        if status == 400:
            assert response.json()["error"]["param"] == next(iter(body))


def test_turns_reach_the_template_whole(running: Running, policy: Policy) -> None:
    def prompt(*messages: dict[str, Any]) -> str:
        taken = [schema.Message.model_validate(message) for message in messages]
        return str(policy.tokenizer.decode(running.desk.chat_prompt(taken)))

    asked = {"role": "user", "content": "Hi", "name": "bob"}
    made = prompt({"role": "developer", "content": "Be kind"}, asked)
    assert made == prompt({"role": "system", "content": "Be kind"}, {**asked, "name": None})
    empty = {"role": "assistant", "content": ""}
    assert prompt(asked, {**empty, "content": None}) == prompt(asked, empty)
    for message in ({**asked, "content": None}, {"role": "assistant"}):
        assert running.chat(messages=[message]).status_code == 400
    template = "{% for m in messages %}{{ m.role }} {{ m.name }};{% endfor %}developer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.tokenizer, "chat_template", template)
        assert prompt({**asked, "role": "developer"}) == "developer bob;developer"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", '{"messages": [%s0]}' % ("0," * 9000)),
        ("chat/completions", '{"messages": [{"role": "user", "content": [%s0]}]}' % ("0," * 9000)),
        ("chat/completions", '{"messages": [%s{}]}' % ('{"role":"user","content":""},' * 600)),
        ("chat/completions", json.dumps({"messages": [], **dict.fromkeys(range(1500), 0)})),
        ("completions", '{"prompt": "x", "stop": [%s0]}' % ("0," * 9000)),
        ("completions", '{"prompt": [%s""]}' % ('"",' * 6000)),
        ("completions", '{"prompt": [%s[]]}' % ("[]," * 6000)),
        ("completions", '{"prompt": [%s""]}' % ("0," * 9000)),
        ("completions", '{"prompt": "x", "strength": [%s0]}' % ("-1," * 6000)),
        ("completions", json.dumps({"prompt": "x", "strength": dict.fromkeys(range(1500), -1)})),
    ],
)
def test_one_body_makes_few_errors_and_not_one_for_each_of_its_parts(
    running: Running, path: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def invalid(errors: Any, **options: Any) -> RequestValidationError:
        made.append(len(errors))
        return RequestValidationError(errors, **options)

    monkeypatch.setattr("fastapi.routing.RequestValidationError", invalid)
    assert len(body) < LIMITS.max_body
    headers = {"content-type": "application/json"}
    response = running.client.post(f"/v1/{path}", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"]
    assert 1 <= made[0] <= 5


def test_a_text_that_cannot_fit_is_refused_before_it_is_read(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("qadapter.serve.asking.tokenize_prompt", read)
    text = "x" * 12_000
    responses = [
        running.chat(messages=[{"role": "user", "content": [{"type": "text", "text": text}]}]),
        running.client.post("/v1/completions", json={"prompt": text}),
        running.client.post("/v1/completions", json={"prompt": [text]}),
    ]
    for response in responses:
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"


def test_models_health_and_metrics(running: Running) -> None:
    (model,) = running.client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert model["max_model_len"] == 200
    assert running.client.get("/v1/models/tiny").json() == model
    assert running.client.get("/v1/models/other").status_code == 404
    assert running.client.get("/health").json() == {"status": "ok"}
    running.chat()
    text = running.client.get("/metrics").text
    line = 'qadapter_requests_total{outcome="ok",path="/v1/chat/completions"}'
    assert line in text
    for name in ("tokens_total", "waiting", "running", "first_token_seconds", "token_seconds"):
        assert f"qadapter_{name}" in text
    assert 'path="/health"' in text
    assert 'path="/v1/models/{model}"' in text
    assert running.client.get("/v1/modelsX").status_code == 404
    assert 'path="other"' in running.client.get("/metrics").text


def counted(running: Running, name: str) -> float:
    """Return a metric's value."""
    text = running.client.get("/metrics").text
    return sum(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"qadapter_{name}")
    )


def test_prompts_that_left_the_queue_unread_are_not_counted(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(policy, max_batch=1)
    go = slow(running, monkeypatch)
    body = json.dumps({"messages": MESSAGES, "max_tokens": 2}).encode()
    with post(running, body):
        until(lambda: running.engine.running == 1)
        with post(running, body):
            until(lambda: running.engine.waiting == 1)
        until(lambda: running.engine.waiting == 0)
    until(lambda: counted(running, 'requests_total{outcome="cancelled"') == 2)
    go.set()
    size = running.chat(n=2, max_tokens=1).json()["usage"]["prompt_tokens"]
    assert counted(running, 'tokens_total{kind="prompt"}') == 2 * size
    running.stop()


def test_a_prompt_counts_as_read_once_it_is_taken(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks leaves between the two: between two tokens the engine does other things, too."""
    running = Running(policy, max_batch=1)
    go, inner = threading.Event(), running.engine._let_go
    monkeypatch.setattr(running.engine, "_let_go", lambda: (go.wait(60), inner()))
    try:
        with post(running, json.dumps({"messages": MESSAGES, "max_tokens": 2}).encode()):
            until(lambda: running.engine.running == 1)
        until(lambda: counted(running, 'requests_total{outcome="cancelled"') == 1)
        go.set()
        size = running.chat(max_tokens=1).json()["usage"]["prompt_tokens"]
        assert counted(running, 'tokens_total{kind="prompt"}') == 2 * size
    finally:
        go.set()
        running.stop()


def test_the_seconds_of_a_token_are_those_after_the_first_piece() -> None:
    async def ask() -> list[float]:
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        tickets = cast(Any, [SimpleNamespace(cancel=lambda: None)] * 2)
        asked = Asked(tickets, queue, 1, cast(Any, None))
        queue.put_nowait((0, Piece("abcd", generated=9)))
        queue.put_nowait((1, Piece("abcd", finish="stop", generated=9)))
        loop = asyncio.get_running_loop()
        last = (0, Piece("e", finish="stop", generated=11))
        async for index, piece in asked.pieces(lambda: asyncio.sleep(60)):
            if index == 0 and piece.finish is None:
                loop.call_later(0.2, queue.put_nowait, last)
        return asked.token_seconds

    (seconds,) = asyncio.run(ask())  # of two tokens; of the other answer there is one piece
    assert seconds >= 0.09


def test_a_key_is_asked_for_everywhere_but_for_health(policy: Policy) -> None:
    running = Running(policy, api_key="s3cret-ключ")
    try:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            response = running.client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert running.client.get("/metrics").status_code == 401
        assert running.client.get("/health").status_code == 200
        for scheme in ("Bearer", "bearer"):  # its case does not matter (RFC 9110)
            right = {"authorization": f"{scheme} s3cret-ключ".encode()}
            assert running.client.get("/v1/models", headers=right).status_code == 200
        wrong = {"authorization": "Basic s3cret-ключ".encode()}
        assert running.client.get("/v1/models", headers=wrong).status_code == 401
    finally:
        running.stop()


def slow(running: Running, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let the engine stop before each token until the event is set."""
    go = threading.Event()
    inner = running.engine.policy.model.policy_logits

    def wait(*args: Any) -> Any:
        go.wait(60)
        return inner(*args)

    monkeypatch.setattr(running.engine.policy.model, "policy_logits", wait)
    return go


def test_a_full_queue_is_429_and_a_closing_server_finishes_and_is_503(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(policy, max_batch=1, max_queue=1)
    go = slow(running, monkeypatch)
    found: list[httpx2.Response] = []
    threads = [
        threading.Thread(target=lambda: found.append(running.chat(max_tokens=3))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    until(lambda: running.engine.waiting == running.engine.running == 1)
    busy = running.chat()
    assert busy.status_code == 429
    assert int(busy.headers["retry-after"]) >= 1
    running.server.handle_exit(15, None)
    closed = running.chat()
    assert closed.status_code == running.client.get("/health").status_code == 503
    assert running.client.get("/metrics").status_code == 200
    assert int(closed.headers["retry-after"]) >= 1
    go.set()
    for thread in [*threads, running.thread]:
        thread.join(60)
    assert [r.status_code for r in found] == [200, 200]
    assert running.engine.idle
    assert not running.thread.is_alive()


def post(running: Running, content: bytes, length: int | None = None) -> socket.socket:
    """Send a chat request, or only the first part of its body, and read no answer."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    plain.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    size = len(content) if length is None else length
    plain.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode() + content)
    return plain


@pytest.mark.parametrize("what", ["half a body", "a stream that nobody reads"])
def test_a_client_that_does_not_finish_does_not_keep_the_server_from_its_end(
    policy: Policy, what: str
) -> None:
    running = Running(policy)
    config = running.server.config
    config.timeout_graceful_shutdown = config.timeout_graceful_shutdown and 1
    running.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    if what == "half a body":
        client = post(running, b"{", length=100)
    else:
        body = {"messages": MESSAGES, "max_tokens": 60, "n": 4, "stream": True, "temperature": 1}
        body |= {"logprobs": True, "top_logprobs": 20, "seed": 0}
        client = post(running, json.dumps(body).encode())
        until(lambda: running.engine.running > 0)
    with client:
        until(lambda: bool(running.server.server_state.tasks))
        running.server.handle_exit(15, None)
        running.thread.join(60)
        assert not running.thread.is_alive()
    assert running.engine.idle


def test_a_body_that_does_not_come_is_a_408(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qadapter.serve.gate.BODY_SECONDS", 0.2)
    with post(running, b"{", length=100) as client:
        client.settimeout(20)
        answer = b""
        while part := client.recv(4096):  # until the server closes
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    running = Running(policy, max_batch=1)
    go = slow(running, monkeypatch)
    body = json.dumps({"messages": MESSAGES, "max_tokens": 60, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as plain:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        plain.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: running.engine.running == 1)
        (ticket,) = running.engine._joining
    until(lambda: ticket.cancelled)
    go.set()
    assert running.chat(max_tokens=2).status_code == 200
    assert ticket.answer.generated == 0
    assert 'outcome="cancelled"' in running.client.get("/metrics").text
    running.stop()


def test_a_failing_engine_is_a_500_in_openais_shape(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = Running(policy)
    with monkeypatch.context() as patch:
        patch.setattr(policy.model, "policy_logits", lambda *_: 1 / 0)
        response = running.chat()
        streamed = running.chat(stream=True)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failed"
    assert json.loads(streamed.text.removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert running.chat().status_code == 200
    running.stop()


def test_log_lines_are_json_without_text_or_key(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="qadapter.serve"):
        running.chat(messages=[{"role": "user", "content": "my secret"}])
        running.chat(secret="field")
        until(lambda: sum(r.message == "request" for r in caplog.records) == 2)
    said = "my " + "secret"
    try:
        raise ValueError(said)
    except ValueError:
        logging.getLogger("qadapter.serve").exception("failed")
    lines = [JsonLines().format(record) for record in caplog.records]
    found = [json.loads(line) for line in lines]
    asked = next(line for line in found if line.get("status") == 200)
    assert asked["path"] == "/v1/chat/completions"
    assert asked["completion_tokens"] == 12
    assert asked.keys() >= {"time", "level", "id", "seconds", "prompt_tokens", "strength"}
    assert "secret" not in "".join(lines)
    assert found[-1]["error"] == "ValueError"


def test_a_template_that_refuses_is_told(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(policy)
    monkeypatch.setattr(
        policy.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}"
    )
    response = running.chat()
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]
    running.stop()


@pytest.fixture(scope="module")
def load() -> Any:
    """The load benchmark, which is no part of the package."""
    path = Path(__file__).parents[2] / "benchmarks" / "load.py"
    spec = importlib.util.spec_from_file_location("load", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load"] = module
    spec.loader.exec_module(module)
    return module


def test_no_request_of_a_mixed_run_is_lost_or_wrong(policy: Policy, load: Any) -> None:
    running = Running(policy, max_batch=8, max_queue=64)
    asked, strengths = [f"Say {i}" for i in range(6)], (0.0, 0.5, 1.0, 2.0)
    options: dict[str, Any] = {"max_new_tokens": 24}
    alone = {
        (content, s): policy.answer([[{"role": "user", "content": content}]], strength=s, **options)
        for content in asked
        for s in strengths
    }
    questions = load.mixed_questions(asked, 60, strengths=strengths, max_tokens=24)
    answers = asyncio.run(load.ask_all(running.url, questions, concurrent=16))
    found = load.judge(questions, answers, {key: text for key, (text,) in alone.items()})
    assert (found.lost, found.wrong) == (0, 0), found.examples
    assert found.left > 10
    assert found.answered > 20
    running.stop()
    assert running.engine.running == running.engine.waiting == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--api-key", ""], "--api-key: is empty"),
        (["--vllm-args=-x"], "--vllm-args: goes with --engine vllm"),
        (["--engine", "vllm", "--max-queue", "9"], "--max-queue: vLLM has no such limit"),
        (["--engine", "vllm", "--port", "0"], "--port: vLLM takes no 0"),
        (["--engine", "vllm", "--port", "9"], "--engine vllm: vLLM is not installed here"),
        (["--host", "192.0.2.1"], "192.0.2.1:8000: cannot be listened on"),
        (["--host", "no.such.host.invalid"], "cannot be listened on"),
        (["--port", "0"], "nowhere"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_sentence(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "nowhere", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_an_export_is_told_how_it_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for config, told in (
        ('{"model_type": "qadapter"}', "serve it with --engine vllm"),
        ('{"model_type": "llama"}', "is not a Q-adapter"),
        ("{", "is not a Q-adapter"),
    ):
        (tmp_path / "config.json").write_text(config)
        assert main(["serve", str(tmp_path), "--port", "0"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line


def test_the_command_serves_until_a_signal_and_tells_of_a_taken_port(
    adapter: str, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "qadapter.cli", "serve", adapter, "--port"]
    log = tmp_path / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen([*words, "0"], stderr=file)
    try:
        until(lambda: b"listening" in log.read_bytes(), seconds=300)
        lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
        port = next(e["port"] for e in map(json.loads, lines) if e["event"] == "listening")
        until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        models = httpx2.get(f"http://127.0.0.1:{port}/v1/models", timeout=60)
        (model,) = models.json()["data"]
        assert model["id"] == Path(adapter).name
        taken = subprocess.run([*words, str(port)], capture_output=True, text=True, timeout=300)
        assert taken.returncode == 2
        (line,) = taken.stderr.splitlines()
        assert f"127.0.0.1:{port}: cannot be listened on (Address already in use)" in line
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
    finally:
        process.kill()
    # A bar of transformers' was in the first line.
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events == ["listening", "request", "closed"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been started in the place of vLLM."""
    found: list[list[str]] = []
    monkeypatch.setattr(on_vllm, "check_installed", lambda: None)
    monkeypatch.setattr(on_vllm, "run", lambda words, api_key: found.append(words))
    return found


def an_export(place: Path, **fields: Any) -> list[str]:
    """Write the config of an export; return the command that serves it on vLLM."""
    text = {"model_type": "llama", "num_hidden_layers": 6}
    fields = {"text_config": text, "branch_layers": [1, 1], "dtype": "bfloat16", **fields}
    place.joinpath("config.json").write_text(json.dumps({"model_type": "qadapter", **fields}))
    return ["serve", str(place), "--engine", "vllm", "--vllm-args=--seed '3'"]


def test_an_export_keeps_its_own_strength_and_dtype_on_vllm_unless_told(
    asked: list[list[str]], tmp_path: Path
) -> None:
    serve = an_export(tmp_path)
    assert main(serve) == 0
    assert main([*serve, "--strength", "1.0,0.5", "--dtype", "float32"]) == 0
    assert asked[0][asked[0].index("--model") + 1] == str(tmp_path)
    assert "--hf-overrides" not in asked[0]
    assert asked[1][asked[1].index("--hf-overrides") + 1] == '{"strength": [1.0, 0.5]}'
    assert asked[1][-2:] == ["--seed", "3"]
    assert [words[words.index("--dtype") + 1] for words in asked] == ["bfloat16", "float32"]
    assert main([*serve[:-1], "--vllm-args='"]) == 2


@pytest.mark.parametrize(
    ("words", "fields", "told"),
    [
        (["--base", "x"], {}, "--base: {} is an export with its base; leave it out."),
        (["--no-check-base"], {}, "--no-check-base: {} is an export"),
        (["--trust-remote-code"], {}, "--trust-remote-code: {} is an export"),
        (["--device", "cpu"], {}, "--device: vLLM picks its own; leave it out"),
        (["--strength", "1,1,1"], {}, "{}: strength: (1.0, 1.0, 1.0) must be a finite number"),
        ([], {"branch_layers": [9]}, "{}: branch_layers: [9] with"),
        (
            [],
            {"text_config": {"model_type": "gpt2", "n_layer": 6}},
            "--engine vllm: the plugin knows llama, mistral, qwen2, qwen3 and not gpt2;",
        ),
    ],
)
def test_what_vllm_would_ignore_of_an_export_or_trip_over_is_told(
    words: list[str],
    fields: dict[str, Any],
    told: str,
    asked: list[list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*an_export(tmp_path, **fields), *words]) == 2
    assert not asked
    (line,) = capsys.readouterr().err.splitlines()
    assert told.format(tmp_path) in line


def test_a_family_that_vllm_cannot_serve_is_told_before_an_export_is_made(
    asked: list[list[str]],
    adapter: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(on_vllm, "FAMILIES", ("qwen3",))
    monkeypatch.setattr("qadapter.export.export_policy", lambda *_: 1 / 0)
    assert main(["serve", adapter, "--engine", "vllm"]) == 2
    assert not asked
    assert "the plugin knows qwen3 and not llama; leave --engine out." in capsys.readouterr().err


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(os.getpid(), worker.pid, flush=True)
while True:
    time.sleep(1)
"""
DYING = STUBBORN.replace("while True", "sys.exit(3)\nwhile True")


@pytest.mark.parametrize(
    ("server", "signals", "code"),
    [
        (STUBBORN, [signal.SIGHUP, signal.SIGTERM], 0),
        (STUBBORN, [signal.SIGTERM, signal.SIGTERM], 0),
        (DYING, [], 1),
    ],
    ids=["hang-up", "twice", "by itself"],
)
def test_no_process_of_vllms_outlives_the_command(
    server: str, signals: list[signal.Signals], code: int
) -> None:
    # Under nohup, which a test may run under, a hang-up is ignored, and rightly stays so.
    program = f"""
import signal, sys
from qadapter.serve import on_vllm
signal.signal(signal.SIGHUP, signal.SIG_DFL)
on_vllm.run([sys.executable, "-c", {server!r}], api_key=None)
"""
    words = [sys.executable, "-c", program]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    started = [int(pid) for pid in process.stdout.readline().split()]
    try:
        for i, number in enumerate(signals):
            process.send_signal(number)
            if i == 0:
                assert process.stdout.readline() == "asked\n"
        assert process.wait(60) == code
        until(lambda: not any(map(alive, started)))
    finally:
        for pid in started:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_export_for_vllm_goes_with_a_command_that_is_ended(
    number: signal.Signals, tmp_path: Path
) -> None:
    program = """
import signal, sys, time
from qadapter.cli import main, serving
from qadapter.serve import on_vllm
signal.signal(signal.SIGHUP, signal.SIG_DFL)
on_vllm.check_installed = lambda: None
serving.load_policy = lambda _: (print("loading", flush=True), time.sleep(300))
sys.exit(main(["serve", "nowhere", "--engine", "vllm"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "loading\n"
        assert [path.name.split(".")[0] for path in tmp_path.iterdir()] == ["qadapter-vllm"]
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert not list(tmp_path.iterdir())
    finally:
        process.kill()
        process.stdout.close()
