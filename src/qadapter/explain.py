"""Which tokens does the preference reward? One page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import cast

from qadapter.data import Pair, tokenize_pairs
from qadapter.policy import Policy
from qadapter.strength import Strength, told

Piece = tuple[str, float, int]
"""Text, its reward in nats, and how many tokens it is."""

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid #8888; padding: 1rem 0; }
.prompt { opacity: .65; white-space: pre-wrap; }
.response { white-space: pre-wrap; margin: .5rem 0; }
.response b { display: block; font-size: .85rem; }
"""


def coloured(text: str, number: float, scale: float, title: str) -> str:
    """Return text on blue where the number is positive and on orange where it is negative.

    Args:
        scale: from which size of the number on the colour is full.
        title: shown when the pointer rests on it.
    """
    # Blue and orange are told apart by every common kind of colour vision.
    share = max(-1.0, min(1.0, number / scale))
    hue = "37, 99, 235" if share > 0 else "234, 120, 12"
    return (
        f'<span title="{escape(title)}" '
        f'style="background: rgba({hue}, {0.75 * abs(share):.2f})">{escape(text)}</span>'
    )


def _pieces(policy: Policy, ids: list[int], rewards: list[float]) -> list[Piece]:
    """Group tokens until they decode to whole characters, and add up their rewards."""
    pieces: list[Piece] = []
    held: list[int] = []
    total = 0.0
    for i, (token, reward) in enumerate(zip(ids, rewards, strict=True)):
        held.append(token)
        total += reward
        text = cast(str, policy.tokenizer.decode(held))
        if "\ufffd" not in text or i == len(ids) - 1:
            pieces.append((text, total, len(held)))
            held, total = [], 0.0
    return pieces


def _response_html(name: str, pieces: Sequence[Piece], scale: float) -> str:
    total = sum(reward for _, reward, _ in pieces)
    spans = "".join(
        coloured(text, reward, scale, f"{reward:+.4f} nats, {n} token{'s' if n > 1 else ''}")
        for text, reward, n in pieces
    )
    return f'<div class="response"><b>{name}: R = {total:+.3f} nats</b>{spans}</div>'


def explain_html(policy: Policy, pairs: Sequence[Pair], *, strength: Strength = 1.0) -> str:
    """Return a page in which every response token is coloured by its reward r2 (METHOD M4).

    Blue tokens are rewarded, orange ones penalised; the scale is shared by the whole page.

    Raises:
        DataError: no pair fits 1,024 tokens, or the model's context.
    """
    limit = min(1024, policy.context)
    tokenized, _ = tokenize_pairs(pairs, policy.tokenizer, end_ids=policy.end_ids, max_length=limit)
    rows: list[tuple[str, str, list[Piece], list[Piece]]] = []
    for pair in tokenized:
        out = policy.judge([pair], strength=strength)
        chosen, rejected = (
            _pieces(policy, ids, out.rewards[out.response == row].tolist())
            for row, ids in enumerate((pair.chosen_ids, pair.rejected_ids))
        )
        rows.append(
            (pair.source, cast(str, policy.tokenizer.decode(pair.prompt_ids)), chosen, rejected)
        )
    sizes = sorted(abs(r) for _, _, *both in rows for pieces in both for _, r, _ in pieces)
    # The 95th percentile, so one outlier does not pale the rest.
    scale = max(sizes[int(0.95 * (len(sizes) - 1))], 1e-9)
    sections = "".join(
        f'<section><h2>{escape(source)}</h2><div class="prompt">{escape(prompt)}</div>'
        f"{_response_html('chosen', chosen, scale)}{_response_html('rejected', rejected, scale)}"
        "</section>"
        for source, prompt, chosen, rejected in rows
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>Token rewards</title><style>{_STYLE}</style></head><body>"
        "<h1>Which tokens does the preference reward?</h1>"
        f"<p>Blue is rewarded, orange penalised; full colour from ±{scale:.3f} nats. Strength "
        f"{told(strength)}. Rewards of single tokens are known up to potential shaping: what a "
        "prefix gains, its continuation may lose; the difference of the two sums R is what was "
        f"learned.</p>{sections}</body></html>\n"
    )
