"""The report: what it says is true of the run, and nothing that a run folder holds breaks it."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import HOSTILE, finished, rewrite

from rsrlm.commands import report
from rsrlm.report.page import charts, render, samples
from rsrlm.report.page.headline import judge_in, of_judge, sentence, standings
from rsrlm.report.page.measured import measured, shown_in
from rsrlm.report.page.past import read
from rsrlm.settings.base import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("made"))


@pytest.fixture
def mine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil; its plots are not drawn, which is what takes time."""
    monkeypatch.setattr(charts, "svg", lambda spec: f"<svg>{json.dumps(spec, allow_nan=False)[:0]}</svg>")
    return Path(shutil.copytree(folder, tmp_path / "made"))


def page(folder: Path) -> str:
    report.write([folder], folder)
    return (folder / "report.html").read_text()


def said(html: str) -> str:
    """The text of a page without its markup."""
    return re.sub(r"<[^>]+>", "", html)


# -- did it get better? ------------------------------------------------------------------------------------------------


def test_the_headline_by_hand(folder: Path) -> None:
    """Held-out answers of M_t are worth t points for every judge, and win over the model before."""
    past = read(folder)
    found = standings(past)
    assert [(one.model, one.after, one.fixed["value"], one.fixed["n"]) for one in found] == [
        ("M0", 0, 0.0, 34), ("M1", 1, 1.0, 34), ("M2", 2, 2.0, 34),
    ]  # fmt: skip
    assert [(one.rival, one.duel["win"]["value"]) for one in found[1:]] == [("M0", 1.0), ("M1", 1.0)]
    assert (found[1].duel["loss"]["low"], found[1].duel["loss"]["high"]) == (0.0, 0.0)
    assert sentence(past, found) == (
        "M2 is better than M0 for the judge that stays (M0): +2.00 points (95 % interval +2.00 to +2.00, n = 34). That "
        "judge is the model it started from: agreement with people is measured by `rsrlm eval judge`."
    )


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([-0.5, -1.5] * 20, "M2 is worse than M0 for the judge that stays (M0): -1.00 points (95 % interval -1."),
        ([-1.0, 1.0] * 20, "No difference between M2 and M0 can be shown: +0.00 points (95 % interval -0."),
    ],
)
def test_no_better_model_is_called_better(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gains: list[float], words: str
) -> None:
    past = read(folder)
    found = standings(past)
    scores = {"M0": dict.fromkeys(range(40), 3.0), "M2": {number: 3.0 + gain for number, gain in enumerate(gains)}}
    monkeypatch.setattr("rsrlm.report.page.headline.scores_of", lambda _, model: {"M0": scores[model]})
    assert sentence(past, found).startswith(words)


def test_too_few_prompts_say_nothing(tmp_path: Path) -> None:
    past = read(finished(tmp_path, heldout=3))
    said = sentence(past, standings(past))
    assert said.startswith(
        "Nothing can be said: 3 held-out prompts with a readable score are too few, and 30 the least"
    )
    assert "M2 has 2.00 points and M0 0.00" in said


def test_without_held_out_prompts_nothing_is_said(tmp_path: Path) -> None:
    past = read(finished(tmp_path, heldout=0))
    assert sentence(past, standings(past)).startswith("Nothing can be said yet: no model was measured")


@pytest.mark.parametrize(
    ("name", "judge"),
    [
        ("M1/tea/0#1@M0", "M0"),
        ("M1/tea/0#0@validator a/b", "validator a/b"),
        ("M1/a@b/0#0@M1", "M1"),
        ("M1/a#1/0#12@M0", "M0"),
    ],
)
def test_who_judged_stands_in_the_id(name: str, judge: str) -> None:
    assert judge_in(name) == judge


# -- what an iteration comes to ----------------------------------------------------------------------------------------


def test_an_iteration_by_hand(folder: Path) -> None:
    """Five prompts with three answers worth 0, 1 and 2 points by M0; both judgements agree; the sixth is unreadable."""
    found = measured(folder / "iterations" / "00")
    assert sorted(found.scores.tolist()) == [0.0] * 5 + [1.0] * 5 + [2.0] * 5
    assert (found.spread, found.judgements_each) == (0.0, 2.0)
    assert found.chosen["points"].tolist() == [2.0] * 5
    assert found.rejected["points"].tolist() == [0.0] * 5
    assert set(found.chosen["characters"]) == {len(f"{HOSTILE} M0 number 2 of many words.")}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("00/tea/2#1~0", ("00/tea/2#1", "00/tea/2#0")),
        ("00/a#b/2~0", ("00/a#b/2", "00/a#b/0")),
        ("00/a.b/s1.0~1", ("00/a.b/s1.0", "00/a.b/s1.1")),
        ("M1/tea/0>M0/tea/0@M0", ("M1/tea/0", "M0/tea/0")),
        ("plain", None),
    ],
)
def test_what_a_comparison_shows_stands_in_its_id(name: str, shown: Any) -> None:
    assert shown_in(name) == shown


