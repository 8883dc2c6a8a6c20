"""The two large files that a training goes through: the state in, the delta out.

Each training writes over what the one before left, since fresh pages and blocks cost more than copying the bytes does.
They are of use to a running site alone: what an earlier life left is deleted at the start, and all at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared import durable


@dataclass(frozen=True, slots=True)
class WorkFiles:
    """The folder that they lie in; one training at a time."""

    folder: Path

    @property
    def state(self) -> Path:
        """The state to train on, as it travelled."""
        return self.folder / "state.safetensors"

    @property
    def delta(self) -> Path:
        """What training has made of it, float32."""
        return self.folder / "delta.safetensors"

    @property
    def size(self) -> int:
        """Bytes of what lies there."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def clear(self) -> None:
        """Make the folder when it is missing, and empty it."""
        durable.make_folder(self.folder)
        self._delete(keep=set())

    def tidy(self) -> None:
        """Delete all but the two: what a training leaves beside them is of use once."""
        self._delete(keep={self.state, self.delta})

    def _delete(self, keep: set[Path]) -> None:
        for left in set(self.folder.iterdir()) - keep:
            left.unlink()
