"""One rank of the learner outside Ray, started by test_learner.py: gradients and losses of one step, saved by rank 0.

`python learner_rank.py MODEL OUTPUT CASES` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; CASES is JSON: a
list of [zero_stage, micro_batch, options]. With method "sft" in the options the items are examples; with "mixed", pairs
of both kinds; "dtype" is the model's; the others are keys of `train`.
"""

import gc
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from rsrlm.records import Example, PreferencePair
from rsrlm.runtime.policy import Policy, load_policy
from rsrlm.runtime.reference import Reference
from rsrlm.settings.machine import ModelConfig
from rsrlm.settings.train import DPO, TrainRule
from rsrlm.store.items import ItemFile, write_items


def make_pairs() -> list[PreferencePair]:
    """Five pairs of unequal length; one response is a single token."""
    numbers = random.Random(3)
    lengths = [(5, 7, 3), (20, 1, 9), (3, 14, 14), (31, 6, 2), (9, 4, 25)]

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(numbers.randrange(3, 49000) for _ in range(count))

    return [
        PreferencePair(
            id=f"00/p{number}/0>1",
            prompt_id=f"p{number}",
            kind="actor",
            chosen_id="c",
            rejected_id="r",
            prompt_token_ids=tokens(prompt),
            chosen_token_ids=tokens(chosen),
            rejected_token_ids=tokens(rejected),
            chosen_score=2.0,
            rejected_score=1.0,
            weight_version="M0",
        )
        for number, (prompt, chosen, rejected) in enumerate(lengths)
    ]


def make_examples() -> list[Example]:
    """The prompts and chosen responses of the pairs: 32 target tokens."""
    return [
        Example(id=pair.id, kind="ift", prompt_token_ids=pair.prompt_token_ids, target_token_ids=pair.chosen_token_ids)
        for pair in make_pairs()
    ]


def live_bytes() -> int:
    """Of all tensors of this process."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def main() -> None:
    folder, output, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    found = []
    for stage, micro_batch, options in cases:
        sft = options.pop("method", "") == "sft"
        pairs: list[Any] = make_examples() if sft else make_pairs()
        if options.pop("mixed", False):
            pairs = [replace(pair, kind="judge") if place % 2 else pair for place, pair in enumerate(pairs)]
        dtype = options.pop("dtype", "float32")
        train = (TrainRule if sft else DPO)(
            lr=1e-3, pairs_per_step=5, zero_stage=stage, micro_batch=micro_batch, max_grad_norm=1e9, **options
        )
        place = Path(f"{output}.{len(found)}")
        if dist.get_rank() == 0:
            write_items(place.with_suffix(".items"), pairs)
        dist.barrier()
        items: ItemFile[Any] = ItemFile(place.with_suffix(".items"))
        everything = range(len(items))
        model = load_policy(folder, ModelConfig(path=folder, dtype=dtype), train)
        held = sum(parameter.numel() for parameter in model.parameters())
        policy = Policy(model, train, dtype, items)
        if policy.loss.needs_reference:
            policy.write_reference(place, lambda done, of: None)
            dist.barrier()
            policy.reference = Reference(place, policy.outline(everything).response_tokens)
        # The first step moves the policy off its reference, so that the second loss is not ln 2.
        first = policy.step(everything, 1e-3)
        summed = policy.gradients(everything, policy.outline(everything))
        gradients = {}
        for name, parameter in policy.model.named_parameters():
            if not parameter.requires_grad:
                continue
            gradient = deepspeed.utils.safe_get_full_grad(parameter)
            gradients[name] = gradient.detach().clone().float().cpu()
        facts = {"packed": policy.packed, "held": held, "optimizer": type(policy.engine.optimizer).__name__}
        found.append({"first": first, "summed": summed, "gradients": gradients, **facts})
        policy.close()
        del policy, model, parameter, gradient
        found[-1]["left"] = live_bytes() - sum(one.nbytes for case in found for one in case["gradients"].values())
    if dist.get_rank() == 0:
        torch.save(found, output)
    dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
