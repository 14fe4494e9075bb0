"""The doctor's checks of the Ray cluster that a run would join: its address, and the token that admits to it."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rsrlm.runtime.address import fault_of


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. `remedy` is empty exactly when the level is ok."""

    check: str
    level: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def check_ray(address: str, source: str) -> Finding:
    """`address` is set by `source`; "local" means that the run starts a cluster."""
    if address == "local":
        return Finding("ray", "ok", "the run starts its own cluster")
    why, mend = fault_of(address, source)
    if why:
        return Finding("ray", "fail", why, mend)
    return Finding("ray", "ok", f"the run would join the cluster of {source}={address}, which answers")


def check_ray_token(environ: Mapping[str, str]) -> Finding:
    """The secret that admits a process to this user's clusters, whose ports are open to the network."""
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        return Finding("ray token", "ok", f"none in {path}: the first run makes one")
    if not mode & 0o077:
        return Finding("ray token", "ok", f"{path} is readable by its owner alone")
    why = f"{path} has mode {mode:o}: others who read it can run code in a run's cluster"
    return Finding("ray token", "warn", why, f"run `chmod 600 {shlex.quote(str(path))}`")
