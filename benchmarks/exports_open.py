"""The other side of exports.py: the tools themselves. Runs in the environment of `make bench-env`, without rsrlm.

Each function opens one export as its tool does, and returns what it found in it.
"""

import json
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

VERDICT = "My verdict is [[A>B]]. Rating: [[7]]"  # what the judge says, whatever it is asked


def versions(tools: dict[str, str]) -> dict[str, str]:
    found = {}
    for name, package in tools.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def trl(asked: dict[str, str]) -> dict[str, Any]:
    """Two optimizer steps, and how many of the pairs TRL has tokenised to what the run trained on."""
    import torch
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    rows = load_dataset(asked["export"], split="train")
    torch.manual_seed(0)
    trainer = DPOTrainer(
        model=asked["base"],
        args=DPOConfig(
            output_dir=f"{asked['scratch']}/trl", max_steps=2, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, max_length=None, learning_rate=1e-6,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    files = sorted(map(str, Path(asked["run"]).glob("iterations/*/pairs.parquet")))
    stored = {row["id"]: row for row in load_dataset("parquet", data_files=files, split="train")}
    prompts = answers = 0
    for row, made in zip(rows, trainer.train_dataset, strict=True):
        pair = stored[row["id"]]
        read = made["prompt_ids"] + made["chosen_ids"]
        trained = pair["prompt_token_ids"] + pair["chosen_token_ids"]
        prompts += made["prompt_ids"] == pair["prompt_token_ids"]
        answers += read[: len(trained)] == trained
    return {
        "found": {"pairs": len(rows), "steps": trainer.state.global_step, "losses": losses},
        "kinds": {kind: rows["kind"][:].count(kind) for kind in sorted(set(rows["kind"]))},
        "prompts_of_the_same_tokens": prompts,
        "prompts_and_chosen_of_the_same_tokens": answers,
    }


def datasets(asked: dict[str, str]) -> dict[str, Any]:
    from datasets import get_dataset_config_names, load_dataset

    names = get_dataset_config_names(asked["export"])
    return {"found": {name: len(load_dataset(asked["export"], name, split="train")) for name in names}}


def alpaca_eval(asked: dict[str, str]) -> dict[str, Any]:
    """The last model against the first, by an annotator that prefers the text shown first; it shuffles them."""
    from alpaca_eval import evaluate

    folder = Path(asked["export"])
    models = sorted(folder.glob("*.json"))
    config = Path(asked["scratch"]) / "annotator"
    config.mkdir(exist_ok=True)
    (config / "prompt.txt").write_text("{instruction}\n(a) {output_1}\n(b) {output_2}\n")
    configs = {
        "fixed": {
            "prompt_template": str(config / "prompt.txt"),
            "fn_completions": "test_completions",
            "completions_kwargs": {"model_name": "fixed", "value": "Output (a)"},
            "fn_completion_parser": "regex_parser",
            "completion_parser_kwargs": {"outputs_to_match": {1: r"Output \(a\)", 2: r"Output \(b\)"}},
            "batch_size": 1,
        }
    }
    import yaml

    (config / "configs.yaml").write_text(yaml.safe_dump(configs))
    leaderboard, annotations = evaluate(
        model_outputs=str(models[-1]),
        reference_outputs=str(models[0]),
        annotators_config=str(config / "configs.yaml"),
        output_path=None,
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
        fn_metric="get_winrate",
        sort_by="win_rate",
        caching_path=None,
    )
    row = leaderboard.iloc[0]
    found = {"model": leaderboard.index[0], "annotated": len(annotations), "win_rate": float(row["win_rate"])}
    return {"found": found, "models": len(models)}


def mt_bench(asked: dict[str, str]) -> dict[str, Any]:
    """FastChat's own loading, checks, matches and ratings; its judge is answered for."""
    from fastchat.llm_judge import common

    folder = Path(asked["export"])
    questions = common.load_questions(str(folder / "question.jsonl"), None, None)
    answers = common.load_model_answers(str(folder / "model_answer"))
    judge = common.Judge("gpt-4", {
        "name": "single-v1", "type": "single", "system_prompt": "", "output_format": "[[rating]]",
        "prompt_template": "{question}\n{answer}",
    })  # fmt: skip
    models = common.get_model_list(str(folder / "model_answer"))
    common.check_data(questions, answers, {}, models, {"default": judge})
    common.chat_completion_openai = lambda *_, **__: VERDICT
    matches = [
        common.MatchSingle(dict(question), model, answers[model][question["question_id"]], judge)
        for question in questions
        for model in models
    ]
    ratings = [common.play_a_match_single(match, None) for match in matches]
    return {
        "found": {"questions": len(questions), "models": models, "rated": sum(one["score"] == 7 for one in ratings)}
    }


def arena_hard(asked: dict[str, str]) -> dict[str, Any]:
    """Arena-Hard's own judging and scoring, from its checkout, with the first model as baseline; its judge is answered
    for."""
    work = Path(asked["scratch"]) / "arena"
    (work / "data").mkdir(parents=True, exist_ok=True)
    (work / "data" / "mine").symlink_to(asked["export"])
    os.chdir(work)
    sys.path.insert(0, asked["arena_hard"])
    sys.modules.setdefault("boto3", types.ModuleType("boto3"))  # of a judge that is not asked
    import gen_judgment
    import show_result
    from utils import completion

    questions = completion.load_questions("data/mine/question.jsonl")
    answers = completion.load_model_answers("data/mine/model_answer")
    completion.registered_api_completion["fixed"] = lambda **_: {"answer": VERDICT}
    first, *others = sorted(answers)
    judged = Path(asked["scratch"]) / "judged"
    configs = {
        "judge_model": "fixed", "prompt_template": "{QUESTION}{ANSWER_A}{ANSWER_B}", "temperature": 0, "max_tokens": 9,
        "regex_patterns": [r"\[\[([AB<>=]+)\]\]"],
    }  # fmt: skip
    for model in others:
        judged.mkdir(exist_ok=True)
        for question in questions:
            gen_judgment.judgment({
                "question": question, "answer": answers[model][question["uid"]],
                "baseline": answers[first][question["uid"]],
                "reference": None, "configs": configs, "settings": {"api_type": "fixed", "endpoints": None},
                "output_file": str(judged / f"{model}.jsonl"),
            })  # fmt: skip
    (work / "data" / "scored" / "model_judgment").mkdir(parents=True, exist_ok=True)
    (work / "data" / "scored" / "model_judgment" / "fixed").symlink_to(judged)
    battles = show_result.load_judgments(["fixed"], "scored")
    style = show_result.get_model_style_metadata("mine")
    commit = subprocess.run(
        ["git", "-C", asked["arena_hard"], "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    return {
        "found": {"questions": len(questions), "models": sorted(answers), "battles": len(battles)},
        "mean_score": float(battles["scores"].astype(float).mean()),  # A is always better, in both orders: a half
        "answers_with_style": sum(map(len, style.values())),
        "commit": commit.stdout.strip(),
    }


def lm_eval(asked: dict[str, str]) -> dict[str, Any]:
    """The script as it was written, on a task of ten sums."""
    folder = Path(asked["scratch"]) / "tasks"
    folder.mkdir(exist_ok=True)
    sums = [{"question": f"{n} + 1 =", "choices": [str(n + 1), str(n + 7)], "answer": 0} for n in range(10)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sums))
    task = {
        "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    import yaml

    (folder / "sums.yaml").write_text(yaml.safe_dump(task))
    script = Path(asked["export"]) / "run.sh"
    more = ["--device", "cpu"] if asked["backend"] == "hf" else []
    done = subprocess.run(
        ["sh", str(script), asked["backend"], "--include_path", str(folder), *more],
        env={**os.environ, "TASKS": "sums", "VLLM_CPU_KVCACHE_SPACE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    (result,) = script.parent.glob(f"results-{asked['backend']}/**/results_*.json")
    found = json.loads(result.read_text())
    return {"found": {"n": found["n-samples"]["sums"]["effective"], "acc": found["results"]["sums"]["acc,none"]}}


def model(asked: dict[str, str]) -> dict[str, Any]:
    """transformers loads the folder and answers; the card is one that huggingface_hub reads."""
    return {"found": _answer(asked["export"]), "card": _card(asked["export"])}


def adapter(asked: dict[str, str]) -> dict[str, Any]:
    """peft loads the folder on the model that it names, or here on the run's; how far its weights are from those of the
    run's last model is said."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(asked["base"], dtype=torch.float32)
    before = {name: one.clone() for name, one in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, asked["export"]).merge_and_unload().state_dict()
    last = max(Path(asked["run"]).glob("models/M*"), key=lambda path: int(path.name[1:]))
    whole = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32).state_dict()
    apart = max(float((merged[name] - one).abs().max()) for name, one in whole.items())
    moved = max(float((before[name] - one).abs().max()) for name, one in whole.items())
    config = json.loads((Path(asked["export"]) / "adapter_config.json").read_text())
    found = {"rank": config["r"], "largest_change": moved, "largest_difference_from_the_whole_model": apart}
    return {"found": found, "card": _card(asked["export"])}


def _answer(folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = loaded.generate(**chat, max_new_tokens=12, do_sample=False)
    return {
        "parameters": loaded.num_parameters(),
        "answer": tokenizer.decode(made[0][chat["input_ids"].shape[1] :], skip_special_tokens=True),
    }


def _card(folder: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    data = ModelCard.load(Path(folder) / "README.md").data.to_dict()
    return {name: data[name] for name in ("base_model", "library_name", "pipeline_tag", "license", "tags")}


if __name__ == "__main__":
    what, given = sys.argv[1], json.loads(sys.argv[2])
    if what == "versions":
        print(json.dumps(versions(given)))
    else:
        print("SAID " + json.dumps(globals()[what](given)))
