"""The local suite: files of known abilities as lm-eval's task configurations.

Prompts and metrics are those of lm-eval's own tasks of these names; only the data come from files.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from qadapter.errors import ConfigError, DataError, needs
from qadapter.files import read_jsonl, read_lines

_Row = dict[str, Any]


@cache
def supply_sentences() -> bool:
    """Return whether nltk lacks its English sentence model; it is then given an untrained one.

    IFEval would try to download it when imported, which fails or hangs without a network. Ours is
    four empty files: a sentence ends at every full stop, even after "Mr.".
    """
    with needs("eval", "evaluate"):
        import nltk
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        nltk.data.path.append(str(files("qadapter") / "data_files" / "nltk"))
        return True
    return False


def untrained_sentences() -> bool:
    """Return whether IFEval, if it is loaded, counts sentences by nltk's untrained model."""
    return supply_sentences() and any("ifeval.instructions_util" in name for name in sys.modules)


def _metric(name: str, aggregation: Any = "mean", *, higher: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


def _choice(*metrics: str) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query.rstrip('\\n')}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [_metric(name) for name in metrics],
    }


def _lambada() -> dict[str, Any]:
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation.lstrip()}}",
        "metric_list": [_metric("acc"), _metric("perplexity", "perplexity", higher=False)],
    }


def _perplexity() -> dict[str, Any]:
    return {
        "dataset_path": "text",
        "output_type": "loglikelihood_rolling",
        "process_docs": with_text,
        "metadata": {"version": 1.1},  # lines are shuffled since
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            _metric("word_perplexity", "weighted_perplexity", higher=False),
            _metric("byte_perplexity", "weighted_perplexity", higher=False),
            _metric("bits_per_byte", "bits_per_byte", higher=False),
        ],
    }


def _ifeval() -> dict[str, Any]:
    supply_sentences()
    with needs("eval", "evaluate"):
        from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results
    return {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": 0,
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": 1280,
        },
        "process_results": process_results,
        "metric_list": [
            _metric("prompt_level_strict_acc"),
            _metric("inst_level_strict_acc", agg_inst_level_acc),
            _metric("prompt_level_loose_acc"),
            _metric("inst_level_loose_acc", agg_inst_level_acc),
        ],
    }


def with_text(docs: Any) -> Any:
    """Return the lines of a text dataset that are not blank, without white space around them.

    They are shuffled, always alike: the first so many lines would be of few documents, and
    lines of one document are alike.
    """
    stripped = docs.map(lambda doc: {"text": doc["text"].strip()})
    return stripped.filter(lambda doc: bool(doc["text"])).shuffle(seed=0)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _wrong_choice(row: _Row) -> str | None:
    choices, gold = row.get("choices"), row.get("gold")
    if not _is_text(row.get("query")):
        return "'query' must be a text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        return "'choices' must be a list of two texts or more"
    if type(gold) is not int or not 0 <= gold < len(choices):
        return "'gold' must be the place of the right choice, from 0"
    return None


def _wrong_continuation(row: _Row) -> str | None:
    for field in ("context", "continuation"):
        if not _is_text(row.get(field)):
            return f"{field!r} must be a text"
    return None


def _wrong_instruction(row: _Row) -> str | None:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    names, options = row.get("instruction_id_list"), row.get("kwargs")
    if type(row.get("key")) is not int:
        return "'key' must be a whole number"
    if not _is_text(row.get("prompt")):
        return "'prompt' must be a text"
    if (
        not isinstance(names, list)
        or not names
        or not set(map(str, names)) <= set(INSTRUCTION_DICT)
    ):
        return "'instruction_id_list' must be a list of IFEval's instructions"
    if not isinstance(options, list) or len(options) != len(names):
        return "'kwargs' must be a list with one object an instruction"
    for name, given in zip(names, options, strict=True):
        try:
            INSTRUCTION_DICT[name](name).build_description(**{k: v for k, v in given.items() if v})
        except (AttributeError, TypeError, ValueError) as error:
            return f"'kwargs' do not fit {name} ({error})"
    return None


_Check = Callable[[_Row], str | None]
_TASKS: dict[str, tuple[Sequence[str], Callable[[], dict[str, Any]], _Check | None]] = {
    "local_piqa": (["piqa.jsonl"], lambda: _choice("acc_norm", "acc"), _wrong_choice),
    "local_arc_easy": (["arc_easy.jsonl"], lambda: _choice("acc", "acc_norm"), _wrong_choice),
    "local_lambada": (["lambada*.jsonl"], _lambada, _wrong_continuation),
    "local_perplexity": (["wikitext2*.txt", "*.txt"], _perplexity, None),
    "local_ifeval": (["ifeval*.jsonl"], _ifeval, _wrong_instruction),
}
"""The files of each task, the first pattern that matches; its configuration; what is wrong in a
row (a file without one holds plain text)."""

_YAML = (".yaml", ".yml")

LOCAL_SUITE = tuple(_TASKS)
"""The tasks of the local suite."""


