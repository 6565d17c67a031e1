"""`compress_tool`: parse, call one stage, print its result, turn errors into exit codes.

Results go to stdout; progress, warnings and errors to stderr. With `--json` stdout holds one JSON
object and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

from compress_tool.arguments import build_parser
from compress_tool.config import Recipe, parse_layers, read_recipe, recipe_from
from compress_tool.errors import (
    INTERRUPTED_EXIT_CODE,
    TERMINATED_EXIT_CODE,
    ResourceError,
    TemporaryError,
    ToolError,
)
from compress_tool.progress import Progress
from compress_tool.units import clock_text

Result = dict[str, Any]

NOT_RECIPE_KEYS: Final = frozenset(
    {"command", "json", "recipe", "source", "out", "resume", "stats", "device"}
)


LONG_RUN_SECONDS: Final = 1800
"""From here on a run says at its start what it is going to take."""

OUT_OF_MEMORY: Final = (
    "out of memory; `compress_tool plan` forecasts the need, and a smaller --batch-size, "
    "--samples or --seq-len lowers it"
)


class _Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that files and locks are closed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Nothing but ToolError texts reaches the user."""
    options = build_parser().parse_args(arguments)
    # oneDNN keeps a compiled product for each of the last 1,024 shapes, and every expert has its
    # own number of tokens: 165 MB on pocket-mixtral. It reads this at its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        with Progress() as progress:
            result, text = COMMANDS[options.command](options, progress)
    except ToolError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(_interrupted(options), INTERRUPTED_EXIT_CODE)
    except _Terminated:
        return _fail(_interrupted(options), TERMINATED_EXIT_CODE)
    except MemoryError:
        return _fail(OUT_OF_MEMORY, ResourceError.exit_code)
    except RuntimeError as error:
        # torch reports a failed allocation as a RuntimeError; anything else is a defect of ours.
        if not isinstance(error, _torch_out_of_memory()) and "not enough memory" not in str(error):
            raise
        return _fail(OUT_OF_MEMORY, ResourceError.exit_code)
    except OSError as error:
        return _fail(
            f"{error.filename or 'input or output'}: {error.strerror or error}; run the command "
            "again when that is mended",
            TemporaryError.exit_code,
        )
    sys.stdout.write(json.dumps(result, indent=2) + "\n" if options.json else text)
    sys.stdout.flush()
    return 6 if options.command == "verify" and not result["ok"] else 0


def _inspect(options: argparse.Namespace, progress: Progress) -> tuple[Result, str]:
    from compress_tool.checkpoint import open_checkpoint
    from compress_tool.inspect import describe
    from compress_tool.summary import inspect_text

    result = describe(open_checkpoint(options.checkpoint, allow_factored=True))
    return result, inspect_text(result)


def _plan(options: argparse.Namespace, progress: Progress) -> tuple[Result, str]:
    from compress_tool.forecast import forecast
    from compress_tool.summary import plan_text

    result = forecast(options.source, _recipe(options), options.stats)
    return result, plan_text(result)


def _run(options: argparse.Namespace, progress: Progress) -> tuple[Result, str]:
    from compress_tool.forecast import forecast
    from compress_tool.pipeline import check_device, run
    from compress_tool.summary import run_text

    start = time.monotonic()
    recipe, device = _recipe(options), check_device(options.device)
    if device == "cpu" and recipe.num_refit_steps > 0:
        _warn_of_a_long_refit(forecast(options.source, recipe), progress)
    done = run(
        options.source,
        options.out,
        recipe,
        progress=progress,
        resume=options.resume,
        statistics=options.stats,
        device=device,
    )
    for warning in done.warnings:
        progress.note(f"warning: {warning}")
    result = dict(done.report) | {
        "out": str(options.out),
        "already_finished": done.already_finished,
        "warnings": list(done.warnings),
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_bytes": done.peak_memory_bytes,
    }
    return result, run_text(result)


