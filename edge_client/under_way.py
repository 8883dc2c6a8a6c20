"""What a site has under way: the state that it pulls, the update that it pushes."""

from __future__ import annotations

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


@dataclass(slots=True)
class Push:
    """The update that is on its way out."""

    manifest: Manifest
    sender: Sender
    patience: Patience
    unsent: int = 0
    """Chunks handed to the shell that the broker does not have yet."""
