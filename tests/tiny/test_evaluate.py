"""lm-eval sees the composed policy, whatever it asks; its base at strength 0; and nothing else."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.utils
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from models import disturbed

from qadapter import evaluate, hub
from qadapter.cli import main
from qadapter.config import QConfig
from qadapter.errors import ConfigError, DataError
from qadapter.evaluate import PAPER_SUITE, evaluate_tasks
from qadapter.lm import QAdapterLM
from qadapter.model import QAdapterModel
from qadapter.policy import Policy
from qadapter.suite import LOCAL_SUITE, local_suite

SETTINGS: list[tuple[dict[str, Any], float]] = [
    ({"alpha_0": 0.5, "alpha_tilde": 0.5}, 0.5),
    ({"alpha_0": 0.2, "alpha_tilde": 0.5}, 1.0),
    ({"alpha_0": 0.8, "alpha_tilde": 0.5, "parameterization": "raw"}, 1.0),
    ({"alpha_0": 0.8, "alpha_tilde": 0.5, "parameterization": "raw"}, 0.3),
]
"""Policies and strengths at which base + LoRA alone is another policy."""


pytestmark = pytest.mark.usefixtures("one_index")


def loud_policy(base: str, **fields: Any) -> Policy:
    """Return a policy whose adapter changes every answer."""
    q_config = QConfig(**{"alpha_0": 0.5, "alpha_tilde": 0.5, **fields})
    loaded = hub.load_base(base, dtype=torch.float32)
    model = QAdapterModel.create(loaded, q_config, lora_r=4, trunk=0.5)
    return Policy(disturbed(model), hub.load_tokenizer(base))


def composed(policy: Policy, ids: Sequence[int], strength: float) -> torch.Tensor:
    """Return log π_s `[T, V]` by METHOD M2 from two plain passes: base + LoRA, and base."""
    model, q = policy.model, policy.model.q_config
    row = torch.tensor([list(ids)])
    with torch.no_grad():
        z = model.peft_model(input_ids=row).logits[0].double()
        with model.adapter_off():
            z1 = model.peft_model(input_ids=row).logits[0].double()
    value = q.alpha_tilde * (z - z1) if q.parameterization == "residual" else z
    return ((strength * value + q.alpha_0 * z1.log_softmax(-1)) / q.alpha_tilde).log_softmax(-1)


def ask(lm: Any, kind: str, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return lm-eval's answers to requests of a kind."""
    instances = [Instance(request_type=kind, doc={}, arguments=r, idx=0) for r in requests]
    answers: list[Any] = getattr(lm, kind)(instances, disable_tqdm=True)
    return answers


# Of several lengths, so that rows of a batch are padded.
CONTINUATIONS = [
    ("Say one", " word"),
    ("A longer thing to be said", "."),
    ("b", " and a, long tail"),
]
TEXTS = [("General text, a line of it.",), ("Short.",)]
PROMPTS = ["Say one", "A longer prompt than the other"]


def check_loglikelihood(lm: Any, policy: Policy, strength: float) -> None:
    for (context, continuation), (found, greedy) in zip(
        CONTINUATIONS, ask(lm, "loglikelihood", CONTINUATIONS), strict=True
    ):
        before, said = (policy.tokenizer(t)["input_ids"] for t in (context, continuation))
        logp = composed(policy, [*before, *said], strength)[len(before) - 1 : -1]
        expected = float(logp.gather(-1, torch.tensor(said)[:, None]).sum())
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy == (logp.argmax(-1).tolist() == said)


def check_rolling(lm: Any, policy: Policy, strength: float) -> None:
    for (text,), found in zip(TEXTS, ask(lm, "loglikelihood_rolling", TEXTS), strict=True):
        ids = [lm.prefix_token_id, *policy.tokenizer(text)["input_ids"]]
        logp = composed(policy, ids, strength)[:-1]
        expected = float(logp.gather(-1, torch.tensor(ids[1:])[:, None]).sum())
        assert found == pytest.approx(expected, abs=1e-3)


