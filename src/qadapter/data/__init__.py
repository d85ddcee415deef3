"""Preference data: file → `Pair` → tokens, every problem named by file and line."""

from qadapter.data.audit import Audit, audit, format_audit, prompt_key
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
from qadapter.data.tokens import (
    Dropped,
    TokenizedPair,
    tokenize_pair,
    tokenize_pairs,
    tokenize_prompt,
)

__all__ = [
    "Audit",
    "BadRow",
    "Dropped",
    "Message",
    "Pair",
    "Text",
    "TokenizedPair",
    "audit",
    "audit_rows",
    "format_audit",
    "prompt_key",
    "read_pairs",
    "read_prompts",
    "read_texts",
    "tokenize_pair",
    "tokenize_pairs",
    "tokenize_prompt",
]
