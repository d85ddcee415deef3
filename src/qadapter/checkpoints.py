"""Checkpoints that are whole or are not used: each is sealed with the digests of its files."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN

from qadapter.errors import ArtefactError, ConfigError, UserError
from qadapter.files import damage, seal, why_not_written, write_text

RUN = "run.json"
"""Says of which run a checkpoint is."""


def step_of(checkpoint: Path) -> int:
    """Return the step of `checkpoint-STEP`."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, the newest last, whole or not."""
    named = re.compile(r"checkpoint-[0-9]+")
    return sorted((p for p in run.glob("checkpoint-*") if named.fullmatch(p.name)), key=step_of)


def newest_sound(run: Path) -> tuple[Path | None, list[str]]:
    """Return a run's newest checkpoint that is whole, and a sentence of each newer one."""
    found = checkpoints(run)
    passed: list[str] = []
    for checkpoint in reversed(found):
        wrong = damage(checkpoint)
        if wrong is None:
            lost = step_of(found[-1]) - step_of(checkpoint)
            if passed:
                passed.append(f"going on from {checkpoint}: up to {lost} steps are done again")
            return checkpoint, passed
        passed.append(f"{checkpoint}: {wrong}; it is not used")
    return None, passed


class SealingTrainer(Trainer):
    """transformers' Trainer, whose checkpoints are sealed and which ends on SIGTERM with one."""

    stopped = False
    """Whether SIGTERM ended the last run."""
    beside: Mapping[str, str] = MappingProxyType({})
    """What checkpoints hold beside, as text by file name."""

    def identity(self) -> dict[str, Any]:
        """Return what a run must share with a checkpoint to go on from it, as JSON holds it."""
        return {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does; SIGTERM saves a checkpoint after the step and ends it."""
        self.stopped = False
        if threading.current_thread() is not threading.main_thread():
            return super().train(*args, **kwargs)  # only the main thread hears signals
        stop = _StopsOnSignal(self)
        # First, so that a budget sees the checkpoint that it asks for.
        self.callback_handler.callbacks.insert(0, stop)
        before = signal.signal(signal.SIGTERM, stop.hear)
        try:
            return super().train(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, before)
            self.remove_callback(stop)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        checkpoint = run / f"checkpoint-{self.state.global_step}"
        limit = self.args.save_total_limit
        if self.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)  # what a cut run left of the same step
        self.accelerator.wait_for_everyone()
        # Older ones go only after this one is sealed.
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for name, text in self.beside.items():
                    write_text(checkpoint / name, text)
                write_text(checkpoint / RUN, json.dumps(self.identity(), indent=1) + "\n")
                seal(checkpoint)
        except Exception as error:
            told = error.__cause__ if isinstance(error, UserError) else error
            reason = why_not_written(told or error, run)
            shutil.rmtree(checkpoint, ignore_errors=True)
            if reason is None:
                raise
            raise UserError(
                f"{checkpoint}: cannot be written ({reason}); free some space, then go on from the "
                "last one by --resume_from_checkpoint true."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit is not None and limit > 0:
            self._delete_older(checkpoint, limit)

    def _delete_older(self, newest: Path, limit: int) -> None:
        """Leave so many checkpoints: the newest, the best, and of those before it the last.

        Any with a later step are left: they are damaged, or of a run that went on from elsewhere.
        """
        best = self._best()
        protected = {p.resolve() for p in (newest, best) if p is not None}
        older = [
            p
            for p in checkpoints(newest.parent)
            if step_of(p) < step_of(newest) and p.resolve() not in protected
        ]
        for checkpoint in older[: max(0, len(older) - max(0, limit - len(protected)))]:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _best(self) -> Path | None:
        best = self.state.best_model_checkpoint
        return Path(best) if best else None

    def _load_best_model(self) -> None:
        best = self._best()
        if best is None:
            return
        if wrong := damage(best):
            raise ArtefactError(
                f"{best}: {wrong}; it was the best one: go on from the last by "
                "--resume_from_checkpoint true --load_best_model_at_end false."
            )
        self._load_from_checkpoint(str(best))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        limit = self.args.save_total_limit
        if self.stopped:  # transformers would leave the best one and delete that to go on from
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _check_same_run(self, checkpoint: Path) -> None:
        """Refuse to go on from another run's checkpoint: half of one is no result of the other."""
        try:
            noted = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
            then = {name: noted[name] for name in self.identity()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{checkpoint}: does not say of which run it is ({RUN}); start anew."
            ) from error
        other = [f"{n} {then[n]} and not {v}" for n, v in self.identity().items() if v != then[n]]
        if other:
            raise ConfigError(
                f"resume_from_checkpoint: {checkpoint} is of a run with {', '.join(other)}; give "
                "what it had, or leave it out and name another --output to start anew."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        names = (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN)
        if checkpoint and not (
            self.is_deepspeed_enabled or any((Path(checkpoint) / n).is_file() for n in names)
        ):  # transformers would begin with a new one
            raise no_optimizer(checkpoint)
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_callback_state(self) -> None:
        # Early stopping counts on. transformers' own way would restore the order to stop, too.
        kept: Any = self.state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        for callback in self.callback_handler.callbacks:
            if kept and isinstance(callback, EarlyStoppingCallback):
                count = kept["attributes"]["early_stopping_patience_counter"]
                callback.early_stopping_patience_counter = count

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)


class _StopsOnSignal(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Ends a run after the step in which the signal came, with a checkpoint."""

    def __init__(self, trainer: SealingTrainer) -> None:
        self._trainer, self._heard = trainer, False

    def hear(self, *_: Any) -> None:
        self._heard = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        accelerator, heard = self._trainer.accelerator, self._heard
        if accelerator.num_processes > 1:  # all end after the same step, whoever heard it
            counts = torch.tensor([int(heard)], device=accelerator.device)
            heard = bool(accelerator.gather(counts).any())
        if heard and state.global_step < state.max_steps:
            self._trainer.stopped = control.should_save = control.should_training_stop = True


def no_optimizer(checkpoint: str | Path) -> ArtefactError:
    """Return what is told of a checkpoint from which nothing can go on."""
    return ArtefactError(
        f"{checkpoint}: holds no state of the optimizer, as save_only_model leaves it; nothing can "
        "go on from it."
    )


@contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """Turn what torch says of a file it will not or cannot read into an ArtefactError.

    They are read with `weights_only`, so code in them is refused and not run.
    """
    try:
        yield
    except (EOFError, OSError, RuntimeError, UnpicklingError, ValueError) as error:
        # torch's own advice would be to run what is in it.
        unsafe = isinstance(error, UnpicklingError)
        reason = "it holds more than numbers" if unsafe else " ".join(str(error).split())[:200]
        raise ArtefactError(
            f"{checkpoint}: the state of optimizer, scheduler or random numbers cannot be read "
            f"({reason}); resume from an older checkpoint."
        ) from error
