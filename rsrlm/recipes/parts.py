"""What several recipes build: a group, a response that nobody sampled, scores on a common scale."""

from collections.abc import Sequence
from statistics import fmean, pstdev

from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Response, Sampling, Task

NOT_SAMPLED = Sampling(temperature=0.0, top_p=1.0, max_tokens=0, seed=0)


def group_of(
    task: Task,
    responses: Sequence[Response],
    judgements: Sequence[Judgement],
    made: Sequence[PreferencePair] | PreferencePair | NoPair,
) -> Group:
    """The group of a task with the pairs that it gave, or the reason why it gave none."""
    pairs = (made,) if isinstance(made, PreferencePair) else () if isinstance(made, NoPair) else tuple(made)
    return Group(
        id=task.id,
        iteration=task.iteration,
        prompt=task.prompt,
        responses=tuple(responses),
        judgements=tuple(judgements),
        pairs=pairs,
        no_pair_reason=made.reason if isinstance(made, NoPair) else "",
    )


def given(
    task: Task, text: str, prompt_token_ids: Sequence[int], token_ids: Sequence[int], name: str = "g", index: int = -1
) -> Response:
    """A text that nobody sampled as a response, such as a solution that came with the prompt: `00/tea/g`.

    `token_ids` are those of the text as the model would write it, its end token included (`ChatEncoder.target`).
    """
    return Response(
        id=f"{task.id}/{name}",
        prompt_id=task.prompt.id,
        index=index,
        role="data",
        text=text,
        token_ids=tuple(token_ids),
        prompt_token_ids=tuple(prompt_token_ids),
        finish_reason="stop",
        weight_version="",
        sampling=NOT_SAMPLED,
    )


def standardised(values: Sequence[float]) -> list[float]:
    """Each less the mean of all, over their population deviation; 0 for all where they do not differ."""
    deviation = pstdev(values) if values else 0.0
    mean = fmean(values) if values else 0.0
    return [(value - mean) / deviation if deviation > 1e-9 else 0.0 for value in values]
