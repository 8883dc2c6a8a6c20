"""A training worker without a model: speaks the real worker's pipe, adds known noise, takes as long as it is told.

It trains from the last version but one only after the file `calm` appeared, so that no run ends before its faults did.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from edge_client import pipe
from shared.config import FederationConfig
from shared.plan import load_plan
from shared.tensorfile import F32Array

SECONDS = "CHAOS_TRAINING_S"
CALM = "calm"
POLL_S = 0.05


def noise(name: str, shape: tuple[int, ...]) -> F32Array:
    """The one direction in which every update points: incompressible, and the same everywhere."""
    return np.random.default_rng(len(name) + ord(name[0])).normal(0.0, 1.0, shape).astype(np.float32)


def step(site: str) -> float:
    """How far one update of a site goes along `noise`."""
    return float(int(site.rpartition("-")[2])) / 4


def _read(size: int) -> bytes:
    data = sys.stdin.buffer.read(size)
    if len(data) < size:
        os._exit(0)
    return data


def _train(request: pipe.Train, site: str, federation: FederationConfig, folder: Path) -> pipe.Trained:
    time.sleep(float(os.environ.get(SECONDS, "0.1")))
    while request.base_version >= federation.federation.versions - 1 and not (folder / CALM).exists():
        time.sleep(POLL_S)
        if os.getppid() == 1:
            os._exit(0)
    state = load_file(request.state)
    save_file({name: step(site) * noise(name, values.shape) for name, values in state.items()}, request.out)
    return pipe.Trained(examples=10, metrics={"loss": 1.0})


def main() -> None:
    """Answer until standard input closes."""
    while True:
        (length,) = pipe.LENGTH.unpack(_read(pipe.LENGTH.size))
        match pipe.unpack_request(_read(length)):
            case pipe.Load() as load:
                folder, site, federation = Path(load.source), load.site, load.federation
                plan = load_plan(folder / "plan.json", federation)
                answer: pipe.Answer = pipe.Loaded(
                    plan=plan,
                    depth=len(plan.layers),
                    limit="",
                    examples=10,
                    notes=1,
                    held_out=0,
                    skipped=0,
                    uncached="",
                )
            case pipe.Train() as train:
                answer = _train(train, site, federation, folder)
            case pipe.Evaluate():
                msg = "nobody scores here"
                raise AssertionError(msg)
        try:
            sys.stdout.buffer.write(pipe.pack(answer))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    main()
