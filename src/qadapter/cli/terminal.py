"""What a terminal may be told: no control characters, no secrets, times as people say them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def printable(text: str) -> str:
    """Return text that cannot steer the terminal: control characters are written out."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def without(secret: str, argv: Sequence[str]) -> list[str]:
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


def duration(seconds: float) -> str:
    """Return seconds as `3 min 05 s` or `2 h 07 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
