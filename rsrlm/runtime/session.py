"""The training of one model on the learner's ranks, job by job.

It starts from a model folder, writes the log-probabilities before the first update, trains, exports and is given up, so
a resumed run takes the same path as an undisturbed one.
"""

import gc
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rsrlm.jobs import ReferenceBatch, Resumed, Said, StepTrained, Trained, TrainJob
from rsrlm.losses.schedule import lr_at
from rsrlm.records import seed_of
from rsrlm.runtime import weights
from rsrlm.runtime.checkpoints import end_path, load_checkpoint, newest_checkpoint, reference_path, save_checkpoint
from rsrlm.runtime.export import export, send
from rsrlm.runtime.mailbox import BroadcastJob, Failed, Finished, ForgetJob
from rsrlm.runtime.policy import Policy, load_policy
from rsrlm.runtime.reference import Reference
from rsrlm.runtime.shares import steps_of
from rsrlm.runtime.weights import Transfer
from rsrlm.settings.machine import ModelConfig
from rsrlm.store.atomic import sync_files
from rsrlm.store.items import ItemFile

Say = Callable[[Any], None]


def candidate_path(output: str, step: int) -> Path:
    """The model after this number of optimizer steps, beside the one at the end of the training."""
    return Path(f"{output}@{step}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank works: the id of its Ray node, and the address at which other hosts reach it."""

    node: str = ""
    address: str = "127.0.0.1"


class Desk:
    """What one rank works at: the jobs, and the training that is kept in memory until it is done."""

    def __init__(self, model: ModelConfig, place: Place) -> None:
        self._model, self._place = model, place
        self._session: Session | None = None

    def do(self, job: TrainJob | BroadcastJob | ForgetJob, say: Say) -> None:
        """Do a job. On the first rank `say` tells of it, the end included."""
        if isinstance(job, TrainJob):
            self._train(job, say)
            return
        if isinstance(job, ForgetJob):
            self.forget()
        elif dist.get_rank() == 0:
            try:
                send(job, self._place.address, say)
            except (OSError, RuntimeError) as error:  # of the network, or of a receiver: the training is as it was
                say(Failed(message=f"weights were not sent: {error}"))
                return
        say(Finished())

    def _train(self, job: TrainJob, say: Say) -> None:
        keep = False
        try:
            if self._session and self._session.ends_before(job):
                self._session.take(job, say)
            elif self._session is None or not self._session.can_do(job):
                self.forget()
                self._session = Session(job, self._model, say, self._place.node)
            trained = self._session.do(job, say)
            keep = job.until is not None or job.course is not None
        finally:
            if not keep:
                self.forget()
        dist.barrier()  # who hears of the end may use the memory of all ranks
        if trained:
            say(trained)

    def forget(self) -> None:
        if self._session:
            self._session.close()
        self._session = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # who shares this GPU is about to fill it


class Session:
    """A training in memory: the policy after as many optimizer steps as there are rows of metrics."""

    def __init__(self, job: TrainJob, model: ModelConfig, say: Callable[[Said], None], node: str = "") -> None:
        self._model, self._node = model, node
        self._root = dist.get_rank() == 0
        items: ItemFile[Any] = ItemFile(Path(job.items))
        adapters = seed_of(job.seed, job.iteration, "adapters", "learner", job.name)
        policy = load_policy(job.model, model, job.train, adapters)
        self._policy = Policy(policy, job.train, model.dtype, items)
        try:
            if job.course and job.course.after:
                load_checkpoint(self._policy.engine, end_path(job.run, job.course.after), job.train)
            self._begin(job, len(items), say)
        except BaseException:
            self.close()
            raise

    def take(self, job: TrainJob, say: Callable[[Said], None]) -> None:
        """Begin another training with the model and the optimizer as they are."""
        items: ItemFile[Any] = ItemFile(Path(job.items))
        self._policy.take(items)
        self._begin(job, len(items), say)

    def _begin(self, job: TrainJob, items: int, say: Callable[[Said], None]) -> None:
        self._job = job
        self._steps = steps_of(items, job.train, job.seed, job.iteration)
        self._last = job.train.steps(items)
        self._rows: list[dict[str, Any]] = []
        self._saved = 0  # optimizer steps before the newest checkpoint
        if self._policy.loss.needs_reference:
            self._policy.reference = self._reference(items, say)
        found = agreed(newest_checkpoint(job))
        if found:
            path, self._saved = found
            self._rows = load_checkpoint(self._policy.engine, path, job.train)

    def _reference(self, items: int, say: Callable[[Said], None]) -> Reference:
        """Of the model that the training starts from, before a checkpoint is loaded; or of another."""
        course = self._job.course
        folder = reference_path(self._job)
        if not agreed(folder.exists()):
            scratch = folder.with_name(folder.name + ".tmp")
            if self._root:
                shutil.rmtree(scratch, ignore_errors=True)
            dist.barrier()
            other = course.reference if course and course.reference != self._job.model else ""
            with self._policy.holding(other, self._model) if other else nullcontext():
                self._policy.write_reference(scratch, lambda done, of: say(ReferenceBatch(done=done, of=of)))
            dist.barrier()
            if self._root:
                sync_files(scratch)
                scratch.rename(folder)
            dist.barrier()
        return Reference(folder, self._policy.outline(range(items)).response_tokens)

    def ends_before(self, job: TrainJob) -> bool:
        """Whether the job goes on from this training, which is at its end."""
        before, course = self._job, job.course
        at_end = before.until is None and len(self._rows) == self._last
        return course is not None and course.after == before.name and at_end and job.train == before.train

    def can_do(self, job: TrainJob) -> bool:
        """Whether the job takes this training up from where it is, or further on."""
        return self._job.continues(job) and len(self._rows) <= (self._last if job.until is None else job.until)

    def do(self, job: TrainJob, say: Callable[[Said], None]) -> Trained | None:
        """Train to the end of the job and export the model. On the first rank, what is to be said of it."""
        started = time.perf_counter()
        policy, rows = self._policy, self._rows
        say(Resumed(step=len(rows), of=self._last, packed=policy.packed, rows=list(rows)))
        end = self._last if job.until is None else job.until
        for number in range(len(rows), end):
            rows.append({"step": number, **self._step(number)})
            say(StepTrained(row=rows[-1]))
            if len(rows) % job.train.checkpoint_every_steps == 0 and len(rows) < end:
                self._save(job)
        if job.until is not None and self._saved < end:
            self._save(job)  # before the export: who finds the candidate can go on from here
        if job.course:
            save_checkpoint(policy.engine, job, rows, end_path(job.run, job.name))
            policy.reference = None  # its files go before this session does
        trained = time.perf_counter()
        if not self._root:
            for _ in policy.state():
                pass  # it has nothing here, but takes part
            policy.adapters()
            return None
        files = None
        if job.until is None and (not job.course or job.course.publish):
            files = weights.write(policy.shapes(), policy.state(), Path(job.run), job.name)
            state = dict(weights.tensors_in(weights.bytes_of(files[0].path)))
        else:
            state = policy.in_memory()
        adapters = policy.adapters()
        written = time.perf_counter()
        output = Path(job.output) if job.until is None else candidate_path(job.output, job.until)
        export(policy.model, state, job, self._model, output, adapters)
        return Trained(
            steps=end,
            files=Transfer(node=self._node, files=files) if files else None,
            train_seconds=trained - started,
            write_seconds=written - trained,
            export_seconds=time.perf_counter() - written,
        )

    def _step(self, number: int) -> dict[str, Any]:
        job, train = self._job, self._job.train
        begun, of = (job.course.step, job.course.of) if job.course else (0, len(self._steps))
        lr = lr_at(
            begun + number,
            of,
            lr=train.lr,
            lr_final=train.lr_final,
            warmup_steps=train.warmup_steps,
            schedule=train.schedule,
        )
        # Dropout draws the same masks when a step is replayed, and others on every rank.
        torch.manual_seed(seed_of(job.seed, job.iteration, str(number), "learner", str(dist.get_rank())))
        return self._policy.step(self._steps[number], lr)

    def _save(self, job: TrainJob) -> None:
        save_checkpoint(self._policy.engine, job, self._rows)
        self._saved = len(self._rows)

    def close(self) -> None:
        self._policy.close()


def agreed(found: Any) -> Any:
    """What the first rank has found, on all ranks: a shared file system may show others something else for a while."""
    box = [found]
    dist.broadcast_object_list(box, src=0)
    return box[0]
