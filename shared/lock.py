"""One writing process to a folder: a lock that the system lets go of when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from shared.errors import UnavailableError


class FolderLock:
    """Holds `path`, an empty file, until it is closed; a context manager.

    `holder` names in the message who else would hold it. UnavailableError when somebody does, or when the folder
    cannot be written.
    """

    def __init__(self, path: Path, *, holder: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UnavailableError(
                f"{path.parent} cannot be written: {error.strerror}", hint="mend its permissions or make room"
            ) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UnavailableError(
                f"{path.parent}: another {holder} runs there", hint="stop it, or give this one another storage folder"
            ) from None

    def close(self) -> None:
        """Let others in; a second time nothing happens."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
