"""The iterative clock over a real run folder, with scripted engines and a scripted learner: who trains from whom, who
judges whom, and where a run that was killed goes on."""

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from scripted import Pools
from spine import Killed, World, answer, plain, sections

from rsrlm.data.ranked import RankedPrompt, Reply
from rsrlm.data.seed_data import Parts
from rsrlm.engines import Model, WrongWeights
from rsrlm.iterative import NoPairs, Stopped
from rsrlm.recipes.sft import NoExamples
from rsrlm.records import Example, Prompt, Request
from rsrlm.store import tables

PROMPTS = [Prompt(id=f"p{number}", text=f"Say {number}.") for number in range(12)]
HELDOUT = [Prompt(id=f"h{number}", text=f"Tell {number}.") for number in range(4)]
VALIDATION = [Prompt(id=f"v{number}", text=f"Show {number}.") for number in range(30)]
REPLIES = (("worth 4", 0.0), ("worth 1", 1.0))
RANKED = [
    RankedPrompt(
        id=name,
        text=f"Ask {name}?",
        replies=tuple(Reply(id=f"{name}-{i}", text=text, rank=rank) for i, (text, rank) in enumerate(REPLIES)),
    )
    for name in ("t0", "t1", "t2")
]
PARTS = Parts(ift=(), eft=tuple(RANKED), evaluation=(), counts={})
FILES = {
    "x.jsonl": [
        Example(id=f"x{number}", kind="ift", prompt_token_ids=(1,), target_token_ids=(number, 2)) for number in range(5)
    ]
}


@pytest.fixture
def world(make_config: Any) -> Callable[..., World]:
    """A run of two iterations; keyword arguments change the config, `over` the world itself."""

    def make(over: dict[str, Any] | None = None, **changes: Any) -> World:
        defaults: dict[str, Any] = {
            "iterations": 2,
            "sample": {"responses": 3, "max_tokens": 24},
            "judge": {"kind": "text", "judgements": 2, "max_tokens": 60},
            "prompts": {"per_iteration": 3, "validation": len(VALIDATION)},
            "data": {"trees": "t.jsonl", "minimum": 1},
            "train": {"checkpoint_every_steps": 1},
        }
        config = make_config(**sections(defaults, changes))
        return World(config, PROMPTS, HELDOUT, VALIDATION, **(over or {}))

    return make


def only(word: str, times: int = 1) -> Callable[[str], bool]:
    """Kills before the `times`-th thing that happens and begins with the word."""
    left = [times]

    def kill(what: str) -> bool:
        left[0] -= what.startswith(word)
        return what.startswith(word) and left[0] == 0

    return kill


def leaves(error: BaseException) -> list[BaseException]:
    return [one for e in error.exceptions for one in leaves(e)] if isinstance(error, BaseExceptionGroup) else [error]


def start(world: World, seed: int = 0) -> bool:
    """Whether the run came to its end."""
    try:
        world.start(seed)
    except BaseException as error:
        if not all(isinstance(one, Killed) for one in leaves(error)):
            raise
        return False
    return True


def stages(model: str, respond: int, compare: int) -> list[tuple[str, dict[str, int]]]:
    compared = {"compare": compare} if compare else {}
    return [
        (f"held-out {model}", {"respond": respond, "judge": 8}),
        (f"held-out {model} by M0", {"judge": 8, **compared}),
    ]


# Four held-out prompts: an answer to each and one more for the KL, two judgements of each by itself, and by M0, which
# compares it with the answer of the model before in both orders.
HELDOUT_STAGES = {
    "M0": stages("M0", 4, 0)[:1],
    "M1": stages("M1", 8, 8),
    "M2": stages("M2", 8, 8),
}


@pytest.mark.parametrize(("duel", "kl"), [(False, False), (True, False), (False, True)])
def test_what_an_evaluation_shows(world: Callable[..., World], duel: bool, kl: bool) -> None:
    made = world(iterations=1, evaluate={"duel": duel, "kl": kl})
    (row,) = made.start()
    heldout = [(title, totals) for title, totals in made.screen.totals if title.startswith("held-out")]
    assert heldout == stages("M0", 4, 0)[:1] + stages("M1", 8 if kl else 4, 8 if duel else 0)
    assert ("duel_with_M0" in row["heldout"], "kl_to_first" in row["heldout"]) == (duel, kl)
    asked = {one.role for _, one in made.asked}
    assert ("duel" in asked) == duel


