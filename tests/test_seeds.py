"""Examples for supervised fine-tuning: read from files, taken from ranked data, mixed by weight."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rsrlm import seeds
from rsrlm.ask import Judging
from rsrlm.chat import ChatEncoder
from rsrlm.config import ConfigError, Data
from rsrlm.data import prompts
from rsrlm.data.ranked import RankedPrompt, Reply
from rsrlm.model import load_tokenizer
from rsrlm.records import Example, Group, Judgement, Prompt, Response, Sampling, Scored, Unparsed, group_id, wording

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=9, seed=1)


@pytest.fixture(scope="module")
def encoder(smollm2: Path) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(smollm2, False))


@pytest.fixture
def judge(make_config: Any, encoder: ChatEncoder) -> Judging:
    return Judging(make_config(judge={"read": "structured", "judgements": 3}), encoder)


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


def test_examples_of_a_file(tmp_path: Path, encoder: ChatEncoder, judge: Judging) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [
        {"id": "a", "prompt": "Say hi.", "target": "Hi <|im_end|> there"},
        {"instruction": "Say hi.", "response": "Hi.", "target": "Short.\nScore: 4"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (first, second), wordings = seeds.read_file(str(file), encoder, judge)
    assert wordings == {wording("say  HI.")}
    assert (first.id, first.kind, second.id, second.kind) == ("a", "ift", "mine.jsonl:2", "eft")
    assert first.prompt_token_ids == encoder.user("Say hi.")
    end = encoder.tokenizer.eos_token_id
    # the end token once, at the end: one in the text is text
    assert (first.target_token_ids.count(end), first.target_token_ids[-1]) == (1, end)
    assert encoder.tokenizer.decode(second.target_token_ids[:-1]) == "Short.\nScore: 4"
    shown = encoder.tokenizer.decode(second.prompt_token_ids)
    assert "scale from 0 to 5" in shown
    assert "\nHi.\n</response" in shown
    # the fence of the example's own id, always the same: a resumed run trains on the same tokens
    response = seeds.reply_as_response(Reply(id="r", text="Hi.", rank=None), "p", "g", 0)
    asked = Prompt(id="p", text="Say hi.")
    assert second.prompt_token_ids == judge.prompt_of(asked, response, group="mine.jsonl:2", iteration=0)


def test_empty_lines_of_a_file_are_counted_and_left_out(tmp_path: Path, encoder: ChatEncoder) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('\n{"prompt": "a", "target": "b"}\n \n{"prompt": "ä", "target": "c"}\n', encoding="utf-8")
    found, _ = seeds.read_file(str(file), encoder, None)  # without a judge: nothing here asks for its prompt
    assert [one.id for one in found] == ["mine.jsonl:2", "mine.jsonl:4"]
    assert found[1].prompt_token_ids == encoder.user("ä")


def test_the_lines_that_a_message_shows_can_be_used(tmp_path: Path, encoder: ChatEncoder, judge: Judging) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("[]")
    with pytest.raises(ConfigError) as caught:
        seeds.read_file(str(file), encoder, judge)
    lines = re.findall(r"\{.*?\}", str(caught.value))
    file.write_text("\n".join(lines))
    assert [one.kind for one in seeds.read_file(str(file), encoder, judge)[0]] == ["ift", "eft"]


def test_judgements_of_a_file_need_a_judge_that_writes(tmp_path: Path, encoder: ChatEncoder) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"instruction": "a", "response": "b", "target": "Score: 1"}')
    with pytest.raises(ConfigError, match=r"line 1: a judgement .*; set judge.read to text or structured$"):
        seeds.read_file(str(file), encoder, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no examples in it"),
        ('{"prompt": "a", "target": "b"}\n{"prompt": ', "line 2: not JSON"),
        ('{"prompt": "a"}', "line 1: must be an object such as"),
        ('{"prompt": 3, "target": "b"}', "line 1: must be an object such as"),
        ('{"instruction": "a", "target": "b"}', "line 1: must be an object such as"),
        ("[1]", "line 1: must be an object such as"),
        (
            '{"id": "x", "prompt": "a", "target": "b"}\n\n{"id": "x", "prompt": "c", "target": "d"}',
            "line 3: id 'x' stands in line 1 already",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, encoder: ChatEncoder, judge: Judging, text: str, message: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        seeds.read_file(str(file), encoder, judge)


def test_a_missing_file_names_the_key(encoder: ChatEncoder, judge: Judging) -> None:
    with pytest.raises(ConfigError, match=r"sft.sources path=nowhere.jsonl: .*give a JSONL file"):
        seeds.read_file("nowhere.jsonl", encoder, judge)


def test_parts_never_overlap_and_long_ones_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "x" * (1 + i % 7), "rejected": "y"} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = seeds.divide(Data(trees=str(file), ift_share=0.5, eft_share=0.25, max_chars=5))
    ids = [prompt.id for part in (parts.ift, parts.eft, parts.evaluation) for prompt in part]
    assert len(ids) == len(set(ids)) == 60  # the rejected reply is short enough everywhere
    assert all((parts.ift, parts.eft, parts.evaluation))
    lengths = Counter(len(prompt.replies) for part in (parts.ift, parts.eft, parts.evaluation) for prompt in part)
    assert lengths == {1: 16, 2: 44}  # chosen ones of 6 and 7 characters are gone
    none = seeds.divide(Data(trees=str(file), max_chars=1))
    assert (none.ift, none.eft, none.evaluation) == ((), (), ())
    assert none.counts["prompts longer than data.max_chars, or without a shorter reply"] == 60


def test_ift_takes_the_best_reply(encoder: ChatEncoder) -> None:
    prompts = [ranked("b", 1, 0), ranked("a", 0, 1), ranked("c", None, None)]
    found, counts = seeds.ift(prompts, encoder, Data())
    assert [example.id for example in found] == ["ift/a-0", "ift/b-1"]
    assert found[1].target_token_ids == encoder.target("reply 1")
    assert counts["examples"] == 2
    assert [example.id for example in seeds.ift(prompts, encoder, Data(max_ift=1))[0]] == ["ift/a-0"]


def test_eft_keeps_what_agrees_with_people(judge: Judging) -> None:
    good, bad, cut = ranked("good", 0, 1), ranked("bad", 0, 1), ranked("cut", 0, 1)
    judgements = {
        "good-0": judged(good, 0, 5.0, None, 4.0), "good-1": judged(good, 1, 2.0, 2.0, 1.0),
        "bad-0": judged(bad, 0, 1.0, 1.0, 1.0), "bad-1": judged(bad, 1, 2.0, 2.0, 2.0),
        "cut-0": judged(cut, 0, 5.0, 5.0, 5.0, cut=True), "cut-1": judged(cut, 1, 1.0, 1.0, 1.0),
    }  # fmt: skip
    found, counts = seeds.accepted([cut, bad, good], judgements, Data(accept="order"), seed=0)
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
    assert seeds.eft(found, judge, 2) == [
        Example(
            id=f"00/good/{index}#0",
            kind="eft",
            prompt_token_ids=judge.prompt_of(
                asked,
                seeds.reply_as_response(good.replies[index], "good", "02/ranked>good", index),
                group="02/ranked>good",
                iteration=2,
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
    found, counts = seeds.accepted([prompt, half], judgements, Data(), seed=0)
    assert [(one.prompt.id, one.reply.id, one.index) for one in found] == [("tea", "tea-0", 0), ("tea", "tea-2", 2)]
    assert (counts["judgements"], counts["judgements unreadable or cut"]) == (3, 0)
    assert counts["prompts refused: a ranked reply without readable judgement"] == 1


def test_a_reply_is_shown_to_the_judge_as_a_finished_answer() -> None:
    response = seeds.reply_as_response(Reply(id="r", text="So.", rank=1), "tea", "02/ranked>tea", 3)
    assert (response.id, response.prompt_id, response.index, response.role) == ("02/ranked>tea/3", "tea", 3, "data")
    assert (response.text, response.finish_reason) == ("So.", "stop")
    assert (response.token_ids, response.prompt_token_ids, response.weight_version) == ((), (), "")  # nobody sampled it


@pytest.mark.parametrize("iteration", [0, 7])
def test_no_prompt_has_the_group_of_ranked_data(tmp_path: Path, iteration: int) -> None:
    """Else a prompt's journalled judgements would be taken for those of a ranked reply."""
    own = seeds.group_of(iteration, ranked("abc", 0)).removeprefix(group_id(iteration, ""))
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"id": own, "prompt": "What is tea?"}))
    with pytest.raises(ConfigError, match="must be a text without / # >"):
        prompts.read(file)


