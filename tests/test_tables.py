"""Parquet that others read: what is in it, its order, and that writing it disturbs nobody."""

import asyncio
import json
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from disks import small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import JUDGEMENTS, LAST_SEED, PAIR, SAMPLING, made_for, response

from rsrlm.records import Example, Group, Prompt
from rsrlm.store import tables
from rsrlm.store.buffer import Buffer, receipt_of
from rsrlm.store.folder import RunFolder
from rsrlm.store.items import Segment
from rsrlm.store.tables import TableWriter, order_of, rows, write_table


@pytest.fixture
def store(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def plain(record: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(record)))


def test_parquet_is_what_datasets_reads(store: RunFolder, tmp_path: Path) -> None:
    from datasets import load_dataset

    prompts = [Prompt(id="z", text="Zwei?"), Prompt(id="tea", text="Describe tea.")]
    other = replace(PAIR, id="00/a/1>0", prompt_id="a", weight=0.5)
    stopped = replace(response(0), sampling=replace(SAMPLING, stop=("\n", "ü")))
    groups = [
        Group(id="00/z", iteration=0, prompt=prompts[0], responses=()),
        Group(
            id="00/tea", iteration=0, prompt=prompts[1], responses=(response(1), stopped),
            judgements=tuple(JUDGEMENTS[::-1]),
        ),
    ]  # fmt: skip
    store.write_groups(0, groups)
    store.write_pairs(0, [PAIR, other])
    example = Example(id="ift/1", kind="ift", prompt_token_ids=(), target_token_ids=(0, 2**31 - 1))
    store.write_examples(0, [example])
    folder = store.iteration(0)
    read = {
        name: load_dataset(
            "parquet", data_files=str(folder / f"{name}.parquet"), split="train", cache_dir=str(tmp_path / "cache")
        ).to_list()
        for name in ("prompts", "responses", "judgements", "pairs", "examples")
    }
    assert read["prompts"] == [{"id": "tea", "text": "Describe tea."}, {"id": "z", "text": "Zwei?"}]
    assert read["responses"] == [plain(stopped), plain(response(1))]
    assert [row["sampling"]["seed"] for row in read["responses"]] == [LAST_SEED, LAST_SEED - 1]
    verdicts = [(row["id"][-1], row["points"], row["variance"], row["unparsed"]) for row in read["judgements"]]
    assert verdicts == [
        ("0", 1 / 3, None, None),
        ("1", 2.0, 0.0, None),
        ("2", None, None, "no score line"),  # and not 0
        ("3", -7.0, None, None),
    ]
    assert read["judgements"][1]["sampling"] == plain(SAMPLING)
    assert read["pairs"] == [plain(PAIR), plain(other)]  # training order, not that of the ids
    assert read["examples"] == [plain(example)]


def test_a_judgement_without_an_engine_has_no_sampling(store: RunFolder) -> None:
    store.write_groups(0, [replace(made_for("tea"), judgements=tuple(JUDGEMENTS))])
    found = list(rows(store.iteration(0) / "judgements.parquet"))
    assert [row["sampling"] is None for row in found] == [False, False, False, True]
    assert found[2]["sampling"]["seed"] == LAST_SEED


def test_an_iteration_without_any_pair_has_its_records_too(store: RunFolder) -> None:
    store.write_groups(0, [])
    store.write_pairs(0, [])
    found = {path.name: list(rows(path)) for path in store.iteration(0).iterdir()}
    assert found == {f"{kind}.parquet": [] for kind in ("prompts", "responses", "judgements", "pairs")}


# Ids that are the beginning of others, with what comes before and after the slash in the order of characters.
NAMES = st.lists(st.text("ab-0~ü\U0001f375", min_size=1, max_size=3), unique=True, max_size=8)


