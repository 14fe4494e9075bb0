"""From scored responses of one prompt to at most one preference pair (Self-Rewarding, section 2.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rsrlm.config import Pair
from rsrlm.records import PreferencePair, Response, Scored, Verdict, group_id

TIE = 1e-9  # means of N judgements are not exact: a smaller difference is a tie


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    response: Response
    points: float
    may_win: bool


def candidates(responses: Sequence[Response], verdicts: Mapping[str, Verdict], rule: Pair) -> list[Candidate]:
    """Responses with a readable score that the rules for cut and empty ones let take part, ordered by index."""
    taking_part = []
    for response in sorted(responses, key=lambda response: response.index):
        verdict = verdicts.get(response.id)
        cut, empty = not response.complete, not response.text.strip()
        if not isinstance(verdict, Scored) or (cut and rule.cut == "drop") or (empty and rule.empty == "drop"):
            continue
        taking_part.append(Candidate(response=response, points=verdict.points, may_win=not cut and not empty))
    return taking_part


def best_against_worst(
    responses: Sequence[Response], verdicts: Mapping[str, Verdict], rule: Pair, iteration: int
) -> PreferencePair | str:
    """The pair of a prompt, or the reason why there is none (a short text that is counted).

    Chosen is the best of the responses that may win, rejected the worst of all that take part; of several equal ones
    the lowest index. Equal scores make no pair. `verdicts` holds the mean verdict of each response by its id.
    """
    taking_part = candidates(responses, verdicts, rule)
    if len(taking_part) < 2:
        return "fewer than two scored responses"
    winners = [candidate for candidate in taking_part if candidate.may_win]
    if not winners:
        return "no complete response"
    chosen = max(winners, key=lambda candidate: candidate.points)
    rejected = min(taking_part, key=lambda candidate: candidate.points)
    margin = chosen.points - rejected.points
    if margin <= TIE:
        # A cut response may hold the best score: then the winners' best can equal, never undercut, the worst.
        return "equal scores"
    if margin <= rule.min_margin + TIE and rule.min_margin > 0:
        return "margin too small"
    if chosen.response.token_ids == rejected.response.token_ids:
        return "same tokens"
    if rule.max_chosen_chars is not None and len(chosen.response.text) > rule.max_chosen_chars:
        return "chosen too long"
    group = group_id(iteration, chosen.response.prompt_id)
    return PreferencePair(
        id=f"{group}/{chosen.response.index}>{rejected.response.index}",
        prompt_id=chosen.response.prompt_id,
        kind="actor",
        chosen_id=chosen.response.id,
        rejected_id=rejected.response.id,
        prompt_token_ids=chosen.response.prompt_token_ids,
        chosen_token_ids=chosen.response.token_ids,
        rejected_token_ids=rejected.response.token_ids,
        chosen_score=chosen.points,
        rejected_score=rejected.points,
        weight_version=chosen.response.weight_version,
    )
