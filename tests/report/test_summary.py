"""What an iteration comes to, and the memory that it takes to say so."""

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from samples import PAIR, made_for, response

from rsrlm.records import Group, PreferencePair, Scored, Unparsed
from rsrlm.report.metrics import MIN_N
from rsrlm.report.signs import measure
from rsrlm.report.summary import summary_of
from rsrlm.store.buffer import Buffer, receipt_of
from rsrlm.store.items import Segment


def test_summary() -> None:
    tea = made_for("tea")  # each response with one judgement of a third of its index, and one that cannot be read
    milk = made_for("milk", responses=1)
    whole = replace(response(0), id="00/milk/0", finish_reason="stop", text=" \n", token_ids=(1, 2, 3, 4, 5))
    milk = replace(milk, responses=(whole,), comparisons=(replace(milk.judgements[0], verdict=Unparsed(reason="cut")),))
    pairs = [replace(PAIR, chosen_score=score) for score in (1.0, 2.0)] + [replace(PAIR, kind="judge")]
    found = summary_of(iter([tea, milk]), iter(pairs))
    assert found == {
        "prompts": 2, "responses": 3, "responses_cut": 2, "responses_empty": 1, "judgements": 6,
        "judgements_unreadable": 3, "unreadable_reasons": {"no score line": 3}, "comparisons": 1, "pairs": 3,
        "comparisons_unreadable": 1,
        "pairs_of_kind": {"actor": 2, "judge": 1}, "mean_score": 1 / 9, "responses_scored": 3,
        "mean_response_tokens": 3.0, "mean_margin": 1.5,
    }  # fmt: skip


def test_nothing_made_has_no_mean() -> None:
    found = summary_of([], [])
    assert {name for name, value in found.items() if value is None} == {
        "mean_score", "mean_response_tokens", "mean_margin",
    }  # fmt: skip
    assert {name: value for name, value in found.items() if value} == {}
    assert summary_of([replace(made_for("tea"), judgements=())], [])["mean_score"] is None


def large(number: int) -> Group:
    """Four responses of different lengths with four judgements each, and pairs of both kinds."""
    group = made_for(f"{number}", responses=4)
    responses = tuple(replace(one, text="words " * (number % 50 + one.index)) for one in group.responses)
    judgements = tuple(
        replace(
            one, id=f"{one.response_id}#{index}", index=index, verdict=Scored(points=(number * 7 + index) % 6 + number)
        )
        for one in group.judgements[::2]
        for index in range(4)
    )
    actor = replace(PAIR, id=f"{group.id}/1>0", chosen_id=responses[1].id, rejected_id=responses[0].id)
    judge = replace(PAIR, kind="judge", chosen_id=judgements[1].id, rejected_id=judgements[0].id)
    return replace(group, responses=responses, judgements=judgements, pairs=(actor, judge), no_pair_reason="")


def peak(work: Callable[[], Any]) -> int:
    """Most bytes that it holds at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_holds_neither_groups_nor_pairs(tmp_path: Path) -> None:
    count = 600
    buffer, segment = Buffer([f"00/{number}" for number in range(count)], tmp_path), Segment(tmp_path / "groups")
    for number in range(count):
        buffer.put(number, receipt_of(large(number), segment))

    def pairs() -> Iterator[PreferencePair]:
        return (pair for group in buffer for pair in group.pairs)

    measure(buffer[:MIN_N], (), ())  # imports scipy
    kept = 1_500_000  # what Python keeps for objects to come, however many groups there are
    assert peak(lambda: summary_of(buffer, pairs())) < 100 * count + kept
    assert peak(lambda: measure(buffer, pairs(), ())) < 700 * count + kept  # more than half of it to rank the scores
    assert peak(lambda: buffer[:500]) > 6_000 * 500
