"""What an iteration comes to, for its metrics.json."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rsrlm.judges.base import mean_verdicts
from rsrlm.records import Group, PreferencePair, Scored, Unparsed
from rsrlm.report.evidence import floats, mean


def summary_of(groups: Iterable[Group], pairs: Iterable[PreferencePair]) -> dict[str, Any]:
    """Counts and means of what was made. `mean_score` is over the responses with a readable score.

    Groups and pairs are read once, one at a time.
    """
    n: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    points, margins = floats(), floats()
    for group in groups:
        responses, judgements = group.answers, group.judgements
        n["prompts"] += 1
        n["responses"] += len(responses)
        n["cut"] += sum(not response.complete for response in responses)
        n["empty"] += sum(not response.text.strip() for response in responses)
        n["tokens"] += sum(len(response.token_ids) for response in responses)
        n["judgements"] += len(judgements)
        n["comparisons"] += len(group.comparisons)
        n["comparisons_unreadable"] += sum(isinstance(one.verdict, Unparsed) for one in group.comparisons)
        unread.update(one.verdict.reason for one in judgements if isinstance(one.verdict, Unparsed))
        points.extend(v.points for v in mean_verdicts(responses, judgements).values() if isinstance(v, Scored))
    for pair in pairs:
        kinds[pair.kind] += 1
        if pair.kind == "actor":
            margins.append(pair.chosen_score - pair.rejected_score)
    return {
        "prompts": n["prompts"],
        "responses": n["responses"],
        "responses_cut": n["cut"],
        "responses_empty": n["empty"],
        "judgements": n["judgements"],
        "judgements_unreadable": unread.total(),
        "unreadable_reasons": dict(unread),
        "comparisons": n["comparisons"],
        "comparisons_unreadable": n["comparisons_unreadable"],
        "pairs": kinds.total(),
        "pairs_of_kind": dict(kinds),
        "mean_score": mean(points),
        "responses_scored": len(points),
        "mean_response_tokens": n["tokens"] / n["responses"] if n["responses"] else None,
        "mean_margin": mean(margins),
    }
