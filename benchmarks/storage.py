"""What does it cost to keep what was answered? Time and memory of the journal, the groups, the tables and the items.

Every part runs in a process of its own, so that its memory is its own. Records are of the size that the papers have:
prompts and responses of 300 tokens, 4 responses to a prompt, 3 judgements of 60 tokens on each.
"""

import asyncio
import gc
import hashlib
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from common import RESULTS, head, spread, write

from rsrlm.recipes.self_rewarding import in_training_order
from rsrlm.records import Group, Judgement, PreferencePair, Prompt, Response, Sampling, Scored, group_id
from rsrlm.store.buffer import Buffer, receipt_of
from rsrlm.store.items import ItemFile, Segment, write_items
from rsrlm.store.journal import CompletionLog
from rsrlm.store.tables import write_groups, write_table

RESPONSES, JUDGEMENTS, TOKENS, JUDGE_TOKENS = 4, 3, 300, 60
VOCABULARY = 49152
WORDS = ["the", "of", "tea", "water", "green", "and", "a", "degrees", "leaves", "cup", "of", "Grüße"]


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def timed(figures: dict[str, float], name: str, count: int) -> Iterator[None]:
    """Microseconds of each of `count`."""
    started = time.perf_counter()
    yield
    figures[name] = (time.perf_counter() - started) / count * 1e6


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(VOCABULARY), k=count))


def group(number: int) -> Group:
    rng = random.Random(number)
    prompt = Prompt(id=f"prompt-{number:07d}", text=" ".join(rng.choices(WORDS, k=TOKENS)))
    identifier, prompt_tokens = group_id(0, prompt.id), tokens(rng, TOKENS)
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=512, seed=rng.getrandbits(63))
    responses = tuple(
        Response(
            id=f"{identifier}/{index}",
            prompt_id=prompt.id,
            index=index,
            role="actor",
            text=" ".join(rng.choices(WORDS, k=TOKENS)),
            token_ids=tokens(rng, TOKENS),
            prompt_token_ids=prompt_tokens,
            finish_reason="stop",
            weight_version="M0",
            sampling=sampling,
        )
        for index in range(RESPONSES)
    )
    judgements = tuple(
        Judgement(
            id=f"{one.id}#{index}",
            prompt_id=prompt.id,
            response_id=one.id,
            index=index,
            role="judge",
            judge="additive (text)",
            text=" ".join(rng.choices(WORDS, k=JUDGE_TOKENS)),
            token_ids=tokens(rng, JUDGE_TOKENS),
            finish_reason="stop",
            weight_version="M0",
            sampling=sampling,
            verdict=Scored(points=3.0),
        )
        for one in responses
        for index in range(JUDGEMENTS)
    )
    return Group(
        id=identifier,
        iteration=0,
        prompt=prompt,
        responses=responses,
        judgements=judgements,
        no_pair_reason="equal scores",
    )


def pair_of(group: Group) -> PreferencePair:
    first, second = group.responses[:2]
    return PreferencePair(
        id=f"{group.id}/0>1",
        prompt_id=group.prompt.id,
        kind="actor",
        chosen_id=first.id,
        rejected_id=second.id,
        prompt_token_ids=first.prompt_token_ids,
        chosen_token_ids=first.token_ids,
        rejected_token_ids=second.token_ids,
        chosen_score=4.0,
        rejected_score=2.0,
        weight_version="M0",
    )


