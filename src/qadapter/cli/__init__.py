"""The command line: parse, call, print, exit code. The only room that prints or exits.

`training`, `pairs`, `policy`, `serving`, `comparison` and `demo` hold the commands; `arguments` the
flags that several of them take; `terminal` what a terminal may be told. Each command imports what
it needs when it runs, so that help and slips are answered at once.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from qadapter import ranks
from qadapter.cli import comparison, demo, pairs, policy, serving, training
from qadapter.cli.terminal import printable
from qadapter.errors import UserError

_DESCRIPTION = """\
Teach an aligned language model a new preference without losing what it knows.

  qadapter demo                                      all of it in ten minutes, on a CPU
  qadapter check prefs.jsonl                         look at the pairs before training
  qadapter train --data prefs.jsonl --output DIR     learn a Q-adapter
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qadapter",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo.add_demo(commands)
    # `main` hands these over before this parser runs: the flags of one are QAdapterConfig's fields,
    # those of the other lm-eval's.
    commands.add_parser("train", help="learn a Q-adapter from preference pairs", add_help=False)
    commands.add_parser("evaluate", help="run lm-eval's tasks on a policy", add_help=False)
    pairs.add_check(commands)
    pairs.add_anchors(commands)
    policy.add_chat(commands)
    policy.add_generate(commands)
    serving.add_serve(commands)
    serving.add_play(commands)
    policy.add_score(commands)
    policy.add_tune(commands)
    policy.add_explain(commands)
    policy.add_export(commands)
    comparison.add_compare(commands)
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
            return training.train(rest)
        elif command == "evaluate":
            comparison.evaluate(rest)
        else:
            args = _parser().parse_args(words)
            args.run(args)
    except UserError as error:
        if debug:
            raise
        if ranks.first_to_tell(unasked=True):  # rather twice than never
            print(f"qadapter: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except Exception:
        # Of a process that ends by an error the others hear that a connection broke.
        if ranks.first_to_tell(unasked=ranks.number() == 0):
            raise
        return 2
    except KeyboardInterrupt:
        if not ranks.launched():  # else the launcher says it, once
            print("qadapter: stopped", file=sys.stderr)
        return 130
    return 0
