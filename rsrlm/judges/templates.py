"""The Jinja2 templates that judges are asked with, and the form of a verdict that a template may name."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from rsrlm.judges.verdicts import SCORE, Form
from rsrlm.placeholders import DATA, template_variables
from rsrlm.records import Prompt
from rsrlm.settings.base import ConfigError

QUESTION_VARIABLES = frozenset({"instruction"})
ADDITIVE_VARIABLES = frozenset({"instruction", "response"})
PAIRWISE_VARIABLES = frozenset({"instruction", "response_a", "response_b"})
META_VARIABLES = frozenset({"instruction", "response", "judgement_a", "judgement_b"})
OPTIONAL_VARIABLES = frozenset({"fence"})
TEMPLATES = Path(__file__).parent.parent / "assets" / "templates"

_HEADER = re.compile(r"\A\{#-?\s*verdict:(.*?)-?#\}", re.DOTALL)
_FORM: TypeAdapter[Form] = TypeAdapter(Form)


def form_of(source: str, default: Form, key: str = "template") -> Form:
    """The form that a template names in its first line, else `default`. Raises ConfigError for one that is wrong."""
    header = _HEADER.match(source)
    if header is None:
        return default
    keys: dict[str, Any] = {name: getattr(default, name) for name in ("label", "scale", "sides", "prefix")}
    try:
        named = yaml.safe_load(header[1])
        if not isinstance(named, dict) or named.keys() - keys.keys():
            raise ValueError(f"a mapping of {_listed(keys)}")
        if "label" in named and default == SCORE:  # a prefix that is named counts all the same
            keys["prefix"] = f"{named['label']}: "
        form = _FORM.validate_python({**keys, **named})
        if form.scale[0] < 0 or form.scale[0] >= form.scale[1] or form.sides[0] == form.sides[1]:
            raise ValueError("scale is [lowest, highest], from 0 on; sides are two different ones")
    except (ValidationError, ValueError, yaml.YAMLError, TypeError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ConfigError(
            f"{key}: its first line names no form of a verdict ({said}); write one such as "
            "{#- verdict: {label: Score, scale: [0, 10]} -#}"
        ) from None
    return form


def load_template(name: str, variables: frozenset[str] = ADDITIVE_VARIABLES, key: str = "template") -> str:
    """The source of a judge template: the name of one of rsrlm's, or the path of a Jinja2 file. `key` is the config's.

    It must print all of `variables`, and may print `fence` (see `fence_of`) and what prompts carry (see `data_names`).
    Raises ConfigError for anything else.
    """
    bundled = {path.stem: path for path in sorted(TEMPLATES.glob("*.jinja"))}
    path = bundled.get(name.removesuffix(".jinja"), Path(os.path.expanduser(name)))
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={name!r}: neither one of rsrlm's ({', '.join(bundled)}) nor a readable Jinja2 file: {error}; "
            "give one of these names or a path"
        ) from None
    try:
        used = template_variables(source)
    except ConfigError as error:
        raise ConfigError(f"{key}={name!r}: {error}") from None
    if missing := variables - used:
        raise ConfigError(f"{key}={name!r}: does not use {_listed(missing)}; add {{{{ {min(missing)} }}}}")
    if unknown := {name for name in used - variables - OPTIONAL_VARIABLES if not name.startswith(DATA)}:
        known = f"{_listed(variables | OPTIONAL_VARIABLES)}, and {DATA}NAME for what prompts carry"
        raise ConfigError(f"{key}={name!r}: uses {_listed(unknown)}, which nobody fills; known here: {known}")
    return source


def data_names(source: str) -> tuple[str, ...]:
    """What a template prints of what its prompt carries (`Prompt.data`): `reference` for `{{ data.reference }}`."""
    return tuple(sorted(name.removeprefix(DATA) for name in template_variables(source) if name.startswith(DATA)))


def data_fields(names: Iterable[str], prompt_id: str, data: Mapping[str, str]) -> dict[str, str]:
    """The fields of a template that prints these. Raises ConfigError where the prompt does not carry one of them."""
    names = tuple(names)
    if missing := [name for name in names if name not in data]:
        raise ConfigError(_not_carried(prompt_id, missing[0]))
    return {DATA + name: data[name] for name in names}


def check_data(sources: Iterable[str], prompts: Iterable[Prompt], key: str) -> None:
    """Raise ConfigError for a prompt that lacks what one of the templates prints; `key` names its file in messages."""
    names = sorted({name for source in sources for name in data_names(source)})
    for prompt in prompts if names else ():
        for name in names:
            if name not in prompt.data:
                raise ConfigError(f"{key}: {_not_carried(prompt.id, name)}")


def _not_carried(prompt_id: str, name: str) -> str:
    return (
        f"prompt {prompt_id!r} has no {name!r}, which the judge's template prints as {{{{ {DATA}{name} }}}}; add it to "
        "the line of the prompt, or take it out of the template"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def fence_of(seed: int) -> str:
    """Eight hex digits for the tags around a response, which its author cannot guess and so cannot close.

    Pass one seed per response, not per judgement: the N judgements of a response then share their whole prompt, and
    the engine's prefix cache computes it once.
    """
    return hashlib.blake2b(f"fence\x1f{seed}".encode(), digest_size=4).hexdigest()
