"""The page of `qadapter play`, in a real browser without a network."""

from __future__ import annotations

import math
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fakes import tiny_tokenizer
from serving import MESSAGES, until

from qadapter import play
from qadapter.cli import main
from qadapter.policy import Policy
from qadapter.serve.answer import Piece, Token
from qadapter.serve.engine import Engine, Request
from qadapter.serve.run import listen, server
from qadapter.strength import Strength

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def policy(adapter: str) -> Policy:
    return Policy.from_pretrained({"tiny": adapter})


def test_colours_titles_and_escapes_of_an_answer() -> None:
    tokens = [
        Token(1, "<b>", 0, -0.1, -3.0),
        Token(2, "\ufffd", 3, -1.0, -1.0),
        Token(3, "\ufffd", 3, -2.0, -0.5),
        Token(4, "x", 4, -1.0, -1.0),
    ]
    html = play.moved_html("<b>é&", tokens)
    spans = re.findall(
        r'<span title="([^"]*)" style="background: rgba\((.*?)\)">(.*?)</span>', html
    )
    assert [text for _, _, text in spans] == ["&lt;b&gt;", "é", "&amp;"]
    titles, colours = [title for title, _, _ in spans], [colour for _, colour, _ in spans]
    assert titles[0] == "base 5.0% → policy 90.5% (+2.90 nats)"
    assert titles[1] == "base 22.3% → policy 5.0% (-1.50 nats)"
    assert colours[0] == "37, 99, 235, 0.75"
    assert colours[1] == "234, 120, 12, 0.56"
    assert colours[2].endswith("0.00")
    assert play.moved_html("", []) == '<div class="answer"></div>'


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror="alert(1)">',
    "' onmouseover='alert(1)",
    "</span></div><iframe srcdoc='&lt;script&gt;'>&#60;b&#62;",
)


