"""The switches of moe-svd and d2-moe through the command line: sizes, resume, verify, report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress_tool.checkpoint import open_checkpoint
from compress_tool.cli import main
from compress_tool.writer import OutputFolder
from tests.checkpoints import tiny_mixtral
from tests.compress_tool.test_methods import run_json
from tests.families import tiny

SMALL = ["--samples", "12", "--seq-len", "32"]
SWITCHES = {
    "k-auto": ["--method", "moe-svd", "--k", "auto"],
    "k-auto-dear": ["--method", "moe-svd", "--k", "auto", "--k-lambda", "1.3", "--groups", "2"],
    "merge": ["--method", "moe-svd", "--combine", "merge", "--k", "3"],
    "merge-auto": ["--method", "moe-svd", "--combine", "merge", "--k", "auto", "--groups", "2"],
    "fisher": ["--method", "d2-moe", "--base", "fisher"],
    "fisher-pruned": ["--method", "d2-moe", "--base", "fisher", "--base-prune", "0.4", "--share-v"],
    "merge-none": ["--method", "moe-svd", "--combine", "merge", "--k", "0"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "dense"
    return tiny_mixtral(path, num_hidden_layers=3, num_local_experts=6)


def layer_entries(out: Path) -> list[dict]:
    return json.loads((out / "report.json").read_text())["layers"]


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("ratio", [0.25, 0.55])
def test_a_switch_from_source_to_verify(capsys, source: Path, tmp_path: Path, name, ratio):
    flags = [*SWITCHES[name], "--ratio", ratio, *SMALL, "--stats", source.parent / "stats"]
    out = tmp_path / "out"
    ran = run_json(capsys, "run", source, out, *flags)
    assert ratio <= ran["ratio"] <= ratio + 0.005
    assert run_json(capsys, "verify", out, "--against", source)["ok"]
    written = open_checkpoint(out, allow_factored=True)
    assert written.total_bytes == ran["bytes_after"]
    # With the calibration at hand, the plan is the run's.
    planned = run_json(capsys, "plan", source, *flags)
    assert planned["bytes_after"] == ran["bytes_after"]
    factored = [entry for entry in layer_entries(out) if entry["form"] != "dense"]
    assert factored
    for entry in factored:
        spec = written.layer_spec(entry["index"])
        assert entry["distinct_experts"] == spec.num_slots == len(set(spec.expert_slot))
        if "fisher" in name:
            assert spec.num_slots == 6
            continue
        groups = spec.num_groups
        assert 1 <= entry["k"] <= 6 // groups or "none" in name
        if "merge" in name and "none" not in name:
            assert spec.num_slots == entry["k"] * groups
        if name == "merge-none":
            assert spec.num_slots == 6


def test_the_slots_follow_the_frequencies_at_every_price(capsys, source: Path, tmp_path: Path):
    slots = []
    for penalty in ("0", "1", "100"):
        out = tmp_path / penalty
        words = ["run", source, out, "--method", "moe-svd", "--rank", "20", "--k", "auto"]
        words += ["--k-lambda", penalty, *SMALL, "--stats", source.parent / "stats"]
        run_json(capsys, *words)
        slots.append([entry["distinct_experts"] for entry in layer_entries(out)])
    for dear, cheap in zip(slots[1:], slots[:-1], strict=True):
        assert all(d <= c for d, c in zip(dear, cheap, strict=True))
    assert slots[0] == [6, 6, 6]
    assert slots[2] == [1, 1, 1]


def run_words(source: Path, out: Path, name: str) -> list[str]:
    return [str(w) for w in ["run", source, out, "--ratio", "0.4", *SWITCHES[name], *SMALL]]


@pytest.mark.parametrize("name", ["k-auto", "merge-auto", "fisher"])
def test_a_killed_run_gives_the_same_bytes(source: Path, tmp_path: Path, monkeypatch, name):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(run_words(source, whole, name)) == 0

    class Killed(BaseException):
        pass

    save, calls = OutputFolder.save_layer_shard, 0

    def stopping(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        save(*args, **kwargs)

    monkeypatch.setattr(OutputFolder, "save_layer_shard", stopping)
    with pytest.raises(Killed):
        main(run_words(source, out, name))
    assert not out.exists()
    assert main([*run_words(source, out, name), "--resume"]) == 0
    for file in sorted(whole.iterdir()):
        if file.suffix == ".safetensors" or file.name == "config.json":
            assert (out / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--k", "some"], "--k"),
        (["--k", "-1"], "--k is -1"),
        (["--k-lambda", "2"], "--k-lambda belongs to --k auto"),
        (["--k", "auto", "--k-lambda", "-1"], "--k-lambda is -1"),
        (["--k", "auto", "--k-lambda", "nan"], "--k-lambda is nan"),
        (["--combine", "merge", "--whitening", "expert"], "--whitening top"),
    ],
)
def test_a_senseless_choice_is_refused_in_one_line(capsys, source, tmp_path, flags, named):
    words = ["run", str(source), str(tmp_path / "out"), "--method", "moe-svd", "--ratio", "0.3"]
    try:
        assert main([*words, *flags]) == 2
    except SystemExit as error:  # argparse refuses what is no number
        assert error.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unreachable_ratio_is_refused_before_anything(capsys, source: Path, tmp_path: Path):
    for name in ("k-auto", "merge-auto"):
        words = ["run", source, tmp_path / "out", *SWITCHES[name], *SMALL, "--ratio", "0.99"]
        assert main([str(word) for word in words]) == 4
        assert "cannot be reached" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["k-auto-dear", "merge-auto", "fisher"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_other_families_take_the_switches(capsys, tmp_path, monkeypatch, family, name):
    """Shared experts beside the routed ones, and layers without experts."""
    monkeypatch.setattr("compress_tool.pipeline.write_report", lambda out: None)
    source, out = tiny(tmp_path / "dense", family), tmp_path / "out"
    ran = run_json(capsys, "run", source, out, *SWITCHES[name], "--rank", "20", *SMALL)
    assert ran["bytes_after"] == open_checkpoint(out, allow_factored=True).total_bytes
    assert run_json(capsys, "verify", out, "--against", source)["ok"]
