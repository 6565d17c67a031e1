"""Calibration: exact statistics, one file per layer, and the same bytes after any kill."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from compress_tool.calibration import calibrate
from compress_tool.calibration_state import calibration_bytes, sole_use, statistics_file
from compress_tool.checkpoint import open_checkpoint
from compress_tool.errors import InputError, NumericsError, ResourceError
from compress_tool.layer_stats import LayerStatistics
from tests.checkpoints import mixtral_config, mixtral_tensors, tiny_mixtral, write_checkpoint
from tests.compress_tool.test_streaming import FORMS, write_factored


def ids_of(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed))


def run(
    path: Path, directory: Path, ids: torch.Tensor, *, resume: bool = False, **options: Any
) -> tuple[Path, ...]:
    checkpoint = open_checkpoint(path, allow_factored=True)
    options = {"batch_size": 2, "progress": lambda *arguments: None} | options
    return calibrate(checkpoint, ids, directory, resume=resume, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def transformers_inputs(path: Path, ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """What reaches the experts of every layer in transformers' own forward."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    )
    inputs: list[dict[str, torch.Tensor]] = []

    def record(module, arguments):
        inputs.append(dict(zip(("x_TD", "index_TK", "gate_TK"), arguments, strict=True)))

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(record)
    with torch.no_grad():
        model(ids)
    return inputs


def test_statistics_are_what_the_experts_of_transformers_see(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    ids = ids_of(5, 24)
    files = run(path, tmp_path / "state", ids)
    assert files == tuple(statistics_file(tmp_path / "state", layer) for layer in (0, 1))
    for file, expected in zip(files, transformers_inputs(path, ids), strict=True):
        statistics = LayerStatistics.load(file)
        assert statistics.num_experts == 4
        assert int(statistics.counts_E.sum()) == 2 * 5 * 24
        assert torch.equal(statistics.index_TK, expected["index_TK"])
        torch.testing.assert_close(statistics.x_TD, expected["x_TD"], rtol=0, atol=1e-5)
        torch.testing.assert_close(statistics.gate_TK, expected["gate_TK"], rtol=0, atol=1e-5)


def test_statistics_do_not_depend_on_the_batch_size(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    ids = ids_of(5, 24)
    one = run(path, tmp_path / "one", ids, batch_size=1)
    many = run(path, tmp_path / "many", ids, batch_size=5)
    for first, second in zip(one, many, strict=True):
        a, b = LayerStatistics.load(first), LayerStatistics.load(second)
        assert torch.equal(a.index_TK, b.index_TK)
        assert torch.equal(a.x_TD, b.x_TD)
        assert torch.equal(a.gate_TK, b.gate_TK)


def test_an_expert_that_is_never_routed_to_has_no_tokens(tmp_path):
    config = mixtral_config()
    tensors = mixtral_tensors(config)
    # An all-zero router ties every expert, and top-k then takes the first two.
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"].zero_()
    path = write_checkpoint(tmp_path / "model", config, tensors)
    for file in run(path, tmp_path / "state", ids_of(2, 8)):
        statistics = LayerStatistics.load(file)
        assert sorted(statistics.counts_E.tolist()) == [0, 0, 16, 16]
        unrouted = int(statistics.counts_E.argmin())
        assert statistics.gram(unrouted).abs().max() == 0
        assert statistics.pooled_gram().isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1)])
def test_fewer_tokens_than_experts_or_hidden_size(tmp_path, size):
    path = tiny_mixtral(tmp_path / "model")
    for file in run(path, tmp_path / "state", ids_of(*size)):
        statistics = LayerStatistics.load(file)
        assert int(statistics.counts_E.sum()) == 2 * size[0] * size[1]
        for expert in range(4):
            assert statistics.gram(expert).isfinite().all()


