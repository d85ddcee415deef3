"""How a server bears load: throughput and latencies, and 1,000 requests of which many are left.

    python benchmarks/load.py runs/demo --output benchmarks/results/load.json
    python benchmarks/load.py --url http://127.0.0.1:8000 --model NAME     # any OpenAI server

Without --url it starts `qadapter serve` itself, on a free port of this machine, with an adapter or
else with a random one, whose answers seldom end before they have to, and also

- answers the same questions one at a time by `generate`, for the ratio to 16 at once;
- asks `--mixed` of them at random strengths, 32 at once, leaves a third of them in the middle, and
  compares each answer that it waited for with the one that `generate` gives alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2

CONCURRENT = (1, 8, 32)


@dataclass
class Told:
    """What one streamed answer was, and when its parts came, in seconds."""

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between one part and the next."""
    total: float = 0.0
    left: bool = False
    """We did not wait for its end."""
    error: str | None = None


@dataclass(frozen=True)
class Question:
    """What is asked, and how."""

    content: str
    strength: float | None
    """None does not send one."""
    max_tokens: int
    leave_after: int | None = None
    """Chunks after which the client leaves, 0 once it is taken; None waits."""


async def ask(client: httpx2.AsyncClient, question: Question, model: str | None) -> Told:
    """Return one greedy answer."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": question.content}],
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= {} if question.strength is None else {"strength": question.strength}
    body |= {} if model is None else {"model": model}
    told, began, ended = Told(), time.perf_counter(), False
    last = began
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return Told(error=f"status {response.status_code}")
            chunks = 0
            if question.leave_after == 0:
                return Told(left=True)
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    ended = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    return Told(error=event["error"]["message"])
                if event.get("usage"):
                    told.tokens = event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    chunks += 1
                    if not (text := choice["delta"].get("content")):
                        continue
                    told.text += text
                    now = time.perf_counter()
                    if told.first:
                        told.gaps.append(now - last)
                    told.first, last = told.first or now - began, now
                if question.leave_after is not None and chunks >= question.leave_after:
                    told.left = True
                    break
    except httpx2.HTTPError as error:
        return Told(error=repr(error))
    told.total = time.perf_counter() - began
    if not (ended or told.left):
        told.error = "the stream broke off"
    return told


async def ask_all(
    url: str, questions: Sequence[Question], *, concurrent: int, model: str | None = None
) -> list[Told]:
    """Return the answers, so many being asked for at any time."""
    places = asyncio.Semaphore(concurrent)
    limits = httpx2.Limits(max_connections=concurrent, max_keepalive_connections=concurrent)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(question: Question) -> Told:
            async with places:
                return await ask(client, question, model)

        return await asyncio.gather(*map(one, questions))


def mixed_questions(
    contents: Sequence[str], n: int, *, strengths: Sequence[float], max_tokens: int, seed: int = 0
) -> list[Question]:
    """Return questions at random strengths, a third of which are left in the middle."""
    draw = random.Random(seed)
    return [
        Question(
            draw.choice(contents),
            draw.choice(strengths),
            max_tokens,
            draw.randrange(max(2, max_tokens // 2)) if draw.random() < 1 / 3 else None,
        )
        for _ in range(n)
    ]


@dataclass
class Mixed:
    """What became of a mixed run."""

    requests: int
    left: int
    answered: int
    lost: int
    wrong: int
    examples: list[str] = field(default_factory=list)


def judge(
    questions: Sequence[Question],
    answers: Sequence[Told],
    alone: Mapping[tuple[str, float | None], str],
) -> Mixed:
    """Return how many answers are missing or differ from those that were made alone."""
    found = Mixed(len(questions), 0, 0, 0, 0)
    for question, told in zip(questions, answers, strict=True):
        expected = alone[question.content, question.strength]
        if told.error is not None:
            found.lost += 1
            found.examples.append(told.error)
        elif told.left:
            found.left += 1
            # What came before is to be right as well.
            right = expected.startswith(told.text.strip())
            found.wrong += not right
        else:
            found.answered += 1
            if told.text.strip() != expected:
                found.wrong += 1
                found.examples.append(f"{told.text!r} instead of {expected!r}")
    del found.examples[5:]
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile, the nearest value from above; nan of none."""
    ordered = sorted(values) or [math.nan]
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def figures(answers: Sequence[Told], seconds: float) -> dict[str, Any]:
    """Return throughput and latencies of answers that took so long together.

    A token's is the time between two parts of an answer: the one in a hundred that waits longest
    does so while other prompts are read.
    """
    good = [a for a in answers if a.error is None]
    gaps = [gap for a in good for gap in a.gaps]
    found: dict[str, Any] = {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "tokens_per_second": sum(a.tokens for a in good) / seconds,
        "tokens_an_answer": sum(a.tokens for a in good) / max(1, len(good)),
    }
    for name, values in (("first_token", [a.first for a in good if a.first]), ("token", gaps)):
        found |= {f"{name}_p50": percentile(values, 0.5), f"{name}_p99": percentile(values, 0.99)}
    return found


