"""Answers that are written line by line: the beginning of an answer, and what the model writes after it."""

from dataclasses import replace
from typing import Any

from pydantic import Field

from rsrlm.engines import SAMPLE_PRIORITY, Engines
from rsrlm.judges.base import Context
from rsrlm.recipes.parts import NOT_SAMPLED
from rsrlm.records import Completion, Request, Response, Sampling, Task
from rsrlm.settings.base import ConfigError, Section

PARTS = 2  # requests for one line: the first may give nothing but a line break


class Line(Section):
    separator: str = Field(
        "\n", min_length=1, description="what ends a line: '\\n', or '\\n\\n' where a step is a paragraph"
    )
    max_tokens: int = Field(128, gt=0, description="of a line; what is longer goes on in the next")


class Lines:
    """Samples what follows the beginning of an answer.

    A beginning is a `Response` whose tokens are those that the model wrote. It is complete only if the model wrote the
    end token. An answer has at most `sample.max_tokens` tokens, whatever the number of its lines.
    """

    def __init__(self, context: Context, sample: Any, line: Line) -> None:
        """`sample` has temperature, top_p and max_tokens. Raises ConfigError where answers begin with a thought."""
        if context.marker:
            raise ConfigError(
                "thought is set, but this recipe writes answers line by line, and all lines are judged; leave it out"
            )
        self.context, self.sample, self.config = context, sample, line

    def start(self, task: Task, name: str) -> Response:
        """Nothing is written yet."""
        return Response(
            id=f"{task.id}/{name}",
            prompt_id=task.prompt.id,
            index=-1,
            role="actor",
            text="",
            token_ids=(),
            prompt_token_ids=self.context.encoder.user(task.prompt.text),
            finish_reason="length",
            weight_version="",
            sampling=NOT_SAMPLED,
        )

    def is_done(self, answer: Response) -> bool:
        """Nothing follows: the model ended it, or the length limit did."""
        return answer.complete or len(answer.token_ids) >= self.sample.max_tokens

    async def follow(
        self,
        engines: Engines,
        task: Task,
        before: Response,
        name: str,
        *,
        temperature: float | None = None,
        whole: bool = False,
    ) -> Response:
        """`before` and one line more, or all the rest with `whole`. Id and seeds come from the task and `name`, which
        may end in `@` and the number of an attempt: the id leaves it out."""
        most = self.sample.max_tokens
        if not whole:
            most = min(most, len(before.token_ids) + self.config.max_tokens)
        made = before
        for part in range(PARTS):
            sampling = Sampling(
                temperature=self.sample.temperature if temperature is None else temperature,
                top_p=self.sample.top_p,
                max_tokens=most - len(made.token_ids),
                seed=self.context.seed_of(task.iteration, task.prompt.id, "actor", f"{name}.{part}" if part else name),
                stop=() if whole else (self.config.separator,),
            )
            request = Request(
                id=f"{task.id}/{name}",
                prompt_token_ids=made.prompt_token_ids + made.token_ids,
                sampling=sampling,
                priority=SAMPLE_PRIORITY,
            )
            made = self._with(made, await engines.complete(request), sampling)
            if made.complete or made.text[len(before.text) :].strip() or len(made.token_ids) >= most:
                break
        return replace(made, id=f"{task.id}/{name.partition('@')[0]}")

    def step(self, before: Response, after: Response, index: int) -> Response:
        """What was written after `before` alone, as one of several: its prompt is the question and what was begun."""
        text = after.text[len(before.text) :]
        return replace(
            after,
            index=index,
            text=text,
            token_ids=after.token_ids[len(before.token_ids) :],
            prompt_token_ids=before.prompt_token_ids + before.token_ids,
            finish_reason="stop" if after.complete or text.endswith(self.config.separator) else "length",
        )

    def _with(self, before: Response, completion: Completion, sampling: Sampling) -> Response:
        """The beginning with what was written after it. A stop string is no end of the answer."""
        text, tokens = completion.text, completion.token_ids
        if completion.finish_reason == "string":
            text += self._tail(completion)
        elif completion.finish_reason == "length" and sampling.stop:
            text, tokens = self._whole_characters(text, tokens)
        return replace(
            before,
            text=before.text + text,
            token_ids=before.token_ids + tokens,
            finish_reason="stop" if completion.finish_reason == "stop" else "length",
            weight_version=completion.weight_version,
            sampling=sampling,
        )

    def _whole_characters(self, text: str, tokens: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Without the first bytes of a character that the limit of a line has cut: what follows them is no text."""
        while len(tokens) > 1 and self._said(tokens).endswith("\ufffd"):
            tokens = tokens[:-1]
        return text.rstrip("\ufffd"), tokens

    def _said(self, tokens: tuple[int, ...]) -> str:
        decode = self.context.encoder.tokenizer.decode
        return str(decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tail(self, completion: Completion) -> str:
        """What the last token says beyond a stop string, such as the second line break of a token of two."""
        # Blanks aside: tokenizers leave out one at the start of what they decode.
        said = self._said(completion.token_ids).lstrip(" ")
        text = completion.text.lstrip(" ")
        return said[len(text) :] if said.startswith(text) else ""
