"""Replies that people ranked: shapes, what is dropped and counted, parts of a split, the best replies."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked_files import as_sets, balanced, message, prompt_of, ranks, tree, written

from rsrlm.data import ranked
from rsrlm.data.ranked import RankedPrompt, ift_examples, part_of, read
from rsrlm.settings.base import ConfigError


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


def test_known_shapes_name_all() -> None:
    assert all(description in ranked.KNOWN for description in ranked.SHAPES.values())


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


# ---- parts


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


# ---- the best replies


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
