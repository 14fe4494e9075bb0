"""What the commands share that go through a file line by line: engines that are asked about each line, rows that are
written in the order of the file, and what it came to."""

import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

from rsrlm.chat import ChatEncoder
from rsrlm.commands.engines import loaded, on_engines, started, work_folder
from rsrlm.config import Config
from rsrlm.data.responses import Answered, AnsweredLines
from rsrlm.engines import Engines, Spent
from rsrlm.records import Role
from rsrlm.report.progress import Report
from rsrlm.run import Run
from rsrlm.runtime import setup
from rsrlm.store.atomic import sync_path
from rsrlm.store.folder import RunFolder

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Whose engines are asked, and by which chat: of the config's model, and of who judges."""

    config: Config
    drawn: Mapping[str, str]
    out: Path
    folder: Path
    encoder: ChatEncoder
    judge_folder: Path | None
    judge_encoder: ChatEncoder

    @classmethod
    def of(cls, config: Config, out: Path, key: str = "model.path") -> "Asker":
        """`key` is where the user named the config's model. Raises ConfigError."""
        config, drawn = started(config, work_folder(out))
        folder, encoder = loaded(config.model, drawn, key)
        other, judge_encoder = setup.judge_of(config, encoder)
        return cls(
            config=config, drawn=drawn, out=out, folder=folder, encoder=encoder, judge_folder=other,
            judge_encoder=judge_encoder,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LineWork:
    """What is done with each line: `rows` asks the engines and gives the line's rows. `requests` are how many it makes
    in all, at most, and `width` how many of a line at once; `engines` is whether any engine is asked."""

    title: str
    rows: Callable[[Engines, Answered], Awaitable[list[Row]]]
    requests: Mapping[Role, int]
    width: int
    engines: bool = True


@dataclass(kw_only=True)
class Tally:
    """What the rows came to, counted while they are written."""

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    points: list[float] = field(default_factory=list)
    labelled: list[tuple[float | None, bool]] = field(default_factory=list)
    kept: Counter[bool] = field(default_factory=Counter)  # by whether they are good, of those that are not refused

    def add(self, row: Row) -> None:
        self.rows += 1
        self.counts["unreadable"] += row.get("unreadable") is not None
        self.counts["refused"] += bool(row.get("refused"))
        self.counts[f"winner {row.get('winner')}"] += 1
        orders = [order["winner"] for order in row.get("orders", ())]
        self.counts.update(f"order {winner}" for winner in orders)
        self.counts["orders disagree"] += row.get("winner") == "tie" and orders not in ([], ["tie", "tie"])
        if row.get("points") is not None:
            self.points.append(row["points"])
        if row.get("good") is not None:
            self.labelled.append((row.get("points"), row["good"]))
            if not row.get("refused"):
                self.kept[row["good"]] += 1

    @property
    def mean_points(self) -> float | None:
        return fmean(self.points) if self.points else None


class InOrder:
    """Rows of lines that are finished in any order, written in the order of the lines."""

    def __init__(self, file: BinaryIO, tally: Tally) -> None:
        self._file, self._tally = file, tally
        self._next = 0
        self._waiting: dict[int, list[Row]] = {}

    def put(self, number: int, rows: list[Row]) -> None:
        self._waiting[number] = rows
        while self._next in self._waiting:
            for row in self._waiting.pop(self._next):
                self._tally.add(row)
                # Half a surrogate pair, which the answer of a server may hold, is no UTF-8.
                self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode(errors="replace") + b"\n")
            self._next += 1


@dataclass(frozen=True, kw_only=True)
class Done:
    tally: Tally
    spent: Spent  # by all requests behind the result
    new: Spent  # by those of this start
    seconds: float


def through(asker: Asker, lines: AnsweredLines, work: LineWork, report: Report) -> Done:
    """Do the work of each line, several at a time, and write the rows. The same again goes on after a kill: what was
    answered is known."""
    folder = work_folder(asker.out)

    async def main(run: Run) -> Done:
        tally, began = Tally(), time.perf_counter()
        engines = await run.load(run.first)
        with (folder / "rows.jsonl").open("wb") as file, run.stage(work.title, work.requests):
            written = InOrder(file, tally)

            async def one(line: Answered) -> None:
                written.put(line.number, await work.rows(engines, line))

            await engines.each(one, lines, work.width)
        seconds = time.perf_counter() - began
        return Done(tally=tally, spent=run.answers.spent, new=run.answers.new, seconds=seconds)

    models = {asker.config.model.path: asker.folder}
    done: Done = on_engines(
        asker.config, folder, models, main, report, drawn=asker.drawn, judge=asker.judge_folder,
        engines=work.engines,
    )  # fmt: skip
    sync_path(folder / "rows.jsonl")
    (folder / "rows.jsonl").replace(asker.out)
    return done


def beside(out: Path, suffix: str) -> Path:
    """A file about the result: `scored.summary.json` beside `scored.jsonl`."""
    return out.with_name(out.name.removesuffix(".jsonl") + suffix)


def cost_of(asker: Asker, done: Done) -> dict[str, Any]:
    """Tokens and seconds, and what a server has counted over all starts."""
    asked = {key: value for key, value in asdict(done.spent).items()}
    now: dict[str, Any] = {**asdict(done.new), "seconds": round(done.seconds, 2)}
    for name in ("prompt_tokens", "generated_tokens"):
        now[f"{name}_per_s"] = round(now[name] / max(done.seconds, 1e-9), 1)
    server = RunFolder(work_folder(asker.out)).note("endpoint-judge")
    return {"asked": asked, "this_start": now, **({"endpoint": server} if server else {})}


def say_cost(cost: Mapping[str, Any], report: Report) -> None:
    asked, now = cost["asked"], cost["this_start"]
    known = asked["requests"] - now["requests"]
    said = f"{now['requests']:,} requests in {now['seconds']:.0f} s"
    if now["prompt_tokens"]:
        said += (
            f": {now['prompt_tokens']:,} prompt tokens ({now['prompt_tokens_per_s']:,.0f} a second), "
            f"{now['generated_tokens']:,} generated ({now['generated_tokens_per_s']:,.0f} a second)"
        )
    report.line(said + (f"; {known:,} were known already" if known else ""))
    if server := cost.get("endpoint"):
        money = f", cost {server['cost']:.4g}" if server.get("cost") else ""
        report.line(
            f"the server, all starts: {server['requests']:,.0f} requests, {server['prompt_tokens']:,.0f} prompt and "
            f"{server['completion_tokens']:,.0f} generated tokens{money}"
        )


def total(lines: AnsweredLines, each: Callable[[Sequence[int]], int]) -> int:
    """The sum over all lines; `each` is told how many judgements each response of a line came with."""
    return sum(each(size) * number for size, number in lines.sizes.items())
