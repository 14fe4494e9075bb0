"""`rsrlm sample` with a judge, with real Ray and vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def test_the_best_of_three_from_nothing_but_a_model(tiny_chat_model: Path, tmp_path: Path) -> None:
    """The engine's settings are those that the machine gives; a model with random weights puts little on digits."""
    rows = [{"id": f"p{number}", "prompt": f"Say {number}."} for number in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *(sys.executable, "-m", "rsrlm.cli", "sample", str(tiny_chat_model), "--in", "prompts.jsonl"),
        *("--out", "best.jsonl", "--responses", "3", "--best", "sample.max_tokens=16", "judge.min_mass=0"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    best = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [row["id"] for row in best] == ["p0", "p1", "p2", "p3"]
    assert all(0 <= row["points"] <= 5 and row["variance"] > 0 for row in best)
    summary = json.loads((tmp_path / "best.summary.json").read_text())
    assert (summary["rows"], summary["this_start"]["requests"]) == (4, 24)
    assert summary["this_start"]["prompt_tokens"] == summary["asked"]["prompt_tokens"] > 0
