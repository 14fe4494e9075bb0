"""A model under DeepSpeed: log-probabilities of what is trained on, and optimizer steps."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rsrlm.losses import packing
from rsrlm.losses.base import loss_for
from rsrlm.runtime.checkpoints import TrainingFailed
from rsrlm.runtime.dropout import set_dropout
from rsrlm.runtime.lora import adapters, add_adapters, weights, whole
from rsrlm.runtime.reference import Reference, write_share
from rsrlm.runtime.shares import Outline, micro_batches, outline, share_of
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import ModelConfig
from rsrlm.settings.train import TrainRule
from rsrlm.store.items import ItemFile

CHUNK_TOKENS = 512  # response tokens whose logits exist at a time


def load_policy(folder: str, model: ModelConfig, train: TrainRule, seed: int = 0) -> Any:
    """The model of a folder, in training mode, in the dtype of the config; under ZeRO 3 this rank's part of it. The
    seed is that of adapters."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    set_dropout(config, train.dropout)
    # As long as it lives, `from_pretrained` divides each parameter over the ranks as it is made, so that no rank ever
    # holds the model whole.
    divided = HfDeepSpeedConfig(deepspeed_config(train, model.dtype)) if train.zero_stage == 3 else None
    policy = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, model.dtype),
        attn_implementation="sdpa",
        trust_remote_code=model.trust_remote_code,
    )
    del divided
    if train.lora:
        add_adapters(policy, train.lora, seed)
    policy.config.use_cache = False
    if train.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy.train()


