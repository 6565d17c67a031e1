"""verify finds every changed bit, and compares with the source what can be compared."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.errors import InputError, UsageError
from compress_tool.manifest import source_identity
from compress_tool.packing import folded_expert
from compress_tool.verify import verify
from compress_tool.weight_error import layer_weight_error
from compress_tool.writer import OutputFolder, factored_config
from tests.checkpoints import tiny_mixtral
from vllm_moesvd.format import (
    PROJECTIONS,
    CheckpointSpec,
    FactoredSpec,
    LatentSpec,
    LayerSpec,
    NarrowSpec,
    layer_tensors,
)

SPECS: dict[int, LayerSpec] = {
    0: LatentSpec(rank_gate_up=32, rank_down=24, width=96, bias=True),
    1: FactoredSpec(rank_gate_up=16, rank_down=8, expert_slot=(0, 1, 1, 2), slot_group=(0, 0, 1)),
    2: NarrowSpec(width=40),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tiny_mixtral(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=4)
    return open_checkpoint(root, allow_factored=False)


def write(source: Checkpoint, out: Path, *, error_factor: float = 1.0, seed: int = 0) -> Path:
    """Random factors for layers 0 to 2, layer 3 dense; weight errors in the manifest."""
    generator = torch.Generator().manual_seed(seed)
    config = factored_config(source, CheckpointSpec(layers=SPECS))
    for final in (False, True):
        generator.manual_seed(seed)
        folder = out if final else out.with_name("first")
        with OutputFolder(folder, job={"seed": seed}, num_layers=4) as output:
            for layer in range(4):
                entry: dict[str, object] = {}
                tensors = None
                if layer in SPECS:
                    sizes = layer_tensors(SPECS[layer], source.shape, source.family, layer)
                    tensors = {
                        name: torch.randn(size, generator=generator) / 8
                        for name, size in sizes.items()
                    }
                    if final:
                        first = open_checkpoint(out.with_name("first"), allow_factored=True)
                        errors = layer_weight_error(
                            source,
                            layer,
                            lambda expert, at=layer, first=first: folded_expert(first, at, expert),
                        )
                        entry["weight_error"] = errors and {
                            key: value * error_factor for key, value in errors.items()
                        }
                output.save_layer_shard(layer, source, tensors, entry)
            output.carry_over(source)
            output.finish(
                source=source,
                config=config,
                source_record=source_identity(source),
                texts={"recipe.yaml": b"a: 1\n"},
            )
    return out


@pytest.fixture(scope="module")
def good(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(source, tmp_path_factory.mktemp("good") / "out")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_good_checkpoint_has_no_problem(good: Path, source: Checkpoint):
    result = verify(good)
    assert result.ok and result.problems == ()
    assert result.checked_tensors == len(open_checkpoint(good, allow_factored=True).tensors)
    assert [layer.form for layer in result.layers] == ["latent", "shared-v", "narrow", "dense"]
    said: list[str] = []
    compared = verify(good, against=source, progress=said.append)
    assert compared.problems == ()
    assert said[0] == "hashes" and "model.norm.weight" in said
    for layer in compared.layers[:2]:
        assert layer.weight_error is not None
        assert layer.weight_error == pytest.approx(layer.recorded_weight_error)
    # Neurons of a narrow layer do not correspond to neurons of the source.
    assert compared.layers[2].weight_error is None


def test_200_flipped_bits_are_all_found(copy: Path):
    """Every file counts in proportion to its size, small ones at least a few times."""
    generator = random.Random(0)
    files = sorted(copy.iterdir())
    chosen = files * 10
    chosen += generator.choices(files, [file.stat().st_size for file in files], k=200)
    for file in chosen:
        data = bytearray(file.read_bytes())
        original = bytes(data)
        position = generator.randrange(len(data))
        data[position] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        result = verify(copy)
        assert not result.ok, (file.name, position)
        assert any(file.name in problem for problem in result.problems)
        assert all("\n" not in problem for problem in result.problems)
        file.write_bytes(original)
    assert verify(copy).ok


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "manifest.json",
        "model-00003-of-00005.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "recipe.yaml",
    ],
)
def test_a_missing_or_shortened_file_is_named(copy: Path, name: str):
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    assert any(name in problem for problem in verify(copy).problems)
    (copy / name).unlink()
    assert any(name in problem for problem in verify(copy).problems)


def test_a_file_that_is_not_in_the_manifest_is_named(copy: Path):
    (copy / "report.html").write_text("made later")
    (copy / ".gitattributes").write_text("hidden")
    assert verify(copy).ok
    (copy / "extra.json").write_text("{}")
    assert verify(copy).problems == (f"{copy}: 'extra.json' is not in the manifest; remove it",)


def test_wrong_weight_errors_in_the_manifest_are_found(source: Checkpoint, tmp_path: Path):
    out = write(source, tmp_path / "out", error_factor=1.01)
    assert verify(out).ok
    problems = verify(out, against=source).problems
    assert len(problems) == 6
    for layer in (0, 1):
        for projection in PROJECTIONS:
            assert any(f"layer {layer} {projection}: relative" in problem for problem in problems)


def test_another_source_is_found(good: Path, tmp_path: Path):
    """Same shapes, other weights: every copied tensor differs, the norms of ones do not."""
    other = open_checkpoint(
        tiny_mixtral(tmp_path / "other", seed=1, num_hidden_layers=4), allow_factored=False
    )
    problems = verify(good, against=other).problems
    assert any("model.embed_tokens.weight is not a copy" in problem for problem in problems)
    assert any("layers.3.block_sparse_moe.experts.0.w1" in problem for problem in problems)
    assert not any("norm.weight is not" in problem for problem in problems)
    assert any("layer 0 gate: relative weight error" in problem for problem in problems)


def test_a_source_of_another_shape_is_found(good: Path, tmp_path: Path):
    other = open_checkpoint(
        tiny_mixtral(tmp_path / "other", num_hidden_layers=3), allow_factored=False
    )
    problems = verify(good, against=other).problems
    assert len(problems) == 1 and "'num_hidden_layers' 4, the source 3" in problems[0]


def test_a_changed_tokenizer_of_the_source_is_found(good: Path, source: Checkpoint, tmp_path: Path):
    shutil.copytree(source.path, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    other = open_checkpoint(tmp_path / "other", allow_factored=False)
    problems = verify(good, against=other).problems
    assert problems == (f"{good / 'tokenizer.json'}: is not the source's tokenizer.json",)


def test_values_that_are_not_finite_are_named(source: Checkpoint, tmp_path: Path):
    """Written so by the tool itself: every hash is right."""
    sizes = layer_tensors(SPECS[2], source.shape, source.family, 2)
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    broken = min(tensors)
    tensors[broken][3, 5] = torch.nan
    with OutputFolder(tmp_path / "out", job={}, num_layers=4) as output:
        for layer in range(4):
            output.save_layer_shard(layer, source, tensors if layer == 2 else None, {})
        output.carry_over(source)
        output.finish(
            source=source,
            config=factored_config(source, CheckpointSpec(layers={2: SPECS[2]})),
            source_record=source_identity(source),
            texts={},
        )
    problems = verify(tmp_path / "out").problems
    assert len(problems) == 1
    assert broken in problems[0] and "nan at [3, 5]" in problems[0]


def test_a_checkpoint_without_manifest_is_a_problem(source: Checkpoint):
    (problem,) = verify(source.path).problems
    assert problem.startswith(f"{source.path / 'manifest.json'}: missing")


def test_no_folder_is_bad_input(tmp_path: Path, good: Path, source: Checkpoint):
    with pytest.raises(InputError, match="no such folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(UsageError, match="takes the dense source"):
        verify(good, against=open_checkpoint(good, allow_factored=True))


def test_a_changed_architecture_is_damage_and_not_a_matter_of_support(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    config["architectures"] = ["XForCausalLM"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "config.json: differs from the manifest" in verify(copy).problems[0]


def test_the_identity_of_a_source_notices_other_weights(source: Checkpoint, tmp_path: Path):
    other = open_checkpoint(
        tiny_mixtral(tmp_path / "other", seed=1, num_hidden_layers=4), allow_factored=False
    )
    assert source_identity(source)["headers"] == source_identity(other)["headers"]
    assert source_identity(source) != source_identity(other)


def test_a_full_hash_of_the_source_notices_one_weight(source: Checkpoint, tmp_path: Path):
    """Deep inside a tensor, where the sample does not look."""
    shutil.copytree(source.path, tmp_path / "other")
    info = source.tensors["model.embed_tokens.weight"]
    data = bytearray(info.file.read_bytes())
    data[info.end - 1] ^= 1
    (tmp_path / "other" / info.file.name).write_bytes(data)
    other = open_checkpoint(tmp_path / "other", allow_factored=False)
    assert source_identity(source) == source_identity(other)
    full = source_identity(source, hash_weights=True)
    assert full != source_identity(other, hash_weights=True)
    assert "model.safetensors" in full["files"]
