"""What judges are asked and how their answers are read, against values worked out by hand."""

import math
import re
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import HOSTILE, as_read
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrlm import judging
from rsrlm.chat import ChatEncoder
from rsrlm.config import ConfigError
from rsrlm.judging import (
    ADDITIVE_VARIABLES,
    ANSWER_PREFIX,
    META_VARIABLES,
    PAIRWISE_PREFIX,
    PAIRWISE_VARIABLES,
    SCORES,
    WINNERS,
    call_function,
    combine_orders,
    fence_of,
    label_ids,
    load_function,
    load_template,
    mean_points,
    parse_points,
    parse_winner,
    points_regex,
    read_distribution,
    winner_from_distribution,
)
from rsrlm.records import FinishReason, Scored, Unparsed, Verdict

# The score format without possessive quantifiers: the same language, in more than quadratic time.
PLAIN_REGEX = re.compile(r"(?i)\bscore\b\s*[:=]?\s*[\*_`\s]*[:=]?\s*[\*_`<\[\(\s]*(-?\d+(?:\.\d+)?)(?![\d.]*\d)")
INF = math.inf


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def scored(points: float, variance: float | None = None) -> Verdict:
    if variance is None:
        return Scored(points=pytest.approx(points, abs=1e-12))
    return Scored(points=pytest.approx(points, abs=1e-12), variance=pytest.approx(variance, abs=1e-12))


# ---- reading a score from text


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("Score: 4", 4),
        ("**Score:** 4", 4),
        ("Score: 4/5", 4),
        ("Score: <4>", 4),
        ("Score: 4.75", 4.75),
        ("score = 3", 3),
        ("SCORE 2", 2),
        ("Score: [5]", 5),
        ("Score: (0)", 0),
        ("**Score: 4**", 4),
        ("`Score: 1`", 1),
        ("Score:\n3", 3),
        ("Score:4.", 4),
        ("Total score: 2 points", 2),
        ("It was Score: 5 at first.\nScore: 3", 3),
        ("Score: 2 out of 5. That is my final score", 2),
    ],
)
def test_scores_that_are_read(text: str, points: float) -> None:
    assert parse_points(text, "stop") == Scored(points=points)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Score: 10", "score out of range"),
        ("Score: -1", "score out of range"),
        ("Score: 5.5", "score out of range"),
        ("Score: 4\nScore: 9", "score out of range"),
        ("Score: " + "9" * 400, "score out of range"),
        ("Score: five", "no score line"),
        ("Score: <total points>", "no score line"),
        ("Score: 1.2.3", "no score line"),
        ("underscore: 4", "no score line"),
        ("4", "no score line"),
        ("", "no score line"),
        ("Score:", "no score line"),
    ],
)
def test_scores_that_are_not_read(text: str, reason: str) -> None:
    assert parse_points(text, "stop") == Unparsed(reason=reason)


@pytest.mark.parametrize(
    "text",
    [
        "The answer is",
        "",
        "Score: 1",
        "Score: 1.",
        "Score:",
        "**Score:** ",
        "Score: -",
        "Relevance score: 1\nCoverage score: 1\nScore: ",
        "Score: 4\nSo the final Score: 4",
    ],
)
def test_scores_that_the_length_limit_cut(text: str) -> None:
    assert parse_points(text, "length") == Unparsed(reason="cut before a score")


@pytest.mark.parametrize("text", ["Score: 4\n", "Score: 4\nThe answer is", "Score: 4/", "Score: 4 "])
def test_scores_that_a_cut_cannot_change(text: str) -> None:
    assert parse_points(text, "length") == Scored(points=4)


def test_range_error_of_a_cut_answer() -> None:
    assert parse_points("Score: 12 of", "length") == Unparsed(reason="score out of range")


@settings(max_examples=500, deadline=None)
@given(text=st.lists(st.sampled_from(["score", "Score:", *" \n:=*_`<[(-.", "1", "4", "10", "x"]), max_size=14))
def test_the_parser_reads_what_the_plain_regex_reads(text: list[str]) -> None:
    joined = "".join(text)
    found = [float(number) for number in PLAIN_REGEX.findall(joined)]
    verdict = parse_points(joined, "stop")
    if not found:
        assert verdict == Unparsed(reason="no score line")
    elif 0 <= found[-1] <= 5:
        assert verdict == Scored(points=found[-1])
    else:
        assert verdict == Unparsed(reason="score out of range")


@pytest.mark.parametrize("fill", [" ", "*", ":", "\n ", "score ", "1", "1.", "winner ", "winner: a "])
def test_degenerate_answers_are_parsed_at_once(fill: str) -> None:
    start = time.perf_counter()
    for text in (f"score{fill * 5000}x", f"winner{fill * 5000}x"):
        parse_points(text, "stop")
        parse_winner(text, "length")
    assert time.perf_counter() - start < 2


