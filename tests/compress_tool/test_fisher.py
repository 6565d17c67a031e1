"""The Fisher base: the streamed backward pass gives what autograd gives on the whole model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compress_tool.fisher as fisher
from compress_tool.calibration import calibrate
from compress_tool.calibration_state import statistics_file
from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.errors import InputError, ResourceError
from compress_tool.fisher import fisher_base, measure_fisher
from compress_tool.layer_stats import LayerStatistics
from tests.checkpoints import mixtral_config, mixtral_tensors, tiny_mixtral, write_checkpoint
from vllm_moesvd.format import PROJECTIONS

NUM_LAYERS = 3


def silent(stage: str, done: int, total: int, detail: str) -> None:
    pass


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp("source") / "dense"
    return open_checkpoint(
        tiny_mixtral(path, num_hidden_layers=NUM_LAYERS, hidden_size=32, intermediate_size=24),
        allow_factored=False,
    )


@pytest.fixture(scope="module")
def ids_NS() -> torch.Tensor:
    return torch.randint(0, 256, (5, 9), generator=torch.Generator().manual_seed(4))


def calibrated(source: Checkpoint, ids_NS: torch.Tensor, path: Path) -> Path:
    calibrate(source, ids_NS, path, batch_size=2, progress=silent, resume=False)
    return path


@pytest.fixture(scope="module")
def measured(source, ids_NS, tmp_path_factory) -> Path:
    path = calibrated(source, ids_NS, tmp_path_factory.mktemp("measured"))
    measure_fisher(source, ids_NS, path, silent)
    return path


def expected_bases(source: Checkpoint, ids_NS: torch.Tensor, stats: Path, *, shuffle: bool = False):
    """Σ f F ⊙ W / Σ f F from transformers' own model, all of it in memory, in fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source.path,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    blocks = [layer.mlp.experts for layer in model.model.layers]
    names = "gate_up_proj", "down_proj"
    for block in blocks:
        for name in names:
            getattr(block, name).requires_grad_()
    squares = [[0.0, 0.0] for _ in blocks]
    for ids in ids_NS:
        model.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        for square, block in zip(squares, blocks, strict=True):
            for kind, name in enumerate(names):
                square[kind] = square[kind] + getattr(block, name).grad.square() / len(ids_NS)
    bases = []
    for layer, (square, block) in enumerate(zip(squares, blocks, strict=True)):
        counts = LayerStatistics.load(statistics_file(stats, layer)).counts_E.double()
        if shuffle:
            counts = counts.roll(1)
        parts = []
        for kind, name in enumerate(names):
            weight = getattr(block, name).detach()
            scaled = square[kind] * (counts / counts.sum())[:, None, None]
            parts.append((scaled * weight).sum(dim=0) / scaled.sum(dim=0))
        width = parts[1].shape[1]
        bases.append((parts[0][:width], parts[0][width:], parts[1]))
    return bases


def distance(left, right) -> float:
    return max(
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(left, right, strict=True)
    )


def test_the_base_is_that_of_autograd_on_the_whole_model(source, ids_NS, measured):
    expected = expected_bases(source, ids_NS, measured)
    wrong = expected_bases(source, ids_NS, measured, shuffle=True)
    fewer = expected_bases(source, ids_NS[:-1], measured)
    for layer in range(NUM_LAYERS):
        base = fisher_base(measured, layer)
        # Measured 7e-7: fp32 gradients against fp64.
        assert distance(base, expected[layer]) < 5e-6
        # Null tests: a frequency moved to its neighbour, a sequence left out, another layer.
        assert distance(base, wrong[layer]) > 1e-2
        assert distance(base, fewer[layer]) > 1e-2
        assert distance(base, expected[layer - 1]) > 1e-1


def test_the_base_lies_between_the_experts(source, measured):
    for layer in range(NUM_LAYERS):
        for projection, base in zip(PROJECTIONS, fisher_base(measured, layer), strict=True):
            stack = torch.stack([source.expert_weight(layer, e, projection) for e in range(4)])
            assert bool((base >= stack.amin(dim=0) - 1e-6).all())
            assert bool((base <= stack.amax(dim=0) + 1e-6).all())


