"""Examples read from files, and replies of people as a judge takes them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scripted import context_of

from rsrlm.chat import ChatEncoder
from rsrlm.data import prompts
from rsrlm.data.examples import group_of, read_examples, reply_as_response
from rsrlm.data.ranked import RankedPrompt, Reply
from rsrlm.judges.base import Origin
from rsrlm.judges.rubric import Structured, Text
from rsrlm.records import Prompt, group_id, wording
from rsrlm.settings.base import ConfigError


@pytest.fixture
def judge(make_config: Any, encoder: ChatEncoder) -> Text:
    config = make_config(judge={"kind": "structured", "judgements": 3})
    return Structured(config.judge, context_of(config, encoder))


def test_examples_of_a_file(tmp_path: Path, encoder: ChatEncoder, judge: Text) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [
        {"id": "a", "prompt": "Say hi.", "target": "Hi <|im_end|> there"},
        {"instruction": "Say hi.", "response": "Hi.", "target": "Short.\nScore: 4"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (first, second), wordings = read_examples(str(file), encoder, judge)
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
    response = reply_as_response(Reply(id="r", text="Hi.", rank=None), "p", "g", 0)
    asked = Prompt(id="p", text="Say hi.")
    assert second.prompt_token_ids == judge.prompt_of(asked, response, Origin(iteration=0, name="mine.jsonl:2/0"))


def test_empty_lines_of_a_file_are_counted_and_left_out(tmp_path: Path, encoder: ChatEncoder) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('\n{"prompt": "a", "target": "b"}\n \n{"prompt": "ä", "target": "c"}\n', encoding="utf-8")
    found, _ = read_examples(str(file), encoder, None)  # without a judge: nothing here asks for its prompt
    assert [one.id for one in found] == ["mine.jsonl:2", "mine.jsonl:4"]
    assert found[1].prompt_token_ids == encoder.user("ä")


def test_the_lines_that_a_message_shows_can_be_used(tmp_path: Path, encoder: ChatEncoder, judge: Text) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("[]")
    with pytest.raises(ConfigError) as caught:
        read_examples(str(file), encoder, judge)
    lines = re.findall(r"\{.*?\}", str(caught.value))
    file.write_text("\n".join(lines))
    assert [one.kind for one in read_examples(str(file), encoder, judge)[0]] == ["ift", "eft"]


def test_judgements_of_a_file_need_a_judge_that_writes(tmp_path: Path, encoder: ChatEncoder) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"instruction": "a", "response": "b", "target": "Score: 1"}')
    with pytest.raises(ConfigError, match=r"line 1: a judgement .*; set judge.kind to text or structured$"):
        read_examples(str(file), encoder, None)


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
def test_files_that_are_refused(tmp_path: Path, encoder: ChatEncoder, judge: Text, text: str, message: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_examples(str(file), encoder, judge)


def test_a_missing_file_names_the_key(encoder: ChatEncoder, judge: Text) -> None:
    with pytest.raises(ConfigError, match=r"sources path=nowhere.jsonl: .*give a JSONL file"):
        read_examples("nowhere.jsonl", encoder, judge)


def test_a_reply_is_shown_to_the_judge_as_a_finished_answer() -> None:
    response = reply_as_response(Reply(id="r", text="So.", rank=1), "tea", "02/ranked>tea", 3)
    assert (response.id, response.prompt_id, response.index, response.role) == ("02/ranked>tea/3", "tea", 3, "data")
    assert (response.text, response.finish_reason) == ("So.", "stop")
    assert (response.token_ids, response.prompt_token_ids, response.weight_version) == ((), (), "")  # nobody sampled it


@pytest.mark.parametrize("iteration", [0, 7])
def test_no_prompt_has_the_group_of_ranked_data(tmp_path: Path, iteration: int) -> None:
    """Ids and seeds of a prompt's judgements would else be those of a ranked reply's."""
    own = group_of(iteration, RankedPrompt(id="abc", text="?", replies=())).removeprefix(group_id(iteration, ""))
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"id": own, "prompt": "What is tea?"}))
    with pytest.raises(ConfigError, match="must be a text without / # >"):
        prompts.read(file)
