"""The privacy ledger of a site: what every training from its storage folder has cost, in `privacy.jsonl`.

A row for each training, durable before the update that came of it can be sealed (see `metered.py`), and never taken
back: neither when the update was rejected or lost, nor when the site died before it was sealed and trained again. What
was spent adds up over all versions, restarts and federations that this folder has seen.

Each row holds the hash of the one before, and every update carries the number of its row (metric `charges`), which its
receipt keeps. So a ledger that was deleted, cut or put back from a backup is found out by the updates that it does not
know, at the next start and by `mailboat site fsck`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared import durable
from shared.errors import CorruptError
from shared.ids import Ident, Sha256Hex

LEDGER = "privacy.jsonl"
CHARGES = "charges"
"""The metric of an update that names its row, counted from 1."""
BUDGET = "privacy-budget"
"""The rule under which a training is refused that would cost too much."""
_NOTHING = "0" * 64
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Charge(_Value):
    """Steps of the sampled Gaussian mechanism, all alike."""

    sample_rate: Annotated[float, Field(gt=0, le=1)]
    """q: the probability with which each record is drawn in a step; the expected batch over the number of records."""
    noise_multiplier: _Positive
    steps: Annotated[int, Field(ge=1)]

    def times(self, count: int) -> Charge:
        """The same, `count` times over."""
        return self.model_copy(update={"steps": self.steps * count})


class Spent(_Value):
    """A training that was done, and what all of them together have cost with it."""

    charge: Charge
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    delta: _Positive


class Limit(_Value):
    """Trainings that have been charged to somebody's account, and the epsilon that it may come to."""

    name: str
    epsilon: _Positive
    charges: tuple[Charge, ...]


class Row(_Value):
    """One line of the ledger."""

    previous: Sha256Hex
    """SHA-256 of the line before, without its end; zeros in the first."""
    at: float
    """Unix seconds by this machine's clock, for people."""
    federation: Ident
    run: Sha256Hex
    """`config_sha256` of the federation: tells one run's spending from another's."""
    base_version: Annotated[int, Field(ge=0)]
    spent: Spent


class Ledger:
    """The ledger of one site's folder, for its one writer; `rows` is what it holds."""

    def __init__(self, storage: Path, *, known: int) -> None:
        """Read it; `known` is the highest row that an update in this folder names.

        CorruptError when a line is not what was written, and when rows are missed.
        """
        self.path = storage / LEDGER
        self.rows, torn = read_ledger(self.path)
        check_known(self.path, self.rows, known)
        if torn:
            cut_torn(self.path, self.rows)
        self._size = len(_lines(self.rows))

    def add(self, federation: str, run: str, base_version: int, spent: Spent) -> int:
        """Write a row, durably, and return its number, counted from 1.

        NoRoomError when the disk is full, CorruptError when the file is not as it was left.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._size:
            raise CorruptError(f"{self.path} was changed while the site ran", hint=_RESTORE)
        row = Row(
            previous=_hash(self.rows[-1]) if self.rows else _NOTHING,
            at=time.time(),
            federation=federation,
            run=run,
            base_version=base_version,
            spent=spent,
        )
        durable.append(self.path, _line(row))
        self._size += len(_line(row))
        self.rows = (*self.rows, row)
        return len(self.rows)


def charges_of(rows: Sequence[Row], keep: Callable[[Row], bool] = lambda _row: True) -> tuple[Charge, ...]:
    """Return what the rows that `keep` chooses were charged, neighbours of one kind as one."""
    charges = (row.spent.charge for row in rows if keep(row))
    return tuple(
        _together(alike) for _, alike in groupby(charges, key=lambda each: (each.sample_rate, each.noise_multiplier))
    )


def read_ledger(path: Path) -> tuple[tuple[Row, ...], bool]:
    """Return the rows of a ledger, and whether a line that a crash cut short stands behind them; no file, no rows.

    CorruptError when a line is not what was written, or does not follow the one before.
    """
    if not path.exists():
        return (), False
    *lines, torn = path.read_bytes().split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = Row.model_validate_json(line)
        except ValidationError:
            row = None
        previous = _hash(rows[-1]) if rows else _NOTHING
        if row is None or row.previous != previous or _line(row) != line + b"\n":
            raise CorruptError(f"{path}, line {number}: not what was written", hint=_RESTORE)
        rows.append(row)
    return tuple(rows), bool(torn)


def cut_torn(path: Path, rows: Sequence[Row]) -> None:
    """Leave the rows alone in the file: a line that a crash cut short was for an update that was never sealed."""
    durable.replace_atomic(path, _lines(rows))


def check_known(path: Path, rows: Sequence[Row], known: int) -> None:
    """Raise CorruptError when an update names a row that is not there."""
    if known > len(rows):
        raise CorruptError(
            f"{path} has {len(rows)} rows, and an update names row {known}: what was spent is not all here",
            hint=_RESTORE,
        )


def row_named(told: Mapping[str, Any]) -> int:
    """Return the row that an update's metrics or its receipt name; 0 for one that was trained without privacy."""
    return int(told.get(CHARGES, 0))


_RESTORE = "restore it from a backup; `mailboat audit show` at the coordinator tells what each update had cost by then"


def _together(alike: Iterable[Charge]) -> Charge:
    first, *others = alike
    return first.model_copy(update={"steps": first.steps + sum(other.steps for other in others)})


def _line(row: Row) -> bytes:
    return json.dumps(row.model_dump(mode="json"), sort_keys=True).encode() + b"\n"


def _lines(rows: Iterable[Row]) -> bytes:
    return b"".join(map(_line, rows))


def _hash(row: Row) -> str:
    return hashlib.sha256(_line(row)[:-1]).hexdigest()
