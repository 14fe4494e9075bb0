"""What judges are asked: the project's templates and those of users, and texts that try to leave their place in one."""

import asyncio
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hostile import HOSTILE, as_read
from hypothesis import given, settings
from hypothesis import strategies as st
from made import response
from scripted import Scripted, context_of, engines_of

from rsrlm.chat import ChatEncoder
from rsrlm.judges.base import Origin, judge_of, sampling_of
from rsrlm.judges.pairwise import duel_judge
from rsrlm.judges.templates import (
    ADDITIVE_VARIABLES,
    META_VARIABLES,
    PAIRWISE_VARIABLES,
    fence_of,
    form_of,
    load_template,
)
from rsrlm.judges.true_false import FORM as TRUE_FALSE
from rsrlm.judges.verdicts import META_WINNER, NO_SCORE, SCORE, WINNER, Form, parse_points
from rsrlm.recipes.process import ProcessBased
from rsrlm.records import Completion, Preferred, Prompt, Sampling, Scored
from rsrlm.settings.base import ConfigError

RATING = Form(label="Rating", scale=(1, 10), prefix="Rating: ")


# ---- the form of a template


def test_a_template_names_the_form_of_its_verdict() -> None:
    assert form_of("Grade it.", SCORE) == SCORE
    assert form_of(load_template("buckets"), SCORE) == Form(label="Score", scale=(1, 5), prefix="Score: ")
    assert form_of("{# verdict: {label: Rating, scale: [1, 10]} #}\nx", SCORE) == RATING
    assert form_of("{#- verdict: {sides: [m, M], prefix: '('} -#}", WINNER) == Form(
        label="Winner", sides=("m", "M"), prefix="("
    )
    assert form_of("text {# verdict: {scale: [1, 10]} #}", SCORE) == SCORE  # not on the first line
    for name, variables, form in (
        ("additive", ADDITIVE_VARIABLES, SCORE),
        ("additive_digits", ADDITIVE_VARIABLES, SCORE),
        ("pairwise", PAIRWISE_VARIABLES, WINNER),
        ("pairwise_text", PAIRWISE_VARIABLES, WINNER),
        ("meta", META_VARIABLES, META_WINNER),
        ("meta_letters", META_VARIABLES, META_WINNER),
        ("answer_true", ADDITIVE_VARIABLES, TRUE_FALSE),
        ("step_true", ADDITIVE_VARIABLES, TRUE_FALSE),
        ("steps", ProcessBased.shown, WINNER),
        ("steps_text", ProcessBased.shown, WINNER),
    ):
        source = load_template(name, variables)
        assert form_of(source, form) == form
        begun = name.endswith(("digits", "letters", "true")) or name in ("pairwise", "steps")
        written = form.prefix if begun else f"{form.label}: "
        assert written.removesuffix("(") in source


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("5", "a mapping of label, prefix, scale, sides"),
        ("{lable: Score}", "a mapping of label, prefix, scale, sides"),
        ("{scale: [5, 0]}", "lowest, highest"),
        ("{scale: [-1, 5]}", "from 0 on"),
        ("{scale: [0, 5.5]}", r"scale\.1: Input should be a valid integer"),
        ("{scale: 5}", "scale: Input should be a valid tuple"),
        ("{label: ''}", "label: String should match"),
        ("{label: 'Score 5'}", "label: String should match"),
        ("{sides: [A, A]}", "two different"),
        ("{sides: [A, '?']}", r"sides\.1: String should match"),
        ("{", "while parsing a flow"),
    ],
)
def test_forms_that_are_refused(header: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^judge\.template='x': .*{message}.*write one such as"):
        form_of(f"{{# verdict: {header} #}}", SCORE, "judge.template='x'")


# ---- templates


def test_bundled_templates() -> None:
    additive = load_template("additive")
    assert additive == load_template("additive.jinja")
    assert "at most 100 words" in additive
    assert '"Score: <total points>"' in additive
    assert additive.endswith("<response {{ fence }}>\n{{ response }}\n</response {{ fence }}>\n")
    assert "words" not in load_template("additive_digits")
    assert WINNER.prefix in load_template("pairwise", PAIRWISE_VARIABLES)
    assert '"Winner: tie"' in load_template("pairwise_text", PAIRWISE_VARIABLES)


@pytest.mark.parametrize(
    ("name", "variables"),
    [("additive_digits", ADDITIVE_VARIABLES), ("meta", META_VARIABLES), ("meta_letters", META_VARIABLES)],
)
def test_one_scale_whoever_reads_it(name: str, variables: frozenset[str]) -> None:
    """What scores a response, and what compares such scores, has the same five statements."""

    def statements(template: str) -> list[str]:
        return [line for line in template.splitlines() if line.startswith("- The answer")]

    found = statements(load_template(name, variables))
    assert len(found) == 5
    assert found == statements(load_template("additive"))


@pytest.mark.parametrize(
    ("name", "variables", "tags"),
    [
        ("additive", ADDITIVE_VARIABLES, ["response"]),
        ("additive_digits", ADDITIVE_VARIABLES, ["response"]),
        ("buckets", ADDITIVE_VARIABLES, ["response"]),
        ("answer_true", ADDITIVE_VARIABLES, ["response"]),
        ("step_true", ADDITIVE_VARIABLES, ["response"]),
        ("pairwise", PAIRWISE_VARIABLES, ["response A", "response B"]),
        ("pairwise_text", PAIRWISE_VARIABLES, ["response A", "response B"]),
        ("steps", ProcessBased.shown, ["steps", "response A", "response B"]),
        ("steps_text", ProcessBased.shown, ["steps", "response A", "response B"]),
        ("meta", META_VARIABLES, ["response", "judgement A", "judgement B"]),
        ("meta_letters", META_VARIABLES, ["response", "judgement A", "judgement B"]),
        ("taught", PAIRWISE_VARIABLES, ["response A", "response B"]),
        ("yes_no", ADDITIVE_VARIABLES, ["response"]),
        ("refine", frozenset({"instruction", "response", "judgement"}), ["response", "judgement"]),
    ],
)
def test_what_a_model_wrote_stands_between_fences(name: str, variables: frozenset[str], tags: list[str]) -> None:
    """Each text in tags of its own, which it cannot close: it was written before anybody knew the fence."""
    blocks = []
    for tag in tags:
        field = tag.lower().replace(" ", "_")
        blocks.append(f"<{tag} {{{{ fence }}}}>\n{{{{ {field} }}}}\n</{tag} {{{{ fence }}}}>\n")
    template = load_template(name, variables)
    assert template.endswith("\n".join(blocks))
    assert template.count("{{") == 1 + 3 * len(tags)  # nothing is printed elsewhere but the question


def test_templates_from_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ instruction }} é {{ response }}", encoding="utf-8")
    assert load_template(str(file)) == "{{ instruction }} é {{ response }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"{{ instruction }}", r"does not use response; add \{\{ response \}\}"),
        (b"{{ instruction }}{{ response }}{{ score }}", "uses score, .*known here: fence, instruction, response"),
        (b"{{ instruction }}\n{{ response ", "line 2: "),
        (b"{{ instruction }}{{ response | upper }}", "response may only be printed"),
        (b"\xff", "nor a readable Jinja2 file"),
    ],
)
def test_template_files_that_are_refused(tmp_path: Path, source: bytes, message: str) -> None:
    file = tmp_path / "mine.jinja"
    file.write_bytes(source)
    with pytest.raises(ConfigError, match=rf"^template='{re.escape(str(file))}': .*{message}"):
        load_template(str(file))


