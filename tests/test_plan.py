"""Bounds and estimates against values worked out by hand."""

import io
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rsrlm.commands import plan as planning
from rsrlm.commands.plan import GIB, Plan, check, show, total_memory
from rsrlm.recipes.base import Demand
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError

PARAMETERS = 100 * 8 + 200  # an embedding of 100 x 8, and a vector


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    shape = {"hidden_size": 8, "num_hidden_layers": 3, "intermediate_size": 20, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps({**shape, "tie_word_embeddings": True}))
    (folder / "tokenizer.json").write_bytes(b"t" * 5000)
    tensors = {"embed": [100, 8], "norm": [200]}
    header = json.dumps(
        {name: {"dtype": "BF16", "shape": size, "data_offsets": [0, 0]} for name, size in tensors.items()}
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def demands(config: Any) -> list[Demand]:
    return [step.recipe.demand_of(step.config, step.config.prompts.per_iteration) for step in config.planned]


def plan(config: Any, model: Path) -> Plan:
    return planning.plan(config, demands(config), model)


def memory(config: Any, model: Path, judge: Path | None = None) -> dict[str, float]:
    """Bytes of one process of each kind that there is."""
    found = planning.memory(config, demands(config), model, judge)
    return {process.name: process.size for process in found if process.number}


def total(config: Any, model: Path) -> float:
    return total_memory(plan(config, model).memory)


# -- requests and tokens: 4 prompts, 2 held out, 2 responses of 24 tokens, a context of 512 ---------------------------


def test_bounds_of_a_text_judge(make_config: Any, model: Path) -> None:
    planned = plan(make_config(judge={"kind": "text", "judgements": 3, "max_tokens": 160}), model)
    assert planned.requests == {
        "responses": 8,  # 4 * 2
        "judgements": 24,  # 8 * 3
        "comparisons": 0,  # no pairs of judgements are asked for
        "held-out answers": 6,  # 2 by the first model, 2 by the new one, and its 2 samples for the KL divergence
        "held-out judgements": 12,  # 2 * 3 by the first on itself, by the new one on itself
        "held-out judgements to report": 6,  # by the first on the new one
        "held-out log-probabilities": 4,  # of the 2 samples, under the new model and the first
        "held-out duels": 4,  # 2, in both orders
    }
    # 8 * 24 + (24 + 18) * 160 + 6 * 96 + (4 + 4) * 1
    assert planned.generated_tokens == 7496
    # 8 * (512 - 24) + 42 * (512 - 160) + 6 * (512 - 96) + (4 + 4) * 511
    assert planned.prompt_tokens == 25272


def test_bounds_of_a_digits_judge(make_config: Any, model: Path) -> None:
    evaluate = {"duel": False, "max_tokens": 32, "kl": False}
    planned = plan(make_config(judge={"kind": "digits"}, evaluate=evaluate), model)
    assert (planned.requests["judgements"], planned.requests["held-out judgements"]) == (8, 4)
    assert planned.requests["held-out duels"] == 0
    assert planned.generated_tokens == 8 * 24 + 14 * 1 + 4 * 32
    assert planned.prompt_tokens == 8 * 488 + 14 * 511 + 4 * 480


def test_bounds_of_a_function_judge(make_config: Any, model: Path) -> None:
    planned = plan(make_config(judge={"kind": "function", "function": "a:b"}), model)
    assert (planned.requests["judgements"], planned.requests["held-out judgements"]) == (0, 0)  # none to an engine
    assert planned.generated_tokens == 8 * 24 + 6 * 96 + 4 + 4


@pytest.mark.parametrize(("choose", "judgements", "duels"), [("score", 30 * 5, 0), ("duel", 0, 30 * 2 * 4)])
def test_bounds_of_candidates(make_config: Any, model: Path, choose: str, judgements: int, duels: int) -> None:
    """4 pairs in steps of 1: candidates after steps 1, 2, 3 and the last model, beside the model before."""
    train = {"pairs_per_step": 1, "candidate_every_steps": 1, "choose": choose}
    planned = plan(make_config(judge={"kind": "digits"}, train=train, prompts={"validation": 30}), model)
    assert planned.requests["validation answers"] == 30 * 5
    assert planned.requests["validation judgements"] == judgements
    assert planned.requests["validation duels"] == duels
    assert (planned.requests["held-out answers"], planned.requests["held-out judgements"]) == (6, 4)
    nobody = plan(make_config(prompts={"validation": 30}), model).requests
    assert [nobody[f"validation {what}"] for what in ("answers", "judgements", "duels")] == [0, 0, 0]


def test_another_validator_has_engines_and_judges_the_first_model_too(make_config: Any, model: Path) -> None:
    config = make_config(evaluate={"judge": {"model": "x", "replicas": 2}})
    planned = plan(config, model)
    # M0 and M1, each by itself and by the validator
    assert (planned.requests["held-out judgements"], planned.requests["held-out judgements to report"]) == (4, 4)
    server = {"endpoint": {"url": "http://a/v1", "model": "m"}, "read": "text"}
    asked = plan(make_config(judge={"kind": "digits"}, evaluate={"judge": server}), model)
    assert asked.requests["held-out judgements to report"] == 2 * 2 * 3  # in words, three of each answer
    # instead of 2 judgements and 4 verdicts of duels of one token each
    more = asked.generated_tokens - plan(make_config(judge={"kind": "digits"}), model).generated_tokens
    assert more == 12 * 160 - 2 + 4 * (300 - 1)
    assert ("engine (validates)", 2) in [(kind, number) for kind, number, _ in planned.actors]
    alone = plan(make_config(), model)
    engine = memory(config, model)["validator engine"]
    assert engine == memory(config, model)["engine"]
    assert total_memory(planned.memory) - total_memory(alone.memory) == pytest.approx(2 * engine)


def test_the_first_iteration_is_within_the_bounds(make_config: Any, model: Path) -> None:
    """It evaluates M0 before it begins, and M1 at its end, which M1 and M0 judge."""
    planned = plan(make_config(judge={"kind": "digits"}), model)
    assert planned.requests["held-out answers"] >= 2 * 2
    assert planned.requests["held-out judgements"] + planned.requests["held-out judgements to report"] >= 2 + 2 * 2


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"pairs_per_step": 2}, 2),
        ({"pairs_per_step": 3}, 2),  # 3 pairs and 1
        ({"pairs_per_step": 5}, 1),
        ({"pairs_per_step": 3, "epochs": 3}, 6),
    ],
)
def test_optimizer_steps(make_config: Any, model: Path, train: dict[str, int], steps: int) -> None:
    assert plan(make_config(train=train), model).optimizer_steps == steps


