"""Keys and tokens are nowhere in what is printed, logged, written or raised."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers
from serving import Running
from test_judge import Endpoint, completion
from test_judge import serve as endpoint_server

from qadapter import hub, ranks
from qadapter.cli import main
from qadapter.config import QAdapterConfig
from qadapter.errors import ModelError, UserError
from qadapter.judge import named_judge
from qadapter.policy import Policy
from qadapter.serve import on_vllm
from qadapter.serve.gate import JsonLines
from qadapter.serve.shelf import Shelf

SECRET = "hf_s3cretOfOurs"
WRONG = "hf_s3cretOfTheirs"


@pytest.fixture
def told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[], str]]:
    """Log all there is to log; the function returns all that was told and all files."""
    caplog.set_level(logging.DEBUG)
    ours = logging.getLogger("transformers")
    level = ours.level
    transformers.utils.logging.set_verbosity_debug()
    monkeypatch.setattr(ours, "propagate", True)
    lines = JsonLines()

    def everything() -> str:
        # What our own clients log of their requests is not the server's.
        records = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
        parts = [*capfd.readouterr(), *(lines.format(r) + str(vars(r)) for r in records)]
        parts += [p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file()]
        return "\n".join(parts)

    yield everything
    ours.setLevel(level)


def whole(error: BaseException) -> str:
    """Return an error as a traceback shows it, with its causes."""
    return "".join(traceback.format_exception(error)) + repr(error)


# --- The Hub's token ------------------------------------------------------------------------------


def test_a_hub_token_is_in_nothing_that_a_run_leaves(
    base: str,
    data: str,
    tmp_path: Path,
    told: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRONG)
    out = tmp_path / "run"
    words = ["train", "--data", data, "--model", base, "--output", str(out), "--hub_token", SECRET]
    words += ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    words += ["--logging_steps", "1", "--report_to", "tensorboard", "--log_level", "debug"]
    words += ["--max_length", "200", "--bf16", "false", "--learning_rate", "0.01"]
    assert main(words) == 0
    assert main([*words, "--resume_from_checkpoint", "nowhere"]) == 2
    with pytest.raises(UserError) as caught:
        main(["--debug", *words, "--max_steps", "-2", "--resume_from_checkpoint", "nowhere"])
    found = told() + whole(caught.value)
    for name in ("README.md", "qadapter_config.json", "checkpoint-2/trainer_state.json"):
        assert (out / name).is_file()
    assert "<HUB_TOKEN>" in found  # the place where tensorboard is told of the settings
    assert SECRET not in found
    assert WRONG not in found


def test_settings_show_no_token(tmp_path: Path) -> None:
    config = QAdapterConfig(data="d", output_dir=str(tmp_path), bf16=False, hub_token=SECRET)
    assert config.hub_token == SECRET
    for shown in (repr(config), str(config), config.to_json_string(), f"{config.to_dict()}"):
        assert "<HUB_TOKEN>" in shown
        assert SECRET not in shown


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", SECRET],
        [f"--hub-token={SECRET}"],
        ["--hub_tok", SECRET],  # argparse takes a flag's beginning for it
        [f"--hub-t={SECRET}"],
    ],
)
def test_the_command_that_goes_on_tells_no_token(
    words: list[str], tmp_path: Path, told: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[str | None] = []

    def stopped(config: QAdapterConfig) -> SimpleNamespace:
        tokens.append(config.hub_token)
        return SimpleNamespace(stopped_at=5)

    monkeypatch.setattr("qadapter.train.run_training", stopped)
    words = ["train", "--data", "pairs.jsonl", "--output", str(tmp_path), *words]
    assert main([*words, "--bf16", "false"]) == 0
    found = told()
    assert "go on by\nqadapter train --data pairs.jsonl" in found
    assert "HUB_TOKEN" in found
    assert tokens == [SECRET]
    assert SECRET not in found


@pytest.mark.parametrize(("ended", "told_of"), [(2, ""), (1, "ended with exit code 1")])
def test_a_launched_process_that_fails_is_told_without_its_command(
    ended: int,
    told_of: str,
    tmp_path: Path,
    told: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """accelerate's own error shows the whole command; and one process once started itself again."""
    started: list[tuple[list[str], dict[str, str]]] = []

    def start(words: list[str], env: dict[str, str]) -> SimpleNamespace:
        started.append((words, env))
        return SimpleNamespace(wait=lambda: ended, returncode=ended)

    file = tmp_path / "one.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\n")
    words = ["train", "--data", "d", "--output", str(tmp_path / "run"), "--hub_token", SECRET]
    words += ["--launch", str(file), "--processes", "1", "--bf16", "false"]
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.commands.launch.subprocess.Popen", start)
        assert main(words) == 2
    ((command, environment),) = started
    assert command[-len(words) :] == words
    monkeypatch.setenv(ranks.LAUNCHED, environment[ranks.LAUNCHED])
    ran: list[QAdapterConfig] = []

    def stopped(config: QAdapterConfig) -> SimpleNamespace:
        ran.append(config)
        return SimpleNamespace(stopped_at=5)

    monkeypatch.setattr("qadapter.train.run_training", stopped)
    assert main(words) == 0
    assert [config.hub_token for config in ran] == [SECRET]
    found = told()
    assert told_of in found
    assert SECRET not in found


