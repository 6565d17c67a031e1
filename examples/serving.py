"""A `vllm serve` process that never outlives its caller."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

READY_TIMEOUT_S = 600.0
"""A cold start takes about a minute on two cores; ten cover a much slower machine."""
STOP_TIMEOUT_S = 10.0
"""How long the server may take to end by itself before it is killed; one that is still importing
takes no notice of SIGTERM, and whoever pressed Ctrl-C waits."""
LOG_LINES_SHOWN = 30
LOG_WIDTH_SHOWN = 300
"""vLLM lists all its architectures in one line of some errors."""


class ServerError(RuntimeError):
    """The server did not become ready; the message holds the end of its log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def turn_signals_into_exceptions() -> None:
    """Make SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that servers are stopped.

    Ctrl-C is set too: a process started in the background of a script ignores it.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)


@contextlib.contextmanager
def running_server(
    command: Sequence[str],
    *,
    port: int,
    log: Path,
    environment: Mapping[str, str],
    waiting: Callable[[float], None],
) -> Iterator[str]:
    """Start `command`, wait until it answers on /health, yield its address, stop it at the end.

    The server and all its workers are one process group, which is stopped whatever happens in the
    body. `waiting` is called with the seconds so far. Raises ServerError with the end of the log
    if the process ends, or is not ready within READY_TIMEOUT_S.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, address, log, waiting)
        yield address
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server: SIGTERM to it, then SIGKILL to whatever is left of its process group."""
    # A second Ctrl-C while the server is being stopped must not leave it running.
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, signal.SIG_IGN)
    try:
        process.terminate()  # it ends its own workers in order and frees their shared memory
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        # A worker may outlive the process that started it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_until_ready(
    process: subprocess.Popen[bytes], address: str, log: Path, waiting: Callable[[float], None]
) -> None:
    start = time.monotonic()
    while not _is_healthy(address):
        elapsed = time.monotonic() - start
        if process.poll() is not None:
            raise ServerError(
                f"the server ended with exit code {process.returncode} before it was ready; "
                f"the end of {log}:\n{_tail(log)}"
            )
        if elapsed > READY_TIMEOUT_S:
            raise ServerError(
                f"the server was not ready after {elapsed:.0f} s; the end of {log}:\n{_tail(log)}"
            )
        waiting(elapsed)
        time.sleep(0.5)


def _is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line[:LOG_WIDTH_SHOWN]}" for line in lines[-LOG_LINES_SHOWN:])
