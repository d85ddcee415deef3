"""`qadapter demo`: all of it on the pairs that come with the package."""

from __future__ import annotations

import argparse
import shutil
import sys

from qadapter.cli.arguments import Commands


def add_demo(commands: Commands) -> None:
    """Add the parser of `qadapter demo`."""
    demo = commands.add_parser("demo", help="train on the shipped pairs and show the result")
    demo.add_argument("--output", default="runs/demo", help="directory for the adapter")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from transformers.utils import logging

    from qadapter import demo
    from qadapter.estimate import peak_memory
    from qadapter.files import shipped
    from qadapter.policy import Policy

    logging.disable_progress_bar()  # of weights loaded in a second; training keeps its own
    # A pipe has no width of its own; four answers side by side want more than the usual 80.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"Training on the pairs that come with qadapter, into {args.output} …")
    result = demo.train_demo(args.output)
    policy = Policy.from_pretrained(result.directory)
    for answers in demo.ask(policy):
        names = ["base", *(f"strength {s:g}" for s in demo.STRENGTHS)]
        table = Table(*names, title=answers.prompt, title_justify="left", expand=True)
        for column in table.columns:
            column.ratio = 1
        table.add_row(*(_shortened(text) for text in (answers.base, *answers.policy)))
        console.print(table)
    score, drifts = demo.measure(policy)
    low, high = score.accuracy_ci
    figures = Table("what", "value", title="Learned, and kept", title_justify="left")
    figures.add_row(
        "held-out preference accuracy",
        f"{score.accuracy:.1%} (95% CI {low:.1%}–{high:.1%}, {score.pairs} pairs)",
    )
    figures.add_row("  by length alone: the longer", f"{score.length_baseline:.1%}")
    figures.add_row("  by length alone: the shorter", f"{1 - score.length_baseline:.1%}")
    figures.add_row("mean margin, nats", f"{score.margin:.2f}")
    for strength, drift in zip(demo.STRENGTHS, drifts, strict=True):
        figures.add_row(
            f"general text, strength {strength:g}",
            f"KL to base {drift.kl:.4f} nats a token; perplexity {drift.perplexity:.2f} "
            f"({drift.perplexity / drift.base_perplexity - 1:+.1%})",
        )
    figures.add_row("trained parameters", f"{result.trainable:,}")
    figures.add_row("pairs a second", f"{result.metrics['train_samples_per_second']:.2f}")
    figures.add_row("peak memory", f"{peak_memory():.1f} GiB")
    console.print(figures)
    held_out = shipped("demo.dev.jsonl")
    console.print("Next:", style="bold")
    program = "qadapter" if shutil.which("qadapter") else sys.argv[0]
    for command in (
        f"chat {args.output} --strength 0.7",
        f"explain {args.output} {held_out} --output rewards.html",
        "train --data YOUR_PAIRS.jsonl --output runs/mine",
    ):
        console.print(f"  {program} {command}", soft_wrap=True, markup=False)


def _shortened(text: str, words: int = 45) -> str:
    said = text.split()
    return " ".join(said[:words]) + (" …" if len(said) > words else "")
