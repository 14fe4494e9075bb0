"""Supervised fine-tuning: examples taken from ranked data and from responses, mixed by weight."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
from scripted import Memory, Scripted, context_of, engines_of, model, run_of

from rsrlm.chat import ChatEncoder
from rsrlm.data.agreement import thin
from rsrlm.data.examples import reply_as_response
from rsrlm.data.ranked import RankedPrompt, Reply
from rsrlm.data.seed_data import Parts
from rsrlm.judges.base import Origin
from rsrlm.judges.rubric import Structured, Text
from rsrlm.recipes.base import Batch, Demand
from rsrlm.recipes.eft import accepted, eft, judge_replies, points_of
from rsrlm.recipes.sft import SFT, NoExamples, ift, length, mixed, positive
from rsrlm.records import Example, Group, Judgement, Prompt, Request, Response, Sampling, Scored, Task, Unparsed
from rsrlm.run import Run
from rsrlm.settings.base import ConfigError
from rsrlm.settings.data import Data

SAMPLING = Sampling(temperature=0.7, top_p=1.0, max_tokens=9, seed=1)


@pytest.fixture
def judge(make_config: Any, encoder: ChatEncoder) -> Text:
    config = make_config(judge={"kind": "structured", "judgements": 3})
    return Structured(config.judge, context_of(config, encoder))


def ranked(name: str, *ranks: float | None) -> RankedPrompt:
    replies = tuple(Reply(id=f"{name}-{i}", text=f"reply {i}", rank=rank) for i, rank in enumerate(ranks))
    return RankedPrompt(id=name, text=f"about {name}?", replies=replies)


def judged(prompt: RankedPrompt, reply: int, *points: float | None, cut: bool = False) -> list[Judgement]:
    return [
        Judgement(
            id=f"00/{prompt.id}/{reply}#{index}", prompt_id=prompt.id, response_id=f"00/{prompt.id}/{reply}",
            index=index, role="judge", judge="additive", text=f"Score: {value}", token_ids=(40 + reply, index, 2),
            finish_reason="length" if cut else "stop", weight_version="M0", sampling=SAMPLING,
            verdict=Unparsed(reason="no score line") if value is None else Scored(points=value),
        )
        for index, value in enumerate(points)
    ]  # fmt: skip


def test_ift_takes_the_best_reply(encoder: ChatEncoder) -> None:
    prompts = [ranked("b", 1, 0), ranked("a", 0, 1), ranked("c", None, None)]
    found, counts = ift(prompts, encoder, Data())
    assert [example.id for example in found] == ["ift/a-0", "ift/b-1"]
    assert found[1] == Example(
        id="ift/b-1",
        kind="ift",
        prompt_token_ids=encoder.user("about b?"),
        target_token_ids=encoder.target("reply 1"),
    )
    assert counts["examples"] == 2
    assert [example.id for example in ift(prompts, encoder, Data(max_ift=1))[0]] == ["ift/a-0"]
    other = RankedPrompt(id="0", text="?", replies=(Reply(id="z", text="z", rank=0), Reply(id="y", text="y", rank=1)))
    assert [example.id for example in ift([*prompts, other], encoder, Data(max_ift=1))[0]] == ["ift/z"]


def test_eft_keeps_what_agrees_with_people(judge: Text) -> None:
    good, bad, cut = ranked("good", 0, 1), ranked("bad", 0, 1), ranked("cut", 0, 1)
    judgements = {
        "good-0": judged(good, 0, 5.0, None, 4.0), "good-1": judged(good, 1, 2.0, 2.0, 1.0),
        "bad-0": judged(bad, 0, 1.0, 1.0, 1.0), "bad-1": judged(bad, 1, 2.0, 2.0, 2.0),
        "cut-0": judged(cut, 0, 5.0, 5.0, 5.0, cut=True), "cut-1": judged(cut, 1, 1.0, 1.0, 1.0),
    }  # fmt: skip
    found, counts = accepted([cut, bad, good], judgements, Data(accept="order"), seed=0)
    # means 4.5 and 1.67: nearest are 5 (the first of two equally near) and 2
    assert [one.judgement.id for one in found] == ["00/good/0#0", "00/good/1#0"]
    assert counts == {
        "judgements": 18,
        "judgements unreadable or cut": 4,
        "prompts accepted": 1,
        "prompts refused: scores in another order": 1,
        "prompts refused: a ranked reply without readable judgement": 1,
        "judgements accepted": 2,
        "thinned as the most common score": 0,
        "kept": 2,
    }
    asked = Prompt(id="good", text=good.text)
    assert eft(found, judge, 2) == [
        Example(
            id=f"00/good/{index}#0",
            kind="eft",
            prompt_token_ids=judge.prompt_of(
                asked,
                reply_as_response(good.replies[index], "good", "02/ranked>good", index),
                Origin(iteration=2, name=f"02/ranked>good/{index}"),
            ),
            target_token_ids=(40 + index, 0, 2),  # the judge's own tokens
        )
        for index in (0, 1)
    ]


def test_replies_that_nobody_ranked_or_judged() -> None:
    """One without rank is not counted; one that was to be judged and was not is unreadable."""
    prompt, half = ranked("tea", 0, None, 1), ranked("half", 0, 1)
    judgements = {
        "tea-0": judged(prompt, 0, 5.0), "tea-1": judged(prompt, 1, None), "tea-2": judged(prompt, 2, 1.0),
        "half-0": judged(half, 0, 5.0),
    }  # fmt: skip
    found, counts = accepted([prompt, half], judgements, Data(), seed=0)
    assert [(one.prompt.id, one.reply.id, one.index) for one in found] == [("tea", "tea-0", 0), ("tea", "tea-2", 2)]
    assert (counts["judgements"], counts["judgements unreadable or cut"]) == (3, 0)
    assert counts["prompts refused: a ranked reply without readable judgement"] == 1


def test_what_is_dropped_is_counted() -> None:
    """Two prompts that are refused for the same reason, and three judgements with one text."""
    refused = [ranked(name, 0, 1) for name in ("a", "b")]
    prompt = ranked("tea", 0, 1)
    judgements = {
        prompt.replies[0].id: judged(prompt, 0, 5.0, 5.0, 5.0),
        prompt.replies[1].id: judged(prompt, 1, 1.0, 2.0, 0.0),
    }
    found, counts = accepted([*refused, prompt], judgements, Data(eft_per_reply=3, accept="pairs"), seed=0)
    assert len(found) == 4
    assert counts["repeated texts"] == 2
    assert [number for reason, number in counts.items() if reason.startswith("prompts refused: ")] == [2]


def test_one_text_is_one_example_of_a_reply() -> None:
    """The judge wrote "Score: 5" twice about the first reply, and "Score: 1" and "Score: 2" about the second."""
    prompt = ranked("tea", 0, 1)
    judgements = {
        prompt.replies[0].id: judged(prompt, 0, 5.0, 5.0),
        prompt.replies[1].id: judged(prompt, 1, 1.0, 2.0),
    }
    found, counts = accepted([prompt], judgements, Data(eft_judgements=2, eft_per_reply=2, accept="pairs"), seed=0)
    assert [one.judgement.id for one in found] == ["00/tea/0#0", "00/tea/1#0", "00/tea/1#1"]
    assert (counts["repeated texts"], counts["judgements accepted"]) == (1, 3)


def test_eft_is_thinned_and_capped() -> None:
    prompts = [ranked(f"p{i}", 0, 1) for i in range(8)]
    judgements = {}
    for prompt in prompts:
        judgements |= {f"{prompt.id}-0": judged(prompt, 0, 4.0), f"{prompt.id}-1": judged(prompt, 1, 3.0)}
    for prompt in prompts[:2]:
        judgements[f"{prompt.id}-1"] = judged(prompt, 1, 1.0)
    # 8 of score 4, 6 of 3, 2 of 1: a share of 0.4 leaves 5 of the 4s beside the 8 others
    found, counts = accepted(prompts, judgements, Data(most_common=0.4), seed=0)
    assert Counter(points_of(one.judgement) for one in found) == {4.0: 5, 3.0: 6, 1.0: 2}
    assert (counts["thinned as the most common score"], counts["prompts accepted"]) == (3, 8)
    drawn = [accepted(prompts, judgements, Data(most_common=0.4), seed=seed)[0] for seed in (0, *range(5))]
    assert drawn[0] == drawn[1] == found
    assert any(one != found for one in drawn)
    capped, counts = accepted(prompts, judgements, Data(max_eft=7), seed=0)
    assert (len(capped), counts["over data.max_eft"], counts["kept"]) == (7, 9, 7)
    assert accepted(prompts, judgements, Data(max_eft=7), seed=0)[0] == capped
    everything, counts = accepted(prompts, judgements, Data(max_eft=16), seed=0)
    assert everything == accepted(prompts, judgements, Data(), seed=0)[0]
    assert "over data.max_eft" not in counts


def example(name: str) -> Example:
    return Example(id=name, kind="ift", prompt_token_ids=(1, 2), target_token_ids=(3, 2))


def test_weights_repeat_and_draw() -> None:
    a, b = [example(f"a{i}") for i in range(10)], [example(f"b{i}") for i in range(4)]
    items = mixed([("a", 0.5, a), ("b", 2.25, b)], 2, 0, 0)
    found = Counter(item.id for item in items)
    assert sum(found[one.id] for one in a) == 5
    assert max(found[one.id] for one in a) == 1
    assert sorted(found[one.id] for one in b) == [2, 2, 2, 3]
    assert mixed([("a", 0.5, a[::-1]), ("b", 2.25, b[::-1])], 2, 0, 0) == items
    assert mixed([("a", 0.5, a), ("b", 2.25, b)], 2, 0, 1) != items
    assert len(mixed([("a", 1.0, a[:2])], 2, 0, 0)) == 2  # as many as the minimum are enough
    with pytest.raises(NoExamples, match=r"c gave 1 examples, fewer than data\.minimum=2; add data, or lower it$"):
        mixed([("c", 1.0, a[:1])], 2, 0, 0)
    with pytest.raises(NoExamples, match=r"iteration 3: the weights of sources leave no example"):
        mixed([("a", 0.01, a)], 2, 0, 3)


def test_a_resumed_run_mixes_as_before() -> None:
    """The order and the draw are part of a run: no release may change them while runs go on."""
    a, b = [example(f"a{i}") for i in range(4)], [example(f"b{i}") for i in range(3)]
    items = mixed([("a", 0.5, a), ("b", 1.0, b)], 1, 5, 2)
    assert [item.id for item in items] == ["a1", "b1", "b0", "b2", "a0"]


def test_positive_takes_complete_responses_with_the_highest_score() -> None:
    def response(index: int, cut: bool = False, text: str = "x") -> Response:
        return Response(
            id=f"00/p/{index}", prompt_id="p", index=index, role="actor", text=text, token_ids=(7, index),
            prompt_token_ids=(1,), finish_reason="length" if cut else "stop", weight_version="M0", sampling=SAMPLING,
        )  # fmt: skip

    responses = (response(0), response(1, cut=True), response(2), response(3, text=" "), response(4))
    prompt = ranked("p", 0)
    judgements = (
        *judged(prompt, 0, 5.0, 5.0), *judged(prompt, 1, 5.0, 5.0), *judged(prompt, 2, 5.0, 4.0),
        *judged(prompt, 3, 5.0, 5.0), *judged(prompt, 4, None, 5.0),
    )  # fmt: skip
    group = Group(
        id="00/p", iteration=0, prompt=Prompt(id="p", text="?"), responses=responses, judgements=judgements,
        no_pair_reason="x",
    )  # fmt: skip
    assert positive([group], 5.0) == [
        Example(id=f"00/p/{index}", kind="positive", prompt_token_ids=(1,), target_token_ids=(7, index))
        for index in (0, 4)
    ]
    assert [one.id for one in positive([group], 4.5)] == ["00/p/0", "00/p/2", "00/p/4"]


# -- an iteration ------------------------------------------------------------------------------------------------------

RANKED = [ranked(f"t{i}", 0, 1) for i in range(6)]
PARTS = Parts(ift=tuple(RANKED[:3]), eft=tuple(RANKED[3:]), evaluation=(), counts={})
PROMPTS = [Prompt(id=f"p{i}", text=f"Say {i}.") for i in range(4)]


def answer(shown: dict[str, str], request: Request, held: str) -> str:
    """People's first reply is worth 5, the second 1; of the model's own answers the first has 5 points, others 2."""
    if "response" not in shown:
        return f"Answer {request.id[-1]} of {held}."
    good = shown["response"] in ("reply 0", f"Answer 0 of {held}.")
    low = 1 if shown["response"].startswith("reply") else 2
    return f"By {request.id[-1]}.\nScore: {5 if good else low}"


@pytest.fixture
def iterate(make_config: Any, encoder: ChatEncoder) -> Any:
    def make(
        *sources: Any, log: Any = None, files: Any = None, tasks: bool = False, engine: Any = None, **changes: Any
    ) -> tuple[Batch, Run, Scripted]:
        config = make_config(
            **{
                "judge": {"kind": "structured", "judgements": 2, "max_tokens": 60},
                "data": {"trees": "t.jsonl", "minimum": 1},
                "steps": [{"recipe": "sft", "sources": list(sources)}],
                "engine": {"max_model_len": 1024},
                **changes,
            }
        )
        context = context_of(config, encoder)
        recipe = SFT(config.planned[0].config, context, context, PARTS, files)
        engine = engine or Scripted(encoder.tokenizer, answer)
        run = run_of(engine, log)
        of = [Task(iteration=2, prompt=prompt) for prompt in PROMPTS] if tasks else []
        return asyncio.run(recipe.iteration(run, 2, model("M2"), of)), run, engine

    return make


def demand_of(make_config: Any, encoder: ChatEncoder, *sources: Any, files: Any = None, **data: Any) -> Demand:
    config = make_config(
        judge={"kind": "structured", "judgements": 2, "max_tokens": 60},
        data={"trees": "t.jsonl", "minimum": 1, **data},
        steps=[{"recipe": "sft", "sources": list(sources)}],
        engine={"max_model_len": 1024},
    )
    context = context_of(config, encoder)
    return SFT(config.planned[0].config, context, context, PARTS, files).demand(10)


def test_what_a_plan_says(make_config: Any, encoder: ChatEncoder) -> None:
    """Ten prompts with two responses of 24 tokens, two judgements each; 3 questions with a best reply, and 6 replies to
    be judged, three times each."""
    half = {"path": "eft", "weight": 0.5}
    everything = demand_of(make_config, encoder, "ift", half, {"path": "positive", "weight": 2.0})
    assert everything.requests == {"actor": (20, 24), "judge": (40 + 18, 60)}
    assert everything.items == 3 + 3 + 40
    assert everything.item_tokens == 400 + 1024 + 60  # a judge's prompt with a reply that fills the engine
    ranked_data = demand_of(make_config, encoder, "ift", half, max_chars=2002, max_ift=2, eft_per_reply=2)
    assert ranked_data.requests == {"actor": (0, 24), "judge": (18, 60)}
    assert (ranked_data.items, ranked_data.item_tokens) == (2 + 6, 400 + 500 + 60)
    assert demand_of(make_config, encoder, "eft", max_eft=4).items == 4
    best = demand_of(make_config, encoder, "ift")
    assert (best.requests, best.items) == ({"actor": (0, 24), "judge": (0, 60)}, 3)
    files = demand_of(make_config, encoder, {"path": "x.jsonl", "weight": 1.5}, files={"x.jsonl": [example("a")] * 5})
    assert files.items == 8


def test_a_template_that_prints_data_is_for_no_replies(make_config: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    template = tmp_path / "with.jinja"
    template.write_text("{{ instruction }} {{ data.answer }} {{ response }} {{ fence }}\nScore: <0-5>")
    config = make_config(
        judge={"kind": "text", "template": str(template)},
        data={"trees": "t.jsonl"},
        steps=[{"recipe": "sft", "sources": ["ift", "eft"]}],
    )
    context = context_of(config, encoder)
    with pytest.raises(ConfigError, match=r"data\.answer .*cannot be judged with it; use a template without it$"):
        SFT(config.planned[0].config, context, context, PARTS)
    SFT(config.planned[0].config.model_copy(update={"sources": config.planned[0].config.sources[:1]}), context, context)


def test_an_iteration_on_ift_asks_nobody(iterate: Any, encoder: ChatEncoder) -> None:
    batch, run, engine = iterate("ift")
    assert engine.requests == engine.holds == []
    assert batch.items == mixed([("ift", 1.0, ift(PARTS.ift, encoder, Data())[0])], 1, 0, 2)
    assert {one.id for one in batch.items} == {f"ift/t{i}-0" for i in range(3)}
    assert batch.groups == []
    said = f"iteration 2: source ift: {batch.measures['examples']['ift']}"
    assert said in cast(Any, run.screen).lines
    counts = {"ift": {"examples": 3, "longer than engine.max_model_len": 0, "used": 3}}
    assert {name: batch.measures["examples"]["ift"][name] for name in counts["ift"]} == counts["ift"]
    assert cast(Any, run).events == [{"event": "examples", "iteration": 2, "sources": batch.measures["examples"]}]


def test_an_iteration_on_eft_imitates_the_model_that_it_starts_from(iterate: Any, encoder: ChatEncoder) -> None:
    """Three judgements of each ranked reply, of which one is kept; a resume asks for none of them."""
    log = Memory()
    batch, run, engine = iterate("eft", log=log)
    assert engine.holds == ["M2"]
    asked = {request.id: request for request in engine.requests}
    assert set(asked) == {f"02/ranked>t{i}/{reply}#{n}" for i in (3, 4, 5) for reply in (0, 1) for n in range(3)}
    assert {one.id for one in batch.items} == {f"02/ranked>t{i}/{reply}#0" for i in (3, 4, 5) for reply in (0, 1)}
    for one in batch.items:
        assert isinstance(one, Example)
        assert one.prompt_token_ids == asked[one.id].prompt_token_ids
        points = 5 if "/0#" in one.id else 1
        assert encoder.tokenizer.decode(one.target_token_ids[:-1]) == f"By 0.\nScore: {points}"
    assert batch.measures["examples"]["eft"]["judgements"] == 18
    assert cast(Any, run.screen).totals == [("iteration 2", {"judge": 18})]
    assert [tick[:2] for tick in cast(Any, run.screen).ticks] == [("judge", 1)] * 18
    again, _, engine = iterate("eft", log=log)
    assert (again, engine.requests) == (batch, [])


def test_judgements_are_thinned_by_the_seed_of_the_run(iterate: Any) -> None:
    """Of three judgements each that say 5 and 1, a quarter may say 5: one beside the other three."""
    fives = [(f"02/ranked>t{i}/0#0", 5.0) for i in (3, 4, 5)]
    found = set()
    for seed in range(4):
        changes = {"data": {"trees": "t.jsonl", "minimum": 1, "most_common": 0.25}, "seed": seed}
        batch, _, _ = iterate("eft", **changes)
        ones = {f"02/ranked>t{i}/1#0" for i in (3, 4, 5)}
        (kept,) = {one.id for one in batch.items} - ones
        ranked_ones = [(name, 1.0) for name in ones]
        assert {kept} | ones == thin([*fives, *ranked_ones], 0.25, seed)
        found.add(kept)
    assert len(found) > 1


def test_judgements_of_a_reply_go_to_one_replica_together(judge: Text, encoder: ChatEncoder) -> None:
    class Noting(Scripted):
        async def generate_all(self, requests: Any) -> Any:
            calls.append([request.id for request in requests])
            return [await self.generate(request) for request in requests]

    calls: list[list[str]] = []
    engines = engines_of(Noting(encoder.tokenizer, answer))
    found = asyncio.run(judge_replies([ranked("t", 0, None, 1)], judge, engines, 2, 4))
    assert {name: [one.index for one in judgements] for name, judgements in found.items()} == {
        "t-0": [0, 1, 2, 3], "t-2": [0, 1, 2, 3],
    }  # fmt: skip
    assert calls == [[f"02/ranked>t/{reply}#{index}" for index in range(4)] for reply in (0, 2)]


def test_an_iteration_on_positive_answers_prompts(iterate: Any) -> None:
    batch, _, engine = iterate({"path": "positive", "weight": 2.0}, tasks=True)
    assert sorted(one.id for one in batch.items) == sorted([f"02/p{i}/0" for i in range(4)] * 2)
    assert [group.id for group in batch.groups] == [f"02/p{i}" for i in range(4)]
    assert batch.measures["examples"]["positive"] == {
        "responses": 8, "longer than engine.max_model_len": 0, "used": 4,
    }  # fmt: skip
    assert engine.holds == ["M2"]


def test_longer_examples_than_an_engine_takes_are_left_out(iterate: Any) -> None:
    """An example that fills the engine's room to its last token is the longest that there is."""

    def long(name: str, tokens: int) -> Example:
        return Example(id=name, kind="ift", prompt_token_ids=(1,) * (tokens - 2), target_token_ids=(3, 2))

    files = {"x.jsonl": [long("short", 3), long("full", 1024), long("over", 1025)]}
    batch, _, _ = iterate("x.jsonl", files=files)
    assert {one.id for one in batch.items} == {"short", "full"}
    assert max(length(one) for one in batch.items) == 1024
    assert batch.measures["examples"] == {"x.jsonl": {"longer than engine.max_model_len": 1, "used": 2}}
    with pytest.raises(NoExamples, match=r"iteration 2: source x\.jsonl gave 2 examples, fewer than data\.minimum=3"):
        iterate("x.jsonl", files=files, data={"minimum": 3})
