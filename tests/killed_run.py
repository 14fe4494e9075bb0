"""`rsrlm` with a SIGKILL of the driver at a chosen place. Started by test_run.py: killed_run.py PLACE ARGUMENTS...

responses: when the third response has been written, with others in flight.
step: when the second optimizer step of iteration 0 has been reported, the learner being inside the next one.
publish: in the engine, when the bytes of M1 are loaded and their version is not set yet.
"""

import os
import signal
import sys


def die() -> None:
    os.kill(int(os.environ["RSRLM_TEST_DRIVER"]), signal.SIGKILL)


def in_worker() -> None:
    """Runs in every Ray worker at its start."""
    from rsrlm.runtime import engine

    original = engine.InProcessEngine.update

    async def update(self: engine.InProcessEngine, update_info: dict, version: str) -> dict:
        if version == "M1":
            self._engine.set_weight_version = lambda _: die()
        return await original(self, update_info, version)

    engine.InProcessEngine.update = update  # type: ignore[method-assign]


def main() -> None:
    place = sys.argv.pop(1)
    os.environ["RSRLM_TEST_DRIVER"] = str(os.getpid())
    from rsrlm import cli
    from rsrlm.store import folder as store

    if place == "responses":
        add = store.Journal.add

        def counted(self: store.Journal, record: object) -> None:
            add(self, record)  # type: ignore[arg-type]
            if "evaluation" not in str(self._file.name) and len(self.responses) == 3:
                die()

        store.Journal.add = counted  # type: ignore[method-assign]
    elif place == "step":
        log = store.StepLog.add

        def logged(self: store.StepLog, row: dict) -> None:
            log(self, row)
            if len(self.rows) == 2:
                die()

        store.StepLog.add = logged  # type: ignore[method-assign]
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