# ---- structured outputs


@pytest.mark.parametrize("answer", ["Good and short.\nScore: 0", "x\nScore: 5", "Score: 9\nScore: 3"])
def test_points_regex_matches_whole_answers(answer: str) -> None:
    assert re.fullmatch(points_regex(160), answer)


@pytest.mark.parametrize(
    "answer",
    ["Score: 3", "Good.\nScore: 6", "Good.\nScore: 3 ", "a\nb\nScore: 3", "é\nScore: 3", f"{'x' * 145}\nScore: 3"],
)
def test_points_regex_refuses_anything_else(answer: str) -> None:
    assert not re.fullmatch(points_regex(160), answer)


def test_points_regex_bound() -> None:
    assert points_regex(160) == "[ -~]{1,144}\\nScore: [0-5]"
    assert points_regex(3) == "[ -~]{1,1}\\nScore: [0-5]"


@settings(deadline=None)
@given(answer=st.from_regex(re.compile(points_regex(48)), fullmatch=True))
def test_structured_answers_are_readable_and_fit_the_budget(tokenizer: Any, answer: str) -> None:
    assert parse_points(answer, "stop") == Scored(points=int(answer[-1]))
    assert len(tokenizer.encode(answer, add_special_tokens=False)) + 1 <= 48


# ---- digit distribution


def logs(*shares: float) -> list[float]:
    return [math.log(share) if share else -INF for share in shares]


def test_read_distribution() -> None:
    # Mean 0.5·4 + 0.5·2 = 3, variance 0.5·1 + 0.5·1 = 1.
    assert read_distribution(logs(0, 0, 0.5, 0, 0.5, 0), 0.05) == scored(3, 1)
    # A tenth of the mass, renormalised: shares 0.2 and 0.8 on 1 and 5; mean 4.2, variance 0.2·3.2² + 0.8·0.8² = 2.56.
    assert read_distribution(logs(0, 0.02, 0, 0, 0, 0.08), 0.05) == scored(4.2, 2.56)
    assert read_distribution(logs(*[1 / 6] * 6), 0.05) == scored(2.5, 35 / 12)
    assert read_distribution([-INF] * 5 + [0.0], 1.0) == scored(5, 0)
    assert read_distribution([-800.0] * 6, 0.0) == scored(2.5, 35 / 12)


def test_unreadable_distributions() -> None:
    assert read_distribution(logs(*[0.001] * 6), 0.05) == Unparsed(reason="little mass on digits")
    assert read_distribution([-INF] * 6, 0.0) == Unparsed(reason="little mass on digits")
    assert read_distribution([-800.0] * 6, 1e-9) == Unparsed(reason="little mass on digits")
    for value in (math.nan, INF):
        broken = [*logs(0.2, 0.2, 0.2, 0.2, 0.2), value]
        assert read_distribution(broken, 0.05) == Unparsed(reason="log-probabilities are not numbers")
    with pytest.raises(ValueError, match="5 log-probabilities for 6 labels"):
        read_distribution([0.0] * 5, 0.05)


@settings(deadline=None)
@given(values=st.lists(st.floats(-60, 0) | st.just(-INF), min_size=6, max_size=6))
def test_points_of_a_distribution_are_within_the_scale(values: list[float]) -> None:
    verdict = read_distribution(values, 0.0)
    if isinstance(verdict, Scored):
        assert -1e-9 <= verdict.points <= 5 + 1e-9
        assert verdict.variance is not None
        assert -1e-9 <= verdict.variance <= 6.25 + 1e-9  # the most that 0..5 allows: half at each end


def test_label_ids(tokenizer: Any) -> None:
    assert label_ids(tokenizer, ANSWER_PREFIX, SCORES) == tuple(tokenizer.convert_tokens_to_ids(list(SCORES)))
    assert label_ids(tokenizer, PAIRWISE_PREFIX, WINNERS) == tuple(tokenizer.convert_tokens_to_ids(["A", "B"]))
    assert label_ids(tokenizer, "Better answer:", (" A", " B")) == tuple(tokenizer.convert_tokens_to_ids(["ĠA", "ĠB"]))


@pytest.mark.parametrize(
    ("prefix", "labels", "named"),
    [
        ("Better answer: ", WINNERS, "'A' after 'Better answer: '"),  # the space becomes part of the letter's token
        (ANSWER_PREFIX, ("1", "10"), "'10'"),
        (ANSWER_PREFIX, ("1", ""), "''"),
        (ANSWER_PREFIX, ("1", "1"), "'1'"),
        ("Sco", ("re",), "'re'"),
    ],
)
def test_labels_that_are_not_one_token_of_their_own(
    tokenizer: Any, prefix: str, labels: tuple[str, ...], named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(named)}.*use judge.read=text"):
        label_ids(tokenizer, prefix, labels)


