"""The online clock over a real run folder, with scripted engines and a scripted learner: which weights answer, what the
learner goes on from, and where a run that was killed goes on."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from spine import SLOTS, Killed, World, answer, plain
from test_iterative import leaves

from rsrlm.records import Prompt, Request
from rsrlm.settings.base import ConfigError

PROMPTS = [Prompt(id=f"p{number}", text=f"Say {number}.") for number in range(10)]
HELDOUT = [Prompt(id=f"h{number}", text=f"Tell {number}.") for number in range(2)]


def by_index(request: Request, weights: str) -> str:
    """A judge gives a point for the index of a response, whoever wrote it."""
    if request.role == "judge" and not request.id.startswith("heldout"):
        shown = "".join(map(chr, request.prompt_token_ids)).split("|")[1]
        return f"Score: {shown.removesuffix('.').split()[-1]}"
    return answer(request, weights)


@pytest.fixture
def world(make_config: Any) -> Callable[..., World]:
    """Five rounds of two prompts; an evaluation after each second one, and at the end."""

    def make(over: dict[str, Any] | None = None, clock: dict[str, Any] | None = None, **changes: Any) -> World:
        defaults: dict[str, Any] = {
            "iterations": 5,
            "sample": {"responses": 3, "max_tokens": 24},
            "judge": {"kind": "text", "judgements": 2, "max_tokens": 60},
            "prompts": {"per_iteration": 2},
            "train": {"checkpoint_every_steps": 1},
            "clock": {"kind": "online", "evaluate_every": 2, **(clock or {})},
        }
        return World(make_config(**{**defaults, **changes}), PROMPTS, HELDOUT, **{"answer": by_index, **(over or {})})

    return make


def authors(world: World) -> list[set[str]]:
    """Whose answers each round trained on."""
    return [{row["text"].partition(" as ")[0] for row in world.table(number, "responses")} for number in range(5)]


WAYS = [  # lag, rounds between new weights, and who answers which round
    (0, 1, [0, 1, 2, 3, 4]),
    (1, 1, [0, 0, 1, 2, 3]),
    (0, 2, [0, 0, 2, 2, 4]),
    (1, 2, [0, 0, 0, 2, 2]),
]


@pytest.mark.parametrize(("lag", "every", "actors"), WAYS)
def test_each_round_goes_on_from_the_one_before(
    lag: int, every: int, actors: list[int], world: Callable[..., World]
) -> None:
    made = world(clock={"lag": lag, "sync_every": every})
    rows = made.start()
    weights = ["M0", *("M0" + "+1" * number for number in range(1, 6))]  # two pairs a round, in one step
    assert authors(made) == [{weights[actor]} for actor in actors]
    assert [row["actor"] for row in rows] == [f"M{actor}" for actor in actors]
    got = [1, 2, 3, 4, 5] if every == 1 else [2, 4, 5]
    assert [row["weight_version"] for row in rows if "published" in row] == [f"M{number}" for number in got]
    assert [job.course.publish for job in made.jobs] == [number in got for number in range(1, 6)]
    assert [(job.source, job.version) for job in made.jobs] == [(f"M{n}", f"M{n + 1}") for n in range(5)]
    courses = [(job.course.after, job.course.step, job.course.of) for job in made.jobs]
    assert courses == [("" if not n else f"M{n}", n, 5) for n in range(5)]
    assert {job.course.reference for job in made.jobs} == {str(made.folder("M0"))}
    for number in range(5):
        assert [item.id for item in made.jobs[number].items] == [row["id"] for row in made.table(number, "pairs")]


@pytest.mark.parametrize(("every", "references"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4])])
def test_the_reference_may_move_with_the_weights(
    every: int, references: list[int], world: Callable[..., World]
) -> None:
    made = world(clock={"reference": "before", "sync_every": every})
    made.start()
    assert [job.course.reference for job in made.jobs] == [str(made.folder(f"M{number}")) for number in references]


@pytest.mark.parametrize("lag", [0, 1])
def test_the_engines_answer_while_the_learner_trains(lag: int, world: Callable[..., World]) -> None:
    """Of round 1, with the weights that round 0 began with; then they get what it gave. Without a lag they wait."""
    made = world(clock={"lag": lag})
    made.start()
    asked = [n for n, what in enumerate(made.happened) if what.startswith("ask actor 01/")]
    done, held = made.happened.index("learner done"), made.happened.index("hold M1")
    assert held < made.happened.index("write metrics.json")
    if lag:  # how they lie to the learner's steps is the machine's say: see test_online_run.py
        assert max(*asked, done) < held
    else:
        assert done < held < min(asked)


def test_the_engines_get_weights_after_so_many_rounds(world: Callable[..., World]) -> None:
    made = world(clock={"lag": 0, "sync_every": 2})
    made.start()
    done = [n for n, what in enumerate(made.happened) if what == "learner done"]
    held, asked = made.happened.index("hold M2"), [what[:12] for what in made.happened].index("ask actor 02")
    assert done[1] < held < asked
    assert "hold M1" not in made.happened


def test_evaluations_are_every_so_many_rounds(world: Callable[..., World]) -> None:
    """Models that nothing comes back to are removed."""
    made = world()
    rows = made.start()
    assert [row["heldout"].get("model") for row in rows] == [None, "M2", None, "M4", "M5"]
    duels = [key for row in rows for key in row["heldout"] if key.startswith("duel_with_")]
    assert duels == ["duel_with_M0", "duel_with_M2", "duel_with_M4"]
    assert sorted(made.weights()) == ["M2", "M4", "M5"]


def test_a_round_without_pairs_leaves_the_weights(world: Callable[..., World]) -> None:
    """All answers to the prompts of round 2 are worth the same."""

    def alike(request: Request, weights: str) -> str:
        if request.role == "judge" and request.id.startswith("02/"):
            return "Score: 3"
        return by_index(request, weights)

    made = world({"answer": alike})
    rows = made.start()
    assert [row["weight_version"] for row in rows] == ["M1", "M2", "M2", "M4", "M5"]
    assert [row["pairs"] for row in rows] == [2, 2, 0, 2, 2]
    assert rows[2]["no_pair_reasons"] == {"equal scores": 2}
    assert [(job.course.after, job.course.step) for job in made.jobs] == [("", 0), ("M1", 1), ("M2", 3), ("M4", 4)]
    assert made.weights()["M5"] == "M0" + "+1" * 4


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("alike", [(0,), (0, 1), (3, 4), (0, 1, 2, 3, 4)])
def test_rounds_without_pairs_anywhere(alike: tuple[int, ...], every: int, world: Callable[..., World]) -> None:
    def ties(request: Request, weights: str) -> str:
        if request.role == "judge" and request.id[:2].isdigit() and int(request.id[:2]) in alike:
            return "Score: 3"
        return by_index(request, weights)

    made = world({"answer": ties}, clock={"sync_every": every})
    rows = made.start()
    assert [bool(row["pairs"]) for row in rows] == [number not in alike for number in range(5)]
    assert rows[-1]["weight_version"] == ("M0" if len(alike) == 5 else "M3" if 4 in alike else "M5")
    assert [job.iteration for job in made.jobs] == [number for number in range(5) if number not in alike]
    assert made.start() == rows  # run again, nothing is left to do


@pytest.mark.parametrize(("lag", "every"), [(0, 1), (1, 1), (0, 2), (1, 2)])
def test_wherever_it_is_killed_the_run_is_the_same(lag: int, every: int, world: Callable[..., World]) -> None:
    rule = {"lag": lag, "sync_every": every, "reference": "first" if every == 1 else "before"}
    whole = world(clock=rule)
    expected = whole.start()
    numbers = random.Random(7)
    places = numbers.sample(range(len(whole.happened)), 25)
    for number, place in enumerate(sorted(places)):
        made = world(clock=rule, name=f"killed-{number}")
        left = [place]

        def kill(_: str, left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] == -1

        made.kill = kill
        rows: list[dict[str, Any]] | None = None
        while rows is None:
            try:
                rows = made.start(seed=number)
            except BaseException as error:
                if not all(isinstance(one, Killed) for one in leaves(error)):
                    raise
        assert plain(rows) == plain(expected), whole.happened[place]
        assert made.weights() == whole.weights()
        assert not list(made.store.checkpoints.glob("*"))
        assert authors(made) == authors(whole)
        # What was in flight beside the training is asked again, and nothing else.
        assert len(set(made.repeated())) <= (2 * SLOTS if lag or every > 1 else 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"candidate_every_steps": 1, "choose": "score"}, "prompts": {"validation": 30}}, "train.choose"),
        ({"train": {"start": "first"}}, "train.start"),
        ({"train": {"lora": {"rank": 2}}}, "train.lora"),
        ({"train": {"zero_stage": 3}}, "train.zero_stage"),
        ({"train": {"zero_stage": 3}, "clock": {"reference": "before", "sync_every": 5}}, "train.zero_stage"),
        ({"steps": [{}], "iterations": 1}, "steps"),
        ({"recipe": "temporal"}, "recipe=temporal"),
        ({"recipe": "cream"}, "recipe=cream"),
    ],
)
def test_what_the_online_clock_cannot_do_is_refused(changes: dict[str, Any], said: str, make_config: Any) -> None:
    make_config(clock="online", train={"zero_stage": 2})
    with pytest.raises(ConfigError, match=rf"{said} with clock\.kind=online: "):
        make_config(**{**changes, "clock": {"kind": "online", **changes.get("clock", {})}})


def test_evaluations_between_new_weights_are_refused(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"clock\.evaluate_every=10 with clock\.sync_every=4: .*multiple"):
        make_config(clock={"kind": "online", "sync_every": 4})
    make_config(clock={"kind": "online", "sync_every": 5})
