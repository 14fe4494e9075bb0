"""Engines, pool and weights with real vLLM in real Ray actors: what is published is what is served."""

import asyncio
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rsrlm.records import Completion, Request, Sampling, seed_of
from rsrlm.runtime.engine import RequestFailed

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

TOKENS = 16


def request(name: str, ids: tuple[int, ...], *, tokens: int = TOKENS, temperature: float = 0.0, **more: Any) -> Request:
    seed = seed_of(0, 0, name, "actor", "0")
    sampling = Sampling(temperature=temperature, top_p=1.0, max_tokens=tokens, seed=seed)
    return Request(id=name, prompt_token_ids=ids, sampling=sampling, priority=more.pop("priority", 10), **more)


def prompts(count: int = 20) -> list[tuple[int, ...]]:
    numbers = random.Random(1)
    return [tuple(numbers.randrange(3, 49000) for _ in range(numbers.randrange(5, 60))) for _ in range(count)]


async def greedy(generate: Callable[[Request], Any], label: str) -> list[tuple[int, ...]]:
    """Greedy token ids on the 20 prompts."""
    requests = [request(f"{label}-{number}", ids) for number, ids in enumerate(prompts())]
    return [completion.token_ids for completion in await asyncio.gather(*map(generate, requests))]


def asked_of(actor: Any) -> Callable[[Request], Any]:
    """Asks an engine actor for one completion."""

    async def ask(request: Request) -> Any:
        [outcome] = await actor.generate.remote([request])
        return outcome

    return ask


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three perturbed exports, each 8 % of every tensor's spread away from the one before."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    folders = []
    for number in range(3):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (parameter.std() * 0.08 if parameter.ndim > 1 else 0.02))
        folder = tmp_path_factory.mktemp("exports") / f"M{number + 1}"
        shutil.copytree(tiny_model, folder)
        model.save_pretrained(folder)
        folders.append(folder)
    return folders


def weight_set(folder: Path, version: str) -> Any:
    from rsrlm.model import weight_files
    from rsrlm.runtime.weights import WeightSet, describe

    return WeightSet(version=version, folder=str(folder), files=describe(weight_files(folder)))


