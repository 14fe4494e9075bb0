"""Autonomous Learning: questions that the model writes about documents, and what it learns from their answers."""

import asyncio
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import response
from scripted import Memory, Scripted, model, recipe_of, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.commands import plan, plan_gpu
from rsrlm.config import load
from rsrlm.data.documents import FORM
from rsrlm.recipes.autonomous import pair, text_example
from rsrlm.recipes.base import NoItems
from rsrlm.records import Completion, NoPair, PreferencePair, Prompt, Request, seed_of
from rsrlm.settings.base import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
ASPIRIN = "Aspirin irreversibly inhibits COX-1."
TEA = "Tea is made of leaves."
LEAVES = "Question: What is tea made of?\nAnswer: leaves"
WRITTEN = "Question: What does aspirin inhibit?\nAnswer: COX-1, irreversibly."


class Reads(Scripted):
    """Writes about a piece what `written` has for its id, and answers every question from memory with `memory`; what is
    named in `cut` ends at its limit."""

    def __init__(
        self, encoder: ChatEncoder, written: dict[str, str], memory: str = "It inhibits COX-2.", cut: str = ""
    ):
        super().__init__(encoder.tokenizer, self._text)
        self.written, self.memory, self.cut = written, memory, cut
        self.asked: list[tuple[str, str, str]] = []  # model, role, id

    def _text(self, shown: dict[str, str], request: Request, held: str) -> str:
        self.asked.append((held, request.role, request.id))
        return self.written[request.id.split("/")[1]] if request.role == "prompter" else self.memory

    async def generate(self, request: Request) -> Completion:
        made = await super().generate(request)
        return replace(made, finish_reason="length" if self.cut and self.cut == request.id else "stop")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "aspirin.txt").write_text(ASPIRIN)
    (folder / "tea.txt").write_text(TEA)
    return folder


@pytest.fixture
def config_of(make_config: Any, documents: Path) -> Callable[..., Any]:
    def make(recipe: str, **keys: Any) -> Any:
        own = {"documents": str(documents), "write": {"max_tokens": 32}, "piece_tokens": 64, **keys}
        return make_config(recipe=recipe, **own)

    return make


def iteration(config: Any, encoder: ChatEncoder, engine: Any, log: Memory | None = None) -> Any:
    """The batch of iteration 1, which starts from M1 and is dealt no prompts."""
    recipe, run = recipe_of(config, encoder), run_of(engine, log)
    recipe.check([])
    run.names = ["M0", "M1"]
    return asyncio.run(asyncio.wait_for(recipe.iteration(run, 1, model("M1"), []), 60))


def text(encoder: ChatEncoder, tokens: Any) -> str:
    decoded: str = encoder.tokenizer.decode(tokens)
    return decoded


# -- open book ---------------------------------------------------------------------------------------------------------


def test_open_book(config_of: Any, encoder: ChatEncoder) -> None:
    """One piece gives a question, another one none: the answer is learnt without the piece, and asking with it."""
    config = config_of("open_book")
    engine, log = Reads(encoder, {"aspirin.txt-0": WRITTEN, "tea.txt-0": "Tea!"}), Memory()
    batch = iteration(config, encoder, engine, log)
    assert sorted(engine.asked) == [("M1", "prompter", "01/aspirin.txt-0/0"), ("M1", "prompter", "01/tea.txt-0/0")]
    asking, closed = sorted(batch.items, key=lambda one: one.id)
    (request,) = [one for one in engine.requests if "aspirin" in one.id]
    assert (closed.id, closed.kind) == ("01/aspirin.txt-0/closed", "closed")
    assert closed.prompt_token_ids == encoder.user("What does aspirin inhibit?")
    assert closed.target_token_ids == encoder.target("COX-1, irreversibly.")
    assert ASPIRIN not in text(encoder, closed.prompt_token_ids + closed.target_token_ids)
    assert (asking.id, asking.kind) == ("01/aspirin.txt-0/asking", "asking")
    assert asking.prompt_token_ids == request.prompt_token_ids
    assert asking.target_token_ids == (*encoder.tokenizer.encode(WRITTEN), 2)  # as sampled
    assert f">\n{ASPIRIN}\n</text" in text(encoder, request.prompt_token_ids)
    assert batch.dropped == {"no question": 1}
    counts = {"closed": 1, "asking": 1}
    assert batch.measures == {"open_book": counts}
    assert [(group.id, group.no_pair_reason) for group in batch.groups if group.no_pair_reason] == [
        ("01/tea.txt-0", "no question")
    ]
    again = iteration(config, encoder, engine, log)
    assert (again.items, len(engine.requests)) == (batch.items, 2)


