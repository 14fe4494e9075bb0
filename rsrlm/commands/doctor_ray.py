"""The doctor's checks of the Ray cluster that a run would join: its address, and the token that admits to it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rsrlm.runtime.address import fault_of, mode_at, token_file
from rsrlm.settings.base import ConfigError


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. `remedy` is empty exactly when the level is ok."""

    check: str
    level: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def check_ray(address: str, source: str, environ: Mapping[str, str]) -> Finding:
    """`address` is set by `source`; "local" means that the run starts a cluster."""
    if address == "local":
        return Finding("ray", "ok", "the run starts its own cluster")
    why, mend = fault_of(address, source)
    if not why:
        try:
            mode = mode_at(address, source, environ)
        except ConfigError as error:
            why, _, mend = str(error).rpartition("; ")
    if why:
        return Finding("ray", "fail", why, mend)
    token = "with its token" if mode == "token" else "and asks for no token"
    return Finding("ray", "ok", f"the run would join the cluster of {source}={address}, which answers {token}")


def check_ray_token(environ: Mapping[str, str]) -> Finding:
    """The secret that admits a process to this user's clusters, whose ports are open to the network."""
    path = token_file(environ)
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        return Finding("ray token", "ok", f"none in {path}: a run's own cluster gets one that ends with it")
    if mode & 0o077:
        why = f"{path} has mode {mode:o}: others who read it can run code in a run's cluster"
        return Finding("ray token", "warn", why, f"run `chmod 600 {shlex.quote(str(path))}`")
    asked = "a cluster of `ray start --head` here asks every host for it, which needs RAY_AUTH_MODE=token there"
    return Finding("ray token", "ok", f"{path} is readable by its owner alone; {asked}")