def resident(pid: int) -> float:
    """Return a process's resident memory, MiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found.group(1)) / 1024 if found else 0.0


@contextmanager
def served(adapter: str, *, log: Path) -> Iterator[tuple[str, int]]:
    """Yield address and process id of a server that is started for the block."""
    command = [sys.executable, "-m", "qadapter.cli", "serve", adapter, "--port", "0"]
    with open(log, "wb") as errors:
        process = subprocess.Popen([*command, "--max-queue", "2000"], stderr=errors)
    try:
        while True:
            lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
            found = [e for e in map(json.loads, lines) if e["event"] == "listening"]
            if found:
                break
            if process.poll() is not None:
                sys.exit(f"the server ended: see {log}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{found[0]['port']}", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        if code := process.wait(600):
            sys.exit(f"the server ended with {code}: see {log}")


def contents() -> list[str]:
    """Return the questions: those of the demo's held-out pairs."""
    from qadapter.files import shipped

    rows = [json.loads(line) for line in Path(shipped("demo.dev.jsonl")).read_text().splitlines()]
    return [row["prompt"][-1]["content"] for row in rows]


def write_adapter(directory: str | Path) -> None:
    """Write a random adapter on the last quarter of the layers; its answers seldom end."""
    import torch

    from qadapter import hub
    from qadapter.config import QConfig
    from qadapter.model import QAdapterModel

    base = hub.load_base(hub.DEFAULT_BASE, dtype=torch.float32)
    model = QAdapterModel.create(
        base, QConfig(alpha_0=0.5, alpha_tilde=0.5, base_model=hub.DEFAULT_BASE)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.adapter_parameters().values():
        parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)


