"""Fixtures of all tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def own_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take away the handlers that lm-eval's program leaves on a stream of this or another test."""
    import lm_eval.utils

    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", False)
    logger = logging.getLogger("lm_eval")
    logger.handlers.clear()
    yield
    logger.handlers.clear()
