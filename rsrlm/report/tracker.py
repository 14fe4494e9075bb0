"""Metrics of iterations for wandb."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

from rsrlm.config import Config
from rsrlm.store.folder import RunFolder


@contextlib.contextmanager
def tracker(config: Config, store: RunFolder) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function for the metrics of each finished iteration, which go to wandb where a project is configured; offline
    without a key."""
    if config.wandb.project is None:
        yield lambda row: None
        return
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY")) or wandb.api.api_key is not None
    run = wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.name,
        id=store.fix("wandb_id", secrets.token_hex(4)),
        resume="allow",
        dir=str(store.folder),
        config=config.model_dump(mode="json"),
        mode=os.environ.get("WANDB_MODE") or ("online" if has_key else "offline"),  # type: ignore[arg-type]
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        yield lambda row: run.log(_numbers(row), step=row["iteration"])
    finally:
        run.finish()


def _numbers(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers by slash-separated names."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + key] = value
    return found
