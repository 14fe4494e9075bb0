"""Templates whose values stand apart; how they are refused is tested with the chat prompts that are made of them."""

from rsrlm.placeholders import placeholder, render, split, template_variables


def test_template_variables() -> None:
    assert template_variables("{{ a }}{% for i in [1, 2] %}{{ i }}{{ b }}{% endfor %}") == {"a", "b"}
    assert template_variables("plain") == set()


def test_values_stand_between_the_pieces() -> None:
    turn = render("Q: {{ a }}\nA: {{ b }}!", ["a", "b", "unused"])
    assert split(turn) == ["Q: ", "a", "\nA: ", "b", "!"]
    assert split(f"x{placeholder('name')}") == ["x", "name", ""]
