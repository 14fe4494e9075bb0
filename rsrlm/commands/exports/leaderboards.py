"""Answers for the tools of AlpacaEval, MT-Bench and Arena-Hard, each of which has judges of its own."""

import json
import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rsrlm.commands.exports.answers import Answer, ModelAnswers
from rsrlm.commands.exports.source import write_lines
from rsrlm.report.progress import Report

CATEGORY = "hard_prompt"  # one of Arena-Hard's, which choose its judge's prompt and the baseline
_CODE = re.compile("```([^`]*)```")
_MARKS = {
    "header_count": {f"h{n}": rf"^#{{{n}}}\s" for n in range(1, 7)},
    "list_count": {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"},
    "bold_count": {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"},
}


def alpaca_eval(answered: ModelAnswers, out: Path, report: Report) -> str:
    """`MODEL.json` for each model: a list of instruction, output and generator."""
    out.mkdir(parents=True)
    for model, answers in answered.models.items():
        outputs = [
            {"instruction": one.prompt, "output": one.text, "generator": model, "dataset": answered.name}
            for one in answers
        ]
        (out / f"{model}.json").write_text(json.dumps(outputs, indent=2, ensure_ascii=False), encoding="utf-8")
    first, *_, last = [*answered.models, *answered.models]
    return (
        f"{_counted(answered)}; alpaca_eval evaluate --model_outputs {last}.json --reference_outputs {first}.json "
        "--annotators_config NAME"
    )


def mt_bench(answered: ModelAnswers, out: Path, report: Report) -> str:
    """`question.jsonl` and `model_answer/MODEL.jsonl`, as in FastChat's data/mt_bench: first turns alone."""
    ids = _numbers(answered)
    questions = _questions(answered)
    write_lines(
        out / "question.jsonl",
        [
            {
                "question_id": ids[one.prompt_id],
                "category": "heldout",
                "turns": [one.prompt],
                "prompt_id": one.prompt_id,
            }
            for one in questions
        ],
    )
    for model, answers in answered.models.items():
        lines = [
            {
                "question_id": ids[one.prompt_id],
                "answer_id": _id(model, one.prompt_id),
                "model_id": model,
                "choices": [{"index": 0, "turns": [one.text]}],
                "tstamp": answered.at,
            }
            for one in answers
        ]
        write_lines(out / "model_answer" / f"{model}.jsonl", lines)
    return f"{_counted(answered)}; put the folder into FastChat's llm_judge/data, its name is the --bench-name"


def arena_hard(answered: ModelAnswers, out: Path, report: Report) -> str:
    """`question.jsonl` and `model_answer/MODEL.jsonl`, as in arena-hard-auto's data/arena-hard-v2.0."""
    questions = _questions(answered)
    write_lines(
        out / "question.jsonl",
        [
            {"uid": one.prompt_id, "category": CATEGORY, "subcategory": answered.name, "prompt": one.prompt}
            for one in questions
        ],
    )
    for model, answers in answered.models.items():
        lines = [
            {
                "uid": one.prompt_id,
                "ans_id": _id(model, one.prompt_id),
                "model": model,
                "messages": [
                    {"role": "user", "content": one.prompt},
                    {"role": "assistant", "content": {"answer": one.text}},
                ],
                "tstamp": answered.at,
                **({} if one.tokens is None else {"metadata": {"token_len": one.tokens, **marks(one.text)}}),
            }
            for one in answers
        ]
        write_lines(out / "model_answer" / f"{model}.jsonl", lines)
    return f"{_counted(answered)}; put the folder into arena-hard-auto's data, its name is the bench_name"


def marks(text: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold texts outside of code, which Arena-Hard takes account of as style."""
    prose = _CODE.sub("", text)
    return {
        kind: {name: len(re.findall(pattern, prose, re.MULTILINE)) for name, pattern in patterns.items()}
        for kind, patterns in _MARKS.items()
    }


def _questions(answered: ModelAnswers) -> Sequence[Answer]:
    """Each prompt once, in the order of the model that has answered most."""
    return max(answered.models.values(), key=len)


def _numbers(answered: ModelAnswers) -> dict[str, Any]:
    """FastChat's questions have numbers: ids that are some stay, others are numbered from 1 on."""
    ids = [one.prompt_id for one in _questions(answered)]
    own = all(one.isdecimal() and one == str(int(one)) for one in ids)
    return {one: int(one) if own else place for place, one in enumerate(ids, start=1)}


def _id(model: str, prompt: str) -> str:
    return blake2b(f"{model}/{prompt}".encode(), digest_size=11).hexdigest()


def _counted(answered: ModelAnswers) -> str:
    return ", ".join(f"{model} {len(answers)} answers" for model, answers in answered.models.items())
