"""MLflow: a server, or a store of its own beside the run folder."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from rsrlm.report.trackers.base import COMPLETED, INTERRUPTED, ITERATION, STEP, Row, Tracked, flat
from rsrlm.report.trackers.samples import COLUMNS
from rsrlm.settings.trackers import Mlflow

TAG = "rsrlm_id"  # by which a resume finds the run again
NUMBERS, PARAMS, CHARS = 1000, 100, 6000  # that a request takes, and those of a parameter
LIMITS = {  # for the user's own to override: a server that is gone is asked for a few seconds
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
STATUSES = {COMPLETED: "FINISHED", INTERRUPTED: "KILLED"}


class MlflowTracker:
    """Steps and iterations are the steps of its metrics."""

    name = "mlflow"

    def __init__(self, run: Tracked, own: Mlflow) -> None:
        self._tracked, self._own = run, own
        self._client: Any = None
        self._id = ""
        self.where = ""

    def open(self) -> int:
        for name, value in LIMITS.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        folder = self._tracked.folder.parent
        uri = self._own.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(
            None if "://" in uri and not uri.startswith("sqlite") else folder / "mlflow_artifacts"
        )
        run = self._again(experiment)
        self._id = run.info.run_id
        if uri.startswith("http"):
            self.where = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._id}"
        else:
            self.where = f"mlflow ui --backend-store-uri {uri}"
        held = run.data.metrics
        return int(held.get(STEP, -1) + held.get(ITERATION, -1)) + 2

    def _experiment(self, artifacts: Any) -> str:
        """Its id; `artifacts` is where those of a store without a server lie."""
        found = self._client.get_experiment_by_name(self._own.experiment)
        if found:
            return str(found.experiment_id)
        where = artifacts and artifacts.resolve().as_uri()
        return str(self._client.create_experiment(self._own.experiment, artifact_location=where))

    def _again(self, experiment: str) -> Any:
        """The run of an earlier start, or else a new one, with the config as its parameters."""
        from mlflow.entities import Param

        client, own = self._client, self._tracked
        found = client.search_runs([experiment], f"tags.{TAG} = '{own.id}'", max_results=1)
        run = found[0] if found else client.create_run(experiment, run_name=own.name, tags={TAG: own.id})
        client.update_run(run.info.run_id, status="RUNNING")
        leaves = {key: str(value)[:CHARS] for key, value in flat(own.config).items()}
        params = iter(Param(key, value) for key, value in leaves.items() if key not in run.data.params)
        while some := list(islice(params, PARAMS)):
            client.log_batch(run.info.run_id, params=some)
        return run

    def log(self, rows: Sequence[Row]) -> None:
        """Samples first: with its numbers a row is there. A server that takes no files has the numbers all the same."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for some in _batches(rows):
            failed: Exception | None = None
            for row in some:
                try:
                    self._samples(row)
                except Exception as error:
                    failed = error
            numbers = [Metric(name, value, now, row.at) for row in some for name, value in row.numbers.items()]
            self._client.log_batch(self._id, metrics=numbers)
            if failed:
                raise failed

    def _samples(self, row: Row) -> None:
        file = f"samples/{row.at:02d}.json"
        if row.samples and file not in {one.path for one in self._client.list_artifacts(self._id, "samples")}:
            table = {column: [sample[column] for sample in row.samples] for column in COLUMNS}
            self._client.log_table(self._id, table, file)

    def close(self, status: str) -> None:
        self._client.set_tag(self._id, "status", status)
        self._client.set_terminated(self._id, STATUSES.get(status, "FAILED"))


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that fit into a request."""
    some: list[Row] = []
    for row in rows:
        if some and sum(len(one.numbers) for one in [*some, row]) > NUMBERS:
            yield some
            some = []
        some.append(row)
    if some:
        yield some
