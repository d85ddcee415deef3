"""`qadapter compare` and `qadapter evaluate`: what is learned, and what is forgotten."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from qadapter.cli.arguments import Commands, add_adapter, level
from qadapter.cli.terminal import duration, printable
from qadapter.errors import TrainingError, needs


def add_compare(commands: Commands) -> None:
    """Add the parser of `qadapter compare`."""
    compare = commands.add_parser(
        "compare", help="train several methods; report what each learns and forgets"
    )
    compare.add_argument("config", help="YAML file: data, methods, sizes; see CompareConfig")
    compare.add_argument("--full", action="store_true", help="lay its section `full` over the rest")
    compare.add_argument("--output", help="directory; default the file's own `output`")
    compare.add_argument(
        "--methods", nargs="+", default=[], metavar="NAME", help="default the file's own `methods`"
    )
    compare.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help="train the reference and the first Q-Adapter again with flipped=0.1, irrelevant=0.3, "
        "pairs=50, or a parameter such as lora_r=4",
    )
    compare.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run cells on this Ray cluster, on a file system all nodes share; `local` starts one",
    )
    compare.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    with needs("compare", "compare"):
        from qadapter.compare import CompareConfig, Progress, compare
        from qadapter.report import write_report

    def tell(at: Progress) -> None:
        left = "" if at.seconds_left is None else f", about {duration(at.seconds_left)} left"
        print(f"[{at.done + 1}/{at.total}] {printable(at.label)}{left}", flush=True)

    flags = {"methods": args.methods, "vary": args.vary, "output": args.output}
    config = CompareConfig.read(args.config, full=args.full, **flags)
    words = ["qadapter", "compare", args.config, *(["--full"] if args.full else [])]
    for name in ("methods", "vary"):
        words += [f"--{name}", *flags[name]] if flags[name] else []
    words += ["--output", args.output] if args.output else []
    path = compare(config, tell, command=shlex.join(words), ray=args.ray)
    found = json.loads(path.read_text(encoding="utf-8"))
    for failure in found["failures"]:
        print(printable(f"failed {failure['cell']}: {failure['error']}"), file=sys.stderr)
    report = write_report(found, path.parent)
    print(f"report  {report}\nfigures {path}")
    if n := len(found["failures"]):
        raise TrainingError(
            f"{n} {'cell' if n == 1 else 'cells'} failed, as told above; run the command again to "
            "try what failed anew."
        )


def evaluate(argv: Sequence[str]) -> None:
    """Run `qadapter evaluate ARGV`, whose parser is lm-eval's."""
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
    add_adapter(ours)
    ours.add_argument("--strength", type=level, default=1.0, help="0 the base, 1 the policy")
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
