"""Formulas of a run on GPUs against values worked out by hand, most of them for Llama-3-8B on H100s of 80 GB."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rsrlm.commands import gpu_memory, plan_gpu
from rsrlm.commands.gpu_memory import GB, engine_memory, host_memory, learner_memory, too_large
from rsrlm.commands.shapes import KNOWN, LLAMA2_13B, LLAMA2_70B, LLAMA3_8B, Shape, from_config, shape_of
from rsrlm.config import load
from rsrlm.model import num_parameters
from rsrlm.recipes.base import Demand
from rsrlm.report.progress import Report
from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import BUILTIN_MODEL
from rsrlm.settings.train import TrainRule

CONFIGS = Path(__file__).parent.parent.parent / "configs"
GPU = 80 * GB
# hidden 8, 2 layers: attention 8 * 4 * (2 * 2 + 2 * 1) = 192, feed-forward 3 * 8 * 20 = 480, norms 16: 688 each; two
# matrices of 100 * 8, and the last norm
SMALL = Shape(hidden=8, layers=2, intermediate=20, vocabulary=100, heads=2, kv_heads=1, head_dim=4)


@pytest.fixture(scope="module")
def meta() -> Any:
    return load(CONFIGS / "meta_rewarding_llama3_8b.yaml", ["data.trees=trees.jsonl"])


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_parameters() -> None:
    assert SMALL.parameters == 2 * 800 + 2 * 688 + 8
    assert SMALL.cached(2) == 2 * 2 * 1 * 4 * 2
    # as their checkpoints have
    assert LLAMA3_8B.parameters == 8_030_261_248
    assert LLAMA2_13B.parameters == 13_015_864_320
    assert LLAMA2_70B.parameters == 68_976_648_192
    assert (LLAMA3_8B.cached(2), LLAMA2_70B.cached(2)) == (131_072, 327_680)


def test_the_built_in_model_has_as_many(smollm2: Path) -> None:
    assert shape_of(str(smollm2)) == KNOWN[BUILTIN_MODEL]
    assert shape_of(str(smollm2)).parameters == num_parameters(smollm2)


def test_a_config_json_is_enough(tmp_path: Path) -> None:
    content = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 50, "num_key_value_heads": None}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": content, "vocab_size": 1}))
    assert shape_of(str(tmp_path)) == Shape(
        hidden=8, layers=2, intermediate=32, vocabulary=50, heads=2, kv_heads=2, head_dim=4
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"hidden_size": 8}, "gives no shape of a model (LookupError: no num_attention_heads)"),
        ({"num_local_experts": 8}, "has experts"),
        ([], "gives no shape of a model"),
        (None, "gives no shape of a model"),
    ],
)
def test_files_that_give_no_shape(tmp_path: Path, content: Any, said: str) -> None:
    (tmp_path / "config.json").write_text("{" if content is None else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        shape_of(str(tmp_path), "judge.model")
    assert str(caught.value).startswith(f"judge.model={tmp_path}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("path", ["./nowhere", "nowhere", "a/b/c", "nobody/has-this-model"])
def test_models_of_unknown_shape(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no config\.json|its config\.json is not") as caught:
        shape_of(path)
    assert "model.path=" in str(caught.value)
    assert "meta-llama/Llama-3.1-8B" in str(caught.value)


def test_one_expert_is_a_dense_model() -> None:
    content = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 5, "num_experts": 1}
    assert from_config(content) is not None


# -- memory ------------------------------------------------------------------------------------------------------------


def test_an_engine(meta: Any) -> None:
    """92 % of 80 GB: 16.06 of weights, 3 of activations, 2 of CUDA; the rest holds 400,000 tokens."""
    parts = engine_memory(LLAMA3_8B, meta, GPU)
    assert sum(parts.values()) == pytest.approx(73.6 * GB)
    assert parts["weights"] == 2 * 8_030_261_248
    assert parts["cache of keys and values"] == 73.6 * GB - 16_060_522_496 - 5 * GB
    assert parts["cache of keys and values"] / 131_072 == pytest.approx(400_000, rel=0.01)
    two = meta.model_copy(update={"engine": meta.engine.model_copy(update={"gpus": 2})})
    assert engine_memory(LLAMA3_8B, two, GPU)["weights"] == 8_030_261_248
    less = meta.model_copy(update={"engine": meta.engine.model_copy(update={"gpu_share": 0.5})})
    assert sum(engine_memory(LLAMA3_8B, less, GPU).values()) == pytest.approx(40 * GB)


def rule(**keys: Any) -> TrainRule:
    return TrainRule(lr=1.0, pairs_per_step=1, **keys)


def test_a_rank_of_zero_3() -> None:
    """Four ranks, rows of 2,300 tokens: 41 GB."""
    checkpointed = rule(zero_stage=3, gradient_checkpointing=True)
    parts = learner_memory(LLAMA3_8B, checkpointed, 4, "bfloat16", 2300)
    assert {name: round(size / GB, 1) for name, size in parts.items()} == {
        "weights": 4.0,
        "gradients": 4.0,
        "optimizer": 24.1,  # 12 bytes
        "buckets and gathered layers": 5.1,  # two buckets of 1 GB, 2 GB of layers, the head of 1.05 GB
        "kept for the backward pass": 0.6,  # 2,300 * 32 * 4,096 * 2
        "one layer": 0.9,  # 2,300 * (18 * 4,096 + 8 * 14,336) * 2
        "logits": 0.8,  # 3 * 512 * 128,256 * 4
        "CUDA, NCCL": 1.5,
    }
    assert sum(parts.values()) / GB == pytest.approx(41, abs=0.1)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "buckets"),
    [(0, 1, 1, 6, 1), (1, 1, 1, 1.5, 3), (2, 1, 0.25, 1.5, 3), (3, 0.25, 0.25, 1.5, 2)],
)
def test_stages_of_zero(stage: Any, weights: float, gradients: float, optimizer: float, buckets: int) -> None:
    """In units of the model in bfloat16; a model below the buckets' size fills none."""
    parts = learner_memory(SMALL, rule(zero_stage=stage), 4, "bfloat16", 10)
    unit = 2 * SMALL.parameters
    assert [parts[name] / unit for name in ("weights", "gradients", "optimizer")] == [weights, gradients, optimizer]
    gathered = (SMALL.parameters + 800) * 2 if stage == 3 else 0
    assert parts["buckets and gathered layers"] == buckets * unit + gathered
    # Nothing is made again: each of 2 layers keeps 14 * 8 + 4 * 20 = 192 numbers of 10 tokens.
    assert (parts["kept for the backward pass"], parts["one layer"]) == (2 * 192 * 10 * 2, 0)
    assert parts["logits"] == 3 * 10 * 100 * 4