class Tags(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("size", [1, 3, 99])
def test_a_models_text_is_text_and_never_tags(text: str, size: int) -> None:
    starts = range(0, len(text), size)
    tokens = [Token(1, text[i : i + size], i, -1.0, -2.0) for i in starts]
    page = Tags(play.moved_html(text, tokens))
    assert page.text == text
    assert page.tags == [("div", ("class",)), *[("span", ("title", "style"))] * len(starts)]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_users_text_that_the_model_repeats_is_text(text: str) -> None:
    class Parrot:
        """An engine that answers every message with itself."""

        policy, context = SimpleNamespace(tokenizer=tiny_tokenizer()), 500

        def submit(self, requests: list[Request]) -> list[SimpleNamespace]:
            for request in requests:
                said = self.policy.tokenizer.decode(request.prompt)
                said = said.split("user\n")[1].split("<|im_end|>")[0]
                tokens = (Token(1, said, 0, -1.0, -2.0),) if request.compare else ()
                request.emit(Piece(said, tokens, "stop"))
            return [SimpleNamespace(cancel=lambda: None)] * len(requests)

    *_, pages = play.answers(cast(Any, Parrot()), text, 1.0, 20)
    assert [Tags(page).text for page in pages] == [text, text]
    assert {tag for page in pages for tag, _ in Tags(page).tags} == {"div", "span"}


def test_answers_are_shown_as_they_grow(policy: Policy) -> None:
    asked: list[Any] = []
    left: list[int] = []

    class Slow:
        """Says the first word at once, and the second when it is told to."""

        def __init__(self) -> None:
            self.policy, self.context = policy, 10_000

        def submit(self, requests: list[Any]) -> list[Any]:
            asked.extend(requests)
            for request in requests:
                request.emit(Piece("one ", (Token(1, "one ", 0, -1.0, -2.0),), None))
            return [SimpleNamespace(cancel=lambda: left.append(1))] * len(requests)

    pages = play.answers(cast(Any, Slow()), "Say 3", 1.0, 20)
    assert [Tags(page).text for page in next(pages)] == ["one ", "one "]
    asked[0].emit(Piece("two", (), "stop"))
    assert [Tags(page).text for page in next(pages)] == ["one two", "one "]
    asked[1].emit(Piece("2", (Token(2, "2", 4, -1.0, -2.0),), "stop"))
    assert [Tags(page).text for page in next(pages)] == ["one two", "one 2"]
    assert next(pages, None) is None
    assert len(left) == 2


def test_answers_are_the_policys_and_a_long_message_is_told(adapter: str) -> None:
    policy = Policy.from_pretrained({"tiny": adapter})
    engine = Engine(policy)
    try:
        *_, (base, ours) = play.answers(engine, "Say 3", 1.0, 20)
        for html, strength in ((base, 0.0), (ours, 1.0)):
            (expected,) = policy.answer([MESSAGES], strength=strength, max_new_tokens=20)
            assert re.sub("<[^>]*>", "", html).strip() == play.escape(expected)
        assert "<span" not in base
        (told,) = play.answers(engine, "x" * 300, 1.0, 20)
        assert "does not fit" in told[0]
    finally:
        engine.close()


def test_each_adapter_has_a_slider_and_their_residuals_add(adapter: str, second: str) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (make install does)")
    policy = Policy.from_pretrained({"tiny": adapter, "deep": second})
    engine = Engine(policy)
    try:
        blocks = play.page(engine, strength=(1.0, 0.5), max_tokens=20)
        sliders = {
            part["id"]: (part["props"]["label"], part["props"]["value"])
            for part in blocks.config["components"]
            if part["type"] == "slider"
        }
        assert list(sliders.values()) == [("Strength: tiny", 1.0), ("Strength: deep", 0.5)]
        asked = [event for event in blocks.config["dependencies"] if event["inputs"]]
        assert len(asked) == 4  # the button, the message, both sliders
        assert all(set(event["inputs"]) > set(sliders) for event in asked)
        *_, (_, ours) = play.answers(engine, "Say 3", (1.0, 0.5), 20)
    finally:
        engine.close()
    (expected,) = policy.answer([MESSAGES], strength=(1.0, 0.5), max_new_tokens=20)
    assert re.sub("<[^>]*>", "", ours).strip() == play.escape(expected)


def test_an_engine_that_fails_is_told_on_the_page(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (make install does)")
    engine = Engine(policy)
    try:
        blocks = play.page(engine, strength=1.0, max_tokens=20)
        answer = next(event.fn for event in blocks.fns.values() if event.api_name == "answer")
        monkeypatch.setattr(policy.model, "policy_logits", lambda *_: 1 / 0)
        with pytest.raises(gradio.Error, match="The answer failed"):
            list(answer("Say 3", 1.0))
        # From a program; sliders have no such numbers. NaN made an answer of NaN.
        for strength in (math.nan, math.inf, -1.0):
            with pytest.raises(gradio.Error, match="must be finite and from 0") as told:
                list(answer("Say 3", strength))
            assert not told.value.print_exception
        for template, said in ((None, "chat template"), ("{{ raise_exception('No') }}", "No")):
            monkeypatch.setattr(policy.tokenizer, "chat_template", template)
            with pytest.raises(gradio.Error, match=said):
                list(answer("Say 3", 1.0))
    finally:
        engine.close()


def test_a_missing_gradio_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["play", "nowhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("gradio is not installed; run `pip install 'qadapter[play]'`.")


@contextmanager
def served(policy: Policy, strength: Strength) -> Iterator[str]:
    """Serve the page in a thread; yield its address."""
    pytest.importorskip("gradio", reason="gradio is not installed (make install does)")
    engine, bound = Engine(policy), listen("127.0.0.1", 0)
    app = play.create_app(play.page(engine, strength=strength, max_tokens=20))
    running = server(app, engine, patience=1)
    thread = threading.Thread(target=running.run, args=([bound],), daemon=True)
    thread.start()
    until(lambda: running.started)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        engine.close()
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(policy: Policy) -> Iterator[str]:
    with served(policy, 1.0) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def wait_for(page: Any, place: str, text: str) -> None:
    """Wait until an answer on the page is this one."""
    page.wait_for_function(
        "([place, text]) => document.querySelector(place).textContent.trim() === text",
        arg=[f"#{place} .answer", text],
        timeout=60_000,
    )


def slide_to_the_left_end(page: Any, name: str) -> None:
    box = page.locator(f"#{name} input[type=range]").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 1, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()


def test_type_slide_see_the_answer_change_and_read_its_colours(
    browser: Any, address: str, policy: Policy
) -> None:
    texts = {  # made before: a model is one thread's at a time
        s: policy.answer([MESSAGES], strength=s, max_new_tokens=20)[0] for s in (0.0, 1.0)
    }
    page = browser.new_page()
    elsewhere: list[str] = []

    def watch(route: Any) -> None:
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    page.route("**/*", watch)
    page.goto(address)

    def expect(place: str, strength: float) -> None:
        wait_for(page, place, texts[strength])

    page.locator("#message textarea").fill(MESSAGES[0]["content"])
    page.locator("#ask").click()
    expect("base", 0.0)
    expect("policy", 1.0)
    spans = page.locator("#policy .answer span")
    assert spans.count() > 5
    for i in range(spans.count()):
        span = spans.nth(i)
        title = span.get_attribute("title")
        found = re.fullmatch(r"base [\d.]+% → policy [\d.]+% \(([+-][\d.]+) nats\)", title)
        assert found is not None
        colour = span.evaluate("e => getComputedStyle(e).backgroundColor")
        alpha = float(colour.rstrip(")").split(", ")[3]) if colour.startswith("rgba") else 1.0
        assert alpha == pytest.approx(0.75 * min(1, abs(float(found[1])) / 2), abs=0.02)
        if alpha:
            assert ("37, 99, 235" in colour) == (float(found[1]) > 0)
    # To the left end: strength 0 is the base, and nothing is moved.
    slide_to_the_left_end(page, "strength-1")
    expect("policy", 0.0)
    titles = [spans.nth(i).get_attribute("title") for i in range(spans.count())]
    assert titles
    assert all("+0.00 nats" in title or "-0.00 nats" in title for title in titles)
    assert elsewhere == []
    page.close()


def test_each_of_two_sliders_moves_its_own_adapter(browser: Any, adapter: str, second: str) -> None:
    both = Policy.from_pretrained({"tiny": adapter, "deep": second})
    settings = [(1.0, 0.5), (1.0, 0.0), (0.0, 0.0)]
    texts = [both.answer([MESSAGES], strength=s, max_new_tokens=20)[0] for s in settings]
    assert len({*texts}) == 3
    with served(both, settings[0]) as address:
        page = browser.new_page()
        page.goto(address)
        page.locator("#message textarea").fill(MESSAGES[0]["content"])
        page.locator("#ask").click()
        wait_for(page, "policy", texts[0])
        slide_to_the_left_end(page, "strength-2")
        wait_for(page, "policy", texts[1])
        slide_to_the_left_end(page, "strength-1")
        wait_for(page, "policy", texts[2])
        wait_for(page, "base", texts[2])
        page.close()
