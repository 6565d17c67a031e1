"""The command line as its users meet it: flags, exit codes, one line per error, JSON alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from compress_tool.arguments import build_parser
from compress_tool.cli import COMMANDS, main
from tests.checkpoints import mixtral_config, mixtral_tensors, tiny_mixtral, write_checkpoint

SMALL = ["--samples", "12", "--seq-len", "32"]

FLAGS = {
    "inspect": {"--json"},
    "verify": {"--json", "--against"},
    "eval": {
        "--json",
        "--text",
        "--against",
        "--seq-len",
        "--batch-size",
        "--device",
        "--dynamic-prune",
        "--tasks",
        "--limit",
        "--num-fewshot",
    },
    "report": {"--json", "--compare"},
    "export-dense": {"--json", "--dtype", "--resume"},
}
RECIPE_FLAGS = {
    "--recipe", "--ratio", "--ratio-of", "--rank", "--method", "--layers", "--groups", "--k",
    "--k-lambda",
    "--combine", "--whitening", "--layer-rank-share", "--centre", "--alpha", "--nearest",
    "--refit-steps", "--base", "--base-prune", "--share-v", "--calibration",
    "--samples", "--seq-len", "--batch-size", "--seed", "--dtype",
}  # fmt: skip
FLAGS["plan"] = {"--json", "--stats"} | RECIPE_FLAGS
FLAGS["run"] = {"--json", "--resume", "--stats", "--device"} | RECIPE_FLAGS


def test_the_flags_are_frozen():
    """A flag is a promise to scripts: adding or renaming one is a decision, made here."""
    parser = build_parser()
    (commands,) = (a for a in parser._actions if hasattr(a, "choices") and a.choices)
    found = {
        name: {o for a in sub._actions for o in a.option_strings} - {"-h", "--help"}
        for name, sub in commands.choices.items()
    }
    assert found == FLAGS


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("source") / "dense", num_hidden_layers=3)


@pytest.fixture(scope="module")
def compressed(source: Path) -> Path:
    out = source.parent / "compressed"
    assert main(["run", str(source), str(out), "--ratio", "0.3", *SMALL]) == 0
    return out


def run_json(capsys, *words: str | Path) -> dict:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_and_run_agree_on_every_size(capsys, source: Path, tmp_path: Path):
    asked = ["--method", "latent", "--ratio", "0.3", *SMALL]
    planned = run_json(capsys, "plan", source, *asked)
    ran = run_json(capsys, "run", source, tmp_path / "out", *asked)
    keys = ("total_params_before", "total_params_after", "ratio", "bytes_before", "bytes_after")
    assert {k: planned[k] for k in keys} == {k: ran[k] for k in keys}
    assert 0.3 <= ran["ratio"] <= 0.305
    inspected = run_json(capsys, "inspect", tmp_path / "out")
    assert inspected["total_params"] == ran["total_params_after"]
    assert inspected["bytes"] == ran["bytes_after"]
    assert inspected["factored_layers"] == [0, 1, 2]
    assert [layer["index"] for layer in ran["layers"]] == [0, 1, 2]
    assert {"form", "rank", "predicted_loss"} <= set(ran["layers"][0])


def test_plan_reads_a_bare_config(capsys, source: Path):
    folder = run_json(capsys, "plan", source, "--ratio", "0.3")
    bare = run_json(capsys, "plan", source / "config.json", "--ratio", "0.3")
    assert folder["total_params_after"] == bare["total_params_after"]


def test_plan_of_the_true_mixtral_keeps_forty_percent(capsys, tmp_path: Path):
    config = mixtral_config(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, num_local_experts=8, vocab_size=32000,
        dtype="bfloat16", max_position_embeddings=32768,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["plan", tmp_path / "config.json", "--ratio", "0.40", "--method", "latent"]
    plan = run_json(capsys, *words)
    assert plan["total_params_before"] == 46_702_792_704
    assert plan["bytes_before"] == 2 * 46_702_792_704
    assert 0.40 <= plan["ratio"] <= 0.405
    assert plan["peak_memory_bytes"] < 24 * 2**30


def test_eval_and_verify(capsys, source: Path, compressed: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    alone = run_json(capsys, "eval", compressed, "--text", text, "--seq-len", "64")
    both = run_json(
        capsys, "eval", compressed, "--text", text, "--seq-len", "64", "--against", source
    )
    assert alone["kl"] is None
    assert alone["perplexity"] == pytest.approx(both["perplexity"], rel=1e-9)
    assert both["kl"] > 0
    assert 0 < both["agreement"] <= 1
    same = run_json(capsys, "eval", source, "--text", text, "--against", source)
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    assert same["agreement"] == 1
    assert run_json(capsys, "verify", compressed, "--against", source)["ok"]


def test_verify_finds_damage_and_exits_6(capsys, source: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert main(["run", str(source), str(out), "--rank", "8", *SMALL]) == 0
    shard = next(out.glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 4
    shard.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(out), "--json"]) == 6
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert shard.name in result["problems"][0]


def _refused(capsys, words: list, code: int, *named: str) -> None:
    assert main([str(word) for word in words]) == code
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, output.err
    assert "Traceback" not in output.err
    for name in named:
        assert name in lines[0]


@pytest.mark.parametrize("ratio", ["0", "1", "-1", "2"])
def test_an_impossible_ratio_is_a_usage_error(capsys, source: Path, tmp_path: Path, ratio: str):
    _refused(capsys, ["run", source, tmp_path / "o", f"--ratio={ratio}"], 2, "--ratio")
    assert not list(tmp_path.iterdir())


def test_an_unreachable_ratio_names_the_maximum(capsys, source: Path, tmp_path: Path):
    _refused(capsys, ["run", source, tmp_path / "o", "--ratio", "0.97"], 4, "ask for at most")
    assert not list(tmp_path.iterdir())


def test_a_compressed_source_is_refused(capsys, compressed: Path, tmp_path: Path):
    _refused(capsys, ["run", compressed, tmp_path / "o", "--ratio", "0.3"], 3, "already compressed")
    assert not list(tmp_path.iterdir())


def test_not_a_checkpoint(capsys, tmp_path: Path):
    _refused(capsys, ["run", tmp_path / "none", tmp_path / "o", "--ratio", "0.3"], 3, "none")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "too short"])
def test_too_little_calibration_text(capsys, source: Path, tmp_path: Path, text: str):
    file = tmp_path / "text.txt"
    file.write_text(text)
    words = ["run", source, tmp_path / "o", "--ratio", "0.3", "--calibration", file]
    _refused(capsys, words, 3, "text.txt", "tokens")
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_calibration_file(capsys, source: Path, tmp_path: Path):
    words = ["run", source, tmp_path / "o", "--ratio", "0.3", "--calibration", tmp_path / "no.txt"]
    _refused(capsys, words, 3, "no.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(capsys, tmp_path: Path, value: float):
    config = mixtral_config()
    tensors = mixtral_tensors(config)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name][5, 7] = value
    source = write_checkpoint(tmp_path / "dense", config, tensors)
    _refused(capsys, ["run", source, tmp_path / "o", "--ratio", "0.3", *SMALL], 3, name)
    assert list(tmp_path.iterdir()) == [source]


def test_an_output_folder_that_is_not_ours(capsys, source: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    _refused(capsys, ["run", source, out, "--ratio", "0.3", *SMALL], 2, "not ours")
    _refused(capsys, ["run", source, out, "--ratio", "0.3", "--resume", *SMALL], 2, "not ours")
    assert (out / "thesis.txt").read_text() == "precious"


def test_an_unsupported_architecture_lists_the_supported(capsys, tmp_path: Path):
    (tmp_path / "m").mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    words = ["run", tmp_path / "m", tmp_path / "o", "--ratio", "0.3"]
    _refused(capsys, words, 7, "LlamaForCausalLM", "MixtralForCausalLM")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_disk_ends_with_4_and_resumes_after_room_is_made(capsys, source: Path, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine allows no mounts")
    try:
        words = ["run", source, disk / "out", "--ratio", "0.3", *SMALL]
        (disk / "ballast").write_bytes(bytes(2_200_000))
        _refused(capsys, words, 4, str(disk))
        assert not (disk / "out").exists()
        (disk / "ballast").unlink()
        assert main([str(word) for word in [*words, "--resume"]]) == 0
        assert main(["verify", str(disk / "out")]) == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(24, "Too many open files", "shard"), 75),
        (MemoryError(), 4),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), 4),
    ],
)
def test_failures_of_the_machine_are_one_line(capsys, monkeypatch, source: Path, error, code):
    def fail(options, progress):
        raise error

    monkeypatch.setitem(COMMANDS, "inspect", fail)
    _refused(capsys, ["inspect", source], code)


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_finished_run_is_recognised(capsys, source: Path, compressed: Path):
    words = ["run", source, compressed, "--ratio", "0.3", *SMALL]
    _refused(capsys, words, 2, "exists")
    again = run_json(capsys, *words, "--resume")
    assert again["already_finished"]
    _refused(capsys, [*words[:-1], "33", "--resume"], 2, "seq_len")


def _spawn(words: list) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "compress_tool", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_anywhere_then_resumed_gives_the_same_bytes(
    source: Path, compressed: Path, tmp_path: Path, number: int
):
    """Killed at each stage: when the scan, the statistics and the first shards appear."""
    out = tmp_path / "out"
    words = ["run", source, out, "--ratio", "0.3", *SMALL, "--resume"]
    marks = ("state/scanned", "state/statistics/hidden-00001.bin", "layers/layer-00001.json")
    for mark in marks:
        process = _spawn(words)
        watched = tmp_path / "out.partial" / mark
        while process.poll() is None and not watched.exists():
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode in {-9, 130, 143}
        assert not out.exists()
        assert not (tmp_path / "out.partial" / "checkpoint" / "config.json").exists()
        if number != signal.SIGKILL:
            assert "--resume" in errors.splitlines()[-1]
            assert "Traceback" not in errors
    process = _spawn(words)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert _files(out) == _files(compressed)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--method", "latent"], ["--refit-steps", "12"]], ids=["latent", "auto"]
)
def test_peak_memory_does_not_grow_with_the_layers_and_is_forecast(tmp_path: Path, flags: list):
    """A leak of one layer per layer would add 12 × 6 MiB."""
    peak = {}
    for num_layers in (4, 16):
        source = tiny_mixtral(
            tmp_path / f"dense-{num_layers}", num_hidden_layers=num_layers, hidden_size=128,
            intermediate_size=256, num_local_experts=16,
        )  # fmt: skip
        out = tmp_path / f"out-{num_layers}"
        words = ["run", source, out, "--ratio", "0.3", "--samples", "16", "--seq-len", "64"]
        words += flags
        process = _spawn([*words, "--json"])
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        peak[num_layers] = json.loads(output)["peak_memory_bytes"]
        process = _spawn(["plan", *words[1:2], *words[3:], "--json"])
        forecast = json.loads(process.communicate(timeout=120)[0])["peak_memory_bytes"]
        assert peak[num_layers] <= 1.2 * forecast <= 1.44 * peak[num_layers]
    assert peak[16] - peak[4] < 40 * 2**20


def test_statistics_are_reused(capsys, source: Path, tmp_path: Path):
    stats = tmp_path / "stats"
    first = tmp_path / "a"
    words = ["--ratio", "0.3", *SMALL, "--stats", stats]
    assert main([str(w) for w in ["run", source, first, *words]]) == 0
    before = {file: file.stat().st_mtime_ns for file in stats.glob("layer-*")}
    assert len(before) == 3
    words[1] = "0.4"
    words += ["--method", "svd"]
    assert main([str(w) for w in ["run", source, tmp_path / "b", *words]]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in stats.glob("layer-*")}
    torch.manual_seed(0)
    capsys.readouterr()
    other = tiny_mixtral(tmp_path / "other", seed=1, num_hidden_layers=3)
    _refused(capsys, ["run", other, tmp_path / "c", *words], 3, "stats")
