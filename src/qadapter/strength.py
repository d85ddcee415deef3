"""How far which adapters move the base: one number for all of them, or one each (METHOD §5)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from qadapter.errors import ConfigError

Strength = float | tuple[float, ...]
"""s: 0 is the base, 1 what was trained."""

MOST = 100.0
"""What clients of a server may ask for: far beyond, float32 mixes differences of large numbers."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What an adapter among others may be called; with `+` between them, names are a sum's."""


def parse(text: str) -> Strength:
    """Return what `0.7` or `1.0,0.5` says.

    Raises:
        ValueError: a part is not a finite number from 0.
    """
    numbers = tuple(map(float, text.split(",")))
    if not all(0 <= number < math.inf for number in numbers):
        raise ValueError(f"{text!r} is not a finite number from 0")
    return numbers if len(numbers) > 1 else numbers[0]


def told(strength: float | Sequence[float]) -> str:
    """Return it as `parse` reads it."""
    numbers = (strength,) if isinstance(strength, int | float) else strength
    return ",".join(f"{number:g}" for number in numbers)


def each(strength: float | Sequence[float], names: Sequence[str]) -> tuple[float, ...]:
    """Return one number for each adapter.

    Raises:
        ConfigError: there are more or fewer, and not one for all; or one is not finite and from 0.
    """
    numbers = (strength,) * len(names) if isinstance(strength, int | float) else tuple(strength)
    if len(numbers) != len(names):
        raise ConfigError(
            f"strength: {len(numbers)} numbers ({told(numbers)}) for "
            f"{len(names)} adapters ({', '.join(names)}); give one for all, or one each."
        )
    if not all(0 <= number < math.inf for number in numbers):
        raise ConfigError(f"strength: {told(numbers)} must be finite and from 0 (METHOD §5).")
    return tuple(map(float, numbers))