def test_how_a_piece_is_read(config_of: Any, encoder: ChatEncoder) -> None:
    """By `write`, with seeds of its own in every iteration."""
    config = config_of("open_book", write={"max_tokens": 20, "temperature": 0.5})
    recipe = recipe_of(config, encoder)
    engine = Reads(encoder, {"aspirin.txt-0": WRITTEN, "tea.txt-0": WRITTEN})
    for number in (0, 1):
        asyncio.run(recipe.iteration(run_of(engine), number, model("M0"), []))
    sampling = {request.id: request.sampling for request in engine.requests}
    assert {(one.temperature, one.top_p, one.max_tokens) for one in sampling.values()} == {(0.5, 0.9, 20)}
    assert {request.regex for request in engine.requests} == {None}
    seeds = {f"{n:02d}/{name}/0": seed_of(0, n, name, "prompter", "0") for n in (0, 1) for name in engine.written}
    assert {name: one.seed for name, one in sampling.items()} == seeds
    assert len(set(seeds.values())) == 4


def test_a_model_that_is_held_to_the_form(config_of: Any, encoder: ChatEncoder) -> None:
    engine = Reads(encoder, {"aspirin.txt-0": WRITTEN, "tea.txt-0": LEAVES})
    iteration(config_of("closed_book", structured=True), encoder, engine)
    forms = {request.role: request.regex for request in engine.requests}
    assert forms == {"prompter": FORM, "actor": None}
    assert all(re.fullmatch(FORM, text) for text in (WRITTEN, LEAVES))
    for other in ("Question: a?", "Question: a?\nAnswer: ", "Question: a\nAnswer: b", f"{WRITTEN}\n", f"So. {WRITTEN}"):
        assert not re.fullmatch(FORM, other)


@pytest.mark.parametrize(
    ("keys", "written", "reason"),
    [
        ({}, "Question: Which?\nAnswer: COX-1\nAnswer: COX-2", "several answers"),
        ({}, "Question:\nAnswer: COX-1", "empty question"),
        (
            {"pointing": ["the text"]},
            "Question: What does the text say?\nAnswer: COX-1",
            "question points into the text",
        ),
        ({"least_overlap": 0.6}, "Question: What?\nAnswer: COX-2 it is", "answer not in the text"),
    ],
)
def test_what_is_dropped(keys: Any, written: str, reason: str, config_of: Any, encoder: ChatEncoder) -> None:
    """The other piece gives an example all the same."""
    engine = Reads(encoder, {"aspirin.txt-0": written, "tea.txt-0": LEAVES})
    batch = iteration(config_of("open_book", keep_asking=False, **keys), encoder, engine)
    assert [one.id for one in batch.items] == ["01/tea.txt-0/closed"]
    assert batch.dropped == {reason: 1}


def test_a_text_that_was_cut_is_dropped(config_of: Any, encoder: ChatEncoder) -> None:
    engine = Reads(encoder, {"aspirin.txt-0": WRITTEN, "tea.txt-0": LEAVES}, cut="01/aspirin.txt-0/0")
    batch = iteration(config_of("open_book"), encoder, engine)
    assert {one.id for one in batch.items} == {"01/tea.txt-0/closed", "01/tea.txt-0/asking"}
    assert batch.dropped == {"cut": 1}


def test_no_example_at_all(config_of: Any, encoder: ChatEncoder) -> None:
    engine = Reads(encoder, dict.fromkeys(("aspirin.txt-0", "tea.txt-0"), "Who knows?"))
    with pytest.raises(NoItems, match=r"no piece of documents=.* gave an example: \{'no question': 2\}"):
        iteration(config_of("open_book"), encoder, engine)


