"""One rank that does training jobs outside Ray, started by test_learner.py: what the first rank says of each job is
pickled to RUN/said.

`python session_rank.py MODEL RUN JOBS` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; JOBS is JSON: a list of
the options of `train`, beside which `until` and `name` are those of the job, `items` is the slice of the pairs, and
`course` that of the job, whose `reference` is `first` (MODEL) or `before` (what the job starts from).
"""

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from learner_rank import make_pairs

from rsrlm.jobs import Course, TrainJob
from rsrlm.runtime.session import Desk, Place
from rsrlm.settings.machine import ModelConfig
from rsrlm.settings.train import Train
from rsrlm.store.items import write_items


def main() -> None:
    folder, run, jobs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    (run / "models").mkdir(parents=True, exist_ok=True)
    desk = Desk(ModelConfig(path=folder, dtype="float32"), Place(node=f"node of rank {dist.get_rank()}"))
    said: list[list[Any]] = []
    for options in jobs:
        until, name, course = options.pop("until", None), options.pop("name", "M1"), options.pop("course", None)
        after = course["after"] if course else ""
        if course:
            course["reference"] = {"first": folder, "before": str(run / "models" / after) if after else folder}[
                course["reference"]
            ]
        pairs = make_pairs()[slice(*options.pop("items", (None,)))]
        digest = write_items(run / "items", pairs) if dist.get_rank() == 0 else ""
        box = [digest]
        dist.broadcast_object_list(box, src=0)
        job = TrainJob(
            run=str(run),
            iteration=0,
            seed=5,
            model=str(run / "models" / after) if after else folder,
            output=str(run / "models" / name),
            name=name,
            train=Train(**{"lr": 1e-2, "pairs_per_step": 2, "checkpoint_every_steps": 5, **options}),
            items=str(run / "items"),
            digest=box[0],
            until=until,
            course=Course(**course) if course else None,
        )
        said.append([])
        desk.do(job, said[-1].append)
    if dist.get_rank() == 0:
        (run / "said").write_bytes(pickle.dumps(said))
    dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
