"""What goes into a link and what comes out: options, events and the one error of its own."""

from __future__ import annotations

from dataclasses import dataclass

from shared.config import BrokerSection, LinkSection
from shared.errors import UnavailableError


class ConnectRefusedError(Exception):
    """The broker answered CONNECT with the reason code `code`."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class NotGrantedError(Exception):
    """The broker did not grant the subscription to `topic`; the reason code is `code`."""

    def __init__(self, topic: str, code: int, text: str) -> None:
        super().__init__(text)
        self.topic = topic
        self.code = code


class HungUpError(Exception):
    """The broker ended the connection before it answered CONNECT."""


class LinkDownError(UnavailableError):
    """There is no connection, or it went away before the broker acknowledged; whether it got through is unknown."""


@dataclass(frozen=True, slots=True)
class Publication:
    """One message on its way out."""

    topic: str
    payload: bytes
    retain: bool = False


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How a link connects and what it says by itself."""

    broker: BrokerSection
    link: LinkSection
    client_id: str
    subscriptions: tuple[str, ...] = ()
    will: Publication | None = None
    """The broker publishes it when the connection breaks; the link itself does when it is closed in order."""
    hello: tuple[Publication, ...] = ()
    """Published on each connection, before `Connected` is reported."""
    give_up_s: float | None = None
    """Give up when no first connection stands within this many seconds; None tries for ever."""


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection stands, every subscription is acknowledged and every hello published."""

    protocol: str
    """'5' or '3.1.1'."""
    broker: str
    """host:port"""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone; the link is already trying to get the next one."""

    reason: str


@dataclass(frozen=True, slots=True)
class Packet:
    """One message came in; `retained` when the broker had kept it from before the subscription."""

    topic: str
    payload: bytes
    retained: bool


Event = Connected | Disconnected | Packet
