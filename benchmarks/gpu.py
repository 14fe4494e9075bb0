"""Does rsrlm do on a GPU what it does on a CPU, how fast, and in how much memory? One GPU, under ten minutes.

    python benchmarks/gpu.py                       # all: benchmarks/results/gpu.json
    python benchmarks/gpu.py --only engine         # or learner, or run; --case "engine, async": one of them
    python benchmarks/gpu.py --tokenizer FOLDER    # of the engines' model; by default that of the built-in model

Learner. `equal`: two optimizer steps of a small model in float32, on the CPU and on the GPU, and on the GPU in bfloat16
with every ZeRO stage. `speed`: steps of a model of 1.2 billion random weights in bfloat16, and in the first case
gathering and writing the weights, as before they go to the engines. Needs neither Ray nor vLLM.

Engine, of 1.1 billion random weights in bfloat16: tokens a second of 512 requests; seconds of an update, and whether
the tokens of two versions come again when they are loaded again; memory that it gives up while it sleeps. No Ray.

Run: two self-rewarding iterations of the same model, `rsrlm run` with an engine and a rank that share the GPU.

Every case runs in a process of its own.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEAK_TFLOPS = 989.0  # of an H100 or H200, bfloat16, dense

SMALL = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
BILLION = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


SERVED = {**BILLION, "vocab_size": 49152}  # by engines: of the built-in model's tokenizer
ENDING = {**SERVED, "tie_word_embeddings": False}
SHAPES = {"small": SMALL, "billion": BILLION, "served": SERVED, "ending": ENDING}


@dataclass(frozen=True)
class Case:
    """One process: a model, where and how it is trained, and on pairs of how many tokens."""

    name: str
    model: str
    device: str
    dtype: str = "float32"
    zero_stage: int = 0
    micro_batch: int = 1
    checkpointing: bool = False
    pairs: int = 8
    prompt: int = 40
    response: int = 30
    steps: int = 2
    write: bool = False
    part: str = "learner"
    kind: str = ""  # of engine
    eager: bool = False
    limit_s: int = 180


CASES = [
    Case("equal, CPU", "small", "cpu"),
    Case("equal, GPU", "small", "cuda"),
    *(Case(f"equal, GPU, bfloat16, ZeRO {stage}", "small", "cuda", "bfloat16", stage) for stage in (0, 1, 2, 3)),
    Case("speed, chat", "billion", "cuda", "bfloat16", 1, 1, False, 32, 66, 157, 3, True),
    Case("speed, chat, micro-batches of 4", "billion", "cuda", "bfloat16", 1, 4, False, 32, 66, 157, 3),
    Case("speed, chat, micro-batches of 16", "billion", "cuda", "bfloat16", 1, 16, False, 32, 66, 157, 3),
    Case("speed, chat, micro-batches of 4, checkpointing", "billion", "cuda", "bfloat16", 1, 4, True, 32, 66, 157, 3),
    Case("speed, long", "billion", "cuda", "bfloat16", 1, 1, False, 16, 600, 700, 3),
    Case("speed, 8k tokens in a row, checkpointing", "billion", "cuda", "bfloat16", 1, 1, True, 4, 2000, 3000, 2),
    Case("engine, in process, no graphs", "served", "cuda", "bfloat16", part="engine", kind="inprocess", eager=True),
    Case("engine, in process", "served", "cuda", "bfloat16", part="engine", kind="inprocess"),
    Case("engine, async", "served", "cuda", "bfloat16", part="engine", kind="async"),
    Case("run, one GPU for both", "ending", "cuda", "bfloat16", part="run", kind="async", limit_s=540),
]  # fmt: skip


def made_pairs(case: Case, vocabulary: int) -> list[Any]:
    from rsrlm.records import PreferencePair

    rng = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(count))

    return [
        PreferencePair(
            id=f"00/{number}/0>1", prompt_id=str(number), kind="actor", chosen_id="0", rejected_id="1",
            prompt_token_ids=tokens(case.prompt), chosen_token_ids=tokens(case.response - number % 3),
            rejected_token_ids=tokens(case.response), chosen_score=1.0, rejected_score=0.0, weight_version="M0",
        )
        for number in range(case.pairs)
    ]  # fmt: skip


def model_folder(case: Case, folder: Path) -> Path:
    """Random weights of the case's shape. On the GPU where there is one to make them: seconds in place of a minute."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    place = folder / case.model
    if not place.exists():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[case.model], pad_token_id=0)
        dtype = torch.float32 if case.model == "small" else torch.bfloat16
        with torch.device("cuda" if case.model != "small" and torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if case.model == "ending":
            end_after(128, model)
        model.save_pretrained(place)
        if case.model in ("served", "ending"):
            for file in Path(os.environ["RSRLM_GPU_TOKENIZER"]).iterdir():
                if "token" in file.name or file.suffix in (".jinja", ".txt"):
                    shutil.copy(file, place)
    return place


def end_after(tokens: int, model: Any) -> None:
    """Let random weights end an answer after so many tokens on the average, or none of them would be complete: what
    all embeddings share says so to the head, and layers add next to nothing to it."""
    import torch

    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.01
            layer.mlp.down_proj.weight *= 0.01
        model.get_input_embeddings().weight[:, 0] = 3.0  # above all other parts: after the norm it is sqrt(H)
        head = model.get_output_embeddings().weight
        head[:, 0] = 0.0
        head[model.config.eos_token_id] = 0.0
        head[model.config.eos_token_id, 0] = math.log(len(head) / tokens) / math.sqrt(head.shape[1])


def run_config(case: Case, folder: Path, runs: str) -> Any:
    """Of a run whose engine and rank share the GPU."""
    from rsrlm.config import resolve

    return resolve(
        {
            "name": "gpu", "runs": runs, "iterations": 2, "model": {"path": str(folder), "dtype": "bfloat16"},
            "prompts": {"path": "builtin", "per_iteration": 64, "heldout": 32},
            "sample": {"responses": 4, "max_tokens": 256, "temperature": 0.8},
            "judge": {"kind": "digits", "fence_salt": "", "min_mass": 0},
            "train": {"lr": 1e-6, "pairs_per_step": 32, "micro_batch": 8, "zero_stage": 1, "gpus": 1, "threads": 8},
            "engine": {
                "kind": case.kind, "gpus": 1, "max_model_len": 2048, "gpu_share": 0.85, "threads": 8,
                "enforce_eager": case.eager,
            },
            "ray": {"share_gpus": True, "object_store_mib": 500},
        }
    )  # fmt: skip


def serve_case(case: Case, folder: Path) -> dict[str, Any]:
    """An engine without Ray."""
    place = model_folder(case, folder)
    return asyncio.run(_served(case, folder, place))


async def _served(case: Case, folder: Path, place: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    from rsrlm.records import Completion, Request, Sampling
    from rsrlm.runtime import weights
    from rsrlm.runtime.async_engine import AsyncEngine
    from rsrlm.runtime.inprocess_engine import InProcessEngine

    other = load_file(place / "model.safetensors")
    changed = {name: tensor * 1.02 for name, tensor in other.items()}
    shapes = weights.shapes_of(other)
    files = {
        version: weights.write(shapes, tensors.items(), folder, version)
        for version, tensors in (("M0", other), ("M1", changed))
    }
    del other, changed
    started = time.perf_counter()
    made = {"inprocess": InProcessEngine, "async": AsyncEngine}[case.kind]
    engine = made(run_config(case, place, str(folder)), str(place), "M0", 0)
    numbers = iter(range(10**9))
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(20, 40000) for _ in range(115)) for _ in range(512)]

    async def answers(count: int, tokens: int, temperature: float) -> list[Any]:
        sampling = Sampling(temperature=temperature, top_p=1.0, max_tokens=tokens, seed=1)
        asked = [
            Request(id=f"r{next(numbers)}", prompt_token_ids=prompt, sampling=sampling, priority=0)
            for prompt in prompts[:count]
        ]
        found = await engine.generate(asked)
        for one in found:
            if not isinstance(one, Completion):
                raise one
        return found

    def tokens(found: list[Any]) -> list[tuple[int, ...]]:
        return [one.token_ids for one in found]

    found: dict[str, Any] = {}
    await answers(1, 1, 0.0)
    found["start_s"] = time.perf_counter() - started
    await answers(64, 16, 0.8)
    started = time.perf_counter()
    sampled = await answers(512, 256, 0.8)
    found["tokens_per_s"] = sum(len(one.token_ids) for one in sampled) / (time.perf_counter() - started)
    found["bytes"] = files["M1"][0].size

    async def load(version: str) -> list[tuple[int, ...]]:
        """Answers with that version alone: an update empties the cache, in which another batch may have rounded in
        another way."""
        found["update"] = await engine.update({"files": [asdict(one) for one in files[version]]}, version)
        answered = await answers(4, 32, 0.0)
        if {one.weight_version for one in answered} != {version}:
            raise RuntimeError(f"answered by another version than {version}")
        return tokens(answered)

    first = await load("M0")
    found["greedy_again"] = tokens(await answers(4, 32, 0.0)) == first
    started = time.perf_counter()
    second = await load("M1")
    found["update_s"] = time.perf_counter() - started
    found["another_version"] = second != first
    found["first_version_again"] = await load("M0") == first
    used = _used_gib()
    started = time.perf_counter()
    await engine.sleep()
    found["sleep_s"] = time.perf_counter() - started
    found["awake_gib"], found["asleep_gib"] = used, _used_gib()
    started = time.perf_counter()
    await engine.wake()
    found["wake_s"] = time.perf_counter() - started
    found["after_sleep_again"] = tokens(await answers(4, 32, 0.0)) == first
    engine.close()
    weights.remove_stale(folder)
    return found


