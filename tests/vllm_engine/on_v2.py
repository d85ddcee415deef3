"""Answers of vLLM's model runner V2 to rows at strengths, as JSON: `python on_v2.py JOB ANSWERS`.

A process of its own, for Triton reads when it is imported that Python runs its kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from engines import BY_REQUEST, engine

HERE = Path(__file__).parent
_PLACES = [HERE / "interpreter", HERE, HERE.parent, HERE.parent / "tiny"]
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "TRITON_DEFAULT_BACKEND": "cpu",
    "VLLM_LOGGING_LEVEL": "INFO",  # it says which runner it takes
    "PYTHONPATH": os.pathsep.join([*map(str, _PLACES), os.environ.get("PYTHONPATH", "")]),
}
"""In which vLLM takes its model runner V2 on a CPU."""


class Found(NamedTuple):
    """What was answered, in the form of vLLM's answers as far as `engines.difference` looks."""

    answers: list[Any]
    preemptions: int


def ask(
    place: Path,
    directory: Path,
    rows: Sequence[Sequence[int]],
    strengths: Sequence[Any],
    *,
    tokens: int = 6,
    **options: Any,
) -> Found:
    """Return greedy answers to rows, each at its strength or, for None, the export's.

    Args:
        place: for files.
        directory: of the export.
    """
    job, out = place / "job.json", place / "answers.json"
    job.write_text(json.dumps([str(directory), rows, strengths, tokens, options]))
    words = [sys.executable, __file__, str(job), str(out)]
    done = subprocess.run(
        words, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Using V2 Model Runner" in done.stdout + done.stderr
    told, preemptions = json.loads(out.read_text())
    return Found([_answer(*one) for one in zip(rows, told, strict=True)], preemptions)


def _answer(row: Sequence[int], told: tuple[list[int], list[dict[str, float]]]) -> Any:
    tokens, log_probs = told
    rows = [{int(t): SimpleNamespace(logprob=x) for t, x in at.items()} for at in log_probs]
    said = SimpleNamespace(token_ids=tokens, logprobs=rows)
    return SimpleNamespace(prompt_token_ids=row, outputs=[said])


def main() -> None:
    """Answer a job."""
    from vllm import SamplingParams

    directory, rows, strengths, tokens, options = json.loads(Path(sys.argv[1]).read_text())
    plain: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    plain |= {"logprobs": 260, "detokenize": False}
    asked = [None if strength is None else {"strength": strength} for strength in strengths]
    params = [SamplingParams(**plain, extra_args=one) for one in asked]
    inputs = [{"prompt_token_ids": row} for row in rows]
    options |= {"logits_processors": [BY_REQUEST], "disable_log_stats": False}
    with engine(directory, **options) as llm:
        found = [answer.outputs[0] for answer in llm.generate(inputs, params, use_tqdm=False)]
        counts = {metric.name: metric for metric in llm.get_metrics()}
    told = [
        (list(said.token_ids), [{t: at.logprob for t, at in row.items()} for row in said.logprobs])
        for said in found
    ]
    Path(sys.argv[2]).write_text(json.dumps([told, counts["vllm:num_preemptions"].value]))


if __name__ == "__main__":
    main()
