"""A run in one file for somebody else: all the evidence, and a script that checks it without this project.

    <federation>-v00000007/
        authority.pub                      of a sealed run: the authority's public keys, PEM
        SHA256SUMS                         of every other file; `sha256sum -c SHA256SUMS` reads it
        endorsements                       where the authority has had other keys: the memberships that those signed
        federation.json                    what all agreed on; its SHA-256 is config_sha256 of row 1
        journal.jsonl                      the rows: seq, at, kind, body (base64), prev and hash (hex)
        masters/v00000000.safetensors      version 0, float32
        plan.json                          the sealed plan; its SHA-256 is the fingerprint in row 1
        updates/<id>.frames, .manifest     each update that was accepted (or merged up to the version asked for); of one
                                           whose bytes were given up, the manifest alone
        verify.py                          `python verify.py`: the Python standard library, msgpack, zstandard, and
                                           cryptography for a sealed run

The two JSON files are the very bytes that were hashed, so that no reader has to know how they were made canonical; no
machine's paths are in them. The same run gives the same bundle, byte for byte: names ascend, and all dates are zero.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

from coordinator.journal import Journal
from coordinator.ledger import Known
from coordinator.masters import master_path
from coordinator.merging import given_up
from coordinator.records import Accepted, Dropped, Pruned, VersionCommitted, from_bytes
from coordinator.rows import JournalReader
from coordinator.views import JOURNAL, not_begun
from shared import audit, durable
from shared.audit import GENESIS, Row
from shared.config import AggregationSection, FederationConfig
from shared.errors import ConfigError, CorruptError
from shared.messages import LOST
from shared.plan import SealedPlan

SCRIPT = Path(__file__).with_name("bundle_verify.py")
"""What stands in the bundle as verify.py."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was written."""

    sha256: str
    """Of the whole file, hex."""
    version: int
    rows: int
    head: str
    """Hash of the last row, hex: it stands for all rows."""
    updates: int


@dataclass(slots=True)
class _Contents:
    version: int
    rows: int = 0
    head: bytes = GENESIS
    updates: tuple[str, ...] = ()
    given_up: frozenset[str] = frozenset()
    """Of those, the ones whose frames are not kept."""


def export_bundle(
    storage: Path,
    federation: FederationConfig,
    plan: SealedPlan,
    out: Path,
    *,
    upto: int | None = None,
    authority: Mapping[str, bytes] = MappingProxyType({}),
) -> Bundle:
    """Write the bundle of a run to the new file `out`, up to version `upto` (None: all that there is).

    `authority` holds, by name, the files by which the memberships in a sealed run's journal are believed.

    Evidence is exported as it lies on the disk, also when it is damaged: the script says so. ConfigError when `out`
    exists or there is no such version, CorruptError when the journal's chain is broken or a file is gone,
    UnavailableError when the disk is full; then nothing is written.
    """
    if out.exists():
        raise ConfigError(f"{out} is already there", hint="name a new file")
    with contextlib.ExitStack() as stack:
        durable.make_folder(out.parent)
        journal = stack.enter_context(Journal.open_read(storage / JOURNAL))
        lines, _fd = stack.enter_context(durable.temporary_file(out.parent))
        contents = _survey(journal, storage, federation.aggregation, upto)
        _write_lines(journal, contents.rows, lines)
        sources = _sources(storage, federation, plan, lines, contents, authority)
        temporary, fd = stack.enter_context(durable.temporary_file(out.parent))
        with durable.storage_errors(out.parent), open(fd, "wb", closefd=False) as file:
            _write_tar(file, f"{federation.federation.name}-v{contents.version:08d}", sources)
        durable.sync_file(fd)
        temporary.rename(out)
    durable.fsync_dir(out.parent)
    return Bundle(_file_sha256(out), contents.version, contents.rows, contents.head.hex(), len(contents.updates))


