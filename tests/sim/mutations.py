"""Deliberate bugs in the real code, each of which the worlds must find within a stated number of seeds from 0.

A checker that finds nothing is worth nothing: this list is what shows that they look.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import coordinator.core
import coordinator.merging
import coordinator.publishing
import edge_client.residual
import edge_client.session
import edge_client.states
import shared.states
import shared.trust.replay
import tests.sim.coordinator
from coordinator.core import Core
from coordinator.journal import Journal
from coordinator.ledger import Known, Ledger
from coordinator.records import Record, Rejected, VersionCommitted
from coordinator.rounds import RoundView
from coordinator.uploads import Upload, Uploads
from edge_client.outbox import Outbox
from edge_client.patience import Patience
from edge_client.pulling import Pulling
from edge_client.residual import Residuals
from edge_client.states import States
from shared import durable, store
from shared.errors import CorruptError
from shared.manifest import Manifest, manifest_from_bytes
from shared.messages import Receipt
from shared.store import FrameStore, Partial
from shared.transfer import Bitmap, Sender
from shared.trust.envelope import SealedEnvelope
from tests.sim.weather import SEALED, STEPPED

Change = tuple[object, str, object]


@dataclass(frozen=True, slots=True)
class Mutation:
    """A bug: what it is, how to make it, and how many seeds may pass before it is found."""

    name: str
    within: int
    changes: tuple[Change, ...]
    first: int = 0
    """The first seed that is looked at."""

    @property
    def seeds(self) -> range:
        """The worlds among which one must notice it."""
        return range(self.first, self.first + self.within)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The code has this bug inside the block."""
        before = [(owner, name, vars(owner)[name]) for owner, name, _ in self.changes]
        for owner, name, changed in self.changes:
            setattr(owner, name, changed)
        try:
            yield
        finally:
            for owner, name, was in before:
                setattr(owner, name, was)


def _changed(owner: object, name: str, change: Callable[[Any], Any]) -> Change:
    """A function made of the one that is there."""
    return owner, name, change(vars(owner)[name])


# -- disk ---


def _ack_without_sync(self: Partial) -> bytes:
    return self.have.to_bytes()


def _unchecked_write(self: Partial, index: int, frame: bytes | memoryview) -> bool:
    if index not in self.have and len(frame) == self.manifest.frame_lengths[index]:
        durable.write_all(self._fd, frame, self._offsets[index])
        self._unsynced = True
    return self.have.add(index)


def _all_frames(_fd: int, manifest: Manifest) -> Iterator[int]:
    return iter(range(manifest.frames))


def _nothing(*_args: Any) -> Any:
    return []


# -- journal and ledger ---


def _append_later(real: Callable[[Journal, Sequence[Record]], Any]) -> Callable[[Journal, Sequence[Record]], Any]:
    def append(self: Journal, facts: Sequence[Record]) -> Any:
        if not self.length:  # without its first record no run begins at all
            return real(self, facts)
        owed = self.__dict__.setdefault("owed", [])
        rows = real(self, owed) if owed else ()
        self.__dict__["owed"] = list(facts)
        return rows

    return append


class _Forgetful(dict[str, Known]):
    """Knows everything and admits nothing."""

    def __contains__(self, _key: object) -> bool:
        return False

    def get(self, _key: str, _default: Any = None) -> Any:
        return None


def _without_dedupe(real: Callable[[Ledger], None]) -> Callable[[Ledger], None]:
    def init(self: Ledger) -> None:
        real(self)
        self.known = _Forgetful()

    return init


def _counts_again(self: Ledger, record: VersionCommitted) -> None:
    self.version = record.version
    self.publish(record.version, manifest_from_bytes(record.state))
    for part in record.contributions:
        self.known[part.update_id].outcome = "merged"


def _apply_but_rejections(real: Callable[[Core, Record], None]) -> Callable[[Core, Record], None]:
    def apply(self: Core, record: Record) -> None:
        if not isinstance(record, Rejected):
            real(self, record)

    return apply


# -- rules of merging ---


def _unmeasured(self: Core, event: Any, now: Any, out: Any) -> None:
    self._admitted(event.update_id, event.norm, None, now, out)


