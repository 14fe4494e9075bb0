"""Replies that people ranked: every shape, what is dropped and counted, and the selection rules by hand."""

import gzip
import itertools
import json
import random
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rsrlm.data import ranked
from rsrlm.data.ranked import RankedPrompt, Read, Reply, accept, ift_examples, part_of, read, thin
from rsrlm.settings.base import ConfigError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TREES = DATA / "openassistant_en_70_trees.jsonl"
ALPACA = DATA / "alpaca_eval_gpt4_preferences_phi2sft.jsonl"


def real(path: Path) -> Path:
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return path


def written(folder: Path, *records: Any, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def message(identifier: str, role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"message_id": identifier, "role": role, "text": f"text of {identifier}", **more}


def tree(identifier: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    prompt = message(identifier, "prompter", **more) | {"replies": list(replies)}
    return {"message_tree_id": identifier, "prompt": prompt}


def flattened(trees: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows, waiting = [], [(one["prompt"], None, one["message_tree_id"]) for one in trees]
    while waiting:
        node, parent, root = waiting.pop()
        own = {name: value for name, value in node.items() if name != "replies"}
        rows.append(own | {"parent_id": parent, "message_tree_id": root})
        waiting += [(reply, node["message_id"], root) for reply in node.get("replies", [])]
    return rows


def as_sets(result: Read) -> dict[str, tuple[str, frozenset[Reply]]]:
    return {prompt.id: (prompt.text, frozenset(prompt.replies)) for prompt in result.prompts}


def ranks(prompt: RankedPrompt) -> list[tuple[str, float | None]]:
    return [(reply.text, reply.rank) for reply in prompt.replies]


# --- real data --------------------------------------------------------------------------------------------------------


def test_open_assistant_trees() -> None:
    trees = [json.loads(line) for line in real(TREES).open(encoding="utf-8")]
    result = read(str(TREES))
    assert result.counts == {
        "deeper turns ignored": len(flattened(trees)) - 70 - 236,
        "prompts kept": 70,
        "prompts read": 70,
        "replies kept": 236,
        "replies kept: synthetic": 13,
        "replies kept: without rank": 3,
        "replies read": 236,
    }
    examples, counts = ift_examples(result.prompts)
    # One tree has replies that nobody ranked.
    assert counts == {"examples": 69, "left out: no ranked reply": 1}
    best = {
        (one["message_tree_id"], reply["text"])
        for one in trees
        for reply in one["prompt"]["replies"]
        if reply.get("rank") == 0
    }
    assert {(prompt.id, reply.text) for prompt, reply in examples} == best


def test_compressed_and_flat_files_and_folders_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = real(TREES).read_bytes()
    trees = [json.loads(line) for line in data.splitlines()]
    rows = flattened(trees)
    random.Random(0).shuffle(rows)  # replies before their questions
    expected = read(str(TREES))
    (tmp_path / "trees.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "trees.json").write_text(json.dumps(trees, indent=1), encoding="utf-8")
    assert read(str(tmp_path / "trees.jsonl.gz")) == expected
    assert read(str(tmp_path / "trees.json")) == expected
    flat = read(written(tmp_path, *rows, name="flat.jsonl"))
    assert as_sets(flat) == as_sets(expected)
    assert flat.counts == expected.counts

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list([{"rank": None} | row for row in rows]).to_parquet(tmp_path / "hub/train-0.parquet")
    assert as_sets(read(str(tmp_path / "hub"))) == as_sets(expected)
    datasets.Dataset.from_list([row | {"lang": 1} for row in rows]).to_parquet(tmp_path / "hub/train-0.parquet")
    with pytest.raises(ConfigError, match=r"hub, row 1: lang must be a text"):
        read(str(tmp_path / "hub"))


def test_alpaca_eval_preferences() -> None:
    result = read(str(real(ALPACA)))
    rows = [json.loads(line) for line in ALPACA.open(encoding="utf-8")]
    assert result.counts == {
        "prompts kept": 805,
        "prompts read": 805,
        "replies kept": 1610,
        "replies kept: without rank": 2,
        "replies read": 1610,
    }
    first = sum(prompt.replies[0].rank == 0 for prompt in result.prompts)
    second = sum(prompt.replies[1].rank == 0 for prompt in result.prompts)
    assert (first, second) == (253, 551)  # and one preference is null
    assert [prompt.text for prompt in result.prompts] == [row["instruction"] for row in rows]
    assert result.prompts[0].replies[0].text == rows[0]["output_1"]


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q?", "chosen": "good", "rejected": "bad"},
        {"instruction": "Q?", "input": "", "chosen": "good", "rejected": "bad"},
        {"question": "Q?", "system": "", "chosen": "good", "rejected": "bad"},
        {
            "conversations": [{"from": "human", "value": "Q?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {
            "prompt": [{"role": "user", "content": "Q?"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {  # the question in both replies, beside it or only there
            "prompt": "Q?",
            "chosen": [{"role": "user", "content": "Q? "}, {"role": "assistant", "content": "good"}],
            "rejected": "bad",
        },
        {
            "chosen": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "bad"}],
        },
        {"prompt": "Q?", "responses": [{"text": "good", "score": 4}, {"text": "bad", "score": 3.5}]},
        {"instruction": "Q?", "responses": [{"response": "good", "rating": 1}, {"response": "bad", "rating": -1}]},
        {"instruction": "Q?", "output_1": "good", "output_2": "bad", "preference": 1.0},
        {"instruction": "Q?", "output_1": "good", "output_2": "bad", "preference": 1.49},
        {"message_tree_id": "t", "prompt": message("t", "prompter") | {"text": "Q?", "replies": [
            message("g", rank=0) | {"text": "good"}, message("b", rank=1) | {"text": "bad"}]}},
    ],
)  # fmt: skip
def test_shapes(tmp_path: Path, record: dict[str, Any]) -> None:
    result = read(written(tmp_path, record))
    assert [prompt.text for prompt in result.prompts] == ["Q?"]
    assert ranks(result.prompts[0]) == [("good", 0.0), ("bad", 1.0)]
    assert result.counts == {"prompts kept": 1, "prompts read": 1, "replies kept": 2, "replies read": 2}


def test_scores_become_ranks_with_ties(tmp_path: Path) -> None:
    scores = [3, 5.0, None, 3.0, 1, 5]
    responses = [{"text": f"r{number}", "score": score} for number, score in enumerate(scores)]
    result = read(written(tmp_path, {"prompt": "Q?", "responses": responses}))
    assert [reply.rank for reply in result.prompts[0].replies] == [1.0, 0.0, None, 1.0, 2.0, 0.0]
    assert result.counts["replies kept: without rank"] == 1


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        (1, (0, 1)),
        (2, (1, 0)),
        (1.5, (0, 0)),
        (0, (0, 0)),
        (1.51, (1, 0)),
        (None, (None, None)),
        (float("nan"), (None, None)),
    ],
)
def test_preferences(tmp_path: Path, preference: float | None, expected: object) -> None:
    row = {"instruction": "Q?", "output_1": "one", "output_2": "two", "preference": preference}
    (prompt,) = read(written(tmp_path, row)).prompts
    assert tuple(reply.rank for reply in prompt.replies) == expected


def test_a_task_keeps_its_material(tmp_path: Path) -> None:
    row = {"instruction": "Sum up.", "input": "Tea is hot.", "chosen": "a", "rejected": "b"}
    assert read(written(tmp_path, row)).prompts[0].text == "Sum up.\n\nTea is hot."


def test_ids_hang_on_the_text_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{number}", "chosen": "same", "rejected": f"b{number}"} for number in range(20)]
    one = read(written(tmp_path, *rows))
    other = read(written(tmp_path, *rows[7:], *reversed(rows[:7])))
    assert as_sets(one) == as_sets(other)
    assert len({reply.id for prompt in one.prompts for reply in prompt.replies}) == 40


def test_ids_fit_into_record_ids(tmp_path: Path) -> None:
    raw = ["plain-id.7", "a/b", "a#b", "a>b", "a\nb", "a\x00b", "a\u2028b", "", "\ud800"]
    trees = [tree(name, message(f"r{name}", text="A"), text=f"Q{n}") for n, name in enumerate(raw)]
    result = read(written(tmp_path, *trees))
    ids = [prompt.id for prompt in result.prompts]
    assert len(ids) == len(set(ids)) == len(raw)
    assert ids[0] == "plain-id.7"
    for identifier in [*ids, *(reply.id for prompt in result.prompts for reply in prompt.replies)]:
        assert identifier
        assert not any(c in "/#>" or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in identifier)


# --- dropped and counted ----------------------------------------------------------------------------------------------


def test_every_reason_is_counted(tmp_path: Path) -> None:
    good = message("good", lang="EN", deleted=False, review_result=True, rank=0)
    deep = message("deep", rank=1) | {"replies": [message("d1") | {"replies": [message("d2")]}, message("d3")]}
    bad = [
        message("b1", lang="de"),
        message("b2", deleted=True),
        message("b3", review_result=False),
        message("b4", text=" \n"),
        message("b5", text=None),
        message("b6", "prompter"),
        message("b7", text="\ud83d"),
        message("good"),
    ]
    source = written(
        tmp_path,
        tree("t1", good, deep, *bad, message("syn", synthetic=True, review_result=None, lang=None), lang="en"),
        tree("t2", message("r2"), lang="de"),
        tree("t3", message("r3"), message("r4"), deleted=True),
        tree("t4", message("r5"), review_result=False),
        tree("t5", text=""),
        tree("t6", message("r6")) | {"prompt": message("t6") | {"replies": [message("r6")]}},
        tree("t1", message("r7")) | {"prompt": message("x", "prompter") | {"replies": [message("r7")]}},
        tree("t7", message("r8"), text="TEXT \n of T1"),
        tree("t8", message("r9", deleted=True)),
        tree("t9", message("r10"), lang="en-US"),
        tree("t10"),
    )
    result = read(source)
    assert [prompt.id for prompt in result.prompts] == ["t1"]
    assert [(reply.id, reply.rank) for reply in result.prompts[0].replies] == [("good", 0), ("deep", 1), ("syn", None)]
    assert result.counts == {
        "deeper turns ignored": 3,
        "prompt dropped: deleted": 1,
        "prompt dropped: duplicate id": 1,
        "prompt dropped: duplicate text": 1,
        "prompt dropped: empty text": 1,
        "prompt dropped: language": 2,
        "prompt dropped: no reply left": 2,
        "prompt dropped: odd role": 1,
        "prompt dropped: review not passed": 1,
        "prompts kept": 1,
        "prompts read": 11,
        "replies kept": 3,
        "replies kept: synthetic": 1,
        "replies kept: without rank": 1,
        "replies read": 20,
        "reply dropped: deleted": 2,
        "reply dropped: duplicate id": 1,
        "reply dropped: empty text": 2,
        "reply dropped: half a surrogate pair": 1,
        "reply dropped: its prompt is dropped": 8,
        "reply dropped: language": 1,
        "reply dropped: odd role": 1,
        "reply dropped: review not passed": 1,
    }
    # None reads every language, and German by name only German and what states no language.
    every = read(source, language=None)
    assert {prompt.id for prompt in every.prompts} == {"t1", "t2", "t9"}
    assert [prompt.id for prompt in read(source, language="de").prompts] == ["t2", "t1", "t7"]


def test_flat_messages_without_a_root(tmp_path: Path) -> None:
    def row(identifier: str, parent: str | None, **more: Any) -> dict[str, Any]:
        role = "prompter" if parent is None else "assistant"
        return message(identifier, role, parent_id=parent, message_tree_id="t") | more

    rows = [
        row("r1", "t"),
        row("lost", "nowhere"),
        row("c1", "c2"),  # a circle
        row("c2", "c1"),
        row("me", "me"),
        row("deep", "r1"),
        row("deeper", "deep"),
        row("t", None, rank=None),
        row("r1", "t", text="again"),
    ]
    result = read(written(tmp_path, *rows))
    assert [(prompt.id, ranks(prompt)) for prompt in result.prompts] == [("t", [("text of r1", None)])]
    assert result.counts["messages ignored: no root"] == 4
    assert result.counts["messages ignored: duplicate id"] == 1
    assert result.counts["deeper turns ignored"] == 2


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {
                "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}],
                "chosen": "a",
                "rejected": "b",
            },
            "prompt dropped: not one question and its answer",
        ),
        ({"conversations": [], "chosen": "a", "rejected": "b"}, "prompt dropped: not one question and its answer"),
        (
            {"prompt": "Q?", "chosen": "a", "rejected": [{"role": "tool", "content": "b"}]},
            "reply dropped: not one question and its answer",
        ),
        ({"prompt": "Q?", "chosen": "a", "rejected": []}, "reply dropped: not one question and its answer"),
        (
            {
                "prompt": "Q?",
                "chosen": "a",
                "rejected": [{"role": "user", "content": "R?"}, {"role": "assistant", "content": "b"}],
            },
            "prompt dropped: replies to different questions",
        ),
        ({"prompt": "Q?", "chosen": "a", "rejected": None}, "reply dropped: empty text"),
        ({"prompt": "Q?", "chosen": "a", "rejected": "a"}, "reply dropped: duplicate id"),
        (
            {
                "prompt": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Q?"}],
                "chosen": "a",
                "rejected": "b",
            },
            "system messages ignored",
        ),
        ({"question": "Q?", "system": "Be.", "chosen": "a", "rejected": "b"}, "system messages ignored"),
    ],
)
def test_other_turns_are_counted(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    counts = read(written(tmp_path, record)).counts
    assert counts[reason] == 1
    assert balanced(counts)


def balanced(counts: Mapping[str, int]) -> bool:
    def dropped(what: str) -> int:
        return sum(number for reason, number in counts.items() if reason.startswith(f"{what} dropped"))

    return counts["prompts read"] == counts["prompts kept"] + dropped("prompt") and (
        counts["replies read"] == counts["replies kept"] + dropped("reply")
    )


# --- hostile ----------------------------------------------------------------------------------------------------------

GOOD = json.dumps(tree("t", message("r"))).encode()
NESTED = b'{"message_tree_id": "u", "prompt": ' + b'{"replies": [' * 5000 + b"]}" * 5000 + b"}"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "no records in it; known shapes: Open Assistant trees"),
        (b"\n \n", "no records in it"),
        (b"[]", "no records in it"),
        (b"[\n1]", "item 1: must be a JSON object, not 1"),
        (b'[{"a": 1},\n{"b" 2}]', r"line 2: not JSON \(Expecting ':' delimiter at column 6\)"),
        (b'{"message', "line 1: not JSON"),
        (GOOD + b'\n\n{"broken"\n', "line 3: not JSON"),
        (GOOD + b"\n\xff\xfe\n", "line 2: not UTF-8"),
        (b"[1,\n2,\n\xff]", "line 3: not UTF-8"),
        (GOOD + b"\n" + NESTED, "line 2: nested too deeply"),
        (b'{"rank": ' + b"9" * 5000 + b"}", "line 1: not readable JSON"),
        (b"3\n", "line 1: must be a JSON object, not 3"),
        (b'"text"\n', "line 1: must be a JSON object"),
        (b'{"text": "only"}', r"line 1: fits no known shape with its keys \['text'\]; known shapes: .*AlpacaEval"),
        (b'{"responses": []}', "line 1: fits no known shape"),
        (GOOD + b'\n{"prompt": "Q?", "chosen": "a", "rejected": "b"}', "line 2: not of the shape of the first record"),
        (b'{"message_tree_id": "t", "prompt": {}}', "line 1: has no message_id"),
        (b'{"message_tree_id": 7, "prompt": {}}', "line 1: message_tree_id must be a text, not 7"),
        (b'{"chosen": "a", "rejected": "b"}', "line 1: has no question"),
        (b'{"prompt": null, "responses": []}', "line 1: has no question"),
        (b'{"prompt": "Q?", "responses": {}}', "responses must be a list, not {}"),
        (b'{"prompt": "Q?", "responses": ["a"]}', "response 1: must be an object with response, not 'a'"),
        (b'{"prompt": "Q?", "responses": [{"score": 1}]}', "response 1: has no response"),
        (b'{"prompt": "Q?", "responses": [{"text": "a", "score": "4"}]}', "response 1: score must be a finite number"),
        (b'{"prompt": "Q?", "responses": [{"text": "a", "score": 1e999}]}', "score must be a finite number or null"),
        (b'{"prompt": "Q?", "responses": [{"text": "a", "score": true}]}', "finite number or null, not True"),
        (
            b'{"prompt": "Q?", "responses": [{"text": "a", "score": 1' + b"0" * 400 + b"}]}",
            "response 1: score must be a finite number",
        ),
        (b'{"prompt": 5, "chosen": "a", "rejected": "b"}', "prompt: must be a text or messages with role and content"),
        (b'{"prompt": "Q?", "chosen": 5, "rejected": "b"}', "chosen: must be a text or messages"),
        (b'{"prompt": "Q?", "chosen": [{}], "rejected": "b"}', "chosen: has no from"),
        (b'{"instruction": "Q?", "output_1": "a", "output_2": "b", "preference": 3}', "preference 3.0 must be from 1"),
        (b'{"instruction": "Q?", "output_1": 1, "output_2": "b", "preference": 1}', "output_1 must be a text, not 1"),
    ],
)
def test_broken_files(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=complaint) as error:
        read(str(path), key="eft.trees")
    assert str(error.value).startswith(f"eft.trees={path}")
    assert len(str(error.value)) < 900


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", 1),
        ("role", None),
        ("message_id", None),
        ("rank", "0"),
        ("deleted", "yes"),
        ("review_result", 1),
        ("lang", ["en"]),
        ("replies", "none"),
        ("replies", [3]),
    ],
)
def test_wrong_types_in_a_tree(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"line 2: .*{field}|line 2: replies must be a list of messages"):
        read(written(tmp_path, tree("a", message("r")), tree("b", message("s") | {field: value})))


