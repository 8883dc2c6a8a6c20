"""What a round cannot do without: each of its steps alone, beside a whole round in the same call.

    python -m bench.limit --json docs/results/limit.json

Processor seconds of the project's own functions over files on a RAM disk, one after the other in one process, with
nobody waiting, no messages and warm caches; and of the bytes through loopback sockets. Their sum, divided by the
processors there are, is a bound that no round of this design and these libraries gets below, however little the
protocol costs; about, as each step is measured a few times and the least counts. What a round takes beyond it is
Python, messages, waking and waiting, and processes in each other's way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.pages import Touched
from bench.peers.site import tensor_name
from bench.peers.stage import isolate
from bench.peers.work import Work
from bench.protocol import machine
from bench.round import TENSORS, WARM_UP, measure
from coordinator import admission
from coordinator.masters import prune_masters
from edge_client.statefile import read_state, write_tensors
from mailboat import upkeep
from shared.config import AggregationSection, CodecSection, StateCodecName
from shared.manifest import Manifest
from shared.slices import make_transfer_frames
from shared.states import extract_state
from shared.store import FrameStore, Stored
from shared.tensorfile import map_tensors
from tests.small_run import SmallRun

MAILBOAT: tuple[StateCodecName, ...] = ("f32", "bf16", "int8")
SEND_BYTES = 1 << 18
TOUCHED = 12
"""Models whose bytes of memory are touched beforehand, as for a round: more than all files of the steps together."""


class Steps:
    """The steps of one round by name, in processor seconds, and how often a round takes each."""

    def __init__(self, turns: int) -> None:
        self._turns = turns
        self.seconds: dict[str, float] = {}
        self.times: dict[str, int] = {}

    def take(
        self, name: str, times: int, work: Callable[[], object], undo: Callable[[], object] = lambda: None
    ) -> None:
        """Measure a step that may be repeated once it was undone, which is not measured."""
        found = []
        for _ in range(self._turns):
            began = time.process_time()
            work()
            found.append(time.process_time() - began)
            undo()
        self.seconds[name], self.times[name] = round(min(found), 3), times

    @property
    def total(self) -> float:
        """Processor seconds of all, each as often as it is taken."""
        return sum(self.seconds[name] * times for name, times in self.times.items())


def steps(root: Path, codec: StateCodecName, work: Work, turns: int) -> Steps:
    """Measure the steps of a round of `work` in an empty folder."""
    found, sites = Steps(turns), work.sites
    initial = {tensor_name(number): values for number, values in enumerate(work.initial())}
    section = CodecSection(up=codec, down=codec)
    run = SmallRun(root / "coordinator", initial, codec=section, aggregation=AggregationSection(mode="sync"))
    state = _whole(run.states, run.state_manifests[0].transfer_id)
    kept = FrameStore(root / "states", recycles=True)
    plain, delta = root / "state.safetensors", root / "delta.safetensors"

    _arriving(found, "site: take a state in", sites, kept, state)
    _arrive(kept, state.manifest, [*_frames(state)])
    found.take("site: unpack it", sites, lambda: extract_state(kept, (state.manifest.transfer_id,), plain))
    found.take("site: decode it", sites, lambda: [None for _ in read_state(plain).values()])

    def train() -> None:
        write_tensors(delta, {tensor_name(number): values for number, values in enumerate(work.delta(1))})

    found.take("site: train, write the delta", sites, train)
    outbox, spooled = FrameStore(root / "outbox", recycles=True), FrameStore(root / "updates")
    accepted = [run.update(f"site-{number}", map_tensors(delta)) for number in range(1, sites + 1)]
    update = _whole(run.updates, accepted[0].update_id)

    def seal() -> None:
        frames = make_transfer_frames(map_tensors(delta), codec, {})
        outbox.seal(frames, lambda summary: update.manifest.model_copy(update=dataclasses.asdict(summary)))

    def forget() -> None:
        """As after a version: the master leaves its place to the next one."""
        prune_masters(run.masters, ())
        for state_id in run.states.ids():
            if state_id != state.manifest.transfer_id:
                run.states.delete(state_id)

    found.take("site: seal it", sites, seal, lambda: outbox.delete(update.manifest.transfer_id))
    found.take("site: read it to send it", sites, lambda: _read(update))
    _arriving(found, "coordinator: take an update in", sites, spooled, update)
    found.take("coordinator: verify it", sites, lambda: admission.verify(update, run.plan))
    planned = run.planned(accepted)
    found.take("coordinator: merge and publish", 1, lambda: run.run_plan(planned), forget)
    found.take("coordinator: read the state to send it", 1, lambda: _read(state))
    # In to the broker and out of it; a state goes in once.
    hops = 2 * sites * update.manifest.wire_bytes + (1 + sites) * state.manifest.wire_bytes
    found.take("sockets", 1, lambda: _through_sockets(hops))
    return found


def _whole(store: FrameStore, transfer_id: str) -> Stored:
    stored = store.get(transfer_id)
    assert stored is not None
    return stored


def _arriving(found: Steps, name: str, times: int, store: FrameStore, origin: Stored) -> None:
    manifest, frames = origin.manifest, [*_frames(origin)]
    found.take(name, times, lambda: _arrive(store, manifest, frames), lambda: store.delete(manifest.transfer_id))


def _arrive(store: FrameStore, manifest: Manifest, frames: Sequence[bytes]) -> None:
    with store.open_partial(manifest) as partial:
        for index, frame in enumerate(frames):
            partial.write(index, frame)
        partial.finish()


def _frames(stored: Stored) -> Iterator[bytes]:
    return (stored.read_frame(index) for index in range(stored.manifest.frames))


def _read(stored: Stored) -> None:
    for _frame in _frames(stored):
        pass


def _through_sockets(size: int) -> None:
    """Both ends of one TCP connection, each in a thread: what all connections of a round carry."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:

        def send() -> None:
            block = bytes(SEND_BYTES)
            for at in range(0, size, SEND_BYTES):
                sender.sendall(memoryview(block)[: min(SEND_BYTES, size - at)])

        thread = threading.Thread(target=send)
        thread.start()
        buffer, got = bytearray(SEND_BYTES), 0
        while got < size and (taken := receiver.recv_into(buffer)):
            got += taken
        thread.join()


