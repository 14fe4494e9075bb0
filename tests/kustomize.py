"""What `kubectl kustomize` makes of the folders in cluster/kuberay, for machines without kubectl.

It knows resources, components, JSON patches, ConfigMaps and images; any other key is an error.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

KNOWN = {
    "apiVersion", "kind", "resources", "components", "patches", "configMapGenerator", "generatorOptions", "images",
    "configurations",
}  # fmt: skip


def build(folder: Path) -> list[dict[str, Any]]:
    """The objects of a folder, as kustomize prints them, in no particular order."""
    return _applied(folder, [])


def _applied(folder: Path, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a kustomization makes of `objects`, which only a component is given."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if unknown := spec.keys() - KNOWN:
        raise ValueError(f"{folder}: {sorted(unknown)}: not known to tests/kustomize.py; add it there")
    for name in spec.get("resources", []):
        objects = objects + (build(folder / name) if (folder / name).is_dir() else _read(folder / name))
    for made in spec.get("configMapGenerator", []):
        data = {Path(name).name: (folder / name).read_text(encoding="utf-8") for name in made["files"]}
        objects = [
            *objects,
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": made["name"]}, "data": data},
        ]
    for name in spec.get("components", []):
        objects = _applied((folder / name).resolve(), objects)
    for patch in spec.get("patches", []):
        targets = [one for one in objects if one["kind"] == patch["target"]["kind"]]
        if not targets:
            raise ValueError(f"{folder}: no {patch['target']['kind']} to patch")
        for target in targets:
            for operation in yaml.safe_load(patch["patch"]):
                _operate(target, operation)
    for image in spec.get("images", []):
        for container in (found for one in objects for found in containers(one)):
            name, _, tag = container["image"].partition(":")
            if name == image["name"]:
                container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}".rstrip(":")
    return objects


def _read(file: Path) -> list[dict[str, Any]]:
    # Loading again what was dumped without aliases makes copies of what anchors share.
    dumper = type("NoAliases", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    return [
        yaml.safe_load(yaml.dump(one, Dumper=dumper)) for one in yaml.safe_load_all(file.read_text(encoding="utf-8"))
    ]


def containers(value: Any) -> list[dict[str, Any]]:
    """All containers anywhere in an object."""
    if isinstance(value, list):
        return [found for one in value for found in containers(one)]
    if not isinstance(value, dict):
        return []
    return [*value.get("containers", []), *(found for one in value.values() for found in containers(one))]


def _operate(target: Any, operation: dict[str, Any]) -> None:
    parent, last = _at(target, operation["path"])
    kind = operation["op"]
    value = operation.get("value")
    if kind == "copy":
        source, name = _at(target, operation["from"])
        kind, value = "add", copy.deepcopy(source[name])
    if kind == "replace":
        parent[last]  # an error where there is nothing to replace
        parent[last] = value
    elif kind == "add" and isinstance(parent, list):
        parent.insert(last, value)
    elif kind == "add":
        parent[last] = value
    else:
        raise ValueError(f"{kind}: not known to tests/kustomize.py; add it there")


def _at(target: Any, path: str) -> tuple[Any, Any]:
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in path.lstrip("/").split("/"))
    for part in parents:
        target = target[int(part) if isinstance(target, list) else part]
    return target, int(last) if isinstance(target, list) else last