def engine_config(make_config: Any, **changes: Any) -> Any:
    engine = {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_gib": 0.25, "cpus": 0.2, **changes.pop("engine", {})}
    return make_config(engine=engine, **changes)


@pytest.fixture(scope="module")
def module_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from rsrlm.config import resolve

    def make(**changes: Any) -> Any:
        data: dict[str, Any] = {
            "name": "engines",
            "runs": str(tmp_path_factory.mktemp("runs")),
            "iterations": 1,
            "model": "smollm2-135m-instruct",
            "prompts": {"path": "builtin", "per_iteration": 4},
            "sample": {"max_tokens": 24},
            "train": {"lr": 1e-3, "pairs_per_step": 2},
            "evaluate": {"max_tokens": 24},
        }
        return resolve({**data, **changes})

    return lambda **changes: engine_config(make, **changes)


@pytest.fixture(scope="module")
def expected(cluster: Any, run_async: Any, module_config: Any, exported: list[Path]) -> list[list[tuple[int, ...]]]:
    """What fresh vLLM engines say that were loaded from the exported folders."""
    from rsrlm.runtime.engine_actor import EngineActor

    async def fresh(folder: Path) -> list[tuple[int, ...]]:
        config = module_config()
        actor = (
            cluster.remote(EngineActor)
            .options(num_cpus=0.2, max_concurrency=100)
            .remote(config, str(folder), "fresh", 0)
        )
        try:
            return await greedy(asked_of(actor), "fresh")
        finally:
            cluster.kill(actor)

    return [run_async(fresh(folder)) for folder in exported[:2]]


def make_pool(config: Any, folder: Path, replicas: int, events: list[dict[str, Any]]) -> Any:
    from rsrlm.runtime.pool import EnginePool

    def note(event: str, **fields: Any) -> None:
        events.append({"event": event, **fields})

    return EnginePool(config, weight_set(folder, "M0"), "test", replicas, note)


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def pool(cluster: Any, run_async: Any, module_config: Any, tiny_model: Path, events: list[dict[str, Any]]) -> Any:
    """Two in-process replicas."""
    made = make_pool(module_config(), tiny_model, 2, events)
    run_async(made.start())
    yield made
    run_async(made.close())


def only(pool: Any, index: int) -> Callable[[Request], Any]:
    return asked_of(pool.replicas.all[index].actor)


# -- weights -----------------------------------------------------------------------------------------------------------


def check_updates(pool: Any, run_async: Any, exported: list[Path], expected: list[list[tuple[int, ...]]]) -> None:
    """Twice in a row: every replica's greedy outputs equal those of a fresh engine on the exported folder."""
    for number, folder in enumerate(exported[:2]):
        reports = run_async(pool.publish(weight_set(folder, f"M{number + 1}")))
        assert len(reports) == len(pool.replicas.all)
        assert all(report["transfer"] >= 0 and report["load"] > 0 for report in reports)
        assert run_async(pool.versions()) == [f"M{number + 1}"] * len(pool.replicas.all)
        for replica in range(len(pool.replicas.all)):
            assert run_async(greedy(only(pool, replica), f"u{number}-{replica}")) == expected[number]


def test_updates_reach_both_replicas(
    pool: Any, run_async: Any, exported: list[Path], expected: list[list[tuple[int, ...]]], tiny_model: Path
) -> None:
    before = run_async(greedy(only(pool, 0), "before"))
    assert before != expected[0] != expected[1]
    check_updates(pool, run_async, exported, expected)


def test_updates_reach_async_llm(
    cluster: Any,
    run_async: Any,
    module_config: Any,
    tiny_model: Path,
    exported: list[Path],
    expected: list[list[tuple[int, ...]]],
) -> None:
    made = make_pool(module_config(engine={"kind": "async"}), tiny_model, 1, [])
    run_async(made.start())
    try:
        check_one_call(made, run_async)
        check_stop_strings(made, run_async, tiny_model)
        check_updates(made, run_async, exported, expected)
        check_a_flipped_byte_is_refused(made, run_async, exported[2], expected[1])
    finally:
        run_async(made.close())


def test_updates_over_gloo(
    cluster: Any,
    pool: Any,
    run_async: Any,
    module_config: Any,
    exported: list[Path],
    expected: list[list[tuple[int, ...]]],
) -> None:
    """As to a host that the learner is not on: one copy arrives in its memory, and both replicas read it."""
    from rsrlm.runtime.carrier import Carrier
    from rsrlm.runtime.export import send
    from rsrlm.runtime.weights import SHM, stale_files

    jobs: list[Any] = []
    notes: list[Any] = []

    async def broadcast(job: Any, listening: Callable[[Any], None]) -> None:
        jobs.append(job)
        loop = asyncio.get_running_loop()
        address = cluster.util.get_node_ip_address()
        await asyncio.to_thread(send, job, address, lambda said: loop.call_soon_threadsafe(listening, said))

    config = module_config(weights={"transport": "gloo"})
    carrier = Carrier(config, broadcast, lambda kind, **fields: notes.append((kind, fields)))

    async def work() -> None:
        sent = await carrier.carried(weight_set(exported[0], "M1"), pool.nodes)
        [(node, [copy])] = sent.local.items()
        assert {node} == pool.nodes == {replica.node for replica in pool.replicas.all}
        assert Path(copy.path).parent == SHM
        assert copy.checksum == sent.files[0].checksum
        await pool.publish(sent)
        assert stale_files(config.folder) == [Path(copy.path)]
        carrier.remove(sent.local)
        await carrier.close()

    run_async(work())
    assert [job.world_size for job in jobs] == [2]
    assert notes == []
    assert stale_files(config.folder) == []
    for replica in range(2):
        assert run_async(greedy(only(pool, replica), f"gloo-{replica}")) == expected[0]


def test_a_transfer_file_carries_the_same_weights(
    pool: Any, run_async: Any, exported: list[Path], expected: list[list[tuple[int, ...]]], tmp_path: Path
) -> None:
    """As the learner publishes: from memory, through a file in shared memory that is gone afterwards."""
    from safetensors.torch import load_file

    from rsrlm.runtime.weights import SHM, WeightSet, remove, shapes_of, stale_files, write

    tensors = load_file(exported[0] / "model.safetensors")
    files = write(shapes_of(tensors), tensors.items(), tmp_path, "M1")
    assert Path(files[0].path).parent == SHM
    run_async(pool.publish(WeightSet(version="M1b", folder=str(exported[0]), files=files)))
    remove(files, tmp_path)
    assert stale_files(tmp_path) == []
    assert run_async(greedy(only(pool, 1), "shm")) == expected[0]


def check_a_flipped_byte_is_refused(pool: Any, run_async: Any, folder: Path, kept: list[tuple[int, ...]]) -> None:
    """The replica names the checksum, keeps its weights and its version, and serves nothing through the pool."""
    from rsrlm.runtime.replicas import PoolFailed

    held = run_async(pool.versions())
    weights = weight_set(folder, "M9")
    path = Path(weights.files[0].path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 1000)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(PoolFailed, match=r"refused weights M9.*checksum"):
        run_async(pool.publish(weights))
    assert run_async(greedy(only(pool, 0), "kept")) == kept
    assert not pool.replicas.all[0].ready.is_set()
    pool.replicas.all[0].ready.set()
    assert run_async(pool.versions())[0] == held[0]


def test_a_flipped_byte_is_refused(
    pool: Any,
    run_async: Any,
    exported: list[Path],
    expected: list[list[tuple[int, ...]]],
    tmp_path: Path,
) -> None:
    run_async(pool.publish(weight_set(exported[0], "M1")))
    spoilt = tmp_path / "spoilt"
    shutil.copytree(exported[2], spoilt)
    check_a_flipped_byte_is_refused(pool, run_async, spoilt, expected[0])
    for replica in pool.replicas.all:
        replica.ready.set()
    run_async(pool.publish(weight_set(exported[0], "M1")))


def test_without_the_repair_the_head_is_stale(
    cluster: Any,
    run_async: Any,
    module_config: Any,
    tiny_model: Path,
    exported: list[Path],
    expected: list[list[tuple[int, ...]]],
) -> None:
    """The proof above can fail: it does when the repair is taken out."""
    from rsrlm.runtime.engine_actor import EngineActor

    class Unrepaired(EngineActor):
        async def __init__(self, *arguments: Any) -> None:  # type: ignore[misc]
            from rsrlm.runtime import vllm_worker

            vllm_worker.repair_tied_head = lambda model: None
            await EngineActor.__init__(self, *arguments)

    actor = (
        cluster.remote(Unrepaired)
        .options(num_cpus=0.2, max_concurrency=100)
        .remote(module_config(), str(tiny_model), "M0", 0)
    )

    async def updated() -> list[tuple[int, ...]]:
        await actor.update.remote(weight_set(exported[0], "M1").update_info(), "M1")
        return await greedy(asked_of(actor), "stale")

    try:
        assert run_async(updated()) != expected[0]
    finally:
        cluster.kill(actor)


# -- order, load, priority ---------------------------------------------------------------------------------------------


async def sampled(pool: Any, label: str, order_seed: int, judge_load: bool) -> dict[str, tuple[int, ...]]:
    """16 prompts x 4 at T = 0.8 in a shuffled order, with judge requests in between if asked."""
    requests = [
        request(f"p{number}/{index}", ids, tokens=12, temperature=0.8)
        for number, ids in enumerate(prompts(16))
        for index in range(4)
    ]
    random.Random(order_seed).shuffle(requests)
    load = []
    if judge_load:
        load = [
            request(f"judge-{number}", ids, tokens=4, temperature=1.0, priority=0)
            for number, ids in enumerate(prompts(30))
        ]
    everything = [value for pair in zip(requests, load + requests[len(load) :], strict=False) for value in pair]
    wanted = {one.id for one in requests}
    unique = list({one.id: one for one in everything}.values())
    completions: list[Completion] = await asyncio.gather(*(pool.generate(one) for one in unique))
    return {one.request_id: one.token_ids for one in completions if one.request_id in wanted}


def test_tokens_depend_on_neither_order_nor_replicas_nor_load(pool: Any, run_async: Any) -> None:
    alone = run_async(sampled(pool, "a", 1, judge_load=False))
    assert len(set(alone.values())) == 64  # no two samples share a seed
    assert run_async(sampled(pool, "b", 2, judge_load=True)) == alone
    pool.replicas.all[1].ready.clear()
    try:
        assert run_async(sampled(pool, "c", 3, judge_load=True)) == alone
        assert run_async(sampled(pool, "d", 4, judge_load=False)) == alone
    finally:
        pool.replicas.all[1].ready.set()


def test_work_is_spread_over_the_replicas(pool: Any, run_async: Any) -> None:
    """Each samples eight of the sixteen answers."""

    async def tokens() -> list[float]:
        return [counters["generation_tokens"] for counters in await pool.stats()]

    async def sampled_by_each() -> list[float]:
        before = await tokens()
        requests = [request(f"s{number}", ids) for number, ids in enumerate(prompts(16))]
        done = await asyncio.gather(*map(pool.generate, requests))
        assert {len(one.token_ids) for one in done} == {TOKENS}
        return [after - earlier for after, earlier in zip(await tokens(), before, strict=True)]

    assert run_async(sampled_by_each()) == [8 * TOKENS, 8 * TOKENS]
    assert all(replica.outstanding == 0 for replica in pool.replicas.all)


def check_one_call(pool: Any, run_async: Any) -> None:
    """Twelve judgements of one response, asked in one call, are those of twelve calls, on one replica that reads their
    prompt once; a request that it refuses spoils none of them."""
    ids = tuple(range(2000, 2100))
    other = tuple(range(3000, 3100))
    requests = [request(f"call-{number}", ids, tokens=8, temperature=1.0) for number in range(12)]

    async def both() -> Any:
        alone = await asyncio.gather(*map(pool.generate, requests))
        before = await pool.stats()
        await pool.generate_all([replace(one, prompt_token_ids=other) for one in requests])
        hits = [
            after["prefix_cache_hits"] - earlier["prefix_cache_hits"]
            for after, earlier in zip(await pool.stats(), before, strict=True)
        ]
        again = await pool.generate_all(requests)
        too_long = request("too long", tuple(range(300)))
        outcomes = await pool.replicas.all[0].actor.generate.remote([requests[0], too_long, requests[1]])
        return alone, hits, again, outcomes

    alone, hits, again, outcomes = run_async(both())
    assert [one.token_ids for one in again] == [one.token_ids for one in alone]
    assert len({one.token_ids for one in again}) == 12
    assert sorted(hits) == [*[0] * (len(hits) - 1), 11 * 96]  # of one replica: three whole blocks of 32 tokens each
    assert [outcomes[place].token_ids for place in (0, 2)] == [one.token_ids for one in alone[:2]]
    assert isinstance(outcomes[1], RequestFailed)
    assert "request too long was refused" in str(outcomes[1])


def test_one_call_for_many_requests(pool: Any, run_async: Any) -> None:
    check_one_call(pool, run_async)


def check_stop_strings(pool: Any, run_async: Any, folder: Path) -> None:
    """The text ends with the stop string, and the tokens are those that the model wrote up to there."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    free = request("free", prompts(1)[0], temperature=1.0)
    whole = run_async(pool.generate(free))
    assert tokenizer.decode(whole.token_ids) == whole.text
    places = [place for place in range(len(whole.text) - 3) if whole.text.find(whole.text[place : place + 3]) == place]
    stops = [whole.text[place : place + 3] for place in places]
    assert len(stops) > 20
    found = run_async(
        pool.generate_all(
            [replace(free, id=stop, sampling=replace(free.sampling, stop=("~~", stop))) for stop in stops]
        )
    )
    within = 0
    for place, stopped in zip(places, found, strict=True):
        assert (stopped.text, stopped.finish_reason) == (whole.text[: place + 3], "string")
        assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
        assert tokenizer.decode(stopped.token_ids).startswith(stopped.text)
        assert len(tokenizer.decode(stopped.token_ids[:-1])) < place + 3
        within += tokenizer.decode(stopped.token_ids) != stopped.text
    assert 0 < within < len(found)
    assert run_async(pool.generate(replace(free, sampling=replace(free.sampling, stop=("~~",))))) == whole


def test_stop_strings(pool: Any, run_async: Any, tiny_model: Path) -> None:
    check_stop_strings(pool, run_async, tiny_model)


async def most_unfinished_groups(pool: Any, groups: int, judge_priority: int) -> int:
    """Groups begun (a response finished) but not fully judged, at most, when all samples are queued at once."""
    begun: dict[int, int] = {}
    worst = 0

    async def member(group: int, index: int) -> None:
        nonlocal worst
        ids = prompts(groups)[group]
        await pool.generate(request(f"g{group}/{index}-{judge_priority}", ids, tokens=12, temperature=1.0))
        begun.setdefault(group, 2)
        worst = max(worst, sum(left > 0 for left in begun.values()))
        await pool.generate(request(f"g{group}/{index}#-{judge_priority}", ids, tokens=1, priority=judge_priority))
        begun[group] -= 1

    await asyncio.gather(*(member(group, index) for group in range(groups) for index in range(2)))
    return worst


def test_judging_first_bounds_unfinished_groups(pool: Any, run_async: Any) -> None:
    """With one replica of 8 slots a group is unfinished only while one of its requests runs or is about to.

    Bound: two groups per slot (a sample and the judgement of another group may change places in one step).
    Without priority the judgements queue behind every sample of the iteration.
    """
    groups, slots = 60, 8
    pool.replicas.all[1].ready.clear()
    try:
        first = run_async(most_unfinished_groups(pool, groups, judge_priority=0))
        none = run_async(most_unfinished_groups(pool, groups, judge_priority=10))
    finally:
        pool.replicas.all[1].ready.set()
    assert first <= 2 * slots
    assert none > 2 * slots


def test_the_prefix_cache_shares_a_prompt(pool: Any, run_async: Any) -> None:
    """Four single-sample requests of one 100-token prompt: three read its three whole blocks of 32 tokens."""
    ids = tuple(range(1000, 1100))

    async def one_after_the_other() -> list[float]:
        hits = []
        for index in range(4):
            before = (await pool.stats())[0]["prefix_cache_hits"]
            await only(pool, 0)(request(f"cache-{index}", ids, temperature=1.0))
            hits.append((await pool.stats())[0]["prefix_cache_hits"] - before)
        return hits

    assert run_async(one_after_the_other()) == [0, 96, 96, 96]


def test_structured_output_and_labels(pool: Any, run_async: Any) -> None:
    from rsrlm.judges.verdicts import parse_points, points_regex
    from rsrlm.records import Scored

    labels = tuple(range(34, 40))

    async def both() -> tuple[Completion, Completion]:
        text = await pool.generate(
            request("structured", prompts(1)[0], tokens=60, temperature=1.0, regex=points_regex(60))
        )
        one = await pool.generate(request("labels", prompts(1)[0], tokens=1, label_ids=labels))
        return text, one

    text, one = run_async(both())
    assert isinstance(parse_points(text.text, text.finish_reason), Scored)
    assert len(one.label_logprobs) == 6
    assert all(value < 0 for value in one.label_logprobs)
    assert len(set(one.label_logprobs)) == 6


def test_log_probabilities_of_a_prompt_are_those_of_transformers(
    pool: Any, run_async: Any, exported: list[Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = tuple(range(200, 240))

    async def both() -> list[Completion]:
        await pool.publish(weight_set(exported[1], "M2"))
        return [await pool.generate(request(f"score-{n}", ids, tokens=1, score_from=n)) for n in (1, 30)]

    found = run_async(both())
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(exported[1], dtype=torch.float32)(torch.tensor([ids])).logits[0]
    expected = torch.log_softmax(logits[:-1], -1)[range(39), ids[1:]].tolist()
    assert found[0].prompt_logprobs == pytest.approx(expected, abs=1e-4)
    assert found[1].prompt_logprobs == pytest.approx(expected[29:], abs=1e-4)


# -- engines that die --------------------------------------------------------------------------------------------------


def pid_of(cluster: Any, replica: Any) -> int:
    """The process of an engine actor, asked of itself."""
    return cluster.get(replica.actor.pid.remote())


def kill_while_busy(pool: Any, run_async: Any, cluster: Any, number: int, label: str) -> dict[str, tuple[int, ...]]:
    """The sampled tokens of 16 x 4 requests, with an engine process hit by a signal while they are in flight."""

    async def hit() -> dict[str, tuple[int, ...]]:
        work = asyncio.ensure_future(sampled(pool, label, 5, judge_load=False))
        await asyncio.sleep(0.3)
        assert not work.done()
        os.kill(pid_of(cluster, pool.replicas.all[0]), number)
        return await asyncio.wait_for(work, 240)

    return run_async(hit())


def test_a_killed_engine_comes_back_with_the_current_weights(
    pool: Any,
    run_async: Any,
    cluster: Any,
    exported: list[Path],
    expected: list[list[tuple[int, ...]]],
    events: list[dict[str, Any]],
) -> None:
    run_async(pool.publish(weight_set(exported[1], "M2")))
    undisturbed = run_async(sampled(pool, "x", 5, judge_load=False))
    assert kill_while_busy(pool, run_async, cluster, signal.SIGKILL, "y") == undisturbed

    async def back() -> None:
        while not all(replica.ready.is_set() for replica in pool.replicas.all):
            await asyncio.sleep(0.5)

    run_async(asyncio.wait_for(back(), 120))
    kinds = [event["event"] for event in events if event["event"] != "engine_up"]
    assert "engine_log" in kinds  # what the dead one wrote last
    assert [kind for kind in kinds if kind != "engine_log"] == ["engine_lost", "engine_restarted"]
    assert run_async(pool.versions()) == ["M2", "M2"]
    for replica in range(2):
        assert run_async(greedy(only(pool, replica), f"back{replica}")) == expected[1]


def test_a_stuck_engine_is_replaced(pool: Any, run_async: Any, cluster: Any, events: list[dict[str, Any]]) -> None:
    """A stopped process keeps its port open and gives no token: it is found and replaced."""
    undisturbed = run_async(sampled(pool, "x", 5, judge_load=False))
    lost = len([event for event in events if event["event"] == "engine_lost"])

    async def watch() -> None:
        pool.replicas.spawn(pool.replicas.watch(every_s=1.0, silence_s=5.0))

    run_async(watch())
    assert kill_while_busy(pool, run_async, cluster, signal.SIGSTOP, "z") == undisturbed
    assert len([event for event in events if event["event"] == "engine_lost"]) == lost + 1
