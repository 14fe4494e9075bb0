"""What the engines of a run are told of the weights that a learner on another host has written, without Ray."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Memory

from rsrlm.engines import Answers, Model, nothing
from rsrlm.records import Completion, Request, Sampling
from rsrlm.runtime import carrier, pools, weights
from rsrlm.runtime.pools import EnginePools
from rsrlm.runtime.replicas import PoolFailed
from rsrlm.runtime.weights import Transfer
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder

REQUEST = Request(
    id="r", prompt_token_ids=(1,), sampling=Sampling(temperature=0.0, top_p=1.0, max_tokens=1, seed=0), priority=0
)
ANSWER: dict[str, Any] = {"token_ids": (1,), "text": "a", "finish_reason": "stop"}
LEARNER, SAMPLER = "a" * 56, "b" * 56


class Following:
    """A pool with a replica on the learner's host and one elsewhere. An update fails with `error`, if it is set."""

    def __init__(self) -> None:
        self.nodes = {LEARNER, SAMPLER}
        self.told: list[list[str]] = []
        self.held = ""
        self.error: Exception | None = None

    async def publish(self, sent: Any) -> list[dict[str, Any]]:
        if self.error:
            raise self.error
        self.told = [[file["path"] for file in sent.update_info(node)["files"]] for node in (LEARNER, SAMPLER)]
        assert all(Path(path).exists() for paths in self.told for path in paths)
        self.held = sent.version
        return []

    async def versions(self) -> list[str]:
        return [self.held]

    async def close(self) -> None: ...


class Held:
    """The pools of a run whose M1 has been trained."""

    def __init__(self, config: Any, memory: Path) -> None:
        self.pools = EnginePools(config, RunFolder(config.folder), {})
        self.following = Following()
        self.pools._following = [self.following]  # type: ignore[list-item]
        self.export = config.folder / "models" / "M1" / "model.safetensors"
        self.export.parent.mkdir(parents=True)
        self.export.write_bytes(b"weights")
        self.written = memory / f"{weights.file_prefix(config.folder)}M1.safetensors"
        self.written.write_bytes(b"the same")
        self.files = Transfer(node=LEARNER, files=weights.describe([self.written]))

    def run(self, work: Callable[[EnginePools], Any]) -> None:
        async def main() -> None:
            try:
                await work(self.pools)
            finally:
                await self.pools.close()

        asyncio.run(main())


@pytest.fixture
def held(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Held:
    """The driver is on the learner's host: nothing has to be removed by another process."""
    there = SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: LEARNER))
    monkeypatch.setattr(carrier, "ray", there)
    return Held(make_config(), tmp_path)


def test_the_learners_file_is_read_on_its_host_and_goes(held: Held) -> None:
    async def work(pools: EnginePools) -> None:
        model = await pools.model("M1", held.files)
        assert held.written.exists()
        await pools.hold(model)
        await asyncio.sleep(0)

    held.run(work)
    assert held.following.told == [[str(held.written)], [str(held.export)]]
    assert not held.written.exists()


@pytest.mark.parametrize("way", ["refused", "discarded", "held already", "never loaded"])
def test_the_learners_file_goes_whatever_becomes_of_its_weights(way: str, held: Held) -> None:
    async def work(pools: EnginePools) -> None:
        if way == "held already":
            await pools.hold(await pools.model("M1"))
        model = await pools.model("M1", None if way == "discarded" else held.files)
        if way == "discarded":
            pools.discard(held.files)
        elif way == "refused":
            held.following.error = PoolFailed("refused")
            with pytest.raises(PoolFailed):
                await pools.hold(model)
        elif way == "held already":
            await pools.hold(model)

    held.run(work)
    assert not held.written.exists()
    assert held.export.exists()


def test_shared_gpus_are_given_up_until_something_is_asked(make_config: Any) -> None:
    """By all pools, those that do not follow the training too."""
    config = make_config(engine={"gpus": 1}, train={"gpus": 1}, ray={"share_gpus": True})
    happened: list[str] = []

    class Sleepers:
        def __init__(self, name: str) -> None:
            self.name, self.replicas, self.slots = name, self, 1

        async def sleep(self) -> None:
            happened.append(f"{self.name} sleeps")

        async def awake(self) -> None:
            happened.append(f"{self.name} awake")

        async def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
            happened.append(f"{self.name} asked")
            return [Completion(request_id=one.id, weight_version="judge", **ANSWER) for one in requests]

    async def work() -> None:
        made = EnginePools(config, RunFolder(config.folder), {})
        made._following, made._frozen = [Sleepers("engines")], [Sleepers("judges")]  # type: ignore[list-item]
        own = Model(name="judge", digest="d")
        for kind in ("_judges", "_validators"):
            setattr(made, kind, (made._frozen[0], own))
        await made.rest()
        happened.append("--")
        judges = made.engines(Model(name="M0", digest="e"), Answers(Memory()), nothing).judges
        validators = made.validators(Answers(Memory()))
        assert validators
        for asked in (judges, validators):
            await asked.complete(REQUEST)

    asyncio.run(work())
    woken = ["engines awake", "judges awake", "judges asked"]
    assert happened == ["engines sleeps", "judges sleeps", "--", *woken, *woken]


def test_gpus_that_are_not_shared_are_kept(held: Held) -> None:
    """The engines of this run cannot sleep."""
    held.run(lambda pools: pools.rest())


def test_a_model_that_is_seen_late_is_waited_for(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never are weights without a file taken for a model."""
    hidden = held.export.parent.with_name("hidden")
    held.export.parent.rename(hidden)

    def appear() -> None:
        time.sleep(0.3)
        hidden.rename(held.export.parent)

    appearing = threading.Thread(target=appear)
    appearing.start()

    async def work(pools: EnginePools) -> None:
        await pools.hold(await pools.model("M1"))

    held.run(work)
    appearing.join()
    assert held.following.told == [[str(held.export)]] * 2
    shutil.rmtree(held.export.parent)
    monkeypatch.setattr(pools, "SEEN_WITHIN_S", 0.1)
    with pytest.raises(
        ConfigError, match=r"models/M1: the weights of a model are not there after 0\.1 s; runs must be"
    ):
        held.run(work)
