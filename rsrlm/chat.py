"""Chat prompts from untrusted text: prompts of a data set, responses of a model.

Such text never passes through Jinja2 or a chat template and never becomes a special token: templates are rendered with
placeholders, and the text is inserted as token ids between the pieces around them. Whatever a response says, the tokens
around it stay the same.

The tokens are those of the model's own chat prompt, with two differences: white space around a text stays even where
the template would trim it, and no token spans the border between a piece and a text. Where a tokenizer would join the
end of a text with what follows it ("." and a line break in a judge's template), there are two tokens instead of one.
"""

import copy
import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from rsrlm.placeholders import placeholder, render, split
from rsrlm.records import encodable
from rsrlm.settings.base import ConfigError


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


# Where a text stands: at the start of the prompt, right after an added token such as <s>, or within other text.
# SentencePiece's tokenizers put a blank of their own before the first, and some of them before the second.
Where = Literal["start", "after", "within"]

# The blank before these belongs to the piece: all tokens up to a fence are then the same, whatever the fence.
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
    """A field's place between the trusted pieces; the `blanks` before it are tokenised with its text."""

    name: str
    blanks: str
    where: Where


class ChatEncoder:
    """Token ids of one-message chat prompts. The tokenizer passed in is left as it is.

    Trusted pieces (the chat template, the turn's template, the answer prefix) are tokenised once per kind of prompt.
    One thread at a time.
    """

    def __init__(self, tokenizer: Any, date: datetime | None = None) -> None:
        """`date` is what chat templates print that ask for the time (default: now), so that the same prompt can be made
        again later. Raises ConfigError for a tokenizer that cannot read its special tokens' spellings as text."""
        self.tokenizer = tokenizer
        self.date = date or datetime.now()
        # A copy, because split_special_tokens=True in a call stays set in the Rust tokenizer inside the wrapper.
        start = copy.deepcopy(tokenizer)
        self._at: dict[Where, Any] = {
            "start": start,
            "after": _without_prefix(start, everywhere=False),
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
        # All comparisons of a response's judgements, and their duels, encode the same texts again.
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

        Template and prefix are trusted: a special token's text in them is that token. Field values are not: they become
        the tokens of their text alone, with lone surrogates as U+FFFD. Blanks before a field are tokenised with its
        value, as tokenizers make one token of a blank and the word after it. Raises ConfigError if the template does
        not fit the fields, or if the model's chat template does not print the turn exactly once and unchanged.
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

        The server tokenises the chat and knows special tokens by their spelling, so in field values an invisible U+2060
        follows the first character of each spelling. Its tokenizer is not known here: this tokenizer's added tokens and
        those of common families count.
        """
        pieces = split(render(template, sorted(fields)))
        return "".join(self._unspelled(fields[piece]) if place % 2 else piece for place, piece in enumerate(pieces))

    def _unspelled(self, text: str) -> str:
        return self._spelled.sub(lambda match: match[0] + "\u2060", text)

    def bare(self, text: str) -> tuple[int, ...]:
        """`text` outside any chat, as a base model reads it: the tokens of the text alone, between those that the
        tokenizer puts around every text, such as a BOS token."""
        tokenizer = self._at["start"]
        whole, alone = (tokenizer.encode("a", add_special_tokens=added) for added in (True, False))
        place = next(place for place in range(len(whole)) if whole[place : place + len(alone)] == alone)
        return (*whole[:place], *self._encode_literally(text, "start"), *whole[place + len(alone) :])

    def target(self, text: str) -> tuple[int, ...]:
        """The answer `text` as a model would write it: the tokens of the text alone, after the blank that some chat
        templates put before an answer, and the end token."""
        blanks, where = self._before_answer()
        return (*self._encode_literally(blanks + text, where), self.tokenizer.eos_token_id)

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The chat as text. Raises ConfigError with the chat template's own error."""
        # A variable hides the global of this name that transformers gives to templates.
        clock = {"strftime_now": self.date.strftime} if "strftime_now" in str(self.tokenizer.chat_template) else {}
        try:
            chat: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **clock
            )
        except Exception as error:
            raise ConfigError(f"the model's chat template failed on a user message: {error}; correct it") from error
        return chat

    def _before_answer(self) -> tuple[str, Where]:
        """The blanks between a prompt and its answer in the chat template, and where these stand."""
        if self._answer is None:
            user, answer = ({"role": role, "content": placeholder(role)} for role in ("user", "assistant"))
            prompt = self._rendered([user], True)
            try:
                whole = self._rendered([user, answer], False)
            except ConfigError:  # a template for one message: answers follow its prompt
                whole = prompt
            between = whole.removeprefix(prompt).partition(answer["content"])[0] if whole.startswith(prompt) else ""
            blanks = "" if between.strip(" ") else between
            self._answer = blanks, self._place_after(self._encode_trusted(prompt, "start"), "start")
        return self._answer

    def _trusted_pieces(
        self, template: str, answer_prefix: str, names: list[str]
    ) -> tuple[_Field | tuple[int, ...], ...]:
        """Token ids of the trusted pieces, and between them the places of the fields."""
        turn = render(template, names)
        pieces = split(self._rendered([{"role": "user", "content": turn}], True))
        if pieces[1::2] != split(turn)[1::2]:
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
            result += [ids, _Field(name, blanks, self._place_after(ids, where))]
            where = "within"
        if answer_prefix:
            blanks, place = self._before_answer()
            ids += self._encode_trusted(blanks + answer_prefix, place)
        return (*result, ids)

    def _place_after(self, ids: Sequence[int], where: Where) -> Where:
        """Where a text stands that follows a piece of these tokens; the piece itself stands at `where`."""
        if not ids:
            return where
        return "after" if ids[-1] in self._ends_section else "within"

    def _encode_trusted(self, text: str, where: Where) -> tuple[int, ...]:
        tokenizer = self._at[where]
        options = {"add_special_tokens": False, "split_special_tokens": False}
        if where != "within" or tokenizer is self._at["after"]:
            return tuple(tokenizer.encode(text, **options))
        # Up to its first added token the text continues what is before it; after that token the blank comes again.
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
        ids = encoded["input_ids"]
        place = next((place for place, token in enumerate(ids) if token in self._ends_section), None)
        if place is None:
            return tuple(ids)
        rest = text[encoded["offset_mapping"][place][1] :]
        return (*ids[: place + 1], *self._encode_trusted(rest, "after"))

    def _encode_literally(self, text: str, where: Where) -> Sequence[int]:
        text = encodable(text)
        options = {"add_special_tokens": False, "split_special_tokens": True}
        ids: list[int] = self._at[where].encode(text, **options)
        if self._added_ids.isdisjoint(ids):
            return ids
        # Models also declare tokens such as <think> that are not special and are matched all the same.
        parts = self._added_text.split(text)
        apart = [item for index, part in enumerate(parts) for item in (part if index % 2 else [part]) if item]
        places: list[Where] = [where, *["within"] * (len(apart) - 1)]  # type: ignore[list-item]
        return [
            token
            for item, place in zip(apart, places, strict=True)
            for token in self._at[place].encode(item, **options)
        ]


