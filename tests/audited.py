"""A run without broker or sites: storage folder and journal as a coordinator leaves them, and ways to spoil them."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.masters import prune_masters
from coordinator.merging import committed, in_order, plan_merge
from coordinator.records import (
    Accepted,
    Dropped,
    Record,
    Rejected,
    Validated,
    VersionCommitted,
    recorded_at,
    to_bytes,
)
from coordinator.views import JOURNAL
from shared import durable
from shared.audit import GENESIS, AuditLog, Row, line_bytes, linked
from shared.config import AggregationSection, CodecSection, ServerSection
from shared.errors import RefusedError
from tests.small_run import SmallRun

TRAIL = "audit.jsonl"
VERSIONS = 3
MOMENTUM = ServerSection(optimizer="momentum", lr=0.7)
SECTIONS = {
    "sync": AggregationSection(size_power=0.5, server=MOMENTUM),
    "fedbuff": AggregationSection(mode="fedbuff", buffer=3, clip_norm=4, server=ServerSection(optimizer="fadas")),
    "fedasync": AggregationSection(mode="fedasync", alpha=0.9),
    "ca2fl": AggregationSection(rule="ca2fl", server=MOMENTUM),
    "multi-krum": AggregationSection(rule="multi-krum"),
    "size-exp-loss": AggregationSection(quality="size-exp-loss", temperature=0.5),
}
SECTIONS |= {f"{mode}, steps": SECTIONS[mode] for mode in ("sync", "fedasync")}
STEPS = CodecSection(down="int8", steps=2, slice_kib=4)
ROUNDS = {"fedasync": (1, 1, 1), "fedasync, steps": (1, 1, 1), "multi-krum": (5, 3, 5)}
"""Updates of each version, where they are not three; of three Krum cannot judge."""
SHAPES = {"block.0.w": (33, 70), "block.1.w": (2049,), "head.bias": (3,)}

Edit = Callable[[Record], Sequence[Record]]


class AuditedRun:
    """Three versions of random updates, some late, one rejected, one dropped, with slots, bf16; not finished.

    Updates are accepted in another order than that in which `order` adds them up. Where `mode` says so versions travel
    as steps in int8, and version 2 whole as well.
    """

    def __init__(
        self,
        storage: Path,
        mode: str,
        order: Callable[[Sequence[Accepted]], list[Accepted]] = in_order,
        *,
        shapes: Mapping[str, tuple[int, ...]] = SHAPES,
        seed: int = 7,
        **settings: Any,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.storage = storage
        self.mode = mode
        run = SmallRun(
            storage,
            {name: rng.normal(0, 1, shape) for name, shape in shapes.items()},
            **{
                "aggregation": SECTIONS[mode],
                "codec": STEPS if mode.endswith("steps") else CodecSection(slice_kib=4),
                **settings,
            },
        )
        self._run = run
        self.federation = run.federation
        self.plan = run.plan
        self.records: list[Record] = [run.opened]
        self.ledger = Ledger()
        self.ledger.apply(run.opened)
        for version, count in enumerate(ROUNDS.get(mode, (3, 3, 3))):
            merged = [self._accept(rng, site, version) for site in (0, 2, 1, 4, 3)[:count]]
            ledger, section = self.ledger, run.federation.aggregation
            known, losses = ledger.known, ledger.losses
            plan = plan_merge(version + 1, order(merged), section, ledger.parts, known=known, losses=losses)
            self._write(*committed(plan, run.merge_plan(plan), section, 4.0 + version))
        spare = run.update("spare", {"head.bias": [1, 2, 3]}, base=VERSIONS)
        self.records += [spare, Rejected("ee" * 16, "bad", "ab" * 32, "wrong-shape", "tensor w", 8.0)]
        self.records.append(Dropped(spare.update_id, "out-of-round", 9.0))
        prune_masters(run.masters, {VERSIONS - 1, VERSIONS})
        durable.remove_spares(run.masters)  # as a coordinator does at its end
        journal = Journal(storage / JOURNAL)
        journal.append(self.records)
        AuditLog(storage / TRAIL, journal.rows)
        journal.close()

    def _accept(self, rng: np.random.Generator, site: int, version: int) -> Accepted:
        """A site's random update; of those that send again, from the newest version."""
        again = self.mode == "ca2fl"
        update = self._run.update(
            f"s{site}" if again else f"s{site}-{version}",
            {
                name: rng.normal(0, 0.1, shape)
                for name, shape in self.plan.trained.items()
                if site or name != "block.0.w"
            },
            base=version if again else int(rng.integers(0, version + 1)),
            examples=int(rng.integers(1, 1000)),
        )
        self._write(update)
        if self.federation.aggregation.quality != "none":
            self._write(Validated(update.update_id, float(rng.uniform(0, 3)), 3.5))
        return update

    def _write(self, *records: Record) -> None:
        for record in records:
            self.records.append(record)
            self.ledger.apply(record)

    @property
    def accepted(self) -> list[Accepted]:
        """Accepted updates, in order."""
        return [record for record in self.records if isinstance(record, Accepted)]

    @property
    def committed(self) -> list[VersionCommitted]:
        """Versions from 1 on."""
        return [record for record in self.records if isinstance(record, VersionCommitted)]

    @contextlib.contextmanager
    def forged(self, edit: Edit) -> Iterator[None]:
        """While the block runs, the journal says what `edit` makes of each record, with a sound chain."""
        rows: list[Row] = []
        for record in [made for before in self.records for made in edit(before)]:
            head = rows[-1].hash if rows else GENESIS
            rows.append(linked(head, len(rows) + 1, recorded_at(record), record.kind, to_bytes(record)))
        with restored(self.storage / JOURNAL), restored(self.storage / TRAIL):
            with self._database() as db:
                db.execute("DELETE FROM rows")
                values = [(row.seq, row.at, row.kind, row.body, row.prev, row.hash) for row in rows]
                db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", values)
            with contextlib.suppress(RefusedError):  # a manifest that is none has no line
                (self.storage / TRAIL).write_bytes(b"".join(line_bytes(row) for row in rows))
            yield

    @contextlib.contextmanager
    def row_changed(self, seq: int, column: str, value: object) -> Iterator[None]:
        """While the block runs, one value of the journal is another."""
        with restored(self.storage / JOURNAL):
            with self._database() as db:
                db.execute(f"UPDATE rows SET {column} = ? WHERE seq = ?", (value, seq))  # noqa: S608 - our own names
            yield

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.storage / JOURNAL)) as db:
            db.execute("PRAGMA synchronous = OFF")
            with db:
                yield db