def test_one_text_is_one_example_of_a_reply() -> None:
    """The judge wrote "Score: 5" twice about the first reply, and "Score: 1" and "Score: 2" about the second."""
    prompt = ranked("tea", 0, 1)
    judgements = {
        prompt.replies[0].id: judged(prompt, 0, 5.0, 5.0),
        prompt.replies[1].id: judged(prompt, 1, 1.0, 2.0),
    }
    found, counts = seeds.accepted(
        [prompt], judgements, Data(eft_judgements=2, eft_per_reply=2, accept="pairs"), seed=0
    )
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
    found, counts = seeds.accepted(prompts, judgements, Data(most_common=0.4), seed=0)
    assert Counter(seeds.points_of(one.judgement) for one in found) == {4.0: 5, 3.0: 6, 1.0: 2}
    assert (counts["thinned as the most common score"], counts["prompts accepted"]) == (3, 8)
    drawn = [seeds.accepted(prompts, judgements, Data(most_common=0.4), seed=seed)[0] for seed in (0, *range(5))]
    assert drawn[0] == drawn[1] == found
    assert any(one != found for one in drawn)
    capped, counts = seeds.accepted(prompts, judgements, Data(max_eft=7), seed=0)
    assert (len(capped), counts["over data.max_eft"], counts["kept"]) == (7, 9, 7)
    assert seeds.accepted(prompts, judgements, Data(max_eft=7), seed=0)[0] == capped
    everything, counts = seeds.accepted(prompts, judgements, Data(max_eft=16), seed=0)
    assert everything == seeds.accepted(prompts, judgements, Data(), seed=0)[0]
    assert "over data.max_eft" not in counts


