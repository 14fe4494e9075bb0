"""From scored responses of one prompt to at most one preference pair.

Best against worst (2401.10020v3, section 2.3), and with length control the shortest of the good against the longest of
the bad (2407.19594v2, section 2.2).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from rsrlm.records import Judgement, NoPair, PreferencePair, Response, Scored, Verdict, group_id
from rsrlm.settings.methods import Pair, TakingPart

POINTS = attrgetter("points")  # of a Candidate
TIE = 1e-9  # means of N judgements are not exact: a smaller difference is a tie


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    response: Response
    points: float
    may_win: bool = True


def candidates(responses: Sequence[Response], verdicts: Mapping[str, Verdict], rule: TakingPart) -> list[Candidate]:
    """Responses with a readable score and a text, ordered by index; one that max_tokens cut may lose but never win."""
    taking_part = []
    seen = set()
    for response in sorted(responses, key=lambda response: response.index):
        verdict = verdicts.get(response.id)
        if not isinstance(verdict, Scored) or not response.text.strip():
            continue
        if rule.duplicates == "drop" and response.text in seen:
            continue
        seen.add(response.text)
        taking_part.append(Candidate(response=response, points=verdict.points, may_win=response.complete))
    return taking_part


def tiers(winners: Sequence[Candidate], others: Sequence[Candidate], rho: float) -> tuple[list[Candidate], ...]:
    """Candidates for chosen, out of `winners`, and for rejected, out of `others` (2407.19594v2, section 2.2).

    With Smax the best score of those that may win and Smin the worst of all, the tiers reach from Smax down to
    (1 - rho) Smax + rho Smin, and from Smin up to (1 - rho) Smin + rho Smax, both inclusive. For rho below 0.5 no
    response is in both unless all scores are equal.
    """
    best = max(candidate.points for candidate in winners)
    worst = min(candidate.points for candidate in others)
    good = [one for one in winners if one.points >= (1 - rho) * best + rho * worst - TIE]
    bad = [one for one in others if one.points <= (1 - rho) * worst + rho * best + TIE]
    return good, bad


def best_against_worst(
    responses: Sequence[Response], verdicts: Mapping[str, Verdict], rule: Pair, iteration: int, seed: int = 0
) -> PreferencePair | NoPair:
    """The pair of a prompt, or the reason why there is none.

    Chosen is the best of the responses that may win, rejected the worst of all that take part. With `rule.rho` or
    `rule.ties` "length", chosen is the shortest of its tier and rejected the longest; what is still equal goes to the
    lowest index, or to one drawn by `seed` where `rule.ties` is "random". Equal scores make no pair. `verdicts` holds
    the mean verdict of each response by its id.
    """
    taking_part = candidates(responses, verdicts, rule)
    if len(taking_part) < 2:
        return NoPair(reason="fewer than two scored responses")
    winners = [candidate for candidate in taking_part if candidate.may_win]
    if not winners:
        return NoPair(reason="no complete response")
    good, bad = tiers(winners, taking_part, rule.rho)

    def length(candidate: Candidate) -> int:
        return len(candidate.response.text)

    if rule.rho or rule.ties == "length":
        chosen, rejected = min(good, key=length), max(bad, key=length)
    elif rule.ties == "random":
        draw = random.Random(f"ties {seed} {group_id(iteration, winners[0].response.prompt_id)}")
        chosen, rejected = draw.choice(good), draw.choice(bad)
    else:
        chosen, rejected = good[0], bad[0]
    made = pair_of(group_id(iteration, chosen.response.prompt_id), chosen, rejected)
    limit = rule.max_chosen_chars
    if isinstance(made, PreferencePair) and limit is not None and length(chosen) > limit:
        return NoPair(reason="chosen too long")
    return made


def pair_of(
    group: str, chosen: Candidate, rejected: Candidate, *, weight: float = 1.0, target: float = 1.0
) -> PreferencePair | NoPair:
    """The pair of two responses of a group, whichever models sampled them; none with equal scores or equal tokens.

    Its weight version is that of the chosen response.
    """
    winner, loser = chosen.response, rejected.response
    if chosen.points - rejected.points <= TIE:
        # A cut response may hold the best score: then the winners' best can equal, never undercut, the worst.
        return NoPair(reason="equal scores")
    if winner.token_ids == loser.token_ids:
        return NoPair(reason="same tokens")
    return PreferencePair(
        id=f"{winner.id}>{loser.id.removeprefix(f'{group}/')}",
        prompt_id=winner.prompt_id,
        kind="actor",
        chosen_id=winner.id,
        rejected_id=loser.id,
        prompt_token_ids=winner.prompt_token_ids,
        chosen_token_ids=winner.token_ids,
        rejected_token_ids=loser.token_ids,
        chosen_score=chosen.points,
        rejected_score=rejected.points,
        weight_version=winner.weight_version,
        weight=weight,
        target=target,
    )


def pair_of_judgements(
    chosen: Judgement, rejected: Judgement, prompt_token_ids: Sequence[int], scores: tuple[float, float]
) -> PreferencePair:
    """The pair of two judgements that answered the same prompt."""
    return PreferencePair(
        id=f"{chosen.id}>{rejected.index}",
        prompt_id=chosen.prompt_id,
        kind="judge",
        chosen_id=chosen.id,
        rejected_id=rejected.id,
        prompt_token_ids=tuple(prompt_token_ids),
        chosen_token_ids=chosen.token_ids,
        rejected_token_ids=rejected.token_ids,
        chosen_score=scores[0],
        rejected_score=scores[1],
        weight_version=chosen.weight_version,
    )
