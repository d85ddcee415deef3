"""From files to tokens: every shape TRL reads, every bad row named, every boundary exact."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from fakes import CHATML, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from qadapter.data import (
    Pair,
    TokenizedPair,
    audit,
    format_audit,
    pairs_digest,
    read_pairs,
    read_prompts,
    read_texts,
    text_windows,
    token_table,
    tokenize_pair,
    tokenize_pairs,
)
from qadapter.data.audit import _Seen
from qadapter.errors import DataError, ModelError, UserError
from qadapter.files import cache_dir
from qadapter.packing import fill_rows

END = frozenset({1})
TOKENIZER = tiny_tokenizer()
STRICT = tiny_tokenizer(
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Its template refuses turns out of order, and breaks on a turn without text."""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


EXPLICIT_CHAT = {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
IMPLICIT_CHAT = {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]}
EXPLICIT_TEXT = {"prompt": "Sky is", "chosen": " blue", "rejected": " green"}
IMPLICIT_TEXT = {"chosen": "Sky is blue", "rejected": "Sky is green"}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def tokens(pair: Pair, **options: Any) -> Any:
    return tokenize_pair(pair, TOKENIZER, **{"end_ids": END, "max_length": 512, **options})


@pytest.mark.parametrize("row", [EXPLICIT_CHAT, IMPLICIT_CHAT])
def test_chat_shapes_give_the_same_pair(tmp_path: Path, row: Any) -> None:
    (pair,) = read_pairs(write(tmp_path / "p.jsonl", [row]))
    assert pair.prompt == [user("Hi")]
    assert (pair.chosen, pair.rejected) == ([assistant("a")], [assistant("b")])
    assert pair.source.endswith("p.jsonl:1")


@pytest.mark.parametrize("row", [EXPLICIT_TEXT, IMPLICIT_TEXT])
def test_text_shapes_give_the_same_pair(tmp_path: Path, row: Any) -> None:
    (pair,) = read_pairs(write(tmp_path / "p.jsonl", [row]))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Sky is", " blue", " green")


def test_a_text_prompt_beside_conversations_is_redundant_as_in_trl(tmp_path: Path) -> None:
    (pair,) = read_pairs(write(tmp_path / "p.jsonl", [{"prompt": "Hi", **IMPLICIT_CHAT}]))
    assert pair.prompt == [user("Hi")]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "directory", "splits"])
def test_other_formats(tmp_path: Path, kind: str) -> None:
    import datasets

    rows = [EXPLICIT_TEXT, {"prompt": "Say\n", "chosen": 'a "b"\nc', "rejected": "d"}]
    data, place = datasets.Dataset.from_list(rows), tmp_path / f"p.{kind}"
    if kind == "json":
        place.write_text(json.dumps(rows))
    elif kind == "csv":
        data.to_csv(place)
    elif kind == "parquet":
        data.to_parquet(place)
    elif kind == "directory":
        data.save_to_disk(place)
    else:
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(place)
    pairs = list(read_pairs(str(place)))
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        (r["prompt"], r["chosen"], r["rejected"]) for r in rows
    ]


@pytest.mark.parametrize("kind", ["lines.json", "json", "parquet", "directory"])
def test_other_formats_hold_conversations(tmp_path: Path, kind: str) -> None:
    import datasets

    rows, place = [EXPLICIT_CHAT, EXPLICIT_CHAT], tmp_path / f"p.{kind}"
    if kind == "lines.json":
        write(place, rows)
    elif kind == "json":
        place.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(place)
    else:
        datasets.DatasetDict({"only": datasets.Dataset.from_list(rows)}).save_to_disk(place)
    pairs = list(read_pairs(str(place)))
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        ([user("Hi")], [assistant("a")], [assistant("b")])
    ] * 2
    assert pairs[1].source == f"{place}:" + ("2" if kind == "lines.json" else "row 2")


def test_splits_without_train_are_named(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([EXPLICIT_TEXT])
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="holds splits a, b; name one"):
        list(read_pairs(str(tmp_path / "d")))
    assert len(list(read_pairs(str(tmp_path / "d" / "b")))) == 1


def test_a_hub_name_takes_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, *, split: str) -> list[Any]:
        asked.append((name, split))
        return [EXPLICIT_TEXT]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [p.source for p in read_pairs("me/set")] == ["me/set:row 1"]
    assert len(list(read_pairs("me/set:test"))) == 1
    assert asked == [("me/set", "train"), ("me/set", "test")]


