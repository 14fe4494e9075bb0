"""What tests of several processes wait for."""

import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def until(happened: Callable[[], Any], within_s: float = 90.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := happened()):
        assert time.monotonic() < deadline, "nothing of this happened"
        time.sleep(0.2)
    return found


def wait_for(what: Callable[[], Any], process: subprocess.Popen[Any], seconds: float = 300) -> Any:
    """What is found while the process lives."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, "\n".join(process.communicate())
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found
