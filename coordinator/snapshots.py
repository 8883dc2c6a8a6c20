"""Snapshots: the ledger as bytes, so that a restart reads the state of a run instead of folding all its rows.

zstd over a msgpack map. Everything that the ledger knows is in it, the digests of every update and version too; what is
not in it is what only the rows tell (times, norms, examples). Its own SHA-256 stands in the row that follows the rows
it sums up, so the hash chain binds it. Reading is strict, because we wrote these bytes ourselves.

    v         1
    opened    the record that opened the run
    versions  one each, from 0 on: manifest (of the state, or of the step to it), BLAKE3 of the master, BLAKE3 of the
              optimizer's slots or nil
    sites     names, numbered by position
    known     one each, in order of decision: id, site's number, SHA-256 of the manifest, outcome's number, rule,
              detail, version, staleness, weight
    pending   records of acceptance, in order
    finished  whether the run is complete
    signed    record of the newest signed head, or nil
    quarantined  records of acceptance of the updates that are kept apart
    losses    id and loss of the updates that are not merged yet, where losses are measured
    anchors   manifests of the states that can be had whole besides a step, by version

The last two are absent from what was written with journal schema 3, the last four from schema 2.
"""

from __future__ import annotations

from typing import Any, get_args

import msgpack
import zstandard

from coordinator import records
from coordinator.ledger import Files, Known, Ledger
from coordinator.records import Accepted, Opened, Signed
from shared.errors import CorruptError, RefusedError
from shared.manifest import manifest_from_bytes
from shared.messages import Outcome

SCHEMA_VERSION = 2
_OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
_LEVEL = 3
RATIO_MAX = 2000
"""A snapshot is mostly digests, which nothing compresses; the bound is far above any."""
_MALFORMED = (
    zstandard.ZstdError,
    msgpack.UnpackException,
    RefusedError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)


def to_bytes(ledger: Ledger) -> bytes:
    """Return a ledger's bytes; asserts that its run was opened. Equal ledgers give equal bytes."""
    assert ledger.opened is not None, "the run was opened"
    sites = sorted({known.site for known in ledger.known.values()})
    number = {site: index for index, site in enumerate(sites)}
    body = {
        "v": SCHEMA_VERSION,
        "opened": records.to_wire(ledger.opened),
        "versions": [
            [
                published.transfers[-1].to_bytes(),
                _raw(ledger.files[version].master),
                _raw(ledger.files[version].optimizer),
            ]
            for version, published in ledger.published.items()
        ],
        "sites": sites,
        "known": [
            [
                bytes.fromhex(update_id),
                number[known.site],
                bytes.fromhex(known.manifest_sha256),
                _OUTCOMES.index(known.outcome),
                known.rule,
                known.detail,
                known.version,
                known.staleness,
                known.weight,
            ]
            for update_id, known in ledger.known.items()
        ],
        "pending": [records.to_wire(accepted) for accepted in ledger.pending],
        "quarantined": [records.to_wire(accepted) for accepted in ledger.quarantined.values()],
        "losses": [[bytes.fromhex(update_id), loss] for update_id, loss in ledger.losses.items()],
        "finished": ledger.finished,
        "pruned": ledger.pruned,
        "signed": None if ledger.signed is None else records.to_wire(ledger.signed),
        "anchors": [
            published.whole.to_bytes()
            for published in ledger.published.values()
            if published.whole is not None and published.step is not None
        ],
    }
    return zstandard.ZstdCompressor(level=_LEVEL).compress(msgpack.packb(body, use_bin_type=True))


def from_bytes(data: bytes) -> Ledger:
    """Inverse of to_bytes.

    CorruptError when they are not a ledger's bytes, RefusedError(rule='newer-schema') for a newer release's.
    """
    try:
        body = msgpack.unpackb(_expanded(data), raw=False)
        version = int(body["v"])
        ledger = _ledger(body) if version == SCHEMA_VERSION else None
    except _MALFORMED:
        raise CorruptError("a snapshot is not a ledger", hint="restore the journal from a backup") from None
    if ledger is None:
        raise RefusedError(
            f"a snapshot of schema version {version}, this release knows {SCHEMA_VERSION}",
            rule="newer-schema",
            hint="run the release that wrote the journal, or a later one",
        )
    return ledger


def _expanded(data: bytes) -> bytes:
    """What a snapshot holds; ValueError when it claims more than any does, for which memory would be taken at once."""
    size = zstandard.get_frame_parameters(data).content_size
    if size > RATIO_MAX * len(data):
        msg = f"{size} bytes out of {len(data)}"
        raise ValueError(msg)
    return zstandard.ZstdDecompressor().decompress(data)


def _ledger(body: dict[str, Any]) -> Ledger:
    ledger = Ledger()
    opened = records.from_wire(body["opened"])
    pending = [records.from_wire(wire) for wire in body["pending"]]
    if not isinstance(opened, Opened):
        raise TypeError
    ledger.opened = opened
    for version, (state, master, optimizer) in enumerate(body["versions"]):
        ledger.publish(version, manifest_from_bytes(state))
        ledger.files[version] = Files(master.hex(), None if optimizer is None else optimizer.hex())
    ledger.version = len(ledger.published) - 1
    for anchor in map(manifest_from_bytes, body.get("anchors", ())):
        ledger.anchor(anchor.version, anchor)
    sites = body["sites"]
    for update_id, site, digest, outcome, *rest in body["known"]:
        ledger.known[update_id.hex()] = Known(sites[site], digest.hex(), _OUTCOMES[outcome], *rest)
    ledger.pending = [record for record in pending if isinstance(record, Accepted)]
    ledger.finished = body["finished"]
    ledger.pruned = int(body.get("pruned", 0))
    held = [records.from_wire(wire) for wire in body.get("quarantined", ())]
    ledger.quarantined = {record.update_id: record for record in held if isinstance(record, Accepted)}
    ledger.losses = {update_id.hex(): loss for update_id, loss in body.get("losses", ())}
    signed = body.get("signed") and records.from_wire(body["signed"])
    ledger.signed = signed if isinstance(signed, Signed) else None
    return ledger


def _raw(digest: str | None) -> bytes | None:
    return None if digest is None else bytes.fromhex(digest)
