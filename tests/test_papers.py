"""Every choice of the two papers is a key whose change alone alters requests, records or loss, and in the direction
that the paper means; what is not done stands in the README with its reason.

SR is Self-Rewarding (2401.10020v3), MR Meta-Rewarding (2407.19594v2); numbers are sections.
"""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import context_of, engines_of, groups_of, judge_pairs, recipe_of
from spine import World

from rsrlm import meta_judging
from rsrlm.chat import ChatEncoder
from rsrlm.commands import plan as planning
from rsrlm.config import Config, load
from rsrlm.data import seed_data, self_instruct
from rsrlm.data.prompt_pool import PromptPool
from rsrlm.data.prompts import deal
from rsrlm.data.ranked import RankedPrompt, Reply
from rsrlm.judges.base import Origin, judge_of, sampling_of
from rsrlm.judges.pairwise import Match, duel_judge, meta_judge
from rsrlm.losses.schedule import lr_at
from rsrlm.pairing import best_against_worst
from rsrlm.recipes import eft, sft
from rsrlm.recipes.meta_rewarding import MetaRewarding
from rsrlm.recipes.self_rewarding import SelfRewarding
from rsrlm.records import (
    Completion,
    Group,
    Judgement,
    NoPair,
    Preferred,
    Prompt,
    Request,
    Response,
    Sampling,
    Scored,
)
from rsrlm.runtime.dropout import set_dropout
from rsrlm.runtime.shares import steps_of

ROOT = Path(__file__).parent.parent
SAMPLING = Sampling(temperature=0.7, top_p=1.0, max_tokens=9, seed=1)


# -- what is looked at -------------------------------------------------------------------------------------------------


class Recorder:
    """Keeps what an engine is asked, and always answers the same."""

    slots = 8

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        return Completion(
            request_id=request.id, token_ids=(5, 2), text="Fine.\nScore: 3", finish_reason="stop", weight_version="M0",
            label_logprobs=(-1.0,) * len(request.label_ids),
        )  # fmt: skip


def response(index: int, text: str, group: str = "00/p") -> Response:
    return Response(
        id=f"{group}/{index}", prompt_id=group.rpartition("/")[2], index=index, role="actor", text=text,
        token_ids=(10 + index, 2), prompt_token_ids=(1,), finish_reason="stop", weight_version="M0", sampling=SAMPLING,
    )  # fmt: skip


def judgement(response_id: str, index: int, points: float, text: str = "") -> Judgement:
    return Judgement(
        id=f"{response_id}#{index}", prompt_id="p", response_id=response_id, index=index, role="judge",
        judge="additive", text=text or f"{index}" * 900, token_ids=(30 + index, 2), finish_reason="stop",
        weight_version="M0", sampling=SAMPLING, verdict=Scored(points=points),
    )  # fmt: skip


RESPONSES = [response(i, text) for i, text in enumerate(["x" * 3000, "x" * 400, "x" * 50, "x" * 50, "y" * 700])]
POINTS = {f"00/p/{i}": Scored(points=points) for i, points in enumerate([4.0, 3.8, 1.0, 4.0, 1.2])}


def recipe_config(config: Config) -> Any:
    """What the first iteration's recipe is made with."""
    return config.planned[0].config


def asked_of_the_judge(config: Config, encoder: ChatEncoder) -> list[Request]:
    engine = Recorder()
    judge = judge_of(config.judge, context_of(config, encoder))
    origin = Origin(iteration=0, name="00/p/2")
    made = asyncio.run(judge(engines_of(engine), Prompt(id="p", text="Why?"), RESPONSES[2], origin))
    assert [one.verdict for one in made] == [Scored(points=3.0)] * len(made)
    return engine.requests


def asked_of_the_meta_judge(config: Config, encoder: ChatEncoder) -> list[Request]:
    engine = Recorder()
    fields = {"instruction": "Why?", "response": "So.", "judgement_a": "Score: 1", "judgement_b": "Score: 2"}
    match = Match(
        id="c", prompt_id="p", response_id="r", index=0, role="meta", fields=fields, seed=1, fence_seed=2, priority=0
    )
    judge = meta_judge(recipe_config(config).meta, context_of(config, encoder))
    asyncio.run(judge(engines_of(engine), [match]))
    return engine.requests


