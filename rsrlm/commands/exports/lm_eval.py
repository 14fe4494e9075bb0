"""How lm-evaluation-harness measures a model of a run: the command, as a script."""

import shlex
from pathlib import Path

from rsrlm.commands.exports.source import RunSource
from rsrlm.report.progress import Report

# Those of Self-Rewarding Language Models (2401.10020v3, section 3.3), by the harness's names.
TASKS = (
    "arc_easy", "arc_challenge", "hellaswag", "social_iqa", "piqa", "gsm8k", "mmlu", "openbookqa", "nq_open",
)  # fmt: skip

SCRIPT = """\
#!/bin/sh
# {model} of run {name} under lm-evaluation-harness (pip install "lm_eval[hf]", or "lm_eval[vllm]").
# sh run.sh [hf|vllm] [options of lm_eval, such as --limit 100 --apply_chat_template]
# TASKS=mmlu,gsm8k sh run.sh chooses other tasks.
set -eu
model={folder}
tasks=${{TASKS:-{tasks}}}
backend=${{1:-hf}}
[ $# -eq 0 ] || shift
case $backend in
  hf) of_backend="" batch=8 ;;
  vllm) of_backend=",max_model_len={room}" batch=auto ;;
  *) echo "run.sh: hf or vllm, not $backend" >&2; exit 2 ;;
esac
exec lm_eval run --model "$backend" --model_args "pretrained=$model,dtype={dtype}{code}$of_backend" \\
  --tasks "$tasks" --batch_size "$batch" --output_path "$(dirname "$0")/results-$backend" "$@"
"""


def write(source: RunSource, out: Path, report: Report) -> str:
    """`run.sh`, which is printed too."""
    name, folder = source.model()
    config = source.config
    script = SCRIPT.format(
        model=name,
        name=config.name,
        folder=shlex.quote(str(folder)),
        tasks=",".join(TASKS),
        dtype=config.model.dtype,
        code=",trust_remote_code=True" if config.model.trust_remote_code else "",
        room=config.engine.max_model_len,
    )
    out.mkdir(parents=True)
    (out / "run.sh").write_text(script, encoding="utf-8")
    report.line(script)
    return f"{name}; start it with sh run.sh hf"
