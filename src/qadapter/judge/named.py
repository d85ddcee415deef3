"""Judges by name, as settings and flags spell them."""

from __future__ import annotations

import re

from qadapter.errors import ConfigError
from qadapter.judge.bradley_terry import BradleyTerryJudge
from qadapter.judge.endpoint import OpenAIJudge
from qadapter.judge.rules import RuleJudge
from qadapter.judge.verdicts import Judge

_KEY = "OPENAI_API_KEY"
_KEY_HOST = r"https://([\w-]+\.)+openai\.com(:\d+)?(/|$)"


def named_judge(name: str, criterion: str | None = None) -> Judge:
    """Return the judge of a name; one that learns is still to be fitted.

    Args:
        name: `bradley-terry`; `rule:` and a rule of `RuleJudge`, as `rule:max_words:40`; or
            `openai:MODEL@URL#VARIABLE`, an OpenAI-compatible endpoint and the environment variable
            that holds its key. Without `#VARIABLE` no key is sent, but to https://api.openai.com
            (or another host below openai.com) the one in `$OPENAI_API_KEY`.
        criterion: what the preference asks for; an endpoint is told it.

    Raises:
        ConfigError: it is none of these, its rule or address is none, or the variable holds no key.
    """
    kind, _, rest = name.partition(":")
    if name == "bradley-terry":
        return BradleyTerryJudge()
    if kind == "rule":
        return RuleJudge(rest)
    model, _, address = rest.partition("@")
    url, hash_sign, variable = address.partition("#")
    if kind == "openai" and model and url and bool(hash_sign) == bool(variable):
        key = variable or (_KEY if re.match(_KEY_HOST, url) else None)
        return OpenAIJudge(url, model, key, criterion=criterion)
    raise ConfigError(
        f"judges: {name!r} is none; give bradley-terry, rule:RULE such as rule:max_words:40, or "
        "openai:MODEL@URL#VARIABLE, where VARIABLE holds the key (without one: openai:MODEL@URL)."
    )
