"""What error feedback (`edge_client.feedback`) owes: one residual a site, kept with the update that left it.

    residual/<update_id>.{frames,manifest}   bfloat16, in the form of a transfer that never travels

Update and residual become true in one moment, COMMIT 1 of the update. The residual is durable first, under the id of
the update that is about to be sealed, and it counts only if that update is known here: waiting, or with a receipt. So a
crash in between leaves a residual that never counts, and the one before it goes on counting. Behind it two count for a
moment; they are numbered, and the later one does.

An update that is rejected or dropped takes the residual with it: what was refused as a whole must not travel in parts,
and a site that trains once more would send that part twice. A restart, a reconnect or an update that is merely late
changes nothing. A residual that the disk has spoilt, or of another plan, owes nothing; the log says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from pathlib import Path

import structlog

from shared.errors import CorruptError, RefusedError
from shared.manifest import Manifest
from shared.slices import FileSummary, FrameWriter
from shared.store import FrameStore, Stored

FOLDER = "residual"

Build = Callable[[FileSummary], Manifest]

log = structlog.get_logger("site")


class Residuals:
    """The residual of one site. `turn` is held by whoever makes the next one of it, or takes it away."""

    def __init__(self, storage: Path, sealed: Collection[str]) -> None:
        self.turn = threading.Lock()
        self._folder = storage / FOLDER
        self._current: str | None = None
        self._store: FrameStore | None = None
        """None until there is something to keep: most codecs leave nothing for later."""
        if self._folder.is_dir():
            self._recover(sealed)

    def _recover(self, sealed: Collection[str]) -> None:
        self._store = FrameStore(self._folder)
        self._store.recover()
        counts = counting(self._store, sealed)
        if counts is None and not set(self._store.ids()).isdisjoint(sealed):
            log.warning("residual dropped; nothing is owed", reason="it is damaged")
        self._keep(counts)

    def current(self, fingerprint: str) -> Stored | None:
        """Return what is owed, read once from end to end; None when nothing is.

        One of another plan or one that is damaged is dropped, and the log says so.
        """
        try:
            stored = self._found()
            if stored is None:
                return None
            if stored.manifest.fingerprint == fingerprint:
                stored.verify()
                return stored
            reason = "it is of another plan"
        except (CorruptError, RefusedError) as error:
            reason = error.message
        log.warning("residual dropped; nothing is owed", residual=self._current, reason=reason)
        self.drop()
        return None

    @property
    def next_number(self) -> int:
        """The number of the residual that follows."""
        stored = self._found()
        return 0 if stored is None else stored.manifest.state.version + 1

    def put(self, frames: FrameWriter, build: Build) -> None:
        """Make the residual of an update durable that is about to be sealed; it does not count yet.

        Errors as FrameStore.seal.
        """
        self._delete_but(self._current)  # those of attempts that found the disk full
        self._store = self._store or FrameStore(self._folder)
        self._store.seal(frames, build)

    def sealed(self, update_id: str) -> None:
        """The update is sealed: its residual counts, if it left one, and no other does."""
        self._keep(update_id if self._store is not None and update_id in self._store.ids() else None)

    def drop(self) -> None:
        """Nothing is owed any more."""
        self._keep(None)

    def _found(self) -> Stored | None:
        return None if self._store is None or self._current is None else self._store.get(self._current)

    def _keep(self, update_id: str | None) -> None:
        self._current = update_id
        self._delete_but(update_id)

    def _delete_but(self, update_id: str | None) -> None:
        if self._store is not None:
            for other in self._store.ids():
                if other != update_id:
                    self._store.delete(other)


def counting(store: FrameStore, sealed: Collection[str]) -> str | None:
    """Which of the residuals in a folder counts, given the updates that were sealed.

    None when one of theirs cannot be read: an earlier one would owe again what was sent since.
    """
    known = [update_id for update_id in store.ids() if update_id in sealed]
    try:
        return max(known, key=lambda update_id: _number(store, update_id), default=None)
    except CorruptError:
        return None


def _number(store: FrameStore, update_id: str) -> int:
    stored = store.get(update_id)
    assert stored is not None, "it was listed"
    return stored.manifest.state.version
