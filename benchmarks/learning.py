"""Does the loop learn? A verifiable judge, fewer words is better (at least five), on the real 135M model.

    .venv/bin/python benchmarks/learning.py            # 3 seeds, three iterations each; about 20 minutes on 2 cores
    .venv/bin/python benchmarks/learning.py --seeds 1  # one seed
    .venv/bin/python benchmarks/learning.py --clock online      # the same prompts in nine rounds
    .venv/bin/python benchmarks/learning.py --clock overlapped  # and the engines get new weights after three of them

Every seed is a run of `rsrlm run` with this file's `fewer_words` as the judge. On held-out prompts the mean length in
words must fall by at least 30 %, and the judge's mean must rise in every iteration. Collapse would do that too, so
these must hold as well: at least 95 % of the outputs end by themselves and have five words or more, distinct-2 stays
above half of M0's, and the negative log-likelihood of a fixed text rises by at most 10 % (all for M3; the other rows
are in the results). Of M0's outputs the cap may
cut fewer than 10 %. Results: benchmarks/results/learning.json and learning.png, of other clocks learning_CLOCK.json.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ITERATIONS = 3
ROUNDS = 3  # of an iteration, on the online clock
CLOCKS = {"iterative": "", "online": "lag: 1", "overlapped": f"lag: 0, sync_every: {ROUNDS}"}
LEAST_WORDS = 5
BEST_WORDS = 10

FIXED_TEXT = """The old harbour lies at the end of a narrow valley, where a river meets the sea. In winter the
fishing boats stay behind the stone wall, and people mend nets in the long wooden sheds. When spring comes, the first
boats leave
before sunrise and return in the afternoon with cod and herring. Children wait on the quay and count the crates.
A small museum keeps tools, photographs and letters from the last two hundred years. Most visitors arrive by train,
walk along the water for an hour, drink a cup of tea and leave again. Those who stay longer learn the names of the
boats, and some of them come back every year. The water is cold and clear, and on quiet days one can hear the bells of
the church on the other side. A doctor comes to the village twice a week. The school has forty pupils and two teachers,
who also run the library. Bread is baked in the morning and sold until it is gone. Nobody locks the door at night."""


QUESTIONS = (
    "Tell me about {} in a few sentences.",
    "What is interesting about {}? Keep it brief.",
    "Describe {} in two or three sentences.",
)

TOPICS = """bicycles; rainbows; coffee; chess; earthquakes; honey bees; lighthouses; jazz; volcanoes; paper; umbrellas;
whales; bread; compasses; glaciers; libraries; mirrors; tulips; the moon; penguins; clay pots; sailing;
thunder; wool; bridges; olive oil; kites; photosynthesis; trains; snow; clocks; gardens; salt; maps; tea;
dinosaurs; origami; soap; deserts; owls; pianos; cheese; hiking; magnets; rivers; violins; windmills;
chocolate; camping; stars; carpets; swimming; potatoes; glass; the heart; letters; rubber; elephants; candles;
museums; batteries; rice; wolves; poetry; sleep; bamboo; castles; cameras; pumpkins; the sea; football;
spiders; cotton; radio; mushrooms; shadows; tides; farming; gold; squirrels; theatre; ice cream; caves;
dolphins; pencils; vaccines; apples; the equator; knitting; satellites; frogs; markets; marathons; steam
engines; coral reefs; dictionaries; fog; horses; lemons; telescopes; parrots; yoga; recycling; bricks;
waterfalls; the violin; cinnamon; tunnels; ants; painting; forests; helicopters; silk; turtles; calendars;
pottery; oranges; lightning; soup; cranes; ballet; islands; garlic; airports; diamonds; snails; the wheel;
cactus plants; fireworks; oceans; baskets; lions; pasta; ladders; the printing press; ferries; peppers;
meteors; drums; hats; butterflies; the alphabet; bicycle helmets; cherries; dams; folk songs; hammers;
kitchens; lakes; mountains"""


def fewer_words(prompt: str, response: str) -> float:
    """5 points for five to ten words, falling by one for every 20 words more; 0 below five words.

    The best score is not at the edge itself: a judge that pays most for exactly five words pays for falling short too,
    since no sampler hits a length exactly.
    """
    words = len(response.split())
    return 0.0 if words < LEAST_WORDS else min(5.0, max(0.0, 5.0 - (words - BEST_WORDS) / 20))


def write_prompts(path: Path) -> None:
    """Two questions about each topic. Answers are a few sentences: the cap cuts few of them, and an answer of less than
    five words would be a collapse and not a good answer."""
    topics = [topic.strip() for topic in TOPICS.replace("\n", " ").split(";")]
    prompts = [
        {
            "id": f"{topic.replace(' ', '-')}-{place}",
            "prompt": QUESTIONS[(number + place) % len(QUESTIONS)].format(topic),
        }
        for number, topic in enumerate(topics)
        for place in range(2)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def rounds(clock: str) -> int:
    """From one evaluation to the next."""
    return 1 if clock == "iterative" else ROUNDS


def changes(clock: str) -> list[str]:
    """What the config says of this clock: the prompts of an iteration are those of its rounds."""
    if clock == "iterative":
        return []
    rule = f"kind: online, {CLOCKS[clock]}, reference: before, evaluate_every: {ROUNDS}"
    return [f"clock={{{rule}}}", f"iterations={ITERATIONS * ROUNDS}", f"prompts.per_iteration={24 // ROUNDS}"]


def run_seed(seed: int, runs: Path, name: str, extra: list[str]) -> Path:
    """One run of the real loop; returns its folder."""
    command = [
        sys.executable, "-m", "rsrlm.cli", "run", str(HERE / "learning.yaml"),
        f"name={name}", f"runs={runs}", f"seed={seed}", f"prompts.path={runs / 'prompts.jsonl'}", *extra,
    ]  # fmt: skip
    print(" ".join(command), flush=True)
    code = subprocess.run(command, cwd=HERE, check=False).returncode
    if code:
        raise SystemExit(f"the run of seed {seed} ended with exit code {code}")
    return runs / name


def outputs(folder: Path, model: int) -> list[dict[str, Any]]:
    """Held-out outputs of M{model}: what the journal holds under ids such as M1/tea-0/0. Judgements and the samples for
    the divergence have longer ids."""
    held_out = re.compile(rf"M{model}/[^/#]+/0")
    with (folder / "journal.jsonl").open(encoding="utf-8") as lines:
        found = {entry["id"]: entry for entry in map(json.loads, lines) if held_out.fullmatch(entry["id"])}
    return [found[name] for name in sorted(found)]


def distinct_2(texts: list[str]) -> float:
    """Different word pairs over all word pairs."""
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def nll_of_fixed_text(model_folder: Path) -> float:
    """Nats per token of FIXED_TEXT."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(FIXED_TEXT)["input_ids"]])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def measure(folder: Path, first_model: Path, rounds: int) -> list[dict[str, float]]:
    """One row per model, M0 to M3; on the online clock M0, M3, M6, M9."""
    rows = []
    for model in range(0, rounds * ITERATIONS + 1, rounds):
        found = outputs(folder, model)
        texts = [one["text"] for one in found]
        words = [len(text.split()) for text in texts]
        ended = [one["finish_reason"] == "stop" for one in found]
        rows.append(
            {
                "model": model,
                "outputs": len(found),
                "words": fmean(words),
                "judge_mean": fmean(fewer_words("", text) for text in texts),
                "cut_share": 1 - fmean(ended),
                "ended_with_five_words": fmean(e and w >= LEAST_WORDS for e, w in zip(ended, words, strict=True)),
                "distinct_2": distinct_2(texts),
                "nll": nll_of_fixed_text(folder / "models" / f"M{model}" if model else first_model),
            }
        )
    return rows