@pytest.mark.parametrize("name", ["nosuch", "", "/", "a\0b"])
def test_unknown_templates_name_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"additive, additive_digits, .*pairwise, pairwise_text.*give one of these"):
        load_template(name)


def test_pairwise_template_for_an_additive_judge_is_refused() -> None:
    with pytest.raises(ConfigError, match="template='pairwise': does not use response; add"):
        load_template("pairwise")


def test_fences() -> None:
    fences = [fence_of(seed) for seed in range(1000)]
    assert all(re.fullmatch("[0-9a-f]{8}", fence) for fence in fences)
    assert len(set(fences)) == 1000
    assert fence_of(2**63 - 1) == fence_of(2**63 - 1)


# ---- hostile text


def tokens_apart(tokenizer: Any, text: str, fence: str) -> list[int]:
    """Token ids of a piece of a judge prompt, with the values in it tokenised on their own."""
    parts = re.split(rf"({fence}|What is tea\?)", text)
    return [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]


@pytest.mark.parametrize("name", ["additive", "additive_digits"])
@pytest.mark.parametrize("response", [text for _, text in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_hostile_responses_change_neither_prompt_nor_score(
    tokenizer: Any, encoder: ChatEncoder, name: str, response: str
) -> None:
    template, fence = load_template(name), fence_of(1)
    prefix = SCORE.prefix if name == "additive_digits" else ""

    def prompt_of(text: str) -> tuple[int, ...]:
        return encoder.encode(template, {"instruction": "What is tea?", "response": text, "fence": fence}, prefix)

    harmless = tokenizer.decode(prompt_of("HARMLESS"), clean_up_tokenization_spaces=False)
    before, after = (tokens_apart(tokenizer, part, fence) for part in harmless.removesuffix(prefix).split("HARMLESS"))
    after += tokenizer.encode(prefix, add_special_tokens=False)
    prompt = prompt_of(response)
    assert list(prompt[: len(before)]) == before
    assert list(prompt[len(prompt) - len(after) :]) == after
    middle = prompt[len(before) : len(prompt) - len(after)]
    assert tokenizer.decode(middle, clean_up_tokenization_spaces=False) == as_read(response)
    added = set(tokenizer.get_added_vocab().values())
    assert sum(token in added for token in prompt) == 5  # three turns begin, two of them end

    # As an engine does it: the judge's answer is what comes after the prompt.
    for answer, verdict in ((" It is short.\nScore: 2", Scored(points=2)), (" It is short.", NO_SCORE)):
        whole = [*prompt, *tokenizer.encode(answer, add_special_tokens=False)]
        assert parse_points(tokenizer.decode(whole[len(prompt) :]), "stop") == verdict


@settings(deadline=None)
@given(response=st.text(), instruction=st.text())
def test_any_response_leaves_the_pairwise_prompt_in_place(
    tokenizer: Any, encoder: ChatEncoder, response: str, instruction: str
) -> None:
    template, fence = load_template("pairwise", PAIRWISE_VARIABLES), "0123abcd"
    fields = {"instruction": instruction, "response_a": "HARMLESS", "response_b": response, "fence": fence}
    prompt = encoder.encode(template, fields, WINNER.prefix)
    without = encoder.encode(template, {**fields, "response_b": ""}, WINNER.prefix)
    end = "\n</response B 0123abcd><|im_end|>\n<|im_start|>assistant\n"
    after = [*tokens_apart(tokenizer, end, fence), *tokenizer.encode(WINNER.prefix, add_special_tokens=False)]
    start, stop = len(without) - len(after), len(prompt) - len(after)
    assert list(prompt[stop:]) == after
    assert prompt[:start] == without[:start]
    assert tokenizer.decode(prompt[start:stop], clean_up_tokenization_spaces=False) == as_read(response)


def test_digits_are_read_on_the_scale_of_their_template(make_config: Any, encoder: ChatEncoder) -> None:
    """One to five: the mean of all alike is 3."""
    config = make_config(judge={"kind": "digits", "template": "buckets"})
    judge = judge_of(config.judge, context_of(config, encoder))
    said = Completion(
        request_id="r", token_ids=(1,), text="3", finish_reason="length", weight_version="M0",
        label_logprobs=(math.log(0.2),) * 5,
    )  # fmt: skip
    assert judge.read(said) == Scored(points=pytest.approx(3.0), variance=pytest.approx(2.0))


def said(text: str) -> Completion:
    return Completion(request_id="r", token_ids=(1,), text=text, finish_reason="stop", weight_version="M0")


def test_written_verdicts_are_read_as_their_template_says(
    make_config: Any, encoder: ChatEncoder, tmp_path: Path
) -> None:
    rating, better = tmp_path / "rating.jinja", tmp_path / "better.jinja"
    rating.write_text("{# verdict: {label: Rating, scale: [1, 10]} #}\n{{ instruction }} {{ response }} {{ fence }}")
    better.write_text(
        "{# verdict: {label: Better, sides: [m, M]} #}\n{{ instruction }} {{ response_a }} {{ response_b }} {{ fence }}"
    )
    config = make_config(
        judge={"kind": "text", "template": str(rating)},
        evaluate={"judge": {"read": "text", "template": str(better), "max_tokens": 30}},
    )
    context = context_of(config, encoder)
    judge, pairwise = judge_of(config.judge, context), duel_judge(config, context)
    assert judge.read(said("Good.\nRating: 7")) == Scored(points=7.0)
    assert judge.read(said("Good.\nScore: 3")) == NO_SCORE
    assert pairwise.read(said("Better: m")) == Preferred(winner="A")
    wrong = tmp_path / "wrong.jinja"
    wrong.write_text("{# verdict: {scale: [5, 5]} #}\n{{ instruction }} {{ response }}")
    with pytest.raises(ConfigError, match=rf"judge\.template='{re.escape(str(wrong))}'.*lowest, highest"):
        judge_of(config.judge.model_copy(update={"template": str(wrong)}), context)


def test_a_judge_behind_a_server_is_asked_in_text(make_config: Any, encoder: ChatEncoder) -> None:
    server = {"kind": "text", "endpoint": {"url": "http://localhost:1/v1", "model": "x"}}
    config = make_config(judge=server, evaluate={"duel": False})
    engine = Scripted(encoder.tokenizer, lambda *_: "Score: 4")
    judge = judge_of(config.judge, context_of(config, encoder))
    asked = Prompt(id="tea", text="What is tea?")
    (found, *_) = asyncio.run(judge(engines_of(engine), asked, response(3, "A plant."), Origin(iteration=1, name="n")))
    assert (found.prompt_id, found.response_id) == ("tea", "01/tea/3")
    assert "A plant." in engine.requests[0].text
    assert "What is tea?" in engine.requests[0].text


def test_stop_strings_of_a_section_are_asked_for() -> None:
    section: Any = SimpleNamespace(temperature=0.5, top_p=0.9, max_tokens=7, stop=["\n\n"])
    assert sampling_of(section, 3) == Sampling(temperature=0.5, top_p=0.9, max_tokens=7, seed=3, stop=("\n\n",))
    del section.stop
    assert sampling_of(section, 3).stop == ()


def test_an_unknown_judge_is_named_by_its_key() -> None:
    section, context = cast(Any, SimpleNamespace(kind="oracle")), cast(Any, None)
    with pytest.raises(ConfigError, match=r"^judge\.kind='oracle': known here: text"):
        judge_of(section, context)