def test_float32_has_no_second_weights() -> None:
    assert learner_memory(SMALL, rule(), 1, "float32", 1)["optimizer"] == 8 * SMALL.parameters


def test_an_optimizer_on_the_hosts() -> None:
    offload = "train.deepspeed.zero_optimization.offload_optimizer.device=cpu"
    config = load(CONFIGS / "meta_rewarding_llama3_8b.yaml", ["data.trees=x", offload])
    demands = plan_gpu.demands_of(config)
    assert gpu_memory.rank_memory(LLAMA3_8B, config, demands)["optimizer"] == 0
    ranks = [one.size / GB for one in host_memory(LLAMA3_8B, config) if one.name == "learner rank"]
    assert ranks == [pytest.approx(4 + 24.1, abs=0.1)]  # 12 bytes for each of 8.03e9 parameters, in four parts


def test_adapters() -> None:
    """Llama-3-8B at rank 16, all linear layers: 32 x 16 x (2 (4096 + 4096) + 2 (4096 + 1024) + 3 (4096 + 14336))."""
    lora = {"lora": {"rank": 16}, "zero_stage": 1, "gradient_checkpointing": True}
    assert LLAMA3_8B.learning(rule(**lora).lora) == 41_943_040
    assert LLAMA3_8B.learning(rule(lora={"rank": 8, "targets": ["q_proj", "v_proj"]}).lora) == 32 * 8 * (8192 + 5120)
    parts = learner_memory(LLAMA3_8B, rule(**lora), 1, "bfloat16", 2300)
    assert parts["weights"] == 2 * 8_030_261_248
    assert parts["gradients"] == 2 * 41_943_040
    assert parts["optimizer"] == 12 * 41_943_040
    assert gpu_memory.checkpoint_bytes(LLAMA3_8B, rule(**lora), 2) == 14 * 41_943_040
    whole = rule(zero_stage=1, gradient_checkpointing=True)
    share = plan_gpu.train_rate(LLAMA3_8B, rule(**lora), 1) / plan_gpu.train_rate(LLAMA3_8B, whole, 1)
    assert share == pytest.approx(8 / 6, rel=0.01)


