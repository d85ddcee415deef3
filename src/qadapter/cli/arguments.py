"""Arguments that several commands take, and the policy that they name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from qadapter.errors import ConfigError
from qadapter.strength import NAME, Strength, each, parse

if TYPE_CHECKING:
    from qadapter.policy import Policy

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a command adds its parser."""


def count(text: str) -> int:
    """Return a whole number from 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return number


def seed(text: str) -> int:
    """Return a whole number that every generator takes for a seed, for argparse."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2³² − 1")
    return number


def port(text: str) -> int:
    """Return a port number, for argparse."""
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 65535")
    return number


def level(text: str) -> float:
    """Return a finite number from 0, for argparse."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0")
    return number


def strength(text: str) -> Strength:
    """Return one number, or several with commas between them, for argparse."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that takes several adapters whose residuals add."""
    parser.add_argument(
        "adapter",
        nargs="+",
        help="directory that `qadapter train` wrote, or NAME=DIR; several of one base add up",
    )
    _add_loading(parser)
    parser.add_argument(
        "--strength",
        type=strength,
        default=1.0,
        help="0 the base, 1 the policy; of several adapters one for all, or one each: 1.0,0.5",
    )
    add_device(parser)


def add_adapter(parser: argparse._ActionsContainer) -> None:
    """Add the arguments of a command that takes one adapter."""
    parser.add_argument("adapter", help="directory that `qadapter train` wrote")
    _add_loading(parser)


def _add_loading(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--base", help="where the base is, if not where the artefact says")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--no-check-base", action="store_true", help="accept another base, tokenizer or template"
    )
    add_trust(parser)


def loading_words(args: argparse.Namespace) -> list[str]:
    """Return the words with which another command loads the same adapter in the same way."""
    words = [args.adapter]
    words += ["--base", args.base] if args.base else []
    words += ["--dtype", args.dtype] if args.dtype != "float32" else []
    words += ["--device", args.device] if args.device else []
    words += ["--no-check-base"] if args.no_check_base else []
    return words + (["--trust-remote-code"] if args.trust_remote_code else [])


def add_trust(parser: argparse._ActionsContainer) -> None:
    """Add the flag that lets a base run its own code."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the base run code that comes with it"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names a device."""
    parser.add_argument("--device", help="cuda, mps, cpu; default the first there is")


def named(words: Sequence[str]) -> dict[str, str]:
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


def load_policy(args: argparse.Namespace) -> Policy:
    """Return the policy that a command's arguments name.

    Raises:
        UserError: it cannot be loaded, or the strengths are not as many as the adapters.
    """
    import torch

    from qadapter import hub
    from qadapter.policy import Policy

    adapters = args.adapter
    if isinstance(adapters, list):
        adapters = named(adapters)
        each(args.strength, list(adapters))
    return Policy.from_pretrained(
        adapters,
        args.base,
        dtype=getattr(torch, args.dtype),
        device=hub.pick_device(args.device),
        check_base=not args.no_check_base,
        trust_remote_code=args.trust_remote_code,
    )
