"""A site's decisions about its link, its pulls and its training; pushing is in test_session_push."""

from __future__ import annotations

from typing import Any

import pytest

from edge_client import decisions as d
from edge_client.session import ANEW_S, IDLE_HELLO_S
from shared.messages import Hello, Probe, Refused, Want, Welcome
from tests.sessions import BOOT, CAP_S, REBOOT, SESSION, STALL_S, SessionBench, jobs, other_digest, sent

# -- link ---


def test_each_connection_begins_with_a_hello() -> None:
    """It says who we are, which federation we think this is, and what we heard last."""
    bench = SessionBench()
    (hello,) = bench.handle(d.LinkUp()).sends
    assert hello == Hello(
        site="north",
        session=SESSION,
        fingerprint=bench.plan.fingerprint,
        config_sha256=bench.plan.config_sha256,
        frozen_sha256=bench.plan.frozen_sha256,
        software="test",
        clock=1e9 + bench.now,
        heard=None,
        heard_final=False,
    )
    bench.handle(d.LinkDown())
    bench.announce(bench.state(2), final=True)
    (hello,) = sent(bench.handle(d.LinkUp()), Hello)
    assert (hello.heard, hello.heard_final) == (bench.state(2).transfer_id, True)


def test_the_same_announcement_again_restarts_the_pull() -> None:
    """The coordinator says it when its link is back: what it had sent is lost. Another one does not."""
    bench = SessionBench()
    bench.connect()
    bench.announce(bench.state(0))
    bench.opened(bench.state(0))
    assert sent(bench.announce(bench.state(0)), Want) == []  # a doubled one: it has just been asked for
    bench.now += ANEW_S
    wants = [sent(bench.announce(bench.state(0), target=target), Want) for target in (3, 4)]
    assert [[want.restart for want in some] for some in wants] == [[True], []]


def test_hello_is_repeated_until_welcome_ever_more_slowly() -> None:
    """After 5 s, 10 more, then each 15: nobody answers, and a thousand sites do not drum on the broker."""
    bench = SessionBench()
    bench.handle(d.LinkUp())
    assert [(at, type(message)) for at, message in bench.ticks(59)] == [
        (at, Hello) for at in (STALL_S, STALL_S + 10, STALL_S + 10 + CAP_S, STALL_S + 10 + 2 * CAP_S)
    ]
    bench.welcome()
    assert bench.ticks(IDLE_HELLO_S - 1) == []


def test_nothing_is_said_without_a_link() -> None:
    """Whatever is waited for, it waits for the connection."""
    bench = SessionBench(outbox=[SessionBench().update()])
    assert bench.ticks(60) == []
    bench.connect()
    bench.handle(d.LinkDown())
    assert bench.ticks(60) == []


def test_a_welcome_for_another_process_is_not_ours() -> None:
    """The topic is shared by all processes of this name; each listens for its own session."""
    bench = SessionBench()
    bench.handle(d.LinkUp())
    bench.receive(Welcome(session="f" * 16, boot=BOOT, clock=0.0))
    assert not bench.session.welcome
    bench.welcome()
    assert bench.session.welcome


def test_a_probe_is_answered_with_a_hello() -> None:
    """Another process claims the name; ours says that it lives. A probe for another one is not answered."""
    bench = SessionBench()
    bench.connect()
    bench.now += 100
    assert [type(message) for message in bench.receive(Probe(session=SESSION)).sends] == [Hello]
    assert bench.ticks(STALL_S - 1) == []
    assert bench.receive(Probe(session="f" * 16)).sends == []


def test_a_refusal_ends_the_process_with_its_rule() -> None:
    """A refusal for this session is final; one for another session is not ours."""
    bench = SessionBench()
    bench.handle(d.LinkUp())
    assert bench.receive(Refused(session="f" * 16, rule="other-plan", detail="")).jobs == []
    refused = bench.receive(Refused(session=SESSION, rule="other-plan", detail="the plan differs"))
    assert refused.jobs == [d.Exit("other-plan", "the plan differs")]