# -- the chain of models -----------------------------------------------------------------------------------------------


def test_each_model_makes_what_trains_the_next(world: Callable[..., World]) -> None:
    made = world()
    rows = made.start()
    assert [(job.iteration, job.source, job.version) for job in made.jobs] == [(0, "M0", "M1"), (1, "M1", "M2")]
    # Two steps on three pairs each: M1 comes from M0, and M2 from M1.
    assert made.weights() == {"M1": "M0+2", "M2": "M0+2+2"}
    assert [row["weight_version"] for row in rows] == ["M1", "M2"]
    for iteration, weights in enumerate(("M0", "M0+2")):
        by = {used for used, one in made.asked if one.id.startswith(f"{iteration:02d}/")}
        assert by == {weights}
        texts = {row["id"]: row["text"] for row in made.table(iteration, "responses")}
        assert texts == {
            f"{iteration:02d}/p{prompt}/{index}": f"{weights} as {index}."
            for prompt in range(3 * iteration, 3 * iteration + 3)
            for index in range(3)
        }
        pairs = made.table(iteration, "pairs")
        assert [pair["id"] for pair in pairs] == [item.id for item in made.jobs[iteration].items]
        assert {pair["id"].rpartition("/")[2] for pair in pairs} == {"2>0"}
        trained = [name for row in made.store.steps(iteration).rows for name in row["pair_ids"]]
        assert trained == [pair["id"] for pair in pairs]
    assert made.happened.count("write training.json") == 2
    heldout = [(title, totals) for title, totals in made.screen.totals if title.startswith("held-out")]
    assert heldout == HELDOUT_STAGES["M0"] + HELDOUT_STAGES["M1"] + HELDOUT_STAGES["M2"]
    told = [json.loads(line) for line in (made.store.folder / "events.jsonl").open()]
    evaluated = [event for event in told if event["event"] == "evaluated"]
    assert [one["model"] for one in evaluated] == ["M0", "M1", "M2"]
    assert all(evaluated[1][name] == value for name, value in rows[0]["heldout"].items())
    assert made.pools.engine.held in ("M0", "M2")


def test_the_first_model_may_train_every_other(world: Callable[..., World]) -> None:
    """But what it trains on comes from the model before."""
    made = world(train={"start": "first"})
    made.start()
    assert [job.source for job in made.jobs] == ["M0", "M0"]
    assert made.weights() == {"M1": "M0+2", "M2": "M0+2"}
    assert made.table(1, "responses")[0]["text"] == "M0+2 as 0."


def test_a_row_says_what_was_made_and_trained(world: Callable[..., World]) -> None:
    made = world()
    made.endpoints = {"judge": {"cost": 1.5}}
    row = made.start()[0]
    counts = {
        "iteration": 0,
        "prompts": 3,
        "responses": 9,
        "responses_cut": 0,
        "responses_empty": 0,
        "judgements": 18,
        "judgements_unreadable": 0,
        "unreadable_reasons": {},
        "comparisons": 0,
        "comparisons_unreadable": 0,
        "pairs": 3,
        "pairs_of_kind": {"actor": 3},
        "no_pair_reasons": {},
        "responses_scored": 9,
        "mean_response_tokens": len("M0 as 0."),
        "prefix_cache_hit_share": None,
        "pairs_trained": 3,
        "optimizer_steps": 2,
        "steps_replayed": 0,
        "dpo_loss_first": 0.7,
        "accuracy_last": 0.5,
        "margin_last": 0.1,
        "published": {"version": "M1"},
        "endpoints": {"judge": {"cost": 1.5}},
    }
    assert {name: row[name] for name in counts} == counts
    # Of index 0, 1 and 2: (0 + 0) / 2, (0 + 1) / 2 and (1 + 2) / 2, since the first judgement is a point lower.
    assert row["mean_score"] == pytest.approx((0 + 0.5 + 1.5) / 3)
    assert row["mean_margin"] == pytest.approx(1.5)
    assert row["learner"] == {
        "train_seconds": 1.0, "decide_seconds": 0.0, "write_seconds": 1.0, "export_seconds": 1.0, "memory_gib": 1.5,
    }  # fmt: skip
    assert set(row["stage_seconds"]) == {"evaluate first model", "produce", "train", "publish", "evaluate"}
    assert row["signs"]["score_mean"] == row["mean_score"]
    assert "choice" not in row
    stages = [title for title, _ in made.screen.totals]
    assert stages == [
        "held-out M0", "iteration 0", "iteration 0", "held-out M1", "held-out M1 by M0",
        "iteration 1", "iteration 1", "held-out M2", "held-out M2 by M0",
    ]  # fmt: skip
    assert made.screen.totals[1][1] == {"respond": 9, "judge": 18}
    assert made.screen.totals[2][1] == {"reference": 3, "steps": 2}