def check_generation(lm: Any, policy: Policy, strength: float) -> None:
    requests = [(prompt, {"until": ["\n\n\n"], "max_gen_toks": 12}) for prompt in PROMPTS]
    for prompt, found in zip(PROMPTS, ask(lm, "generate_until", requests), strict=True):
        ids = list(policy.tokenizer(prompt)["input_ids"])
        start = len(ids)
        while len(ids) < start + 12 and ids[-1] not in policy.end_ids:
            ids.append(int(composed(policy, ids, strength)[-1].argmax()))
        assert found == policy.tokenizer.decode(ids[start:], skip_special_tokens=True)


CHECKS: list[Callable[[Any, Policy, float], None]] = [
    check_loglikelihood,
    check_rolling,
    check_generation,
]


@pytest.mark.parametrize(("fields", "strength"), SETTINGS)
@pytest.mark.parametrize("check", CHECKS)
def test_every_request_is_answered_by_the_composition(
    check: Callable[[Any, Policy, float], None],
    fields: dict[str, Any],
    strength: float,
    base: str,
) -> None:
    policy = loud_policy(base, **fields)
    check(QAdapterLM(policy, strength=strength, batch_size=2), policy, strength)


class LoraAlone(QAdapterLM):
    """The authors' bug: what generates and scores is base + LoRA, without the composition."""

    def _model_call(self, inps: torch.Tensor, **_: None) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model.peft_model(input_ids=inps).logits
        return logits

    def _model_generate(
        self, context: Any, max_length: int, stop: Any, **options: Any
    ) -> torch.Tensor:
        out: torch.Tensor = self.model.peft_model.generate(
            input_ids=context,
            attention_mask=options["attention_mask"],
            max_length=max_length,
            do_sample=False,
        )
        return out


class BaseAlone(LoraAlone):
    """An evaluator that lost the adapter."""

    def _model_call(self, inps: torch.Tensor, **options: None) -> torch.Tensor:
        with self.model.adapter_off():
            return super()._model_call(inps, **options)

    def _model_generate(self, *args: Any, **options: Any) -> torch.Tensor:
        with self.model.adapter_off():
            return super()._model_generate(*args, **options)


@pytest.mark.parametrize(("fields", "strength"), SETTINGS)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("wrong", [LoraAlone, BaseAlone])
def test_the_proof_above_fails_without_the_composition(
    wrong: type[QAdapterLM],
    check: Callable[[Any, Policy, float], None],
    fields: dict[str, Any],
    strength: float,
    base: str,
) -> None:
    policy = loud_policy(base, **fields)
    with pytest.raises(AssertionError):
        check(wrong(policy, strength=strength, batch_size=2), policy, strength)


