"""Where a run stands, put together from the journal (what is certain) and `status.json` (what was so a moment ago)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from coordinator.status import LiveStatus, SiteStatus
from coordinator.views import RunView, SiteSummary, load_run, summarise_sites
from shared.config import FederationConfig
from shared.manifest import BLOCKS, Manifest
from shared.plan import blocks_from
from shared.store import FrameStore

ALIVE_S = 10.0
"""A coordinator writes its live view about twice a second; one that has not for this long is not running."""


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One site: what it says of itself and what the journal says of its updates."""

    site: str
    present: bool
    phase: str | None
    version: int | None
    progress: float
    outbox: int
    bytes_up: int
    bytes_down: int
    merged: int
    waiting: int
    rejected: int
    dropped: int
    blocks: int | None = None
    """Blocks that it trains, where these are not all of the plan's."""
    epsilon: float | None = None
    """What its trainings have cost each of its records by now, by its own ledger; None without privacy."""
    delta: float | None = None


@dataclass(frozen=True, slots=True)
class Overview:
    """A run; `running` and the sites' presence are as of `seen_at` (unix seconds, None without a live view)."""

    federation: str
    mode: str
    version: int
    target: int
    finished: bool
    running: bool
    connected: bool
    merging: bool
    pending: int
    bytes_up: int
    bytes_down: int
    state_digest: str
    seen_at: float | None
    waiting_for: str
    coordinator: str
    sites: tuple[SiteRow, ...]
    held: str = ""
    """Why the coordinator takes no update for now."""
    quarantined: int = 0
    """Updates that are kept apart until somebody has looked."""
    renewals: tuple[str, ...] = ()
    """Sites that have not said yet that they hold their newest grant."""
    chosen: tuple[int, ...] | None = None
    """The blocks that importance chose for the newest version; None before it did, and in other plans."""


def load_overview(storage: Path, federation: FederationConfig, *, now: float) -> Overview:
    """Read journal and live view; errors as `load_run`. A live view that is missing or torn is left out."""
    run = load_run(storage)
    found = overview(run, _live(storage / "status.json"), federation, now=now)
    return replace(found, chosen=_chosen(storage, run.current.state) if federation.layers.by_importance else None)


def overview(run: RunView, live: LiveStatus | None, federation: FederationConfig, *, now: float) -> Overview:
    """Put the two together; `now` in unix seconds."""
    running = live is not None and now - live.at < ALIVE_S
    connected = running and live is not None and live.connected
    merging = running and live is not None and live.merging
    rows = _rows(summarise_sites(run), live.sites if live else {}, federation.federation.sites, running=running)
    pending = sum(row.waiting for row in rows)
    return Overview(
        federation=federation.federation.name,
        mode=federation.aggregation.mode,
        version=run.current.version,
        target=federation.federation.versions,
        finished=run.finished_at is not None,
        running=running,
        connected=connected,
        merging=merging,
        pending=pending,
        bytes_up=live.bytes_up if live else 0,
        bytes_down=live.bytes_down if live else 0,
        state_digest=run.current.state.leads_to,
        seen_at=live.at if live else None,
        waiting_for=_waiting_for(
            run, rows, federation, running=running, connected=connected, merging=merging, pending=pending
        ),
        coordinator=_coordinator(live, running=running, connected=connected, now=now),
        sites=rows,
        held=live.held if running and live is not None else "",
        quarantined=sum(life.fate == "quarantined" for life in run.updates.values()),
        renewals=live.renewals if running and live is not None else (),
    )


def _chosen(storage: Path, state: Manifest) -> tuple[int, ...] | None:
    stored = FrameStore(storage / "states").get(state.transfer_id)
    if stored is None:
        return None
    with stored.open_tensors() as tensors:
        return blocks_from(tensors.header.metadata)


def _live(path: Path) -> LiveStatus | None:
    try:
        return LiveStatus.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _rows(
    told: tuple[SiteSummary, ...], live: dict[str, SiteStatus], invited: tuple[str, ...], *, running: bool
) -> tuple[SiteRow, ...]:
    summaries = {summary.site: summary for summary in told}
    names = sorted({*summaries, *live, *invited})
    return tuple(_row(name, summaries.get(name), live.get(name), running=running) for name in names)


def _row(name: str, summary: SiteSummary | None, live: SiteStatus | None, *, running: bool) -> SiteRow:
    return SiteRow(
        site=name,
        present=running and live is not None and live.present,
        phase=live.phase if live else None,
        version=live.version if live else None,
        progress=live.progress if live else 0.0,
        outbox=live.outbox if live else 0,
        bytes_up=live.bytes_up if live else 0,
        bytes_down=live.bytes_down if live else 0,
        merged=summary.merged if summary else 0,
        waiting=summary.waiting if summary else 0,
        rejected=summary.rejected if summary else 0,
        dropped=summary.dropped if summary else 0,
        blocks=int(live.metrics[BLOCKS]) if live and BLOCKS in live.metrics else None,
        epsilon=live.metrics.get("epsilon") if live else None,
        delta=live.metrics.get("delta") if live else None,
    )


def _coordinator(live: LiveStatus | None, *, running: bool, connected: bool, now: float) -> str:
    if live is None:
        return "has not run yet"
    if not running:
        return f"not running, last seen {_ago(now - live.at)}"
    return "running, connected to the broker" if connected else "running, NOT connected to the broker"


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} seconds ago"


def _waiting_for(
    run: RunView,
    rows: tuple[SiteRow, ...],
    federation: FederationConfig,
    *,
    running: bool,
    connected: bool,
    merging: bool,
    pending: int,
) -> str:
    if run.finished_at is not None:
        return "nothing: the run is complete"
    if not running:
        return "the coordinator: start it with `mailboat coordinator run`"
    if not connected:
        return "the broker"
    if merging:
        return f"version {run.current.version + 1}, which is being merged"
    present = [row for row in rows if row.present]
    if not present:
        return "sites: none is present"
    section = federation.aggregation
    if section.mode == "fedasync":
        return "the next update of any site"
    if section.mode == "fedbuff":
        return f"{max(0, section.buffer - pending)} more updates of {section.buffer}"
    late = [row.site for row in present if not row.waiting]
    if late:
        return f"updates of {', '.join(late)} (or {section.deadline_s:g} s, with {section.quorum} at least)"
    return f"{max(0, section.quorum - pending)} more updates"