def test_the_hosts(meta: Any) -> None:
    sizes = {one.name: (one.number, round(one.size / GB, 1)) for one in host_memory(LLAMA3_8B, meta) if one.number}
    assert sizes == {
        "engine": (4, 8.0),
        "learner rank": (4, 4.0),
        "first rank's copy for an export": (1, 16.1),
        "/dev/shm": (1, 32.1),
        "driver": (1, 0.6),
    }
    whole = load(CONFIGS / "meta_rewarding_llama3_8b.yaml", ["data.trees=x", "train.zero_stage=2"])
    assert [round(one.size / GB, 1) for one in host_memory(LLAMA3_8B, whole) if one.name == "learner rank"] == [20.1]


def test_the_disk(meta: Any) -> None:
    demand = Demand(requests={"actor": (10, 5), "judge": (20, 5)}, items=1, item_tokens=5)
    found = gpu_memory.disk(LLAMA3_8B, meta, [demand])
    assert found["models"] == 5 * 2 * 8_030_261_248
    assert round(found["checkpoint"] / GB) == 112  # 14 bytes
    assert found["records"] == 10 * 1800 + 20 * 900


def test_gpus_of_all_pools() -> None:
    judges = ["judge.replicas=2", "evaluate.judge.model=meta-llama/Llama-2-70b-hf", "evaluate.judge.replicas=3"]
    config = load(CONFIGS / "meta_rewarding_llama3_8b.yaml", ["data.trees=x", "engine.gpus=2", *judges])
    assert gpu_memory.gpus_of(config) == (4 + 2 + 3) * 2 + 4
    assert [(pool.does, pool.replicas, pool.key) for pool in gpu_memory.pools(config)] == [
        ("samples", 4, "model.path"),
        ("judges", 2, "model.path"),
        ("validates", 3, "evaluate.judge.model"),
    ]
    assert [pool.shape.layers for pool in gpu_memory.pools(config)] == [32, 32, 80]


def test_what_does_not_fit(meta: Any) -> None:
    demands = plan_gpu.demands_of(meta)
    assert too_large(meta, demands, GPU) == []
    (engine, rank) = too_large(meta, demands, 20 * GB)
    assert "engine.gpus=1: an engine that samples and judges has 0.0 GB" in engine
    assert "train.workers=4: a rank needs 42 GB of 20 GB" in rank
    large = load(CONFIGS / "irpo_llama2_70b.yaml")
    assert too_large(large, plan_gpu.demands_of(large), GPU) == []


# -- tokens and time ---------------------------------------------------------------------------------------------------


def test_tokens_of_meta_rewarding(meta: Any) -> None:
    """5,000 prompts, 7 answers of 450 tokens, 11 judgements of 180, 110 comparisons of 250: 16, 69 and 137 million."""
    demand = plan_gpu.demands_of(meta)[1]
    work = plan_gpu.work_of(meta, meta.planned[1], demand)
    answer, judgement, comparison = 0.44 * 1024, 0.6 * 300, 0.625 * 400
    assert work.generated == 35_000 * answer + 385_000 * judgement + 550_000 * comparison
    shown = 400 + 115 + answer
    assert work.prefilled == pytest.approx(35_000 * 115 + 35_000 * shown + 550_000 * (judgement + 50))
    # 7,500 of 10,000 pairs; half of them of responses, half of judgements; the sixth epoch is the last
    pair = (115 + 2 * answer + shown + 2 * judgement) / 2
    assert work.reference == pytest.approx(7500 * pair)
    assert work.trained == pytest.approx(6 * 7500 * pair)
    assert (work.generated / 1e6, work.trained / 1e6) == pytest.approx((222.6, 52.7), abs=0.1)


