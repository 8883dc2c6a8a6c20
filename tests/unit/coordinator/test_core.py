"""The coordinator's decisions about sites, states, rounds and the end of the run; updates are in test_core_updates."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator import decisions as d
from coordinator.core import DOWNLINK_MERGE_S, IDLE_STALLS
from coordinator.records import VersionCommitted
from shared.messages import Announce, Message, Offer, Presence, Probe, Receipt, Refused, Status, Want, Welcome
from tests.cores import BOOT, STALL_S, CoordinatorBench, bits, jobs, said, session_of
from tests.factories import digest, make_federation, make_state, make_update, update_id_of


def _bench(versions: int = 3, config: dict[str, Any] | None = None, **aggregation: Any) -> CoordinatorBench:
    federation = make_federation(
        federation={"name": "ward", "versions": versions}, aggregation={"mode": "fedasync", **aggregation}
    )
    return CoordinatorBench(federation, **(config or {}))


def _update_of(bench: CoordinatorBench, site: str, **changes: Any) -> Any:
    return make_update(bench.plan, site, bench.state, **changes)


def _status(site: str, process: str = "", phase: Any = "training") -> Status:
    return Status(site=site, session=session_of(process or site), phase=phase, version=0)


# -- who speaks ---


def test_a_site_that_heard_the_latest_is_only_welcomed() -> None:
    """The answer to a hello names its session, our boot and our clock."""
    bench = _bench()
    assert bench.hello("north").sends == [
        d.Send("north", Welcome(session=session_of("north"), boot=BOOT, clock=1e9 + bench.now))
    ]
    assert bench.core.sites.present == {"north"}


@pytest.mark.parametrize("missed", [{"heard": None}, {"heard": "f" * 32}, {"heard_final": True}])
def test_a_site_that_missed_the_announcement_gets_it_again_alone(missed: dict[str, Any]) -> None:
    """A broker may lose what it retained; nobody else needs to hear it twice."""
    bench = _bench()
    decision = bench.hello("north", **missed)
    assert said(decision, Announce, "north") == [bench.core.announcement()]
    assert said(decision, Announce) == []


@pytest.mark.parametrize(
    ("changes", "rule", "words"),
    [
        ({"fingerprint": digest("x"), "config_sha256": digest("x")}, "other-config", ["federation.toml differs"]),
        (
            {"fingerprint": digest("x"), "frozen_sha256": digest("x")},
            "other-weights",
            ["frozen weights of the base model differ", digest("x")[:12], digest("frozen")[:12]],
        ),
        ({"fingerprint": digest("x")}, "other-plan", ["layer plan or the tokenizer differs"]),
        (
            {"fingerprint": digest("x"), "config_sha256": digest("x"), "frozen_sha256": digest("x")},
            "other-config",
            ["federation.toml differs"],
        ),
    ],
)
def test_a_site_of_another_federation_is_refused(changes: dict[str, Any], rule: str, words: list[str]) -> None:
    """The refusal names what differs, and the site does not count as present."""
    bench = _bench()
    decision = bench.hello("north", **changes)
    (refused,) = said(decision, Refused, "north")
    assert len(decision.sends) == 1
    assert (refused.session, refused.rule) == (session_of("north"), rule)
    assert all(word in refused.detail for word in words)
    assert bench.core.sites.present == frozenset()


def test_a_site_that_is_not_on_the_roster_is_refused() -> None:
    """[federation] sites is the list of those who may take part."""
    bench = CoordinatorBench(make_federation(federation={"name": "ward", "sites": ["north"]}))
    (refused,) = said(bench.hello("south"), Refused, "south")
    assert refused.rule == "unknown-site"
    assert refused.detail == "south is not in [federation] sites"
    assert said(bench.hello("north"), Welcome, "north")
    assert bench.core.sites.present == {"north"}


@pytest.mark.parametrize("liar", [True, False])
def test_who_speaks_is_told_by_the_topic(liar: bool) -> None:
    """A body that names another site than its topic has no effect at all."""
    bench = _bench()
    bench.hello("north")
    topic = "south" if liar else "north"
    messages: list[Message] = [
        _status("north"),
        Presence(site="north", session=session_of("north"), online=False),
    ]
    for message in messages:
        assert bench.receive(topic, message).sends == []
    assert (bench.core.sites.present == {"north"}) == liar
    assert (bench.core.sites["north"].status is None) == liar
    assert bool(bench.receive(topic, bench.greeting("north")).sends) != liar


def test_a_second_process_of_a_site_is_refused_when_the_first_answers() -> None:
    """The present one is probed, and its hello sends the other away."""
    bench = _bench()
    bench.hello("north", "A")
    assert bench.hello("north", "B").sends == [d.Send("north", Probe(session=session_of("A")))]
    answer = bench.hello("north", "A")
    assert [welcome.session for welcome in said(answer, Welcome, "north")] == [session_of("A")]
    (refused,) = said(answer, Refused, "north")
    assert (refused.session, refused.rule) == (session_of("B"), "duplicate-site")
    assert refused.detail == "another process already runs as site north"


def test_a_waiting_process_gets_no_second_probe() -> None:
    """While the probe is under way another hello of the newcomer changes nothing."""
    bench = _bench()
    bench.hello("north", "A")
    bench.hello("north", "B")
    assert bench.hello("north", "B").sends == []


def test_a_restarted_process_is_welcome_when_its_predecessor_is_silent() -> None:
    """After stall_s without an answer to repeated probes it takes over, and what comes back later is refused."""
    bench = _bench()
    bench.hello("north", "A")
    bench.hello("north", "B")
    for _ in range(3):
        assert bench.tick(STALL_S / 4).sends == [d.Send("north", Probe(session=session_of("A")))]
    bench.hello("north", "B")
    assert bench.tick(STALL_S / 4 - 0.1).sends == []
    assert [welcome.session for welcome in said(bench.tick(0.1), Welcome, "north")] == [session_of("B")]
    (refused,) = said(bench.hello("north", "A"), Refused, "north")
    assert (refused.session, refused.rule) == (session_of("A"), "duplicate-site")


def test_a_restarted_process_is_welcome_as_soon_as_its_predecessor_is_known_to_be_gone() -> None:
    """The broker's word of the old connection's end answers the probe."""
    bench = _bench()
    bench.hello("north", "A")
    bench.hello("north", "B")
    assert [welcome.session for welcome in said(bench.gone("north", "A"), Welcome, "north")] == [session_of("B")]
    assert bench.core.sites.present == {"north"}


def test_a_site_that_left_frees_its_upload_and_its_pull() -> None:
    """Credit and chunks go to those who are here."""
    bench = _bench()
    bench.hello("north")
    update = _update_of(bench, "north")
    bench.receive("north", Offer(manifest=update))
    bench.handle(d.SpoolOpened(update.transfer_id, bits(5)))
    bench.receive("north", Want(transfer_id=bench.state.transfer_id, have=bits(5), window=4))
    assert bench.core.uploads.reserved
    assert bench.core.downlink.active == {"north"}
    bench.gone("north", "some earlier process")
    assert bench.core.uploads.reserved
    assert bench.core.downlink.active
    assert bench.gone("north").jobs == [d.CloseSpool(update.transfer_id)]
    assert bench.core.uploads.reserved == 0
    assert bench.core.downlink.active == frozenset()


def test_only_the_process_that_speaks_for_a_site_describes_it() -> None:
    """A status of a process that waits, or was superseded, is not shown."""
    bench = _bench()
    bench.receive("north", _status("north", "A", "starting"))
    assert bench.core.sites["north"].status == _status("north", "A", "starting")
    bench.hello("north", "A")
    bench.receive("north", _status("north", "B", "failed"))
    assert bench.core.sites["north"].status == _status("north", "A", "starting")
    bench.receive("north", _status("north", "A"))
    assert bench.core.sites["north"].status == _status("north", "A")


@pytest.mark.parametrize(
    "message",
    [
        Presence(site="north", session=session_of("north"), online=True),
        Probe(session=session_of("north")),
        Welcome(session=session_of("north"), boot=BOOT, clock=0.0),
        Refused(session=session_of("north"), rule="x", detail=""),
        Receipt(update_id="0" * 32, manifest_sha256=digest("m"), outcome="accepted"),
    ],
)
def test_what_only_we_may_say_is_not_listened_to(message: Message) -> None:
    """Such a message from a site changes nothing and is not answered."""
    bench = _bench()
    for present in (set[str](), {"north"}):
        decision = bench.receive("north", message)
        assert (decision.records, decision.sends, decision.jobs) == ([], [], [])
        assert bench.core.sites.present == present
        bench.hello("north")


# -- states ---


def test_each_connection_repeats_the_announcement_to_everybody() -> None:
    """The broker may have lost what it retained; the announcement says all a site needs to start."""
    bench = _bench(versions=9)
    assert bench.handle(d.LinkUp()).sends == [
        d.Send(
            None,
            Announce(
                boot=BOOT,
                fingerprint=bench.plan.fingerprint,
                config_sha256=bench.plan.config_sha256,
                frozen_sha256=bench.plan.frozen_sha256,
                manifest=make_state(bench.plan, 0),
                final=False,
                target=9,
            ),
        )
    ]


def test_a_state_is_served_to_those_who_want_it() -> None:
    """A fresh pull waits a moment for others, then goes out."""
    bench = _bench()
    bench.hello("north")
    bench.hello("south")
    want = Want(transfer_id=bench.state.transfer_id, have=bits(5), window=4)
    assert bench.receive("north", want).jobs == []
    assert bench.tick(DOWNLINK_MERGE_S).jobs == [d.Serve(bench.state.transfer_id, "north", (0, 1, 2, 3))]


def test_an_older_state_is_still_served() -> None:
    """A site that is nearly through with it may finish its pull."""
    bench = _bench()
    older = bench.state
    bench.merged(bench.upload("north", _update_of(bench, "north")))
    bench.hello("south")
    want = Want(transfer_id=older.transfer_id, have=bits(5, 0, 1, 2), window=4)
    assert bench.receive("south", want).jobs == [d.Serve(older.transfer_id, "south", (3, 4))]


def test_a_state_that_was_never_published_is_not_served() -> None:
    """Nor is an update: nobody may pull another site's delta."""
    bench = _bench()
    update = _update_of(bench, "north")
    bench.upload("north", update)
    for wanted in ("f" * 32, update.transfer_id):
        answer = bench.receive("south", Want(transfer_id=wanted, have=b"", window=4))
        assert answer.jobs == []
        # Whoever asks for such a thing has heard of another run.
        assert said(answer, Announce, "south") == [bench.core.announcement()]
        assert bench.tick(DOWNLINK_MERGE_S).jobs == []


