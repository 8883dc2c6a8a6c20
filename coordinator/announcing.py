"""What is announced of a version: a state that can be had whole, and the steps that lead to the newest one.

So each site finds a way there by itself, whatever it holds. How far back the steps go is a matter of bytes: whoever is
so far behind that the steps weigh more than the whole state is better off with that.
"""

from __future__ import annotations

from coordinator.ledger import Ledger
from shared.errors import ConfigError
from shared.manifest import Manifest
from shared.messages import MAX_CONTROL_BYTES

STEPS_BYTES = 4096
"""Manifests of steps that lead to a state which can be had whole take at most so much of an announcement, or as much as
the manifest of that state where that is more: about 0.01 % of the bytes that a site then need not fetch."""

_MANIFEST_BYTES, _FRAME_BYTES = 600, 37
"""The most that a step's manifest takes for itself, and for each of its frames: hash and length."""

ANNOUNCEMENT_BYTES = MAX_CONTROL_BYTES - 10_000
"""All manifests of an announcement; beside them stand its few other fields, and what sealing adds."""


def announced(ledger: Ledger) -> tuple[Manifest, tuple[Manifest, ...]]:
    """Return the newest state that can be had whole, and the steps that are announced with it, in order."""
    version, steps = ledger.version, list[Manifest]()
    while (whole := ledger.published[version].whole) is None:
        step = ledger.published[version].step
        assert step is not None, f"version {version} was published"
        steps.append(step)
        version -= 1
    taken = [len(each.to_bytes()) for each in (whole, *steps)]
    room, weight = min(max(STEPS_BYTES, taken[0]), ANNOUNCEMENT_BYTES - sum(taken)), whole.wire_bytes
    while (step := ledger.published[version].step) is not None:
        room, weight, version = room - len(step.to_bytes()), weight - step.wire_bytes, version - 1
        if room < 0 or weight < 0:
            break
        steps.append(step)
    return whole, tuple(reversed(steps))


def check_announceable(whole: Manifest, step_file_bytes: int, steps: int) -> None:
    """Raise ConfigError when the manifests of a state, and of the steps before the next, fit into no announcement."""
    frames = -(-step_file_bytes // whole.slice_size)
    needed = len(whole.to_bytes()) + (steps - 1) * (_MANIFEST_BYTES + _FRAME_BYTES * frames)
    if steps and needed > ANNOUNCEMENT_BYTES:
        raise ConfigError(
            f"codec.steps = {steps}: announcements would take {needed:,} bytes, possible are {ANNOUNCEMENT_BYTES:,}",
            hint="take fewer steps, or raise codec.slice_kib",
        )