def test_examples_come_in_an_order_of_their_own(config_of: Any, encoder: ChatEncoder) -> None:
    written = {"aspirin.txt-0": WRITTEN, "tea.txt-0": LEAVES}
    ids = sorted(f"01/{name}/{kind}" for name in written for kind in ("closed", "asking"))
    for seed in (1, 2, 3):
        shuffled = list(ids)
        random.Random(f"examples {seed} 1").shuffle(shuffled)
        batch = iteration(config_of("open_book", seed=seed), encoder, Reads(encoder, written))
        assert [one.id for one in batch.items] == shuffled


def test_plain_training_on_the_text(config_of: Any, encoder: ChatEncoder) -> None:
    """All tokens but the first; nobody is asked."""
    engine = Reads(encoder, {})
    batch = iteration(config_of("open_book", on="text"), encoder, engine)
    assert (engine.asked, batch.groups) == ([], ())
    found = {one.id: (one.kind, one.prompt_token_ids + one.target_token_ids) for one in batch.items}
    texts = {"aspirin.txt-0": ASPIRIN, "tea.txt-0": TEA}
    assert found == {name: ("text", tuple(encoder.tokenizer.encode(words))) for name, words in texts.items()}
    assert {len(one.prompt_token_ids) for one in batch.items} == {1}
    assert batch.measures == {"open_book": {"text": 2}}


def test_a_beginning_is_no_target(config_of: Any, encoder: ChatEncoder, documents: Path) -> None:
    """A tokenizer may put a BOS token first. Of a text of one token nothing is left."""
    made = text_example(Prompt(id="tea-0", text="Tea"), (1, 70, 71))
    assert (made.prompt_token_ids, made.target_token_ids) == ((1,), (70, 71))
    (documents / "tea.txt").write_text("A")
    batch = iteration(config_of("open_book", on="text"), encoder, Reads(encoder, {}))
    assert [one.id for one in batch.items] == ["aspirin.txt-0"]


# -- closed book -------------------------------------------------------------------------------------------------------


def test_closed_book(config_of: Any, encoder: ChatEncoder) -> None:
    """The answer with the text in sight is preferred to the one from memory; who writes no question is not asked."""
    config = config_of("closed_book", sample={"responses": 4, "max_tokens": 24, "temperature": 0.3})
    engine, log = Reads(encoder, {"aspirin.txt-0": WRITTEN, "tea.txt-0": "Tea!"}), Memory()
    batch = iteration(config, encoder, engine, log)
    assert sorted(engine.asked) == [
        ("M1", "actor", "01/aspirin.txt-0/1"),
        ("M1", "prompter", "01/aspirin.txt-0/0"),
        ("M1", "prompter", "01/tea.txt-0/0"),
    ]
    (made,) = batch.items
    assert (made.id, made.chosen_id) == ("01/aspirin.txt-0/g>1", "01/aspirin.txt-0/g")
    assert made.prompt_token_ids == encoder.user("What does aspirin inhibit?")
    assert made.chosen_token_ids == encoder.target("COX-1, irreversibly.")
    assert made.rejected_token_ids == (*encoder.tokenizer.encode("It inhibits COX-2."), 2)
    assert (made.chosen_score, made.rejected_score, made.weight, made.target) == (1, 0, 1, 1)
    assert (made.prompt_id, made.weight_version) == ("aspirin.txt-0", "M1")
    assert batch.dropped == {"no question": 1}
    (memory,) = [request for request in engine.requests if request.role == "actor"]
    assert memory.prompt_token_ids == made.prompt_token_ids
    assert (memory.sampling.temperature, memory.sampling.max_tokens) == (0.3, 24)
    assert memory.sampling.seed == seed_of(0, 1, "aspirin.txt-0", "actor", "1")
    group = next(group for group in batch.groups if group.pairs)
    assert [(one.id, one.role, one.prompt_id) for one in group.responses] == [
        ("01/aspirin.txt-0/0", "prompter", "aspirin.txt-0"),
        ("01/aspirin.txt-0/1", "actor", "aspirin.txt-0"),
        ("01/aspirin.txt-0/g", "data", "aspirin.txt-0"),
    ]
    assert group.prompt.text == ASPIRIN
    again = iteration(config, encoder, engine, log)
    assert (list(again.items), len(engine.requests)) == ([made], 3)