def _silent(real: Callable[..., Iterator[Record]]) -> Callable[..., Iterator[Record]]:
    def committed(*args: Any) -> Iterator[Record]:
        return (record for record in real(*args) if isinstance(record, VersionCommitted))

    return committed


def _first_merged(known: Mapping[str, Known]) -> dict[str, str]:
    found: dict[str, str] = {}
    for update_id, life in known.items():
        if life.outcome == "merged":
            found.setdefault(life.site, update_id)
    return found


# -- credits and windows ---


def _leaky_close(real: Callable[..., None]) -> Callable[..., None]:
    def close(self: Uploads, upload: Upload, now: float, out: Any) -> None:
        self.budget_bytes -= upload.reserved
        real(self, upload, now, out)

    return close


def _generous(self: Uploads, upload: Upload) -> None:
    self.reserved -= upload.reserved
    upload.reserved = min(self.window, upload.manifest.frames) * upload.manifest.slice_size
    self.reserved += upload.reserved


def _take_all(self: Sender) -> list[int]:
    return [index for index in self.have.missing() if self.state.name == "SENDING"]


def _shifted(size: int, data: bytes) -> Bitmap:
    return Bitmap(size, (i for i in range(min(size, 8 * len(data))) if data[i >> 3] >> (i & 7) & 1 and i < size - 1))


# -- the site ---


def _settle_backwards(self: Outbox, receipt: Receipt) -> str | None:
    stored = self.store.get(receipt.update_id)
    if stored is None:
        return None
    facts = stored.manifest.update
    origin = {"base_version": facts.base_version, "base_digest": facts.base_digest}
    self.store.delete(receipt.update_id)
    said = json.dumps({**origin, **receipt.model_dump(mode="json")}).encode()
    durable.replace_atomic(self._receipts / f"{receipt.update_id}.json", said)
    return facts.base_digest


def _residual_last(self: Outbox, frames: Any, build: Any, left: Any = None) -> Manifest:
    manifest = self.store.seal(frames, build).manifest
    if left is not None:
        self.residuals.put(*left)
    self.residuals.sealed(manifest.transfer_id)
    return manifest


def _counts_unsealed(real: Callable[..., str | None]) -> Callable[..., str | None]:
    return lambda store, _sealed: real(store, store.ids())


def _oldest_counts(store: FrameStore, sealed: Collection[str]) -> str | None:
    known = [update_id for update_id in store.ids() if update_id in sealed]
    return min(known, key=lambda update_id: edge_client.residual._number(store, update_id), default=None)


def _never(*_args: Any) -> bool:
    return False


def _always(*_args: Any) -> bool:
    return True


def _all_pending(view: RoundView, _section: object) -> int:
    return len(view.pending)


# -- steps ---


