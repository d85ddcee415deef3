"""`qadapter play`: a page on which base and policy answer the same message, side by side.

Gradio takes seconds to import; importing this module does not.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from queue import Queue
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from jinja2 import TemplateError

from qadapter.data import tokenize_prompt
from qadapter.errors import UserError
from qadapter.explain import coloured
from qadapter.policy import Policy
from qadapter.serve.answer import Piece, Token
from qadapter.serve.engine import Engine, EngineBusy, Request
from qadapter.serve.run import server
from qadapter.strength import Strength, each

if TYPE_CHECKING:
    from gradio import Blocks

FULL_COLOUR = 2.0
"""Nats that a token's log-prob moves, from which on its colour is full."""

_ABOUT = """\
The base and the policy answer the same message, each by its likeliest tokens. **Blue** tokens
became likelier through the adapter, **orange** ones less likely; rest the pointer on one to see
its probability under both.
"""
_CSS = """
.answer { white-space: pre-wrap; min-height: 8rem; line-height: 1.6; overflow-wrap: anywhere; }
.answer .prose { white-space: pre-wrap; }
footer { display: none !important; }
"""


class AnswerFailed(Exception):
    """The engine failed while it answered."""


def check_installed() -> None:
    """Raise ImportError if Gradio is missing, before anything slow is done."""
    import gradio  # noqa: F401


def moved_html(text: str, tokens: Sequence[Token]) -> str:
    """Return an answer with each token coloured by log π_s − log π1, nats.

    Tokens that are parts of one character are one span: their log-probs add up.
    """
    spans = []
    held: list[Token] = []
    starts = [*(token.offset for token in tokens), len(text)]
    for token, end in zip(tokens, starts[1:], strict=True):
        held.append(token)
        start = held[0].offset
        if end == start and token is not tokens[-1]:
            continue
        ours, base = (
            math.fsum(getattr(t, name) or 0.0 for t in held) for name in ("logprob", "base_logprob")
        )
        title = f"base {math.exp(base):.1%} → policy {math.exp(ours):.1%} ({ours - base:+.2f} nats)"
        spans.append(coloured(text[start:end], ours - base, FULL_COLOUR, title))
        held = []
    return f'<div class="answer">{"".join(spans)}</div>'


def answers(
    engine: Engine, message: str, strength: Strength, max_tokens: int
) -> Iterator[tuple[str, str]]:
    """Yield the pages of base and policy as they grow.

    Raises:
        EngineBusy: too many ask at once.
        AnswerFailed: the engine's log tells why.
        UserError: the tokenizer has no chat template.
    """
    policy = engine.policy
    prompt = tokenize_prompt([{"role": "user", "content": message}], policy.tokenizer)
    pieces: Queue[tuple[int, Piece]] = Queue()
    room = min(max_tokens, engine.context - len(prompt))
    if room < 1:
        too_long = '<div class="answer">The message does not fit the model\'s context.</div>'
        yield too_long, too_long
        return

    def request(index: int, strength: Strength) -> Request:
        def emit(piece: Piece) -> None:
            pieces.put((index, piece))

        return Request(prompt, emit, max_tokens=room, strength=strength, compare=index == 1)

    tickets = engine.submit([request(0, 0.0), request(1, strength)])
    texts, complete = ["", ""], 0
    tokens: list[Token] = []
    try:
        while complete < len(tickets):
            index, piece = pieces.get()
            if piece.finish == "error":
                raise AnswerFailed
            texts[index] += piece.text
            tokens += piece.tokens if index == 1 else ()
            complete += piece.finish is not None
            if pieces.empty() or complete == len(tickets):
                base = f'<div class="answer">{escape(texts[0])}</div>'
                yield base, moved_html(texts[1], tokens)
    finally:
        for ticket in tickets:
            ticket.cancel()


def page(engine: Engine, *, strength: Strength, max_tokens: int) -> Blocks:
    """Return the page, with a slider for each adapter.

    Args:
        strength: where the sliders start.
    """
    import gradio

    names = engine.policy.names
    # Told on the page, and not in the terminal with a traceback.
    slip = partial(gradio.Error, print_exception=False)

    def answer(message: str, *strengths: float) -> Iterator[tuple[str, str]]:
        if not message.strip():
            raise slip("Write a message first.")
        try:
            yield from answers(engine, message, strengths, max_tokens)
        except EngineBusy:
            raise slip("Too many are asking at once; try again.") from None
        except AnswerFailed:
            raise slip("The answer failed; the server's log tells why.") from None
        except (UserError, TemplateError) as error:  # a template has its own idea of turns
            raise slip(str(error)) from None

    with gradio.Blocks(title=f"qadapter: {' + '.join(names)}", analytics_enabled=False) as blocks:
        gradio.Markdown(_ABOUT)
        message = gradio.Textbox(label="Message", lines=2, elem_id="message")
        sliders = [
            gradio.Slider(
                0,
                max(2.0, start),
                start,
                step=0.05,
                label=f"Strength: {name}",
                elem_id=f"strength-{i}",
            )
            for i, (name, start) in enumerate(
                zip(names, each(strength, names), strict=True), start=1
            )
        ]
        button = gradio.Button("Answer", variant="primary", elem_id="ask")
        with gradio.Row():
            shown = []
            for title, place in (("Base", "base"), ("Policy", "policy")):
                with gradio.Column():
                    gradio.Markdown(f"### {title}")
                    shown.append(gradio.HTML('<div class="answer"></div>', elem_id=place))
        asked: dict[str, Any] = {"inputs": [message, *sliders], "outputs": shown}
        asked |= {"trigger_mode": "always_last", "show_progress": "hidden", "api_name": "answer"}
        for event in (button.click, message.submit, *(slider.release for slider in sliders)):
            event(answer, **asked)
    return blocks


def create_app(blocks: Blocks) -> FastAPI:
    """Return an application with the page at its root; nothing of it is fetched from elsewhere."""
    import gradio

    system = ["system-ui", "sans-serif"]
    theme = gradio.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])
    app: FastAPI = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None),
        blocks,
        path="",
        theme=theme,
        css=_CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
    return app


def run(policy: Policy, bound: socket.socket, *, strength: Strength, max_tokens: int) -> None:
    """Show the page on a bound socket until a signal."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    engine = Engine(policy)
    app = create_app(page(engine, strength=strength, max_tokens=max_tokens))
    # A page that is open keeps a connection for ever.
    server(app, engine, patience=1).run([bound])