def test_a_dropped_link_forgets_pulls_and_keeps_uploads() -> None:
    """What was in flight to the sites is lost; what they sent us is on disk."""
    bench = _bench()
    bench.hello("north")
    update = _update_of(bench, "north")
    bench.receive("north", Offer(manifest=update))
    bench.handle(d.SpoolOpened(update.transfer_id, bits(5)))
    bench.receive("north", Want(transfer_id=bench.state.transfer_id, have=bits(5), window=4))
    assert bench.handle(d.LinkDown()) == d.Decision()
    assert bench.core.downlink.active == frozenset()
    assert bench.core.uploads.accepts("north", update.transfer_id, 0)


def test_quiet_uploads_and_pulls_are_given_up() -> None:
    """A few stall times without a sign of life, and credit and chunks go to others."""
    bench = _bench()
    bench.hello("north")
    update = _update_of(bench, "north")
    bench.receive("north", Offer(manifest=update))
    bench.handle(d.SpoolOpened(update.transfer_id, bits(5)))
    bench.receive("north", Want(transfer_id=bench.state.transfer_id, have=bits(5), window=4))
    bench.tick(IDLE_STALLS * STALL_S)
    assert bench.core.downlink.active == {"north"}
    assert bench.tick(0.1).jobs == [d.CloseSpool(update.transfer_id)]
    assert bench.core.downlink.active == frozenset()


