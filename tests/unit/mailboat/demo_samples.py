"""Facts of an imagined run, for the tests of what the demonstration shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from coordinator.records import Accepted, Contribution, Finished, Opened, Record, Rejected, VersionCommitted
from coordinator.status import LiveStatus, SiteStatus
from mailboat.demo.facts import Facts, ProcessState, Score, Traffic, with_records, with_status
from mailboat.demo.report import BrokerFacts, Result, count_wire
from mailboat.demo.wire import FullTransfer
from shared.manifest import Manifest, StateFacts


def state(version: int) -> bytes:
    """The manifest of a published state, as the journal keeps it."""
    return Manifest(
        transfer_id=f"{version:032x}",
        federation="demo-test",
        fingerprint="f" * 64,
        codec="bf16",
        group=2,
        slice_size=4096,
        file_size=4096,
        file_digest=f"{version:064x}",
        frame_lengths=(100,),
        frame_hashes=bytes(32),
        created=1.0,
        facts=StateFacts(version=version),
    ).to_bytes()


def opened() -> Opened:
    """The first record."""
    return Opened("f" * 64, "c" * 64, "e" * 64, state(0), "a" * 64)


def accepted(number: int, site: str, base: int) -> Accepted:
    """An update that arrived."""
    return Accepted(f"{number:032x}", site, base, 54, "b" * 64, "d" * 64, 1.0, 2.0)


def committed(version: int, *parts: tuple[int, str, int]) -> VersionCommitted:
    """A version made of (update number, site, staleness)."""
    contributions = tuple(
        Contribution(f"{number:032x}", site, version - 1 - late, late, 1 / len(parts)) for number, site, late in parts
    )
    return VersionCommitted(version, contributions, state(version), "a" * 64, None, 3.0)


RUN: tuple[Record, ...] = (
    opened(),
    accepted(1, "site-1", 0),
    accepted(2, "site-2", 0),
    committed(1, (1, "site-1", 0), (2, "site-2", 0)),
    accepted(3, "site-1", 1),
    Rejected(f"{4:032x}", "site-2", "b" * 64, "norm", "too large", 2.5),
    accepted(5, "site-3", 0),
    committed(2, (3, "site-1", 0), (5, "site-3", 1)),
    Finished(2, 4.0),
)
"""Two versions by three sites, one update a version late, one refused."""


def site_status(**changes: Any) -> SiteStatus:
    """A site that trains."""
    base = SiteStatus(
        present=True,
        phase="training",
        version=1,
        progress=0.4,
        metrics={"strict_f1": 0.512},
        bytes_up=1000,
        bytes_down=2000,
        outbox=0,
        reconnects=0,
        seen_at=5.0,
    )
    return base.model_copy(update=changes)


def live(sites: Mapping[str, SiteStatus]) -> LiveStatus:
    """The coordinator's live view with these sites in it."""
    return LiveStatus(
        boot="0" * 16,
        federation="demo-test",
        mode="sync",
        version=1,
        target=2,
        finished=False,
        connected=True,
        pending=0,
        merging=False,
        bytes_up=2500,
        bytes_down=5000,
        at=6.0,
        sites=dict(sites),
    )


PROCESSES: dict[str, ProcessState] = {"site-1": "ended", "site-2": "ended", "site-3": "ended", "site-4": "absent"}


def score(strict: float, lenient: float) -> Score:
    """The measures of the demonstration's own task."""
    return Score({"strict_f1": strict, "lenient_f1": lenient})


def run_facts() -> Facts:
    """The whole imagined run."""
    sites = {name: site_status(present=False, phase="done", version=2) for name in ("site-1", "site-2", "site-3")}
    facts = with_status(with_records(Facts(processes=PROCESSES), RUN), live(sites))
    scores = {0: score(0.01, 0.05), 1: score(0.40, 0.50), 2: score(0.612, 0.703)}
    return dataclasses.replace(facts, scores=scores)


def result(**changes: Any) -> Result:
    """What the run ended with."""
    facts = run_facts()
    whole = Result(
        facts=facts,
        mode="sync",
        codec="bf16",
        layers=(10, 11, 12, 13, 14, 15),
        trained_parameters=1_000_000,
        total_parameters=3_000_000,
        local_only={"site-1": score(0.5, 0.6), "site-2": score(0.52, 0.58), "site-3": score(0.4, 0.5)},
        centralized=score(0.64, 0.72),
        wire=count_wire(facts, FullTransfer(file_bytes=12_000, sent_bytes=12_100, received_bytes=12_200)),
        broker=BrokerFacts("mosquitto", "2.0.11", "mqtt://127.0.0.1:4711"),
        federated_s=41.0,
        wall_s=90.0,
    )
    return dataclasses.replace(whole, **changes)


__all__ = ["PROCESSES", "RUN", "Traffic", "accepted", "committed", "live", "result", "run_facts", "site_status"]