def _survey(journal: JournalReader, storage: Path, section: AggregationSection, upto: int | None) -> _Contents:
    """Return how many rows belong to the bundle, and whose updates."""
    accepted: list[str] = []
    merged: dict[str, Known] = {}
    contents, pruned = _Contents(version=0), 0
    for row in audit.verified(journal.rows(), str(journal.path)):
        record = from_bytes(row.body)
        if isinstance(record, Accepted):
            accepted.append(record.update_id)
        elif isinstance(record, Dropped) and record.rule == LOST:
            accepted.remove(record.update_id)
        elif isinstance(record, Pruned):
            pruned = record.version
        elif isinstance(record, VersionCommitted):
            contents.version = record.version
            merged |= {
                part.update_id: Known(part.site, "", "merged", version=record.version, staleness=part.staleness)
                for part in record.contributions
            }
        contents.rows, contents.head = row.seq, row.hash
        if upto is not None and contents.version == upto:
            break
    if not contents.rows:
        raise not_begun(storage)
    if upto is not None and contents.version != upto:
        raise ConfigError(f"there is no version {upto}", hint=f"versions 0 to {contents.version} have been published")
    contents.updates = tuple(accepted if upto is None else merged)
    contents.given_up = given_up(merged, pruned, section)
    return contents


def _write_lines(journal: JournalReader, count: int, path: Path) -> None:
    with durable.storage_errors(path.parent), path.open("wb") as file:
        for row in journal.rows(limit=count):
            file.write(_line(row))


def _line(row: Row) -> bytes:
    fields = {
        "seq": row.seq,
        "at": row.at,
        "kind": row.kind,
        "body": base64.b64encode(row.body).decode(),
        "prev": row.prev.hex(),
        "hash": row.hash.hex(),
    }
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _sources(
    storage: Path,
    federation: FederationConfig,
    plan: SealedPlan,
    lines: Path,
    contents: _Contents,
    authority: Mapping[str, bytes],
) -> dict[str, Path | bytes]:
    """Return name and origin of each file, SHA256SUMS included, by name."""
    sources: dict[str, Path | bytes] = {
        **authority,
        "federation.json": _canonical(federation.model_dump(mode="json", exclude={"model": {"base"}})),
        "journal.jsonl": lines,
        "masters/v00000000.safetensors": master_path(storage / "masters", 0),
        "plan.json": _canonical(plan.model_dump(mode="json")),
        "verify.py": SCRIPT,
    }
    for update_id in contents.updates:
        for suffix in ("manifest",) if update_id in contents.given_up else ("frames", "manifest"):
            sources[f"updates/{update_id}.{suffix}"] = storage / "updates" / f"{update_id}.{suffix}"
    sums = "".join(f"{digest}  {name}\n" for name, digest in _digests(sources))
    return dict(sorted({**sources, "SHA256SUMS": sums.encode()}.items()))


def _canonical(plain: Mapping[str, object]) -> bytes:
    """The JSON whose digest `config_sha256` and `fingerprint` are."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def _digests(sources: Mapping[str, Path | bytes]) -> Iterator[tuple[str, str]]:
    for name, source in sorted(sources.items()):
        yield name, hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else _file_sha256(source)


def _file_sha256(path: Path) -> str:
    if not path.exists():
        raise CorruptError(f"{path} is gone", hint="restore it from a backup, or recompute it from version 0")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tar(file: IO[bytes], folder: str, sources: Mapping[str, Path | bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, source in sources.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")  # its owner, group and time are zero
            if isinstance(source, bytes):
                entry.size = len(source)
                tar.addfile(entry, io.BytesIO(source))
                continue
            try:
                with source.open("rb") as content:
                    entry.size = source.stat().st_size
                    tar.addfile(entry, content)
            except FileNotFoundError:
                raise CorruptError(
                    f"{source} is gone",
                    hint="see: mailboat audit verify; updates given up later are exported with them",
                ) from None
