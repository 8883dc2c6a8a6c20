"""The first step of a run: version 0, from the tensors that sealing wrote."""

from __future__ import annotations

from pathlib import Path

from coordinator.announcing import check_announceable
from coordinator.masters import TensorFile, master_path, writing
from coordinator.publishing import publish
from coordinator.records import Opened
from shared import durable
from shared.codec import data_bytes
from shared.config import FederationConfig
from shared.errors import ConfigError, RefusedError
from shared.plan import SealedPlan
from shared.states import Imprint
from shared.store import FrameStore

HEADER_BYTES = 1 << 20
"""Most that a step's header takes, for the size of announcements: ten thousand tensors."""

_HINT = "seal the federation again: mailboat coordinator seal"


def open_run(
    folder: Path, federation: FederationConfig, plan: SealedPlan, initial: Path, *, created: float | None = None
) -> Opened:
    """Write master and published state of version 0 below `folder`, durably, and return the record that opens the run.

    `initial` is a plain float32 safetensors file with exactly the plan's tensors, else ConfigError names it and the
    tensor; ConfigError also when announcements would grow too long. `created` is unix seconds, by default now.
    The run is open once the record is in the journal; until then this may be repeated.
    """
    masters, states = folder / "masters", folder / "states"
    durable.make_folder(masters)
    with _checked(initial, plan) as tensors:
        imprint = Imprint(federation, plan.fingerprint, 0)
        with writing(master_path(masters, 0), plan.tensors, imprint.metadata("master")) as writer:
            for name in sorted(tensors):
                writer.write(name, tensors[name])
        try:
            state, _ = publish(FrameStore(states), imprint, (), tensors.__getitem__, plan.tensors, created=created)
        except RefusedError as error:
            raise ConfigError(f"{initial}: {error.message}", hint=_HINT) from None
    section = federation.codec
    check_announceable(state, HEADER_BYTES + data_bytes(plan.tensors, section.down), section.steps)
    return Opened(
        fingerprint=plan.fingerprint,
        config_sha256=plan.config_sha256,
        frozen_sha256=plan.frozen_sha256,
        state=state.to_bytes(),
        master_digest=writer.digest,
    )


def _checked(path: Path, plan: SealedPlan) -> TensorFile:
    try:
        tensors = TensorFile(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", hint=_HINT) from None
    except RefusedError as error:
        raise ConfigError(f"{path} is not a float32 safetensors file: {error.message}", hint=_HINT) from None
    try:
        _compare(path, tensors, plan)
    except ConfigError:
        tensors.close()
        raise
    return tensors


def _compare(path: Path, tensors: TensorFile, plan: SealedPlan) -> None:
    found = tensors.shapes
    for name in sorted(found.keys() ^ plan.tensors.keys()):
        what = "lacks" if name in plan.tensors else "has a tensor that the plan does not name:"
        raise ConfigError(f"{path} {what} {name}", hint=_HINT)
    for name, shape in plan.tensors.items():
        if found[name] != shape:
            raise ConfigError(f"{path}: {name} has shape {found[name]}, the plan says {shape}", hint=_HINT)
