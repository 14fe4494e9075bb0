"""Hosts of a cluster, and what every one of them must see before a run starts: its folder and its models."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import xxhash
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rsrlm.config import Config
from rsrlm.model import weight_files
from rsrlm.runtime.address import address_of
from rsrlm.runtime.room import host_of, wanted_of
from rsrlm.runtime.weights import remove_stale
from rsrlm.settings.base import ConfigError, last_line

MARKER = ".seen"
LOOK_WAIT_S = 60.0  # for a host to start a process and answer
SHARED_WAIT_S = 5.0  # for a network file system to show a new file to other hosts


def on_node(node: str) -> dict[str, Any]:
    """Ray's options of what takes no CPU and is to run on this node, or not at all."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a host sees: the marker in the run folder, whether it can write there, and digests of the models."""

    marker: str
    writable: bool
    models: Mapping[str, str]


def digest_of_model(folder: str) -> str:
    """Of the config and the sizes of the weights; empty where there is no such model."""
    try:
        files = [(path.name, path.stat().st_size) for path in weight_files(Path(folder))]
        config = (Path(folder) / "config.json").read_bytes()
    except OSError:
        return ""
    return xxhash.xxh3_64_hexdigest(repr(files).encode() + config) if files else ""


def look(run: str, models: Mapping[str, str], marker: str) -> Sight:
    """See what there is, and take away what a killed run has left in this host's memory."""
    seen, deadline = "", time.monotonic() + SHARED_WAIT_S
    while seen != marker:
        with contextlib.suppress(OSError):
            seen = (Path(run) / MARKER).read_text()
        if seen == marker or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    if seen == marker:
        remove_stale(Path(run))
    found = {key: digest_of_model(folder) for key, folder in models.items()}
    return Sight(marker=seen, writable=os.access(run, os.W_OK), models=found)


def check_hosts(config: Config, models: Mapping[str, Path | None]) -> None:
    """Raises ConfigError where a host of a joined cluster that can hold an engine or a rank does not see the run
    folder, or a model: `models` has their folders by their keys. To be called before anything of the run is in the
    memory of a host."""
    if not address_of(config):
        return
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here and _works(node, config)]
    if not others:
        return
    folders = {key: str(folder) for key, folder in models.items() if folder}
    marker = config.folder / MARKER
    text = f"{socket.gethostname()} {time.time_ns()}"
    marker.write_text(text)
    try:
        _ask(others, str(config.folder), folders, text)
    finally:
        marker.unlink(missing_ok=True)


def _works(node: dict[str, Any], config: Config) -> bool:
    """Whether anything of a run can be placed on the node."""
    host = host_of(node)
    return bool(config.engine.producers) or any(
        host.places(one) and (not one.each or any(host.has.get(name) for name in one.each))
        for one in wanted_of(config, config.train.workers)
    )


def _ask(nodes: list[dict[str, Any]], run: str, folders: Mapping[str, str], marker: str) -> None:
    own = {key: digest_of_model(folder) for key, folder in folders.items()}
    asked = {}
    for node in nodes:
        task = ray.remote(look).options(max_retries=0, **on_node(node["NodeID"]))
        asked[task.remote(run, folders, marker)] = node
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_WAIT_S)
    problems = {asked[one]["NodeID"]: _heard(one, run, marker, own, folders) for one in answered}
    silent = f"gave no answer within {LOOK_WAIT_S:g} s: see `ray status`, and its logs"
    left = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # what is gone meanwhile is in nobody's way
    for node in nodes:
        if node["NodeID"] in left and (problem := problems.get(node["NodeID"], silent)):
            raise ConfigError(f"host {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) {problem}")


def _heard(reference: Any, run: str, marker: str, own: Mapping[str, str], folders: Mapping[str, str]) -> str:
    try:
        sight = ray.get(reference)
    except Exception as error:
        return f"cannot run rsrlm: {last_line(error)}; install the same version there"
    return _problem(sight, run, marker, folders, own)


def _problem(sight: Sight, run: str, marker: str, folders: Mapping[str, str], own: Mapping[str, str]) -> str:
    """What is wrong with what a host sees, and how to mend it; empty where it is right."""
    if sight.marker != marker:
        return f"does not see the run folder {run}: set runs to a folder that all hosts share, or mount it there"
    if not sight.writable:
        return f"cannot write to the run folder {run}: mount it for writing there"
    for key, folder in folders.items():
        if not sight.models[key]:
            return (
                f"does not see {key}={folder}: mount that folder there, or set HF_HOME to a folder that all hosts share"
            )
        if sight.models[key] != own[key]:
            return f"sees another model under {key}={folder}: all hosts must have the same files there"
    return ""
