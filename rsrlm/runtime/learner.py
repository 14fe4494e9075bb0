"""The learner: one DeepSpeed rank trains M_{t+1} from M_t on an iteration's pairs. `serve` is the whole life of a rank.

A training job is stateless across iterations: it loads M_t, computes the reference log-probabilities before the first
update, trains, exports M_{t+1} and forgets everything, so a resumed run takes the same path as an undisturbed one.
A rank waits for its next job outside of any collective.
"""

import errno
import gc
import math
import os
import random
import re
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsrlm.records import Example, PreferencePair, seed_of
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import Model
from rsrlm.settings.train import Train, TrainRule
from rsrlm.store.atomic import sync_files
from rsrlm.store.items import ItemFile

Item = PreferencePair | Example
Emit = Callable[[dict[str, Any]], None]
FULL_BYTES = 64 << 20  # less free space than this explains a failed write
CHUNK_TOKENS = 512  # response tokens whose logits exist at a time
# How transformers' causal language models call the shares that they drop of activations and attention weights.
DROPOUT_KEYS = frozenset(
    {
        *("dropout", "dropout_p", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"),
        *("hidden_dropout", "hidden_dropout_prob", "residual_dropout", "resid_dropout", "resid_pdrop", "mlp_dropout"),
        *("activation_dropout", "embedding_dropout", "embed_dropout", "embd_pdrop", "emb_pdrop"),
    }
)


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why and names the pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """One iteration's training: `model` on `items` to `output`, named `version`.

    `train` are the iteration's own settings; `items` is the file of `rsrlm.store.items` that holds pairs for DPO or
    examples for SFT in training order, of which every rank reads what it needs.
    """

    run: str
    iteration: int
    seed: int
    model: str
    output: str
    version: str
    train: TrainRule
    items: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BroadcastJob:
    """Send the files of a version to every replica over gloo (rank 0 only)."""

    paths: tuple[str, ...]
    address: str
    port: int
    world_size: int


def steps_of(items: Sequence[Any], config: TrainRule, seed: int, iteration: int) -> list[list[Any]]:
    """The items of every optimizer step. The first epoch keeps the given order, later ones shuffle it by seed.

    The last step of an epoch takes what is left, be it a single pair: every pair counts once in every epoch, and in a
    small step for more, since a step's loss is the mean over its pairs.
    """
    steps = []
    for epoch in range(config.epochs):
        order = list(items)
        if epoch:
            random.Random(f"epoch {seed} {iteration} {epoch}").shuffle(order)
        steps += [order[i : i + config.pairs_per_step] for i in range(0, len(order), config.pairs_per_step)]
    return steps


def share_of(batch: Sequence[Any], rank: int, world_size: int, micro_batch: int) -> list[tuple[list[Any], list[float]]]:
    """This rank's micro-batches as (items, weights). Every rank gets as many: weight 0 marks an item that only keeps
    the ranks in step and counts nothing."""
    mine = list(batch[rank::world_size])
    rounds = math.ceil(math.ceil(len(batch) / world_size) / micro_batch)
    shares = []
    for i in range(rounds):
        items = mine[i * micro_batch : (i + 1) * micro_batch]
        shares.append((items, [1.0] * len(items)) if items else ([batch[0]], [0.0]))
    return shares


def set_dropout(model_config: Any, dropout: float) -> None:
    """Set the dropout that the architecture has, nested configs such as text_config included.

    0 means that nothing is dropped, layers neither, whatever the names. Raises ConfigError for another value where the
    architecture has no dropout.
    """
    found = [
        (part, key)
        for part in _parts(model_config)
        for key, value in vars(part).items()
        if "drop" in key and isinstance(value, (int, float)) and not isinstance(value, bool)
        if not dropout or key in DROPOUT_KEYS
    ]
    if dropout and not found:
        raise ConfigError(
            f"train.dropout={dropout}: the architecture {model_config.model_type} has no dropout; set train.dropout=0"
        )
    for part, key in found:
        setattr(part, key, dropout)


def _parts(model_config: Any) -> list[Any]:
    """A config and those within it."""
    parts = [value for key, value in vars(model_config).items() if key.endswith("_config")]
    inside = [part for part in parts if hasattr(part, "to_dict")]
    return [model_config, *(part for value in inside for part in _parts(value))]


def load_policy(folder: str, model: Model, train: TrainRule) -> Any:
    """The model of a folder, in training mode, in the dtype of the config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    set_dropout(config, train.dropout)
    policy = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, model.dtype),
        attn_implementation="sdpa",
        trust_remote_code=model.trust_remote_code,
    )
    policy.config.use_cache = False
    if train.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy.train()


def deepspeed_config(train: TrainRule, dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        # The learner accumulates by itself: the number of micro-batches differs from step to step.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }


class Policy:
    """A model under DeepSpeed that gives response log-probabilities and takes gradient steps on items of one type."""

    def __init__(self, model: Any, train: TrainRule, dtype: str, item: type) -> None:
        import deepspeed
        import torch

        from rsrlm.losses import packing
        from rsrlm.losses.base import loss_for

        self.train = train
        self.loss = loss_for(item, train)
        self.model = model
        try:
            packing.check_architecture(model)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.packed = train.packed and packing.supports_packing(model)
        pad = model.config.pad_token_id
        self._pad_id = pad if isinstance(pad, int) and pad >= 0 else 0

        class ResponseLogps(torch.nn.Module):
            """ZeRO hooks the forward of the module that it wraps, so the log-probabilities are its forward."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, batch: packing.TokenBatch, num_chunks: int) -> torch.Tensor:
                return packing.response_logps(self.model, batch, num_chunks=num_chunks)

        optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, weight_decay=train.weight_decay, fused=True)
        self.engine, *_ = deepspeed.initialize(
            model=ResponseLogps(), optimizer=optimizer, config=deepspeed_config(train, dtype)
        )
        self.device = self.engine.device

    def batch(self, items: Sequence[Item]) -> Any:
        from rsrlm.losses import packing

        fields = (self.loss.prompt, *self.loss.responses)
        ids = [[getattr(item, name) for name in fields] for item in items]
        built = packing.pack(ids) if self.packed else packing.pad(ids, self._pad_id)
        return built.to(self.device)

    def response_tokens(self, item: Item) -> int:
        return sum(len(getattr(item, name)) for name in self.loss.responses)

    def num_chunks(self, items: Sequence[Item]) -> int:
        """Chunks of any micro-batch of these items: the same on all ranks, since ZeRO-3 gathers the head for each."""
        return math.ceil(self.train.micro_batch * max(map(self.response_tokens, items)) / CHUNK_TOKENS)

    def reference_logps(self, items: Sequence[Item], tick: Callable[[int], None]) -> dict[str, list[float]]:
        """Per-token log-probabilities of both responses of every pair, chosen first, under the model as it is now."""
        import torch
        import torch.distributed as dist

        rank, world_size = dist.get_rank(), dist.get_world_size()
        found: dict[str, list[float]] = {}
        chunks = self.num_chunks(items)
        self.engine.eval()
        with torch.no_grad():
            shares = share_of(range(len(items)), rank, world_size, self.train.micro_batch)
            for number, (places, weights) in enumerate(shares):
                pairs = [items[place] for place in places]
                batch = self.batch(pairs)
                values = self.engine(batch, chunks).cpu()
                owner = torch.div(batch.segment_R.cpu(), len(self.loss.responses), rounding_mode="floor")
                for index, (pair, weight) in enumerate(zip(pairs, weights, strict=True)):
                    if weight:
                        found[pair.id] = values[owner == index].tolist()
                tick(number)
        self.engine.train()
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, found)
        return {pair: values for part in gathered for pair, values in part.items()}

    def gradients(self, batch: Sequence[Item], reference: dict[str, list[float]]) -> dict[str, float]:
        """Accumulate the gradients of one optimizer step and return its metrics, summed over all ranks.

        The loss is the sum over the step divided by its number of pairs, or of target tokens for SFT, whatever ranks
        and micro-batches it is split over. Raises TrainingFailed with the ids when it is not finite.
        """
        import torch
        import torch.distributed as dist

        world_size = dist.get_world_size()
        shares = share_of(batch, dist.get_rank(), world_size, self.train.micro_batch)
        chunks = self.num_chunks(batch)
        denominator = self.loss.denominator(len(batch), sum(map(self.response_tokens, batch)))
        kinds = sorted({item.kind for item in batch})
        totals: dict[str, float] = {}
        for number, (items, counted) in enumerate(shares):
            packed = self.batch(items)
            counted_N = torch.tensor(counted, device=self.device)
            logps_R = self.engine(packed, chunks)
            ref_R = None
            if self.loss.needs_reference:
                ref_R = torch.tensor([x for item in items for x in reference[item.id]], device=self.device)
            found = self.loss.sums(logps_R, ref_R, packed, items, counted_N)
            sums = dict(found.sums)
            for kind in kinds if len(kinds) > 1 else ():
                of_kind = torch.tensor([item.kind == kind for item in items], device=self.device)
                sums |= {f"{kind}/{name}": (value * of_kind).sum() for name, value in found.each.items()}
            for name, value in {**sums, "tokens": float(packed.input_ids.numel())}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            self.engine.set_gradient_accumulation_boundary(number == len(shares) - 1)
            # DeepSpeed averages gradients over the ranks; the sum over all items is wanted.
            self.engine.backward(found.loss * (world_size / denominator))
            if number < len(shares) - 1:
                self.engine.step()
        names = sorted(totals)
        sums = torch.tensor([totals[name] for name in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        summed = dict(zip(names, sums.tolist(), strict=True))
        if not math.isfinite(summed["loss"]):
            raise TrainingFailed(
                f"the loss is {summed['loss']}; nothing was updated by this step. Its pairs (or examples): "
                + ", ".join(item.id for item in batch)
                + ". Lower train.lr, or look at these in the iteration's Parquet files"
            )
        return summed

    def step(self, batch: Sequence[Item], reference: dict[str, list[float]], lr: float) -> dict[str, float]:
        """One optimizer step; metrics are means over the step's pairs (SFT: target tokens) unless the name says
        otherwise. Where both kinds of pairs are trained, `actor/NAME` and `judge/NAME` are means over that kind."""
        started = time.perf_counter()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        summed = self.gradients(batch, reference)
        plain_norm = self._plain_norm()  # DeepSpeed reports none without a ZeRO or bf16 optimizer
        self.engine.step()
        norm = plain_norm if plain_norm is not None else float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise TrainingFailed(
                f"the gradient norm is {norm} after " + ", ".join(item.id for item in batch) + "; lower train.lr"
            )
        seconds = time.perf_counter() - started
        tokens = summed.pop("tokens")
        return {
            **self.loss.means(summed),
            "grad_norm": norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
            "memory_gib": memory_gib(self.device),
        }

    def _plain_norm(self) -> float | None:
        """Gradient norm over all parameters before clipping, where they hold whole gradients."""
        import torch

        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if self.train.zero_stage or not gradients:
            return None
        return float(torch.nn.utils.get_total_norm(gradients))

    def state(self) -> dict[str, Any]:
        """The model's parameters by their Hugging Face names, whole, on rank 0; empty elsewhere. Tied ones once."""
        import deepspeed
        import torch.distributed as dist

        root = dist.get_rank() == 0
        found = {}
        for name, parameter in self.model.named_parameters():
            if self.train.zero_stage == 3:
                with deepspeed.zero.GatheredParameters([parameter]):
                    if root:
                        found[name] = parameter.detach().cpu().clone()
            elif root:
                found[name] = parameter.detach().cpu().contiguous()
        return found

    def close(self) -> None:
        self.engine.destroy()


def memory_gib(device: Any) -> float:
    """Peak memory of this rank so far: resident set on a CPU, allocated on a GPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint_path(run: Path, version: str, step: int) -> Path:
    return run / "checkpoints" / f"{version}-s{step:06d}"


def newest_checkpoint(run: Path, version: str) -> tuple[Path, int] | None:
    """The newest whole checkpoint of the training of a model, and the number of optimizer steps it has behind it."""
    found = sorted(
        path for path in (run / "checkpoints").glob("*-s*") if re.fullmatch(re.escape(version) + r"-s\d{6}", path.name)
    )
    return (found[-1], int(found[-1].name.rpartition("s")[2])) if found else None


def save_checkpoint(
    policy: Policy, run: Path, version: str, reference: dict[str, list[float]], rows: list[dict[str, Any]]
) -> None:
    """Published under its name when every rank has written its part; older ones go. `rows` are the steps behind it."""
    import torch.distributed as dist

    path = checkpoint_path(run, version, len(rows))
    scratch = path.with_name(path.name + ".tmp")
    policy.engine.save_checkpoint(
        str(scratch),
        tag="state",
        client_state={"rsrlm_reference": reference, "rsrlm_rows": rows},
    )
    dist.barrier()
    if dist.get_rank() == 0:
        sync_files(scratch)
        scratch.rename(path)
        for old in path.parent.glob("*-s*"):
            if old != path and not old.name.endswith(".tmp"):
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def load_checkpoint(policy: Policy, path: Path) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Restore weights and optimizer; returns reference log-probabilities and step rows. Raises TrainingFailed."""
    import torch.distributed as dist

    # lstat as well: a link of one's own may lead to a file of another's.
    for file in (path, *path.rglob("*")):
        if {file.stat().st_uid, file.lstat().st_uid} != {os.getuid()}:
            raise TrainingFailed(
                f"checkpoint {path}: {file.name} belongs to another user, and is not read since DeepSpeed's format can "
                "run code; delete the checkpoint to start the iteration's training again"
            )
    ranks = len(list((path / "state").glob("*optim_states.pt"))) or 1
    if policy.train.zero_stage and ranks != dist.get_world_size():
        raise TrainingFailed(
            f"checkpoint {path} was written by {ranks} ranks and cannot be read by {dist.get_world_size()}; resume "
            f"with train.workers={ranks}, or delete it to start the iteration's training again"
        )
    _, client = policy.engine.load_checkpoint(str(path), tag="state")
    return client["rsrlm_reference"], client["rsrlm_rows"]


# -- a job -------------------------------------------------------------------------------------------------------------


def run_job(job: TrainJob, model: Model, emit: Emit, goes_on: Callable[[int], bool] = lambda _: True) -> None:
    """Train one iteration. Rank 0 emits `resumed`, `reference`, `step`, `candidate` and finally `done` events.

    With `train.early_stop`, `goes_on` of a candidate's number of steps says on every rank whether training goes on.
    """
    import torch
    import torch.distributed as dist

    from rsrlm.losses.schedule import lr_at
    from rsrlm.runtime import weights

    root = dist.get_rank() == 0
    run, train = Path(job.run), job.train
    started = time.perf_counter()
    items: ItemFile[Any] = ItemFile(Path(job.items))
    policy = Policy(load_policy(job.model, model, train), train, model.dtype, items.kind)
    try:
        steps = steps_of(range(len(items)), train, job.seed, job.iteration)
        last = train.steps(len(items))
        checkpoint = newest_checkpoint(run, job.version)
        if checkpoint:
            path, first = checkpoint
            reference, rows = load_checkpoint(policy, path)
        else:
            first, rows, reference = 0, [], {}
            rounds = math.ceil(math.ceil(len(items) / dist.get_world_size()) / train.micro_batch)
            if policy.loss.needs_reference:
                reference = policy.reference_logps(
                    items, lambda number: emit({"event": "reference", "done": number + 1, "of": rounds})
                )
        # The rows, because a driver that was interrupted may not have seen the last steps before the checkpoint.
        emit({"event": "resumed", "step": first, "of": last, "packed": policy.packed, "rows": rows})
        waited = 0.0
        for number in range(first, last):
            # Behind the checkpoint of the step before: who decides may take long.
            if train.candidate_every_steps and number and number % train.candidate_every_steps == 0:
                state = policy.state()
                if root:
                    export(policy.model, state, job, model, candidate_path(job.output, number))
                    emit({"event": "candidate", "step": number})
                del state
                dist.barrier()
                asked = time.perf_counter()
                if train.early_stop and not goes_on(number):
                    last = number
                waited += time.perf_counter() - asked
                if last == number:
                    break
            batch = [items[place] for place in steps[number]]
            lr = lr_at(
                number,
                len(steps),
                lr=train.lr,
                lr_final=train.lr_final,
                warmup_steps=train.warmup_steps,
                schedule=train.schedule,
            )
            # Dropout draws the same masks when a step is replayed, and others on every rank.
            torch.manual_seed(seed_of(job.seed, job.iteration, str(number), "learner", str(dist.get_rank())))
            metrics = policy.step(batch, reference, lr)
            rows.append({"step": number, "pair_ids": [item.id for item in batch], **metrics})
            emit({"event": "step", "row": rows[-1]})
            if (number + 1) % train.checkpoint_every_steps == 0 and number + 1 < last:
                save_checkpoint(policy, run, job.version, reference, rows)
        trained = time.perf_counter()
        state = policy.state()
        if root:
            files = weights.write(state, run, job.version)
            written = time.perf_counter()
            export(policy.model, state, job, model)
            emit(
                {
                    "event": "done",
                    "steps": last,
                    "replayed_from": first,
                    "files": files,
                    "train_seconds": trained - started - waited,
                    "decide_seconds": waited,
                    "write_seconds": written - trained,
                    "export_seconds": time.perf_counter() - written,
                }
            )
        dist.barrier()
    finally:
        policy.close()
        del policy
        gc.collect()


def candidate_path(output: str | Path, step: int) -> Path:
    """The model after so many steps, beside the iteration's last one."""
    return Path(f"{output}@{step}")


def export(model: Any, state: dict[str, Any], job: TrainJob, config: Model, folder: Path | None = None) -> None:
    """A Hugging Face folder with tokenizer and chat template; it appears under its name only when it is whole."""
    from transformers import AutoConfig

    from rsrlm.model import load_tokenizer

    output = folder or Path(job.output)
    scratch = output.with_name(output.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch, state_dict=state)
    # Its own config has what training set: this stage's dropout, which is none of the next one's, and no cache.
    source = AutoConfig.from_pretrained(job.model, trust_remote_code=config.trust_remote_code)
    source.architectures, source.dtype = model.config.architectures, model.dtype
    source.save_pretrained(scratch)
    load_tokenizer(Path(job.model), config.trust_remote_code).save_pretrained(scratch)
    generation = Path(job.model) / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, scratch)
    sync_files(scratch)
    shutil.rmtree(output, ignore_errors=True)
    scratch.rename(output)


def send(job: BroadcastJob) -> None:
    """Broadcast the files over a gloo group of this process and the replicas' workers."""
    from rsrlm.runtime import vllm_worker
    from rsrlm.runtime.weights import bytes_of

    group = vllm_worker.gloo_group(job.address, job.port, 0, job.world_size)
    for path in job.paths:
        vllm_worker.broadcast(group, bytes_of(path))


def disk_is_full(error: Exception, folder: str | Path) -> bool:
    """Whether a write failed for want of space, so that a rebuilt group would fail in the same way.

    safetensors raises an error of its own with the system's words, and takes away what it has written. torch says
    nothing of the reason, and leaves the disk full.
    """
    said = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    return said or (isinstance(error, (OSError, RuntimeError)) and shutil.disk_usage(folder).free <= FULL_BYTES)


# -- the life of a rank ------------------------------------------------------------------------------------------------


def serve(settings: dict[str, Any]) -> None:
    """Ray Train runs this on every rank: take jobs from the mailbox until it says stop.

    A rank that comes up again after a failure is handed the unfinished job again; the job finds its checkpoint.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not settings["train"].gpus else "cuda")
    import ray
    import torch
    import torch.distributed as dist

    model: Model = settings["model"]
    train: Train = settings["train"]
    if not train.gpus:
        torch.set_num_threads(train.threads)
    mailbox = settings["mailbox"]
    rank = dist.get_rank()
    done = -1
    while True:
        number, job = ray.get(mailbox.next.remote(done))
        if job == "stop":
            return
        if job is None:
            continue

        def emit(event: dict[str, Any], number: int = number) -> None:
            if rank == 0 or event["event"] == "failed":
                ray.get(mailbox.emit.remote(number, event))

        def goes_on(step: int, number: int = number) -> bool:
            while True:
                decided = ray.get(mailbox.decision.remote(number, step))
                if decided is not None:
                    return decided
                send_waiting(number)

        def send_waiting(number: int) -> None:
            """Weights that the engines wait for while this job is not done: a candidate's, for who decides."""
            behind, waiting = ray.get(mailbox.next.remote(number, 0.0))
            if rank == 0 and isinstance(waiting, BroadcastJob):
                send(waiting)
                ray.get(mailbox.emit.remote(behind, {"event": "done"}))

        try:
            if isinstance(job, BroadcastJob):
                if rank == 0:
                    send(job)
                emit({"event": "done"})
            else:
                send_waiting(number)  # this rank may be one that was rebuilt while engines wait
                run_job(job, model, emit, goes_on)
        except (TrainingFailed, ConfigError) as error:
            # The user's to mend: a rebuilt group would fail in the same way.
            emit({"event": "failed", "message": str(error)})
        except Exception as error:
            if not disk_is_full(error, settings["folder"]):
                raise
            emit({"event": "failed", "message": f"No space left on device ({error})"})
        done = number
