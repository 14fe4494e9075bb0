"""Where a run works: models, engines, servers, the cluster."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rsrlm.settings.base import Number, Section

BUILTIN_MODEL = "smollm2-135m-instruct"


class ModelConfig(Section):
    path: str = Field(description=f"Hugging Face id, folder, or the built-in {BUILTIN_MODEL!r}")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of engines, learner and exported models")
    trust_remote_code: bool = Field(False, description="execute Python code that comes with the model")


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


class Clock(Section):
    """When the engines get new weights."""

    kind: Literal["iterative", "online"] = Field(
        "iterative",
        description="iterative: each iteration trains a model anew on what the one before it has made; online: each is "
        "a round of one long training, which keeps its optimizer and its learning rate's schedule, and the engines go "
        "on with the next prompts meanwhile",
    )
    lag: int = Field(
        1,
        ge=0,
        le=1,
        description="online: 1: a round is answered while the one before it is trained on, by the weights that the "
        "engines hold then; 0: where it is to be answered by new weights, the engines wait for them",
    )
    sync_every: int = Field(1, gt=0, description="online: rounds after which the engines get new weights")
    reference: Literal["first", "before"] = Field(
        "first",
        description="online: whose log-probabilities are the reference: those of the model that the run starts from, "
        "or of the one that the engines have got before the round is trained on",
    )
    evaluate_every: int = Field(
        10, gt=0, description="online: rounds between two evaluations on held-out prompts, a multiple of sync_every"
    )

    @model_validator(mode="after")
    def _evaluates_what_the_engines_hold(self) -> Self:
        if self.kind == "online" and self.evaluate_every % self.sync_every:
            raise ValueError(
                f"clock.evaluate_every={self.evaluate_every} with clock.sync_every={self.sync_every}: the engines "
                "evaluate the weights that they have got; set the first to a multiple of the second"
            )
        return self

    @property
    def overlaps(self) -> bool:
        """Whether engines answer while the learner trains."""
        return self.kind == "online" and (self.lag > 0 or self.sync_every > 1)

    def answers(self, number: int) -> int:
        """Rounds that the weights have learnt from which answer round `number`."""
        return self.holds(max(0, number - self.lag))

    def holds(self, number: int) -> int:
        """Rounds that the weights have learnt from which the engines hold while round `number` begins to be trained
        on."""
        return number // self.sync_every * self.sync_every


class Watched(Section):
    """A sign of trouble of an iteration: beyond `warn` the run says so, beyond `stop` it ends."""

    warn: Number | None = None
    stop: Number | None = None


class Engine(Section):
    kind: Literal["inprocess", "async"] = Field(
        "inprocess", description="inprocess: vLLM's LLMEngine in the actor (small machines); async: AsyncLLM"
    )
    replicas: int = Field(1, gt=0)
    min_replicas: int | None = Field(
        None,
        gt=0,
        description="a run begins when so many (of each kind of engine) are up; the others join it as hosts do. None: "
        "all",
    )
    producers: int = Field(
        0,
        ge=0,
        description="processes that make groups, each with its share of the replicas: worth it where one process "
        "cannot keep them busy; 0: the run's own",
    )
    threads: int = Field(2, gt=0, description="CPU threads of one replica")
    cpus: Number = Field(0.5, ge=0, description="Ray CPUs of one replica (placement only)")
    gpus: int = Field(0, ge=0, description="GPUs of one replica (tensor parallel size)")
    max_model_len: int = Field(1024, gt=0, description="tokens of prompt and answer together")
    max_num_seqs: int | None = Field(
        None, gt=0, description="requests that one replica runs at once; None: 32, and 256 on GPUs"
    )
    kv_cache_gib: Number | None = Field(
        None, gt=0, description="of a replica (of each of its GPUs); None: 1, and on GPUs what gpu_share leaves"
    )
    gpu_share: Number = Field(0.92, gt=0, lt=1, description="of the memory of each of its GPUs that a replica takes")
    enforce_eager: bool | None = Field(None, description="no CUDA graphs; None: on CPUs only")
    start_timeout_s: Number = Field(300.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "inprocess" and self.gpus > 1:
            raise ValueError(f"engine.gpus={self.gpus} needs engine.kind=async (tensor parallel)")
        if self.min_replicas and self.min_replicas > self.replicas:
            raise ValueError(
                f"engine.min_replicas={self.min_replicas} with engine.replicas={self.replicas}: lower the first or "
                "raise the second"
            )
        if self.producers > self.replicas:
            raise ValueError(f"engine.producers={self.producers} with engine.replicas={self.replicas}: each needs one")
        return self

    def least(self, replicas: int) -> int:
        """Of so many replicas, those without which no run begins."""
        return min(self.min_replicas or replicas, replicas)

    @property
    def sequences(self) -> int:
        """Requests that one replica runs at once."""
        return self.max_num_seqs or (256 if self.gpus else 32)

    @property
    def cpu_cache_gib(self) -> float:
        """The cache of a replica on CPUs."""
        return self.kv_cache_gib or 1.0


class Weights(Section):
    transport: Literal["shm", "gloo"] = Field(
        "shm",
        description="to the replicas on other hosts than the learner's, which share its memory: shm: they read the "
        "exported model in the run folder; gloo: a copy is sent to each host",
    )
    deadline_s: Number = Field(120.0, gt=0, description="a replica that loads weights for longer is replaced")


class Hosts(Section):
    """Labels (`ray start --labels`) that a host must have for these to be placed there; none: any host."""

    engines: dict[str, str] = Field({}, description="of engine.replicas")
    judges: dict[str, str] = Field({}, description="of judge.replicas")
    validators: dict[str, str] = Field({}, description="of evaluate.judge.replicas")
    learner: dict[str, str] = Field({}, description="of train.workers")

    def of(self, pool: str) -> dict[str, str]:
        found: dict[str, str] = getattr(self, pool, {})
        return found


class Ray(Section):
    address: str | None = Field(None, description="join this cluster; None: RAY_ADDRESS if set, else start one here")
    wait_s: Number | None = Field(
        None,
        ge=0,
        description="how long a run waits for hosts that are still to join; None: 60 on a cluster that it joins, 0 on "
        "its own",
    )
    hosts: Hosts = Hosts()
    spread: bool = Field(False, description="engines over as many hosts as there are; otherwise hosts fill up in turn")
    share_gpus: bool = Field(
        False,
        description="engines and ranks take turns on the same GPUs: engines sleep, their weights in the memory of the "
        "host, while the learner trains",
    )
    object_store_mib: int = Field(200, ge=80, description="of a cluster that is started here")
