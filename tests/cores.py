"""The coordinator's core on a bench: events in by hand, decisions out, time as the test says."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

from coordinator import decisions as d
from coordinator.core import Core
from coordinator.decisions import Instant
from coordinator.ledger import Ledger
from coordinator.merging import MergeResult, choosing
from coordinator.offers import UNRECORDED
from coordinator.records import Opened, Record
from shared.config import CoordinatorConfig, FederationConfig
from shared.manifest import Manifest
from shared.messages import Announce, Hello, Message, Offer, Presence, Receipt
from shared.transfer import Bitmap
from tests.factories import digest, make_federation, make_plan, make_state, make_step

STALL_S = 5.0
BOOT = "b" * 16
M = TypeVar("M", bound=Message)
J = TypeVar("J", bound=d.Job)


def session_of(name: str) -> str:
    """A session id that stands for whatever process `name` names."""
    return digest(f"session {name}")[:16]


def bits(size: int, *present: int) -> bytes:
    """The bitmap of these chunks as it travels."""
    return Bitmap(size, present).to_bytes()


class CoordinatorBench:
    """A core whose run is open at version 0; `records` is what the journal would hold."""

    def __init__(self, federation: FederationConfig | None = None, **config: Any) -> None:
        self.federation = federation or make_federation()
        self.plan = make_plan(self.federation)
        self.config = CoordinatorConfig.model_validate(
            {"federation": "f", "storage": "s", "link": {"stall_s": STALL_S, "window": 4}, **config}
        )
        self.now = 100.0
        self.records: list[Record] = []
        self.opened = Opened(
            self.plan.fingerprint,
            self.plan.config_sha256,
            self.plan.frozen_sha256,
            make_state(self.plan, 0).to_bytes(),
            digest("master 0"),
        )
        self.records.append(self.opened)
        self.core = self.boot()

    def boot(self, boot: str = BOOT) -> Core:
        """A core as it is after reading the journal."""
        self.core = Core(self.federation, self.plan, config=self.config, boot=boot)
        for record in self.records:
            self.core.apply(record)
        return self.core

    @property
    def state(self) -> Manifest:
        """The published state of the current version."""
        return make_state(self.plan, self.core.ledger.version)

    def handle(self, event: d.Event) -> d.Decision:
        """One event now."""
        decision = self.core.handle(event, Instant(self.now, 1e9 + self.now))
        self.records += decision.records
        self._check_told_after_recorded(decision)
        return decision

    def _check_told_after_recorded(self, decision: d.Decision) -> None:
        """Whatever a receipt says is in the journal by the time it is sent."""
        ledger = Ledger()
        for record in self.records:
            ledger.apply(record)
        for send in decision.sends:
            if isinstance(send.message, Receipt) and send.message.rule not in UNRECORDED:
                assert send.message == ledger.receipt(send.message.update_id)
            if isinstance(send.message, Announce):
                said = send.message
                assert (said.state_digest, said.final) == (ledger.newest.digest, ledger.finished)

    def receive(self, site: str, message: Message) -> d.Decision:
        """A message on the topic of `site`."""
        return self.handle(d.Received(site, message))

    def tick(self, seconds: float = 0.0) -> d.Decision:
        """Let time pass, then tick."""
        self.now += seconds
        return self.handle(d.Tick())

    def greeting(self, site: str, process: str = "", **changes: Any) -> Hello:
        """The hello of one process of a site that has heard the current announcement."""
        fields: dict[str, Any] = {
            "site": site,
            "session": session_of(process or site),
            "fingerprint": self.plan.fingerprint,
            "config_sha256": self.plan.config_sha256,
            "frozen_sha256": self.plan.frozen_sha256,
            "software": "test",
            "clock": 0.0,
            "heard": self.state.transfer_id,
            "heard_final": self.core.ledger.finished,
            **changes,
        }
        return Hello(**fields)

    def hello(self, site: str, process: str = "", **changes: Any) -> d.Decision:
        """That hello arrives."""
        return self.receive(site, self.greeting(site, process, **changes))

    def gone(self, site: str, process: str = "") -> d.Decision:
        """The broker says that a process of the site is away."""
        return self.receive(site, Presence(site=site, session=session_of(process or site), online=False))

    def upload(self, site: str, update: Manifest) -> d.Decision:
        """A site's update comes in whole and passes admission; the decision is that of its acceptance."""
        update_id = update.transfer_id
        assert d.OpenSpool(update) in self.receive(site, Offer(manifest=update)).jobs
        self.handle(d.SpoolOpened(update_id, bits(update.frames)))
        stored = self.handle(d.ChunksStored(update_id, tuple(range(update.frames))))
        assert d.Verify(update_id) in stored.jobs
        return self.handle(d.Verified(update_id, 1.0))

    def merged(self, decision: d.Decision, chosen: Collection[str] | None = None) -> d.Decision:
        """The merge that a decision started is done; of its updates those of the `chosen` sites counted (None: all)."""
        (merge,) = jobs(decision, d.Merge)
        counted = {part.update_id for part in merge.plan.contributions if chosen is None or part.site in chosen}
        version, parts = merge.plan.version, choosing(merge.plan, counted).recorded()
        steps = self.federation.codec.steps
        whole, step = make_state(self.plan, version), make_step(self.plan, version)
        anchor = whole if steps and not version % steps else None
        result = MergeResult(step if steps else whole, digest(f"master {version}"), None, parts, anchor)
        return self.handle(d.Merged(merge.plan, result))


def said(decision: d.Decision, kind: type[M], site: str | None = None) -> list[M]:
    """The messages of one kind that a decision sends to one site (or, without a site, to everybody)."""
    return [send.message for send in decision.sends if isinstance(send.message, kind) and send.site == site]


def jobs(decision: d.Decision, kind: type[J]) -> list[J]:
    """The jobs of one kind that a decision starts."""
    return [job for job in decision.jobs if isinstance(job, kind)]
