"""`python -m tests.chaos.recovery --json FILE`: one fault in mid-upload, and how long until bytes move again.

Default settings, one site, one update of 8 MB over a link of 8 Mbit/s. Measured at the broker: the time from the end of
the fault (the restarted process is started, the link is back) until the coordinator says that it holds a chunk which
came by for the first time after that, and the bytes of update chunks that came by twice. A measurement during which
this machine was busy with something else is marked, and left out of the report.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mailboat.flaky import Conditions
from tests.chaos.conduct import Outcome, Run
from tests.chaos.disks import may_mount
from tests.chaos.plan import BROKER, COORDINATOR_NAME, Fault, Patience, Plan
from tests.chaos.results import machine

SITE = "site-1"
PARAMETERS = 2_000_000
SLICE_KIB = 128
WINDOW = 16
LOOK_S = 0.1
SHARE_MAX = 0.1
"""Share of the time by which looks may be late before a measurement says nothing."""

FAULTS = {
    "site killed": Fault(0.0, "kill", SITE, 0.0, mid_upload=True),
    "coordinator killed": Fault(0.0, "kill", COORDINATOR_NAME, 0.0, mid_upload=True),
    "broker killed, its persistence file removed": Fault(0.0, "forget", BROKER, 0.0, mid_upload=True),
    "site's link reset": Fault(0.0, "reset", SITE, 0.0, mid_upload=True),
    "site's link down for 10 s": Fault(0.0, "down", SITE, 10.0, mid_upload=True),
    "site's link silent for 10 s": Fault(0.0, "hole", SITE, 10.0, mid_upload=True),
    "coordinator's link down for 10 s": Fault(0.0, "down", COORDINATOR_NAME, 10.0, mid_upload=True),
    "coordinator stopped for 10 s": Fault(0.0, "pause", COORDINATOR_NAME, 10.0, mid_upload=True),
    "coordinator away for 60 s": Fault(0.0, "away", COORDINATOR_NAME, 60.0, mid_upload=True),
}


@dataclass(slots=True)
class Looks:
    """How late this process gets to look: the share of time that the machine gave to others."""

    late_s: float = 0.0
    all_s: float = 0.0
    _task: asyncio.Task[None] | None = field(default=None, repr=False)

    def begin(self) -> None:
        """Look until `end`."""
        self._task = asyncio.create_task(self._look())

    def end(self) -> float:
        """The share, 0 to 1."""
        assert self._task is not None
        self._task.cancel()
        return self.late_s / max(self.all_s, LOOK_S)

    async def _look(self) -> None:
        at = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            self.late_s += max(0.0, now - at - LOOK_S)
            self.all_s += now - at
            at = now


def single(fault: Fault) -> Plan:
    """One site, one update worth measuring, one fault."""
    link = Conditions(latency_s=0.01, bytes_per_s=1_000_000.0)
    return Plan(
        seed=0,
        mode="sync",
        sites=1,
        versions=2,
        parameters=PARAMETERS,
        slice_kib=SLICE_KIB,
        window=WINDOW,
        queue_max=1000,
        sealed=False,
        training_s=0.1,
        links={COORDINATOR_NAME: Conditions(), SITE: link},
        points={},
        faults=(fault,),
        patience=Patience(stall_s=5.0, backoff_cap_s=15.0, keepalive_s=30),
        disks=(fault.target,) if fault.kind == "full" else (),
    )


async def measure(root: Path, fault: Fault) -> tuple[Outcome, dict[str, Any]]:
    """One run with that fault."""
    run = Run(root, single(fault))
    looks = Looks()
    try:
        await run.begin()
        looks.begin()
        await run.strike()
        await run.end()
    finally:
        starved = looks.end()
        await run.close()
    await run.settle()
    applied = run.outcome.applied[0]
    again = [death.back_at for death in run.outcome.deaths if death.back_at is not None]
    over = max([applied.until, *again]) if fault.kind in {"kill", "away", "forget"} else applied.until
    moved = min((at for at, came in run.tap.held if came > over), default=None)
    return run.outcome, {
        "recovery_s": None if moved is None else round(moved - over, 2),
        "resent_bytes": run.tap.up.resent,
        "wire_bytes": run.tap.up.total,
        "starved": round(starved, 3),
        "ok": not run.outcome.problems,
    }


def main() -> int:
    """Measure every fault several times."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.recovery", description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in FAULTS}
    failed = False
    for _ in range(options.times):
        for name, fault in FAULTS.items():
            root = Path(tempfile.mkdtemp(prefix="chaos-recovery-"))
            outcome, measured = asyncio.run(measure(root, fault))
            found[name].append(measured)
            failed |= bool(outcome.problems)
            sys.stdout.write(f"{time.strftime('%H:%M:%S')} {name}: {measured} {outcome.problems or ''}\n")
            sys.stdout.flush()
            shutil.rmtree(root)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                settings = {"update_bytes": 4 * PARAMETERS, "slice_kib": SLICE_KIB, "window": WINDOW, "mbit_s": 8}
                result = {"machine": machine(), "root": may_mount(), "settings": settings, "faults": found}
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
