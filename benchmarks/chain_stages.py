"""The other side of chain.py: the scripts that people run one after the other, each in a process of its own.

    python chain_stages.py generate|judge|train|load WORK.json

They need vLLM, transformers and TRL, and nothing of rsrlm. Each reads what the one before it has written beside
WORK.json, and notes in STAGE.json what it did until when.
"""

import json
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Work = Mapping[str, Any]
Row = dict[str, Any]
TIE = 1e-9
MARK = 0xF0000  # of private use: stands for a value while a template is rendered


class Clock:
    """Moments at which a kind of work was done, in seconds since 1970."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, float]] = []

    def __call__(self, what: str) -> None:
        self.marks.append((what, time.time()))


def engine(work: Work, model: str) -> tuple[Any, Any]:
    """vLLM with the model, and its tokenizer."""
    from transformers import AutoTokenizer
    from vllm import LLM

    return LLM(**{**work["engine"], "model": model}), AutoTokenizer.from_pretrained(model)


def asked(tokenizer: Any, template: str, fields: Mapping[str, str], prefix: str = "") -> list[int]:
    """The chat prompt of a template, with each value as the tokens of its text alone: what a model wrote must not
    become a special token."""
    import jinja2

    marks = {name: chr(MARK + place) for place, name in enumerate(fields)}
    turn = [{"role": "user", "content": jinja2.Template(template).render(marks)}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + prefix
    values = {mark: fields[name] for name, mark in marks.items()}
    ids: list[int] = []
    for piece in re.split(f"([{''.join(values)}])", chat):
        value = piece in values
        ids += tokenizer.encode(
            values[piece] if value else piece, add_special_tokens=False, split_special_tokens=value
        )  # fmt: skip
    return ids


def completed(llm: Any, requests: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Any]:
    """The output of each prompt with its sampling parameters, in one call: vLLM batches and shares what is alike."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in requests]
    outputs = llm.generate(prompts, [SamplingParams(**params) for _, params in requests], use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def generate(work: Work, folder: Path, clock: Clock) -> dict[str, Any]:
    llm, tokenizer = engine(work, work["model"])
    clock("start")
    requests, rows = [], []
    for prompt in work["prompts"]:
        ids = asked(tokenizer, "{{ prompt }}", {"prompt": prompt["text"]})
        for index, response in enumerate(prompt["responses"]):
            requests.append((ids, {**work["sampling"], "seed": response["seed"]}))
            rows.append({**response, "id": f"{prompt['id']}/{index}", "index": index, "prompt_ids": ids})
    for row, answer in zip(rows, completed(llm, requests), strict=True):
        row |= {
            "text": answer.text, "token_ids": list(answer.token_ids), "complete": answer.finish_reason == "stop",
        }  # fmt: skip
    (folder / "responses.json").write_text(json.dumps(rows))
    clock("generate")
    return {"tokens": sum(len(row["token_ids"]) for row in rows)}


def judge(work: Work, folder: Path, clock: Clock) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    llm, tokenizer = engine(work, work["model"])
    rows: list[Row] = json.loads((folder / "responses.json").read_text())
    rule, texts = work["judge"], {one["id"]: one["text"] for one in work["prompts"]}
    clock("start")
    before = len(tokenizer.encode(rule["prefix"], add_special_tokens=False))
    labels = [tokenizer.encode(rule["prefix"] + one, add_special_tokens=False)[before] for one in rule["labels"]]
    params: dict[str, Any] = {**rule["sampling"], "logprob_token_ids": labels or None}
    if rule["regex"]:
        params["structured_outputs"] = StructuredOutputsParams(regex=rule["regex"])
    requests = []
    for row in rows:
        fields = {"instruction": texts[row["id"].rpartition("/")[0]], "response": row["text"], "fence": row["fence"]}
        ids = asked(tokenizer, rule["template"], fields, rule["prefix"])
        requests += [(ids, {**params, "seed": seed}) for seed in row["judge_seeds"]]
    answers = iter(completed(llm, requests))
    for row in rows:
        found = [_points(next(answers), rule, labels) for _ in row["judge_seeds"]]
        readable = [one for one in found if one is not None]
        row["score"] = statistics.fmean(readable) if readable else None
    clock("judge")
    pairs = pairs_of(rows, work["order"])
    (folder / "pairs.json").write_text(json.dumps(pairs))
    clock("pair")
    return {"pairs": [one["id"] for one in pairs], "scores": {row["id"]: row["score"] for row in rows}}


def _points(answer: Any, rule: Work, labels: Sequence[int]) -> float | None:
    """The score of a judgement: the mean over the digits, or what its last line says; None if it cannot be read."""
    if labels:
        shares = [math.exp(answer.logprobs[0][label].logprob) for label in labels]
        if sum(shares) < rule["min_mass"]:
            return None
        return sum(int(name) * share for name, share in zip(rule["labels"], shares, strict=True)) / sum(shares)
    found = re.search(r"(?:^|\n)Score: ([0-5](?:\.\d+)?)\s*$", answer.text)
    return float(found[1]) if found and answer.finish_reason == "stop" else None


def pairs_of(rows: Sequence[Row], order: str) -> list[Row]:
    """The best of the responses that ended by themselves against the worst of all, prompt by prompt; in the order that
    `order` seeds."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["score"] is not None and row["text"].strip():
            groups.setdefault(row["id"].rpartition("/")[0], []).append(row)
    pairs = []
    for group in groups.values():
        ended = [row for row in group if row["complete"]]
        if len(group) < 2 or not ended:
            continue
        chosen = next(row for row in ended if row["score"] >= max(one["score"] for one in ended) - TIE)
        rejected = next(row for row in group if row["score"] <= min(one["score"] for one in group) + TIE)
        if chosen["score"] - rejected["score"] > TIE and chosen["token_ids"] != rejected["token_ids"]:
            pairs.append(
                {
                    "id": f"{chosen['id']}>{rejected['index']}", "prompt_ids": chosen["prompt_ids"],
                    "chosen_ids": chosen["token_ids"], "rejected_ids": rejected["token_ids"],
                }
            )  # fmt: skip
    pairs.sort(key=lambda one: one["id"])
    random.Random(order).shuffle(pairs)
    return pairs


def train(work: Work, folder: Path, clock: Clock) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):
        """Of the very token ids: nothing is rendered or cut."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
            clock("start")
            found = super()._precompute_ref_logps(*args, **options)
            clock("references")
            return found

    rule = work["train"]
    rows = json.loads((folder / "pairs.json").read_text())
    steps = math.ceil(len(rows) / rule["pairs_per_step"]) * rule["epochs"]
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rule["micro_batch"],
        gradient_accumulation_steps=rule["pairs_per_step"] // rule["micro_batch"],
        num_train_epochs=rule["epochs"],
        learning_rate=rule["lr"],
        lr_scheduler_type="cosine_with_min_lr",
        # A cycle that ends with the last step, and not one after it.
        lr_scheduler_kwargs={"min_lr": rule["lr_final"], "num_cycles": 0.5 * steps / max(1, steps - 1)},
        warmup_steps=0,
        beta=rule["beta"],
        precompute_ref_log_probs=True,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([{key: row[key] for key in row if key != "id"} for row in rows]),
        processing_class=tokenizer,
    )
    clock("start")
    trainer.train()
    clock("steps")
    trainer.save_model(str(folder / "M1"))
    clock("save")
    return {"losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def load(work: Work, folder: Path, clock: Clock) -> dict[str, Any]:
    engine(work, str(folder / "M1"))
    clock("start")
    return {}


if __name__ == "__main__":
    stage, file = sys.argv[1], Path(sys.argv[2])
    done, watch = {"generate": generate, "judge": judge, "train": train, "load": load}[stage], Clock()
    facts = done(json.loads(file.read_text()), file.parent, watch)
    (file.parent / f"{stage}.json").write_text(json.dumps({**facts, "marks": watch.marks}))
