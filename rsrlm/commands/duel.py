"""`rsrlm eval duel`: two models head to head on the prompts of a file (2407.19594v2, section 3.3)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsrlm.commands.engines import by_validator, figure, loaded, on_engines, started, without_judge, write_json
from rsrlm.config import Config
from rsrlm.data import prompts as prompt_files
from rsrlm.engines import SAMPLE_PRIORITY, Engines
from rsrlm.evaluate import EVALUATION
from rsrlm.judges.base import Context, context_of
from rsrlm.judges.pairwise import Match, Pairwise, duel_judge, winner_of
from rsrlm.judges.verdicts import combine_orders
from rsrlm.recipes.base import respond
from rsrlm.records import Prompt, Response, Task, Unparsed
from rsrlm.report import metrics
from rsrlm.report.progress import Report
from rsrlm.run import Run
from rsrlm.settings.methods import SamplingParams

ROWS = {"win": "A wins", "tie": "ties", "loss": "B wins", "win_rate": "win rate of A, ties count half"}


async def answers(
    prompts: Sequence[Prompt], engines: Engines, context: Context, params: SamplingParams
) -> list[Response]:
    """One answer to each prompt, in the order of the prompts. Its seed does not depend on the model: two models meet
    with the same luck."""

    async def one(prompt: Prompt) -> Response:
        seed = context.seed_of(EVALUATION, prompt.id, "actor", "0")
        task = Task(iteration=EVALUATION, prompt=prompt)
        return await respond(engines, context, task, 0, params, group=prompt.id, seed=seed)

    return await engines.each(one, prompts, 1)


def match(context: Context, prompt: Prompt, shown: Sequence[str], name: str, order: str) -> Match:
    """The two texts in the order in which they are shown, which `order` names."""
    return Match(
        id=name,
        prompt_id=prompt.id,
        response_id=name,
        index=0,
        role="duel",
        fields={"instruction": prompt.text, "response_a": shown[0], "response_b": shown[1]},
        seed=context.seed_of(EVALUATION, prompt.id, "duel", order),
        fence_seed=context.seed_of(EVALUATION, prompt.id, "duel", "fence"),
        priority=SAMPLE_PRIORITY,
        data=prompt.data,
    )


async def compare(
    prompts: Sequence[Prompt], first: Sequence[Response], second: Sequence[Response], judge: Pairwise, engines: Engines
) -> dict[str, Any]:
    """Wins, ties and losses of the first model's answers in both orders, with intervals, and both models' lengths."""

    async def outcome(asked: tuple[Prompt, Response, Response]) -> Any:
        prompt, a, b = asked
        if a.text == b.text:
            engines.count("duel", 2)
            return "tie"
        shown = ((a.text, b.text), (b.text, a.text))
        orders = [match(judge.context, prompt, texts, f"{prompt.id}#{n}", str(n)) for n, texts in enumerate(shown)]
        one, other = await judge(engines, orders)
        return combine_orders(winner_of(one), winner_of(other))

    found = await engines.each(outcome, list(zip(prompts, first, second, strict=True)), 2)
    readable = [one for one in found if not isinstance(one, Unparsed)]
    return {
        **metrics.win_rate(readable, seed=judge.context.seed),
        "unreadable": len(found) - len(readable),
        "mean_chars": [sum(len(one.text) for one in side) / len(side) if side else None for side in (first, second)],
    }


def _key_of(config: Config, judge: str | None) -> str:
    """Where the user named the model that compares."""
    if judge:
        return "--judge"
    if config.evaluate.judge.model:
        return "evaluate.judge.model"
    return "judge.model" if config.judge.model else "model.path"


def eval_duel(
    config: Config, first: str, second: str, judge: str | None, prompts: Sequence[Prompt], out: Path, report: Report
) -> dict[str, Any]:
    """Two models' answers to the same prompts, compared by a third (or one of them) in both orders.

    `judge` is a model that compares; None is the config's judge.model or judge.endpoint, else its model.
    """
    key = _key_of(config, judge)
    config = by_validator(config)
    # Neither the models of the command line nor another judge are those that model.trust_remote_code speaks of.
    by = judge or config.judge.external or config.model.path
    of = {name: config.model_at(name) for name in (first, second, by)}
    if judge:
        config = without_judge(config)
    config, drawn = started(config, out)
    models = {name: loaded(of[name], drawn, side) for name, side in {first: "A", second: "B"}.items()}
    endpoint = config.judge.endpoint
    folder, encoder = loaded(config.model, drawn) if endpoint else loaded(of[by], drawn, key)
    # The pool that compares is the only one of its stage: no engines of another judge beside it.
    alone = without_judge(config)
    comparing = duel_judge(config, context_of(config, encoder))
    kept = _usable(config, [context_of(config, one) for _, one in models.values()], comparing, prompts, report)
    sides = []
    for side, name in (("a", first), ("b", second)):
        where, own = models[name]
        context = context_of(config, own)

        async def answer(run: Run, context: Context = context, side: str = side) -> list[Response]:
            with run.stage(f"answers of {side.upper()}", {"actor": len(kept)}):
                return await answers(kept, await run.load(run.first), context, config.evaluate)

        with_its_code = alone.model_copy(update={"model": of[name]})
        sides.append(on_engines(with_its_code, out, {name: where}, answer, report, drawn=drawn))
        write_json(out / f"outputs-{side}.json", _outputs(name, kept, sides[-1]))

    async def decide(run: Run) -> dict[str, Any]:
        with run.stage("duel", {"duel": 2 * len(kept)}):
            engines = (await run.load(run.first)).judges
            return await compare(kept, sides[0], sides[1], comparing, engines)

    asking = config if endpoint else alone.model_copy(update={"model": of[by]})
    found = on_engines(asking, out, {by: folder}, decide, report, drawn=drawn, engines=endpoint is None)
    result = {"a": first, "b": second, "judge": f"{comparing.name} by {by}", **found}
    write_json(out / "duel.json", result)
    _show(result, report)
    return result


def _outputs(generator: str, prompts: Sequence[Prompt], answers: Sequence[Response]) -> list[dict[str, str]]:
    """As AlpacaEval takes them."""
    return [
        {
            "instruction": prompt.text,
            "output": answer.text,
            "generator": generator,
            "dataset": "prompts",
            "prompt_id": prompt.id,
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _usable(
    config: Config, asking: Sequence[Context], comparing: Pairwise, prompts: Sequence[Prompt], report: Report
) -> list[Prompt]:
    """Prompts that can be answered and compared; the others are said."""
    chat = max(len(one.asked("")) for one in asking)
    lengths = {prompt.id: max(len(one.asked(prompt.text)) for one in asking) - chat for prompt in prompts}
    longest = config.evaluate.max_tokens
    needs = {"evaluate.max_tokens": chat + longest, "the judge of two answers": comparing.needs(2 * longest)}
    kept, long = prompt_files.usable(list(prompts), lengths, needs, config)
    if long:
        report.line(f"{len(long)} prompts are too long and left out: {', '.join(long[:5])}")
    return kept


def _show(result: dict[str, Any], report: Report) -> None:
    rows = [{"what": heading, "value": figure(result[key])} for key, heading in ROWS.items()]
    rows.append({"what": "mean characters, A / B", "value": " / ".join(f"{n:.0f}" for n in result["mean_chars"])})
    rows.append({"what": "unreadable", "value": str(result["unreadable"])})
    title = f"A: {result['a']}   B: {result['b']}   judge: {result['judge']}"
    report.table(title, rows, {"what": "", "value": ""})
