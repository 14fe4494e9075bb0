"""Ids and seeds: who asks for what, and nothing else, decides what is sampled."""

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rsrlm.records import Prompt, Response, Role, Sampling, Unparsed, group_id, seed_of

ROLES: tuple[Role, ...] = ("actor", "judge", "duel")
# Few characters, among them those that ids are built of, so that near misses are common.
IDS = st.text("ab0|/#> ", min_size=1, max_size=4)
ASKED = st.tuples(st.integers(0, 12), st.integers(0, 12), IDS, st.sampled_from(ROLES), IDS)


@given(ASKED, ASKED)
@example((1, 12, "a", "actor", "0"), (11, 2, "a", "actor", "0"))
@example((0, 0, "a", "actor", "b|c"), (0, 0, "a|actor|b", "actor", "c"))
@example((0, 0, "a/0", "actor", "0"), (0, 0, "a", "actor", "0/0"))
@settings(deadline=None, max_examples=200)
def test_seeds_differ_exactly_when_what_is_asked_differs(one: tuple, other: tuple) -> None:
    assert (seed_of(*one) == seed_of(*other)) == (one == other)


def test_no_two_samples_of_a_run_share_a_seed() -> None:
    asked = [
        (run, iteration, prompt, role, index)
        for run in (0, 1)
        for iteration in range(4)
        for prompt in [f"p{number}" for number in range(30)]
        for role in ROLES
        for index in ("0", "1", "2", "10", "0#0", "0#1", "1#0")
    ]
    seeds = {seed_of(*one) for one in asked}
    assert len(seeds) == len(asked) == 2 * 4 * 30 * 3 * 7


def test_seeds_use_63_bits_and_no_more() -> None:
    seeds = [seed_of(0, 0, f"p{number}", "actor", "0") for number in range(200)]
    assert min(seeds) >= 0
    assert max(seeds) < 2**63  # a signed 64-bit integer holds it
    assert max(seeds) >= 2**62  # of 200 seeds, all below half the range has odds of 2^-200


def test_seeds_stay_the_same_between_versions() -> None:
    """A resumed run must sample what the first attempt would have. From `b2sum -l 64` of the text, halved."""
    # printf '0\x1f0\x1ftea-vs-coffee\x1factor\x1f2' | b2sum -l 64 -> d1ef215e15a58a11
    assert seed_of(0, 0, "tea-vs-coffee", "actor", "2") == int("d1ef215e15a58a11", 16) // 2


def test_group_ids_sort_by_iteration() -> None:
    assert group_id(0, "tea-vs-coffee") == "00/tea-vs-coffee"
    assert group_id(12, "b") == "12/b"
    assert sorted(group_id(iteration, "x") for iteration in (10, 2, 0)) == ["00/x", "02/x", "10/x"]


def test_records_are_frozen_and_born_complete() -> None:
    prompt = Prompt(id="tea", text="Describe tea.")
    with pytest.raises(FrozenInstanceError):
        prompt.text = "Describe coffee."
    with pytest.raises(TypeError, match="text"):
        Prompt(id="tea")
    with pytest.raises(TypeError, match="reason"):
        Unparsed()


@pytest.mark.parametrize(("finish_reason", "complete"), [("stop", True), ("length", False)])
def test_a_response_is_complete_when_the_model_ended_it(finish_reason: str, complete: bool) -> None:
    response = Response(
        id="00/tea/0",
        prompt_id="tea",
        index=0,
        role="actor",
        text="",
        token_ids=(),
        prompt_token_ids=(1,),
        finish_reason=finish_reason,
        weight_version="M0",
        sampling=Sampling(temperature=1.0, top_p=1.0, max_tokens=4, seed=0),
    )
    assert response.complete is complete
