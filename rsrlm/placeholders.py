"""Jinja2 templates rendered with a placeholder for each value, so that values stand apart from what is trusted."""

import re
from collections.abc import Sequence
from types import SimpleNamespace

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rsrlm.settings.base import ConfigError

# Private-use characters: no case, no white space and no markup, so that filters such as trim leave them alone.
_OPEN, _CLOSE = "\U000f5a1d", "\U000f5a1e"
_PLACEHOLDER = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")
DATA = "data."  # before the names of what a prompt carries for its judges, as in {{ data.reference }}
_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=False)


def placeholder(name: str) -> str:
    return f"{_OPEN}{name}{_CLOSE}"


def template_variables(source: str) -> frozenset[str]:
    """The variables of a Jinja2 template, which may only print each as it is, as in `{{ response }}`; `data.reference`
    is one where the template prints `{{ data.reference }}`.

    Raises ConfigError for any other use (values come in after the rendering, so that a filter or a condition would
    look at a placeholder) and for invalid Jinja2.
    """
    if _OPEN in source or _CLOSE in source:
        raise ConfigError(f"contains {_OPEN!r} or {_CLOSE!r}, which stand for the values while rendering; remove them")
    try:
        tree = _JINJA.parse(source)
        names = frozenset(meta.find_undeclared_variables(tree))
    except TemplateSyntaxError as error:
        raise ConfigError(f"line {error.lineno}: {error.message}; correct the Jinja2 syntax") from None
    printed = {id(node) for output in tree.find_all(nodes.Output) for node in output.nodes}
    # The name `data` within a printed {{ data.reference }}: the attribute is what is printed.
    carried = {
        id(node.node): DATA + node.attr
        for node in tree.find_all(nodes.Getattr)
        if id(node) in printed and isinstance(node.node, nodes.Name) and f"{node.node.name}." == DATA
    }
    for node in tree.find_all(nodes.Name):
        if node.name in names and id(node) not in printed and id(node) not in carried:
            shown = f"{DATA}NAME" if f"{node.name}." == DATA else node.name
            raise ConfigError(
                f"line {node.lineno}: {node.name} may only be printed as {{{{ {shown} }}}}, without filters, "
                "conditions or assignments, as its value is put in after the rendering"
            )
    bare = {node.name for node in tree.find_all(nodes.Name) if id(node) not in carried}
    return (names & bare) | frozenset(carried.values())


def render(template: str, names: Sequence[str]) -> str:
    """The template with placeholders for those of `names` that it uses. Raises ConfigError unless it always prints
    them."""
    variables = template_variables(template)
    if unknown := variables - set(names):
        raise ConfigError(f"the template uses {', '.join(sorted(unknown))}; it may use {', '.join(names)}")
    try:
        plain = {name: placeholder(name) for name in names}
        carried = {name.removeprefix(DATA): text for name, text in plain.items() if name.startswith(DATA)}
        turn = _JINJA.from_string(template).render({**plain, "data": SimpleNamespace(**carried)})
    except Exception as error:
        raise ConfigError(f"the template cannot be rendered: {error}; correct it") from error
    if lost := variables - set(split(turn)[1::2]):
        raise ConfigError(f"the template does not print {', '.join(sorted(lost))} in every case; print it always")
    return turn


def split(text: str) -> list[str]:
    """Trusted pieces at even places, names of placeholders between them."""
    pieces = _PLACEHOLDER.split(text)
    if any(character in piece for piece in pieces[::2] for character in (_OPEN, _CLOSE)):
        raise ConfigError("a template changed the text it was to print; remove its filters")
    return pieces
