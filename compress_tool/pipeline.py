"""`compress_tool run`: the one place that sees every stage.

audit → size plan → scan → calibrate → (choose layers) → factor and write layer by layer → finish
→ verify. Every stage leaves its result on disk before the next one uses it, so `--resume` goes on
where a killed run stopped and writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress_tool.calibration import ProgressCallback, calibrate
from compress_tool.calibration_state import sole_use
from compress_tool.calibration_text import calibration_files, calibration_windows
from compress_tool.checkpoint import Checkpoint, open_checkpoint, scan_finite
from compress_tool.config import FISHER, Recipe
from compress_tool.durable import digest_file, write_file
from compress_tool.errors import InputError, NumericsError, ResourceError, VerificationError
from compress_tool.fisher import measure_fisher
from compress_tool.folder import contained_file, read_json_object
from compress_tool.layer_work import LayerWork, write_layers
from compress_tool.manifest import read_manifest, source_identity
from compress_tool.model_card import model_card
from compress_tool.plain import output_config
from compress_tool.planning import final_plan, first_plan
from compress_tool.report import write_report
from compress_tool.run_report import routing_warnings, run_report
from compress_tool.sizing import (
    SizePlan,
    chosen_layers,
    planned_disk_bytes,
)
from compress_tool.trajectory import Trajectory
from compress_tool.verify import verify
from compress_tool.writer import OutputFolder

SCANNED_FILE = "scanned"
REPORT_FILE = "report.json"
TRAJECTORY_FOLDER = "trajectory"
MAX_STATE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What `run` prints: the plan's numbers with the losses filled in, and what to know."""

    report: Mapping[str, Any]
    warnings: tuple[str, ...]
    already_finished: bool
    peak_memory_bytes: int


def run(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    progress: ProgressCallback,
    resume: bool = False,
    statistics: Path | None = None,
    device: str = "cpu",
) -> RunResult:
    """Compress the checkpoint at `source` into a new folder `out`.

    `statistics` keeps the calibration for other recipes on the same text. Raises the ToolError
    that says what is wrong; until the very end nothing exists at `out`.
    """
    checkpoint = open_checkpoint(source, allow_factored=False)
    layers = chosen_layers(checkpoint, recipe)
    files = calibration_files(recipe)
    forecast = first_plan(checkpoint, recipe, layers)
    windows = calibration_windows(checkpoint, recipe)
    num_tokens = windows.ids_NS.numel()
    job = _job(checkpoint, recipe, files)
    with OutputFolder(
        out,
        job=job,
        num_layers=checkpoint.num_layers,
        planned_bytes=planned_disk_bytes(checkpoint, recipe, forecast, num_tokens),
        resume=resume,
    ) as folder:
        if folder.is_finished:
            return _finished(folder.out, windows.warnings)
        _scan_once(checkpoint, folder, progress)
        directory = statistics if statistics is not None else folder.state / "statistics"
        try:
            with sole_use(directory):
                calibrate(
                    checkpoint,
                    windows.ids_NS,
                    directory,
                    batch_size=recipe.batch_size,
                    progress=progress,
                    resume=resume or statistics is not None,
                    device=device,
                )
                ids_NS = windows.ids_NS
                if recipe.base == FISHER:
                    measure_fisher(checkpoint, ids_NS, directory, progress, device)
                plan = final_plan(checkpoint, recipe, layers, directory, progress, ids_NS, device)
            trajectory = None
            if recipe.num_refit_steps > 0:
                path = folder.state / TRAJECTORY_FOLDER
                trajectory = Trajectory(checkpoint, ids_NS, path, recipe.batch_size, device)
            work = LayerWork(
                checkpoint=checkpoint,
                recipe=recipe,
                plan=plan,
                statistics=directory,
                folder=folder,
                device=device,
                trajectory=trajectory,
            )
            entries = write_layers(work, progress)
        except NumericsError:
            # The same numbers would come again: no --resume could complete this run.
            folder.discard()
            raise
        except InputError:
            if not resume:
                folder.discard()
            raise
        report = run_report(
            checkpoint, recipe, plan, entries, windows, files, directory, trajectory
        )
        _finish(checkpoint, recipe, plan, folder, report)
    _verify(folder.out, plan, progress)
    write_report(folder.out)
    return RunResult(
        report=report,
        warnings=windows.warnings + routing_warnings(entries),
        already_finished=False,
        peak_memory_bytes=_peak_memory_bytes(),
    )


