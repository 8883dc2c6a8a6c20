"""What is a site's own: the tensors that it trains and never sends, as of its newest update.

    own/00000007-<update_id>-<sha256>.safetensors   float32; the header names the federation's fingerprint

The file is durable before the manifest of its update, so that COMMIT 1 makes both count at once: one whose update was
never sealed is what a crash left, and goes. The newest counts. The one before it stays as well, for the day on which
somebody moves a damaged update away and the site trains on that version again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared import durable
from shared.errors import CorruptError

OWN = "own"
KEPT = 2
_NAME = re.compile(r"(\d{8,})-([0-9a-f]{32})-([0-9a-f]{64})\.safetensors")
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One file: its place in the order, the update that it belongs to, and the SHA-256 of its bytes."""

    number: int
    update_id: str
    sha256: str
    path: Path

    @property
    def intact(self) -> bool:
        """Whether the bytes are those that were written."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


class Own:
    """The folder of one site; one process writes it. `sealed` tells whether an update of that id was ever sealed."""

    def __init__(self, storage: Path, sealed: Callable[[str], bool]) -> None:
        self._folder = storage / OWN
        self._sealed = sealed
        if self._folder.is_dir():  # most federations leave nothing at their sites
            durable.remove_temporaries(self._folder)
            self.prune()
            # A predecessor that was killed may have named a file and not synced the name.
            durable.fsync_dir(self._folder)

    def newest(self) -> Path | None:
        """See the function `newest`."""
        return newest(self._folder, self._sealed)

    def keep(self, file: Path, update_id: str) -> None:
        """Make a copy of `file` durable; it counts from the moment in which that update is sealed."""
        durable.make_folder(self._folder)
        self.prune()  # attempts that found the disk full
        with file.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
            source.seek(0)
            number = 1 + max((entry.number for entry in entries(self._folder)), default=0)
            path = self._folder / f"{number:08d}-{update_id}-{digest}.safetensors"
            durable.write_once(path, iter(partial(source.read, _READ_BYTES), b""))

    def prune(self) -> None:
        """Delete what `leftovers` names."""
        for entry in leftovers(self._folder, self._sealed):
            entry.path.unlink()


def newest(folder: Path, sealed: Callable[[str], bool]) -> Path | None:
    """Return the file that counts, None before the first; CorruptError when the disk has spoilt it."""
    counting = [entry for entry in entries(folder) if sealed(entry.update_id)]
    if not counting:
        return None
    if not counting[-1].intact:
        raise CorruptError(f"{counting[-1].path} is not what was written", hint=OTHERWISE)
    return counting[-1].path


def entries(folder: Path) -> list[Entry]:
    """Return the files in the folder of a site's own, oldest first."""
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("*.safetensors"))
    return sorted(Entry(int(name[1]), name[2], name[3], path) for path, name in found if name)


def leftovers(folder: Path, sealed: Callable[[str], bool]) -> Iterator[Entry]:
    """Yield the files that do not count: of updates that were never sealed, and all but the newest two."""
    found = entries(folder)
    kept = [entry for entry in found if sealed(entry.update_id)][-KEPT:]
    yield from (entry for entry in found if entry not in kept)


OTHERWISE = "restore it from a backup, or move it away: the site then goes on from what it had before"