def local_suite(directory: str | Path, tasks: Sequence[str] = LOCAL_SUITE) -> list[dict[str, Any]]:
    """Return lm-eval task configurations on the files of a directory, all of them read and checked.

    All tasks are zero-shot. The first metric of each, which `evaluate_tasks` reports:

    - `local_piqa`, `piqa.jsonl` (query, choices, gold): accuracy by log-likelihood per character;
      a query is all of the prompt before "Answer:", so it begins with "Question: ".
    - `local_arc_easy`, `arc_easy.jsonl` (the same fields): accuracy by log-likelihood.
    - `local_lambada`, `lambada*.jsonl` (context, continuation): share of continuations that are
      what the policy says greedily.
    - `local_perplexity`, `wikitext2*.txt`, else `*.txt`: word perplexity, exp of the negative
      log-likelihood of all text by the number of words between white space; each line that is not
      blank is a document, predicted from the begin or end token and from nothing before it. They
      come shuffled, so that a limit takes lines from all of the text.
      lm-eval's `wikitext` takes whole pages and undoes WikiText's spacing: its numbers are lower.
    - `local_ifeval`, `ifeval*.jsonl` (key, prompt, instruction_id_list, kwargs): share of prompts
      all of whose instructions are followed, strictly judged; answers of up to 1280 tokens, which
      `generation_kwargs` may shorten.

    Args:
        tasks: those of `LOCAL_SUITE` that are wanted.

    Raises:
        DataError: a file is missing, or there are two for one task; a line is malformed.
        ConfigError: a task is unknown, or what IFEval needs is not installed.
    """
    if unknown := [name for name in tasks if name not in _TASKS]:
        raise ConfigError(f"{unknown[0]}: is not one of {', '.join(LOCAL_SUITE)}.")
    return [_task_on(name, _the_file(Path(directory), _TASKS[name][0], name)) for name in tasks]


def suite_tasks(entries: Sequence[str]) -> list[str | dict[str, Any]]:
    """Return the tasks of a suite as `evaluate_tasks` takes them; those of files are read.

    Args:
        entries: files (.jsonl, .txt) as `file_task` takes them, directories of a `local_suite`,
            and lm-eval's names of tasks or paths of its YAML files.

    Raises:
        DataError: a file cannot be read or has other rows.
    """
    found: list[str | dict[str, Any]] = []
    for entry in entries:
        path = Path(entry)
        if path.suffix in (".jsonl", ".txt"):
            found.append(file_task(path))
        elif path.suffix not in _YAML and (path.is_dir() or path.name != entry):
            found += local_suite(path)
        else:
            found.append(entry)
    return found


def is_yaml(task: str) -> bool:
    """Return whether a task that lm-eval knows is the path of a YAML file of its."""
    return Path(task).suffix in _YAML


def yaml_files(path: str | Path) -> list[Path]:
    """Return a YAML file of lm-eval's and what it reads beside it.

    That is the YAML files that it includes, and theirs, and the Python files of its functions; not
    what these import.
    """
    found: list[Path] = []
    waiting = [Path(path).expanduser().resolve()]  # as lm-eval does, where links lead elsewhere
    while waiting:
        file = waiting.pop(0)
        if file in found or not file.is_file():  # as functions of an installed package are not
            continue
        found.append(file)
        if is_yaml(str(file)):
            waiting += [(file.parent / name).resolve() for name in _named_in(file)]
    return found


def _named_in(file: Path) -> Iterator[str]:
    """Yield what an lm-eval YAML file includes, and the files of its functions."""

    def functions(node: Any) -> Iterator[str]:
        if node.tag == "!function":
            yield node.value.rpartition(".")[0].replace(".", "/") + ".py"
        elif isinstance(node, yaml.CollectionNode):
            for inner in node.value:  # of a mapping, pairs
                for one in inner if isinstance(inner, tuple) else (inner,):
                    yield from functions(one)

    root = yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "include":
            named = value.value if isinstance(value, yaml.SequenceNode) else [value]
            yield from (one.value for one in named)
    if root is not None:
        yield from functions(root)


def file_task(path: str | Path) -> dict[str, Any]:
    """Return the lm-eval task configuration of one file, all of it read and checked.

    A file that is named as one of `local_suite` is that task; another has the rows of
    `arc_easy.jsonl` or of `lambada*.jsonl`, or is plain text (.txt), is scored as they are, and is
    a task of its own name.

    Raises:
        DataError: the file cannot be read or has other rows.
        ConfigError: what IFEval needs is not installed.
    """
    path = Path(path)
    for name, (patterns, _, _) in _TASKS.items():
        if path.match(patterns[0]):
            return _task_on(name, path)
    if path.suffix == ".txt":
        return _task_on("local_perplexity", path) | {"task": path.stem}
    _, first = next(read_jsonl(path), (0, None))
    for field, name in (("choices", "local_arc_easy"), ("continuation", "local_lambada")):
        if isinstance(first, dict) and field in first:
            return _task_on(name, path) | {"task": path.stem}
    raise DataError(
        f"{path}: has neither 'choices' nor 'continuation'; give query, choices and gold, or "
        "context and continuation."
    )


def _task_on(name: str, path: Path) -> dict[str, Any]:
    _, config, wrong = _TASKS[name]
    state = random.getstate()  # IFEval draws when it is imported, and what a row leaves open
    made = config()  # first: the checks of IFEval are its own
    _check_file(path, wrong)
    random.setstate(state)
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
        **made,
    }


def _the_file(directory: Path, patterns: Sequence[str], name: str) -> Path:
    if not directory.is_dir():
        raise DataError(f"{directory}: is not a directory; name the one with the suite's files.")
    found = next((f for p in patterns if (f := sorted(directory.glob(p)))), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{directory}: {found[0].name} and {found[1].name} are both for {name}; keep one."
        )
    raise DataError(
        f"{directory / patterns[0]}: missing; {name} reads it, add the file or leave the task out."
    )


def _check_file(path: Path, wrong: _Check | None) -> None:
    empty = True
    for number, row in read_jsonl(path) if wrong else read_lines(path):
        empty = False
        if wrong is None:
            continue
        said = wrong(row) if isinstance(row, dict) else "must be an object"
        if said:
            raise DataError(f"{path}:{number}: {said}; fix or drop the line.")
    if empty:
        raise DataError(f"{path}: is empty; copy it again.")
