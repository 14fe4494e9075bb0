"""Ranked seed data, divided once and for all."""

import json
from collections import Counter
from pathlib import Path

from rsrlm.data.ranked import RankedPrompt
from rsrlm.data.seed_data import Parts, divide, trained_on
from rsrlm.records import Prompt, wording
from rsrlm.settings.data import Data


def test_parts_never_overlap_and_long_ones_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "x" * (1 + i % 7), "rejected": "y"} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = divide(Data(trees=str(file), ift_share=0.5, eft_share=0.25, max_chars=5))
    ids = [prompt.id for part in (parts.ift, parts.eft, parts.evaluation) for prompt in part]
    assert len(ids) == len(set(ids)) == 60  # the rejected reply is short enough everywhere
    assert all((parts.ift, parts.eft, parts.evaluation))
    lengths = Counter(len(prompt.replies) for part in (parts.ift, parts.eft, parts.evaluation) for prompt in part)
    assert lengths == {1: 16, 2: 44}  # chosen ones of 6 and 7 characters are gone
    none = divide(Data(trees=str(file), max_chars=1))
    assert (none.ift, none.eft, none.evaluation) == ((), (), ())
    assert none.counts["prompts longer than data.max_chars, or without a shorter reply"] == 60


def test_what_is_trained_on_is_known_by_id_and_by_wording() -> None:
    """Of IFT and EFT, but not of evaluation; `others` are wordings of files and prompts."""
    prompts = {name: RankedPrompt(id=name, text=f"About {name}?", replies=()) for name in ("ift", "eft", "evaluation")}
    parts = Parts(ift=(prompts["ift"],), eft=(prompts["eft"],), evaluation=(prompts["evaluation"],), counts={})
    found = trained_on(parts, [wording("Say hi.")])
    assert [prompt in found for prompt in prompts.values()] == [True, True, False]
    assert Prompt(id="other", text="  ABOUT ift? ") in found  # the same question in other letters
    assert Prompt(id="ift", text="Something else") in found
    assert Prompt(id="x", text="say  HI.") in found
    assert Prompt(id="x", text="Say ho.") not in found
    assert prompts["ift"] not in trained_on(None)
