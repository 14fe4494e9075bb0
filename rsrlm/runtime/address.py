"""Where the Ray cluster is that a run joins, and what is wrong with an address that none can be joined at."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from rsrlm.config import Config
from rsrlm.settings.base import ConfigError, NotYet

RAY_NOTE = Path("/tmp/ray/ray_current_cluster")  # where `ray start` notes the address that "auto" joins


def address_of(config: Config) -> str | None:
    """The cluster to join. "local" is Ray's word for none: one of this run's own."""
    address = config.ray.address
    if address in (None, "", "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    return None if address in (None, "", "local") else address


def ray_address(configured: str | None, environ: Mapping[str, str], note: Path = RAY_NOTE) -> tuple[str, str]:
    """The cluster that a run would join ("local": it starts one), and the setting that names it."""
    address, source = configured, "ray.address"
    if address in (None, "", "auto") and environ.get("RAY_ADDRESS"):
        address, source = environ["RAY_ADDRESS"], "RAY_ADDRESS"
    if address == "auto":
        address = note.read_text().strip() if note.is_file() else "127.0.0.1:6379"
    return address or "local", source


def token_file(environ: Mapping[str, str]) -> Path:
    """Where Ray keeps the secret that admits a process to this user's clusters."""
    return Path(environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))


def token_of(environ: Mapping[str, str]) -> str:
    """The user's token; empty where there is none."""
    if token := environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    try:
        return token_file(environ).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError):
        return ""


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


def mode_at(address: str, source: str, environ: Mapping[str, str]) -> str:
    """The RAY_AUTH_MODE with which the cluster at this address admits a driver. Raises ConfigError where it does not.

    Ray's own answers come late and name no reason: a driver without the token fails after 20 s as if nobody were there,
    and the actors of one that shows a token nobody asked for die.
    """
    wanted, at = environ.get("RAY_AUTH_MODE", "").lower(), f"{source}={address}"
    if environ.get("RAY_USE_TLS", "0") == "1" or wanted not in ("", "token", "disabled"):
        return wanted or "disabled"
    answer = _answer_of(address, "")
    if answer == "OK":
        if wanted == "token":
            raise ConfigError(
                f"RAY_AUTH_MODE=token, but the cluster of {at} was started without tokens, and its workers could not "
                "speak with the run; unset RAY_AUTH_MODE"
            )
        return "disabled"
    if answer != "UNAUTHENTICATED":
        raise ConfigError(
            f"{at}: what answers there is no head of Ray ({answer}); give the address that `ray start --head` printed"
        )
    copy = "copy ~/.ray/auth_token from the cluster's head, with mode 600, or set RAY_AUTH_TOKEN"
    token, file = token_of(environ), token_file(environ)
    if not token:
        raise ConfigError(f"the cluster of {at} asks for a token, and there is none in {file}; {copy}")
    if _answer_of(address, token) != "OK":
        held = "RAY_AUTH_TOKEN" if environ.get("RAY_AUTH_TOKEN") else file
        raise ConfigError(f"the cluster of {at} refuses the token in {held}; {copy}")
    if wanted == "disabled":
        raise ConfigError(f"RAY_AUTH_MODE=disabled, but the cluster of {at} asks for a token; unset RAY_AUTH_MODE")
    return "token"


def _answer_of(address: str, token: str) -> str:
    """How a head of Ray answers whoever shows this token: the name of a status of gRPC."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            alive(b"", timeout=10, metadata=[("authorization", f"Bearer {token}")] if token else [])
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def check_address(config: Config) -> None:
    """Raises ConfigError where no cluster can be joined. Sets RAY_AUTH_MODE, before Ray is imported, which reads it."""
    if address_of(config) is None:
        return
    address, source = ray_address(config.ray.address, os.environ)
    why, mend = fault_of(address, source)
    if why:
        raise NotYet(f"{why}; {mend}")
    os.environ["RAY_AUTH_MODE"] = mode_at(address, source, os.environ)
