"""What is trained on that no model of the run has sampled, and prompts that a model makes."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rsrlm.settings.base import Number, Section
from rsrlm.settings.methods import SamplingParams


class Source(Section):
    path: str = Field(
        description="JSONL of examples (`rsrlm data`), or made by the run itself: 'ift' and 'eft' from data.trees, "
        "'positive' from responses with positive_score"
    )
    weight: Number = Field(
        1.0, gt=0, description="times that each example appears in an epoch; the fraction is drawn by seed"
    )


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
    max_rouge: Number = Field(0.7, gt=0, le=1, description="a prompt with a higher ROUGE-L to any other is dropped")
    min_words: int = Field(3, ge=0, description="a prompt must have more")
    max_words: int = Field(150, gt=0)
    cut_at_separator: bool = Field(
        False, description="leave out what follows a separator: a model in training goes on to answer its own prompts"
    )
