"""The output folder: complete or absent, whatever happens, and the same bytes in the end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.errors import ResourceError, TemporaryError, UsageError
from compress_tool.manifest import read_manifest, source_identity
from compress_tool.verify import verify
from compress_tool.writer import OutputFolder, factored_config
from tests.checkpoints import mixtral_config, mixtral_tensors, tiny_mixtral, write_checkpoint
from tests.compress_tool.faults import DiskOperations, fail_with, killed_at
from tests.compress_tool.test_checkpoint import fused_tensors
from vllm_moesvd.format import CheckpointSpec, LatentSpec, layer_tensors

SPEC = LatentSpec(rank_gate_up=16, rank_down=24, width=96)
JOB = {"ratio": 0.4, "seed": 0, "source": {"headers": {"a": "b"}}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tiny_mixtral(tmp_path_factory.mktemp("source") / "model", num_shards=2)
    return open_checkpoint(root, allow_factored=False)


def factors(source: Checkpoint) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = layer_tensors(SPEC, source.shape, source.family, 1)
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def compress(source: Checkpoint, out: Path, *, resume: bool = False, job: dict = JOB) -> None:
    """A run of the tool without its mathematics: layer 0 stays dense, layer 1 is factored."""
    tensors = factors(source)
    with OutputFolder(out, job=job, num_layers=2, planned_bytes=1000, resume=resume) as folder:
        if folder.is_finished:
            return
        for layer in range(2):
            if not folder.has_layer(layer):
                folder.save_layer_shard(
                    layer, source, tensors if layer else None, {"form": ["dense", "latent"][layer]}
                )
        folder.carry_over(source)
        folder.finish(
            source=source,
            config=factored_config(source, CheckpointSpec(layers={1: SPEC})),
            source_record=source_identity(source),
            texts={"recipe.yaml": b"ratio: 0.4\n", "README.md": b"# Card\n"},
        )


def digests(root: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(root.iterdir())
    }


@pytest.fixture(scope="module")
def undisturbed(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    compress(source, out)
    return digests(out)


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """Memory where there is some: hundreds of runs wait for fsync on a busy disk otherwise."""
    shared = Path("/dev/shm")
    parent = shared if shared.is_dir() and os.access(shared, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=parent) as path:
        yield Path(path)


def test_the_result_is_a_checkpoint_with_every_tensor(source: Checkpoint, tmp_path: Path):
    out = tmp_path / "new" / "out"
    compress(source, out)
    result = open_checkpoint(out, allow_factored=True)
    packed = factors(source)
    for name, tensor in packed.items():
        assert torch.equal(result.read(name), tensor)
    for name in set(source.tensors) - set(source.expert_tensors(1)):
        assert torch.equal(result.read(name), source.read(name))
        assert result.tensors[name].dtype == source.tensors[name].dtype
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "config.json",
        "manifest.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source.path / name).read_bytes()
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_the_library_reads_the_shards_and_the_index_agrees(source: Checkpoint, tmp_path: Path):
    out = tmp_path / "out"
    compress(source, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = 0
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        assert {index["weight_map"].pop(name) for name in tensors} == {file.name}
        header_length = int.from_bytes(file.read_bytes()[:8], "little")
        assert header_length % 8 == 0
    assert index["weight_map"] == {} and index["metadata"]["total_size"] == total


def test_the_manifest_describes_every_file_and_no_circumstance(
    source: Checkpoint, undisturbed: dict[str, str], tmp_path: Path
):
    out = tmp_path / "elsewhere" / "out"
    compress(source, out)
    assert digests(out) == undisturbed
    manifest = read_manifest(out)
    assert {n: f["sha256"] for n, f in manifest["files"].items()} == {
        name: digest for name, digest in undisturbed.items() if name != "manifest.json"
    }
    assert manifest["layers"] == {"0": {"form": "dense"}, "1": {"form": "latent"}}
    assert manifest["job"] == JOB
    text = (out / "manifest.json").read_text()
    assert str(tmp_path) not in text and os.uname().nodename not in text


def test_a_fused_source_gives_published_names(tmp_path: Path):
    config = mixtral_config(dtype="bfloat16")
    tensors = mixtral_tensors(config)
    root = write_checkpoint(tmp_path / "fused", config, fused_tensors(tensors, 2))
    plain = write_checkpoint(tmp_path / "plain", config, tensors)
    results = []
    for path in (root, plain):
        checkpoint = open_checkpoint(path, allow_factored=False)
        compress(checkpoint, tmp_path / f"out-{path.name}")
        results.append(digests(tmp_path / f"out-{path.name}"))
    for name in results[0]:
        assert (results[0][name] == results[1][name]) == (name != "manifest.json")


def test_killed_at_every_disk_operation_the_resumed_run_gives_the_same_bytes(
    source: Checkpoint, undisturbed: dict[str, str], memory_disk: Path
):
    number = 0
    while True:
        number += 1
        out = memory_disk / f"{number}" / "out"
        out.parent.mkdir()
        killed = killed_at(number, lambda out=out: compress(source, out))
        if out.exists():
            assert digests(out) == undisturbed
        compress(source, out, resume=True)
        assert digests(out) == undisturbed
        assert [entry.name for entry in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out)
        if not killed:
            break
    assert number > 60


def test_killed_again_and_again_the_run_still_completes(
    source: Checkpoint, undisturbed: dict[str, str], memory_disk: Path
):
    """100 operations are enough for a shard or two, or for the files at the end."""
    out = memory_disk / "out"
    attempts = 0
    while killed_at(100, lambda: compress(source, out, resume=True)):
        attempts += 1
        assert attempts < 10
    assert attempts > 0
    assert digests(out) == undisturbed


@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [
        (errno.ENOSPC, ResourceError, "free some space"),
        (errno.EROFS, ResourceError, "writable"),
        (errno.EACCES, ResourceError, "writable"),
        (errno.EIO, TemporaryError, "--resume"),
        (errno.EMFILE, TemporaryError, "--resume"),
    ],
)
def test_an_error_at_every_disk_operation_is_reported_and_can_be_resumed(
    source: Checkpoint,
    undisturbed: dict[str, str],
    memory_disk: Path,
    number: int,
    kind: type[Exception],
    advice: str,
):
    at = 0
    while True:
        at += 1
        out = memory_disk / f"{at}" / "out"
        out.parent.mkdir()
        try:
            with pytest.MonkeyPatch.context() as patch:
                DiskOperations(patch, at, fail_with(number))
                compress(source, out)
        except kind as error:
            message = str(error)
            assert str(out) in message and advice in message and "--resume" in message
        else:
            # Undoing a first creation may swallow an error: the folder is empty by then.
            assert digests(out) == undisturbed
            break
        assert not list(out.parent.rglob("*.tmp"))
        if out.exists():
            assert digests(out) == undisturbed
        compress(source, out, resume=True)
        assert digests(out) == undisturbed
        assert [entry.name for entry in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out)
    assert at > 60


def test_leftovers_of_a_killed_write_are_removed(source: Checkpoint, tmp_path: Path):
    out = tmp_path / "out"
    with OutputFolder(out, job=JOB, num_layers=2) as folder:
        folder.carry_over(source)
    leftover = tmp_path / "out.partial" / "checkpoint" / "model-00002-of-00003.safetensors.tmp"
    leftover.write_bytes(b"half")
    with OutputFolder(out, job=JOB, num_layers=2, resume=True):
        assert not leftover.exists()


def test_a_shard_that_vanished_is_written_again(
    source: Checkpoint, undisturbed: dict[str, str], tmp_path: Path
):
    out = tmp_path / "out"
    with OutputFolder(out, job=JOB, num_layers=2) as folder:
        folder.carry_over(source)
        folder.save_layer_shard(0, source, None, {"form": "dense"})
        assert folder.has_layer(0) and folder.layer_entry(0) == {"form": "dense"}
    (tmp_path / "out.partial" / "checkpoint" / "model-00002-of-00003.safetensors").unlink()
    compress(source, out, resume=True)
    assert digests(out) == undisturbed


def test_an_unsaved_layer_cannot_be_published(source: Checkpoint, tmp_path: Path):
    with OutputFolder(tmp_path / "out", job=JOB, num_layers=2) as folder:
        folder.carry_over(source)
        with pytest.raises(ValueError, match="model-00002-of-00003"):
            folder.finish(source=source, config={}, source_record={}, texts={})
    assert not (tmp_path / "out").exists()


def test_another_job_is_refused_and_the_key_is_named(source: Checkpoint, tmp_path: Path):
    out = tmp_path / "out"
    with OutputFolder(out, job=JOB, num_layers=2) as folder:
        folder.save_layer_shard(0, source, None, {})
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"ratio was 0\.4, now it is 0\.5"):
        compress(source, out, resume=True, job=JOB | {"ratio": 0.5})
    with pytest.raises(UsageError, match="extra was None, now it is 1"):
        compress(source, out, resume=True, job=JOB | {"extra": 1})
    with pytest.raises(UsageError, match="continue it with --resume or delete it"):
        compress(source, out)
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_a_finished_run_is_left_alone(
    source: Checkpoint, undisturbed: dict[str, str], tmp_path: Path
):
    out = tmp_path / "out"
    compress(source, out)
    times = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    compress(source, out, resume=True)
    with pytest.raises(UsageError, match="already finished"):
        compress(source, out)
    with pytest.raises(UsageError, match="ratio was"):
        compress(source, out, resume=True, job=JOB | {"ratio": 0.5})
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == times
    assert digests(out) == undisturbed


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize("kind", ["file", "folder", "empty", "link", "dangling"])
@pytest.mark.parametrize("resume", [False, True])
def test_what_is_not_ours_is_not_touched(
    source: Checkpoint, tmp_path: Path, name: str, kind: str, resume: bool
):
    path = tmp_path / name
    (tmp_path / "target").mkdir()
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to(tmp_path / "target")
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        if kind == "folder":
            (path / "mine").write_text("mine")
    before = sorted((str(file), file.lstat().st_mtime_ns) for file in tmp_path.rglob("*"))
    if name == "out.partial" and kind == "empty":
        compress(source, tmp_path / "out", resume=resume)
        return
    with pytest.raises(UsageError, match="is not ours"):
        compress(source, tmp_path / "out", resume=resume)
    assert sorted((str(f), f.lstat().st_mtime_ns) for f in tmp_path.rglob("*")) == before


def test_an_output_below_a_file_is_refused(source: Checkpoint, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is not a folder"):
        compress(source, tmp_path / "file" / "out")


def test_a_second_process_is_told_to_wait(source: Checkpoint, tmp_path: Path):
    out = tmp_path / "out"
    with (
        OutputFolder(out, job=JOB, num_layers=2),
        pytest.raises(TemporaryError, match="another process"),
    ):
        OutputFolder(out, job=JOB, num_layers=2, resume=True)
    compress(source, out, resume=True)


def test_a_plan_larger_than_the_disk_is_refused_before_anything_is_written(
    source: Checkpoint, tmp_path: Path
):
    with pytest.raises(ResourceError, match="bytes are needed for out"):
        OutputFolder(tmp_path / "out", job=JOB, num_layers=2, planned_bytes=2**60)
    assert list(tmp_path.iterdir()) == []


def test_discard_leaves_nothing(source: Checkpoint, tmp_path: Path):
    with OutputFolder(tmp_path / "out", job=JOB, num_layers=2) as folder:
        folder.save_layer_shard(0, source, None, {})
        (folder.state / "calibration").mkdir()
        folder.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
@pytest.mark.parametrize("kilobytes", [40, 300, 570])
def test_a_full_disk_is_reported_and_the_run_continues_when_there_is_room(
    source: Checkpoint, undisturbed: dict[str, str], tmp_path: Path, kilobytes: int
):
    """The result has some 590 kB: it fills up in a shard, in a later one, near the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={kilobytes}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        with pytest.raises(ResourceError, match=r"No space left on device.*--resume"):
            compress(source, disk / "out")
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        compress(source, disk / "out", resume=True)
        assert digests(disk / "out") == undisturbed
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_read_only_disk_is_reported(source: Checkpoint, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        with pytest.raises(ResourceError, match=r"out\.partial: Read-only file system"):
            compress(source, disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_result_verifies(source: Checkpoint, tmp_path: Path):
    compress(source, tmp_path / "out")
    assert verify(tmp_path / "out").problems == ()
