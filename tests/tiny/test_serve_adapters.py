"""Several adapters behind one server: asked for by name, composed, loaded while it runs."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from serving import MESSAGES, Running, until

from qadapter.cli import main
from qadapter.policy import Policy
from qadapter.serve.shelf import Shelf


@pytest.fixture(scope="module")
def alone(adapter: str, second: str) -> Any:
    """Return a function that says what adapters answer, on a model that no server has."""
    policy = Policy.from_pretrained({"tiny": adapter, "deep": second})

    def answer(tiny: float, deep: float, max_tokens: int = 12) -> str:
        (text,) = policy.answer([MESSAGES], strength=[tiny, deep], max_new_tokens=max_tokens)
        return text

    assert len({answer(*s) for s in ((1, 0), (0, 1), (1, 1), (0, 0), (1, 0.5))}) == 5
    return answer


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, second: str, adapter: str) -> Path:
    root = tmp_path_factory.mktemp("shelf")
    shutil.copytree(second, root / "deep")
    shutil.copytree(adapter, root / "sub" / "tiny")
    return root


@pytest.fixture(scope="module")
def two(adapter: str, second: str) -> Iterator[Running]:
    policy = Policy.from_pretrained({"tiny": adapter, "deep": second})
    running = Running(policy, strength=(1.0, 0.5), max_batch=4)
    yield running
    running.stop()


@pytest.fixture
def one(adapter: str, shelf: Path) -> Iterator[Running]:
    running = Running(Policy.from_pretrained({"tiny": adapter}), shelf=Shelf(shelf), max_batch=4)
    yield running
    running.stop()


def said(response: httpx2.Response) -> tuple[str, str]:
    """Return who answered what."""
    assert response.status_code == 200, response.text
    found = response.json()
    return found["model"], found["choices"][0]["message"]["content"].strip()


@pytest.mark.parametrize(
    ("body", "model", "strengths"),
    [
        ({}, "tiny+deep", (1.0, 0.5)),
        ({"model": "tiny"}, "tiny", (1.0, 0.0)),
        ({"model": "deep"}, "deep", (0.0, 0.5)),
        ({"model": "deep", "strength": 1}, "deep", (0.0, 1.0)),
        ({"model": "tiny+deep", "strength": 1}, "tiny+deep", (1.0, 1.0)),
        ({"model": "deep+tiny", "strength": [0, 1]}, "tiny+deep", (1.0, 0.0)),
        ({"strength": [0.0, 1.0]}, "tiny+deep", (0.0, 1.0)),
        ({"strength": {"deep": 1.0}}, "deep", (0.0, 1.0)),
        ({"model": "tiny", "strength": {"deep": 0.5, "tiny": 1}}, "tiny+deep", (1.0, 0.5)),
    ],
)
def test_a_request_names_its_adapters_and_their_strengths(
    two: Running, alone: Any, body: dict[str, Any], model: str, strengths: tuple[float, float]
) -> None:
    assert said(two.chat(**body)) == (model, alone(*strengths))


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"model": "tiny+tiny"}, 404, "model"),
        ({"model": "tiny+"}, 404, "model"),
        ({"strength": {"other": 1}}, 400, "strength"),
        ({"strength": {}}, 400, "strength"),
        ({"strength": {"tiny": -1}}, 400, "strength"),
        ({"strength": [1]}, 400, "strength"),
        ({"model": "tiny", "strength": [1, 1]}, 400, "strength"),
        ({"model": "tiny", "strength": {"deep": 1}}, 400, "strength"),
    ],
)
def test_what_names_no_adapters_is_told(
    two: Running, body: dict[str, Any], status: int, param: str
) -> None:
    response = two.chat(**body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_requests_for_different_adapters_do_not_disturb_each_other(
    two: Running, alone: Any
) -> None:
    asked: list[tuple[dict[str, Any], tuple[float, float]]] = [
        ({"model": "tiny"}, (1, 0)),
        ({"model": "deep", "strength": 1}, (0, 1)),
        ({"strength": {"tiny": 1, "deep": 1}}, (1, 1)),
        ({"strength": 0}, (0, 0)),
        ({"model": "tiny", "strength": 0}, (0, 0)),
        ({"strength": [1, 0.5]}, (1, 0.5)),
    ] * 2
    expected = [alone(*s, max_tokens=8 + i) for i, (_, s) in enumerate(asked)]
    found: dict[int, str] = {}

    def ask(i: int, body: dict[str, Any]) -> None:
        found[i] = said(two.chat(**body, max_tokens=8 + i))[1]

    threads = [threading.Thread(target=ask, args=(i, b)) for i, (b, _) in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[i] for i in range(len(asked))] == expected


def test_the_list_of_models_begins_with_what_is_the_default(two: Running) -> None:
    listed = [model["id"] for model in two.client.get("/v1/models").json()["data"]]
    assert listed == ["tiny+deep", "tiny", "deep"]
    for name in listed:
        assert two.client.get(f"/v1/models/{name}").json()["id"] == name
    # Nobody said that adapters may be loaded.
    for path in ("load", "unload"):
        assert two.client.post(f"/v1/{path}_lora_adapter", json={}).status_code == 404


def load(running: Running, name: str, path: str) -> httpx2.Response:
    body = {"lora_name": name, "lora_path": path}
    return running.client.post("/v1/load_lora_adapter", json=body)


def unload(running: Running, name: str) -> httpx2.Response:
    return running.client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_an_adapter_comes_and_goes_while_others_are_answered(
    one: Running, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [alone(1, 0, 60), alone(0.5, 1, 60)]
    step, at = threading.Semaphore(0), one.engine.policy.model
    inner, free = at.policy_logits, threading.Event()

    def wait(*args: Any) -> Any:
        if not free.is_set():
            step.acquire(timeout=60)
        return inner(*args)

    monkeypatch.setattr(at, "policy_logits", wait)
    found: dict[str, Any] = {}

    def ask(name: str, **body: Any) -> threading.Thread:
        def work() -> None:
            found[name] = one.chat(max_tokens=60, **body)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def ordered(name: str, call: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.update({name: call()}))
        thread.start()
        return thread

    first = ask("first")
    until(lambda: one.engine.running == 1)
    coming = ordered("load", lambda: load(one, "new", "deep"))
    until(lambda: bool(one.engine._orders))
    step.release(3)
    coming.join(60)
    assert found["load"].json()["id"] == "new"
    both = ask("both", strength={"new": 1.0, "tiny": 0.5})
    # It waits for the step that is held, or was just in time for it.
    until(lambda: one.engine.waiting == 1 or one.engine.running == 2)
    step.release(3)
    until(lambda: one.engine.running == 2)
    assert "first" not in found
    # It is not to be had any more, but those who have it are answered.
    assert unload(one, "new").json() == {"id": "new", "object": "model", "deleted": True}
    assert one.chat(model="new").status_code == 404
    assert [adapter.name for adapter in at.adapters] == ["tiny", "new"]
    # Its name is free, and another adapter's at once.
    again = ordered("again", lambda: load(one, "new", "sub/tiny"))
    free.set()
    step.release(9)
    for thread in (again, first, both):
        thread.join(60)
    assert [said(found[name])[1] for name in ("first", "both")] == expected
    until(lambda: len(at.adapters) == 2)
    assert found["again"].status_code == 200
    assert said(one.chat(model="new", max_tokens=12)) == ("new", alone(1, 0))
    assert unload(one, "new").status_code == 200
    until(lambda: len(at.adapters) == 1)
    assert said(one.chat()) == ("tiny", alone(1, 0))
    assert not [name for name, _ in at.named_parameters() if "more" in name]


@pytest.fixture(scope="module")
def guarded(
    adapter: str, second: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, Path]]:
    """A server whose shelf holds all that must not be loaded, and where the shelf is."""
    place = tmp_path_factory.mktemp("guarded")
    outside, root = place / "outside", place / "root"
    inside = ("deep", "half", "half config", "half identity", "pipe", "cut", "other base")
    for directory in (outside, place / "root2", *(root / n for n in inside)):
        shutil.copytree(second, directory)
    (root / "sub").mkdir()
    (root / "link").symlink_to(outside)
    (root / "ring").symlink_to(root / "ring")
    (root / "sub" / "up").symlink_to("../..")
    for directory, name in (
        ("half", "adapter_model.safetensors"),
        ("half config", "adapter_config.json"),
        ("half identity", "qadapter_config.json"),
    ):
        (root / directory / name).unlink()
        (root / directory / name).symlink_to(outside / name)
    (root / "pipe" / "adapter_config.json").unlink()
    os.mkfifo(root / "pipe" / "adapter_config.json")  # whoever reads it waits for ever
    cut = root / "cut" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:99])
    config = root / "other base" / "qadapter_config.json"
    config.write_text(config.read_text().replace('"base_hash": "', '"base_hash": "0'))
    running = Running(Policy.from_pretrained({"tiny": adapter}), shelf=Shelf(root))
    yield running, place
    running.stop()


@pytest.mark.parametrize(
    ("name", "path", "param"),
    [
        ("tiny", "deep", "lora_name"),
        ("a+b", "deep", "lora_name"),
        ("../x", "deep", "lora_name"),
        ("new\n", "deep", "lora_name"),
        ("", "deep", "lora_name"),
        ("new", "nowhere", "lora_path"),
        ("new", "", "lora_path"),
        ("new", "sub", "lora_path"),
        ("new", "deep\x00", "lora_path"),
        ("new", "../outside", "lora_path"),
        ("new", "deep/../../outside", "lora_path"),
        ("new", "OUTSIDE", "lora_path"),
        ("new", "OUTSIDE/../outside", "lora_path"),
        ("new", "/", "lora_path"),
        ("new", "//etc/passwd", "lora_path"),
        ("new", "/proc/self/cwd", "lora_path"),
        ("new", "../root2", "lora_path"),
        ("new", "~", "lora_path"),
        ("new", "$HOME", "lora_path"),
        ("new", "%2e%2e/outside", "lora_path"),
        ("new", "..\\outside", "lora_path"),
        ("new", "file:///etc", "lora_path"),
        ("new", "\x00../outside", "lora_path"),
        ("new", "../outside\x00/deep", "lora_path"),
        ("new", "x" * 1000, "lora_path"),
        ("new", "x/" * 500 + "deep", "lora_path"),
        ("new", "../" * 300 + "etc", "lora_path"),
        ("new", "x" * 1025, "lora_path"),
        ("x" * 65, "deep", "lora_name"),
        ("x" * 10_000, "deep", "lora_name"),
        ("new\x00", "deep", "lora_name"),
        ("..", "deep", "lora_name"),
        ("/etc/passwd", "deep", "lora_name"),
        ("new", "link", "lora_path"),
        ("new", "link/.", "lora_path"),
        ("new", "sub/up/outside", "lora_path"),
        ("new", "half", "lora_path"),
        ("new", "half config", "lora_path"),
        ("new", "half identity", "lora_path"),
        ("new", "pipe", "lora_path"),
        ("new", "ring", "lora_path"),
        ("new", "cut", "lora_path"),
        ("new", "other base", "lora_path"),
    ],
)
def test_what_lies_outside_or_cannot_be_used_is_not_loaded(
    guarded: tuple[Running, Path], name: str, path: str, param: str
) -> None:
    running, place = guarded
    path = path.replace("OUTSIDE", str(place / "outside"))
    response = load(running, name, path)
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["param"] == param
    assert str(place) not in error["message"].replace(path or "-", "")
    assert [m["id"] for m in running.client.get("/v1/models").json()["data"]] == ["tiny"]
    assert running.engine.policy.names == ["tiny"]


@pytest.mark.parametrize(
    "name",
    [
        "deep",
        "../root/deep",
        "root/deep",
        "PLACE/root/deep",
        "tiny/../deep",
        "tiny\x00",
        "tiny+../deep",
        "link",
        "/etc/passwd",
        "x" * 10_000,
    ],
)
def test_the_name_of_a_model_is_no_path(guarded: tuple[Running, Path], name: str) -> None:
    running, place = guarded
    name = name.replace("PLACE", str(place))
    assert running.chat(model=name).status_code in (400, 404)  # too long, or not there
    assert running.chat(strength={name: 1.0}).status_code == 400
    quoted = quote(name, safe="")
    for path in (quoted, quote(quoted, safe="")):
        response = running.client.get(f"/v1/models/{path}")
        assert response.status_code == 404
        assert "base" not in response.text
    assert unload(running, name).status_code in (400, 404)
    assert running.engine.policy.names == ["tiny"]


def test_the_first_adapters_stay_and_what_is_not_there_cannot_leave(
    guarded: tuple[Running, Path],
) -> None:
    running, _ = guarded
    assert unload(running, "tiny").status_code == 400
    assert unload(running, "new").status_code == 404
    # What nothing is wrong with is loaded, by its whole path, too.
    whole = guarded[1] / "root" / "deep"
    assert load(running, "new", str(whole)).status_code == 200
    assert unload(running, "new").status_code == 200
    until(lambda: running.engine.policy.names == ["tiny"])


def test_a_shelf_holds_so_many_and_counts_those_that_left_and_still_answer(
    one: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.engine.max_adapters = 2
    model = one.engine.policy.model
    inner, free, steps = model.policy_logits, threading.Event(), threading.Semaphore(0)

    def wait(*args: Any) -> Any:
        if not free.is_set():
            steps.acquire(timeout=60)
        return inner(*args)

    assert load(one, "new", "deep").status_code == 200
    # At strength 0, for the adapter's own answer is of two tokens, which ended before the checks.
    asked = {"model": "new", "strength": 0.0, "max_tokens": 60, "temperature": 0}
    assert one.chat(**asked).json()["usage"]["completion_tokens"] > 12
    until(lambda: one.engine.running == 0)  # else what is seen below may be this one, leaving
    monkeypatch.setattr(model, "policy_logits", wait)
    asking = threading.Thread(target=lambda: one.chat(**asked))
    asking.start()
    until(lambda: one.engine.running == 1)
    assert unload(one, "new").status_code == 200
    found: list[httpx2.Response] = []
    loading = threading.Thread(target=lambda: found.append(load(one, "other", "deep")))
    loading.start()
    until(lambda: bool(one.engine._orders))
    steps.release(3)
    loading.join(60)
    assert found[0].status_code == 400
    assert "unload one first" in found[0].json()["error"]["message"]
    assert len(model.adapters) == 2
    free.set()
    steps.release(9)
    asking.join(60)
    until(lambda: one.engine.running == 0)
    # One that nobody asks for any more makes room at once.
    for name in ("other", "third"):
        assert load(one, name, "deep").status_code == 200
        assert unload(one, name).status_code == 200


def test_a_refused_adapter_does_not_tell_where_the_bases_lie(
    guarded: tuple[Running, Path],
) -> None:
    running, _ = guarded
    base = Path(running.engine.policy.model.q_config.base_model)
    assert base.is_absolute()
    message = load(running, "new", "other base").json()["error"]["message"]
    assert "was trained on another base" in message
    assert base.name in message
    assert str(base.parent) not in message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x", "y", "--strength", "1,2,3"], "3 numbers (1,2,3) for 2 adapters (x, y)"),
        (["x", "a/x"], "another adapter is named 'x', too; name it, as in other=a/x"),
        (["a+b=x"], "'a+b' is no name"),
        (["x", "--adapter-dir", "nowhere"], "--adapter-dir: nowhere is no directory"),
        (["x", "--adapter-dir", ".", "--engine", "vllm"], "--adapter-dir: vLLM reads no adapters"),
        (["x", "--strength", "1,-1"], "is not a finite number from 0"),
    ],
)
def test_adapters_that_cannot_be_served_are_told_in_one_sentence(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["serve", *words, "--port", "0"])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
