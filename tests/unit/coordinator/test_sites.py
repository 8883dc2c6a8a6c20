"""Who speaks for a site: a restart takes over, a second process does not, and a stray one is told to go."""

from __future__ import annotations

import pytest

from coordinator.sites import REMEMBERED_SESSIONS, Claim, Sites
from tests.cores import session_of

A, B, C = (session_of(name) for name in "ABC")
PROBE_S = 5.0


@pytest.fixture
def sites() -> Sites:
    """Process A speaks for `north`; B has just said hello and A is being probed."""
    sites = Sites(probe_s=PROBE_S)
    assert sites.hello("north", A, 0.0) == (Claim.WELCOME, None)
    assert sites.hello("north", B, 10.0) == (Claim.PROBE, A)
    return sites


def test_the_first_process_is_welcome_and_stays_so() -> None:
    """A process that greets again (a new connection) is the same process."""
    sites = Sites(probe_s=PROBE_S)
    assert sites.hello("north", A, 0.0) == (Claim.WELCOME, None)
    assert sites.hello("north", A, 1.0) == (Claim.WELCOME, None)
    assert sites.present == {"north"}


def test_the_one_who_lives_keeps_the_name(sites: Sites) -> None:
    """A answers the probe with a hello: A is welcome, and B is the one to refuse."""
    assert sites.hello("north", A, 11.0) == (Claim.WELCOME, B)
    assert sites.silent(100.0) == []
    assert sites["north"].session == A


def test_the_newcomer_waits_while_the_probe_is_under_way(sites: Sites) -> None:
    """One probe is enough, for B's repeated hello and for a third process."""
    assert sites.hello("north", B, 11.0) == (Claim.WAIT, None)
    assert sites.hello("north", C, 11.0) == (Claim.WAIT, None)
    assert sites["north"].challenger == B


def test_a_silent_process_is_superseded(sites: Sites) -> None:
    """After probe_s without an answer a newcomer that said hello again takes over, and not before."""
    assert sites.hello("north", B, 10.0 + PROBE_S) == (Claim.WAIT, None)
    assert sites.silent(10.0 + PROBE_S - 0.01) == []
    assert sites["north"].session == A
    assert sites.silent(10.0 + PROBE_S) == [("north", B)]
    assert sites["north"].session == B
    assert sites.silent(100.0) == []


def test_a_newcomer_that_was_killed_does_not_hold_up_the_next(sites: Sites) -> None:
    """B is gone before it could say hello again; C, which repeats itself, takes its place and A's."""
    assert sites.hello("north", C, 11.0) == (Claim.WAIT, None)
    assert sites.hello("north", C, 15.0) == (Claim.WAIT, None)
    assert sites.silent(10.0 + PROBE_S) == [("north", C)]
    assert sites["north"].session == C


def test_one_late_hello_puts_nobody_out(sites: Sites) -> None:
    """The word of a process that is gone, found by the broker somewhere, is said once: whoever is present stays."""
    assert sites.hello("north", C, 11.0) == (Claim.WAIT, None)
    assert sites.silent(1000.0) == []
    assert sites["north"].session == A


def test_a_probe_may_be_lost(sites: Sites) -> None:
    """The present one is asked again, spread over probe_s, four times in all, and a hello ends that."""
    asked = [10.0 + step / 100 for step in range(2000) if sites.unanswered(10.0 + step / 100) == [("north", A)]]
    assert asked == pytest.approx([11.25, 12.5, 13.75])
    sites.hello("north", A, 20.0)
    sites.hello("north", C, 30.0)
    sites.hello("north", A, 30.1)
    assert sites.unanswered(1000.0) == []


def test_a_process_that_left_is_replaced_at_once(sites: Sites) -> None:
    """The broker's word that A is gone answers the probe."""
    assert sites.left("north", A, 5.0) == B
    assert sites["north"].session == B
    assert sites.present == {"north"}
    assert sites.silent(100.0) == []


def test_a_stray_process_that_comes_back_is_refused(sites: Sites) -> None:
    """A went on (asleep, cut off) after B had taken its place: two must not train under one name."""
    sites.hello("north", B, 11.0)
    sites.silent(10.0 + PROBE_S)
    assert sites.hello("north", A, 20.0) == (Claim.REFUSE, None)
    assert sites["north"].session == B


def test_a_stray_process_that_comes_back_to_an_empty_place_is_refused_too(sites: Sites) -> None:
    """Its successor has trained in its place meanwhile, and will come back with what it has."""
    sites.hello("north", B, 11.0)
    sites.silent(10.0 + PROBE_S)
    sites.left("north", B, 5.0)
    assert sites.hello("north", A, 20.0) == (Claim.REFUSE, None)
    assert sites.present == frozenset()


def test_a_challenger_that_gives_up_is_forgotten(sites: Sites) -> None:
    """B left while it waited: A stays, and the probe has no consequence."""
    assert sites.left("north", B, 5.0) is None
    assert sites.silent(100.0) == []
    assert sites["north"].session == A


def test_the_departure_of_somebody_else_changes_nothing(sites: Sites) -> None:
    """A late word about an older process does not send the present one away."""
    assert sites.left("north", C, 5.0) is None
    assert sites["north"].session == A
    assert sites["north"].challenger == B


def test_a_site_that_left_is_not_present_and_may_return() -> None:
    """The same process after a broken connection is welcome without a probe, and so is a new one."""
    for returned in (A, B):
        sites = Sites(probe_s=PROBE_S)
        sites.hello("north", A, 0.0)
        assert sites.left("north", A, 5.0) is None
        assert sites.present == frozenset()
        assert sites.hello("north", returned, 1.0) == (Claim.WELCOME, None)
        assert sites.present == {"north"}


def test_sites_do_not_stand_in_each_others_way() -> None:
    """Each name has its own process; items come by name."""
    sites = Sites(probe_s=PROBE_S)
    assert sites.hello("south", A, 0.0) == (Claim.WELCOME, None)
    assert sites.hello("north", B, 0.0) == (Claim.WELCOME, None)
    sites.hello("south", C, 0.0)
    sites.hello("south", C, PROBE_S)
    assert sites.silent(PROBE_S) == [("south", C)]
    assert [name for name, _ in sites.items()] == ["north", "south"]
    assert sites["north"].session == B


def test_memory_is_bounded_by_sites_not_by_restarts() -> None:
    """A thousand restarts of one site leave a handful of sessions, the latest ones."""
    sites = Sites(probe_s=PROBE_S)
    for number in range(1000):
        for again in (0.0, PROBE_S):
            sites.hello("north", session_of(f"run {number}"), 10.0 * number + again)
        sites.silent(10.0 * number + PROBE_S)
    (_, site), *others = sites.items()
    assert not others
    assert list(site.superseded) == [session_of(f"run {998 - back}") for back in reversed(range(REMEMBERED_SESSIONS))]