def test_tokens_of_fine_tuning(meta: Any) -> None:
    """1,630 judgements as examples, five epochs, and no requests for prompts."""
    demand = plan_gpu.demands_of(meta)[0]
    assert (demand.items, {number for number, _ in demand.requests.values()}) == (1630, {0})
    work = plan_gpu.work_of(meta, meta.planned[0], demand)
    assert (work.generated, work.reference) == (0, 0)
    assert work.trained == pytest.approx(5 * 1630 * (400 + 115 + 0.44 * 1024 + 180))
    assert plan_gpu.unknown_of(meta) == ["SFT: the judgements of ranked replies that make eft"]


def test_examples_whose_number_is_not_known() -> None:
    config = load(CONFIGS / "cream_llama3_8b.yaml", ["data.trees=x", "data.max_ift=null"])
    assert plan_gpu.demands_of(config)[0].items == 0
    assert plan_gpu.unknown_of(config) == ["M1: the examples of ift; data.max_ift and data.max_eft bound them"]


def test_rates(meta: Any) -> None:
    # A step of 256 sequences reads 16.06 GB and 256 * 1,300 * 131,072 bytes at 3.35 TB/s, and takes 2 ms more.
    step = (16.0605e9 + 43.6207e9) / 3.35e12 + 0.002
    assert plan_gpu.decode_rate(LLAMA3_8B, meta, GPU) == pytest.approx(0.78 * 256 / step, rel=1e-4)
    assert plan_gpu.decode_rate(LLAMA3_8B, meta, GPU) == pytest.approx(10_000, rel=0.02)
    # A cache of 6.2 GB holds 36 sequences.
    assert plan_gpu.decode_rate(LLAMA3_8B, meta, 29.6 * GB) == pytest.approx(
        0.78 * 36 / ((16.0605e9 + 36 * 1300 * 131_072) / 3.35e12 + 0.002), rel=1e-4
    )
    assert plan_gpu.prefill_rate(LLAMA3_8B, 1) == pytest.approx(30_790, rel=0.001)  # 494.5e12 / 16.06e9
    assert plan_gpu.prefill_rate(LLAMA3_8B, 8) == pytest.approx(8 * 30_790, rel=0.001)
    forward = 0.4 * 989e12 / 8_030_261_248
    assert plan_gpu.train_rate(LLAMA3_8B, rule(), 4) == pytest.approx(4 * forward / 6)
    third = rule(zero_stage=3, gradient_checkpointing=True)
    assert plan_gpu.train_rate(LLAMA3_8B, third, 4) == pytest.approx(0.65 * 4 * forward / 8)


def test_weights(meta: Any) -> None:
    """16.06 GB: twice at 4 GB/s over the bus, a copy at 8, a file at 4, two checksums at 10.9, the export at 1.5."""
    first, again = plan_gpu.publish_seconds(LLAMA3_8B, meta)
    assert first == pytest.approx(16.0605 * (0.5 + 0.125 + 0.25 + 2 / 10.9 + 1 / 1.5), rel=1e-4)
    assert again == pytest.approx(16.0605 * (2 / 10.9 + 0.25 + 1 / 3), rel=1e-4)
    over = meta.weights.model_copy(update={"transport": "gloo"})
    for replicas, hops in ((4, 1), (8, 1), (9, 2), (32, 3)):  # one host of 8 GPUs, two, four: a tree
        engine = meta.engine.model_copy(update={"replicas": replicas})
        hosts, _ = plan_gpu.publish_seconds(LLAMA3_8B, meta.model_copy(update={"weights": over, "engine": engine}))
        assert hosts - first == pytest.approx(hops * 16.0605 / 1.2, rel=1e-4)


