"""Tasks of lm-evaluation-harness on a checkpoint: named, from a YAML file, or from running text.

`load_tasks` reads data sets and fails early; `run_tasks` computes. Both need the extra `eval`. The
harness talks on stderr and stdout; both belong to this tool, so it is kept quiet. Of the harness's
two entries `evaluate` is used: `simple_evaluate` adds facts about the machine by running programs.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from compress_tool.checkpoint import Checkpoint
from compress_tool.continuation import TASK_NAME, continuation_task, questions_from_files
from compress_tool.errors import (
    InputError,
    TemporaryError,
    ToolError,
    UnsupportedError,
    UsageError,
)
from compress_tool.likelihood import ProgressCallback

PRESET: Final = "paper"
PRESET_TASKS: Final = {
    "openbookqa": "openbookqa",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "winogrande": "winogrande",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "mathqa": "mathqa",
    "gsm8k": "gsm8k",
}
"""The tasks of the MoE-SVD and D2-MoE papers, and where lm_eval 0.4 keeps each: reading only those
folders takes a moment, its whole index of 14,000 tasks ten seconds."""

TASK_FILE_SUFFIXES: Final = (".yaml", ".yml")
NOT_METRICS: Final = ("alias", "name", "sample_len", "sample_count")
LOUD_LOGGERS: Final = ("lm_eval", "huggingface_hub", "datasets", "httpx", "fsspec")

FEWSHOT_SEED: Final = 1234
"""Chooses the solved examples; the harness's own default, so that its numbers are met."""

TaskSpec = str | dict[str, Any]

LoadedTasks = dict[str, dict[str, Any]]
"""As the harness's TaskManager gives it: `tasks`, `groups` and `group_map`, each by name."""


def task_names(text: str) -> list[str]:
    """`--tasks` as a list without repetition: `paper` stands for the eight of PRESET_TASKS."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if not name:
            raise UsageError(f"--tasks is {text!r}, expected names separated by single commas")
        names.extend(PRESET_TASKS if name == PRESET else [name])
    return list(dict.fromkeys(names))


def load_tasks(names: Sequence[str], files: Sequence[Path]) -> LoadedTasks:
    """The harness's task objects for `names`, with their data sets in memory or mapped.

    A name is one of the harness's tasks, a task file (`*.yaml`, paths in it relative to the
    working folder), or `continuation`, made of the texts `files`. Raises UnsupportedError without
    lm_eval, UsageError for an unknown name, TemporaryError for a data set that cannot be reached,
    InputError for a task or data set that is broken.
    """
    if find_spec("lm_eval") is None:
        raise UnsupportedError(
            "--tasks needs lm-evaluation-harness, which is not installed; "
            "pip install 'vllm-moesvd[eval]'"
        )
    specs = [_spec(name, files) for name in names]
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=False, include_path=_preset_folders(names))
        unknown = [name for name in specs if isinstance(name, str) and not _knows(manager, name)]
        if unknown:
            manager = TaskManager()
        for name in unknown:
            if not _knows(manager, name):
                near = get_close_matches(name, manager.all_tasks, n=1, cutoff=0.75)
                raise UsageError(
                    f"--tasks names {name!r}, which lm_eval does not know"
                    f"{f' (did you mean {near[0]}?)' if near else ''}; give a task name, "
                    f"a .yaml file, {PRESET!r} or {TASK_NAME!r}"
                )
        loaded: LoadedTasks = {"tasks": {}, "groups": {}, "group_map": {}}
        for name, spec in zip(names, specs, strict=True):
            for kind, found in _loaded(manager, name, spec).items():
                loaded[kind] |= found
        return loaded


def run_tasks(
    checkpoint: Checkpoint,
    tasks: LoadedTasks,
    *,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    progress: ProgressCallback,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Score `tasks` (of `load_tasks`); per task its metrics, sample count, shots and version.

    Metrics keep the harness's names; one that belongs to an answer filter is `metric,filter`.
    """
    with _quiet():
        from lm_eval.evaluator import evaluate

        from compress_tool.harness import StreamedLM

        model = StreamedLM(checkpoint, batch_size=batch_size, progress=progress, device=device)
        for task in tasks["tasks"].values():
            _set_fewshot(task, num_fewshot)
        try:
            found = evaluate(lm=model, task_dict=tasks, limit=limit, log_samples=False)
        except (ToolError, MemoryError, RuntimeError):
            raise
        except Exception as error:  # a task's own code, or one of the harness's many checks
            raise InputError(f"--tasks: lm_eval stopped: {_first_line(error)}") from error
    assert found is not None, "one process has rank 0"
    return {name: _result(name, values, found) for name, values in found["results"].items()}


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As the harness does: a task that says 0 means it, one that says nothing has none."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _result(name: str, values: dict[str, Any], found: Any) -> dict[str, Any]:
    metrics = {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if key not in NOT_METRICS and isinstance(value, int | float)
    }
    counts = found.get("n-samples", {}).get(name, {})
    return metrics | {
        "samples": counts.get("effective"),
        "num_fewshot": found.get("n-shot", {}).get(name),
        "version": found.get("versions", {}).get(name),
    }


def _spec(name: str, files: Sequence[Path]) -> TaskSpec:
    if name == TASK_NAME:
        if not files:
            raise UsageError(f"--tasks {TASK_NAME} is made of running text; name it with --text")
        return continuation_task(questions_from_files(files))
    if name.endswith(TASK_FILE_SUFFIXES):
        if not Path(name).is_file():
            raise InputError(f"{name}: no such file, expected a task of lm-evaluation-harness")
        return str(Path(name))
    return name


def _knows(manager: Any, name: str) -> bool:
    return name in manager.task_index or name.endswith(TASK_FILE_SUFFIXES)


def _preset_folders(names: Sequence[str]) -> list[Path]:
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    folders = [root / PRESET_TASKS[name] for name in names if name in PRESET_TASKS]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _loaded(manager: Any, name: str, spec: TaskSpec) -> LoadedTasks:
    """One name may be a group or a tag of several tasks."""
    try:
        loaded: LoadedTasks = manager.load([spec])
    except FileNotFoundError as error:
        raise InputError(f"task {name}: {_first_line(error)}") from error
    except OSError as error:  # every way in which a hub or a mirror is not reached is one of these
        raise TemporaryError(
            f"task {name}: its data set is not in the local cache and cannot be reached "
            f"({_first_line(error)}); run again with network, or use --tasks {TASK_NAME}"
        ) from error
    except Exception as error:  # whatever a data set's or a task's own code raises
        raise InputError(f"task {name}: cannot be loaded: {_first_line(error)}") from error
    return loaded


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of the harness and its libraries on stdout, stderr or in the log, but errors."""
    loggers = [logging.getLogger(name) for name in LOUD_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