def test_iterations_are_numbers(mine: Path) -> None:
    """The hundredth comes after the 99th, and what is no number is none of them."""
    for name in ("99", "101"):
        shutil.copytree(mine / "iterations" / "01", mine / "iterations" / name)
    (mine / "iterations" / "01.bak").mkdir()
    past = read(mine)
    assert [row["iteration"] for row in past.rows] == [0, 1, 99, 101]
    assert "iteration 100 has no metrics.json" in past.missing


def test_a_function_that_scores_is_no_model(mine: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in (mine / "heldout").glob("*/judgements.parquet"):
        table = pq.read_table(path)
        for name, value in (("weight_version", ""), ("judge", "my_judges:short")):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, name, pa.array([value] * table.num_rows))
        pq.write_table(table, path)
    past = read(mine)
    found = sentence(past, standings(past))
    assert found.startswith("M2 is better than M0 for the judge that stays (my_judges:short): +2.00 points")
    assert "started from" not in found
    assert [one.own["value"] for one in standings(past)] == [None] * 3


def test_a_validator_is_another_judge_than_one_of_its_name() -> None:
    scores = {"validator X": {"a": 1.0}, "X": {"a": 5.0}}
    assert of_judge(scores, "X") == {"a": 5.0}
    assert of_judge(scores, "X", validates=True) == {"a": 1.0}
    assert of_judge(scores, "Y", validates=True) == {}


def test_orders_that_name_one_winner_agree(tmp_path: Path) -> None:
    """Comparison 0 is won by the same text in both orders, 1 by what is shown first; 2 was asked in one order only."""
    from rsrlm.records import Judgement, Preferred
    from rsrlm.store.tables import write_table

    winners = {"00/a/0~1": "A", "00/a/1~0": "B", "00/b/0~1": "A", "00/b/1~0": "A", "00/c/0~1": "tie"}
    write_table(
        tmp_path / "comparisons.parquet",
        "comparisons",
        [
            Judgement(
                id=name, prompt_id=name[3], response_id=name.partition("~")[0], index=0, role="duel", judge="j",
                text="", token_ids=(), finish_reason="stop", weight_version="M0", sampling=None,
                verdict=Preferred(winner=winner),  # type: ignore[arg-type]
            )
            for name, winner in winners.items()
        ],
    )  # fmt: skip
    found = measured(tmp_path)
    assert found.first_wins == (0.75, 4)
    assert found.orders_agree == (0.5, 2)


def test_a_part_of_a_long_table_is_said_to_be_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not measured(folder / "iterations" / "00").parts
    monkeypatch.setattr("rsrlm.report.page.measured.MOST_ROWS", 10)
    assert measured(folder / "iterations" / "00").parts
    assert "Of a part of the rows" in page(folder)


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_show_what_was_made(folder: Path) -> None:
    found, of = samples.of_iteration(folder / "iterations" / "00", 0)
    assert of == len(found) == 6
    by_id = {one["id"]: one for one in found}
    one = by_id["p1"]
    assert [answer["side"] for answer in one["responses"]] == ["chosen", "", "rejected"]
    assert [answer["score"] for answer in one["responses"]] == [2.0, 1.0, 0.0]
    assert all("Because." in each["text"] for answer in one["responses"] for each in answer["judgements"])
    assert (one["gap"], by_id["p5"]["unreadable"], by_id["p5"]["gap"]) == (2.0, 6, None)
    assert one["pairs"] == [{"chosen": "00/p1/2", "rejected": "00/p1/0", "kind": "actor", "gap": 2.0}]


def test_what_stands_out_is_among_the_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "EACH", 1)
    ids = [f"p{number}" for number in range(6)]
    out = {"gap": dict.fromkeys(ids, 0.0) | {"p4": 2.0}, "unreadable": {"p5": 3.0}, "chars": {"p3": 9.0}, "spread": {}}

    class First:
        def sample(self, of: list[str], k: int) -> list[str]:
            return of[:k]

    assert samples.chosen_of(ids, out, First()) == ["p0", "p1", "p4", "p5", "p3"]  # type: ignore[arg-type]


