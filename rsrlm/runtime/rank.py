"""The life of one of the learner's ranks. It waits for its next job outside of any collective."""

import os
from typing import Any

from rsrlm.runtime.mailbox import Failed, Stop
from rsrlm.settings.base import ConfigError
from rsrlm.settings.train import Train


def serve(settings: dict[str, Any]) -> None:
    """Ray Train runs this on every rank: take jobs from the mailbox until it says stop.

    A rank that comes up again after a failure is handed the unfinished job again; the job finds its checkpoint.
    """
    train: Train = settings["train"]
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if train.gpus else "cpu")
    import ray
    import torch
    import torch.distributed as dist

    from rsrlm.runtime.checkpoints import TrainingFailed
    from rsrlm.runtime.export import disk_is_full
    from rsrlm.runtime.session import Desk, Place

    if not train.gpus:
        torch.set_num_threads(train.threads)
    mailbox, first = settings["mailbox"], dist.get_rank() == 0
    place = Place(node=ray.get_runtime_context().get_node_id(), address=ray.util.get_node_ip_address())
    desk = Desk(settings["model"], place)
    done = -1
    while True:
        number, job = ray.get(mailbox.next.remote(done))
        if isinstance(job, Stop):
            return
        if job is None:
            continue

        def say(event: Any, number: int = number) -> None:
            if first or isinstance(event, Failed):
                ray.get(mailbox.emit.remote(number, event))

        try:
            desk.do(job, say)
        except (TrainingFailed, ConfigError) as error:
            # The user's to mend: a rebuilt group would fail in the same way.
            say(Failed(message=str(error)))
        except Exception as error:
            if not disk_is_full(error, settings["folder"]):
                raise
            say(Failed(message=f"No space left on device ({error})"))
        done = number