def verdicts(rows: list[dict[str, float]]) -> dict[str, bool]:
    """Which of the conditions hold for one seed."""
    first, last = rows[0], rows[-1]
    means = [row["judge_mean"] for row in rows]
    return {
        "words fall by 30 %": last["words"] <= 0.7 * first["words"],
        "judge's mean rises every iteration": all(b > a for a, b in pairwise(means)),
        "95 % end by themselves with five words": last["ended_with_five_words"] >= 0.95,
        "distinct-2 above half of M0's": all(row["distinct_2"] > 0.5 * first["distinct_2"] for row in rows),
        "NLL rises by at most 10 %": all(row["nll"] <= 1.1 * first["nll"] for row in rows),
        "cap cuts fewer than 10 % of M0": first["cut_share"] < 0.1,
    }


def plot(seeds: dict[int, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6))
    panels = (
        ("words", "mean words per answer"),
        ("judge_mean", "judge's mean (0 to 5)"),
        ("distinct_2", "distinct-2"),
        ("nll", "NLL of a fixed text (nats/token)"),
    )
    for axis, (key, title) in zip(axes, panels, strict=True):
        for seed, rows in seeds.items():
            axis.plot(
                [f"M{row['model']}" for row in rows], [row[key] for row in rows], marker="o", label=f"seed {seed}"
            )
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("A verifiable judge (fewer words, at least five) on SmolLM2-135M-Instruct, held-out prompts")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="keep the runs here; a finished seed is not run again")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="iterative")
    parser.add_argument("overrides", nargs="*", help="config overrides, such as train.lr=1e-5")
    arguments = parser.parse_args()
    from rsrlm.config import load
    from rsrlm.model import folder_of

    first_model = folder_of(load(HERE / "learning.yaml").model)
    runs = arguments.runs or Path(tempfile.mkdtemp(prefix="rsrlm-learning-"))
    write_prompts(runs.resolve() / "prompts.jsonl")
    seeds = {}
    for seed in range(arguments.seeds):
        name = f"learning-{arguments.clock}-{seed}"
        folder = runs.resolve() / name
        summary = folder / "summary.json"
        if not summary.exists() or json.loads(summary.read_text())["status"] != "completed":
            run_seed(seed, runs.resolve(), name, [*changes(arguments.clock), *arguments.overrides])
        seeds[seed] = measure(folder, first_model, rounds(arguments.clock))
        for row in seeds[seed]:
            print(seed, {key: round(value, 4) for key, value in row.items()}, flush=True)
        print(seed, verdicts(seeds[seed]), flush=True)
    falls = [1 - rows[-1]["words"] / rows[0]["words"] for rows in seeds.values()]
    result = {
        "question": "does the loop learn a verifiable judge?",
        "command": " ".join(["benchmarks/learning.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "config": (HERE / "learning.yaml").read_text(),
        "seeds": seeds,
        "fall_of_words": {"mean": fmean(falls), "stdev": stdev(falls) if len(falls) > 1 else None, "each": falls},
        "verdicts": {seed: verdicts(rows) for seed, rows in seeds.items()},
        "all_hold": all(all(verdicts(rows).values()) for rows in seeds.values()),
    }
    RESULTS.mkdir(exist_ok=True)
    name = "learning" if arguments.clock == "iterative" else f"learning_{arguments.clock}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(seeds, RESULTS / f"{name}.png")
    print(json.dumps(result["verdicts"], indent=2), "\nall hold:", result["all_hold"])


if __name__ == "__main__":
    main()
