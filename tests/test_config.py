"""Configs: what loads, what is refused, and that nothing is repaired in silence."""

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rsrlm.commands.engines import check_out
from rsrlm.config import Config, dump, load, resolve
from rsrlm.settings.base import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
SMALL: dict[str, Any] = {
    "name": "small",
    "iterations": 2,
    "model": "some/id",
    "prompts": {"path": "builtin", "per_iteration": 4},
    "sample": {"max_tokens": 24},
    "judge": {"kind": "text"},
    "train": {"lr": 1e-3, "pairs_per_step": 2},
    "engine": {"max_model_len": 512},
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def refused(path: Path, *overrides: str) -> str:
    """The message that the config is refused with."""
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return str(caught.value)


# -- what loads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads_and_survives_its_dump(path: Path, tmp_path: Path) -> None:
    config = load(path, ["data.trees=trees.jsonl"])
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump(config), encoding="utf-8")
    again = load(resolved)
    assert yaml.safe_load(dump(again)) == yaml.safe_load(dump(config))
    assert again.planned == config.planned


def test_the_project_has_configs() -> None:
    assert "quickstart" in [path.stem for path in CONFIGS]


# PyYAML folds a text of nothing but these line ends; no path or name has them.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029"))


# Line ends and quotes, a byte-order mark, YAML's own words, numbers and dates written as text.
@example(runs="\ufeffa: 'b' \"c\"\n\td # e\\", template="null", project="2024-01-01")
@example(runs="yes", template="1e5", project="0x10")
@example(runs="~", template="1_000", project="12:30:00")
@given(runs=TEXT, template=TEXT, project=st.none() | st.text("0123456789eE+-._:xob"))
@settings(deadline=None, max_examples=50)
def test_dump_and_load_keep_every_text(
    tmp_path_factory: pytest.TempPathFactory, runs: str, template: str, project: str | None
) -> None:
    config = resolve(
        {**SMALL, "runs": runs, "judge": {"template": template}, "trackers": {"tensorboard": {"folder": project}}}
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_bytes(dump(config).encode())
    assert yaml.safe_load(dump(load(path))) == yaml.safe_load(dump(config))


@pytest.mark.parametrize("recipe", ["self_rewarding", "meta_rewarding"])
def test_a_config_without_steps_survives_its_dump(recipe: str, tmp_path: Path) -> None:
    """Whatever sections the recipe has beside those of the top, and whatever keys in them."""
    config = resolve({**SMALL, "recipe": recipe, "pair": {"rho": 0.2}, "train": {**SMALL["train"], "beta": 0.3}})
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump(config))
    again = load(dumped)
    assert [step.config for step in again.planned] == [step.config for step in config.planned]
    assert yaml.safe_load(dump(again)) == yaml.safe_load(dump(config))


def test_dump_writes_every_default(small: Path) -> None:
    assert yaml.safe_load(dump(load(small)))["train"]["weight_decay"] == 0.0
    assert set(yaml.safe_load(dump(load(small)))) == {*Config.model_fields, "pair"}  # of the recipe


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False))
@example(1e-6)  # PyYAML reads 1e-06, without a dot, as text
@example(1e16)
@example(5e-324)
@settings(deadline=None, max_examples=50)
def test_every_way_that_python_writes_a_float_is_that_float(tmp_path_factory: Any, lr: float) -> None:
    path = tmp_path_factory.getbasetemp() / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    assert load(path, [f"train.lr={lr!r}"]).train.lr == lr


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("1E3", 1000.0), ("2.5e+4", 25000.0), ("5.e-1", 0.5), ("1", 1.0), (".5", 0.5)]
)
def test_numbers_that_are_plainly_numbers(small: Path, text: str, value: float) -> None:
    lr = load(small, [f"train.lr={text}"]).train.lr
    assert lr == value
    assert type(lr) is float


