"""`qadapter check` and `qadapter anchors`: what training reads, before it does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qadapter.cli.arguments import Commands, add_device, add_trust, count, seed
from qadapter.cli.terminal import printable
from qadapter.errors import ConfigError, DataError


def add_check(commands: Commands) -> None:
    """Add the parser of `qadapter check`."""
    check = commands.add_parser("check", help="audit preference data")
    check.add_argument("data", help="file, directory or Hub name")
    check.add_argument("--model", help="count tokens as this model does")
    check.add_argument("--eval-data", help="held-out pairs, to look for shared prompts")
    check.add_argument("--max-length", type=count, default=1024, help="tokens a pair may have")
    check.add_argument("--show", type=count, metavar="N", help="print N pairs")
    add_trust(check)
    check.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> None:
    from qadapter import hub
    from qadapter.data import audit, format_audit

    tokenizer, end_ids = None, frozenset[int]()
    if args.model:
        trust = args.trust_remote_code
        tokenizer = hub.load_tokenizer(args.model, trust_remote_code=trust)
        settings = hub.load_generation_config(args.model, trust_remote_code=trust)
        end_ids = hub.end_of_turn_ids(tokenizer, settings)
    found = audit(
        args.data, tokenizer, end_ids=end_ids, max_length=args.max_length, eval_path=args.eval_data
    )
    print(printable(format_audit(found)))
    if args.show:
        if tokenizer is None:
            raise ConfigError(
                "--show needs --model, whose tokenizer tells which tokens are trained."
            )
        _show(args, tokenizer, end_ids)
    if found.bad:
        raise DataError(
            f"{args.data}: {found.bad_rows} of {found.rows} rows cannot be trained on, the first "
            f"is {found.bad[0].source}; mend them as said above."
        )


def _show(args: argparse.Namespace, tokenizer: Any, end_ids: frozenset[int]) -> None:
    from itertools import islice

    from rich.console import Console
    from rich.text import Text

    from qadapter.data import read_pairs, tokenize_pair

    console = Console()
    for pair in islice(read_pairs(args.data), args.show):
        tokens = tokenize_pair(pair, tokenizer, end_ids=end_ids, max_length=args.max_length)
        if isinstance(tokens, str):
            console.print(f"{pair.source}: dropped, {tokens}", style="yellow")
            continue
        console.rule(f"{pair.source} (trained tokens in colour)")
        prompt, chosen, rejected = (
            printable(tokenizer.decode(ids))
            for ids in (tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids)
        )
        console.print(Text(prompt, style="dim"))
        console.print(Text("chosen   " + chosen, style="green"))
        console.print(Text("rejected " + rejected, style="red"))


def add_anchors(commands: Commands) -> None:
    """Add the parser of `qadapter anchors`."""
    anchors = commands.add_parser(
        "anchors", help="let the base write general text, for --anchor_data"
    )
    anchors.add_argument("output", help="JSON Lines file to write, a text a line")
    anchors.add_argument("--model", help="the base; default the one that training takes")
    anchors.add_argument("--count", type=count, help="how many texts; default 192")
    anchors.add_argument("--seed", type=seed, default=0, help="of the sampling")
    anchors.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    add_trust(anchors)
    add_device(anchors)
    anchors.set_defaults(run=_anchors)


def _anchors(args: argparse.Namespace) -> None:
    import torch
    from rich.progress import track

    from qadapter import hub
    from qadapter.anchors import COUNT, free_texts
    from qadapter.files import check_writable, write_jsonl

    if Path(args.output).suffix != ".jsonl":
        raise ConfigError(f"{args.output}: must end in .jsonl, as which it is read; name it so.")
    if Path(args.output).exists():
        raise ConfigError(f"{args.output}: is there already; name another file, or remove it.")
    check_writable(Path(args.output).parent)
    name, trust = args.model or hub.DEFAULT_BASE, args.trust_remote_code
    base = hub.load_base(
        name,
        dtype=getattr(torch, args.dtype),
        device=hub.pick_device(args.device),
        trust_remote_code=trust,
    )
    tokenizer = hub.load_tokenizer(name, trust_remote_code=trust)
    wanted = args.count or COUNT
    texts = free_texts(base, tokenizer, wanted, seed=args.seed)
    rows = ({"text": text} for text in track(texts, "writing", total=wanted))
    write_jsonl(args.output, rows)
    print(f"{wanted} texts of {printable(name)} in {printable(args.output)}")
