"""Judges of two texts: what is asked, and the record of each verdict. The engines are scripted."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from scripted import Scripted, context_of, engines_of

from rsrlm.chat import ChatEncoder
from rsrlm.judges.pairwise import Match, Pairwise, duel_judge, meta_judge, winner_of
from rsrlm.recipes.meta_rewarding import Meta
from rsrlm.records import Judgement, Preferred, Request, Unparsed
from rsrlm.settings.base import ConfigError

FIELDS = {"instruction": "Say tea.", "response_a": "good", "response_b": "bad"}
MATCH = Match(
    id="a>b", prompt_id="tea", response_id="M1/tea/0", index=4, role="duel", fields=FIELDS, seed=7, fence_seed=8,
    priority=3,
)  # fmt: skip
SWAPPED = replace(MATCH, id="b>a", fields={**FIELDS, "response_a": "bad", "response_b": "good"}, seed=9)


def verdicts(judge: Pairwise, engine: Any, *matches: Match) -> tuple[Judgement, ...]:
    return asyncio.run(judge(engines_of(engine), matches))


SHARES = {"A": pytest.approx(7 / 9), "B": pytest.approx(2 / 9)}  # of what `Scripted` gives the letters


def likes_good(shown: dict[str, str], request: Request, held: str) -> str:
    side = "A" if shown["response A"] == "good" else "B"
    return side if request.label_ids else f"Because.\nWinner: {side}"


@pytest.mark.parametrize(("read", "tokens"), [("letters", 1), ("text", 50)])
def test_the_record_of_a_verdict(make_config: Any, encoder: ChatEncoder, read: str, tokens: int) -> None:
    config = make_config(evaluate={"judge": {"read": read, "max_tokens": 50}})
    judge = duel_judge(config, context_of(config, encoder))
    engine = Scripted(encoder.tokenizer, likes_good)
    first, second = verdicts(judge, engine, MATCH, SWAPPED)
    template = {"letters": "pairwise (letters)", "text": "pairwise_text (text)"}[read]
    for judgement, request, match, winner in zip(
        (first, second), engine.requests, (MATCH, SWAPPED), ("A", "B"), strict=True
    ):
        assert (request.id, request.role, request.priority) == (match.id, "duel", 3)
        assert (request.sampling.seed, request.sampling.max_tokens) == (match.seed, tokens)
        assert (request.sampling.temperature, request.sampling.top_p) == (0.0, 1.0)
        assert judgement == Judgement(
            id=match.id, prompt_id="tea", response_id="M1/tea/0", index=4, role="duel", judge=template,
            text=likes_good({"response A": match.fields["response_a"]}, request, "M0"), token_ids=judgement.token_ids,
            finish_reason="stop", weight_version="M0", sampling=request.sampling,
            verdict=Preferred(winner=winner, share=SHARES[winner] if read == "letters" else None),  # type: ignore
        )  # fmt: skip
        assert winner_of(judgement) == winner
    assert encoder.tokenizer.decode(first.token_ids[:-1]) == first.text


def test_what_cannot_be_read_is_said(make_config: Any, encoder: ChatEncoder) -> None:
    config = make_config(evaluate={"judge": {"read": "text"}}, engine={"max_model_len": 2048})
    judge = duel_judge(config, context_of(config, encoder))
    (found,) = verdicts(judge, Scripted(encoder.tokenizer, lambda *_: "Neither of them."), MATCH)
    assert found.verdict == winner_of(found) == Unparsed(reason="no winner line")
    letters = make_config()
    judge = duel_judge(letters, context_of(letters, encoder))
    (found,) = verdicts(judge, Scripted(encoder.tokenizer, lambda *_: "tie"), MATCH)
    assert found.verdict == Preferred(winner="tie", share=0.5)


def test_only_what_fits_is_asked(make_config: Any, encoder: ChatEncoder) -> None:
    """In one call, in order; the others have their place in the result all the same."""
    config = make_config()
    judge = duel_judge(config, context_of(config, encoder))
    long = replace(MATCH, id="long", fields={**FIELDS, "response_a": "good " * 600})
    engine = Scripted(encoder.tokenizer, likes_good)
    found = verdicts(judge, engine, MATCH, long, SWAPPED)
    assert [request.id for request in engine.requests] == ["a>b", "b>a"]
    assert [one.id for one in found] == ["a>b", "long", "b>a"]
    assert [winner_of(one) for one in found] == ["A", Unparsed(reason="judge prompt too long"), "B"]
    assert (found[1].weight_version, found[1].text, found[1].token_ids) == ("", "", ())
    engine = Scripted(encoder.tokenizer, likes_good)
    assert [one.verdict for one in verdicts(judge, engine, long)] == [Unparsed(reason="judge prompt too long")]
    assert verdicts(judge, engine) == ()
    assert engine.requests == []


def test_a_server_is_asked_in_text_however_long(make_config: Any, encoder: ChatEncoder) -> None:
    """It tokenises for itself, and its context is not ours."""
    server = {"endpoint": {"url": "http://localhost:1/v1", "model": "x"}, "read": "text"}
    config = make_config(evaluate={"judge": server})
    judge = duel_judge(config, context_of(config, encoder))
    engine = Scripted(encoder.tokenizer, lambda *_: "Winner: A")
    long = replace(MATCH, fields={**FIELDS, "response_a": "good " * 600})
    (found,) = verdicts(judge, engine, long)
    assert found.verdict == Preferred(winner="A")
    assert "good good" in engine.requests[0].text
    assert engine.requests[0].text in encoder.tokenizer.decode(engine.requests[0].prompt_token_ids)
    assert judge.needs(9) == 0
    letters = make_config(evaluate={"duel": False, "judge": {**server, "read": "letters"}})
    with pytest.raises(ConfigError, match=r"evaluate\.judge\.read=letters: an endpoint compares in text; set"):
        duel_judge(letters, context_of(letters, encoder))


def test_a_structured_judge_sends_its_regex_and_others_none(make_config: Any, encoder: ChatEncoder) -> None:
    context = context_of(make_config(), encoder)
    match = replace(
        MATCH, role="meta",
        fields={"instruction": "Why?", "response": "So.", "judgement_a": "Score: 1", "judgement_b": "Score: 2"},
    )  # fmt: skip
    for read, regex, labels in (("text", False, 0), ("structured", True, 0), ("letters", False, 2)):
        engine = Scripted(encoder.tokenizer, lambda _, request, __: "A" if request.label_ids else "Winner: A")
        judge = meta_judge(Meta(read=read, max_tokens=30), context)  # type: ignore[arg-type]
        (found,) = verdicts(judge, engine, match)
        assert winner_of(found) == "A"
        (request,) = engine.requests
        assert (request.regex is not None, len(request.label_ids), request.role) == (regex, labels, "meta")
        assert request.sampling.max_tokens == (1 if labels else 30)
