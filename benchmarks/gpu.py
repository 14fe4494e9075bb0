"""Does the learner do on a GPU what it does on a CPU, how fast, and in how much memory? One GPU, under ten minutes.

    python benchmarks/gpu.py                       # benchmarks/results/gpu.json

`equal`: two optimizer steps of a small model in float32, on the CPU and on the GPU, and on the GPU in bfloat16 with
every ZeRO stage. `speed`: steps of a model of 1.2 billion random weights in bfloat16, and in the first case gathering
and writing the weights, as before they go to the engines. Every case runs in a process of its own. Needs torch with
CUDA, transformers and DeepSpeed, and neither Ray nor vLLM.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
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


CASES = [
    Case("equal, CPU", "small", "cpu"),
    Case("equal, GPU", "small", "cuda"),
    *(Case(f"equal, GPU, bfloat16, ZeRO {stage}", "small", "cuda", "bfloat16", stage) for stage in (0, 1, 2, 3)),
    Case("speed, chat", "billion", "cuda", "bfloat16", 1, 1, False, 32, 66, 157, 3, True),
    Case("speed, chat, micro-batches of 4", "billion", "cuda", "bfloat16", 1, 4, False, 32, 66, 157, 3),
    Case("speed, chat, micro-batches of 4, checkpointing", "billion", "cuda", "bfloat16", 1, 4, True, 32, 66, 157, 3),
    Case("speed, long", "billion", "cuda", "bfloat16", 1, 1, False, 16, 600, 700, 3),
    Case("speed, 8k tokens in a row, checkpointing", "billion", "cuda", "bfloat16", 1, 1, True, 4, 2000, 3000, 2),
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
        config = LlamaConfig(**(SMALL if case.model == "small" else BILLION), pad_token_id=0)
        dtype = torch.float32 if case.model == "small" else torch.bfloat16
        with torch.device("cuda" if case.model == "billion" else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(place)
    return place


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

        started = time.perf_counter()
        state = policy.state()
        gathered = time.perf_counter()
        weights.write(state, folder, "M1")
        found |= {"gather_s": gathered - started, "write_s": time.perf_counter() - gathered}
        weights.remove_stale(folder)
    policy.close()
    dist.destroy_process_group()
    if case.device == "cuda":
        found["device"] = torch.cuda.get_device_name(0)
    return found


def compared(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How far the GPU's numbers are from the CPU's, relatively, at most over the steps."""
    worst = {}
    of_cpu = found["equal, CPU"].get("steps")
    for name, one in found.items():
        if name.startswith("equal, GPU") and of_cpu and "steps" in one:
            worst[name] = max(
                abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-3)
                for ours, theirs in zip(one["steps"], of_cpu, strict=True)
                for key in ("loss", "chosen_logp", "rejected_logp", "grad_norm")
            )
    return worst


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for case in CASES:
            environment = {**os.environ, "DS_ACCELERATOR": case.device, "RSRLM_GPU_CASE": case.name}
            environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
            done = subprocess.run(
                [sys.executable, __file__, name], capture_output=True, text=True, env=environment, timeout=180,
                check=False,
            )  # fmt: skip
            answer = [line for line in done.stdout.splitlines() if line.startswith("{")]
            failed = {"failed": done.stderr[-2000:]}
            found[case.name] = json.loads(answer[-1]) if answer and not done.returncode else failed
            print(case.name, json.dumps(found[case.name])[:900], flush=True)
            out.mkdir(parents=True, exist_ok=True)
            data = {"cases": [asdict(one) for one in CASES], "figures": found, "difference_to_cpu": compared(found)}
            (out / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(compared(found), indent=1))


if __name__ == "__main__":
    if wanted := os.environ.get("RSRLM_GPU_CASE"):
        print(json.dumps(run_case(next(case for case in CASES if case.name == wanted), Path(sys.argv[1]))))
    else:
        main()
