"""Where the Ray cluster is that a run joins, and what is wrong with an address that none can be joined at."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from rsrlm.config import Config
from rsrlm.settings.base import ConfigError

RAY_NOTE = Path("/tmp/ray/ray_current_cluster")  # where `ray start` notes the address that "auto" joins


def address_of(config: Config) -> str | None:
    """The cluster to join. "local" is Ray's word for none: one of this run's own."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def ray_address(configured: str | None, environ: Mapping[str, str], note: Path = RAY_NOTE) -> tuple[str, str]:
    """The cluster that a run would join ("local": it starts one), and the setting that names it."""
    address, source = configured, "ray.address"
    if address in (None, "", "auto") and environ.get("RAY_ADDRESS"):
        address, source = environ["RAY_ADDRESS"], "RAY_ADDRESS"
    if address == "auto":
        address = note.read_text().strip() if note.is_file() else "127.0.0.1:6379"
    return address or "local", source


def fault_of(address: str, source: str) -> tuple[str, str]:
    """What is wrong with the address that `source` sets, and how it is mended; empty where something answers."""
    host, _, port = address.rpartition(":")
    own = f"unset {source} for a cluster of the run's own"
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65_536:
        why = f"{source}={address} is not the HOST:PORT of a cluster"
        if address.startswith("ray://"):
            why += " (Ray's client of ray:// runs no driver of this kind: run rsrlm on a host of the cluster)"
        elif "://" in address:
            why += " (an http:// one is for `ray job submit` alone)"
        return why, f"set {source} to one such as 10.0.0.1:6379, or {own}"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: not a host name at all
        why = f"the run would join the cluster of {source}={address}, which does not answer: "
        return why + (getattr(error, "strerror", None) or str(error)), (
            f"start it there with `ray start --head --port={port}`, or {own}"
        )
    return "", ""


def check_address(config: Config) -> None:
    """Raises ConfigError where nothing can be joined at the cluster's address."""
    if address_of(config) is None:
        return
    why, mend = fault_of(*ray_address(config.ray.address, os.environ))
    if why:
        raise ConfigError(f"{why}; {mend}")
