"""Mistakes in the config, the prompts and the judges: told before anything starts, and without a stack trace."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import PROMPTS, Ended, Started, write_prompts

from rsrlm.data.examples import reply_as_response
from rsrlm.data.ranked import Reply
from rsrlm.judges.base import Origin
from rsrlm.records import Prompt


def test_a_mistake_in_a_process_of_its_own(config_file: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rsrlm.cli", "run", str(config_file), "prompts.path=nowhere.jsonl"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "rsrlm: prompts.path=nowhere.jsonl: No such file or directory; give a JSONL file with id and prompt per line, "
        "or 'builtin'\n"
    )
    assert not (tmp_path / "runs").exists()


def test_a_config_that_is_not_there(rsrlm: Callable[..., Ended], tmp_path: Path) -> None:
    for command in ("run", "plan", "doctor"):
        ended = rsrlm(command, "nowhere.yaml")
        assert (ended.code, ended.out) == (2, "")
        assert ended.err == "rsrlm: nowhere.yaml: No such file or directory; give the path of a YAML config\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=1e-5", ["train.learning_rate='1e-5': no step uses it (recipes: SelfR", " lr, "]),
        ("trian.lr=1e-5", ["trian: unknown key; known here: ", " train, "]),
        ("train.lr=fast", ["train.lr='fast': ", "number"]),
        ("prompts.per_iteration=4.5", ["prompts.per_iteration=4.5: ", "integer"]),
        ("sample.responses=1", ["sample.responses=1: ", "greater than or equal to 2"]),
        ("judge.kind=oracle", ["judge.kind='oracle': ", "digits"]),
        ("lr", ["'lr': overrides are written key.sub=value, such as train.lr=1e-5"]),
        ("name=a/b", ["name='a/b': "]),
        (f"name={'x' * 300}", ["at most 200 characters"]),
    ],
)
def test_keys_and_values(override: str, said: list[str], refused: Callable[..., str]) -> None:
    message = refused(override)
    for part in said:
        assert part in message


def test_every_command_that_reads_a_config_refuses_it_alike(rsrlm: Callable[..., Ended], config_file: Path) -> None:
    told = [rsrlm(command, config_file, "train.learning_rate=1") for command in ("run", "plan", "doctor")]
    assert {(ended.code, ended.out) for ended in told} == {(2, "")}
    assert len({ended.err for ended in told}) == 1


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, ": No such file or directory; give a JSONL file with id and prompt per line, or 'builtin'"),
        (["", " "], ": no prompts in it; write one JSON object with id and prompt per line"),
        (['{"id": "a", "prompt": "x"}', "", '{"id": "b", "pro'], ", line 3: not JSON ("),
        (['{"id": "a", "prompt": "x"}', '{"id": "b"}'], ', line 2: must be an object such as {"id": "tea", '),
        (
            ['{"id": "a", "prompt": "x"}', '{"id": "b", "prompt": "y"}', '{"id": "a", "prompt": "z"}'],
            ", line 3: id 'a' stands in line 1 already; ids are unique",
        ),
    ],
    ids=["missing", "empty", "malformed", "no-prompt", "duplicate"],
)
def test_prompt_files(lines: list[str] | None, said: str, refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "theirs.jsonl"
    if lines is not None:
        path.write_text("\n".join(lines))
    assert f"prompts.path={path}{said}" in refused(f"prompts.path={path}")


def test_too_few_prompts(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused("iterations=2") == (
        f"rsrlm: prompts.path={tmp_path / 'prompts.jsonl'}: 7 usable prompts, but 10 are needed (2 held out, 4 for "
        "each of 2 iterations); add prompts, lower prompts.per_iteration or set prompts.reuse=true\n"
    )


def with_a_long_one(path: Path) -> None:
    write_prompts(path, [*PROMPTS[:6], {"id": "long", "prompt": "tea " * 4200}])


def test_a_prompt_that_is_too_long_is_left_out(
    rsrlm: Callable[..., Ended], refused: Callable[..., str], config_file: Path, tmp_path: Path
) -> None:
    with_a_long_one(tmp_path / "prompts.jsonl")
    assert "6 usable prompts, but 7 are needed" in refused("prompts.heldout=3")
    with pytest.raises(Started) as started:
        rsrlm("run", config_file)
    prepared = started.value.arguments[0]
    assert prepared.left_out == ["long"]
    dealt = [*prepared.heldout.prompts, *(task.prompt for task in prepared.iterations[0].tasks)]
    assert {prompt.id for prompt in dealt} == {f"p{number}" for number in range(6)}


def test_a_question_is_not_both_held_out_and_trained_on(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path
) -> None:
    again = [{"id": f"again{place}", "prompt": f" {one['prompt'].upper()}"} for place, one in enumerate(PROMPTS)]
    write_prompts(tmp_path / "prompts.jsonl", [*PROMPTS, *again])
    with pytest.raises(Started) as started:
        rsrlm("run", config_file, "prompts.heldout=3")
    prepared = started.value.arguments[0]
    assert prepared.repeated == [one["id"] for one in again]
    dealt = [*prepared.heldout.prompts, *(task.prompt for task in prepared.iterations[0].tasks)]
    assert sorted(prompt.id for prompt in dealt) == sorted(one["id"] for one in PROMPTS)


def test_whatever_is_sampled_can_be_judged(rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path) -> None:
    """Of prompts of 10 to 200 tokens, those are left out whose longest responses the judge could not read."""
    prompts = [{"id": f"p{n}", "prompt": "tea " * n} for n in range(10, 201, 10)]
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    options = ("model=smollm2-135m-instruct", "judge.kind=text", "judge.max_tokens=60", "sample.max_tokens=300")
    with pytest.raises(Started) as started:
        rsrlm("run", config_file, *options, "engine.max_model_len=850", "evaluate.duel=false")
    prepared = started.value.arguments[0]
    assert 0 < len(prepared.left_out) < len(prompts)
    judge, tokenizer = prepared.iterations[0].recipe.judge, prepared.heldout.context.encoder.tokenizer
    text = tokenizer.decode(tokenizer.encode(" word" * 400)[:300])
    response = reply_as_response(Reply(id="r", text=text, rank=0), "p", "00/p", 0)

    def asked(prompt: dict[str, str]) -> int:
        shown = Prompt(id=prompt["id"], text=prompt["prompt"])
        return len(judge.prompt_of(shown, response, Origin(iteration=0, name=f"00/{shown.id}/0"))) + 60

    room = {prompt["id"]: 850 - asked(prompt) for prompt in prompts}
    assert all((room[name] < 0) == (name in prepared.left_out) for name in room if abs(room[name]) > 16)
    assert all(room[prompt["id"]] >= 0 for prompt in prompts if prompt["id"] not in prepared.left_out)


@pytest.mark.parametrize("key", ["judge", "evaluate.judge"])
def test_an_endpoint_is_named_by_its_key(refused: Callable[..., str], key: str) -> None:
    endpoint = 'endpoint={url: "ftp://host", model: m}'
    options = ["judge.kind=text", "evaluate.judge.read=text", f"{key}.{endpoint}"]
    assert refused(*options).startswith(f"rsrlm: {key}.endpoint.url='ftp://host': no http url")


# -- judges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["judge.template", "evaluate.judge.template"])
def test_a_template_that_is_missing(key: str, refused: Callable[..., str]) -> None:
    message = refused(f"{key}=mine.jinja")
    assert message.startswith(f"rsrlm: {key}='mine.jinja': neither one of rsrlm's (additive, ")
    assert message.endswith("give one of these names or a path\n")


def test_a_template_for_something_else(refused: Callable[..., str]) -> None:
    assert "evaluate.judge.template='additive': does not use response_a, response_b; add" in refused(
        "evaluate.judge.template=additive"
    )


@pytest.mark.parametrize("key", ["judge.template", "evaluate.judge.template"])
def test_what_a_template_prints_is_carried_by_each_prompt(
    key: str, rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path
) -> None:
    texts = "{{ response_a }}{{ response_b }}" if "evaluate" in key else "{{ response }}"
    (tmp_path / "mine.jinja").write_text("{{ instruction }} {{ data.reference }}" + texts)
    ended = rsrlm("plan", config_file, f"{key}={tmp_path / 'mine.jinja'}")
    assert ended.code == 2
    assert re.fullmatch(
        rf"rsrlm: prompts.path={tmp_path / 'prompts.jsonl'}: prompt '\w+' has no 'reference', which the judge's "
        r"template prints as \{\{ data.reference \}\}; add it to the line of the prompt, or take it out of the "
        r"template\n",
        ended.err,
    )
    write_prompts(tmp_path / "prompts.jsonl", [{**prompt, "reference": "Tea."} for prompt in PROMPTS])
    assert rsrlm("plan", config_file, f"{key}={tmp_path / 'mine.jinja'}").code == 0
    # A reference takes room too: one that leaves none is left out, as a long prompt is.
    long = [{**prompt, "reference": "Tea. " * (0 if number else 900)} for number, prompt in enumerate(PROMPTS)]
    write_prompts(tmp_path / "prompts.jsonl", long)
    with pytest.raises(Started) as started:
        rsrlm("run", config_file, f"{key}={tmp_path / 'mine.jinja'}")
    assert started.value.arguments[0].left_out == [PROMPTS[0]["id"]]


def test_ranked_data_carries_nothing_for_templates(
    rsrlm: Callable[..., Ended], config_file: Path, ranked: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_text("{{ instruction }} {{ data.reference }} {{ response }}")
    judge = (f"judge.template={tmp_path / 'mine.jinja'}", "judge.kind=text", f"data.trees={ranked}")
    said = "judge.template prints {{ data.reference }}, which ranked data does not carry"
    for command in (
        ("eval", "judge", config_file, "--data", ranked),
        ("data", "eft", config_file, "--out", tmp_path / "eft.jsonl"),
    ):
        ended = rsrlm(*command, *judge)
        assert (ended.code, said in ended.err) == (2, True), ended


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("their_judge:longer", "=their_judge:longer: cannot be imported: AttributeError: "),
        ("no_such_module:shorter", "=no_such_module:shorter: cannot be imported: ModuleNotFoundError: "),
        (
            "their_judge:alone",
            "=their_judge:alone: must be callable with (prompt, response) or (prompt, response, data): ",
        ),
        ("shorter", "='shorter': write module:name, such as my_judges:shorter"),
    ],
)
def test_functions_that_cannot_judge(
    function: str, said: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "their_judge", raising=False)
    (tmp_path / "their_judge.py").write_text("def alone(prompt):\n    return 1\n")
    message = refused("judge.kind=function", f"judge.function={function}")
    assert message.startswith(f"rsrlm: judge.function{said}")


def test_a_function_beside_the_working_directory_is_found(
    rsrlm: Callable[..., Ended], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "my_judge", raising=False)
    (tmp_path / "my_judge.py").write_text("def shorter(prompt, response):\n    return -len(response)\n")
    assert rsrlm("plan", config_file, "judge.kind=function", "judge.function=my_judge:shorter").code == 0
    assert sys.path[-1] == str(tmp_path)  # and hides nothing that is installed


SCRIPT, MODULE = [str(Path(sys.executable).parent / "rsrlm")], [sys.executable, "-m", "rsrlm.cli"]


@pytest.mark.parametrize(
    ("command", "does"),
    [
        (SCRIPT, "doctor"),
        (MODULE, "doctor"),
        pytest.param(SCRIPT, "plan", marks=pytest.mark.ray),  # imports Ray, torch and transformers
    ],
)
def test_a_file_of_the_working_directory_is_no_library(
    command: list[str], does: str, config_file: Path, tmp_path: Path
) -> None:
    """A judge of one's own comes last too: it does not stand in for what is installed."""
    for name in ("psutil", "typer", "logging", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working directory')\n")
    (tmp_path / "my_judge.py").write_text("def shorter(prompt, response):\n    return -len(response)\n")
    arguments = [does, str(config_file), "judge.kind=function", "judge.function=my_judge:shorter"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0 or (does == "doctor" and "\nfail  " in done.stdout)  # a machine may lack something
