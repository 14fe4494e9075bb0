"""What recipes ask for: prompts, samples, judges, pairs; and how held-out answers are judged."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from rsrlm.settings.base import JUDGES, ConfigError, Number, Section, plugin
from rsrlm.settings.machine import Endpoint
from rsrlm.settings.source import lines_of


class PerIteration(Section):
    per_iteration: int = Field(gt=0, description="prompts that an iteration answers")


class Prompts(PerIteration):
    path: str = Field(
        description="JSONL with id and prompt per line, and what else a recipe needs, such as answer; files of the "
        "project's own are 'builtin' and 'arithmetic', which has answers"
    )
    heldout: int = Field(8, ge=0, description="prompts set aside for evaluation: they report")
    validation: int = Field(
        0, ge=0, description="prompts set aside for train.choose, beside those of heldout: they decide"
    )
    reuse: bool = Field(False, description="take prompts again in later iterations when the file is used up")


class SamplingParams(Section):
    temperature: Number = Field(0.7, ge=0)
    top_p: Number = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(gt=0)


class Sample(SamplingParams):
    responses: int = Field(4, ge=2, description="per prompt (K)")


class Thought(Section):
    """A thought before the answer (2410.10630): trained on, and shown to no judge."""

    template: str = Field("thought", description="what asks for both: a name of rsrlm's or a Jinja2 file")
    marker: str = Field("<R>", min_length=1, description="what stands between the thought and the answer, once")


class JudgeSection(Section):
    """What every judge of responses has; `Config` of a judge extends it. Who judges holds for the whole run."""

    kind: str = Field(
        "text", description="text, structured, digits, yes_no, true_false, answer, function, or module:Class"
    )
    model: str | None = Field(
        None, description="another model that judges, frozen, in a pool of its own (judge.replicas): external rewards"
    )
    trust_remote_code: bool = Field(False, description="execute Python code that comes with judge.model")
    endpoint: Endpoint | None = Field(None, description="a model behind an OpenAI-compatible API that judges")
    fence_salt: str | None = Field(
        None,
        description="what makes the fence around a response unguessable; null: drawn when the run starts and noted in "
        "start.json; set it to repeat a run exactly",
    )
    replicas: int = Field(0, ge=0, description="engines that only judge, with the same weights; 0: one pool for both")

    @model_validator(mode="after")
    def _someone_judges(self) -> Self:
        if self.model and self.endpoint:
            raise ValueError(f"judge.model={self.model} and judge.endpoint: one of them judges; remove the other")
        if self.model and not self.replicas:
            raise ValueError(f"judge.model={self.model} needs engines of its own: set judge.replicas=1 or more")
        if self.trust_remote_code and not self.model:
            raise ValueError(
                "judge.trust_remote_code=true is for the code of judge.model, which is not set; set it, or use "
                "model.trust_remote_code"
            )
        if self.endpoint and (self.kind != "text" or self.replicas):
            raise ValueError(
                f"judge.endpoint answers in text: judge.kind={self.kind} and judge.replicas={self.replicas} must be "
                "text and 0"
            )
        return self

    @property
    def external(self) -> str | None:
        """Who judges in the place of the model in training."""
        return self.model or (self.endpoint.model if self.endpoint else None)

    @property
    def per_response(self) -> int:
        """Judgements of a response."""
        return 1

    @property
    def tokens(self) -> int:
        """Tokens that one judgement may generate; 0 where no engine is asked."""
        return 0

    @property
    def in_words(self) -> bool:
        """Whether the judge writes what it thinks, so that its judgements can be compared and imitated."""
        return False


WHO_JUDGES = ("model", "trust_remote_code", "endpoint", "fence_salt", "replicas")


def judge_section(data: dict[str, Any]) -> JudgeSection:
    """The Config of the judge that `kind` names. Raises ConfigError and pydantic's ValidationError."""
    section: JudgeSection = plugin(str(data.get("kind", "text")), JUDGES, "judge.kind").Config.model_validate(data)
    return section


def _judge_of_kind(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, dict):
        try:
            return judge_section(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        except ValidationError as error:
            kind = plugin(str(value.get("kind", "text")), JUDGES, "judge.kind").Config
            raise ValueError("\n".join(lines_of(error, kind, "judge."))) from None
    return value if isinstance(value, JudgeSection) else handler(value)


JudgeConfig = Annotated[SerializeAsAny[JudgeSection], WrapValidator(_judge_of_kind)]


class TakingPart(Section):
    """Which scored responses take part in a pair."""

    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="drop: of responses with the same text only the first takes part"
    )


class Pair(TakingPart):
    max_chosen_chars: int | None = Field(None, gt=0, description="drop pairs whose chosen response is longer")
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

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rho and self.ties != "first":
            raise ValueError(
                f"pair.ties={self.ties} does not apply to pair.rho={self.rho}, which goes by length; remove pair.ties"
            )
        return self


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
    max_tokens: int = Field(300, gt=0, description="of a written pairwise verdict")
    temperature: ClassVar[float] = 0.0
    top_p: ClassVar[float] = 1.0

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
