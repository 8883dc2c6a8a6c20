"""Checking a site's folder while nobody writes it: the updates that wait, the receipts, the states, and what stays.

    settled-update    an update whose receipt is here; the crash came before its bytes were deleted
    stale-own         what was to stay here with an update that was never sealed, or that is long past
    stale-residual    what an update left out that was never sealed, or an earlier one than the last
    litter            files under temporary names, frames that no manifest speaks of
    damaged-state     a state that is not what was sent; it can be pulled again
    damaged-residual  what updates left out is not what was kept; without it nothing is owed, and the run goes on
    damaged-own       what stays here is not what was written; there is no other copy
    damaged-update    an update without receipt that is not what was sealed; there is no other copy
    damaged-receipt   a receipt that cannot be read; the coordinator's journal says the same
    damaged-ledger    a privacy ledger with a line that is not what was written
    short-ledger      a privacy ledger without a row that an update names: deleted, cut, or put back from a backup

With `repair` the first six are deleted. The others are left for people to look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edge_client import residual
from edge_client.layout import LOCK, PREFIX, check_layout
from edge_client.outbox import is_sealed, named_charges, read_receipt, receipt_paths
from edge_client.own import OTHERWISE, OWN, entries, leftovers
from edge_client.privacy.ledger import LEDGER, check_known, cut_torn, read_ledger
from shared import durable
from shared.errors import ConfigError, CorruptError, RefusedError
from shared.lock import FolderLock
from shared.problems import Problem
from shared.store import FrameStore

_TRAIN_AGAIN = (
    "look for disk errors, restore it from a backup, or move its files away: the site then trains on that version again"
)


@dataclass(frozen=True, slots=True)
class Checked:
    """What was looked at, and all that was found."""

    waiting: int
    """Updates without receipt."""
    receipts: int
    charges: int
    """Trainings in the privacy ledger; 0 where none was private, and where it cannot be read."""
    problems: tuple[Problem, ...]


def check(storage: Path, *, repair: bool = False) -> Checked:
    """Look at a site's whole folder, and with `repair` delete what may go.

    Raises ConfigError when no site has run there, UnavailableError while one does, RefusedError with rule
    'newer-schema' or 'older-schema' when another release wrote it.
    """
    if not (storage / "outbox").is_dir():
        raise ConfigError(f"{storage}: no site has run there", hint="name the configuration of a site that has")
    with FolderLock(storage / LOCK, holder="site"):
        check_layout(storage)
        receipts = receipt_paths(storage)
        charges, ledger_problems = _ledger(storage, repair=repair)
        problems = [
            *_receipts(receipts),
            *ledger_problems,
            *_outbox(storage, {path.stem for path in receipts}, repair=repair),
            *_own(storage, repair=repair),
            *_states(storage, repair=repair),
            *_residual(storage, {path.stem for path in receipts}, repair=repair),
            *_litter(storage, repair=repair),
        ]
        waiting = len(FrameStore(storage / "outbox").ids())
    return Checked(waiting, len(receipts), charges, tuple(problems))


def _receipts(paths: list[Path]) -> Iterator[Problem]:
    for path in paths:
        try:
            read_receipt(path)
        except CorruptError as error:
            yield Problem(
                "damage", "damaged-receipt", _place(path), "not a receipt as a site writes it", False, error.hint
            )


def _ledger(storage: Path, *, repair: bool) -> tuple[int, list[Problem]]:
    """The number of its rows, and what is wrong with it; a line that a crash cut short is litter."""
    path, problems = storage / LEDGER, []
    try:
        rows, torn = read_ledger(path)
    except CorruptError as error:
        return 0, [Problem("damage", "damaged-ledger", LEDGER, error.message.partition(", ")[2], False, error.hint)]
    if torn:
        if repair:
            cut_torn(path, rows)
        problems.append(_leftover("litter", LEDGER, "a line that was being written", repair=repair))
    try:
        check_known(path, rows, _named(storage))
    except CorruptError as error:
        what = error.message.removeprefix(f"{path} ")
        problems.append(Problem("damage", "short-ledger", LEDGER, what, False, error.hint))
    return len(rows), problems


def _named(storage: Path) -> int:
    """The highest row that a readable update or receipt names; those that cannot be read are told on their own."""
    store, waiting, answered = FrameStore(storage / "outbox"), [], []
    for update_id in store.ids():
        with suppress(CorruptError, RefusedError):
            stored = store.get(update_id)
            waiting += [stored.manifest] if stored is not None else []
    for path in receipt_paths(storage):
        with suppress(CorruptError):
            answered.append(read_receipt(path))
    return named_charges(waiting, answered)


def _outbox(storage: Path, settled: set[str], *, repair: bool) -> Iterator[Problem]:
    store = FrameStore(storage / "outbox")
    for update_id in store.ids():
        where = f"outbox/{update_id}"
        if update_id in settled:
            if repair:
                store.delete(update_id)
            yield _leftover("settled-update", where, "its receipt is here", repair=repair)
            continue
        broken = _broken(store, update_id)
        if broken:
            yield Problem("damage", "damaged-update", where, broken, False, _TRAIN_AGAIN)


def _own(storage: Path, *, repair: bool) -> Iterator[Problem]:
    stale = set(leftovers(storage / OWN, partial(is_sealed, storage)))
    for entry in entries(storage / OWN):
        if entry in stale:
            if repair:
                entry.path.unlink()
            yield _leftover("stale-own", _place(entry.path), "it belongs to no update that counts", repair=repair)
        elif not entry.intact:
            yield Problem("damage", "damaged-own", _place(entry.path), "not what was written", False, OTHERWISE)


def _states(storage: Path, *, repair: bool) -> Iterator[Problem]:
    if not (storage / "states").is_dir():
        return
    store = FrameStore(storage / "states")
    for state_id in store.ids():
        broken = _broken(store, state_id)
        if broken:
            if repair:
                store.delete(state_id)
            advice = "" if repair else "--repair deletes it, and it is pulled again"
            yield Problem("damage", "damaged-state", f"states/{state_id}", broken, repair, advice)


def _residual(storage: Path, settled: set[str], *, repair: bool) -> Iterator[Problem]:
    if not (storage / residual.FOLDER).is_dir():
        return
    store = FrameStore(storage / residual.FOLDER)
    broken = {update_id: _broken(store, update_id) for update_id in store.ids()}
    counts = residual.counting(store, settled.union(FrameStore(storage / "outbox").ids()))
    for update_id, reason in broken.items():
        if not reason and update_id == counts:
            continue
        if repair:
            store.delete(update_id)
        where = f"{residual.FOLDER}/{update_id}"
        if reason:
            advice = "" if repair else "--repair deletes it; what it owes is then never sent"
            yield Problem("damage", "damaged-residual", where, reason, repair, advice)
        else:
            yield _leftover("stale-residual", where, "it does not count, or not any more", repair=repair)


def _broken(store: FrameStore, transfer_id: str) -> str:
    """What is wrong with a whole transfer; empty when it is what its manifest says, down to the file's hash."""
    try:
        stored = store.get(transfer_id)
        if stored is not None:
            stored.check_frames()
            with stored.open_tensors(verify=True) as reader:
                for _ in reader.tensors():
                    pass
    except (CorruptError, RefusedError) as error:
        return error.message.rpartition("/")[2]
    return ""


def _litter(storage: Path, *, repair: bool) -> Iterator[Problem]:
    for name in ("outbox", OWN, "receipts", "states", residual.FOLDER, PREFIX):
        folder = storage / name
        loose = [
            path
            for path in folder.glob("*.frames")
            if not any(path.with_suffix(suffix).exists() for suffix in (".manifest", ".part.manifest"))
        ]
        for path in sorted([*durable.temporaries(folder), *loose]):
            if repair:
                path.unlink()
            yield _leftover("litter", _place(path), "a file that was being written, or to be", repair=repair)


def _leftover(rule: str, where: str, what: str, *, repair: bool) -> Problem:
    return Problem("leftover", rule, where, what, repair, "" if repair else "--repair deletes it")


def _place(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
