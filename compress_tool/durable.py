"""Files that are either complete on disk or absent, and what a failing disk means to the user."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from compress_tool.errors import InputError, ResourceError, TemporaryError, ToolError

TEMPORARY_SUFFIX: Final = ".tmp"
READ_CHUNK_BYTES: Final = 8 * 2**20
"""Beyond 1 MB the copy runs at disk speed; smaller keeps the peak memory flat."""
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_PERMISSION: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """Size and content of one file."""

    num_bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
    """Write `path` completely or not at all, and make it survive a power loss.

    A failure removes the temporary file; only a kill leaves `<path>.tmp` behind. Raises
    ResourceError where the user must act (disk full, no permission), else TemporaryError.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    digest = hashlib.sha256()
    num_bytes = 0
    with storage_errors(path):
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666
        )
        try:
            try:
                for chunk in chunks:
                    view = memoryview(chunk)
                    digest.update(view)
                    num_bytes += view.nbytes
                    while view.nbytes:
                        view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)
    return FileDigest(num_bytes=num_bytes, sha256=digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Make the folder's entries survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_range(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The bytes `path[start:end]` in chunks; InputError if the file has become shorter."""
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            position = start
            while position < end:
                chunk = stream.read(min(READ_CHUNK_BYTES, end - position))
                if not chunk:
                    raise InputError(
                        f"{path}: ends at byte {position}, expected {end}; the file changed while "
                        "it was being read"
                    )
                position += len(chunk)
                yield chunk
    except OSError as error:
        raise TemporaryError(f"{path}: reading failed: {error.strerror}; try again") from error


def digest_file(path: Path) -> FileDigest:
    """Hash a whole file in chunks."""
    digest = hashlib.sha256()
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    for chunk in read_range(path, 0, num_bytes):
        digest.update(chunk)
    return FileDigest(num_bytes=num_bytes, sha256=digest.hexdigest())


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the ToolError that tells the user what to do."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path) -> ToolError:
    """The ToolError for a failed write to `path`."""
    reason = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        return ResourceError(
            f"{path}: {reason}; free some space there and run the same command with --resume"
        )
    if error.errno in _NO_PERMISSION:
        return ResourceError(
            f"{path}: {reason}; make the folder writable and run the same command with --resume, "
            "or choose another output folder"
        )
    if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR):
        return ResourceError(f"{path}: {reason}; choose another output folder")
    return TemporaryError(f"{path}: {reason}; run the same command with --resume")
