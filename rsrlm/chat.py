"""Chat prompts out of text that nobody vouches for: prompts of a data set, responses of a model.

Such text never passes through Jinja2 or a chat template, and never becomes a special token: templates are rendered with
placeholders, and the text goes in as token ids between the pieces that they leave. Whatever a response says, the
tokens around it stay the same.

The tokens are those of the model's own chat prompt, but for two things that come with this: white space around a text
stays, also where the template would trim it, and no token reaches from a
piece into a text. A tokenizer that would join the end of a text with what follows it ("." and a line break in a judge's
template) gives one token there, and here it is two.
"""

import copy
import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rsrlm.settings.base import ConfigError

# Private-use characters: no case, no white space and no markup, so that filters such as trim leave them alone.
_OPEN, _CLOSE = "\U000f5a1d", "\U000f5a1e"
_PLACEHOLDER = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")
_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=False)


def check_tokenizer(tokenizer: Any, name: str, key: str = "model.path") -> None:
    """Raise ConfigError unless the tokenizer of the model `name`, which the user named under `key`, can write a chat
    prompt and recognise an end."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{key}={name}: its tokenizer has no chat template; use an instruction-tuned model, or add "
            "chat_template.jinja to a local copy of the model folder"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{key}={name}: its tokenizer has no end token, so that no answer could end by itself; set eos_token "
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


# Where a text stands: at the start of the prompt, right behind an added token such as <s>, or within other text.
# SentencePiece's tokenizers put a blank of their own before the first, and some of them before the second.
Where = Literal["start", "behind", "within"]

# What stands behind a blank that is not its own: all up to a fence is one piece, whatever the fence.
_APART = frozenset({"fence"})


# Special tokens and marks of turns that models know: <|im_end|>, <|turn>, <channel|>, <｜User｜>, [|user|], [INST],
# <s>, <<SYS>>, <bos>, <EOS_TOKEN>, <unused3>, <start_of_turn>. Little else has this form in code, HTML or mathematics.
SPELLINGS = "|".join(
    (
        r"<\|\w(?:[\w .:/+-]{0,62}\w)?\|>",
        r"<\|\w{1,64}>",
        r"<\w{1,64}\|>",
        r"<｜[^<>｜\n]{1,64}｜>",
        r"\[\|\w{1,64}\|\]",
        r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|[gs]?MASK)\]",
        r"</?s>",
        r"<</?SYS>>",
        r"<(?:bos|eos|pad|unk|mask|sep|cls|sop|eop|eot|eoh|eoa|endoftext|\w{1,32}_TOKEN|unused\d+|reserved_\d+)>",
        r"</?(?:start|begin|end)_of_\w{1,32}>",
    )
)


class _Field(NamedTuple):
    """A field's place between the trusted pieces; `blanks` stand before it and are tokenised with its text."""

    name: str
    blanks: str
    where: Where


