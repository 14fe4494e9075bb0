"""Do the tests notice wrong code? Changes the modules in [tool.mutmut] one spot at a time, and runs their tests.

    make mutants                    # all modules; goes on where it was stopped, unless code or tests have changed since
    make mutants MODULE=pairing     # one of them, anew

Prints what became of the mutants of each module, and writes the survivors with their diffs to mutants/survivors.txt.
Those that may live stand in mutants.yaml beside this file, each with the reason. Fails where fewer than 95 % died, or
where a survivor has no reason. Code at the top level of a module is not changed: constants, regular expressions,
dataclasses.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "mutants"  # of mutmut: the changed modules, a copy of the tests, and the verdicts
ACCEPTED = ROOT / "tests" / "mutants.yaml"
LEAST = 0.95
DEAD = ("killed", "timeout", "segfault")
UNKNOWN = "not checked"
COLUMNS = ("mutants", "killed", "timeout", "survived", "no tests", "other", UNKNOWN)


def all_modules() -> list[str]:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [".".join(Path(path).with_suffix("").parts[1:]) for path in config["tool"]["mutmut"]["only_mutate"]]


def fingerprint() -> str:
    """Of all that a verdict depends on in the project."""
    found = hashlib.sha256()
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    places = [ROOT / name for name in ("rsrlm", "tests", "pyproject.toml", *config["tool"]["mutmut"]["also_copy"])]
    for path in sorted({found for place in places for found in (place, *place.rglob("*"))}):
        if path.is_file() and path != ACCEPTED and "__pycache__" not in path.parts:
            found.update(f"{path}\0".encode() + path.read_bytes())
    return found.hexdigest()


def run(modules: list[str], processes: int) -> None:
    """Let mutmut work; it keeps the verdicts below WORK, and says itself what went wrong."""
    of = WORK / "fingerprint"
    if not of.exists() or of.read_text(encoding="utf-8") != fingerprint():
        shutil.rmtree(WORK, ignore_errors=True)
        WORK.mkdir()
        of.write_text(fingerprint(), encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mutmut",
            "run",
            "--max-children",
            str(processes),
            *(f"rsrlm.{name}.*" for name in modules),
        ],
        cwd=ROOT,
        # Threads that a forked process does not have would be waited for.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)


def verdicts(module: str) -> dict[str, str]:
    """What became of each mutant."""
    from mutmut.stats import status_by_exit_code

    meta = WORK / "rsrlm" / f"{module.replace('.', '/')}.py.meta"
    found = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
    return {name: status_by_exit_code[code] for name, code in found.items()}


def described(name: str, module: str) -> tuple[str, str, str]:
    """Function, change and diff of a mutant. A change is "old lines -> new lines", which outlives new line numbers."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    diff = get_diff_for_mutant(name, path=f"rsrlm/{module.replace('.', '/')}.py")
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    old, new = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    function, of = orig_function_and_class_names_from_key(name)
    return (f"{of}.{function}" if of else function), f"{old} -> {new}", diff


def accepted() -> dict[tuple[str, str, str], str]:
    """The reason for each (module, function, change) that may survive."""
    found: dict[tuple[str, str, str], str] = {}
    for entry in yaml.safe_load(ACCEPTED.read_text(encoding="utf-8")) or []:
        for change in entry["changes"]:
            found[entry["module"], entry["function"], change] = entry["reason"]
    return found


def survivors(modules: dict[str, dict[str, str]]) -> Iterator[tuple[str, str, str, str, str]]:
    for module, found in modules.items():
        for name, verdict in found.items():
            if verdict not in (*DEAD, UNKNOWN):
                function, change, diff = described(name, module)
                yield module, function, change, f"{name}: {verdict}", diff


def report(modules: dict[str, dict[str, str]]) -> bool:
    """Prints the table and writes the survivors; whether all is well."""
    may_live = accepted()
    unused = {key for key in may_live if key[0] in modules}
    explained: Counter[str] = Counter()
    new: list[dict[str, Any]] = []
    with (WORK / "survivors.txt").open("w", encoding="utf-8") as file:
        for module, function, change, name, diff in survivors(modules):
            reason = may_live.get((module, function, change))
            unused.discard((module, function, change))
            if reason:
                explained[module] += 1
            else:
                new.append({"module": module, "function": function, "reason": "", "changes": [change]})
            print(f"{name}\nreason: {reason or 'NONE'}\n{diff}\n", file=file)

    print(f"\n{'module':14}" + "".join(f"{name:>12}" for name in (*COLUMNS, "died", "explained")))
    total: Counter[str] = Counter()
    for module, found in modules.items():
        counts = Counter(verdict if verdict in COLUMNS else "other" for verdict in found.values())
        counts["mutants"] = len(found)
        counts["dead"] = sum(verdict in DEAD for verdict in found.values())
        counts["explained"] = explained[module]
        total += counts
        print(line(module, counts))
    if len(modules) > 1:
        print(line("all", total))

    for module, function, change in sorted(unused):
        print(f"in {ACCEPTED.name}, but no survivor: {module}, {function}: {change}")
    if new:
        print(f"\n{len(new)} survivors without a reason. Test them, or add them to {ACCEPTED.relative_to(ROOT)}:\n")
        print(yaml.safe_dump(new, sort_keys=False, allow_unicode=True, width=1000))
    if total[UNKNOWN]:
        print(f"stopped before the last {total[UNKNOWN]}; the same command goes on")
        return False
    share = total["dead"] / total["mutants"]
    print(f"{share:.1%} of {total['mutants']} died (at least {LEAST:.0%} must); survivors: {WORK.name}/survivors.txt")
    return share >= LEAST and not new


def line(name: str, counts: Counter[str]) -> str:
    numbers = "".join(f"{counts[column]:>12}" for column in COLUMNS)
    return f"{name:14}{numbers}{counts['dead'] / max(1, counts['mutants']):>12.1%}{counts['explained']:>12}"


def main() -> None:
    known = all_modules()
    parser = argparse.ArgumentParser(description="Change the code and see whether a test fails.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(known)}; all without any")
    parser.add_argument("--processes", type=int, default=1, help="mutants at once, a core each (default: 1)")
    parser.add_argument("--report", action="store_true", help="only print what was found before")
    options = parser.parse_args()
    if unknown := set(options.modules) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    os.chdir(ROOT)
    if not options.report:
        run(options.modules, options.processes)
    sys.exit(not report({name: verdicts(name) for name in options.modules or known}))


if __name__ == "__main__":
    main()
