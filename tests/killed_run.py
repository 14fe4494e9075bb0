"""`rsrlm` with a SIGKILL of the driver at a chosen place. Started by test_run.py: killed_run.py PLACE ARGUMENTS...

responses: when the third response has been written, with others in flight.
step: when the second optimizer step of iteration 0 has been reported, the learner being inside the next one.
publish: in the engine, when the bytes of M1 are loaded and their version is not set yet.
"""

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any


def die() -> None:
    os.kill(int(os.environ["RSRLM_TEST_DRIVER"]), signal.SIGKILL)


def in_worker() -> None:
    """Runs in every Ray worker at its start."""
    from rsrlm.runtime.inprocess_engine import InProcessEngine

    original = InProcessEngine.update

    async def update(self: InProcessEngine, update_info: dict, version: str) -> dict:
        if version == "M1":
            self._engine.set_weight_version = lambda _: die()
        return await original(self, update_info, version)

    InProcessEngine.update = update  # type: ignore[method-assign]


def main() -> None:
    place = sys.argv.pop(1)
    os.environ["RSRLM_TEST_DRIVER"] = str(os.getpid())
    from rsrlm import cli
    from rsrlm.store import journal, steps

    if place == "responses":
        add = journal.CompletionLog.add
        responses = []

        def counted(self: journal.CompletionLog, key: bytes, payload: Mapping[str, Any]) -> None:
            add(self, key, payload)
            if payload["id"].startswith("00/") and "#" not in payload["id"]:
                responses.append(payload["id"])
            if len(responses) == 3:
                die()

        journal.CompletionLog.add = counted  # type: ignore[method-assign]
    elif place == "step":
        log = steps.StepLog.add

        def logged(self: steps.StepLog, row: dict) -> None:
            log(self, row)
            if len(self.rows) == 2:
                die()

        steps.StepLog.add = logged  # type: ignore[method-assign]
    elif place == "publish":
        import ray

        init = ray.init

        def with_hook(**arguments: object) -> object:
            arguments["runtime_env"] = {
                "worker_process_setup_hook": in_worker,
                "env_vars": {
                    "RSRLM_TEST_DRIVER": str(os.getpid()),
                    "PYTHONPATH": os.path.dirname(os.path.abspath(__file__)),
                },
            }
            return init(**arguments)

        ray.init = with_hook
    cli.main()


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import killed_run

    killed_run.main()
