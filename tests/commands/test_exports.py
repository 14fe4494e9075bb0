"""`rsrlm export` on run folders made by hand: what other tools read. TRL, alpaca_eval, FastChat, Arena-Hard and lm-eval
open the exports of a real run in benchmarks/exports.py."""

import functools
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import pytest
from huggingface_hub import ModelCard, constants, metadata_load
from samples import PAIR, made_for
from small_tokenizers import KINDS, TEMPLATES, tokenizer_of
from typer.testing import CliRunner

from rsrlm.chat import ChatEncoder
from rsrlm.cli import app
from rsrlm.commands.exports import cards, formats, leaderboards, trl
from rsrlm.commands.exports.source import Selection
from rsrlm.records import Group, Prompt
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError
from rsrlm.store.folder import RunFolder

PROMPTS = {"tea": "Name a tea.", "milk": "Name a milk.", "oats": "What are oats?", "rye": "What is rye?"}
HEARD = Report()
LOADED = functools.cache(trl.load_tokenizer)  # once for all tests


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(HEARD, "line", lines.append)
    return lines


@pytest.fixture
def export(said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Export as the command line does, to a folder of its own."""
    monkeypatch.setattr(trl, "load_tokenizer", LOADED)

    def call(folder: Path, to: str, repo: str | None = None, **chosen: Any) -> Path:
        names = {"iterations": "iteration", "kinds": "kind"}
        named = [names.get(name, name) for name in chosen]
        return formats.export(folder, to, tmp_path / f"to-{to}", Selection(**chosen), named, repo, HEARD)

    return call


def answered(store: RunFolder, model: str, **texts: str) -> None:
    """What a model has answered to held-out prompts."""
    groups = []
    for name, text in texts.items():
        response = replace(
            made_for(name).responses[0], id=f"{model}/{name}/0", prompt_id=name, text=text, token_ids=(5, 6, 2)
        )
        prompt = Prompt(id=name, text=PROMPTS[name])
        groups.append(Group(id=f"{model}/{name}", iteration=1_000_000, prompt=prompt, responses=(response,)))
    store.write_heldout(model, groups)


HELD = {"model": "M0", "answers": {"tokens": 3.0, "words": 2.0, "complete": 1.0},
        "score_by_current": {"judge": "M0", "mean": 2.0, "n": 2},
        "score_by_first": {"judge": "M0", "mean": 2.0, "n": 2}}  # fmt: skip
LATER = {**HELD, "model": "M1", "score_by_current": {"judge": "M1", "mean": 2.0, "n": 2},
         "score_by_first": {"judge": "M0", "mean": float("nan"), "n": 2},
         "duel_with_M0": {"n": 2, "win": 0.5, "tie": 0.5, "loss": 0.0}, "kl_to_first": {"per_token": 0.25}}  # fmt: skip


@pytest.fixture
def run(make_config: Any, encoder: ChatEncoder, tmp_path: Path) -> RunFolder:
    """A run of two iterations, of which the second was killed while it trained; prompt "rye" was set aside to choose
    by, "tea" and "oats" are held out, and "milk" was trained on."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": name, "prompt": text}) + "\n" for name, text in PROMPTS.items()))
    config = make_config(name="mine", iterations=2, prompts={"path": str(path), "heldout": 2, "validation": 1})
    store = RunFolder.create(config)
    store.fix("drawn", {"date": "2026-01-02T03:04:05", "fence_salt": ""})
    store.fix("heldout_first", HELD)
    answered(store, "M0", tea="Green.", oats="Grain.")
    answered(store, "M1", tea="Go \ufffd")
    milk = made_for("milk")
    for number in (0, 1):
        store.write_groups(number, [replace(milk, prompt=replace(milk.prompt, text=PROMPTS["milk"]))])
        store.write_pairs(number, [*pairs(encoder, number)])
    row = {"iteration": 0, "prompts": 1, "responses": 2, "judgements": 4, "judgements_unreadable": 2, "pairs": 2,
           "optimizer_steps": 1, "mean_score": None, "weight_version": "M1", "heldout": LATER}  # fmt: skip
    store.write_metrics(0, row)
    for _ in range(2):  # a resume says it again
        store.event("alarm", iteration=0, sign="score_length", value=0.75, action="warn")
    return store


