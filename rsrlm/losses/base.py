"""What a loss is: the items that it learns from, how their tokens are laid out, and what is summed up and divided.

A loss is a file in this folder (or the module that defines its items) with a subclass of `Loss`. Nothing in it
averages: micro-batches and ranks hold unequal numbers of items, so the learner adds the sums up and divides once by the
denominator of the whole step.

Shapes in names, as in `rsrlm.losses.packing`: S sequences, R response tokens, N items of a micro-batch.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from rsrlm import losses
from rsrlm.losses.packing import TokenBatch
from rsrlm.settings.train import TrainRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """`loss` is a scalar with gradient, the sum over the items; `sums` are detached scalars that can be added up, with
    the same names every time. `each` has some of them by item, [N], for figures by kind of item."""

    loss: Tensor
    sums: dict[str, Tensor]
    each: dict[str, Tensor] = field(default_factory=dict)


class Loss(ABC):
    """Learns from items of one type.

    prompt, responses: the fields of an item that hold token ids; every response continues the prompt. A field counts as
    often as it is named.
    needs_reference: the log-probabilities under the model before the first update are wanted too.
    """

    item: ClassVar[type]
    prompt: ClassVar[str]
    responses: ClassVar[tuple[str, ...]]
    needs_reference: ClassVar[bool] = False

    def __init__(self, train: TrainRule) -> None:
        self.train = train

    def layout(self, item: Any) -> list[list[tuple[int, ...]]]:
        """Token ids of each prompt of an item with the responses that continue it: one prompt, unless overridden."""
        return [[getattr(item, name) for name in (self.prompt, *self.responses)]]

    @abstractmethod
    def sums(
        self,
        logps_R: Tensor,
        ref_logps_R: Tensor | None,
        batch: TokenBatch,
        items: Sequence[Any],
        counted_N: Tensor,
    ) -> Sums:
        """Of a micro-batch, whose sequences are those of `layout`, item by item. `counted_N` is 1, and 0 for a dummy
        that keeps ranks in step and adds nothing."""

    @abstractmethod
    def denominator(self, items: int, response_tokens: int) -> int:
        """What the loss of a step is divided by, given the numbers of its items and of their response tokens."""

    @abstractmethod
    def means(self, summed: dict[str, float]) -> dict[str, float]:
        """What a step reports, from its sums over all ranks. Names with a slash are of one kind of item,
        `judge/margin`."""


def loss_for(item: type, train: TrainRule) -> Loss:
    """The loss that learns from items of this type. Raises LookupError."""
    for module in pkgutil.iter_modules(losses.__path__):
        importlib.import_module(f"{losses.__name__}.{module.name}")
    found = [kind for kind in _subclasses(Loss) if getattr(kind, "item", None) is item]
    if len(found) != 1:
        raise LookupError(
            f"{len(found)} losses learn from {item.__name__}: write one subclass of rsrlm.losses.base.Loss with "
            f"item = {item.__name__}, in rsrlm/losses or in the module of {item.__name__}"
        )
    return found[0](train)


def _subclasses(kind: type[Any]) -> list[type[Any]]:
    return [one for direct in kind.__subclasses__() for one in (direct, *_subclasses(direct))]


def sequence_sums(values_R: Tensor, segment_R: Tensor, num_segments: int) -> Tensor:
    """[num_segments]: the sum of the values of each segment; 0 for a segment without any."""
    return values_R.new_zeros(num_segments).index_add(0, segment_R, values_R)
