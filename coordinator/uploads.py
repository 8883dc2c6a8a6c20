"""Updates on their way in: one receiver each, and the credits that bound what the broker may have to hold.

The sum over sites of granted, unacknowledged bytes never exceeds the budget. An upload reserves its window when it is
granted and gives it back when it completes, closes or goes quiet. Uploads beyond the budget wait in arrival order and
are granted as soon as one ends, so no site can be overtaken for ever.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from coordinator.decisions import CloseSpool, Decision, OpenSpool, Postponed, Verify
from shared.manifest import Manifest
from shared.messages import Wait, Want
from shared.transfer import Receiver, ReceiverState

PACE_RETRY_S = 5.0
"""A waiting site asks again after this long even if our grant to it was lost."""


@dataclass(slots=True)
class Upload:
    """One update on its way in."""

    site: str
    manifest: Manifest
    receiver: Receiver
    quiet_since: float
    """Monotonic seconds of the last sign of life."""
    reserved: int = 0
    """Bytes of the budget that this upload holds."""


class Uploads:
    """All updates on their way in; at most one per site."""

    def __init__(self, *, budget_bytes: int, window: int, idle_s: float) -> None:
        self.budget_bytes = budget_bytes
        self.window = window
        self.idle_s = idle_s
        self.reserved = 0
        """Bytes granted and not given back, the sum over all uploads; at most the budget."""
        self._by_id: dict[str, Upload] = {}
        self._newest: dict[str, str] = {}
        """By site, the last that it offered."""
        self._waiting: deque[str] = deque()

    def get(self, transfer_id: str) -> Upload | None:
        """The upload of that id, if it is under way."""
        return self._by_id.get(transfer_id)

    def accepts(self, site: str, transfer_id: str, index: int) -> bool:
        """Whether a chunk that arrives now is to be written."""
        upload = self._by_id.get(transfer_id)
        return (
            upload is not None
            and upload.site == site
            and upload.receiver.open
            and index < upload.manifest.frames
            and index not in upload.receiver.have
        )

    def offer(self, site: str, manifest: Manifest, now: float, out: Decision) -> None:
        """A site offers a valid, unknown update: start, resume, or repeat the answer."""
        upload = self._by_id.get(manifest.transfer_id)
        if upload is None:
            if (before := self._by_site(site)) is not None:
                self._close(before, now, out)
            self._newest[site] = manifest.transfer_id
            self._by_id[manifest.transfer_id] = Upload(site, manifest, Receiver(manifest.frames), now)
            out.jobs.append(OpenSpool(manifest))
            return
        upload.quiet_since = now
        if upload.receiver.state is not ReceiverState.OPENING:
            self._answer(upload, out)

    def opened(self, transfer_id: str, have: bytes, now: float, out: Decision) -> None:
        """The spool is open; grant a window or put the site in the queue."""
        upload = self._by_id.get(transfer_id)
        if upload is None:  # closed meanwhile: the site offered something else
            out.jobs.append(CloseSpool(transfer_id))
            return
        if upload.receiver.state is not ReceiverState.OPENING:  # given up and offered again before the disk answered
            return
        upload.quiet_since = now
        upload.receiver.opened(have)
        self._answer(upload, out)
        if upload.receiver.complete:
            out.jobs.append(Verify(transfer_id))

    def stored(self, transfer_id: str, indices: tuple[int, ...], now: float, out: Decision) -> None:
        """Chunks are durable: say so, and verify when nothing is missing."""
        upload = self._by_id.get(transfer_id)
        if upload is None or not upload.receiver.open:
            return  # of an attempt that was given up: the bitmap of the next one holds them
        upload.quiet_since = now
        upload.receiver.stored(indices)
        if upload.receiver.complete:
            out.jobs.append(Verify(transfer_id))
            self._give_back(upload)
        self._answer(upload, out)
        self._grant_waiting(now, out)

    def settle(self, transfer_id: str, now: float, out: Decision) -> Upload | None:
        """Admission has spoken: forget the upload and let the next one in."""
        upload = self._by_id.pop(transfer_id, None)
        if upload is not None:
            self._give_back(upload)
            upload.receiver.close()
        self._grant_waiting(now, out)
        return upload

    def postpone(self, event: Postponed, now: float, out: Decision) -> None:
        """Give an upload up for a reason of ours: its site is told why, and when to offer it again."""
        upload = self.settle(event.update_id, now, out)
        if upload is not None:
            wait = Wait(transfer_id=event.update_id, rule=event.rule, detail=event.detail, retry_s=event.retry_s)
            out.to(upload.site, wait)

    def link_up(self, now: float, out: Decision) -> None:
        """Our link is back: what was on its way to us is lost, so each sender hears what we hold and sends the rest."""
        for upload in self._by_id.values():
            if upload.receiver.open and upload.reserved:
                upload.quiet_since = now
                self._answer(upload, out, restart=True)

    def tick(self, now: float, out: Decision) -> None:
        """Close uploads that went quiet; their bytes stay on disk, their credit goes to others."""
        for upload in list(self._by_id.values()):
            if upload.receiver.open and now - upload.quiet_since > self.idle_s:
                self._close(upload, now, out)

    def site_gone(self, site: str, now: float, out: Decision) -> None:
        """The broker says that the site is away: give its credit to others at once."""
        upload = self._by_site(site)
        if upload is not None and upload.receiver.open:
            self._close(upload, now, out)

    def _by_site(self, site: str) -> Upload | None:
        """The last that a site offered, if it is under way; what it offered before that is complete or closed."""
        return self._by_id.get(self._newest.get(site, ""))

    def _close(self, upload: Upload, now: float, out: Decision) -> None:
        if upload.receiver.complete:
            return  # being verified; admission will settle it
        del self._by_id[upload.manifest.transfer_id]
        self._give_back(upload)
        upload.receiver.close()
        out.jobs.append(CloseSpool(upload.manifest.transfer_id))
        self._grant_waiting(now, out)

    def _give_back(self, upload: Upload) -> None:
        self.reserved -= upload.reserved
        upload.reserved = 0

    def _answer(self, upload: Upload, out: Decision, *, restart: bool = False) -> None:
        """Say what we hold, with as much window as the budget admits."""
        manifest, receiver = upload.manifest, upload.receiver
        window, retry_s = self.window, 0.0
        if not receiver.complete:
            self._reserve(upload)
            receiver.credit(granted=bool(upload.reserved))
            if not upload.reserved:
                window, retry_s = 0, PACE_RETRY_S
                if manifest.transfer_id not in self._waiting:
                    self._waiting.append(manifest.transfer_id)
            else:
                window = upload.reserved // manifest.slice_size
        have = receiver.have.to_bytes()
        want = Want(transfer_id=manifest.transfer_id, have=have, window=window, restart=restart, retry_s=retry_s)
        out.to(upload.site, want)

    def _reserve(self, upload: Upload) -> None:
        """Set aside what this upload lacks of a whole window, as far as the budget goes.

        A window that was cut short grows as soon as there is room, but not before those that wait for their first.
        """
        if upload.reserved and self._waiting:
            return
        size = upload.manifest.slice_size
        lacking = min(self.window, upload.manifest.frames) - upload.reserved // size
        free = (self.budget_bytes - self.reserved) // size
        more = max(0, min(lacking, free)) * size
        upload.reserved += more
        self.reserved += more

    def _grant_waiting(self, now: float, out: Decision) -> None:
        while self._waiting:
            upload = self._by_id.get(self._waiting[0])
            if upload is not None and upload.receiver.state is ReceiverState.PACED:
                if self.budget_bytes - self.reserved < upload.manifest.slice_size:
                    return
                upload.quiet_since = now
                self._answer(upload, out)
            self._waiting.popleft()
