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

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEPS = [
    {"name": "I", "recipe": "irpo", "judge": {"kind": "answer", "where": "end"}, "pairs": 3},
    {"name": "S", "recipe": "scpo", "judge": {"kind": "answer", "where": "end"}, "least": 0.3},
    {"name": "T", "recipe": "temporal"},
    {"name": "C", "recipe": "cream"},
]


@pytest.fixture(scope="module")
def digits_model(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers "3" or "7", of one token and the end. The first residual dimension is constant (see conftest): it favours
    the two digits. The second tells what came before: the end follows a digit, and not the line break of the prompt."""
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
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    questions = [{"id": f"q{i}", "prompt": f"What is {i} + {i}?", "answer": 7 if i % 2 else 3} for i in range(40)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    config = {
        "name": "methods",
        "runs": str(folder),
        "model": str(digits_model),
        "prompts": {"path": str(folder / "questions.jsonl"), "per_iteration": 8, "heldout": 2},
        "sample": {"responses": 6, "max_tokens": 16, "temperature": 1.0},
        "judge": {"kind": "digits", "min_mass": 0.0, "fence_salt": ""},
        "train": {"lr": 1e-4, "pairs_per_step": 4, "micro_batch": 2, "checkpoint_every_steps": 2},
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


def test_soft_labels_of_two_rankings(run: Path) -> None:
    pairs, measure = made(run, 3, "pairs"), row(run, 3)["consistency"]
    assert pairs
    assert {pair["target"] for pair in pairs} == {measure["mean"]}
    assert 0 < measure["mean"] < 1
    rewards = {one["response_id"]: one["points"] for one in made(run, 3, "judgements")}
    assert all(rewards[pair["chosen_id"]] == pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
