"""Chat prompts out of text that nobody vouches for: prompts of a data set, responses of a model.

Such text never passes through Jinja2 or a chat template, and never becomes a special token: templates are rendered with
placeholders, and the text goes in as token ids between the pieces that they leave. Whatever a response says, the
tokens around it stay the same.
"""

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rsrlm.config import ConfigError

# Private-use characters: no case, no white space and no markup, so that filters such as trim leave them alone.
_OPEN, _CLOSE = "\U000f5a1d", "\U000f5a1e"
_PLACEHOLDER = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")
_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=False)


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise ConfigError unless the tokenizer of the model `name` can write a chat prompt and recognise an end."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"model.path={name}: its tokenizer has no chat template; use an instruction-tuned model, or add "
            "chat_template.jinja to a local copy of the model folder"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.path={name}: its tokenizer has no end token, so that no answer could end by itself; set eos_token "
            "in tokenizer_config.json of a local copy of the model folder"
        )


def template_variables(source: str) -> frozenset[str]:
    """The variables of a Jinja2 template, each of which it may only print as it is, as in `{{ response }}`.

    ConfigError if it does anything else with one (values come in after the rendering, so that a filter or a condition
    would look at a placeholder) or is not valid Jinja2.
    """
    if _OPEN in source or _CLOSE in source:
        raise ConfigError(f"contains {_OPEN!r} or {_CLOSE!r}, which stand for the values while rendering; remove them")
    try:
        tree = _JINJA.parse(source)
        names = frozenset(meta.find_undeclared_variables(tree))
    except TemplateSyntaxError as error:
        raise ConfigError(f"line {error.lineno}: {error.message}; correct the Jinja2 syntax") from None
    printed = {id(node) for output in tree.find_all(nodes.Output) for node in output.nodes}
    for node in tree.find_all(nodes.Name):
        if node.name in names and id(node) not in printed:
            raise ConfigError(
                f"line {node.lineno}: {node.name} may only be printed as {{{{ {node.name} }}}}, without filters, "
                "conditions or assignments, as its value is put in after the rendering"
            )
    return names


class ChatEncoder:
    """Token ids of one-message chat prompts. The tokenizer passed in is left as it is.

    Trusted pieces (the chat template, the turn's template, the answer prefix) are tokenised once per kind of prompt.
    One thread at a time.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # A copy, because split_special_tokens=True in a call stays set in the Rust tokenizer behind the wrapper.
        self._literal = copy.deepcopy(tokenizer)
        self._literal.split_special_tokens = True
        added = {
            text: token for text, token in tokenizer.get_added_vocab().items() if len(text) > 1 and not text.isspace()
        }
        self._added_ids = frozenset(added.values())
        longest_first = sorted(added, key=len, reverse=True)
        self._added_text = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # N judgements of a response, and all comparisons of those, ask for the same texts again and again.
        self._encoded = functools.lru_cache(maxsize=512)(self._encode_literally)
        self._pieces: dict[tuple[str, str, frozenset[str]], tuple[str | tuple[int, ...], ...]] = {}
        for text, token in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
            if token in self._encode_literally(text):
                raise ConfigError(
                    f"the model's tokenizer reads {text!r} in a user's text as its special token, so that a response "
                    "could end its own turn; use a model with a fast tokenizer"
                )

    def encode(self, template: str, fields: Mapping[str, str], answer_prefix: str = "") -> tuple[int, ...]:
        """The prompt of a user turn: `template` is Jinja2 that prints `fields`, `answer_prefix` opens the answer.

        Template and prefix are trusted: a special token's text in them is that token. Field values are not: they come
        out as the tokens of their text alone, with lone surrogates as U+FFFD. ConfigError if the template does not
        fit the fields, or if the model's chat template does not print the turn exactly once and unchanged.
        """
        key = (template, answer_prefix, frozenset(fields))
        if key not in self._pieces:
            self._pieces[key] = self._trusted_pieces(template, answer_prefix, sorted(fields))
        values = {name: self._encoded(text) for name, text in fields.items()}
        ids: list[int] = []
        for piece in self._pieces[key]:
            ids.extend(values[piece] if isinstance(piece, str) else piece)
        return tuple(ids)

    def user(self, text: str) -> tuple[int, ...]:
        """The prompt that asks the model `text`."""
        return self.encode("{{ prompt }}", {"prompt": text})

    @staticmethod
    def text(template: str, fields: Mapping[str, str]) -> str:
        """The user turn as text, for a model behind an API: `template` with the fields put in after the rendering."""
        pieces = _split(_render(template, sorted(fields)))
        return "".join(fields[piece] if place % 2 else piece for place, piece in enumerate(pieces))

    def target(self, text: str) -> tuple[int, ...]:
        """The answer `text` as a model would write it: the tokens of the text alone, and the end token."""
        return (*self._encode_literally(text), self.tokenizer.eos_token_id)

    def _trusted_pieces(self, template: str, answer_prefix: str, names: list[str]) -> tuple[str | tuple[int, ...], ...]:
        """Token ids of the trusted pieces, and between them the names of the fields."""
        turn = _render(template, names)
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise ConfigError(f"the model's chat template failed on a user message: {error}; correct it") from error
        pieces = _split(text)
        if pieces[1::2] != _split(turn)[1::2]:
            raise ConfigError("the model's chat template does not print a user message exactly once; correct it")
        trusted = [self._encode_trusted(piece) for piece in pieces[::2]]
        trusted[-1] += self._encode_trusted(answer_prefix)
        result: list[str | tuple[int, ...]] = [trusted[0]]
        for name, ids in zip(pieces[1::2], trusted[1:], strict=True):
            result += [name, ids]
        return tuple(result)

    def _encode_trusted(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False))

    def _encode_literally(self, text: str) -> Sequence[int]:
        # JSON can carry half of a surrogate pair, which no tokenizer takes.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids: list[int] = self._literal.encode(text, add_special_tokens=False)
        if self._added_ids.isdisjoint(ids):
            return ids
        # Models also declare tokens such as <think> that are not called special and are matched all the same.
        parts = self._added_text.split(text)
        apart = [item for index, part in enumerate(parts) for item in (part if index % 2 else [part]) if item]
        return [token for item in apart for token in self._literal.encode(item, add_special_tokens=False)]


def _render(template: str, names: list[str]) -> str:
    """The template with a placeholder for every field, each used field at least once."""
    variables = template_variables(template)
    if unknown := variables - set(names):
        raise ConfigError(f"the template uses {', '.join(sorted(unknown))}; it may use {', '.join(names)}")
    try:
        turn = _JINJA.from_string(template).render({name: f"{_OPEN}{name}{_CLOSE}" for name in names})
    except Exception as error:
        raise ConfigError(f"the template cannot be rendered: {error}; correct it") from error
    if lost := variables - set(_split(turn)[1::2]):
        raise ConfigError(f"the template does not print {', '.join(sorted(lost))} in every case; print it always")
    return turn


def _split(text: str) -> list[str]:
    """Trusted pieces at even places, field names between them."""
    pieces = _PLACEHOLDER.split(text)
    if any(character in piece for piece in pieces[::2] for character in (_OPEN, _CLOSE)):
        raise ConfigError("a template changed the text it was to print; remove its filters")
    return pieces
