"""Small tokenizers of the kinds that models come with, and chat templates in the manner of theirs; nothing to download.

Trained on the project's own prompts and judge templates, so that common words are tokens of their own.
"""

import functools
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

USER = "{% for m in messages %}{% if m.role == 'user' %}"
ANSWER = "{% elif m.role == 'assistant' %}"
END = "{% endif %}{% endfor %}"
ASK = "{% if add_generation_prompt %}"

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + ASK
    + "<|im_start|>assistant\n{% endif %}",
    "llama2": USER + "<s>[INST] {{ m.content.strip() }} [/INST]" + ANSWER + " {{ m.content }} </s>" + END,
    "llama3": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content.strip() }}<|eot_id|>{% endfor %}"
    + ASK + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma": "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content.strip() }}<end_of_turn>\n{% endfor %}" + ASK + "<start_of_turn>model\n{% endif %}",
    "mistral": USER + "<s>[TURN] {{ m.content }}[/TURN]" + ANSWER + " {{ m.content }}</s>" + END,
    "deepseek": USER + "<｜User｜>{{ m.content }}" + ANSWER + "<｜Assistant｜>{{ m.content }}</s>" + END
    + ASK + "<｜Assistant｜>{% endif %}",
    "vicuna": "{% for m in messages %}{{ m.role.upper() }}: {{ m.content }}\n{% endfor %}"
    + ASK + "ASSISTANT:{% endif %}",
}  # fmt: skip
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<bos>", "<start_of_turn>", "<end_of_turn>", "[TURN]", "[/TURN]", "<｜User｜>", "<｜Assistant｜>"),
)
METASPACE = ("prepend", "first", "always", "replace")  # SentencePiece's kinds
BYTE_LEVEL = ("gpt2", "llama3", "gpt2-prefix")
KINDS = METASPACE + BYTE_LEVEL

# Named, so that a template that is added changes no vocabulary.
CORPUS = ("additive", "additive_digits", "buckets", "meta", "meta_letters", "pairwise", "pairwise_text")

# The manner of Llama 3's, shortened: punctuation takes the line breaks behind it.
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _corpus() -> Iterator[str]:
    assets = Path(str(resources.files("rsrlm"))) / "assets"
    for name in CORPUS:
        yield (assets / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    for line in (assets / "prompts" / "instructions.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["prompt"]


@functools.cache
def _trained(kind: str) -> Tokenizer:
    if kind in METASPACE:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        # As SentencePiece learns: no token reaches over a blank, digits and line breaks are alone.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\n|\d"), "isolated"),
                pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
            ]
        )
        first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet: list[str] = []
    else:
        tokenizer = Tokenizer(models.BPE())
        prefix = kind == "gpt2-prefix"
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            if kind == "llama3"
            else pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        )
        tokenizer.decoder = decoders.ByteLevel()
        first, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=first, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if kind in METASPACE:
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
        blank = normalizers.Replace(" ", "▁")
        if kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
        elif kind == "replace":
            tokenizer.normalizer = blank
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        strip = [] if kind == "replace" else [decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    return tokenizer


@functools.cache
def tokenizer_of(kind: str, template: str) -> Any:
    """A tokenizer of this kind with the chat template of this name; its BOS and end tokens are <s> and </s>."""
    from transformers import PreTrainedTokenizerFast

    # Of the 256 byte tokens only <unk>, <s> and </s> are special; training made all of them so.
    state = json.loads(_trained(kind).to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL], special_tokens=True)
    found.chat_template = TEMPLATES[template]
    return found