def _finish(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: SizePlan,
    folder: OutputFolder,
    report: Mapping[str, Any],
) -> None:
    card = model_card(
        report,
        source_name=checkpoint.path.resolve().name,
        source_readme=_source_readme(checkpoint),
    )
    folder.finish(
        source=checkpoint,
        config=output_config(checkpoint, plan.specs),
        source_record=source_identity(checkpoint),
        texts={
            "recipe.yaml": recipe.to_yaml().encode(),
            "README.md": card.encode(),
            REPORT_FILE: (json.dumps(report, indent=1, sort_keys=True) + "\n").encode(),
        },
    )


def _source_readme(checkpoint: Checkpoint) -> str | None:
    """The source's model card, for its licence; a link out of the folder is not followed."""
    try:
        return contained_file(checkpoint.path, "README.md").read_text(errors="replace")
    except InputError:
        return None


def _verify(out: Path, plan: SizePlan, progress: ProgressCallback) -> None:
    """Read everything back: what is on disk is what was promised, byte for byte."""
    progress("verify", 0, 1, "")
    result = verify(out)
    problems = list(result.problems)
    if not problems:
        written = open_checkpoint(out, allow_factored=True)
        if written.total_bytes != plan.bytes_after:
            problems.append(f"{out}: {written.total_bytes} bytes, planned {plan.bytes_after}")
    progress("verify", 1, 1, "")
    if problems:
        raise VerificationError(f"{problems[0]} ({len(problems)} problems; see `verify {out}`)")


def _job(checkpoint: Checkpoint, recipe: Recipe, files: Sequence[Path]) -> dict[str, Any]:
    """What must be equal for a run to be the same run; texts and sources by content, not path."""
    texts = [digest_file(file).sha256 for file in files]
    identity = json.dumps(source_identity(checkpoint), sort_keys=True)
    return {
        **recipe.to_json(),
        "calibration": [file.name for file in files],
        "calibration_sha256": texts,
        "source_sha256": hashlib.sha256(identity.encode()).hexdigest(),
    }


def _scan_once(checkpoint: Checkpoint, folder: OutputFolder, progress: ProgressCallback) -> None:
    """Look for NaN and infinite weights; a source that has them leaves nothing behind."""
    marker = folder.state / SCANNED_FILE
    if marker.exists():
        return
    total = sum(info.num_bytes for info in checkpoint.tensors.values())
    done = 0

    def read(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("scan", done, total, "bytes")

    try:
        scan_finite(checkpoint, checkpoint.tensors, read)
    except InputError:
        folder.discard()
        raise
    write_file(marker, [b""])


def _finished(out: Path, warnings: tuple[str, ...]) -> RunResult:
    """The result of a run that an earlier process completed."""
    read_manifest(out)
    report = read_json_object(out, REPORT_FILE, 64 * MAX_STATE_BYTES)
    return RunResult(
        report=report,
        warnings=warnings,
        already_finished=True,
        peak_memory_bytes=_peak_memory_bytes(),
    )


def _peak_memory_bytes() -> int:
    """High-water mark of this process; `getrusage` would show the parent's, inherited at exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def check_device(device: str) -> str:
    """`cpu` or `cuda[:n]`, if this machine has it; raises ResourceError."""
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ResourceError(f"--device is {device}, this machine offers cpu only; use --device cpu")
    return device
