"""Chat prompts out of text that nobody vouches for: what surrounds it never depends on it."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hostile import HOSTILE, SPECIAL_TOKENS, as_read
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrlm.chat import ChatEncoder, check_tokenizer, template_variables
from rsrlm.config import ConfigError
from rsrlm.judging import ADDITIVE_VARIABLES, PAIRWISE_VARIABLES, SCORE, WINNER, load_template

BEFORE = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
ANY_TEXT = st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "{{", "im_end", "<", " ", "\n"])).map(
    "".join
)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def ids_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def with_chat_template(tokenizer: Any, chat_template: str) -> ChatEncoder:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = chat_template
    return ChatEncoder(changed)


def assert_only_the_middle_differs(tokenizer: Any, ids: tuple[int, ...], before: str, text: str, after: str) -> None:
    """`ids` are the tokens of `before` and `after` with nothing special between, which decodes to `text`, exactly."""
    prefix, suffix = ids_of(tokenizer, before), ids_of(tokenizer, after)
    assert ids[: len(prefix)] == prefix
    assert ids[len(ids) - len(suffix) :] == suffix
    middle = ids[len(prefix) : len(ids) - len(suffix)]
    assert not set(middle) & set(tokenizer.get_added_vocab().values())
    assert tokenizer.decode(middle, skip_special_tokens=False, clean_up_tokenization_spaces=False) == as_read(text)


def test_user_prompt_is_the_models_own_chat_prompt(tokenizer: Any, encoder: ChatEncoder) -> None:
    ids = encoder.user("What is tea?")
    assert tokenizer.decode(ids) == f"{BEFORE}What is tea?{AFTER}"
    assert ids == ids_of(tokenizer, f"{BEFORE}What is tea?{AFTER}")


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs", "Z", "C")), max_size=30))
def test_ordinary_text_gets_the_tokens_of_the_plain_way(tokenizer: Any, encoder: ChatEncoder, text: str) -> None:
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert encoder.user(text) == ids_of(tokenizer, plain)


@pytest.mark.parametrize("text", [text for _, text in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_hostile_user_text_stays_between_its_turn_tokens(tokenizer: Any, encoder: ChatEncoder, text: str) -> None:
    assert_only_the_middle_differs(tokenizer, encoder.user(text), BEFORE, text, AFTER)


@settings(deadline=None)
@given(text=ANY_TEXT)
def test_any_user_text_stays_between_its_turn_tokens(tokenizer: Any, encoder: ChatEncoder, text: str) -> None:
    assert_only_the_middle_differs(tokenizer, encoder.user(text), BEFORE, text, AFTER)


@settings(deadline=None)
@given(first=ANY_TEXT, second=ANY_TEXT)
def test_several_fields_and_one_field_twice(tokenizer: Any, encoder: ChatEncoder, first: str, second: str) -> None:
    def alone(text: str) -> tuple[int, ...]:
        before, after = ids_of(tokenizer, BEFORE), ids_of(tokenizer, AFTER)
        return encoder.user(text)[len(before) : -len(after)]

    ids = encoder.encode("1 {{ a }}\n2 {{ b }}\n3 {{ a }}", {"a": first, "b": second}, "Score: ")
    expected = (
        *ids_of(tokenizer, f"{BEFORE}1 "),
        *alone(first),
        *ids_of(tokenizer, "\n2 "),
        *alone(second),
        *ids_of(tokenizer, "\n3 "),
        *alone(first),
        *ids_of(tokenizer, AFTER),
        *ids_of(tokenizer, "Score: "),
    )
    assert ids == expected


def test_hostile_table_has_every_added_token_of_the_tokenizer(tokenizer: Any) -> None:
    assert len(HOSTILE) >= 30
    assert len({name for name, _ in HOSTILE}) == len(HOSTILE)
    assert set(SPECIAL_TOKENS) == set(tokenizer.get_added_vocab())


def test_special_tokens_count_in_templates_and_prefixes_only(encoder: ChatEncoder) -> None:
    trusted = encoder.encode("<|im_end|>{{ a }}", {"a": ""}, "<|im_start|>")
    quoted = encoder.encode("{{ a }}", {"a": "<|im_end|>"})
    assert (trusted.count(2), trusted.count(1), quoted.count(2)) == (3, 4, 2)


def test_special_tokens_in_values_are_ordinary_pieces_of_text(tokenizer: Any, encoder: ChatEncoder) -> None:
    ids = encoder.encode("{{ a }}", {"a": "<|im_end|>"})
    before = ids_of(tokenizer, BEFORE)
    assert tokenizer.convert_ids_to_tokens(ids[len(before) : len(before) + 7]) == ["<", "|", "im", "_", "end", "|", ">"]


def test_the_tokenizer_passed_in_is_left_as_it_is(tokenizer: Any) -> None:
    ChatEncoder(tokenizer).user("<|im_end|>")
    assert tokenizer.split_special_tokens is False
    assert tokenizer.backend_tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [2]


def test_a_call_with_split_special_tokens_stays_set_behind_the_wrapper(tokenizer: Any) -> None:
    """Why the encoder keeps a copy; if this fails, transformers has changed and the copy may go."""
    mine = copy.deepcopy(tokenizer)
    mine.encode("<|im_end|>", add_special_tokens=False, split_special_tokens=True)
    assert mine.backend_tokenizer.encode("<|im_end|>").ids != [2]


def test_added_tokens_that_are_not_special_are_text_too(tokenizer: Any) -> None:
    mine = copy.deepcopy(tokenizer)
    mine.add_tokens(["<think>", "<think>>"])
    encoder = ChatEncoder(mine)
    assert mine.encode("<think>", add_special_tokens=False, split_special_tokens=True) == [len(tokenizer)]
    assert encoder.encode("<think>{{ a }}", {"a": ""}).count(len(tokenizer)) == 1
    for text in ("a<think>b", "<think>", "<<think>>><think", "<think><think>>"):
        assert_only_the_middle_differs(mine, encoder.user(text), BEFORE, text, AFTER)


@pytest.mark.parametrize(
    ("text", "read"), [("a\ud83db", "a\ufffdb"), ("\udc00", "\ufffd"), ("\ud83c\udf75", "🍵"), ("\ufeffx", "\ufeffx")]
)
def test_lone_surrogates_become_replacement_characters(
    tokenizer: Any, encoder: ChatEncoder, text: str, read: str
) -> None:
    assert_only_the_middle_differs(tokenizer, encoder.user(text), BEFORE, read, AFTER)


def test_trusted_pieces_are_made_once_per_kind_of_prompt(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = copy.deepcopy(tokenizer)
    calls: list[str] = []
    for name in ("apply_chat_template", "encode"):
        original = getattr(mine, name)
        monkeypatch.setattr(
            mine, name, lambda *a, _o=original, _n=name, **k: calls.append(_n) or _o(*a, **k), raising=True
        )
    encoder = ChatEncoder(tokenizer)
    encoder.tokenizer = mine
    for index in range(5):
        encoder.encode("Rate {{ a }} now", {"a": f"text {index}"}, "Score: ")
    assert calls == ["apply_chat_template", "encode", "encode", "encode"]
    encoder.encode("Rate {{ a }} now", {"a": "text"}, "Points: ")
    assert calls.count("apply_chat_template") == 2


def test_chat_templates_that_trim(tokenizer: Any) -> None:
    encoder = with_chat_template(tokenizer, "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    assert tokenizer.decode(encoder.encode("\n Say {{ a }}. \n", {"a": " x "})) == "[Say  x .]"
    assert tokenizer.decode(encoder.user("  <|im_end|>  ")) == "[  <|im_end|>  ]"


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{{ messages[0].content }}{{ messages[0].content }}", "exactly once"),
        ("no message at all", "exactly once"),
        ("{{ messages[0].content[:3] }}", "changed the text"),
        ("{{ messages[0].content | upper }}", "exactly once"),
        ("{{ raise_exception('no users here') }}", "no users here"),
    ],
)
def test_chat_templates_that_do_not_print_the_message(tokenizer: Any, chat_template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_chat_template(tokenizer, chat_template).user("hello")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ a", "line 1: .*correct the Jinja2 syntax"),
        ("one\n{{ a | nosuchfilter }}", "line 2: No filter named 'nosuchfilter'"),
        ("{{ a | upper }}", "only be printed"),
        ("{{ a ~ '!' }}", "only be printed"),
        ("{% if a %}yes{% endif %}", "only be printed"),
        ("{% set b = a %}{{ b }}", "only be printed"),
        ("{{ a.b }}", "only be printed"),
        ("{{ a }}\U000f5a1da\U000f5a1e", "remove them"),
        ("{{ a }}{{ c }}", "uses c; it may use a, b"),
        ("{% filter truncate(2, true, '', 0) %}{{ a }}{% endfilter %}", "changed the text"),
        ("{% if false %}{{ a }}{% endif %}", "does not print a in every case"),
        ("{{ a }}{{ 1 // 0 }}", "cannot be rendered"),
        ("{% include 'other' %}{{ a }}", "cannot be rendered"),
        ("{{ a }}{{ ''.__class__.__mro__ }}", "cannot be rendered"),
    ],
)
def test_templates_that_are_refused(encoder: ChatEncoder, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder.encode(template, {"a": "x", "b": "y"})


def test_template_variables() -> None:
    assert template_variables("{{ a }}{% for i in [1, 2] %}{{ i }}{{ b }}{% endfor %}") == {"a", "b"}
    assert template_variables("plain") == set()


def test_templates_lose_one_final_newline_and_escape_nothing(tokenizer: Any, encoder: ChatEncoder) -> None:
    ids = encoder.encode("<b> & {{ a }}\n", {"a": "<i> & \"'"})
    assert tokenizer.decode(ids) == f"{BEFORE}<b> & <i> & \"'{AFTER}"


@pytest.mark.parametrize(
    ("name", "variables", "prefix"),
    [
        ("additive", ADDITIVE_VARIABLES, ""),
        ("additive_digits", ADDITIVE_VARIABLES, SCORE.prefix),
        ("pairwise", PAIRWISE_VARIABLES, WINNER.prefix),
        ("pairwise_text", PAIRWISE_VARIABLES, ""),
    ],
)
def test_judge_prompts_share_all_up_to_the_fence(
    tokenizer: Any, encoder: ChatEncoder, name: str, variables: frozenset[str], prefix: str
) -> None:
    def prompt(text: str) -> tuple[int, ...]:
        fields = {**dict.fromkeys(variables, text), "instruction": "What is tea?", "fence": f"{len(text):08x}"}
        return encoder.encode(load_template(name, variables), fields, prefix)

    first, second = prompt("A drink."), prompt("An infusion of leaves.")
    shared = next(index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    text = tokenizer.decode(first[:shared])
    assert text.startswith(f"{BEFORE}You will grade" if "additive" in name else f"{BEFORE}Two answers")
    assert "What is tea?" in text
    assert "</question>" in text
    assert "A drink." not in text
    assert tokenizer.decode(first).endswith(f"00000008>{AFTER}{prefix}")


def test_check_tokenizer(tokenizer: Any) -> None:
    check_tokenizer(tokenizer, "smollm2")
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = None
    with pytest.raises(ConfigError, match=r"model.path=base: .*no chat template; use an instruction-tuned"):
        check_tokenizer(mine, "base")
    mine = copy.deepcopy(tokenizer)
    mine.eos_token = None
    with pytest.raises(ConfigError, match=r"model.path=base: .*no end token.*set eos_token"):
        check_tokenizer(mine, "base")


def test_a_tokenizer_that_cannot_take_text_literally_is_refused(tokenizer: Any) -> None:
    class Deaf(type(tokenizer)):  # type: ignore[misc]
        def encode(self, text: str, **options: Any) -> list[int]:
            return super().encode(text, **{**options, "split_special_tokens": False})

        def get_added_vocab(self) -> dict[str, int]:
            return {"<other>": 999_999}

    mine = copy.deepcopy(tokenizer)
    mine.__class__ = Deaf
    with pytest.raises(ConfigError, match="could end its own turn"):
        ChatEncoder(mine)
