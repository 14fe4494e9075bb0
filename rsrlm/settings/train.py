"""How the learner trains: `train` of a config and of a step."""

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from rsrlm.settings.base import Number, Section

# Of DeepSpeed's config: what the learner does by itself, or what a key of ours says.
OWN_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization.stage",
    "bf16",
    "fp16",
    "amp",
    "optimizer",
    "scheduler",
)


class LoRA(Section):
    """Low-rank adapters (2106.09685): each linear layer learns the product of two small matrices beside its weight."""

    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0, description="what an adapter adds is scaled by alpha / rank")
    dropout: Number = Field(0.0, ge=0, lt=1)
    targets: list[str] = Field([], description="names of linear layers, such as q_proj; none: all but the LM head")


class TrainRule(Section):
    """How an iteration trains, whatever on."""

    start: Literal["before", "first"] = Field(
        "before",
        description="the model that training starts from: that of the iteration before (M_t), or the first (M0)",
    )
    lr: Number = Field(gt=0)
    lr_final: Number = Field(0.0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: Number = Field(0.0, ge=0)
    max_grad_norm: Number = Field(1.0, gt=0)
    epochs: int = Field(1, gt=0)
    stop_after_epoch: int | None = Field(
        None, gt=0, description="train no further than this epoch; the learning rate is that of all epochs"
    )
    candidate_every_steps: int | None = Field(
        None, gt=0, description="export the model every so many steps too, for train.choose"
    )
    choose: Literal["last", "score", "duel"] = Field(
        "last",
        description="which candidate becomes the next model: the last one; score, duel: the last one whose answers to "
        "the validation prompts were better than those of the best before it, the model before being the first; score "
        "goes by mean scores, duel by comparisons in both orders, and better is what a 95 % interval confirms",
    )
    early_stop: bool = Field(
        False, description="judge each candidate when it is there, and end training at the first that is not better"
    )
    pairs_per_step: int = Field(
        gt=0,
        description="pairs (or examples) of one optimizer step, over all ranks; the last step of an epoch may have "
        "fewer, of which each then weighs more",
    )
    micro_batch: int = Field(1, gt=0, description="pairs (or examples) of one forward pass of one rank")
    packed: bool = Field(
        True, description="chosen and rejected in one row behind their shared prompt; examples likewise"
    )
    gradient_checkpointing: bool = False
    dropout: Number = Field(0.0, ge=0, lt=1)
    zero_stage: Literal[0, 1, 2, 3] = 0
    lora: LoRA | None = Field(None, description="train adapters alone, and add them to the weights at the end")
    deepspeed: dict[str, Any] = Field(
        {},
        description="further keys of DeepSpeed's own config, such as {zero_optimization: {offload_optimizer: {device: "
        "cpu}}}",
    )
    checkpoint_every_steps: int = Field(50, gt=0)

    @model_validator(mode="after")
    def _adds_to_deepspeed(self) -> Self:
        for key in OWN_KEYS:
            section, _, name = key.rpartition(".")
            keys = self.deepspeed.get(section, {}) if section else self.deepspeed
            if not isinstance(keys, dict):
                raise ValueError(f"train.deepspeed.{section}={keys!r} must be a mapping of keys")
            if name in keys:
                raise ValueError(f"train.deepspeed.{key} is not yours to set: other keys of train, and model.dtype, do")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lr_final > self.lr:
            raise ValueError(f"train.lr_final={self.lr_final} is above train.lr={self.lr}; lower it")
        if self.stop_after_epoch is not None and self.stop_after_epoch > self.epochs:
            raise ValueError(
                f"train.stop_after_epoch={self.stop_after_epoch} is after train.epochs={self.epochs}; lower it"
            )
        if (self.choose == "last") != (self.candidate_every_steps is None):
            raise ValueError(
                f"train.choose={self.choose} with train.candidate_every_steps={self.candidate_every_steps}: candidates "
                "are for choosing among them; set both, or neither"
            )
        if self.early_stop and self.choose == "last":
            raise ValueError(
                "train.early_stop=true goes by candidates: set train.candidate_every_steps, and train.choose to score "
                "or duel"
            )
        return self

    def steps(self, items: int) -> int:
        """Optimizer steps of an iteration on so many pairs or examples."""
        return -(-items // self.pairs_per_step) * (self.stop_after_epoch or self.epochs)


class Distillation(TrainRule):
    """Training on judgements in two views (2409.00935)."""

    student_scale: Number = Field(0.3, ge=0, description="times the cross-entropy of the student's view")
    kl_scale: Number = Field(2.0, ge=0, description="times KL(teacher || student), in which the teacher stands still")


class DPO(TrainRule):
    """Training on preference pairs (2305.18290)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: Number = Field(0.1, gt=0)
    nll_scale: Number = Field(0.0, ge=0, description="times the per-token negative log-likelihood of the chosen")


class SPPO(DPO):
    """Training on preference pairs whose scores are win rates (2405.00675): other scores are no goal of its loss."""

    loss: Literal["sppo"] = "sppo"  # type: ignore[assignment]  # DPO's losses have no use for win rates
    beta: Number = Field(0.001, gt=0, description="1 / eta: a win rate p is the goal (p - 1/2) / beta of a log-ratio")


class Train(DPO):
    """What all iterations share: the learner's ranks, and the values that a step's own `train` leaves out, which may be
    keys that only its recipe knows."""

    model_config = ConfigDict(extra="allow")

    loss: Literal["sigmoid", "ipo", "sppo"] = "sigmoid"  # type: ignore[assignment]  # which of them, a step's rule says
    workers: int = Field(1, gt=0, description="ranks of the learner group")
    threads: int = Field(2, gt=0, description="CPU threads of one rank")
    cpus: Number = Field(0.5, ge=0, description="Ray CPUs of one rank (placement only; threads says how many it uses)")
    gpus: int = Field(0, ge=0, le=1, description="GPUs of one rank")
    silence_s: Number = Field(
        1800.0, gt=0, description="a learner that says nothing for so long (no step is done) hangs: the run ends"
    )