def actor_pair(config: Config, encoder: ChatEncoder) -> Any:
    return best_against_worst(RESPONSES, POINTS, recipe_config(config).pair, 0, config.seed)


def pair_of_texts(config: Config, *judged: tuple[str, float]) -> Any:
    """The pair of responses with these texts and points."""
    responses = [response(index, text) for index, (text, _) in enumerate(judged)]
    points = {one.id: Scored(points=points) for one, (_, points) in zip(responses, judged, strict=True)}
    return best_against_worst(responses, points, recipe_config(config).pair, 0)


def judge_pair(config: Config, encoder: ChatEncoder) -> Any:
    """One group where the first position wins all but once, and one where the second does."""
    groups = []
    for name, wins in (("p", {(0, 1): 1, (1, 0): 1, (0, 2): 1, (2, 0): 1, (1, 2): 1, (2, 1): -1}),
                       ("q", {(0, 1): -1, (1, 0): -1, (0, 2): -1, (2, 0): 1, (1, 2): -1, (2, 1): -1})):  # fmt: skip
        shown = response(0, "an answer", f"00/{name}")
        texts = ("same" * 300, "same" * 300, "other" * 300)
        found = [judgement(shown.id, i, points, texts[i]) for i, points in enumerate([1.0, 4.0, 2.0])]
        matches = meta_judging.matches(meta_judging.contestants(found, recipe_config(config).meta))
        comparisons = tuple(
            Judgement(
                id=meta_judging.comparison_id(a, b), prompt_id=name, response_id=shown.id, index=a.index, role="meta",
                judge="meta", text="", token_ids=(), finish_reason="stop", weight_version="M0", sampling=SAMPLING,
                verdict=Preferred(winner="A" if wins[a.index, b.index] == 1 else "B"),
            )
            for a, b in matches
        )  # fmt: skip
        groups.append(
            Group(id=f"00/{name}", iteration=0, prompt=Prompt(id=name, text="Why?"), responses=(shown,),
                  judgements=tuple(found), comparisons=comparisons, no_pair_reason="x")
        )  # fmt: skip
    found, _ = judge_pairs(recipe_of(config, encoder), groups)
    return found["00/p"], found["00/q"]


def produced(config: Config, encoder: ChatEncoder) -> Any:
    """Everything that is asked for one prompt, in an order of its own, and the pair of responses."""
    engine = Recorder()
    (group,) = groups_of(recipe_of(config, encoder), engine, [Prompt(id="p", text="Why?")])
    kinds = {"~": [], "#": [], "/": []}  # comparisons, judgements, responses
    for request in engine.requests:
        kinds[next(mark for mark in kinds if mark in request.id)].append(request)
    assert len(kinds["~"]) == len(group.comparisons)
    return SimpleNamespace(responses=kinds["/"], judgements=kinds["#"], comparisons=kinds["~"])


def replies_judged(config: Config, encoder: ChatEncoder) -> int:
    engine = Recorder()
    prompt = RankedPrompt(id="p", text="Why?", replies=(Reply(id="r", text="So.", rank=0.0),))
    judge = judge_of(config.judge, context_of(config, encoder))
    asyncio.run(eft.judge_replies([prompt], judge, engines_of(engine), 0, config.data.eft_judgements))
    return len(engine.requests)


def trained_from(config: Config, encoder: ChatEncoder) -> list[str]:
    """The model that each iteration's training starts from, in a run with scripted engines and learner."""
    world = World(config, [Prompt(id=f"p{i}", text=f"{i}?") for i in range(8)])
    world.start()
    return [job.source for job in world.jobs]


def learning_rates(config: Config, encoder: ChatEncoder) -> list[float]:
    train = recipe_config(config).train
    return [
        lr_at(step, 10, lr=train.lr, lr_final=train.lr_final, warmup_steps=train.warmup_steps,
                     schedule=train.schedule)
        for step in range(10)
    ]  # fmt: skip


def steps(config: Config, encoder: ChatEncoder) -> Any:
    train = recipe_config(config).train
    return [len(step) for step in steps_of(11, train, 0, 0)][: train.steps(11)]


def requests(config: Config, encoder: ChatEncoder) -> Any:
    from rsrlm.model import folder_of

    demands = [step.recipe.demand_of(step.config, step.config.prompts.per_iteration) for step in config.planned]
    planned = planning.plan(config, demands, folder_of(config.model))
    return SimpleNamespace(**planned.requests, tokens=planned.generated_tokens)


