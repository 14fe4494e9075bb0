"""`rsrlm run` and `rsrlm resume`: from a config, or a folder, to the exit code of the run."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from rsrlm.config import Config, differences
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder

LOCK_WAIT_S = 120.0  # for the end of a job that was stopped, or the lease of a killed host on a shared folder


def run(config: Config, report: Report, or_resume: bool = False) -> int:
    """Start a run; with `or_resume`, go on with that of the same name where there is one. Raises ConfigError where it
    was begun with another config."""
    if not or_resume or not (config.folder / "config.yaml").is_file():
        RunFolder.check_new(config.folder)
        return _execute(config, {}, lambda: RunFolder.create(config), report)
    from rsrlm.runtime import alive

    store, begun = RunFolder.open(config.folder)
    if differing := differences(begun, config, apart=("runs", "ray", "trackers")):
        raise ConfigError(
            f"{store.folder} was begun with another config ({'; '.join(differing[:5])}); use that one, or choose "
            "another name with name=NAME"
        )
    alive.wait_until_free(store, LOCK_WAIT_S, report.line)
    return resume(store, begun.model_copy(update={"ray": config.ray, "trackers": config.trackers}), report)


def resume(store: RunFolder, config: Config, report: Report) -> int:
    """Go on with a run."""
    if len(store.metrics()) >= config.iterations:
        from rsrlm.report.trackers import following as trackers
        from rsrlm.runtime.exits import write_summary

        write_summary(store, "completed")  # a kill may have come between the last iteration and the summary
        store.drop_checkpoints()
        trackers.check(config)
        trackers.follow(config, store, report).end("completed", limit_s=None)
        report.line(f"{store.folder} is finished: {config.iterations} iterations, see {store.folder / 'summary.json'}")
        return 0
    from rsrlm.runtime import alive
    from rsrlm.runtime.scale import scaled

    if ended := alive.how_it_ended(store):
        report.line(f"going on with {store.folder}, which was {ended}")
    return _execute(scaled(config, store), store.note("start"), lambda: store, report)


def scale(store: RunFolder, config: Config, wanted: Sequence[str], report: Report) -> None:
    """Ask a run for numbers of engines, such as "engines=3". Raises ConfigError."""
    from rsrlm.runtime import alive
    from rsrlm.runtime import scale as scaling

    numbers = {}
    for one in wanted:
        name, _, number = one.partition("=")
        if not number.isdecimal():
            raise ConfigError(f"{one}: must be POOL=NUMBER, such as engines=3")
        numbers[name] = int(number)
    scaling.ask(store, config, numbers)
    asked = ", ".join(f"{name}={number}" for name, number in numbers.items())
    when = "within seconds" if alive.held(store) else "when it is resumed: nobody runs it now"
    report.line(f"{store.folder}: {asked}, {when}")


def _execute(config: Config, noted: dict[str, Any], store_of: Callable[[], RunFolder], report: Report) -> int:
    """The exit code of a run. Ray starts while the run is prepared; `store_of` gives the folder, once there is nothing
    left to refuse the run for."""
    from rsrlm.data import prompts as prompt_files
    from rsrlm.report.trackers import following as trackers
    from rsrlm.runtime import address, cluster

    trackers.check(config)
    cluster.check_devices(config)
    address.check_address(config)
    prompts = prompt_files.read(prompt_files.file_of(config.prompts))  # first, since it is quick and often wrong
    with report.busy("loading Ray"):
        ray = cluster.begin(config)
    with report.busy("loading torch"):
        from rsrlm.runtime import launch, setup
    prepared = setup.prepare(config, noted, report.busy, prompts)
    if not noted:
        check_room(prepared)
    if not address.address_of(config) and (crowded := crowding(config)):
        report.line(crowded)
    with report.busy("joining the cluster" if address.address_of(config) else "starting Ray"):
        cluster.joined(config, ray, report.line)
    store = store_of()
    setup.check_inputs(prepared, store)
    return launch.execute(prepared, store, report, ray)


def crowding(config: Config) -> str:
    """What is said of more threads than cores."""
    from rsrlm.commands import doctor

    found = doctor.check_cores(config, len(os.sched_getaffinity(0)))
    return f"{found.detail}; {found.remedy}" if found.level == "warn" else ""


def check_room(prepared: Any) -> None:
    """Refuse a run that cannot fit, before anything starts. Raises ConfigError."""
    from rsrlm.commands import plan as planning

    planning.check(planning.plan_of(prepared), prepared.config)