# -- which weights are asked -------------------------------------------------------------------------------------------

WEIGHTS = {"M0": "M0", "M1": "M0+2", "M2": "M0+2+2"}


def meant(request: str) -> set[str]:
    """The models that a request by its id is for."""
    if re.match(r"\d\d/", request):
        return {f"M{int(request[:2])}"}
    if "@" in request:
        return {request.rpartition("@")[2]}
    own = request.partition("/")[0]
    return {own, "M0"} if request.endswith("/logprobs") else {own}


def test_everything_is_asked_of_the_weights_that_are_meant(world: Callable[..., World]) -> None:
    made = world()
    made.start()
    by: dict[str, set[str]] = {}
    for weights, request in made.asked:
        by.setdefault(request.id, set()).add(weights)
    assert by == {name: {WEIGHTS[model] for model in meant(name)} for name in by}
    assert Counter(name.partition("/")[0] for name in by if name.count("/") == 2 and "#" not in name)["M2"] == 4
    assert {name.rpartition("@")[2] for name in by if "@" in name} == {"M0", "M1", "M2"}
    duels = {re.sub("/h[0-9]/0", "", name) for name in by if ">" in name}
    assert duels == {"M1>M0@M0", "M0>M1@M0", "M2>M1@M0", "M1>M2@M0"}


@pytest.mark.parametrize("way", ["score", "duel"])
def test_candidates_are_judged_by_the_model_before_them(world: Callable[..., World], way: str) -> None:
    made = world(**{**WORLDS["score"], "train": {"candidate_every_steps": 1, "choose": way}})
    made.start()
    role = {"score": "judge", "duel": "duel"}[way]
    judged = [(weights, one.id) for weights, one in made.asked if one.role == role and "/v" in one.id]
    by = {(request.rpartition("@")[2], weights) for weights, request in judged}
    assert by == {("M0", "M0"), ("M1", made.weights()["M1"])}
    for name, before in (("M1@1", "M0"), ("M2@1", "M1"), ("M2", "M1")):
        of = {request.rpartition("@")[2] for _, request in judged if re.match(rf"{name}/|.*>{name}/", request)}
        assert of == {before}
    answers = {one.id.partition("/")[0] for _, one in made.asked if one.role == "actor" and "/v" in one.id}
    assert answers == {"M0", "M1@1", "M1", "M2@1", "M2"}


def test_figures_of_held_out_answers_by_hand(world: Callable[..., World]) -> None:
    """Answer 0 of M_t is worth t points for M0 as a judge, and two more for a later one; the first of two judgements is
    a point lower, where there is one."""
    made = world()
    rows = [row["heldout"] for row in made.start()]
    first = json.loads((made.store.folder / "start.json").read_text())["heldout_first"]
    nobody = {"judge": "M0", "mean": 0.0, "n": 4}
    assert (first["score_by_current"], first["score_by_first"]) == (nobody, nobody)
    assert not [name for name in first if name.startswith(("duel", "kl"))]
    for number, row in enumerate(rows, start=1):
        assert row["model"] == f"M{number}"
        assert row["score_by_current"] == {"judge": f"M{number}", "mean": number + 1.5, "n": 4}
        assert row["score_by_first"] == {"judge": "M0", "mean": number - 0.5, "n": 4}
        duel = row[f"duel_with_M{number - 1}"]
        assert duel["judge"] == "pairwise (letters) by M0, both orders"
        assert (duel["n"], duel["win"], duel["tie"], duel["loss"]) == (4, 1.0, 0.0, 0.0)
        assert row["kl_to_first"]["per_token"] == pytest.approx(math.expm1(-0.5 * number) + 0.5 * number)
        assert row["answers"]["tokens"] == len(f"{WEIGHTS[row['model']]} as 0.")


