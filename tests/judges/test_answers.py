"""Final answers by hand: what is read, what is equal, and what is none."""

import asyncio
import time
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import response
from pydantic import ValidationError

from rsrlm.judges.answers import (
    EMPTY,
    NO_ANSWER,
    NO_NUMBER,
    SEVERAL,
    AnswerForm,
    FinalAnswer,
    RightAnswer,
    find,
    gold,
)
from rsrlm.judges.base import Origin
from rsrlm.records import Judgement, Prompt, Scored, Unparsed
from rsrlm.settings.base import ConfigError

LINE, HASHES, BOXED, END = (AnswerForm(where=where) for where in ("line", "hashes", "boxed", "end"))
LINE_TEXT, BOXED_TEXT = (AnswerForm(where=where, value="text") for where in ("line", "boxed"))


def judge_of(config: dict[str, str]) -> RightAnswer:
    context: Any = None
    return RightAnswer(RightAnswer.Config.model_validate(config), context)


def value(text: str, form: AnswerForm) -> str | Unparsed:
    found = find(text, form)
    return found.value if isinstance(found, FinalAnswer) else found


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        ("48 + 24 = 72 clips.\nFinal answer: 72", LINE, "72"),
        ("So **Final Answer:** $72.00", LINE, "72"),
        ("final answer:\n\n72 clips in total.", LINE, "72"),
        ("Final answer: 48 + 24 = 72", LINE, "72"),
        ('I will write "Final answer: ..." at the end.\nFinal answer: 72', LINE, "72"),
        ("Final answer: 72\nAs I said, the final answer: $72$.", LINE, "72"),
        ("Final answer: 72\nFinal answer: 27", LINE, SEVERAL),  # hedging is no answer
        ("Final answer: 72. Final answer: 27", LINE, SEVERAL),
        ("Final answer: 3 or 4", LINE, SEVERAL),
        ("The answer is 72.", LINE, NO_ANSWER),
        ("Final answer: many", LINE, NO_NUMBER),
        ("Final answer:", LINE, EMPTY),
        ("Final answer: 3 dozen", LINE, NO_NUMBER),
        ("Final answer: minus 3", LINE, NO_NUMBER),
        ("She has 5.\n#### 1,234", HASHES, "1234"),
        ("#### 18\nQ: next", HASHES, "18"),
        ("##### 18", HASHES, NO_ANSWER),
        ("see #### 18", HASHES, NO_ANSWER),
        (r"The final answer is $\boxed{\frac{3}{4}}$.", BOXED, "3/4"),
        (r"\boxed{\text{about } 18\text{ cm}}", BOXED, "18"),
        (r"so $\boxed{18} = \fbox{18.0}$", BOXED, "18"),
        (r"either \boxed{1} or \boxed{2}", BOXED, SEVERAL),
        (r"never closed: \boxed{18", BOXED, NO_ANSWER),
        (r"Final answer: \boxed{18}", LINE, "18"),
        ("There are 3 bags of 6, so 18.", END, "18"),
        ("There are 1,200 or, better, 1/2 of 7.", END, "7"),
        ("None at all.", END, NO_ANSWER),
        (r"\boxed{\boxed{1}} and \boxed{2}", BOXED, SEVERAL),
        (r"\boxed{\frac{1}{1,000}}", BOXED, "1/1000"),
        ("Final answer: .", LINE, EMPTY),
        ("Final answer: X", LINE, NO_NUMBER),
        ("Final answer: N = 5", LINE_TEXT, "5"),
        ('Final answer: "New York"', LINE_TEXT, "newyork"),
        ("Final answer: Xerox", LINE_TEXT, "xerox"),
        ("Final answer: MAX", LINE_TEXT, "max"),
        ("Final answer: (c)", LINE_TEXT, "c"),
        ("Final answer: (C)", LINE_TEXT, "c"),
        ("Final answer: C.", LINE_TEXT, "c"),
        ("Final answer:  New  York.", LINE_TEXT, "newyork"),
        ("Final answer: 0.50", LINE_TEXT, "1/2"),
        (r"\boxed{x = 5}", BOXED_TEXT, "5"),
        (r"\boxed{\dfrac12}", BOXED_TEXT, "1/2"),
        (r"\boxed{x^2 + 2x}", BOXED_TEXT, "x^2+2x"),
        (r"\boxed{\left( 1, \sqrt2 \right)}", BOXED_TEXT, r"(1,\sqrt{2})"),
        (r"\boxed{\Delta}", BOXED_TEXT, r"\Delta"),  # not \delta
    ],
)
def test_what_is_read(text: str, form: AnswerForm, expected: str | Unparsed) -> None:
    assert value(text, form) == expected


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("18", "18"), ("18.", "18"), ("018", "18"), ("18.0", "18"), ("-18", "-18"), ("− 18", "-18"), ("+18", "18"),
        ("1,000", "1000"), ("1{,}000", "1000"), (r"1\,000", "1000"), ("1,000,000.5", "2000001/2"), (".5", "1/2"),
        ("$18", "18"), (r"\$18.00", "18"), ("18 €", "18"), ("50%", "50"), (r"50\%", "50"), ("90^\\circ", "90"),
        ("1/2", "1/2"), ("2/4", "1/2"), ("1 1/2", "3/2"), ("-1 1/2", "-3/2"), (r"-\frac{3}{6}", "-1/2"),
        (r"\tfrac12", "1/2"), (r"\(18\)", "18"), (r"$18\ \mathrm{cm}$", "18"), ("*18*", "18"), ("**18**", "18"),
        ("`18`", "18"), ("(18)", "18"), ("18 km/h", "18"), ("x = 18", "18"), ("x = - 18", "-18"),
        ("18 (eighteen)", "18"),
    ],
)  # fmt: skip
def test_spellings_of_a_number(written: str, number: str) -> None:
    assert value(f"Final answer: {written}", LINE) == number


