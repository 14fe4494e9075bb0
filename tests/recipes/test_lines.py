"""Answers written line by line have the tokens of an answer that is written at once, whatever the tokenizer."""

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest
from scripted import engines_of
from small_tokenizers import KINDS, tokenizer_of
from writer import Writer

from rsrlm.chat import ChatEncoder
from rsrlm.judges.base import Context
from rsrlm.recipes.lines import Line, Lines
from rsrlm.records import Completion, Prompt, Request, Response, Task, seed_of
from rsrlm.settings.methods import SamplingParams

TASK = Task(iteration=2, prompt=Prompt(id="tea", text="What is 3 + 4?"))


def lines_of(encoder: ChatEncoder, most: int = 200, **line: Any) -> Lines:
    context = Context(encoder=encoder, seed=5, room=512)
    return Lines(context, SamplingParams(temperature=0.8, top_p=0.9, max_tokens=most), Line(**line))


class Teller(Writer):
    """Tells a text on from where it is begun, with the tokens that it has within a text."""

    def __init__(self, encoder: ChatEncoder, text: str) -> None:
        super().__init__(encoder.tokenizer, lambda request, begun: text.removeprefix(begun))
        self.encoder = encoder

    def begun(self, request: Request) -> str:
        own = request.prompt_token_ids[len(self.encoder.user(TASK.prompt.text)) :]
        return self.decode(own).lstrip(" ")

    def encode(self, text: str) -> tuple[int, ...]:
        return self.encoder.target(f"x{text}")[len(self.encoder.target("x")) - 1 : -1]


def followed(lines: Lines, engine: Writer, **how: Any) -> list[Response]:
    """Each beginning, up to the end of the answer."""

    async def work() -> list[Response]:
        made = [lines.start(TASK, "t")]
        while not lines.is_done(made[-1]):
            assert len(made) < 20
            made.append(await lines.follow(engines_of(engine), TASK, made[-1], f"t{len(made) - 1}@1", **how))
        return made[1:]

    return asyncio.run(work())


def pieces(found: list[Response]) -> list[str]:
    texts = ["", *(one.text for one in found)]
    return [now.removeprefix(before) for before, now in itertools.pairwise(texts)]


@pytest.mark.parametrize("kind", [*KINDS, "smollm2"])
@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("Add them.\n3 + 4 = 7\nSo: 7.", "\n", ["Add them.\n", "3 + 4 = 7\n", "So: 7."]),
        ("One line.", "\n", ["One line."]),
        ("Ends with a break.\n", "\n", ["Ends with a break.\n", ""]),
        ("A step:\n3 + 4\n\nThen.\n\nSo 7.", "\n\n", ["A step:\n3 + 4\n\n", "Then.\n\n", "So 7."]),
    ],
)
def test_lines_have_the_tokens_of_the_whole(
    kind: str, text: str, separator: str, expected: list[str], encoder: ChatEncoder
) -> None:
    own = encoder if kind == "smollm2" else ChatEncoder(tokenizer_of(kind, "chatml"))
    engine = Teller(own, text)
    found = followed(lines_of(own, separator=separator), engine)
    assert pieces(found) == expected
    *begun, answer = found
    assert [one.complete for one in begun] == [False] * len(begun)
    assert answer.complete
    assert answer.text == text
    assert answer.token_ids[-1] == own.tokenizer.eos_token_id
    assert own.tokenizer.eos_token_id not in answer.token_ids[:-1]
    assert engine.decode(answer.token_ids).lstrip(" ") == text
    assert answer.token_ids == (*engine.encode(text), own.tokenizer.eos_token_id)
    for one in begun:
        assert engine.decode(one.token_ids).lstrip(" ") == one.text


def test_a_blank_line_is_of_the_tokens_that_the_model_wrote(encoder: ChatEncoder) -> None:
    """Its tokenizer has one for two line breaks, and one for four."""
    engine = Teller(encoder, text := "Add them.\n\n3 + 4 = 7\n\n\n\nSo 7.")
    found = followed(lines_of(encoder), engine)
    assert [piece.strip() for piece in pieces(found)] == ["Add them.", "3 + 4 = 7", "So 7."]
    assert found[-1].text == text
    assert found[-1].token_ids == (*engine.encode(text), encoder.tokenizer.eos_token_id)
    assert [one.id for one in found] == [f"02/tea/t{n}" for n in range(3)]