def _last_twice(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda states, parts: real(states, [*parts, parts[-1]])


def _without_the_last(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda states, parts: real(states, parts[:-1] or parts)


def _a_little_off(real: Callable[..., Any]) -> Callable[..., Any]:
    def seal(states: Any, imprint: Any, read: Any, *rest: Any, expected: str | None = None, **options: Any) -> Any:
        factor = 1.0 if expected is None else 1.0001
        return real(states, imprint, lambda name: read(name) * factor, *rest, **options)

    return seal


# -- trust ---


def _strict_load(real: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def load(path: Any, kind: Any) -> Any:
        found = real(path, kind)
        if found is None and path.exists():
            raise CorruptError("counters", hint="delete them")
        return found

    return load


MUTATIONS = (
    Mutation("chunks are acknowledged before they are synced", 60, ((Partial, "sync", _ack_without_sync),)),
    Mutation("a chunk's digest is not checked", 60, ((Partial, "write", _unchecked_write),)),
    Mutation("what lies in a spool is believed without its digest", 60, ((store, "_intact_frames", _all_frames),)),
    Mutation("names are not synced", 60, ((durable, "fsync_dir", _nothing),)),
    Mutation("the receipt goes out before the commit", 60, (_changed(Journal, "append", _append_later),)),
    Mutation("a known update is taken as new", 60, (_changed(Ledger, "__init__", _without_dedupe),)),
    Mutation("an update counts in two versions", 60, ((Ledger, "_apply_version", _counts_again),)),
    Mutation("rejections are forgotten in a crash", 60, (_changed(Core, "apply", _apply_but_rejections),)),
    Mutation(
        "bytes of a rejected update stay after a crash", 400, ((tests.sim.coordinator, "discard_rejected", _nothing),)
    ),
    Mutation(
        "states that nobody published stay",
        60,
        ((tests.sim.coordinator, "discard_uncommitted", _nothing),),
        first=2200,  # one world in two thousand dies twice between a merge and its row: 2226 does
    ),
    Mutation("an update is accepted before its loss is known", 60, ((Core, "_verified", _unmeasured),)),
    Mutation("what stands in for Krum is not said", 60, (_changed(coordinator.core, "committed", _silent),)),
    Mutation("CA2FL remembers the first update of a site", 200, ((coordinator.merging, "last_merged", _first_merged),)),
    Mutation("credits of a closed upload are not returned", 60, (_changed(Uploads, "_close", _leaky_close),)),
    Mutation("the budget is not looked at", 60, ((Uploads, "_reserve", _generous),)),
    Mutation("the window does not bound", 60, ((Sender, "take", _take_all),)),
    Mutation("the bitmap ends one too early", 60, ((Bitmap, "from_bytes", staticmethod(_shifted)),)),
    Mutation("the outbox lets go before it has the receipt", 200, ((Outbox, "_settle", _settle_backwards),)),
    Mutation("sealed updates are not looked for at the start", 60, ((Outbox, "pending", _nothing),)),
    Mutation("an update is sealed before its residual", 200, ((Outbox, "seal", _residual_last),)),
    Mutation(
        "a residual counts before its update is sealed",
        200,
        (_changed(edge_client.residual, "counting", _counts_unsealed),),
    ),
    Mutation(
        "an earlier residual counts again",
        60,
        ((edge_client.residual, "counting", _oldest_counts),),
        first=860,  # one world in hundreds dies between an update and the end of the residual before: 890 does
    ),
    Mutation("a refused update leaves its residual", 60, ((Residuals, "drop", _nothing),)),
    Mutation("nobody asks again", 60, ((Patience, "spent", _never),)),
    Mutation("an idle site does not say hello", 1000, ((edge_client.session, "IDLE_HELLO_S", 1e9),)),
    Mutation("a rejected site never trains again", 200, ((edge_client.session, "RETRAIN_S", 1e9),)),
    Mutation("a postponed update is not offered again", 200, ((Uploads, "postpone", _nothing),)),
    Mutation("a round closes with whatever is there", 60, ((coordinator.core, "updates_to_merge", _all_pending),)),
    Mutation("old masters are kept", 60, ((tests.sim.coordinator, "prune_masters", _nothing),)),
    Mutation("old states are kept at a site", 60, ((States, "forget_all_but", _nothing),)),
    Mutation(
        "a site adds a step twice",
        60,
        (_changed(edge_client.states, "open_state", _last_twice), (shared.states, "_check_digest", _nothing)),
        first=STEPPED,
    ),
    Mutation(
        "a step starts from another state than was published",
        60,
        (_changed(coordinator.publishing, "open_state", _without_the_last),),
        first=STEPPED,
    ),
    Mutation(
        "a whole state is another one than the steps to it make",
        60,
        (_changed(coordinator.publishing, "seal_state", _a_little_off),),
        first=STEPPED,
    ),
    Mutation("steps that make no state are waited for", 200, ((Pulling, "_unmade", _nothing),), first=STEPPED),
    Mutation(
        "what steps are added to is not kept", 60, ((Pulling, "in_use", property(lambda _self: set())),), first=STEPPED
    ),
    Mutation(
        "a retained announcement is trusted without its signature",
        60,
        ((SealedEnvelope, "signed_by", _always),),
        first=SEALED,
    ),
    Mutation(
        "counters that a power loss tore stop the process",
        60,
        (_changed(shared.trust.replay, "_load", _strict_load),),
        first=SEALED,
    ),
)
