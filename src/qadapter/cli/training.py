"""`qadapter train`: its flags are the fields of `QAdapterConfig`."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qadapter import ranks
from qadapter.cli.arguments import count
from qadapter.cli.terminal import duration, without
from qadapter.errors import ConfigError

if TYPE_CHECKING:
    from qadapter.config import QAdapterConfig
    from qadapter.train import TrainResult


def train(argv: Sequence[str]) -> int:
    """Run `qadapter train ARGV`; return its exit code."""
    from transformers import HfArgumentParser

    from qadapter.config import QAdapterConfig
    from qadapter.launch import launch
    from qadapter.train import run_training

    parser = HfArgumentParser(  # type: ignore[arg-type,unused-ignore]
        QAdapterConfig,
        prog="qadapter train",
        description="Learn a Q-adapter. Flags and YAML fields are the same; a flag wins.",
    )
    parser.add_argument("--config", help="YAML file with any of the fields below")
    parser.add_argument("--output", dest="output_dir", help="same as --output_dir")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the run will take, and do not start it"
    )
    parser.add_argument(
        "--launch", metavar="FILE", help="start several processes as this accelerate file says"
    )
    parser.add_argument("--processes", type=count, help="with --launch: so many in all")
    known, _ = parser.parse_known_args(list(argv))
    words = [*(_yaml_words(known.config, QAdapterConfig) if known.config else []), *argv]
    values = vars(parser.parse_args(words))
    del values["config"]
    file, processes = values.pop("launch"), values.pop("processes")
    if file and not ranks.launched():
        return launch(file, ["train", *argv], processes=processes)
    logging.basicConfig(format="%(message)s")
    first = ranks.number() == 0
    logging.getLogger("qadapter").setLevel(logging.INFO if first else logging.ERROR)
    if values.pop("dry_run"):
        _estimate(QAdapterConfig(**values))
        return 0
    result = run_training(QAdapterConfig(**values))
    if first:
        _told(result, argv)
    return 0


def _yaml_words(path: str, config: type) -> list[str]:
    """Return a YAML file's fields as the flags they stand for, so both are read by one parser."""
    from qadapter.files import read_fields

    fields = read_fields(path)
    known = {f.name for f in dataclasses.fields(config)}
    words: list[str] = []
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(f"{path}: {name!r} is not a field; see `qadapter train --help`.")
        if value is None:
            raise ConfigError(f"{path}: {name!r} has no value; give one or drop the line.")
        if value is False and name.endswith("_strategy"):
            value = "no"  # which YAML reads as a boolean
        values = value if isinstance(value, list) else [value]
        # `=` keeps a value that begins with a dash from being read as a flag.
        texts = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
        words += [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
    return words


def _estimate(config: QAdapterConfig) -> None:
    from qadapter.estimate import Epoch, estimate

    found = estimate(config)

    def told(epoch: Epoch) -> str:
        return f"{duration(epoch.seconds)}, {epoch.flops / 1e12:,.1f} TFLOP"

    print(f"pairs            {found.pairs:,} ({found.dropped:,} dropped)")
    print(f"tokens           {found.tokens:,}, of which {found.response_tokens:,} in responses")
    print(f"micro-batches    {found.batches:,} an epoch")
    print(f"first epoch      {told(found.first)}")
    if found.later is not None:
        print(f"later epochs     {told(found.later)} each, from a cache on disk")
        there = f", {found.kept:.0%} of it on disk already" if found.kept else ""
        print(f"trunk cache      {found.cache / 2**30:.2f} GiB{there}")
    print(f"training         {duration(found.seconds)} for {found.epochs:g} epochs")
    print(f"peak memory      {found.peak:.1f} GiB")
    print("no run was started; leave out --dry-run to start it")


def _told(result: TrainResult, argv: Sequence[str]) -> None:
    if result.stopped_at is not None:
        again = [*without("--hub-token", argv), "--resume_from_checkpoint", "true"]
        command = shlex.join(["qadapter", "train", *again])
        print(f"stopped after step {result.stopped_at}; go on by\n{command}")
        return
    for reason, sources in result.dropped.items():
        print(f"dropped {len(sources)} pairs: {reason} (the first is {sources[0]})")
    for name, value in sorted(result.metrics.items()):
        print(f"{name:28} {value:.4g}")
    if result.budget:
        print(f"budget  {result.budget}")
    trained = f"{result.trainable:,} parameters in {result.layers} layers"
    print(f"trained {trained} on {result.pairs} pairs; the base is unchanged")
    print(f"saved   {result.directory}\nnext    qadapter chat {result.directory}")
