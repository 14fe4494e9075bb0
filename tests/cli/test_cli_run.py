"""`rsrlm run` and `rsrlm resume`: what starts, with what, and what is refused of a run that is there already."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Ended, Started, edit, started_with, write_weights

from rsrlm.commands import running
from rsrlm.data.examples import reply_as_response
from rsrlm.data.ranked import Reply
from rsrlm.judges.base import Origin
from rsrlm.judges.templates import TEMPLATES
from rsrlm.records import Prompt
from rsrlm.runtime import alive, cluster, launch, setup
from rsrlm.store.folder import RunFolder


def test_what_is_right_starts(rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, smollm2: Path) -> None:
    """Or every refusal below could be one of something else."""
    with pytest.raises(Started) as started:
        rsrlm("run", config_file, "model=smollm2-135m-instruct", "seed=7")
    prepared, store = started.value.arguments[:2]
    assert prepared.config.seed == 7
    assert prepared.model == smollm2
    assert prepared.left_out == []
    assert (len(prepared.heldout.prompts), [len(one.tasks) for one in prepared.iterations]) == (2, [4])
    assert store.folder == tmp_path / "runs" / "mine"
    assert sorted(path.name for path in store.folder.iterdir()) == ["config.yaml", "start.json", "trained_on.json"]


def judge_prompt_of(prepared: Any) -> tuple[int, ...]:
    response = reply_as_response(Reply(id="r", text="A drink.", rank=0), "tea", "00/tea", 0)
    judge, origin = prepared.iterations[0].recipe.judge, Origin(iteration=0, name="00/tea/0")
    found: tuple[int, ...] = judge.prompt_of(Prompt(id="tea", text="What is tea?"), response, origin)
    return found


def test_a_resume_makes_the_prompts_that_the_engines_saw(
    rsrlm: Callable[..., Ended], config_file: Path, clock: Path, tmp_path: Path
) -> None:
    """Whatever the chat template prints, and whatever was drawn for the fences."""
    first, store = started_with(lambda: rsrlm("run", config_file, f"model={clock}"))
    second, _ = started_with(lambda: rsrlm("resume", tmp_path / "runs" / "mine"))
    assert first.heldout.context.encoder.user("x") == second.heldout.context.encoder.user("x")
    assert judge_prompt_of(first) == judge_prompt_of(second)
    assert store.note("start")["drawn"] == first.drawn == second.drawn
    assert first.config.judge.fence_salt == first.drawn["fence_salt"] == second.config.judge.fence_salt
    assert len(first.drawn["fence_salt"]) == 16


def test_no_seed_tells_the_fences_of_a_run(rsrlm: Callable[..., Ended], config_file: Path) -> None:
    def prompt(*options: str) -> tuple[int, ...]:
        name = f"name=n{len(made)}"
        made.append(judge_prompt_of(started_with(lambda: rsrlm("run", config_file, name, *options))[0]))
        return made[-1]

    made: list[tuple[int, ...]] = []
    assert prompt() != prompt()
    assert prompt("judge.fence_salt=mine") == prompt("judge.fence_salt=mine") != prompt("judge.fence_salt=yours")
    # The prompts' author may know seed, ids and program, and compute the fence of a run without a salt.
    public = prompt("judge.fence_salt=''")
    assert public == prompt("judge.fence_salt=''")
    assert public not in made[:-2]


def test_a_run_without_notes_of_its_start_is_not_resumed(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path
) -> None:
    _, store = started_with(lambda: rsrlm("run", config_file))
    noted = store.note("start")
    del noted["drawn"]
    store.write_note("start", noted)
    ended = rsrlm("resume", tmp_path / "runs" / "mine")
    assert ended.code == 2
    assert "no date and fence salt in it" in ended.err
    assert "start anew under another name" in ended.err
    # Killed before anything was noted: nothing was asked yet.
    (store.folder / "start.json").unlink()
    started_with(lambda: rsrlm("resume", tmp_path / "runs" / "mine"))


@pytest.mark.parametrize("code", [0, 3, 4, 130])
def test_the_exit_code_is_that_of_the_run(
    code: int, rsrlm: Callable[..., Ended], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "prepare", lambda *_: SimpleNamespace(model=None))
    monkeypatch.setattr(running, "check_room", lambda prepared: None)
    monkeypatch.setattr(setup, "check_inputs", lambda *_: None)
    monkeypatch.setattr(launch, "execute", lambda *_: code)
    assert rsrlm("run", config_file).code == code


def test_an_interruption_while_preparing(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "prepare", prepare)
    ended = rsrlm("run", config_file)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert not (tmp_path / "runs").exists()


def test_a_stop_while_hosts_are_waited_for(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked of an autoscaler is taken back, and nothing is made."""
    told: list[str] = []

    def joined(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            told.append("nothing more")

    monkeypatch.setattr(cluster, "joined", joined)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert rsrlm("run", config_file).code == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told
    assert not (tmp_path / "runs").exists()


def test_a_resume_refuses_other_prompts(rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path) -> None:
    """One line more in the prompt file would deal other prompts to every iteration."""
    started_with(lambda: rsrlm("run", config_file))
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "prompt": "One more."}))
    ended = rsrlm("resume", tmp_path / "runs" / "mine")
    assert ended.code == 2
    assert "the prompts of this run changed since it was started" in ended.err


