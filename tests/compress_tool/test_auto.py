"""Method auto, end to end on tiny checkpoints: sizes, resume, sequential states, probes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress_tool import calibration, probe, trajectory
from compress_tool.auto_plan import narrow_loss
from compress_tool.checkpoint import open_checkpoint
from compress_tool.config import Recipe
from compress_tool.errors import InputError
from compress_tool.forecast import forecast
from compress_tool.pipeline import run
from compress_tool.probe import split_sequences
from compress_tool.trajectory import Trajectory
from tests.checkpoints import tiny_mixtral
from vllm_moesvd.format import MoEShape

RECIPE = Recipe(ratio=0.4, samples=12, seq_len=32, refit_steps=8)


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "dense"
    return tiny_mixtral(path, num_hidden_layers=3, hidden_size=128, head_dim=64)


def digests(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def test_a_killed_run_goes_on_to_the_same_bytes(source: Path, tmp_path: Path, monkeypatch):
    run(source, tmp_path / "whole", RECIPE, progress=quiet)
    assert 0.4 <= json.loads((tmp_path / "whole/report.json").read_text())["ratio"] <= 0.405

    class Killed(BaseException):
        pass

    for call, last in (("commit", 0), ("forget", 0), ("commit", 2), ("task", 1)):
        real = getattr(Trajectory, call)

        def dying(self, layer, *rest, real=real, last=last):
            result = real(self, layer, *rest)
            if layer == last:
                raise Killed
            return result

        out = tmp_path / f"{call}-{last}"
        with monkeypatch.context() as patch:
            patch.setattr(trajectory.Trajectory, call, dying)
            try:
                run(source, out, RECIPE, progress=quiet)
            except Killed:
                assert not out.exists()
        run(source, out, RECIPE, progress=quiet, resume=True)
        assert digests(out) == digests(tmp_path / "whole")


def test_another_ratio_measures_nothing_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Probes lie with the statistics; `plan --stats` then names what `run` does, at once."""
    monkeypatch.chdir(tmp_path)
    stats = Path("stats")  # relative, as users type it
    with pytest.raises(InputError, match="no finished measurements"):
        forecast(source, RECIPE, stats)
    run(source, tmp_path / "a", RECIPE, progress=quiet, statistics=stats)
    other = replace(RECIPE, ratio=0.25)
    with monkeypatch.context() as patch:
        patch.setattr(probe, "observed_layer", None)
        patch.setattr(calibration, "StreamedModel", None)
        planned = forecast(source, other, stats)
    run(source, tmp_path / "b", other, progress=quiet, statistics=stats)
    report = json.loads((tmp_path / "b/report.json").read_text())
    keys = ("index", "form", "rank", "width")
    written = [layer for layer in report["layers"] if layer["form"] != "dense"]
    for mine, theirs in zip(planned["layers"], written, strict=True):
        assert [mine.get(key) for key in keys] == [theirs.get(key) for key in keys]
    assert planned["ratio"] == report["ratio"]
    run(source, tmp_path / "alone", other, progress=quiet)
    assert digests(tmp_path / "alone") == digests(tmp_path / "b")
    with pytest.raises(InputError, match="no finished measurements"):
        forecast(source, replace(other, dtype="bfloat16"), stats)
    with pytest.raises(InputError, match="another calibration"):
        forecast(source, replace(other, seed=1), stats)
    paper = replace(other, method="moe-svd", refit_steps=None)
    with pytest.raises(InputError, match="no finished measurements for --method moe-svd"):
        forecast(source, paper, stats)


def test_an_uncompressed_prefix_has_no_drift(source: Path, tmp_path: Path):
    checkpoint = open_checkpoint(source, allow_factored=False)
    ids_NS = torch.arange(64).view(2, 32)
    states = Trajectory(checkpoint, ids_NS, tmp_path / "states", 2, "cpu")
    states.run_dense(0)
    states.commit(0, None)
    task = states.task(1)
    assert task.drift_TD.abs().max() == 0
    change_TD = torch.full_like(task.drift_TD, 0.25)
    states.commit(1, change_TD)
    states.forget(1)
    again = Trajectory(checkpoint, ids_NS, tmp_path / "states", 2, "cpu")
    assert torch.equal(again.task(2).drift_TD, states.task(2).drift_TD)
    assert states.task is not None and len(list((tmp_path / "states").iterdir())) == 2


def test_sequences_are_fitted_or_probed():
    for num_sequences, seq_len in ((128, 512), (7, 64), (256, 256), (2, 9000)):
        split = split_sequences(num_sequences, seq_len)
        assert not set(split.fitted) & set(split.probed)
        assert split.fitted and split.probed
        assert max(split.fitted + split.probed) < num_sequences
    assert split_sequences(5, 8192).probed == (4,)


def test_the_loss_of_a_width_lies_between_its_probes():
    shape = MoEShape(hidden_size=128, expert_width=384, num_experts=8, top_k=2)
    probes = {"narrow-288": 0.001, "narrow-192": 0.004, "narrow-96": 0.003, "narrow-48": 0.05}
    losses = [narrow_loss(probes, shape, width) for width in range(8, 392, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0
    assert narrow_loss(probes, shape, 288) == pytest.approx(0.001)
    assert narrow_loss(probes, shape, 48) == pytest.approx(0.05)