def test_a_coordinator_that_boots_anew_is_greeted() -> None:
    """It knows nothing of us; until its welcome we are not welcome, and nothing is offered."""
    bench = SessionBench(outbox=[SessionBench().update()])
    bench.connect()
    bench.announce(boot=BOOT)
    assert bench.session.push is not None
    assert bench.announce(boot=BOOT).sends == []
    assert [type(message) for message in bench.announce(boot=REBOOT).sends] == [Hello]
    assert not bench.session.welcome
    assert bench.session.push is None
    assert bench.announce(boot=REBOOT).sends == []
    assert bench.ticks(STALL_S)[-1][0] == STALL_S  # and again when the hello is lost
    assert sent(bench.welcome(REBOOT), Want) == []
    assert bench.session.push is not None


def test_an_announcement_before_the_first_welcome_needs_no_second_hello() -> None:
    """The retained one comes with the subscription, while our hello is on its way."""
    bench = SessionBench()
    for boot in (BOOT, REBOOT):  # also when the coordinator restarted while we were away
        bench.handle(d.LinkUp())
        assert bench.announce(boot=boot).sends == []
        bench.welcome(boot)
        bench.handle(d.LinkDown())


def test_an_announcement_of_another_federation_is_ignored() -> None:
    """It may be retained from an earlier run; the answer to our hello decides."""
    bench = SessionBench()
    bench.connect()
    assert bench.announce(fingerprint=other_digest(), final=True) == d.Decision()
    assert bench.session.announced is None


def test_an_idle_site_says_hello_now_and_then() -> None:
    """In case the broker lost an announcement; not while it has something to do."""
    bench = SessionBench(trained={SessionBench().state(version).file_digest for version in (0, 1)})
    bench.connect()
    bench.announce()
    bench.pulled(bench.state())
    assert bench.session.phase == "waiting"
    assert [(at, type(message)) for at, message in bench.ticks(IDLE_HELLO_S)] == [(IDLE_HELLO_S, Hello)]
    assert bench.ticks(STALL_S - 1) == []  # its answer is waited for like any other
    bench.welcome()
    bench.announce(bench.state(1))
    bench.opened(bench.state(1))
    assert Hello not in {type(message) for _, message in bench.ticks(2 * IDLE_HELLO_S)}
    bench.pulled(bench.state(1))
    assert bench.session.phase == "waiting"
    assert [type(message) for _, message in bench.ticks(IDLE_HELLO_S)] == [Hello]


@pytest.mark.parametrize("up", [True, False])
def test_phases_in_one_word(up: bool) -> None:
    """What a person reads in the live view, at each step of a round."""
    bench = SessionBench()
    state, phases = bench.state(), [bench.session.phase]
    if up:
        bench.connect()
        phases.append(bench.session.phase)
    bench.announce()
    phases.append(bench.session.phase)
    bench.pulled(state)
    phases.append(bench.session.phase)
    update = bench.update()
    bench.handle(d.Trained(update))
    phases.append(bench.session.phase)
    bench.receive(bench.receipt(update))
    phases.append(bench.session.phase)
    bench.announce(state, final=True)
    phases.append(bench.session.phase)
    waiting = ["waiting"] if up else []
    assert phases == ["starting", *waiting, "pulling", "training", "uploading", "waiting" if up else "starting", "done"]


# -- pull ---


def _pulling(**session: Any) -> SessionBench:
    """Connected, welcome, and the spool of version 0 (5 chunks) is open and empty."""
    bench = SessionBench(**session)
    bench.connect()
    assert bench.announce().jobs == [d.OpenSpool(bench.state())]
    bench.opened(bench.state())
    return bench


def _stored(bench: SessionBench, *indices: int, version: int = 0) -> d.Decision:
    return bench.handle(d.ChunksStored(bench.state(version).transfer_id, indices))


def test_an_announced_state_is_wanted_with_what_is_there_already() -> None:
    """The first Want carries the bitmap of an earlier attempt, and says that nothing is in flight."""
    bench = SessionBench()
    bench.connect()
    state = bench.state()
    assert bench.announce().sends == []
    (want,) = bench.opened(state, 1, 2).sends
    assert want == Want(transfer_id=state.transfer_id, have=b"\x06", window=4, restart=True)


