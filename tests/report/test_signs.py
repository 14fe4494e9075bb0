"""The signs of hand-made iterations."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from rsrlm.records import (
    Group,
    Judgement,
    PreferencePair,
    Preferred,
    Prompt,
    Response,
    Sampling,
    Scored,
    Unparsed,
    Verdict,
    group_id,
)
from rsrlm.report.alarms import check
from rsrlm.report.signs import SIGNS, measure

SAMPLING = Sampling(temperature=0.8, top_p=1.0, max_tokens=8, seed=1)
Row = tuple[str, float | None]  # text and score of a response


def group(name: str, *rows: Row, judgement: str = "fine") -> tuple[Group, dict[str, Verdict]]:
    """A group with one judgement per response, and its verdicts."""
    responses, judgements, verdicts = [], [], {}
    for index, (text, points) in enumerate(rows):
        identifier = f"{group_id(1, name)}/{index}"
        verdict = Unparsed(reason="no score line") if points is None else Scored(points=points)
        verdicts[identifier] = verdict
        responses.append(
            Response(
                id=identifier, prompt_id=name, index=index, role="actor", text=text, token_ids=(index, 2),
                prompt_token_ids=(1, 9), finish_reason="stop", weight_version="M1", sampling=SAMPLING,
            )
        )  # fmt: skip
        judgements.append(
            Judgement(
                id=f"{identifier}#0", prompt_id=name, response_id=identifier, index=0, role="judge", judge="additive",
                text=judgement * (index + 1), token_ids=(5,), finish_reason="stop", weight_version="M1",
                sampling=SAMPLING, verdict=verdict,
            )
        )  # fmt: skip
    made = Group(
        id=group_id(1, name), iteration=1, prompt=Prompt(id=name, text="?"), responses=tuple(responses),
        judgements=tuple(judgements), no_pair_reason="none needed here",
    )  # fmt: skip
    return made, verdicts


def pair(kind: str, chosen: str, rejected: str, gap: float = 1.0) -> PreferencePair:
    return PreferencePair(
        id=f"{chosen}>{rejected}", prompt_id="tea", kind=kind, chosen_id=chosen, rejected_id=rejected,
        prompt_token_ids=(1,), chosen_token_ids=(2,), rejected_token_ids=(3,), chosen_score=gap, rejected_score=0.0,
        weight_version="M1",
    )  # fmt: skip


def step(chosen_logp: float, kl: float = 0.01) -> dict[str, float]:
    return {"chosen_logp": chosen_logp, "rejected_logp": -1.0, "margin": 0.0, "kl_per_token": kl}


def found(made: Sequence[tuple[Group, dict[str, Verdict]]], **more: object) -> dict[str, float | None]:
    return measure((one for one, _ in made), more.pop("pairs", ()), more.pop("steps", ()), **more)


def test_nothing_made_is_no_number() -> None:
    nothing = found([])
    assert all(nothing[name] is None for name in SIGNS)
    assert {name: value for name, value in nothing.items() if name not in SIGNS} == {
        f"n_{name}": 0
        for name in (
            "groups", "responses", "scored", "judgements", "actor_pairs", "judge_pairs", "steps", "decided",
            "decided_apart",
        )
    }  # fmt: skip


def test_scores() -> None:
    made = found(
        [
            group("tea", ("a", 4.0), ("b", 4.0 + 1e-12)),  # equal: a sum in another order
            group("rain", ("a", 5.0), ("b", 4.5), ("c", None)),
            group("wood", ("a", 3.0), ("b", None)),  # one score is not equal to anything
            group("iron", ("a", 1.5), ("b", 4.49)),
        ]
    )
    assert (made["equal_scores"], made["n_groups"]) == (pytest.approx(1 / 3), 3)
    assert (made["score_mean"], made["n_scored"]) == (pytest.approx((8 + 9.5 + 3 + 5.99) / 7), 7)
    assert made["saturated"] == pytest.approx(2 / 7)
    assert (made["unreadable"], made["n_judgements"]) == (pytest.approx(2 / 9), 9)
    assert made["score_drift"] is None


def test_all_unreadable_is_no_score() -> None:
    made = found([group("tea", ("a", None), ("b", None))])
    assert made["unreadable"] == 1
    assert made["score_mean"] is made["saturated"] is made["equal_scores"] is made["score_length"] is None


def test_only_the_judges_own_judgements_count_as_unreadable() -> None:
    one, verdicts = group("tea", ("a", 4.0))
    meta = Judgement(
        id="01/tea/0#0~1", prompt_id="tea", response_id="01/tea/0", index=0, role="meta", judge="meta", text="",
        token_ids=(), finish_reason="stop", weight_version="M1", sampling=SAMPLING, verdict=Unparsed(reason="none"),
    )  # fmt: skip
    more = Group(
        id=one.id, iteration=1, prompt=one.prompt, responses=one.responses, judgements=(*one.judgements, meta),
        no_pair_reason="none needed here",
    )  # fmt: skip
    assert found([(more, verdicts)])["unreadable"] == 0


def test_pairs_of_responses_and_of_judgements_are_apart() -> None:
    made = found(
        [group("tea", ("four", 4.0), ("sixsix", 3.0)), group("rain", ("ab", 5.0), ("", 1.0), judgement="judged")],
        pairs=[
            pair("actor", "01/tea/0", "01/tea/1", gap=1.0),
            pair("actor", "01/rain/0", "01/rain/1", gap=4.0),
            pair("judge", "01/rain/0#0", "01/rain/1#0", gap=0.3),
        ],
    )
    assert (made["chosen_chars"], made["rejected_chars"], made["pair_score_gap"]) == (3, 3, 2.5)
    assert (made["judge_chosen_chars"], made["judge_rejected_chars"]) == (6, 12)
    assert (made["n_actor_pairs"], made["n_judge_pairs"]) == (2, 1)


def test_a_solution_that_came_with_the_prompt_is_no_sampled_text() -> None:
    """Nothing is known of its characters; the pair counts all the same."""
    tea = group("tea", ("twelve chars", 4.5), ("x", 4.0))
    both = [pair("actor", "01/tea/g", "01/tea/1"), pair("actor", "01/tea/0", "01/tea/1")]
    made = found([tea], pairs=both)
    assert (made["chosen_chars"], made["rejected_chars"], made["n_actor_pairs"]) == (12, 1, 2)
    alone = found([tea], pairs=both[:1])
    assert (alone["chosen_chars"], alone["rejected_chars"]) == (None, 1)


def test_against_earlier_iterations() -> None:
    made = [group("tea", ("twelve chars", 4.5), ("x", 4.0))]
    pairs = [pair("actor", "01/tea/0", "01/tea/1")]
    first, before = {"score_mean": 3.0, "chosen_chars": 3.0}, {"score_mean": 4.0, "chosen_chars": 8.0}
    later = found(made, pairs=pairs, earlier=[first, before])
    assert (later["score_drift"], later["chosen_chars_ratio"]) == (1.25, 1.5)
    unknown: dict[str, float | None] = {"score_mean": None, "chosen_chars": 0.0}
    blind = found(made, pairs=pairs, earlier=[unknown])
    assert blind["score_drift"] is blind["chosen_chars_ratio"] is None
    again = found(made, pairs=pairs, earlier=[later])
    assert (again["score_drift"], again["chosen_chars_ratio"]) == (0, 1)


def test_score_and_length() -> None:
    rising = [group(f"p{i}", ("x" * i, float(i))) for i in range(30)]
    assert found(rising)["score_length"] == pytest.approx(1)
    assert found(rising[1:])["score_length"] is None  # 29
    falling = [group(f"p{i}", ("x" * i, -float(i)), ("unread" * 99, None)) for i in range(30)]
    assert found(falling)["score_length"] == pytest.approx(-1)
    assert found([group(f"p{i}", ("x" * i, 5.0)) for i in range(40)])["score_length"] is None


def test_distinct_is_a_mean_over_groups() -> None:
    made = found([group("tea", ("a b a", 1.0), ("a b", 1.0)), group("rain", ("c d", 1.0)), group("wood", ("", 1.0))])
    assert made["distinct_1"] == pytest.approx((2 / 5 + 1) / 2)
    assert made["distinct_2"] == pytest.approx((2 / 3 + 1) / 2)
    many = [group(f"p{i}", ("c d", 1.0)) for i in range(50)]
    assert found(many)["distinct_1"] == 1  # more prompts do not lower it
    assert found([group("tea", *[("same old words", 1.0)] * 10)])["distinct_1"] == pytest.approx(0.1)


def test_steps() -> None:
    assert found([], steps=[step(-30.0), step(-99.0), step(-42.0, kl=0.3)])["chosen_logp_change"] == -12
    assert found([], steps=[step(-30.0), step(-42.0, kl=0.3)])["kl_per_token"] == 0.3
    assert found([], steps=[step(-30.0)])["chosen_logp_change"] is None
    # Of 20 steps the first two and the last two: -10, -20 and -40, -50.
    rows = [step(-10.0), step(-20.0), *[step(-999.0)] * 16, step(-40.0), step(-50.0)]
    assert found([], steps=rows)["chosen_logp_change"] == -30
    broken = found([], steps=[step(-30.0), step(math.nan, kl=math.nan)])
    assert broken["chosen_logp_change"] is broken["kl_per_token"] is None
    supervised = found([], steps=[{"loss": 1.0}, {"loss": 0.5}])
    assert supervised["chosen_logp_change"] is supervised["kl_per_token"] is None
    assert supervised["n_steps"] == 2


def judged(index: int, points: float | None) -> Judgement:
    """One of several judgements of one response."""
    verdict = Unparsed(reason="no score line") if points is None else Scored(points=points)
    return Judgement(
        id=f"01/tea/0#{index}", prompt_id="tea", response_id="01/tea/0", index=index, role="judge", judge="additive",
        text="fine", token_ids=(5,), finish_reason="stop", weight_version="M1", sampling=SAMPLING, verdict=verdict,
    )  # fmt: skip


def compared(first: int, second: int, verdict: Verdict) -> Judgement:
    """The comparison that shows judgement `first` first."""
    return Judgement(
        id=f"01/tea/0#{first}~{second}", prompt_id="tea", response_id="01/tea/0", index=first, role="meta",
        judge="meta", text="", token_ids=(), finish_reason="stop", weight_version="M1", sampling=SAMPLING,
        verdict=verdict,
    )  # fmt: skip


def test_meta_judge() -> None:
    first, tie, second = Preferred(winner="A"), Preferred(winner="tie"), Preferred(winner="B")
    one, verdicts = group("tea", ("a", 4.0))
    five, three, four, four_again, unread = (
        judged(index, points) for index, points in enumerate((5.0, 3.0, 4.0, 4.0, None))
    )
    made = replace(
        one,
        judgements=(five, three, four, four_again, unread),
        comparisons=(
            compared(0, 1, first),  # 5 wins over 3
            compared(1, 0, second),
            compared(1, 2, first),  # 3 wins over 4
            compared(2, 3, first),  # 4 and 4: no higher score to win
            compared(0, 2, tie),
            compared(2, 0, Unparsed(reason="no winner line")),
            compared(0, 4, tie),  # without points on one side, and nobody won
        ),
    )
    measured = found([(made, verdicts)])
    assert (measured["first_position_wins"], measured["n_decided"]) == (0.75, 4)
    assert (measured["higher_score_wins"], measured["n_decided_apart"]) == (pytest.approx(2 / 3), 3)


def test_responses_that_are_compared() -> None:
    """They have no points: only the position may say something."""
    first, second = Preferred(winner="A", share=0.9), Preferred(winner="B", share=0.2)
    one, verdicts = group("tea", ("a", None), ("b", None))
    orders = [
        replace(compared(index, 1 - index, verdict), id=f"01/tea/{index}~{1 - index}", role="duel")
        for index, verdict in enumerate((first, second))
    ]
    measured = found([(replace(one, judgements=(), comparisons=tuple(orders)), verdicts)])
    assert (measured["first_position_wins"], measured["n_decided"], measured["n_decided_apart"]) == (0.5, 2, 0)


def test_alarms_of_an_iteration_that_went_wrong() -> None:
    text = "word " * 600  # 3,000 characters, the same words again and again
    made = found(
        [group(f"p{i}", (text, 5.0), (text, 5.0), ("", None)) for i in range(40)],
        pairs=[pair("actor", "01/p0/0", "01/p0/2", gap=0.1)],
        steps=[step(-20.0), step(-80.0, kl=1.5)],
        earlier=[{"score_mean": 4.1, "chosen_chars": 1100.0}],
        kl_to_first=0.6,
    )
    assert {alarm.sign for alarm in check(made)} == {
        "equal_scores", "score_mean", "score_drift", "saturated", "pair_score_gap", "chosen_chars",
        "chosen_chars_ratio", "distinct_1", "distinct_2", "unreadable", "chosen_logp_change", "kl_per_token",
        "kl_to_first",
    }  # fmt: skip


def test_every_sign_says_what_it_measures_and_what_to_try() -> None:
    assert list(SIGNS) == [name for name in found([]) if not name.startswith("n_")]
    for name, sign in SIGNS.items():
        assert sign.measure.__doc__, name
        assert sign.remedy, name
        assert sign.over or name == "kl_to_first"  # whose denominator stands with the held-out answers
