"""The work that every framework gets: known noise added to a model, so that the result can be worked out by hand.

Imported by Mailboat's processes and, from environments of their own, by those of the peers: numpy and nothing else.
The first values of the model are a ledger: training at site i adds 1 to the i-th of them and nothing to the others, so
that each global model tells whose updates went into it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

VARIABLE = "PEERS_WORK"
"""Names the file that `Work.save` wrote, in the environment of every process."""
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Work:
    """What is trained, by how many, how often."""

    root: str
    """Folder of this run."""
    sites: int
    parameters: int
    tensors: int
    """The parameters stand in so many tensors of one size."""
    rounds: int
    training_s: float
    """How long training is made to take."""

    @property
    def shape(self) -> tuple[int, int]:
        """All tensors as one array."""
        return (self.tensors, self.parameters // self.tensors)

    @property
    def model_bytes(self) -> int:
        """The model as float32."""
        return 4 * self.shape[0] * self.shape[1]

    def save(self) -> Path:
        """Write the file that `load` reads, the initial model and the noise."""
        root = Path(self.root)
        chance = np.random.default_rng(0)
        for name in ("initial", "noise"):
            values = chance.standard_normal(self.shape, np.float32)
            values *= np.float32(0.02)
            values[0, : self.sites] = 0.0
            np.save(root / f"{name}.npy", values)
        path = root / "work.json"
        path.write_text(json.dumps(dataclasses.asdict(self)))
        return path

    def initial(self) -> Array:
        """The model that everybody starts from, memory-mapped."""
        values: Array = np.load(Path(self.root) / "initial.npy", mmap_mode="r")
        return values

    def note(self, who: str, what: str, **facts: Any) -> None:
        """Append one line to the run's log, from whichever process."""
        line = json.dumps({"at": time.time(), "who": who, "what": what, **facts}) + "\n"
        with (Path(self.root) / "events.jsonl").open("a") as log:
            log.write(line)

    def ledger(self, first: Array) -> list[float]:
        """The ledger in the first tensor of a model."""
        return [round(float(value), 4) for value in first[: self.sites]]

    def delta(self, site: int) -> Array:
        """What training at site 1, 2, ... adds, after the time that training takes; memory-mapped, its own copy."""
        time.sleep(self.training_s)
        values: Array = np.load(Path(self.root) / "noise.npy", mmap_mode="c")
        values[0, site - 1] = 1.0
        return values


def load() -> Work:
    """The work that the environment names."""
    return Work(**json.loads(Path(os.environ[VARIABLE]).read_text()))


def events(root: Path) -> list[dict[str, Any]]:
    """What the processes noted so far, in order of time."""
    path = root / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda event: float(event["at"]))
