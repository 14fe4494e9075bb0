"""Whole runs from the command line, with real Ray, vLLM and DeepSpeed: finished, without pairs, interrupted, killed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from metric_names import REAL, undocumented
from waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

RSRLM = [sys.executable, "-m", "rsrlm.cli"]
KILLED = [sys.executable, str(Path(__file__).parent / "killed_run.py")]
MARK = "RSRLM_TEST_RUN"  # in the environment of a run, and so of every process that it starts


@pytest.fixture(scope="module")
def config_file(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of a tiny model, three optimizer steps each, a checkpoint after every second one."""
    folder = tmp_path_factory.mktemp("run")
    config = {
        "name": "whole",
        "runs": str(folder / "runs"),
        "iterations": 2,
        "model": str(tiny_chat_model),
        "prompts": {"path": "builtin", "per_iteration": 10, "heldout": 3},
        "sample": {"responses": 3, "max_tokens": 24, "temperature": 0.8},
        "judge": {"kind": "digits", "min_mass": 0, "fence_salt": ""},  # runs are compared
        "train": {"lr": 1e-3, "lr_final": 1e-4, "pairs_per_step": 3, "micro_batch": 2, "checkpoint_every_steps": 2},
        "evaluate": {"max_tokens": 16},
        "report": False,
        "engine": {"max_model_len": 768, "max_num_seqs": 4, "kv_cache_gib": 0.25},
        "trackers": {"tensorboard": True},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# What a user may have in the environment of a run.
KEYS = {
    name: f"never-write-{name}"
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
}


def run(*arguments: str, command: list[str] = RSRLM) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **KEYS, MARK: "1", "WANDB_MODE": "offline"},
    )


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RSRLM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **KEYS, MARK: "1", "WANDB_MODE": "offline"},
    )


def our_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if MARK in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_nothing_is_left() -> None:
    """No process of a run survives it by more than 30 seconds."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and our_processes():
        time.sleep(0.5)
    assert not [" ".join(process.cmdline()) for process in our_processes()]


@pytest.fixture(scope="module")
def whole(config_file: Path) -> tuple[Path, str]:
    """An undisturbed run: its folder and what it printed."""
    done = run("run", str(config_file), "report=true", "trackers.wandb.project=test", "trackers.mlflow=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_nothing_is_left()
    return config_file.parent / "runs" / "whole", done.stdout


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_run_trains_and_publishes(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    found = summary(folder)
    assert found["status"] == "completed"
    assert len(found["iterations"]) == 2
    for number, row in enumerate(found["iterations"]):
        assert row["iteration"] == number
        assert (row["prompts"], row["responses"], row["judgements"]) == (10, 30, 30)
        assert row["judgements_unreadable"] == 0
        assert row["pairs"] == row["pairs_trained"] >= 7
        assert row["pairs"] + sum(row["no_pair_reasons"].values()) == 10
        assert row["optimizer_steps"] == math.ceil(row["pairs"] / 3)
        assert row["dpo_loss_first"] == pytest.approx(math.log(2), abs=1e-3)
        assert row["dpo_loss_last"] != row["dpo_loss_first"]
        assert row["weight_version"] == f"M{number + 1}"
        assert 0 <= row["mean_score"] <= 5
        assert 0 < row["mean_response_tokens"] <= 24
        assert row["seconds"] > 0
        assert row["heldout"]["score_by_first"]["judge"] == "M0"
        assert row["heldout"]["score_by_current"]["judge"] == f"M{number + 1}"
        assert f"duel_with_M{number}" in row["heldout"]
    assert "status: completed" in printed
    assert f"report: {folder}/report.html" in printed
    page = (folder / "report.html").read_text()
    assert all(words in page for words in ("whole: report", ">completed<", "Nothing can be said: 3 held-out"))
    assert "Not here" not in page
    assert "iteration 1: respond 30/30" in printed


def tracked(folder: Path) -> dict[str, list[int]]:
    """The steps of each of TensorBoard's scalars."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {tag: [one.step for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_trackers_have_every_step_and_iteration(whole: tuple[Path, str]) -> None:
    from mlflow.tracking import MlflowClient
    from wandb.proto.wandb_internal_pb2 import Record

    from rsrlm.report.trackers.wandb import records_in

    folder, printed = whole
    names = tracked(folder)
    assert undocumented(names) == set()
    assert set(names) >= REAL
    steps = sum(row["optimizer_steps"] for row in summary(folder)["iterations"])
    assert names["train/loss"] == names["train/lr"] == list(range(steps))
    assert names["heldout/duel/n"] == names["iteration/mean_score"] == [0, 1]
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = [Record.FromString(data) for data in records_in(log)]
    assert [one.history.step.num for one in records if one.HasField("history")] == list(range(steps + 2))
    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("rsrlm").experiment_id])
    assert (found.info.run_name, found.info.status) == ("whole", "FINISHED")
    assert found.data.metrics.keys() == names.keys()
    assert "mlflow: mlflow ui --backend-store-uri" in printed


