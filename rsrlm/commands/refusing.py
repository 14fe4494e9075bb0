"""Refusing what is judged badly: by a threshold that is given, or that held-out responses give; and what it keeps."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rsrlm.commands.batch import Tally, beside
from rsrlm.data.responses import labelled
from rsrlm.report.progress import Report
from rsrlm.report.selective import Kept, area, as_csv, as_svg, risk_coverage, threshold_for
from rsrlm.settings.base import ConfigError
from rsrlm.store.atomic import write_whole

RISKS = (0.0, 0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """How the user wants to choose: the best of each prompt alone; responses below `threshold` refused, or such that
    a share of at most `risk` of what is kept of the file `held_out` is bad."""

    best: bool = False
    threshold: float | None = None
    risk: float | None = None
    held_out: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if (self.risk is None) != (self.held_out is None):
            raise ConfigError("--risk SHARE and --held-out FILE: the threshold is chosen by both; give both")
        if self.risk is not None and self.threshold is not None:
            raise ConfigError(f"--risk {self.risk:g} chooses the threshold; leave out --threshold {self.threshold:g}")
        if self.risk is not None and not 0 <= self.risk < 1:
            raise ConfigError(f"--risk {self.risk:g}: give a share of bad responses, from 0 to below 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold {self.threshold}: give a number of points")

    @property
    def judges(self) -> bool:
        return self.best or self.refuses

    @property
    def refuses(self) -> bool:
        return self.threshold is not None or self.risk is not None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Responses with fewer points are refused. `curve` is that of the held-out responses, and `kept` what the threshold
    keeps of them."""

    threshold: float
    kept: Kept | None = None
    curve: Sequence[Kept] = ()

    @classmethod
    def of(cls, choosing: Choosing, judge: str, model: str | None, report: Report) -> "Refusal | None":
        """By the held-out responses that `judge` has scored with this model. Raises ConfigError."""
        if choosing.held_out is None or choosing.risk is None:
            return None if choosing.threshold is None else cls(threshold=choosing.threshold)
        scored, models = labelled(choosing.held_out, judge)
        if others := models - {model}:
            report.line(f"{choosing.held_out} was scored by {', '.join(sorted(others))}, and now {model} judges")
        curve = risk_coverage(scored)
        kept = threshold_for(curve, choosing.risk)
        if kept is None:
            least = min(curve, key=lambda one: one.risk)
            raise ConfigError(
                f"--risk {choosing.risk:g}: no threshold keeps the risk of {choosing.held_out} so low; the lowest is "
                f"{least.risk:.3f}, at {least.threshold:.4f} points"
            )
        low, high = kept.interval
        report.line(
            f"threshold {kept.threshold:.4f}: of {len(scored)} held-out responses it keeps {kept.kept} "
            f"({kept.coverage:.3f}), and {kept.risk:.3f} of these are bad [{low:.3f}, {high:.3f}]"
        )
        return cls(threshold=kept.threshold, kept=kept, curve=curve)


def refused(points: float | None, refusal: Refusal | None) -> dict[str, bool]:
    """Of a row with these points: nothing where nobody refuses."""
    return {} if refusal is None else {"refused": points is None or points < refusal.threshold}


def show(refusal: Refusal | None, tally: Tally, out: Path, report: Report) -> dict[str, Any]:
    """Say how often what is kept is bad, where that is known, and write the curve beside the result, as a table and as
    a plot. Returns the figures."""
    found: dict[str, Any] = {}
    if refusal:
        found |= {"threshold": refusal.threshold, "refused": tally.counts["refused"]}
        if refusal.kept:
            found["held_out"] = _figures(refusal.kept) | {"area": area(refusal.curve)}
        if known := tally.kept.total():
            found["risk_of_kept"] = tally.kept[False] / known
            report.line(f"of {known} kept here that say so, {found['risk_of_kept']:.3f} are bad")
    own = risk_coverage(tally.labelled)
    if own:
        found["labelled"] = {"responses": len(tally.labelled), "risk": own[-1].risk, "area": area(own)}
    if own and not (refusal and refusal.curve):
        _table(own, report)
    if curve := (refusal.curve if refusal and refusal.curve else own):
        write_whole(beside(out, ".curve.csv"), as_csv(curve).encode())
        write_whole(beside(out, ".curve.svg"), as_svg(curve, refusal.kept if refusal else None).encode())
        report.line(f"risk and coverage: {beside(out, '.curve.csv')}, {beside(out, '.curve.svg')}")
    return found


def _figures(kept: Kept) -> dict[str, Any]:
    low, high = kept.interval
    return {**asdict(kept), "risk_low": low, "risk_high": high}


def _table(curve: Sequence[Kept], report: Report) -> None:
    table = []
    for risk in RISKS:
        found = threshold_for(curve, risk)
        row = {"at most": f"{risk:.0%} bad", "threshold": "none"}
        if found:
            low, high = found.interval
            row |= {name: f"{getattr(found, name):.3f}" for name in ("coverage", "risk")}
            row["interval"] = f"{low:.3f} to {high:.3f}"
            # Rounded down: what it is read from must not be refused by it.
            row["threshold"] = f"{math.floor(found.threshold * 1e4) / 1e4:.4f}"
        table.append(row)
    columns = {"at most": "at most", "threshold": "threshold", "coverage": "coverage", "risk": "risk"}
    title = f"Refusal: risk {curve[-1].risk:.3f} without it, area {area(curve):.3f}"
    report.table(title, table, {**columns, "interval": "95 %"})
