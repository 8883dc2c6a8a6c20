"""Scores of each version on the held-out notes, as it is published, by a worker of the trainer that the sites use."""

from __future__ import annotations

import asyncio
from pathlib import Path

from edge_client.worker_client import WorkerClient
from mailboat.demo.facts import Facts, Score
from mailboat.demo.plan import Layout
from shared.errors import CorruptError
from shared.manifest import Manifest
from shared.store import FrameStore


class Scorer:
    """Scores versions in the order in which they were asked for; `scores` grows as they are done."""

    def __init__(self, worker: WorkerClient, layout: Layout) -> None:
        self.scores: dict[int, Score] = {}
        self._worker = worker
        self._layout = layout
        self._asked: set[int] = set()
        self._queue: asyncio.Queue[Manifest] = asyncio.Queue()

    def ask(self, facts: Facts) -> None:
        """Ask for every published version that was not asked for yet, version 0 included."""
        for manifest in facts.published:
            if manifest.state.version not in self._asked:
                self._asked.add(manifest.state.version)
                self._queue.put_nowait(manifest)

    async def run(self) -> None:
        """Score what is asked for, until cancelled."""
        while True:
            manifest = await self._queue.get()
            file = self._layout.scratch / f"v{manifest.state.version:08d}.safetensors"
            await asyncio.to_thread(extract, self._layout.storage, manifest, file)
            self.scores[manifest.state.version] = await score(self._worker, file, self._layout.heldout)
            file.unlink()


async def score(worker: WorkerClient, state: Path, notes: Path) -> Score:
    """Return the score of the state in a file on these notes."""
    found = await worker.evaluate(state, notes)
    return Score(found.overall)


def extract(storage: Path, manifest: Manifest, out: Path) -> None:
    """Write a published state of the coordinator as a plain safetensors file; CorruptError when it is not there."""
    stored = FrameStore(storage / "states").get(manifest.transfer_id)
    if stored is None:
        raise CorruptError(f"{storage / 'states'} lacks version {manifest.state.version}", hint="start a new run")
    stored.extract(out)
