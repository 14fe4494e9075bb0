"""The layers: imports only point down, and the leaves stay light. See the README's picture."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rsrlm"
HEAVY = {"ray", "vllm", "deepspeed", "torch", "transformers"}

# Layer of every module; an import at the top of a module may only go to a lower layer or, in its own, as listed.
LAYERS = {
    "records": 0, "config": 0, "files": 0,
    "chat": 1, "judging": 1, "pairing": 1, "prompts": 1, "buffer": 1, "losses": 1, "packing": 1, "model": 1,
    "functions": 1, "progress": 1, "ranked": 1, "self_instruct": 1, "metrics": 1, "endpoint": 1, "meta_judging": 2,
    "watch": 2, "ask": 2, "store": 2, "plan": 3, "doctor": 4, "produce": 3, "evaluate": 4, "seeds": 4, "judge_eval": 5,
    "loop": 5, "runtime.weights": 6, "runtime.mailbox": 6, "runtime.vllm_worker": 7, "runtime.engine": 7,
    "runtime.learner": 7, "runtime.actors": 8, "runtime.launch": 9, "runtime.tools": 10, "cli": 11,
}  # fmt: skip
SIDEWAYS = {("judging", "chat"), ("functions", "judging"), ("losses", "packing"), ("ranked", "chat"),
            ("runtime.engine", "runtime.vllm_worker")}  # fmt: skip
# Who may import what that is heavy, anywhere in the module.
ALLOWED = {
    "torch": {"losses", "packing", "model", "runtime.*"},
    "transformers": {"model", "runtime.*"},
    "ray": {"runtime.actors", "runtime.launch", "runtime.learner"},
    "vllm": {"runtime.engine", "runtime.vllm_worker"},
    "deepspeed": {"runtime.learner"},
}
LIGHT = ["records", "config", "files", "chat", "judging", "pairing", "prompts", "buffer", "model", "store",
         "plan", "doctor", "produce", "evaluate", "loop", "progress", "cli", "ranked", "self_instruct",
         "metrics", "watch", "meta_judging", "ask", "seeds", "judge_eval", "endpoint", "functions"]  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


def imports(path: Path, top_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def own(imported: set[str]) -> set[str]:
    names = {name.removeprefix("rsrlm.") for name in imported if name.startswith("rsrlm.")}
    return {known for known in LAYERS if any(name == known or name.startswith(known + ".") for name in names)}


def test_every_module_has_a_layer() -> None:
    assert set(modules()) <= set(LAYERS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str) -> None:
    upward = {
        target
        for target in own(imports(modules()[name], top_only=True))
        if LAYERS[target] >= LAYERS[name] and (name, target) not in SIDEWAYS
    }
    assert not upward


@pytest.mark.parametrize("name", sorted(modules()))
def test_heavy_imports_only_where_allowed(name: str) -> None:
    for imported in imports(modules()[name], top_only=False):
        root = imported.split(".")[0]
        if root in HEAVY:
            allowed = ALLOWED[root]
            assert name in allowed or f"{name.split('.')[0]}.*" in allowed, f"{name} imports {imported}"


def test_light_modules_import_nothing_heavy() -> None:
    """In a fresh interpreter, one after the other."""
    code = "import sys\n" + "".join(
        f"import rsrlm.{name}\nbad = {HEAVY!r} & set(sys.modules)\nassert not bad, ('{name}', bad)\n" for name in LIGHT
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_packages_are_empty() -> None:
    assert all(not path.read_text().strip() for path in PACKAGE.rglob("__init__.py"))
