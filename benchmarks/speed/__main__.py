"""How fast, how large, how good: Q-Adapter beside TRL's DPOTrainer and the authors' computation.

    python benchmarks/speed --output benchmarks/results/speed.json --draw docs/speed.svg

Every case runs in a process of its own; the cases of a repeat come one after another, then the next
repeat. What the JSONL beside the output holds is not run again, so a cut run goes on; rows of other
code or of another machine are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from measured import origin, read_rows

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
SECTIONS = ("training", "estimate", "gemm", "decoding", "profile", "growth", "quality")


TRL_SWEEP = {
    "float32": {"weights": "float32", "autocast": False, "precompute": False},
    "float32, precomputed": {"weights": "float32", "autocast": False, "precompute": True},
    "bf16 autocast": {"weights": "float32", "autocast": True, "precompute": False},
    "bf16 weights": {"weights": "bfloat16", "autocast": True, "precompute": False},
    "bf16 autocast, precomputed": {"weights": "float32", "autocast": True, "precompute": True},
    "bf16 weights, precomputed": {"weights": "bfloat16", "autocast": True, "precompute": True},
}


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    section: str
    name: str
    function: str
    """Name of the function in `FUNCTIONS` of `run_case`."""
    options: dict[str, Any]
    """Its arguments."""
    once: bool = False
    """Not repeated."""


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    repeats: int
    pairs: int
    slow_pairs: int
    seed: int
    quality_pairs: int
    held_out: int
    text_tokens: int = 10_000
    sweep_pairs: int = 8
    sweep: tuple[str, ...] = tuple(TRL_SWEEP)
    gemm: tuple[int, ...] = (1024, 2048, 4096)
    gemm_repeats: int = 5
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 128
    new: int = 32
    rounds: int = 2
    steps: int = 3
    tokens: tuple[int, ...] = (128, 256, 512, 1024)
    depths: tuple[int, ...] = (2, 4, 8, 15, 30)
    words: tuple[int, ...] = (32_768, 131_072, 262_144)
    runs: tuple[int, ...] = (8, 16, 32)

    def quick(self) -> Sizes:
        """Return the least with which every section still runs."""
        return dataclasses.replace(
            self,
            repeats=1,
            pairs=4,
            slow_pairs=4,
            quality_pairs=8,  # two steps: the first warms up, at a learning rate of 0
            held_out=4,
            text_tokens=512,
            sweep=self.sweep[-1:],
            gemm=(512, 1024),
            gemm_repeats=2,
            batches=(1, 2),
            prompt=16,
            new=8,
            rounds=1,
            steps=1,
            tokens=(128, 256),
            depths=(2, 4),
            words=(32_768, 65_536),
            runs=(4, 8),
        )


def not_run(bf16: bool) -> dict[str, str]:
    """Return the settings of TRL that were left out, and why."""
    reasons = {} if bf16 else {"bf16": "emulated on this device, some hundred times slower"}
    reasons |= {
        "padding_free": "trl 1.16 warns and falls back to padding",
        "use_kernels": "kernels come from the Hub and are for accelerators",
        "gradient_checkpointing": "TRL's default, but slower; off in every run",
    }
    try:
        import liger_kernel  # noqa: F401
    except ImportError as error:
        reasons["use_liger_kernel"] = f"{error}; its kernels are Triton's and need an accelerator"
    return reasons


def sweep_cases(sizes: Sizes) -> list[Case]:
    """Return DPOTrainer's configurations, each on a few pairs."""
    shared = {"layers": 30, "pairs": sizes.sweep_pairs, "of": sizes.pairs, "seed": sizes.seed}
    return [
        Case("training", f"sweep {name}", "trl", {**shared, **TRL_SWEEP[name]}, once=True)
        for name in sizes.sweep
    ]


def training_cases(sizes: Sizes, trl: dict[str, Any]) -> list[Case]:
    """Return the interleaved training cases; `trl` is DPOTrainer's best configuration."""
    fast = {"pairs": sizes.pairs, "of": sizes.pairs, "seed": sizes.seed, "epochs": 2}
    slow = {"pairs": sizes.slow_pairs, "of": sizes.pairs, "seed": sizes.seed}
    two_pass = {**slow, "epochs": 1, "two_pass": True}
    return [
        Case("training", "ours_k8", "ours", {**fast, "layers": 8}),
        Case("training", "trl_best", "trl", {**slow, **trl, "layers": 30}),
        Case("training", "ours_k30", "ours", {**fast, "layers": 30}),
        Case("training", "trl_k8", "trl", {**slow, **trl, "layers": 8}),
        Case("training", "authors_k30", "ours", {**two_pass, "layers": 30}),
        Case("training", "authors_k8", "ours", {**two_pass, "layers": 8}),
    ]


