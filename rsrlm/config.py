"""The configuration of a run: YAML, dotted overrides, and nothing repaired in silence.

Every section is frozen. A fact stands in one place; what follows from several is a property. Errors name the key, the
value and the remedy.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

BUILTIN_MODEL = "smollm2-135m-instruct"
LEAST_VALIDATION = 30  # prompts below which metrics.py estimates nothing
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class ConfigError(Exception):
    """A user's mistake in configuration or input; the message says what to do about it. Exit code 2."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _whole_number_is_a_float(value: Any) -> Any:
    """YAML writes 1 for 1.0, and PyYAML reads 1e-6 (no dot) as a string: both are plainly numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # the same as 1e999, which is refused
            return math.inf
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


Number = Annotated[float, BeforeValidator(_whole_number_is_a_float)]


class Model(Section):
    path: str = Field(description=f"Hugging Face id, folder, or the built-in {BUILTIN_MODEL!r}")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of engines, learner and exported models")
    trust_remote_code: bool = Field(False, description="execute Python code that comes with the model")


class Prompts(Section):
    path: str = Field(description="JSONL with id and prompt per line; 'builtin' is the project's own file")
    per_iteration: int = Field(gt=0, description="prompts that each iteration answers")
    heldout: int = Field(8, ge=0, description="prompts set aside for evaluation: they report")
    validation: int = Field(
        0, ge=0, description="prompts set aside for train.choose, beside those of heldout: they decide"
    )
    reuse: bool = Field(False, description="take prompts again in later iterations when the file is used up")
    overlong: Literal["drop", "error"] = Field(
        "drop", description="a prompt that leaves no room for max_tokens: left out and counted, or the run stops"
    )


class SamplingParams(Section):
    temperature: Number = Field(0.7, ge=0)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 is off")
    max_tokens: int = Field(gt=0)


class Sample(SamplingParams):
    responses: int = Field(4, ge=2, description="per prompt (K)")


class Endpoint(Section):
    """An OpenAI-compatible server."""

    url: str = Field(description="base url, such as https://api.openai.com/v1")
    model: str
    key_env: str | None = Field(None, description="environment variable that holds the key; None: no key")
    max_concurrent: int = Field(16, gt=0, le=1000)
    requests_per_minute: Number | None = Field(None, gt=0)
    max_retries: int = Field(5, ge=0)
    timeout_s: Number = Field(120.0, gt=0, description="for the whole answer to one attempt")
    price_in: Number = Field(0.0, ge=0, description="per million prompt tokens, in any currency")
    price_out: Number = Field(0.0, ge=0, description="per million generated tokens")
    max_cost: Number | None = Field(None, ge=0, description="no request is sent once it has cost this much")


class Judge(Section):
    model: str | None = Field(
        None, description="another model that judges, frozen, in a pool of its own (judge.replicas): external rewards"
    )
    trust_remote_code: bool = Field(False, description="execute Python code that comes with judge.model")
    endpoint: Endpoint | None = Field(None, description="a model behind an OpenAI-compatible API that judges")
    read: Literal["text", "structured", "digits", "function"] = Field(
        "text",
        description="text: the verdict line of free text; structured: the same with the line guaranteed; "
        "digits: the distribution over 0..5 in one decoding step; function: a Python function",
    )
    template: str = Field("additive", description="name of a template of rsrlm, or path of a Jinja2 file")
    function: str | None = Field(None, description="module:name, called with (prompt, response) and returning a number")
    timeout_s: Number = Field(60.0, gt=0, description="function: a call that takes longer gives no score")
    judgements: int | None = Field(None, gt=0, description="per response, averaged over the readable ones (N)")
    temperature: Number = Field(0.7, ge=0)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int = Field(160, gt=0)
    min_mass: Number = Field(0.05, ge=0, le=1, description="digits: less probability than this on 0..5 is unreadable")
    fence_salt: str | None = Field(
        None,
        description="what makes the fence around a response unguessable; null: drawn when the run starts and noted in "
        "start.json; set it to repeat a run exactly",
    )
    replicas: int = Field(0, ge=0, description="engines that only judge, with the same weights; 0: one pool for both")
    priority: bool = Field(True, description="judging before sampling in the engines' scheduler")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.read in ("digits", "function") and self.judgements is not None:
            raise ValueError(
                f"judge.judgements={self.judgements} does not apply to judge.read={self.read}, which gives one score "
                "per response; remove judge.judgements, or use judge.read=text"
            )
        if self.read == "function" and not self.function:
            raise ValueError("judge.read=function needs judge.function, e.g. judge.function=my_judges:shorter")
        if self.read != "function" and self.function:
            raise ValueError(f"judge.function={self.function} needs judge.read=function, not {self.read}")
        if self.model and self.endpoint:
            raise ValueError(f"judge.model={self.model} and judge.endpoint: one of them judges; remove the other")
        if self.model and (self.read == "function" or not self.replicas):
            raise ValueError(
                f"judge.model={self.model} needs engines of its own and a judge that asks them: set judge.replicas=1 "
                "or more, and judge.read to text, structured or digits"
            )
        if self.trust_remote_code and not self.model:
            raise ValueError(
                "judge.trust_remote_code=true is for the code of judge.model, which is not set; set it, or use "
                "model.trust_remote_code"
            )
        if self.endpoint and (self.read != "text" or self.replicas):
            raise ValueError(
                f"judge.endpoint answers in text: judge.read={self.read} and judge.replicas={self.replicas} must be "
                "text and 0"
            )
        if self.read == "function" and self.replicas:
            raise ValueError(f"judge.replicas={self.replicas} with judge.read=function: no engine judges; set it to 0")
        return self

    @property
    def per_response(self) -> int:
        """Judgements per response."""
        return self.judgements or (1 if self.read in ("digits", "function") else 3)

    @property
    def external(self) -> str | None:
        """Who judges in the place of the model in training."""
        return self.model or (self.endpoint.model if self.endpoint else None)


class Pair(Section):
    min_margin: Number = Field(0.0, ge=0, description="points; the difference must be larger than this")
    cut: Literal["rejected_only", "drop"] = Field(
        "rejected_only", description="a response cut by max_tokens: may lose but never win, or is left out"
    )
    empty: Literal["rejected_only", "drop"] = Field("drop", description="a response without text, likewise")
    max_chosen_chars: int | None = Field(None, gt=0, description="drop pairs whose chosen response is longer")
    kinds: list[Literal["actor", "judge"]] = Field(
        ["actor"], min_length=1, description="what the learner trains on: pairs of responses, pairs of judgements"
    )
    rho: Number = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="length control: chosen is the shortest response whose score is within this share of the group's "
        "range below the best, rejected the longest within it above the worst; 0 is off",
    )
    ties: Literal["first", "length", "random"] = Field(
        "first",
        description="of equal scores with rho=0: lowest index, shortest chosen and longest rejected, or by seed",
    )
    length: Literal["chars", "tokens"] = Field("chars", description="unit of rho's and ties' length")
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="drop: of responses with the same text only the first takes part"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"pair.kinds={self.kinds}: name each kind once")
        if self.rho and self.ties != "first":
            raise ValueError(
                f"pair.ties={self.ties} does not apply to pair.rho={self.rho}, which goes by length; remove pair.ties"
            )
        return self


class Meta(Section):
    """The meta-judge: which of two judgements of one response is the better one (2407.19594v2, section 2.3)."""

    read: Literal["text", "structured", "letters"] = Field(
        "text",
        description="text: reasoning and a winner line; structured: the same with the line guaranteed; letters: the "
        "probabilities of A and B in one decoding step",
    )
    template: str = Field("meta", description="name of a template of rsrlm, or path of a Jinja2 file")
    temperature: Number = Field(0.7, ge=0)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int = Field(300, gt=0)
    min_mass: Number = Field(
        0.05, ge=0, le=1, description="letters: less probability than this on A and B is unreadable"
    )
    weights: Literal["iteration", "prompt", "none"] = Field(
        "iteration",
        description="wins by the judgement shown first or second are weighted against the position's bias, counted "
        "over the iteration or over each prompt alone; none: 0.5 each",
    )
    ridge: Number = Field(0.01, gt=0, description="times the sum of squared scores: keeps the Bradley-Terry fit finite")
    max_chosen_chars: int | None = Field(None, gt=0, description="drop pairs whose chosen judgement is longer")
    opponents: int | None = Field(
        None, gt=0, description="comparisons that a judgement takes part in, at least; None: with every other one"
    )
    collapse: bool = Field(False, description="judgements with the same text are compared once")
    skip_agreed: bool = Field(False, description="no comparisons where all judgements of the response give one score")


class Train(Section):
    method: Literal["dpo", "sft"] = Field(
        "dpo", description="dpo: on preference pairs; sft: on targets, see sft.sources"
    )
    start: Literal["before", "first"] = Field(
        "before",
        description="the model that training starts from: that of the iteration before (M_t), or the first (M0)",
    )
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: Number = Field(0.1, gt=0)
    label_smoothing: Number = Field(0.0, ge=0, lt=0.5)
    length_normalized: bool = Field(False, description="mean instead of sum of a response's log-probabilities")
    nll_scale: Number = Field(0.0, ge=0, description="times the per-token negative log-likelihood of the chosen")
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
    workers: int = Field(1, gt=0, description="ranks of the learner group")
    threads: int = Field(2, gt=0, description="CPU threads of one rank")
    cpus: Number = Field(0.5, ge=0, description="Ray CPUs of one rank (placement only; threads says how many it uses)")
    gpus: int = Field(0, ge=0, le=1, description="GPUs of one rank")
    checkpoint_every_steps: int = Field(50, gt=0)
    max_restarts: int = Field(2, ge=0, description="times the group is rebuilt after a rank died")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lr_final > self.lr:
            raise ValueError(f"train.lr_final={self.lr_final} is above train.lr={self.lr}; lower it")
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                f"train.label_smoothing={self.label_smoothing} does not apply to train.loss=ipo; set it to 0"
            )
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


class Source(Section):
    path: str = Field(
        description="JSONL of examples (`rsrlm data`), or made by the run itself: 'ift' and 'eft' from data.trees, "
        "'positive' from responses with sft.positive_score"
    )
    weight: Number = Field(
        1.0, gt=0, description="times that each example appears in an epoch; the fraction is drawn by seed"
    )


class SFT(Section):
    sources: list[Source] = Field([], description="what train.method=sft trains on")
    positive_score: Number = Field(5.0, description="least mean score of a response that source 'positive' takes")


class Data(Section):
    """Human-ranked seed data, and how IFT and EFT examples are taken from it (2401.10020v3, section 3.1.1)."""

    trees: str | None = Field(
        None,
        description="ranked data: Open Assistant trees (.jsonl, .jsonl.gz), other ranked files, or a Hugging Face id",
    )
    language: str | None = Field("en", description="of the trees; None: all")
    ift_share: Number = Field(0.6, ge=0, le=1, description="of the trees, by a hash of the tree id")
    eft_share: Number = Field(0.3, ge=0, le=1, description="likewise; what is left is for evaluation")
    max_ift: int | None = Field(None, gt=0)
    max_eft: int | None = Field(None, gt=0, description="judgements kept at most")
    max_chars: int | None = Field(None, gt=0, description="leave out trees with a longer prompt, and longer replies")
    eft_judgements: int = Field(3, gt=0, description="judgements sampled for each ranked reply")
    eft_per_reply: int = Field(1, gt=0, description="of those, kept for a reply at most: the nearest to their mean")
    accept: Literal["order", "pairs"] = Field(
        "order", description="judgements kept: of trees whose whole order agrees with people, or of pairs that agree"
    )
    most_common: Number = Field(1.0, gt=0, le=1, description="the most common score is thinned to this share")
    minimum: int = Field(8, gt=0, description="fewer examples of a source than this fail the stage")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.eft_per_reply > self.eft_judgements:
            raise ValueError(
                f"data.eft_per_reply={self.eft_per_reply} is more than data.eft_judgements={self.eft_judgements}; "
                "lower it, or sample more"
            )
        if self.ift_share + self.eft_share > 1:
            raise ValueError(
                f"data.ift_share={self.ift_share} and data.eft_share={self.eft_share} add up to more than 1; lower them"
            )
        return self


class SelfInstruct(SamplingParams):
    """Prompts that a model makes (`rsrlm data prompts`; 2401.10020v3, section 3.1.3, and Self-Instruct, 2212.10560)."""

    temperature: Number = Field(0.6, ge=0)
    top_p: Number = Field(0.9, gt=0, le=1)
    max_tokens: int = Field(512, gt=0)
    from_seeds: int = Field(6, gt=0, description="demonstrations from prompts.path")
    from_generated: int = Field(2, ge=0, description="demonstrations from prompts made before")
    round: int = Field(32, gt=0, description="requests that see the same prompts made before")
    give_up_after: int = Field(5, gt=0, description="rounds in a row without a new prompt")
    max_rouge: Number = Field(0.7, gt=0, le=1, description="a prompt with a higher ROUGE-L to any other is dropped")
    min_words: int = Field(3, ge=0, description="a prompt must have more")
    max_words: int = Field(150, gt=0)
    cut_at_separator: bool = Field(
        False, description="leave out what follows a separator: a model in training goes on to answer its own prompts"
    )


class Watched(Section):
    """A sign of trouble of an iteration: beyond `warn` the run says so, beyond `stop` it ends."""

    warn: Number | None = None
    stop: Number | None = None


class Engine(Section):
    kind: Literal["inprocess", "async"] = Field(
        "inprocess", description="inprocess: vLLM's LLMEngine in the actor (small machines); async: AsyncLLM"
    )
    replicas: int = Field(1, gt=0)
    threads: int = Field(2, gt=0, description="CPU threads of one replica")
    cpus: Number = Field(0.5, ge=0, description="Ray CPUs of one replica (placement only)")
    gpus: int = Field(0, ge=0, description="GPUs of one replica (tensor parallel size)")
    max_model_len: int = Field(1024, gt=0, description="tokens of prompt and answer together")
    max_num_seqs: int = Field(32, gt=0, description="requests that one replica runs at once")
    kv_cache_gib: Number = Field(1.0, gt=0)
    block_size: int = Field(32, gt=0)
    enforce_eager: bool = True
    start_timeout_s: Number = Field(300.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "inprocess" and self.gpus > 1:
            raise ValueError(f"engine.gpus={self.gpus} needs engine.kind=async (tensor parallel)")
        if self.gpus == 0 and self.block_size % 32:
            raise ValueError(f"engine.block_size={self.block_size}: vLLM on CPUs needs a multiple of 32")
        return self


class Weights(Section):
    transport: Literal["shm", "gloo"] = Field("shm", description="shm: one file on the host; gloo: between hosts")
    deadline_s: Number = Field(120.0, gt=0, description="an update that takes longer fails")


class Validator(Section):
    """Who judges held-out answers and candidates. Where `model` and `endpoint` name nobody, the judge of the rewards
    does; where that is the model itself, M0 reports and the model before decides on candidates."""

    model: str | None = Field(None, description="other weights, frozen, in engines of their own (replicas)")
    trust_remote_code: bool = Field(False, description="execute Python code that comes with evaluate.judge.model")
    endpoint: Endpoint | None = Field(None, description="a model behind an OpenAI-compatible API, as in the paper")
    replicas: int = Field(1, gt=0, description="engines of evaluate.judge.model")
    read: Literal["letters", "text"] = Field(
        "letters", description="how the pairwise verdict is read: the letters' probabilities, or a written winner line"
    )
    template: str = Field("pairwise", description="pairwise judge template: a name of rsrlm's or a Jinja2 file")
    temperature: Number = Field(0.0, ge=0, description="of a written pairwise verdict")
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int = Field(300, gt=0, description="of a written pairwise verdict")
    min_mass: Number = Field(
        0.05, ge=0, le=1, description="letters: less probability than this on the two is unreadable"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model and self.endpoint:
            raise ValueError(f"evaluate.judge.model={self.model} and evaluate.judge.endpoint: remove one of them")
        if self.trust_remote_code and not self.model:
            raise ValueError(
                "evaluate.judge.trust_remote_code=true is for the code of evaluate.judge.model, which is not set; set "
                "it, or use model.trust_remote_code"
            )
        return self

    @property
    def external(self) -> str | None:
        """Who judges in the place of the rewards' judge."""
        return self.model or (self.endpoint.model if self.endpoint else None)