def loss(config: Config, encoder: ChatEncoder) -> float:
    import torch

    from rsrlm.losses.packing import pack
    from rsrlm.losses.pair import Labels, pair_loss

    batch = pack([((1, 2), (3, 4), (5,))])
    logps, reference, one = torch.tensor([-1.0, -2.0, -2.5]), torch.tensor([-1.5, -2.0, -2.0]), torch.ones(1)
    labels = Labels(weight_P=one, target_P=one, score_S=torch.tensor([1.0, 0.0]))
    found = pair_loss(logps, reference, batch, one, labels, recipe_config(config).train)
    return float(found.loss)


def dropout(config: Config, encoder: ChatEncoder) -> float:
    from transformers import LlamaConfig

    model = LlamaConfig()
    set_dropout(model, recipe_config(config).train.dropout)
    return float(model.attention_dropout)


def divided(config: Config, encoder: ChatEncoder) -> Any:
    parts = seed_data.divide(config.data)
    ift = sft.ift(parts.ift, encoder, config.data)[0]
    ids = [{one.id for one in part} for part in (parts.ift, parts.eft, parts.evaluation)]
    return (*ids, len(ift))


def kept_judgements(config: Config, encoder: ChatEncoder) -> Any:
    prompts, found = [], {}
    for name, points in (
        ("a", [5.0, 4.0, 4.5]),
        ("b", [4.0, 4.0, 1.0]),
        ("c", [4.0, 2.0, 1.0]),
        ("d", [4.0, 3.0, 2.0]),
    ):
        replies = tuple(Reply(id=f"{name}{i}", text=f"{i}", rank=float(i)) for i in range(3))
        prompts.append(RankedPrompt(id=name, text="?", replies=replies))
        for i, value in enumerate(points):
            found[f"{name}{i}"] = [judgement(f"00/{name}/{i}", sample, value) for sample in range(2)]
    kept, _ = eft.accepted(prompts, found, config.data, config.seed)
    return [one.judgement.id for one in kept], [eft.points_of(one.judgement) for one in kept]


def mixture(config: Config, encoder: ChatEncoder) -> Any:
    own = recipe_config(config)
    judgements = tuple(judgement(one.id, 0, POINTS[one.id].points) for one in RESPONSES)
    group = Group(
        id="00/p", iteration=0, prompt=Prompt(id="p", text="?"), responses=tuple(RESPONSES), judgements=judgements,
        no_pair_reason="x",
    )  # fmt: skip
    examples = sft.positive([group], own.positive_score)
    sources = [(source.path, source.weight, examples) for source in own.sources]
    return [item.id for item in sft.mixed(sources, own.data.minimum, config.seed, 0)]


def made_prompts(config: Config, encoder: ChatEncoder) -> Any:
    rule = config.self_instruct
    texts = [f"Prompt number {i} about {topic}" for i, topic in enumerate(["tea", "cars", "rain", "bread"] * 5)]
    numbers = {"from_seeds": rule.from_seeds, "from_generated": rule.from_generated}
    shown = self_instruct.demonstrations(texts[:12], texts[12:], seed=config.seed, batch=0, **numbers)
    text = (
        " Explain how tea is made at home\n10. Describe a red car\n11. Name\n---\n12. Explain how tea is brewed at home"
    )
    found = self_instruct.Continuation(request=0, text=text, cut=False, model="M", demonstrations=())
    kept, reasons = self_instruct.select(
        [found], PromptPool(max_rouge=rule.max_rouge),
        self_instruct.Filters(min_words=rule.min_words, max_words=rule.max_words),
        cut_at_separator=rule.cut_at_separator,
    )  # fmt: skip
    numbers_shown = [int(text.split()[2]) for text in shown]
    return SimpleNamespace(
        seeds=sum(number < 12 for number in numbers_shown), made=sum(number >= 12 for number in numbers_shown),
        kept=[one.text for one in kept], reasons=reasons, sampling=sampling_of(rule, 0),
    )  # fmt: skip


def dealt(config: Config, encoder: ChatEncoder) -> Any:
    found = deal([Prompt(id=f"p{i}", text=f"{i}?") for i in range(80)], config)
    return len(found.heldout), len(found.validation), [len(hand) for hand in found.hands]