def _without_prefix(tokenizer: Any, *, everywhere: bool) -> Any:
    """A copy that puts no blank of its own before a text at the start nor, with `everywhere`, after added tokens.

    The tokenizer itself where it puts none anyway, or has no Rust tokenizer inside.
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

    without = copy.deepcopy(tokenizer)
    for part, state in changed.items():
        component = normalizers.Sequence([]) if part == "normalizer" else pre_tokenizers.Sequence([])
        component.__setstate__(json.dumps(state).encode())  # state of any type: the class does not matter
        setattr(without.backend_tokenizer, part, component)
    return without


def _unprefixed(state: dict[str, Any], everywhere: bool) -> dict[str, Any]:
    """The JSON of a normalizer or pre-tokenizer that adds no blank, or with `everywhere` false none at the start."""
    match state.get("type"):
        case "Prepend" if everywhere:
            return {"type": "Sequence", "normalizers": []}
        case "Metaspace" if everywhere or state["prepend_scheme"] == "first":
            return {**state, "prepend_scheme": "never"}
        case "ByteLevel" if everywhere and "add_prefix_space" in state:
            return {**state, "add_prefix_space": False}
        case "Sequence":
            key = "normalizers" if "normalizers" in state else "pretokenizers"
            # A pre-tokenizer after another sees words, and its blank then marks each word.
            return {
                **state,
                key: [
                    _unprefixed(item, everywhere and (key == "normalizers" or place == 0))
                    for place, item in enumerate(state[key])
                ],
            }
    return state