def test_no_key_is_written_or_printed(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert b"never-write-" not in path.read_bytes(), path
    assert "never-write-" not in printed


def test_records_carry_who_made_them(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    for number in (0, 1):
        data = folder / "iterations" / f"{number:02d}"
        responses = {row["id"]: row for row in pq.read_table(data / "responses.parquet").to_pylist()}
        judgements = pq.read_table(data / "judgements.parquet").to_pylist()
        pairs = pq.read_table(data / "pairs.parquet").to_pylist()
        assert {row["weight_version"] for row in responses.values()} == {f"M{number}"}
        assert {row["weight_version"] for row in judgements} == {f"M{number}"}
        assert len({row["sampling"]["seed"] for row in responses.values()}) == len(responses) == 30
        points = {row["response_id"]: row["points"] for row in judgements}
        for pair in pairs:
            chosen, rejected = responses[pair["chosen_id"]], responses[pair["rejected_id"]]
            assert chosen["prompt_id"] == rejected["prompt_id"] == pair["prompt_id"]
            assert chosen["finish_reason"] == "stop"
            assert chosen["token_ids"] == pair["chosen_token_ids"]
            assert chosen["token_ids"][-1] == 2  # the end token was sampled, so it is trained on
            assert rejected["token_ids"] == pair["rejected_token_ids"]
            assert pair["chosen_score"] == points[pair["chosen_id"]] > points[pair["rejected_id"]]
            siblings = [points[i] for i, row in responses.items() if row["prompt_id"] == pair["prompt_id"]]
            assert pair["rejected_score"] == min(siblings)


def test_exported_models_load_and_differ(whole: tuple[Path, str], tiny_chat_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = whole
    weights = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.embed_tokens.weight
        for path in (tiny_chat_model, folder / "models" / "M1", folder / "models" / "M2")
    ]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert AutoTokenizer.from_pretrained(folder / "models" / "M2").chat_template
    assert not list(folder.rglob("*.tmp"))


def test_a_finished_run_is_not_run_again(whole: tuple[Path, str], config_file: Path) -> None:
    folder, _ = whole
    again = run("run", str(config_file))
    assert again.returncode == 2
    assert "rsrlm resume" in again.stderr
    resumed = run("resume", str(folder))
    assert resumed.returncode == 0
    assert "is finished" in resumed.stdout


LOGGED = ("train/loss", "train/lr", "iteration/number")
SCORES = ("points", "variance", "chosen_score", "rejected_score")  # float32 sums in another order differ a little


def assert_same_as(folder: Path, whole_folder: Path) -> None:
    """Ids, token ids, seeds and training order are equal; scores are equal up to rounding."""
    for number in (0, 1):
        ours, theirs = (f / "iterations" / f"{number:02d}" for f in (folder, whole_folder))
        for name in ("prompts", "responses", "judgements", "pairs"):
            rows = [pq.read_table(d / f"{name}.parquet").to_pylist() for d in (ours, theirs)]
            assert len(rows[0]) == len(rows[1])
            for one, other in zip(*rows, strict=True):
                for key, value in one.items():
                    assert value == (pytest.approx(other[key], abs=1e-3) if key in SCORES else other[key]), (name, key)
        order = [[json.loads(line)["pair_ids"] for line in (d / "steps.jsonl").open()] for d in (ours, theirs)]
        assert order[0] == order[1]
    ours, theirs = tracked(folder), tracked(whole_folder)
    assert {name: ours[name] == theirs[name] for name in LOGGED} == dict.fromkeys(LOGGED, True)
    assert summary(folder)["status"] == "completed"


@pytest.mark.parametrize(
    "place",
    [pytest.param("responses", marks=pytest.mark.full), "step", pytest.param("publish", marks=pytest.mark.full)],
)
def test_a_killed_driver_is_resumed(place: str, whole: tuple[Path, str], config_file: Path) -> None:
    """SIGKILL leaves no process and loses nothing: the resumed run ends as the undisturbed one did."""
    from rsrlm.config import resolve
    from rsrlm.runtime.weights import stale_files

    killed = run(place, "run", str(config_file), f"name=killed-{place}", command=KILLED)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert_nothing_is_left()
    folder = config_file.parent / "runs" / f"killed-{place}"
    assert summary(folder)["status"] == "running"
    journal = folder / "journal.jsonl"
    before = journal.read_bytes().rpartition(b"\n")[0]
    resumed = run("resume", str(folder))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_nothing_is_left()
    assert_same_as(folder, whole[0])
    assert journal.read_bytes().startswith(before)  # what was finished was not done again
    keys = [json.loads(line)["k"] for line in journal.open()]
    ids = [name for line in journal.open() if (name := json.loads(line)["id"]).startswith("00/")]
    assert len(keys) == len(set(keys))
    assert len(ids) == len(set(ids)) == 60
    assert stale_files(folder) == []
    assert resolve(yaml.safe_load((folder / "config.yaml").read_text())).name == f"killed-{place}"
    if place == "responses":
        assert 3 <= len([line for line in before.splitlines() if b'"id":"00/' in line]) < 60
    if place == "step":
        replayed = summary(folder)["iterations"][0]["steps_replayed"]
        assert replayed in (0, 2)  # the kill fell after or before the checkpoint of the second step
        assert ("replaying 2 optimizer steps" in resumed.stdout) == (replayed == 2)
        assert "iteration 0: respond 30/30, judge 30/30" in resumed.stdout  # without a token


def answers(folder: Path, iteration: int) -> list[bytes]:
    """Lines of all journals."""
    lines = [line for path in folder.glob("journal*.jsonl") for line in path.read_bytes().splitlines()]
    return [line for line in lines if b'"id":"%02d/' % iteration in line]


def samples(folder: Path) -> bool:
    """Whether a run has answers of iteration 0."""
    return bool(answers(folder, 0))


def trains(folder: Path) -> bool:
    return (folder / "iterations" / "00" / "steps.jsonl").exists()


@pytest.mark.parametrize(
    ("number", "begun"),
    [
        pytest.param(signal.SIGINT, trains, id="SIGINT"),
        pytest.param(signal.SIGTERM, samples, id="SIGTERM", marks=pytest.mark.full),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    number: signal.Signals, begun: Callable[[Path], bool], config_file: Path, whole: tuple[Path, str]
) -> None:
    folder = config_file.parent / "runs" / f"interrupted-{number.name}"
    process = started("run", str(config_file), f"name={folder.name}")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not begun(folder):
        time.sleep(0.05)
    if begun is trains:
        # A learner in the middle of a long step does not hear that it is to stop.
        ranks = [one for one in our_processes() if "RayTrainWorker" in " ".join(one.cmdline())]
        assert ranks
        for rank in ranks:
            rank.suspend()
    process.send_signal(number)
    printed, errors = process.communicate(timeout=90)
    assert begun(folder)
    assert process.returncode == 130, printed + errors
    assert "status: interrupted" in printed
    assert f"rsrlm resume {folder}" in printed
    assert "Traceback" not in errors
    assert summary(folder)["status"] == "interrupted"
    assert_nothing_is_left()
    if begun is trains:
        # The learner may have gone on to a checkpoint that the driver did not see; nothing is missing from the books.
        resumed = run("resume", str(folder))
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        assert_same_as(folder, whole[0])
        rows = summary(folder)["iterations"]
        assert [row["optimizer_steps"] for row in rows] == [
            row["optimizer_steps"] for row in summary(whole[0])["iterations"]
        ]
        assert all(row["pairs_trained"] == row["pairs"] for row in rows)


@pytest.mark.full
def test_a_run_with_producers_survives_their_death_and_its_own(whole: tuple[Path, str], config_file: Path) -> None:
    """Two producers with an engine each. One is killed while it makes groups, then the driver in the next iteration."""
    folder = config_file.parent / "runs" / "producers"
    process = started("run", str(config_file), f"name={folder.name}", "engine.replicas=2", "engine.producers=2")
    wait_for(lambda: len(answers(folder, 0)) >= 5, process)
    producers = [one for one in our_processes() if "Producer" in " ".join(one.cmdline())]
    assert len(producers) == 2
    producers[0].kill()
    wait_for(lambda: len(answers(folder, 1)) >= 5, process)
    process.kill()
    process.communicate()
    assert_nothing_is_left()
    events = [json.loads(line) for line in (folder / "events.jsonl").open()]
    assert [event["event"] for event in events].count("producer_lost") == 1
    before = len(answers(folder, 1))
    assert before < 60
    resumed = run("resume", str(folder))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_nothing_is_left()
    assert_same_as(folder, whole[0])
    # Of the driver, of two producers, of the one in the place of the dead one, and of two after the resume.
    assert len(list(folder.glob("journal*.jsonl"))) == 6
    keys = [json.loads(line)["k"] for number in (0, 1) for line in answers(folder, number)]
    assert len(keys) == len(set(keys)) == 120  # nothing was answered twice, but for what was in flight
    assert not list((folder / "segments").glob("*/*"))


@pytest.mark.full
def test_a_run_takes_an_engine_more(whole: tuple[Path, str], config_file: Path) -> None:
    """While it samples; what it makes stays the same."""
    folder = config_file.parent / "runs" / "scaled"
    process = started("run", str(config_file), f"name={folder.name}")
    wait_for(lambda: (folder / "start.json").exists(), process)
    asked = run("scale", str(folder), "engines=2")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert "engines=2, within seconds" in asked.stdout
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, printed + errors
    assert "engines: 1 replicas become 2" in printed
    assert_nothing_is_left()
    assert_same_as(folder, whole[0])


def test_a_run_is_not_run_twice_at_once(whole: tuple[Path, str]) -> None:
    from rsrlm.settings.base import ConfigError
    from rsrlm.store.folder import RunFolder

    store, _ = RunFolder.open(whole[0])
    with store.lock(), pytest.raises(ConfigError, match="another process is running it"):
        store.lock()
    store.lock().close()


def test_an_iteration_without_pairs(config_file: Path) -> None:
    done = run("run", str(config_file), "name=no-pairs", "pair.max_chosen_chars=1", "prompts.heldout=0")
    assert done.returncode == 3, done.stdout + done.stderr
    found = summary(config_file.parent / "runs" / "no-pairs")
    assert found["status"] == "no_pairs"
    assert "chosen too long" in found["reason"]
    assert found["iterations"] == []


def test_a_loss_that_is_not_finite_stops_before_weights_are_published(config_file: Path) -> None:
    done = run("run", str(config_file), "name=nan", "train.lr=1e30", "train.lr_final=1e30", "prompts.heldout=0")
    assert done.returncode == 4, done.stdout + done.stderr
    folder = config_file.parent / "runs" / "nan"
    assert "00/" in summary(folder)["reason"]
    assert "lower train.lr" in summary(folder)["reason"]
    assert not (folder / "models").exists()
    published = [json.loads(line) for line in (folder / "events.jsonl").open() if '"publishing"' in line]
    assert published == []


@pytest.mark.full
def test_the_real_model_learns_something(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct through the same command: one small iteration of the quickstart."""
    config = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    done = run(
        "run",
        str(config),
        f"runs={tmp_path}",
        "iterations=1",
        "prompts.per_iteration=8",
        "prompts.heldout=2",
        "sample.max_tokens=64",
        "evaluate.max_tokens=32",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = summary(tmp_path / "quickstart")["iterations"][0]
    assert row["judgements_unreadable"] == 0
    assert row["pairs"] >= 3
    assert row["dpo_loss_first"] == pytest.approx(math.log(2), abs=1e-3)
    assert row["weight_version"] == "M1"
    assert row["prefix_cache_hit_share"] > 0.3
    assert_nothing_is_left()
