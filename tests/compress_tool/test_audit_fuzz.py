"""No bytes make the readers of untrusted files fail with anything but a ToolError."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress_tool.checkpoint import open_checkpoint
from compress_tool.errors import InputError, ToolError, UnsupportedError
from compress_tool.headers import read_header
from tests.checkpoints import mixtral_config, tiny_mixtral

FUZZ = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["F32", "BF16", "../x.safetensors", "/etc/passwd", "a\0", "\ud800", SHARD]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("fuzz") / "model", num_shards=2)


def opens_or_refuses(root: Path) -> None:
    try:
        open_checkpoint(root, allow_factored=True)
    except (InputError, UnsupportedError) as error:
        assert "\n" not in str(error) and str(error).strip()


def with_file(root: Path, name: str, data: bytes, check: Callable[[Path], None]) -> None:
    """Run `check` with one file replaced, then restore it."""
    original = (root / name).read_bytes()
    (root / name).write_bytes(data)
    try:
        check(root)
    finally:
        (root / name).write_bytes(original)


def framed(text: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + payload


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes_as_a_shard(folder: Path, data: bytes):
    with_file(folder, SHARD, data, opens_or_refuses)


@FUZZ
@given(text=st.binary(max_size=200), payload=st.binary(max_size=64))
def test_any_bytes_as_a_header(tmp_path: Path, text: bytes, payload: bytes):
    file = tmp_path / "x.safetensors"
    file.write_bytes(framed(text, payload))
    with pytest.raises(ToolError):
        read_header(file)


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F7", 3, None]),
        "shape": st.lists(st.integers(-1, 5) | st.just(2**63), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | json_values,
        "extra": json_values,
    },
)


@FUZZ
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b.weight", "__metadata__", "../x", "", "a\nb"]),
        entries | json_values,
        max_size=4,
    ),
    num_bytes=st.integers(0, 64),
)
def test_any_json_as_a_header(tmp_path: Path, header: dict[str, Any], num_bytes: int):
    """A header is refused or describes the file: every byte belongs to exactly one tensor."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(framed(json.dumps(header).encode(), bytes(num_bytes)))
    try:
        tensors = read_header(file)
    except InputError as error:
        assert str(file) in str(error) and "\n" not in str(error)
        return
    assert sum(info.num_bytes for info in tensors.values()) == num_bytes
    assert set(tensors) == set(header) - {"__metadata__"}


@FUZZ
@given(index=json_values | st.fixed_dictionaries({"weight_map": json_values}))
def test_any_json_as_an_index(folder: Path, index: Any):
    with_file(folder, INDEX, json.dumps(index).encode(), opens_or_refuses)


@FUZZ
@given(target=st.text(max_size=40) | json_values)
def test_any_target_in_the_index(folder: Path, target: Any):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = target
    with_file(folder, INDEX, json.dumps(index).encode(), opens_or_refuses)


@FUZZ
@given(data=st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_config(folder: Path, data: bytes):
    with_file(folder, "config.json", data, opens_or_refuses)
    with_file(folder, "tokenizer_config.json", data, opens_or_refuses)


@FUZZ
@given(key=st.sampled_from(sorted(mixtral_config())), value=json_values)
def test_any_value_of_a_known_key(folder: Path, key: str, value: Any):
    data = json.dumps(mixtral_config() | {key: value}).encode()
    with_file(folder, "config.json", data, opens_or_refuses)


layer_entries = st.fixed_dictionaries(
    {"form": st.sampled_from(["latent", "narrow", "shared-v", "svd", "base-delta"]) | json_values},
    optional={
        "rank_gate_up": st.integers(0, 100) | json_values,
        "rank_down": st.integers(0, 100) | json_values,
        "width": st.integers(0, 100) | json_values,
        "bias": json_values,
        "expert_slot": st.lists(st.integers(0, 4), max_size=5) | json_values,
        "slot_group": st.lists(st.integers(0, 4), max_size=5) | json_values,
    },
)


@FUZZ
@given(
    layers=st.dictionaries(st.sampled_from(["0", "1", "2", "01", "x", "²"]), layer_entries)
    | json_values
)
def test_any_factored_layers(folder: Path, layers: Any):
    config = mixtral_config(
        architectures=["MixtralMoESVDForCausalLM"], moesvd={"format_version": 1, "layers": layers}
    )
    with_file(folder, "config.json", json.dumps(config).encode(), opens_or_refuses)


@FUZZ
@given(position=st.integers(0, 3000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_header_or_config(folder: Path, position: int, bit: int):
    for name in (SHARD, "config.json", INDEX):
        data = bytearray((folder / name).read_bytes())
        data[position % len(data)] ^= 1 << bit
        with_file(folder, name, bytes(data), opens_or_refuses)


@settings(max_examples=100, deadline=None)
@given(name=st.text(max_size=30).filter(lambda name: "/" not in name))
def test_any_name_in_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str):
    root = tmp_path_factory.mktemp("names") / "model"
    root.mkdir()
    try:
        (root / name).write_bytes(b"x")
    except (OSError, ValueError):
        return
    with pytest.raises(InputError):
        open_checkpoint(root, allow_factored=True)
    shutil.rmtree(root)