def test_a_config_cannot_be_changed(small: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(small).train.lr = 1.0


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_unknown_keys_are_named_with_the_known_ones(small: Path) -> None:
    assert "trian: unknown key; known here: clock, data, engine, evaluate," in refused(small, "trian.lr=1.0")
    message = refused(small, "judge.jugements=2")
    assert "judge.jugements: unknown key" in message
    assert "judgements" in message.split("known here:")[1]
    assert "responses" not in message  # that is a key of sample
    assert "model.pth: unknown key; known here: dtype, path, trust_remote_code" in refused(small, "model.pth=x")


@pytest.mark.parametrize("key", ["name", "iterations", "model", "prompts.path", "sample.max_tokens", "train.lr"])
def test_missing_keys_say_how_to_give_them(small: Path, key: str) -> None:
    data = copy.deepcopy(SMALL)
    section, _, last = key.rpartition(".")
    del (data[section] if section else data)[last]
    small.write_text(yaml.safe_dump(data))
    assert f"{key}: missing; add it to the file or pass {key}=VALUE" in refused(small)


def test_all_mistakes_are_told_at_once(small: Path) -> None:
    message = refused(small, "train.lr=-1", "engine.replicas=0", "typo=1")
    assert all(part in message for part in (str(small), "train.lr=-1", "engine.replicas=0", "typo: unknown key"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("iterations=2.0", "iterations=2.0: input should be a valid integer"),  # not rounded
        ("iterations=1e1", "iterations='1e1': input should be a valid integer"),
        ("iterations=true", "iterations=True: input should be a valid integer"),
        ("iterations='2'", "iterations='2': input should be a valid integer"),
        ("iterations=0", "iterations=0: input should be greater than 0"),
        ("prompts.reuse='true'", "prompts.reuse='true': input should be a valid boolean"),
        ("prompts.reuse=1", "prompts.reuse=1: input should be a valid boolean"),
        ("train.lr=true", "train.lr=True: input should be a valid number"),
        ("train.lr='0.5'", "train.lr='0.5': input should be a valid number"),
        ("train.lr=fast", "train.lr='fast': input should be a valid number"),
        ("train.lr=0", "train.lr=0.0: input should be greater than 0"),
        ("train.lr=.nan", "train.lr=nan: input should be"),
        ("train.lr=", "train.lr=None: input should be a valid number"),
        ("sample.top_p=1.5", "sample.top_p=1.5: input should be less than or equal to 1"),
        ("sample.responses=1", "sample.responses=1: input should be greater than or equal to 2"),
        (
            "judge.kind=numbers",
            "judge.kind='numbers': known here: text, structured, digits, yes_no, true_false, function, answer, or",
        ),
        ("judge=null", "judge=None: input should be a valid dictionary"),
        ("model=3", "model=3: input should be a valid dictionary"),
        ("name=2", "name=2: input should be a valid string"),
        ("name=../up", "name='../up': string should match pattern"),
        ('name="ends\\n"', "name='ends\\n': string should match pattern"),
        ("name=''", "name='': string should match pattern"),
        ("name=.hidden", "name='.hidden': string should match pattern"),
    ],
)
def test_wrong_values_are_named_and_never_repaired(small: Path, override: str, said: str) -> None:
    assert said in refused(small, override)


@pytest.mark.parametrize("key", ["train.lr", "sample.temperature"])
@pytest.mark.parametrize("value", [".inf", "1e999", "1" + "0" * 400])
def test_infinite_numbers_are_refused(small: Path, key: str, value: str) -> None:
    assert f"{key}=inf" in refused(small, f"{key}={value}")


SHARED = "ray.share_gpus=true engine.gpus=1 train.gpus=1"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("judge.kind=digits judge.judgements=3", ["judge.judgements: unknown key; known here: endpoint, fence_salt,"]),
        ("judge.kind=function judge.function=a:b judge.judgements=1", ["judge.judgements: unknown key", "timeout_s"]),
        ("judge.kind=function", ["judge.function: missing; add it to the file or pass judge.function=VALUE"]),
        ("judge.function=a:b", ["judge.function: unknown key; known here: endpoint, fence_salt, judgements"]),
        (
            "judge.kind=function judge.function=a:b judge.replicas=2",
            ["judge.replicas=2", "judge.kind=function", "no engine judges"],
        ),
        ("train.lr_final=0.002", ["train.lr_final=0.002 is above train.lr=0.001", "lower it"]),
        ("engine.gpus=2", ["engine.gpus=2 needs engine.kind=async"]),
        ("sample.max_tokens=512", ["sample.max_tokens=512", "engine.max_model_len=512", "lower the first or raise"]),
        ("evaluate.max_tokens=600", ["evaluate.max_tokens=600", "engine.max_model_len=512"]),
        ("judge.max_tokens=512", ["judge.max_tokens=512", "engine.max_model_len=512"]),
        ("judge.kind=structured judge.max_tokens=512", ["judge.max_tokens=512", "engine.max_model_len=512"]),
        ("model.dtype=bfloat16", ["model.dtype=bfloat16", "use model.dtype=float32"]),
        (
            "model.dtype=bfloat16 train.gpus=1",
            ["model.dtype=bfloat16", "train.zero_stage=0", "set train.zero_stage=1, 2 or 3"],
        ),
        (f"{SHARED} engine.gpus=2 engine.kind=async", ["engine.gpus=2 with ray.share_gpus=true", "set it to 1"]),
        (f"{SHARED} train.gpus=0", ["train.gpus=0 with ray.share_gpus=true", "set it to 1"]),
        (f"{SHARED} clock.kind=online", ["clock.kind=online with ray.share_gpus=true", "leave out"]),
        (f"{SHARED} train.workers=2", ["train.workers=2 with ray.share_gpus=true", "there are 1", "raise engine.rep"]),
        (
            f"{SHARED} train.candidate_every_steps=1 train.choose=score train.early_stop=true prompts.validation=30",
            ["train.early_stop=true with ray.share_gpus=true", "set one of them to false"],
        ),
        ("train.deepspeed.bf16.enabled=true", ["train.deepspeed.bf16", "not yours to set"]),
        ("train.deepspeed.zero_optimization.stage=1", ["train.deepspeed.zero_optimization.stage", "not yours to set"]),
        ("train.deepspeed.zero_optimization=3", ["train.deepspeed.zero_optimization=3", "mapping"]),
    ],
)
def test_impossible_combinations_name_keys_values_and_remedy(small: Path, overrides: str, said: list[str]) -> None:
    message = refused(small, *overrides.split())
    assert [part for part in said if part not in message] == []