STEPS = [{"recipe": "sft", "sources": ["ift", "EXAMPLES"]}, {"judge": {"template": "TEMPLATE"}}, {}]
STEPS.append({"recipe": "open_book", "documents": "DOCUMENTS", "on": "text"})


@pytest.fixture
def inputs(tmp_path: Path, ranked: Path, model: Path, other_model: Path, small_model: Path) -> dict[str, Path]:
    """All that a run reads while it goes on."""
    examples, template = tmp_path / "examples.jsonl", tmp_path / "mine.jinja"
    (documents := tmp_path / "documents").mkdir()
    (documents / "tea.txt").write_text("Tea is a drink.")
    examples.write_text(json.dumps({"prompt": "Say nothing.", "target": "Silence."}) + "\n")
    shutil.copy(TEMPLATES / "additive.jinja", template)
    validator = Path(shutil.copytree(small_model, tmp_path / "validator"))
    return {
        "RANKED": ranked, "EXAMPLES": examples, "TEMPLATE": template, "MODEL": model, "JUDGE": other_model,
        "VALIDATOR": validator, "DOCUMENTS": documents,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("RANKED", "the training data"),
        ("EXAMPLES", "the training data"),
        ("TEMPLATE", "the judge"),
        ("MODEL", "the model"),
        ("JUDGE", "the judge's model"),
        ("VALIDATOR", "the validator's model"),
        ("DOCUMENTS", "the training data"),
        (None, None),
    ],
)
def test_a_resume_refuses_other_inputs(
    changed: str | None, said: str | None, rsrlm: Callable[..., Ended], config_file: Path, inputs: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    options = [
        f"steps={json.dumps(STEPS)}", "iterations=4", "prompts.per_iteration=2", "model=MODEL", "data.trees=RANKED",
        "data.eft_share=0", "data.ift_share=1", "judge.kind=text", "judge.model=JUDGE", "judge.replicas=1",
        "evaluate.judge.model=VALIDATOR", "evaluate.judge.replicas=1",
    ]  # fmt: skip
    for name, path in inputs.items():
        options = [option.replace(name, str(path)) for option in options]
    started_with(lambda: rsrlm("run", config_file, *options))
    if changed is None:
        started_with(lambda: rsrlm("resume", tmp_path / "runs" / "mine"))
        return
    path = inputs[changed]
    if changed == "DOCUMENTS":
        (path / "ale.md").write_text("And so is ale.")
    elif path.is_dir():
        write_weights(path / "model.safetensors", rows=11)
    else:
        text = path.read_text()
        other = re.sub("good 7|Silence|You will", "Some", text)
        assert other != text
        path.write_text(other)
    ended = rsrlm("resume", tmp_path / "runs" / "mine")
    assert ended.code == 2
    assert f"{said} of this run changed since it was started; restore the former" in ended.err


@pytest.mark.parametrize("config", ["", "schedule: []\n"])
def test_a_run_of_another_version_is_not_resumed(
    config: str, rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path
) -> None:
    """What it answered lies where nothing looks for it. Its config may hold keys that are written otherwise, and
    mending these is not enough."""
    store = started_with(lambda: rsrlm("run", config_file))[1]
    store.iteration(0).mkdir(parents=True)
    (store.iteration(0) / "journal.jsonl").write_text('{"t": "response"}\n')
    edit(store.folder / "start.json", layout=None)
    with (store.folder / "config.yaml").open("a") as file:
        file.write(config)
    before = sorted(tmp_path.rglob("*"))
    for command in (["resume", store.folder], ["eval", "judge", store.folder, "--data", "ranked.jsonl"]):
        ended = rsrlm(*command)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err == (
            f"rsrlm: {store.folder}: this run was begun with another version of rsrlm, which keeps its answers in "
            "another way; finish it with that version, or start anew under another name\n"
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_of_what_is_no_run(rsrlm: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        ended = rsrlm("resume", folder)
        assert (ended.code, ended.out) == (2, "")
        assert (
            ended.err == f"rsrlm: {folder}: no run here (no config.yaml); give the folder of a run, such as runs/NAME\n"
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_resume_looks_at_the_inputs_again(rsrlm: Callable[..., Ended], make_config: Any, tmp_path: Path) -> None:
    store = RunFolder.create(make_config(prompts={"path": str(tmp_path / "gone.jsonl")}))
    ended = rsrlm("resume", store.folder)
    assert (ended.code, ended.out) == (2, "")
    assert f"prompts.path={tmp_path / 'gone.jsonl'}: No such file" in ended.err
    assert [path.name for path in store.folder.iterdir()] == ["config.yaml"]


def test_resume_of_a_finished_run_does_nothing(
    rsrlm: Callable[..., Ended], make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunFolder.create(make_config(iterations=2, model={"path": "./gone"}))
    for iteration in range(2):
        store.write_metrics(iteration, {"iteration": iteration})
    ended = rsrlm("resume", store.folder)
    assert ended.code == 0
    assert f"{store.folder} is finished: 2 iterations" in ended.out


def test_a_job_that_is_tried_again_goes_on(rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path) -> None:
    first, store = started_with(lambda: rsrlm("run", config_file, "seed=7", "--or-resume"))
    assert store.note("start")["drawn"] == first.drawn
    store.write_summary({"status": "running"})  # killed there
    store.write_note("alive", {"host": "head", "pid": 12, "at": time.time() - 100})
    again, same = started_with(lambda: rsrlm("run", "--or-resume", config_file, "seed=7", "ray.wait_s=5"))
    assert (same.folder, again.drawn) == (store.folder, first.drawn)
    assert again.config.ray.wait_s == 5  # what is about the cluster is this try's
    with pytest.raises(Started):
        rsrlm("resume", store.folder)
    assert rsrlm("run", config_file, "seed=7").code == 2  # without the option it is refused


def test_what_a_try_again_says_of_the_one_before(
    rsrlm: Callable[..., Ended], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = started_with(lambda: rsrlm("run", config_file))[1]
    store.write_summary({"status": "running"})
    store.write_note("alive", {"host": "head", "pid": 12, "at": time.time() - 100})
    with pytest.raises(Started):
        rsrlm("run", config_file, "--or-resume")
    said = capsys.readouterr().out
    killed = "which was killed, last run by process 12 of host head, seen 100 s ago\n"
    assert f"going on with {store.folder}, {killed}" in said
    store.write_summary({"status": "interrupted"})
    with pytest.raises(Started):
        rsrlm("run", config_file, "--or-resume")
    assert f"going on with {store.folder}, which was interrupted\n" in capsys.readouterr().out


def test_a_try_again_with_another_config(rsrlm: Callable[..., Ended], config_file: Path) -> None:
    store = started_with(lambda: rsrlm("run", config_file))[1]
    before = sorted(store.folder.rglob("*"))
    ended = rsrlm("run", config_file, "--or-resume", "train.lr=0.5", "sample.responses=3")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"rsrlm: {store.folder} was begun with another config (sample.responses: 2 -> 3; ")
    assert "train.lr: 0.001 -> 0.5" in ended.err
    assert "name=NAME" in ended.err
    assert sorted(store.folder.rglob("*")) == before


def test_a_try_again_of_what_is_finished(rsrlm: Callable[..., Ended], config_file: Path) -> None:
    store = started_with(lambda: rsrlm("run", config_file))[1]
    store.write_metrics(0, {"iteration": 0})
    ended = rsrlm("run", config_file, "--or-resume")
    assert ended.code == 0
    assert "is finished: 1 iterations" in ended.out
    assert store.summary()["status"] == "completed"


def test_a_try_again_waits_for_the_end_of_the_one_before(
    rsrlm: Callable[..., Ended], config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = started_with(lambda: rsrlm("run", config_file))[1]
    with alive.noted_alive(store):
        lock = store.lock()
        monkeypatch.setattr(running, "LOCK_WAIT_S", 0.0)
        ended = rsrlm("run", config_file, "--or-resume")
        assert ended.code == 2
        assert re.search(r": still run by process \d+ of host \S+, seen 0 s ago, 0 s later; stop it first", ended.err)
    assert not store.note("alive")
    monkeypatch.setattr(running, "LOCK_WAIT_S", 60.0)
    monkeypatch.setattr(alive, "time", SimpleNamespace(sleep=lambda _: lock.close(), monotonic=time.monotonic))
    with pytest.raises(Started):
        rsrlm("run", config_file, "--or-resume")
    assert f"{store.folder} is being run: waiting up to 60 s for its end" in capsys.readouterr().out


def test_a_job_that_no_further_try_could_mend(
    rsrlm: Callable[..., Ended], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts jobs again does so at every other code, each time with a cluster of its own."""

    def code_of(code: int, *options: str) -> int:
        monkeypatch.setattr(running, "run", lambda *_: code)
        return int(rsrlm("run", config_file, *options).code)

    assert [code_of(code) for code in (0, 2, 3, 4, 5, 130)] == [0, 2, 3, 4, 5, 130]
    assert [code_of(code, "--final-is-success") for code in (0, 2, 3, 4, 5, 130)] == [0, 0, 0, 4, 0, 130]


def test_what_a_further_try_could_mend(rsrlm: Callable[..., Ended], config_file: Path) -> None:
    for mistake, code in (("train.lr=fast", 0), ("prompts.path=gone.jsonl", 0), ("ray.address=127.0.0.1:1", 2)):
        ended = rsrlm("run", config_file, "--final-is-success", mistake)
        assert ended.code == code
        assert ended.err.startswith("rsrlm: ")