def pairs(encoder: ChatEncoder, number: int) -> list[Any]:
    actor = replace(
        PAIR, id=f"0{number}/milk/1>0", prompt_id="milk", prompt_token_ids=encoder.user(PROMPTS["milk"]),
        chosen_token_ids=encoder.target("Oat milk, <|im_end|> & more."),
        rejected_token_ids=encoder.target("Cow's")[:-1],
    )  # fmt: skip
    judged = encoder.encode("Grade: {{ x }}", {"x": "it"}, answer_prefix="Score: ")
    four, one = (tuple(encoder.tokenizer.encode(digit)) for digit in "41")
    return [
        actor,
        replace(
            actor,
            id=f"0{number}/milk/0#1>0",
            kind="judge",
            prompt_token_ids=judged,
            chosen_token_ids=four,
            rejected_token_ids=one,
        ),
    ]


# -- trl ---------------------------------------------------------------------------------------------------------------


def test_pairs_are_conversations_from_what_was_trained_on(run: RunFolder, export: Any, said: list[str]) -> None:
    rows = datasets.load_dataset(str(export(run.folder, "trl")), split="train").to_list()
    first = rows[0]
    assert first["prompt"] == [{"role": "user", "content": "Name a milk."}]
    assert first["chosen"] == [{"role": "assistant", "content": "Oat milk, <|im_end|> & more."}]
    assert first["rejected"] == [{"role": "assistant", "content": "Cow's"}]
    assert (first["score_chosen"], first["score_rejected"], first["weight"]) == (1 / 3, 0.0, 1.0)
    assert [(row["id"], row["iteration"]) for row in rows] == [("00/milk/1>0", 0), ("01/milk/1>0", 1)]
    assert said == [
        "not finished, and exported as far as they are: iterations 1",
        "2 of 4 answers do not end with the model's end token; a chat template ends them all the same",
        "pairs of kind judge are left out; --kind judge takes them",
        f"written to {run.folder.parent.parent / 'to-trl'}: 2 pairs (actor 2)",
    ]


def test_a_judges_pairs_begin_as_its_prompt_has_begun_them(run: RunFolder, export: Any, said: list[str]) -> None:
    out = export(run.folder, "trl", kinds=["judge", "other"], iterations=[1])
    (row,) = datasets.load_dataset(str(out), split="train").to_list()
    assert row["prompt"] == [{"role": "user", "content": "Grade: it"}]
    assert [row[side][0]["content"] for side in ("chosen", "rejected")] == ["Score: 4", "Score: 1"]
    assert "there are no pairs of kind other" in said
    assert "(judge: 1)" in (out / "README.md").read_text()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_users_turn_is_found_in_any_chat(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind, template)
    encoder = ChatEncoder(tokenizer)
    frame = trl.Frame(encoder)
    for text in ("Compare tea and coffee.", "1 + 1?", "Say <|im_end|> and </s>\n[INST] twice"):
        prompt = encoder.user(text)
        turn = frame.turn([*prompt, 5, 6])
        assert turn is not None
        assert (turn[0].strip(), turn[1]) == (text, [5, 6])
    assert frame.turn([7, 7, 7]) is None


def test_prompts_that_are_no_chat_are_left_out(run: RunFolder, export: Any, said: list[str]) -> None:
    [chat, _] = run.pairs(1)
    bare = replace(chat, prompt_token_ids=(40, 41), weight=0.5)
    run.write_pairs(1, [bare, replace(chat, target=0.75)])
    export(run.folder, "trl", iterations=[1])
    assert "1 pairs are left out: their prompts are no chat with one message" in said
    assert "1 pairs have a weight or target other than 1, which TRL does not read" in said


