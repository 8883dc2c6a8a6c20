"""A hostile site with a place in the federation: how much slower the others' rounds get, and what memory it takes.

Two honest sites and a coordinator run a federation twice over a real Mosquitto, once alone and once beside a third site
that does all it can, as fast as the broker takes it:

    offers      sound offers under ever new ids, of updates that never come
    chunks      whole packets for updates that nobody asked for, and garbage
    messages    hellos and wants, whole bitmaps of nothing, and bytes that are no message

What is measured is the median time from version to version in the coordinator's journal, and the coordinator's peak
memory. `make bench-hostile`; a quiet machine is needed for times that mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from broker.launcher import run_broker
from coordinator.journal import Journal
from coordinator.records import VersionCommitted
from shared.config import BrokerSection, LinkSection
from shared.ids import new_session_id, new_update_id
from shared.link import Connected, Link, LinkDownError, LinkOptions
from shared.messages import Hello, Message, Offer, Want, chunk_header, encode
from shared.plan import SealedPlan
from shared.topics import Channel, topic
from tests.factories import make_state, make_update
from tests.toys import write_toy

NAME = "toy"
HOSTILE = "site-9"
GARBAGE_BYTES = 64 * 1024
IN_FLIGHT = 32
"""Messages that the hostile site hands to the broker at once."""


class HostileSite:
    """Sends until it is cancelled; counts what it got rid of."""

    def __init__(self, url: str, plan: SealedPlan) -> None:
        self.plan = plan
        self.sent = 0
        self.link = Link(LinkOptions(BrokerSection(url=url), LinkSection(), f"{NAME}-hostile"))

    async def run(self) -> None:
        """Until cancelled."""
        async with self.link, asyncio.TaskGroup() as tasks:
            async for event in self.link.events():
                if isinstance(event, Connected):
                    for number in range(IN_FLIGHT):
                        tasks.create_task(self._flood(number))

    async def _flood(self, number: int) -> None:
        up, data = (topic(NAME, channel, HOSTILE) for channel in (Channel.UP_CTL, Channel.UP_DATA))
        base = make_state(self.plan, 0)
        while True:
            what, where = self._next(number, base), up
            if number % 2:
                where = data
            with contextlib.suppress(LinkDownError):
                await self.link.publish(where, what)
                self.sent += 1

    def _next(self, number: int, base: Any) -> bytes:
        if number % 2:
            body = secrets.token_bytes(GARBAGE_BYTES)
            return body if number % 4 == 1 else chunk_header(secrets.token_hex(16), 0, len(body)) + body
        choices: list[Message] = [
            Offer(manifest=make_update(self.plan, HOSTILE, base, update_id=new_update_id(HOSTILE))),
            Want(transfer_id=secrets.token_hex(16), have=b"", window=4096, restart=True),
            Hello(
                site=HOSTILE,
                session=new_session_id(),
                fingerprint=self.plan.fingerprint,
                config_sha256=self.plan.config_sha256,
                frozen_sha256=self.plan.frozen_sha256,
                software="hostile",
                clock=time.time(),
            ),
        ]
        return encode(choices[number // 2 % 3]) if number % 8 else secrets.token_bytes(1000)


async def measure(versions: int, *, hostile: bool) -> dict[str, Any]:
    """One run's median round, the coordinator's peak memory, and what the hostile site sent."""
    with tempfile.TemporaryDirectory(prefix="mailboat-hostile-") as folder:
        root = Path(folder)
        async with run_broker("mosquitto", root / "broker") as broker:
            write_toy(root, broker.url, sites=2, versions=versions, quorum=2, parameters=2_000_000)
            plan = SealedPlan.model_validate_json((root / "coordinator" / "plan.json").read_bytes())
            flood = HostileSite(broker.url, plan)
            flooding = asyncio.create_task(flood.run()) if hostile else None
            parties = [
                await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "tests.toys",
                    "coordinator" if name == "coordinator" else "site",
                    str(root / f"{name}.toml"),
                    stdout=asyncio.subprocess.DEVNULL,
                )
                for name in ("coordinator", "site-1", "site-2")
            ]
            watching = asyncio.create_task(_peak_mib(parties[0].pid))
            codes = [await party.wait() for party in parties]
            watching.cancel()
            if flooding is not None:
                flooding.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await flooding
        assert codes == [0, 0, 0], codes
        with Journal.open_read(root / "coordinator" / "journal.sqlite") as journal:
            times = [record.at for record in journal.replay() if isinstance(record, VersionCommitted)]
        rounds = [after - before for before, after in itertools.pairwise(times)]
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        return {
            "round_s": round(statistics.median(rounds), 3),
            "rounds": len(rounds),
            "coordinator_peak_mib": round(_PEAK.get(parties[0].pid, 0.0)),
            "hostile_messages": flood.sent,
        }


_PEAK: dict[int, float] = {}


async def _peak_mib(pid: int) -> None:
    """Note the peak memory of a process until it is gone."""
    while True:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    _PEAK[pid] = int(line.split()[1]) / 1024
        await asyncio.sleep(0.2)


async def compare(versions: int) -> dict[str, Any]:
    """Both runs, and how much the round grew."""
    alone = await measure(versions, hostile=False)
    beside = await measure(versions, hostile=True)
    return {"alone": alone, "beside": beside, "growth": round(beside["round_s"] / alone["round_s"] - 1, 3)}


def main() -> None:
    """Print the comparison, and write it where told."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--versions", type=int, default=12)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = asyncio.run(compare(given.versions))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
