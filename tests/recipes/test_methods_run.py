"""One run through all methods with real Ray, vLLM and DeepSpeed, and a tiny model that answers 3 or 7."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from scipy.stats import kendalltau

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ANSWERS = {"kind": "answer", "where": "end"}
SHORT = {"max_tokens": 40, "temperature": 1.0}
WRITTEN = {"read": "structured", **SHORT}  # a model with random weights gives no letter a probability worth reading
FAST = {"train": {"lr": 1e-4}}  # enough to change a ranking, and so little that both answers stay likely
STEPS = [
    {"name": "I", "recipe": "irpo", "judge": ANSWERS, "pairs": 3, **FAST},
    {"name": "S", "recipe": "scpo", "judge": ANSWERS, "least": 0.3, **FAST},
    {"name": "T", "recipe": "temporal", **FAST},
    {"name": "C", "recipe": "cream"},
    {"name": "D", "recipe": "dice", "pair": {"least": 2, "least_chars": 1}},
    {"name": "P", "recipe": "spin", "replay": [1.0]},
    {"name": "W", "recipe": "sppo", "sample": {"responses": 3}, "compare": WRITTEN},
    {"name": "N", "recipe": "dno", "judge": ANSWERS, "pair": {"floor": 1.0, "margin": 1.0, "own_margin": 1.0}},
    {"name": "J", "recipe": "self_j", "judge": {"template": "self_j"}},
    {"name": "R", "recipe": "spar", "judge": {"kind": "yes_no", "structured": True, "judgements": 3, **SHORT}},
    {"name": "E", "recipe": "self_taught", "compare": {**WRITTEN, "judgements": 4}, "prompts": {"per_iteration": 16}},
    {
        "name": "L", "recipe": "alpha_llm", "judge": ANSWERS, "outcome": "judge", "least": 0.5,
        "search": {"simulations": 4, "rollouts": 1, "beta_prm": 0.0}, "width": {"root_least": 4},
    },
    {"name": "B", "recipe": "process", "candidates": 3, "depth": 2, "compare": WRITTEN},
]  # fmt: skip


@pytest.fixture(scope="module")
def digits_model(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers "3" or "7", of one token and the end. The first residual dimension is constant (see conftest): it favours
    the two digits. The second tells what came before: the end follows a digit, and not the line break of the prompt.
    Of two verdicts, where one must be written, both are as likely."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "digits"
    shutil.copytree(tiny_chat_model, folder)
    model, tokenizer = (one.from_pretrained(folder) for one in (AutoModelForCausalLM, AutoTokenizer))
    three, seven, line = (tokenizer.encode(text)[0] for text in ("3", "7", "\n"))
    with torch.no_grad():
        for token, first, second in (
            (tokenizer.eos_token_id, 40.0, 30.0), (three, 40.2, 5.0), (seven, 40.5, 5.0), (line, 30.0, -5.0),
        ):  # fmt: skip
            model.model.embed_tokens.weight[token, 0] = first
            model.model.embed_tokens.weight[token, 1] = second
        for one, other in (("A", "B"), (" A", " B"), ("Yes", "No"), (" Yes", " No")):
            this, that = (tokenizer.encode(text) for text in (one, other))
            assert len(this) == len(that) == 1
            model.model.embed_tokens.weight[that[0]] = model.model.embed_tokens.weight[this[0]]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    questions = [
        {"id": f"q{i}", "prompt": f"What is {i} + {i}?", "answer": 7 if i % 2 else 3, "reference": "7"}
        for i in range(140)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    config = {
        "name": "methods",
        "runs": str(folder),
        "model": str(digits_model),
        "prompts": {"path": str(folder / "questions.jsonl"), "per_iteration": 8, "heldout": 2},
        "sample": {"responses": 6, "max_tokens": 16, "temperature": 1.0},
        "judge": {"kind": "digits", "min_mass": 0.0, "fence_salt": ""},
        "train": {"lr": 1e-6, "pairs_per_step": 4, "micro_batch": 2, "checkpoint_every_steps": 2},
        "evaluate": {"max_tokens": 16, "duel": False},
        "engine": {"max_model_len": 1024, "max_num_seqs": 16, "kv_cache_gib": 0.5},
        "steps": STEPS,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "rsrlm.cli", "run", str(folder / "config.yaml")],
        capture_output=True, text=True, timeout=800, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "methods"


def test_the_report_reads_what_every_method_wrote(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert all(f"iteration {number}" in page for number in range(len(STEPS)))
    assert "Not here" not in page


def made(run: Path, iteration: int, name: str) -> list[dict[str, Any]]:
    return pq.read_table(run / "iterations" / f"{iteration:02d}" / f"{name}.parquet").to_pylist()


def row(run: Path, iteration: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())["iterations"][iteration]
    return found


def test_right_against_wrong_answers(run: Path) -> None:
    judged = {one["response_id"]: one["points"] for one in made(run, 0, "judgements")}
    pairs = made(run, 0, "pairs")
    assert {(judged[pair["chosen_id"]], judged[pair["rejected_id"]]) for pair in pairs} == {(1.0, 0.0)}
    # All right answers to a question are one text here, and so are all wrong ones: a question gives one pair.
    assert row(run, 0)["pairs_trained"] == len(pairs) == len({pair["prompt_id"] for pair in pairs}) > 0
    assert row(run, 0)["mean_score"] == pytest.approx(sum(judged.values()) / len(judged))


def test_most_against_least_frequent_answers(run: Path) -> None:
    pairs = made(run, 1, "pairs")
    assert pairs
    for pair in pairs:
        assert 0 < pair["weight"] == pytest.approx(pair["chosen_score"] - pair["rejected_score"])
        assert pair["chosen_score"] >= 0.3
    assert row(run, 1)["votes"]["majority_known"] == 8


def test_responses_of_several_models(run: Path) -> None:
    responses = {one["id"]: one for one in made(run, 2, "responses")}
    versions = {one["weight_version"] for one in responses.values()}
    assert versions == {"S", "M0", "S.ahead"}
    assert len(responses) == 8 * 6 * len(versions)
    for pair in made(run, 2, "pairs"):
        assert responses[pair["chosen_id"]]["weight_version"] != "M0"
        assert responses[pair["rejected_id"]]["weight_version"] != "S.ahead"
    assert {one["weight_version"] for one in made(run, 2, "judgements")} == {"S"}


def agreement_of(run: Path, iteration: int) -> float:
    """C of an iteration, from the log-probabilities in the journal: of its model, of the one before, and of the first,
    in the order in which they were asked. Equal responses to a prompt are asked about once."""
    responses = made(run, iteration, "responses")
    text = {one["id"]: (one["prompt_id"], tuple(one["token_ids"])) for one in responses}
    sums: dict[Any, list[float]] = {}
    for line in (run / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)
        identifier, _, what = entry["id"].rpartition("/")
        if what == "logprobs" and identifier in text:
            sums.setdefault(text[identifier], []).append(sum(entry["prompt_logprobs"]))
    agreed = []
    for prompt in {one["prompt_id"] for one in responses}:
        rewards = [
            (now - first, before - first)
            for now, before, first in (sums[text[one["id"]]] for one in responses if one["prompt_id"] == prompt)
        ]
        if all(len(set(column)) > 1 for column in zip(*rewards, strict=True)):
            agreed.append((kendalltau(*zip(*rewards, strict=True)).statistic + 1) / 2)
    return sum(agreed) / len(agreed)


def test_soft_labels_of_two_rankings(run: Path) -> None:
    pairs, measure = made(run, 3, "pairs"), row(run, 3)["consistency"]
    assert pairs
    assert {pair["target"] for pair in pairs} == {measure["mean"]}
    assert measure["mean"] == pytest.approx(agreement_of(run, 3))
    rewards = {one["response_id"]: one["points"] for one in made(run, 3, "judgements")}
    assert all(rewards[pair["chosen_id"]] == pair["chosen_score"] > pair["rejected_score"] for pair in pairs)


def test_a_price_per_character(run: Path) -> None:
    """Both answers have one character: whatever its price, chosen and rejected are as long."""
    assert row(run, 4)["length"] == {"alpha": 0.0, "chars_chosen_less_rejected": 0.0}
    pairs = made(run, 4, "pairs")
    assert pairs
    for pair in pairs:
        assert pair["chosen_score"] > pair["rejected_score"]


def test_the_answers_of_the_data_and_pairs_of_the_iteration_before(run: Path) -> None:
    pairs = made(run, 5, "pairs")
    own = [pair for pair in pairs if pair["id"].startswith("05/")]
    again = [pair for pair in pairs if pair["id"].startswith("04/")]
    assert {pair["id"] for pair in again} == {pair["id"] for pair in made(run, 4, "pairs")}
    assert len(own) + len(again) == len(pairs) == row(run, 5)["pairs_trained"]
    assert row(run, 5)["replay"] == {"pairs": len(again)}
    texts = {one["id"]: one["text"] for one in made(run, 5, "responses")}
    assert own  # the data says 7: who answered 3 learns from it
    assert {texts[pair["rejected_id"]] for pair in own} == {"3"}


def test_win_rates(run: Path) -> None:
    pairs, comparisons = made(run, 6, "pairs"), made(run, 6, "comparisons")
    assert len(comparisons) == 8 * 3 * 2
    assert pairs
    for pair in pairs:
        assert 0 < pair["rejected_score"] < pair["chosen_score"] < 1
    steps = [json.loads(line) for line in (run / "iterations/06/steps.jsonl").read_text().splitlines()]
    goals = [(1000 * (pair[f"{side}_score"] - 0.5)) ** 2 / 2 for pair in pairs for side in ("chosen", "rejected")]
    # Before the first step the log-ratios are 0, and the loss is what the goals are squared.
    first = {pair["id"]: place for place, pair in enumerate(pairs)}
    expected = [goals[2 * first[name]] + goals[2 * first[name] + 1] for name in steps[0]["pair_ids"]]
    assert steps[0]["loss"] == pytest.approx(sum(expected) / len(expected), rel=0.05)


def test_all_pairs_far_enough_apart(run: Path) -> None:
    judged = {one["response_id"]: one["points"] for one in made(run, 7, "judgements")}
    pairs = made(run, 7, "pairs")
    own = [pair for pair in pairs if pair["id"].startswith("07/")]
    assert {(judged[pair["chosen_id"]], judged[pair["rejected_id"]]) for pair in own} == {(1.0, 0.0)}
    assert row(run, 7)["replay"]["pairs"] == len(pairs) - len(own)


def test_a_judge_in_two_views(run: Path) -> None:
    examples = made(run, 8, "examples")
    assert len({example["target_token_ids"][0] for example in examples}) == len(examples) == 8  # grades 0, 1, 2, 3, 5..
    (step, *_) = [json.loads(line) for line in (run / "iterations/08/steps.jsonl").read_text().splitlines()]
    parts = step["teacher_ce"] + 0.3 * step["student_ce"] + 2 * step["kl"]
    assert step["sft_loss"] == pytest.approx(parts, rel=1e-4)
    assert row(run, 8)["examples_trained"] == 8


def test_refined_responses(run: Path) -> None:
    texts = {one["id"]: one["text"] for one in made(run, 9, "responses")}
    for pair in made(run, 9, "pairs"):
        assert pair["rejected_score"] < 0.5 < pair["chosen_score"]
        assert texts[pair["chosen_id"]] != texts[pair["rejected_id"]]
    assert row(run, 9)["spar"]["refined_yes"] >= row(run, 9)["pairs_trained"] > 0


def test_judgements_that_found_the_bad_answer(run: Path) -> None:
    examples = made(run, 10, "examples")
    sides = ["B" if example["id"].rpartition("/")[2].startswith("1~") else "A" for example in examples]
    assert sides.count("A") == sides.count("B") > 0
    verdicts = {one["id"]: one["points"] for one in made(run, 10, "comparisons")}
    assert [verdicts[example["id"]] for example in examples] == [1.0 if side == "A" else 0.0 for side in sides]


def test_the_best_answer_of_a_tree(run: Path) -> None:
    examples = made(run, 11, "examples")
    judged = {one["response_id"]: one["points"] for one in made(run, 11, "judgements")}
    assert examples
    assert {judged[example["id"]] for example in examples} == {1.0}
    assert row(run, 11)["search"]["kept"] == len(examples)


def test_steps_that_are_compared(run: Path) -> None:
    pairs = made(run, 12, "pairs")
    assert pairs
    assert {pair["kind"] for pair in pairs} == {"step"}