@pytest.mark.parametrize(
    ("cut", "memory", "reasons", "pairs"),
    [
        ("", "COX-1,  irreversibly.\n", {"same text": 1}, 0),
        ("01/aspirin.txt-0/1", "It inhibits COX-2", {}, 1),  # it may lose
        ("01/aspirin.txt-0/0", "It inhibits COX-2.", {"cut": 1}, 0),
        ("", " ", {"no text": 1}, 0),
    ],
)
def test_which_answers_are_a_pair(
    cut: str, memory: str, reasons: dict[str, int], pairs: int, config_of: Any, encoder: ChatEncoder, documents: Path
) -> None:
    (documents / "tea.txt").unlink()
    engine = Reads(encoder, {"aspirin.txt-0": WRITTEN}, memory, cut)
    batch = iteration(config_of("closed_book"), encoder, engine)
    assert (batch.dropped, len(batch.items)) == (reasons, pairs)
    assert len(engine.asked) == (1 if "cut" in reasons else 2)  # about a text that is dropped nobody is asked


def test_pairs_by_hand() -> None:
    opened, memory = (replace(response(index, words), prompt_id="tea") for index, words in enumerate(("a b", "a c")))
    found = pair("01/tea", opened, memory)
    assert isinstance(found, PreferencePair)
    assert (found.id, found.chosen_score, found.rejected_score) == ("01/tea/0>1", 1.0, 0.0)
    assert pair("01/tea", opened, replace(memory, finish_reason="length")) == found
    assert pair("01/tea", replace(opened, finish_reason="length"), memory) == NoPair(reason="cut")
    assert pair("01/tea", opened, replace(memory, text=" a\n\nb ")) == NoPair(reason="same text")
    assert isinstance(pair("01/tea", opened, replace(memory, text="A b")), PreferencePair)


# -- pieces, plans, errors ---------------------------------------------------------------------------------------------


def test_some_of_the_pieces(config_of: Any, encoder: ChatEncoder, documents: Path) -> None:
    """Drawn by seed and iteration, none twice."""
    for number in range(8):
        (documents / f"{number}.txt").write_text(f"Number {number}.")
    recipe = recipe_of(config_of("closed_book", per_iteration=5), encoder)
    drawn = [[task.prompt.id for task in recipe.drawn(number)] for number in range(3)]
    assert all(len(set(ids)) == 5 for ids in drawn)
    assert drawn[0] != drawn[1] != drawn[2]
    assert [task.id for task in recipe.drawn(1)] == [f"01/{name}" for name in drawn[1]]
    assert drawn == [[task.prompt.id for task in recipe.drawn(number)] for number in range(3)]
    everything = recipe_of(config_of("closed_book"), encoder)
    assert {task.prompt.id for task in everything.drawn(0)} == {piece.id for piece in everything.pieces}
    assert len(everything.pieces) == 10
    assert everything.inputs == [[piece.id, piece.text] for piece in everything.pieces]


@pytest.mark.parametrize("recipe", ["open_book", "closed_book"])
def test_what_is_refused(
    recipe: str, config_of: Any, make_config: Any, encoder: ChatEncoder, documents: Path, tmp_path: Path
) -> None:
    def refused(said: str, **keys: Any) -> None:
        with pytest.raises(ConfigError, match=said):
            recipe_of(config_of(recipe, **keys), encoder).check([])

    refused(r"per_iteration=3 with documents=.*, which make 2 pieces; lower it", per_iteration=3)
    refused(r"documents=nowhere\.txt: No such file", documents="nowhere.txt")
    refused(r"thought: an answer that is written with a document in sight has no thought", thought={})
    refused(r"template='nowhere': neither one of rsrlm's \(.*open_book", template="nowhere")
    template = tmp_path / "mine.jinja"
    template.write_text("Ask about it.")
    refused(r"does not use document; add \{\{ document \}\}", template=str(template))
    template.write_text("Ask about {{ document }}, as {{ data.answer }} does.")
    refused(r"prompt 'aspirin\.txt-0' has no 'answer'", template=str(template))
    refused(
        r"piece_tokens=400 with engine\.max_model_len=512: the reading of a piece takes \d+ tokens; lower piece_tokens",
        piece_tokens=400,
    )
    refused(r"piece_tokens.*greater than or equal to 16", piece_tokens=8)
    with pytest.raises(ConfigError, match="documents: missing; add it to the file"):
        make_config(recipe=recipe)
    with pytest.raises(ConfigError, match=r"with clock\.kind=online: an iteration of it may train"):
        config_of(recipe, clock="online")


