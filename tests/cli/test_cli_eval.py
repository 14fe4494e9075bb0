"""`rsrlm eval`: what it measures and on what, and what of its answers it knows already when it runs again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import PROMPTS, Answering, Ended, Started, started_with, write_prompts

from rsrlm.judges.templates import TEMPLATES
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder


def test_a_function_judge_is_measured_without_engines(
    rsrlm: Callable[..., Ended], config_file: Path, ranked: Path, tmp_path: Path, engines: Answering
) -> None:
    """It likes what is longer: people's choice in all twenty. Twice: the second time from the journal."""
    (tmp_path / "taste.py").write_text("def longer(prompt, response):\n    return min(5.0, len(response) / 2)\n")
    arguments = ("eval", "judge", config_file, "--data", ranked, "judge.kind=function", "judge.function=taste:longer")
    for _ in range(2):
        ended = rsrlm(*arguments, "--limit", 15)
        assert ended.code == 0, ended
        assert "15 of 20 prompts of part unseen with 30 ranked replies" in ended.out
    found = json.loads((tmp_path / "runs" / "mine" / "eval" / "ranked" / "judge.json").read_text())
    assert (found["data"], found["part"], found["prompts"], found["of"]) == ("ranked.jsonl", "unseen", 15, 20)
    assert found["models"]["M0"]["pairwise_accuracy"]["count"] == 15
    journal = tmp_path / "runs" / "mine" / "eval" / "ranked" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 30
    # A larger limit goes on with what is there; other texts are another question.
    assert rsrlm(*arguments).code == 0
    assert len(journal.read_text().splitlines()) == 40
    ranked.write_text(ranked.read_text().replace("bad", "worse"))
    assert rsrlm(*arguments).code == 0
    assert len(journal.read_text().splitlines()) == 60
    assert engines.clusters == 0


def test_a_judge_is_asked_once(
    rsrlm: Callable[..., Ended], config_file: Path, ranked: Path, tmp_path: Path, engines: Answering
) -> None:
    """A larger limit and another setting ask for what they change; all is known in the end, and no engine starts."""
    template = tmp_path / "mine.jinja"
    shutil.copy(TEMPLATES / "additive_digits.jinja", template)
    arguments = ("eval", "judge", config_file, "--data", ranked, "--out", tmp_path / "out")

    def asked(*options: object) -> int:
        ended = rsrlm(*arguments, f"judge.template={template}", *options)
        assert ended.code == 0, ended
        return len(engines.take())

    assert asked("--limit", 5) == 10
    assert asked() == 30
    found = (tmp_path / "out" / "judge.json").read_bytes()
    assert (asked(), engines.clusters) == (0, 2)
    assert (tmp_path / "out" / "judge.json").read_bytes() == found
    assert asked("--pairwise") == 40
    ranked.write_text(ranked.read_text().replace('"bad"', '"worse"', 3))
    assert asked() == 3
    template.write_text(template.read_text().replace("You will", "You shall"))
    assert asked() == 40
    template.write_text(template.read_text().replace("You shall", "You will"))
    assert (asked(), asked("--pairwise", "--limit", 5), engines.clusters) == (0, 0, 5)


def test_all_models_of_a_run_are_told_apart_by_their_weights(
    rsrlm: Callable[..., Ended], config_file: Path, ranked: Path, small_model: Path, other_model: Path,
    engines: Answering,
) -> None:  # fmt: skip
    """M1 is M0 again, as where no candidate was better: it is not asked what is known."""
    store = started_with(lambda: rsrlm("run", config_file, "iterations=2", "prompts.reuse=true"))[1]
    for name, folder in (("M1", small_model), ("M2", other_model)):
        shutil.copytree(folder, store.model(name))
    ended = rsrlm("eval", "judge", store.folder, "--data", ranked)
    assert ended.code == 0, ended
    assert [version for version, _ in engines.requests] == ["M0"] * 40 + ["M2"] * 40
    found = json.loads((store.folder / "eval" / "ranked" / "judge.json").read_text())["models"]
    assert list(found) == ["M0", "M1", "M2"]
    assert found["M0"] == found["M1"]
    engines.take()
    assert rsrlm("eval", "judge", store.folder, "--data", ranked, "--model", "M2").code == 0
    assert (engines.take(), engines.clusters) == ([], 1)


def test_a_duel_asks_for_what_is_not_known(
    rsrlm: Callable[..., Ended], config_file: Path, small_model: Path, other_model: Path, tmp_path: Path,
    engines: Answering,
) -> None:  # fmt: skip
    """Seven prompts: answers of both models, and comparisons in both orders."""
    engines.text = lambda version, request: f"{version} says {request.id}"

    def asked(*options: object) -> tuple[int, int]:
        before = engines.clusters
        ended = rsrlm("eval", "duel", config_file, small_model, other_model, "--out", tmp_path / "out", *options)
        assert ended.code == 0, ended
        return len(engines.take()), engines.clusters - before

    assert asked() == (28, 3)
    found = json.loads((tmp_path / "out" / "duel.json").read_text())
    assert (found["win"]["n"], found["tie"]["count"], found["unreadable"]) == (7, 7, 0)  # always A: in both orders
    outputs = json.loads((tmp_path / "out" / "outputs-b.json").read_text())
    assert {one["generator"] for one in outputs} == {str(other_model)}
    assert asked() == (0, 0)
    assert asked("judge.fence_salt=mine") == (14, 1)  # answers are asked for without a fence
    assert asked("evaluate.temperature=0.1") == (14, 2)  # the same words come out, which were compared
    write_prompts(tmp_path / "prompts.jsonl", [*PROMPTS[1:], {"id": "new", "prompt": "Say more."}])
    assert asked() == (4, 3)
    assert asked("--judge", other_model) == (14, 1)


