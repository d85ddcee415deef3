"""Exports of tiny policies, of the families that the vLLM plugin knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import tiny_policy
from fakes import SIZES_FOR_VLLM

from qadapter.export import export_policy
from qadapter.policy import Policy


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that exports a tiny policy once: family → policy and directory."""
    done: dict[str, tuple[Policy, Path]] = {}

    def export(family: str) -> tuple[Policy, Path]:
        if family not in done:
            # A window that prompts are longer than.
            sizes = SIZES_FOR_VLLM | ({"sliding_window": 16} if family == "mistral" else {})
            policy = tiny_policy(family, sizes=sizes, alpha_0=0.4, alpha_tilde=0.6)
            directory = tmp_path_factory.mktemp("export") / family
            export_policy(policy, directory, strength=0.7)
            done[family] = policy, directory
        return done[family]

    return export
