"""Memory and time of `qadapter check` and `qadapter train`'s first steps, by number of pairs.

    python benchmarks/data_scale.py --output benchmarks/results/data_scale.json

Each command runs as a user runs it, in a process of its own, training with two workers. Two peaks
are taken of all its processes together: anonymous memory (RssAnon), which nothing but their end
gives back, and all resident memory (RSS), in which the pages of mapped files count, once for each
process, though the kernel drops them when it needs room. So the first is what has to be flat.
Sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from qadapter import hub


def tiny_base(directory: Path) -> Path:
    """Write a two-layer Llama with a byte tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<end>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def write_pairs(path: Path, count: int) -> None:
    """Write so many short pairs, all different."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no, {i % 97}"}
            file.write(json.dumps(row) + "\n")


def memory(pid: int) -> dict[str, int]:
    """Return the sizes that the kernel tells of a process, KiB; none if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {f.split(":")[0]: int(f.split()[1]) for f in lines if f.startswith(("Rss", "VmRSS"))}


def children(pid: int) -> list[psutil.Process]:
    """Return the processes that a process started, and those that they did."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def peaks(command: list[str], cache: Path) -> dict[str, float]:
    """Run a command and return its seconds and peaks in MiB."""
    environment = {**os.environ, "QADAPTER_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    begun, anonymous, resident = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=told)
        while process.poll() is None:
            found = [memory(process.pid), *(memory(c.pid) for c in children(process.pid))]
            anonymous = max(anonymous, sum(f.get("RssAnon", 0) for f in found))
            resident = max(resident, sum(f.get("VmRSS", 0) for f in found))
            time.sleep(0.05)
        seconds = time.perf_counter() - begun
        if process.returncode:
            told.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{told.read()}")
    figures = {"anonymous_mib": anonymous / 1024, "rss_mib": resident / 1024, "seconds": seconds}
    return {name: round(value, 1) for name, value in figures.items()}


def measured(count: int, directory: Path, base: Path) -> dict[str, dict[str, float]]:
    """Return the peaks of both commands on so many pairs."""
    data = directory / f"{count}.jsonl"
    write_pairs(data, count)
    command = [sys.executable, "-m", "qadapter.cli"]
    options = "--max_steps 20 --max_length 64 --tokens_per_batch 512 --dataloader_num_workers 2"
    quiet = "--bf16 false --use_cpu true --save_strategy no --disable_tqdm true --lora_r 4"
    quiet += " --anchor_weight 0"
    out = str(directory / f"out{count}")
    both = {
        "check": f"check {data} --model {base} --max-length 64",
        "train": f"train --data {data} --model {base} --output {out} {options} {quiet}",
    }
    return {
        name: peaks([*command, *words.split()], directory / "cache") for name, words in both.items()
    }


def main() -> None:
    """Measure each number of pairs and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    figures: dict[str, object] = {"machine": f"{hub.processor()}, {os.cpu_count()} CPUs"}
    with tempfile.TemporaryDirectory() as directory:
        base = tiny_base(Path(directory) / "base")
        runs = {n: measured(n, Path(directory), base) for n in args.pairs}
        figures["left_in_cache"] = [
            p.name for p in (Path(directory) / "cache" / "pairs").iterdir() if p.name != ".lock"
        ]
    figures["pairs"] = runs
    few, many = runs[args.pairs[0]], runs[args.pairs[-1]]
    figures["ratios"] = {
        name: {what: round(many[name][what] / few[name][what], 3) for what in few[name]}
        for name in few
    }
    text = json.dumps(figures, indent=1) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