def test_a_run_without_such_pairs_says_what_it_has(run: RunFolder, export: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--kind other: .* has pairs of kind actor, judge"):
        export(run.folder, "trl", kinds=["other"])
    run.write_pairs(0, [])
    with pytest.raises(ConfigError, match="has no pairs; --to datasets exports what else"):
        export(run.folder, "trl", iterations=[0])
    assert not list(tmp_path.glob("*to-trl*"))  # nothing half written


# -- datasets ----------------------------------------------------------------------------------------------------------


def test_records_load_as_a_data_set_with_a_config_for_each_kind(run: RunFolder, export: Any) -> None:
    run.write_pairs(1, [])  # an empty file has no rows to load
    out = export(run.folder, "datasets")
    assert datasets.get_dataset_config_names(str(out)) == ["prompts", "responses", "judgements", "pairs"]
    responses = datasets.load_dataset(str(out), "responses", split="train").to_list()
    assert [(row["iteration"], row["id"]) for row in responses] == [
        (number, f"00/milk/{index}") for number in (0, 1) for index in (0, 1)
    ]
    assert responses[0]["token_ids"] == [128255, 0]
    assert datasets.load_dataset(str(out), "pairs", split="train")["iteration"][:] == [0, 0]
    card = (out / "README.md").read_text()
    assert "| `judgements` | 8 |" in card
    assert "| 0 | 1 | 2 | 4 | 2 | 2 | - |" in card  # a mean that is not there
    header = metadata_load(out / "README.md")
    assert (header["size_categories"], header["tags"][-1]) == (["n<1K"], "self_rewarding")
    for kind in ("prompts", "responses", "judgements", "pairs"):
        for column in datasets.load_dataset(str(out), kind, split="train").column_names:
            assert f"| `{column}` |" in card.partition(f"### {kind}")[2].partition("###")[0]


def test_data_sets_of_several_runs_are_not_taken_for_each_other(run: RunFolder, export: Any) -> None:
    """`datasets` keeps what it has loaded, by the names of the folder and of the files in it."""
    first = export(run.folder, "datasets", iterations=[0])
    assert datasets.load_dataset(str(first), "pairs", split="train")["id"][:] == ["00/milk/1>0", "00/milk/0#1>0"]
    shutil.rmtree(first)
    run.write_pairs(0, list(run.pairs(1))[:1])
    again = export(run.folder, "datasets", iterations=[0])
    assert again == first
    assert datasets.load_dataset(str(again), "pairs", split="train")["id"][:] == ["01/milk/1>0"]


@pytest.mark.parametrize(
    ("rows", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**7 - 1, "1M<n<10M"), (10**7, "n>10M")]
)
def test_size_categories(rows: int, size: str) -> None:
    assert cards.size_of(rows) == size


def test_what_is_missing_is_said_and_what_is_broken_is_named(run: RunFolder, export: Any, said: list[str]) -> None:
    path = run.iteration(1) / "responses.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"01/responses.parquet: cannot be read .*--iteration"):
        export(run.folder, "datasets")
    (run.iteration(1) / "prompts.parquet").unlink()
    export(run.folder, "datasets")
    assert "left out, as they have no prompts: iterations 1" in said
    with pytest.raises(ConfigError, match=r"--iteration 2: .* has iterations 0 to 1"):
        export(run.folder, "trl", iterations=[0, 2])


def test_an_empty_run_has_nothing_to_export(make_config: Any, export: Any) -> None:
    folder = RunFolder.create(make_config(iterations=3)).folder
    for to, why in {
        "trl": "no pairs of iteration 0 to 2 yet, so there is nothing to export",
        "datasets": "no prompts of iteration 0 to 2 yet",
        "alpaca_eval": "none has been written yet",
        "lm_eval": "has trained no model yet",
        "model": "has trained no model yet",
    }.items():
        with pytest.raises(ConfigError, match=why):
            export(folder, to)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_held_out_answers_as_alpaca_eval_reads_them(run: RunFolder, export: Any, said: list[str]) -> None:
    out = export(run.folder, "alpaca_eval")
    found = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    assert found == {
        "mine-M0": [
            {"instruction": "What are oats?", "output": "Grain.", "generator": "mine-M0", "dataset": "mine"},
            {"instruction": "Name a tea.", "output": "Green.", "generator": "mine-M0", "dataset": "mine"},
        ],
        "mine-M1": [{"instruction": "Name a tea.", "output": "Go �", "generator": "mine-M1", "dataset": "mine"}],
    }
    assert said[0] == "no held-out answers of M2"


