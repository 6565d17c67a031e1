"""The audit: what a checkpoint is, what is refused, and what reading gives."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_tool.checkpoint import Checkpoint, open_checkpoint, scan_finite
from compress_tool.errors import InputError, TemporaryError
from tests.checkpoints import (
    POCKET_MIXTRAL,
    mixtral_config,
    mixtral_tensors,
    tiny_mixtral,
    write_checkpoint,
)
from tests.compress_tool.malformed import CASES, EXPERT, Case


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("good") / "model", num_shards=3)


def fused_tensors(tensors: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """The layout transformers 5 may write: all experts of a layer in two tensors."""
    fused = {name: t for name, t in tensors.items() if ".block_sparse_moe." not in name}
    for layer in range(num_layers):
        block = f"model.layers.{layer}.block_sparse_moe"
        num_experts = tensors[f"{block}.gate.weight"].shape[0]
        expert = [
            [tensors[f"{block}.experts.{e}.{w}.weight"] for w in ("w1", "w3", "w2")]
            for e in range(num_experts)
        ]
        prefix = f"model.layers.{layer}.mlp"
        fused[f"{prefix}.gate.weight"] = tensors[f"{block}.gate.weight"]
        fused[f"{prefix}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([w1, w3]) for w1, w3, _ in expert]
        )
        fused[f"{prefix}.experts.down_proj"] = torch.stack([w2 for _, _, w2 in expert])
    return fused


def snapshot(root: Path) -> dict[str, str]:
    """Digest of every regular file below `root`."""
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed_checkpoint_is_refused_in_one_line(good: Path, tmp_path: Path, case: Case):
    root = tmp_path / "model"
    shutil.copytree(good, root)
    case.damage(root)
    before = snapshot(tmp_path) if "device" not in case.name else {}
    with pytest.raises(case.kind) as caught:
        open_checkpoint(root, allow_factored=True)
    message = str(caught.value)
    assert type(caught.value) is case.kind
    assert "\n" not in message and message.isprintable()
    assert len(message) < 1000 or "long" in case.name
    for word in case.named:
        assert word in message
    assert before == (snapshot(tmp_path) if before else {})


def test_there_are_at_least_60_malformed_cases():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 60


def test_nothing_outside_the_folder_is_opened(good: Path, tmp_path: Path):
    """An audit hook sees every open; hooks cannot be removed, so it is switched off instead."""
    opened: list[str] = []
    is_on = [True]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and is_on[0] and isinstance(arguments[0], str | Path):
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    (tmp_path / "x.safetensors").write_bytes((good / "config.json").read_bytes())
    for case in CASES:
        root = tmp_path / case.name.replace("/", "-")
        shutil.copytree(good, root)
        is_on[0] = False
        case.damage(root)
        is_on[0] = True
        opened.clear()
        with pytest.raises(case.kind):
            open_checkpoint(root, allow_factored=True)
        is_on[0] = False
        assert [name for name in opened if not name.startswith(f"{root}/")] == []
        refused = (".bin", ".pt", ".pth", ".pkl", ".py")
        assert not [name for name in opened if name.lower().endswith(refused)]
        is_on[0] = True
    is_on[0] = False


@pytest.mark.parametrize("path", ["missing", "file", "missing/deeper", "file/deeper", "a\0b"])
def test_what_is_not_a_folder_is_bad_input(tmp_path: Path, path: str):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"folder|path"):
        open_checkpoint(tmp_path / path, allow_factored=False)


def test_empty_folder_names_config_json(tmp_path: Path):
    with pytest.raises(InputError, match=r"config\.json: missing"):
        open_checkpoint(tmp_path, allow_factored=False)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_reading_gives_the_stored_tensors(tmp_path: Path, num_shards: int):
    config = mixtral_config(dtype="bfloat16")
    tensors = mixtral_tensors(config)
    root = write_checkpoint(tmp_path / "m", config, tensors, num_shards=num_shards)
    checkpoint = open_checkpoint(root, allow_factored=False)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert torch.equal(checkpoint.read(name, torch.float32), tensor.float())
    assert checkpoint.total_params == sum(t.numel() for t in tensors.values())
    assert checkpoint.total_bytes == 2 * checkpoint.total_params
    assert checkpoint.routed_params == 2 * 4 * 3 * 64 * 96
    assert checkpoint.moe_layers == (0, 1)


def test_shards_without_an_index_are_read(good: Path, tmp_path: Path):
    root = tmp_path / "model"
    shutil.copytree(good, root)
    (root / "model.safetensors.index.json").unlink()
    assert set(open_checkpoint(root, allow_factored=False).tensors) == set(
        open_checkpoint(good, allow_factored=False).tensors
    )


def test_both_layouts_give_the_same_experts(tmp_path: Path):
    config = mixtral_config()
    tensors = mixtral_tensors(config)
    plain = open_checkpoint(
        write_checkpoint(tmp_path / "plain", config, tensors), allow_factored=False
    )
    fused = open_checkpoint(
        write_checkpoint(tmp_path / "fused", config, fused_tensors(tensors, 2)),
        allow_factored=False,
    )
    assert fused.is_fused(0) and not plain.is_fused(0)
    assert plain.routed_params == fused.routed_params
    assert plain.total_params == fused.total_params
    for layer in range(2):
        assert torch.equal(*(c.read(*c.router_tensors(layer).values()) for c in (plain, fused)))
        for expert in range(4):
            for projection in ("gate", "up", "down"):
                assert torch.equal(
                    plain.expert_weight(layer, expert, projection),
                    fused.expert_weight(layer, expert, projection),
                )


def test_a_tied_lm_head_counts_once(tmp_path: Path):
    config = mixtral_config(tie_word_embeddings=True)
    tensors = mixtral_tensors(config)
    absent = open_checkpoint(
        write_checkpoint(tmp_path / "a", config, tensors), allow_factored=False
    )
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    present = open_checkpoint(
        write_checkpoint(tmp_path / "b", config, tensors), allow_factored=False
    )
    assert absent.total_params == present.total_params
    assert absent.total_bytes == present.total_bytes
    assert "lm_head.weight" in present.outer_tensors()


def test_read_rows_is_one_entry_of_the_first_dimension(good: Path):
    checkpoint = open_checkpoint(good, allow_factored=False)
    assert torch.equal(checkpoint.read_rows(EXPERT, 5), checkpoint.read(EXPERT)[5])
    with pytest.raises(ValueError, match="out of range"):
        checkpoint.read_rows(EXPERT, 96)


def test_the_hub_cache_layout_is_accepted(good: Path, tmp_path: Path):
    blobs = tmp_path / "models--org--name" / "blobs"
    root = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    root.mkdir(parents=True)
    for number, file in enumerate(sorted(good.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (root / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert open_checkpoint(root, allow_factored=False).num_layers == 2
    # The same links into another model's cache are refused.
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (root / "config.json").unlink()
    shutil.copy(good / "config.json", other / "config")
    (root / "config.json").symlink_to("../../../models--org--other/blobs/config")
    with pytest.raises(InputError, match="leaves the checkpoint folder"):
        open_checkpoint(root, allow_factored=False)


def test_a_weight_file_under_another_name_does_not_disturb(good: Path, tmp_path: Path):
    """Mistral's own releases hold a second copy as consolidated.safetensors."""
    root = tmp_path / "model"
    shutil.copytree(good, root)
    (root / "consolidated.safetensors").write_bytes(b"never opened")
    assert open_checkpoint(root, allow_factored=False).num_layers == 2


