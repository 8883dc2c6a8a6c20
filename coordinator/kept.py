"""What a run keeps on disk, compared with what its journal says of it: updates, published states, float32 files.

Nothing is written. Each function returns all that it finds wrong, named down to the frame; paths are given below the
storage folder. Memory: one manifest and what `coordinator.admission` takes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from coordinator import admission
from coordinator.lineage import RecordedTransfer, RecordedVersion
from coordinator.masters import master_path, slot_path, slots_digest
from coordinator.offers import check_offer
from coordinator.records import Accepted
from coordinator.trail import Finding
from shared.config import FederationConfig
from shared.digest import file_digest
from shared.errors import CorruptError, RefusedError
from shared.manifest import Manifest, manifest_from_bytes
from shared.plan import SealedPlan
from shared.store import Stored, frame_offsets

NORM_TOLERANCE = 1e-9
"""A sum of squares is formed in another order on another machine; float64 keeps 15 digits of it."""


def check_update(
    storage: Path,
    accepted: Accepted,
    base_digest: str | None,
    plan: SealedPlan,
    federation: FederationConfig,
    check_manifest: Callable[[Manifest, str], Iterator[Finding]] = lambda _manifest, _place: iter(()),
    *,
    given_up: bool = False,
) -> list[Finding]:
    """Compare a kept update with the record of its acceptance, and let it pass admission once more.

    `check_manifest` says what else is wrong with its manifest, given its place.
    `base_digest` is the digest of the published state that it starts from, None when there is none. The frames of one
    that was given up may be gone.
    """
    found: list[Finding] = []
    place = f"updates/{accepted.update_id}"
    stored = _open(storage, place, accepted.manifest_sha256, found)
    if stored is None:
        return found
    try:
        check_offer(stored.manifest, site=accepted.site, plan=plan, federation=federation)
        facts = stored.manifest.update
    except RefusedError as error:
        return [Finding(error.rule, f"{place}.manifest", error.message)]
    said = (stored.manifest.transfer_id, facts.base_version, facts.examples, stored.manifest.file_digest)
    recorded = (accepted.update_id, accepted.base_version, accepted.examples, accepted.file_digest)
    for name, ours, theirs in zip(("id", "base version", "examples", "file digest"), recorded, said, strict=True):
        if ours != theirs:
            found.append(Finding("update-facts", f"{place}.manifest", f"{name} {theirs}, the journal says {ours}"))
    if base_digest != facts.base_digest:
        found.append(Finding("base-unknown", f"{place}.manifest", "it starts from a state that was never published"))
    found += check_manifest(stored.manifest, place)
    if given_up and not stored.path.exists():
        return found
    damaged = [*_frames(stored, place)]
    return [*found, *(damaged or _content(stored, place, accepted, plan))]


def check_frames(storage: Path, update_id: str, manifest_sha256: str, *, given_up: bool = False) -> list[Finding]:
    """Compare a kept update with the digest of its manifest, which is all that a snapshot tells of it."""
    found: list[Finding] = []
    place = f"updates/{update_id}"
    stored = _open(storage, place, manifest_sha256, found)
    if stored is None or (given_up and not stored.path.exists()):
        return found
    return [*_frames(stored, place)]


def check_state(storage: Path, version: int, recorded: RecordedTransfer, plan: SealedPlan) -> list[Finding]:
    """Compare a kept published state, or step to one, with the manifest and digests that the journal recorded."""
    found: list[Finding] = []
    place = f"states/{recorded.transfer_id}"
    stored = _open(storage, place, recorded.manifest_sha256, found)
    if stored is None:
        return found
    damaged = [*_frames(stored, place)]
    if damaged:
        return damaged
    try:
        with stored.open_tensors(verify=True) as reader:
            if reader.shapes != dict(sorted(plan.tensors.items())):
                found.append(Finding("state-content", place, f"version {version} holds other tensors than the plan"))
    except RefusedError as error:
        found.append(Finding("state-content", f"{place}.frames", error.message))
    return found


def check_master(
    storage: Path, version: int, recorded: RecordedVersion, slots: Sequence[str], *, required: bool
) -> list[Finding]:
    """Compare a version's float32 files with their digests; those of a version that is not `required` may be gone."""
    folder = storage / "masters"
    groups = [("master", [master_path(folder, version)], recorded.master_digest)]
    if recorded.optimizer_digest is not None:
        paths = [slot_path(folder, version, slot) for slot in slots]
        groups.append(("slots", paths, recorded.optimizer_digest))
    found = []
    for rule, paths, digest in groups:
        sound = _has(paths, digest, rule)
        # Looked at afterwards: a coordinator that runs may have given them up, and be writing over them.
        missing = [path for path in paths if not path.exists()]
        where = ", ".join(f"masters/{path.name}" for path in missing or paths)
        if missing and required:
            found.append(Finding(f"{rule}-gone", where, f"version {version} cannot be continued without it"))
        elif not (missing or sound):
            found.append(Finding(f"{rule}-digest", where, f"not the bytes that row {recorded.row} recorded"))
    return found


def _has(paths: Sequence[Path], digest: str, rule: str) -> bool:
    """Whether the files are there with the digest of a version's master, or of all its slots."""
    try:
        hashes = [file_digest(path) for path in paths]
    except FileNotFoundError:
        return False
    return (hashes[0] if rule == "master" else slots_digest(hashes)) == digest


def _open(storage: Path, place: str, manifest_sha256: str, found: list[Finding]) -> Stored | None:
    """Return a transfer whose manifest is the recorded one, byte for byte, else add to `found`."""
    path = storage / f"{place}.manifest"
    if not path.exists():
        found.append(Finding("transfer-gone", f"{place}.manifest", "the journal needs it"))
        return None
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != manifest_sha256:
        found.append(Finding("manifest-digest", f"{place}.manifest", "not the bytes whose digest the journal holds"))
        return None
    try:
        manifest: Manifest = manifest_from_bytes(raw)
    except RefusedError as error:
        found.append(Finding(error.rule, f"{place}.manifest", error.message))
        return None
    return Stored(manifest, storage / f"{place}.frames", frame_offsets(manifest))


def _frames(stored: Stored, place: str) -> Iterator[Finding]:
    if not stored.path.exists():
        yield Finding("frames-gone", f"{place}.frames", "the journal needs it")
        return
    size = stored.path.stat().st_size
    if size != stored.manifest.wire_bytes:
        yield Finding("frames-size", f"{place}.frames", f"{size} bytes, the manifest says {stored.manifest.wire_bytes}")
    for index in range(stored.manifest.frames):
        try:
            stored.read_frame(index)
        except CorruptError:
            yield Finding("frame-hash", f"{place}.frames: frame {index}", "its bytes are not those that arrived")


def _content(stored: Stored, place: str, accepted: Accepted, plan: SealedPlan) -> Iterator[Finding]:
    try:
        admitted = admission.verify(stored, plan)
    except RefusedError as error:
        yield Finding(error.rule, f"{place}.frames", error.message)
        return
    if not math.isclose(admitted.norm, accepted.norm, rel_tol=NORM_TOLERANCE):
        yield Finding("update-norm", f"{place}.frames", f"norm {admitted.norm!r}, the journal says {accepted.norm!r}")
