"""What a demonstration ends with: tables for people, JSON for scripts. Both from one `Result`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from coordinator.records import VersionCommitted
from mailboat.console import measure_title
from mailboat.demo.facts import Facts, Score
from mailboat.demo.screen import points, size
from mailboat.demo.wire import FullTransfer
from shared.manifest import manifest_from_bytes


@dataclass(frozen=True, slots=True)
class Wire:
    """Bytes as counted: PUBLISH packets at the sites' links, and one measured transfer of the full model."""

    up: int
    down: int
    uplink_transfers: int
    downlink_transfers: int
    full: FullTransfer

    @property
    def full_fedavg(self) -> int:
        """What full-model FedAvg takes for as many transfers: the measured one, times their number, each way."""
        return self.uplink_transfers * self.full.sent_bytes + self.downlink_transfers * self.full.received_bytes

    @property
    def saving(self) -> float:
        """Share of full-model FedAvg's bytes that this run did not send."""
        return 1 - (self.up + self.down) / self.full_fedavg


@dataclass(frozen=True, slots=True)
class BrokerFacts:
    """Which broker carried the run; `version` is empty for one that ran before."""

    kind: str
    version: str
    url: str


@dataclass(frozen=True, slots=True)
class Result:
    """A demonstration that ended well."""

    facts: Facts
    mode: str
    codec: str
    layers: tuple[int, ...]
    trained_parameters: int
    total_parameters: int
    local_only: Mapping[str, Score]
    """Each site trained alone; empty when no baselines were wanted."""
    centralized: Score | None
    wire: Wire
    broker: BrokerFacts
    federated_s: float
    """From the start of the coordinator to the last version."""
    wall_s: float

    @property
    def base(self) -> Score:
        """The base model with its seeded head, before any training."""
        return self.facts.scores[0]

    @property
    def federated(self) -> Score:
        """The last version."""
        return self.facts.scores[self.facts.version]

    @property
    def best_alone(self) -> tuple[str, Score] | None:
        """The site that does best alone, by the task's main measure, on the same held-out notes as everybody."""
        if not self.local_only:
            return None
        return max(self.local_only.items(), key=lambda item: item[1].main)


def count_wire(facts: Facts, full: FullTransfer) -> Wire:
    """Sum up the links of all sites."""
    return Wire(
        up=sum(traffic.up.total for traffic in facts.traffic.values()),
        down=sum(traffic.down.total for traffic in facts.traffic.values()),
        uplink_transfers=facts.uplink_transfers,
        downlink_transfers=facts.downlink_transfers,
        full=full,
    )


# -- for scripts ---


def to_json(result: Result) -> dict[str, Any]:
    """Return plain values; every F1 is 0 to 1, every size is in bytes."""
    facts, wire = result.facts, result.wire
    opened = facts.opened
    assert opened is not None, "a run that ended was opened"
    first = {"version": 0, **_score(result.base), "state_digest": manifest_from_bytes(opened.state).leads_to}
    return {
        "versions": [{**first, "contributions": []}, *(_version(facts, version) for version in facts.versions)],
        "local_only": {site: _score(score) for site, score in sorted(result.local_only.items())},
        "centralized": _score(result.centralized) if result.centralized else None,
        "bytes": {
            "up": wire.up,
            "down": wire.down,
            "full_fedavg": wire.full_fedavg,
            "saving": wire.saving,
            "uplink_transfers": wire.uplink_transfers,
            "downlink_transfers": wire.downlink_transfers,
            "full_transfer_sent": wire.full.sent_bytes,
            "full_transfer_received": wire.full.received_bytes,
            "full_model_file": wire.full.file_bytes,
        },
        "broker": {"kind": result.broker.kind, "version": result.broker.version, "url": result.broker.url},
        "mode": result.mode,
        "codec": result.codec,
        "layers": list(result.layers),
        "trained_parameters": result.trained_parameters,
        "total_parameters": result.total_parameters,
        "federated_s": round(result.federated_s, 2),
        "wall_s": round(result.wall_s, 2),
    }