def test_an_announcement_repeated_opens_nothing_twice() -> None:
    """The same state again: it is under way, or it is here."""
    bench = SessionBench()
    bench.connect()
    bench.announce()
    assert bench.announce() == d.Decision()
    bench.opened(bench.state())
    assert bench.announce() == d.Decision()
    bench.pulled(bench.state())
    assert bench.announce().jobs == []


def test_a_state_that_is_here_is_not_pulled() -> None:
    """Found on disk at the start."""
    bench = SessionBench()
    bench.pulled(bench.state())
    bench.connect()
    assert jobs(bench.announce(), d.OpenSpool) == []


def test_half_a_window_of_chunks_is_acknowledged() -> None:
    """Often enough to keep the chunks flowing, not for each."""
    bench = _pulling()
    assert _stored(bench, 0).sends == []
    (want,) = _stored(bench, 1).sends
    assert (want.have, want.restart) == (b"\x03", False)  # type: ignore[attr-defined]
    assert _stored(bench, 1).sends == []
    assert _stored(bench, 2).sends == []
    assert len(_stored(bench, 3).sends) == 1


def test_the_last_chunk_is_acknowledged_and_the_state_verified() -> None:
    """The coordinator learns that nothing is missing; the state is checked before it is used."""
    bench = _pulling()
    state = bench.state()
    _stored(bench, 0, 1, 2, 3)
    decision = _stored(bench, 4)
    assert decision.jobs == [d.Finish(state.transfer_id)]
    assert [want.have for want in sent(decision, Want)] == [b"\x1f"]
    assert _stored(bench, 4) == d.Decision()


def test_a_full_spool_is_verified_without_a_word() -> None:
    """Everything was here before the crash."""
    bench = SessionBench()
    bench.connect()
    bench.announce()
    assert bench.opened(bench.state(), *range(5)) == d.Decision(jobs=[d.Finish(bench.state().transfer_id)])


def test_what_is_taken_of_the_data_topics() -> None:
    """A chunk is written when it is of the state being pulled, its spool open, in range, and new."""
    bench = SessionBench()
    state = bench.state()
    accepts = bench.session.pulls.accepts
    bench.connect()
    assert not accepts(state.transfer_id, 0)
    bench.announce()
    assert not accepts(state.transfer_id, 0)
    bench.opened(state, 1)
    assert [accepts(state.transfer_id, index) for index in (0, 1, 4, 5)] == [True, False, True, False]
    assert not accepts(bench.state(1).transfer_id, 0)
    _stored(bench, 0, 2, 3, 4)
    assert not accepts(state.transfer_id, 0)


def test_a_chunk_that_takes_longer_than_the_patience_is_waited_for() -> None:
    """On a slow link no second copy is asked for while the first one comes in; when it stops coming, one is."""
    bench = SessionBench()
    bench.connect()
    state = bench.state()
    bench.announce(state)
    bench.opened(state)
    for _ in range(100):
        bench.now += 0.25
        assert bench.handle(d.Tick(receiving=True)).sends == []
    waits = [(after, message) for after, message in bench.ticks(6.0) if isinstance(message, Want)]
    assert [(after, message.restart) for after, message in waits] == [(5.0, True)]


def test_a_pull_that_stalls_asks_again_from_scratch() -> None:
    """Whatever was in flight is lost; asked ever more slowly while nothing comes, and afresh once something does."""
    bench = _pulling()
    asked = bench.ticks(31)
    assert [at for at, _ in asked] == [STALL_S, STALL_S + 10, STALL_S + 10 + CAP_S]
    assert all(isinstance(message, Want) and message.restart for _, message in asked)
    _stored(bench, 0)
    assert bench.ticks(STALL_S)[0][0] == STALL_S


