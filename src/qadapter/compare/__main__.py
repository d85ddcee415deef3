"""A cell's own process: `python -m qadapter.compare DIRECTORY`."""

import os
import sys
from pathlib import Path
from threading import Thread

from qadapter.compare.cells import work


def _end_with_parent() -> None:
    """Wait for the end of standard input, which the parent holds open, and end this process."""
    while os.read(sys.stdin.fileno(), 1):  # `sys.stdin` itself would be locked at the exit
        pass
    print("the process that began this cell has ended", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    Thread(target=_end_with_parent, daemon=True).start()
    work(Path(sys.argv[1]).resolve())
