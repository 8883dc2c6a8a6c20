"""Records: the facts that the journal stores, one frozen dataclass each, and their bytes.

The body of a journal row is a msgpack map: `v` (schema version), `t` (kind), then the fields in the order in which the
dataclass lists them, so that equal records give equal bytes. Reading is strict: an unknown, missing or mistyped field
is an error, because we wrote these bytes ourselves. A record never changes its meaning; a new meaning is a new kind.

`at` is unix seconds by the coordinator's clock: for people, never for decisions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, get_args

import msgpack
from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError

from shared.errors import CorruptError, RefusedError
from shared.ids import DigestHex, Ident, Sha256Hex, TransferId
from shared.manifest import Manifest, describe_invalid, manifest_from_bytes
from shared.trust.witness import bare_sha256

SCHEMA_VERSION = 2

Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Positive = Annotated[int, Field(ge=1, lt=2**63, strict=True)]
Real = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Rule = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,48}$", strict=True)]
Text = Annotated[str, Field(max_length=500, strict=True)]
RawBytes = Annotated[bytes, Strict()]
Signature = Annotated[bytes, Strict(), Field(min_length=64, max_length=64)]
ManifestBytes = Annotated[bytes, Strict()]
"""`Manifest.to_bytes()`, kept as it was sealed; `shared.manifest.manifest_from_bytes` opens it."""

_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Opened:
    """The run began: what all sites must agree on, and version 0."""

    kind: ClassVar[str] = "opened"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    fingerprint: Sha256Hex
    config_sha256: Sha256Hex
    frozen_sha256: Sha256Hex
    state: ManifestBytes
    master_digest: DigestHex


@dataclass(frozen=True, slots=True)
class Accepted:
    """An update is durable, verified, and will be merged or dropped, once."""

    kind: ClassVar[str] = "accepted"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    update_id: TransferId
    site: Ident
    base_version: Count
    examples: Count
    manifest_sha256: Sha256Hex
    file_digest: DigestHex
    norm: Real
    """Global L2 norm of the delta."""
    at: Real


@dataclass(frozen=True, slots=True)
class Validated:
    """The loss of an update that was just accepted, on the notes that the coordinator's operator holds."""

    kind: ClassVar[str] = "validated"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    update_id: TransferId
    loss: Finite
    """Of the state that the update starts from with its delta added: what the site had when it had trained."""
    at: Real


@dataclass(frozen=True, slots=True)
class Rejected:
    """An update will never be merged, because it broke the named rule."""

    kind: ClassVar[str] = "rejected"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    update_id: TransferId
    site: Ident
    manifest_sha256: Sha256Hex
    rule: Rule
    detail: Text
    at: Real


@dataclass(frozen=True, slots=True)
class Dropped:
    """An accepted update will not be merged after all: the run ended, or the named rule took it out of its round."""

    kind: ClassVar[str] = "dropped"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    update_id: TransferId
    rule: Rule
    at: Real


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An accepted update is kept apart, under the named rule, until a person releases or drops it."""

    kind: ClassVar[str] = "quarantined"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    update_id: TransferId
    rule: Rule
    detail: Text
    at: Real


@dataclass(frozen=True, slots=True)
class Released:
    """A person has let an update out of quarantine: it waits to be merged, behind all that wait."""

    kind: ClassVar[str] = "released"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    update_id: TransferId
    at: Real


@dataclass(frozen=True, slots=True)
class Contribution:
    """The part that one update had in a version."""

    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    update_id: TransferId
    site: Ident
    base_version: Count
    staleness: Count
    weight: Real
    """Coefficient of the update's delta before the server optimizer, for a tensor that every update holds."""


@dataclass(frozen=True, slots=True)
class VersionCommitted:
    """A version and its master are durable; from here on it is what sites start from."""

    kind: ClassVar[str] = "committed"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    version: Count
    contributions: tuple[Contribution, ...]
    """In the order of addition: `coordinator.merging.in_order`, in earlier runs the order of acceptance."""
    state: ManifestBytes
    """How it is published: the state whole, or the step from the version before."""
    master_digest: DigestHex
    optimizer_digest: DigestHex | None
    """Digest of the server optimizer's slots; None where it has none."""
    at: Real


@dataclass(frozen=True, slots=True)
class Substituted:
    """The version of the next row has fewer updates than the agreed rule can judge, and is merged by another."""

    kind: ClassVar[str] = "substituted"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    version: Count
    rule: Rule
    """What stood in."""
    updates: Count
    needed: Count
    """Updates that the agreed rule needs."""
    at: Real


@dataclass(frozen=True, slots=True)
class Anchored:
    """The state of a version that is published as a step can be had whole, too; steps lead on from it."""

    kind: ClassVar[str] = "anchored"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    version: Count
    state: ManifestBytes
    at: Real


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is complete; `version` is the last one."""

    kind: ClassVar[str] = "finished"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    version: Count
    at: Real


@dataclass(frozen=True, slots=True)
class Signed:
    """The coordinator has signed the head of the chain; the sites get its word, and cannot be told otherwise later."""

    kind: ClassVar[str] = "signed"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    version: Count
    """The newest version then."""
    seq: Positive
    """An earlier row, and its hash."""
    head: Sha256Hex
    signature: Signature
    """Of what, says `shared.trust.witness`."""
    member: RawBytes
    """The membership whose key it is, as the federation's authority signed it."""
    at: Real


