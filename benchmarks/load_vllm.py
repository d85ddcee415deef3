"""What a policy costs on vLLM: throughput and latencies beside the base's, both on vLLM.

    .venv-vllm/bin/python benchmarks/load_vllm.py --dtype bfloat16 --turns 7

Servers of the base and, at each strength, of the export of a policy on the last quarter whose
adapter is random (its answers, as the base's, seldom end before they have to), started alike and
asked in turns, each turn in another order; the ratio is of turns side by side. The base is there
twice: what it is to itself is what this cannot tell from nothing. While one is asked the others are
stopped, for a server that waits takes time from one that works. Run it in the environment of `make
test-vllm`, on a machine that does nothing else, and leave the server and the client a core of their
own (`OMP_NUM_THREADS=1` on two), as vLLM advises.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
from load import Question, ask_all, contents, figures, write_adapter

from qadapter import hub


def everyone(pid: int) -> list[psutil.Process]:
    """Return a process and those that it started, and they; none if it is gone."""
    try:
        one = psutil.Process(pid)
        return [one, *one.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def running(words: Sequence[str], port: int, log: Path) -> Iterator[tuple[str, int]]:
    """Yield address and process id of a server that runs for the block."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("w") as said:
        # Sessions of their own: the scheduler is fair to sessions, not to processes.
        process = subprocess.Popen(
            words, stdout=said, stderr=said, env=settings | os.environ, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"a server ended: see {log}")
            try:
                httpx2.get(url + "/health", timeout=5).raise_for_status()
                break
            except httpx2.HTTPError:
                time.sleep(1)
        yield url, process.pid
    finally:
        for one in everyone(process.pid):  # what is stopped cannot end
            one.resume()
        process.send_signal(signal.SIGTERM)
        process.wait(120)


@contextmanager
def awake(pid: int) -> Iterator[None]:
    """Let a server run for the block that is stopped otherwise."""
    for process in everyone(pid):
        process.resume()
    try:
        yield
    finally:
        for process in everyone(pid):
            process.suspend()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def turn(url: str, asked: Sequence[str], concurrent: int, max_tokens: int) -> dict[str, Any]:
    """Return the figures of twice as many questions as are asked at once, at least eight."""
    n = max(8, 2 * concurrent)
    questions = [Question(asked[i % len(asked)], None, max_tokens) for i in range(n)]
    began = time.perf_counter()
    answers = asyncio.run(ask_all(url, questions, concurrent=concurrent, model="it"))
    return figures(answers, time.perf_counter() - began)


def main() -> None:
    """Start them, ask them in turns, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--strengths", nargs="+", default=["1", "0.7"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--vllm-args", default="--max-model-len 1024", help="for all servers")
    parser.add_argument("--output", default="load_vllm.json")
    args = parser.parse_args()
    asked = contents()
    found: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "command": " ".join(sys.argv),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "rows": [],
        "ratios": [],
    }
    with tempfile.TemporaryDirectory() as made, ExitStack() as servers:
        adapter = Path(made) / "it"
        write_adapter(adapter)
        export = Path(made) / "export"
        words = [sys.executable, "-m", "qadapter.cli", "export", str(adapter), str(export)]
        subprocess.run([*words, "--dtype", args.dtype], check=True)
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--dtype", args.dtype]
        server += ["--served-model-name", "it", "--max-num-seqs", "32", *args.vllm_args.split()]
        base = [*server, "--model", hub.resolve_base(hub.DEFAULT_BASE)]
        own = [*server, "--model", str(export), "--hf-overrides"]
        others = {
            f"policy at {s}": [*own, json.dumps({"strength": float(s)})] for s in args.strengths
        }
        others = {"base again": base, **others}
        started = {}
        for name, words in {"base": base, **others}.items():
            port, log = free_port(), Path(tempfile.gettempdir()) / f"load-vllm-{name}.log"
            url, pid = started[name] = servers.enter_context(
                running([*words, "--port", str(port)], port, log)
            )
            with awake(pid):
                turn(url, asked, 8, 8)
        for concurrent in args.concurrent:
            ratios: dict[str, list[float]] = {name: [] for name in others}
            for number in range(args.turns):
                turns = {}
                order = list(started)
                for name in [*order[number % len(order) :], *order[: number % len(order)]]:
                    url, pid = started[name]
                    with awake(pid):
                        turns[name] = turn(url, asked, concurrent, args.max_tokens)
                    row = {"what": name, "concurrent": concurrent, **turns[name]}
                    found["rows"].append(row)
                    print(json.dumps(row), flush=True)
                for name, several in ratios.items():
                    speeds = [turns[which]["tokens_per_second"] for which in (name, "base")]
                    several.append(speeds[0] / speeds[1])
            for name, several in ratios.items():
                ends = {"least": min(several), "most": max(several)}
                ratio = {"what": name, "concurrent": concurrent, **ends}
                found["ratios"].append({**ratio, "median": statistics.median(several)})
                print(json.dumps(found["ratios"][-1]), flush=True)
    Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