def test_samples_fit_their_budget_and_come_from_all_iterations() -> None:
    made = [{"iteration": number // 50, "id": f"p{number}", "text": "x" * 1000} for number in range(100)]
    kept = samples.within(made, 20_000)
    assert 15 < len(kept) < 20
    assert abs(sum(1 if one["iteration"] else -1 for one in kept)) <= 1
    assert not any("_turn" in one for one in made)


def test_models_to_choose_from_are_those_with_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "LATE_MODELS", 1)
    found = render.sampled(read(folder), [])
    assert found["models"] == ["M0", "M2"]
    assert {tuple(one["model"] for one in prompt["answers"]) for prompt in found["heldout"]} == {("M0", "M2")}


def test_differences_by_hand() -> None:
    assert samples.difference("one two three", "one 2 three four") == [
        (" ", "one "), ("-", "two"), ("+", "2"), (" ", " three"), ("+", " four"),
    ]  # fmt: skip
    assert samples.difference("same", "same") == [(" ", "same")]
    assert samples.difference("", "") == []
    long = "word " * 1600
    assert samples.difference(long, long) is None


# -- the page ----------------------------------------------------------------------------------------------------------


def test_what_models_write_is_no_markup(folder: Path) -> None:
    html = page(folder)
    scripts = re.findall(r"<script[^>]*>", html)
    assert scripts == ['<script type="application/json" id="r0-data">', "<script>"]  # as text
    assert "onerror=" not in re.sub(r"<script type.*?</script>", "", html, flags=re.DOTALL)
    data = re.search(r'id="r0-data">(.*?)</script>', html, re.DOTALL)
    assert data
    assert HOSTILE in json.loads(data[1])["samples"][0]["prompt"]


def test_the_page_needs_nothing_else(folder: Path) -> None:
    html = page(folder)
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|url\(|@import', html)
    assert len(html.encode()) < 5_000_000


def test_the_markdown_says_the_same(folder: Path) -> None:
    report.write([folder], folder)
    text = (folder / "report.md").read_text()
    assert "**Did it get better?** M2 is better than M0" in text
    assert re.search(r"^\| M1 \| 1\.00 \(1\.00 to 1\.00\) \| 1\.00 \(1\.00 to 1\.00\) by M1 \| 34 \|", text, re.M)
    assert "| 0 | M0 | M1 | 6 | 18 | 1.00 | 5 |" in text
    tables = "\n".join(line if line.startswith("|") else "" for line in text.splitlines()).split("\n\n")
    for table in filter(None, (one.strip() for one in tables)):  # whatever stands in the cells, no row has more of them
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_signs_past_their_limits_are_marked(folder: Path) -> None:
    html = page(folder)
    alarms = [one for one in read(folder).events if one["event"] == "alarm"]
    assert alarms, "the made run raises some"
    assert html.count('class="flag"') == len({(one["sign"], one["iteration"]) for one in alarms})
    assert f"iteration {alarms[0]['iteration']}: {alarms[0]['sign']} is" in said(html)


# -- folders that are not as they should be ----------------------------------------------------------------------------


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run here \(no config.yaml\)"):
        report.write([tmp_path], tmp_path)


def test_a_run_that_has_only_begun(mine: Path) -> None:
    for name in ("iterations", "heldout", "models"):
        shutil.rmtree(mine / name)
    for name in ("start.json", "summary.json", "events.jsonl"):
        (mine / name).unlink()
    text = said(page(mine))
    assert "no iteration has begun" in text
    assert "Nothing can be said yet" in text


def test_half_a_run(mine: Path) -> None:
    (mine / "iterations" / "01" / "metrics.json").unlink()
    text = said(page(mine))
    assert "iteration 1 is not finished" in text
    assert "1 of 2 iterations" in text


def test_an_iteration_in_the_middle_is_missing(mine: Path) -> None:
    shutil.rmtree(mine / "iterations" / "00")
    assert "iteration 0 has no metrics.json" in said(page(mine))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("iterations/01/metrics.json", "01/metrics.json cannot be read"),
        ("iterations/01/judgements.parquet", "the tables of iteration 1 cannot be read"),
        ("heldout/M0/judgements.parquet", "held-out answers cannot be read"),
        ("heldout/M1/responses.parquet", "held-out answers cannot be read"),
        ("iterations/00/steps.jsonl", "1 lines of steps.jsonl cannot be read"),
        ("events.jsonl", "1 lines of events.jsonl cannot be read"),
        ("start.json", "start.json cannot be read"),
        ("config.yaml", "config.yaml cannot be read"),
    ],
)
def test_broken_files_are_named(mine: Path, name: str, words: str) -> None:
    (mine / name).write_bytes(b"\xff\xfe{ not: [what it was \x00")
    assert words in said(page(mine))


