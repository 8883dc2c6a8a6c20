"""Scores of each version on the held-out notes, as it is published, by a worker of the trainer that the sites use."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from edge_client.worker_client import WorkerClient
from mailboat.demo.facts import Facts, Score
from mailboat.demo.plan import Layout
from shared.states import extract_state
from shared.store import FrameStore


class Scorer:
    """Scores versions in the order in which they were asked for; `scores` grows as they are done."""

    def __init__(self, worker: WorkerClient, layout: Layout) -> None:
        self.scores: dict[int, Score] = {}
        self._worker = worker
        self._layout = layout
        self._asked: set[int] = set()
        self._queue: asyncio.Queue[tuple[int, tuple[str, ...]]] = asyncio.Queue()

    def ask(self, facts: Facts) -> None:
        """Ask for every published version that was not asked for yet, version 0 included."""
        for version, parts in enumerate(facts.published):
            if version not in self._asked:
                self._asked.add(version)
                self._queue.put_nowait((version, parts))

    async def run(self) -> None:
        """Score what is asked for, until cancelled."""
        while True:
            version, parts = await self._queue.get()
            file = self._layout.scratch / f"v{version:08d}.safetensors"
            await asyncio.to_thread(extract, self._layout.storage, parts, file)
            self.scores[version] = await score(self._worker, file, self._layout.heldout)
            file.unlink()


async def score(worker: WorkerClient, state: Path, notes: Path) -> Score:
    """Return the score of the state in a file on these notes."""
    found = await worker.evaluate(state, notes)
    return Score(found.overall)


def extract(storage: Path, parts: Sequence[str], out: Path) -> None:
    """Write a published state of the coordinator as a plain safetensors file; CorruptError when it is not there."""
    extract_state(FrameStore(storage / "states"), parts, out)