def pairs_by_iteration(config: Config, encoder: ChatEncoder) -> Any:
    return [best_against_worst(RESPONSES, POINTS, step.config.pair, 0, config.seed) for step in config.planned]


def comparison_asks(config: Config, encoder: ChatEncoder) -> bool:
    """Whether engines of ours are asked to compare."""
    return duel_judge(config, context_of(config, encoder)).needs(9) > 0


# -- the rows ----------------------------------------------------------------------------------------------------------

Look = Callable[[Config, ChatEncoder], Any]


def meta_step(**keys: Any) -> dict[str, Any]:
    """One iteration of Meta-Rewarding with these keys of its own."""
    return {"steps": [{"recipe": "meta_rewarding", **keys}]}


def sft_step(**keys: Any) -> dict[str, Any]:
    return {"steps": [{"recipe": "sft", **keys}]}


STRUCTURED = {"judge": {"kind": "structured", "judgements": 3, "max_tokens": 60}}
BOTH = {**STRUCTURED, **meta_step(), "engine": {"max_model_len": 2048}}
TREES = {"data": {"trees": "TREES", "ift_share": 0.5, "eft_share": 0.3, "minimum": 1}, **STRUCTURED}
TEXT_DUEL = {"evaluate": {"judge": {"read": "text"}}}
POSITIVE = {"sources": [{"path": "positive"}], "positive_score": 4.0}
MIXED = {**sft_step(**POSITIVE), "data": {"minimum": 1}}

# (row, what is looked at, config, change of one key, what the change does to what is looked at)
Check = Callable[[Any, Any], bool]
Row = tuple[str, Look, dict[str, Any], dict[str, Any], Check]


def sampled(name: str, value: float) -> Check:
    """All requests have this value of a sampling parameter after the change, and none before."""
    return lambda before, after: (
        {getattr(request.sampling, name) for request in after} == {value}
        and value not in {getattr(request.sampling, name) for request in before}
    )


def pair_of(*indices: tuple[int, int]) -> Check:
    """Chosen and rejected before and after."""
    return lambda before, after: (
        [tuple(int(name[-1]) for name in (pair.chosen_id, pair.rejected_id)) for pair in (before, after)]
        == list(indices)
    )


def gap(pair: Any) -> float:
    return float(pair.chosen_score - pair.rejected_score)


