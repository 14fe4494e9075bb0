"""The preference buffer: groups in, pairs out, everything on disk before it is acknowledged.

A plain class; `rsrlm.runtime.actors` makes a Ray actor of it. Its file is an append-only journal of groups and of
"trained" marks, so a buffer opened on the same folder after a kill holds exactly what it had acknowledged.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rsrlm.records import PreferencePair
from rsrlm.store.atomic import read_lines

_PAIR = TypeAdapter(PreferencePair)


class PreferenceBuffer:
    """Groups of all iterations of one run, keyed by group id.

    Raises ValueError for marks on pairs that are not there.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._groups: dict[str, tuple[int, PreferencePair | None, str]] = {}
        self._pair_ids: set[str] = set()
        self._trained: dict[str, set[int]] = {}  # steps that used a pair: one for each epoch
        self._warning = ""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._restore()
        self._file = self._path.open("ab")

    def _restore(self) -> None:
        # To go on without a line is safe: a group of an unfinished iteration is put again, from a journal that was on
        # disk before it; of finished iterations nobody reads the pairs, and marks only count.
        self._warning = read_lines(self._path, self._take)

    def _take(self, entry: dict[str, Any]) -> None:
        if "trained" in entry:
            self._train(entry["trained"], entry["step"])
        elif "untrained_after" in entry:
            self._untrain(entry["iteration"], entry["untrained_after"])
        else:
            pair = None if entry["pair"] is None else _PAIR.validate_python(entry["pair"])
            self._keep(entry["group"], entry["iteration"], pair, entry["no_pair_reason"])

    def _keep(self, group: str, iteration: int, pair: PreferencePair | None, no_pair_reason: str) -> None:
        self._groups[group] = (iteration, pair, no_pair_reason)
        if pair is not None:
            self._pair_ids.add(pair.id)

    def warning(self) -> str:
        """What the user should know about the file that the buffer was opened on; "" for nothing."""
        return self._warning

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def put(self, group: str, iteration: int, pair: PreferencePair | None, no_pair_reason: str) -> bool:
        """Add a finished group; returns when it is on disk. A group that is there already stays as it is.

        True where that one has another pair: records that were lost have been made again, and differently. The first
        pair counts, since the learner may have trained on it, and it carries its own tokens.
        """
        if group in self._groups:
            return _trained_on(self._groups[group][1]) != _trained_on(pair)
        self._append(
            {
                "group": group,
                "iteration": iteration,
                "pair": None if pair is None else _PAIR.dump_python(pair, mode="json"),
                "no_pair_reason": no_pair_reason,
            }
        )
        self._keep(group, iteration, pair, no_pair_reason)
        return False

    def pairs(self, iteration: int, seed: int) -> list[PreferencePair]:
        """The iteration's pairs in training order, which depends on ids and seed alone."""
        found = [pair for at, pair, _ in self._groups.values() if at == iteration and pair is not None]
        found.sort(key=lambda pair: pair.id)
        random.Random(f"pairs {seed} {iteration}").shuffle(found)
        return found

    def mark_trained(self, pair_ids: list[str], step: int) -> None:
        """Note that optimizer step `step` (0 is the first of its iteration) used these pairs."""
        unknown = [pair for pair in pair_ids if pair not in self._pair_ids]
        if unknown:
            raise ValueError(f"pair {unknown[0]} is not in the buffer")
        self._append({"trained": pair_ids, "step": step})
        self._train(pair_ids, step)

    def _train(self, pair_ids: list[str], step: int) -> None:
        for pair in pair_ids:
            self._trained.setdefault(pair, set()).add(step)

    def forget_trained_from(self, iteration: int, step: int) -> None:
        """Steps from `step` on were lost with their process and will be replayed."""
        self._append({"untrained_after": step, "iteration": iteration})
        self._untrain(iteration, step)

    def _untrain(self, iteration: int, step: int) -> None:
        of_iteration = {pair.id for at, pair, _ in self._groups.values() if at == iteration and pair is not None}
        for pair in of_iteration & self._trained.keys():
            left = {one for one in self._trained.pop(pair) if one < step}
            if left:
                self._trained[pair] = left

    def groups(self, iteration: int) -> dict[str, str]:
        """Finished groups of an iteration: group id to the reason why it has no pair ("" when it has one)."""
        return {group: reason for group, (at, _, reason) in self._groups.items() if at == iteration}

    def trained(self, iteration: int) -> dict[str, int]:
        """Trained pairs of an iteration: pair id to the last optimizer step that used it."""
        of_iteration = {pair.id for at, pair, _ in self._groups.values() if at == iteration and pair is not None}
        return {pair: max(steps) for pair, steps in self._trained.items() if pair in of_iteration}

    def status(self) -> dict[str, int]:
        """Counts, to look at while the run goes on."""
        pairs = sum(pair is not None for _, pair, _ in self._groups.values())
        return {"groups": len(self._groups), "pairs": pairs, "trained": len(self._trained)}


def _trained_on(pair: PreferencePair | None) -> tuple[Any, ...]:
    """Which pair it is. Scores are left out: one judgement made anew moves those of a whole iteration's judge pairs."""
    return () if pair is None else (pair.id, pair.chosen_token_ids, pair.rejected_token_ids)