def deepspeed_config(train: TrainRule, dtype: str) -> dict[str, Any]:
    """Ours, and on top of it what `train.deepspeed` adds."""
    config: dict[str, Any] = {
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
    zero = {**config["zero_optimization"], **train.deepspeed.get("zero_optimization", {})}
    return {**config, **train.deepspeed, "zero_optimization": zero}


class Used(torch.nn.Module):
    """ZeRO hooks the forward of the module that it wraps, so whatever uses the model is done in its forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, use: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return use(self.model, *args, **options)


class Policy:
    """A model that learns from the items of a file. Items are told by their places in it."""

    def __init__(self, model: Any, train: TrainRule, dtype: str, items: ItemFile[Any]) -> None:
        import deepspeed

        self.train, self.model = train, model
        pad = model.config.pad_token_id
        self._pad_id = pad if isinstance(pad, int) and pad >= 0 else 0
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=train.lr, weight_decay=train.weight_decay, fused=True)
        self.engine, *_ = deepspeed.initialize(
            model=Used(model), optimizer=optimizer, config=deepspeed_config(train, dtype)
        )
        self.device = self.engine.device
        try:
            self.engine(packing.check_architecture)
        except ValueError as error:
            self.close()
            raise ConfigError(str(error)) from None
        # In a list: ZeRO's hooks know no bare bool.
        self.packed = train.packed and self.engine(lambda whole: [packing.supports_packing(whole)])[0]
        self.take(items)

    def take(self, items: ItemFile[Any]) -> None:
        """Learn from these items from now on."""
        self._items = items
        self.loss = loss_for(items.kind, self.train)
        self._most_chunks = self._num_chunks(self.outline(range(len(items))).response_tokens)
        self.reference: Reference | None = None  # wanted where loss.needs_reference

    @contextmanager
    def holding(self, folder: str, model: ModelConfig) -> Iterator[None]:
        """The weights of a model folder for a while, without ZeRO 3; its own are kept beside them."""
        from transformers import AutoModelForCausalLM

        dtype, code = getattr(torch, model.dtype), model.trust_remote_code
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=code)
        found = {name: parameter.detach() for name, parameter in other.named_parameters()}
        own = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self._fill(found)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    def outline(self, places: Sequence[int]) -> Outline:
        return outline(self._items, places, self.loss.responses)

    def _batch(self, items: Sequence[Any]) -> packing.TokenBatch:
        ids = [texts for item in items for texts in self.loss.layout(item)]
        return (packing.pack(ids) if self.packed else packing.pad(ids, self._pad_id)).to(self.device)

    def _logps(self, batch: packing.TokenBatch, num_chunks: int) -> torch.Tensor:
        return self.engine(packing.response_logps, batch, num_chunks=num_chunks)

    def _num_chunks(self, response_tokens: Sequence[int]) -> int:
        """Chunks of any micro-batch of these items: the same on all ranks, since ZeRO-3 gathers the head for each."""
        return math.ceil(self.train.micro_batch * max(response_tokens) / CHUNK_TOKENS)

    def write_reference(self, folder: Path, tick: Callable[[int, int], None]) -> None:
        """Write this rank's share of the log-probabilities under the model as it is now, for `Reference`.

        `tick` is told how many micro-batches of how many are done.
        """
        self.engine.eval()
        with torch.no_grad():
            write_share(folder, dist.get_rank(), dist.get_world_size(), self._own_logps(tick))
        self.engine.train()

    def _own_logps(self, tick: Callable[[int, int], None]) -> Iterator[np.ndarray]:
        """Those of each item of this rank's share, [R] of all its responses."""
        everything, chunks = range(len(self._items)), self._most_chunks
        size, world_size = self.train.micro_batch, dist.get_world_size()
        rounds = micro_batches(len(everything), world_size, size)
        for number, (places, counted) in enumerate(share_of(everything, dist.get_rank(), world_size, size)):
            batch = self._batch([self._items[place] for place in places])
            values = self._logps(batch, chunks).cpu()
            owner = torch.div(batch.segment_R.cpu(), len(self.loss.responses), rounding_mode="floor")
            for index, counts in enumerate(counted):
                if counts:
                    yield values[owner == index].numpy()
            tick(number + 1, rounds)

    def gradients(self, places: Sequence[int], known: Outline) -> dict[str, float]:
        """Accumulate the gradients of one optimizer step and return its metrics, summed over all ranks.

        The loss is the sum over the step divided by the denominator of the loss, whatever ranks and micro-batches it is
        split over. Raises TrainingFailed with the ids when it is not finite.
        """
        world_size = dist.get_world_size()
        shares = share_of(places, dist.get_rank(), world_size, self.train.micro_batch)
        # ZeRO-3 records the order of its gathers in the first step, and the others must keep to it.
        chunks = self._most_chunks if self.train.zero_stage == 3 else self._num_chunks(known.response_tokens)
        denominator = self.loss.denominator(len(places), sum(known.response_tokens))
        kinds = sorted(set(known.kinds)) if len(set(known.kinds)) > 1 else []
        totals: dict[str, Any] = {}
        for number, (own, counted) in enumerate(shares):
            loss, sums = self._micro_batch(own, counted, chunks, kinds)
            for name, value in sums.items():
                # On the device: to wait for a number would hold up the next micro-batch.
                totals[name] = totals.get(name, 0.0) + torch.as_tensor(value, dtype=torch.float64, device=self.device)
            self.engine.set_gradient_accumulation_boundary(number == len(shares) - 1)
            # DeepSpeed averages gradients over the ranks; the sum over all items is wanted.
            self.engine.backward(loss * (world_size / denominator))
            if number < len(shares) - 1:
                self.engine.step()
        names = sorted(totals)
        sums_64 = torch.stack([totals[name] for name in names])
        dist.all_reduce(sums_64)
        summed = dict(zip(names, sums_64.tolist(), strict=True))
        if not math.isfinite(summed["loss"]):
            raise TrainingFailed(
                f"the loss is {summed['loss']}; nothing was updated by this step. Its pairs (or examples): "
                + ", ".join(known.ids)
                + ". Lower train.lr, or look at these in the iteration's Parquet files"
            )
        return summed

    def _micro_batch(
        self, places: Sequence[int], counted: Sequence[float], chunks: int, kinds: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Loss and sums; `kinds` are those that have sums of their own."""
        items = [self._items[place] for place in places]
        batch = self._batch(items)
        counted_N = torch.tensor(counted, device=self.device)
        logps_R = self._logps(batch, chunks)
        ref_R = self.reference.of(places).to(self.device) if self.reference else None
        found = self.loss.sums(logps_R, ref_R, batch, items, counted_N)
        sums: dict[str, Any] = dict(found.sums)
        for kind in kinds:
            of_kind = torch.tensor([item.kind == kind for item in items], device=self.device)
            sums |= {f"{kind}/{name}": (value * of_kind).sum() for name, value in found.each.items()}
        return found.loss, {**sums, "tokens": batch.tokens}

    def step(self, places: Sequence[int], lr: float) -> dict[str, Any]:
        """One optimizer step; metrics are means over the step's pairs (SFT: target tokens) unless the name says
        otherwise. Where several kinds of pairs are trained, `actor/NAME` and `judge/NAME` are means over that kind."""
        started = time.perf_counter()
        known = self.outline(places)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        summed = self.gradients(places, known)
        plain_norm = self._plain_norm()  # DeepSpeed reports none without a ZeRO or bf16 optimizer
        self.engine.step()
        norm = plain_norm if plain_norm is not None else float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise TrainingFailed(f"the gradient norm is {norm} after " + ", ".join(known.ids) + "; lower train.lr")
        seconds = time.perf_counter() - started
        tokens = summed.pop("tokens")
        return {
            "pair_ids": known.ids,
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
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if self.train.zero_stage or not gradients:
            return None
        return float(torch.nn.utils.get_total_norm(gradients))

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Of the model's weights by their Hugging Face names, whole. Tied ones once."""
        return {
            name: (first.dtype, tuple(getattr(first, "ds_shape", first.shape)))
            for name, (first, *_), _ in weights(self.model)
        }

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """These weights on rank 0, in the same order, each until the next is asked for; nothing elsewhere. Under ZeRO 3
        all ranks must go through it together."""
        import deepspeed

        divided, root = self.train.zero_stage == 3, dist.get_rank() == 0
        for name, parameters, adapter in weights(self.model):
            with deepspeed.zero.GatheredParameters(parameters) if divided else nullcontext():
                if root:
                    yield name, whole(parameters, adapter)

    def adapters(self) -> dict[str, torch.Tensor]:
        """Those of train.lora on the host of rank 0, none elsewhere. Under ZeRO 3 all ranks must ask for them
        together."""
        import deepspeed

        named = dict(adapters(self.model))
        divided, root = self.train.zero_stage == 3, dist.get_rank() == 0
        with deepspeed.zero.GatheredParameters(list(named.values())) if divided else nullcontext():
            return {name: one.detach().to("cpu", copy=True).contiguous() for name, one in named.items() if root}

    def in_memory(self) -> dict[str, torch.Tensor]:
        """All of them on the host. Where they are there and whole already, nothing is copied."""
        divided = self.train.zero_stage == 3
        return {name: tensor.to("cpu", copy=divided).contiguous() for name, tensor in self.state()}

    def close(self) -> None:
        """Give up all that is in memory. Under ZeRO 3 DeepSpeed 0.19 keeps the model in caches of its own, and with it
        the optimizer: nothing is left in them."""
        parameters, optimizer = list(self.model.parameters()), self.engine.optimizer
        self.engine.destroy()
        for parameter in parameters:
            parameter.data, parameter.grad = torch.empty(0, dtype=parameter.dtype), None
            vars(parameter).clear()
        for holder in (optimizer, self.engine):
            vars(holder).clear()


def memory_gib(device: Any) -> float:
    """Peak memory of this rank so far: resident set on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