def compare(codec: StateCodecName, options: argparse.Namespace) -> dict[str, Any]:
    """The steps of a round and the round itself, one after the other."""
    with tempfile.TemporaryDirectory(prefix="mailboat-limit-", dir=options.place) as folder:
        work = Work(folder, options.sites, round(options.parameters * 1e6), TENSORS, 1, 0.0)
        work.save()
        Touched(1, 0 if options.untouched else TOUCHED * work.model_bytes).keep(0)
        found = steps(Path(folder), codec, work, options.turns)
    whole = measure(f"mailboat {codec}", "tmpfs", options.place, options)
    seconds, spent = float(np.median(whole.seconds)), sum(whole.cpu_s.values())
    cores = os.cpu_count() or 1
    return {
        "codec": codec,
        "steps": {name: {"s": found.seconds[name], "times": found.times[name]} for name in found.seconds},
        "steps_s": round(found.total, 2),
        "round_processor_s": round(spent, 2),
        "share": round(found.total / spent, 3) if spent else None,  # a tiny round may take less than the kernel counts
        "bound_s": round(found.total / cores, 2),
        "round_s": round(seconds, 2),
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.limit", description=__doc__)
    parser.add_argument("--codecs", nargs="+", choices=MAILBOAT, default=list(MAILBOAT))
    parser.add_argument("--parameters", type=float, default=60.0, help="millions")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help=f"rounds measured, after {WARM_UP} to warm up")
    parser.add_argument("--turns", type=int, default=3, help="of each step, the least of which counts")
    parser.add_argument("--place", type=Path, default=Path("/dev/shm"), help="folder to work in")  # noqa: S108 - a RAM disk
    parser.add_argument("--untouched", action="store_true", help="as bench.round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    isolate()
    upkeep.settle_in()
    found = []
    for codec in options.codecs:
        found.append(compare(codec, options))
        print(json.dumps(found[-1], indent=1), flush=True)
    if options.json:
        settings = {key: getattr(options, key) for key in ("parameters", "sites", "rounds", "turns")}
        options.json.write_text(
            json.dumps({"machine": machine(), "settings": settings, "codecs": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
