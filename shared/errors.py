"""Errors, drawn as one tree. The class says whose fault it is and what the caller may do.

    MailboatError
    ├── ConfigError       exit 2   a command line or configuration is wrong; the reader of the message mends it
    ├── RefusedError      exit 3   a peer, its bytes or a data file broke a named rule; retrying the same is useless
    ├── CorruptError      exit 3   bytes that we wrote are not what we wrote; stop and look
    └── UnavailableError  exit 4   broker, disk, memory or peer is not there now; retrying later may help
        └── NoRoomError            a disk is full: go on when there is room

A bug of ours is none of these: it is an AssertionError or whatever Python raises, and it keeps its traceback.

Every message is one sentence that names the file, key or peer; every hint is one sentence that says what to do.
Neither ever carries patient text, a label example, or the content of a note.
"""

from __future__ import annotations

from typing import ClassVar


class MailboatError(Exception):
    """An error that a person can act on; printed as one line and a hint, never as a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(MailboatError):
    """A command line, a configuration file or a key in it is wrong."""

    exit_code: ClassVar[int] = 2


class RefusedError(MailboatError):
    """A peer, its bytes or a data file broke the rule named `rule`."""

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, rule: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.rule = rule


class CorruptError(MailboatError):
    """Bytes at rest differ from the digest recorded when they were written."""

    exit_code: ClassVar[int] = 3


class UnavailableError(MailboatError):
    """Something outside this process is missing for now: broker, disk space, memory, a peer."""

    exit_code: ClassVar[int] = 4


class NoRoomError(UnavailableError):
    """A disk is full or a quota used up; what is to be written can be written once there is room."""
