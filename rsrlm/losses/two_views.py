"""Self-distillation of a judge (Self-J, 2409.00935): what it says with the reference in view teaches it to do without.

Shapes in names: N items, L labels of each; S = 2 N L sequences of one token: the labels after the teacher's prompt,
then those after the student's, item by item.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsrlm.losses.base import Loss, Sums
from rsrlm.losses.packing import TokenBatch
from rsrlm.records import TwoViews
from rsrlm.settings.train import Distillation, TrainRule

TINY = 1e-6  # probability: below it a logarithm says more of rounding than of the model


class TwoViewsLoss(Loss):
    """The denominator is the number of items of the step."""

    item = TwoViews
    prompt = "student_token_ids"
    responses = ("label_token_ids", "label_token_ids")
    train: Distillation

    def __init__(self, train: TrainRule) -> None:
        if not isinstance(train, Distillation):
            raise TypeError(f"two views are trained on by the rules of Distillation, not by {type(train).__name__}")
        self.train = train

    def layout(self, item: TwoViews) -> list[list[tuple[int, ...]]]:
        labels = [(label,) for label in item.label_token_ids]
        return [[item.teacher_token_ids, *labels], [item.student_token_ids, *labels]]

    def sums(
        self,
        logps_R: Tensor,
        ref_logps_R: Tensor | None,
        batch: TokenBatch,
        items: Sequence[TwoViews],
        counted_N: Tensor,
    ) -> Sums:
        label_N = torch.tensor([item.label for item in items], device=logps_R.device)
        return distillation(logps_R.view(len(items), 2, -1), label_N, counted_N, self.train)

    def denominator(self, items: int, response_tokens: int) -> int:
        return items

    def means(self, summed: dict[str, float]) -> dict[str, float]:
        """Means over the examples of a step, in nats; `sft_loss` is the loss. `student_right` is the share of examples
        whose label is the student's likeliest."""
        examples = summed["examples"]
        found = {name: value / examples for name, value in summed.items() if name != "examples"}
        return {**found, "sft_loss": found["loss"], "examples": examples}


def distillation(logps_NVL: Tensor, label_N: Tensor, counted_N: Tensor, train: Distillation) -> Sums:
    """CE(teacher) + `student_scale` CE(student) + `kl_scale` KL(teacher || student) of each item, summed.

    `logps_NVL` are the log-probabilities of the labels in the views V (teacher, student), in nats; all tokens that are
    no label count as one further outcome in the KL divergence, in which the teacher is detached.
    """
    counted_N = counted_N.to(logps_NVL.dtype)
    teacher_NL, student_NL = logps_NVL[:, 0], logps_NVL[:, 1]
    teacher_ce_N, student_ce_N = (-one.gather(-1, label_N[:, None]).squeeze(-1) for one in (teacher_NL, student_NL))
    teacher_NO, student_NO = (with_rest(one) for one in (teacher_NL.detach(), student_NL))
    kl_N = (teacher_NO.exp() * (teacher_NO - student_NO)).sum(-1)
    loss_N = counted_N * (teacher_ce_N + train.student_scale * student_ce_N + train.kl_scale * kl_N)
    with torch.no_grad():
        right_N = (student_NL.argmax(-1) == label_N).to(logps_NVL.dtype)
        parts = {"teacher_ce": teacher_ce_N, "student_ce": student_ce_N, "kl": kl_N, "student_right": right_N}
        sums = {name: (counted_N * values_N).sum() for name, values_N in parts.items()}
    return Sums(loss=loss_N.sum(), sums={"loss": loss_N.detach().sum(), "examples": counted_N.sum(), **sums})


def with_rest(logps_NL: Tensor) -> Tensor:
    """[N, L + 1]: with the log-probability of everything else, at least that of `TINY`."""
    rest_N1 = (1 - logps_NL.exp().sum(-1, keepdim=True)).clamp(min=TINY).log()
    return torch.cat([logps_NL, rest_N1], -1)