def test_a_new_connection_asks_for_what_is_missing() -> None:
    """Nothing is in flight over a new connection, and the coordinator is told so."""
    bench = _pulling()
    _stored(bench, 0)
    bench.handle(d.LinkDown())
    assert bench.opened(bench.state(1)) == d.Decision()
    bench.handle(d.LinkUp())
    (want,) = sent(bench.welcome(), Want)
    assert (want.have, want.restart) == (b"\x01", True)


def test_a_spool_that_opens_while_the_link_is_down_is_asked_for_later() -> None:
    """The want goes out with the welcome."""
    bench = SessionBench()
    bench.connect()
    bench.announce()
    bench.handle(d.LinkDown())
    assert bench.opened(bench.state()).sends == []
    bench.handle(d.LinkUp())
    assert len(sent(bench.welcome(), Want)) == 1


def test_chunks_that_become_durable_after_the_link_fell_count() -> None:
    """They are on disk, whatever the link does."""
    bench = _pulling()
    bench.handle(d.LinkDown())
    assert _stored(bench, 0, 1, 2, 3).sends == []
    assert jobs(_stored(bench, 4), d.Finish)


@pytest.mark.parametrize(("held", "abandoned"), [((), True), ((0, 1), True), ((0, 1, 2), False)])
def test_a_pull_is_given_up_for_a_newer_version_below_half(held: tuple[int, ...], abandoned: bool) -> None:
    """With more than half here it is finished and trained on, a version late."""
    bench = _pulling()
    _stored(bench, *held)
    decision = bench.announce(bench.state(1))
    wanted = [d.CloseSpool(bench.state().transfer_id), d.OpenSpool(bench.state(1))] if abandoned else []
    assert decision.jobs == wanted
    assert bench.session.pulls.accepts(bench.state().transfer_id, 4) != abandoned


def test_the_newer_version_follows_the_one_that_was_finished() -> None:
    """What was announced meanwhile is pulled as soon as the older state is here."""
    bench = _pulling()
    _stored(bench, 0, 1, 2)
    bench.announce(bench.state(1))
    _stored(bench, 3, 4)
    assert bench.pulled(bench.state()).jobs == [d.OpenSpool(bench.state(1)), d.Train(bench.state())]


@pytest.mark.parametrize("opening", [True, False])
def test_a_state_at_work_on_disk_is_not_given_up(opening: bool) -> None:
    """While its spool opens, or it is verified, the newer version waits."""
    bench = SessionBench()
    bench.connect()
    bench.announce()
    if not opening:
        bench.opened(bench.state(), *range(5))
    assert bench.announce(bench.state(1)).jobs == []


def test_what_the_disk_says_of_a_pull_that_was_given_up_is_ignored() -> None:
    """Late reports about the older state change nothing."""
    bench = _pulling()
    bench.announce(bench.state(1))
    assert bench.opened(bench.state()) == d.Decision()
    assert _stored(bench, 0) == d.Decision()
    bench.opened(bench.state(1))
    assert _stored(bench, 0, 1) == d.Decision()
    assert bench.session.pulls.pull is not None
    assert len(bench.session.pulls.pull.receiver.have) == 0


def test_a_state_that_does_not_verify_is_pulled_again() -> None:
    """Its bytes are gone; the spool begins anew."""
    bench = _pulling()
    _stored(bench, *range(5))
    broken = bench.handle(d.StateBroken(bench.state().transfer_id))
    assert broken.jobs == [d.OpenSpool(bench.state())]


def test_a_state_that_rots_before_it_is_trained_on_is_pulled_again() -> None:
    """The pull of a newer one, which is under way by then, is not given up for it."""
    bench = SessionBench()
    bench.connect()
    bench.announce(bench.state(0))
    bench.pulled(bench.state(0))
    assert bench.session.training is not None
    broken = bench.handle(d.StateBroken(bench.state(0).transfer_id))
    assert broken.jobs == [d.OpenSpool(bench.state(0))]
    bench.pulled(bench.state(0))
    bench.announce(bench.state(1))
    assert bench.handle(d.StateBroken(bench.state(0).transfer_id)).jobs == []
    assert bench.session.pulls.pull is not None
    assert jobs(bench.pulled(bench.state(1)), d.Train) == [d.Train(bench.state(1))]


