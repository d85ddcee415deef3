"""Kill a training run again and again; it must end with the adapter of an undisturbed one.

    python tests/tiny/chaos.py KILLS SEED OUTPUT WORD...

The words are those of `qadapter train`. Each attempt is a forked process that goes on from the last
sound checkpoint and dies by SIGKILL at a moment drawn at random, until so many have died; then one
is let finish. Four of five find no trunk cache, so that kills fall into its writing, too. Prints
one line of JSON: how many died, in the midst of what, and how many different adapters came of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import qadapter.train
from qadapter import checkpoints, files
from qadapter.cli import main

ADAPTER = "adapter_model.safetensors"
TRUNK = files.cache_dir() / "trunk"
SLOWEST = 120.0
"""Seconds after which an attempt is thought to hang."""


def attempt(words: list[str], output: Path, kill_after: float | None) -> tuple[int | None, float]:
    """Run once; return the exit code, None if it was killed, and how long it ran."""
    if any(output.glob("checkpoint-*")) and checkpoints.newest_sound(output)[0]:
        words = [*words, "--resume_from_checkpoint", "true"]
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os._exit(main(words))
    while True:
        ran = time.perf_counter() - start
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), ran
        if ran > (kill_after if kill_after is not None else SLOWEST):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if kill_after is None:
                raise SystemExit(f"an attempt ran for more than {SLOWEST:g} seconds")
            return None, ran
        time.sleep(0.002)


def state(output: Path) -> str:
    """Return what the killed attempt leaves."""
    found = checkpoints.checkpoints(output)
    if not found:
        return "before a checkpoint"
    return "between checkpoints" if files.damage(found[-1]) is None else "in a checkpoint"


def cached() -> str:
    """Return how much of the trunk cache the killed attempt leaves."""
    sums = [torch.frombuffer(p.read_bytes(), dtype=torch.int64) for p in TRUNK.rglob("sums.bin")]
    if not sums:
        return "none"
    written = torch.cat(sums) != 0
    return "whole" if written.all() else "partly written" if written.any() else "empty"


def run(kills: int, seed: int, output: Path, words: list[str]) -> dict[str, object]:
    """Kill so many attempts, then let one finish."""
    draw, died, left = random.Random(seed), 0, Counter[str]()
    caches = Counter[str]()
    ended: set[str] = set()
    words = ["train", *words, "--output", str(output)]
    # How long an undisturbed attempt takes, from one that is thrown away.
    code, whole = attempt([*words[:-1], str(output) + ".timed"], Path(str(output) + ".timed"), None)
    if code:
        raise SystemExit(f"the undisturbed run ended with {code}")
    while died < kills:
        if draw.random() < 0.8:
            shutil.rmtree(TRUNK, ignore_errors=True)
        code, ran = attempt(words, output, draw.uniform(0.05, 1.0) * whole)
        if code is None:
            died += 1
            left[state(output)] += 1
            caches[cached()] += 1
        elif code:
            raise SystemExit(f"an attempt of {ran:.1f} s ended with {code}")
        else:  # it was faster than its killer: the next begins anew
            ended.add(files.sha256(output / ADAPTER))
            shutil.rmtree(output)
    code, _ = attempt(words, output, None)
    if code:
        raise SystemExit(f"the last attempt ended with {code}")
    ended.add(files.sha256(output / ADAPTER))
    return {"kills": died, "left": left, "cache": caches, "adapters": len(ended)}


if __name__ == "__main__":
    assert qadapter.train  # imported before the first fork, so that attempts begin at once
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
