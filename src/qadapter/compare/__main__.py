"""A cell's own process: `python -m qadapter.compare DIRECTORY`."""

import sys
from pathlib import Path

from qadapter.compare.cells import work

if __name__ == "__main__":
    work(Path(sys.argv[1]).resolve())