@pytest.mark.parametrize(
    "overrides",
    [
        "judge.kind=text judge.judgements=3",
        "judge.kind=function judge.function=a:b",
        "judge.kind=digits judge.replicas=1",
        "train.lr_final=0.001",
        "train.loss=ipo",
        "engine.gpus=1",
        "engine.gpus=2 engine.kind=async",
        "sample.max_tokens=511",
        "model.dtype=bfloat16 engine.gpus=1 train.zero_stage=1",
        "model.dtype=bfloat16 train.gpus=1 train.zero_stage=3",
        f"{SHARED} engine.replicas=2 train.workers=2",
        'train.deepspeed={"zero_optimization":{"offload_optimizer":{"device":"cpu"}}}',
    ],
)
def test_the_possible_neighbours_of_these_load(small: Path, overrides: str) -> None:
    config = yaml.safe_load(dump(load(small, overrides.split())))
    for override in overrides.split():
        section, key = override.split("=")[0].split(".")
        assert config[section][key] == yaml.safe_load(override.split("=")[1])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@given(section=st.sampled_from(sorted(Config.model_fields)), value=ANYTHING, data=st.data())
@settings(deadline=None, max_examples=150)
def test_whatever_stands_in_a_config_it_is_taken_or_refused_by_name(section: str, value: Any, data: Any) -> None:
    fields = getattr(Config.model_fields[section].annotation, "model_fields", None)
    if fields and data.draw(st.booleans()):
        base = SMALL.get(section, {})
        key = data.draw(st.sampled_from(sorted(fields)))
        value = {**(base if isinstance(base, dict) else {"path": base}), key: value}
    try:
        named = resolve({**SMALL, section: value}).model_fields_set
    except ConfigError as error:
        named = str(error)
    assert section in named