def short(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bound generation: 1280 new tokens are more than the tiny context."""
    for config in configs:
        if "generation_kwargs" in config:
            config["generation_kwargs"]["max_gen_toks"] = 12
    return configs


def samples(lm: Any, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all that lm-eval logs of each document."""
    loaded = TaskManager(include_defaults=False).load(configs)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    found = lm_eval.evaluate(lm, loaded, bootstrap_iters=0)
    logged: dict[str, Any] = found["samples"]
    return logged


def test_strength_zero_is_lm_evals_own_backend_item_by_item(base: str, suite: Path) -> None:
    ours = QAdapterLM(loud_policy(base), strength=0.0, batch_size=2)
    theirs = HFLM(base, dtype="float32", device="cpu", batch_size=2)
    found = samples(ours, short(local_suite(suite)))
    assert found == samples(theirs, short(local_suite(suite)))
    assert set(found) == set(LOCAL_SUITE)
    for kind, requests in (
        ("loglikelihood", CONTINUATIONS),
        ("loglikelihood_rolling", TEXTS),
        ("generate_until", [(p, {"until": [], "max_gen_toks": 12}) for p in PROMPTS]),
    ):
        assert ask(ours, kind, requests) == ask(theirs, kind, requests)


def test_the_local_suite_scores_what_it_says(
    base: str, suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, strength = loud_policy(base), 0.7
    states = random.getstate(), torch.get_rng_state()
    scores = evaluate_tasks(policy, short(local_suite(suite)), strength=strength, batch_size=2)
    assert capsys.readouterr().out == ""
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert tuple(s.task for s in scores) == LOCAL_SUITE
    piqa, arc, lambada, perplexity, ifeval = scores

    def logp(context: str, text: str) -> torch.Tensor:
        before, said = (policy.tokenizer(t)["input_ids"] for t in (context, text))
        row = composed(policy, [*before, *said], strength)[len(before) - 1 : -1]
        return row.gather(-1, torch.tensor(said)[:, None])

    def right(row: dict[str, Any], by: Callable[[str], float]) -> float:
        prompt = row["query"].rstrip("\n") + "\nAnswer:"
        sums = [float(logp(prompt, " " + c).sum()) / by(c) for c in row["choices"]]
        return float(sums.index(max(sums)) == row["gold"])

    rows = [json.loads(line) for line in (suite / "piqa.jsonl").read_text().splitlines()]
    assert (piqa.metric, arc.metric, lambada.metric) == ("acc_norm", "acc", "acc")
    assert piqa.items == tuple(right(row, len) for row in rows)
    assert arc.items == tuple(right(row, lambda _: 1.0) for row in rows)
    for score in (piqa, arc, lambada, ifeval):
        assert score.value == pytest.approx(sum(score.items) / score.n)
        assert score.higher_is_better
        assert score.stderr is not None
    lines = ["= Title =", "A line , of words .", "[1, 2]", "Last"]
    begin = policy.tokenizer.bos_token
    expected = [float(logp(begin, line).sum()) for line in lines]
    words = [len(line.split()) for line in lines]
    # In an order of their own, always the same.
    place = [words.index(int(weight)) for weight in perplexity.weights]
    assert sorted(place) == [0, 1, 2, 3] != place
    assert perplexity.items == pytest.approx([expected[i] for i in place], abs=1e-3)
    assert {score.weights for score in (piqa, arc, lambada, ifeval)} == {()}
    assert perplexity.value == pytest.approx(math.exp(-sum(expected) / sum(words)), rel=1e-4)
    assert perplexity.metric == "word_perplexity"
    assert not perplexity.higher_is_better
    assert ifeval.metric == "prompt_level_strict_acc"
    assert [s.n for s in scores] == [3, 3, 3, 4, 2]
    assert [s.n for s in evaluate_tasks(policy, local_suite(suite)[:4], limit=2)] == [2] * 4


@pytest.mark.parametrize(
    ("values", "items", "weights"),
    [
        ([(-2.5, 3), (-4.0, 5)], (-2.5, -4.0), (3.0, 5.0)),
        ([(1, 0), (0, 0)], (), ()),  # right and given answers, of F1
        ([(0.5, 1, 2), (1.0, 1, 1)], (), ()),  # what another metric puts together
        ([True, 0.5], (1.0, 0.5), ()),
    ],
)
def test_of_a_document_a_figure_is_kept_and_a_weight_where_it_has_one(
    values: list[Any], items: tuple[float, ...], weights: tuple[float, ...]
) -> None:
    class Task:
        def aggregation(self) -> dict[str, None]:
            return {"m": None}

    found = {
        "samples": {"t": [{"m": value, "filter": "none"} for value in values]},
        "n-samples": {"t": {"effective": len(values)}},
        "higher_is_better": {"t": {"m": True}},
    }
    score = evaluate._score("t", {"m,none": 1.0}, {"t": Task()}, found)
    assert (score.items, score.weights, score.n) == (items, weights, 2)


def test_of_a_perplexity_by_documents_each_weighs_one() -> None:
    """lm-eval's LAMBADA: figures of documents are log-likelihoods, not what the metric says."""
    from lm_eval.api.metrics import perplexity

    class Task:
        def aggregation(self) -> dict[str, Any]:
            return {"perplexity": perplexity}

    samples = [{"perplexity": value, "filter": "none"} for value in (-1.0, -3.0)]
    found = {
        "samples": {"t": samples},
        "n-samples": {"t": {"effective": 2}},
        "higher_is_better": {"t": {"perplexity": False}},
    }
    score = evaluate._score("t", {"perplexity,none": math.exp(2)}, {"t": Task()}, found)
    assert (score.items, score.weights) == ((-1.0, -3.0), (1.0, 1.0))
    assert score.value == pytest.approx(math.exp(-sum(score.items) / sum(score.weights)))


def test_fewshot_and_chat_template_change_the_prompt(base: str, suite: Path) -> None:
    policy = loud_policy(base)
    (config,) = local_suite(suite, ["local_lambada"])
    config["metric_list"] = config["metric_list"][::-1]  # log-likelihoods are what tells

    def items(**options: Any) -> tuple[float, ...]:
        return evaluate_tasks(policy, [config], **options)[0].items

    plain = items()
    assert items(num_fewshot=1) == plain  # the task says 0, which lm-eval keeps
    del config["num_fewshot"]
    assert items() == plain
    assert items(num_fewshot=1) != plain
    assert items(apply_chat_template=True) != plain


def test_a_group_is_one_score(
    base: str, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["local_piqa", "local_arc_easy"]
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "both", "task": names, "aggregate_metric_list": [mean]}
    for i, config in enumerate([group, *local_suite(suite, names)]):
        (tmp_path / f"{i}.yaml").write_text(json.dumps(config))  # YAML holds JSON
    manager = TaskManager(include_defaults=False, include_path=tmp_path)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    tasks = ["both", *local_suite(suite, ["local_lambada"])]
    both, lambada = evaluate_tasks(loud_policy(base), tasks)
    assert (both.task, lambada.task) == ("both", "local_lambada")
    assert (both.metric, both.n, len(both.items)) == ("acc", 6, 6)
    assert both.value == pytest.approx(sum(both.items) / 6)


def test_what_lm_eval_cannot_do_is_one_error(base: str, suite: Path) -> None:
    policy = loud_policy(base)
    (ifeval,) = local_suite(suite, ["local_ifeval"])
    with pytest.raises(ConfigError, match="max tokens to generate"):  # 1280, of a context of 256
        evaluate_tasks(policy, [ifeval])
    with pytest.raises(ConfigError, match="limit: 0"):
        evaluate_tasks(policy, [ifeval], limit=0)
    with pytest.raises(ConfigError, match="strength: -1"):
        evaluate_tasks(policy, [ifeval], strength=-1.0)
    assert evaluate_tasks(policy, []) == []


def test_the_model_is_registered_and_refuses_what_it_would_ignore(adapter: str) -> None:
    from lm_eval.api.registry import get_model

    lm = get_model("qadapter").create_from_arg_string(f"pretrained={adapter},strength=0.5")
    assert (type(lm), lm.strength) == (QAdapterLM, 0.5)
    assert lm.get_model_info()["base_model"] == lm.model.q_config.base_model
    for wrong in ("parallelize=True", "dtype=many", "strength=-1"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            get_model("qadapter").create_from_arg_string(f"pretrained={adapter},{wrong}")


# ── files of the suite ──────────────────────────────────────────────────────────────────────────

GOOD_CHOICE = {"query": "Question: q", "choices": ["a", "b"], "gold": 1}
GOOD_IFEVAL = {
    "key": 1,
    "prompt": "p",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("piqa.jsonl", {**GOOD_CHOICE, "query": 3}, "'query' must be a text"),
        ("piqa.jsonl", {**GOOD_CHOICE, "choices": ["a"]}, "'choices' must be"),
        ("piqa.jsonl", {**GOOD_CHOICE, "gold": 2}, "'gold' must be"),
        ("arc_easy.jsonl", {**GOOD_CHOICE, "gold": True}, "'gold' must be"),
        ("arc_easy.jsonl", ["a"], "must be an object"),
        ("lambada.dev.jsonl", {"context": "a"}, "'continuation' must be a text"),
        ("lambada.dev.jsonl", {"context": " ", "continuation": "b"}, "'context' must be a text"),
        ("ifeval.jsonl", {**GOOD_IFEVAL, "key": "1"}, "'key' must be"),
        ("ifeval.jsonl", {**GOOD_IFEVAL, "prompt": None}, "'prompt' must be"),
        ("ifeval.jsonl", {**GOOD_IFEVAL, "instruction_id_list": ["x"]}, "'instruction_id_list'"),
        ("ifeval.jsonl", {**GOOD_IFEVAL, "instruction_id_list": [["x"]]}, "'instruction_id_list'"),
        ("ifeval.jsonl", {**GOOD_IFEVAL, "kwargs": []}, "'kwargs' must be"),
        ("ifeval.jsonl", {**GOOD_IFEVAL, "kwargs": [{"x": 1}]}, "'kwargs' do not fit"),
        ("ifeval.jsonl", {**GOOD_IFEVAL, "kwargs": [None]}, "'kwargs' do not fit"),
    ],
)
def test_a_malformed_line_is_told_by_file_line_and_field(
    file: str, row: object, message: str, suite: Path, tmp_path: Path
) -> None:
    for path in suite.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / file).open("a") as out:
        out.write("\n" + json.dumps(row) + "\n")
    number = len((tmp_path / file).read_text().splitlines())
    with pytest.raises(DataError) as told:
        local_suite(tmp_path)
    assert str(told.value).startswith(f"{tmp_path / file}:{number}: {message}")


def test_missing_doubled_and_empty_files_are_told(suite: Path, tmp_path: Path) -> None:
    for path in suite.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert [c["task"] for c in local_suite(tmp_path)] == list(LOCAL_SUITE)
    (tmp_path / "another.txt").write_text("x")
    with pytest.raises(DataError, match=r"another\.txt and other\.txt are both for"):
        local_suite(tmp_path)
    (tmp_path / "wikitext2.txt").write_text(" \n")  # this name goes before others
    with pytest.raises(DataError, match=r"wikitext2\.txt: is empty"):
        local_suite(tmp_path)
    (tmp_path / "piqa.jsonl").unlink()
    with pytest.raises(DataError, match=r"piqa\.jsonl: missing"):
        local_suite(tmp_path)
    assert len(local_suite(tmp_path, ["local_lambada"])) == 1
    with pytest.raises(DataError, match="is not a directory"):
        local_suite(tmp_path / "none")
    with pytest.raises(ConfigError, match="local_gsm8k: is not one of"):
        local_suite(tmp_path, ["local_gsm8k"])


# ── the command ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("own_log")
def test_the_command_gives_what_python_gives(
    adapter: str, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model_args:\n  max_length: 128\nbatch_size: 2\n")
    words = ["--strength", "0.5", "--suite-data", str(suite), "--limit", "2", "--log_samples"]
    words += ["--gen_kwargs", "max_gen_toks=12", "--config", str(config)]
    words += ["--use_cache", str(tmp_path / "cache")]
    assert main(["evaluate", adapter, *words, "--output_path", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(path.read_text())
    assert written["config"]["model_args"]["max_length"] == 128
    assert written["config"]["strength"] == 0.5
    policy = Policy.from_pretrained(adapter)
    configs = short(local_suite(suite))
    for score in evaluate_tasks(policy, configs, strength=0.5, limit=2, batch_size=2):
        found = written["results"][score.task][f"{score.metric},none"]
        assert found == pytest.approx(score.value)
        assert score.task in printed
    assert "Metric" in printed
    assert len(list(tmp_path.glob("cache_*_rank0.db"))) == 1
    (path,) = (tmp_path / "out").rglob("samples_local_perplexity_*.jsonl")
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.usefixtures("own_log")
def test_a_cache_of_answers_answers_for_its_own_adapter_only(
    base: str, suite: Path, tmp_path: Path
) -> None:
    policy, cache = loud_policy(base), str(tmp_path / "cache")
    words = ["--suite-data", str(suite), "--tasks", "local_lambada", "--use_cache", cache]

    def perplexity(strength: str) -> float:
        policy.model.save_pretrained(tmp_path / "adapter")
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        more = ["--base", base, "--strength", strength, "--output_path", str(out)]
        assert main(["evaluate", str(tmp_path / "adapter"), *more, *words]) == 0
        (path,) = out.rglob("results_*.json")
        found = json.loads(path.read_text())["results"]["local_lambada"]["perplexity,none"]
        return float(found)

    first = [perplexity("1"), perplexity("0.5")]
    with torch.no_grad():
        for parameter in policy.model.adapter_parameters().values():
            parameter.mul_(0.5)
    second = perplexity("1")
    assert len({*first, second}) == 3
    assert len(list(tmp_path.glob("cache_*.db"))) == 3


@pytest.mark.usefixtures("own_log")
def test_bad_input_is_one_sentence_and_exit_two(
    adapter: str, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "away.yaml").write_text(
        "task: away\ndataset_path: nobody/no-such-set\noutput_type: generate_until\n"
        "test_split: test\ndoc_to_text: text\ndoc_to_target: text\n"
    )
    (tmp_path / "hf.yaml").write_text("model: hf\n")
    local = ["--suite-data", str(suite)]
    cases: list[tuple[list[str], str]] = [
        (["--tasks", "nosuchtask"], "Tasks not found: nosuchtask"),
        (["--tasks", str(tmp_path / "away.yaml")], "nobody/no-such-set"),
        ([], "--tasks: none given"),
        (["--suite", "local"], "--suite-data D"),
        (["--tasks", "local_piqa"], "--suite-data D"),
        (["--suite", "paper", *local], "--suite-data: belongs to"),
        (["--suite-data", str(tmp_path)], "piqa.jsonl: missing"),
        ([*local, "--model", "hf"], "--model: the model is the adapter"),
        ([*local, "--config", str(tmp_path / "hf.yaml")], "--model: the model is the adapter"),
        ([*local, "--config", str(tmp_path / "none.yaml")], "none.yaml"),
        ([*local, "--model_args", "strength=2"], "'strength' has a flag of its own"),
        ([*local, "--limit", "-1"], "--limit: -1 must be"),
        ([*local, "--device", "nowhere"], "--device: nowhere is not to be had"),
        ([*local, "--log_samples"], "--output_path"),
        ([*local, "--tasks", "local_ifeval"], "max tokens to generate"),
        ([*local, "--tasks", "local_piqa", "--model_args", "strenght=2"], "'strenght' is not one"),
    ]
    for words, message in cases:
        assert main(["evaluate", adapter, *words]) == 2, words
        err = capsys.readouterr().err
        last = err.strip().splitlines()[-1]
        assert last.startswith("qadapter: "), err
        assert message in last, (words, last)
        assert "Traceback" not in err
    assert main(["evaluate", str(tmp_path), *local]) == 2
    assert "is not a Q-adapter" in capsys.readouterr().err
    for words in (["--no-such-flag"], ["--limit", "many"], ["--suite", "other"]):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", adapter, *words])
        assert stop.value.code == 2
        assert "qadapter evaluate: error:" in capsys.readouterr().err


def test_help_shows_ours_and_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--strength", "--suite-data", "--num_fewshot"))


def test_the_paper_suite_is_known_to_lm_eval() -> None:
    assert set(PAPER_SUITE) <= set(TaskManager().all_tasks)


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_importing_the_module_does_not_import_lm_eval() -> None:
    done = run("import sys, qadapter.evaluate; print('lm_eval' in sys.modules)")
    assert done.stdout.strip() == "False"


def test_a_missing_lm_eval_is_one_sentence() -> None:
    done = run(
        "import sys; sys.modules['lm_eval'] = None\n"
        "from qadapter.cli import main\nsys.exit(main(['evaluate', 'x', '--tasks', 'piqa']))"
    )
    assert done.returncode == 2
    assert "pip install 'qadapter[eval]'" in done.stderr
    assert "Traceback" not in done.stderr
