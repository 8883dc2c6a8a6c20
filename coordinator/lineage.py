"""The versions of a run as an auditor reads them: which states were published, how, and whether they follow.

A part of `coordinator.trail`, and as distrustful: what cannot be right is yielded as a rule and what is wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from coordinator.ledger import Files, Ledger, Published
from coordinator.optimizers import SLOTS
from coordinator.records import Anchored
from shared.config import FederationConfig
from shared.errors import RefusedError
from shared.manifest import Manifest, StateFacts, StepFacts, manifest_from_bytes
from shared.plan import SealedPlan

Broken = tuple[str, str]
"""Rule and what is wrong; the row is known to the caller."""


@dataclass(frozen=True, slots=True)
class RecordedTransfer:
    """What the journal says of a state, or of a step to one, as it was sealed."""

    transfer_id: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class RecordedVersion:
    """What the journal says of a version's files; digests in hex."""

    row: int
    state_digest: str
    """Of the published state's plain file."""
    whole: RecordedTransfer | None
    """That state; None where it can be had by a step alone."""
    step: RecordedTransfer | None
    """The step to it from the version before."""
    master_digest: str
    optimizer_digest: str | None

    @property
    def transfers(self) -> list[RecordedTransfer]:
        """All that was published of it."""
        return [each for each in (self.whole, self.step) if each is not None]


class Lineage:
    """The versions so far, as far as they could be followed."""

    def __init__(self, federation: FederationConfig, plan: SealedPlan) -> None:
        self.federation = federation
        self.plan = plan
        self.versions: dict[int, RecordedVersion] = {}

    def begin(self, seq: int, ledger: Ledger) -> None:
        """Start from the snapshot of row `seq`, because the rows before it are not here."""
        for version, published in ledger.published.items():
            self.versions[version] = summed_up(seq, published, ledger.files[version])

    def differs(self, ledger: Ledger) -> bool:
        """Whether a snapshot says otherwise than the rows before it."""
        ours = {version: dataclasses.replace(recorded, row=0) for version, recorded in self.versions.items()}
        theirs = {
            version: summed_up(0, published, ledger.files[version]) for version, published in ledger.published.items()
        }
        return ours != theirs

    def parts(self, version: int) -> tuple[str, ...]:
        """The ids of what makes up the state of a version, as `Ledger.parts`; none where some are unknown."""
        return tuple(part.transfer_id for part in self.made_of(version))

    def made_of(self, version: int) -> tuple[RecordedTransfer, ...]:
        """What makes up the state of a version: one that is whole, and the steps behind it, in order; as `parts`."""
        steps: list[RecordedTransfer] = []
        for at in range(version, -1, -1):
            recorded = self.versions.get(at)
            if recorded is None:
                break
            if recorded.whole is not None:
                return (recorded.whole, *reversed(steps))
            steps += recorded.transfers
        return ()

    def publish(
        self, seq: int, version: int, state: bytes, master: str, optimizer: str | None = None
    ) -> Iterator[Broken]:
        """A row says that a version exists: its manifest, and the digests of its float32 files."""
        try:
            manifest = manifest_from_bytes(state)
        except RefusedError as error:
            yield "state-manifest", error.message
            return
        yield from self._wrong_fields(manifest, version, stepped=version > 0 and self.federation.codec.steps > 0)
        slots = version > 0 and self.federation.aggregation.mode != "fedasync"
        if (optimizer is not None) != (slots and bool(SLOTS[self.federation.aggregation.server.optimizer])):
            yield "slots-digest", "it has the digest of slots and needs none, or needs one and has none"
        self.versions[version] = RecordedVersion(
            row=seq,
            state_digest=manifest.leads_to,
            whole=None if isinstance(manifest.facts, StepFacts) else _recorded(state),
            step=_recorded(state) if isinstance(manifest.facts, StepFacts) else None,
            master_digest=master,
            optimizer_digest=optimizer,
        )

    def anchor(self, record: Anchored, newest: int) -> Iterator[Broken]:
        """A row says that a version can be had whole; `newest` is the newest one."""
        recorded = self.versions.get(record.version)
        if recorded is None or recorded.whole is not None or record.version != newest:
            yield "anchor-place", f"version {record.version} is not the newest, or can be had whole already"
            return
        if not self._anchors(record.version):
            yield "anchor-place", f"by codec.steps version {record.version} is not one that can be had whole"
        try:
            manifest = manifest_from_bytes(record.state)
        except RefusedError as error:
            yield "state-manifest", error.message
            return
        yield from self._wrong_fields(manifest, record.version, stepped=False)
        if manifest.file_digest != recorded.state_digest:
            yield "anchor-differs", f"it is another state than the step to version {record.version} makes"
        self.versions[record.version] = dataclasses.replace(recorded, whole=_recorded(record.state))

    def anchor_due(self, version: int) -> Iterator[Broken]:
        """The version is about to be followed by another: by now it must be here whole, if it is its turn."""
        recorded = self.versions.get(version)
        if recorded is not None and recorded.whole is None and self._anchors(version):
            yield "anchor-gone", f"no row before this one says that version {version} can be had whole"

    def _anchors(self, version: int) -> bool:
        steps = self.federation.codec.steps
        return steps > 0 and version % steps == 0

    def _wrong_fields(self, manifest: Manifest, version: int, *, stepped: bool) -> Iterator[Broken]:
        codec = self.federation.codec
        facts = manifest.facts
        wanted = {
            "transfer_id": manifest.file_digest[:32],
            "federation": self.federation.federation.name,
            "fingerprint": self.plan.fingerprint,
            "codec": codec.down if stepped else codec.whole,
            "slice_size": codec.slice_kib * 1024,
            "facts": StateFacts(version=version),
        }
        if stepped and isinstance(facts, StepFacts):
            before = self.versions.get(version - 1)
            base = before.state_digest if before else None
            wanted["facts"] = facts if (facts.version, facts.base_digest) == (version, base) else None
        wrong = [name for name, value in wanted.items() if getattr(manifest, name) != value]
        if wrong:
            yield "state-manifest", f"the state's manifest has another {', '.join(wrong)} than version {version} must"


def _recorded(manifest: bytes) -> RecordedTransfer:
    return RecordedTransfer(manifest_from_bytes(manifest).transfer_id, hashlib.sha256(manifest).hexdigest())


def summed_up(row: int, published: Published, files: Files) -> RecordedVersion:
    """What a ledger tells of a version, as if row `row` had said all of it."""
    whole, step = (None if each is None else _recorded(each.to_bytes()) for each in (published.whole, published.step))
    return RecordedVersion(row, published.digest, whole, step, files.master, files.optimizer)