def test_pocket_mixtral_is_accepted():
    checkpoint = open_checkpoint(POCKET_MIXTRAL, allow_factored=False)
    assert checkpoint.total_params == 10_365_056
    scan_finite(checkpoint, checkpoint.tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scan_names_the_tensor_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, dtype: str
):
    config = mixtral_config(dtype=dtype)
    tensors = mixtral_tensors(config)
    tensors[EXPERT][95, 63] = value
    checkpoint = open_checkpoint(
        write_checkpoint(tmp_path / "m", config, tensors), allow_factored=False
    )
    # A chunk of 100 bytes puts the number in the last, partial one.
    monkeypatch.setattr("compress_tool.checkpoint.SCAN_CHUNK_BYTES", 100)
    with pytest.raises(InputError, match=r"experts\.2\.w1\.weight.*\[95, 63\]"):
        scan_finite(checkpoint, checkpoint.tensors)
    read: list[int] = []
    fine = [name for name in checkpoint.tensors if name != EXPERT]
    scan_finite(checkpoint, fine, read.append)
    assert sum(read) == checkpoint.total_bytes - tensors[EXPERT].nbytes


def test_a_file_that_shrinks_after_the_audit_is_noticed(tmp_path: Path):
    root = tiny_mixtral(tmp_path / "model")
    checkpoint = open_checkpoint(root, allow_factored=False)
    last = max(checkpoint.tensors.values(), key=lambda info: info.end)
    data = last.file.read_bytes()
    last.file.write_bytes(data[:-10])
    with pytest.raises(InputError, match="file changed"):
        checkpoint.read(last.name)
    last.file.unlink()
    with pytest.raises(TemporaryError, match="reading failed"):
        checkpoint.read(last.name)


def test_a_compressed_source_is_refused_where_a_dense_one_is_needed(tmp_path: Path):
    root = narrow_checkpoint(tmp_path / "narrow")
    with pytest.raises(InputError, match="already compressed"):
        open_checkpoint(root, allow_factored=False)
    checkpoint = open_checkpoint(root, allow_factored=True)
    assert checkpoint.spec is not None and list(checkpoint.spec.layers) == [1]
    with pytest.raises(ValueError, match="no dense expert"):
        checkpoint.expert_weight(1, 0, "gate")
    assert checkpoint.expert_weight(0, 0, "gate").shape == (96, 64)


def narrow_checkpoint(root: Path) -> Path:
    config = mixtral_config(
        architectures=["MixtralMoESVDForCausalLM"],
        moesvd={"format_version": 1, "layers": {"1": {"form": "narrow", "width": 8}}},
    )
    tensors = mixtral_tensors(config)
    for name in list(tensors):
        if name.startswith("model.layers.1.block_sparse_moe.experts"):
            is_down = ".w2." in name
            tensors[name] = (tensors[name][:, :8] if is_down else tensors[name][:8]).contiguous()
    return write_checkpoint(root, config, tensors)


def test_no_tensor_is_read_to_open_a_checkpoint(good: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("compress_tool.checkpoint.read_slice", None)
    checkpoint = open_checkpoint(good, allow_factored=False)
    assert isinstance(checkpoint, Checkpoint)


def test_load_and_save_of_this_file_agree(good: Path, tmp_path: Path):
    """Our header reader accepts what the library writes, metadata or not, any dtype order."""
    tensors = load_file(good / "model-00001-of-00003.safetensors")
    assert tensors
    save_file(tensors, tmp_path / "a.safetensors", metadata={"k": "v" * 1000})
    from compress_tool.headers import read_header

    for name, info in read_header(tmp_path / "a.safetensors").items():
        assert info.shape == tuple(tensors[name].shape)
