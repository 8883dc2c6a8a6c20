"""What the agent asks of whoever trains, without knowing what training is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Standing:
    """How a trainer stands between two updates."""

    held: str = ""
    """Why it does not train although it was asked to; empty while it does."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers to be told along with those of the newest training."""


class TrainedUpdate(Protocol):
    """What training reports besides the delta's file."""

    @property
    def examples(self) -> int:
        """How many examples the delta was trained on."""

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers only, and only such as may leave the site."""

    @property
    def own(self) -> Path | None:
        """File of what stays at this site and is to be kept with the update, see `edge_client.own`; or None."""


class Trainer(Protocol):
    """Whoever turns a state into a delta; the worker process in a real run."""

    @property
    def standing(self) -> Standing:
        """How it stands now."""

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float | None], None]
    ) -> TrainedUpdate:
        """Train on the state in file `state` and write the delta to file `delta`, both plain safetensors.

        The delta is float32. `on_progress(share, loss)` is called now and then; no loss is told where it must not be.
        What came of it may leave the site once this has returned.
        """
