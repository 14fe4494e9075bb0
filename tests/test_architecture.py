"""The shape of the package: imports point down, what is light stays light, and nothing grows beyond one's view."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rsrlm"
HEAVY = {"ray", "vllm", "deepspeed", "torch", "transformers"}

# From the bottom up. A module imports what stands in lower lines, or in its own, wherever in it the import stands.
LAYERS = (
    {"records", "settings"},
    {"config", "engines"},
    {"placeholders", "chat", "model", "losses", "store", "jobs"},
    {"run"},
    {"judges", "data", "pairing"},
    {"report"},
    {"meta_judging", "recipes", "evaluate", "candidates", "training", "iterative", "online"},
    {"runtime"},
    {"commands"},
    {"command_line"},
    {"cli"},
)
# Who may import what is heavy, anywhere in the module.
ALLOWED = {
    "torch": {"losses", "model", "runtime"},
    "transformers": {"model", "runtime"},
    "ray": {"runtime"},
    "vllm": {"runtime"},
    "deepspeed": {"runtime"},
}
HEAVY_ROOMS = {"losses", "runtime"}  # every other module can be imported without any of these

MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 330, 50, 8


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def layer(name: str) -> int:
    room = name.split(".")[0]
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def own(imported: set[str]) -> set[str]:
    names = {name.removeprefix("rsrlm.") for name in imported if name.startswith("rsrlm.")}
    return {known for known in MODULES if any(name == known or name.startswith(known + ".") for name in names)}


def functions(name: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    upward = {target for target in own(imports(name)) if layer(target) > layer(name)}
    assert not upward


def test_imports_make_no_circle() -> None:
    """Within a layer too: take away what imports nothing that is left, until nothing is left."""
    left = {name: own(imports(name)) - {name} for name in MODULES}
    while left:
        free = {name for name, targets in left.items() if not targets & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in free}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_heavy_imports_only_where_allowed(name: str) -> None:
    for imported in imports(name):
        root = imported.split(".")[0]
        if root in HEAVY:
            assert name.split(".")[0] in ALLOWED[root], f"{name} imports {imported}"


def test_light_modules_import_nothing_heavy() -> None:
    """In a fresh interpreter, one after the other."""
    light = sorted(name for name in MODULES if name.split(".")[0] not in HEAVY_ROOMS)
    code = "import sys\n" + "".join(
        f"import rsrlm.{name}\nbad = {HEAVY!r} & set(sys.modules)\nassert not bad, ('{name}', bad)\n" for name in light
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_fit_the_eye(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES


def test_packages_are_empty() -> None:
    assert all(not path.read_text().strip() for path in PACKAGE.rglob("__init__.py"))


def test_functions_fit_the_eye() -> None:
    lengths: dict[str, int] = {}
    for name in MODULES:
        for node in functions(name):
            key, length = f"{name}.{node.name}", (node.end_lineno or 0) - node.lineno + 1
            lengths[key] = max(length, lengths.get(key, 0))
    assert {key: n for key, n in lengths.items() if n > MOST_FUNCTION_LINES} == {}


def test_few_parameters() -> None:
    crowded = set()
    for name in MODULES:
        for node in functions(name):
            names = [one.arg for one in (*node.args.args, *node.args.kwonlyargs)]
            if len(names) - (names[:1] in (["self"], ["cls"])) > MOST_PARAMETERS:
                crowded.add(f"{name}.{node.name}")
    assert crowded == set()


def test_class_names_are_those_of_one_class() -> None:
    """But for `Config`, which recipes and judges nest."""
    classes = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert {name for name, number in classes.items() if number > 1} == {"Config"}