def test_held_out_answers_are_kept_with_what_was_said_of_them(world: Callable[..., World]) -> None:
    made = world()
    made.start()
    folder = made.store.folder / "heldout"
    assert sorted(path.name for path in folder.iterdir()) == ["M0", "M1", "M2"]
    kept = {path.stem: [*tables.rows(path)] for path in (folder / "M2").iterdir()}
    assert [row["id"] for row in kept["prompts"]] == ["h0", "h1", "h2", "h3"]
    assert [row["text"] for row in kept["responses"]] == [f"{WEIGHTS['M2']} as 0."] * 4
    # Two judgements each by the model and by M0; 2.5 points less by M0 are as in the test above.
    judged = [(row["id"].partition("@")[2].partition("/")[0], row["points"]) for row in kept["judgements"]]
    assert Counter(judged) == {("M2", 3.0): 4, ("M2", 4.0): 4, ("M0", 1.0): 4, ("M0", 2.0): 4}
    said = {(row["prompt_id"], row["response_id"].partition("/")[0], row["text"]) for row in kept["comparisons"]}
    assert said == {(f"h{number}", *shown) for number in range(4) for shown in (("M2", "A"), ("M1", "B"))}
    assert not (folder / "M0" / "comparisons.parquet").exists()


class Exchanged(Pools):
    """Loads M0 for M1 and M1 for M0, from when there are both."""

    async def model_instead(self, model: Model) -> Model:
        other = {"M0": "M1", "M1": "M0"}.get(model.name, model.name)
        try:
            return await self.model(other)
        except FileNotFoundError:
            return model

    async def hold(self, model: Model) -> dict[str, Any]:
        return await super().hold(await self.model_instead(model))


class Disguised(Exchanged):
    """The same, under the name that was asked for."""

    async def hold(self, model: Model) -> dict[str, Any]:
        found = await Pools.hold(self, model)
        self.engine.weights = (await self.model_instead(model)).digest
        return found


def test_engines_with_other_weights_than_are_meant_end_the_run(world: Callable[..., World]) -> None:
    made = world({"pools": Exchanged})
    with pytest.raises(ExceptionGroup) as caught:
        made.start()
    assert {type(error) for error in leaves(caught.value)} == {WrongWeights}
    assert {str(error).partition(" was ")[2] for error in leaves(caught.value)} == {"answered by M0, not M1"}
    assert made.store.metrics() == []
    journal = (made.store.folder / "journal.jsonl").read_text()
    assert '"M1/h' not in journal


def test_weights_that_only_bear_the_name_change_the_figures(world: Callable[..., World]) -> None:
    """So that an exchange in the program, which no version can show, would not pass these tests."""
    rows = [row["heldout"] for row in world().start()]
    others = [row["heldout"] for row in world({"pools": Disguised}, name="disguised").start()]
    for name in ("score_by_current", "score_by_first", "duel_with_M0", "kl_to_first"):
        assert rows[0][name] != others[0][name]


# -- kills -------------------------------------------------------------------------------------------------------------

EARLY = {"train": {"candidate_every_steps": 1, "choose": "score", "early_stop": True, "pairs_per_step": 1}}
SEEDS = 3  # of kills, for each kind of run
WORLDS: dict[str, dict[str, Any]] = {
    "self_rewarding": {},
    "meta_rewarding": {"recipe": "meta_rewarding"},
    "temporal": {"recipe": "temporal", "judge": {"kind": "text", "judgements": 1, "max_tokens": 60}},
    "sft": {
        "iterations": 3,
        "steps": [
            {"recipe": "sft", "sources": [{"path": "x.jsonl"}, {"path": "eft"}]},
            {"recipe": "sft", "sources": [{"path": "positive"}, {"path": "x.jsonl"}], "positive_score": 4.0},
            {"recipe": "self_rewarding", "pair": {"rho": 0.3}},
        ],
    },
    "score": {"train": {"candidate_every_steps": 1, "choose": "score", "checkpoint_every_steps": 2}},
    "duel": {"train": {**EARLY["train"], "choose": "duel"}},
}
DATA = {"parts": PARTS, "files": FILES}


def compared(made: World) -> dict[str, Any]:
    """All that a kill must not change."""
    rows = made.store.metrics()
    noted = json.loads((made.store.folder / "start.json").read_text())
    written = {
        f"{iteration}/{name}": made.table(iteration, name)
        for iteration in range(len(rows))
        for name in ("responses", "judgements", "comparisons", "pairs", "examples")
        if (made.store.iteration(iteration) / f"{name}.parquet").exists()
    }
    steps = [made.store.steps(iteration).rows for iteration in range(len(rows))]
    folder = made.store.folder / "heldout"
    heldout = {str(path.relative_to(folder)): [*tables.rows(path)] for path in folder.rglob("*.parquet")}
    made_of = {"rows": plain(rows), "noted": noted, "weights": made.weights(), "steps": steps}
    return {**made_of, "heldout": heldout, **written}


