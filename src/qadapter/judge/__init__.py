"""Judges: whose answers are better, the policy's or the base's?

A judge compares two answers to a prompt. `BradleyTerryJudge` learns from preference pairs how,
`OpenAIJudge` asks a language model, `RuleJudge` checks what can be checked. The accuracy with which
a judge tells chosen from rejected on held-out pairs stands in each verdict it gives.
"""

from qadapter.judge.bradley_terry import BradleyTerryJudge
from qadapter.judge.endpoint import OpenAIJudge
from qadapter.judge.named import named_judge
from qadapter.judge.rules import RuleJudge
from qadapter.judge.verdicts import Judge, NoVoteError, Validation, WinRate

__all__ = [
    "BradleyTerryJudge",
    "Judge",
    "NoVoteError",
    "OpenAIJudge",
    "RuleJudge",
    "Validation",
    "WinRate",
    "named_judge",
]
