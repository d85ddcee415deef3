"""The command line: parse, call, print, exit code. The only module that prints or exits."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import shlex
import shutil
import sys
import tempfile
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter import ranks
from qadapter.errors import ConfigError, DataError, TrainingError, UserError
from qadapter.strength import NAME, Strength, each, parse, told

if TYPE_CHECKING:
    from qadapter.config import QAdapterConfig
    from qadapter.policy import Policy
    from qadapter.train import TrainResult

_DESCRIPTION = """\
Teach an aligned language model a new preference without losing what it knows.

  qadapter demo                                      all of it in ten minutes, on a CPU
  qadapter check prefs.jsonl                         look at the pairs before training
  qadapter train --data prefs.jsonl --output DIR     learn a Q-adapter from them
  qadapter chat DIR --strength 0.7                   talk to it
  qadapter chat DIR DIR2 --strength 1.0,0.5          to two adapters of one base at once
  qadapter score DIR held_out.jsonl --json           how well it learned, how far it drifted
  qadapter tune DIR --max-kl 0.05 --text F           the largest strength that drifts no further
  qadapter generate DIR --prompts F --output F2      answer a file of prompts
  qadapter serve DIR --port 8000                     behind OpenAI's endpoints, strength per request
  qadapter play DIR                                  a page with base and policy side by side
  qadapter explain DIR pairs.jsonl --output F.html   which tokens the preference rewards
  qadapter compare run.yaml                          what each method learns and forgets
  qadapter evaluate DIR --tasks arc_easy,ifeval      what it still knows, by any task of lm-eval
  qadapter export DIR OUT --format policy            a model of its own, for transformers and vLLM

Every command answers --help. Bad input is told in one sentence with exit code 2; --debug, before
the command, shows the traceback.
"""


def _count(text: str) -> int:
    """Return a whole number from 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return number


def _seed(text: str) -> int:
    """Return a whole number that every generator takes for a seed, for argparse."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2³² − 1")
    return number


def _port(text: str) -> int:
    """Return a port number, for argparse."""
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 65535")
    return number


def _level(text: str) -> float:
    """Return a finite number from 0, for argparse."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0")
    return number


def _strength(text: str) -> Strength:
    """Return one number, or several with commas between them, for argparse."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_policy(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that takes several adapters whose residuals add."""
    parser.add_argument(
        "adapter",
        nargs="+",
        help="directory that `qadapter train` wrote, or NAME=DIR; several of one base add up",
    )
    _add_loading(parser)
    parser.add_argument(
        "--strength",
        type=_strength,
        default=1.0,
        help="0 the base, 1 the policy; of several adapters one for all, or one each: 1.0,0.5",
    )
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda, mps, cpu; default the first there is")


