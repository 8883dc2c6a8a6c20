"""The signatures in a journal, read as an auditor reads them: whose they are, and which history they speak of.

The coordinator signs the head of its chain with each version, each site its updates together with the last head that
it had seen. A rewritten journal can be given a sound chain and new signatures of the coordinator, but not those of the
sites: what is left of them names hashes that the rows do not have any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from coordinator.records import (
    Accepted,
    Anchored,
    Dropped,
    Finished,
    Opened,
    Pruned,
    Record,
    Signed,
    Snapshot,
    VersionCommitted,
    Witnessed,
)
from coordinator.trail import Finding, row_place
from shared.audit import Row
from shared.config import FederationConfig
from shared.errors import CorruptError, RefusedError
from shared.manifest import Manifest, Witness
from shared.messages import Head
from shared.trust.membership import Believed, Membership, stated_membership
from shared.trust.witness import HEADS, NOTHING_SEEN, bare_sha256, head_fits, parse_head, witness_fits

MEANWHILE = (Anchored, Dropped, Finished, Pruned, Snapshot)
"""What may stand between a version and the signature over it."""


class Seals:
    """What was signed, row by row; `believed` says which memberships count.

    Without it they are taken as they stand: then the signatures are compared with the keys that the journal itself
    names, and somebody who writes all of it anew can name keys of his own.
    """

    def __init__(self, federation: FederationConfig, fingerprint: str, believed: Believed | None = None) -> None:
        self.sealed = federation.trust.mode == "sealed"
        self.name = federation.federation.name
        self.fingerprint = fingerprint
        self.believed = believed
        self.signatures = 0
        """Signatures that were checked and fit."""
        self.coordinators: list[Membership] = []
        self.witnesses: dict[str, Witnessed] = {}
        """By update."""
        self._begun = 0
        self._hashes: dict[int, str] = {}
        self._agreed = {0}
        """Rows whose hashes are those that a site saw."""
        self._owed: tuple[int, tuple[type[Record], ...], str] | None = None
        """A row that is signed by one that follows, what may follow, and its kind."""

    def begin(self, seq: int, signed: Signed | None) -> None:
        """Start at a snapshot: hashes of earlier rows are not known, but who signed the newest head then."""
        self._begun = seq
        if signed is not None:
            with contextlib.suppress(RefusedError):  # then no head that a site kept will fit
                self.coordinators.append(self._member(signed.member, "coordinator"))

    def take(self, row: Row, record: Record) -> list[Finding]:
        """Follow one row whose hash was computed anew, and return what is wrong with it."""
        return [Finding(rule, row_place(row.seq), what) for rule, what in self._take(row, record)]

    def check_manifest(self, manifest: Manifest, place: str) -> Iterator[Finding]:
        """Compare a kept update with what the journal says of its signature."""
        record = self.witnesses.get(manifest.transfer_id)
        if record is not None and (manifest.witness, bare_sha256(manifest)) != (_witness(record), record.bare_sha256):
            yield Finding("witness-differs", f"{place}.manifest", "its signature is not the one in the journal")

    # -- heads that a site kept ---

    def check_heads(self, folder: Path, where: str) -> Iterator[Finding]:
        """Compare the heads in a copy of a site's receipts folder with the rows; a folder may hold none."""
        path = folder / HEADS
        lines = path.read_bytes().splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            place = f"{where}/{HEADS}: line {number}"
            try:
                head = parse_head(line, place)
            except CorruptError:
                yield Finding("head-unreadable", place, "not a head as a site writes it")
                continue
            keys = [member.sign_key for member in self.coordinators]
            if not any(head_fits(key, self.name, self.fingerprint, head) for key in keys):
                yield Finding("head-unsigned", place, "no coordinator that the journal names has signed it")
                continue
            self.signatures += 1
            yield from (
                Finding(rule, place, what)
                for rule, what in self._history(head.seq, head.head, "the site was told that")
            )

    # -- one row ---

    def _take(self, row: Row, record: Record) -> Iterator[tuple[str, str]]:
        self._hashes[row.seq] = row.hash.hex()
        if self._owed is not None and not isinstance(record, self._owed[1]):
            yield "not-signed", f"it follows {self._owed[2]} of row {self._owed[0]}, which was not signed"
            self._owed = None
        match record:
            case Opened() | VersionCommitted() if self.sealed:
                self._owed = (row.seq, (Signed, *MEANWHILE), record.kind)
            case Accepted() if self.sealed:
                self._owed = (row.seq, (Witnessed,), record.kind)
            case Signed():
                self._owed = None
                yield from self._signed(record)
            case Witnessed():
                self._owed = None
                yield from self._witnessed(record)
            case _:
                pass

    def _signed(self, record: Signed) -> Iterator[tuple[str, str]]:
        head = Head(version=record.version, seq=record.seq, head=record.head, signature=record.signature)
        try:
            member = self._member(record.member, "coordinator")
        except RefusedError as error:
            yield "signer", error.message
            return
        if not head_fits(member.sign_key, self.name, self.fingerprint, head):
            yield "signature", "the coordinator's signature does not fit"
            return
        self.signatures += 1
        self.coordinators.append(member)
        yield from self._history(record.seq, record.head, "the coordinator signed that", by_site=False)

    def _witnessed(self, record: Witnessed) -> Iterator[tuple[str, str]]:
        self.witnesses[record.update_id] = record
        try:
            member = self._member(record.member, "site")
        except RefusedError as error:
            yield "signer", error.message
            return
        if member.name != record.site or not witness_fits(member.sign_key, record.bare_sha256, _witness(record)):
            yield "signature", f"the signature of {record.site} does not fit"
            return
        self.signatures += 1
        if (record.seq, record.head) != (NOTHING_SEEN.seq, NOTHING_SEEN.head):
            yield from self._history(record.seq, record.head, f"{record.site} counter-signed that")

    def _history(self, seq: int, head: str, who: str, *, by_site: bool = True) -> Iterator[tuple[str, str]]:
        found = self._hashes.get(seq)
        if found == head:
            self._agreed |= {seq} if by_site else set()
        elif found is not None:
            begin = max((row for row in self._agreed if row < seq), default=0) + 1
            changed = f"what was changed since lies in rows {begin} to {seq}"
            yield "history-changed", f"{who} row {seq} has hash {head}, it has {found} now; {changed}"
        elif seq > self._begun:
            yield "history-changed", f"{who} row {seq} has hash {head}, and there is no such row"

    def _member(self, document: bytes, role: str) -> Membership:
        member = (
            self.believed.membership(document, federation=self.name)
            if self.believed is not None
            else stated_membership(document)
        )
        if member.role != role:
            raise RefusedError(f"the membership of a {member.role}", rule="other-role")
        return member


def _witness(record: Witnessed) -> Witness:
    return Witness(seq=record.seq, head=record.head, signature=record.signature)
