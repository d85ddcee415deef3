"""`python -m qadapter.cli`, which launchers of several processes start."""

import sys

from qadapter.cli import main

if __name__ == "__main__":
    sys.exit(main())
