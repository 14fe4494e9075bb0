"""The recipes of the papers as whole runs of a tiny model, with real Ray, vLLM and DeepSpeed, and what is done with a
run afterwards.

A model with random weights never writes a verdict line: its judgements and comparisons are structured.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

RSRLM = [sys.executable, "-m", "rsrlm.cli"]


def rsrlm(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [*RSRLM, *arguments], capture_output=True, text=True, timeout=600, check=False, env=environment
    )


@pytest.fixture(scope="module")
def folder(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of both recipes in one, and its ranked data: SFT on IFT and EFT; both kinds of pairs; then actor pairs
    with length control, a choice among candidates and early stopping."""
    folder = tmp_path_factory.mktemp("recipes")
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"{i} is a number, and a fine one at that.", "rejected": "No idea."}
        for i in range(30)
    ]
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "recipe",
        "runs": str(folder / "runs"),
        "iterations": 3,
        "model": str(tiny_chat_model),
        "prompts": {"path": "builtin", "per_iteration": 8, "heldout": 2, "validation": 30},
        "sample": {"responses": 3, "max_tokens": 20, "temperature": 0.8},
        "judge": {"kind": "structured", "judgements": 3, "max_tokens": 40, "temperature": 1.0, "fence_salt": ""},
        "data": {
            "trees": str(folder / "ranked.jsonl"), "ift_share": 0.4, "eft_share": 0.4, "accept": "pairs", "minimum": 2,
        },
        "train": {"lr": 1e-5, "pairs_per_step": 4, "micro_batch": 2, "checkpoint_every_steps": 2},
        "evaluate": {"max_tokens": 16},
        "report": False,
        "engine": {"max_model_len": 1024, "max_num_seqs": 16, "kv_cache_gib": 0.5},
        "steps": [
            {
                "name": "SFT",
                "recipe": "sft",
                "sources": [{"path": "ift", "weight": 1.5}, "eft"],
                "train": {"epochs": 4, "stop_after_epoch": 2},
            },
            {
                "name": "M1",
                "recipe": "meta_rewarding",
                "meta": {"read": "structured", "max_tokens": 40, "temperature": 1.0},
            },
            {
                "name": "M2",
                "pair": {"rho": 0.3},
                "train": {"candidate_every_steps": 1, "choose": "score", "early_stop": True, "pairs_per_step": 2},
            },
        ],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    done = rsrlm("run", str(folder / "config.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "recipe"


def rows(run: Path, iteration: int, name: str) -> list[dict[str, Any]]:
    return pq.read_table(run / "iterations" / f"{iteration:02d}" / f"{name}.parquet").to_pylist()


def test_supervised_fine_tuning_comes_first(run: Path) -> None:
    row = json.loads((run / "summary.json").read_text())["iterations"][0]
    examples = rows(run, 0, "examples")
    kinds = [example["kind"] for example in examples]
    assert set(kinds) == {"ift", "eft"}
    split = json.loads((run / "split.json").read_text())
    parts = [set(split[name]) for name in ("ift", "eft", "evaluation")]
    assert (len(set.union(*parts)), sum(map(len, parts))) == (30, 30)  # every prompt is in one part
    assert split["counts"]["prompts kept"] == 30
    assert row["examples"]["eft"]["used"] == kinds.count("eft") >= 2
    # weight 1.5: one and a half times as many
    assert kinds.count("ift") == row["examples"]["ift"]["used"] + round(row["examples"]["ift"]["used"] / 2)
    assert row["examples_trained"] == row["examples"]["ift"]["used"] + kinds.count("eft")
    assert row["optimizer_steps"] == 2 * -(-len(examples) // 4)
    assert row["sft_loss_last"] < row["sft_loss_first"]
    assert (row["responses"], row["pairs"], row["weight_version"]) == (0, 0, "SFT")
    judgements = {(entry := json.loads(line))["id"]: entry for line in (run / "journal.jsonl").read_text().splitlines()}
    for example in examples:
        if example["kind"] == "eft":  # the judge's own tokens, unchanged
            assert example["target_token_ids"] == judgements[example["id"]]["token_ids"]


def test_pairs_of_responses_and_of_judgements_are_trained_together(run: Path) -> None:
    row = json.loads((run / "summary.json").read_text())["iterations"][1]
    pairs = rows(run, 1, "pairs")
    kinds = [pair["kind"] for pair in pairs]
    assert kinds.count("actor") >= 1
    assert kinds.count("judge") >= 1
    assert row["pairs_of_kind"] == {kind: kinds.count(kind) for kind in set(kinds)}
    assert row["pairs_trained"] == len(pairs)
    assert row["dpo_loss_first"] == pytest.approx(0.6931, abs=1e-3)
    judgements = {judgement["id"]: judgement for judgement in rows(run, 1, "judgements")}
    for pair in pairs:
        if pair["kind"] == "judge":
            for side in ("chosen", "rejected"):
                judgement = judgements[pair[f"{side}_id"]]
                assert pair[f"{side}_token_ids"] == judgement["token_ids"]
                assert judgement["weight_version"] == pair["weight_version"] == "SFT"
    comparisons = rows(run, 1, "comparisons")
    shown = {(*one["id"].rpartition("#")[2].split("~"), one["response_id"]) for one in comparisons}
    assert {(b, a, response) for a, b, response in shown} == shown  # each in both orders
    assert row["comparisons"] == len(comparisons) > 0
    weights = row["meta"]["position_weights"]
    assert weights["first"] + weights["second"] == pytest.approx(1)
    assert weights["second"] == pytest.approx(row["meta"]["first_position_wins"])
    steps = [json.loads(line) for line in (run / "iterations/01/steps.jsonl").read_text().splitlines()]
    assert any("actor/margin" in step and "judge/margin" in step for step in steps)
    trained = [pair for step in steps for pair in step["pair_ids"]]
    assert trained == [pair["id"] for pair in pairs]


def test_the_last_iteration_chose_among_candidates(run: Path) -> None:
    row = json.loads((run / "summary.json").read_text())["iterations"][2]
    assert {pair["kind"] for pair in rows(run, 2, "pairs")} == {"actor"}
    assert row["comparisons"] == 0
    choice = row["choice"]
    best, gained = "M1", []  # the model before is the first to beat
    for name, gain in choice["found"].items():
        assert (gain["over"], gain["by"], gain["judge"]) == (best, "score", "M1")
        gained.append(gain["estimable"] and gain["low"] > 0)
        best = name if gained[-1] else best
    assert choice["chosen"] == best
    # Training ended at the first candidate that was not better; nothing was asked about what came after.
    assert all(gained[:-1])
    assert choice["candidates"] == [*(f"M2@{step}" for step in range(1, row["optimizer_steps"] + 1)), "M2"]
    assert list(choice["found"]) == choice["candidates"][: len(gained)]
    assert (row["optimizer_steps"] < -(-row["pairs"] // 2)) == (len(gained) < len(choice["candidates"]))
    assert sorted(path.name for path in (run / "models").iterdir()) == ["M1", "M2", "SFT"]
    weights = [(run / "models" / name / "model.safetensors").read_bytes() for name in ("M1", "M2")]
    assert (weights[0] == weights[1]) == (best == "M1")
    # They answer prompts of their own; what is measured afterwards is the chosen model on those that report.
    names = [json.loads(line)["id"] for line in (run / "journal.jsonl").read_text().splitlines()]
    found = [re.fullmatch(r"(?!\d+/)([^/#>]+)/[^/#>]+/0", name) for name in names]  # not of an iteration, 01/...
    answered = Counter(one[1] for one in found if one)
    expected = Counter({"M0": 2, "SFT": 2, "M1": 2, "M2": 2})
    for name in ("M1", *choice["found"]):
        expected[name] += 30
    assert answered == expected
    assert row["signs"]["n_responses"] == 24
    assert row["heldout"]["model"] == "M2"


def test_a_finished_recipe_is_resumed_as_finished(run: Path) -> None:
    done = rsrlm("resume", str(run))
    assert done.returncode == 0, done.stderr
    assert "is finished: 3 iterations" in done.stdout


@pytest.mark.full
def test_judges_of_all_models_of_a_run(run: Path, folder: Path) -> None:
    """Scores of every model, and the same again without an engine doing anything twice."""
    arguments = ("eval", "judge", str(run), "--data", str(folder / "ranked.jsonl"), "--limit", "6", "--part", "all")
    done = rsrlm(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prompts of part all with 12 ranked replies" in done.stdout
    found = json.loads((run / "eval" / "ranked" / "judge.json").read_text())
    assert list(found["models"]) == ["M0", "SFT", "M1", "M2"]
    assert (found["part"], found["prompts"], found["of"]) == ("all", 6, 30)
    for measures in found["models"].values():
        assert measures["readable"]["n"] == 36  # 12 replies, 3 judgements each
        assert not measures["pairwise_accuracy"]["estimable"]  # 6 pairs
        assert measures["pairwise_accuracy"]["n"] == 6
    assert "not estimable (n=6)" in done.stdout


@pytest.mark.full
def test_a_duel_of_two_models(run: Path, folder: Path) -> None:
    (folder / "duel.jsonl").write_text(
        "".join(json.dumps({"id": f"p{i}", "prompt": f"Say {i}."}) + "\n" for i in range(4))
    )
    out = folder / "duel"
    config = str(folder / "config.yaml")
    done = rsrlm(
        "eval", "duel", config, str(run / "models/SFT"), str(run / "models/M2"), "--out", str(out),
        f"prompts.path={folder / 'duel.jsonl'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "duel.json").read_text())
    assert found["win"]["n"] + found["unreadable"] == 4
    outputs = json.loads((out / "outputs-a.json").read_text())
    assert [set(one) for one in outputs] == [{"instruction", "output", "generator", "dataset", "prompt_id"}] * 4


@pytest.mark.full
def test_seed_data_and_prompts_as_files(folder: Path) -> None:
    """`rsrlm data`: files that a run takes as sources."""
    config = str(folder / "config.yaml")
    for what in ("ift", "eft"):
        done = rsrlm("data", what, config, "--out", str(folder / f"{what}.jsonl"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{what.upper()} examples" in done.stdout
    sources = json.dumps([{"path": str(folder / f"{what}.jsonl")} for what in ("ift", "eft")])
    done = rsrlm("plan", config, "iterations=1", f"steps=[{{recipe: sft, sources: {sources}}}]")
    assert done.returncode == 0, done.stdout + done.stderr
    few = rsrlm("data", "ift", config, "--out", str(folder / "few.jsonl"), "data.minimum=1000")
    assert few.returncode == 3
    assert "fewer than data.minimum=1000" in few.stderr
    assert not (folder / "few.jsonl").exists()


@pytest.mark.full
def test_a_kill_while_judgements_are_written(run: Path, folder: Path) -> None:
    """The same examples, in the same order, and the same first loss as without the kill; no judgement is done twice."""
    command = [*RSRLM, "run", str(folder / "config.yaml"), "name=killed"]
    killed = folder / "runs" / "killed"
    journal = killed / "journal.jsonl"
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def judged() -> int:
        """Judgements of people's replies that are written down."""
        return journal.read_bytes().count(b"ranked>") if journal.exists() else 0

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and judged() < 10:
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert judged() >= 10
    done = rsrlm("resume", str(killed))
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(killed, 0, "examples") == rows(run, 0, "examples")
    keys = [json.loads(line)["k"] for line in journal.read_text().splitlines()]
    assert len(keys) == len(set(keys))
    first, other = (json.loads((one / "summary.json").read_text())["iterations"][0] for one in (run, killed))
    assert other["sft_loss_first"] == pytest.approx(first["sft_loss_first"], rel=1e-6)


class Api(BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose score depends on the answer's text alone."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][0]["content"]
        said = "Winner: A" if "answer B" in text else f"Because.\nScore: {sum(text.encode()) % 6}"
        answer = {
            "id": "x", "object": "chat.completion", "created": 0, "model": asked["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }  # fmt: skip
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.full
@pytest.mark.parametrize("who", ["model", "endpoint", "validator"])
def test_another_judge(who: str, folder: Path, tiny_model: Path) -> None:
    """External rewards: other weights in a pool of their own, or a server; and what the server cost. And a server that
    validates while the rewards stay the model's own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "price_in": 1.0}
    judge: dict[str, Any] = {
        "model": {"kind": "structured", "judgements": 2, "max_tokens": 40, "model": str(tiny_model), "replicas": 1},
        "endpoint": {"kind": "text", "judgements": 2, "endpoint": api},
        "validator": {"kind": "structured", "judgements": 2, "max_tokens": 40},
    }[who]
    validator = {"read": "text", **({"endpoint": api} if who == "validator" else {})}
    try:
        done = rsrlm(
            "run", str(folder / "config.yaml"), f"name=external-{who}", "steps=[{}]", "iterations=1",
            f"judge={json.dumps(judge)}", f"evaluate.judge={json.dumps(validator)}",
        )  # fmt: skip
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "runs" / f"external-{who}"
    versions = {one["weight_version"] for one in rows(run, 0, "judgements")}
    assert versions == {{"model": "judge", "endpoint": "endpoint:m", "validator": "M0"}[who]}
    assert {one["weight_version"] for one in rows(run, 0, "responses")} == {"M0"}
    row = json.loads((run / "summary.json").read_text())["iterations"][0]
    assert row["pairs"] >= 1
    name = {"model": str(tiny_model), "endpoint": "m", "validator": "m"}[who]
    assert row["heldout"]["score_by_first"]["judge"] == name
    assert row["heldout"]["score_by_current"]["judge"] == ("M1" if who == "validator" else name)
    assert f"by {name}, both orders" in row["heldout"]["duel_with_M0"]["judge"]
    if who != "model":
        # 48 judgements (none by who only validates), those of 2 held-out answers of M0 and M1, and duels, where answers
        # differ: 100 prompt tokens each at 1 per million
        used = row["endpoints"][{"endpoint": "judge", "validator": "validator"}[who]]
        assert list(row["endpoints"]) == [{"endpoint": "judge", "validator": "validator"}[who]]
        assert {"endpoint": 48 + 8, "validator": 8}[who] <= used["requests"] <= {"endpoint": 60, "validator": 12}[who]
        assert used["cost"] == pytest.approx(used["requests"] * 1e-4)
