"""House rules no linter holds: one version, every module importable, a light `import qadapter`."""

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qadapter

ROOT = Path(__file__).parents[2]
# `__main__` runs the program when imported.
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(qadapter.__path__, prefix="qadapter.")
    if not module.name.endswith(".__main__")
)


def test_the_changelog_starts_with_the_installed_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", changelog, flags=re.MULTILINE)
    assert versions[0] == importlib.metadata.version("qadapter")


def test_modules_are_found() -> None:
    assert "qadapter.functional" in MODULES  # else the next test would pass on nothing


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    if name in [f"qadapter.vllm_plugin.{part}" for part in ("model", "state", "strengths")]:
        pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
    importlib.import_module(name)


def test_importing_the_package_does_not_import_torch() -> None:
    # A fresh interpreter: this one has torch already, from the other tests.
    program = "import sys, qadapter; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_help_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import atexit, sys; from qadapter.cli import main\n"
        "atexit.register(lambda: print({'torch', 'transformers'} & set(sys.modules)))\n"
        "main(['--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("usage: qadapter")
    assert result.stdout.splitlines()[-1] == "set()"


def test_every_test_that_the_documents_name_is_there() -> None:
    named = {
        (path.name, *found)
        for path in ROOT.glob("docs/**/*.md")
        for found in re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)`", path.read_text("utf-8"))
    }
    assert len(named) > 40
    missing = [
        f"{page}: {file}::{name}"
        for page, file, name in sorted(named)
        if f"\ndef {name}(" not in (ROOT / "tests" / file).read_text("utf-8")
    ]
    assert missing == []
