"""Documents: what is read, where it is cut, and what counts as a question with its answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsrlm.chat import ChatEncoder
from rsrlm.data.documents import Asked, Document, asked, cut, overlap, pieces, read, refused
from rsrlm.records import NoPair, Prompt
from rsrlm.settings.base import ConfigError

ASPIRIN = "Aspirin irreversibly inhibits COX-1."


def words(text: str) -> int:
    return len(text.split())


def lines(*entries: Any) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_file_of_documents(tmp_path: Path) -> None:
    file = tmp_path / "books.jsonl"
    file.write_text(lines({"id": "tea", "text": "Tea.\u2028Hot."}, {"text": "Ale.", "id": "ale", "year": 1900}) + "\n")
    assert read(str(file)) == (Document(id="tea", text="Tea.\u2028Hot."), Document(id="ale", text="Ale."))


def test_a_folder_of_files(tmp_path: Path) -> None:
    """In the order of their paths; what else lies there, and what is hidden, is passed over."""
    (tmp_path / "a").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "z.txt").write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.")
    (tmp_path / "a" / "b.MD").write_text("# Three")
    (tmp_path / "a" / "c.jsonl").write_text(lines({"id": "four", "text": "4"}))
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    found = [(one.id, one.text) for one in read(str(tmp_path))]
    assert found == [("a_b.MD", "# Three"), ("four", "4"), ("z.txt", "One.\nTwo.")]
    assert [one.id for one in read(str(tmp_path / "z.txt"))] == ["z.txt"]


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tea.txt").write_text("Tea.")
    assert read("~/tea.txt") == (Document(id="tea.txt", text="Tea."),)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tea.txt", b"Tea \xff", r"documents=.*tea\.txt: not UTF-8 at byte 4; save the file as UTF-8"),
        ("tea.txt", b" \n", r"documents=.*tea\.txt: text of 'tea\.txt' must be a text that is not empty"),
        ("te#a.txt", b"Tea", r"id 'te#a\.txt' must be a text without / # >"),
        ("tea.pdf", b"Tea", r"neither a folder nor one of \.jsonl, \.txt, \.md; give a \.jsonl file"),
        ("tea.jsonl", b"", "no documents in it; write one JSON object with id and text per line"),
        ("tea.jsonl", b'{"id": "a", "text": "x"}\n{"id"', "line 2: not JSON"),
        ("tea.jsonl", b'["a"]', 'line 1: must be an object such as {"id": "tea"'),
        ("tea.jsonl", b'{"id": "a", "prompt": "x"}', "line 1: must be an object such as"),
        ("tea.jsonl", b'{"id": "a", "text": null}', "line 1: text of 'a' must be a text that is not empty"),
        ("tea.jsonl", b'{"id": "a>b", "text": "x"}', "line 1: id 'a>b' must be a text without / # >"),
        ("tea.jsonl", b'{"id": "a", "text": "\\ud800"}', "line 1: '\\\\ud800' is half a surrogate pair"),
        (
            "tea.jsonl",
            b'{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}',
            r"line 2: id 'a' is that of .*tea\.jsonl, line 1 already; ids are unique",
        ),
    ],
)
def test_what_cannot_be_read(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read(str(tmp_path / name))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"documents=.*none\.txt: No such file or directory; give a \.jsonl file"):
        read(str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match=r"no \.jsonl, \.txt, \.md file in this folder"):
        read(str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("x")
    (tmp_path / "a_b.txt").write_text("y")
    with pytest.raises(ConfigError, match=r"id 'a_b\.txt' is that of .*/a/b\.txt already"):
        read(str(tmp_path))


# -- cutting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b\n\nc d\n \t\n\n e", ["a b\n\nc d", "e"]),  # paragraphs that fit together stay as they are
        ("a b c\n\nd e", ["a b c", "d e"]),
        ("a b. c d! e f.\n\ng", ["a b. c d!", "e f.", "g"]),  # a long paragraph at sentences, and the next by itself
        ('"a b." c d? (e.) f', ['"a b." c d?', "(e.) f"]),
        ("a b\nc d\ne f", ["a b\nc d", "e f"]),  # lines count as sentences do
        ("a b c d e f g", ["a b c d", "e f g"]),  # a long sentence at words
        ("3.5 a b c", ["3.5 a b c"]),
        ("  \n\n ", []),
    ],
)
def test_where_a_text_is_cut(text: str, expected: list[str]) -> None:
    assert cut(text, 4, words) == expected


def test_what_has_no_borders_is_cut_all_the_same() -> None:
    assert cut("abcdefghij", 4, len) == ["abcd", "efgh", "ij"]
    assert cut("喝茶。很好！真的？", 6, len) == ["喝茶。很好！", "真的？"]


@given(st.text(st.sampled_from("ab .!\n。"), max_size=80), st.integers(1, 12))
def test_pieces_hold_all_of_the_text_and_fit(text: str, most: int) -> None:
    made = cut(text, most, len)
    assert "".join("".join(made).split()) == "".join(text.split())
    assert all(0 < len(piece) <= most and piece == piece.strip() for piece in made)


def test_pieces_are_counted_in_tokens(encoder: ChatEncoder) -> None:
    texts = [f"Town {n} lies on a river. Its mayor is known for long speeches, and its cakes are sweet." for n in "123"]
    documents = (Document(id="towns-1", text="\n\n".join(texts)), Document(id="one", text=texts[0]))
    alone = len(encoder.user(texts[0])) - len(encoder.user(""))
    found = pieces(documents, 2 * alone + 2, encoder)
    assert found == (
        Prompt(id="towns-1-0", text="\n\n".join(texts[:2])),
        Prompt(id="towns-1-1", text=texts[2]),
        Prompt(id="one-0", text=texts[0]),
    )
    assert [piece.text for piece in pieces(documents, alone, encoder)] == [*texts, texts[0]]
    smaller = pieces(documents, alone - 1, encoder)
    assert [piece.id for piece in smaller if piece.id.startswith("one")] == ["one-0", "one-1"]
    assert smaller[0].text == "Town 1 lies on a river."


# -- questions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Question: What does aspirin inhibit?\nAnswer: COX-1, irreversibly.",
            Asked(question="What does aspirin inhibit?", answer="COX-1, irreversibly."),
        ),
        ("\n  question :Which?\n\n ANSWER:\nThis.\nAnd that.\n", Asked(question="Which?", answer="This.\nAnd that.")),
        ("Question: Is 'Answer: 3' a line?\nAnswer: No.", Asked(question="Is 'Answer: 3' a line?", answer="No.")),
        ("Question: Which?\nAnswer: This.\nAnswer: That.", "several answers"),
        ("Question: Which?\nQuestion: What?\nAnswer: This.", "several questions"),
        ("Question: Which?\nThis.", "no answer"),
        ("Question: Which? Answer: This.", "no answer"),
        ("Which?\nAnswer: This.", "no question"),
        ("", "no question"),
        ("Answer: This.\nQuestion: Which?", "answer before question"),
        ("Question:\nAnswer: This.", "empty question"),
        ("Question: Which?\nAnswer: \n", "empty answer"),
        ("Sure!\nQuestion: Which?\nAnswer: This.", "text before the question"),
    ],
)
def test_one_question_and_one_answer(text: str, expected: Asked | str) -> None:
    assert asked(text) == (NoPair(reason=expected) if isinstance(expected, str) else expected)


def test_questions_that_point_into_the_text() -> None:
    pointing = ("in the passage", "the author")
    for question, reason in (
        ("What does The  Author claim?", "question points into the text"),
        ("Who are the authors of Faust?", ""),
        ("What is inhibited in the passage?", "question points into the text"),
    ):
        assert refused(Asked(question=question, answer="COX-1"), ASPIRIN, pointing, 0.0) == reason
        assert refused(Asked(question=question, answer="COX-1"), ASPIRIN, (), 0.0) == ""


def test_answers_that_are_not_in_the_text() -> None:
    """Of three words, two are there; without words none is."""
    assert overlap("cox, IRREVERSIBLY so", ASPIRIN) == pytest.approx(2 / 3)
    assert overlap("...", ASPIRIN) == 0
    found = Asked(question="What?", answer="cox, irreversibly so")
    assert refused(found, ASPIRIN, (), 0.66) == ""
    assert refused(found, ASPIRIN, (), 0.67) == "answer not in the text"
    assert refused(Asked(question="What?", answer="..."), ASPIRIN, (), 0.0) == ""


@pytest.mark.parametrize(
    "more", ["\n\nQuestion 2: c?\nAnswer 2: d", "\n**Question:** c?", "\n- Answer: d", "\n# question 3.: c?"]
)
def test_a_second_question_is_found_however_it_is_marked(more: str) -> None:
    assert isinstance(asked(f"Question: a?\nAnswer: b{more}"), NoPair)
    assert asked("**Question:** a?\n**Answer:** b") == Asked(question="a?", answer="b")
    assert asked("Question: a?\nAnswer: the question is open") == Asked(question="a?", answer="the question is open")


def test_an_empty_file_beside_others_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("Tea.")
    (tmp_path / "b.md").write_text(" \n")
    assert [one.id for one in read(str(tmp_path))] == ["a.md"]
    with pytest.raises(ConfigError, match="must be a text that is not empty"):
        read(str(tmp_path / "b.md"))
