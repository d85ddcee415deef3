"""Strangers at the server's door: OpenAI's client, and a fuzzer that has read the schema."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from serving import MESSAGES, Running

from qadapter.policy import Policy
from qadapter.serve.shelf import Shelf


@pytest.fixture(scope="module")
def running(adapter: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    policy, shelf = Policy.from_pretrained({"tiny": adapter}), tmp_path_factory.mktemp("shelf")
    running = Running(policy, api_key="right", shelf=Shelf(shelf))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="right", max_retries=0)


def test_openais_client_chats_and_streams(client: openai.OpenAI, running: Running) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20}
    asked |= {"temperature": 0, "logprobs": True, "top_logprobs": 2}
    for strength in (0, 1):
        extra = {"strength": strength}
        whole = client.chat.completions.create(**asked, extra_body=extra)
        text = whole.choices[0].message.content
        assert text is not None
        (expected,) = running.engine.policy.answer([MESSAGES], strength=strength, max_new_tokens=20)
        assert text.strip() == expected
        chunks = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}, extra_body=extra
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert chunks[-1].usage == whole.usage
        assert whole.choices[0].logprobs is not None
        logprobs = [t.logprob for t in whole.choices[0].logprobs.content or ()]
        streamed = [t.logprob for c in chunks for x in c.choices for t in x.logprobs.content]
        assert streamed == pytest.approx(logprobs, abs=1e-5)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "qadapter"


def test_openais_client_completes(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="tiny", prompt=["Say", "Sing"], n=2, seed=1, logprobs=1, max_tokens=5, stop=["\n"]
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage is not None
    assert found.usage.prompt_tokens == 7
    (choice,) = client.completions.create(model="tiny", prompt="Say", logprobs=3).choices
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or ()) == len(choice.logprobs.token_logprobs or ()) <= 16


def test_openais_client_knows_our_errors(client: openai.OpenAI, running: Running) -> None:
    chat: dict[str, Any] = {"model": "tiny", "messages": MESSAGES}
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.chat.completions.create(**{**chat, "model": "other"})
    with pytest.raises(openai.BadRequestError, match="strength"):
        client.chat.completions.create(**chat, extra_body={"strength": -1})
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny", prompt="x" * 300)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError, match="more than 20000 bytes"):
        client.completions.create(model="tiny", prompt="x" * 30_000)


CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.missing_required_header,
]
"""All that apply but positive_data_acceptance: the limits of one server are not in its schema."""


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_a_fuzzer_finds_neither_a_5xx_nor_a_breach_of_the_schema(
    running: Running, mode: GenerationMode
) -> None:
    headers = {"Authorization": "Bearer right"}
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers=headers)
    rejection = schema.config.checks.negative_data_rejection
    rejection.expected_statuses = ["400", "413"]  # a text longer than its limit may pass the body's
    seen: Counter[tuple[str, int]] = Counter()
    operations = [found.ok() for found in schema.get_all_operations()]
    for operation in operations:
        if mode.is_negative and operation.method == "get":
            continue  # it takes nothing that could be wrong, at most a text

        @settings(
            max_examples=50 if operation.path.endswith("completions") else 20,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            # A name may be any text to the schema; most answers would be that it is unknown.
            name = case.body.get("model") if isinstance(case.body, dict) else None
            if isinstance(name, str) and len(name) <= 1024:  # else it is what is wrong
                case.body["model"] = "tiny"
            response = case.call_and_validate(headers=headers, checks=CHECKS)
            seen[case.operation.path, response.status_code] += 1

        ask()
    posted = {status for (path, status) in seen if path.endswith("completions")}
    assert posted - {413} == ({400} if mode.is_negative else {200, 400}), seen
    if not mode.is_negative:
        assert {path for path, _ in seen} == {operation.path for operation in operations}
