"""YAML and overrides as plain data, and what is said about data that does not fit."""

from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rsrlm.settings.base import ConfigError


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping with a key twice: PyYAML takes the last one without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Here and not in construct_mapping, which also sees the keys that `<<` merges in.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return node


def parse(text: str) -> Any:
    """What the YAML says. Raises ValueError with the reason."""
    try:
        return yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, LookupError, AttributeError, RecursionError) as error:  # `!!int ''` is an IndexError
        raise ValueError(str(error)) from None


def override_key(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: overrides are written key.sub=value, such as train.lr=1e-5")
    try:
        value = parse(text)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{override!r}: the value is not valid YAML; quote it, as in {key}='\"text\"' ({reason})"
        ) from None
    *parents, last = key.split(".")
    section = data
    for part in parents:
        child = section.setdefault(part, {})
        if child is None:  # a section that is switched off
            child = section[part] = {}
        if isinstance(child, str) and part == "model" and section is data:
            child = section[part] = {"path": child}
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {part} is not a section")
        section = child
    section[last] = value


def message_of(error: ValidationError, source: str, model: type[BaseModel]) -> str:
    return f"{source}: " + "\n".join(lines_of(error, model))


def lines_of(error: ValidationError, model: type[BaseModel], section: str = "") -> list[str]:
    """What is wrong, a line for each key; `section` is where the model's keys stand, such as "judge."."""
    lines = []
    for item in error.errors():
        key = section + ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = ", ".join(keys_at(model, item["loc"][:-1]))
            lines.append(f"{key}: unknown key; known here: {known}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing; add it to the file or pass {key}=VALUE")
        elif item["type"] == "value_error":
            lines.append(str(item["ctx"]["error"]))
        else:
            lines.append(f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return lines


def keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Keys of the section at a place; sections stand in lists, mappings, annotations and unions with None too."""
    section: Any = model
    for part in path:
        fields = getattr(section, "model_fields", {})
        section = _section_in(fields[part].annotation if part in fields else section)
        if section is None:
            return []
    return sorted(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = (_section_in(one) for one in get_args(annotation))
    return next((section for section in inside if section is not None), None)
