"""The manifest of a transfer: everything a receiver must know before the first chunk, and can check afterwards.

A transfer is an update (site to coordinator), a state, or a step from one state to the next (coordinator to sites). Its
payload is one standard safetensors file cut into raw slices of `slice_size` bytes; each slice travels and rests as one
zstd frame. The manifest lists each frame's length and BLAKE3 and the whole file's, so that a frame is checked
before it is decompressed and the file after.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Annotated, Any, Literal, Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import RefusedError
from shared.ids import DigestHex, Ident, Sha256Hex, TransferId

MAX_FRAMES = 24_000
"""12 GB at the default slice of 512 KiB; keeps a manifest under 1,000,000 bytes, the smallest default packet limit
among brokers."""

MAX_FRAME_BYTES = 900_000
"""A frame and its header stay under that packet limit with room for the topic."""

DEFAULT_SLICE_BYTES = 512 * 1024
MIN_SLICE_BYTES = 4 * 1024
MAX_SLICE_BYTES = 768 * 1024
MAX_METRICS = 64
IMPORTANCE = "importance/"
"""How metrics begin that say how much a block matters to a site's notes; its number follows."""
BLOCKS = "blocks"
"""The metric that says how many blocks a site trains, where these are not all of the plan's."""

Metrics = dict[
    Annotated[str, Field(pattern=r"^[a-z0-9_/]{1,64}$")],
    Annotated[float, Field(allow_inf_nan=False)],
]
_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,100}")
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class WireModel(BaseModel):
    """Frozen, strict, closed: a value of such a type has passed every check of its fields."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class UpdateFacts(WireModel):
    """What an update says of itself."""

    site: Ident
    base_version: int = Field(ge=0)
    base_digest: DigestHex
    """Digest of the published state that the site started from: BLAKE3 of its plain file."""
    examples: int = Field(ge=1, le=1_000_000_000)
    metrics: Metrics
    """Numbers only: training loss, local F1, seconds."""

    @model_validator(mode="after")
    def _few_metrics(self) -> Self:
        if len(self.metrics) > MAX_METRICS:
            msg = f"more than {MAX_METRICS} metrics"
            raise ValueError(msg)
        return self


class StateFacts(WireModel):
    """What a published state says of itself."""

    version: int = Field(ge=0)


class StepFacts(WireModel):
    """What a step says of itself: added to the state before, it makes that of `version`."""

    version: int = Field(ge=1)
    base_digest: DigestHex
    """Digest of the state that it is added to, as `UpdateFacts.base_digest`."""
    state_digest: DigestHex
    """Digest of the state that it makes."""


class Witness(WireModel):
    """A site's signature over its update and the last head of the coordinator's chain that it had seen by then."""

    seq: int = Field(ge=0, lt=2**63)
    """Row of that head; 0 when the site had seen none."""
    head: Sha256Hex
    signature: Annotated[bytes, Field(min_length=64, max_length=64)]


class Manifest(WireModel):
    """One transfer, described before it is sent; see the module's docstring."""

    transfer_id: TransferId
    federation: Ident
    fingerprint: Sha256Hex
    codec: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")]
    group: Literal[1, 2, 4]
    """Byte-grouping width used inside each slice before zstd."""
    slice_size: int = Field(ge=MIN_SLICE_BYTES, le=MAX_SLICE_BYTES, multiple_of=8)
    file_size: int = Field(ge=1)
    file_digest: DigestHex
    frame_lengths: tuple[Annotated[int, Field(ge=1, le=MAX_FRAME_BYTES)], ...] = Field(
        min_length=1, max_length=MAX_FRAMES
    )
    frame_hashes: bytes
    """BLAKE3 of each frame, 32 bytes each, in order."""
    created: NonNegative
    """Unix seconds by the sender's clock; for people, never for decisions."""
    facts: UpdateFacts | StateFacts | StepFacts
    witness: Witness | None = None
    """In sealed federations, of updates; see `shared.trust.witness`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        frames = -(-self.file_size // self.slice_size)
        if len(self.frame_lengths) != frames:
            msg = f"{len(self.frame_lengths)} frames listed, but the file size and slice size give {frames}"
            raise ValueError(msg)
        if len(self.frame_hashes) != 32 * frames:
            msg = f"{len(self.frame_hashes)} bytes of frame hashes for {frames} frames"
            raise ValueError(msg)
        if self.witness is not None and not isinstance(self.facts, UpdateFacts):
            msg = "a state has no witness"
            raise ValueError(msg)
        return self

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.frame_lengths)

    @property
    def wire_bytes(self) -> int:
        """Payload bytes of all frames, without packet headers."""
        return sum(self.frame_lengths)

    def frame_hash(self, index: int) -> bytes:
        """BLAKE3 (32 bytes) of frame `index`."""
        return self.frame_hashes[32 * index : 32 * index + 32]

    def raw_size(self, index: int) -> int:
        """Uncompressed bytes of slice `index`; only the last one is short."""
        return min(self.slice_size, self.file_size - index * self.slice_size)

    @property
    def update(self) -> UpdateFacts:
        """The update's facts; asserts that this is an update."""
        assert isinstance(self.facts, UpdateFacts)
        return self.facts

    @property
    def state(self) -> StateFacts:
        """The state's facts; asserts that this is a state."""
        assert isinstance(self.facts, StateFacts)
        return self.facts

    @property
    def step(self) -> StepFacts:
        """The step's facts; asserts that this is a step."""
        assert isinstance(self.facts, StepFacts)
        return self.facts

    @property
    def version(self) -> int:
        """The version that a state is, or that a step makes; asserts that this is no update."""
        assert not isinstance(self.facts, UpdateFacts)
        return self.facts.version

    @property
    def leads_to(self) -> str:
        """Digest (hex) of the state that is here once this is: its own, or of the state that a step makes."""
        return self.facts.state_digest if isinstance(self.facts, StepFacts) else self.file_digest

    def to_wire(self) -> dict[str, Any]:
        """Return plain msgpack-able values, in field order (the encoding is canonical); no witness, no field of it."""
        fields = {**vars(self), "frame_lengths": list(self.frame_lengths), "facts": {**vars(self.facts)}}
        if self.witness is None:
            del fields["witness"]
        else:
            fields["witness"] = {**vars(self.witness)}
        return fields

    def to_bytes(self) -> bytes:
        """Canonical msgpack bytes; equal manifests give equal bytes."""
        packed: bytes = msgpack.packb(self.to_wire(), use_bin_type=True)
        return packed

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, in hex: the manifest's own identity in receipts and journal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parse_manifest(wire: object) -> Manifest:
    """Validate decoded msgpack into a Manifest; RefusedError(rule='bad-manifest') names the first wrong field."""
    if isinstance(wire, dict) and isinstance(wire.get("frame_lengths"), list):
        wire = {**wire, "frame_lengths": tuple(wire["frame_lengths"])}
    try:
        return Manifest.model_validate(wire)
    except ValidationError as error:
        raise RefusedError(describe_invalid("manifest", error), rule="bad-manifest") from None


@functools.lru_cache(maxsize=16)
def manifest_from_bytes(data: bytes) -> Manifest:
    """Inverse of Manifest.to_bytes for bytes at rest; RefusedError(rule='bad-manifest') when they do not parse.

    The newest ones are remembered: a transfer's manifest is looked at for each frame that is read from the disk, and
    one of 24,000 frames takes milliseconds to validate. A manifest is a value; whoever asks twice may get one object.
    """
    try:
        wire = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException):
        raise RefusedError("a manifest is not msgpack", rule="bad-manifest") from None
    return parse_manifest(wire)


def describe_invalid(what: str, error: ValidationError) -> str:
    """Name the first offending field and the reason; the offending value, which a peer chose, is left out.

    So is a key that a peer made up, unless it looks like a name: it may hold anything, of any length.
    """
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    parts = [str(part) for part in first["loc"]]
    where = ".".join(part if _NAME.fullmatch(part) else "?" for part in parts) or "whole"
    return f"{what}: field {where}: {first['msg']}"
