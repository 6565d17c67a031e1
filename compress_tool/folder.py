"""Which files of a checkpoint folder are read, and nothing outside that folder.

transformers follows an index entry such as `../x.safetensors` out of the folder and unpickles
what is not safetensors; so every path is judged here before any of its code sees the folder.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from compress_tool.errors import InputError, TemporaryError
from compress_tool.headers import JsonError, TensorInfo, read_header, show, strict_json

CONFIG_FILE: Final = "config.json"
INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
CODE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".py", ".ckpt"})
"""Files that can run code when loaded: refused by name, never opened."""
MAX_CONFIG_BYTES: Final = 4 * 2**20
"""A large config.json is some 10 kB; with 1000 factored layers of 1000 experts it is 4 MB."""
MAX_INDEX_BYTES: Final = 100 * 2**20
"""DeepSeek-V3 with 91 991 tensors has an index of 9 MB."""
_SHARD_NAME: Final = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def open_folder(path: Path) -> Path:
    """Check that `path` is a folder without executable files; returns it resolved."""
    try:
        root = path.resolve(strict=True)
        if not root.is_dir():
            raise InputError(f"{path}: not a folder, expected a Hugging Face checkpoint folder")
        names = sorted(entry.name for entry in root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such folder, expected a Hugging Face checkpoint") from None
    except PermissionError:
        raise InputError(f"{path}: the folder may not be read by this user") from None
    except RuntimeError:
        raise InputError(f"{path}: symlink loop") from None
    except ValueError:
        raise InputError(f"{show(str(path))}: not a path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from error
    refused = [name for name in names if Path(name).suffix.lower() in CODE_SUFFIXES]
    if refused:
        raise InputError(
            f"{path}: holds {show(refused[0])}, a file that can run code when it is loaded; only "
            "safetensors checkpoints are read: remove it or convert the checkpoint"
        )
    return root


def contained_file(root: Path, name: str) -> Path:
    """The regular file `name` directly in `root`; links may only lead into its own hub cache.

    Returns the path inside `root`. Raises InputError for a path, a missing file, a link out of
    the folder. The Hugging Face cache layout is accepted:
    `models--x--y/snapshots/<revision>/file -> ../../blobs/<hash>`.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(f"{root}: {show(name)} must be a plain file name in the folder")
    file = root / name
    try:
        target = file.resolve(strict=True)
        is_regular = stat.S_ISREG(target.stat().st_mode)
    except FileNotFoundError:
        raise InputError(f"{file}: missing; download the checkpoint again") from None
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"{root / show(name)}: cannot be opened: {error}") from None
    whole_root = root.resolve()
    if not target.is_relative_to(whole_root) and not _same_hub_cache(whole_root, target):
        raise InputError(
            f"{file}: a link that leaves the checkpoint folder (to {target}); "
            "copy the file into the folder"
        )
    if not is_regular:
        raise InputError(f"{file}: not a regular file")
    return file


def read_json_object(root: Path, name: str, max_bytes: int) -> dict[str, Any]:
    """Read `root/name` as a JSON object; raises InputError naming the file."""
    file = contained_file(root, name)
    try:
        with file.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except PermissionError:
        raise InputError(f"{file}: may not be read by this user") from None
    except OSError as error:
        raise TemporaryError(f"{file}: reading failed: {error.strerror}; try again") from error
    if len(data) > max_bytes:
        raise InputError(f"{file}: larger than {max_bytes} bytes, not a usable {name}")
    try:
        value = strict_json(data)
    except JsonError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found {show(value)}")
    return value


def refuse_remote_code(file: Path, value: Any) -> None:
    """Raise InputError if `auto_map` appears anywhere in a JSON value."""
    for key in _keys(value):
        if key == "auto_map":
            raise InputError(
                f"{file}: auto_map asks to run code that comes with the checkpoint, which is "
                "never done; remove the key if the architecture is a standard one"
            )


def read_tensors(root: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder's safetensors files, index and headers in full agreement."""
    present = {entry.name for entry in root.iterdir()}
    if INDEX_FILE in present:
        weight_map = _read_weight_map(root)
        files = sorted(set(weight_map.values()))
        stray = sorted(
            name
            for name in present - set(files)
            if name == SINGLE_FILE or _SHARD_NAME.fullmatch(name)
        )
        if stray:
            raise InputError(
                f"{root / stray[0]}: weights that {INDEX_FILE} does not mention; remove the "
                "wrong one"
            )
    else:
        weight_map = None
        files = _files_without_index(root, present)
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        for tensor in read_header(contained_file(root, name)).values():
            if tensor.name in tensors:
                raise InputError(
                    f"{tensor.file}: tensor {tensor.name} is also in "
                    f"{tensors[tensor.name].file.name}"
                )
            if weight_map is not None and weight_map.get(tensor.name) != name:
                raise InputError(
                    f"{tensor.file}: tensor {tensor.name} is listed in {INDEX_FILE} as part of "
                    f"{show(weight_map.get(tensor.name))}"
                )
            tensors[tensor.name] = tensor
    for tensor_name, file_name in (weight_map or {}).items():
        if tensor_name not in tensors:
            raise InputError(
                f"{root / INDEX_FILE}: tensor {show(tensor_name)} is not in {file_name}"
            )
    return tensors


def _read_weight_map(root: Path) -> dict[str, str]:
    index = read_json_object(root, INDEX_FILE, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{root / INDEX_FILE}: weight_map must be a non-empty object, found {show(weight_map)}"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise InputError(
                f"{root / INDEX_FILE}: tensor {show(tensor)} is mapped to {show(name)}, expected "
                "the name of a .safetensors file"
            )
        if Path(name).name != name or "\\" in name or "\0" in name:
            raise InputError(
                f"{root / INDEX_FILE}: tensor {show(tensor)} is mapped to {show(name)}, expected "
                "a plain file name in the same folder"
            )
    return weight_map


def _files_without_index(root: Path, present: set[str]) -> list[str]:
    shards = {name: match for name in present if (match := _SHARD_NAME.fullmatch(name))}
    if SINGLE_FILE in present:
        if shards:
            raise InputError(
                f"{root}: holds both {SINGLE_FILE} and {min(shards)} and no {INDEX_FILE}; "
                "remove the wrong ones"
            )
        return [SINGLE_FILE]
    if not shards:
        raise InputError(f"{root}: no {SINGLE_FILE} and no {INDEX_FILE}; not a checkpoint")
    counts = {int(match[2]) for match in shards.values()}
    count = max(counts)
    # `count` may be 99999: compare numbers of files, then names.
    if len(counts) > 1 or sorted(int(match[1]) for match in shards.values()) != list(
        range(1, count + 1)
    ):
        raise InputError(
            f"{root}: no {INDEX_FILE}, and the shards are not complete: found {len(shards)} of "
            f"{count}"
        )
    return sorted(shards)


def _same_hub_cache(root: Path, target: Path) -> bool:
    model = root.parent.parent
    return (
        root.parent.name == "snapshots"
        and model.name.startswith("models--")
        and target.parent == model / "blobs"
    )


def _keys(value: Any) -> Iterator[str]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
