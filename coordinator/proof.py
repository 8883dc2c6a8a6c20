"""The proof of a run: everything that can be checked without computing a version again, and all that is wrong.

The hash chain and content of the journal, `audit.jsonl` line by line, what must hold between the records, each kept
update and published state down to its frames, the float32 files, and the receipts that sites hold. Nothing is written,
nothing stops at the first finding. A coordinator may run meanwhile: the journal is read first, and what it committed
later is not looked at.

Where a segment of the journal was moved away, the proof begins with the newest snapshot, which the chain binds: it says
which rows are missed and their file's SHA-256, and checks each file against the digests that the snapshot carries.

A chain alone proves that no row was changed by itself; one who rewrites all rows makes a sound chain. What such a
rewriter cannot reach are the sites' signatures, and the receipts and heads at the sites, so they are compared here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coordinator import records
from coordinator.journal import Journal
from coordinator.kept import check_frames, check_master, check_state, check_update
from coordinator.ledger import Known
from coordinator.merging import given_up
from coordinator.offers import UNRECORDED
from coordinator.optimizers import SLOTS
from coordinator.rows import JournalReader, Restored
from coordinator.seals import Seals
from coordinator.trail import Finding, Trail, row_place
from coordinator.views import JOURNAL
from shared import audit
from shared.audit import GENESIS, Mark, Row
from shared.config import FederationConfig
from shared.errors import ConfigError, CorruptError, RefusedError
from shared.manifest import describe_invalid
from shared.messages import LOST, Receipt
from shared.plan import SealedPlan
from shared.trust.membership import Believed

AUDIT = "audit.jsonl"
UNREADABLE = (CorruptError, UnicodeDecodeError)
"""What reading a damaged database raises; the second comes from Python's module, when SQLite quotes damaged text."""

SHORT = "audit-short"
"""Rule of a trail whose last lines are missing: what every kill between a row and its line leaves behind."""

AHEAD = 10_000
"""Rows in which to look for a version that was committed since the check began."""

Progress = Callable[[float], None]
"""Called with the share of the transfers that were checked, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was looked at, and what is wrong."""

    rows: int
    head: str
    """Hash of the last row, hex: it stands for the whole journal."""
    version: int
    """The newest version; -1 when the run could not be followed that far."""
    updates: int
    """Accepted ones, each with its frames."""
    receipts: int
    findings: tuple[Finding, ...]
    signatures: int = 0
    """Of coordinator and sites; checked, and they fit."""
    pruned: tuple[str, ...] = ()
    """What is not here: rows, and the SHA-256 of the file that holds them; updates that were given up."""


@dataclass(slots=True)
class _Chain:
    """Where the reading of the journal stands."""

    seals: Seals
    seq: int = 0
    head: bytes = GENESIS


def prove(
    storage: Path,
    federation: FederationConfig,
    plan: SealedPlan,
    *,
    receipts: Sequence[Path] = (),
    believed: Believed | None = None,
    progress: Progress = lambda _share: None,
) -> Proof:
    """Check a run in a coordinator's storage folder; `receipts` are copies of sites' receipt folders.

    `believed` says which memberships in the journal count; without it a signature is compared with the key that the
    journal names.

    Raises ConfigError when there is no journal or a receipts folder is none; all else is a finding.
    """
    trail, chain = Trail(federation, plan), _Chain(Seals(federation, plan.fingerprint, believed))
    findings: list[Finding] = []
    unreadable: set[int] = set()
    try:
        reader = Journal.open_read(storage / JOURNAL)
    except UNREADABLE as error:
        return Proof(0, GENESIS.hex(), -1, 0, 0, (Finding("journal-unreadable", JOURNAL, _below(error)),))
    pruned: tuple[str, ...] = ()
    with reader as journal:
        try:
            restored = journal.restore()
            pruned = tuple(str(segment) for segment in journal.pruned())
        except (*UNREADABLE, RefusedError):
            restored = None
            findings.append(Finding("snapshot-unreadable", JOURNAL, "its snapshot is not what was written"))
        if restored is not None and pruned:
            trail.begin(restored.row.seq, restored.ledger)
            chain.seq, chain.head = restored.row.seq, restored.row.hash
            chain.seals.begin(chain.seq, restored.ledger.signed)
        findings += _follow(journal, trail, chain, unreadable, restored)
        findings += _masters(storage, trail, journal, chain.seq)
        findings += _transfers(storage, trail, chain.seals, progress)
        lines = _Lines(restored.mark if restored and pruned else None, chain.seq, unreadable)
        findings += _audit_lines(storage / AUDIT, journal, lines)
    held = 0
    for folder in receipts:
        findings += chain.seals.check_heads(folder, f"{folder.parent.name}/{folder.name}")
        for path in _receipt_files(folder):
            held += 1
            findings += _receipt(path, trail)
    return Proof(
        chain.seq,
        chain.head.hex(),
        trail.version,
        len(_kept(trail)),
        held,
        tuple(findings),
        chain.seals.signatures,
        (*pruned, *_pruned(trail)),
    )