@dataclass(frozen=True, slots=True)
class Witnessed:
    """A site has signed an update of its own, and with it the last head that it had seen."""

    kind: ClassVar[str] = "witnessed"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    update_id: TransferId
    site: Ident
    bare_sha256: Sha256Hex
    """Of the update's manifest without the signature."""
    seq: Count
    """An earlier row, and the hash that it had for the site; 0 and zeros when it had seen none."""
    head: Sha256Hex
    signature: Signature
    member: RawBytes
    """As in `Signed`."""
    at: Real


@dataclass(frozen=True, slots=True)
class Pruned:
    """A person has given up the bytes of updates that were merged up to this version; their digests stay.

    Which, says `coordinator.merging.given_up`. The version's master and slots are kept from now on as version 0 is:
    whoever recomputes the run begins there.
    """

    kind: ClassVar[str] = "pruned"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    version: Positive
    at: Real


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The rows before this one are summed up in a snapshot, and were moved out of the journal into a segment."""

    kind: ClassVar[str] = "snapshot"
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    version: Count
    """The newest version then."""
    updates: Count
    """Updates decided by then."""
    sha256: Sha256Hex
    """Of the snapshot's bytes."""
    at: Real


Record = (
    Opened
    | Accepted
    | Validated
    | Rejected
    | Quarantined
    | Released
    | Dropped
    | Substituted
    | VersionCommitted
    | Anchored
    | Finished
    | Signed
    | Witnessed
    | Pruned
    | Snapshot
)

_KINDS: dict[str, TypeAdapter[Record]] = {each.kind: TypeAdapter(each) for each in get_args(Record)}


def to_wire(record: Record) -> dict[str, Any]:
    """Return plain msgpack-able values, schema version and kind first, then the fields in order."""
    return {"v": SCHEMA_VERSION, "t": record.kind, **dataclasses.asdict(record)}


def from_wire(wire: object) -> Record:
    """Inverse of to_wire.

    Raises CorruptError that names the field when the map is not a record, and RefusedError(rule='newer-schema') when
    a newer release wrote it.
    """
    if not isinstance(wire, dict):
        raise CorruptError("a journal record is not a map", hint="restore the journal from a backup")
    fields = dict(wire)
    version, kind = fields.pop("v", None), fields.pop("t", None)
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RefusedError(
            f"a journal record of schema version {version}, this release knows {SCHEMA_VERSION}",
            rule="newer-schema",
            hint="run the release that wrote the journal, or a later one",
        )
    if version != SCHEMA_VERSION or not isinstance(kind, str) or kind not in _KINDS:
        raise CorruptError("a journal record of unknown kind", hint="restore the journal from a backup")
    try:
        return _KINDS[kind].validate_python(fields)
    except ValidationError as error:
        raise CorruptError(describe_invalid(f"journal record {kind}", error), hint="restore it from a backup") from None


def to_bytes(record: Record) -> bytes:
    """Canonical msgpack bytes; asserts that reading them back gives the same record."""
    body: bytes = msgpack.packb(to_wire(record), use_bin_type=True)
    assert from_bytes(body) == record, f"{record.kind} does not survive its own encoding"
    return body


def from_bytes(body: bytes) -> Record:
    """Inverse of to_bytes; raises as from_wire does, and CorruptError for what is not msgpack."""
    try:
        wire = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException):
        raise CorruptError("a journal record is not msgpack", hint="restore the journal from a backup") from None
    return from_wire(wire)


def accepted_record(manifest: Manifest, norm: float, at: float) -> Accepted:
    """Return the acceptance of the update that this manifest describes."""
    facts = manifest.update
    return Accepted(
        update_id=manifest.transfer_id,
        site=facts.site,
        base_version=facts.base_version,
        examples=facts.examples,
        manifest_sha256=manifest.digest,
        file_digest=manifest.file_digest,
        norm=norm,
        at=at,
    )


def acceptance(
    manifest: Manifest, norm: float, at: float, *, member: bytes | None = None, loss: float | None = None
) -> Iterator[Record]:
    """Yield what is written down of the update that this manifest describes when it is accepted.

    `member` is the signed membership of its site, for which the manifest must be signed, and `loss` what was measured.
    """
    update_id = manifest.transfer_id
    yield accepted_record(manifest, norm, at)
    if member is not None:
        seen = manifest.witness
        assert seen is not None, "an update with a membership is signed"
        bare = bare_sha256(manifest)
        yield Witnessed(update_id, manifest.update.site, bare, seen.seq, seen.head, seen.signature, member, at)
    if loss is not None:
        yield Validated(update_id, loss, at)


def recorded_at(record: Record) -> float:
    """Unix seconds of a record, for people; of Opened, when its state was sealed."""
    return manifest_from_bytes(record.state).created if isinstance(record, Opened) else record.at


def told(record: Record) -> dict[str, Any]:
    """What the log says of a record."""
    fields = ("update_id", "site", "base_version", "version", "examples", "loss", "rule", "needed", "detail")
    return {name: getattr(record, name) for name in fields if hasattr(record, name)}