@given(names=NAMES, counts=st.lists(st.integers(0, 12), min_size=8, max_size=8))
@settings(deadline=None, max_examples=40)
def test_groups_become_tables_ordered_by_id(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], counts: list[int]
) -> None:
    groups = [made_for(name, responses=count) for name, count in zip(names, counts, strict=False)]
    groups = [
        replace(group, comparisons=group.judgements if number == 2 else ()) for number, group in enumerate(groups)
    ]
    store = RunFolder(tmp_path_factory.mktemp("run"))
    buffer, segment = Buffer([group.id for group in groups], store.folder), Segment(store.folder / "groups")
    for index, group in reversed(list(enumerate(groups))):
        buffer.put(index, receipt_of(group, segment))
    store.write_groups(0, buffer)
    store.write_groups(1, groups)
    by_hand = {
        "prompts": [group.prompt for group in groups],
        **{
            kind: [record for group in groups for record in getattr(group, kind)]
            for kind in ("responses", "judgements", "comparisons")
        },
    }
    if not by_hand["comparisons"]:
        del by_hand["comparisons"]
    for kind, records in by_hand.items():
        write_table(store.iteration(2) / f"{kind}.parquet", kind, sorted(records, key=lambda one: one.id))
    found, from_list, expected = (
        {path.stem: list(rows(path)) for path in store.iteration(iteration).iterdir()} for iteration in range(3)
    )
    assert found == from_list == expected
    assert found["responses"] == [plain(one) for one in sorted(by_hand["responses"], key=lambda one: one.id)]


@given(ids=st.lists(st.text(st.characters(codec="utf-8")), max_size=30))
@settings(deadline=None, max_examples=100)
def test_arrow_orders_ids_as_python_does(ids: list[str]) -> None:
    assert [ids[index] for index in order_of(ids)] == sorted(ids)


def test_the_order_of_many_ids() -> None:
    ids = [f"{number % 7}/{number}" for number in range(40_000)]
    assert [ids[index] for index in order_of(ids)] == sorted(ids)
    assert list(order_of(["same"] * 40_000)) == list(range(40_000))


def test_more_records_than_memory_would_hold_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches to a row group, several row groups, and an end that fills neither."""
    monkeypatch.setattr(tables, "ROW_GROUP_BYTES", 100_000)
    most = 0

    def source() -> Any:
        nonlocal most
        for index in range(tables.BATCH * 20 + 3):
            most = max(most, sum(batch.nbytes for batch in writer._batches) + len(writer._records) * 150)
            yield replace(response(0), id=f"{index:05d}", token_ids=(index,) * (index % 7))

    with TableWriter(tmp_path / "x.parquet", "responses") as writer:
        writer.add(source())
        writer.add([])
        writer.add(iter([replace(response(1), id="last")]))
    found = list(rows(tmp_path / "x.parquet"))
    assert [row["id"] for row in found] == [*(f"{index:05d}" for index in range(tables.BATCH * 20 + 3)), "last"]
    assert all(row["token_ids"] == [index] * (index % 7) for index, row in enumerate(found[:-1]))
    assert {len(row["prompt_token_ids"]) for row in found} == {1}
    assert most < 250_000


def test_a_table_that_failed_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    write_table(path, "pairs", [PAIR])
    before = path.read_bytes()

    def broken() -> Any:
        yield PAIR
        raise RuntimeError("cut short")

    with pytest.raises(RuntimeError, match="cut short"):
        write_table(path, "pairs", broken())
    with pytest.raises(OSError, match="File too large"), small_disk(len(before) + 100):
        write_table(path, "pairs", [replace(PAIR, id=f"{index:0100d}") for index in range(5000)])
    with pytest.raises(struct.error):
        write_table(path, "pairs", [replace(PAIR, chosen_token_ids=(2**31,))])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_threads_are_let_in_between_batches(store: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds the GIL at a stretch is the conversion of one batch."""
    sizes = []
    convert = tables.batch_of

    def noted(records: Any, schema: Any) -> Any:
        sizes.append(len(records))
        return convert(records, schema)

    monkeypatch.setattr(tables, "batch_of", noted)
    groups = [made_for(f"{number}", responses=10) for number in range(100)]
    asyncio.run(asyncio.to_thread(store.write_groups, 0, groups))
    assert sum(sizes) == 100 * (1 + 10 + 20)
    assert max(sizes) == tables.BATCH <= 300
