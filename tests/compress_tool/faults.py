"""Make the N-th operation on the disk fail, or the process die at it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

OPERATIONS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
KILLED = 137


class DiskOperations:
    """Counts calls of the os functions that change a disk; acts at call number `at`.

    Reading does not count: `os.open` is intercepted only where it may create a file.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, act: Callable[[str], None]) -> None:
        self.count = 0
        for name in OPERATIONS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name), at, act))

    def _wrap(self, name: str, real: Any, at: int, act: Callable[[str], None]) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            self.count += 1
            if self.count == at:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                act(name)
            return real(*arguments, **options)

        return call


def killed_at(at: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that dies, without any cleaning, at its N-th disk operation.

    Returns False if the child reached the end before that. A write is torn in the middle.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.MonkeyPatch.context() as patch:
                DiskOperations(patch, at, lambda _: os._exit(KILLED))
                work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"the child ended with {code}"
    return code == KILLED


def fail_with(number: int) -> Callable[[str], None]:
    def act(operation: str) -> None:
        raise OSError(number, os.strerror(number))

    return act