def test_long_conversations_are_no_deep_recursion(tmp_path: Path) -> None:
    """Trees nest as deep as JSON can be read; flat messages have no such limit."""
    rows = [message("m0", "prompter", parent_id=None, message_tree_id="m0")]
    rows += [message(f"m{n}", parent_id=f"m{n - 1}", message_tree_id="m0") for n in range(1, 5000)]
    assert read(written(tmp_path, *rows)).counts["deeper turns ignored"] == 4998


def test_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    for data in (GOOD, gzip.compress(GOOD * 9)[:-9], gzip.compress(GOOD)[:12] + b"\x07" * 99):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"cannot be read: .*is it whole, and as its name says"):
            read(str(path))
    (tmp_path / "data.csv").write_text("prompt,chosen")
    with pytest.raises(ConfigError, match=r"data\.csv: not one of \.jsonl, "):
        read(str(tmp_path / "data.csv"))
    with pytest.raises(ConfigError, match="no such file or folder"):
        read(str(tmp_path / "other.jsonl"))
    with pytest.raises(ConfigError, match="no such file or folder"):
        read("")
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), "no-such-owner/no-such-data-set", "a\x00b"):
        with pytest.raises(ConfigError, match="neither a file here nor a data set that loads"):
            read(source)


def test_splits_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    row = {"prompt": "Q?", "chosen": "a", "rejected": "b"}
    for folder, names in {"both": ("train", "test"), "one": ("test",), "neither": ("test", "validation")}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            written(tmp_path / folder, row | {"prompt": name}, name=f"{name}.jsonl")
    assert [prompt.text for prompt in read(str(tmp_path / "both")).prompts] == ["train"]
    assert [prompt.text for prompt in read(str(tmp_path / "one")).prompts] == ["test"]
    with pytest.raises(ConfigError, match=r"has the splits (test, validation|validation, test) and none called train"):
        read(str(tmp_path / "neither"))


