"""The two sides of learner.py: a process that holds a model, and does a round at each line on its standard input.

    python learner_sides.py SIDE JSON    # of what `Work` says

TRL's side needs nothing of rsrlm: it runs in an environment of its own.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """What a side is given. `pairs` holds token ids: prompt, chosen, rejected; all of them are one optimizer step."""

    model: str
    pairs: list[tuple[list[int], list[int], list[int]]]
    micro_batch: int
    rounds: int
    device: str
    dtype: str
    scratch: str
    weights: str = "float32"  # what TRL's optimizer keeps; rsrlm's always keeps float32
    lr: float = 1e-6


def say(**what: Any) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print("SAID " + json.dumps(what), flush=True)


def heard() -> None:
    """Wait for the next round."""
    if not sys.stdin.readline():
        sys.exit(0)


def memory_gib(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**20


def ended(device: str) -> float:
    """Now, when the device has done what it was told."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def rsrlm(work: Work) -> None:
    import deepspeed
    import torch.distributed as dist

    from rsrlm.records import PreferencePair
    from rsrlm.runtime.policy import Policy, load_policy
    from rsrlm.runtime.reference import Reference
    from rsrlm.settings.machine import ModelConfig
    from rsrlm.settings.train import DPO
    from rsrlm.store.items import ItemFile, write_items

    deepspeed.init_distributed(dist_backend="nccl" if work.device == "cuda" else "gloo", verbose=False)
    items_path = Path(work.scratch) / f"items-{dist.get_rank()}"
    made = [
        PreferencePair(
            id=f"00/{number}/0>1", prompt_id=str(number), kind="actor", chosen_id="0", rejected_id="1",
            prompt_token_ids=tuple(prompt), chosen_token_ids=tuple(chosen), rejected_token_ids=tuple(rejected),
            chosen_score=1.0, rejected_score=0.0, weight_version="M0",
        )
        for number, (prompt, chosen, rejected) in enumerate(work.pairs)
    ]  # fmt: skip
    write_items(items_path, made)
    items: ItemFile[Any] = ItemFile(items_path)
    train = DPO(
        lr=work.lr, pairs_per_step=len(made), micro_batch=work.micro_batch,
        zero_stage=0 if work.dtype == "float32" else 1,
    )  # fmt: skip
    policy = Policy(
        load_policy(work.model, ModelConfig(path=work.model, dtype=work.dtype), train), train, work.dtype, items
    )
    folder = Path(work.scratch) / "reference"
    policy.write_reference(folder, lambda done, of: None)
    policy.reference = Reference(folder, policy.outline(range(len(items))).response_tokens)
    policy.step(range(len(items)), work.lr)
    say(ready=True)
    for number in range(work.rounds):
        heard()
        started = ended(work.device)
        policy.write_reference(Path(work.scratch) / f"reference-{number}", lambda done, of: None)
        referred = ended(work.device)
        row = policy.step(range(len(items)), work.lr)
        stepped = ended(work.device)
        say(
            reference_s=referred - started, step_s=stepped - referred, loss=row["loss"],
            grad_norm=row["grad_norm"], memory_gib=memory_gib(work.device),
        )  # fmt: skip


def trl(work: Work) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Rounds(TrainerCallback):
        """A round is an optimizer step of the trainer's own loop. The first warms up."""

        def __init__(self) -> None:
            self.said: dict[str, float] = {}

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                return
            heard()
            started = ended(work.device)
            for batch in trainer.batches:
                trainer.compute_ref_log_probs(trainer.model, batch)
            self.started = ended(work.device)
            self.said = {"reference_s": self.started - started}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self.said:
                say(ready=True)
                return
            self.said["step_s"] = ended(work.device) - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if self.said and "loss" in logs:
                say(**self.said, loss=logs["loss"], grad_norm=logs["grad_norm"], memory_gib=memory_gib(work.device))

    class Tokenized(DPOTrainer):
        """Of the very token ids: nothing is rendered or cut."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in work.pairs]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config = DPOConfig(
        output_dir=work.scratch + "/trl",
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=len(rows) // (work.micro_batch * ranks),
        max_steps=work.rounds + 1,
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        beta=0.1,
        precompute_ref_log_probs=True,
        max_length=None,
        gradient_checkpointing=False,
        bf16=work.dtype == "bfloat16",
        use_cpu=work.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=work.device == "cuda",
        seed=0,
    )
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.weights))
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Tokenized(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[Rounds()],
    )  # fmt: skip
    own = rows[int(os.environ.get("RANK", "0")) :: ranks]
    trainer.batches = [
        {
            name: tensor.to(work.device)
            for name, tensor in trainer.data_collator(own[at : at + work.micro_batch]).items()
        }
        for at in range(0, len(own), work.micro_batch)
    ]
    trainer.train()


if __name__ == "__main__":
    {"rsrlm": rsrlm, "trl": trl}[sys.argv[1]](Work(**json.loads(Path(sys.argv[2]).read_text())))
