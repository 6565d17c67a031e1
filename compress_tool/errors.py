"""Errors a user can meet, each with the exit code of `compress_tool` that belongs to it.

A message says what was given, what was expected, where, and what to do, in one line.
"""

from __future__ import annotations

from typing import ClassVar


class ToolError(Exception):
    """Base of all errors that end the tool with one line instead of a traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(ToolError):
    """The command line or the recipe asks for something that makes no sense."""

    exit_code = 2


class InputError(ToolError):
    """The source checkpoint or a text file is broken."""

    exit_code = 3


class ResourceError(ToolError):
    """The request cannot be met: disk, memory, or a size that no plan reaches."""

    exit_code = 4


class NumericsError(ToolError):
    """A computation gave something that is not a usable number."""

    exit_code = 5


class VerificationError(ToolError):
    """A finished checkpoint is not what its manifest says."""

    exit_code = 6


class UnsupportedError(ToolError):
    """The architecture, or the feature for this architecture, is not supported."""

    exit_code = 7


class TemporaryError(ToolError):
    """An operation failed that may succeed when the command is run again."""

    exit_code = 75


INTERRUPTED_EXIT_CODE = 130
TERMINATED_EXIT_CODE = 143
