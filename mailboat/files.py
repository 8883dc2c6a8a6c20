"""Files that a command writes where the user said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import UnavailableError


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