ROWS: list[Row] = [
    ("SR 2.4: an iteration of supervised fine-tuning, which answers no prompts", dealt, {"iterations": 2},
     {"steps": [{"recipe": "sft", "sources": [{"path": "x.jsonl"}]}, {}]},
     lambda b, a: (b[2], a[2]) == ([4, 4], [0, 4])),
    ("SR 2.4: M1 starts from M0 again, M2 and M3 from the model before", trained_from, {
        "iterations": 2, "judge": {"kind": "text", "judgements": 2}, "evaluate": {"duel": False}},
     {"train": {"start": "first"}}, lambda b, a: (b, a) == (["M0", "M1"], ["M0", "M0"])),
    ("SR 3.1.1: seed data", divided, TREES, {"data": {"ift_share": 0.2}},
     lambda b, a: a[0] < b[0] and a[1] == b[1] and a[2] > b[2]),
    ("SR 3.1.1: trees for EFT, and those left for evaluation", divided, TREES, {"data": {"eft_share": 0.1}},
     lambda b, a: a[1] < b[1] and len(a[2]) > len(b[2])),
    ("SR 3.1.1: English", divided, TREES, {"data": {"language": "de"}},
     lambda b, a: all(b[:3]) and not any(a[:3])),
    ("SR 3.1.1: 3,200 IFT examples", divided, TREES, {"data": {"max_ift": 3}}, lambda b, a: b[3] > a[3] == 3),
    ("SR 3.1.1: 1,630 EFT examples", kept_judgements, TREES, {"data": {"max_eft": 1}},
     lambda b, a: len(b[0]) > len(a[0]) == 1),
    # The orders of a (5, 4, 4.5) and b (4, 4, 1) disagree with people, those of c and d agree.
    ("SR 3.1.1: the order of the scores agrees with people", kept_judgements, TREES, {"data": {"accept": "pairs"}},
     lambda b, a: set(b[0]) < set(a[0]) and {one[3] for one in b[0]} == {"c", "d"} < {one[3] for one in a[0]}),
    # 4, 2, 1 and 4, 3, 2: of the most common, the two 4s, as many stay as make a fifth: 1 of 5.
    ("SR 3.1.1: the most common score is thinned", kept_judgements, TREES, {"data": {"most_common": 0.2}},
     lambda b, a: (b[1].count(4.0), a[1].count(4.0)) == (2, 1) and len(b[0]) - len(a[0]) == 1),
    ("SR 3.1.1: judgements kept for a reply (open)", kept_judgements, TREES, {"data": {"eft_per_reply": 2}},
     lambda b, a: len(a[0]) == 2 * len(b[0])),
    ("SR 3.1.1: judgements sampled for a reply (open)", replies_judged, TREES, {"data": {"eft_judgements": 7}},
     lambda b, a: (b, a) == (3, 7)),
    ("SR 2.1: IFT and EFT are mixed", mixture, MIXED,
     sft_step(**{**POSITIVE, "sources": [{"path": "positive", "weight": 2.0}]}),
     lambda b, a: sorted(a) == sorted(b * 2)),
    ("SR A.4: positive examples are those of score 5", mixture, MIXED, sft_step(**{**POSITIVE, "positive_score": 3.8}),
     lambda b, a: set(a) - set(b) == {"00/p/1"}),
    ("SR 3.1.3: T of the prompt maker", made_prompts, {}, {"self_instruct": {"temperature": 0.9}},
     lambda b, a: (b.sampling.temperature, a.sampling.temperature) == (0.6, 0.9)),
    ("SR 3.1.3: top-p of the prompt maker", made_prompts, {}, {"self_instruct": {"top_p": 0.5}},
     lambda b, a: (b.sampling.top_p, a.sampling.top_p) == (0.9, 0.5)),
    ("SR 3.1.3: 6 demonstrations from the seeds", made_prompts, {}, {"self_instruct": {"from_seeds": 5}},
     lambda b, a: (b.seeds, b.made, a.seeds, a.made) == (6, 2, 5, 2)),
    ("SR 3.1.3: 2 demonstrations from those made", made_prompts, {}, {"self_instruct": {"from_generated": 1}},
     lambda b, a: (b.seeds, b.made, a.seeds, a.made) == (6, 2, 6, 1)),
    ("SR 3.1.3: ROUGE-L filter", made_prompts, {}, {"self_instruct": {"max_rouge": 0.99}},
     lambda b, a: set(a.kept) - set(b.kept) == {"Explain how tea is brewed at home"}),
    ("SR 3.1.3: length filter", made_prompts, {}, {"self_instruct": {"min_words": 6}},
     lambda b, a: set(b.kept) - set(a.kept) == {"Describe a red car"}),
    ("SR A.5: cut at the separator", made_prompts, {}, {"self_instruct": {"cut_at_separator": True}},
     lambda b, a: (b.reasons[self_instruct.TOO_SIMILAR], a.reasons[self_instruct.TOO_SIMILAR]) == (1, 0)),
    ("SR 2.2, fig. 2: the judge's prompt, or another (fig. 7)", asked_of_the_judge, STRUCTURED,
     {"judge": {"template": "buckets"}},
     lambda b, a: b[0].regex.endswith(" [012345]") and a[0].regex.endswith(" [12345]")),
    ("SR 3.1.3: 3 judgements", produced, STRUCTURED, {"judge": {"judgements": 11}},
     lambda b, a: (len(b.judgements), len(a.judgements)) == (2 * 3, 2 * 11)),
    ("SR 3.1.3: T of the judge", asked_of_the_judge, STRUCTURED, {"judge": {"temperature": 0.2}},
     sampled("temperature", 0.2)),
    ("SR 3.1.3: top-p of the judge", asked_of_the_judge, STRUCTURED, {"judge": {"top_p": 0.5}}, sampled("top_p", 0.5)),
    ("SR 3.1.3: 4 candidates", produced, {}, {"sample": {"responses": 7}},
     lambda b, a: (len(b.responses), len(a.responses)) == (2, 7)),
    ("SR 3.1.3: T of the actor", produced, {}, {"sample": {"temperature": 0.3}},
     lambda b, a: sampled("temperature", 0.3)(b.responses, a.responses)),
    ("SR 3.1.3: top-p of the actor", produced, {}, {"sample": {"top_p": 0.9}},
     lambda b, a: sampled("top_p", 0.9)(b.responses, a.responses)),
    ("SR 3.1.3: prompts of an iteration", dealt, {}, {"prompts": {"per_iteration": 5}},
     lambda b, a: (b[2], a[2]) == ([4], [5])),
    ("SR 3.1.3: learning rate", learning_rates, {}, {"train": {"lr": 2e-3}},
     lambda b, a: (max(b), max(a)) == (1e-3, 2e-3)),
    ("SR 3.1.3: final learning rate", learning_rates, {}, {"train": {"lr_final": 1e-4}},
     lambda b, a: (b[-1], a[-1]) == (pytest.approx(0), pytest.approx(1e-4))),
    # A third of the way: (1 + cos 60 degrees) / 2 = 3/4, and 2/3 on a line.
    ("SR 3.1.3: cosine", learning_rates, {}, {"train": {"schedule": "linear"}},
     lambda b, a: (b[3], a[3]) == (pytest.approx(0.75e-3), pytest.approx(2e-3 / 3))),
    ("SR 3.1.3: batch", steps, {}, {"train": {"pairs_per_step": 3}},
     lambda b, a: (b, a) == ([2, 2, 2, 2, 2, 1], [3, 3, 3, 2])),
    ("SR 3.1.3: dropout", dropout, {}, {"train": {"dropout": 0.1}}, lambda b, a: (b, a) == (0.0, 0.1)),
    # Chosen is 0.5 nats likelier than before and rejected 0.5 less: h = 1.
    ("SR 3.1.3, MR A.3: beta", loss, {}, {"train": {"beta": 0.5}},
     lambda b, a: (b, a) == (pytest.approx(math.log1p(math.exp(-0.1))), pytest.approx(math.log1p(math.exp(-0.5))))),
    ("SR 3.1.3: a candidate every 200 steps, chosen by a judge", requests, {"prompts": {"validation": 30}},
     {"train": {"candidate_every_steps": 200, "choose": "duel"}},
     lambda b, a: [getattr(one, f"validation {what}") for one in (b, a) for what in ("answers", "duels")]
     == [0, 0, 30 * 2, 30 * 2]),  # the model before and the last one, in both orders
    ("SR 3.1.3: 253 prompts that choose", dealt, {}, {"prompts": {"validation": 31}},
     lambda b, a: (b[:2], a[:2]) == ((2, 0), (2, 31))),
    ("SR 3.2.1: 256 prompts that report", dealt, {}, {"prompts": {"heldout": 3}},
     lambda b, a: (b[:2], a[:2]) == ((2, 0), (3, 0))),
    # 2 prompts in both orders: 4 verdicts of 1 token, or of at most 300.
    ("SR 3.2.1, A.6: how a comparison is read", requests, {}, {"evaluate": {"judge": {"read": "text"}}},
     lambda b, a: a.tokens - b.tokens == 4 * 299),
    ("SR 3.1.3, 3.2.1: who compares", comparison_asks, TEXT_DUEL,
     {"evaluate": {"judge": {"read": "text", "endpoint": {"url": "http://localhost:1/v1", "model": "claude"}}}},
     lambda b, a: b and not a),  # our engines are not asked
    ("MR 3.1: which kinds of pairs", produced, BOTH, {"steps": [{"recipe": "self_rewarding"}]},
     lambda b, a: (len(b.comparisons), len(a.comparisons)) == (6, 0)),
    ("MR 2.2: identical responses are removed", lambda c, e: pair_of_texts(c, ("a", 1.0), ("a", 2.0)), {},
     {"pair": {"duplicates": "drop"}},
     lambda b, a: b.chosen_id == "00/p/1" and a == NoPair(reason="fewer than two scored responses")),
    # At rho 0.3 good are 3.1 and more, of which the fourth is the shortest; bad 1.9 and less: the last is the longest.
    ("MR 2.2: rho", actor_pair, {}, {"pair": {"rho": 0.3}}, pair_of((0, 2), (3, 4))),
    ("MR 2.2: ties at rho 0 (open)", actor_pair, {}, {"pair": {"ties": "length"}}, pair_of((0, 2), (3, 2))),
    ("MR A.3: chosen of at most 2,500 characters", actor_pair, {}, {"pair": {"max_chosen_chars": 2500}},
     lambda b, a: b.chosen_id == "00/p/0" and a == NoPair(reason="chosen too long")),
    ("MR 2.3, fig. 2: the meta-judge's prompt and reading", asked_of_the_meta_judge, BOTH,
     meta_step(meta={"read": "letters"}),
     lambda b, a: (len(b[0].label_ids), len(a[0].label_ids), a[0].sampling.max_tokens) == (0, 2, 1)),
    ("MR: sampling of the meta-judge (open)", asked_of_the_meta_judge, BOTH, meta_step(meta={"temperature": 0.1}),
     sampled("temperature", 0.1)),
    ("MR 2.3: every two judgements in both orders", produced, BOTH, {"judge": {"judgements": 11}},
     lambda b, a: (len(b.comparisons), len(a.comparisons)) == (3 * 2, 11 * 10)),
    ("MR 2.3: identical judgements (open)", judge_pair, BOTH, meta_step(meta={"collapse": True}),
     lambda b, a: b[0].id == "00/p/0#1>2" and a[0] == NoPair(reason="equal judgements") and a[1].id == "00/q/0#2>0"),
    # p: 1 beats 2 in both orders, all else is position. Counted in p alone, where the first position wins 5 of 6, its
    # wins weigh 1/6 instead of the 1/2 of both prompts together: they blur the order of 1 and 2 less.
    ("MR 2.3: scope of the position weights (open)", judge_pair, BOTH, meta_step(meta={"weights": "prompt"}),
     lambda b, a: [one.id for one in (b[0], a[0])] == ["00/p/0#1>2"] * 2 and gap(a[0]) > 1.2 * gap(b[0])),
    ("MR A.3: chosen judgement of at most 1,100 characters", judge_pair, BOTH,
     meta_step(meta={"max_chosen_chars": 1100}),
     lambda b, a: b[0].chosen_id == "00/p/0#1" and a[0] == NoPair(reason="chosen too long")),
    ("MR A.3: 10 epochs", steps, {}, {"train": {"epochs": 10}}, lambda b, a: a == b * 10),
    ("MR A.3: the checkpoint of epoch 5", steps, {"train": {"epochs": 10}}, {"train": {"stop_after_epoch": 5}},
     lambda b, a: a * 2 == b),
    ("MR A.3: a setting of its own for each iteration", pairs_by_iteration, {"iterations": 2},
     {"steps": [{}, {"pair": {"rho": 0.3}}]},
     lambda b, a: a[0] == b[0] == b[1] and pair_of((0, 2), (3, 4))(*a)),
    ("DPO and others: IPO", loss, {}, {"train": {"loss": "ipo"}}, lambda b, a: a == pytest.approx((1 - 5) ** 2)),
    ("DPO and others: NLL term", loss, {}, {"train": {"nll_scale": 1.0}}, lambda b, a: a == pytest.approx(b + 1.5)),
]  # fmt: skip