def test_csv_blank_lines_count_and_extra_commas_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,chosen,rejected\nx,a,b\n\n\ny,same,same\n")
    with pytest.raises(DataError, match=r"p\.csv:5: 'rejected' equals"):
        list(read_pairs(str(path)))
    path.write_text("prompt,chosen,rejected\nx,well, yes,no\n")
    with pytest.raises(DataError, match=r"p\.csv:2: more fields than the header"):
        list(read_pairs(str(path)))
    path.write_text(f'prompt,chosen,rejected\nx,a,b\nx,"{"a" * 140_000}",b\n')
    with pytest.raises(DataError, match=r"p\.csv:3: not readable CSV"):
        list(read_pairs(str(path)))


def test_broken_json_is_named_by_the_files_own_line(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('[\n\n\n{"prompt": 1,\n oops}]')
    with pytest.raises(DataError, match=r"p\.json:5: not valid JSON"):
        list(read_pairs(str(path)))


def test_csv_lines_are_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,chosen,rejected\n"two\nlines",a,b\nx,same,same\n')
    with pytest.raises(DataError, match=r"p\.csv:4: 'rejected' equals 'chosen'"):
        list(read_pairs(str(path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": "a"}, r"'rejected' is missing \(the row has chosen, prompt\)"),
        ({**EXPLICIT_TEXT, "rejected": " blue"}, "'rejected' equals 'chosen'; drop the line"),
        ({**EXPLICIT_TEXT, "rejected": 3}, "'rejected' is int, not text"),
        ({**EXPLICIT_CHAT, "rejected": "b"}, "'rejected' is str, not a list of messages"),
        ({**EXPLICIT_TEXT, "prompt": ""}, "no prompt"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"chosen": "", "rejected": "b"}, "no prompt"),
        ({**EXPLICIT_CHAT, "chosen": [user("x")]}, "must be one assistant message"),
        ({**EXPLICIT_CHAT, "chosen": [assistant("x"), user("y")]}, "must be one assistant message"),
        ({**EXPLICIT_CHAT, "chosen": [{"role": "assistant"}]}, "without text in 'content'"),
        ({**EXPLICIT_CHAT, "prompt": [{"role": "bard", "content": "x"}]}, "role 'bard'"),
        ({**EXPLICIT_TEXT, "prompt": [user("x")]}, "'prompt' is a list and 'chosen' is text"),
        ({**IMPLICIT_CHAT, "prompt": 5}, "'prompt' is int, not a list of messages"),
        ({**EXPLICIT_TEXT, "prompt": "x\ud800"}, r"'prompt' has half a character \(U\+D800 at 2\)"),
        ({**EXPLICIT_CHAT, "chosen": [assistant("\udc00")]}, "'chosen' has half a character"),
        ([1, 2], "a list, not an object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "p.jsonl", [EXPLICIT_TEXT, row])
    with pytest.raises(DataError, match=r"p\.jsonl:2: .*" + message):
        list(read_pairs(path))


def test_one_broken_line_in_ten_thousand(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [json.dumps(EXPLICIT_TEXT)] * 10_000
    lines[7_654] = lines[7_654][:-5]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"p\.jsonl:7655: not valid JSON"):
        list(read_pairs(str(path)))


def test_a_byte_order_mark_is_no_error_and_latin_1_is(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(EXPLICIT_TEXT).encode())
    assert len(list(read_pairs(str(path)))) == 1
    path.write_bytes(json.dumps(EXPLICIT_TEXT).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2: not UTF-8"):
        list(read_pairs(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "holds no rows"),
        ("p.txt", "x", "unknown format"),
        ("missing.jsonl", None, "cannot be read"),
        ("missing.csv", None, "cannot be read"),
        ("missing.parquet", None, "no such file; check the path"),
        ("p.parquet", "not parquet", "not a readable Parquet file"),
        ("p.json", "[{]", "not valid JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_pairs(str(path)))


def test_the_response_holds_its_first_token_and_its_end_and_no_newline() -> None:
    pair = tokens(Pair([user("Hi")], [assistant("abc")], [assistant("d")], "m:1"))
    assert TOKENIZER.decode(pair.chosen_ids) == "abc<|im_end|>"
    assert TOKENIZER.decode(pair.rejected_ids) == "d<|im_end|>"
    assert TOKENIZER.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")
    assert (pair.chosen_terminal, pair.rejected_terminal) == (True, True)


def test_an_end_token_inside_the_response_does_not_end_it() -> None:
    pair = tokens(Pair([user("Hi")], [assistant("a<|im_end|>b")], [assistant("c")], "m:1"))
    assert TOKENIZER.decode(pair.chosen_ids) == "a<|im_end|>b<|im_end|>"


def test_a_template_without_an_end_token_gets_one() -> None:
    template = CHATML.replace("<|im_end|>\n", "\n")
    pair = tokenize_pair(
        Pair([user("Hi")], [assistant("a")], [assistant("b")], "m:1"),
        tiny_tokenizer(template),
        end_ids=END,
        max_length=99,
    )
    assert isinstance(pair, TokenizedPair)
    assert pair.chosen_ids[-1] == 1


def test_an_eos_token_that_ends_no_turn_is_refused() -> None:
    with pytest.raises(ModelError, match="does not end a turn"):
        tokenize_pair(Pair("x", "a", "b", "m:1"), TOKENIZER, end_ids=frozenset({0}), max_length=9)


def test_never_two_bos() -> None:
    tokenizer = tiny_tokenizer("<bos>" + CHATML, bos=True)
    for pair in (
        Pair([user("Hi")], [assistant("a")], [assistant("b")], "m:1"),
        Pair("<bos>Hi", "a", "b", "m:2"),
        Pair("Hi", "a", "b", "m:3"),
    ):
        found = tokenize_pair(pair, tokenizer, end_ids=END, max_length=99)
        assert isinstance(found, TokenizedPair)
        assert found.prompt_ids[0] == 2
        assert [*found.prompt_ids, *found.chosen_ids].count(2) == 1


def test_a_template_whose_prompt_is_no_prefix_is_refused() -> None:
    template = "{% if add_generation_prompt %}Now: {% endif %}" + CHATML
    with pytest.raises(ModelError, match=r"m:1: .*not a prefix"):
        tokenize_pair(
            Pair([user("Hi")], [assistant("a")], [assistant("b")], "m:1"),
            tiny_tokenizer(template),
            end_ids=END,
            max_length=99,
        )
    with pytest.raises(ModelError, match="no chat template"):
        tokenize_pair(
            Pair([user("Hi")], [assistant("a")], [assistant("b")], "m:1"),
            tiny_tokenizer(None),
            end_ids=END,
            max_length=99,
        )


def test_turns_that_the_template_refuses_are_named() -> None:
    """jinja2's own errors once ended `check` and `train` in a traceback."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    for prompt, why in (([user("a"), user("b")], "roles must alternate"), ([user("a"), call], "")):
        with pytest.raises(DataError, match=rf"m:1: 'prompt': .*refuses .*{why}.*; give turns"):
            tokenize_pair(
                Pair(prompt, [assistant("a")], [assistant("b")], "m:1"),
                STRICT,
                end_ids=END,
                max_length=99,
            )


@pytest.mark.parametrize(
    ("response", "limit", "truncate", "told"),
    [
        ("b" * 30, 30, False, r"1 too long\), of which this is the first; raise max_length or set"),
        ("b", 1, True, r"1 prompt too long\), of which this is the first; raise max_length\."),
        ("a ", 99, False, r"1 identical .*; give responses that differ\."),
        ("a ", 99, True, r"1 identical .*; give responses that differ or raise max_length\."),
    ],
)
def test_where_no_pair_is_left_what_helps_is_told(
    response: str, limit: int, truncate: bool, told: str
) -> None:
    strips = tiny_tokenizer(CHATML.replace("m['content']", "m['content']|trim"))
    pair = Pair([user("Hi")], [assistant("a")], [assistant(response)], "m:1")
    with pytest.raises(DataError, match=r"m:1: no pair is left \(" + told):
        tokenize_pairs([pair], strips, end_ids=END, max_length=limit, truncate=truncate)


def test_long_pairs_are_dropped_or_cut_and_never_terminal_when_cut() -> None:
    pair = Pair("1234", "abcdefgh", "abcxyz", "m:1")
    assert tokens(pair, max_length=12) == "too long"
    assert tokens(pair, max_length=4, truncate=True) == "prompt too long"
    assert tokens(pair, max_length=7, truncate=True) == "identical after truncation"
    cut = tokens(pair, max_length=11, truncate=True)
    assert (len(cut.chosen_ids), len(cut.rejected_ids)) == (7, 7)
    assert (cut.chosen_terminal, cut.rejected_terminal) == (False, True)
    exact = tokens(pair, max_length=13)
    assert (exact.chosen_terminal, len(exact.chosen_ids)) == (True, 9)


def test_dropped_pairs_are_reported_and_none_left_is_an_error() -> None:
    pairs = [Pair("12", "a" * n, "b", f"m:{n}") for n in (1, 9, 2, 30)]
    kept, dropped = tokenize_pairs(pairs, TOKENIZER, end_ids=END, max_length=6)
    assert [k.source for k in kept] == ["m:1", "m:2"]
    assert {k: list(v) for k, v in dropped.items()} == {"too long": ["m:9", "m:30"]}
    with pytest.raises(DataError, match=r"no pair is left \(4 prompt too long\)"):
        tokenize_pairs(pairs, TOKENIZER, end_ids=END, max_length=2)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(deadline=None, max_examples=150)
@given(TEXTS, TEXTS, TEXTS)
def test_any_text_goes_through_and_comes_back(prompt: str, chosen: str, rejected: str) -> None:
    pair = Pair([user(prompt)], [assistant(chosen)], [assistant(rejected)], "m:1")
    found = tokens(pair)
    if chosen == rejected:
        assert found == "identical after truncation"
        return
    assert TOKENIZER.decode(found.chosen_ids) == chosen + "<|im_end|>"
    assert TOKENIZER.decode(found.rejected_ids) == rejected + "<|im_end|>"


WORDS = st.sampled_from(["a", "b", "c"])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), max_size=12))
def test_repeated_and_turned_pairs_are_counted(drawn: list[tuple[str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        names = ("prompt", "chosen", "rejected")
        rows = [dict(zip(names, row, strict=True)) for row in drawn if row[1] != row[2]]
        kept = [tuple(row.values()) for row in rows]
        if not kept:
            return
        found = audit(write(Path(directory) / "p.jsonl", rows))
    earlier = [kept[:i] for i in range(len(kept))]
    assert found.duplicates == sum(p in e for p, e in zip(kept, earlier, strict=True))
    assert found.contradictions == sum(
        (p, r, c) in e for (p, c, r), e in zip(kept, earlier, strict=True)
    )


def test_no_room_for_the_digests_is_one_sentence() -> None:
    seen = _Seen()
    seen._run("PRAGMA max_page_count = 2")

    def fill() -> None:
        for pair in range(10_000):
            seen.add(pair, -pair)

    with pytest.raises(UserError, match=r"digests cannot be written .*full.*SQLITE_TMPDIR"):
        fill()


def test_the_audit_counts_what_it_says(tmp_path: Path) -> None:
    swapped = {**EXPLICIT_TEXT, "chosen": " green", "rejected": " blue"}
    empty = {"prompt": "Say", "chosen": "", "rejected": "words here and more"}
    rows = [EXPLICIT_TEXT, EXPLICIT_TEXT, swapped, empty, {"chosen": "x"}]
    path = write(tmp_path / "p.jsonl", rows)
    held_out = write(tmp_path / "e.jsonl", [{**EXPLICIT_TEXT, "chosen": " grey"}])
    found = audit(path, TOKENIZER, end_ids=END, max_length=13, eval_path=held_out)
    assert (found.rows, len(found.bad), found.duplicates, found.contradictions) == (5, 1, 1, 2 - 1)
    assert (found.empty_responses, found.shared_with_eval) == (1, 3)
    # tokens: blue 6, green 7, so the longer one wins once in four pairs
    assert found.length_bias == 0.25
    assert {k: list(v) for k, v in found.dropped.items()} == {"too long": [f"{path}:4"]}
    text = format_audit(found)
    assert "'rejected' is missing" in text
    assert "longer one is chosen    25.0%" in text


def test_the_audit_counts_tokens_of_pairs_the_template_makes_identical(tmp_path: Path) -> None:
    """It once mixed their lengths in words into the tokens, and did not list them as dropped."""
    strips = tiny_tokenizer(CHATML.replace("m['content']", "m['content']|trim"))
    row = {**EXPLICIT_CHAT, "chosen": [assistant("b ")]}
    path = write(tmp_path / "p.jsonl", [row, EXPLICIT_CHAT])
    found = audit(path, strips, end_ids=END)
    assert {k: list(v) for k, v in found.dropped.items()} == {
        "identical after truncation": [f"{path}:1"]
    }
    assert found.lengths["chosen"] == {2: 2}


def test_other_formats_are_no_prompts_and_crlf_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"one\r\ntwo\r\n")
    assert read_texts(str(path)) == ["one", "two"]
    for read in (read_prompts, read_texts):
        with pytest.raises(DataError, match=r"give \.txt or \.jsonl"):
            read(str(tmp_path / "p.json"))


def test_prompts_and_texts(tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("one\n\ntwo\n")
    assert read_prompts(str(lines)) == [[user("one")], [user("two")]]
    assert read_texts(str(lines)) == ["one", "two"]
    rows = write(tmp_path / "p.jsonl", [{"prompt": "one", "text": "t"}, {"prompt": [user("two")]}])
    assert read_prompts(rows) == [[user("one")], [user("two")]]
    with pytest.raises(DataError, match=r"p\.jsonl:2: 'text' is missing"):
        read_texts(rows)


EXAMPLES = int(os.environ.get("QADAPTER_FUZZ", "40"))
LINES = st.text(st.characters(), max_size=30)
VALUES = st.one_of(st.none(), st.integers(), st.floats(), st.booleans(), LINES)
MESSAGES = st.lists(
    st.one_of(
        VALUES,
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool", "bard", None, 3, []])},
            optional={"content": VALUES, "tool_calls": VALUES, "name": VALUES},
        ),
    ),
    max_size=4,
)
TURNS = st.one_of(
    st.builds(
        lambda r, c: {"role": r, "content": c}, st.sampled_from(["user", "assistant"]), LINES
    ),
    st.just({"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}),
)
FIELD = st.one_of(LINES, MESSAGES, VALUES)
ROWS = st.one_of(
    VALUES,
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "extra"]), FIELD),
    st.fixed_dictionaries({"prompt": LINES, "chosen": LINES, "rejected": LINES}),
    st.builds(
        lambda p, c, r: {"prompt": [user(p)], "chosen": [assistant(c)], "rejected": [assistant(r)]},
        LINES,
        LINES,
        LINES,
    ),
    st.fixed_dictionaries(
        {
            "prompt": st.lists(TURNS, min_size=1, max_size=3),
            "chosen": LINES.map(lambda text: [assistant(text)]),
            "rejected": LINES.map(lambda text: [assistant(text)]),
        }
    ),
)
PLACE = re.compile(r".*/fuzz\.jsonl(?::(\d+))?: ")
MEND = re.compile(r"; (add|drop|fix|give|make|raise|set|use) [^\n;]*\.")


def assert_explained(refused: str, rows: list[Any]) -> None:
    """One sentence: the file, the line and the field where there is one, and how to mend it."""
    assert "\n" not in refused
    assert len(refused.replace(os.path.dirname(refused.split(": ")[0]), "")) < 250
    place, mend = PLACE.match(refused), MEND.search(refused)
    assert place is not None
    assert mend is not None
    assert mend.end() == len(refused)
    if place[1] is None:
        assert "holds no rows" in refused
        assert not rows
    elif isinstance(rows[int(place[1]) - 1], dict) and "no pair is left" not in refused:
        assert re.search("'(prompt|chosen|rejected)'", refused[place.end() :])


@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(
    st.lists(ROWS, max_size=5),
    st.integers(1, 120),
    st.booleans(),
    st.sampled_from([TOKENIZER, STRICT]),
)
def test_any_file_is_trained_on_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    limit: int,
    truncate: bool,
    tokenizer: Any,
) -> None:
    """`make fuzz` draws ten thousand: only our own errors, one line each, that name the place."""
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    write(path, rows)
    options = {"end_ids": END, "max_length": limit}
    refused = None
    try:
        found = audit(str(path), tokenizer, **options)
        format_audit(found)
        table, dropped = token_table(read_pairs(str(path)), tokenizer, truncate=truncate, **options)
    except UserError as error:
        refused = str(error)
    if refused is not None:
        assert_explained(refused, rows)
        return
    listed, also = tokenize_pairs(read_pairs(str(path)), tokenizer, truncate=truncate, **options)
    assert list(table) == listed
    assert table.lengths.tolist() == [p.tokens for p in listed]
    assert {k: list(v) for k, v in dropped.items()} == {k: list(v) for k, v in also.items()}
    assert len(table) + sum(map(len, dropped.values())) == found.rows


def test_workers_read_the_same_pairs_and_a_resumed_run_none_of_those_skipped() -> None:
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader

    pairs = [Pair("12", "a" * (1 + n % 5), "b", f"m:{n}") for n in range(20)]
    table, _ = token_table(pairs, TOKENIZER, end_ids=END, max_length=60)
    read: list[int] = []

    class Watched(Sequence[TokenizedPair]):
        def __len__(self) -> int:
            return len(table)

        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return table[index]

    alone = list(DataLoader(table, batch_size=2, collate_fn=list))
    workers = DataLoader(table, batch_size=2, collate_fn=list, num_workers=2)
    assert list(workers) == alone
    rest = list(skip_first_batches(DataLoader(Watched(), batch_size=2, collate_fn=list), 7))
    assert rest == alone[7:]
    assert read == list(range(14, 20))
    assert fill_rows(table, 30, seed=1)[:] == fill_rows(alone and table[:], 30, seed=1)[:]


def test_what_a_stopped_run_left_is_taken_and_what_is_not_the_same_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path))
    pairs = [Pair(str(i), "a" * (60 if i == 1 else 2), "b", f"m:{i}") for i in range(4)]
    limits: dict[str, Any] = {"end_ids": END, "max_length": 30}

    def never() -> Iterator[Pair]:
        raise AssertionError("read again")
        yield

    def taken(given: Iterable[Pair], identity: list[object], **other: Any) -> Any:
        return token_table(given, TOKENIZER, identity=identity, **{**limits, **other})

    table, dropped = taken(pairs, ["x", 1])
    # Another run at the same time has its own, which goes with it.
    beside, _ = taken(pairs, ["x", 1])
    assert list(beside) == list(table)
    del beside
    whole = list(table)
    table.keep()
    again, told = taken(never(), ["x", 1])
    assert list(again) == whole
    assert {why: list(of) for why, of in told.items()} == {w: list(o) for w, o in dropped.items()}
    assert sum(map(len, told.values())) == 1
    again.keep()
    for identity, other in ((["x", 2], {}), (["x", 1], {"max_length": 31})):
        with pytest.raises(AssertionError, match="read again"):
            taken(never(), identity, **other)
    (rows,) = [f for f in (cache_dir() / "pairs").rglob("pairs.arrow")]
    damaged = bytearray(rows.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    rows.write_bytes(damaged)
    mended, _ = taken(pairs, ["x", 1])
    assert list(mended) == whole
    mended.keep()
    seal = rows.with_name("pairs.json")
    seal.write_text(seal.read_text().replace(pairs_digest(whole), "0" * 64))
    with pytest.raises(AssertionError, match="read again"):
        taken(never(), ["x", 1])
    assert mended.digest == pairs_digest(whole) != pairs_digest(whole[::-1])
    del table, again, mended
    gc.collect()
    assert not list((cache_dir() / "pairs").rglob("pairs.arrow"))


def test_the_file_of_a_table_goes_with_it_and_that_of_a_killed_process_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path))
    root = cache_dir() / "pairs"
    for name in ("nameless.left", "old", "recent"):
        (root / name).mkdir(parents=True)
    os.utime(root / "old", (0, 0))
    table, _ = token_table([Pair("1", "a", "b", "m:1")], TOKENIZER, end_ids=END, max_length=60)
    other, _ = token_table([Pair("1", "a", "c", "m:1")], TOKENIZER, end_ids=END, max_length=60)
    assert not (root / "nameless.left").exists()
    assert not (root / "old").exists()
    (root / "recent" / ".lock").unlink(missing_ok=True)
    (root / "recent").rmdir()  # a stopped run may come back for it
    assert [table[0].source, other[0].source] == ["m:1"] * 2  # the first one's was left alone
    assert len([p for p in root.iterdir() if p.is_dir()]) >= 2
    del table, other
    gc.collect()
    assert not [p for p in root.iterdir() if p.is_dir()]


class _Numbers:
    """A tokenizer of numbers: each word is its token."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


@given(tokens=st.integers(2, 400), window=st.integers(2, 9), most=st.integers(1, 500))
def test_windows_of_a_text_are_spread_over_it(tokens: int, window: int, most: int) -> None:
    """The first windows would all be of its first document."""
    texts, words = [], [*map(str, range(tokens))]
    for i in range(0, tokens, 7):
        texts.append(" ".join(words[i : i + 7]))
    tokenizer = cast(PreTrainedTokenizerBase, _Numbers())
    whole = text_windows(texts, tokenizer, window=window)
    assert [t for row in whole for t in row] == [*range(tokens - (tokens % window == 1))]
    some = text_windows(texts, tokenizer, window=window, max_tokens=most)
    assert len(some) == min(len(whole), math.ceil(most / window))
    places = [whole.index(row) for row in some]
    gaps = [b - a for a, b in pairwise(places)]
    assert places[0] == 0
    assert all(gap > 0 for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert len(whole) - places[-1] <= max(gaps, default=len(whole)) + 1