def _add_adapter(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("adapter", help="directory that `qadapter train` wrote")
    _add_loading(parser)


def _add_loading(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--base", help="where the base is, if not where the artefact says")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--no-check-base", action="store_true", help="accept another base, tokenizer or template"
    )
    _add_trust(parser)


def _add_trust(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the base run code that comes with it"
    )


def _named(words: Sequence[str]) -> dict[str, str]:
    """Return directories of adapters by name: what stands before a `=`, or the directory's own.

    Raises:
        ConfigError: two have one name, or one is none that may stand among others.
    """
    found: dict[str, str] = {}
    for word in words:
        name, given, place = word.partition("=")
        if not given or Path(word).is_dir():
            name, place = Path(word).resolve().name, word
        if name in found:
            raise ConfigError(
                f"{place}: another adapter is named {name!r}, too; name it, as in other={place}."
            )
        if (len(words) > 1 or place != word) and not NAME.fullmatch(name):
            raise ConfigError(
                f"{place}: {name!r} is no name for one of several adapters (letters, digits, "
                f"'.', '_' and '-'); name it, as in mine={place}."
            )
        found[name] = place
    return found


def _load_policy(args: argparse.Namespace) -> Policy:
    import torch

    from qadapter import hub
    from qadapter.policy import Policy

    adapters = args.adapter
    if isinstance(adapters, list):
        adapters = _named(adapters)
        each(args.strength, list(adapters))
    return Policy.from_pretrained(
        adapters,
        args.base,
        dtype=getattr(torch, args.dtype),
        device=hub.pick_device(args.device),
        check_base=not args.no_check_base,
        trust_remote_code=args.trust_remote_code,
    )


def _train(argv: Sequence[str]) -> int:
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
    parser.add_argument("--processes", type=_count, help="with --launch: so many in all")
    known, _ = parser.parse_known_args(list(argv))
    words = [*(_yaml_words(known.config, QAdapterConfig) if known.config else []), *argv]
    values = vars(parser.parse_args(words))
    del values["config"]
    file, processes = values.pop("launch"), values.pop("processes")
    if file and not ranks.launched():
        return launch(file, ["train", *argv], processes=processes)
    if values.pop("dry_run"):
        _estimate(QAdapterConfig(**values))
        return 0
    logging.basicConfig(format="%(message)s")
    first = ranks.number() == 0
    logging.getLogger("qadapter").setLevel(logging.INFO if first else logging.ERROR)
    result = run_training(QAdapterConfig(**values))
    if first:
        _told(result, argv)
    return 0


def _without(secret: str, argv: Sequence[str]) -> list[str]:
    """Return a command line with a name in the place of a secret: what is printed gets kept.

    Args:
        secret: its flag, such as `--hub-token`, which argparse knows by its beginning, too.
    """
    name, shown, hiding = secret[2:].upper().replace("-", "_"), [], False
    least = secret.index("-", 2) + 2  # letters: fewer could mean another flag
    for word in argv:
        flag, equals, _ = word.partition("=")
        if word.startswith("--"):
            hiding = len(flag) >= least and secret.startswith(flag.replace("_", "-"))
            shown.append(f"{flag}={name}" if hiding and equals else word)
        else:
            shown.append(name if hiding else word)
    return shown


def _told(result: TrainResult, argv: Sequence[str]) -> None:
    if result.stopped_at is not None:
        again = [*_without("--hub-token", argv), "--resume_from_checkpoint", "true"]
        command = shlex.join(["qadapter", "train", *again])
        print(f"stopped after step {result.stopped_at}; go on by\n{command}")
        return
    for reason, sources in result.dropped.items():
        print(f"dropped {len(sources)} pairs: {reason} (the first is {sources[0]})")
    for name, value in sorted(result.metrics.items()):
        print(f"{name:28} {value:.4g}")
    if result.budget:
        print(f"budget  {result.budget}")
    print(f"trained {result.trainable:,} parameters on {result.pairs} pairs; the base is unchanged")
    print(f"saved   {result.directory}\nnext    qadapter chat {result.directory}")


def _estimate(config: QAdapterConfig) -> None:
    from qadapter.estimate import Epoch, estimate

    found = estimate(config)

    def told(epoch: Epoch) -> str:
        return f"{_duration(epoch.seconds)}, {epoch.flops / 1e12:,.1f} TFLOP"

    print(f"pairs            {found.pairs:,} ({found.dropped:,} dropped)")
    print(f"tokens           {found.tokens:,}, of which {found.response_tokens:,} in responses")
    print(f"micro-batches    {found.batches:,} an epoch")
    print(f"first epoch      {told(found.first)}")
    if found.later is not None:
        print(f"later epochs     {told(found.later)} each, from a cache on disk")
        there = f", {found.kept:.0%} of it on disk already" if found.kept else ""
        print(f"trunk cache      {found.cache / 2**30:.2f} GiB{there}")
    print(f"training         {_duration(found.seconds)} for {found.epochs:g} epochs")
    print(f"peak memory      {found.peak:.1f} GiB")
    print("nothing was written; leave out --dry-run to start")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


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
    print(_printable(format_audit(found)))
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
            _printable(tokenizer.decode(ids))
            for ids in (tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids)
        )
        console.print(Text(prompt, style="dim"))
        console.print(Text("chosen   " + chosen, style="green"))
        console.print(Text("rejected " + rejected, style="red"))