@pytest.mark.parametrize("stop_after", range(1, 4))
def test_stopped_after_any_layer_and_resumed_gives_the_same_bytes(tmp_path, stop_after):
    path = tiny_mixtral(tmp_path / "model", num_hidden_layers=4)
    ids = ids_of(5, 16)
    run(path, tmp_path / "whole", ids)

    def stop(stage, done, total, detail):
        if done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "state", ids, progress=stop)
    calls: list[int] = []
    run(
        path,
        tmp_path / "state",
        ids,
        resume=True,
        progress=lambda stage, done, total, detail: calls.append(done),
    )
    assert calls[0] == stop_after
    assert contents(tmp_path / "state") == contents(tmp_path / "whole")


KILLED_SCRIPT = """
import sys, time
from pathlib import Path
from threading import Event, Thread
import torch
from compress_tool.calibration import calibrate
from compress_tool.checkpoint import open_checkpoint
ids = torch.load(sys.argv[3], weights_only=True)
def progress(stage, done, total, detail):
    print(done, flush=True)
    time.sleep(0.02)
calibrate(open_checkpoint(Path(sys.argv[1]), allow_factored=False), ids, Path(sys.argv[2]),
          batch_size=1, progress=progress, resume=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(tmp_path):
    path = tiny_mixtral(tmp_path / "model", num_hidden_layers=6)
    ids = ids_of(6, 16)
    torch.save(ids, tmp_path / "ids")
    run(path, tmp_path / "whole", ids, batch_size=1)
    command = [sys.executable, "-c", KILLED_SCRIPT, path, tmp_path / "state", tmp_path / "ids"]
    kills = 0
    for delay in (0.03, 0.11, 0.17, 0.26, 0.31):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "state") == contents(tmp_path / "whole")


def test_a_finished_calibration_is_not_run_again(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    ids = ids_of(2, 8)
    files = run(path, tmp_path / "state", ids)
    times = [file.stat().st_mtime_ns for file in files]
    assert run(path, tmp_path / "state", ids, resume=True) == files
    assert [file.stat().st_mtime_ns for file in files] == times


def test_without_resume_it_starts_afresh_and_leaves_other_files_alone(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    run(path, tmp_path / "state", ids_of(2, 8))
    (tmp_path / "state" / "notes.txt").write_text("mine")
    files = run(path, tmp_path / "state", ids_of(3, 8))
    assert LayerStatistics.load(files[0]).num_tokens == 24
    assert (tmp_path / "state" / "notes.txt").read_text() == "mine"


def test_a_missing_statistics_file_makes_resume_start_again(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    ids = ids_of(2, 8)
    files = run(path, tmp_path / "state", ids)
    before = contents(tmp_path / "state")
    files[0].unlink()
    run(path, tmp_path / "state", ids, resume=True)
    assert contents(tmp_path / "state") == before


def test_another_text_does_not_continue(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    run(path, tmp_path / "state", ids_of(2, 8))
    with pytest.raises(InputError, match=r"another calibration \(ids_sha256 changed\)"):
        run(path, tmp_path / "state", ids_of(2, 8, seed=1), resume=True)


def test_nobody_elses_files_are_deleted(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    state = tmp_path / "state"
    state.mkdir()
    (state / "clusters.json").write_text("mine")
    with pytest.raises(InputError, match=r"holds clusters.json and no calibration.json"):
        run(path, state, ids_of(2, 8))
    assert (state / "clusters.json").read_text() == "mine"


def test_a_shared_folder_is_used_by_one_run_at_a_time(tmp_path):
    entered = Event()

    def enter() -> None:
        with sole_use(tmp_path / "state"):
            entered.set()

    other = Thread(target=enter)
    with sole_use(tmp_path / "state"):
        other.start()
        assert not entered.wait(0.3)
    assert entered.wait(10)
    other.join()


def test_other_weights_do_not_continue(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    run(path, tmp_path / "state", ids_of(2, 8))
    stat = (path / "model.safetensors").stat()
    tiny_mixtral(path, seed=1)
    os.utime(path / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(InputError, match=r"\(weights changed\)"):
        run(path, tmp_path / "state", ids_of(2, 8), resume=True)


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_broken_state_file_is_an_input_error(tmp_path, content):
    path = tiny_mixtral(tmp_path / "model")
    run(path, tmp_path / "state", ids_of(2, 8))
    (tmp_path / "state" / "calibration.json").write_text(content)
    with pytest.raises(InputError, match=r"calibration\.json"):
        run(path, tmp_path / "state", ids_of(2, 8), resume=True)


def test_truncated_hidden_states_are_an_input_error(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    run(path, tmp_path / "state", ids_of(2, 8))
    (tmp_path / "state" / "hidden-00001.bin").unlink()
    (tmp_path / "state" / "hidden-00000.bin").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match=r"hidden-00000\.bin: holds 100 bytes"):
        run(path, tmp_path / "state", ids_of(2, 8), resume=True)


def test_a_disk_that_is_too_small_is_found_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    path = tiny_mixtral(tmp_path / "model")
    checkpoint = open_checkpoint(path, allow_factored=False)
    needed = calibration_bytes(checkpoint, 16, torch.float32)
    for free, enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        if enough:
            run(path, tmp_path / "state", ids_of(2, 8))
        else:
            with pytest.raises(ResourceError, match="free some space"):
                run(path, tmp_path / "other", ids_of(2, 8))
            assert list((tmp_path / "other").iterdir()) == []


def test_the_disk_forecast_is_what_the_files_take(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    run(path, tmp_path / "state", ids_of(8, 64))
    sizes = [file.stat().st_size for file in (tmp_path / "state").iterdir()]
    one_hidden = 8 * 64 * 64 * 4
    checkpoint = open_checkpoint(path, allow_factored=False)
    forecast = calibration_bytes(checkpoint, 8 * 64, torch.float32)
    assert sum(sizes) + one_hidden == pytest.approx(forecast, rel=0.01)


def test_an_overflow_leaves_no_file_for_its_layer(tmp_path):
    config = mixtral_config()
    tensors = mixtral_tensors(config)
    for projection in ("v_proj", "o_proj"):
        tensors[f"model.layers.1.self_attn.{projection}.weight"] *= 1e25
    path = write_checkpoint(tmp_path / "model", config, tensors)
    with pytest.raises(NumericsError):
        run(path, tmp_path / "state", ids_of(2, 8))
    names = sorted(file.name for file in (tmp_path / "state").iterdir())
    assert names == ["calibration.json", "hidden-00000.bin", "layer-00000.safetensors"]


@pytest.mark.parametrize("limit_bytes", [100, 9000, 17_000])
def test_a_full_disk_is_a_resource_error_and_resume_completes(tmp_path, limit_bytes):
    """A file size limit stands for the full disk: the same failed write, in the same places."""
    path = tiny_mixtral(tmp_path / "model")
    ids = ids_of(4, 16)
    run(path, tmp_path / "whole", ids)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(ResourceError, match="--resume"):
            run(path, tmp_path / "state", ids)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "state").glob("*.tmp"))
    run(path, tmp_path / "state", ids, resume=True)
    assert contents(tmp_path / "state") == contents(tmp_path / "whole")


def test_a_read_only_place_is_a_resource_error(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        run(path, tmp_path / "file" / "state", ids_of(2, 8))


def test_a_compressed_checkpoint_can_be_calibrated_too(tmp_path):
    path = write_factored(tmp_path / "model", FORMS["latent-bias"], layer=0)
    ids = ids_of(3, 8)
    files = run(path, tmp_path / "state", ids)
    dense = run(tiny_mixtral(tmp_path / "dense"), tmp_path / "dense-state", ids)
    first, second = (
        [LayerStatistics.load(run_files[layer]) for run_files in (files, dense)] for layer in (0, 1)
    )
    assert torch.equal(first[0].x_TD, first[1].x_TD)
    assert not torch.allclose(second[0].x_TD, second[1].x_TD, atol=0.1)