def _pruned(trail: Trail) -> Iterator[str]:
    if trail.pruned:
        count = len(given_up(trail.known, trail.pruned, trail.federation.aggregation))
        yield f"{count} updates merged up to version {trail.pruned}: given up, their manifests and digests are here"


# -- the journal ---


def _follow(
    journal: JournalReader, trail: Trail, chain: _Chain, unreadable: set[int], restored: Restored | None
) -> Iterator[Finding]:
    while True:
        try:
            row = next(journal.rows(chain.seq, limit=1), None)
        except UNREADABLE as error:
            # Behind what SQLite cannot read there may be more, but nothing that could be trusted.
            yield Finding("journal-unreadable", f"{JOURNAL}: behind row {chain.seq}", _below(error))
            return
        if row is None:
            break
        if row.seq <= chain.seq:
            # A damaged index leads back to where we were, for ever.
            yield Finding("journal-unreadable", f"{JOURNAL}: behind row {chain.seq}", f"row {row.seq} comes next")
            return
        try:
            # One row at a time: what is wrong with this one shall not hide what is wrong with the next.
            list(audit.verified([row], JOURNAL, after=chain.seq, prev=chain.head))
        except CorruptError as error:
            yield Finding("chain", row_place(row.seq), error.message.removeprefix(f"{JOURNAL}: "))
        chain.seq, chain.head = row.seq, row.hash
        if restored is not None and row.seq == restored.row.seq and (what := trail.differs(restored.ledger)):
            yield Finding("snapshot-differs", row_place(row.seq), f"other {what} than the rows before it tell")
        yield from _content(row, trail, chain.seals, unreadable)
    if not trail.versions:
        yield Finding("not-opened", JOURNAL, "no row opens the run")


def _content(row: Row, trail: Trail, seals: Seals, unreadable: set[int]) -> Iterator[Finding]:
    try:
        record = records.from_bytes(row.body)
        columns = (record.kind, records.recorded_at(record))
    except (CorruptError, RefusedError) as error:
        unreadable.add(row.seq)
        yield Finding("row-content", row_place(row.seq), error.message)
        return
    if (row.kind, row.at) != columns:
        yield Finding("row-columns", row_place(row.seq), "its columns differ from its body")
    yield from trail.take(row.seq, record)
    yield from seals.take(row, record)


def _below(error: CorruptError | UnicodeDecodeError) -> str:
    """An error's text without the folder, which is the reader's own business."""
    return error.message.rpartition("/")[2] if isinstance(error, CorruptError) else "its text is not UTF-8"


@dataclass(frozen=True, slots=True)
class _Lines:
    """What the lines of audit.jsonl are compared with: `mark` where the first rows are not here."""

    mark: Mark | None
    length: int
    unreadable: set[int]


def _audit_lines(path: Path, journal: JournalReader, lines: _Lines) -> Iterator[Finding]:
    """Compare audit.jsonl with the rows; a coordinator that runs may have added to both since row `length`."""
    if not path.exists():
        yield Finding("audit-gone", AUDIT, "start the coordinator once: it writes the file anew from the journal")
        return
    begin = number = lines.mark.seq if lines.mark else 0
    rows = journal.rows(begin)
    try:
        with path.open("rb") as file:
            if lines.mark is not None and hashlib.sha256(file.read(lines.mark.size)).hexdigest() != lines.mark.sha256:
                yield Finding("audit-line", f"{AUDIT}: up to line {number}", "not the lines that were written")
                return
            # Lines first: a row is committed before its line is written, so each line must have one.
            for number, line in enumerate(file, start=begin + 1):
                row = next(rows, None)
                if row is None:
                    yield Finding("audit-line", f"{AUDIT}: line {number}", "the journal has no such row")
                    return
                if row.seq not in lines.unreadable and not _says(line, row):
                    yield Finding("audit-line", f"{AUDIT}: line {number}", f"differs from row {row.seq} of the journal")
    except UNREADABLE:
        return  # told already, as journal-unreadable
    if number < lines.length:
        yield Finding(SHORT, AUDIT, f"ends after line {number}, the journal has {lines.length} rows")