def test_an_older_version_is_believed() -> None:
    """A coordinator restored from a backup may announce it; it is told apart by its id, and trained on."""
    bench = SessionBench()
    bench.connect()
    bench.announce(bench.state(5))
    bench.pulled(bench.state(5))
    bench.handle(d.Trained(bench.update(5)))
    older = bench.state(3, salt="restored")
    assert bench.announce(older).jobs == [d.OpenSpool(older)]
    assert jobs(bench.pulled(older), d.Train) == [d.Train(older)]


# -- train ---


def test_a_state_is_trained_on_once() -> None:
    """Not again while it trains, not after it was trained on, not after a restart."""
    bench = SessionBench()
    state = bench.state()
    assert bench.pulled(state).jobs == [d.Train(state)]
    assert bench.pulled(state).jobs == []
    bench.handle(d.Trained(bench.update()))
    assert bench.pulled(state).jobs == []
    again = SessionBench(trained={state.file_digest})
    assert again.pulled(state).jobs == []


def test_training_needs_no_link() -> None:
    """A site that is cut off trains on the state that it has."""
    bench = SessionBench()
    assert bench.pulled(bench.state()).jobs == [d.Train(bench.state())]


def test_one_training_at_a_time_and_then_on_the_newest_state() -> None:
    """What arrives meanwhile waits for the end of the run."""
    bench = SessionBench()
    bench.pulled(bench.state(0))
    assert bench.pulled(bench.state(1)).jobs == []
    assert bench.pulled(bench.state(2)).jobs == []
    assert bench.handle(d.Trained(bench.update(0))).jobs == [d.Train(bench.state(2))]


def test_a_full_outbox_pauses_training() -> None:
    """No more than outbox_max updates wait for the network; a receipt makes room."""
    waiting = [SessionBench().update(version) for version in (0, 1)]
    bench = SessionBench(outbox=waiting, outbox_max=2)
    assert bench.pulled(bench.state(2)).jobs == []
    settled = bench.receive(bench.receipt(waiting[0]))
    assert jobs(settled, d.Train) == [d.Train(bench.state(2))]


# -- the end ---


def test_the_end_of_the_run_cancels_training_and_waits_for_what_is_owed() -> None:
    """The last state is fetched, every sealed update gets its answer, and then the process leaves."""
    update = SessionBench().update()
    bench = SessionBench(outbox=[update])
    bench.connect()
    bench.announce(bench.state(1))
    bench.pulled(bench.state(1))
    final = bench.state(3)
    decision = bench.announce(final, final=True)
    assert decision.jobs == [d.OpenSpool(final), d.CancelTraining()]
    assert bench.session.training is None
    assert jobs(bench.pulled(final), d.Exit) == []
    assert jobs(bench.pulled(final), d.Train) == []
    receipt = bench.receipt(update, outcome="rejected", rule="run-complete")
    assert bench.receive(receipt).jobs == [d.Settle(receipt), d.Exit()]


def test_a_site_does_not_leave_without_the_final_state() -> None:
    """With nothing owed it stays until the last version is here."""
    bench = SessionBench()
    bench.connect()
    assert bench.announce(bench.state(3), final=True).jobs == [d.OpenSpool(bench.state(3))]
    assert jobs(bench.tick(100.0), d.Exit) == []
    assert bench.pulled(bench.state(3)).jobs == [d.Exit()]


def test_an_update_sealed_in_the_moment_of_the_end_gets_its_answer() -> None:
    """The run ended while it was being sealed: it is offered like any other."""
    bench = SessionBench()
    bench.connect()
    bench.announce(bench.state(0))
    bench.pulled(bench.state(0))
    bench.announce(bench.state(0), final=True)
    assert jobs(bench.handle(d.Trained(bench.update())), d.Exit) == []
    assert bench.session.push is not None


def test_a_run_that_is_not_complete_is_not_left() -> None:
    """Whatever is here and whatever is settled."""
    bench = SessionBench(trained={SessionBench().state().file_digest})
    bench.connect()
    bench.announce()
    assert bench.pulled(bench.state()).jobs == []
