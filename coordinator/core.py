"""The coordinator's decisions: events in, Decision out; no I/O, no clock, no tensors.

Theory of operation
-------------------
State is of two kinds. *Durable* state (which version is current, what became of each update) is the ledger's, and only
records change it; replaying the journal through `apply` gives it back. *Volatile* state (who is present, which chunks
are on their way) is lost with the process and built anew from what sites say after they see our announcement.

An update's life here:

    unknown --Offer--> on its way (uploads) --Verified--> Accepted --merge--> VersionCommitted
                                            --VerifyFailed--> Rejected      --run over--> Dropped

Where updates are weighed by their loss, Validated comes after Verified, and only then the record of acceptance.

An offer of a known id gets the receipt again, whatever else is going on. One merge runs at a time; unsent receipts
need no list, because a site repeats its offer until it has the receipt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import assert_never

from coordinator import decisions as d
from coordinator.announcing import announced
from coordinator.decisions import Instant
from coordinator.downlink import Downlink
from coordinator.intake import Intake
from coordinator.ledger import Ledger
from coordinator.merging import committed, in_order, plan_merge
from coordinator.offers import OVERTAKEN, REUSED, check_id, objection, unrecorded
from coordinator.records import Dropped, Finished, Quarantined, Record, Rejected, Released, Signed, acceptance
from coordinator.rounds import RoundView, punctuality, updates_to_merge
from coordinator.sites import Claim, Sites, stranger
from coordinator.uploads import Upload, Uploads
from shared.config import CoordinatorConfig, FederationConfig
from shared.errors import RefusedError
from shared.manifest import Manifest, UpdateFacts
from shared.messages import (
    LOST,
    Announce,
    Head,
    Hello,
    Message,
    Offer,
    Presence,
    Probe,
    Refused,
    Status,
    Wait,
    Want,
    Welcome,
)
from shared.plan import SealedPlan

DOWNLINK_MERGE_S = 0.3
"""How long a fresh pull waits for others to join it."""

IDLE_STALLS = 3
"""An upload or pull that shows no sign of life for this many stall times gives its credit back."""


class Core:
    """See the module's docstring; `boot` is this process's session id.

    `attest` (`Guard.attest`) says under whose signed membership an update counts, and refuses one that nobody signed.
    """

    def __init__(
        self,
        federation: FederationConfig,
        plan: SealedPlan,
        *,
        config: CoordinatorConfig,
        boot: str,
        attest: Callable[[Manifest], bytes | None] = lambda _manifest: None,
    ) -> None:
        link = config.link
        self._attest = attest
        self.federation = federation
        self.plan = plan
        self.boot = boot
        self.settle_s = link.stall_s
        # What a site needs at the longest to notice that its link is dead and to connect again.
        self.back_within_s = link.stall_s + link.backoff_cap_s
        # By then the broker has said that a process is gone, unless it dropped the word.
        self.quiet_s = 1.5 * link.keepalive_s + self.back_within_s
        self.exit_when_done = config.exit_when_done
        idle_s = IDLE_STALLS * link.stall_s
        self.ledger = Ledger()
        # What follows is lost with the process.
        self.sites = Sites(probe_s=link.stall_s)
        self.intake = Intake(config.admission)
        self.uploads = Uploads(budget_bytes=config.credit_mib << 20, window=link.window, idle_s=idle_s)
        self.downlink = Downlink(merge_s=DOWNLINK_MERGE_S, idle_s=idle_s, stall_s=link.stall_s, window=link.window)
        self._started: float | None = None
        self._round_opened = 0.0
        self._answered: set[str] = set()
        self.merging = False

    def apply(self, record: Record) -> None:
        """Take one fact from the journal: recovery is this, for each record in order."""
        self.ledger.apply(record)
        self.intake.saw(record)

    def _record(self, out: d.Decision, record: Record) -> None:
        out.records.append(record)
        self.apply(record)

    # -- events ---

    def handle(self, event: d.Event, now: Instant) -> d.Decision:
        """Decide; see `coordinator.decisions` for what the shell owes in return."""
        if self._started is None:
            self._started = self._round_opened = now.mono
        out = d.Decision()
        match event:
            case d.LinkUp():
                out.sends.append(d.Send(None, self.announcement()))
                self.uploads.link_up(now.mono, out)
            case d.LinkDown():
                self.downlink.reset()
            case d.Received():
                self._receive(event.site, event.message, now, out)
            case d.SpoolOpened() | d.ChunksStored() | d.Verified() | d.Validated() | d.VerifyFailed() | d.Postponed():
                self._on_upload(event, now, out)
            case d.Merged():
                self._merged(event, now, out)
            case d.Ruled():
                self._ruled(event, now, out)
            case d.Tick():
                self._tick(now, out)
            case _:
                assert_never(event)
        if out.records:
            self._close_round(now, out)
        return out

    def signed(self, head: Head, member: bytes, at: float) -> d.Decision:
        """The head of the chain was signed, with the key of that membership, at `at` (unix seconds): tell the sites."""
        out = d.Decision()
        self._record(out, Signed(head.version, head.seq, head.head, head.signature, member, at))
        for name in sorted(self.sites.present):
            out.to(name, head)
        return out

    def _on_upload(self, event: d.UploadEvent, now: Instant, out: d.Decision) -> None:
        match event:
            case d.SpoolOpened():
                self.uploads.opened(event.transfer_id, event.have, now.mono, out)
            case d.ChunksStored():
                self.uploads.stored(event.transfer_id, event.indices, now.mono, out)
            case d.Verified():
                self._verified(event, now, out)
            case d.Validated():
                self._admitted(event.update_id, event.norm, event.loss, now, out)
            case d.VerifyFailed():
                self._verify_failed(event, now, out)
            case d.Postponed():
                self.uploads.postpone(event, now.mono, out)

    def announcement(self) -> Announce:
        """The retained word about the current version."""
        whole, steps = announced(self.ledger)
        return Announce(
            boot=self.boot,
            fingerprint=self.plan.fingerprint,
            config_sha256=self.plan.config_sha256,
            frozen_sha256=self.plan.frozen_sha256,
            manifest=whole,
            final=self.ledger.finished,
            target=self.federation.federation.versions,
            steps=steps,
        )

    def _receive(self, name: str, message: Message, now: Instant, out: d.Decision) -> None:
        if isinstance(message, Hello | Status | Presence) and message.site != name:
            return  # the topic says who speaks; a body that says otherwise is not worth an answer
        site = self.sites.heard(name, now)
        match message:
            case Hello():
                self._hello(name, message, now, out)
            case Presence(online=False):
                self._gone(name, message.session, now, out)
            case Status():
                if site.session in {None, message.session}:
                    site.status = message
            case Offer():
                self._offer(name, message.manifest, now, out)
            case Want():
                self._want(name, message, now, out)
            case _:
                pass  # presence online (hello says it better), or a message that only we may send

    # -- who speaks ---

    def _hello(self, name: str, hello: Hello, now: Instant, out: d.Decision) -> None:
        refusal = stranger(name, hello, self.plan, self.federation)
        if refusal is not None:
            rule, detail = refusal
            out.to(name, Refused(session=hello.session, rule=rule, detail=detail))
            return
        claim, other = self.sites.hello(name, hello.session, now.mono)
        if claim is Claim.PROBE and other is not None:
            out.to(name, Probe(session=other))
        elif claim is Claim.REFUSE:
            self._refuse_double(name, hello.session, out)
        elif claim is Claim.WELCOME:
            self._welcome(name, hello.session, now, out)
            if (hello.heard, hello.heard_final) != (self.ledger.newest.digest[:32], self.ledger.finished):
                out.to(name, self.announcement())
            if other is not None:
                self._refuse_double(name, other, out)

    def _welcome(self, name: str, session: str, now: Instant, out: d.Decision) -> None:
        out.to(name, Welcome(session=session, boot=self.boot, clock=now.wall))
        for update_id in self._lost.get(name, ()):
            out.to(name, self.ledger.receipt(update_id))
        signed = self.ledger.signed
        if signed is not None:
            out.to(name, Head(version=signed.version, seq=signed.seq, head=signed.head, signature=signed.signature))

    @cached_property
    def _lost(self) -> dict[str, list[str]]:
        return self.ledger.by_rule(LOST)  # read once: updates are given up only while no coordinator runs

    def _refuse_double(self, name: str, session: str, out: d.Decision) -> None:
        detail = f"another process already runs as site {name}"
        out.to(name, Refused(session=session, rule="duplicate-site", detail=detail))

    def _gone(self, name: str, session: str, now: Instant, out: d.Decision) -> None:
        was_speaking = self.sites[name].session == session
        promoted = self.sites.left(name, session, now.mono)
        if was_speaking:
            self.uploads.site_gone(name, now.mono, out)
            self.downlink.site_gone(name)
            self._close_round(now, out)
        if promoted is not None:
            self._welcome(name, promoted, now, out)

    # -- updates ---

    def _offer(self, name: str, manifest: Manifest, now: Instant, out: d.Decision) -> None:
        try:
            check_id(manifest, site=name)
        except RefusedError as foreign:  # no record: whose id this is, may still offer it
            out.to(name, unrecorded(manifest, foreign.rule, foreign.message))
            return
        known = self.ledger.known.get(manifest.transfer_id)
        if known is not None:
            same = known.manifest_sha256 == manifest.digest
            out.to(name, self.ledger.receipt(manifest.transfer_id) if same else unrecorded(manifest, *REUSED))
            return
        under_way = self.uploads.get(manifest.transfer_id)
        if under_way is not None and under_way.manifest != manifest:
            out.to(name, unrecorded(manifest, *REUSED))
            return
        late = None if under_way is not None else self.intake.put_off(name, manifest, now.mono)
        if late is not None:  # also when it would be refused: each refusal is a row of the journal
            why, retry_s = late
            out.to(name, Wait(transfer_id=manifest.transfer_id, rule=why.rule, detail=why.message, retry_s=retry_s))
            return
        refusal = objection(
            manifest, site=name, plan=self.plan, federation=self.federation, ledger=self.ledger, attest=self._attest
        )
        in_admission = under_way is not None and under_way.receiver.complete
        if refusal is not None and not in_admission:
            self._reject(name, manifest, refusal, now, out)
            if refusal.rule in OVERTAKEN:
                # An earlier attempt may have left some of it, or be under way still.
                self.uploads.settle(manifest.transfer_id, now.mono, out)
                out.jobs.append(d.Discard(manifest.transfer_id))
            return
        self.uploads.offer(name, manifest, now.mono, out)

    def _reject(self, name: str, manifest: Manifest, why: RefusedError, now: Instant, out: d.Decision) -> None:
        update_id = manifest.transfer_id
        self._record(out, Rejected(update_id, name, manifest.digest, why.rule, why.message[:500], now.wall))
        out.to(name, self.ledger.receipt(update_id))
        if isinstance(manifest.facts, UpdateFacts) and manifest.facts.base_version == self.ledger.version:
            self._answered.add(name)

    def _verified(self, event: d.Verified, now: Instant, out: d.Decision) -> None:
        upload = self.uploads.get(event.update_id)
        if upload is None or self.federation.aggregation.quality == "none" or self.ledger.finished:
            self._admitted(event.update_id, event.norm, None, now, out)
            return
        base = self.ledger.parts(upload.manifest.update.base_version)
        out.jobs.append(d.Validate(event.update_id, event.norm, base))

    def _admitted(self, update_id: str, norm: float, loss: float | None, now: Instant, out: d.Decision) -> None:
        upload = self.uploads.settle(update_id, now.mono, out)
        if upload is None or update_id in self.ledger.known:
            return
        try:
            if self.ledger.finished:
                raise RefusedError(f"the run was complete at version {self.ledger.version}", rule="run-complete")
            if loss is not None and not math.isfinite(loss):
                raise RefusedError("on the coordinator's notes its loss is not finite", rule="loss-not-finite")
            self._accept(upload, norm, loss, now, out)
        except RefusedError as why:
            self._reject(upload.site, upload.manifest, why, now, out)
            out.jobs.append(d.Discard(update_id))
            return
        out.to(upload.site, self.ledger.receipt(update_id))

    def _accept(self, upload: Upload, norm: float, loss: float | None, now: Instant, out: d.Decision) -> None:
        manifest, member = upload.manifest, self._attest(upload.manifest)
        odd = self.intake.objection(manifest.update.examples, norm)
        for record in acceptance(manifest, norm, now.wall, member=member, loss=loss):
            self._record(out, record)
        if odd is not None:
            self._record(out, Quarantined(manifest.transfer_id, odd.rule, odd.message, now.wall))
            if manifest.update.base_version == self.ledger.version:
                self._answered.add(upload.site)  # a round does not wait for what a person has to look at

    def _ruled(self, event: d.Ruled, now: Instant, out: d.Decision) -> None:
        update = self.ledger.quarantined.get(event.update_id)
        if update is None:
            return
        late = self.ledger.version - update.base_version > self.federation.aggregation.staleness.limit
        if event.release and not late:
            self._record(out, Released(event.update_id, now.wall))
        else:
            rule = "too-stale" if event.release else "quarantine"
            self._record(out, Dropped(event.update_id, rule, now.wall))
        out.to(update.site, self.ledger.receipt(event.update_id))

    def _verify_failed(self, event: d.VerifyFailed, now: Instant, out: d.Decision) -> None:
        upload = self.uploads.settle(event.update_id, now.mono, out)
        if upload is None or event.update_id in self.ledger.known:
            return
        self._reject(upload.site, upload.manifest, RefusedError(event.detail, rule=event.rule), now, out)
        out.jobs.append(d.Discard(event.update_id))

    # -- states and rounds ---

    def _want(self, name: str, want: Want, now: Instant, out: d.Decision) -> None:
        manifest = self.ledger.transfers.get(want.transfer_id)
        if manifest is None:
            out.to(name, self.announcement())  # the broker kept one of another run, perhaps
        else:
            self.downlink.want(name, want, manifest, self.sites.present, now.mono, out)

    def _close_round(self, now: Instant, out: d.Decision) -> None:
        """Start the next merge when the round's rule says so; what was recorded, who left, and time may bring it about.

        It looks at all sites, so nothing that comes with each chunk of each of them may lead here.
        """
        if self.merging or self.ledger.finished or not self.ledger.pending or self._started is None:
            return
        view = RoundView(
            version=self.ledger.version,
            pending=self.ledger.pending,
            awaited=self.sites.awaited,
            answered=frozenset(self._answered),
            open_s=now.mono - self._round_opened,
            settled=now.mono - self._started >= self.settle_s,
        )
        section = self.federation.aggregation
        if count := updates_to_merge(view, section):
            self.merging = True
            self.sites.punctual(*punctuality(view, section))
            ledger = self.ledger
            merged, known, losses = in_order(ledger.pending[:count]), ledger.known, ledger.losses
            plan = plan_merge(ledger.version + 1, merged, section, ledger.parts, known=known, losses=losses)
            out.jobs.append(d.Merge(plan))

    def _merged(self, event: d.Merged, now: Instant, out: d.Decision) -> None:
        assert self.merging
        self.merging = False
        self._round_opened = now.mono
        self._answered.clear()
        for record in committed(event.plan, event.result, self.federation.aggregation, now.wall):
            self._record(out, record)
        if self.ledger.version >= self.federation.federation.versions:
            for update in [*self.ledger.pending, *self.ledger.quarantined.values()]:
                self._record(out, Dropped(update.update_id, "run-complete", now.wall))
                out.to(update.site, self.ledger.receipt(update.update_id))
            self._record(out, Finished(self.ledger.version, now.wall))
        out.sends.append(d.Send(None, self.announcement()))
        for part in event.result.contributions:
            out.to(part.site, self.ledger.receipt(part.update_id))

    def _tick(self, now: Instant, out: d.Decision) -> None:
        for name, session in self.sites.unanswered(now.mono):
            out.to(name, Probe(session=session))
        for name, session in self.sites.silent(now.mono):
            self._welcome(name, session, now, out)
        self.uploads.tick(now.mono, out)
        self.downlink.tick(self.sites.present, now.mono, out)
        self._close_round(now, out)
        if self.ledger.finished and self.exit_when_done and now.mono - self._round_opened >= self.settle_s:
            for name, session in self.sites.quiet(now.mono, for_s=self.quiet_s):
                out.to(name, Probe(session=session))
            if not self.sites.expected(now.mono, back_within_s=self.back_within_s):
                out.jobs.append(d.Stop())