# Row, and what the README must say about it.
NOT_DONE = [
    ("SR 3.2.1, MR 3.2: AlpacaEval 2, Arena-Hard and MT-Bench by GPT-4", "AlpacaEval 2, Arena-Hard and MT-Bench"),
    ("SR 3.2.1: the nine NLP benchmarks", "nine NLP benchmarks"),
    ("SR 3.2.1: human evaluation", "human evaluation"),
]


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in change.items():
        found[key] = {**found[key], **value} if isinstance(value, dict) and isinstance(found.get(key), dict) else value
    return found


@pytest.mark.parametrize(("row", "look", "config", "change", "check"), ROWS, ids=[row[0] for row in ROWS])
def test_a_key_alone_alters_what_is_done(
    row: str, look: Look, config: dict[str, Any], change: dict[str, Any], check: Check, make_config: Any,
    encoder: ChatEncoder, tmp_path: Path,
) -> None:  # fmt: skip
    trees = tmp_path / "trees.jsonl"
    trees.write_text("".join(json.dumps(tree(number)) + "\n" for number in range(40)))

    def made(keys: dict[str, Any], name: str) -> Config:
        data = json.loads(json.dumps(keys).replace("TREES", str(trees)))
        config: Config = make_config(**{"name": name, **data})
        return config

    before = look(made(config, "base"), encoder)
    assert look(made(config, "again"), encoder) == before
    assert check(before, look(made(merged(config, change), "changed"), encoder))