@contextlib.contextmanager
def restored(path: Path) -> Iterator[None]:
    """Put the file back as it was when the block ends, and take away what SQLite laid beside it."""
    before = path.read_bytes()
    try:
        yield
    finally:
        for beside in path.parent.glob(f"{path.name}-*"):
            beside.unlink()
        path.write_bytes(before)


def flipped(data: bytes, bit: int) -> bytes:
    """The bytes with one bit turned over; `bit` counts from the lowest of the first byte."""
    spoilt = bytearray(data)
    spoilt[bit // 8] ^= 1 << (bit % 8)
    return bytes(spoilt)


@contextlib.contextmanager
def spoilt(path: Path, bit: int) -> Iterator[None]:
    """While the block runs, one bit of the file is turned over."""
    with restored(path):
        path.write_bytes(flipped(path.read_bytes(), bit))
        yield


def on(kind: type[Record], change: Callable[[Any], Sequence[Record]], *, nth: int = 0) -> Callable[[], Edit]:
    """Change the `nth` record of a kind."""

    def begin() -> Edit:
        seen = iter(range(1000))
        return lambda record: change(record) if isinstance(record, kind) and next(seen) == nth else [record]

    return begin


def put(**fields: Any) -> Callable[[Any], Sequence[Record]]:
    """Other values for some fields."""
    return lambda record: [dataclasses.replace(record, **fields)]
