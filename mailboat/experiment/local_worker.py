"""The training worker without a process of its own: what `WorkerClient` asks of one, asked of the thing itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from edge_client import pipe
from edge_client.privacy.ledger import Charge, Limit
from edge_client.training import Standing
from edge_client.worker import Worker
from edge_client.worker_client import WorkerClient, load_request, raised
from shared.config import ComputeSection, FederationConfig, SiteConfig

_A = TypeVar("_A", pipe.Loaded, pipe.Trained, pipe.Evaluated, pipe.Measured)


class LocalWorker:
    """A model and the notes of whichever site it serves; keeps the model as long as the federation stays the same."""

    standing = Standing()

    def __init__(self, compute: ComputeSection) -> None:
        self._compute = compute
        self._worker = Worker(lambda _answer: None)
        self.own: Callable[[], Path | None] = lambda: None
        """The file of what stayed at the site after its newest update."""

    def load(self, config: SiteConfig, federation: FederationConfig, initial: Path | None) -> pipe.Loaded:
        """Load model and notes of a site; see `WorkerClient.load`."""
        if config.layers.memory_mib is not None:
            # This process holds the models of all sites: what one of them takes is seen in one of its own.
            depth = asyncio.run(_depth_alone(config, federation))
            layers = config.layers.model_copy(update={"memory_mib": None, "at_most": depth})
            config = config.model_copy(update={"layers": layers})
        # One worker serves many sites in turn, each for a while: what they keep is not worth their disks.
        # And where it computes the trial says, not a site's file.
        kept = {"initial": initial, "storage": None, "compute": self._compute}
        request = load_request(config, federation).model_copy(update=kept)
        return self._ask(request, pipe.Loaded)

    async def train(
        self,
        state: Path,
        base_version: int,
        delta: Path,
        *,
        on_progress: Callable[[float, float], None],
        so_far: tuple[Charge, ...] = (),
        limits: tuple[Limit, ...] = (),
    ) -> pipe.Trained:
        """See `WorkerClient.train`."""
        request = pipe.Train(
            state=state, base_version=base_version, out=delta, own=self.own(), so_far=so_far, limits=limits
        )
        return self._ask(request, pipe.Trained)

    def evaluate(self, state: Path, notes: Path) -> pipe.Evaluated:
        """See `WorkerClient.evaluate`; with what has stayed at the site, where anything does."""
        return self._ask(pipe.Evaluate(state=state, notes=notes, own=self.own()), pipe.Evaluated)

    def loss(self, state: Path) -> float:
        """See `WorkerClient.loss`."""
        measured = self._ask(pipe.Measure(state=state), pipe.Measured)
        return math.nan if measured.loss is None else measured.loss

    def _ask(self, request: pipe.Request, wanted: type[_A]) -> _A:
        answer = self._worker.handle(request)
        if isinstance(answer, pipe.Failed):
            raise raised(answer)
        assert isinstance(answer, wanted), "an answer to another request"
        return answer


async def _depth_alone(config: SiteConfig, federation: FederationConfig) -> int:
    """How many blocks the site's limits allow in a worker that is a process, as in a real run."""
    async with WorkerClient(config, federation) as worker:
        return (await worker.load()).depth
