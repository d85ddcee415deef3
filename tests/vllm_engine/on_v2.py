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
from typing import Any

from engines import engine

from qadapter.vllm_plugin import BY_REQUEST

HERE = Path(__file__).parent
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "TRITON_DEFAULT_BACKEND": "cpu",
    "PYTHONPATH": os.pathsep.join(
        map(str, (HERE / "interpreter", HERE, HERE.parent, HERE.parent / "tiny"))
    ),
}
"""In which vLLM takes its model runner V2 on a CPU."""


def asked(
    directory: Path, rows: Sequence[Sequence[int]], strengths: Sequence[Any], **options: Any
) -> list[Any]:
    """Return greedy answers to rows, each at its strength or, for None, the export's.

    They look like vLLM's, as far as `engines.difference` looks.
    """
    job, answers = directory / "job.json", directory / "answers.json"
    job.write_text(json.dumps([str(directory), rows, strengths, options]))
    words = [sys.executable, __file__, str(job), str(answers)]
    done = subprocess.run(
        words, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Using V2 Model Runner" in done.stdout + done.stderr
    return [
        SimpleNamespace(
            prompt_token_ids=row,
            outputs=[
                SimpleNamespace(
                    token_ids=tokens,
                    logprobs=[
                        {int(t): SimpleNamespace(logprob=found) for t, found in at.items()}
                        for at in log_probs
                    ],
                )
            ],
        )
        for row, (tokens, log_probs) in zip(rows, json.loads(answers.read_text()), strict=True)
    ]


def main() -> None:
    """Answer a job."""
    from vllm import SamplingParams

    directory, rows, strengths, options = json.loads(Path(sys.argv[1]).read_text())
    plain: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    params = [
        SamplingParams(
            **plain,
            logprobs=260,
            detokenize=False,
            extra_args=None if strength is None else {"strength": strength},
        )
        for strength in strengths
    ]
    inputs = [{"prompt_token_ids": row} for row in rows]
    with engine(directory, logits_processors=[BY_REQUEST], **options) as llm:
        found = [answer.outputs[0] for answer in llm.generate(inputs, params, use_tqdm=False)]
    told = [
        (list(said.token_ids), [{t: at.logprob for t, at in row.items()} for row in said.logprobs])
        for said in found
    ]
    Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
