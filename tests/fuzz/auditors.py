"""The decoders of what an auditor is handed by those whom he checks: rows, heads, receipts, bundles, keys.

A bundle's script is run as its `main` runs it: what it says that it catches is caught.
"""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path, PurePosixPath
from typing import Any, cast

import msgpack
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator import bundle_verify, records
from coordinator.proof import UNREADABLE, _receipt
from coordinator.rows import ARCHIVE, JournalReader
from coordinator.seals import Seals
from coordinator.trail import Trail
from coordinator.views import JOURNAL
from shared.audit import GENESIS, linked
from shared.errors import CorruptError, RefusedError
from shared.slices import compress_slice
from shared.trust.kit import authority_pem, parse_authorities
from shared.trust.membership import Believed, public_bytes, sign_endorsements
from shared.trust.witness import parse_head
from tests.factories import make_federation, make_plan
from tests.fuzz.mutate import mutated_bytes, mutated_json, mutated_msgpack, packed
from tests.fuzz.target import Target

FEDERATION = make_federation()
PLAN = make_plan(FEDERATION)
AUTHORITY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = public_bytes(AUTHORITY)
GOLDEN = Path(__file__).parents[1] / "golden"
BODIES = {path.stem: path.read_bytes() for path in sorted((GOLDEN / "journal").glob("*.msgpack"))}
ROWS = [*(BODIES[kind] for kind in ("opened", "accepted", "witnessed", "committed")), *BODIES.values()]
DATABASES = [path.read_bytes() for path in sorted((GOLDEN / "storage").glob("*.sqlite"))]
SIZE, GROUP = 4096, 2
FRAME = compress_slice(np.linspace(-1, 1, SIZE // 4, dtype=np.float32).tobytes(), GROUP)


class File(PurePosixPath):
    """A file of a given content below any folder, for functions that only read it; it lies nowhere."""

    content: bytes = b""

    def read_bytes(self) -> bytes:
        """All of it."""
        return self.content

    def read_text(self, encoding: str) -> str:
        """The same, decoded."""
        return self.content.decode(encoding)

    def exists(self) -> bool:
        """It does."""
        return True


class Folder(dict[str, bytes]):
    """A folder of such files."""

    def __truediv__(self, name: str) -> File:
        file = File(name)
        file.content = self[name]
        return file


def _script(run: Callable[[Any], object]) -> Callable[[bytes], None]:
    """`run` over what the bytes say as msgpack, within what the script catches."""

    def caught(data: bytes) -> None:
        with redirect_stdout(io.StringIO()):
            try:
                run(msgpack.unpackb(data, raw=False))
            except bundle_verify.UNREADABLE:
                return

    return caught


def _bundle(data: bytes) -> None:
    with redirect_stdout(io.StringIO()):
        try:
            lines = [json.loads(line) for line in data.splitlines()]
            list(bundle_verify.check_chain(lines))
            told = [bundle_verify.record_of(line) for line in lines]
            list(bundle_verify.check_counting(told))
            list(bundle_verify.check_states(told, []))
        except bundle_verify.UNREADABLE:
            return


def _signatures(given: Any) -> None:
    rows, keys, endorsements = given
    folder = Folder({"authority.pub": keys, "endorsements": endorsements})
    lines = [{"seq": seq, "hash": "00" * 32} for seq in range(1, len(rows) + 1)]
    list(bundle_verify.check_signatures(cast("Path", folder), lines, rows))


def _frame(given: Any) -> None:
    frame, size, group = given
    out = bundle_verify.expand(frame, size, group)
    assert len(out) == size <= bundle_verify.SLICE_BYTES_MAX


def _rows(data: bytes) -> None:
    """A journal with a sound chain and any content, followed to its end."""
    believed = Believed((PUBLIC,))
    trail, seals, head = Trail(FEDERATION, PLAN), Seals(FEDERATION, PLAN.fingerprint, believed), GENESIS
    try:
        bodies = [body for body in msgpack.unpackb(data, raw=False) if isinstance(body, bytes)]
    except (ValueError, TypeError):
        return
    for seq, body in enumerate(bodies[:100], start=1):
        row = linked(head, seq, 1.0, "any", body)
        head = row.hash
        try:
            record = records.from_bytes(body)
        except (CorruptError, RefusedError):
            continue
        trail.take(seq, record)
        seals.take(row, record)


def _rows_mutated(data: bytes, rng: random.Random) -> bytes:
    bodies = msgpack.unpackb(data, raw=False)
    match rng.randrange(3):
        case 0:
            rng.shuffle(bodies)
        case 1:
            bodies.append(rng.choice(bodies))
        case _:
            at = rng.randrange(len(bodies))
            bodies[at] = mutated_msgpack(bodies[at], rng)
    return packed(bodies, data, rng)


_PLACE = tempfile.TemporaryDirectory(prefix="mailboat-fuzz-")
(Path(_PLACE.name) / ARCHIVE).symlink_to(GOLDEN / "storage" / ARCHIVE)


def _database(data: bytes) -> None:
    """A journal's file itself, as SQLite reads it: each row comes once and in order, or the file is told unsound."""
    path = Path(_PLACE.name) / JOURNAL
    path.write_bytes(data)
    try:
        with JournalReader(path) as journal:
            journal.restore()
            journal.pruned()
            found = [row.seq for row in journal.rows()]
    except UNREADABLE:
        return
    assert found == sorted(set(found))


def _held(data: bytes) -> None:
    file = File(f"north/receipts/{'ab' * 16}.json")
    file.content = data
    list(_receipt(cast("Path", file), Trail(FEDERATION, PLAN)))


_RECEIPT = {
    "update_id": "ab" * 16,
    "manifest_sha256": "cd" * 32,
    "outcome": "merged",
    "version": 3,
    "staleness": 0,
    "weight": 0.5,
    "base_version": 2,
    "base_digest": "ef" * 32,
}
_HEAD = b'{"version": 3, "seq": 27, "head": "' + b"5b" * 32 + b'", "signature": "' + b"00" * 64 + b'"}'
_LINE = (
    b'{"seq":1,"at":1.0,"kind":"dropped","body":"hKF2AaF0p2Ryb3BwZWSpdXBkYXRlX2lkoWGkcnVsZaFi","prev":"'
    + b"00" * 32
    + b'","hash":"'
    + b"00" * 32
    + b'"}'
)
_PUB = authority_pem([PUBLIC])
_ENDORSED = sign_endorsements(AUTHORITY, "north", [b"one", b"two"])
_SIGNED: bytes = msgpack.packb([[msgpack.unpackb(body) for body in ROWS], _PUB, _ENDORSED])

AUDITORS = (
    Target("database", DATABASES, mutated_bytes, _database, 1),
    Target("database", DATABASES, mutated_bytes, _database, 1),
    Target("rows", [msgpack.packb(ROWS)], _rows_mutated, _rows, 3),
    Target("head", [_HEAD], mutated_json, lambda data: parse_head(data, "fuzz"), 2),
    Target("receipt", [json.dumps(_RECEIPT).encode()], mutated_json, _held, 2),
    Target("keys", [_PUB], mutated_bytes, lambda data: parse_authorities(data, Path("authority.pub")), 1),
    Target("bundle", [_LINE], mutated_json, _bundle, 2),
    Target("bundle-signatures", [_SIGNED], mutated_msgpack, _script(_signatures), 2),
    Target("bundle-frame", [msgpack.packb([FRAME, SIZE, GROUP])], mutated_msgpack, _script(_frame), 2),
)