def _verify(options: argparse.Namespace, progress: Progress) -> tuple[Result, str]:
    from compress_tool.checkpoint import open_checkpoint
    from compress_tool.summary import verify_text
    from compress_tool.verify import verify

    against = None
    if options.against is not None:
        against = open_checkpoint(options.against, allow_factored=True)
    steps = 0

    def step(what: str) -> None:
        nonlocal steps
        steps += 1
        progress("verify", steps, 0, what)

    done = verify(options.checkpoint, against=against, progress=step)
    result: Result = {
        "ok": done.ok,
        "checked_tensors": done.checked_tensors,
        "problems": list(done.problems),
        "layers": [
            {
                "index": layer.index,
                "form": layer.form,
                "weight_error": None if layer.weight_error is None else dict(layer.weight_error),
                "recorded_weight_error": None
                if layer.recorded_weight_error is None
                else dict(layer.recorded_weight_error),
            }
            for layer in done.layers
        ],
    }
    return result, verify_text(result, options.checkpoint)


def _evaluate(options: argparse.Namespace, progress: Progress) -> tuple[Result, str]:
    from compress_tool.evaluate import evaluate_all
    from compress_tool.pipeline import check_device
    from compress_tool.summary import eval_text

    result = evaluate_all(
        options.checkpoint,
        against=options.against,
        files=options.text,
        tasks=options.tasks,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        dynamic_prune=options.dynamic_prune,
        device=check_device(options.device),
        progress=progress,
    )
    return result, eval_text(result)


def _report(options: argparse.Namespace, progress: Progress) -> tuple[Result, str]:
    from compress_tool.report import write_report

    file = write_report(options.checkpoint, options.compare)
    return {"report": str(file)}, f"wrote {file}\n"


def _export(options: argparse.Namespace, progress: Progress) -> tuple[Result, str]:
    import torch

    from compress_tool.checkpoint import open_checkpoint
    from compress_tool.export_dense import export_dense

    checkpoint = open_checkpoint(options.checkpoint, allow_factored=True)
    export_dense(
        checkpoint,
        options.out,
        dtype=None if options.dtype == "source" else getattr(torch, options.dtype),
        resume=options.resume,
        progress=lambda done: progress("export", done, checkpoint.num_layers, f"layer {done}"),
    )
    written = open_checkpoint(options.out, allow_factored=False)
    result = {
        "out": str(options.out),
        "total_params": written.total_params,
        "bytes": written.total_bytes,
    }
    return result, f"wrote {options.out}: dense, for any engine\n"


COMMANDS: Final[dict[str, Callable[[argparse.Namespace, Progress], tuple[Result, str]]]] = {
    "inspect": _inspect,
    "plan": _plan,
    "run": _run,
    "verify": _verify,
    "eval": _evaluate,
    "report": _report,
    "export-dense": _export,
}


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe file's values, overridden by the flags that were given."""
    values = {} if options.recipe is None else read_recipe(options.recipe)
    given = {key: value for key, value in vars(options).items() if key not in NOT_RECIPE_KEYS}
    if isinstance(given.get("layers"), str):
        given["layers"] = parse_layers(given["layers"])
    # Giving one of the two takes the other one of the file back.
    for chosen, other in (("ratio", "rank"), ("rank", "ratio")):
        if chosen in given and other not in given:
            values.pop(other, None)
    return recipe_from(values | given)


def _warn_of_a_long_refit(expected: Result, progress: Progress) -> None:
    """The refit is most of the work of `auto`, and a CPU is the wrong machine for a large one."""
    if expected["seconds"] > LONG_RUN_SECONDS:
        progress.note(
            f"warning: about {clock_text(expected['seconds'])} on this machine's CPU, most of it "
            "for the refit; --refit-steps 0 leaves it out, --device cuda is far faster"
        )


def _interrupted(options: argparse.Namespace) -> str:
    out: Path | None = getattr(options, "out", None)
    if out is None:
        return "interrupted"
    return f"interrupted; the state is in {out}.partial, the same command with --resume goes on"


def _fail(message: str, code: int) -> int:
    # One line, whatever a library put into the message.
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


def _torch_out_of_memory() -> type[BaseException]:
    """torch's own error class, where torch has been imported at all."""
    torch: Any = sys.modules.get("torch")
    return MemoryError if torch is None else torch.OutOfMemoryError


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise _Terminated
