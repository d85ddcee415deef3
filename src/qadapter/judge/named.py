"""Judges by name, as settings and flags spell them."""

from __future__ import annotations

import os

from qadapter.errors import ConfigError
from qadapter.judge.bradley_terry import BradleyTerryJudge
from qadapter.judge.endpoint import OpenAIJudge
from qadapter.judge.rules import RuleJudge
from qadapter.judge.verdicts import Judge

_KEY = "OPENAI_API_KEY"


def named_judge(name: str) -> Judge:
    """Return the judge of a name; one that learns is still to be fitted.

    Args:
        name: `bradley-terry`; `rule:` and a rule of `RuleJudge`, as `rule:max_words:40`; or
            `openai:MODEL@URL`, an OpenAI-compatible endpoint, whose key is in `$OPENAI_API_KEY`
            unless it wants none.

    Raises:
        ConfigError: it is none of these, or its rule or address is none.
    """
    kind, _, rest = name.partition(":")
    if name == "bradley-terry":
        return BradleyTerryJudge()
    if kind == "rule":
        return RuleJudge(rest)
    model, _, url = rest.partition("@")
    if kind == "openai" and model and url:
        return OpenAIJudge(url, model, _KEY if _KEY in os.environ else None)
    raise ConfigError(
        f"judges: {name!r} is none; give bradley-terry, rule:RULE such as rule:max_words:40, or "
        "openai:MODEL@URL."
    )