def tree(number: int) -> dict[str, Any]:
    def message(name: str, role: str, **more: Any) -> dict[str, Any]:
        return {
            "message_id": f"t{number}{name}",
            "text": f"text {name} of {number}",
            "role": role,
            "lang": "en",
            **more,
        }

    replies = [message(f"r{rank}", "assistant", rank=rank, replies=[]) for rank in range(3)]
    return {"message_tree_id": f"t{number}", "prompt": {**message("", "prompter"), "replies": replies}}


@pytest.mark.parametrize(("row", "said"), NOT_DONE, ids=[row for row, _ in NOT_DONE])
def test_what_is_not_done_stands_in_the_readme(row: str, said: str) -> None:
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_the_recipes_carry_the_papers_values() -> None:
    """2401.10020v3, section 3.1.3; 2407.19594v2, section 3.1 and appendix A.3."""
    sr = load(ROOT / "configs/self_rewarding_llama2_70b.yaml", ["data.trees=x"])
    assert [sr.model_name(index) for index in range(5)] == ["M0", "SFT", "M1", "M2", "M3"]
    assert [step.recipe for step in sr.planned] == [sft.SFT, sft.SFT, SelfRewarding, SelfRewarding]
    base, m1, m2, m3 = (step.config for step in sr.planned)
    for one in (base, m1):
        assert (one.train.lr, one.train.lr_final) == (5.5e-6, 1.1e-6)
    for one in (m2, m3):
        assert (one.train.start, one.train.lr, one.train.lr_final) == ("before", 1e-6, 1e-7)
        assert (one.train.candidate_every_steps, one.train.beta) == (200, 0.1)
        assert (one.sample.responses, one.sample.temperature, one.sample.top_p) == (4, 0.7, 0.9)
        assert (one.judge.judgements, one.judge.temperature, one.judge.top_p) == (3, 0.7, 0.9)
        assert one.pair.rho == 0.0
    assert {one.train.pairs_per_step for one in (base, m1, m2, m3)} == {16}
    chosen = [(one.train.candidate_every_steps, one.train.choose, one.train.early_stop) for one in (base, m1, m2, m3)]
    assert chosen == [(200, "duel", True)] * 4
    assert (sr.judge.external, sr.validator.external) == (None, "validator")  # rewards its own, early stopping not
    assert {one.train.dropout for one in (base, m1, m2, m3)} == {0.1}
    assert ([s.path for s in base.sources], [s.path for s in m1.sources]) == (["ift"], ["ift", "eft"])
    assert m1.train.start == "first"
    assert (sr.data.max_ift, sr.data.max_eft, sr.data.accept) == (3200, 1630, "order")
    assert (sr.self_instruct.temperature, sr.self_instruct.top_p) == (0.6, 0.9)
    assert (sr.prompts.heldout, sr.prompts.validation) == (256, 253)

    mr = load(ROOT / "configs/meta_rewarding_llama3_8b.yaml", ["data.trees=x"])
    assert [mr.model_name(index) for index in range(6)] == ["M0", "SFT", "M1", "M2", "M3", "M4"]
    first, *rest = (step.config for step in mr.planned)
    assert mr.planned[0].recipe is sft.SFT
    assert (first.train.lr, first.train.epochs, first.train.stop_after_epoch) == (5e-8, 10, 5)
    assert [source.path for source in first.sources] == ["eft"]
    for one in rest:
        assert (one.train.lr, one.train.epochs, one.train.beta) == (5e-6, 10, 0.1)
        assert (one.train.pairs_per_step, one.train.schedule) == (32, "cosine")
        assert (one.sample.responses, one.sample.temperature, one.sample.top_p) == (7, 0.8, 0.95)
        assert (one.judge.judgements, one.judge.temperature, one.judge.top_p) == (11, 0.8, 0.95)
        assert one.pair.duplicates == "drop"
        assert one.prompts.per_iteration == 5000
    assert [one.pair.rho for one in rest] == [0.0, 0.32, 0.32, 0.4]
    assert [step.recipe for step in mr.planned[1:]] == [MetaRewarding] * 2 + [SelfRewarding] * 2
    assert [one.pair.max_chosen_chars for one in rest] == [2500, None, None, None]
    assert [one.meta.max_chosen_chars for one in rest[:2]] == [1100, 1000]
    assert [one.train.stop_after_epoch for one in rest] == [6, 4, 2, 2]