def _used_gib() -> float:
    """Of the GPU, by all processes."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024


def whole_case(case: Case, folder: Path) -> dict[str, Any]:
    """`rsrlm run`."""
    from rsrlm.config import dump

    place = model_folder(case, folder)
    file = folder / "run.yaml"
    file.write_text(dump(run_config(case, place, str(folder / "runs"))))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "rsrlm.cli", "run", str(file)], capture_output=True, text=True, check=False,
        timeout=case.limit_s - 20,
    )  # fmt: skip
    found: dict[str, Any] = {"seconds": time.perf_counter() - started}
    print(done.stdout[-20000:], done.stderr[-10000:], flush=True)
    run = folder / "runs" / "gpu"
    events = [json.loads(line) for line in (run / "events.jsonl").open()] if (run / "events.jsonl").exists() else []
    found["engine_up"] = [one.get("seconds") for one in events if one["event"] == "engine_up"]
    rows = [json.loads(path.read_text()) for path in sorted(run.glob("iterations/*/metrics.json"))]
    kept = ("pairs", "optimizer_steps", "seconds", "stage_seconds", "learner", "published")
    found["iterations"] = [{name: row.get(name) for name in kept} for row in rows]
    if done.returncode:
        raise RuntimeError(f"rsrlm run ended with {done.returncode}: {done.stderr[-1500:] or done.stdout[-1500:]}")
    return found


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """In a process of its own."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from rsrlm.runtime.policy import Policy, load_policy
    from rsrlm.runtime.reference import Reference
    from rsrlm.settings.machine import ModelConfig
    from rsrlm.settings.train import DPO
    from rsrlm.store.items import ItemFile, write_items

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    deepspeed.init_distributed(dist_backend="nccl" if case.device == "cuda" else "gloo", verbose=False)
    started = time.perf_counter()
    path = model_folder(case, folder)
    config = ModelConfig(path=str(path), dtype=case.dtype)
    train = DPO(
        lr=1e-4 if case.model == "small" else 1e-7, pairs_per_step=case.pairs, micro_batch=case.micro_batch,
        zero_stage=case.zero_stage, gradient_checkpointing=case.checkpointing,
    )  # fmt: skip
    vocabulary = (SMALL if case.model == "small" else BILLION)["vocab_size"]
    write_items(folder / "items", made_pairs(case, int(vocabulary)))
    items: ItemFile[Any] = ItemFile(folder / "items")
    policy = Policy(load_policy(str(path), config, train), train, case.dtype, items)
    found: dict[str, Any] = {"ready_s": time.perf_counter() - started, "packed": policy.packed}
    started = time.perf_counter()
    reference = folder / f"reference {case.name}"
    policy.write_reference(reference, lambda done, of: None)
    policy.reference = Reference(reference, policy.outline(range(len(items))).response_tokens)
    found["reference_s"] = time.perf_counter() - started
    rows = [policy.step(range(len(items)), train.lr) for _ in range(case.steps)]
    names = ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "grad_norm", "kl_per_token")
    found["steps"] = [{name: row[name] for name in names} for row in rows]
    last = rows[-1]
    parameters = sum(one.numel() for one in policy.model.parameters())
    found |= {
        "parameters": parameters,
        "step_s": last["seconds"],
        "pairs_per_s": case.pairs / last["seconds"],
        "tokens_per_s": last["tokens_per_s"],
        "memory_gib": last["memory_gib"],
        "share_of_peak": 6 * parameters * last["tokens_per_s"] / (PEAK_TFLOPS * 1e12),
    }
    if case.write:
        from rsrlm.runtime import weights

        for name in ("first_write_s", "write_s"):
            started = time.perf_counter()
            weights.write(policy.shapes(), policy.state(), folder, "M1")
            found[name] = time.perf_counter() - started
        weights.remove_stale(folder)
    policy.close()
    dist.destroy_process_group()
    if case.device == "cuda":
        found["device"] = torch.cuda.get_device_name(0)
    return found


