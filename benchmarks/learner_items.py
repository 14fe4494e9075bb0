"""How long until the learner's ranks have what they train on? From the post of a job to all ranks being ready.

The mailbox and the ranks are real Ray actors; there is no model. A rank is ready when it knows the items of every
optimizer step and their lengths, and has its own items of the first step as objects.
"""

import asyncio
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, cluster, head, shown, spread, write

from rsrlm.jobs import TrainJob
from rsrlm.records import PreferencePair
from rsrlm.runtime.mailbox import Finished, Mailbox
from rsrlm.settings.train import Train
from rsrlm.store.items import Items, Segment, write_items

PROMPT_TOKENS, RESPONSE_TOKENS = 600, 200
DIFFERENT = 1000  # pairs with tokens of their own
VOCABULARY = 49152
OBJECT_STORE_MIB = 100  # no item passes through it


def pairs(count: int) -> Iterator[PreferencePair]:
    rng = random.Random(0)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(VOCABULARY), k=number))

    made = [
        PreferencePair(
            id="", prompt_id=f"p{number}", kind="actor", chosen_id="c", rejected_id="r",
            prompt_token_ids=tokens(PROMPT_TOKENS), chosen_token_ids=tokens(RESPONSE_TOKENS),
            rejected_token_ids=tokens(RESPONSE_TOKENS), chosen_score=1.0, rejected_score=0.0, weight_version="M0",
        )
        for number in range(min(count, DIFFERENT))
    ]  # fmt: skip
    for number in range(count):
        yield replace(made[number % DIFFERENT], id=f"00/p{number}/1>0")


class Rank:
    """Takes jobs from the mailbox as the learner's ranks do, and stops where they would load a model."""

    def work(self, mailbox: Any, rank: int, ranks: int, jobs: int) -> list[dict[str, float]]:
        import ray

        from rsrlm.runtime.shares import outline, share_of, steps_of
        from rsrlm.store.items import ItemFile

        found, done = [], -1
        while len(found) < jobs:
            number, job = ray.get(mailbox.next.remote(done))
            if job is None:
                continue
            heard, before = time.time(), _resident()
            items: ItemFile[PreferencePair] = ItemFile(Path(job.items))
            steps = steps_of(len(items), job.train, job.seed, job.iteration)
            known = outline(items, range(len(items)), ("chosen_token_ids", "rejected_token_ids"))
            own = [items[place] for places, _ in share_of(steps[0], rank, ranks, 1) for place in places]
            assert max(known.response_tokens) == 2 * RESPONSE_TOKENS
            assert len(own) == -(-len(steps[0]) // ranks)
            found.append(
                {
                    "heard": heard,
                    "ready": time.time(),
                    "grown_mib": (_resident() - before) / 2**20,
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
                }
            )
            if rank == 0:
                ray.get(mailbox.emit.remote(number, Finished()))
            done = number
        return found


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def measure(items: Path, digest: str, ranks: int, rounds: int) -> list[dict[str, Any]]:
    """The first round warms up and does not count."""
    import ray

    mailbox = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=1000).remote()
    made = [ray.remote(Rank).options(num_cpus=0.5).remote() for _ in range(ranks)]
    working = [one.work.remote(mailbox, rank, ranks, rounds + 1) for rank, one in enumerate(made)]
    posted, answered = [], []
    for number in range(rounds + 1):
        job = TrainJob(
            run="", iteration=0, seed=0, model="", output="", name="M1", digest=digest, items=str(items),
            train=Train(lr=1e-6, pairs_per_step=128, epochs=2),
        )  # fmt: skip
        posted.append(time.time())
        await mailbox.post.remote(job)
        slowest = 0.0
        while not await mailbox.events.remote(number, 0, 0.0):
            asked = time.perf_counter()
            await mailbox.next.remote(number, 0.0)
            slowest = max(slowest, time.perf_counter() - asked)
            await asyncio.sleep(0.02)
        answered.append(slowest)
    found = await asyncio.gather(*working)
    return [
        {
            "round": number,
            "ready_s": max(rank[number]["ready"] for rank in found) - posted[number],
            "heard_s": max(rank[number]["heard"] for rank in found) - posted[number],
            "mailbox_slowest_s": answered[number],
            "rank_grown_mib": max(rank[number]["grown_mib"] for rank in found),
            "rank_peak_mib": max(rank[number]["peak_mib"] for rank in found),
        }
        for number in range(1, rounds + 1)
    ]


def main(
    count: Annotated[int, typer.Option("--pairs")] = 100_000,
    ranks: int = 2,
    rounds: int = 5,
    out: Path = RESULTS,
) -> None:
    result = {**head(__doc__ or ""), "pairs": count, "tokens": [PROMPT_TOKENS, RESPONSE_TOKENS], "ranks": ranks}
    with tempfile.TemporaryDirectory() as folder, cluster(OBJECT_STORE_MIB):
        items = Path(folder) / "items"
        started = time.perf_counter()
        segment, made = Segment(Path(folder) / "pairs"), Items(PreferencePair)
        for pair in pairs(count):
            made.put(segment.path, segment.add(pair))
        segment.close()
        digest = write_items(items, made)
        file_mib = Path(segment.path).stat().st_size / 2**20
        result |= {"write_s": time.perf_counter() - started, "file_mib": file_mib}
        result["rounds"] = asyncio.run(measure(items, digest, ranks, rounds))
    for name in ("ready_s", "rank_grown_mib", "mailbox_slowest_s"):
        values = [one[name] for one in result["rounds"]]
        result[name] = spread(values)
        print(f"{name}: {shown(values)}")
    print(f"write_s: {result['write_s']:.1f}, {result['file_mib']:.0f} MiB; {write(out, 'learner_items', result)}")


if __name__ == "__main__":
    typer.run(main)