def test_an_answer_from_memory_must_fit_too(config_of: Any, encoder: ChatEncoder) -> None:
    config = config_of("closed_book", write={"max_tokens": 100}, sample={"max_tokens": 400})
    with pytest.raises(ConfigError, match=r"an answer from memory takes 5\d\d tokens"):
        recipe_of(config, encoder).check([])
    plain = recipe_of(config_of("open_book", on="text", piece_tokens=5000), encoder)
    with pytest.raises(ConfigError, match=r"a piece takes 5001 tokens"):
        plain.check([])


def test_what_an_iteration_is(config_of: Any, encoder: ChatEncoder) -> None:
    """It is dealt no prompts, and asks one thing at a time for each piece."""
    for number, name in enumerate(("open_book", "closed_book")):
        recipe = recipe_of(config_of(name), encoder)
        assert not recipe.answers_prompts(recipe.config)
        assert (recipe.trains, recipe.width, recipe.scale) == (("examples", "pairs")[number], 1, (0, 1))
        assert recipe.asks == [recipe.turn.source]


@pytest.mark.parametrize(
    ("recipe", "keys", "requests", "items", "tokens"),
    [
        ("open_book", {}, {"prompter": (2, 32)}, 4, 32 + 400 + 64),
        ("open_book", {"keep_asking": False, "per_iteration": 1}, {"prompter": (1, 32)}, 1, 32 + 64),
        ("open_book", {"on": "text"}, {}, 2, 65),
        ("closed_book", {}, {"prompter": (2, 32), "actor": (2, 24)}, 2, 64 + 32 + 24),
    ],
)
def test_what_a_plan_says(
    recipe: str, keys: Any, requests: Any, items: int, tokens: int, config_of: Any, encoder: ChatEncoder
) -> None:
    """Of the pieces that are there, whatever the number of prompts."""
    config = config_of(recipe, **keys)
    made = recipe_of(config, encoder)
    demand = made.demand(10)
    assert (demand.requests, demand.items, demand.item_tokens) == (requests, items, tokens)
    assert made.requests(10) == {role: number for role, (number, _) in requests.items()}
    bounds = plan.bounds(config, [demand])
    assert bounds.requests.get("prompts that are written") == (requests["prompter"][0] if requests else None)
    assert bounds.requests["responses"] == requests.get("actor", (0, 0))[0]


def test_a_plan_without_documents() -> None:
    config = load(CONFIGS / "autonomous_llama31_8b.yaml")
    open_book, closed_book, *_ = plan_gpu.demands_of(config)
    assert (open_book.items, closed_book.items) == (0, 0)
    named = [f"{name}: the pieces of the documents; per_iteration bounds them" for name in ("M1", "M2")]
    assert plan_gpu.unknown_of(config)[:2] == named
    bounded = load(CONFIGS / "autonomous_llama31_8b.yaml", ["per_iteration=1000"])
    assert plan_gpu.unknown_of(bounded) == []
    first, second = (
        plan_gpu.work_of(bounded, step, demand)
        for step, demand in zip(bounded.planned[:2], plan_gpu.demands_of(bounded)[:2], strict=True)
    )
    assert first.generated == 1000 * 0.44 * 256
    assert first.prefilled == 1000 * (115 + 512)
    assert (first.reference, first.trained) == (0, 2 * 2000 * (256 + 400 + 512) / 2)
    answer = 0.44 * bounded.planned[1].config.sample.max_tokens
    assert second.generated == 1000 * (0.44 * 256 + answer)
    assert second.reference == second.trained == pytest.approx(0.75 * 1000 * (115 + 2 * answer))


@pytest.mark.parametrize("name", ["autonomous_llama31_8b", "autonomous_smollm2_cpu"])
def test_the_configs(name: str) -> None:
    """Both recipes by turns."""
    planned = load(CONFIGS / f"{name}.yaml").planned
    assert [step.recipe.__name__ for step in planned[:2]] == ["OpenBook", "ClosedBook"]
    assert not any(hasattr(step.config.train, "beta") for step in planned[::2])
