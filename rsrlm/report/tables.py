"""What a run prints when it ends: its iterations, the held-out prompts, and how it goes on."""

from typing import Any

from rsrlm.report.progress import Report
from rsrlm.store.folder import RunFolder

COLUMNS = {
    "iteration": "iteration",
    "prompts": "prompts",
    "responses": "responses",
    "judgements": "judgements",
    "judgements_unreadable": "unreadable",
    "pairs": "pairs",
    "optimizer_steps": "steps",
    "mean_score": "mean score",
    "mean_response_tokens": "tokens",
    "loss_first": "loss first",
    "loss_last": "last",
    "weight_version": "weights",
    "seconds": "seconds",
}


def show(store: RunFolder, status: str, reason: str, report: Report) -> None:
    """The tables and lines that end a run."""
    rows = store.metrics()
    if rows:
        report.table("Iterations", [_shown(row) for row in rows], COLUMNS)
        report.table("Held-out prompts", heldout_rows(store, rows), heldout_columns(rows))
    report.line(f"status: {status}" + (f": {reason}" if reason else ""))
    report.line(f"run folder: {store.folder}")
    if status not in ("completed",):
        report.line(f"go on with: rsrlm resume {store.folder}")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: DPO and SFT losses share their columns."""
    losses = {key: row.get(f"dpo_{key}", row.get(f"sft_{key}")) for key in ("loss_first", "loss_last")}
    return {**row, **losses}


def heldout_columns(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Every score says who gave it: the model itself and M0, or another model that judges in their place."""
    scores: dict[str, Any] = next((row["heldout"] for row in rows if row["heldout"]), {})
    judge = scores["score_by_first"]["judge"] if scores else "M0"
    own = scores["score_by_current"]["judge"] if scores else ""
    other = bool(scores) and own == judge
    by = "itself" if not scores or own == scores["model"] else own
    return {
        "model": "model",
        "tokens": "tokens",
        "words": "words",
        "complete": "complete",
        **({"kl": "KL to M0"} if "kl_to_first" in scores else {}),
        **({} if other else {"own": f"score by {by}"}),
        "first": f"score by {judge}",
        "duel": f"win / tie / loss over the model before (judge: {judge})",
    }


def heldout_rows(store: RunFolder, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model that was evaluated, M0 first."""
    found = [row["heldout"] for row in rows if row["heldout"]]
    first = store.note("start").get("heldout_first")
    table = []
    for entry in [*([first] if first else []), *found] if found else []:
        duel = next((value for key, value in entry.items() if key.startswith("duel_with_")), None)
        shares = [duel[key] for key in ("win", "tie", "loss")] if duel and duel["n"] else None
        table.append(
            {
                "model": entry["model"],
                **entry["answers"],
                "kl": entry.get("kl_to_first", {}).get("per_token"),
                "own": entry["score_by_current"]["mean"],
                "first": entry["score_by_first"]["mean"],
                "duel": " / ".join(f"{share:.2f}" for share in shares) if shares else None,
            }
        )
    return table