# -- files and overrides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must be a mapping"),
        (b"- name\n- seed\n", "must be a mapping"),
        (b"just words", "must be a mapping"),
        (b"name: [a\n", "not valid YAML"),
        (b"\tname: a\n", "not valid YAML"),
        (b"name: \xff\xfe\n", "not valid YAML"),
        (b"? [a]\n: b\n", "not valid YAML"),
        (b"name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),  # nothing is executed
        (b"name: 2024-31-12\n", "not valid YAML"),  # PyYAML makes a date of it, in vain
        (b"name: !!int ''\n", "not valid YAML"),
        (b"name: !!bool 7\n", "not valid YAML"),
        (b"name: " + b"[" * 5000, "not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert said in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert f"{tmp_path / 'no.yaml'}: No such file or directory; give the path" in refused(tmp_path / "no.yaml")
    assert f"{tmp_path}: Is a directory; give the path" in refused(tmp_path)


def test_a_key_written_twice_is_refused(small: Path) -> None:
    """PyYAML takes the last one, and the first would be gone without a word."""
    text = small.read_text()
    small.write_text(text + "train: {lr: 0.5, pairs_per_step: 2}\n")
    assert "the key 'train' stands twice" in refused(small)
    small.write_text(text + "pair: {rho: 0.1, ties: first, 'rho': 0.2}\n")
    assert "the key 'rho' stands twice" in refused(small)
    small.write_text(text)
    assert "the key 'lr' stands twice" in refused(small, "train={lr: 1, lr: 2, pairs_per_step: 2}")


def test_a_key_may_replace_one_that_is_merged_in(small: Path) -> None:
    text = "evaluate: &deep\n  <<: &base {max_tokens: 9, top_p: 0.3}\n  top_p: 0.4\n"
    small.write_text(text + small.read_text().replace("sample:\n", "sample:\n  <<: *deep\n"))
    config = load(small)
    assert (config.evaluate.max_tokens, config.evaluate.top_p) == (9, 0.4)
    assert (config.sample.max_tokens, config.sample.top_p) == (24, 0.4)


def test_overrides_are_yaml(small: Path) -> None:
    config = load(
        small,
        [
            "train.lr=2e-5",
            "prompts.reuse=true",
            "judge.judgements=5",
            "trackers.wandb.project='12'",
            "prompts.path=a=b.jsonl",  # the first = separates
            "pair.max_chosen_chars=100",  # a section that the file does not have
            "pair.max_chosen_chars=null",  # the last one counts
            "sample={max_tokens: 9, top_p: 0.5}",  # a whole section: its other keys are defaults again
        ],
    )
    assert config.train.lr == 2e-5
    assert config.prompts.reuse is True
    assert config.judge.judgements == 5
    assert config.trackers.wandb.project == "12"
    assert config.prompts.path == "a=b.jsonl"
    assert config.planned[0].config.pair.max_chosen_chars is None
    assert (config.sample.max_tokens, config.sample.top_p, config.sample.responses) == (9, 0.5, 4)


def test_the_short_way_to_name_a_model_takes_overrides_too(small: Path) -> None:
    assert load(small).model.path == "some/id"
    dtyped = load(small, ["model.dtype=bfloat16", "engine.gpus=1", "train.zero_stage=1"]).model
    assert (dtyped.path, dtyped.dtype) == ("some/id", "bfloat16")
    swapped = load(small, ["model=other/id", "model.trust_remote_code=true"]).model
    assert (swapped.path, swapped.trust_remote_code) == ("other/id", True)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr", "'train.lr': overrides are written key.sub=value"),
        ("--lr", "'--lr': overrides are written key.sub=value"),
        ("=5", "'=5': overrides are written key.sub=value"),
        ("name=[a", "'name=[a': the value is not valid YAML; quote it, as in name='\"text\"'"),
        ("name=@x", "'name=@x': the value is not valid YAML"),
        ("name=2024-31-12", "'name=2024-31-12': the value is not valid YAML"),
        ("iterations.sub=1", "'iterations.sub=1': iterations is not a section"),
        ("name.path=x", "'name.path=x': name is not a section"),  # the short way is the model's alone
        ("train.lr.sub=1", "'train.lr.sub=1': lr is not a section"),
        ("train..lr=1", "no step uses it"),
    ],
)
def test_overrides_that_are_none(small: Path, override: str, said: str) -> None:
    assert said in refused(small, override)