def compared(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How far the GPU's numbers are from the CPU's, relatively, at most over the steps."""
    worst = {}
    of_cpu = found.get("equal, CPU", {}).get("steps")
    for name, one in found.items():
        if name.startswith("equal, GPU") and of_cpu and "steps" in one:
            worst[name] = max(
                abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-3)
                for ours, theirs in zip(one["steps"], of_cpu, strict=True)
                for key in ("loss", "chosen_logp", "rejected_logp", "grad_norm")
            )
    return worst


def in_process(command: list[str], environment: dict[str, str], case: Case, logs: Path | None) -> dict[str, Any]:
    """The figures of a case, or the end of what it said before it failed."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    watch = threading.Timer(case.limit_s, os.killpg, (process.pid, signal.SIGKILL))
    watch.start()
    said, _ = process.communicate()
    watch.cancel()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # an engine's processes
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{case.name}.log".replace(" ", "_").replace(",", "")).write_text(said)
    answer = [line for line in said.splitlines() if line.startswith("{")]
    figures: dict[str, Any] = {"failed": said[-3000:]}
    if answer and not process.returncode:
        figures = json.loads(answer[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=("learner", "engine", "run"))
    parser.add_argument("--case", help="only the one of this name")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--logs", type=Path, help="a folder for what the cases print")
    given = parser.parse_args()
    out, cases = given.out, [one for one in CASES if given.only in (None, one.part) and given.case in (None, one.name)]
    before = json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").exists() else {"figures": {}}
    found: dict[str, dict[str, Any]] = before["figures"]
    if not given.tokenizer and any(case.model == "served" for case in cases):
        from rsrlm.model import folder_of
        from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig

        given.tokenizer = folder_of(ModelConfig(path=BUILTIN_MODEL))  # type: ignore[call-arg]
    with tempfile.TemporaryDirectory() as name:
        for case in cases:
            environment = {**os.environ, "DS_ACCELERATOR": case.device, "RSRLM_GPU_CASE": case.name}
            environment["RSRLM_GPU_TOKENIZER"] = str(given.tokenizer)
            environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
            found[case.name] = in_process([sys.executable, __file__, name], environment, case, given.logs)
            print(case.name, json.dumps(found[case.name])[:900], flush=True)
            out.mkdir(parents=True, exist_ok=True)
            data = {"cases": [asdict(one) for one in CASES], "figures": found, "difference_to_cpu": compared(found)}
            (out / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(compared(found), indent=1))


if __name__ == "__main__":
    if wanted := os.environ.get("RSRLM_GPU_CASE"):
        does = {"learner": run_case, "engine": serve_case, "run": whole_case}
        one = next(case for case in CASES if case.name == wanted)
        print(json.dumps(does[one.part](one, Path(sys.argv[1]))))
    else:
        main()