def _says(line: bytes, row: Row) -> bool:
    try:
        return line == audit.line_bytes(row)
    except RefusedError:
        return True  # the manifest in the row is damaged, which was told with the row


# -- files ---


def _masters(storage: Path, trail: Trail, journal: JournalReader, length: int) -> Iterator[Finding]:
    slots = SLOTS[trail.federation.aggregation.server.optimizer]
    for version, recorded in trail.versions.items():
        found = check_master(storage, version, recorded, slots, required=version in {0, trail.pruned, trail.version})
        # A coordinator that has gone on since has pruned what was the newest master when we began.
        if found and version == trail.version > 0 and _went_on(journal, length):
            continue
        yield from found


def _went_on(journal: JournalReader, length: int) -> bool:
    try:
        return any(row.kind == records.VersionCommitted.kind for row in journal.rows(after=length, limit=AHEAD))
    except UNREADABLE:
        return False


def _transfers(storage: Path, trail: Trail, seals: Seals, progress: Progress) -> Iterator[Finding]:
    kept = _kept(trail)
    published = [(version, each) for version, recorded in trail.versions.items() for each in recorded.transfers]
    total, done = len(published) + len(kept), 0
    for version, each in published:
        yield from check_state(storage, version, each, trail.plan)
        done += 1
        progress(done / total)
    pruned = given_up(trail.known, trail.pruned, trail.federation.aggregation)
    for update_id in kept:
        gone = update_id in pruned
        if update_id not in trail.accepted:
            yield from check_frames(storage, update_id, trail.known[update_id].manifest_sha256, given_up=gone)
            done += 1
            continue
        _seq, accepted = trail.accepted[update_id]
        base = trail.versions.get(accepted.base_version)
        started = base.state_digest if base else None
        said = seals.check_manifest
        yield from check_update(storage, accepted, started, trail.plan, trail.federation, said, given_up=gone)
        done += 1
        progress(done / total)


def _kept(trail: Trail) -> list[str]:
    """Ids of the updates whose bytes are kept: all but those that were rejected, or given up."""
    return [key for key, known in trail.known.items() if known.outcome != "rejected" and known.rule != LOST]


# -- receipts ---


def _receipt_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder", hint="name a copy of a site's receipts folder")
    return sorted(folder.glob("*.json"))


def _receipt(path: Path, trail: Trail) -> Iterator[Finding]:
    where = f"{path.parent.parent.name}/{path.parent.name}/{path.name}"
    try:
        fields: dict[str, Any] = dict(json.loads(path.read_bytes()))
        base_version, base_digest = fields.pop("base_version"), fields.pop("base_digest")
        receipt = Receipt.model_validate(fields)
    except ValidationError as error:
        yield Finding("receipt-unreadable", where, describe_invalid("receipt", error))
        return
    except (ValueError, TypeError, KeyError, RecursionError):
        yield Finding("receipt-unreadable", where, "not a receipt as a site writes it")
        return
    if receipt.update_id != path.stem:
        yield Finding("receipt-differs", where, f"it is about update {receipt.update_id}")
    if receipt.rule in UNRECORDED:
        return
    known = trail.known.get(receipt.update_id)
    if known is None:
        yield Finding("receipt-unknown-update", where, f"the site was told {receipt.outcome}, no row knows the update")
        return
    for name, told, recorded in _told(receipt, known):
        yield Finding("receipt-differs", where, f"the site was told {name} {told}, the journal says {recorded}")
    if receipt.update_id in trail.accepted:
        _seq, accepted = trail.accepted[receipt.update_id]
        base = trail.versions.get(accepted.base_version)
        if base is None or (base_version, base_digest) != (accepted.base_version, base.state_digest):
            yield Finding("receipt-differs", where, "the site trained on another state than the journal says")


def _told(receipt: Receipt, known: Known) -> Iterator[tuple[str, object, object]]:
    """Fields in which receipt and journal differ; a receipt may be from before the update was merged or dropped."""
    names = ["manifest_sha256"]
    if receipt.outcome != "accepted" or known.outcome == "rejected":
        names += ["outcome", "rule", "version", "staleness", "weight"]
    for name in names:
        told, recorded = getattr(receipt, name), getattr(known, name)
        if told != recorded:
            yield name, told, recorded