def test_a_model_is_known_whatever_its_folder(
    rsrlm: Callable[..., Ended], config_file: Path, small_model: Path, model: Path, tmp_path: Path, engines: Answering
) -> None:
    """Its copy gives the same answers, so that nothing is compared."""
    assert rsrlm("eval", "duel", config_file, small_model, model, "--out", tmp_path / "out").code == 0
    assert (len(engines.take()), engines.clusters) == (7, 1)
    assert json.loads((tmp_path / "out" / "duel.json").read_text())["tie"]["count"] == 7


def tree(number: int, question: str) -> dict[str, Any]:
    replies = [
        {"message_id": f"t{number}r{rank}", "text": f"reply {rank}", "role": "assistant", "rank": rank, "replies": []}
        for rank in range(2)
    ]
    root = {"message_id": f"t{number}", "text": question, "role": "prompter", "replies": replies}
    return {"message_tree_id": f"t{number}", "prompt": root}


class TestWhatIsTrainedOnIsNotMeasuredOn:
    """40 trees, of which some are for IFT and EFT, measured on from files of other names."""

    @pytest.fixture
    def trees(self, tmp_path: Path) -> list[dict[str, Any]]:
        found = [tree(number, f"What is number {number}?") for number in range(40)]
        (tmp_path / "trees.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
        return found

    @pytest.fixture
    def measured(
        self, rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, trees: list[dict[str, Any]]
    ) -> Callable[..., tuple[set[str], str]]:
        """Ids of the questions measured on in a file, and what is said about it."""
        (tmp_path / "nobodys_taste.py").write_text("def flat(prompt, response):\n    return 1\n")

        def measure(*arguments: Any, file: Path, config: Any = config_file) -> tuple[set[str], str]:
            out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
            ended = rsrlm(
                "eval", "judge", config, "--data", file, "--out", out, f"data.trees={tmp_path / 'trees.jsonl'}",
                "data.ift_share=0.3", "data.eft_share=0.3", "judge.kind=function", "judge.function=nobodys_taste:flat",
                *arguments,
            )  # fmt: skip
            assert ended.code == 0, ended
            names = [json.loads(line)["id"] for line in (out / "journal.jsonl").read_text().splitlines()]
            return {name.partition("ranked>")[2].partition("/")[0] for name in names}, ended.out

        return measure

    def test_by_id_and_by_wording_from_any_file(
        self, measured: Callable[..., tuple[set[str], str]], tmp_path: Path, trees: list[dict[str, Any]]
    ) -> None:
        own, said = measured(file=tmp_path / "trees.jsonl")
        assert 0 < len(own) < 40
        assert f"{40 - len(own)} prompts are trained on and left out" in said
        copy = tmp_path / "copy.jsonl"
        shutil.copy(tmp_path / "trees.jsonl", copy)
        assert measured(file=copy)[0] == own
        # Other ids, other case and blanks: the questions are the same.
        asked = [one["prompt"]["text"].upper().replace(" ", "  ") for one in trees]
        copy.write_text("".join(json.dumps(tree(100 + n, text)) + "\n" for n, text in enumerate(asked)))
        assert measured(file=copy)[0] == {f"t{100 + int(name[1:])}" for name in own}
        # The same ids with other words: left out as well.
        copy.write_text("".join(json.dumps(tree(n, f"Another question {n}")) + "\n" for n in range(40)))
        assert measured(file=copy)[0] == own

    def test_a_part_that_is_asked_for_is_measured_on_and_said_to_be_trained_on(
        self, measured: Callable[..., tuple[set[str], str]], tmp_path: Path
    ) -> None:
        unseen, _ = measured(file=tmp_path / "trees.jsonl")
        everything, said = measured("--part", "all", file=tmp_path / "trees.jsonl")
        assert len(everything) == 40
        assert f"{40 - len(unseen)} prompts are trained on and measured on all the same" in said

    def test_a_run_remembers_what_it_trains_on(
        self,
        rsrlm: Callable[..., Ended],
        measured: Callable[..., tuple[set[str], str]],
        config_file: Path,
        tmp_path: Path,
    ) -> None:
        """The prompts of its iterations and the questions in a file of examples too."""
        write_prompts(
            tmp_path / "prompts.jsonl", [{"id": f"p{n}", "prompt": f"what is number {n}? "} for n in range(9)]
        )
        examples = tmp_path / "examples.jsonl"
        examples.write_text(
            json.dumps({"prompt": "What is number 8?", "target": "8"}) + "\n"
            + json.dumps({"instruction": "What is number 39?", "response": "x", "target": "Score: 1"}) + "\n"
        )  # fmt: skip
        steps = [{"recipe": "sft", "sources": [str(examples)]}, {}]
        with pytest.raises(Started) as started:
            rsrlm(
                "run", config_file, "iterations=2", f"steps={json.dumps(steps)}", "judge.kind=text",
                "data.minimum=1", "prompts.heldout=4",
            )  # fmt: skip
        prepared, store = started.value.arguments[:2]
        assert "p8" not in {prompt.id for prompt in prepared.heldout.prompts}  # a question of the examples
        answered = {int(task.prompt.id[1:]) for one in prepared.iterations for task in one.tasks}
        trained = answered | {8, 39}
        assert len(trained) == 4 + 1 + 1 - (8 in answered)
        found, _ = measured(file=tmp_path / "trees.jsonl", config=store.folder)
        assert found == {f"t{number}" for number in range(40) if number not in trained}


def test_an_evaluation_does_not_stand_in_the_way_of_a_run(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    (folder / "eval").mkdir(parents=True)
    RunFolder.check_new(folder)
    (folder / "other").mkdir()
    with pytest.raises(ConfigError, match="holds other files"):
        RunFolder.check_new(folder)