def test_nothing_but_the_results_stays(measured: Path):
    names = sorted(file.name for file in measured.glob("fisher-*"))
    assert names == [f"fisher-0000{layer}.safetensors" for layer in range(NUM_LAYERS)]


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_killed_pass_goes_on_to_the_same_bytes(
    source, ids_NS, measured, tmp_path, monkeypatch, stop
):
    """Killed before any of its writes: 4 states, 4 gradients and 3 bases in all."""
    path = calibrated(source, ids_NS, tmp_path / "stats")
    write, calls = fisher.write_file, 0

    class Killed(BaseException):
        pass

    def stopping(file, chunks):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Killed
        return write(file, chunks)

    monkeypatch.setattr(fisher, "write_file", stopping)
    with pytest.raises(Killed):
        measure_fisher(source, ids_NS, path, silent)
    monkeypatch.setattr(fisher, "write_file", write)
    measure_fisher(source, ids_NS, path, silent)
    files = sorted(path.glob("fisher-*"))
    assert [file.name for file in files] == [f.name for f in sorted(measured.glob("fisher-*"))]
    for file in files:
        assert file.read_bytes() == (measured / file.name).read_bytes()


def test_a_finished_pass_is_not_repeated(source, ids_NS, measured, monkeypatch):
    monkeypatch.setattr(fisher, "StreamedModel", None)
    measure_fisher(source, ids_NS, measured, silent)


def test_an_expert_that_no_sequence_reached_counts_for_nothing(tmp_path):
    """Its elements have no gradient; where none has one, the mean by frequency is taken."""
    config = mixtral_config(num_hidden_layers=1, hidden_size=32, intermediate_size=24)
    tensors = mixtral_tensors(config)
    # Equal logits: the same two experts for every token. Neuron 3 is dead in all of them.
    tensors["model.layers.0.block_sparse_moe.gate.weight"].zero_()
    for expert in range(4):
        for name in ("w1", "w3"):
            tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"][3] = 0
    source = open_checkpoint(
        write_checkpoint(tmp_path / "dense", config, tensors), allow_factored=False
    )
    ids_NS = torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(4))
    path = calibrated(source, ids_NS, tmp_path / "stats")
    counts = LayerStatistics.load(statistics_file(path, 0)).counts_E
    assert sorted(counts.tolist()) == [0, 0, 24, 24]
    used = counts.nonzero()[:, 0].tolist()
    measure_fisher(source, ids_NS, path, silent)
    base = fisher_base(path, 0)
    for projection, base_part in zip(PROJECTIONS, base, strict=True):
        stack = torch.stack([source.expert_weight(0, e, projection) for e in used])
        assert bool((base_part >= stack.amin(dim=0) - 1e-6).all())
        assert bool((base_part <= stack.amax(dim=0) + 1e-6).all())
    # h of the dead neuron is 0, so its column of down has no gradient.
    downs = [source.expert_weight(0, e, "down")[:, 3] for e in used]
    torch.testing.assert_close(base[2][:, 3], (downs[0] + downs[1]) / 2)


def test_the_sequences_are_spread_over_all_windows():
    ids_NS = torch.arange(100)[:, None]
    chosen = fisher._spread(ids_NS)[:, 0].tolist()
    assert len(chosen) == len(set(chosen)) == fisher.FISHER_SEQUENCES
    assert (chosen[0], chosen[-1]) == (0, 99)
    assert fisher._spread(ids_NS[:3])[:, 0].tolist() == [0, 1, 2]


def test_a_full_disk_is_said_before_anything_is_computed(source, ids_NS, tmp_path, monkeypatch):
    path = calibrated(source, ids_NS, tmp_path / "stats")
    needed = fisher.fisher_bytes(source, *ids_NS.shape)
    monkeypatch.setattr(
        fisher.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1, total=0, used=0)
    )
    with pytest.raises(ResourceError, match=r"--base fisher, .* free"):
        measure_fisher(source, ids_NS, path, silent)
    assert not list(path.glob("fisher-*"))


def test_the_disk_forecast_is_an_upper_bound(source, ids_NS, tmp_path, monkeypatch):
    path, largest = calibrated(source, ids_NS, tmp_path / "stats"), 0
    write = fisher.write_file

    def watching(file, chunks):
        nonlocal largest
        write(file, chunks)
        largest = max(largest, sum(f.stat().st_size for f in path.glob("fisher-*")))

    monkeypatch.setattr(fisher, "write_file", watching)
    measure_fisher(source, ids_NS, path, silent)
    forecast = fisher.fisher_bytes(source, *ids_NS.shape)
    assert 0.5 * forecast < largest <= forecast


def test_a_damaged_file_is_named(source, ids_NS, measured, tmp_path):
    for name in ("short", "empty"):
        folder = tmp_path / name
        folder.mkdir()
        data = fisher.fisher_file(measured, 1).read_bytes()
        fisher.fisher_file(folder, 1).write_bytes(data[:-40] if name == "short" else b"")
        with pytest.raises(InputError, match="fisher-00001"):
            fisher_base(folder, 1)
    path = calibrated(source, ids_NS, tmp_path / "stats")
    (path / "fisher-gradient-00002.bin").write_bytes(b"1234")
    with pytest.raises(InputError, match="gradient-00002"):
        measure_fisher(source, ids_NS, path, silent)
