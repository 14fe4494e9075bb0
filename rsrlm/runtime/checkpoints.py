"""Where a training can be taken up again: DeepSpeed's own checkpoints, and the log-probabilities before the first
update. Their names tell the model and the items, so that those of a training on other items are not taken."""

import errno
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rsrlm.jobs import TrainJob
from rsrlm.settings.base import first_line
from rsrlm.settings.train import TrainRule
from rsrlm.store.atomic import sync_files


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why and names the items."""


ANEW = "begin the run anew under another name, from the newest model in models/ (model.path)"


def _place(job: TrainJob, name: str) -> Path:
    return Path(job.run) / "checkpoints" / f"{job.name}-{job.digest[:8]}-{name}"


def checkpoint_path(job: TrainJob, step: int) -> Path:
    return _place(job, f"s{step:06d}")


def reference_path(job: TrainJob) -> Path:
    return _place(job, "reference")


def end_path(run: str, name: str) -> Path:
    """The optimizer at the end of the training of a model, for one that goes on from it."""
    return Path(run) / "checkpoints" / f"{name}-end"


def newest_checkpoint(job: TrainJob) -> tuple[Path, int] | None:
    """The newest whole checkpoint of a training that is not beyond the end of the job, and the number of optimizer
    steps before it."""
    start = re.escape(checkpoint_path(job, 0).name.removesuffix("s000000"))
    folder = checkpoint_path(job, 0).parent
    steps = [int(found[1]) for path in folder.glob("*") if (found := re.fullmatch(rf"{start}s(\d{{6}})", path.name))]
    steps = [step for step in steps if job.until is None or step <= job.until]
    return (checkpoint_path(job, max(steps)), max(steps)) if steps else None


def save_checkpoint(engine: Any, job: TrainJob, rows: list[dict[str, Any]], path: Path | None = None) -> None:
    """It has its name when every rank has written its part; then older ones of this model go. `rows` are the metrics of
    the steps before it."""
    path = path or checkpoint_path(job, len(rows))
    scratch = path.with_name(path.name + ".tmp")
    engine.save_checkpoint(
        str(scratch),
        tag="state",
        client_state={"rsrlm_rows": rows},
        exclude_frozen_parameters=job.train.lora is not None,  # all but the adapters: as the model has them
    )
    dist.barrier()
    if dist.get_rank() == 0:
        sync_files(scratch)
        shutil.rmtree(path, ignore_errors=True)
        scratch.rename(path)
        for old in path.parent.glob("*"):
            if old != path and re.fullmatch(re.escape(job.name) + r"-[^-]*-s\d{6}", old.name):
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _instead(path: Path) -> str:
    """What to do without a checkpoint: the optimizer of a course cannot be made again."""
    if path.name.endswith("-end"):
        return ANEW
    return "delete the checkpoint to start the iteration's training again"


def owner_in(folder: Path) -> int:
    """The user that a new file in a folder belongs to: us, or on many a network disk somebody whom we all become."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".owner-") as file:
        return os.stat(file.name).st_uid


def load_checkpoint(engine: Any, path: Path, train: TrainRule) -> list[dict[str, Any]]:
    """Restore weights and optimizer; returns the metrics of the steps before. Raises TrainingFailed."""
    if not path.exists():
        raise TrainingFailed(
            f"checkpoint {path} is gone, and with it the optimizer that this training goes on with; {ANEW}"
        )
    own = owner_in(path.parent)
    # lstat as well: a link of one's own may lead to a file of another's.
    for file in (path, *path.rglob("*")):
        if {file.stat().st_uid, file.lstat().st_uid} != {own}:
            raise TrainingFailed(
                f"checkpoint {path}: {file.name} belongs to another user, and is not read since DeepSpeed's format can "
                f"run code; {_instead(path)}"
            )
    ranks = len(list((path / "state").glob("*optim_states.pt"))) or 1
    if train.zero_stage and ranks != dist.get_world_size():
        raise TrainingFailed(
            f"checkpoint {path} was written by {ranks} ranks and cannot be read by {dist.get_world_size()}; resume "
            f"with train.workers={ranks}, or {_instead(path)}"
        )
    try:
        _, client = engine.load_checkpoint(str(path), tag="state", load_module_strict=train.lora is None)
    except (RuntimeError, OSError, EOFError, LookupError, pickle.UnpicklingError) as error:
        # What torch says of a file that is not whole. Other errors may be of a disk, or of a rank that died: a group
        # that is built anew tries again.
        whole = isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error)
        if whole or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise TrainingFailed(f"checkpoint {path} cannot be read: {first_line(error)}; {_instead(path)}") from error
    rows: list[dict[str, Any]] = client["rsrlm_rows"]
    return rows