@pytest.mark.parametrize("name", WORLDS)
def test_a_run_that_is_killed_anywhere_comes_to_the_same_and_asks_nothing_twice(
    name: str, world: Callable[..., World]
) -> None:
    """Each time up to six kills, before anything that happens: a request, a record, a step, a file, an event."""
    undisturbed = world(DATA, **WORLDS[name])
    assert start(undisturbed)
    assert undisturbed.repeated() == []
    expected, kinds = compared(undisturbed), Counter(what.partition(" ")[0] for what in undisturbed.happened)
    killed, turns = set(), itertools.cycle(sorted(kinds))  # each kind has its turn
    for seed in range(SEEDS):
        rng = random.Random(f"{name} {seed}")
        made = world(DATA, name=f"killed{seed}", **WORLDS[name])
        for _ in range(6):
            kind = next(turns)
            made.kill = only(f"{kind} ", rng.randint(1, max(1, kinds[kind] // 3)))
            if start(made, seed=rng.randrange(99)):
                break
            killed.add(kind)
        made.kill = lambda _: False
        assert start(made)
        assert made.repeated() == []
        assert compared(made) == expected
    assert killed == set(kinds) >= {"ask", "hold", "learner", "event", "write"}


STAGES = {
    # what it is killed before: how often it trains M1, and what is not asked again
    "event group": 1,
    "learner resumed": 2,
    "learner step": 2,
    "learner done": 2,
    "write training.json": 2,
    "hold M1": 1,
    "ask judge M1/h0/0#0@M1": 1,
    "event evaluated": 1,
    "write metrics.json": 1,
    "event iteration_finished": 1,
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_goes_on_where_the_run_was_killed(stage: str, world: Callable[..., World]) -> None:
    undisturbed = world()
    undisturbed.start()
    made = world(name="killed")
    made.kill = only(stage, 2 if stage == "event evaluated" else 1)  # the first one is M0's
    assert not start(made)
    asked, finished = len(made.asked), len(made.store.metrics())
    assert finished == (stage == "event iteration_finished")
    made.kill = lambda _: False
    rows = made.start(seed=5)
    assert compared(made) == compared(undisturbed)
    assert made.repeated() == []
    assert [job.version for job in made.jobs] == ["M1"] * STAGES[stage] + ["M2"]
    # What is finished is not looked at again.
    if finished:
        later = [request.id for _, request in made.asked[asked:] if ">" not in request.id]
        assert not [name for name in later if name.startswith(("00/", "M1/"))]
    assert len(rows) == 2


def test_after_training_a_resume_moves_no_weights_but_those_of_the_result(world: Callable[..., World]) -> None:
    """All answers of the model before are known: engines need not hold it again."""
    made = world()
    made.kill = only("hold M1")
    assert not start(made)
    made.kill, made.happened = (lambda _: False), []
    made.start()
    holds = [what for what in made.happened if what.startswith("hold")]
    assert holds[0] == "hold M1"
    assert made.happened.index("hold M1") < next(
        place for place, what in enumerate(made.happened) if what.startswith("ask")
    )


def test_steps_after_the_last_checkpoint_are_replayed_and_said(world: Callable[..., World]) -> None:
    made = world(train={"checkpoint_every_steps": 2, "pairs_per_step": 1}, prompts={"per_iteration": 5})
    made.kill = only("event step", 4)
    assert not start(made)
    made.kill = lambda _: False
    row = made.start()[0]
    # Steps 0 to 3 were done, of which the checkpoint knows two; the log had the fourth, though nobody told.
    assert (row["optimizer_steps"], row["steps_replayed"]) == (5, 2)
    assert [one["step"] for one in made.store.steps(0).rows] == [0, 1, 2, 3, 4]
    assert "replaying 2 optimizer steps after the last checkpoint" in made.screen.lines
    assert ("reference", 5, 0) in made.screen.ticks
    assert ("steps", 2, 0) in made.screen.ticks


def test_a_finished_run_does_nothing(world: Callable[..., World]) -> None:
    made = world()
    rows = made.start()
    made.kill = lambda _: True
    assert made.start() == rows


def test_other_items_than_were_trained_on_are_trained_on_again(world: Callable[..., World]) -> None:
    """The journal was lost, and the engines answer otherwise: a result of other items is none of this run's."""
    made = world()
    made.kill = only("hold M1")
    assert not start(made)
    (made.store.folder / "journal.jsonl").unlink()
    made.answer = lambda request, weights: answer(request, weights).replace("as 2", "as 3")
    made.kill = lambda _: False
    made.start()
    assert [job.version for job in made.jobs] == ["M1", "M1", "M2"]
    assert "iteration 0: M1 was trained on other pairs and is trained again" in made.screen.lines
    assert len(made.store.steps(0).rows) == 2


def test_a_choice_among_other_candidates_is_made_again(world: Callable[..., World]) -> None:
    """Trained again, since its items are others: what was chosen before says nothing about these candidates."""
    made = world(**EARLY, iterations=1)
    made.kill = only("take M1")
    assert not start(made)
    chosen = made.store.iteration(0) / "chosen.json"
    assert json.loads(chosen.read_text())["chosen"] == "M1@1"
    (made.store.folder / "journal.jsonl").unlink()

    def otherwise(request: Request, weights: str) -> str:
        """Now every candidate is worth as much as M0."""
        if request.role == "judge" and "".join(map(chr, request.prompt_token_ids)).startswith("Show"):
            return "Score: 3"
        return answer(request, weights).replace("as 2", "as 3")

    made.answer, made.kill = otherwise, lambda _: False
    (row,) = made.start()
    assert row["choice"]["chosen"] == json.loads(chosen.read_text())["chosen"] == "M0"
    assert made.weights() == {"M1": "M0"}


def test_other_items_than_a_training_was_begun_with_begin_it_anew(world: Callable[..., World]) -> None:
    """Neither its candidates nor its steps are those of the items that there are."""
    made = world(iterations=1, prompts={"per_iteration": 5}, **EARLY)
    made.kill = only("learner step", 2)
    assert not start(made)
    assert made.weights() == {"M1@1": "M0+1"}
    (made.store.folder / "journal.jsonl").unlink()
    made.answer = lambda request, weights: answer(request, weights).replace("as 2", "as 3")
    made.kill = lambda _: False
    made.start()
    assert "iteration 0: M1 was trained on other pairs and is trained again" in made.screen.lines
    assert [job.until for job in made.jobs] == [1, 2, 1, 2]
    # With the same items, a candidate is not trained again.
    made = world(name="same", iterations=1, prompts={"per_iteration": 5}, **EARLY)
    made.kill = only("learner step", 2)
    assert not start(made)
    made.kill = lambda _: False
    made.start()
    assert [job.until for job in made.jobs] == [1, 2, 2]


# -- choosing and stopping early ---------------------------------------------------------------------------------------


def test_training_ends_at_the_first_candidate_that_is_not_better(world: Callable[..., World]) -> None:
    """Every candidate was trained once since M0, so the second is no better than the first, which becomes M1."""
    made = world(iterations=1, prompts={"per_iteration": 5}, **EARLY)
    (row,) = made.start()
    assert made.happened.count("learner step") == 2
    assert [job.until for job in made.jobs] == [1, 2]
    assert made.happened.count("learner forget") == 1  # nobody goes on with what it keeps in memory
    assert row["optimizer_steps"] == 2
    assert made.jobs[0].rule.steps(5) == 5
    assert (row["choice"]["chosen"], row["choice"]["candidates"]) == ("M1@1", ["M1@1", "M1@2", "M1"])
    assert list(row["choice"]["found"]) == ["M1@1", "M1@2"]
    assert "M1@2 is not better than M1@1: training ends" in made.screen.lines
    assert made.weights() == {"M1": "M0+1"}
    assert made.pools.discarded == [None]  # it has no files of a candidate
    assert row["heldout"]["score_by_first"]["mean"] == 0.5
    assert {weights for weights, one in made.asked if one.id.startswith("M1/h") and "@" not in one.id} == {"M0+1", "M0"}


def test_candidates_are_judged_after_the_training_where_it_does_not_stop_early(world: Callable[..., World]) -> None:
    rule = {**EARLY["train"], "early_stop": False}
    made = world(iterations=1, prompts={"per_iteration": 5}, **{**EARLY, "train": rule})
    (row,) = made.start()
    assert [job.until for job in made.jobs] == [1, 2, 3, 4, None]
    trained = max(place for place, what in enumerate(made.happened) if what.startswith("learner"))
    assert trained < min(place for place, what in enumerate(made.happened) if what.startswith("hold M1@"))
    assert (row["optimizer_steps"], row["choice"]["chosen"]) == (5, "M1@1")
    assert made.screen.ticks.count(("steps", 1, 10)) == 5
    assert "learner forget" not in made.happened
    # The learner's files are those of its last step: nobody may load them for M1.
    assert made.pools.discarded == ["files of M1"]
    assert made.weights() == {"M1": "M0+1"}


def test_nothing_that_is_better_keeps_the_model_before(world: Callable[..., World]) -> None:
    """The judge likes M0 best: M1 is M0 by another name, and M2 may be a better one."""

    def likes_m0(request: Request, weights: str) -> str:
        found = answer(request, weights)
        if request.role == "judge" and "".join(map(chr, request.prompt_token_ids)).split("|")[0].startswith("Show"):
            return "Score: 4" if "|M0 as" in "".join(map(chr, request.prompt_token_ids)) else "Score: 2"
        return found

    made = world({"answer": likes_m0}, **EARLY)
    rows = made.start()
    assert [row["choice"]["chosen"] for row in rows] == ["M0", "M1"]
    assert made.weights() == {"M1": "M0", "M2": "M0"}
    assert made.pools.discarded == [None, None]
    assert [row["heldout"]["score_by_first"]["mean"] for row in rows] == [0.0, 0.0]
    assert [(job.source, job.version) for job in made.jobs] == [("M0", "M1"), ("M1", "M2")]


def test_the_last_candidate_is_published_from_the_learners_files(world: Callable[..., World]) -> None:
    """Where each is better than the one before."""

    def grows(request: Request, weights: str) -> str:
        shown = "".join(map(chr, request.prompt_token_ids)).split("|")
        if request.role == "judge" and shown[0].startswith("Show"):
            return f"Score: {sum(map(int, re.findall('[+]([0-9])', shown[1])))}"
        return answer(request, weights)

    made = world({"answer": grows}, iterations=1, prompts={"per_iteration": 4}, **EARLY)
    (row,) = made.start()
    assert (row["choice"]["chosen"], row["optimizer_steps"]) == ("M1", 4)
    assert made.weights() == {"M1": "M0+4"}
    assert made.pools.discarded == []
    assert [gain["over"] for gain in row["choice"]["found"].values()] == ["M0", "M1@1", "M1@2", "M1@3"]


# -- endings -----------------------------------------------------------------------------------------------------------


def same_score(request: Request, weights: str) -> str:
    return "Score: 3" if request.role == "judge" else answer(request, weights)


def test_an_iteration_without_pairs_ends_the_run(world: Callable[..., World]) -> None:
    """After its records are written, and each time again until something else changes."""
    made = world({"answer": same_score})
    for attempt in range(2):
        with pytest.raises(NoPairs, match=r"^iteration 0 has no pairs: \{'equal scores': 3\}$"):
            made.start()
        assert len(made.table(0, "responses")) == 9
        assert made.table(0, "pairs") == []
        assert made.jobs == []
        assert made.repeated() == [], attempt


def test_a_source_without_enough_examples_ends_the_run(world: Callable[..., World]) -> None:
    steps = [{"recipe": "sft", "sources": [{"path": "positive"}], "positive_score": 5.0}]
    made = world(DATA, steps=steps, iterations=1)
    with pytest.raises(NoExamples, match="source positive gave 0 examples"):
        made.start()
    assert made.jobs == []


def test_a_sign_beyond_its_limit_ends_the_run_after_its_iteration(world: Callable[..., World]) -> None:
    """The row is written: a resume goes on with the next iteration, and ends after that where the sign is still
    beyond its limit."""
    made = world(watch={"score_mean": {"warn": 0.1, "stop": 0.6}}, iterations=3)
    for finished in (1, 2):
        with pytest.raises(Stopped, match=f"^after iteration {finished - 1}: score_mean is .*, above 0.6: "):
            made.start()
        assert len(made.store.metrics()) == finished
        assert any(line.startswith(f"iteration {finished - 1}: score_mean is") for line in made.screen.lines)
    events = [json.loads(line) for line in (made.store.folder / "events.jsonl").read_text().splitlines()]
    alarms = [event for event in events if event["event"] == "alarm" and event["sign"] == "score_mean"]
    assert [(event["iteration"], event["action"]) for event in alarms] == [(0, "stop"), (1, "stop")]


def test_a_sign_that_ends_the_run_ends_it_after_a_kill_too(world: Callable[..., World]) -> None:
    """That came between the row and the alarm. What was told is not told again."""
    made = world(watch={"score_mean": {"stop": 0.6}}, iterations=3)
    made.kill = only("event alarm", 1)
    assert not start(made)
    made.kill = lambda _: False
    assert len(made.store.metrics()) == 1
    for finished in (1, 2):
        with pytest.raises(Stopped, match=f"^after iteration {finished - 1}: score_mean is .*, above 0.6: "):
            made.start()
        assert len(made.store.metrics()) == finished


def test_warnings_end_nothing(world: Callable[..., World]) -> None:
    made = world(watch={"score_mean": {"warn": 0.1}})
    rows = made.start()
    assert len(rows) == 2
    assert sum("score_mean is" in line for line in made.screen.lines) == 2


# -- recipes in a run --------------------------------------------------------------------------------------------------


def test_pairs_of_judgements_are_trained_on_and_measured(world: Callable[..., World]) -> None:
    made = world(recipe="meta_rewarding", iterations=1)
    (row,) = made.start()
    assert row["pairs_of_kind"] == {"actor": 3, "judge": 3}
    assert row["comparisons"] == len(made.table(0, "comparisons")) == 6
    # Judgement 0 wins in both orders: as often shown first as second.
    assert row["meta"]["position_weights"] == {"first": 0.5, "second": 0.5}
    assert {pair["id"].rpartition("#")[2] for pair in made.table(0, "pairs") if pair["kind"] == "judge"} == {"0>1"}
    assert {item.kind for item in made.jobs[0].items} == {"actor", "judge"}
    assert row["signs"]["n_decided"] == 6


def test_supervised_fine_tuning_comes_first_and_leaves_prompts_alone(world: Callable[..., World]) -> None:
    made = world(DATA, **WORLDS["sft"])
    rows = made.start()
    assert [job.source for job in made.jobs] == ["M0", "M1", "M2"]
    assert rows[0]["examples"]["x.jsonl"] == {"longer than engine.max_model_len": 0, "used": 5}
    assert rows[0]["examples"]["eft"]["kept"] == 6
    assert (rows[0]["signs"], rows[0]["prompts"], rows[0]["pairs"]) == ({}, 0, 0)
    assert rows[0]["examples_trained"] == len(made.table(0, "examples")) == 11
    assert [one["id"] for one in made.table(0, "examples")] == [item.id for item in made.jobs[0].items]
    assert rows[0]["sft_loss_first"] == 2.0
    # Step 0 answers no prompts, and step 1 takes the first three.
    assert {row["id"].split("/")[1] for row in made.table(1, "responses")} == {"p0", "p1", "p2"}
    assert {row["id"].split("/")[1] for row in made.table(2, "responses")} == {"p3", "p4", "p5"}
    assert rows[1]["examples"]["positive"]["used"] == sum(
        row["id"].endswith("/2") for row in made.table(1, "responses")
    )
    assert rows[2]["pairs"] == 3


def test_a_model_trained_within_an_iteration_is_given_up(world: Callable[..., World]) -> None:
    made = world(**WORLDS["temporal"])
    rows = made.start()
    assert [(job.iteration, job.source, job.version) for job in made.jobs] == [
        (0, "M0", "M0.ahead"), (0, "M0", "M1"), (1, "M1", "M1.ahead"), (1, "M1", "M2"),
    ]  # fmt: skip
    assert made.weights() == {"M0.ahead": "M0+2", "M1": "M0+2", "M1.ahead": "M0+2+2", "M2": "M0+2+2"}
    # M0, the model before, and the model ahead answer; the model before judges all of them.
    texts = [row["text"].partition(" as ")[0] for row in made.table(1, "responses")]
    assert Counter(texts) == {"M0": 9, "M0+2": 9, "M0+2+2": 9}
    assert {weights for weights, one in made.asked if one.id.startswith("01/") and one.role == "judge"} == {"M0+2"}
    # A later index has more points.
    assert rows[1]["temporal"] == {"rejected_of_first": 0, "chosen_of_ahead": 3}