@pytest.mark.parametrize(
    "written",
    ["2x", "x-3", "x/2", "2*x", "2*3", "2^3", "x^2", "1,23", "1.2.3", "1/0", "1/2/3", r"\sqrt{2}", "sqrt(2)",
     r"\frac{x}{2}", "18apples", "1e5", "v2", "9" * 41, "1st"],
)  # fmt: skip
def test_what_is_no_number_is_not_read_as_a_part_of_it(written: str) -> None:
    assert value(f"Final answer: {written}", LINE) == NO_NUMBER


def test_the_text_as_written_is_kept() -> None:
    assert find("So.\nFinal answer:  **$72** clips", LINE) == FinalAnswer(text="$72** clips", value="72")
    assert find("It is $72.50.", END) == FinalAnswer(
        text="145/2", value="145/2"
    )  # a number found in no place of its own


def test_what_was_cut_has_no_final_answer() -> None:
    whole = response(0, "Final answer: 7")
    judge = judge_of({})
    assert judge.read(whole) == FinalAnswer(text="7", value="7")
    assert judge.read(response(0, "Final answer: 7", cut=True)) == Unparsed(reason="cut before its end")


def test_the_judge_compares_with_the_answer_of_the_prompt() -> None:
    counted: list[str] = []
    engines: Any = SimpleNamespace(judges=SimpleNamespace(count=counted.append))
    judge = judge_of({"where": "hashes"})

    def judged(text: str, data: dict[str, str]) -> Judgement:
        prompt = Prompt(id="tea", text="?", data=data)
        origin = Origin(iteration=1, name="01/tea/3", by="@M1")
        (made,) = asyncio.run(judge(engines, prompt, response(3, text), origin))
        return made

    right = judged("#### $7 in all", {"answer": "7.0"})
    assert (right.verdict, right.text, right.judge) == (
        Scored(points=1.0),
        "$7 in all",
        "final answer (hashes, number)",
    )
    assert (right.id, right.response_id, right.prompt_id, right.role) == ("01/tea/3#0@M1", "01/tea/3", "tea", "judge")
    assert (right.index, right.sampling, right.weight_version, right.token_ids) == (0, None, "", ())
    assert judged("#### 8", {"answer": "7"}).verdict == Scored(points=0.0)
    unread = judged("I think 7.", {"answer": "7"})
    assert (unread.verdict, unread.text) == (Scored(points=0.0), "[no final answer]")
    for text in ("#### 7", "I think 7."):
        assert judged(text, {}).verdict == Unparsed(reason="the prompt has no answer")
    assert counted == ["judge"] * 5


def test_no_engine_judges_answers() -> None:
    judge = judge_of({})
    assert (judge.per_response, judge.max_tokens, judge.needs(99), judge.form.scale) == (1, 0, 0, (0, 1))
    assert judge.source == "final answer (line, number)"
    assert judge.config.tokens == 0
    with pytest.raises(ValidationError, match="no engine judges"):
        RightAnswer.Config(model="other", replicas=1)


def test_answers_of_prompts_are_compared_in_the_same_form() -> None:
    assert gold(Prompt(id="a", text="?", data={"answer": "1,000.0"}), LINE) == value("#### $1000", HASHES)
    with pytest.raises(ConfigError, match=r"prompt 'a' has no answer .* add a field \"answer\""):
        gold(Prompt(id="a", text="?"), LINE)
    said = (
        r"prompt 'a': final answer is no number: 'blue' with judge.value=number; correct its field \"answer\", or use "
    )
    with pytest.raises(ConfigError, match=said + r"judge\.value=text$"):
        gold(Prompt(id="a", text="?", data={"answer": "blue"}), LINE)
    assert gold(Prompt(id="a", text="?", data={"answer": "blue"}), LINE_TEXT) == "blue"


def test_the_last_number_is_no_text() -> None:
    with pytest.raises(ValidationError, match=r"set judge\.value=number"):
        AnswerForm(where="end", value="text")


@given(st.fractions(max_denominator=10**6), st.sampled_from(["line", "hashes", "boxed", "end"]))
@settings(deadline=None, max_examples=100)
def test_every_fraction_comes_back(number: Fraction, where: str) -> None:
    written = str(number)
    text = {"line": f"Final answer: {written}", "hashes": f"#### {written}", "boxed": rf"\boxed{{{written}}}"}.get(
        where, f"It is {written}."
    )
    assert value(text, AnswerForm.model_validate({"where": where})) == written


@given(st.text(st.sampled_from(r"\{}$ .,-+*/=^0123456789xfrac\n#:"), max_size=40), st.sampled_from([LINE, BOXED_TEXT]))
@settings(deadline=None, max_examples=200)
def test_nothing_raises(text: str, form: AnswerForm) -> None:
    for written in (text, f"Final answer: {text}", rf"\boxed{{{text}}}"):
        assert isinstance(find(written, form), FinalAnswer | Unparsed)


@pytest.mark.parametrize(
    "piece", ["Final answer: ", "9", "9,999,", r"\boxed{", "{", "- ", "1 1/", r"\frac{", " ", "*_ \n"]
)
def test_the_time_is_linear(piece: str) -> None:
    begin = time.perf_counter()
    for form in (LINE, HASHES, BOXED, END, LINE_TEXT, BOXED_TEXT):
        find(f"Final answer: #### \\boxed{{{piece * 20_000}", form)
    assert time.perf_counter() - begin < 5
