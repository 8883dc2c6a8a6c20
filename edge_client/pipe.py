"""What the site's agent and its training worker say to each other over the worker's standard input and output.

One frame is four bytes of length (big endian) and a msgpack map. The agent sends a request; the worker answers with any
number of Progress and Notice frames and then exactly one other. Tensors and notes never pass here, only their paths.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Annotated, Any, Literal

import msgpack
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from edge_client.privacy.ledger import Charge, Limit, Spent
from shared.config import Clipping, ComputeSection, FederationConfig, LocalLayersSection, PrefixSection
from shared.plan import SealedPlan

LENGTH = struct.Struct(">I")

MAX_FRAME = 16 << 20
"""The largest frame holds a sealed plan: some 100 bytes a tensor, so room for 100,000 of them."""


class _Frame(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Load(_Frame):
    """Load model and notes; must come first."""

    kind: Literal["load"] = "load"
    federation: FederationConfig
    source: str
    notes: Path
    skip_bad: bool
    holdout: float
    threads: int
    site: str
    limits: LocalLayersSection = LocalLayersSection()
    prefix: PrefixSection = PrefixSection()
    storage: Path | None = None
    """The site's folder, where the frozen prefix is kept; None keeps it in memory."""
    keep_free: int = 0
    """Bytes that stay free on the disk of `storage`."""
    depth: int | None = None
    """How many blocks to train, where that was decided before; else `limits` decide."""
    initial: Path | None = None
    """Where to write the tensors that are trained as the model's folder has them: version 0 of a federation."""
    trains: bool = True
    """False where losses are measured and no more: nobody's privacy is spent, whatever the federation says."""
    clipping: Clipping = "record"
    compute: ComputeSection = ComputeSection()


class Train(_Frame):
    """Train from the state in a file, and write the delta to another."""

    kind: Literal["train"] = "train"
    state: Path
    base_version: int
    out: Path
    own: Path | None = None
    """What stayed here after the update before."""
    so_far: tuple[Charge, ...] = ()
    """What trainings have cost this site's records; of a private federation, as are the limits."""
    limits: tuple[Limit, ...] = ()


class Evaluate(_Frame):
    """Score a state on notes: those at `notes`, or the held-out ones of this site when None."""

    kind: Literal["evaluate"] = "evaluate"
    state: Path
    notes: Path | None
    own: Path | None = None
    """What stayed here after an update; None scores the tensors that everybody begins with."""


class Measure(_Frame):
    """Measure the loss of a state on the notes that were loaded to train on."""

    kind: Literal["measure"] = "measure"
    state: Path


class Export(_Frame):
    """Write the whole model with a state in it to a folder, in Hugging Face's layout."""

    kind: Literal["export"] = "export"
    state: Path
    out: Path


Request = Load | Train | Evaluate | Measure | Export


class Loaded(_Frame):
    """What this machine's model and notes amount to."""

    kind: Literal["loaded"] = "loaded"
    plan: SealedPlan
    depth: int
    """How many blocks are trained here at a time."""
    limit: str
    """The site's limit that allows no more; empty when none does."""
    examples: int
    """Examples that are trained on, as the task counts them; in a private federation records. The weight of this site's
    updates."""
    notes: int
    """Notes trained on."""
    held_out: int
    """Notes kept back for the local score."""
    skipped: int
    """Notes left out as unreadable."""
    uncached: str
    """Why each epoch runs the frozen blocks again; empty when their output is kept."""


class Progress(_Frame):
    """How far an update is, 0 to 1, and the loss of the latest step."""

    kind: Literal["progress"] = "progress"
    share: float
    loss: float


class Notice(_Frame):
    """A line for the log."""

    kind: Literal["notice"] = "notice"
    level: str
    event: str
    fields: dict[str, str | int | float | bool | None]


class Trained(_Frame):
    """The delta is in its file."""

    kind: Literal["trained"] = "trained"
    examples: int
    metrics: dict[str, float]
    own: Path | None = None
    """Beside the delta: what stays here; None where nothing does."""
    spent: Spent | None = None
    """What it cost; None without privacy."""


class Evaluated(_Frame):
    """The task's measures by name, each 0 to 1; the first is the one that models are compared by."""

    kind: Literal["evaluated"] = "evaluated"
    overall: dict[str, float]
    labels: dict[str, dict[str, float]]


class Measured(_Frame):
    """The mean loss; None where it is infinite or no number."""

    kind: Literal["measured"] = "measured"
    loss: float | None


class Exported(_Frame):
    """The model is in its folder."""

    kind: Literal["exported"] = "exported"


class Failed(_Frame):
    """The request could not be carried out; `error` is a class of shared/errors.py, raised again at the other end."""

    kind: Literal["failed"] = "failed"
    error: str
    message: str
    hint: str
    rule: str


Answer = Loaded | Progress | Notice | Trained | Evaluated | Measured | Exported | Failed

_requests: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
_answers: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="kind")])


def pack(frame: Request | Answer) -> bytes:
    """Return a frame with its length in front."""
    body: bytes = msgpack.packb(frame.model_dump(mode="json"), use_bin_type=True)
    assert len(body) <= MAX_FRAME, "see MAX_FRAME"
    return LENGTH.pack(len(body)) + body


def unpack_request(body: bytes) -> Request:
    """Inverse of `pack` for a request, without the length."""
    return _requests.validate_python(_plain(body))


def unpack_answer(body: bytes) -> Answer:
    """Inverse of `pack` for an answer, without the length."""
    return _answers.validate_python(_plain(body))


def _plain(body: bytes) -> Any:
    return msgpack.unpackb(body, raw=False)