def test_a_file_without_end(mine: Path) -> None:
    """As where the files of a run are devices: what is no file is not read."""
    (mine / "events.jsonl").unlink()
    (mine / "events.jsonl").symlink_to("/dev/full")
    assert "M2 is better" in said(page(mine))


def test_numbers_that_are_none(mine: Path) -> None:
    """Infinities and NaN in figures and rows: no plot, no table and no script chokes on them."""
    path = mine / "iterations" / "01" / "steps.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "loss": float("nan"), "margin": float("inf")}) + "\n" for row in rows))
    metrics = mine / "iterations" / "01" / "metrics.json"
    held = json.loads(metrics.read_text())["heldout"]
    rewrite(metrics, mean_score=float("nan"), heldout={**held, "score_by_first": {"judge": "M0", "mean": float("nan")}})
    html = page(mine)
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert "Nothing can be said: no readable score by M0" in said(html)


def test_a_run_of_another_version(mine: Path) -> None:
    rewrite(mine / "start.json", layout=1)
    text = (mine / "config.yaml").read_text()
    (mine / "config.yaml").write_text(text + "\nsome_old_key: 3\n")
    shutil.rmtree(mine / "heldout")
    found = said(page(mine))
    assert "made with another version of rsrlm" in found
    assert "no held-out answers were kept" in found


def test_a_folder_that_cannot_be_written(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out=.*file: .*; choose a folder that you can write"):
        report.write([mine], tmp_path / "file")


@pytest.mark.parametrize(("ago", "status"), [(5.0, "running"), (3600.0, "not heard of for a while")])
def test_a_run_that_says_that_it_runs(mine: Path, ago: float, status: str) -> None:
    rewrite(mine / "summary.json", status="running")
    (mine / "alive.json").write_text(json.dumps({"host": "a", "pid": 1, "at": time.time() - ago}))
    assert report.past_of(mine).status == status
    assert not (mine / ".lock").exists(), "a report takes no lock that a resume might want"


# -- several runs ------------------------------------------------------------------------------------------------------


def test_runs_beside_each_other(folder: Path, mine: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((mine / "config.yaml").read_text())
    config["train"]["lr"] = 0.5
    config["name"] = "other"
    (mine / "config.yaml").write_text(yaml.safe_dump(config))
    found = report.compare([folder, mine], tmp_path / "out")
    assert found["differing"] == [["train.lr", "0.001", "0.5"]]
    assert [row[0] for row in found["rows"]] == ["made", "other"]
    assert "M2 is better" in (tmp_path / "out" / "compare.md").read_text()
    assert (tmp_path / "out" / "compare.html").stat().st_size < 1_000_000


def test_runs_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    found = report.compare([folder, folder], tmp_path)
    assert found["names"] == ["made (1)", "made (2)"]
    assert found["differing"] == []


def test_shared_held_out_prompts(folder: Path, tmp_path: Path) -> None:
    other = finished(tmp_path, heldout=4)
    assert [one.id for one in report.shared_prompts(folder, other)] == ["h0", "h1", "h2", "h3"]
    shutil.rmtree(other / "heldout")
    with pytest.raises(ConfigError, match="share no held-out prompts"):
        report.shared_prompts(folder, other)


# -- plots -------------------------------------------------------------------------------------------------------------


def test_series_differ_by_more_than_colour() -> None:
    rows = [{"x": x, "y": x * k, "series": f"s{k}"} for x in range(5) for k in (1, 2)]
    drawn = charts.lines(rows, "x", "y")
    assert 'stroke-dasharray="6,3"' in drawn
    assert "var(--c2)" in drawn
    assert 'aria-label="x: 4; y: 8; series: s2"' in drawn


def test_long_series_are_thinned_to_their_end() -> None:
    rows = [{"x": x, "y": float(x), "series": "s"} for x in range(100_000)]
    kept = charts.thinned(rows)
    assert len(kept) <= charts.MOST_POINTS
    assert kept[-1]["x"] == 99_999


def test_nothing_to_plot() -> None:
    assert charts.lines([{"x": 0, "y": float("nan"), "series": "s"}], "x", "y") == ""
    assert charts.histogram({"a": [], "b": [float("inf")]}, "points") == ""
    assert charts.stacked([], "seconds", ["a"]) == ""
    assert charts.timeline([], "minutes") == ""


def test_values_that_are_all_the_same_have_a_histogram() -> None:
    assert "n = 3" in charts.histogram({"a": [2.0, 2.0, 2.0]}, "points")


@pytest.mark.parametrize("text", ["</script>", "<!--", "\u2028", "\ud800", "]]>"])
def test_json_within_a_page(text: str) -> None:
    found = render.embedded({"text": text})
    assert not set("<>\u2028") & set(found)
    assert json.loads(found)["text"] in (text, "?")
