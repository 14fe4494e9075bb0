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
    {"records", "config"},
    {"chat", "model", "losses", "store"},
    {"judges", "data", "pairing"},
    {"report"},
    {"buffer", "meta_judging", "ask", "produce", "seeds", "evaluate", "judge_eval", "loop"},
    {"runtime"},
    {"commands"},
    {"cli"},
)
UPWARD = {("runtime.launch", "commands.plan")}  # not mended yet
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
# What is larger still. It may shrink, and an entry that is not needed any more must go.
LARGE = {
    "chat": 352, "config": 812, "ask": 366, "seeds": 365, "loop": 680, "judges.verdicts": 386, "data.ranked": 618,
    "report.metrics": 363, "report.signs": 429, "store.folder": 390, "commands.doctor": 440, "commands.tools": 630,
    "runtime.actors": 550, "runtime.endpoint": 357, "runtime.engine": 389, "runtime.launch": 770,
    "runtime.learner": 643,
}  # fmt: skip


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
    upward = {target for target in own(imports(name)) if layer(target) > layer(name) and (name, target) not in UPWARD}
    assert not upward


def test_imports_make_no_circle() -> None:
    """Within a layer too: take away what imports nothing that is left, until nothing is left."""
    left = {name: own(imports(name)) - {name} for name in MODULES}
    left["runtime.launch"] -= {"commands.plan"}
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
    assert lines <= LARGE.get(name, MOST_LINES)
    assert name not in LARGE or lines > MOST_LINES, f"{name} has {lines} lines: take it out of LARGE"


def test_packages_are_empty() -> None:
    assert all(not path.read_text().strip() for path in PACKAGE.rglob("__init__.py"))


@pytest.mark.skip(reason="the rule for functions, parameters and class names is not met yet")
def test_functions_and_names() -> None:
    long = [
        f"{name}.{node.name}"
        for name in MODULES
        for node in functions(name)
        if (node.end_lineno or 0) - node.lineno + 1 > MOST_FUNCTION_LINES
        or len(node.args.args) + len(node.args.kwonlyargs) > MOST_PARAMETERS + 1
    ]
    classes = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert not long
    assert not [name for name, number in classes.items() if number > 1]
