"""`status.json`: what the coordinator knows now, for people and for `mailboat status`; never a basis for decisions."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from coordinator.core import Core
from shared.config import Mode
from shared.messages import Phase


class _Live(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteStatus(_Live):
    """One site, as it last said itself; byte counts are those of its own link."""

    present: bool
    phase: Phase | None
    version: int | None
    progress: float
    metrics: dict[str, float]
    bytes_up: int
    bytes_down: int
    outbox: int
    reconnects: int
    seen_at: float
    """Unix seconds."""


class LiveStatus(_Live):
    """The coordinator; `bytes_up` came in from the broker, `bytes_down` went out to it."""

    boot: str
    federation: str
    mode: Mode
    version: int
    target: int
    finished: bool
    connected: bool
    pending: int
    """Updates accepted and not yet merged."""
    merging: bool
    bytes_up: int
    bytes_down: int
    at: float
    """Unix seconds when this was written."""
    sites: dict[str, SiteStatus]
    held: str = ""
    """Why no update is taken for now: the disk has no room."""
    renewals: tuple[str, ...] = ()
    """Sites that have not said yet that they hold the newest grant that lies here for them."""


def live_status(
    core: Core,
    *,
    connected: bool,
    bytes_up: int,
    bytes_down: int,
    at: float,
    held: str = "",
    renewals: tuple[str, ...] = (),
) -> LiveStatus:
    """Sum up the core's state; counters and clock come from the shell."""
    present = core.sites.present
    sites = {}
    for name, site in core.sites.items():
        said = site.status
        sites[name] = SiteStatus(
            present=name in present,
            phase=said.phase if said else None,
            version=said.version if said else None,
            progress=said.progress if said else 0.0,
            metrics=said.metrics if said else {},
            bytes_up=said.bytes_up if said else 0,
            bytes_down=said.bytes_down if said else 0,
            outbox=said.outbox if said else 0,
            reconnects=said.reconnects if said else 0,
            seen_at=site.seen_at,
        )
    return LiveStatus(
        boot=core.boot,
        federation=core.federation.federation.name,
        mode=core.federation.aggregation.mode,
        version=core.ledger.version,
        target=core.federation.federation.versions,
        finished=core.ledger.finished,
        connected=connected,
        pending=len(core.ledger.pending),
        merging=core.merging,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        at=at,
        sites=sites,
        held=held,
        renewals=renewals,
    )