# -- rounds ---


def test_one_merge_runs_at_a_time_and_the_next_follows_at_once() -> None:
    """What is accepted during a merge waits for the next one, which starts with the end of the one before."""
    bench = _bench()
    first, second = (_update_of(bench, site) for site in ("north", "south"))
    merging = bench.upload("north", first)
    assert [part.update_id for part in jobs(merging, d.Merge)[0].plan.contributions] == [first.transfer_id]
    assert bench.upload("south", second).jobs == []
    assert bench.tick(100.0).jobs == []
    (merge,) = jobs(bench.merged(merging), d.Merge)
    assert [part.update_id for part in merge.plan.contributions] == [second.transfer_id]
    assert merge.plan.version == 2
    assert merge.plan.contributions[0].staleness == 1
    assert merge.plan.contributions[0].base == (make_state(bench.plan, 0).transfer_id,)


def test_a_version_is_recorded_then_announced_then_receipted() -> None:
    """One decision: the record with what each update counted, the announcement, a receipt for each part."""
    bench = _bench(mode="sync", quorum=2, staleness={"kind": "constant"})
    updates = {site: _update_of(bench, site, examples=n) for site, n in (("north", 30), ("south", 10))}
    for site, update in updates.items():
        bench.upload(site, update)
    decision = bench.merged(bench.tick(STALL_S))
    (record,) = decision.records
    assert isinstance(record, VersionCommitted)
    assert record.version == 1
    assert record.state == make_state(bench.plan, 1).to_bytes()
    assert record.at == 1e9 + bench.now
    assert [(part.site, part.weight) for part in record.contributions] == [("north", 0.75), ("south", 0.25)]
    assert [send.site for send in decision.sends] == [None, "north", "south"]
    for site, weight in (("north", 0.75), ("south", 0.25)):
        (receipt,) = said(decision, Receipt, site)
        assert (receipt.outcome, receipt.version, receipt.staleness, receipt.weight) == ("merged", 1, 0, weight)
        assert receipt.update_id == updates[site].transfer_id