def test_actors(make_config: Any, model: Path) -> None:
    one = plan(make_config(train={"workers": 3}), model).actors
    assert [(kind, number) for kind, number, _ in one] == [
        ("engine (samples and judges)", 1),
        ("learner rank", 3),
    ]
    two = plan(make_config(engine={"replicas": 4, "threads": 7}, judge={"replicas": 2}), model).actors
    assert [(kind, number) for kind, number, _ in two][:2] == [("engine (samples)", 4), ("engine (judges)", 2)]
    assert "7 threads" in two[1][2]


# -- memory and disk ---------------------------------------------------------------------------------------------------


def test_memory_of_an_engine(make_config: Any, model: Path) -> None:
    base = memory(make_config(), model)["engine"]
    # Weights, the tied head once more (100 * 8), both in float32, and the cache; logits of a context, twice.
    assert base == planning.ENGINE_BASE + 2 * 4 * PARAMETERS + 4 * 800 + 0.25 * GIB + 2 * 4 * 100 * 512
    assert base - memory(make_config(evaluate={"kl": False}), model)["engine"] == 2 * 4 * 100 * 512
    assert memory(make_config(engine={"kv_cache_gib": 2.25}), model)["engine"] - base == 2 * GIB
    assert memory(make_config(engine={"kind": "async"}), model)["engine"] - base == planning.ENGINE_CORE_BASE
    half = memory(make_config(train={"gpus": 1, "zero_stage": 1}, model={"dtype": "bfloat16"}), model)["engine"]
    assert base - half == 2 * (2 * PARAMETERS + 800)
    untied = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(untied))
    assert base - memory(make_config(), model)["engine"] == 4 * 800


def test_memory_of_adapters(make_config: Any, model: Path) -> None:
    """Gradients, two moments and a checkpoint of the adapters alone."""
    whole, some = make_config(), make_config(train={"lora": {"rank": 2, "targets": ["q_proj"]}})
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, "num_attention_heads": 1}))
    hidden, layers = content["hidden_size"], content["num_hidden_layers"]
    learning = layers * 2 * (hidden + hidden)
    saved = memory(whole, model)["learner rank"] - memory(some, model)["learner rank"]
    assert saved == 3 * 4 * (PARAMETERS - learning)