def test_a_model_that_has_answered_nothing(run: RunFolder, export: Any) -> None:
    with pytest.raises(ConfigError, match=r"--model M2: no held-out answers of it; .* has those of M0, M1"):
        export(run.folder, "mt_bench", model="M2")
    shutil.rmtree(run.folder / "heldout")
    with pytest.raises(ConfigError, match=r"no answers to held-out prompts \(none has been written yet\)"):
        export(run.folder, "mt_bench")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_mt_bench_files(run: RunFolder, export: Any) -> None:
    out = export(run.folder, "mt_bench")
    assert lines(out / "question.jsonl") == [
        {"question_id": 1, "category": "heldout", "turns": ["What are oats?"], "prompt_id": "oats"},
        {"question_id": 2, "category": "heldout", "turns": ["Name a tea."], "prompt_id": "tea"},
    ]
    (only,) = lines(out / "model_answer" / "mine-M1.jsonl")
    assert only.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (only["question_id"], only["model_id"]) == (2, "mine-M1")
    assert only["choices"] == [{"index": 0, "turns": ["Go �"]}]


def test_arena_hard_files(run: RunFolder, export: Any) -> None:
    out = export(run.folder, "arena_hard")
    assert [(one["uid"], one["prompt"]) for one in lines(out / "question.jsonl")] == [
        ("oats", "What are oats?"), ("tea", "Name a tea."),
    ]  # fmt: skip
    first = lines(out / "model_answer" / "mine-M0.jsonl")[1]
    assert first["messages"] == [
        {"role": "user", "content": "Name a tea."},
        {"role": "assistant", "content": {"answer": "Green."}},
    ]
    assert (first["uid"], first["model"], first["metadata"]["token_len"]) == ("tea", "mine-M0", 3)


def test_marks_of_style_outside_of_code() -> None:
    text = "# One\n## Two\n##Three\n1. a\n 2. b\n- c\n* d\n**bold** __too__\n```\n# no\n- no\n**no**\n```"
    assert leaderboards.marks(text) == {
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 2},
        "bold_count": {"**": 1, "__": 1},
    }