def _printable(text: str) -> str:
    """Return text that cannot steer the terminal: control characters are written out."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _score(args: argparse.Namespace) -> None:
    from qadapter.alarms import inverted
    from qadapter.data import read_pairs, read_texts
    from qadapter.files import write_jsonl

    pairs = list(read_pairs(args.data))
    texts = read_texts(args.text) if args.text else None
    policy = _load_policy(args)
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


def _tune(args: argparse.Namespace) -> None:
    from qadapter.budget import tune
    from qadapter.data import read_texts

    texts = read_texts(args.text)
    found = tune(
        _load_policy(args),
        texts,
        max_kl=args.max_kl,
        max_strength=args.max_strength,
        max_tokens=args.text_tokens,
    )
    following = f"qadapter chat {args.adapter} --strength {found.strength:g}"
    if args.json:
        print(json.dumps({**dataclasses.asdict(found), "next": following}, allow_nan=False))
        return
    spread = "of one window, so without an interval"
    if found.kl_ci is not None:
        spread = f"95% {found.kl_ci[0]:.4g}–{found.kl_ci[1]:.4g}"
    print(f"strength {found.strength:g}, the largest up to {found.max_strength:g} that keeps to it")
    print(f"KL       {found.kl:.4g} nats a token ({spread}) of at most {found.max_kl:g}")
    print(f"         {found.kl_at_max:.4g} at strength {found.max_strength:g}")
    print(f"read on  {found.tokens:,} tokens of {args.text}\nnext     {following}")


def _generate(args: argparse.Namespace) -> None:
    from qadapter.data import read_prompts
    from qadapter.files import write_jsonl

    prompts = read_prompts(args.prompts)
    policy = _load_policy(args)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        from transformers import set_seed

        set_seed(args.seed)
        options |= {"do_sample": True, "temperature": args.temperature}
    rows = []
    for start in range(0, len(prompts), args.batch_size):
        part = prompts[start : start + args.batch_size]
        answers = policy.answer(part, strength=args.strength, **options)
        for prompt, answer in zip(part, answers, strict=True):
            rows.append({"prompt": prompt, "response": answer, "strength": args.strength})
    write_jsonl(args.output, rows)
    print(f"{len(rows)} answers written to {args.output}")


def _explain(args: argparse.Namespace) -> None:
    from itertools import islice

    from qadapter.data import read_pairs
    from qadapter.explain import explain_html
    from qadapter.files import write_text

    pairs = list(islice(read_pairs(args.data), args.max_pairs))
    html = explain_html(_load_policy(args), pairs, strength=args.strength)
    write_text(args.output, html)
    print(f"{html.count('<section>')} pairs explained in {args.output}")


def _export(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from qadapter.export import FORMATS, PROMPTS
    from qadapter.files import check_new

    check_new(args.output)
    logging.disable_progress_bar()  # three of them, of seconds each
    done = FORMATS[args.format](_load_policy(args), args.output, strength=args.strength)
    print(f"written  {done.directory}")
    print(
        f"checked  its log-probs are the policy's on {len(PROMPTS)} prompts: largest difference "
        f"{done.difference:.2g} nats, of {done.allowed:.2g} that rounding explains"
    )


def _compare(args: argparse.Namespace) -> None:
    from qadapter.compare import CompareConfig, Progress, compare
    from qadapter.report import write_report

    def tell(at: Progress) -> None:
        left = "" if at.seconds_left is None else f", about {_duration(at.seconds_left)} left"
        print(f"[{at.done + 1}/{at.total}] {_printable(at.label)}{left}", flush=True)

    flags = {"vary": args.vary, "output": args.output}
    config = CompareConfig.read(args.config, full=args.full, **flags)
    words = [args.config, *(["--full"] if args.full else [])]
    words += [f"--vary {' '.join(args.vary)}"] if args.vary else []
    command = f"qadapter compare {' '.join(words)}"
    path = compare(config, tell, command=command, ray=args.ray)
    found = json.loads(path.read_text(encoding="utf-8"))
    for failure in found["failures"]:
        print(_printable(f"failed {failure['cell']}: {failure['error']}"), file=sys.stderr)
    report = write_report(found, path.parent)
    print(f"report  {report}\nfigures {path}")
    if n := len(found["failures"]):
        raise TrainingError(
            f"{n} {'cell' if n == 1 else 'cells'} failed, as told above; run the command again to "
            "try what failed anew."
        )


def _evaluate(argv: Sequence[str]) -> None:
    from qadapter import evaluate

    parser = evaluate.harness_parser()
    parser.prog = "qadapter evaluate"
    parser.usage = "%(prog)s adapter [options]"
    parser.description = (
        "Run lm-eval's tasks on the composed policy. All of lm-eval's options work; the model is "
        "the adapter. --suite-data D adds tasks on local files: local_piqa, local_arc_easy, "
        "local_lambada, local_perplexity and local_ifeval, all of them unless --tasks names some."
    )
    parser.epilog = None
    ours = parser.add_argument_group("qadapter")
    _add_adapter(ours)
    ours.add_argument("--strength", type=_level, default=1.0, help="0 the base, 1 the policy")
    ours.add_argument("--suite", choices=["local", "paper"], help="a set of tasks")
    ours.add_argument("--suite-data", metavar="D", help="directory of the local suite's files")
    options = parser.parse_args(list(argv))
    taken = vars(options)
    model = {
        "pretrained": taken.pop("adapter"),
        "strength": taken.pop("strength"),
        "base": taken.pop("base"),
        "dtype": taken.pop("dtype"),
        "check_base": not taken.pop("no_check_base"),
    }
    suite, data = taken.pop("suite"), taken.pop("suite_data")
    evaluate.run_harness(options, model, suite=suite, suite_data=data)


def _demo(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from transformers.utils import logging

    from qadapter import demo
    from qadapter.estimate import peak_memory
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
    held_out = demo.shipped("demo.dev.jsonl")
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


def _chat(args: argparse.Namespace) -> None:
    from qadapter.policy import Chat

    chat = Chat(_load_policy(args), strength=args.strength, max_new_tokens=args.max_new_tokens)
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
                print(_printable(piece), end="", flush=True)
        except UserError as error:  # a slip at the prompt does not end the talk
            print(error, end="")
        print()


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turn a failed import of an extra's packages into a ConfigError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{name}: {error.name or error} is not installed; run `pip install 'qadapter[{name}]'`."
        ) from error


def _serve(args: argparse.Namespace) -> None:
    key = os.environ.get("QADAPTER_API_KEY") if args.api_key is None else args.api_key
    if key == "":
        raise ConfigError("--api-key: is empty, which any client could guess; give one or none.")
    if args.engine == "vllm":
        _serve_on_vllm(args, key)
        return
    args.strength = 1.0 if args.strength is None else args.strength
    if args.vllm_args is not None:
        raise ConfigError("--vllm-args: goes with --engine vllm; leave it out or add that.")
    with _extra("serve"):
        from qadapter.serve.asking import Limits
        from qadapter.serve.run import listen, run
        from qadapter.serve.shelf import Shelf

    limits = {n: getattr(args, n) for n in _LIMITS if getattr(args, n) is not None}
    shelf = None if args.adapter_dir is None else Shelf(args.adapter_dir)
    with closing(listen(args.host, args.port)) as bound:
        run(
            _load_policy(args),
            bound,
            strength=args.strength,
            limits=Limits(**limits),
            max_batch=args.max_batch,
            max_queue=64 if args.max_queue is None else args.max_queue,
            api_key=key,
            shelf=shelf,
        )


_LIMITS = ("max_context", "max_tokens", "max_body")


def _serve_on_vllm(args: argparse.Namespace, key: str | None) -> None:
    from qadapter.serve import on_vllm

    for name in ("max_tokens", "max_body", "max_queue", "adapter_dir"):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            what = "reads no adapters" if name == "adapter_dir" else "has no such limit"
            raise ConfigError(f"{flag}: vLLM {what}; leave it out, or --engine vllm.")
    if args.port == 0:
        raise ConfigError("--port: vLLM takes no 0 for any free one; name a port.")
    on_vllm.check_installed()
    with tempfile.TemporaryDirectory(prefix="qadapter-vllm.") as made:
        adapters = _named(args.adapter)
        export = Path(next(iter(adapters.values())))
        if len(adapters) > 1 or not on_vllm.is_export(export):
            from qadapter.export import export_policy

            args.strength = 1.0 if args.strength is None else args.strength
            export = export_policy(_load_policy(args), Path(made) / "export").directory
        words = on_vllm.command(
            export,
            name="+".join(adapters),
            host=args.host,
            port=args.port,
            strength=args.strength,
            dtype=args.dtype,
            max_batch=args.max_batch,
            max_context=args.max_context,
            more=args.vllm_args or "",
        )
        print(shlex.join(_without("--api-key", words)), flush=True)
        on_vllm.run(words, api_key=key)


def _play(args: argparse.Namespace) -> None:
    with _extra("play"):
        from qadapter import play
        from qadapter.serve.run import listen

        play.check_installed()
    with closing(listen(args.host, args.port)) as bound:
        policy = _load_policy(args)
        host, port = bound.getsockname()[:2]
        print(f"http://{host}:{port}  (Ctrl-C ends it)", flush=True)
        play.run(policy, bound, strength=args.strength, max_tokens=args.max_new_tokens)


def _add_address(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=_port, default=port, help=f"default {port}; 0 any free one")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qadapter",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train on the shipped pairs and show the result")
    demo.add_argument("--output", default="runs/demo", help="directory for the adapter")
    demo.set_defaults(run=_demo)

    # `main` hands these over before this parser runs: the flags of one are QAdapterConfig's fields,
    # those of the other lm-eval's.
    commands.add_parser("train", help="learn a Q-adapter from preference pairs", add_help=False)
    commands.add_parser("evaluate", help="run lm-eval's tasks on a policy", add_help=False)

    check = commands.add_parser("check", help="audit preference data")
    check.add_argument("data", help="file, directory or Hub name")
    check.add_argument("--model", help="count tokens as this model does")
    check.add_argument("--eval-data", help="held-out pairs, to look for shared prompts")
    check.add_argument("--max-length", type=_count, default=1024, help="tokens a pair may have")
    check.add_argument("--show", type=_count, metavar="N", help="print N pairs")
    _add_trust(check)
    check.set_defaults(run=_check)

    chat = commands.add_parser("chat", help="talk to a policy")
    _add_policy(chat)
    chat.add_argument("--max-new-tokens", type=_count, default=256)
    chat.set_defaults(run=_chat)

    generate = commands.add_parser("generate", help="answer a file of prompts")
    _add_policy(generate)
    generate.add_argument("--prompts", required=True, help=".txt, a prompt a line, or .jsonl")
    generate.add_argument("--output", required=True, help=".jsonl to write")
    generate.add_argument("--max-new-tokens", type=_count, default=256)
    generate.add_argument("--temperature", type=_level, default=0.0, help="0 is greedy")
    generate.add_argument("--seed", type=_seed, default=42)
    generate.add_argument("--batch-size", type=_count, default=8)
    generate.set_defaults(run=_generate)

    serve = commands.add_parser("serve", help="serve a policy behind OpenAI's endpoints")
    _add_policy(serve)
    _add_address(serve, 8000)
    serve.add_argument(
        "--engine", choices=["embedded", "vllm"], default="embedded", help="vllm: its own server"
    )
    serve.add_argument("--api-key", help="ask clients for it; default $QADAPTER_API_KEY, or none")
    serve.add_argument(
        "--adapter-dir",
        metavar="D",
        help="let clients load adapters from under D (/v1/load_lora_adapter); default nobody may",
    )
    serve.add_argument("--max-batch", type=_count, default=16, help="answers made together")
    serve.add_argument("--max-queue", type=_count, help="answers that may wait, default 64")
    serve.add_argument("--max-tokens", type=_count, help="tokens of an answer, default 1024")
    serve.add_argument("--max-context", type=_count, help="of prompt and answer, default 4096")
    serve.add_argument("--max-body", type=_count, help="bytes of a request, default 1 MiB")
    serve.add_argument("--vllm-args", metavar="FLAGS", help="further flags of vLLM's, quoted")
    # An export has a strength of its own.
    serve.set_defaults(run=_serve, strength=None)

    play = commands.add_parser("play", help="a page with base and policy side by side")
    _add_policy(play)
    _add_address(play, 7860)
    play.add_argument("--max-new-tokens", type=_count, default=256)
    play.set_defaults(run=_play)

    score = commands.add_parser("score", help="held-out accuracy, margin and KL to the base")
    _add_policy(score)
    score.add_argument("data", help="held-out preference pairs")
    score.add_argument("--json", action="store_true", help="one JSON object on stdout")
    score.add_argument("--rewards", metavar="F", help="write each pair's rewards here (.jsonl)")
    score.add_argument("--text", metavar="F", help="general text, for KL and perplexity")
    score.add_argument("--text-tokens", type=_count, default=50_000, help="at most so many of it")
    score.add_argument("--max-length", type=_count, default=1024)
    score.set_defaults(run=_score)

    tune = commands.add_parser("tune", help="the largest strength inside a forgetting budget")
    _add_adapter(tune)
    _add_device(tune)
    tune.add_argument(
        "--max-kl", type=_level, required=True, help="KL(base || policy), nats a token"
    )
    tune.add_argument("--text", required=True, metavar="F", help="general text to read it on")
    tune.add_argument("--max-strength", type=_level, default=1.0, help="look no further")
    tune.add_argument("--text-tokens", type=_count, default=10_000, help="at most so many of it")
    tune.add_argument("--json", action="store_true", help="one JSON object on stdout")
    tune.set_defaults(run=_tune)

    explain = commands.add_parser("explain", help="colour tokens by their reward, in a page")
    _add_policy(explain)
    explain.add_argument("data", help="preference pairs")
    explain.add_argument("--output", required=True, help=".html to write")
    explain.add_argument("--max-pairs", type=_count, default=20)
    explain.set_defaults(run=_explain)

    export = commands.add_parser("export", help="write a policy as other programs serve it")
    _add_policy(export)
    export.add_argument("output", help="directory to write, new or empty")
    export.add_argument(
        "--format",
        choices=["policy", "merged", "peft", "gguf"],
        default="policy",
        help="the whole policy; one plain model, plain LoRA or GGUF of strength 1",
    )
    export.set_defaults(run=_export)

    compare = commands.add_parser(
        "compare", help="train several methods; report what each learns and forgets"
    )
    compare.add_argument("config", help="YAML file: data, methods, sizes; see CompareConfig")
    compare.add_argument("--full", action="store_true", help="lay its section `full` over the rest")
    compare.add_argument("--output", help="directory; default the file's own `output`")
    compare.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help="robustness: flipped=0.1, irrelevant=0.3, pairs=50, or a parameter such as lora_r=4",
    )
    compare.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run cells on this Ray cluster, on a file system all nodes share; `local` starts one",
    )
    compare.set_defaults(run=_compare)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after a user's error told in one sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words[:1]
    if not debug:  # what other packages tell each other through the user
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        command, *rest = words[int(debug) :] or [""]
        if command == "train":
            return _train(rest)
        elif command == "evaluate":
            _evaluate(rest)
        else:
            args = _parser().parse_args(words)
            args.run(args)
    except UserError as error:
        if debug:
            raise
        if ranks.first_to_tell():
            print(f"qadapter: {_printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except Exception:
        # Of a process that ends by an error the others hear that a connection broke.
        if ranks.first_to_tell():
            raise
        return 2
    except KeyboardInterrupt:
        print("qadapter: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
