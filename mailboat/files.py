"""Files that a command writes where the user said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import ConfigError, UnavailableError


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Turn any failure of the system to write at `path` into UnavailableError that names it."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(
            f"{path} cannot be written: {(error.strerror or 'unknown reason').lower()}",
            hint="check its owner and mode, and the free space",
        ) from None


def reading(path: Path, limit: int) -> bytes:
    """The content of a file that the user named; ConfigError when it cannot be read or has more than `limit` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        reason = (error.strerror or "unknown reason").lower()
        raise ConfigError(f"{path} cannot be read: {reason}", hint="check its name, owner and mode") from None
    if len(data) > limit:
        raise ConfigError(f"{path} has more than {limit} bytes", hint="it is another kind of file")
    return data
