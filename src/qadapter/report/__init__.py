"""The report of a comparison: one page that needs no network, and its pictures."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qadapter.files import whole_files
from qadapter.report import figures, tables
from qadapter.report.results import Results
from qadapter.report.wording import lead, paragraphs

__all__ = ["write_report"]


def write_report(comparison: Mapping[str, Any], directory: Path) -> Path:
    """Write `report.html` and its pictures into `directory`; return the page's path.

    The page holds its pictures and style itself, loads nothing, and works without JavaScript. All
    intervals but those of win rates are computed here, from the votes and windows in `comparison`,
    as `qadapter.stats` tells.

    Args:
        comparison: what `comparison.json` holds. Q-Adapters are the methods whose library begins
            with `qadapter`; tasks are compared with the method `base`. A method's own setting is
            its dial at 1, or at `own_dial` if it has that field; where the dial has no such value,
            at the last. A run's `at_reference` holds `tasks` at the reference's margin and the
            `dial` there; its `adapter`, where that lies, relative to the comparison.
        directory: made if it is not there. Pictures of an earlier report go.

    Raises:
        UserError: it cannot be written.
    """
    results = Results(comparison)
    pictures = figures.draw(results)
    page = _render(results, pictures)
    with whole_files(directory) as partial:
        for name in figures.PICTURES:
            if name in pictures:
                (partial / f"{name}.png").write_bytes(pictures[name])
            else:  # of an earlier report
                Path(directory, f"{name}.png").unlink(missing_ok=True)
        (partial / "report.html").write_text(page, encoding="utf-8")
    return Path(directory) / "report.html"


def _render(results: Results, pictures: Mapping[str, bytes]) -> str:
    """Return the page; every text that goes into it is escaped by jinja2."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = (files("qadapter") / "data_files" / "report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        results=results,
        comparison=results.comparison,
        tables=tables,
        lead=lead(results),
        paragraphs=paragraphs(results),
        pictures={name: b64encode(png).decode() for name, png in pictures.items()},
    )
