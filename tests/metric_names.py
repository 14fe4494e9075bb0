"""The names of metrics in docs/trackers.md; a star stands for the rest of a name."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs" / "trackers.md"

# What only a real learner and real engines measure: test_run.py finds it.
REAL = {
    "iteration/prefix_cache_hit_share", "published/bytes", "published/seconds", "train/grad_norm", "train/lr",
    "train/nll", "train/pairs", "train/rejected_logp", "train/seconds", "train/tokens_per_s",
}  # fmt: skip


def documented() -> set[str]:
    """The names in the first column of the table."""
    lines = DOCS.read_text(encoding="utf-8").partition("## Names")[2].splitlines()
    return {name for line in lines if line.startswith("| `") for name in re.findall("`([^`]+)`", line.split("|")[1])}


def undocumented(logged: Iterable[str]) -> set[str]:
    return {name for name in logged if not any(fnmatchcase(name, pattern) for pattern in documented())}


def never_logged(logged: Iterable[str]) -> set[str]:
    """Documented names that nothing has."""
    names = list(logged)
    return {pattern for pattern in documented() if not any(fnmatchcase(name, pattern) for name in names)}
