"""`<out>.partial/`: where a run keeps everything until its result can be renamed to `<out>`.

    job.json      what is being made; another job is refused
    lock          held by the running process
    ...           whatever the owner writes

Nothing that was there before is ever touched: an existing `<out>`, or a `<out>.partial` of
something else, is refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from compress_tool.durable import TEMPORARY_SUFFIX, storage_errors, sync_folder, write_file
from compress_tool.errors import ResourceError, TemporaryError, ToolError, UsageError
from compress_tool.folder import read_json_object
from compress_tool.headers import show
from compress_tool.manifest import read_manifest

JOB_FILE: Final = "job.json"
LOCK_FILE: Final = "lock"
MAX_JOB_BYTES: Final = 2**20


class PartialFolder:
    """Owns `<out>.partial/` and its lock until `publish` or `close`. A context manager.

    `job` identifies the run, JSON values by key; only the same job may continue.
    `planned_bytes` is what `<out>.partial/` will hold at its largest.
    """

    def __init__(
        self, out: Path, *, job: Mapping[str, Any], planned_bytes: int = 0, resume: bool = False
    ) -> None:
        """Create or resume. Raises before writing anything if something else is in the way.

        UsageError: `out` or its partial state belongs to something else. ResourceError:
        `planned_bytes` do not fit on the disk. TemporaryError: another process is at work.
        """
        self.out = Path(out).absolute()
        self.path = self.out.with_name(self.out.name + ".partial")
        self.job: dict[str, Any] = json.loads(json.dumps(dict(job), allow_nan=False))
        self.is_finished = False
        """The same job already produced `out`: there is nothing left to do."""
        self._lock: int | None = None
        with storage_errors(self.path):
            if os.path.lexists(self.out):
                self._accept_finished(resume)
                return
            is_new = not os.path.lexists(self.path)
            if not is_new:
                self._check_existing(resume)
            self._check_space(planned_bytes)
            try:
                self._create()
            except BaseException:
                if is_new:
                    self._undo_create()
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; the partial state stays for `--resume`."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Delete the partial state: for a run that no `--resume` could complete."""
        _remove(self.path)
        self.close()

    def publish(self, folder: Path) -> None:
        """Rename the finished `folder` to `out` and delete the partial state."""
        with storage_errors(self.out):
            sync_folder(folder)
            if os.path.lexists(self.out):
                raise UsageError(f"{self.out}: appeared during the run; the result is in {folder}")
            folder.rename(self.out)
            sync_folder(self.out.parent)
        self.is_finished = True
        self.discard()

    def _accept_finished(self, resume: bool) -> None:
        try:
            made_by = read_manifest(self.out)["job"] if self.out.is_dir() else None
        except ToolError:
            made_by = None
        if made_by is None:
            raise UsageError(f"{self.out}: exists and is not ours; choose another output folder")
        _same_job(self.out, made_by, self.job)
        if not resume:
            raise UsageError(
                f"{self.out}: exists, this run is already finished; choose another output folder"
            )
        self.is_finished = True
        if (self.path / JOB_FILE).is_file():
            # Killed between the rename and the end of the cleaning.
            _same_job(self.path, _read_job(self.path), self.job)
            self._take_lock()
            self.discard()
        elif self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _check_existing(self, resume: bool) -> None:
        if self.path.is_symlink() or not self.path.is_dir():
            raise UsageError(f"{self.path}: exists and is not ours; choose another output folder")
        names = {entry.name for entry in self.path.iterdir()}
        if JOB_FILE in names:
            if not resume:
                raise UsageError(
                    f"{self.path}: holds an unfinished run; continue it with --resume or delete it"
                )
            _same_job(self.path, _read_job(self.path), self.job)
        elif names - {LOCK_FILE, JOB_FILE + TEMPORARY_SUFFIX}:
            raise UsageError(f"{self.path}: exists and is not ours; choose another output folder")

    def _check_space(self, planned_bytes: int) -> None:
        parent = self.out.parent
        while not os.path.lexists(parent):
            parent = parent.parent
        if not parent.is_dir():
            raise UsageError(f"{parent}: is not a folder, {self.out} cannot be made in it")
        written = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        free = shutil.disk_usage(parent).free
        needed = max(planned_bytes - written, 0)
        if needed > free:
            raise ResourceError(
                f"{parent}: {needed} bytes are needed for {self.out.name}, {free} are free; make "
                "room or choose another disk"
            )

    def _create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if (self.path / JOB_FILE).exists():
            _same_job(self.path, _read_job(self.path), self.job)
        else:
            text = json.dumps(self.job, indent=2, sort_keys=True) + "\n"
            write_file(self.path / JOB_FILE, [text.encode()])
            sync_folder(self.path.parent)

    def _undo_create(self) -> None:
        with suppress(OSError, ToolError):
            if self._lock is None:
                self.path.rmdir()
            else:
                self.discard()

    def _take_lock(self) -> None:
        file = self.path / LOCK_FILE
        # A file opened for writing: NFS cannot lock a folder.
        self._lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process before us may have deleted the file between our open and our lock.
            held = os.fstat(self._lock).st_nlink > 0
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            held = False
        if not held:
            self.close()
            raise TemporaryError(
                f"{self.path}: another process is working there; wait for it to end, then use "
                "--resume"
            )


def _read_job(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path.resolve(), JOB_FILE, MAX_JOB_BYTES)
    except ToolError as error:
        raise UsageError(f"{error}; delete {path} to start again") from None


def _same_job(where: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differing = sorted(key for key in set(found) | set(asked) if found.get(key) != asked.get(key))
    if differing:
        key = differing[0]
        raise UsageError(
            f"{where}: is of another run: {key} was {show(found.get(key))}, now it is "
            f"{show(asked.get(key))}"
            + (f" (and {', '.join(differing[1:5])} differ)" if differing[1:] else "")
            + "; repeat the first command, or choose another output folder"
        )


def _remove(path: Path) -> None:
    """Delete the partial state, job.json last: until then a resumed run knows it as its own."""
    with storage_errors(path):
        for entry in sorted(path.iterdir()):
            if entry.name in (JOB_FILE, LOCK_FILE):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (path / LOCK_FILE).unlink(missing_ok=True)
        (path / JOB_FILE).unlink(missing_ok=True)
        path.rmdir()