# ---- averages


NOT_READ = Unparsed(reason="no score line")


@pytest.mark.parametrize(
    ("verdicts", "mean"),
    [
        ([Scored(points=4), Scored(points=5), NOT_READ], scored(4.5, 0.25)),
        ([Scored(points=4), NOT_READ, NOT_READ], Scored(points=4)),
        ([Scored(points=3.2, variance=1.5)], Scored(points=3.2, variance=1.5)),
        # Mean 12/3 = 4, squared deviations 1, 1, 0.
        ([Scored(points=3), Scored(points=5), Scored(points=4)], scored(4, 2 / 3)),
        ([Scored(points=4.4)] * 3, scored(4.4, 0)),
        ([NOT_READ, NOT_READ], Unparsed(reason="no readable judgement")),
        ([], Unparsed(reason="no readable judgement")),
    ],
)
def test_mean_points(verdicts: list[Verdict], mean: Verdict) -> None:
    assert mean_points(iter(verdicts)) == mean


@settings(deadline=None)
@given(points=st.lists(st.floats(0, 5), min_size=1, max_size=8), unread=st.integers(0, 3))
def test_unread_judgements_never_move_a_mean(points: list[float], unread: int) -> None:
    read: list[Verdict] = [Scored(points=value) for value in points]
    assert mean_points([NOT_READ] * unread + read) == mean_points(read)


# ---- pairwise


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("Both are fine.\nWinner: A", "A"),
        ("**Winner:** B", "B"),
        ("winner = [B]", "B"),
        ("Winner: Answer A", "A"),
        ("Winner: response B.", "B"),
        ('Winner: "A"', "A"),
        ("Winner: tie", "tie"),
        ("Winner: Tie.", "tie"),
        ("Winner: a tie", "tie"),
        ("Winner: A\nOr so I think.", "A"),
        ("Winner: A and clearly so", "A"),
        ("Winner: A\nNo.\nWinner: B", "B"),
        ("Winner: Judgement A", "A"),  # the paper spells it in both ways
        ("**Winner: Judgment B**", "B"),
    ],
)
def test_winners_that_are_read(text: str, winner: str) -> None:
    assert parse_winner(text, "stop") == winner


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "Winner: C",
        "Winner: both",
        "Winner: a",
        "Winner: Alice",
        "Winner: A or B",
        "Winner: [A | Answer B]",
        "Winner: [Judgement A | Judgement B]",
        "Winner: neither judgment",
    ],
)
def test_winners_that_are_not_read(text: str) -> None:
    assert parse_winner(text, "stop") == Unparsed(reason="no winner line")


@pytest.mark.parametrize("text", ["It is", "Winner:", "Winner: A", "Winner: B\nFinally, Winner: Ans", "Winner: t"])
def test_winners_that_the_length_limit_cut(text: str) -> None:
    assert parse_winner(text, "length") == Unparsed(reason="cut before a winner")


def test_winner_of_a_cut_answer() -> None:
    assert parse_winner("Winner: B\nBecause", "length") == "B"


@pytest.mark.parametrize(
    ("values", "winner"),
    [
        (logs(0.6, 0.3), "A"),
        (logs(0.2, 0.3), "B"),
        (logs(0.4, 0.4), "tie"),
        ([-INF, -1.0], "B"),
        (logs(0.02, 0.01), Unparsed(reason="little mass on letters")),
        ([-INF, -INF], Unparsed(reason="little mass on letters")),
        ([math.nan, -1.0], Unparsed(reason="log-probabilities are not numbers")),
    ],
)
def test_winner_from_distribution(values: list[float], winner: Any) -> None:
    assert winner_from_distribution(values, 0.05) == winner


@pytest.mark.parametrize(
    ("first", "second", "combined"),
    [
        ("A", "B", "first"),
        ("B", "A", "second"),
        ("A", "A", "tie"),
        ("B", "B", "tie"),
        ("A", "tie", "tie"),
        ("tie", "A", "tie"),
        ("tie", "tie", "tie"),
        (judging.NO_WINNER, "A", judging.NO_WINNER),
        ("A", judging.CUT_WINNER, judging.CUT_WINNER),
    ],
)
def test_combine_orders(first: Any, second: Any, combined: Any) -> None:
    assert combine_orders(first, second) == combined


# ---- templates


