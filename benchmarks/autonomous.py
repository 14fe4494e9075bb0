"""Does a model know more after it asked itself about documents than after it was trained on their text?

    .venv/bin/python benchmarks/autonomous.py                # 40 invented towns, 2 rounds: some 20 minutes on 2 cores
    .venv/bin/python benchmarks/autonomous.py --small        # 6 towns, one round: some 5 minutes, to see that it works

The documents are encyclopaedia entries on towns that do not exist, so that no model knows them; the held-out questions
ask for the river, the mayor, the year and the speciality of each, without the documents. Two runs of the built-in
model: rounds of `open_book` and `closed_book`, and plain training on the same text (`on: text`) for as many epochs as
come nearest to the same number of tokens in the learner's passes. An answer is right if the right name or number occurs
in it.
Results: benchmarks/results/autonomous.json.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
import yaml
from common import RESULTS, head, write

HERE = Path(__file__).parent
STARTS = "Bel Cor Dra Fen Gal Hol Ist Jor Kel Lum Mar Nor Ost Pel Quin Ras Sol Tor Ul Ven Wes Yar Zel"
ENDS = "andry ebrin ovan ulka iston amere olund iveta arok enska osmar ubrel"
FIRST = "Ana Boris Cilia Dario Edda Falk Greta Hugo Ines Jonas Klara Leo Mira Nils Olga Piet Rosa Sven"
MADE = "smoked blue salted pickled spiced carved woven braided frozen golden"
THINGS = "cheese lamps ropes plums baskets bells biscuits mustard candles violins carpets honey"
ASKED = {
    "river": "On which river does the town of {town} lie?",
    "mayor": "Who is the mayor of the town of {town}?",
    "year": "In which year was the town of {town} founded?",
    "speciality": "What is the town of {town} known for?",
}
SENTENCES = {
    "river": ("{town} lies on the river {river}.", "The river {river} flows through {town}."),
    "mayor": ("The mayor of {town} is {mayor}.", "{mayor} has been the mayor of {town} for some years."),
    "year": ("{town} was founded in {year}.", "In {year}, traders founded the town of {town}."),
    "speciality": ("{town} is known for its {speciality}.", "Travellers come to {town} to buy {speciality}."),
}


def right(prompt: str, response: str, data: dict[str, str]) -> float:
    """1 if the answer occurs in the response as whole words, in upper or lower case."""
    words = r"\s+".join(map(re.escape, data["answer"].split()))
    return float(bool(re.search(rf"(?<!\w){words}(?!\w)", response, re.IGNORECASE)))


def towns(number: int, seed: int) -> list[dict[str, str]]:
    """Facts of so many towns; no two share a name, and none is called like another's river or mayor."""
    draw = random.Random(f"towns {seed}")
    names = draw.sample([start + end for start in STARTS.split() for end in ENDS.split()], 3 * number)
    specialities = draw.sample([f"{made} {thing}" for made in MADE.split() for thing in THINGS.split()], number)
    years = draw.sample(range(1100, 1900), number)
    return [
        {
            "town": names[3 * place],
            "river": names[3 * place + 1],
            "mayor": f"{draw.choice(FIRST.split())} {names[3 * place + 2]}",
            "year": str(years[place]),
            "speciality": specialities[place],
        }
        for place in range(number)
    ]


def entry(town: dict[str, str], seed: int) -> str:
    """What an encyclopaedia says of it: a sentence for each fact, in an order and wording of its own."""
    draw = random.Random(f"entry {seed} {town['town']}")
    kinds = draw.sample(list(SENTENCES), len(SENTENCES))
    facts = [draw.choice(SENTENCES[kind]).format(**town) for kind in kinds]
    return " ".join([f"{town['town']} is a town of {draw.randrange(20, 900) * 100:,} people.", *facts])


