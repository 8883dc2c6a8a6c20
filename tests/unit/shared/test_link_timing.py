"""When a link gives a connection up and when it comes back, by the pure rules alone, for thousands of sites at once."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.link import backoff
from shared.link.backoff import Backoff
from shared.link.vigil import LOOK_S, Signs, Verdict, Vigil

SITES = 1000
CAP_S = 15.0
USUAL_S = 0.2


def comes_back_s(seed: int, outage_s: float, *, silent: bool) -> float:
    """When the first attempt that succeeds begins, after a settled connection dropped at 0.

    While the outage lasts an attempt is refused at once, or with `silent` has no answer and takes all its patience.
    """
    uniform = random.Random(seed).uniform
    state = backoff.dropped(Backoff(since=-60.0), now=0.0, lasted_s=60.0, taken_over=False)
    now = backoff.delay_s(state, now=0.0, spent_s=0.0, cap_s=CAP_S, uniform=uniform)
    while now < outage_s:
        patience_s = backoff.patience_s(state, now=now, usual_s=USUAL_S, reached=False, uniform=uniform)
        spent_s = patience_s if silent else 0.0
        now += spent_s
        state = backoff.failed(state, answered=False)
        now += backoff.delay_s(state, now=now, spent_s=spent_s, cap_s=CAP_S, uniform=uniform)
    return now


def crowd(times: list[float], width_s: float) -> float:
    """Largest number of sites within one slot of that width."""
    return max(Counter(int(time / width_s) for time in times).values())


class TestComingBack:
    @pytest.mark.parametrize("silent", [False, True])
    @pytest.mark.parametrize("outage_s", [0.0, 1.0, 5.0, 20.0, 60.0])
    def test_after_an_outage_of_up_to_a_minute(self, outage_s: float, silent: bool) -> None:
        """Each of many sites tries within 1.1 s of the link's return, which leaves 0.9 s of the two for the rest."""
        late = [comes_back_s(seed, outage_s, silent=silent) - outage_s for seed in range(SITES)]
        assert max(late) <= 1.1

    @pytest.mark.parametrize("silent", [False, True])
    @pytest.mark.parametrize("outage_s", [600.0, 3600.0])
    def test_after_a_longer_outage(self, outage_s: float, silent: bool) -> None:
        """Within the cap."""
        late = [comes_back_s(seed, outage_s, silent=silent) - outage_s for seed in range(SITES // 10)]
        assert max(late) <= CAP_S

    @pytest.mark.parametrize("silent", [False, True])
    @pytest.mark.parametrize(("outage_s", "width_s"), [(0.0, 0.5), (5.0, 0.75), (60.0, 0.75)])
    def test_never_in_lockstep(self, outage_s: float, width_s: float, silent: bool) -> None:
        """They spread over the whole span: no twentieth of it holds more than two and a half times its share."""
        times = [comes_back_s(seed, outage_s, silent=silent) - outage_s for seed in range(SITES)]
        assert max(times) - min(times) >= 0.9 * width_s
        assert crowd(times, width_s / 20) <= 2.5 * SITES / 20

    def test_patience_before_the_broker_is_reached(self) -> None:
        """Four times the usual, more as the outage goes on, ten seconds at most; drawn from three quarters up."""
        cases = [(0, None, 3.0), (0, 0.01, 1.0), (0, 0.6, 2.4), (60, 0.01, 1.0), (300, 0.01, 5.0), (9e3, 0.01, 10.0)]
        for now, usual_s, expected_s in cases:
            for draw, share in ((max, 1.0), (min, 0.75)):
                drawn = backoff.patience_s(Backoff(0.0), now=now, usual_s=usual_s, reached=False, uniform=draw)
                assert drawn == pytest.approx(share * expected_s)

    def test_a_broker_that_keeps_us_waiting_is_given_more_time(self) -> None:
        """Twice as much each time, so that no crowd starves itself by giving up; once it answers all is as before."""
        state, spans = Backoff(0.0), []
        for _ in range(6):
            spans.append(backoff.patience_s(state, now=0.0, usual_s=0.1, reached=True, uniform=max))
            assert backoff.patience_s(state, now=0.0, usual_s=0.1, reached=False, uniform=max) == 1.0
            state = backoff.failed(state, answered=False, kept_waiting=True)
        assert spans == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
        assert backoff.dropped(state, now=0.0, lasted_s=9.0, taken_over=False).kept_waiting == 0

    def test_a_broker_that_accepted_us_is_given_a_minute_in_the_end(self) -> None:
        """A cluster that chooses leaders subscribes slowly; whoever gives up is subscribed from the beginning."""
        state, spans = Backoff(0.0), []
        for _ in range(8):
            spans.append(backoff.patience_s(state, now=0.0, usual_s=0.1, reached=True, greeted=True, uniform=max))
            state = backoff.failed(state, answered=False, kept_waiting=True)
        assert spans == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]

    @given(st.floats(0, 1e5), st.floats(0, 1e3), st.integers())
    def test_waiting_for_an_answer_counts_as_waiting(self, now: float, spent_s: float, seed: int) -> None:
        """What an unanswered attempt took is taken off the wait; after a refusal it is not."""
        silent, refused = (backoff.failed(Backoff(since=0.0), answered=answered) for answered in (False, True))
        for state, spared_s in ((silent, spent_s), (refused, 0.0)):
            whole, rest = (
                backoff.delay_s(state, now=now, spent_s=spent, cap_s=CAP_S, uniform=random.Random(seed).uniform)
                for spent in (0.0, spent_s)
            )
            assert rest == max(0.0, whole - spared_s)


class Watched:
    """A vigil at its default, looked at regularly."""

    def __init__(self) -> None:
        self.vigil = Vigil(stall_s=5.0, keepalive_s=30.0)
        self.vigil.begin()
        self.now_s = 0.0

    def until_cut(self, signs: Signs, *, answers: bool = False, longest_s: float = 100.0) -> tuple[Verdict, float]:
        """How and when it ends, while nothing changes but the answers to pings."""
        began = self.now_s
        while self.now_s - began < longest_s:
            self.now_s += LOOK_S
            verdict = self.vigil.look(signs, LOOK_S)
            if verdict in {Verdict.SILENT, Verdict.OWING}:
                return verdict, self.now_s - began
            if verdict is Verdict.ASK and answers:
                signs = replace(signs, answers=signs.answers + 1)
        return Verdict.WAIT, longest_s


SHORT = 1000
"""What is said after each connect, and acknowledged at once."""
CHUNK = 524_288


def uploaded(vigil: Vigil, rate: int, chunks: int = 4) -> int:
    """How often the vigil cuts one upload through a box that takes all at once and passes on `rate` bytes a second.

    The retained announcement comes after each connect. Status of 100 bytes goes out and is acknowledged for a minute
    before, each second.
    """
    vigil.begin()
    for second in range(1, 61):
        said = SHORT + 100 * second
        for look in range(10):
            signs = Signs(heard=300 + second, taken=said, acked=said if look else said - 100, owed=0 if look else 100)
            vigil.look(signs, LOOK_S)
    for cuts in range(10):
        vigil.begin()
        for look in range(1, 10_000):
            through = min(chunks, int(look * LOOK_S * rate / CHUNK))
            signs = Signs(
                heard=300 + through,
                taken=SHORT + chunks * CHUNK,
                acked=SHORT + through * CHUNK,
                owed=CHUNK if through < chunks else 0,
            )
            if vigil.look(signs, LOOK_S) in {Verdict.SILENT, Verdict.OWING}:
                break
            if through == chunks:
                return cuts
    return 10


class TestVigil:
    def test_silence(self) -> None:
        """A connection on which nothing moves is given up after 1.5 s at the default."""
        verdict, after_s = Watched().until_cut(Signs())
        assert verdict is Verdict.SILENT
        assert after_s == pytest.approx(1.5, abs=0.15)

    def test_an_idle_connection_is_asked_and_kept(self) -> None:
        """As long as pings are answered nothing needs to move."""
        assert Watched().until_cut(Signs(), answers=True)[0] is Verdict.WAIT

    def test_an_acknowledgement_that_never_comes(self) -> None:
        """A broker that answers and never acknowledges is given up after `stall_s`."""
        verdict, after_s = Watched().until_cut(Signs(owed=100), answers=True)
        assert verdict is Verdict.OWING
        assert after_s == pytest.approx(5.0, abs=0.15)

    @pytest.mark.parametrize("name", ["heard", "taken"])
    def test_a_byte_a_second_is_enough(self, name: str) -> None:
        """However slowly bytes move, in either direction, the connection stays."""
        vigil = Vigil(stall_s=5.0, keepalive_s=30.0)
        vigil.begin()
        for look in range(1000):
            verdict = vigil.look(Signs(**{name: look // 10, "owed": 100}), LOOK_S)
            assert verdict not in {Verdict.SILENT, Verdict.OWING}

    def test_a_sleep_of_our_own_is_nobodys_silence(self) -> None:
        """A process that was stopped for an hour looks again before it judges."""
        vigil = Vigil(stall_s=5.0, keepalive_s=30.0)
        vigil.begin()
        assert vigil.look(Signs(), 3600.0) is Verdict.WAIT

    def test_patience_doubles_until_something_comes_in(self) -> None:
        """A slow link is not cut for ever: the patience doubles up to the keepalive, and starts over with a message."""
        watched, spans = Watched(), []
        for _ in range(7):
            watched.vigil.begin()
            spans.append(watched.until_cut(Signs())[1])
        assert spans == pytest.approx([1.5, 3.0, 6.0, 12.0, 24.0, 30.0, 30.0], abs=0.15)
        watched.vigil.begin()
        watched.vigil.look(Signs(heard=1), LOOK_S)
        assert watched.vigil.silence_s == 1.5

    @pytest.mark.parametrize(("rate", "cuts"), [(400_000, 0), (200_000, 1), (120_000, 2), (50_000, 3)])
    def test_a_deep_buffer_before_a_slow_line(self, rate: int, cuts: int) -> None:
        """It is cut until the patience lasts for a chunk, and not in later uploads, whatever goes between them."""
        vigil = Vigil(stall_s=5.0, keepalive_s=30.0)
        assert [uploaded(vigil, rate) for _ in range(5)] == [cuts, 0, 0, 0, 0]

    def test_after_an_upload_that_was_lost(self) -> None:
        """On a line without such a buffer the next loss is noticed as soon, once a chunk was acknowledged at once."""
        vigil = Vigil(stall_s=5.0, keepalive_s=30.0)
        vigil.begin()
        spoken = Signs(heard=300, taken=SHORT, acked=SHORT)
        vigil.look(spoken, LOOK_S)
        while vigil.look(replace(spoken, taken=SHORT + 50_000, owed=CHUNK), LOOK_S) is not Verdict.SILENT:
            pass
        vigil.begin()
        vigil.look(spoken, LOOK_S)
        assert vigil.silence_s == 3.0
        for step in range(1, 30):  # 2.9 s for a chunk, half a second on its way
            vigil.look(replace(spoken, taken=SHORT + min(CHUNK, step * CHUNK // 24), owed=CHUNK), LOOK_S)
        vigil.look(Signs(heard=301, taken=SHORT + CHUNK, acked=SHORT + CHUNK), LOOK_S)
        assert vigil.silence_s == 1.5
