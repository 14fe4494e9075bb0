"""What `rsrlm scale` asks for, and who follows it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from rsrlm.commands import running
from rsrlm.runtime import scale
from rsrlm.runtime.room import wanted_of
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder


class Screen:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_a_run_is_asked(make_config: Any) -> None:
    """Pools that were not named keep what was asked of them before."""
    config = make_config(judge={"kind": "digits", "replicas": 1})
    store, screen = RunFolder.create(config), Screen()
    running.scale(store, config, ["judges=2"], screen)  # type: ignore[arg-type]
    with store.lock():
        running.scale(store, config, ["engines=3"], screen)  # type: ignore[arg-type]
    assert store.note("scale") == {"judges": 2, "engines": 3}
    assert screen.lines == [
        f"{store.folder}: judges=2, when it is resumed: nobody runs it now",
        f"{store.folder}: engines=3, within seconds",
    ]


def test_a_run_that_goes_on_has_what_was_asked_for(make_config: Any) -> None:
    config = make_config(judge={"kind": "digits", "replicas": 2}, engine={"replicas": 8})
    store = RunFolder.create(config)
    assert scale.scaled(config, store) == config
    store.write_note("scale", {"engines": 2, "judges": 0})
    found = scale.scaled(config, store)
    assert (found.engine.replicas, found.judge.replicas) == (2, 2)
    assert len(found.planned) == len(config.planned)
    assert [one.number for one in wanted_of(found, 1)] == [4, 1]
    (store.folder / "scale.json").write_text("{")
    assert scale.scaled(config, store) == config


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("engines", "engines: must be POOL=NUMBER, such as engines=3"),
        ("engines=-1", "engines=-1: must be POOL=NUMBER"),
        ("engines=0", "engines=0: at least one must be left"),
        ("judges=2", "judges=2: .* has no such engines; it has engines$"),
    ],
)
def test_what_cannot_be_asked(wanted: str, said: str, make_config: Any) -> None:
    config = make_config()
    store = RunFolder.create(config)
    with pytest.raises(ConfigError, match=said):
        running.scale(store, config, [wanted], Screen())  # type: ignore[arg-type]
    assert store.note("scale") == {}


def test_pools_follow(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each to its number, once; a file that cannot be read changes nothing, nor does a pool that is not there."""
    monkeypatch.setattr(scale, "LOOK_EVERY_S", 0.01)
    store = RunFolder.create(make_config())
    resized: list[tuple[str, int]] = []

    def pool(name: str) -> Any:
        def resize(number: int) -> None:
            resized.append((name, number))
            made.all = [None] * number

        made = SimpleNamespace(all=[None], resize=resize)
        return made

    async def main() -> None:
        notes: list[dict[str, Any]] = []
        pools = {"engines": pool("engines"), "judges": pool("judges")}
        following = asyncio.ensure_future(
            scale.follow(store, pools, lambda kind, **what: notes.append({"event": kind, **what}))
        )
        await asyncio.sleep(0.05)
        assert resized == []
        store.write_note("scale", {"engines": 3, "validators": 2})
        await asyncio.sleep(0.1)
        for wrong in ("{", "[1]", '{"engines": "3"}', '{"engines": 0}', '{"engines": true}'):
            (store.folder / "scale.json").write_text(wrong)
            await asyncio.sleep(0.05)
        store.write_note("scale", {"engines": 2, "judges": 1})
        await asyncio.sleep(0.1)
        following.cancel()
        assert resized == [("engines", 3), ("engines", 2)]
        assert notes == [
            {"event": "scaled", "pool": "engines", "before": 1, "after": 3},
            {"event": "scaled", "pool": "engines", "before": 3, "after": 2},
        ]

    asyncio.run(main())
