"""Supervised fine-tuning: the negative log-likelihood of target tokens."""

from collections.abc import Sequence

from torch import Tensor

from rsrlm.losses.base import Loss, Sums
from rsrlm.losses.packing import TokenBatch
from rsrlm.records import Example


class TargetLoss(Loss):
    """The denominator is the number of target tokens of the step."""

    item = Example
    prompt = "prompt_token_ids"
    responses = ("target_token_ids",)

    def sums(
        self,
        logps_R: Tensor,
        ref_logps_R: Tensor | None,
        batch: TokenBatch,
        items: Sequence[Example],
        counted_N: Tensor,
    ) -> Sums:
        return target_loss(logps_R, batch.segment_R, counted_N)

    def denominator(self, items: int, response_tokens: int) -> int:
        return response_tokens

    def means(self, summed: dict[str, float]) -> dict[str, float]:
        """`loss`, also called `sft_loss`, is the mean over the target tokens of a step, in nats."""
        tokens = summed["tokens_trained"]
        loss = summed["loss"] / tokens
        return {"loss": loss, "sft_loss": loss, "examples": summed["examples"], "tokens_trained": tokens}


def target_loss(logps_R: Tensor, segment_R: Tensor, counted_N: Tensor) -> Sums:
    """The negative log-likelihood of all target tokens, summed, in nats.

    R target tokens of N examples; `segment_R` is the example of each.
    """
    counted_N = counted_N.to(logps_R.dtype)
    counted_R = counted_N[segment_R]
    loss = -(counted_R * logps_R).sum()
    sums = {"loss": loss.detach(), "tokens_trained": counted_R.sum(), "examples": counted_N.sum()}
    return Sums(loss=loss, sums=sums)
