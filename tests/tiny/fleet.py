"""Run `qadapter` in forked processes that share one import of everything.

    python tests/tiny/fleet.py < JOBS

JOBS is a JSON list of objects: `words` of the command line, `processes`, `engine` (a file of
`configs/` without its ending, or nothing). Prints one JSON object a job: exit codes, and what each
process said on stdout and stderr. The environment is what accelerate's launcher makes of the file.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import qadapter.train
from qadapter.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"


def environment(engine: str) -> dict[str, str]:
    """Return what accelerate's launcher would set for a file of `configs/`."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(CONFIGS / f"{engine}.yaml"), "none"]
    args, file, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(file.deepspeed_config)
        _, made = prepare_deepspeed_cmd_env(args)
    else:
        made = prepare_multi_gpu_env(args)
    return {k: v for k, v in made.items() if k.startswith(("ACCELERATE", "FSDP"))}


def child(job: dict[str, Any], rank: int, port: int, said: Path) -> None:
    """Become one process of a job; does not return."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed fleet leaves none
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), stream)
    if job.get("engine"):
        os.environ.update(environment(job["engine"]))
    if job["processes"] > 1 or job.get("engine"):
        world = str(job["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        os.environ.update(WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_PORT=str(port))
    os.environ.update(job.get("env", {}))
    code = main(job["words"])
    sys.stdout.flush()
    os._exit(code)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job to its end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        said, children = Path(place), []
        for rank in range(job["processes"]):
            if (pid := os.fork()) == 0:
                try:
                    child(job, rank, port, said)
                except BaseException:
                    traceback.print_exc()  # os._exit would end it before it is told
                    sys.stderr.flush()
                finally:
                    os._exit(1)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        told = {f.name: f.read_text(errors="replace") for f in said.iterdir()}
    return {"codes": codes, **told}


if __name__ == "__main__":
    assert qadapter.train  # imported before the first fork
    for line in json.load(sys.stdin):
        print(json.dumps(run(line)), flush=True)