def test_a_duels_answers(export: Any, tmp_path: Path) -> None:
    """Both models are called M1; where ids are not written down, the prompts are counted."""
    for side, text in (("a", "Yes."), ("b", "No.")):
        outputs = [
            {"instruction": "Is it?", "output": text, "generator": f"runs/{side}/models/M1", "dataset": "prompts"}
        ]
        (tmp_path / f"outputs-{side}.json").write_text(json.dumps(outputs))
    out = export(tmp_path, "arena_hard")
    assert [one["uid"] for one in lines(out / "question.jsonl")] == ["1"]
    found = {path.stem: lines(path)[0] for path in (out / "model_answer").iterdir()}
    assert {name: one["messages"][1]["content"]["answer"] for name, one in found.items()} == {
        "M1": "Yes.",
        "M1-b": "No.",
    }
    shutil.rmtree(out)
    path = tmp_path / "outputs-a.json"
    path.write_text(path.read_text().replace('"dataset"', '"prompt_id": "0a1b", "dataset"'))
    assert lines(export(tmp_path, "arena_hard", model="M1") / "question.jsonl")[0]["uid"] == "0a1b"
    assert "metadata" not in found["M1"]  # lengths in tokens are not known
    (tmp_path / "outputs-b.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"outputs-b.json: no outputs of a duel"):
        export(tmp_path, "alpaca_eval")


def test_numbers_that_are_ids_stay(run: RunFolder, export: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROMPTS, "81", "Name a tea.")
    monkeypatch.setitem(PROMPTS, "102", "What are oats?")
    answered(run, "M0", **{"81": "Green.", "102": "Grain."})
    out = export(run.folder, "mt_bench", model="M0")
    assert [one["question_id"] for one in lines(out / "model_answer" / "mine-M0.jsonl")] == [102, 81]


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(run: RunFolder, tiny_model: Path) -> RunFolder:
    """With M1, a whole model of random weights."""
    run.model("M1").mkdir(parents=True)
    for path in tiny_model.iterdir():
        os.link(path, run.model("M1") / path.name)
    return run


def test_lm_eval_gets_the_model_the_backend_and_what_else_is_said(
    trained: RunFolder, export: Any, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = export(trained.folder, "lm_eval") / "run.sh"
    assert script.read_text() in said
    tool = tmp_path / "bin" / "lm_eval"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nfor one in "$@"; do echo "$one"; done\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")

    def asked(*options: str, **environment: str) -> list[str]:
        done = subprocess.run(
            ["sh", script, *options], capture_output=True, text=True, check=False, env={**os.environ, **environment}
        )
        return (done.stdout or done.stderr).splitlines()

    model = f"pretrained={trained.model('M1')},dtype=float32"
    plain = asked()
    assert plain[:5] == ["run", "--model", "hf", "--model_args", model]
    assert "arc_easy,arc_challenge" in plain[6]
    other = asked("vllm", "--limit", "5", TASKS="mine")
    assert other[2:7] == ["vllm", "--model_args", f"{model},max_model_len=512", "--tasks", "mine"]
    assert other[-2:] == ["--limit", "5"]
    assert asked("gguf") == ["run.sh: hf or vllm, not gguf"]


def test_a_model_folder_with_a_card(trained: RunFolder, export: Any, smollm2: Path) -> None:
    out = export(trained.folder, "model")
    weights = out / "model.safetensors"
    assert weights.samefile(trained.model("M1") / "model.safetensors")  # no second copy on this disk
    assert (out / "chat_template.jinja").is_file()
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "transformers",
        "text-generation",
        "apache-2.0",
    )
    assert data["model_name"] == "mine-M1"
    assert "| M1 | 3.000 | 2.000 | 1.000 | 0.250 | 2.000 | - | 0.50 / 0.50 / 0.00 |" in card.text  # NaN is no figure
    assert "trouble: iteration 0: `score_length` is 0.750." in card.text
    assert "**The run is not finished**: 1 of 2 iterations." in card.text
    assert "- Prompts: `prompts.jsonl`; 2 of them held out." in card.text  # no folder of this machine
    assert "2 held-out prompts are too few" in card.text


def test_models_that_are_not_there(trained: RunFolder, export: Any) -> None:
    for model, why in {"M2": "--model M2: .* has M0, M1", "M0": "the run has not trained it"}.items():
        with pytest.raises(ConfigError, match=why):
            export(trained.folder, "model", model=model)
    with pytest.raises(ConfigError, match=r"--adapter: M1 .* has no adapter"):
        export(trained.folder, "model", adapter=True)
    weights = trained.model("M1") / "model.safetensors"
    cut = weights.read_bytes()[:-9]
    weights.unlink()
    weights.write_bytes(cut)
    with pytest.raises(ConfigError, match="is not a whole safetensors file"):
        export(trained.folder, "model")


@pytest.mark.torch
def test_adapters_of_several_iterations_are_one(run: RunFolder, export: Any, tiny_model: Path) -> None:
    """Of other ranks, scales and layers. peft adds it to the first model, and has the weights that the iterations have
    made one after the other."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rsrlm.runtime import lora
    from rsrlm.settings.train import LoRA

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = tiny_model
    for name, base, rule in (
        ("M1", "M0", LoRA(rank=2, alpha=8, targets=["q_proj", "down_proj"])),
        ("M2", "M1", LoRA(rank=3, alpha=3, targets=["q_proj"])),
    ):
        torch.manual_seed(rule.rank)
        part = AutoModelForCausalLM.from_pretrained(before)
        lora.add_adapters(part, rule, seed=1)
        tensors = {key: torch.randn(one.shape) / 9 for key, one in lora.adapters(part)}
        model.save_pretrained(run.model(name))
        lora.write_adapter(run.model(name) / "adapter", tensors, rule, base, str(before))
        model = PeftModel.from_pretrained(model, str(run.model(name) / "adapter")).merge_and_unload()
        model.save_pretrained(run.model(name))
        before = run.model(name)
    for path in tiny_model.glob("token*"):
        os.link(path, run.model("M2") / path.name)
    out = export(run.folder, "model", adapter=True)
    first = AutoModelForCausalLM.from_pretrained(tiny_model)
    whole = PeftModel.from_pretrained(first, str(out)).merge_and_unload().state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(whole[name], weight, rtol=0, atol=1e-5)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 5
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert metadata_load(out / "README.md")["library_name"] == "peft"


# -- the hub -----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Makes a repository, and takes the files of one commit in full."""

    asked: list[tuple[str, str, bytes]]

    def log_message(self, *_: Any) -> None:
        pass

    def _reply(self, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._reply({"id": "me/mine", "sha": "0" * 40, "siblings": [], "createdAt": "2026-01-01T00:00:00.000Z"})

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append((self.path, self.headers["Authorization"], sent))
        if self.path.endswith("/create"):
            self._reply({"url": f"http://{self.headers['Host']}/me/mine"})
        elif "/preupload/" in self.path:
            files = json.loads(sent)["files"]
            self._reply(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]}
            )
        else:
            address = f"http://{self.headers['Host']}/me/mine/commit/0"
            self._reply({"commitUrl": address, "commitOid": "0" * 40, "success": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Mine", (Hub,), {"asked": []}))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    yield server
    server.shutdown()
    server.server_close()


def test_push_uploads_the_folder_with_the_token_to_a_private_repository(
    trained: RunFolder, export: Any, hub: Any, said: list[str]
) -> None:
    out = export(trained.folder, "lm_eval")  # any folder: weights are not for this server
    from rsrlm.commands.exports import push

    push.upload(out, "me/mine", "model", HEARD)
    asked = hub.RequestHandlerClass.asked
    assert {token for _, token, _ in asked} == {"Bearer hf_mine"}
    made = json.loads(asked[0][2])
    assert (asked[0][0], made["name"]) == ("/api/repos/create", "mine")
    assert made.get("private") is True or made.get("visibility") == "private"
    commit = [json.loads(line) for line in asked[-1][2].splitlines()]
    assert [one["value"]["path"] for one in commit if one["key"] == "file"] == ["run.sh"]


def test_what_the_hub_would_refuse_is_refused_before_anything_is_written(
    run: RunFolder, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for to, repo, why in (
        ("trl", "me/mine", "--push me/mine: no token; set HF_TOKEN"),
        ("trl", "mine", "--push mine: write OWNER/NAME"),
        ("trl", "me/..", "--push me/..: "),
        ("mt_bench", "me/mine", "the hub takes --to trl, datasets, model"),
    ):
        with pytest.raises(ConfigError, match=why):
            export(run.folder, to, repo)
        assert not (tmp_path / f"to-{to}").exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"--push me/mine: .*the export is in .*to-trl: `hf upload me/mine"):
        export(run.folder, "trl", "me/mine")


# -- the command -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused(run: RunFolder, export: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--to csv: no such format; there are trl, datasets, alpaca_eval, mt_bench"):
        export(run.folder, "csv")
    with pytest.raises(ConfigError, match="--adapter is for --to model; leave it out with --to trl"):
        export(run.folder, "trl", adapter=True)
    with pytest.raises(ConfigError, match="no run here"):
        export(tmp_path, "trl")
    (tmp_path / "to-trl").mkdir()
    with pytest.raises(ConfigError, match="to-trl is there already"):
        export(run.folder, "trl")
    start = run.folder / "start.json"
    start.write_text(start.read_text().replace('"layout": 3', '"layout": 2'))
    with pytest.raises(ConfigError, match="begun with another version"):
        export(run.folder, "datasets")
    start.write_bytes(b'{"layout": "\xff')
    with pytest.raises(ConfigError, match=r"start\.json cannot be read"):
        export(run.folder, "datasets")


def test_the_command_writes_into_the_run(run: RunFolder) -> None:
    done = CliRunner().invoke(app, ["export", str(run.folder), "--to", "datasets", "--iteration", "0"])
    assert done.exit_code == 0, done.output
    assert len(list((run.folder / "exports/datasets").rglob("*.parquet"))) == 4
    assert run.pairs(1)  # the run is as it was
