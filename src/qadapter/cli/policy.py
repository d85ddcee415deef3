"""What is done with a policy: talk, answers, figures, pages, files for other programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from typing import Any

from qadapter.cli.arguments import (
    Commands,
    add_adapter,
    add_device,
    add_policy,
    count,
    level,
    load_policy,
    loading_words,
    seed,
)
from qadapter.cli.terminal import printable
from qadapter.errors import UserError
from qadapter.strength import told


def add_chat(commands: Commands) -> None:
    """Add the parser of `qadapter chat`."""
    chat = commands.add_parser("chat", help="talk to a policy")
    add_policy(chat)
    chat.add_argument("--max-new-tokens", type=count, default=256)
    chat.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> None:
    from qadapter.chat import Chat

    chat = Chat(load_policy(args), strength=args.strength, max_new_tokens=args.max_new_tokens)
    print("/strength S changes it, /base shows the base's answer, /reset forgets, Ctrl-D leaves.")
    while True:
        try:
            line = input(f"[{told(chat.strength)}] > ").strip()
        except EOFError:
            print()
            return
        if not line:
            continue
        try:
            for piece in chat.send(line):
                print(printable(piece), end="", flush=True)
        except UserError as error:  # a slip at the prompt does not end the talk
            print(error, end="")
        print()


def add_generate(commands: Commands) -> None:
    """Add the parser of `qadapter generate`."""
    generate = commands.add_parser("generate", help="answer a file of prompts")
    add_policy(generate)
    generate.add_argument("--prompts", required=True, help=".txt, a prompt a line, or .jsonl")
    generate.add_argument("--output", required=True, help=".jsonl to write")
    generate.add_argument("--max-new-tokens", type=count, default=256)
    generate.add_argument("--temperature", type=level, default=0.0, help="0 is greedy")
    generate.add_argument("--seed", type=seed, default=42)
    generate.add_argument("--batch-size", type=count, default=8)
    generate.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    from qadapter.data import read_prompts
    from qadapter.files import write_jsonl

    prompts = read_prompts(args.prompts)
    policy = load_policy(args)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        from transformers import set_seed

        set_seed(args.seed)
        options |= {"do_sample": True, "temperature": args.temperature}
    policy.prompt_ids(prompts)  # one too long is told by its place, before any is answered
    rows = []
    for start in range(0, len(prompts), args.batch_size):
        part = prompts[start : start + args.batch_size]
        answers = policy.answer(part, strength=args.strength, **options)
        for prompt, answer in zip(part, answers, strict=True):
            rows.append({"prompt": prompt, "response": answer, "strength": args.strength})
    write_jsonl(args.output, rows)
    print(f"{len(rows)} answers written to {args.output}")


def add_score(commands: Commands) -> None:
    """Add the parser of `qadapter score`."""
    score = commands.add_parser("score", help="held-out accuracy, margin and KL to the base")
    add_policy(score)
    score.add_argument("data", help="held-out preference pairs")
    score.add_argument("--json", action="store_true", help="one JSON object on stdout")
    score.add_argument("--rewards", metavar="F", help="write each pair's rewards here (.jsonl)")
    score.add_argument("--text", metavar="F", help="general text, for KL and perplexity")
    score.add_argument(
        "--text-tokens", type=count, default=50_000, help="about so many, from all of it"
    )
    score.add_argument("--max-length", type=count, default=1024)
    score.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> None:
    from qadapter.alarms import inverted
    from qadapter.data import read_pairs, read_texts
    from qadapter.files import write_jsonl

    pairs = list(read_pairs(args.data))
    texts = read_texts(args.text) if args.text else None
    policy = load_policy(args)
    score = policy.score(pairs, strength=args.strength, max_length=args.max_length)
    if alarm := inverted(score.accuracy, score.pairs):
        print(alarm, file=sys.stderr)
    figures = score.summary()
    if texts is not None:
        drift = policy.drift(texts, strength=args.strength, max_tokens=args.text_tokens)
        figures |= {f"text_{k}": v for k, v in dataclasses.asdict(drift).items()}
    if args.rewards:
        rewards = zip(score.chosen_rewards, score.rejected_rewards, strict=True)
        write_jsonl(args.rewards, [{"chosen": won, "rejected": lost} for won, lost in rewards])
    if args.json:
        print(json.dumps(figures, allow_nan=False))
        return
    for name, value in figures.items():
        print(f"{name:22} {value:.4f}" if isinstance(value, float) else f"{name:22} {value}")


def add_tune(commands: Commands) -> None:
    """Add the parser of `qadapter tune`."""
    tune = commands.add_parser("tune", help="the largest strength inside a forgetting budget")
    add_adapter(tune)
    add_device(tune)
    tune.add_argument(
        "--max-kl", type=level, required=True, help="KL(base || policy), nats a token"
    )
    tune.add_argument("--text", required=True, metavar="F", help="general text to read it on")
    tune.add_argument("--max-strength", type=level, default=1.0, help="look no further")
    tune.add_argument(
        "--text-tokens", type=count, default=10_000, help="about so many, from all of it"
    )
    tune.add_argument("--json", action="store_true", help="one JSON object on stdout")
    tune.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> None:
    from qadapter.budget import tune
    from qadapter.data import read_texts

    texts = read_texts(args.text)
    found = tune(
        load_policy(args),
        texts,
        max_kl=args.max_kl,
        max_strength=args.max_strength,
        max_tokens=args.text_tokens,
    )
    strength = f"{found.strength:.9g}"  # all of its digits: more than it may be outside
    words = ["qadapter", "chat", *loading_words(args), "--strength", strength]
    following = shlex.join(words)
    if args.json:
        print(json.dumps({**dataclasses.asdict(found), "next": following}, allow_nan=False))
        return
    spread = "of one window, so without an interval"
    if found.kl_ci is not None:
        spread = f"95% {found.kl_ci[0]:.4g}–{found.kl_ci[1]:.4g}"
    print(f"strength {strength}, the largest up to {found.max_strength:.9g} that keeps to it")
    print(f"KL       {found.kl:.4g} nats a token ({spread}) of at most {found.max_kl:g}")
    print(f"         {found.kl_at_max:.4g} at strength {found.max_strength:.9g}")
    print(f"read on  {found.tokens:,} tokens of {args.text}\nnext     {following}")


def add_explain(commands: Commands) -> None:
    """Add the parser of `qadapter explain`."""
    explain = commands.add_parser("explain", help="colour tokens by their reward, in a page")
    add_policy(explain)
    explain.add_argument("data", help="preference pairs")
    explain.add_argument("--output", required=True, help=".html to write")
    explain.add_argument("--max-pairs", type=count, default=20)
    explain.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> None:
    from itertools import islice

    from qadapter.data import read_pairs
    from qadapter.explain import explain_html
    from qadapter.files import write_text

    pairs = list(islice(read_pairs(args.data), args.max_pairs))
    html = explain_html(load_policy(args), pairs, strength=args.strength)
    write_text(args.output, html)
    print(f"{html.count('<section>')} pairs explained in {args.output}")


def add_export(commands: Commands) -> None:
    """Add the parser of `qadapter export`."""
    export = commands.add_parser("export", help="write a policy as other programs serve it")
    add_policy(export)
    export.add_argument("output", help="directory to write, new or empty")
    export.add_argument(
        "--format",
        choices=["policy", "merged", "peft", "gguf"],
        default="policy",
        help="the whole policy; one plain model, plain LoRA or GGUF of strength 1",
    )
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from qadapter.export import FORMATS, PROMPTS
    from qadapter.files import check_new

    check_new(args.output)
    logging.disable_progress_bar()  # three of them, of seconds each
    done = FORMATS[args.format](load_policy(args), args.output, strength=args.strength)
    print(f"written  {done.directory}")
    print(
        f"checked  its log-probs are the policy's on {len(PROMPTS)} prompts: largest difference "
        f"{done.difference:.2g} nats, of {done.allowed:.2g} that rounding explains"
    )
