"""When to try again, as pure functions of what happened; chance is passed in.

Two kinds of failure want two kinds of patience. A broker that cannot be reached costs nobody anything when it is tried
again, so the waits grow only with the outage itself: up to a sixtieth of it, which keeps the return after a minute
within a second, and is exponential growth over time all the same. A broker that answers and turns us away, or ends
the connection at once (two clients under one id end each other), is not to be pestered: the waits double from the
first. Every wait is drawn uniformly from zero up ("full jitter", M. Brooker, "Exponential Backoff And Jitter", AWS
Architecture Blog, 2015), so that sites which lost the broker together do not come back in step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

SETTLED_S = 2.0
"""A connection that ends sooner counts as a failure of the broker's choosing."""
PROMPT_S = 0.5
"""Longest wait before the first try after a settled connection dropped."""
UNREACHABLE_FLOOR_S = 0.75
"""Ceiling of the waits while an outage is young."""
OUTAGE_SHARE = 1 / 60
"""A wait never adds more than this share to an outage."""

PATIENCE_UNKNOWN_S = 3.0
PATIENCE_MIN_S = 1.0
PATIENCE_MAX_S = 10.0
PATIENCE_GREETED_MAX_S = 60.0
"""The same once the broker has accepted us. Three NATS servers that lost one took 8 s for a subscription; whoever gave
up on them before had to be subscribed from the beginning."""
PATIENCE_SPREAD = 0.75
"""A patience is drawn from this share of itself upwards, so that those who began in step do not stay in it."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """What the past says about the next wait; `since` is when the outage began (monotonic seconds)."""

    since: float
    turned_away: int = 0
    """How often in a row the broker answered and did not want us, or dropped us at once."""
    unreachable: int = 0
    """How often in a row there was no answer."""
    kept_waiting: int = 0
    """How often in a row the broker's machine took the connection and the broker did not answer in time."""


def dropped(state: Backoff, *, now: float, lasted_s: float, taken_over: bool) -> Backoff:
    """A connection that had stood for `lasted_s` seconds has ended; `taken_over` when by our own client id."""
    if taken_over or lasted_s < SETTLED_S:
        return Backoff(since=now, turned_away=state.turned_away + 1)
    return Backoff(since=now)


def failed(state: Backoff, *, answered: bool, kept_waiting: bool = False) -> Backoff:
    """An attempt to connect has failed; `answered` when the broker itself said no."""
    waits = state.kept_waiting + kept_waiting
    if answered:
        return replace(state, turned_away=state.turned_away + 1, unreachable=0, kept_waiting=0)
    return replace(state, unreachable=state.unreachable + 1, kept_waiting=waits)


def ceiling_s(state: Backoff, *, now: float, cap_s: float) -> float:
    """The longest wait that may come next, in seconds."""
    if state.turned_away:
        return min(cap_s, PROMPT_S * 2.0 ** min(state.turned_away, 32))
    if state.unreachable:
        return min(cap_s, max(UNREACHABLE_FLOOR_S, (now - state.since) * OUTAGE_SHARE))
    return min(cap_s, PROMPT_S)


def delay_s(
    state: Backoff, *, now: float, spent_s: float, cap_s: float, uniform: Callable[[float, float], float]
) -> float:
    """The next wait in seconds, drawn with `uniform(low, high)`.

    `spent_s` is how long the last attempt waited for an answer; where none came, that was waiting enough and counts.
    """
    drawn = uniform(0.0, ceiling_s(state, now=now, cap_s=cap_s))
    return max(0.0, drawn - spent_s) if state.unreachable and not state.turned_away else drawn


def patience_s(
    state: Backoff,
    *,
    now: float,
    usual_s: float | None,
    reached: bool,
    uniform: Callable[[float, float], float],
    greeted: bool = False,
) -> float:
    """How long the next step of an attempt may take before the next attempt starts, in seconds.

    `usual_s` is how long the last good attempt took. Until the broker's machine is `reached`, patience is short: a
    packet lost on a dead link is not sent again for seconds, and asking afresh finds the link's return sooner; it grows
    with the outage, since a link may also have become slow. A broker that was reached and does not answer has perhaps
    thousands to greet, and giving up on it only adds to its work: for each attempt in a row that it kept waiting, it is
    given twice the time. `greeted` when it has accepted us already: then it is there, and this may go further.
    """
    if usual_s is None:
        longest = PATIENCE_UNKNOWN_S
    else:
        longest = max(PATIENCE_MIN_S, 4 * usual_s, (now - state.since) * OUTAGE_SHARE)
    if reached:
        longest *= 2.0 ** min(state.kept_waiting, 32)
    longest = min(PATIENCE_GREETED_MAX_S if greeted else PATIENCE_MAX_S, longest)
    return uniform(PATIENCE_SPREAD * longest, longest)
