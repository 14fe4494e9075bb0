"""Pairs as a preference set for TRL's `DPOTrainer`: conversations, from the token ids that were trained on.

The pairs hold what the model read and wrote, not messages: the user's turn is what stands between the parts that the
chat template puts around it. What a judge's prompt already says of the answer (`Score: `) begins both answers.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rsrlm.chat import ChatEncoder, check_tokenizer
from rsrlm.commands.exports import cards
from rsrlm.commands.exports.source import RunSource, rows
from rsrlm.model import folder_of, load_tokenizer
from rsrlm.records import group_id
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError
from rsrlm.store.tables import BATCH

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        *((name, _MESSAGES) for name in ("prompt", "chosen", "rejected")),
        *((name, pa.float64()) for name in ("score_chosen", "score_rejected", "weight", "target")),
        *((name, pa.string()) for name in ("id", "kind")),
        ("iteration", pa.int64()),
    ]
)


class Frame:
    """What a chat template puts around the one message of a prompt, as token ids."""

    def __init__(self, encoder: ChatEncoder) -> None:
        one, other = encoder.user("a"), encoder.user("1")
        self.before = tuple(_shared(one, other))
        self.after = tuple(reversed(_shared(one[len(self.before) :][::-1], other[len(self.before) :][::-1])))
        self._tokenizer = encoder.tokenizer
        # A blank that the template puts before every message is none of the user's.
        self._blanks = self._text(one[len(self.before) : len(one) - len(self.after)]).removesuffix("a")

    def _text(self, ids: Sequence[int], special: bool = True) -> str:
        said: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return said

    def turn(self, prompt: Sequence[int]) -> tuple[str, list[int]] | None:
        """The user's text, and the tokens of the answer that the prompt has already begun; None where the prompt is no
        such chat."""
        begin, width = len(self.before), len(self.after)
        if tuple(prompt[:begin]) != self.before:
            return None
        for place in range(begin, len(prompt) - width + 1):
            if tuple(prompt[place : place + width]) == self.after:
                return self._text(prompt[begin:place]).removeprefix(self._blanks), list(prompt[place + width :])
        return None

    def answer(self, ids: Sequence[int]) -> str:
        return self._text(ids, special=False)

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether the model ended the answer by itself."""
        return bool(ids) and ids[-1] in self._tokenizer.all_special_ids


def _shared(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """What both begin with."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def conversation(pair: dict[str, Any], frame: Frame, iteration: int) -> dict[str, Any] | None:
    """The row of a pair; None where its prompt is no chat."""
    turn = frame.turn(pair["prompt_token_ids"])
    if turn is None:
        return None
    user, begun = turn
    sides = {side: frame.answer([*begun, *pair[f"{side}_token_ids"]]) for side in ("chosen", "rejected")}
    return {
        "prompt": [{"role": "user", "content": user}],
        **{side: [{"role": "assistant", "content": text}] for side, text in sides.items()},
        **{f"score_{side}": pair[f"{side}_score"] for side in sides},
        **{name: pair[name] for name in ("weight", "target", "id", "kind")},
        "iteration": iteration,
    }


def write(source: RunSource, out: Path, report: Report) -> str:
    """`train.parquet` and a card."""
    numbers = source.iterations("pairs")
    found: Counter[str] = Counter()  # pairs by kind, of all kinds
    what: Counter[str] = Counter()
    frame = _frame(source)

    out.mkdir(parents=True)
    with report.busy("writing the pairs"), pq.ParquetWriter(out / "train.parquet", SCHEMA, compression="zstd") as file:
        made = _wanted(source, numbers, frame, found, what)
        while batch := list(islice(made, BATCH)):
            file.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
    if not what["pairs"]:
        has = (
            f"pairs of kind {', '.join(sorted(found))}"
            if found
            else "no pairs; --to datasets exports what else there is"
        )
        raise ConfigError(f"--kind {', '.join(source.wanted.kinds)}: {source.store.folder} has {has}")
    _remark(source, what, found)
    kinds = {kind: number for kind, number in sorted(found.items()) if kind in source.wanted.kinds}
    train = source.config.planned[what["last"]].config.train
    cards.write(
        out,
        "trl.md.jinja",
        cards.dataset_header(source, out, {"default": "train.parquet"}, what["pairs"], "preference pairs"),
        source=source,
        kinds=kinds,
        pairs=what["pairs"],
        cut=what["cut"],
        train=train,
    )
    return f"{what['pairs']} pairs ({', '.join(f'{kind} {number}' for kind, number in kinds.items())})"


def _wanted(
    source: RunSource, numbers: Sequence[int], frame: Frame, found: Counter[str], what: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Rows of the pairs that are wanted. Counts them by kind, of all kinds, in `found`, and in `what` what is said of
    them; "last" there is the iteration of the last one."""
    for number in numbers:
        for pair in rows(source.table(number, "pairs")):
            if not pair["id"].startswith(group_id(number, "")) and len(numbers) > 1:
                what["replayed"] += 1  # an earlier iteration has it
                continue
            found[pair["kind"]] += 1
            if pair["kind"] not in source.wanted.kinds:
                continue
            row = conversation(pair, frame, number)
            if row is None:
                what["strange"] += 1
                continue
            what["pairs"] += 1
            what["last"] = number
            what["cut"] += sum(not frame.ends(pair[f"{side}_token_ids"]) for side in ("chosen", "rejected"))
            what["uneven"] += pair["weight"] != 1 or pair["target"] != 1
            yield row


def _frame(source: RunSource) -> Frame:
    """Of the chat template of the run's models, all of which have that of the first."""
    config, there = source.config.model, source.models()
    folder = source.store.model(there[-1]) if there else folder_of(config)
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    check_tokenizer(tokenizer, config.path)
    return Frame(ChatEncoder(tokenizer, cards.started(source)))


def _remark(source: RunSource, what: Counter[str], found: Counter[str]) -> None:
    if what["replayed"]:
        source.remarks.append(f"{what['replayed']} pairs of earlier iterations, trained on again, stand there once")
    if what["strange"]:
        source.remarks.append(f"{what['strange']} pairs are left out: their prompts are no chat with one message")
    if what["cut"]:
        source.remarks.append(
            f"{what['cut']} of {2 * what['pairs']} answers do not end with the model's end token; a chat template ends "
            "them all the same"
        )
    if what["uneven"]:
        source.remarks.append(f"{what['uneven']} pairs have a weight or target other than 1, which TRL does not read")
    if others := sorted(set(found) - set(source.wanted.kinds)):
        source.remarks.append(f"pairs of kind {', '.join(others)} are left out; --kind {others[0]} takes them")
    if missing := sorted(set(source.wanted.kinds) - set(found)):
        source.remarks.append(f"there are no pairs of kind {', '.join(missing)}")