def _score(score: Score) -> dict[str, float]:
    return dict(score.measures)


def _version(facts: Facts, version: VersionCommitted) -> dict[str, Any]:
    return {
        "version": version.version,
        **_score(facts.scores[version.version]),
        "state_digest": manifest_from_bytes(version.state).leads_to,
        "contributions": [
            {
                "update_id": part.update_id,
                "site": part.site,
                "base_version": part.base_version,
                "staleness": part.staleness,
                "weight": part.weight,
            }
            for part in version.contributions
        ],
    }


# -- for people ---


def version_table(result: Result) -> Table:
    """Each version: who had a part in it, and its F1."""
    table = Table(title="Versions, scored on the pooled held-out notes", box=box.SIMPLE, title_justify="left")
    for title in ("version", *_titles(result)):
        table.add_column(title, justify="right")
    table.add_column("made of (versions late)")
    table.add_row("0", *_cells(result.base), "the base model")
    for version in result.facts.versions:
        score = result.facts.scores[version.version]
        parts = ", ".join(f"{part.site} ({part.staleness})" for part in version.contributions)
        table.add_row(str(version.version), *_cells(score), parts)
    return table


def _titles(result: Result) -> list[str]:
    """The measures' names for people, the main one first."""
    return [measure_title(name) for name in result.base.measures]


def _cells(score: Score) -> list[str]:
    return [points(value) for value in score.measures.values()]


def comparison_table(result: Result) -> Table:
    """The last version against what each site could do without the others, and against what nobody may do."""
    table = Table(title="Compared, on the same notes", box=box.SIMPLE, title_justify="left")
    table.add_column("model")
    for title in _titles(result):
        table.add_column(title, justify="right")
    table.add_row("base model", *_cells(result.base))
    best = result.best_alone
    for site, score in sorted(result.local_only.items()):
        label = f"{site} alone" + (", the best single site" if best and site == best[0] else "")
        table.add_row(label, *_cells(score))
    federated = result.federated
    label = f"federated, version {result.facts.version}"
    table.add_row(label, *_cells(federated), style="bold")
    if result.centralized is not None:
        central = result.centralized
        table.add_row("centralized, all notes in one place", *_cells(central))
    return table


def wire_table(result: Result) -> Table:
    """What was counted on the wire, and how the comparison was measured."""
    wire = result.wire
    table = Table(title="Bytes on the wire, counted at the sites' links", box=box.SIMPLE, title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("how it was counted")
    table.add_row("up, all sites", size(wire.up), f"every PUBLISH packet; {wire.uplink_transfers} updates arrived")
    table.add_row("down, all sites", size(wire.down), f"the same; {wire.downlink_transfers} states were pulled")
    table.add_row(
        "full-model FedAvg",
        size(wire.full_fedavg),
        f"measured: one float32 transfer of all {result.total_parameters:,} parameters over this broker took "
        f"{size(wire.full.sent_bytes)}; times {wire.uplink_transfers} up and {wire.downlink_transfers} down",
    )
    table.add_row("saved", f"{wire.saving:.1%}", "of full-model FedAvg's bytes", style="bold")
    return table


def verdict(result: Result) -> list[str]:
    """Return the outcome in sentences, whichever way it went."""
    lines = []
    reached, title = result.federated.main, _titles(result)[0]
    title = title[0].upper() + title[1:]
    if result.best_alone is not None:
        site, score = result.best_alone
        lines.append(f"{title} {_gap(reached - score.main)} the best single site ({site}) trained alone.")
    if result.centralized is not None:
        lines.append(f"{title} {_gap(reached - result.centralized.main)} centralized training on pooled notes.")
    return lines


def _gap(difference: float) -> str:
    side = "above" if difference >= 0 else "below"
    return f"{points(abs(difference))} points {side}"
