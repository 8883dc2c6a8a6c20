"""When the hostile site of the flood benchmark was listened to again, as the coordinator's log tells."""

from __future__ import annotations

import json
import math

from bench.hostile import listened_again


def line(second: float, event: str, **fields: object) -> str:
    """A line as the coordinator writes it."""
    return json.dumps({"timestamp": f"2026-11-20T10:00:{second:09.6f}Z", "level": "warning", "event": event, **fields})


def test_a_muting_ends_one_listening_and_the_next_begins_when_it_is_over() -> None:
    """Muted at 1 s for 10, at 13.5 s for 20: listened to from 11 to 13.5, and from 33.5 on."""
    floods = "a site floods; it is not listened to for a while"
    log = [line(0, "connected"), line(1, floods, seconds=10.0), line(2, "published"), line(13.5, floods, seconds=20.0)]
    (first, second) = listened_again("a line of somebody else\n" + "\n".join(log))
    begun = first[0] - 11
    assert (first[1] - begun, second[0] - begun, second[1]) == (13.5, 33.5, math.inf)
    assert listened_again(line(0, "connected")) == []