def example(name: str) -> Example:
    return Example(id=name, kind="ift", prompt_token_ids=(1, 2), target_token_ids=(3, 2))


def test_weights_repeat_and_draw(make_config: Any) -> None:
    config = make_config(data={"minimum": 2})
    a, b = [example(f"a{i}") for i in range(10)], [example(f"b{i}") for i in range(4)]
    items = seeds.mixed([("a", 0.5, a), ("b", 2.25, b)], config, 0)
    found = Counter(item.id for item in items)
    assert sum(found[one.id] for one in a) == 5
    assert max(found[one.id] for one in a) == 1
    assert sorted(found[one.id] for one in b) == [2, 2, 2, 3]
    assert seeds.mixed([("a", 0.5, a[::-1]), ("b", 2.25, b[::-1])], config, 0) == items
    assert seeds.mixed([("a", 0.5, a), ("b", 2.25, b)], config, 1) != items
    assert len(seeds.mixed([("a", 1.0, a[:2])], config, 0)) == 2  # as many as the minimum are enough
    with pytest.raises(seeds.NoExamples, match=r"source c gave 1 examples, fewer than data.minimum=2"):
        seeds.mixed([("c", 1.0, a[:1])], config, 0)
    with pytest.raises(seeds.NoExamples, match=r"iteration 3: the weights of sft.sources leave no example"):
        seeds.mixed([("a", 0.01, a)], config, 3)


def test_a_resumed_run_mixes_as_before(make_config: Any) -> None:
    """The order and the draw are part of a run: no release may change them while runs go on."""
    config = make_config(data={"minimum": 1}, seed=5)
    items = seeds.mixed(
        [("a", 0.5, [example(f"a{i}") for i in range(4)]), ("b", 1.0, [example(f"b{i}") for i in range(3)])], config, 2
    )
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
        id="00/p", iteration=0, prompt=Prompt(id="p", text="?"), responses=responses, judgements=judgements, pair=None,
        no_pair_reason="x",
    )  # fmt: skip
    assert seeds.positive([group], 5.0) == [
        Example(id=f"00/p/{index}", kind="positive", prompt_token_ids=(1,), target_token_ids=(7, index))
        for index in (0, 4)
    ]
    assert [one.id for one in seeds.positive([group], 4.5)] == ["00/p/0", "00/p/2", "00/p/4"]


def test_longer_examples_than_an_engine_takes_are_left_out() -> None:
    assert seeds.fitting([example("a")], 4) == [example("a")]
    assert seeds.fitting([example("a")], 3) == []