# -- properties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        (["judge.kind=text"], 3),
        (["judge.kind=structured"], 3),
        (["judge.kind=text", "judge.judgements=11"], 11),
        (["judge.kind=digits"], 1),
        (["judge.kind=function", "judge.function=a:b"], 1),
    ],
)
def test_judgements_per_response(small: Path, overrides: list[str], number: int) -> None:
    assert load(small, overrides).judge.per_response == number


def test_the_run_folder_is_absolute(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    assert load(small).folder == tmp_path / "runs" / "small"
    assert load(small, ["runs=~/results"]).folder == Path("/home/ann/results/small")
    assert load(small, ["runs=/data/runs", "name=try2"]).folder == Path("/data/runs/try2")
    with pytest.raises(ConfigError, match="runs=~nobody-of-this-name/results: that user has no home folder"):
        _ = load(small, ["runs=~nobody-of-this-name/results"]).folder


# -- steps -------------------------------------------------------------------------------------------------------------


def test_a_step_changes_one_iteration() -> None:
    steps = [{"name": "SFT", "recipe": "sft", "sources": ["a.jsonl"], "train": {"lr": 0.25}}, {"pair": {"rho": 0.1}}]
    config = resolve({**SMALL, "pair": {"max_chosen_chars": 50}, "steps": steps})
    first, second = (step.config for step in config.planned)
    assert (first.train.lr, second.train.lr) == (0.25, config.train.lr)
    assert [(source.path, source.weight) for source in first.sources] == [("a.jsonl", 1.0)]
    assert (second.pair.rho, second.pair.max_chosen_chars) == (0.1, 50)  # what a step leaves out is that of the top
    assert [config.model_name(index) for index in range(3)] == ["M0", "SFT", "M2"]
    assert [step.recipe.__name__ for step in config.planned] == ["SFT", "SelfRewarding"]
    assert not hasattr(first.train, "beta")  # a step has its recipe's keys, and no others
    again = resolve(yaml.safe_load(dump(config)))
    assert again.planned == config.planned


def test_the_number_of_steps_is_that_of_the_iterations() -> None:
    data = {key: value for key, value in SMALL.items() if key != "iterations"}
    assert resolve({**data, "steps": [{}, {}, {}]}).iterations == 3


def test_without_steps_all_iterations_are_alike() -> None:
    config = resolve({**SMALL, "iterations": 10**9})
    assert config.model_name(10**9) == "M1000000000"
    first, second = resolve({**SMALL, "recipe": "meta_rewarding"}).planned
    assert (first.name, second.name) == ("M1", "M2")
    assert first.config is second.config
    assert first.config.meta.weights == "iteration"


def test_a_recipe_and_a_judge_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named by package.module:Class, and their keys may stand in a step, or at the top for all steps."""
    (tmp_path / "own_methods.py").write_text(
        "from rsrlm.recipes.self_rewarding import SelfRewarding\n"
        "from rsrlm.judges.rubric import Text\n"
        "from rsrlm.settings.base import Section\n"
        "class Bonus(Section):\n    amount: int = 1\n"
        "class Mine(SelfRewarding):\n"
        "    class Config(SelfRewarding.Config):\n        bonus: Bonus = Bonus()\n        size: int = 3\n"
        "class Strict(Text):\n    class Config(Text.Config):\n        least: int = 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"recipe": "own_methods:Mine", "bonus": {"amount": 5}, "judge": {"kind": "own_methods:Strict", "least": 4}}
    config = resolve({**SMALL, **own, "steps": [{"size": 7}, {"bonus": {"amount": 6}}]})
    first, second = (step.config for step in config.planned)
    assert (first.size, first.bonus.amount, first.judge.least) == (7, 5, 4)
    assert (second.size, second.bonus.amount, second.judge.judgements) == (3, 6, 3)
    assert resolve(yaml.safe_load(dump(config))).planned == config.planned


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=[{}]", "steps has 1 entries for iterations=2; write one for each, or leave out iterations"),
        ("steps=[{}, {pair: {roh: 0.3}}]", "step 1: pair.roh: unknown key; known here: duplicates"),
        ("steps=[{}, {engine: {replicas: 2}}]", "step 1: engine: recipe self_rewarding has no such key; it has judge,"),
        ("steps=[{train: {workers: 2}}, {}]", "step 0: train.workers: unknown key; known here: beta,"),
        ("steps=[{judge: {replicas: 2}}, {}]", "step 0: judge.replicas holds for the whole run; set it at the top"),
        ("steps=[{prompts: {heldout: 1}}, {}]", "step 0: prompts.heldout: unknown key; known here: per_iteration"),
        ("steps=[{name: M2}, {}]", "the models M0, M2, M2 need names of their own"),
        ("steps=[{name: M0}, {}]", "the models M0, M0, M2 need names of their own"),
        ("steps=[{name: a/b}, {}]", "name='a/b' must be letters, digits, '.', '_' and '-'"),
        ("steps=[3, {}]", "steps.0=3: input should be a valid dictionary"),
        ("steps=[{pair: 3}, {}]", "step 0: pair=3: input should be a valid dictionary"),
        ("steps=[{recipe: sft}, {}]", "step 0: sources: missing"),
        ("steps=[{recipe: sft, sources: []}, {}]", "step 0: sources=[]: list should have at least 1 item"),
        ("steps=[{}, {train: {epochs: 2, stop_after_epoch: 3}}]", "step 1: train.stop_after_epoch=3 is after"),
        ("steps=[{name: M.tmp}, {}]", "not end in .tmp or .old"),
        ("steps=[{sources: [a]}, {}]", "step 0: sources: recipe self_rewarding has no such key"),
        ("steps=[{meta: {read: text}}, {}]", "step 0: meta: recipe self_rewarding has no such key"),
        ("meta={read: text}", "meta: unknown key; known here: clock, data,"),
        ("steps=[{recipe: sft, sources: [a], train: {beta: 0.2}}, {}]", "step 0: train.beta: unknown key; known h"),
        (
            "'steps=[{recipe: sft, sources: [a]}, {recipe: sft, sources: [a]}]' train.beta=0.2",
            "train.beta=0.2: no step",
        ),
        ("recipe=dpo", "recipe='dpo': known here: sft, self_rewarding, meta_rewarding, irpo, "),
        ("recipe=no.such:Class", "recipe='no.such:Class': No module named 'no'"),
        ("recipe=json:nothing", "recipe='json:nothing': module 'json' has no attribute 'nothing'"),
        (
            "'steps=[{recipe: meta_rewarding, judge: {kind: structured, temperature: 0}}, {}]'",
            "all judgements of a response would be the same; raise it",
        ),
        ("schedule=[{}]", "schedule is written otherwise: steps: a list with one entry for each iteration"),
        ("wandb.project=x", "wandb is written otherwise: trackers.wandb: {project: NAME}"),
        ("train.method=sft", "train.method is written otherwise: recipe: sft, self_rewarding or meta_rewarding"),
        ("pair.kinds=[judge]", "pair.kinds is written otherwise: recipe: meta_rewarding"),
        ("judge={read: text}", "judge.read is written otherwise: judge.kind: text, structured, digits or function"),
        ("sft.sources=[]", "sft is written otherwise: steps: an entry {recipe: sft,"),
        ("evaluate.judge='{read: text, max_tokens: 9999}'", "evaluate.judge.max_tokens=9999 leaves no room"),
        (
            "judge='{kind: digits, model: x, replicas: 1}' 'steps=[{recipe: sft, sources: [eft]}, {}]' data.trees=x",
            "the model's own judgements, but x judges; make a file with `rsrlm data eft`",
        ),
        ("judge.kind=digits 'steps=[{recipe: sft, sources: [positive]}, {}]'", "whose mean never reaches it; lower it"),
        ("pair.rho=0.5", "pair.rho=0.5: input should be less than 0.5"),
        ("pair='{rho: 0.1, ties: length}'", "pair.ties=length does not apply to pair.rho=0.1"),
        (
            "'steps=[{recipe: meta_rewarding, pair: {kinds: [judge]}}, {}]'",
            "step 0: pair.kinds: unknown key; known here",
        ),
        ("recipe=meta_rewarding judge.kind=digits", "use judge.kind=text or structured, and judge.judgements of 2"),
        ("train.choose=score", "candidates are for choosing among them; set both, or neither"),
        ("train.candidate_every_steps=3", "candidates are for choosing among them; set both, or neither"),
        ("train.early_stop=true", "goes by candidates: set train.candidate_every_steps"),
        ("'steps=[{recipe: sft, sources: [eft]}, {}]'", "which is made from ranked data: set data.trees=PATH"),
        ("data='{ift_share: 0.7, eft_share: 0.4}'", "add up to more than 1; lower them"),
        ("judge='{kind: digits, model: x}'", "judge.model=x needs engines of its own"),
        ("judge.trust_remote_code=true", "judge.trust_remote_code=true is for the code of judge.model, which is not s"),
        ("evaluate.judge.trust_remote_code=true", "is for the code of evaluate.judge.model, which is not set; set it"),
        ("evaluate.judge='{model: x, endpoint: {url: u, model: m}}'", "and evaluate.judge.endpoint: remove one of"),
        ("evaluate.judge.endpoint='{url: u, model: m}'", "compares in text: set evaluate.judge.read=text"),
        (
            "train='{lr: 1, pairs_per_step: 1, candidate_every_steps: 2, choose: duel}'",
            "prompts.validation=0: candidates are chosen by prompts of",
        ),
        ("judge='{kind: digits, endpoint: {url: u, model: m}}'", "judge.endpoint answers in text"),
        ("judge.endpoint='{url: u, model: m, kye: k}'", "judge.endpoint.kye: unknown key; known here: key_env,"),
        (
            "'steps=[{recipe: sft, sources: [{path: a, wieght: 2}]}, {}]'",
            "step 0: sources.0.wieght: unknown key; known",
        ),
        ("watch='{equal_scores: {wran: 1}}'", "watch.equal_scores.wran: unknown key; known here: stop, warn"),
    ],
)
def test_steps_and_combinations_that_are_refused(small: Path, override: str, message: str) -> None:
    assert message in refused(
        small, *(shlex.split(override) if "'" in override or " judge" in override else [override])
    )


def test_fewer_validation_prompts_than_a_figure_needs_are_refused() -> None:
    from rsrlm.config import LEAST_VALIDATION
    from rsrlm.report.metrics import MIN_N

    assert LEAST_VALIDATION == MIN_N


def test_a_job_writes_nothing_where_ray_deletes_it(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray job submit --working-dir .` starts the driver in a copy that Ray keeps for as long as the job."""
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    monkeypatch.delenv("RSRLM_RUNS", raising=False)
    for runs in ("runs", str(package / "runs")):
        with pytest.raises(ConfigError, match=f"runs={runs} lies in the files that Ray keeps of this job") as refused:
            _ = make_config(runs=runs).folder
        assert "set RSRLM_RUNS=/FOLDER, on a disk that all hosts share" in str(refused.value)
    with pytest.raises(ConfigError, match="--out x/found lies in the files that Ray keeps of this job"):
        check_out(Path("x/found"))
    assert make_config(runs="/data/runs").folder == Path("/data/runs/test")
    monkeypatch.setenv("RSRLM_RUNS", "/data/others")
    assert make_config(runs="runs").folder == Path("/data/others/test")
    assert make_config(runs="/data/runs").folder == Path("/data/runs/test")
    monkeypatch.chdir(tmp_path)
    assert make_config(runs="runs").folder == tmp_path / "runs" / "test"


def test_a_section_that_no_step_knows_is_refused_by_key(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"compare\.sofft=False: no step uses it \(recipes: Sppo\); known"):
        make_config(recipe="sppo", compare={"sofft": False})
    make_config(recipe="sppo", pair={}, meta={})  # an empty one says nothing


def test_a_judge_of_two_words_does_not_score_with_its_template(make_config: Any) -> None:
    """Behind an endpoint points are written: a template that asks for True or False gives none."""
    server = {"endpoint": {"url": "http://localhost:1/v1", "model": "x"}, "read": "text"}
    made = make_config(judge={"kind": "true_false"}, evaluate={"judge": server})
    assert (made.validating.kind, made.validating.template) == ("text", "additive")
    own = make_config(judge={"kind": "digits", "template": "buckets"}, evaluate={"judge": server})
    assert own.validating.template == "buckets"