def test_bundled_templates() -> None:
    additive = load_template("additive")
    assert additive == load_template("additive.jinja")
    assert "at most 100 words" in additive
    assert '"Score: <total points>"' in additive
    assert additive.endswith("<response {{ fence }}>\n{{ response }}\n</response {{ fence }}>\n")
    assert "words" not in load_template("additive_digits")
    assert PAIRWISE_PREFIX in load_template("pairwise", PAIRWISE_VARIABLES)
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
        ("pairwise", PAIRWISE_VARIABLES, ["response A", "response B"]),
        ("pairwise_text", PAIRWISE_VARIABLES, ["response A", "response B"]),
        ("meta", META_VARIABLES, ["response", "judgement A", "judgement B"]),
        ("meta_letters", META_VARIABLES, ["response", "judgement A", "judgement B"]),
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
    prefix = ANSWER_PREFIX if name == "additive_digits" else ""

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
    for answer, verdict in ((" It is short.\nScore: 2", Scored(points=2)), (" It is short.", NOT_READ)):
        whole = [*prompt, *tokenizer.encode(answer, add_special_tokens=False)]
        assert parse_points(tokenizer.decode(whole[len(prompt) :]), "stop") == verdict


@settings(deadline=None)
@given(response=st.text(), instruction=st.text())
def test_any_response_leaves_the_pairwise_prompt_in_place(
    tokenizer: Any, encoder: ChatEncoder, response: str, instruction: str
) -> None:
    template, fence = load_template("pairwise", PAIRWISE_VARIABLES), "0123abcd"
    fields = {"instruction": instruction, "response_a": "HARMLESS", "response_b": response, "fence": fence}
    prompt = encoder.encode(template, fields, PAIRWISE_PREFIX)
    without = encoder.encode(template, {**fields, "response_b": ""}, PAIRWISE_PREFIX)
    end = "\n</response B 0123abcd><|im_end|>\n<|im_start|>assistant\n"
    after = [*tokens_apart(tokenizer, end, fence), *tokenizer.encode(PAIRWISE_PREFIX, add_special_tokens=False)]
    start, stop = len(without) - len(after), len(prompt) - len(after)
    assert list(prompt[stop:]) == after
    assert prompt[:start] == without[:start]
    assert tokenizer.decode(prompt[start:stop], clean_up_tokenization_spaces=False) == as_read(response)


# ---- function judges


def shorter(prompt: str, response: str) -> float:
    return -len(response)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (3, Scored(points=3.0)),
        (-2.5, Scored(points=-2.5)),
        (True, Scored(points=1.0)),
        (np.float32(0.5), Scored(points=0.5)),
        (Fraction(1, 4), Scored(points=0.25)),
        *((value, judging.NO_NUMBER) for value in (None, "4", math.nan, INF, -INF, 10**400, 1j, [4])),
    ],
)
def test_call_function(value: Any, verdict: Verdict) -> None:
    assert call_function(lambda prompt, response: value, "p", "r") == verdict


def test_call_function_passes_prompt_and_response() -> None:
    assert call_function(lambda prompt, response: len(prompt) * 10 + len(response), "ab", "xyz") == Scored(points=23)


def test_a_function_that_raises_is_the_users_mistake() -> None:
    def broken(prompt: str, response: str) -> float:
        return {}[response]

    with pytest.raises(ConfigError, match=r"broken raised KeyError: 'r' for the prompt 'What is tea\?'; correct it"):
        call_function(broken, "What is tea?", "r")


@pytest.fixture
def my_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_test_judges.py").write_text(
        "def shorter(prompt, response):\n    return -len(response)\ndef unary(prompt):\n    return 0\nconstant = 3\n"
    )
    (tmp_path / "my_broken_judges.py").write_text("import no_such_module_of_rsrlm\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_test_judges"


@pytest.mark.parametrize("separator", [":", "."])
def test_load_function(my_judges: str, separator: str) -> None:
    function: Callable[[str, str], float] = load_function(f"{my_judges}{separator}shorter")
    assert call_function(function, "p", "four") == Scored(points=-4)


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ("shorter", "write module:name"),
        (":shorter", "write module:name"),
        ("my_test_judges:", "write module:name"),
        ("no_such_module_of_rsrlm:f", "No module named .*on PYTHONPATH"),
        ("my_broken_judges:f", "No module named 'no_such_module_of_rsrlm'"),
        ("my_test_judges:longer", "has no attribute 'longer'"),
        ("my_test_judges:constant", "must be callable with"),
        ("my_test_judges:unary", "must be callable with"),
    ],
)
def test_load_function_errors(my_judges: str, dotted: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"judge.function={dotted}|{message}") as caught:
        load_function(dotted)
    assert re.search(message, str(caught.value))


def test_reasons_are_few_and_fixed() -> None:
    """Reasons are counted, so texts of judges must not get into them."""
    known = {value.reason for value in vars(judging).values() if isinstance(value, Unparsed)}
    assert len(known) == 10
    finishes: tuple[FinishReason, ...] = ("stop", "length")
    for _, text in HOSTILE:
        for finish in finishes:
            for verdict in (parse_points(text, finish), parse_winner(text, finish)):
                assert not isinstance(verdict, Unparsed) or verdict.reason in known
