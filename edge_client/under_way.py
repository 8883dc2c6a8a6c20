"""What a site has under way: the state that it pulls, the update that it pushes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_client.patience import Patience
from shared.manifest import Manifest
from shared.transfer import Receiver, Sender


@dataclass(slots=True)
class Pull:
    """A state on its way in."""

    manifest: Manifest
    receiver: Receiver
    patience: Patience
    unacknowledged: int = 0
    """Chunks stored since the last Want."""
    begun_at: float = -math.inf
    """Monotonic seconds of the last Want that began anew."""

    def begins_anew(self, now: float, *, within_s: float = 0.0) -> bool:
        """Take down that it begins anew now; False when it did so less than `within_s` ago."""
        before, self.begun_at = self.begun_at, now
        return now - before >= within_s


@dataclass(slots=True)
class Push:
    """The update that is on its way out."""

    manifest: Manifest
    sender: Sender
    patience: Patience
    unsent: int = 0
    """Chunks handed to the shell that the broker does not have yet."""
