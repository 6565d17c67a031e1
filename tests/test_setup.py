"""tools/setup.sh with stand-ins for Python and pip: what is run, when, and what is said."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest

SETUP = Path(__file__).parent.parent / "tools" / "setup.sh"


class Machine:
    """A PATH whose `python3.11` logs every call; its `-m venv` makes a venv of the same kind."""

    def __init__(self, folder: Path) -> None:
        self.venv = folder / "venv"
        self.calls = folder / "calls"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls.touch()
        self.python = self.bin / "python3.11"
        self.behave()

    def behave(self, *, pip: str = "exit 0", venv_module: str = "exit 0") -> None:
        self.python.write_text(
            textwrap.dedent(f"""\
            #!/bin/sh
            echo "$*" >>{self.calls}
            case "$*" in
                *version_info*) exit 0 ;;
                *ensurepip*) {venv_module} ;;
                "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
                "-m pip "*) {pip} ;;
            esac
            """)
        )
        self.python.chmod(0o755)

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SETUP, self.venv],
            env={
                "PATH": f"{self.bin}:/usr/bin:/bin",
                "PYTHON": str(self.python),
                "BACKEND": "cpu",
            }
            | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def pip_calls(self) -> int:
        return self.calls.read_text().count("-m pip")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_second_setup_starts_nothing(machine: Machine) -> None:
    assert machine.setup().returncode == 0
    assert machine.pip_calls() == 2
    machine.calls.write_text("")
    done = machine.setup()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert machine.calls.read_text() == ""


def test_cpu_packages_are_pinned_and_not_resolved(machine: Machine) -> None:
    machine.setup()
    calls = machine.calls.read_text()
    assert "--no-deps --no-compile -r constraints/cpu-py311.txt" in calls
    assert "vllm_cpu_shim.py" in calls


def test_gpu_gets_vllm_and_no_shim(machine: Machine) -> None:
    assert machine.setup(BACKEND="gpu").returncode == 0
    calls = machine.calls.read_text()
    assert "--editable .[gpu,eval,report,dev]" in calls
    assert "vllm_cpu_shim.py" not in calls
    assert "cpu-py311" not in calls


def test_a_failed_installation_says_why_and_the_next_one_starts_over(machine: Machine) -> None:
    machine.behave(pip="echo 'ERROR: no route'; exit 1")
    failed = machine.setup()
    assert failed.returncode == 1
    assert "ERROR: no route" in failed.stderr
    (machine.venv / "half-written").touch()
    machine.behave()
    done = machine.setup()
    assert done.returncode == 0
    assert "making it again" in done.stdout
    assert not (machine.venv / "half-written").exists()


def test_an_installation_that_was_killed_starts_over(machine: Machine) -> None:
    machine.behave(pip="kill -9 $PPID; exit 1")
    assert machine.setup().returncode != 0
    machine.behave()
    done = machine.setup()
    assert done.returncode == 0
    assert "making it again" in done.stdout


def test_missing_cpu_torch_names_the_setting(machine: Machine) -> None:
    machine.behave(pip="echo 'ERROR: No matching distribution found for torch==9.9+cpu'; exit 1")
    last = machine.setup().stderr.splitlines()[-1]
    assert "PyTorch's CPU wheel index" in last
    assert "PIP_EXTRA_INDEX_URL" in last
    assert "://" not in last


def test_missing_venv_module_is_one_line(machine: Machine) -> None:
    machine.behave(venv_module="exit 1")
    done = machine.setup()
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "python3.11-venv" in done.stderr
    assert not machine.venv.exists()


def test_old_python_is_one_line(machine: Machine, tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = machine.setup(PYTHON=str(old))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "needs Python 3.11" in done.stderr


def test_another_backend_makes_the_environment_again(machine: Machine) -> None:
    machine.setup()
    done = machine.setup(BACKEND="gpu")
    assert done.returncode == 0
    assert "making it again" in done.stdout


def test_an_unknown_backend_is_refused(machine: Machine) -> None:
    done = machine.setup(BACKEND="tpu")
    assert done.returncode == 1
    assert "expected cpu or gpu" in done.stderr
    assert not machine.venv.exists()
