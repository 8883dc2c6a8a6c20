"""A site's states at rest: pulled, made by steps, forgotten. Everything here blocks on the disk.

    states/<id>.{frames,manifest}   states, whole, and steps that wait to be added to one; what the run still needs

A state that steps made lies here as one that was pulled whole does: as the frames of its plain file, under the id that
its digest gives it. It is made of what is there already and appears whole or not at all, so a process that is killed
while it adds up does the same again. The digest is compared with the one that the coordinator published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import structlog

from edge_client import decisions as d
from shared.config import FederationConfig
from shared.errors import CorruptError, NoRoomError, RefusedError
from shared.manifest import Manifest, StateFacts
from shared.plan import blocks_from
from shared.states import Imprint, State, extract_state, open_state, seal_state
from shared.store import FrameStore
from shared.tensorfile import map_tensors

log = structlog.get_logger("site")


class States:
    """The folder of one site; one process writes it."""

    def __init__(self, root: Path, federation: FederationConfig, fingerprint: str) -> None:
        self.store = FrameStore(root, recycles=True)
        self._federation = federation
        self._fingerprint = fingerprint

    def held(self) -> Manifest | None:
        """The newest state that lies here whole; what cannot be read is left to whoever needs it."""
        return max(self._whole(), key=lambda state: (state.version, state.created), default=None)

    def _whole(self) -> Iterator[Manifest]:
        for state_id in self.store.ids():
            try:
                stored = self.store.get(state_id)
            except CorruptError:
                continue
            if stored is not None and isinstance(stored.manifest.facts, StateFacts):
                yield stored.manifest

    def begin(self, initial: Path) -> None:
        """Keep version 0 as the base model here has it (a plain float32 safetensors file), unless the disk is full.

        Base models and heads are drawn alike everywhere, so that this is the state which the coordinator published:
        then it need not travel. If it is not, it is one that no steps lead on from, and is replaced.
        """
        tensors = map_tensors(initial)
        shapes = {name: values.shape for name, values in tensors.items()}
        try:
            seal_state(self.store, Imprint(self._federation, self._fingerprint, 0), tensors.__getitem__, shapes)
        except NoRoomError as error:
            log.warning("version 0 will be pulled", reason=error.message)

    def step_on(self, base: Manifest, steps: Sequence[Manifest]) -> d.StateReady | d.Unmade:
        """Make the state that these steps lead to from `base`, durably; NoRoomError when the disk is full.

        Where what lies here does not make it, the transfers that are not what was sent are deleted; all of them, when
        each by itself is sound.
        """
        parts = [each.transfer_id for each in (base, *steps)]
        try:
            made = self._made(open_state(self.store, parts))
        except (RefusedError, CorruptError, FileNotFoundError) as error:
            broken = [part for part in parts if not self._sound(part)] or parts
            log.warning("no state came of steps; what was to blame is pulled again", parts=broken, reason=str(error))
            for part in broken:
                self.store.delete(part)
            return d.Unmade(tuple(broken))
        log.info("stepped", version=made.version, steps=len(steps))
        return d.StateReady(made)

    def _made(self, state: State) -> Manifest:
        """Seal it under the digest that was published, or raise RefusedError."""
        imprint = Imprint(self._federation, self._fingerprint, state.version, blocks_from(state.metadata))
        return seal_state(self.store, imprint, state.__getitem__, state.shapes, expected=state.digest)

    def _sound(self, transfer_id: str) -> bool:
        try:
            stored = self.store.get(transfer_id)
            if stored is not None:
                stored.check_frames()
                stored.verify()
        except (CorruptError, RefusedError, FileNotFoundError):
            return False
        return stored is not None

    def extract(self, state: Manifest, path: Path) -> None:
        """Write a state's plain safetensors file over `path`; errors as `extract_state`."""
        extract_state(self.store, (state.transfer_id,), path)

    def forget_all_but(self, used: Callable[[], set[str]]) -> None:
        """Delete what no run needs: only the newest state is worth its disk space, and what is in use.

        `used` is asked when the folder was listed, so that nothing is deleted that begins to arrive meanwhile.
        """
        here, needed = self.store.ids() + self.store.partial_ids(), used()
        for unused in [each for each in here if each not in needed]:
            self.store.delete(unused)
