"""Several methods on the same pairs, scored the same way: what each learns and what it forgets.

run.yaml → `CompareConfig` → splits (`data`) → for each `Method` a search and runs over seeds, every
one a `Cell` of its own process, kept on disk → figures (`measure`) → `comparison.json`.
"""

from qadapter.compare.config import CompareConfig
from qadapter.compare.methods import METHODS, Method
from qadapter.compare.run import compare
from qadapter.compare.running import Progress

__all__ = ["METHODS", "CompareConfig", "Method", "Progress", "compare"]