def digest(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()


def journal(folder: Path, count: int) -> dict[str, float]:
    """Half of the entries are responses, half judgements."""
    made = group(0)
    payloads = [
        {"id": one.id, "token_ids": one.token_ids, "text": one.text, "finish_reason": one.finish_reason}
        for one in (made.responses[0], made.judgements[0])
    ]
    figures: dict[str, float] = {}
    log, before = CompletionLog(folder / "log.jsonl"), resident()
    with timed(figures, "journal add us", count):
        for number in range(count):
            log.add(digest(number), payloads[number % 2])
    figures["journal bytes in memory per entry"] = (resident() - before) / count
    figures["journal bytes on disk per entry"] = log.path.stat().st_size / count
    asked = [digest(random.Random(0).randrange(count) + number % 7) for number in range(10_000)]
    with timed(figures, "journal find us", len(asked)):
        for key in asked:
            _ = key in log
    with timed(figures, "journal get us", len(asked)):
        for key in asked:
            log.get(key)
    log.close()
    return figures


def journal_open(folder: Path, count: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    before = resident()
    started = time.perf_counter()
    log = CompletionLog(folder / "log.jsonl")
    figures["journal open seconds"] = time.perf_counter() - started
    figures["journal open peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 2**20
    assert len(log) == count
    return figures


def buffer(folder: Path, count: int) -> dict[str, float]:
    made = [group(number) for number in range(500)]
    made = [replace(one, pairs=(pair_of(one),), no_pair_reason="") for one in made]
    ids = [group_id(0, f"{number:07d}") for number in range(count)]
    figures: dict[str, float] = {}
    segment, before = Segment(folder / "groups"), resident()
    filled = Buffer(ids, folder)
    with timed(figures, "group to its segment us", len(made)):
        receipts = [receipt_of(one, segment) for one in made]
    with timed(figures, "receipt put us", count):
        for number in range(count):
            filled.put(number, receipts[number % len(made)])
    figures["group and pair, bytes in memory"] = (resident() - before) / count
    with timed(figures, "group read us", len(made)):
        for number in range(len(made)):
            filled[number]
    with timed(figures, "training order us", count):
        order = in_training_order(filled.pairs, 0, 0)
    with timed(figures, "file of the training job us", count):
        write_items(folder / "items", order)
    file: ItemFile[PreferencePair] = ItemFile(folder / "items")
    with timed(figures, "item read us", 2000):
        for _ in range(2000):
            file[random.randrange(count)]
    return figures


def records(folder: Path, count: int) -> dict[str, float]:
    made = [group(number) for number in range(count)]
    figures: dict[str, float] = {}
    write_groups(folder, made[:200])  # imports, and the allocator's first pages
    for kind in ("responses", "judgements"):
        rows = [record for one in made for record in getattr(one, kind)]
        with timed(figures, f"{kind} to Parquet us", len(rows)):
            write_table(folder / f"{kind}.parquet", kind, rows)

    async def deaf() -> float:
        writing = asyncio.create_task(asyncio.to_thread(write_groups, folder, made))
        longest = 0.0
        while not writing.done():
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - started)
        await writing
        return longest

    figures["event loop held up ms, at most"] = asyncio.run(deaf()) * 1e3
    return figures


def measured(part: Callable[[Path, int], dict[str, float]], folder: Path, count: int) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(part, folder, count).result()


def main(
    entries: Annotated[int, typer.Option(help="of the journal; 8,000,000 are 16 GB on disk")] = 200_000,
    groups: Annotated[int, typer.Option(help="receipts in the buffer")] = 100_000,
    table_groups: Annotated[int, typer.Option(help="groups that become tables")] = 3000,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="folder of the result")] = RESULTS,
) -> None:
    done: list[dict[str, float]] = []
    data = {**head(__doc__.splitlines()[0]), "counts": [entries, groups, table_groups]}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="rsrlm-storage-") as name:
            folder, figures = Path(name), {}
            plan: list[tuple[Callable[[Path, int], dict[str, float]], int]] = [
                (journal, entries),
                (journal_open, entries),
                (buffer, groups),
                (records, table_groups),
            ]
            for part, count in plan:
                figures |= measured(part, folder, count)
            done.append(figures)
        summary = {key: spread([one[key] for one in done]) for key in figures}
        write(out, "storage", {**data, "summary": summary, "rounds": done})
    for key, values in summary.items():
        print(f"{key:40} {values['median']:10.1f}   {values['low']:.1f} to {values['high']:.1f}")


if __name__ == "__main__":
    typer.run(main)
