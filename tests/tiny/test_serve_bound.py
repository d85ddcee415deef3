"""What is refused by its characters alone never has few enough tokens."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qadapter.serve.bound import TextBound


def sentences() -> Any:
    """Return a tokenizer like Llama 2's: spaces are letters, bytes stand for unknown ones."""
    words = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)], "▁", "▁▁", "a"]
    vocab = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "▁")], byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


def composed() -> Any:
    made = tiny_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.NFC()
    return made


def stripping() -> Any:
    made = tiny_tokenizer()
    made.add_tokens(AddedToken("<end>", lstrip=True, rstrip=True))
    return made


def words() -> Any:
    """Return a tokenizer to which any unknown word is one token."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def dropping() -> Any:
    made = tiny_tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return made


MADE = {f.__name__: f() for f in (tiny_tokenizer, sentences, composed, stripping, words, dropping)}


@pytest.mark.parametrize("name", MADE)
@given(
    parts=st.lists(
        st.sampled_from(["a", " ", "<end>", "<|im_start|>", "e\u0302\u0301", "🙂", "zz", "\n"]),
        max_size=9,
    ),
    times=st.integers(1, 60),
)
def test_what_fits_is_not_refused(name: str, parts: list[str], times: int) -> None:
    tokenizer, text = MADE[name], "".join(part * times for part in parts)
    bound = TextBound(tokenizer)
    assert not bound.exceeds(text, len(tokenizer(text)["input_ids"]))


@pytest.mark.parametrize(
    ("name", "letters", "spaces"),
    [
        ("tiny_tokenizer", True, True),
        ("sentences", True, True),
        ("composed", True, True),
        ("stripping", True, False),
        ("words", False, False),
        ("dropping", False, False),
    ],
)
def test_what_is_much_too_long_is_refused_where_nothing_is_dropped(
    name: str, letters: bool, spaces: bool
) -> None:
    bound = TextBound(MADE[name])
    assert bound.exceeds("z" * 1000, 20) is letters
    assert bound.exceeds(" " * 1000, 20) is spaces
