"""What commands with engines and no learner share: the engines, the answers kept beside the result, the result."""

import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rsrlm.chat import ChatEncoder, check_tokenizer
from rsrlm.config import Config, in_a_job
from rsrlm.engines import Answers, NobodyAnswers
from rsrlm.model import folder_of, load_tokenizer
from rsrlm.report.progress import Report
from rsrlm.run import Run
from rsrlm.runtime import setup
from rsrlm.runtime.cluster import ray_cluster
from rsrlm.runtime.exits import interruptible
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import ModelConfig
from rsrlm.store.atomic import write_whole
from rsrlm.store.folder import RunFolder
from rsrlm.store.journal import Journals


def on_engines(
    config: Config,
    folder: Path,
    models: Mapping[str, Path],
    work: Callable[[Run], Awaitable[Any]],
    report: Report,
    *,
    drawn: Mapping[str, str],
    judge: Path | None = None,
    engines: bool = True,
) -> Any:
    """Run `work` with engines that hold the first of `models`, and everything down again. What they answer is kept in
    `folder`, so that the same command goes on after a kill.

    `drawn` is what `started` gave: prompts that are made again must be those that were asked. `judge` is the folder of
    another model that judges. Without `engines` nothing starts, for judges that need none.
    """
    # No learner, so nobody who could send over gloo: every engine loads from its folder.
    config = config.model_copy(update={"weights": config.weights.model_copy(update={"transport": "shm"})})
    folder.mkdir(parents=True, exist_ok=True)
    store = RunFolder(folder)
    first = next(iter(models))

    async def main(started: bool) -> Any:
        from rsrlm.runtime.pools import EnginePools

        pools = EnginePools(by_judge(config), store, models, None, judge)
        log = Journals(folder)
        try:
            if not started and engines and not len(log):
                raise NobodyAnswers("nothing is known yet")
            await pools.start(first, started)
            if started and len(log):
                report.line(f"{len(log)} answers are known already")
            run = Run(pools, Answers(log), report, store.event, await pools.model(first), store.segments)
            return await work(run)
        finally:
            await pools.close()
            log.close()

    with store.lock():  # one process writes the journal
        store.fix("drawn", dict(drawn))
        # Where all answers are known, as after a kill at the very end, no engine starts.
        try:
            return interruptible(main(started=False))
        except* NobodyAnswers:
            pass
        report.line("starting engines")
        with ray_cluster(config, store, say=report.line):
            return interruptible(main(started=True))


def started(config: Config, folder: Path) -> tuple[Config, dict[str, str]]:
    """The config with its fence salt, and what was drawn when a command began in `folder` (see `setup.started`)."""
    return setup.started(config, RunFolder(folder).note("start"))


def loaded(
    model: ModelConfig, drawn: Mapping[str, str] | None = None, key: str = "model.path"
) -> tuple[Path, ChatEncoder]:
    """The model's folder and its encoder, with the date that was drawn. Raises ConfigError, which begins with `key`."""
    folder = folder_of(model, key)
    tokenizer = load_tokenizer(folder, model.trust_remote_code, key)
    check_tokenizer(tokenizer, model.path, key)
    return folder, ChatEncoder(tokenizer, datetime.fromisoformat(drawn["date"]) if drawn else None)


def by_validator(config: Config) -> Config:
    """A config in which who validates is the judge: nobody else is asked to compare."""
    own = config.evaluate.judge
    if not own.external:
        return config
    who = {name: getattr(own, name) for name in ("model", "trust_remote_code", "endpoint")}
    who["replicas"] = own.replicas if own.model else 0
    return by_judge(config.model_copy(update={"judge": config.judge.model_copy(update=who)}))


def without_judge(config: Config) -> Config:
    """No other model and no server judges."""
    nobody = config.judge.model_copy(update={"model": None, "replicas": 0, "endpoint": None})
    return config.model_copy(update={"judge": nobody})


def judge_alone(config: Config) -> tuple[Config, str]:
    """A config whose own model is who judges, so that no other engines are started; and where that model is named."""
    own = config.judge
    key = "judge.model" if own.model else "model.path"
    replicas = own.replicas if own.model else config.engine.replicas
    engine = config.engine.model_copy(update={"replicas": replicas})
    judge = own.model_copy(update={"model": None, "trust_remote_code": False, "replicas": 0})
    model = config.model_at(own.model) if own.model else config.model
    return config.model_copy(update={"judge": judge, "engine": engine, "model": model}), key


def by_judge(config: Config) -> Config:
    """A config in which nobody validates: no engines of their own are started."""
    own = config.evaluate.judge.model_copy(update={"model": None, "endpoint": None})
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"judge": own})})


def check_out(out: Path, folder: bool = False, also: Sequence[str | None] = ()) -> Path:
    """The path, or ConfigError where it can be none: `also` are files that are read."""
    if any(name and out.resolve() == Path(os.path.expanduser(name)).resolve() for name in also):
        raise ConfigError(f"--out {out} is a file that is read; give another one")
    if not out.name or out.name == ".." or (out.is_file() if folder else out.is_dir()):
        raise ConfigError(f"--out {out}: give the path of a {'folder' if folder else 'file'} to write")
    if in_a_job(out.absolute()):
        raise ConfigError(f"--out {out} lies in the files that Ray keeps of this job and deletes after it: write /PATH")
    return out


def work_folder(out: Path) -> Path:
    """Where a command keeps its answers while it works on the file `out`."""
    return out.with_name(out.name + ".work")


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def figure(measured: Mapping[str, Any]) -> str:
    """A figure with its interval and denominator; "not estimable" below 30."""
    if not measured["estimable"]:
        return f"not estimable (n={measured['n']})"
    return f"{measured['value']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}] n={measured['n']}"
