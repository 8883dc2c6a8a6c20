"""What each version's published state must be, bit for bit, at whoever holds it: worked out from the journal's inputs.

States that travel whole are toys, steps are real: float32 tensors that follow from the master, the codec's own
rounding, and the sum of both ends. Here they are added up in memory, one after the other, from the records alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from blake3 import blake3

from coordinator.ledger import Ledger
from shared.codec import decode_add, encode, encode_file
from shared.manifest import Manifest, StepFacts, manifest_from_bytes
from shared.states import Imprint, open_state
from shared.store import FrameStore, Stored
from shared.tensorfile import F32Array
from tests.sim.toys import published_frames, read_whole, tensors_of
from tests.sim.weather import Scenario


class ViolationError(AssertionError):
    """Something happened that must not happen."""


def demand(condition: object, message: str) -> None:
    """Raise ViolationError unless the condition holds."""
    if not condition:
        raise ViolationError(message)


def content_of(stored: Stored, scenario: Scenario) -> bytes:
    """All that a state says, verified; errors as `read_whole` and `Stored.open_tensors`."""
    if not scenario.federation.codec.steps:
        return b"".join(read_whole(stored))
    with stored.open_tensors(verify=True) as reader:
        return b"".join(bytes(raw.data) for raw in reader.slices())


class Replicas:
    """See the module's docstring; `newest` is the digest of the newest version's state."""

    def __init__(self, scenario: Scenario, fingerprint: str) -> None:
        self.scenario = scenario
        self.fingerprint = fingerprint
        self.newest = ""
        self.digests: list[str] = []
        """By version."""
        self._content: dict[str, bytes] = {}
        self._state: dict[str, F32Array] = {}

    def publish(self, version: int, master: bytes, sealed: bytes) -> None:
        """A version was published: by this manifest, of this master."""
        manifest, section = manifest_from_bytes(sealed), self.scenario.federation.codec
        if not section.steps:
            content, before = b"".join(published_frames(master, self.scenario.state_frames)), None
        else:
            before = self.newest if version else None
            content = self._stepped(version, tensors_of(master, self.scenario))
        sha256 = blake3(content).hexdigest()
        demand(manifest.leads_to == sha256, f"version {version} publishes another state")
        base = manifest.step.base_digest if isinstance(manifest.facts, StepFacts) else None
        demand(base == before, f"version {version} is no step from the state before it")
        self._content[sha256] = content
        self.newest = sha256
        self.digests.append(sha256)

    def anchor(self, version: int, sealed: bytes) -> None:
        """The state of a version can be had whole."""
        demand(version and not version % self.scenario.federation.codec.steps, f"version {version} is an anchor")
        same = manifest_from_bytes(sealed).file_digest == self.newest == self.digests[version]
        demand(same, f"the anchor of version {version} is another state")

    def _stepped(self, version: int, master: dict[str, F32Array]) -> bytes:
        federation = self.scenario.federation
        codec = federation.codec.down
        for name, tensor in master.items():
            if not version:
                self._state[name] = tensor.copy()
                continue
            parts = encode(name, np.subtract(tensor, self._state[name]), codec)
            decode_add([array for _, _, array in parts], codec, 1.0, self._state[name])
        return self._file(version, self._state)

    def _file(self, version: int, tensors: Mapping[str, F32Array]) -> bytes:
        metadata = Imprint(self.scenario.federation, self.fingerprint, version).metadata("state")
        return b"".join(encode_file(tensors, "f32", metadata))

    def recovered(self, ledger: Ledger, states: FrameStore) -> None:
        """The coordinator has read its journal again: whole or by steps, every version's state is on its disk."""
        for version, sha256 in enumerate(self.digests if self.scenario.federation.codec.steps else ()):
            made = self._file(version, open_state(states, ledger.parts(version)))
            demand(self._content[sha256] == made, f"the coordinator's state of version {version} is another one")

    def knows(self, manifest: Manifest) -> bool:
        """Whether this state was ever published."""
        return manifest.file_digest in self._content

    def check(self, who: str, manifest: Manifest, content: bytes) -> None:
        """Somebody holds a state: it is what was published of that version, bit for bit."""
        demand(self._content.get(manifest.file_digest) == content, f"{who} holds another state than was published")
