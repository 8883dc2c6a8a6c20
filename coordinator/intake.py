"""What a site may bring, besides what the format demands: how often, how much, and how far out of line.

Rates are token buckets that start full and refill evenly: an offer beyond them is put off (`Wait`, rule rate-updates or
rate-bytes), and nothing is recorded of it. An update that is sound and out of line is kept apart, not rejected: a
person looks at it (`mailboat quarantine`) and releases or drops it. Its rules:

    norm-max       the delta's L2 norm is above [admission] norm_max
    norm-factor    it is more than norm_factor times the median of the last updates accepted
    examples-min   it claims fewer examples than examples_min
    examples-max   it claims more than examples_max

Everything here is lost with the process but the norms of the rows that a restart reads; then the buckets are full.
"""

from __future__ import annotations

import statistics
from collections import deque

from coordinator.records import Accepted, Record
from shared.bucket import Bucket
from shared.config import AdmissionSection
from shared.errors import RefusedError
from shared.manifest import Manifest

HOUR_S = 3600.0
NORMS = 64
"""Updates whose norms are remembered."""
NORMS_MIN = 8
"""Fewer say nothing of what is usual."""
MESSAGES_BURST = 10
"""Seconds of control messages that may come at once: what the broker held while we were away."""


class Intake:
    """All sites' buckets, and what norms were usual; grows with sites."""

    def __init__(self, section: AdmissionSection) -> None:
        self.section = section
        self._updates: dict[str, Bucket] = {}
        self._bytes: dict[str, Bucket] = {}
        self._messages: dict[str, Bucket] = {}
        self._norms: deque[float] = deque(maxlen=NORMS)

    def hears(self, site: str, now: float) -> bool:
        """Whether a control message of this site is looked at; what is not is as good as lost on its way."""
        rate = self.section.messages_per_s
        bucket = self._messages.setdefault(site, Bucket(rate * MESSAGES_BURST, rate))
        if bucket.wait(1, now) > 0:
            return False
        bucket.take(1, now)
        return True

    def put_off(self, site: str, manifest: Manifest, now: float) -> tuple[RefusedError, float] | None:
        """Why a new offer has to wait, and how many seconds; None takes it and counts it."""
        section, size = self.section, manifest.wire_bytes
        updates = self._updates.setdefault(site, _hourly(section.updates_per_hour))
        amount = self._bytes.setdefault(site, _hourly(section.mib_per_hour << 20))
        if section.updates_per_hour and (wait := updates.wait(1, now)) > 0:
            what = f"more than {section.updates_per_hour} updates an hour"
            return RefusedError(what, rule="rate-updates"), wait
        if section.mib_per_hour and (wait := amount.wait(size, now)) > 0:
            return RefusedError(f"more than {section.mib_per_hour} MiB an hour", rule="rate-bytes"), wait
        updates.take(1, now)
        amount.take(size, now)
        return None

    def saw(self, record: Record) -> None:
        """Remember the norm of an accepted update."""
        if isinstance(record, Accepted):
            self._norms.append(record.norm)

    def objection(self, examples: int, norm: float) -> RefusedError | None:
        """Why a sound update is kept apart; None for one that is in line."""
        section = self.section
        if section.norm_max and norm > section.norm_max:
            return RefusedError(f"its norm is {norm:.4g}, above {section.norm_max:.4g}", rule="norm-max")
        if examples < section.examples_min:
            return RefusedError(f"{examples} examples, fewer than {section.examples_min}", rule="examples-min")
        if section.examples_max and examples > section.examples_max:
            return RefusedError(f"{examples} examples, more than {section.examples_max}", rule="examples-max")
        if section.norm_factor and len(self._norms) >= NORMS_MIN:
            usual = statistics.median(self._norms)
            if usual > 0 and norm > section.norm_factor * usual:
                what = f"its norm is {norm:.4g}, {norm / usual:.0f} times the usual {usual:.4g}"
                return RefusedError(what, rule="norm-factor")
        return None


def _hourly(amount: int) -> Bucket:
    return Bucket(float(amount), max(amount, 1) / HOUR_S)