def throughput(
    url: str,
    asked: Sequence[str],
    *,
    strengths: Sequence[float | None],
    max_tokens: int,
    model: str | None,
) -> list[dict[str, Any]]:
    """Return the figures of each concurrency and strength; the strengths take turns."""
    rows = []
    for concurrent in CONCURRENT:
        for strength in strengths:
            n = max(8, 2 * concurrent)
            questions = [Question(asked[i % len(asked)], strength, max_tokens) for i in range(n)]
            began = time.perf_counter()
            answers = asyncio.run(ask_all(url, questions, concurrent=concurrent, model=model))
            row = figures(answers, time.perf_counter() - began)
            rows.append({"concurrent": concurrent, "strength": strength, **row})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def against_generate(
    url: str, adapter: str, asked: Sequence[str], *, max_tokens: int
) -> list[dict[str, Any]]:
    """Return tokens a second of 16 questions at once and of `generate` one at a time, in turns.

    Each at strength 0 and at 1, where the demo's answers are short and more of the time is prompts.
    The base is also asked alone, as transformers runs it.
    """
    from qadapter.hub import load_base
    from qadapter.policy import Policy

    policy = Policy.from_pretrained(adapter)
    base = load_base(policy.model.q_config.base_model, dtype=policy.model.dtype)
    policy.answer([asked[0]], max_new_tokens=2)
    asked = asked[:16]

    def alone(model: Any, **strength: float) -> float:
        """Return a model's tokens a second, one question after another."""
        began, tokens = time.perf_counter(), 0
        for content in asked:
            ids = policy.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
            out = model.generate(
                **ids,
                **strength,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=sorted(policy.end_ids),
                pad_token_id=policy.tokenizer.pad_token_id,
            )
            tokens += out.shape[1] - ids["input_ids"].shape[1]
        return tokens / (time.perf_counter() - began)

    rows = []
    for _ in range(3):
        base_alone = alone(base)
        for strength in (0.0, 1.0):
            questions = [Question(content, strength, max_tokens) for content in asked]
            began = time.perf_counter()
            answers = asyncio.run(ask_all(url, questions, concurrent=16))
            found = figures(answers, time.perf_counter() - began)
            row = {
                "strength": strength,
                "tokens_an_answer": found["tokens_an_answer"],
                "server_at_16": found["tokens_per_second"],
                "generate": alone(policy.model, strength=strength),
                "base_generate": base_alone,
            }
            rows.append(row | {"ratio": row["server_at_16"] / row["generate"]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def mixed(url: str, pid: int, adapter: str, asked: Sequence[str], n: int) -> dict[str, Any]:
    """Return what became of `n` requests, and the server's memory before and after."""
    from qadapter.policy import Policy

    strengths, max_tokens = (0.0, 0.5, 1.0, 2.0), 20
    asked = asked[:20]
    policy = Policy.from_pretrained(adapter)
    alone = {
        (content, s): policy.answer(
            [[{"role": "user", "content": content}]], strength=s, max_new_tokens=max_tokens
        )[0]
        for content in asked
        for s in strengths
    }
    options: dict[str, Any] = {"strengths": strengths, "max_tokens": max_tokens}
    # A tenth first: a process that has just started has not yet asked for what it needs.
    warm = mixed_questions(asked, max(1, n // 10), seed=1, **options)
    asyncio.run(ask_all(url, warm, concurrent=32))
    before = resident(pid)
    questions = mixed_questions(asked, n, **options)
    answers = asyncio.run(ask_all(url, questions, concurrent=32))
    after = resident(pid)
    found = asdict(judge(questions, answers, alone))
    return {**found, "mib_before": before, "mib_after": after, "growth": after / before - 1}


def main() -> None:
    """Run what was asked for and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", nargs="?", help="directory that `qadapter train` wrote")
    parser.add_argument("--url", help="a server that runs already, up to and without /v1")
    parser.add_argument("--model", help="the model's name there")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--mixed", type=int, default=1000, help="requests of the mixed run")
    parser.add_argument("--skip", nargs="*", default=[], help="throughput, generate, mixed")
    parser.add_argument("--output", default="load.json")
    args = parser.parse_args()
    if args.adapter and args.url:
        parser.error("give an adapter or --url, not both")
    if args.skip and Path(args.output).exists():
        parser.error(f"{args.output} would lose what is skipped; give another --output")
    asked = contents()
    threads = os.environ.get("OMP_NUM_THREADS")
    found: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "threads": threads, "system": platform.platform()},
        "command": " ".join(sys.argv),
    }
    options: dict[str, Any] = {"max_tokens": args.max_tokens}
    if args.url:
        found["throughput"] = throughput(
            args.url, asked, strengths=[None], model=args.model, **options
        )
    else:
        log = Path(tempfile.gettempdir()) / "qadapter-load.log"
        with tempfile.TemporaryDirectory() as made:
            adapter = args.adapter or str(Path(made) / "random")
            if args.adapter is None:
                write_adapter(adapter)
            with served(adapter, log=log) as (url, pid):
                if "throughput" not in args.skip:
                    found["throughput"] = throughput(
                        url, asked, strengths=[0.0, 1.0], model=None, **options
                    )
                if "generate" not in args.skip:
                    found["generate"] = against_generate(url, adapter, asked, **options)
                if "mixed" not in args.skip:
                    found["mixed"] = mixed(url, pid, adapter, asked, args.mixed)
                    print(json.dumps(found["mixed"]), flush=True)
    Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