def estimate_cases(sizes: Sizes) -> list[Case]:
    """Return the dry runs, to be set beside what was then measured."""
    shared = {"pairs": sizes.pairs, "seed": sizes.seed}
    return [
        Case("estimate", f"ours_k{layers}", "foretold", {**shared, "layers": layers})
        for layers in (8, 30)
    ]


def decoding_cases(sizes: Sizes) -> list[Case]:
    """Return the decoding case."""
    shared = {
        "batches": list(sizes.batches),
        "prompt": sizes.prompt,
        "new": sizes.new,
        "rounds": sizes.rounds,
        "seed": sizes.seed,
    }
    kinds = ["base", "policy_k8", "policy_k30", "two_models"]
    return [Case("decoding", "decoding", "decode", {"kinds": kinds, **shared})]


def profile_cases(sizes: Sizes) -> list[Case]:
    """Return where the time goes of a first and of a cached step, and of decoding one by one."""
    seed = {"seed": sizes.seed}
    step = {"pairs": min(8, sizes.pairs), **seed}
    token = {"batch": 1, "prompt": sizes.prompt, "new": sizes.new, **seed}
    cases = [
        ("ours_k8", "profiled", {**step, "cached": False}),
        ("ours_k8_cached", "profiled", {**step, "cached": True}),
        ("decoding_base", "profiled_decoding", {**token, "kind": "base"}),
        ("decoding_policy_k8", "profiled_decoding", {**token, "kind": "policy_k8"}),
    ]
    return [Case("profile", name, f, options, once=True) for name, f, options in cases]


def growth_cases(sizes: Sizes) -> list[Case]:
    """Return a step against tokens, layers and vocabulary, and a run against pairs."""
    seed, steps = {"seed": sizes.seed}, {"seed": sizes.seed, "steps": sizes.steps}
    cases = [
        *(("tokens", n, "step", {"tokens": n, "layers": 8, **steps}) for n in sizes.tokens),
        *(("layers", k, "step", {"tokens": 512, "layers": k, **steps}) for k in sizes.depths),
        *(("words", v, "vocabulary", {"words": v, "states": 512, **steps}) for v in sizes.words),
        *(("pairs", n, "run_of", {"pairs": n, **seed}) for n in sizes.runs),
    ]
    return [Case("growth", f"{axis} {x}", f, options, once=True) for axis, x, f, options in cases]


def quality_cases(sizes: Sizes, trl: dict[str, Any]) -> list[Case]:
    """Return the runs whose results are judged."""
    shared = {
        "pairs": sizes.quality_pairs,
        "held_out": sizes.held_out,
        "text_tokens": sizes.text_tokens,
        "seed": sizes.seed,
    }
    ours = [("ours_k8", 8, False), ("authors_k8", 8, True), ("ours_k30", 30, False)]
    return [
        *(
            Case("quality", n, "quality_ours", {**shared, "layers": k, "two_pass": p}, once=True)
            for n, k, p in ours
        ),
        Case("quality", "trl_best", "quality_trl", {**shared, **trl, "layers": 30}, once=True),
    ]


