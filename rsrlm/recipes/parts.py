"""What several recipes build: a group, a response that nobody sampled, a prompt by a template of their own; and scores
on a common scale."""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from rsrlm.engines import SAMPLE_PRIORITY, Engines
from rsrlm.judges import templates
from rsrlm.judges.base import LONGEST_FENCE, Context, sampling_of
from rsrlm.records import Group, Judgement, NoPair, PreferencePair, Prompt, Request, Response, Role, Sampling, Task
from rsrlm.settings.base import ConfigError

REFERENCE = "reference"  # in the data of a prompt: a good answer
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


def given_answer(context: Context, task: Task, key: str) -> Response | None:
    """The answer that came with the prompt under this key; None where there is none, or it leaves no room."""
    text = task.prompt.data.get(key, "")
    prompt, target = context.asked(task.prompt.text), context.encoder.target(text)
    return given(task, text, prompt, target) if text.strip() and len(prompt) + len(target) <= context.room else None


def check_carried(prompts: Sequence[Prompt], key: str, use: str) -> None:
    """Raise ConfigError for a prompt that lacks what a recipe needs; `use` says what for."""
    for prompt in prompts:
        if not prompt.data.get(key, "").strip():
            raise ConfigError(f"prompt {prompt.id!r} has no {key!r}, {use}; add it to the line of the prompt")


def check_given(context: Context, prompts: Sequence[Prompt], key: str) -> None:
    """Raise ConfigError for a prompt with such an answer in a run whose answers begin with a thought: none comes with
    it, and to prefer it would teach the model not to think."""
    for prompt in prompts:
        if context.marker and prompt.data.get(key, "").strip():
            raise ConfigError(
                f"prompt {prompt.id!r} has {key!r}, an answer without a thought, and thought is set: leave out one"
            )


def standardised(values: Sequence[float]) -> list[float]:
    """Each less the mean of all, over their population deviation; 0 for all where they do not differ."""
    deviation = pstdev(values) if values else 0.0
    mean = fmean(values) if values else 0.0
    return [(value - mean) / deviation if deviation > 1e-9 else 0.0 for value in values]


class Turn:
    """A prompt that a recipe writes by a template of its own, which prints `variables`, what the prompt carries, and a
    fence."""

    def __init__(self, context: Context, name: str, variables: frozenset[str], key: str) -> None:
        """`name` is that of a template of rsrlm or a file, `key` the config's. Raises ConfigError."""
        self.source = templates.load_template(name, variables, key)
        self._context, self._variables = context, variables
        self._data_names = templates.data_names(self.source)

    def needs(self) -> int:
        """Tokens of the template alone."""
        data = templates.data_fields(self._data_names, "", dict.fromkeys(self._data_names, ""))
        fields = {**dict.fromkeys(self._variables, ""), **data, "fence": LONGEST_FENCE}
        return len(self._context.encoder.encode(self.source, fields))

    async def ask(
        self,
        engines: Engines,
        task: Task,
        params: Any,
        role: Role,
        index: int,
        fields: Mapping[str, str],
        regex: str | None = None,
    ) -> Response:
        """What the model writes, as response `index` of the task's group, held to `regex` where there is one; a
        response without text, cut at once, where the prompt leaves no room."""
        context, name = self._context, str(index)
        data = templates.data_fields(self._data_names, task.prompt.id, task.prompt.data)
        fence = context.fence(context.seed_of(task.iteration, task.prompt.id, role, f"fence {name}"))
        tokens = context.encoder.encode(self.source, {**fields, **data, "fence": fence})
        sampling = sampling_of(params, context.seed_of(task.iteration, task.prompt.id, role, name))
        request = Request(
            id=f"{task.id}/{name}",
            prompt_token_ids=tokens,
            sampling=sampling,
            priority=SAMPLE_PRIORITY,
            regex=regex,
            role=role,
        )
        fits = len(tokens) + params.max_tokens <= context.room
        completion = await engines.complete(request) if fits else None
        return Response(
            id=request.id,
            prompt_id=task.prompt.id,
            index=index,
            role=role,
            text=completion.text if completion else "",
            token_ids=completion.token_ids if completion else (),
            prompt_token_ids=tokens,
            finish_reason=completion.finish_reason if completion else "length",
            weight_version=completion.weight_version if completion else "",
            sampling=sampling,
        )
