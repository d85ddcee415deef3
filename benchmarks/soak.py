"""Training and serving side by side for 90 minutes: are memory and handles flat?

    python benchmarks/soak.py runs/demo --output benchmarks/results/soak.json --draw docs/soak.svg

One `qadapter train` of endless epochs (anchors, trunk cache, evaluation, a checkpoint every few
steps) and one `qadapter serve` run until the time is up, the latter under questions at random
strengths of which a third are left in the middle; every answer is compared with the one that was
made alone. Every ten seconds the kernel is asked for each one's anonymous memory, open files and
threads, children included. The medians of the last quarter of the samples are set against those of
the second eighth: what is before belongs to starting. Then both get SIGTERM and have to end with 0.
Exit code 1 where anything grew, was lost or was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from load import Mixed, ask_all, contents, judge, mixed_questions, served

from qadapter.checkpoints import checkpoints, step_of
from qadapter.files import shipped
from qadapter.policy import Policy

STRENGTHS = (0.0, 0.5, 1.0, 2.0)
MAX_TOKENS = 20
GROWTH = 0.05
"""What a median may have grown by, of memory; files and threads may not grow at all."""


@dataclass(frozen=True)
class Sample:
    """What the kernel tells of a process and its children at one moment."""

    minutes: float
    anonymous_mib: float
    files: int
    threads: int


def sample(pid: int, begun: float) -> Sample | None:
    """Return one sample; None where the process, or one of its children, just ended."""
    try:
        one = psutil.Process(pid)
        everyone = [one, *one.children(recursive=True)]
        anonymous = 0
        for process in everyone:
            status = Path(f"/proc/{process.pid}/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            anonymous += int(line.split()[1])
        return Sample(
            round((time.monotonic() - begun) / 60, 3),
            round(anonymous / 1024, 1),
            sum(process.num_fds() for process in everyone),
            sum(process.num_threads() for process in everyone),
        )
    except (psutil.NoSuchProcess, OSError, StopIteration):
        return None


@contextmanager
def trained(directory: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a training that goes on until the block ends; it has to end well then."""
    options = {
        "data": shipped("demo.train.jsonl"),
        "eval_data": shipped("demo.dev.jsonl"),
        "anchor_data": shipped("anchors.txt"),
        "output": directory,
        "trunk": 0.75,
        "num_train_epochs": 100_000,
        "learning_rate": 1e-6,  # it is not to diverge in hundreds of epochs
        "lr_scheduler_type": "constant",
        "logging_steps": 5,
        "save_steps": 20,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 50,
        "disable_tqdm": "true",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "qadapter.cli", "train", *words]
    with open(log, "wb") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told)
    try:
        yield process
    finally:
        ended_before = process.poll() is not None
        process.send_signal(signal.SIGTERM)
        if code := process.wait(600):
            sys.exit(f"the training ended with {code}: see {log}")
        if ended_before:
            sys.exit(f"the training ended before its time: see {log}")


def steps_of(directory: Path) -> int:
    """Return how many steps a training's newest checkpoint has done."""
    return max(map(step_of, checkpoints(directory)), default=0)


def growth(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Return the medians after starting and at the end, by what was sampled.

    Raises:
        SystemExit: there are too few samples to tell.
    """
    if len(samples) < 40:
        sys.exit(f"{len(samples)} samples do not tell growth; let --minutes be 7 or more")
    n = len(samples)
    early, late = samples[n // 8 : n // 4], samples[-(n // 4) :]
    found = {}
    for what in ("anonymous_mib", "files", "threads"):
        before = float(np.median([getattr(s, what) for s in early]))
        after = float(np.median([getattr(s, what) for s in late]))
        found[what] = {"before": before, "after": after, "growth": round(after / before - 1, 4)}
    minutes = [s.minutes for s in samples[n // 8 :]]
    slope = np.polyfit(minutes, [s.anonymous_mib for s in samples[n // 8 :]], 1)[0]
    found["anonymous_mib"]["mib_per_hour"] = round(float(slope) * 60, 1)
    return found


def draw(samples: Mapping[str, list[Sample]], path: Path) -> None:
    """Write the picture: memory and open files against time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for name, found in samples.items():
        minutes = [s.minutes for s in found]
        axes[0].plot(minutes, [s.anonymous_mib for s in found], label=name)
        axes[1].plot(minutes, [s.files for s in found], label=name)
    axes[0].set(xlabel="minutes", ylabel="anonymous memory, MiB", ylim=(0, None))
    axes[1].set(xlabel="minutes", ylabel="open files", ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run both until the time is up, and write what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", help="directory that `qadapter train` wrote; it is served")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--concurrent", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    parser.add_argument("--draw", type=Path, help="write a picture here")
    args = parser.parse_args()
    asked = contents()[:20]
    policy = Policy.from_pretrained(args.adapter)
    alone = {
        (content, s): policy.answer(
            [[{"role": "user", "content": content}]], strength=s, max_new_tokens=MAX_TOKENS
        )[0]
        for content in asked
        for s in STRENGTHS
    }
    del policy
    samples: dict[str, list[Sample]] = {"training": [], "server": []}
    told = Mixed(0, 0, 0, 0, 0)
    place = Path(tempfile.mkdtemp(prefix="qadapter-soak-"))
    over = threading.Event()
    with (
        served(args.adapter, log=place / "serve.log") as (url, pid),
        trained(place / "run", place / "train.log") as training,
    ):
        begun = time.monotonic()

        def watch() -> None:
            while not over.wait(10):
                for name, watched in (("training", training.pid), ("server", pid)):
                    if taken := sample(watched, begun):
                        samples[name].append(taken)

        watcher = threading.Thread(target=watch)
        watcher.start()
        seed = 0
        while time.monotonic() - begun < 60 * args.minutes and training.poll() is None:
            seed += 1
            questions = mixed_questions(
                asked, 100, strengths=STRENGTHS, max_tokens=MAX_TOKENS, seed=seed
            )
            answers = asyncio.run(ask_all(url, questions, concurrent=args.concurrent))
            found = judge(questions, answers, alone)
            for what in ("requests", "left", "answered", "lost", "wrong"):
                setattr(told, what, getattr(told, what) + getattr(found, what))
            told.examples = [*told.examples, *found.examples][:5]
            state = {k: v[-1].anonymous_mib for k, v in samples.items() if v}
            minutes = (time.monotonic() - begun) / 60
            print(json.dumps({"minutes": round(minutes, 1), **asdict(told), **state}), flush=True)
        over.set()
        watcher.join()
        steps = steps_of(place / "run")
    grown = {name: growth(found) for name, found in samples.items()}
    flat = all(
        figures["growth"] <= (GROWTH if what == "anonymous_mib" else 0)
        for each in grown.values()
        for what, figures in each.items()
    )
    ok = flat and not told.lost and not told.wrong and steps > 0
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "minutes": args.minutes,
        "requests": asdict(told),
        "training_steps": steps,
        "grown": grown,
        "flat": flat,
        "samples": {name: [asdict(s) for s in found[::6]] for name, found in samples.items()},
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.draw:
        draw(samples, args.draw)
    print(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=1))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
