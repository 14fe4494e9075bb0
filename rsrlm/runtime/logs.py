"""What an actor wrote before it died, kept in the run folder: it is hard to find on its host, and may go with it."""

import asyncio
import contextlib
import os
from pathlib import Path

import ray

from rsrlm.runtime.places import on_node

LINES = 200
WAIT_S = 30.0  # for its host to answer


def last_lines(pid: int) -> list[str]:
    """Of the error log of a worker of Ray on this host. To be called in another one, which has its log beside it."""
    lines: list[str] = []
    for path in Path(os.readlink("/proc/self/fd/2")).parent.glob(f"worker-*-{pid}.err"):
        lines += path.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]
    return lines


async def keep_log(node: str, pid: int, path: Path) -> list[str]:
    """Write the last lines of a process on this node to the file; returns them. None where its host is gone too."""
    if not ray.is_initialized():
        return []
    with contextlib.suppress(Exception):
        lines = await asyncio.wait_for(ray.remote(last_lines).options(**on_node(node)).remote(pid), WAIT_S)
        if lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join([*lines, ""]), encoding="utf-8")
        return lines
    return []
