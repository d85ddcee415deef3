"""The real model in two processes beside one, on the same global batches.

    python benchmarks/two_processes.py [--output benchmarks/results/two_processes.csv]

Trains SmolLM2-135M-Instruct on 16 short pairs, two a step, in float32: in one process, and by
`qadapter train --launch` in two over gloo, with `configs/ddp.yaml` and `configs/fsdp.yaml`; then
both of these again from the checkpoint in the middle. Writes one row a run: the largest difference
from the one process's loss curve and adapter, and, of a resumed run, from the run that was not cut.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
STEPS = 4
SETTINGS = (
    "--max_length 128 --truncate true --learning_rate 2e-3 --warmup_steps 0 --max_pairs 8 "
    "--trunk 0.9 --lora_r 4 --bf16 false --logging_steps 1 --disable_tqdm true --seed 3 "
    f"--save_steps {STEPS // 2} --cache_trunk false --max_steps {STEPS} --anchor_weight 0"
)


def train(out: Path, data: Path, *words: str) -> None:
    """Run `qadapter train`; what it says goes to this program's stderr."""
    command = [sys.executable, "-m", "qadapter.cli", "train", *SETTINGS.split(), *words]
    subprocess.run([*command, "--data", str(data), "--output", str(out)], check=True, stdout=2)


def losses(out: Path) -> list[float]:
    """Return the logged loss of each step."""
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def apart(one: Path, other: Path) -> tuple[float, float]:
    """Return the largest difference of two runs' losses and of their adapters' weights."""
    name = "adapter_model.safetensors"
    a, b = load_file(one / name), load_file(other / name)
    weights = max(float((a[key] - b[key]).abs().max()) for key in a.keys() | b.keys())
    curve = max(abs(x - y) for x, y in zip(losses(one), losses(other), strict=True))
    return curve, weights


def main() -> None:
    """Train five times and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results/two_processes.csv")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work, data = Path(scratch), Path(scratch) / "pairs.jsonl"
        source = ROOT / "src/qadapter/data_files/demo.train.jsonl"
        with open(source, encoding="utf-8") as lines:
            data.write_text("".join(islice(lines, 8)), encoding="utf-8")
        one = work / "one"
        train(one, data, "--per_device_train_batch_size", "2")
        learned = load_file(one / "adapter_model.safetensors")
        largest = max(float(tensor.abs().max()) for tensor in learned.values())
        for name in ("ddp", "fsdp"):
            out, again = work / name, work / f"{name}_resumed"
            launch = ["--launch", str(ROOT / "configs" / f"{name}.yaml")]
            launch += ["--per_device_train_batch_size", "1"]
            train(out, data, *launch)
            curve, weights = apart(one, out)
            rows.append([f"{name}, 2 processes", "one process", curve, weights, largest])
            shutil.copytree(out / f"checkpoint-{STEPS // 2}", again / f"checkpoint-{STEPS // 2}")
            train(again, data, *launch, "--resume_from_checkpoint", "true")
            curve, weights = apart(out, again)
            rows.append([f"{name}, resumed", f"{name}, not cut", curve, weights, largest])
    with open(args.output, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["run", "beside", "loss differs by", "weights differ by", "largest weight"])
        table.writerows(rows)
    print(Path(args.output).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
