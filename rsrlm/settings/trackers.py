"""Where the numbers of a run go beside its folder."""

from typing import Any

from pydantic import Field, field_validator

from rsrlm.settings.base import Section


class Wandb(Section):
    project: str = "rsrlm"
    entity: str | None = Field(None, description="None: the account's own")


class TensorBoard(Section):
    folder: str | None = Field(
        None, description="above that of the run's event files; None: they are in its run folder"
    )


class Mlflow(Section):
    uri: str | None = Field(
        None,
        description="of the server or store; None: MLFLOW_TRACKING_URI if set, else mlflow.db beside the run folder",
    )
    experiment: str = "rsrlm"


class Trackers(Section):
    """Each one that is named is used; `true` takes its defaults."""

    wandb: Wandb | None = None
    tensorboard: TensorBoard | None = None
    mlflow: Mlflow | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value
