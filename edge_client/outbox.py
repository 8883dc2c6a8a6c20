"""Sealed updates that wait for their receipt, and the receipts: what a site must never lose.

    outbox/<update_id>.{frames,manifest}   sealed, no receipt yet
    receipts/<update_id>.json              what became of it; kept for ever, it is the site's proof
    own/                                   what stays here and belongs to the newest of them; see `edge_client.own`
    residual/                              what error feedback owes (`edge_client.residual`)

A receipt is durable before the update's bytes go. A crash between the two leaves both; the next start sees the receipt
and removes the bytes. Everything here blocks on the disk.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from edge_client.layout import open_layout
from edge_client.own import OWN, Own, newest
from edge_client.privacy.ledger import CHARGES, row_named
from edge_client.residual import Build, Residuals
from shared import durable
from shared.errors import CorruptError
from shared.faultpoint import passing
from shared.manifest import Manifest
from shared.messages import LOST, Receipt
from shared.slices import FileSummary, FrameWriter
from shared.store import FrameStore

_RECEIPTS = "receipts"
_NAMES = "[0-9a-f]" * 32 + ".json"


class Outbox:
    """The folder of one site; one process writes it."""

    def __init__(self, storage: Path) -> None:
        open_layout(storage)
        self.store = FrameStore(storage / "outbox", recycles=True)
        self._receipts = storage / _RECEIPTS
        self._storage = storage
        self._lock = threading.Lock()
        durable.make_folder(self._receipts)
        self.store.recover()
        durable.remove_temporaries(self._receipts)
        # A predecessor that was killed may have left a receipt whose name is not on the disk yet.
        durable.fsync_dir(self._receipts)
        answered = {path.stem for path in receipt_paths(storage)}
        for update_id in answered:
            self.store.delete(update_id)
        self.residuals = Residuals(storage, answered.union(self.store.ids()))
        self.own = Own(storage, partial(is_sealed, storage))

    def pending(self) -> list[Manifest]:
        """Manifests of the updates without receipt, in the order in which they were trained."""
        found = [stored.manifest for each in self.store.ids() if (stored := self.store.get(each)) is not None]
        return sorted(found, key=lambda manifest: (manifest.update.base_version, manifest.created))

    def trained(self) -> set[str]:
        """Digests of the states that this site has trained on, so that it does not train on one twice.

        Those are left out whose updates were all rejected or lost: whoever starts a site again may have mended the
        cause.
        """
        waiting = {manifest.update.base_digest for manifest in self.pending()}
        answered = [read_receipt(path) for path in receipt_paths(self._storage)]
        counted = (each for each in answered if each["outcome"] != "rejected" and each.get("rule") != LOST)
        return waiting | {each["base_digest"] for each in counted}

    def charges(self) -> int:
        """Return the highest row of the privacy ledger that an update here names; 0 when none does."""
        return named_charges(self.pending(), map(read_receipt, receipt_paths(self._storage)))

    def seal(
        self,
        frames: FrameWriter,
        build: Build,
        left: tuple[FrameWriter, Build] | None = None,
        own: Path | None = None,
    ) -> Manifest:
        """Store an update durably; from here on it is never thrown away without a receipt.

        `left` is the residual that it leaves, if it does: from the same moment on that is owed, and nothing before it.
        A file `own`, of what stays here, counts from the same moment on. Errors as FrameStore.seal.
        """
        if left is not None:
            self.residuals.put(*left)

        def build_beside(summary: FileSummary) -> Manifest:
            manifest = build(summary)
            if own is not None:
                self.own.keep(own, manifest.transfer_id)
            return manifest

        manifest = self.store.seal(frames, build_beside).manifest
        self.residuals.sealed(manifest.transfer_id)
        self.own.prune()
        return manifest

    def read_frame(self, update_id: str, index: int) -> tuple[Manifest, bytes] | None:
        """Return an update's manifest and one of its frames, or None when it is settled, in whatever thread."""
        with self._lock:
            stored = self.store.get(update_id)
            return None if stored is None else (stored.manifest, stored.read_frame(index))

    def settle(self, receipt: Receipt) -> str | None:
        """Keep a receipt, then delete the update's bytes; return the digest of the state that it was trained on.

        None when it is about no update of ours, or says nothing new.
        """
        refused = receipt.outcome in {"rejected", "dropped"}
        # A residual that is being made of the one to be dropped is finished first, and dropped as well.
        with self.residuals.turn if refused else nullcontext(), self._lock:
            return self._settle(receipt, refused=refused)

    def _settle(self, receipt: Receipt, *, refused: bool) -> str | None:
        path = self._receipts / f"{receipt.update_id}.json"
        said = receipt.model_dump(mode="json")
        stored = self.store.get(receipt.update_id)
        if stored is not None:
            facts = stored.manifest.update
            origin: dict[str, Any] = {"base_version": facts.base_version, "base_digest": facts.base_digest}
            if CHARGES in facts.metrics:
                origin[CHARGES] = row_named(facts.metrics)
        elif path.exists():
            earlier = read_receipt(path)
            origin = {key: earlier[key] for key in ("base_version", "base_digest", CHARGES) if key in earlier}
            if earlier == {**origin, **said}:
                return None
        else:
            return None
        if refused:
            # Before the receipt: a crash in between owes too little, and nothing twice.
            self.residuals.drop()
        passing("settle.before")
        durable.replace_atomic(path, json.dumps({**origin, **said}, sort_keys=True).encode() + b"\n")
        passing("settle.middle")
        self.store.delete(receipt.update_id)
        passing("settle.after")
        return str(origin["base_digest"])


def is_sealed(storage: Path, update_id: str) -> bool:
    """True when an update of that id waits in a site's folder, or has its receipt there."""
    waits = storage / "outbox" / f"{update_id}.manifest"
    return waits.exists() or (storage / _RECEIPTS / f"{update_id}.json").exists()


def newest_own(storage: Path) -> Path | None:
    """The file of what stays at a site, as of its newest update; for readers, while the site may run."""
    return newest(storage / OWN, partial(is_sealed, storage))


def receipt_paths(storage: Path) -> list[Path]:
    """The receipts in a site's folder, by update id."""
    return sorted((storage / _RECEIPTS).glob(_NAMES))


def named_charges(waiting: Iterable[Manifest], answered: Iterable[Mapping[str, Any]]) -> int:
    """Return the highest row of the privacy ledger that waiting updates and receipts name; 0 when none does."""
    told = chain((manifest.update.metrics for manifest in waiting), answered)
    return max(map(row_named, told), default=0)


def read_receipt(path: Path) -> dict[str, Any]:
    """Return a receipt's fields and the state that its update was trained on; CorruptError when it is none."""
    try:
        loaded: Any = json.loads(path.read_bytes())
    except ValueError:
        loaded = None
    match loaded:
        case {"base_version": int(), "base_digest": str(), "outcome": str()}:
            return dict(loaded)
    raise CorruptError(f"{path} is not what was written", hint="move it away; a copy is with the coordinator")