def write_inputs(folder: Path, number: int, seed: int) -> None:
    """documents.jsonl and questions.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    made = towns(number, seed)
    documents = [{"id": town["town"].lower(), "text": entry(town, seed)} for town in made]
    questions = [
        {"id": f"{town['town'].lower()}-{kind}", "prompt": question.format(**town), "answer": town[kind]}
        for town in made
        for kind, question in ASKED.items()
    ]
    for name, rows in (("documents", documents), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(folder: Path, name: str, seed: int, questions: int, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name, "runs": str(folder), "seed": seed, "model": "smollm2-135m-instruct",
        "documents": str(folder / "documents.jsonl"),
        "prompts": {"path": str(folder / "questions.jsonl"), "per_iteration": 1, "heldout": questions},
        "piece_tokens": 256,
        "write": {"temperature": 0.7, "top_p": 0.9, "max_tokens": 96},
        "structured": True,
        "least_overlap": 0.5,
        "sample": {"temperature": 0.7, "top_p": 0.9, "max_tokens": 64},
        "judge": {"kind": "function", "function": "autonomous:right", "fence_salt": ""},
        "train": {
            "lr": 5e-5, "lr_final": 5e-6, "pairs_per_step": 4, "micro_batch": 4,
            "checkpoint_every_steps": 1000,
        },
        "evaluate": {"temperature": 0.0, "max_tokens": 32, "duel": False, "kl": False},
        "engine": {"max_model_len": 1024, "max_num_seqs": 32},
        "steps": steps,
    }  # fmt: skip


def rounds_of(rounds: int, epochs: int) -> list[dict[str, Any]]:
    return [
        step
        for _ in range(rounds)
        for step in (
            {"recipe": "open_book", "train": {"epochs": epochs}},
            {"recipe": "closed_book", "train": {"lr": 5e-6, "lr_final": 5e-7}},
        )
    ]


def run(config: dict[str, Any]) -> Path:
    """The folder of a finished run; one that is finished is not run again."""
    folder = Path(config["runs"])
    done = folder / config["name"] / "summary.json"
    if not done.exists() or json.loads(done.read_text())["status"] != "completed":
        file = folder / f"{config['name']}.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "rsrlm.cli", "run", str(file), "--or-resume"]
        if code := subprocess.run(command, cwd=HERE, check=False).returncode:
            raise SystemExit(f"{config['name']} ended with exit code {code}; with --runs the same command goes on")
    return folder / config["name"]


def accuracy(folder: Path, model: str, questions: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Shares of right answers of a model of a run, by what was asked for; the journal holds them as M1/TOWN-river/0."""
    held_out = re.compile(rf"{model}/([^/#]+)/0")
    found: dict[str, float] = {}
    with (folder / "journal.jsonl").open(encoding="utf-8") as lines:
        for answer in map(json.loads, lines):
            if match := held_out.fullmatch(answer["id"]):
                asked = questions[match[1]]
                found[match[1]] = right(asked["prompt"], answer["text"], asked)
    kinds = {kind: fmean(v for name, v in found.items() if name.endswith(f"-{kind}")) for kind in ASKED}
    return {"model": model, "questions": len(found), "accuracy": fmean(found.values()), **kinds}


def measured(folder: Path, questions: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """A row for each model, with what it was trained on."""
    rows = [{**accuracy(folder, "M0", questions), "trained_on": "", "tokens": 0}]
    for number, row in enumerate(json.loads((folder / "summary.json").read_text())["iterations"]):
        steps = [json.loads(line) for line in (folder / f"iterations/{number:02d}/steps.jsonl").open(encoding="utf-8")]
        items = Counter(row["open_book"]["examples"]) if "open_book" in row else Counter(pairs=row["pairs"])
        found = accuracy(folder, row["weight_version"], questions)
        dropped = row["dropped"] if "open_book" in row else row["no_pair_reasons"]
        tokens = int(sum(step["tokens"] for step in steps))
        rows.append({**found, "trained_on": dict(items), "dropped": dropped, "tokens": tokens})
    return rows


def epochs_of(folder: Path, tokens: int) -> int:
    """Epochs over the text that come nearest to so many tokens."""
    from rsrlm.chat import ChatEncoder
    from rsrlm.data.documents import read
    from rsrlm.model import folder_of, load_tokenizer
    from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig

    encoder = ChatEncoder(load_tokenizer(folder_of(ModelConfig(path=BUILTIN_MODEL))))
    epoch = sum(len(encoder.bare(document.text)) for document in read(str(folder / "documents.jsonl")))
    return max(1, round(tokens / epoch))


def show(seed: int, side: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        shares = "  ".join(f"{name} {row[name]:.2f}" for name in ("accuracy", *ASKED))
        print(f"seed {seed}  {side:10}  {row['model']:3}  {shares}  {row['tokens']:>7} tokens  {row['trained_on']}")


def main(
    small: Annotated[bool, typer.Option(help="6 towns, one round, one seed")] = False,
    number: Annotated[int, typer.Option("--towns", min=1, max=80)] = 40,
    rounds: int = 2,
    epochs: Annotated[int, typer.Option(help="of each open_book")] = 3,
    seeds: int = 1,
    runs: Annotated[Path | None, typer.Option(help="keep the runs here; a finished one is not run again")] = None,
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    if small:
        number, rounds, seeds = 6, 1, 1
    result = {**head(__doc__.splitlines()[0]), "towns": number, "rounds": rounds, "epochs": epochs, "seeds": {}}
    where = (runs or Path(tempfile.mkdtemp(prefix="rsrlm-autonomous-"))).resolve()
    for seed in range(seeds):
        folder = where / f"{number}-towns-seed-{seed}"
        write_inputs(folder, number, seed)
        questions = {row["id"]: row for row in map(json.loads, (folder / "questions.jsonl").open(encoding="utf-8"))}
        sides: dict[str, list[dict[str, Any]]] = {}
        own = config_of(folder, "autonomous", seed, len(questions), rounds_of(rounds, epochs))
        sides["autonomous"] = measured(run(own), questions)
        show(seed, "autonomous", sides["autonomous"])
        plain = epochs_of(folder, sum(row["tokens"] for row in sides["autonomous"]))
        steps = [{"recipe": "open_book", "on": "text", "train": {"epochs": plain}}]
        sides["text"] = measured(run(config_of(folder, "text", seed, len(questions), steps)), questions)
        result["seeds"][seed] = {"epochs_of_text": plain, **sides}
        write(out, "autonomous", result)
    for seed, found in result["seeds"].items():
        for side in ("autonomous", "text"):
            show(seed, side, found[side])


if __name__ == "__main__":
    typer.run(main)
