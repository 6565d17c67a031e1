"""Progress: what appears on a terminal, in a log, and where nothing may appear."""

from __future__ import annotations

import io

import pytest

from compress_tool.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def log_of(seconds_per_step: float, steps: int) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        for step in range(steps):
            progress("calibrate", step, steps, f"layer {step}")
            clock.now += seconds_per_step
        progress("calibrate", steps, steps)
    return stream.getvalue().splitlines()


def test_a_log_gets_the_start_the_end_and_a_line_every_ten_seconds() -> None:
    lines = log_of(seconds_per_step=1.0, steps=30)
    assert lines[0] == "calibrate 0/30 · layer 0"
    assert lines[1] == "calibrate 10/30 · layer 10 · 0:10 elapsed, 0:20 left"
    assert lines[-1] == "calibrate 30/30 · done in 0:30"
    assert len(lines) == 4


def test_a_fast_stage_is_two_lines_however_many_steps_it_has() -> None:
    assert len(log_of(seconds_per_step=0.001, steps=5000)) == 2


def test_every_new_stage_is_announced_at_once() -> None:
    stream = io.StringIO()
    with Progress(stream=stream, clock=Clock()) as progress:
        for stage in ("calibrate", "factor", "verify"):
            progress(stage, 0, 2, "layer 0")
            progress(stage, 2, 2)
            progress(stage, 2, 2)
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == [
        stage for stage in ("calibrate", "factor", "verify") for _ in range(2)
    ]


def test_time_left_counts_only_the_steps_of_this_run() -> None:
    """A resumed job starts at step 6 of 10: its rate is not 6 steps in no time."""
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress("factor", 6, 10, "layer 6")
        clock.now += 20.0
        progress("factor", 7, 10, "layer 7")
    assert stream.getvalue().splitlines()[-1].endswith("0:20 elapsed, 1:00 left")


def test_time_left_falls_while_a_step_runs() -> None:
    """Many calls inside one long step must not make the rest look longer."""
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress("calibrate", 0, 4, "layer 0")
        clock.now += 60.0
        progress("calibrate", 1, 4, "layer 1")
        for _ in range(4):
            clock.now += 20.0
            progress("calibrate", 1, 4, "layer 1")
    left = [line.rpartition(", ")[2] for line in stream.getvalue().splitlines()[1:]]
    assert left == ["3:00 left", "2:40 left", "2:20 left", "2:00 left", "1:40 left"]


def test_an_unknown_total_has_no_end() -> None:
    stream = io.StringIO()
    with Progress(stream=stream, clock=Clock()) as progress:
        progress("read", 5, 0, "a.txt")
    assert stream.getvalue() == "read 5 · a.txt\n"


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(stream=stream) as progress:
        progress("calibrate", 3, 8, "layer 3")
        progress.note("layer 3: expert 5 was never routed [to]")
        progress("factor", 1, 8, "layer 1")
    shown = stream.getvalue()
    assert "3/8" in shown
    assert "1/8" in shown
    assert "layer 3: expert 5 was never routed [to]" in shown
    assert "\x1b[" in shown


def test_silent_and_stdout_stay_empty(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with Progress(stream=stream, silent=True) as progress:
        progress("calibrate", 1, 2)
        progress.note("not shown")
    with Progress() as progress:
        progress("calibrate", 1, 2)
    captured = capsys.readouterr()
    assert stream.getvalue() == ""
    assert captured.out == ""
    assert captured.err == "calibrate 1/2\n"


def test_a_closed_pipe_does_not_end_the_job() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Progress(stream=Closed()) as progress:
        progress("calibrate", 1, 2)
