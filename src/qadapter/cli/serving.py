"""`qadapter serve` and `qadapter play`: a policy behind HTTP."""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from contextlib import closing
from pathlib import Path

from qadapter.cli.arguments import Commands, add_policy, count, load_policy, named, port
from qadapter.cli.terminal import without
from qadapter.errors import ConfigError, needs

_LIMITS = ("max_context", "max_tokens", "max_body")


def add_serve(commands: Commands) -> None:
    """Add the parser of `qadapter serve`."""
    serve = commands.add_parser("serve", help="serve a policy behind OpenAI's endpoints")
    add_policy(serve)
    _add_address(serve, 8000)
    serve.add_argument(
        "--engine", choices=["embedded", "vllm"], default="embedded", help="vllm: its own server"
    )
    serve.add_argument("--api-key", help="ask clients for it; default $QADAPTER_API_KEY, or none")
    serve.add_argument(
        "--adapter-dir",
        metavar="D",
        help="let clients load adapters from under D (/v1/load_lora_adapter); default nobody may",
    )
    serve.add_argument("--max-batch", type=count, default=16, help="answers made together")
    serve.add_argument("--max-queue", type=count, help="answers that may wait, default 64")
    serve.add_argument("--max-tokens", type=count, help="tokens of an answer, default 1024")
    serve.add_argument("--max-context", type=count, help="of prompt and answer, default 4096")
    serve.add_argument("--max-body", type=count, help="bytes of a request, default 1 MiB")
    serve.add_argument("--vllm-args", metavar="FLAGS", help="further flags of vLLM's, quoted")
    # An export has a strength and a dtype of its own.
    serve.set_defaults(run=_serve, strength=None, dtype=None)


def _serve(args: argparse.Namespace) -> None:
    key = os.environ.get("QADAPTER_API_KEY") if args.api_key is None else args.api_key
    if key == "":
        raise ConfigError("--api-key: is empty, which any client could guess; give one or none.")
    if args.engine == "vllm":
        _serve_on_vllm(args, key)
        return
    args.strength = 1.0 if args.strength is None else args.strength
    args.dtype = args.dtype or "float32"
    if args.vllm_args is not None:
        raise ConfigError("--vllm-args: goes with --engine vllm; leave it out or add that.")
    with needs("serve", "serve"):
        from transformers.utils import logging

        from qadapter.serve.asking import Limits
        from qadapter.serve.run import listen, run
        from qadapter.serve.shelf import Shelf

    limits = {n: getattr(args, n) for n in _LIMITS if getattr(args, n) is not None}
    shelf = None if args.adapter_dir is None else Shelf(args.adapter_dir)
    logging.disable_progress_bar()  # the log is JSON
    with closing(listen(args.host, args.port)) as bound:
        run(
            load_policy(args),
            bound,
            strength=args.strength,
            limits=Limits(**limits),
            max_batch=args.max_batch,
            max_queue=64 if args.max_queue is None else args.max_queue,
            api_key=key,
            shelf=shelf,
        )


def _serve_on_vllm(args: argparse.Namespace, key: str | None) -> None:
    from qadapter.config import is_export
    from qadapter.serve import on_vllm

    for name in ("max_tokens", "max_body", "max_queue", "adapter_dir"):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            what = "reads no adapters" if name == "adapter_dir" else "has no such limit"
            raise ConfigError(f"{flag}: vLLM {what}; leave it out, or --engine vllm.")
    if args.port == 0:
        raise ConfigError("--port: vLLM takes no 0 for any free one; name a port.")
    if args.device is not None:
        raise ConfigError("--device: vLLM picks its own; leave it out, or --engine vllm.")
    on_vllm.check_installed()
    made = tempfile.TemporaryDirectory(prefix="qadapter-vllm.")
    with on_vllm.handled(on_vllm.leave), made as place:
        adapters = named(args.adapter)
        export = Path(next(iter(adapters.values())))
        if len(adapters) == 1 and is_export(export):
            for flag in ("--base", "--no-check-base", "--trust-remote-code"):
                if getattr(args, flag[2:].replace("-", "_")):
                    raise ConfigError(f"{flag}: {export} is an export with its base; leave it out.")
            kept = on_vllm.dtype_of(export, args.strength)
            args.dtype = args.dtype or kept
        else:
            # A name of its own: stores of keys and values that servers share may go by it.
            export = _exported(args, Path(place) / Path(place).name)
        words = on_vllm.command(
            export,
            name="+".join(adapters),
            host=args.host,
            port=args.port,
            strength=args.strength,
            dtype=args.dtype,
            max_batch=args.max_batch,
            max_context=args.max_context,
            more=args.vllm_args or "",
        )
        print(shlex.join(without("--api-key", words)), flush=True)
        on_vllm.run(words, api_key=key)


def _exported(args: argparse.Namespace, place: Path) -> Path:
    """Write an export of the adapters that a command names, if vLLM can serve it."""
    from qadapter.export import export_policy
    from qadapter.serve import on_vllm

    args.strength = 1.0 if args.strength is None else args.strength
    args.dtype = args.dtype or "float32"
    policy = load_policy(args)
    on_vllm.check_family(policy.model.config.model_type)
    return export_policy(policy, place).directory


def add_play(commands: Commands) -> None:
    """Add the parser of `qadapter play`."""
    play = commands.add_parser("play", help="a page with base and policy side by side")
    add_policy(play)
    _add_address(play, 7860)
    play.add_argument("--max-new-tokens", type=count, default=256)
    play.set_defaults(run=_play)


def _play(args: argparse.Namespace) -> None:
    with needs("play", "play"):
        from qadapter import play
        from qadapter.serve.run import listen

        play.check_installed()
    with closing(listen(args.host, args.port)) as bound:
        policy = load_policy(args)
        host, port = bound.getsockname()[:2]
        print(f"http://{host}:{port}  (Ctrl-C ends it)", flush=True)
        play.run(policy, bound, strength=args.strength, max_tokens=args.max_new_tokens)


def _add_address(parser: argparse.ArgumentParser, usual: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=port, default=usual, help=f"default {usual}; 0 any free one")
