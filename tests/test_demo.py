"""The demo's server always ends: after the body, on Ctrl-C, on SIGTERM, and if it never starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# A stand-in for `vllm serve`: answers /health, has a worker that ignores SIGTERM in its process
# group, and ignores SIGTERM itself if told to.
SERVER = """
import http.server, os, signal, subprocess, sys, time
port, pids, stubborn = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "stubborn"
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
worker = subprocess.Popen([sys.executable, "-c", code])
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(pids + ".new", "w") as file:
    file.write(f"{os.getpid()} {worker.pid}")
os.rename(pids + ".new", pids)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""

# A stand-in for the demo: holds the server open until it is told to go.
DEMO = """
import sys, time
from pathlib import Path
import serving
serving.STOP_TIMEOUT_S = 1.0
serving.turn_signals_into_exceptions()
folder, mode = Path(sys.argv[1]), sys.argv[2]
port = serving.free_port()
command = [sys.executable, "-c", (folder / "server.py").read_text(), str(port),
           str(folder / "pids"), mode]
if mode == "broken":
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
try:
    with serving.running_server(command, port=port, log=folder / "log", environment={},
                                waiting=lambda elapsed: None):
        (folder / "ready").touch()
        if mode == "fails":
            raise RuntimeError("the body failed")
        time.sleep(30 if mode != "ends" else 0)
except serving.ServerError as error:
    print(error)
    raise SystemExit(1)
"""


def start(folder: Path, mode: str) -> subprocess.Popen[str]:
    (folder / "server.py").write_text(SERVER)
    return subprocess.Popen(
        [sys.executable, "-c", DEMO, str(folder), mode],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a dead worker waits for the init process to collect it


def assert_nothing_runs(folder: Path) -> None:
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("mode", ["ends", "fails"])
def test_the_server_ends_with_the_body(tmp_path: Path, mode: str) -> None:
    demo = start(tmp_path, mode)
    _, errors = demo.communicate(timeout=30)
    assert demo.returncode == (0 if mode == "ends" else 1), errors
    assert_nothing_runs(tmp_path)


@pytest.mark.parametrize("mode", ["willing", "stubborn"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_server(tmp_path: Path, number: signal.Signals, mode: str) -> None:
    demo = start(tmp_path, mode)
    wait_for(tmp_path / "ready")
    demo.send_signal(number)
    demo.communicate(timeout=30)
    assert demo.returncode in {-number, 128 + number}
    assert_nothing_runs(tmp_path)


def test_ctrl_c_twice_still_stops_the_server(tmp_path: Path) -> None:
    demo = start(tmp_path, "stubborn")
    wait_for(tmp_path / "ready")
    demo.send_signal(signal.SIGINT)
    time.sleep(0.3)
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=30)
    assert_nothing_runs(tmp_path)


def test_ctrl_c_while_the_server_starts(tmp_path: Path) -> None:
    demo = start(tmp_path, "willing")
    wait_for(tmp_path / "pids")
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=30)
    assert_nothing_runs(tmp_path)


def test_a_server_that_fails_shows_its_log(tmp_path: Path) -> None:
    demo = start(tmp_path, "broken")
    output, errors = demo.communicate(timeout=30)
    assert demo.returncode == 1, errors
    assert "exit code 3" in output
    assert "no such model" in output