class Evaluate(SamplingParams):
    temperature: Number = Field(0.0, ge=0, description="of the answers")
    max_tokens: int = Field(96, gt=0)
    judge: Validator = Validator()
    duel: bool = Field(True, description="win rate over the previous model by the pairwise judge, in both orders")
    kl: bool = Field(
        True, description="estimate the KL divergence from M0, on one answer to each held-out prompt at temperature 1"
    )


class Wandb(Section):
    project: str | None = Field(None, description="None: no wandb")
    entity: str | None = None


class Ray(Section):
    address: str | None = Field(None, description="join this cluster; None: RAY_ADDRESS if set, else start one here")
    object_store_mib: int = Field(200, ge=80, description="of a cluster that is started here")


class Config(Section):
    """One run. `name` is the run folder under `runs`."""

    name: str = Field(pattern=f"^{NAME}$", max_length=200)
    runs: str = "runs"
    seed: int = Field(0, ge=0)
    iterations: int = Field(gt=0)
    model: Model
    prompts: Prompts
    sample: Sample
    judge: Judge = Judge()
    meta: Meta = Meta()
    pair: Pair = Pair()
    sft: SFT = SFT()
    data: Data = Data()
    self_instruct: SelfInstruct = SelfInstruct()
    watch: dict[str, Watched | None] = Field(
        {}, description="limits of the signs of trouble, by name, in the place of the defaults; null switches one off"
    )
    train: Train
    schedule: list[dict[str, Any]] = Field(
        [],
        description="changes of each iteration, in order: any of name (of the model it trains), prompts.per_iteration, "
        "sample, judge, meta, pair, sft, train; empty: all iterations alike",
    )
    engine: Engine = Engine()
    weights: Weights = Weights()
    evaluate: Evaluate = Evaluate()
    wandb: Wandb = Wandb()
    ray: Ray = Ray()

    @model_validator(mode="before")
    @classmethod
    def _model_shorthand(cls, data: Any) -> Any:
        """`model: some/id` is short for `model: {path: some/id}`."""
        if isinstance(data, dict) and isinstance(data.get("model"), str):
            return {**data, "model": {"path": data["model"]}}
        return data

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key, tokens in (
            ("sample.max_tokens", self.sample.max_tokens),
            ("evaluate.max_tokens", self.evaluate.max_tokens),
            *([("judge.max_tokens", self.judge.max_tokens)] if self.judge.read in ("text", "structured") else []),
        ):
            if tokens >= self.engine.max_model_len:
                raise ValueError(
                    f"{key}={tokens} leaves no room for a prompt in engine.max_model_len={self.engine.max_model_len}; "
                    "lower the first or raise the second"
                )
        if self.train.gpus == 0 and self.engine.gpus == 0 and self.model.dtype == "bfloat16":
            raise ValueError("model.dtype=bfloat16 without GPUs is slow and untested; use model.dtype=float32")
        if "judge" in self.pair.kinds and (
            self.judge.read not in ("text", "structured") or self.judge.per_response < 2
        ):
            raise ValueError(
                f"pair.kinds={self.pair.kinds} compares judgements of one response, but judge.read={self.judge.read} "
                f"gives {self.judge.per_response}; use judge.read=text or structured, and judge.judgements of 2 or more"
            )
        if "judge" in self.pair.kinds and self.judge.external:
            raise ValueError(
                f"pair.kinds={self.pair.kinds} trains on the model's own judgements, but {self.judge.external} judges; "
                "leave out judge"
            )
        if self.train.choose != "last" and self.prompts.validation < LEAST_VALIDATION:
            raise ValueError(
                f"train.choose={self.train.choose} with prompts.validation={self.prompts.validation}: candidates are "
                f"chosen by prompts of their own, and fewer than {LEAST_VALIDATION} cannot tell them apart; raise it"
            )
        if self.validator.endpoint and self.compares and self.evaluate.judge.read != "text":
            key = "evaluate.judge" if self.evaluate.judge.endpoint else "judge"
            raise ValueError(
                f"{key}.endpoint compares in text: set evaluate.judge.read=text, or evaluate.duel=false and no "
                "train.choose=duel"
            )
        if "judge" in self.pair.kinds and self.meta.max_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"meta.max_tokens={self.meta.max_tokens} leaves no room for a prompt in engine.max_model_len="
                f"{self.engine.max_model_len}; lower the first or raise the second"
            )
        if "judge" in self.pair.kinds and self.judge.temperature == 0:
            raise ValueError(
                f"judge.temperature=0 with pair.kinds={self.pair.kinds}: all judgements of a response would be "
                "the same; raise it"
            )
        if self.evaluate.judge.read == "text" and self.evaluate.judge.max_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"evaluate.judge.max_tokens={self.evaluate.judge.max_tokens} leaves no room for a prompt in "
                f"engine.max_model_len={self.engine.max_model_len}; lower the first or raise the second"
            )
        if "eft" in {source.path for source in self.sft.sources} and self.judge.external:
            raise ValueError(
                f"sft.sources names eft, the model's own judgements, but {self.judge.external} judges; make a file "
                "with `rsrlm data eft`, and name that"
            )
        positive = "positive" in {source.path for source in self.sft.sources}
        if positive and self.judge.read == "digits" and self.sft.positive_score >= 5:
            raise ValueError(
                f"sft.positive_score={self.sft.positive_score} with judge.read=digits, whose mean never reaches it; "
                "lower it"
            )
        made = {source.path for source in self.sft.sources} & {"ift", "eft"}
        if made and self.data.trees is None:
            raise ValueError(
                f"sft.sources names {', '.join(sorted(made))}, which is made from ranked data: set data.trees=PATH, "
                "such as the message trees of Open Assistant (2023-04-12_oasst_ready.trees.jsonl.gz from "
                "huggingface.co/datasets/OpenAssistant/oasst1), or data.trees=OpenAssistant/oasst1"
            )
        if "eft" in made and self.judge.read not in ("text", "structured"):
            raise ValueError(
                f"sft.sources names eft, whose targets are written judgements, but judge.read={self.judge.read}; use "
                "judge.read=text or structured"
            )
        return self

    @property
    def validator(self) -> Judge | Validator:
        """Who validates: `evaluate.judge` if it names somebody, else the judge of the rewards."""
        return self.evaluate.judge if self.evaluate.judge.external else self.judge

    @property
    def validating(self) -> Judge:
        """How who validates scores an answer: as the judge of the rewards does, but in text where that is a function or
        the validator stands behind an API."""
        own = self.evaluate.judge
        if not own.external:
            return self.judge
        update: dict[str, Any] = {"model": own.model, "endpoint": own.endpoint}
        if own.endpoint or self.judge.read == "function":
            update |= {"read": "text", "function": None}
        return self.judge.model_copy(update=update)

    @property
    def compares(self) -> bool:
        """Whether answers are compared two by two."""
        return self.evaluate.duel or self.train.choose == "duel"

    def _merged(self, iteration: int) -> dict[str, Any]:
        """Plain data of this iteration's config: the schedule's changes over everything else."""
        data = self.model_dump()
        for section, changes in self.schedule[iteration].items():
            if section != "name":
                data[section] = {**data[section], **changes}
        return {**data, "schedule": [], "iterations": 1}

    def at(self, iteration: int) -> "Config":
        """The config of one iteration, 0 being the first."""
        return Config.model_validate(self._merged(iteration)) if self.schedule else self

    @property
    def distinct(self) -> list[tuple["Config", int]]:
        """The configs of all iterations, in order, and how many iterations in a row have each."""
        if not self.schedule:
            return [(self, self.iterations)]
        return [(self.at(iteration), 1) for iteration in range(self.iterations)]

    def model_at(self, path: str) -> Model:
        """Another model, loaded like the config's own. Code that comes with it is run only where its key says so."""
        own = path == self.model.path and self.model.trust_remote_code
        others = any(path == who.model and who.trust_remote_code for who in (self.judge, self.evaluate.judge))
        return self.model.model_copy(update={"path": path, "trust_remote_code": own or others})

    def model_name(self, index: int) -> str:
        """M0, which the run starts from, and from 1 on what each iteration trains."""
        return str(self.schedule[index - 1].get("name", f"M{index}")) if index and self.schedule else f"M{index}"

    @property
    def folder(self) -> Path:
        try:
            runs = Path(self.runs).expanduser()
        except RuntimeError:
            raise ConfigError(f"runs={self.runs}: that user has no home folder here; write the folder out") from None
        return runs.resolve() / self.name


