"""`manifest.json`: what a finished checkpoint consists of and where it came from.

It holds no time, host or path, so that the same job gives the same bytes. Its own digest is
inside, over the text without that entry: a changed byte anywhere in it is found.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from compress_tool.checkpoint import Checkpoint
from compress_tool.durable import FileDigest, digest_file, read_range
from compress_tool.errors import InputError
from compress_tool.folder import CONFIG_FILE, INDEX_FILE, read_json_object
from compress_tool.headers import header_bytes_of

MANIFEST_FILE: Final = "manifest.json"
MANIFEST_VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 64 * 2**20
SELF_KEY: Final = "manifest_sha256"
SAMPLE_BYTES: Final = 4096
"""Of each tensor: one block of the disk, 3 MB for Mixtral-8x7B."""


def manifest_json(
    *,
    job: Mapping[str, Any],
    source: Mapping[str, Any],
    files: Mapping[str, FileDigest],
    layers: Mapping[int, Mapping[str, Any]],
) -> bytes:
    """The bytes of manifest.json. `layers` are the caller's per-layer entries, by index."""
    value = {
        "manifest_version": MANIFEST_VERSION,
        "job": dict(job),
        "source": dict(source),
        "versions": package_versions(),
        "layers": {str(layer): dict(layers[layer]) for layer in sorted(layers)},
        "files": {
            name: {"bytes": digest.num_bytes, "sha256": digest.sha256}
            for name, digest in sorted(files.items())
        },
    }
    return _render(value | {SELF_KEY: hashlib.sha256(_render(value)).hexdigest()})


def read_manifest(root: Path) -> dict[str, Any]:
    """Read and check manifest.json; raises InputError if it is not byte for byte ours."""
    value = read_json_object(root, MANIFEST_FILE, MAX_MANIFEST_BYTES)
    file = root / MANIFEST_FILE
    if value.get("manifest_version") != MANIFEST_VERSION:
        raise InputError(
            f"{file}: manifest_version is {value.get('manifest_version')!r}, this version reads "
            f"{MANIFEST_VERSION}"
        )
    body = {key: item for key, item in value.items() if key != SELF_KEY}
    if (
        value.get(SELF_KEY) != hashlib.sha256(_render(body)).hexdigest()
        or file.read_bytes() != _render(value)
        or any(not isinstance(body.get(key), dict) for key in ("job", "source", "layers", "files"))
    ):
        raise InputError(f"{file}: was changed after it was written")
    return value


def source_identity(checkpoint: Checkpoint, *, hash_weights: bool = False) -> dict[str, Any]:
    """What identifies a source: config.json, the index, every header, a sample of the weights.

    The sample is the start of every tensor: another training gives another digest at no cost,
    but damage further inside does not show. `hash_weights` reads everything and adds the digest
    of every file.
    """
    shards = sorted({info.file for info in checkpoint.tensors.values()})
    small = [name for name in (CONFIG_FILE, INDEX_FILE) if (checkpoint.path / name).exists()]
    sample = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        end = min(info.end, info.start + SAMPLE_BYTES)
        for chunk in read_range(info.file, info.start, end):
            sample.update(chunk)
    identity: dict[str, Any] = {
        "files": {name: digest_file(checkpoint.path / name).sha256 for name in small},
        "headers": {
            shard.name: hashlib.sha256(header_bytes_of(shard)).hexdigest() for shard in shards
        },
        "weights_sample_sha256": sample.hexdigest(),
    }
    if hash_weights:
        identity["files"] |= {shard.name: digest_file(shard).sha256 for shard in shards}
    return identity


def package_versions() -> dict[str, str]:
    """Versions of this tool and of what computes the numbers."""
    versions = {"python": platform.python_version()}
    for package in ("vllm-moesvd", "torch", "transformers", "safetensors", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _render(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
