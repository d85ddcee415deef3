"""Preference data: file → `Pair` → tokens, every problem named by file and line."""

from qadapter.data.audit import Audit, audit, format_audit, prompt_digest, prompt_key, text_key
from qadapter.data.pairs import (
    BadRow,
    Message,
    Pair,
    Text,
    audit_rows,
    read_pairs,
    read_prompts,
    read_texts,
)
from qadapter.data.table import TokenTable, file_identity, pair_lengths, pairs_digest, token_table
from qadapter.data.tokens import (
    WINDOW,
    Dropped,
    Sources,
    TokenizedPair,
    render_prompt,
    spread,
    text_windows,
    tokenize_pair,
    tokenize_pairs,
    tokenize_prompt,
)

__all__ = [
    "WINDOW",
    "Audit",
    "BadRow",
    "Dropped",
    "Message",
    "Pair",
    "Sources",
    "Text",
    "TokenTable",
    "TokenizedPair",
    "audit",
    "audit_rows",
    "file_identity",
    "format_audit",
    "pair_lengths",
    "pairs_digest",
    "prompt_digest",
    "prompt_key",
    "read_pairs",
    "read_prompts",
    "read_texts",
    "render_prompt",
    "spread",
    "text_key",
    "text_windows",
    "token_table",
    "tokenize_pair",
    "tokenize_pairs",
    "tokenize_prompt",
]