def test_hours(meta: Any) -> None:
    """M1 on 4 engines and 4 ranks: 1.9 hours of generation and one of training."""
    demand, step = plan_gpu.demands_of(meta)[1], meta.planned[1]
    work = plan_gpu.work_of(meta, step, demand)
    took = plan_gpu.seconds_of(LLAMA3_8B, meta, step.config.train, work, 1878, GPU)
    decoding = work.generated / plan_gpu.decode_rate(LLAMA3_8B, meta, GPU) / 4
    assert took.generation == pytest.approx(decoding + work.prefilled / plan_gpu.prefill_rate(LLAMA3_8B, 1) / 4)
    assert took.generation / 3600 == pytest.approx(1.9, abs=0.02)
    forward = 0.4 * 989e12 * 4 / (2 * 8_030_261_248)
    assert took.training == pytest.approx(
        work.trained / plan_gpu.train_rate(LLAMA3_8B, step.config.train, 4) + work.reference / forward
    )
    assert took.training / 3600 == pytest.approx(0.94, abs=0.01)
    assert took.checkpoints == pytest.approx(12 * 112.42 / 1.5, rel=1e-3)  # after every 150 of 1,878 steps
    assert took.total == took.generation + took.training + took.weights + took.checkpoints
    more = meta.model_copy(update={"engine": meta.engine.model_copy(update={"replicas": 8})})
    assert plan_gpu.seconds_of(LLAMA3_8B, more, step.config.train, work, 1, GPU).generation == took.generation / 2


def shown(config: Any, gpu_gb: float = 80) -> str:
    screen = io.StringIO()
    plan_gpu.show(config, gpu_gb, Report(Console(file=screen, width=200, soft_wrap=True, highlight=False)))
    return screen.getvalue()


def test_rows_that_leave_a_gpu_idle(make_config: Any) -> None:
    """44 % of the most that an item can have: of 2 * 300 + 64 tokens, 292."""

    def said(micro_batch: int) -> str:
        made = make_config(
            train={"gpus": 1, "micro_batch": micro_batch},
            sample={"responses": 2, "max_tokens": 300},
            engine={"max_model_len": 4096},
        )
        return plan_gpu.idle(made, plan_gpu.demands_of(made))

    assert said(2).startswith(
        "train.micro_batch=2: forward passes of about 584 tokens leave a GPU idle; 14 would make it 4000"
    )
    assert said(8) == ""


def test_the_screen(meta: Any) -> None:
    said = shown(meta)
    lines = {tuple(cell.strip() for cell in line.strip("│").split("│")) for line in said.splitlines()}
    assert ("comparisons", "550000") in lines
    assert ("optimizer", "24.1 GB") in lines
    assert ("cache of keys and values", "52.5 GB") in lines
    assert ("each of 4 learner ranks", "4.0 GB") in lines
    assert ("M1", "222.6", "164.3", "52.7", "1.90", "0.94", "52", "899") in lines
    assert "together 7.8 h on 8 GPUs, 62 GPU hours" in said
    assert "training may take twice as long" in said
    assert "does not fit" not in said
    assert "does not fit: train.workers=4" in shown(meta, 40)


def test_the_table_of_the_docs_is_what_plan_prints(meta: Any) -> None:
    said = (CONFIGS.parent / "docs" / "gpus.md").read_text()
    numbers = {f"{size / GB:.1f}" for size in engine_memory(LLAMA3_8B, meta, GPU).values()}
    numbers |= {f"{size / GB:.1f}" for size in learner_memory(LLAMA3_8B, rule_of(meta), 4, "bfloat16", 4096).values()}
    assert "| M1 | 222.6 | 164.3 | 52.7 | 1.90 | 0.94 | 52 | 899 |" in said
    assert {number for number in numbers if f"| {number} |" not in said} == set()
    assert "7.8 h" in said


def rule_of(config: Any) -> TrainRule:
    found: TrainRule = config.planned[0].config.train
    return found


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml") if "gpus: 1" in path.read_text()))
def test_every_config_for_gpus_can_be_planned(name: str) -> None:
    size = next((size for size in ("70b", "13b") if size in name), "")
    model = f"meta-llama/Llama-2-{size}-hf" if size else "meta-llama/Llama-3.1-8B"
    said = shown(load(CONFIGS / f"{name}.yaml", ["data.trees=x", f"model.path={model}"]))
    assert "GPU hours" in said
    assert ("does not fit: train.workers=16" in said) == (name == "self_rewarding_llama2_70b")
    assert said.count("does not fit") == (name == "self_rewarding_llama2_70b")


def test_engines_without_gpus_are_not_counted(make_config: Any) -> None:
    config = make_config(train={"gpus": 1, "zero_stage": 1}, model={"dtype": "bfloat16"})
    assert math.isclose(gpu_memory.gpus_of(config), 1)
    said = shown(config)
    assert "not counted: engines without GPUs" in said
    assert "Each GPU of an engine" not in said