def test_a_line_break_at_the_start_is_asked_beyond(encoder: ChatEncoder) -> None:
    """A line of nothing but its end is no option: the model is asked once more."""
    engine = Teller(encoder, "\nSo 7.")
    (one,) = followed(lines_of(encoder), engine)
    assert one.text == "\nSo 7."
    assert [request.id for request in engine.requests] == ["02/tea/t0@1"] * 2
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds == [seed_of(5, 2, "tea", "actor", name) for name in ("t0@1", "t0@1.1")]


def test_any_end_of_the_models_own_ends_the_answer(encoder: ChatEncoder) -> None:
    """Some models have several end tokens, and their tokenizer names one."""

    class Ending(Teller):
        async def generate(self, request: Request) -> Completion:
            made = await super().generate(request)
            return replace(made, token_ids=(*made.token_ids[:-1], 1)) if made.finish_reason == "stop" else made

    engine = Ending(encoder, "Add.\nSo 7.")
    assert [one.complete for one in followed(lines_of(encoder), engine)] == [False, True]


@pytest.mark.parametrize("most", range(5, 11))  # a character of this kind has four tokens, and one a blank
def test_a_character_of_several_tokens_is_not_cut(most: int, encoder: ChatEncoder) -> None:
    engine = Teller(encoder, text := "Add \U0001f9ee\U0001f9ee now.\nSo 7.")
    found = followed(lines_of(encoder, max_tokens=most), engine)
    assert found[-1].text == text
    assert engine.decode(found[-1].token_ids) == text
    assert not any("\ufffd" in engine.decode(one.token_ids) for one in found)


def test_what_is_asked(encoder: ChatEncoder) -> None:
    engine = Teller(encoder, "Add them.\n3 + 4 = 7")
    first, second = followed(lines_of(encoder, max_tokens=50), engine)
    one, other = engine.requests
    assert one.prompt_token_ids == first.prompt_token_ids == encoder.user("What is 3 + 4?")
    assert other.prompt_token_ids == one.prompt_token_ids + first.token_ids
    assert (one.sampling.temperature, one.sampling.top_p, one.sampling.stop) == (0.8, 0.9, ("\n",))
    assert (one.sampling.max_tokens, other.sampling.max_tokens) == (50, 50)
    assert second.sampling == other.sampling
    assert second.weight_version == "M0"
    engine = Teller(encoder, "Add them.\n3 + 4 = 7")
    (whole,) = followed(lines_of(encoder), engine, whole=True, temperature=0.0)
    (asked,) = engine.requests
    assert (asked.sampling.stop, asked.sampling.max_tokens, asked.sampling.temperature) == ((), 200, 0.0)
    assert whole.token_ids == second.token_ids


def test_a_long_line_goes_on_and_a_long_answer_is_cut(encoder: ChatEncoder) -> None:
    text = "one two three four five six seven eight nine ten\neleven"
    tokens = encoder.target(text)
    assert len(tokens) == 14
    found = followed(lines_of(encoder, max_tokens=4), Teller(encoder, text))
    assert [len(one.token_ids) for one in found] == [4, 8, 11, 14]
    assert found[-1].complete
    assert found[-1].token_ids == tokens
    cut = followed(lines_of(encoder, most=7, max_tokens=4), Teller(encoder, text))
    assert [len(one.token_ids) for one in cut] == [4, 7]
    assert not cut[-1].complete
    assert cut[-1].token_ids == tokens[:7]


def test_a_model_that_writes_line_breaks_alone_ends(encoder: ChatEncoder) -> None:
    found = followed(lines_of(encoder, most=20), Teller(encoder, "\n" * 999))
    assert len(found[-1].token_ids) >= 20
    assert not found[-1].complete