class ChatEncoder:
    """Token ids of one-message chat prompts. The tokenizer passed in is left as it is.

    Trusted pieces (the chat template, the turn's template, the answer prefix) are tokenised once per kind of prompt.
    One thread at a time.
    """

    def __init__(self, tokenizer: Any, date: datetime | None = None) -> None:
        """`date` is what chat templates print that ask for the time, now if None: a prompt that is made again must be
        the one that an engine saw. Raises ConfigError for a tokenizer that cannot take its special tokens' spellings
        as text."""
        self.tokenizer = tokenizer
        self.date = date or datetime.now()
        # A copy, because split_special_tokens=True in a call stays set in the Rust tokenizer behind the wrapper.
        start = copy.deepcopy(tokenizer)
        self._at: dict[Where, Any] = {
            "start": start,
            "behind": _without_prefix(start, everywhere=False),
            "within": _without_prefix(start, everywhere=True),
        }
        vocabulary = tokenizer.get_added_vocab()
        self._ends_section = frozenset(vocabulary.values())
        added = {text: token for text, token in vocabulary.items() if len(text) > 1 and not text.isspace()}
        self._added_ids = frozenset(added.values())
        longest_first = sorted(added, key=len, reverse=True)
        self._added_text = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        either = "|".join([*map(re.escape, longest_first), SPELLINGS])
        # A look-ahead, as spellings may overlap.
        self._spelled = re.compile(f"(?=(?:{either})).", re.DOTALL)
        # N judgements of a response, and all comparisons of those, ask for the same texts again and again.
        self._encoded = functools.lru_cache(maxsize=512)(self._encode_literally)
        self._pieces: dict[tuple[str, str, frozenset[str]], tuple[_Field | tuple[int, ...], ...]] = {}
        self._answer: tuple[str, Where] | None = None
        for text, token in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
            if token in self._encode_literally(text, "within"):
                raise ConfigError(
                    f"the model's tokenizer reads {text!r} in a user's text as its special token, so that a response "
                    "could end its own turn; use a model with a fast tokenizer"
                )

    def encode(self, template: str, fields: Mapping[str, str], answer_prefix: str = "") -> tuple[int, ...]:
        """The prompt of a user turn: `template` is Jinja2 that prints `fields`, `answer_prefix` opens the answer.

        Template and prefix are trusted: a special token's text in them is that token. Field values are not: they come
        out as the tokens of their text alone, with lone surrogates as U+FFFD. Blanks that a template puts before a
        field are tokenised with the value, as tokenizers make one token of a blank and the word behind it. ConfigError
        if the template does not fit the fields, or if the model's chat template does not print the turn exactly once
        and unchanged.
        """
        key = (template, answer_prefix, frozenset(fields))
        if key not in self._pieces:
            self._pieces[key] = self._trusted_pieces(template, answer_prefix, sorted(fields))
        ids: list[int] = []
        for piece in self._pieces[key]:
            if isinstance(piece, _Field):
                ids.extend(self._encoded(piece.blanks + fields[piece.name], piece.where))
            else:
                ids.extend(piece)
        return tuple(ids)

    def user(self, text: str) -> tuple[int, ...]:
        """The prompt that asks the model `text`."""
        return self.encode("{{ prompt }}", {"prompt": text})

    def text(self, template: str, fields: Mapping[str, str]) -> str:
        """The user turn as text, for a model behind an API: `template` with the fields put in after the rendering.

        Its server tokenises the chat and knows special tokens by their spelling, so that in field values a spelling
        gets an invisible U+2060 behind its first character. Which tokenizer it has is not known here: this
        tokenizer's added tokens and those of common families count.
        """
        pieces = _split(_render(template, sorted(fields)))
        return "".join(self._unspelled(fields[piece]) if place % 2 else piece for place, piece in enumerate(pieces))

    def _unspelled(self, text: str) -> str:
        return self._spelled.sub(lambda match: match[0] + "\u2060", text)

    def bare(self, text: str) -> tuple[int, ...]:
        """`text` outside of any chat, as a base model reads it: the tokens of the text alone, between those that the
        tokenizer puts around any text, such as a BOS token."""
        tokenizer = self._at["start"]
        whole, alone = (tokenizer.encode("a", add_special_tokens=added) for added in (True, False))
        place = next(place for place in range(len(whole)) if whole[place : place + len(alone)] == alone)
        return (*whole[:place], *self._encode_literally(text, "start"), *whole[place + len(alone) :])

    def target(self, text: str) -> tuple[int, ...]:
        """The answer `text` as a model would write it behind a prompt: the tokens of the text alone, after the blank
        that some chat templates put before an answer, and the end token."""
        blanks, where = self._before_answer()
        return (*self._encode_literally(blanks + text, where), self.tokenizer.eos_token_id)

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The chat as text. Raises ConfigError with what the chat template says."""
        # A variable hides the global of this name that transformers gives to templates.
        clock = {"strftime_now": self.date.strftime} if "strftime_now" in str(self.tokenizer.chat_template) else {}
        try:
            found: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **clock
            )
        except Exception as error:
            raise ConfigError(f"the model's chat template failed on a user message: {error}; correct it") from error
        return found

    def _before_answer(self) -> tuple[str, Where]:
        """The blanks that the chat template puts between a prompt and its answer, and where these stand."""
        if self._answer is None:
            user, answer = ({"role": role, "content": f"{_OPEN}{role}{_CLOSE}"} for role in ("user", "assistant"))
            prompt = self._rendered([user], True)
            try:
                whole = self._rendered([user, answer], False)
            except ConfigError:  # a template for one message: answers follow its prompt
                whole = prompt
            between = whole.removeprefix(prompt).partition(_OPEN)[0] if whole.startswith(prompt) else ""
            blanks = "" if between.strip(" ") else between
            self._answer = blanks, self._behind(self._encode_trusted(prompt, "start"), "start")
        return self._answer

    def _trusted_pieces(
        self, template: str, answer_prefix: str, names: list[str]
    ) -> tuple[_Field | tuple[int, ...], ...]:
        """Token ids of the trusted pieces, and between them the places of the fields."""
        turn = _render(template, names)
        pieces = _split(self._rendered([{"role": "user", "content": turn}], True))
        if pieces[1::2] != _split(turn)[1::2]:
            raise ConfigError("the model's chat template does not print a user message exactly once; correct it")
        result: list[_Field | tuple[int, ...]] = []
        where: Where = "start"
        for piece, name in zip_longest(pieces[::2], pieces[1::2]):
            ids = self._encode_trusted(piece, where)
            if name is None:
                break
            blanks = ""
            if name not in _APART and piece.endswith(" "):
                shorter = self._encode_trusted(piece.rstrip(" "), where)
                if shorter != ids:  # else the token before the blanks swallows them
                    ids, blanks = shorter, piece[len(piece.rstrip(" ")) :]
            result += [ids, _Field(name, blanks, self._behind(ids, where))]
            where = "within"
        if answer_prefix:
            blanks, place = self._before_answer()
            ids += self._encode_trusted(blanks + answer_prefix, place)
        return (*result, ids)

    def _behind(self, ids: Sequence[int], where: Where) -> Where:
        """Where a text stands that follows a piece with these tokens, which stands at `where`."""
        if not ids:
            return where
        return "behind" if ids[-1] in self._ends_section else "within"

    def _encode_trusted(self, text: str, where: Where) -> tuple[int, ...]:
        tokenizer = self._at[where]
        options = {"add_special_tokens": False, "split_special_tokens": False}
        if where != "within" or tokenizer is self._at["behind"]:
            return tuple(tokenizer.encode(text, **options))
        # Up to its first added token it goes on with what is before it; behind that token the blank comes again.
        found = tokenizer(text, return_offsets_mapping=True, **options)
        ids = found["input_ids"]
        place = next((place for place, token in enumerate(ids) if token in self._ends_section), None)
        if place is None:
            return tuple(ids)
        rest = text[found["offset_mapping"][place][1] :]
        return (*ids[: place + 1], *self._encode_trusted(rest, "behind"))

    def _encode_literally(self, text: str, where: Where) -> Sequence[int]:
        # JSON can carry half of a surrogate pair, which no tokenizer takes.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        options = {"add_special_tokens": False, "split_special_tokens": True}
        ids: list[int] = self._at[where].encode(text, **options)
        if self._added_ids.isdisjoint(ids):
            return ids
        # Models also declare tokens such as <think> that are not called special and are matched all the same.
        parts = self._added_text.split(text)
        apart = [item for index, part in enumerate(parts) for item in (part if index % 2 else [part]) if item]
        places: list[Where] = [where, *["within"] * (len(apart) - 1)]  # type: ignore[list-item]
        return [
            token
            for item, place in zip(apart, places, strict=True)
            for token in self._at[place].encode(item, **options)
        ]


def _without_prefix(tokenizer: Any, *, everywhere: bool) -> Any:
    """A copy that puts no blank of its own before the start of a text, nor, with `everywhere`, behind added tokens.

    The tokenizer itself where it does not anyway, and where it has no Rust tokenizer inside.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    changed: dict[str, Any] = {}
    for part in ("normalizer", "pre_tokenizer"):
        component = getattr(backend, part, None)
        state = json.loads(component.__getstate__()) if component is not None else {}
        if (plain := _unprefixed(state, everywhere)) != state:
            changed[part] = plain
    if not changed:
        return tokenizer
    from tokenizers import normalizers, pre_tokenizers

    mine = copy.deepcopy(tokenizer)
    for part, state in changed.items():
        component = normalizers.Sequence([]) if part == "normalizer" else pre_tokenizers.Sequence([])
        component.__setstate__(json.dumps(state).encode())  # of any type: the class is only a name for it
        setattr(mine.backend_tokenizer, part, component)
    return mine


def _unprefixed(state: dict[str, Any], everywhere: bool) -> dict[str, Any]:
    """The JSON of a normalizer or pre-tokenizer that adds no blank; only the start's where not `everywhere`."""
    match state.get("type"):
        case "Prepend" if everywhere:
            return {"type": "Sequence", "normalizers": []}
        case "Metaspace" if everywhere or state["prepend_scheme"] == "first":
            return {**state, "prepend_scheme": "never"}
        case "ByteLevel" if everywhere and "add_prefix_space" in state:
            return {**state, "add_prefix_space": False}
        case "Sequence":
            key = "normalizers" if "normalizers" in state else "pretokenizers"
            # A pre-tokenizer behind another sees words, and its blank is then the mark of each word.
            return {
                **state,
                key: [
                    _unprefixed(item, everywhere and (key == "normalizers" or place == 0))
                    for place, item in enumerate(state[key])
                ],
            }
    return state


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