def _message(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = ", ".join(_keys_at(item["loc"][:-1]))
            lines.append(f"{key}: unknown key; known here: {known}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing; add it to the file or pass {key}=VALUE")
        elif item["type"] == "value_error":
            lines.append(str(item["ctx"]["error"]))
        else:
            lines.append(f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return f"{source}: " + "\n".join(lines)


def _keys_at(path: tuple[int | str, ...]) -> list[str]:
    """Keys of the section at a place; sections stand in lists, mappings and unions with None too."""
    section: Any = Config
    for part in path:
        inside = section.model_fields[part].annotation if part in section.model_fields else section
        while not (isinstance(inside, type) and issubclass(inside, BaseModel)):
            inside = next(one for one in reversed(get_args(inside)) if one is not type(None))
        section = inside
    return sorted(section.model_fields)


def resolve(data: dict[str, Any], source: str = "config") -> Config:
    """Validated config from plain data, its schedule included. Raises ConfigError."""
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_message(error, source)) from None
    _check_schedule(config, source)
    return config


SCHEDULED = ("prompts", "sample", "judge", "meta", "pair", "sft", "train")
# The learner group, the pools and the prompts that are set aside live as long as the run.
FIXED = (
    *(f"train.{key}" for key in ("workers", "threads", "cpus", "gpus", "max_restarts")),
    *(f"judge.{key}" for key in ("replicas", "model", "trust_remote_code", "endpoint")),
    *(f"prompts.{key}" for key in ("path", "heldout", "validation", "reuse", "overlong")),
)


def _check_schedule(config: Config, source: str) -> None:
    if config.schedule and len(config.schedule) != config.iterations:
        raise ConfigError(
            f"{source}: schedule has {len(config.schedule)} entries for iterations={config.iterations}; write one for "
            "each iteration ({} where nothing changes)"
        )
    for iteration, changes in enumerate(config.schedule):
        where = f"{source}: schedule entry {iteration}"
        for section, values in changes.items():
            if section == "name":
                if not isinstance(values, str) or not re.fullmatch(NAME, values):
                    raise ConfigError(f"{where}: name={values!r} must be letters, digits, '.', '_' and '-'")
                if values.endswith((".tmp", ".old")):
                    raise ConfigError(f"{where}: name={values!r}: .tmp and .old are endings of files in the making")
            elif section not in SCHEDULED:
                raise ConfigError(f"{where}: {section} cannot change; known here: name, {', '.join(SCHEDULED)}")
            elif not isinstance(values, dict):
                raise ConfigError(f"{where}: {section}={values!r} must be a mapping of keys")
        try:
            step = config.at(iteration)
        except ValidationError as error:
            raise ConfigError(_message(error, where)) from None
        unread = {
            "sft": step.train.method != "sft",
            "pair": step.train.method == "sft",
            "meta": step.train.method == "sft" or "judge" not in step.pair.kinds,
        }
        for section in changes:
            if unread.get(section):
                raise ConfigError(
                    f"{where}: {section} has no effect with train.method={step.train.method} and "
                    f"pair.kinds={step.pair.kinds}; remove it, or change these"
                )
        for key in FIXED:
            section, name = key.split(".")
            if getattr(getattr(step, section), name) != getattr(getattr(config, section), name):
                raise ConfigError(f"{where}: {key} holds for the whole run; set it outside of the schedule")
    names = [config.model_name(index) for index in range(len(config.schedule) + 1)]
    if len(set(names)) < len(names):
        raise ConfigError(f"{source}: schedule: the models {', '.join(names)} need names of their own")
    for iteration, (step, _) in enumerate(config.distinct):
        if step.train.method == "sft" and not step.sft.sources:
            raise ConfigError(
                f"{source}: iteration {iteration} has train.method=sft and no sft.sources; name at least one, such as "
                "sft.sources='[{path: my_examples.jsonl}]'"
            )


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping with a key twice: PyYAML takes the last one without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Here and not in construct_mapping, which also sees the keys that `<<` merges in.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return node


def _parse(text: str) -> Any:
    """What the YAML says. Raises ValueError with the reason."""
    try:
        return yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, LookupError, AttributeError, RecursionError) as error:  # `!!int ''` is an IndexError
        raise ValueError(str(error)) from None


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Config from a YAML file and `key.sub=value` overrides, whose values are YAML too. Raises ConfigError."""
    file = Path(path)
    try:
        data = _parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give the path of a YAML config") from None
    except ValueError as error:  # UnicodeDecodeError is one, and so is that of an impossible date
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: must be a mapping of keys, such as those of configs/quickstart.yaml")
    for override in overrides or []:
        _override(data, override)
    return resolve(data, str(file))


def changed(config: Config, overrides: list[str] | None) -> Config:
    """A config with overrides on top of it. Raises ConfigError."""
    data = config.model_dump(mode="json")
    for override in overrides or []:
        _override(data, override)
    return resolve(data, "the run's config")


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: overrides are written key.sub=value, such as train.lr=1e-5")
    try:
        value = _parse(text)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{override!r}: the value is not valid YAML; quote it, as in {key}='\"text\"' ({reason})"
        ) from None
    *parents, last = key.split(".")
    section = data
    for part in parents:
        child = section.setdefault(part, {})
        if isinstance(child, str) and part == "model" and section is data:
            child = section[part] = {"path": child}
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {part} is not a section")
        section = child
    section[last] = value


def dump(config: Config) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