def test_the_environments_token_goes_to_the_hub_alone(
    endpoint: Endpoint, told: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert huggingface_hub.get_token() == SECRET
    endpoint.reply = lambda _: (401, b'{"error": "this model is not yours"}')
    for name, value in (
        ("ENDPOINT", endpoint.url),
        ("HF_HUB_OFFLINE", False),
        ("HUGGINGFACE_CO_URL_TEMPLATE", endpoint.url + "/{repo_id}/resolve/{revision}/{filename}"),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps another address
    with pytest.raises(ModelError) as caught:
        hub.load_tokenizer("owner/private")
    assert f"Bearer {SECRET}" in endpoint.keys
    assert SECRET not in told() + whole(caught.value)


# --- The server's key -----------------------------------------------------------------------------


def test_keys_of_a_server_and_of_its_clients_are_not_logged(
    adapter: str, tmp_path: Path, told: Callable[[], str]
) -> None:
    (tmp_path / "shelf").mkdir()
    policy = Policy.from_pretrained({"tiny": adapter})
    running = Running(policy, api_key=SECRET, shelf=Shelf(tmp_path / "shelf"))
    right, wrong = ({"authorization": f"Bearer {key}"} for key in (SECRET, WRONG))
    try:
        for headers, status in ((right, 200), (wrong, 401), ({"authorization": WRONG}, 401)):
            for path in ("models", "models/tiny"):
                found = running.client.get(f"/v1/{path}", headers=headers)
                assert found.status_code == status
        for path in (f"/v1/models?api_key={WRONG}", f"/{WRONG}", f"/v1/models/{WRONG}"):
            assert running.client.get(path).status_code == 401
            assert running.client.get(path, headers=right).status_code in (200, 404)
        running.client.headers.update(right)
        assert running.chat().status_code == 200
        assert running.chat(api_key=WRONG, model=WRONG).status_code in (400, 404)
        body = {"lora_name": WRONG, "lora_path": WRONG}
        assert running.client.post("/v1/load_lora_adapter", json=body).status_code == 404
        assert running.client.post("/v1/completions", content=WRONG).status_code == 400
        metrics = running.client.get("/metrics").text
    finally:
        running.stop()
    found = told() + metrics
    assert '"outcome": "unauthorized"' in found
    assert SECRET not in found
    assert WRONG not in found


def test_the_key_is_not_in_the_command_that_is_shown_of_vllm(
    tmp_path: Path, told: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[list[str], str | None]] = []
    monkeypatch.setattr(on_vllm, "check_installed", lambda: None)
    monkeypatch.setattr(on_vllm, "run", lambda words, api_key: ran.append((words, api_key)))
    monkeypatch.setenv("QADAPTER_API_KEY", SECRET)
    (tmp_path / "config.json").write_text('{"model_type": "qadapter"}')
    serve = ["serve", str(tmp_path), "--engine", "vllm"]
    assert main([*serve, f"--vllm-args=--seed 3 --api-key {WRONG}"]) == 0
    ((words, key),) = ran
    assert (key, words[-1]) == (SECRET, WRONG)
    assert SECRET not in " ".join(words)
    found = told()
    assert "--seed 3 --api-key API_KEY" in found
    assert SECRET not in found
    assert WRONG not in found


# --- A judge's key --------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    yield from endpoint_server(monkeypatch)


def test_a_judges_key_goes_to_its_endpoint_alone(
    endpoint: Endpoint, tmp_path: Path, told: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr("time.sleep", lambda _: None)  # it waits before it asks again
    judge = named_judge(f"openai:some-model@{endpoint.url}#OPENAI_API_KEY")
    rate = judge.win_rate(["?"], ["a"], ["b"])
    (tmp_path / "comparison.json").write_text(json.dumps(vars(rate), default=str))
    errors = []
    for status, body in ((401, b"no such key: " + SECRET.encode()), (500, SECRET.encode() * 20)):
        endpoint.reply = lambda _, reply=(status, body): reply
        with pytest.raises(UserError) as caught:
            judge.votes(["?"], ["a"], ["b"])
        errors.append(whole(caught.value))
    endpoint.reply = lambda _: (200, completion(SECRET))
    assert judge.votes(["?"], ["a"], ["b"]) == [None]
    assert set(endpoint.keys) == {f"Bearer {SECRET}"}
    assert SECRET not in told() + "".join(errors)
