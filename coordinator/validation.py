"""Validation: how well each site's model does on notes that the coordinator's operator holds.

The model of a site is the published state that it started from with its update added. It is written to a file of its
own, tensor by tensor, for a `Validator` to measure; who that is, this package does not know, as it has no model. One
file lies there at a time, and none when the process has ended in good order.

A validator that cannot answer (its process dies again and again, say) holds up the updates that wait for it and nothing
else: they stay on their way, their sites keep them, and it is asked again until it answers.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import structlog

from coordinator.decisions import Validate, Validated
from coordinator.disk import Disk
from coordinator.leftovers import VALIDATION
from coordinator.masters import TensorWriter
from coordinator.means import Kept
from shared import durable
from shared.config import FederationConfig
from shared.errors import ConfigError, UnavailableError
from shared.states import open_part, open_state
from shared.tensorfile import Shape

RETRY_S = 30.0
"""Pause before a validator that failed is asked again."""

log = structlog.get_logger("coordinator")


class Validator(Protocol):
    """Whoever has a model and the operator's notes."""

    async def loss(self, state: Path) -> float:
        """Return the mean loss of the model with the tensors in a plain float32 safetensors file.

        Infinite or no number where the model gives that. UnavailableError when it cannot be measured now.
        """
        ...


def check_validator(federation: FederationConfig, validator: Validator | None) -> None:
    """Raise ConfigError when updates are to be weighed by their loss and nobody can measure it."""
    quality = federation.aggregation.quality
    if quality != "none" and validator is None:
        raise ConfigError(
            f'aggregation.quality = "{quality}" weighs updates by a loss, and there are no notes here to measure it',
            hint="name a folder of annotated notes in coordinator.toml: [validation] notes = ...",
        )


class Validation:
    """The validator and the file that it is shown; `held` says why nothing is measured, and is empty otherwise."""

    def __init__(
        self, validator: Validator | None, kept: Kept, shapes: Mapping[str, Shape], storage: Path, disk: Disk
    ) -> None:
        self._validator = validator
        self._kept = kept
        self._shapes = dict(sorted(shapes.items()))
        self._folder = storage / VALIDATION
        self._disk = disk
        self._turn = asyncio.Lock()
        self.held = ""
        shutil.rmtree(self._folder, ignore_errors=True)  # what a crash left

    async def measure(self, job: Validate) -> Validated:
        """Return the loss of an update's model, however long it takes.

        CorruptError when the update or the state that it starts from is no longer what was written.
        """
        assert self._validator is not None, "see check_validator"
        path = self._folder / f"{job.update_id}.safetensors"
        async with self._turn:
            try:
                await self._disk.given_room(write_model, self._kept, job, self._shapes, path)
                return Validated(job.update_id, job.norm, await self._loss(self._validator, path))
            finally:
                path.unlink(missing_ok=True)

    async def _loss(self, validator: Validator, path: Path) -> float:
        while True:
            try:
                loss = await validator.loss(path)
            except UnavailableError as error:
                self.held = f"no update can be validated: {error.message}"
                log.warning("cannot validate", why=error.message, hint=error.hint, again_in_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
            else:
                self.held = ""
                return loss


def write_model(kept: Kept, job: Validate, shapes: Mapping[str, Shape], path: Path) -> None:
    """Write the tensors that a site had when it had trained: those of its base state with its delta added, float32.

    CorruptError when either is gone or damaged, UnavailableError when the disk is full.
    """
    durable.make_folder(path.parent)
    base, update = open_state(kept.states, job.base), open_part(kept.updates, job.update_id)
    with path.open("wb") as file:
        writer = TensorWriter(file.fileno(), path.parent, shapes, {})
        for name in shapes:
            values = base[name]
            if name in update.shapes:
                update.add_tensor(name, 1.0, values)
            writer.write(name, values)