def test_windows_files(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n")
    assert len(read(str(path)).prompts) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.sampled_from(["", "en", "prompter", "assistant"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
    max_leaves=4,
)
FIELDS = """message_id message_tree_id parent_id role text rank deleted review_result lang replies prompt chosen
rejected conversations instruction responses output_1 preference synthetic"""
fields = st.sampled_from(FIELDS.split())
bases = st.sampled_from(
    [
        tree("t", message("r", rank=0), message("s", rank=1)),
        message("t", "prompter", message_tree_id="t", parent_id=None),
        {"prompt": "Q?", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]},
        {"prompt": "Q?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]},
        {"instruction": "Q?", "output_1": "a", "output_2": "b", "preference": 1.5},
    ]
)


@settings(deadline=None, max_examples=300)
@given(base=bases, edits=st.lists(st.tuples(fields, json_values), max_size=3), inner=st.booleans())
def test_any_json_is_read_or_refused(
    base: dict[str, Any], edits: list[tuple[str, Any]], inner: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    record = json.loads(json.dumps(base))
    target = record["prompt"] if inner and isinstance(record.get("prompt"), dict) else record
    target.update(edits)
    try:
        result = read(written(tmp_path_factory.getbasetemp(), record))
    except ConfigError:
        return
    assert balanced(result.counts)
    for prompt in result.prompts:
        assert prompt.text.strip()
        assert prompt.replies
        assert all(isinstance(reply.rank, float | None) and reply.text.strip() for reply in prompt.replies)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_parts_by_hash() -> None:
    shares = {"ift": 0.6, "eft": 0.3, "eval": 0.1}
    ids = [f"tree-{number}" for number in range(10_000)]
    parts = [part_of(identifier, shares) for identifier in ids]
    assert {name: abs(parts.count(name) / 10_000 - share) < 0.015 for name, share in shares.items()} == {
        "ift": True,
        "eft": True,
        "eval": True,
    }
    assert parts == [part_of(identifier, dict(reversed(shares.items()))) for identifier in ids]
    other = [part_of(identifier, shares, seed=1) for identifier in ids]
    # Independent of seed 0: they agree by chance in .36 + .09 + .01 of all.
    assert abs(sum(map(str.__eq__, parts, other)) / 10_000 - 0.46) < 0.02
    assert {part_of(identifier, {"all": 1, "none": 0}) for identifier in ids} == {"all"}
    assert len({part_of(identifier, {str(n): 0.1 for n in range(10)}) for identifier in ids}) == 10


def test_parts_stay_as_published() -> None:
    """A change would put evaluation questions of finished runs into the training of later ones."""
    shares = {"ift": 0.5, "eft": 0.3, "eval": 0.2}
    assert [part_of(name, shares) for name in ("tea", "coffee", "milk", "water", "\ud800")] == [
        "eft",
        "ift",
        "ift",
        "ift",
        "ift",
    ]


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.5}, {"a": 0.7, "b": 0.7}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {"a": float("inf")}]
)
def test_shares_that_are_none(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        part_of("tea", shares)


@settings(deadline=None, max_examples=60)
@given(
    questions=st.lists(st.sampled_from(["Tea?", "tea?", " TEA? ", "Milk?", "Wa ter?", "wa\n ter?", "?"]), min_size=1),
    cut=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_parts_share_no_question(
    questions: list[str], cut: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trees = [tree(f"t{n}", message(f"r{n}"), text=text) for n, text in enumerate(questions)]
    result = read(written(tmp_path_factory.getbasetemp(), *trees))
    parts: dict[str, set[str]] = {"a": set(), "b": set()}
    for prompt in result.prompts:
        parts[part_of(prompt.id, {"a": cut, "b": 1 - cut}, seed)].add(" ".join(prompt.text.lower().split()))
    assert not parts["a"] & parts["b"]
    assert parts["a"] | parts["b"] == {" ".join(text.lower().split()) for text in questions}


# --- IFT --------------------------------------------------------------------------------------------------------------


def prompt_of(*ranked_as: float | None, name: str = "p") -> RankedPrompt:
    """Replies are called a, b, c ..."""
    replies = [Reply(id=chr(97 + n), text=f"reply {n}", rank=rank) for n, rank in enumerate(ranked_as)]
    return RankedPrompt(id=name, text="Q?", replies=tuple(replies))


def test_ift_takes_the_best() -> None:
    prompts = [
        prompt_of(1, 0, 2),
        prompt_of(2, 1),  # rank 0 was dropped on reading
        prompt_of(None, 0, 1),
        prompt_of(None, None),
        prompt_of(1, 0, 0),
        prompt_of(0),
    ]
    examples, counts = ift_examples(prompts)
    assert [(id(prompt), reply.id) for prompt, reply in examples] == [
        (id(prompts[at]), best) for at, best in ((0, "b"), (1, "b"), (2, "b"), (4, "b"), (5, "a"))
    ]
    assert counts == {
        "examples": 5,
        "left out: no ranked reply": 1,
        "examples: tie for the best": 1,
        "examples: some replies without rank": 1,
        "examples: best is not rank 0": 1,
    }
    turned = RankedPrompt(id="p", text="Q?", replies=prompts[4].replies[::-1])
    assert ift_examples([turned])[0][0][1].id == "b"
    assert ift_examples([]) == ([], {"examples": 0})


# --- EFT --------------------------------------------------------------------------------------------------------------

ORDER = [
    # ranks, samples of a, b, c ..., accepted samples or the reason
    ((0, 1), [[4], [3]], {"a": 0, "b": 0}),
    ((1, 0), [[3], [4]], {"a": 0, "b": 0}),
    ((0, 1, 2), [[4.33], [3.67], [4.0]], "scores in another order"),
    ((0, 1), [[3], [3]], "equal scores for different ranks"),
    ((0, 1), [[3, 4], [4, 3]], "equal scores for different ranks"),
    ((0, 1), [[0.1 + 0.2], [0.3]], "equal scores for different ranks"),  # a rounding error is no lead
    ((0, 0, 1), [[4], [5], [3]], {"a": 0, "b": 0, "c": 0}),  # a human tie imposes nothing
    ((0, 0, 1), [[5], [5], [3]], {"a": 0, "b": 0, "c": 0}),
    ((0, 0, 1), [[4], [2], [3]], "scores in another order"),
    ((0, 0), [[5], [1]], "all ranks are equal"),
    ((0, None), [[5], [1]], "fewer than two ranked replies"),
    ((None, None), [[5], [1]], "fewer than two ranked replies"),
    ((0, None, 1), [[4], [5], [3]], {"a": 0, "c": 0}),  # nobody ranked b
    ((0, 1), [[4], [None, None]], "a ranked reply without readable judgement"),
    ((0, 1), [[4], []], "a ranked reply without readable judgement"),
    ((0, 1), [[None, 4], [3, None]], {"a": 1, "b": 0}),  # an unread sample is no 0
    ((0, 1), [[0], [None]], "a ranked reply without readable judgement"),
    ((0, 1), [[5, 4, 4], [1, 2, 2]], {"a": 1, "b": 1}),  # nearest to 4.33 and 1.67, the lowest index of equal ones
    ((0, 1), [[4, 5], [1]], {"a": 0, "b": 0}),  # 4 and 5 are as near to 4.5
    ((0, 1), [[4, 4, 4], [4, 4, 3]], {"a": 0, "b": 2}),  # the samples taken must differ too, not only the means
    ((0, 1), [[5, 4, 4], [4, 4, 4]], {"a": 0, "b": 0}),
    ((0, 1, 2), [[4], [1, 5], [2]], "no samples in this order"),  # means 4, 3, 2, but b has neither 3
    ((0, 1, 2), [[5, 4], [4, 4, 3], [3, 3]], {"a": 0, "b": 0, "c": 0}),
    ((0, 1, 1), [[4, 3], [3, 2], [2, 4]], {"a": 0, "b": 0, "c": 0}),
    ((0, 1, 1), [[4, 3], [3, 1], [2, 2]], {"a": 0, "b": 0, "c": 0}),
    ((0, 1, 1), [[3], [2], [4, 4]], "scores in another order"),
]


def sampled(scores: Sequence[Sequence[float | None]]) -> dict[str, Sequence[float | None]]:
    return {chr(97 + n): samples for n, samples in enumerate(scores)}


@pytest.mark.parametrize(("people", "scores", "expected"), ORDER)
def test_accept_by_order(people: Sequence[float | None], scores: list[list[float | None]], expected: object) -> None:
    found = accept(prompt_of(*people), sampled(scores), "order")
    assert (found if isinstance(found, str) else dict(found)) == expected


@pytest.mark.parametrize(
    ("people", "scores", "expected"),
    [
        ((0, 1), [[4], [3]], {"a": 0, "b": 0}),
        ((0, 1), [[3], [4]], "no reply agrees more than it disagrees"),
        ((0, 1), [[3], [3]], "no reply agrees more than it disagrees"),
        # a > b and a > c agree, b > c does not: a 2:0, b 1:1, c 1:1
        ((0, 1, 2), [[5], [3], [4]], {"a": 0}),
        # a > c, b > c agree, a > b is a tie: a 1:1, b 1:1, c 2:0
        ((0, 1, 2), [[4], [4], [3]], {"c": 0}),
        # four replies, only c > d wrong: a 3:0, b 3:0, c 2:1, d 2:1
        ((0, 1, 2, 3), [[5], [4], [2], [3]], {"a": 0, "b": 0, "c": 0, "d": 0}),
        # an unread reply takes no part; the others are judged among themselves
        ((0, 1, 2), [[5, 3], [None], [3, 3]], {"a": 0, "c": 0}),
        ((0, 1), [[5], [None]], "no reply agrees more than it disagrees"),
        # b and c are a human tie: no pair, a wins both
        ((0, 1, 1), [[5], [3], [4]], {"a": 0, "b": 0, "c": 0}),
        ((0, 1, None), [[5], [3], [1]], {"a": 0, "b": 0}),
        ((0, 1), [[5, 4, 4], [1, 2, 2]], {"a": 1, "b": 1}),
        ((0, 0), [[5], [1]], "all ranks are equal"),
        ((0, None), [[5], [1]], "fewer than two ranked replies"),
    ],
)
def test_accept_by_pairs(people: Sequence[float | None], scores: list[list[float | None]], expected: object) -> None:
    found = accept(prompt_of(*people), sampled(scores), "pairs")
    assert (found if isinstance(found, str) else dict(found)) == expected


@pytest.mark.parametrize(
    ("rule", "people", "scores", "most", "expected"),
    [
        # 1 of a and 5 of b contradict people
        ("pairs", (0, 1), [[5, 5, 5, 1], [2, 5]], 4, [("a", 0), ("a", 1), ("a", 2), ("b", 0)]),
        # mean 3.5: 4 and 3 are as near, then 5; b is accepted with all that it has
        ("pairs", (0, 1), [[5, 4, 3, 2], [1]], 3, [("a", 1), ("a", 2), ("a", 0), ("b", 0)]),
        # a > b > c: first 4 3 2; then 5 4 1 holds, and a third choice has nothing left of c
        (
            "order", (0, 1, 2), [[4, 5, 4], [3, 4, 2], [2, 1]], 3,
            [("a", 0), ("a", 2), ("b", 0), ("b", 2), ("c", 0), ("c", 1)],
        ),
        ("pairs", (0, 1), [[3, 3], [4, 4]], 2, "no reply agrees more than it disagrees"),
    ],
)  # fmt: skip
def test_accept_more_than_one_sample_of_a_reply(
    rule: Any, people: Sequence[float], scores: list[list[float | None]], most: int, expected: object
) -> None:
    assert accept(prompt_of(*people), sampled(scores), rule, most) == expected


def test_accept_wants_a_known_rule() -> None:
    with pytest.raises(ValueError, match="order or pairs"):
        accept(prompt_of(0, 1), {}, "best")  # type: ignore[arg-type]


samples_of_replies = st.lists(
    st.tuples(
        st.sampled_from([None, 0.0, 1.0, 2.0]),
        st.lists(st.sampled_from([None, 0.0, 1.0, 2.0, 3.0, 3.5, 4.0, 5.0]), max_size=3),
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=400)
@given(replies=samples_of_replies, stranger=st.booleans())
@example(replies=[(0.0, [5.0, 4.0]), (1.0, [4.0, 4.0, 3.0]), (2.0, [3.0, 3.0])], stranger=True)
def test_order_against_every_choice(replies: list[tuple[float | None, list[float | None]]], stranger: bool) -> None:
    prompt = prompt_of(*(rank for rank, _ in replies))
    scores = sampled([samples for _, samples in replies]) | ({"of another prompt": [5.0]} if stranger else {})
    found = accept(prompt, scores, "order")
    taking_part = [reply for reply in prompt.replies if reply.rank is not None]
    readable = [[(i, s) for i, s in enumerate(scores[reply.id]) if s is not None] for reply in taking_part]

    def agree(values: Sequence[float]) -> bool:
        pairs = list(itertools.permutations(zip(taking_part, values, strict=True), 2))
        ordered = [(a, b) for (one, a), (other, b) in pairs if (one.rank or 0) < (other.rank or 0)]
        return bool(ordered) and all(a > b for a, b in ordered)

    choices = []
    if all(readable):
        means = [statistics.mean(score for _, score in samples) for samples in readable]
        if agree([round(mean, 6) for mean in means]):
            for choice in itertools.product(*readable):
                if agree([score for _, score in choice]):
                    away = sum(abs(score - mean) for (_, score), mean in zip(choice, means, strict=True))
                    choices.append((away, [index for index, _ in choice]))
    if isinstance(found, str):
        assert not choices
        return
    assert [identifier for identifier, _ in found] == [reply.id for reply in taking_part]
    distance = {tuple(indices): away for away, indices in choices}
    assert distance[tuple(index for _, index in found)] == pytest.approx(min(distance.values()))


@settings(deadline=None, max_examples=400)
@given(replies=samples_of_replies, most=st.integers(1, 3))
@example(replies=[(0.0, [5.0, 5.0, 1.0]), (1.0, [3.0, 3.0, 5.0])], most=3)
def test_what_pairs_accepts_agrees_more_than_it_disagrees(
    replies: list[tuple[float | None, list[float | None]]], most: int
) -> None:
    """The means and every sample taken, each against the means of the other replies; and nothing that does is left."""
    prompt, scores = prompt_of(*(rank for rank, _ in replies)), sampled([samples for _, samples in replies])
    found = accept(prompt, scores, "pairs", most)
    readable = {reply.id: [s for s in scores[reply.id] if s is not None] for reply in prompt.replies}
    means = {name: statistics.mean(samples) for name, samples in readable.items() if samples}

    def agrees(reply: Any, score: float) -> bool:
        balance = 0
        for other in prompt.replies:
            if other.rank is not None and other.rank != reply.rank and other.id in means:
                ahead = (score - means[other.id]) * (1 if reply.rank < other.rank else -1)
                balance += 1 if ahead > 1e-9 else -1
        return balance > 0

    expected = []
    for reply in prompt.replies:
        if reply.rank is not None and reply.id in means and agrees(reply, means[reply.id]):
            own = [i for i, s in enumerate(scores[reply.id]) if s is not None and agrees(reply, s)]
            near = sorted(own, key=lambda i: (round(abs(scores[reply.id][i] - means[reply.id]), 9), i))
            expected += [(reply.id, index) for index in near[:most]]
    assert (found if isinstance(found, list) else []) == expected
    turned = RankedPrompt(id="p", text="Q?", replies=prompt.replies[::-1])
    again = accept(turned, scores, "pairs", most)
    assert sorted(again if isinstance(again, list) else []) == sorted(expected)


# --- thinning ---------------------------------------------------------------------------------------------------------


def scored(**numbers: int) -> list[tuple[str, float]]:
    """s4=3 is three examples with score 4; s35=1 is one with 3.5."""
    return [
        (f"{name}-{n}", float(name[1:2] + "." + (name[2:] or "0")))
        for name, number in numbers.items()
        for n in range(number)
    ]


@pytest.mark.parametrize(
    ("examples", "most", "left"),
    [
        (scored(s4=8, s3=2, s5=2), 0.5, {"s4": 4, "s3": 2, "s5": 2}),
        (scored(s4=8, s3=2, s5=2), 1.0, {"s4": 8, "s3": 2, "s5": 2}),
        (scored(s4=8, s3=2, s5=2), 0.7, {"s4": 8, "s3": 2, "s5": 2}),  # 8 of 12 is less
        (scored(s4=8, s3=2, s5=2), 0.34, {"s4": 2, "s3": 2, "s5": 2}),  # 2.06 rounded down
        (scored(s4=80, s3=70), 0.3, {"s4": 30, "s3": 70}),
        (scored(s4=5, s35=4, s3=1), 0.4, {"s4": 3, "s35": 4, "s3": 1}),  # 3.5 is not 4
        (scored(s4=3, s3=3), 0.4, {"s4": 2, "s3": 3}),  # the higher of equally common ones
        (scored(s4=3), 0.9, {}),
        (scored(s4=3), 1.0, {"s4": 3}),
        ([], 0.5, {}),
    ],
)
def test_thin(examples: list[tuple[str, float]], most: float, left: dict[str, int]) -> None:
    names = [identifier.split("-")[0] for identifier in thin(examples, most, 3)]
    assert {name: names.count(name) for name in names} == left


@given(
    scores=st.lists(st.sampled_from([3.0, 3.5, 4.0, 5.0]), max_size=40),
    most=st.floats(0.05, 1.0),
    seed=st.integers(0, 9),
    order=st.randoms(use_true_random=False),
)
def test_thinning_is_no_more_than_needed(scores: list[float], most: float, seed: int, order: random.Random) -> None:
    examples = [(f"e{number}", score) for number, score in enumerate(scores)]
    kept = thin(examples, most, seed)
    gone = [score for identifier, score in examples if identifier not in kept]
    assert len(set(gone)) <= 1
    if gone:
        assert scores.count(gone[0]) == max(map(scores.count, scores))
        stay = scores.count(gone[0]) - len(gone)
        assert stay <= most * len(kept) + 1e-6
        assert stay + 1 > most * (len(kept) + 1) - 1e-6
    elif scores and most < 1:
        assert max(map(scores.count, scores)) <= most * len(scores) + 1e-6
    order.shuffle(examples)
    assert thin(examples, most, seed) == kept


def test_the_seed_chooses_who_goes() -> None:
    examples = scored(s4=100, s3=10)
    assert len({frozenset(thin(examples, 0.5, seed)) for seed in range(10)}) == 10


@pytest.mark.parametrize("most", [0, -0.5, 1.5, float("nan")])
def test_thin_refuses(most: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        thin([("a", 1.0)], most, 0)


def test_thin_refuses_repeated_ids() -> None:
    with pytest.raises(ValueError, match="unique"):
        thin([("a", 1.0), ("a", 2.0)], 0.5, 0)


def test_known_shapes_name_all() -> None:
    assert all(description in ranked.KNOWN for description in ranked.SHAPES.values())