def test_a_sync_round_waits_until_presence_can_be_trusted() -> None:
    """Just after the start nobody has said hello yet; sites get stall_s to do so."""
    bench = _bench(mode="sync", quorum=1)
    bench.tick()
    bench.upload("north", _update_of(bench, "north"))
    assert bench.tick(STALL_S - 0.1).jobs == []
    assert jobs(bench.tick(0.1), d.Merge)


def test_a_present_site_is_waited_for_until_the_deadline() -> None:
    """The deadline counts from the announcement of the version, not from the start of the process."""
    bench = _bench(mode="sync", quorum=1, deadline_s=60.0)
    bench.hello("south")
    bench.tick()
    bench.upload("north", _update_of(bench, "north"))
    assert bench.tick(59.0).jobs == []
    bench.merged(bench.upload("south", _update_of(bench, "south")))
    bench.upload("north", _update_of(bench, "north"))
    assert bench.tick(59.0).jobs == []
    assert jobs(bench.tick(1.0), d.Merge)


def test_the_buffers_worth_of_the_oldest_is_merged() -> None:
    """What was accepted beyond it opens the next round."""
    bench = _bench(mode="fedbuff", buffer=2)
    updates = [_update_of(bench, f"site-{number}") for number in range(5)]
    bench.upload("site-0", updates[0])
    merging = bench.upload("site-1", updates[1])
    for number in (2, 3, 4):
        bench.upload(f"site-{number}", updates[number])
    (merge,) = jobs(bench.merged(merging), d.Merge)
    assert [part.update_id for part in merge.plan.contributions] == [update.transfer_id for update in updates[2:4]]


def test_who_is_present_stays_trusted_from_round_to_round() -> None:
    """Only the start of the process leaves it in doubt; the next round closes as soon as all are in."""
    bench = _bench(mode="sync", quorum=1)
    bench.hello("north")
    bench.tick()
    bench.upload("north", _update_of(bench, "north"))
    bench.merged(bench.tick(STALL_S))
    assert jobs(bench.upload("north", _update_of(bench, "north")), d.Merge)


@pytest.mark.parametrize("stale", [False, True])
def test_a_site_whose_update_was_rejected_is_not_waited_for(stale: bool) -> None:
    """It trains once on a version; only an update on an older one leaves more to come."""
    bench = _bench(mode="sync", quorum=1)
    bench.hello("south")
    bench.tick()
    if stale:
        old = _update_of(bench, "south", update_id=update_id_of("south", "old")).model_copy(update={"codec": "bf16"})
        bench.upload("south", _update_of(bench, "south"))
        bench.merged(bench.tick(STALL_S))
    else:
        old = _update_of(bench, "south").model_copy(update={"codec": "bf16"})
    bench.upload("north", _update_of(bench, "north"))
    assert bench.tick(STALL_S).jobs == []
    decision = bench.receive("south", Offer(manifest=old))
    assert bool(jobs(decision, d.Merge)) != stale


def test_each_version_asks_everybody_anew() -> None:
    """A rejection on one version does not excuse from the next."""
    bench = _bench(mode="sync", quorum=1)
    bench.hello("south")
    bench.tick()
    bench.upload("north", _update_of(bench, "north"))
    bad = _update_of(bench, "south").model_copy(update={"codec": "bf16"})
    bench.now += STALL_S
    bench.merged(bench.receive("south", Offer(manifest=bad)))
    bench.upload("north", _update_of(bench, "north"))
    assert bench.tick(STALL_S).jobs == []


def test_a_site_that_leaves_may_close_the_round() -> None:
    """The rule is looked at after every event, also after a departure."""
    bench = _bench(mode="sync", quorum=1)
    bench.hello("south")
    bench.tick()
    bench.upload("north", _update_of(bench, "north"))
    assert bench.tick(STALL_S).jobs == []
    assert jobs(bench.gone("south"), d.Merge)


def test_recovery_goes_on_where_the_journal_ends() -> None:
    """A merge that a crash interrupted is planned again, the same; sites in between are as if never seen."""
    bench = _bench()
    merging = bench.upload("north", _update_of(bench, "north"))
    before = bench.core
    after = bench.boot("c" * 16)
    assert (after.ledger.version, after.ledger.known, after.ledger.pending) == (
        before.ledger.version,
        before.ledger.known,
        before.ledger.pending,
    )
    assert bench.tick().jobs == merging.jobs
    assert after.announcement().boot == "c" * 16