def run_case(function: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one case in this process."""
    import costs
    import decoding
    import measuring
    import training

    functions = {
        "ours": training.ours,
        "trl": training.trl,
        "quality_ours": training.quality_ours,
        "quality_trl": training.quality_trl,
        "foretold": training.foretold,
        "decode": decoding.decode,
        "profiled_decoding": decoding.profiled,
        "gemm": costs.gemm,
        "profiled": costs.profiled,
        "step": costs.step,
        "vocabulary": costs.vocabulary,
        "run_of": costs.run_of,
        "machine": measuring.machine,
    }
    return functions[function](**options)


def in_process(function: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a process of its own, whose last line is its result."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    call = json.dumps({"function": function, "options": options})
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent), "case", call],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


class Runs:
    """Results so far, in a file beside the output."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.key = path, key
        self.rows = read_rows(path, key)
        self.used: list[dict[str, Any]] = []
        """Those that this call asked for."""

    def run(self, case: Case, repeat: int) -> dict[str, Any]:
        """Return the result of a case, from the file if it is there."""
        asked = {**dataclasses.asdict(case), "repeat": repeat}
        for row in self.rows:
            if all(row[name] == json.loads(json.dumps(value)) for name, value in asked.items()):
                self.used.append(row)
                return row["result"]
        print(f"{case.section}: {case.name}, repeat {repeat}", file=sys.stderr, flush=True)
        options = dict(case.options)
        if case.section == "training":
            options["flops"] = repeat == 0 and not case.once
        row = {**asked, "key": self.key, "result": in_process(case.function, options)}
        self.used.append(row)
        if "error" in row["result"]:  # told in the output, and tried again the next time
            print(f"  failed: {row['result']['error']}", file=sys.stderr, flush=True)
        else:
            self.rows.append(row)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row["result"]


def best_configuration(runs: Runs, sizes: Sizes) -> dict[str, Any]:
    """Return DPOTrainer's configuration with the most pairs a second in its first epoch.

    Each is timed in as many turns as there are repeats, and its best turn counts: what slows a turn
    is the machine.
    """
    paces: dict[str, float] = {}
    for repeat in range(sizes.repeats):
        for case in sweep_cases(sizes):
            result = runs.run(case, repeat)
            if "epochs" in result:
                pace = result["epochs"][0]["pairs_per_second"]
                paces[case.name] = max(pace, paces.get(case.name, 0.0))
    if not paces:
        raise SystemExit("DPOTrainer ran in no configuration; the reasons are above")
    return TRL_SWEEP[max(paces, key=lambda n: paces[n]).removeprefix("sweep ")]


def run_all(runs: Runs, sizes: Sizes, skip: set[str]) -> dict[str, Any]:
    """Run everything wanted; return DPOTrainer's best configuration."""
    trl = {} if {"training", "quality"} <= skip else best_configuration(runs, sizes)
    gemm = {"sizes": list(sizes.gemm), "repeats": sizes.gemm_repeats}
    cases = [
        *training_cases(sizes, trl),
        *estimate_cases(sizes),
        Case("gemm", "gemm", "gemm", gemm),
        *decoding_cases(sizes),
        *profile_cases(sizes),
        *growth_cases(sizes),
        *quality_cases(sizes, trl),
    ]
    cases = [case for case in cases if case.section not in skip]
    for repeat in range(sizes.repeats):
        for case in cases:
            if not case.once:
                runs.run(case, repeat)
    for case in cases:
        if case.once:
            runs.run(case, 0)
    return trl


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", required=True, metavar="JSON")
    parser.add_argument("--draw", metavar="SVG")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=24, help="pairs of ours, timed")
    parser.add_argument("--slow-pairs", type=int, default=12, help="pairs of the others, of these")
    parser.add_argument("--quality-pairs", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", nargs="*", choices=SECTIONS, default=[])
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    return parser


def main() -> None:
    """Run what is missing, write the JSON, print the table, and draw if asked."""
    if sys.argv[1:2] == ["case"]:
        print("\n" + json.dumps(run_case(**json.loads(sys.argv[2]))))
        return
    parser = arguments()
    args = parser.parse_args()
    if not DATA.is_dir():
        parser.exit(message=f"skipped: no data in {DATA}; set QADAPTER_DATA\n")
    fields = ("repeats", "pairs", "slow_pairs", "seed", "quality_pairs", "held_out")
    sizes = Sizes(**{name: getattr(args, name) for name in fields})
    machine = in_process("machine", {})
    if not machine["bf16"]:
        sweep = tuple(name for name, options in TRL_SWEEP.items() if not options["autocast"])
        sizes = dataclasses.replace(sizes, sweep=sweep)
    sizes = sizes.quick() if args.quick else sizes
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = output.with_suffix(".jsonl")
    if args.fresh:
        lines.unlink(missing_ok=True)
    runs = Runs(lines, origin(Path(__file__).parent))
    trl = run_all(runs, sizes, set(args.skip))

    import report  # after the runs: a child process counts its parent's memory at its start

    summary = {
        "machine": machine,
        "command": "python benchmarks/speed " + " ".join(sys.argv[1:]),
        "seed": sizes.seed,
        "sizes": dataclasses.asdict(sizes),
        "trl_best": trl,
        "trl_not_run": not_run(machine["bf16"]),
        **report.summarise(runs.used),
        "raw": runs.used,
    }
    output.write_text(json.dumps(summary, indent=1) + "\n")
    print(report.table(summary))
    if args.draw:
        report.draw(summary, args.draw)


if __name__ == "__main__":
    main()