def test_memory_of_another_judge(make_config: Any, model: Path, tmp_path: Path) -> None:
    """Twice the layers' weights: of the judge's engines alone."""
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "config.json").write_text((model / "config.json").read_text())
    header = json.dumps({"embed": {"dtype": "BF16", "shape": [3000], "data_offsets": [0, 0]}}).encode()
    (judge / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    found = memory(make_config(judge={"replicas": 2}), model, judge)
    assert found["judge engine"] - found["engine"] == 2 * 4 * (3000 - PARAMETERS)


def test_memory_of_a_learner(make_config: Any, model: Path) -> None:
    base = memory(make_config(), model)["learner rank"]
    # Weights, gradients and two moments. Activations: min(512, 2 * 24 + 64) = 112 tokens of 3 layers of
    # 14 * 8 + 4 * 20 = 192 floats. Logits: three times 2 * 24 = 48 rows of 100 floats.
    assert base == planning.LEARNER_BASE + 4 * 4 * PARAMETERS + 112 * 3 * 192 * 4 + 3 * 48 * 100 * 4
    assert memory(make_config(train={"zero_stage": 2}), model)["learner rank"] - base == 4 * PARAMETERS
    twice = memory(make_config(train={"micro_batch": 2}), model)["learner rank"]
    assert twice - base == 112 * 3 * 192 * 4 + 3 * 48 * 100 * 4
    # A layer keeps its input (8), written twice.
    checkpointed = memory(make_config(train={"gradient_checkpointing": True}), model)["learner rank"]
    assert base - checkpointed == 112 * 3 * (192 - 16) * 4


def test_all_processes_count(make_config: Any, model: Path) -> None:
    """But for the records, whose size is a bound."""
    one = memory(make_config(), model)
    engine, rank, others = one["engine"], one["learner rank"], one["driver"] + one["ray"]
    assert total(make_config(), model) == pytest.approx(engine + rank + others)
    many = make_config(engine={"replicas": 5}, judge={"replicas": 3}, train={"workers": 2})
    assert total(many, model) == pytest.approx(8 * engine + 2 * rank + others)
    mixed = make_config(judge={"replicas": 3}, train={"workers": 2})
    assert total(mixed, model) == pytest.approx(4 * engine + 2 * rank + others)


def test_disk_of_a_run(make_config: Any, model: Path) -> None:
    config = make_config(iterations=3, train={"checkpoint_every_steps": 2})
    found = planning.disk(config, demands(config), model, [2, 2, 1])
    beside = (model / "config.json").stat().st_size + 5000
    assert found["models"] == 3 * (4 * PARAMETERS + beside)
    assert found["records"] == 3 * 8 * (1800 + 900)
    assert "checkpoint" not in found  # the last step needs none
    assert planning.disk(config, demands(config), model, [2, 3, 1])["checkpoint"] == 3 * 4 * PARAMETERS
    judged = [replace(demand, requests={"judge": (10, 1)}) for demand in demands(config)]
    assert planning.disk(config, judged, model, [2, 2, 1])["records"] == 3 * 10 * 900


# -- what cannot run ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def checked(config: Any, model: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check(plan(config, model), config)
    return str(caught.value)


def test_a_run_that_fits(make_config: Any, model: Path) -> None:
    config = make_config(engine={"kv_cache_gib": 0.01})
    check(plan(config, model), config)
    assert not config.folder.exists()  # nothing is made by asking


def test_too_little_memory(make_config: Any, model: Path) -> None:
    # 1.15 + 1,000,000 + 0.85 + 0.60 + 1.75 GiB
    message = checked(make_config(engine={"kv_cache_gib": 1e6}), model)
    assert "the run needs about 1000004.4 GiB of memory" in message
    assert "engine.kv_cache_gib" in message


def test_replicas_count_against_the_memory(make_config: Any, model: Path) -> None:
    assert "GiB of memory" in checked(make_config(engine={"replicas": 100_000}), model)
    assert "GiB of memory" in checked(make_config(judge={"replicas": 100_000}), model)
    assert "GiB of memory" in checked(make_config(train={"workers": 100_000}), model)


@pytest.mark.parametrize("changes", [{"ray": {"address": "ray://head:10001"}}, {"engine": {"gpus": 1}}], ids=str)
def test_the_memory_of_other_machines_is_not_this_ones(make_config: Any, model: Path, changes: dict[str, Any]) -> None:
    config = make_config(judge={"replicas": 100_000}, **changes)
    check(plan(config, model), config)
    assert total(config, model) > 100_000 * GIB


@pytest.mark.parametrize(
    ("address", "variable", "joins"),
    [
        (None, "", False),
        (None, "local", False),  # Ray starts a cluster here for that
        (None, "10.0.0.1:6379", True),
        ("local", "10.0.0.1:6379", False),  # the config comes first
        ("10.0.0.1:6379", "local", True),
    ],
)
def test_which_cluster_a_run_joins(
    make_config: Any, model: Path, monkeypatch: pytest.MonkeyPatch, address: str | None, variable: str, joins: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    config = make_config(judge={"replicas": 100_000}, ray={"address": address})
    if joins:
        check(plan(config, model), config)
    else:
        assert "GiB of memory" in checked(config, model)


def test_too_little_disk(make_config: Any, model: Path, tmp_path: Path) -> None:
    message = checked(make_config(prompts={"per_iteration": 10**12}), model)
    assert "GiB of disk" in message
    assert f"are free at {tmp_path};" in message  # the runs folder is not there yet
    assert "runs=FOLDER" in message


def test_a_second_checkpoint_stands_beside_the_first(make_config: Any, model: Path) -> None:
    """`check` needs the room of two where `disk` counts one."""
    config = make_config()
    planned = plan(config, model)
    free = shutil.disk_usage(model).free
    check(replace(planned, disk={"checkpoint": 0.45 * free}), config)
    with pytest.raises(ConfigError, match="GiB of disk"):
        check(replace(planned, disk={"checkpoint": 0.55 * free}), config)


# -- other shapes of config.json, and the screen -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "shape"),
    [
        (
            {"n_embd": 8, "n_layer": 2, "vocab_size": 50},  # GPT-2
            {"hidden": 8, "layers": 2, "intermediate": 32, "vocabulary": 50, "tied": 0},
        ),
        (
            {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 50, "tie_word_embeddings": True},
            {"hidden": 8, "layers": 2, "intermediate": 32, "vocabulary": 50, "tied": 1},
        ),
        (
            # A model that sees as well: its language part counts.
            {
                "vocab_size": 1,
                "text_config": {"hidden_size": 6, "num_hidden_layers": 4, "intermediate_size": 9, "vocab_size": 70},
            },
            {"hidden": 6, "layers": 4, "intermediate": 9, "vocabulary": 70, "tied": 0},
        ),
        (
            {"hidden_size": 8, "n_layer": 2, "vocab_size": None, "tie_word_embeddings": None, "text_config": None},
            {"hidden": 8, "layers": 2, "intermediate": 32, "vocabulary": 0, "tied": 0},
        ),
    ],
)
def test_shapes(tmp_path: Path, content: dict[str, Any], shape: dict[str, int]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert planning._shape(tmp_path) == shape


def test_the_plan_on_the_screen(make_config: Any, model: Path) -> None:
    screen = io.StringIO()
    config = make_config(judge={"kind": "text"}, engine={"kv_cache_gib": 4})
    planned = plan(config, model)
    show(planned, config, Report(Console(file=screen, width=200, soft_wrap=True, highlight=False)))
    lines = {tuple(cell.strip() for cell in line.strip("│").split("│")) for line in screen.getvalue().splitlines()}
    assert ("judgements", "24") in lines
    assert ("optimizer steps", "2") in lines
    assert ("memory: engine", "5.15 GiB") in lines
    assert ("memory: all", "8.35 GiB") in lines  # and 0.85 + 0.60 + 1.75
    assert f"run folder: {config.folder}" in screen.getvalue()
    assert "max_grad_norm: 1.0" in screen.getvalue()


def test_bounds_of_steps(make_config: Any, model: Path) -> None:
    """The largest number of any iteration; judgements are compared in both orders, 4 * 3 of each prompt."""
    config = make_config(
        iterations=3,
        judge={"kind": "structured", "judgements": 4, "max_tokens": 60},
        evaluate={"duel": False, "kl": False},
        steps=[
            {"recipe": "sft", "sources": ["mine.jsonl"], "train": {"epochs": 4}},
            {"recipe": "meta_rewarding", "meta": {"read": "structured", "max_tokens": 70}},
            {"prompts": {"per_iteration": 6}},
        ],
    )
    # As its recipe says: 21 examples, and no prompts.
    sft = Demand(requests={"actor": (0, 24), "judge": (0, 60)}, items=21, item_tokens=500)
    planned = planning.plan(config, [sft, *demands(config)[1:]], model)
    assert planned.requests == {
        "responses": 12,  # 6 * 2 in the last
        "judgements": 48,  # 12 * 4
        "comparisons": 48,  # 4 * 12 in the second
        "held-out answers": 4,
        "held-out judgements": 16,
        "held-out judgements to report": 8,
        "held-out log-probabilities": 0,
        "held-out duels": 0,
    }
    # 21 examples in steps of 2, 4 epochs; the second has 8 pairs, the last 6
    assert planned.optimizer_steps == 44
    # first: 4 answers of 96 and 24 judgements of 60; second: 8 * 24 + 32 * 60 + 48 * 70 + 2 * 96 + 16 * 60
    assert planned.generated_tokens == 6624


@pytest.mark.parametrize(("rounds", "every", "kept"), [(1, 1, 1), (2, 1, 2), (10, 1, 3), (200, 1, 22), (200, 5, 23)])
def test_models_that_online_rounds_leave(rounds: int, every: int, kept: int, make_config: Any) -> None:
    """Those of evaluations, every tenth round, the last one, and those that answer and are the reference before it."""
    made = make_config(clock={"kind": "online", "sync_every": every}, iterations=rounds)
    assert made.models_kept == kept
    assert make_config(iterations=rounds).models_kept == rounds
