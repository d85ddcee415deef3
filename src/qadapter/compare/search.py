"""How a comparison chooses a method's settings: as many trials for each, judged by one rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from qadapter.compare.config import CompareConfig
from qadapter.compare.methods import Choice, Method, Params, Range, Space, Value
from qadapter.compare.running import Run, tried

SEED = 0
"""Of the search, and of what it trains."""
_STARTUP = 4
"""Trials before TPE has enough to go by: the defaults, then random ones."""
_ASKINGS = 10
"""How often a setting that was tried is asked for again: TPE proposes what it likes twice."""
_NOTHING_LEARNED = 1e6
"""Nats a token for a nat of margin: more than anything that learned."""


def searched(run: Run, name: str, method: Method) -> dict[str, Any]:
    """Search the method's settings on the validation pairs, by Optuna's TPE.

    It begins with the method's defaults at one and at two epochs, in which Replay has one of its
    kinds each, and then has what other pairings there are at random rates; a setting that was tried
    is not tried again while others come up. Two aims, accuracy and a
    low `kl_of_one_nat`. Chosen is, of the settings whose accuracy is within one standard error of
    the best, the one with the least of it: a search for accuracy alone would pick among equals by
    noise, and so make any method's forgetting a matter of luck. Settings that the comparison gives
    are not searched.
    """
    given = _given(method, run.config.settings.get(name, {}))
    space = {k: v for k, v in method.space.items() if k not in given}
    if trials_of(run.config, name, method) == 0:
        best = {**method.defaults, **given}
        return {"sampler": None, "space": {}, "trials": [], "best": best}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=SEED, n_startup_trials=_STARTUP),
    )
    start = {k: v for k, v in method.defaults.items() if k in space}
    kinds = {k: v.values for k, v in space.items() if isinstance(v, Choice)}
    first = [*zip(*kinds.values(), strict=False)] or [()]
    others = [chosen for chosen in product(*kinds.values()) if chosen not in first]
    for chosen in (*first, *others):
        numbers = start if chosen in first else {}
        study.enqueue_trial({**numbers, **dict(zip(kinds, chosen, strict=True))})
    trials: list[dict[str, Any]] = []
    for i in range(run.config.trials):
        trial, params = _asked(study, space, given, trials)
        if found := tried(run, name, params, SEED, f"{name} trial {i}"):
            point = found["points"][0]
            figures = {k: point[k] for k in ("accuracy", "accuracy_ci", "kl", "margin")}
            figures["kl_of_one_nat"] = kl_of_one_nat(point["kl"], point["margin"])
            told = {"state": "complete", "seconds": found["seconds"], **figures}
        else:
            told = {"state": "failed", "seconds": 0.0}
        trials.append({"params": params, **told})
        _tell(study, trial, told)
    return {
        "sampler": _sampler(run.config.trials),
        "space": {k: str(v) for k, v in space.items()},
        "trials": trials,
        "best": one_standard_error(trials),
    }


def _asked(
    study: Any, space: Space, given: Params, trials: Sequence[Mapping[str, Any]]
) -> tuple[Any, Params]:
    """Return a trial and its settings: not those of an earlier one, unless nothing else comes."""
    for left in reversed(range(_ASKINGS)):
        trial = study.ask({k: _distribution(v) for k, v in space.items()})
        params = {**given, **{k: _rounded(v) for k, v in trial.params.items()}}
        earlier = next((t for t in trials if t["params"] == params), None)
        if earlier is None or not left:
            break
        _tell(study, trial, earlier)
    return trial, params


def _tell(study: Any, trial: Any, told: Mapping[str, Any]) -> None:
    from optuna.trial import TrialState

    if told["state"] == "complete":
        study.tell(trial, (told["accuracy"], told["kl_of_one_nat"]))
    else:
        study.tell(trial, state=TrialState.FAIL)


def trials_of(config: CompareConfig, name: str, method: Method) -> int:
    """Return how many settings are tried: none where all are given."""
    return config.trials if set(method.space) - set(config.settings.get(name, {})) else 0


def _sampler(trials: int) -> str:
    if trials <= _STARTUP:
        return "the defaults, then random settings"
    return f"optuna TPESampler, the first {_STARTUP} trials without it"


def kl_of_one_nat(kl: float, margin: float) -> float:
    """Return KL/margin², what a margin of one nat costs along the dial.

    To second order KL grows with the square of the adapter's weight where the margin grows with the
    weight, so the size that a setting happens to be trained to hardly matters to it. KL alone would
    choose the most timid settings, and a method would be judged by how far those can be turned up.
    What learned nothing, or the contrary, costs `_NOTHING_LEARNED`.
    """
    return min(kl / margin**2, _NOTHING_LEARNED) if margin > 0 else _NOTHING_LEARNED


def one_standard_error(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the settings with the least `kl_of_one_nat` within one SE of the best accuracy.

    The standard error is what the accuracy lies above its 95% interval's lower end, over 1.96.
    """
    done = [t for t in trials if t["state"] == "complete"]
    if not done:
        return None
    best = max(done, key=lambda t: t["accuracy"])
    mark = best["accuracy"] - (best["accuracy"] - best["accuracy_ci"][0]) / 1.96
    good = (t for t in done if t["accuracy"] >= mark)
    return dict(min(good, key=lambda t: t["kl_of_one_nat"])["params"])


def _given(method: Method, settings: Mapping[str, float | str]) -> Params:
    """Return given settings as the search would have them, so that they make the same cells."""

    def told(values: Range | Choice, value: float | str) -> Value:
        whole = isinstance(values, Choice) and isinstance(value, float) and value.is_integer()
        return int(value) if whole else value

    return {name: told(method.space[name], value) for name, value in settings.items()}


def _distribution(space: Range | Choice) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(space, Range):
        return FloatDistribution(space.low, space.high, log=True)
    return CategoricalDistribution(space.values)


def _rounded(value: Any) -> Any:
    """Return a searched number in three digits, as the report shows it."""
    return float(f"{value:.3g}") if isinstance(value, float) else value
