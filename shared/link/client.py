"""One MQTT connection: aiomqtt's client with what it hides brought to light.

aiomqtt 2.5 connects in a thread (which cannot be cancelled), waits ten seconds when the broker hangs up before it
answers, drops the reason codes of PUBACK, and its bounded queue discards messages that were already acknowledged. So
this class is given a connected socket, fails at once, reads the codes, and hands each packet to a callback. A
connection is used once: paho forgets its window when it reconnects.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import logging
import math
import socket
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiomqtt
import paho.mqtt.client as mqtt
from aiomqtt import MqttError, ProtocolVersion
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from shared.errors import RefusedError
from shared.link import refusals
from shared.link.counters import Counters
from shared.link.dial import WatchedTlsSocket
from shared.link.model import (
    ConnectRefusedError,
    HungUpError,
    LinkDownError,
    LinkOptions,
    NotGrantedError,
    Packet,
    Publication,
)
from shared.link.packets import MalformedPublishError, packet_bytes, parse_publish, publish_packet_bytes
from shared.link.readahead import ReadAhead
from shared.link.vigil import Signs

PACKETS_AT_ONCE = 32
"""Taken in before others have their turn: of small ones a read holds a hundred, and the next may be there by then."""

MAX_INFLIGHT = 20
"""Publications handed to the library and not acknowledged; a broker may ask for fewer (Receive Maximum)."""
SUBSCRIBE_MAX = 100
"""Topics in one SUBSCRIBE."""
CLOSE_S = 1.0
"""Longest wait for a DISCONNECT to leave."""

_PUBLISH = PacketTypes.PUBLISH << 4
_QUIET = logging.getLogger("mailboat.mqtt")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False  # what it says we say ourselves, once and in our words


@dataclass(frozen=True, slots=True)
class Shared:
    """What outlives a connection."""

    options: LinkOptions
    password: str | None
    counters: Counters
    sink: Callable[[Packet], bool]
    """Takes what comes in; True when that is enough for now."""


class Connection(aiomqtt.Client):
    """One connection over a socket that is already connected."""

    def __init__(self, shared: Shared, sock: socket.socket, *, broker: str, protocol: ProtocolVersion) -> None:
        options, will, modern = shared.options, shared.options.will, protocol is ProtocolVersion.V5
        super().__init__(
            hostname=broker,
            identifier=options.client_id,
            username=options.broker.username,
            password=shared.password,
            protocol=protocol,
            clean_session=None if modern else True,
            clean_start=True if modern else mqtt.MQTT_CLEAN_START_FIRST_ONLY,
            keepalive=options.link.keepalive_s,
            will=None if will is None else aiomqtt.Will(will.topic, will.payload, 1, will.retain),
            max_inflight_messages=MAX_INFLIGHT,
            logger=_QUIET,
        )
        self.broker = broker
        self.topics: tuple[str, ...] = ()
        self.taken_over = False
        self._shared = shared
        self._socket = sock
        self._modern = modern
        self._heard = 0
        """Bytes of messages, and one for each acknowledgement; the beginning of the next message is counted apart."""
        self._answers = 0
        self._queued = 0
        """Bytes handed to the library to be sent; not those of pings, whose answer is what counts."""
        self._held = False
        self._slots = asyncio.Semaphore(MAX_INFLIGHT)
        self._packet_max = math.inf
        self._acked = 0
        """What `_queued` was after the last message that was acknowledged; `_acks` has it of those that wait."""
        self._acks: dict[int, tuple[asyncio.Future[ReasonCode], int]] = {}
        self._reason = ""
        self._adapt(self._client)
        self._disconnected.add_done_callback(self._settle)

    def _adapt(self, paho: mqtt.Client) -> None:
        """Put our parts in the place of paho's; the tests of the link fail when a release of paho moves them."""
        paho.manual_ack_set(True)
        self._ahead = ReadAhead(self._socket, paho._sock_recv)  # noqa: SLF001
        self._plain_queue = paho._packet_queue  # noqa: SLF001
        self._plain_pingresp = paho._handle_pingresp  # noqa: SLF001
        paho._create_socket = lambda: self._socket  # type: ignore[method-assign] # noqa: SLF001
        paho._sock_recv = self._ahead.recv  # type: ignore[assignment, method-assign] # noqa: SLF001
        paho._handle_publish = self._take_publish  # type: ignore[method-assign] # noqa: SLF001
        paho._handle_pingresp = self._take_pingresp  # type: ignore[method-assign] # noqa: SLF001
        paho._packet_queue = self._queue_packet  # type: ignore[method-assign] # noqa: SLF001

    # -- opening and closing -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """CONNECT and wait for CONNACK, without a deadline; raises ConnectRefusedError, HungUpError or SSLError."""
        self._client_connect()
        await self._connected

    async def follow(self, topics: tuple[str, ...]) -> None:
        """Subscribe to these with QoS 1, and to nothing else.

        NotGrantedError names the first topic that the broker does not grant, HungUpError tells that it hung up first.
        """
        new, gone = sorted({*topics} - {*self.topics}), sorted({*self.topics} - {*topics})
        for some in (new[at : at + SUBSCRIBE_MAX] for at in range(0, len(new), SUBSCRIBE_MAX)):
            granted = await self.subscribe([(topic, 1) for topic in some], timeout=math.inf)
            for topic, code in zip(some, granted, strict=True):
                assert isinstance(code, ReasonCode)  # an int only with the callbacks of paho 1
                if code.value >= refusals.FAILURE:
                    raise NotGrantedError(topic, code.value, str(code))
        self.topics = topics
        if gone:  # last: what belongs to both sets is never missed
            self._client.unsubscribe(gone)  # nobody waits: a loss of the connection ends the subscriptions too

    async def lost(self) -> str:
        """Wait for the end of the connection and return what is known of its reason."""
        await asyncio.wait([self._disconnected])
        failure = self._disconnected.exception()
        if failure is not None and not self._reason:
            return f"the connection broke: {type(failure).__name__}: {failure}"
        return self._reason or "the connection broke"

    async def close(self) -> None:
        """Send DISCONNECT, so that the broker does not publish the will, and end."""
        if not self._disconnected.done() and self._client.disconnect() == mqtt.MQTT_ERR_SUCCESS:
            await asyncio.wait([self._disconnected], timeout=CLOSE_S)
        self.abandon("closed by this side")

    def abandon(self, reason: str) -> None:
        """End now, without a word to the broker; does nothing when it has ended already."""
        self._client._sock_close()  # noqa: SLF001 - paho has no public way to drop a connection
        self._socket.close()
        if not self._disconnected.done():
            self._reason = reason
            self._disconnected.set_result(None)

    # -- reading -------------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Read nothing more for now: it waits in the kernel and then with the broker, not in this process."""
        if not self._held and self._socket.fileno() >= 0:
            self._held = True
            self._loop.remove_reader(self._socket.fileno())

    def go_on(self) -> None:
        """Read again; does nothing when it was not held."""
        if self._held and self._socket.fileno() >= 0:
            self._held = False
            self._loop.add_reader(self._socket.fileno(), self._read)
            self._loop.call_soon(self._read)  # there may be bytes that the socket does not show

    def _read(self) -> None:
        try:
            for _ in range(PACKETS_AT_ONCE):
                if self._held or self._socket.fileno() < 0:
                    return
                self._client.loop_read()
                if not self._ahead.pending:
                    return
            self._loop.call_soon(self._read)  # others first
        except (OSError, ValueError, MqttError) as error:  # as aiomqtt does: it ends the connection
            if not self._disconnected.done():
                self._disconnected.set_exception(error)

    # -- publishing ----------------------------------------------------------------------------------------------------

    async def post(self, publication: Publication) -> None:
        """Publish with QoS 1 and return on PUBACK; LinkDownError when the connection goes first, RefusedError on a no.

        A caller that is cancelled while it waits gives up the answer, not the place in the window: the library still
        holds the packet.
        """
        size = self._packet_bytes(publication)
        if size > self._packet_max:
            raise RefusedError(
                f"{publication.topic}: a packet of {size} bytes, broker {self.broker} takes {self._packet_max}",
                rule="packet-too-large",
                hint="lower codec.slice_kib, or raise the broker's limit (Mosquitto: max_packet_size)",
            )
        await self._slots.acquire()
        if self._disconnected.done():
            self._slots.release()
            raise LinkDownError(f"the connection to broker {self.broker} went away before the message was sent")
        info = self._client.publish(publication.topic, publication.payload, 1, publication.retain)
        if info.rc != mqtt.MQTT_ERR_SUCCESS:
            self._slots.release()
            raise LinkDownError(f"broker {self.broker} cannot be written to: {mqtt.error_string(info.rc)}")
        self._shared.counters.bytes_sent += size
        self._shared.counters.packets_sent += 1
        answer: asyncio.Future[ReasonCode] = asyncio.get_running_loop().create_future()
        self._acks[info.mid] = answer, self._queued
        reason = await answer
        if reason.value == refusals.NO_MATCHING_SUBSCRIBERS:
            self._shared.counters.unmatched += 1
        elif reason.value in refusals.PASSING:
            raise LinkDownError(f"broker {self.broker} did not take a message: {reason}")
        elif reason.value >= refusals.FAILURE:
            raise refusals.publish_refusal(publication.topic, str(reason), self.broker)

    def _packet_bytes(self, publication: Publication) -> int:
        topic, payload = len(publication.topic.encode()), len(publication.payload)
        return publish_packet_bytes(topic=topic, payload=payload, qos=1, properties=1 if self._modern else 0)

    # -- watching ------------------------------------------------------------------------------------------------------

    @property
    def receiving(self) -> int:
        """Bytes of the message that is coming in."""
        return len(self._client._in_packet["packet"])  # noqa: SLF001

    def signs_of_life(self) -> Signs:
        """What has moved so far; who does not listen must not complain of silence.

        Of a TLS connection the bytes on their way are counted encrypted, so that `taken` may fall a little for a while.
        """
        self._heard += self._held
        waiting = sum(packet["to_process"] for packet in self._client._out_packet)  # noqa: SLF001
        unacked = array.array("i", [0])
        with contextlib.suppress(OSError, ValueError):  # the socket may be closed
            fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, unacked)
        return Signs(
            heard=self._heard + self.receiving,
            answers=self._answers,
            taken=self._queued - waiting - unacked[0],
            acked=self._acked,
            owed=next((end - self._acked for _, end in self._acks.values()), 0),
        )

    def ask_for_life(self) -> None:
        """Send a ping."""
        self._client._send_pingreq()  # noqa: SLF001 - paho sends one only after a whole keepalive

    def excuse_ping(self) -> None:
        """Start the wait for an answer to a ping anew.

        paho ends a connection whose ping is unanswered for a keepalive, also when the ping still waits behind our own
        bytes on a slow link; whoever sees those bytes move calls this.
        """
        if self._client._ping_t:  # noqa: SLF001
            self._client._ping_t = self._client._last_bytes_received = time.monotonic()  # noqa: SLF001

    def _write(self) -> None:
        try:
            self._client.loop_write()
        except (OSError, ValueError) as error:  # as aiomqtt does: it ends the connection
            if not self._disconnected.done():
                self._disconnected.set_exception(error)

    # -- what paho calls; the signatures are its own -------------------------------------------------------------------

    def _on_connect(
        self,
        client: mqtt.Client,
        userdata: Any,
        flags: mqtt.ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        if self._connected.done():
            return
        if reason_code.value != 0:
            self._connected.set_exception(ConnectRefusedError(reason_code.value, str(reason_code)))
            return
        self._slots = asyncio.Semaphore(min(MAX_INFLIGHT, getattr(properties, "ReceiveMaximum", MAX_INFLIGHT)))
        self._packet_max = getattr(properties, "MaximumPacketSize", math.inf)
        self._connected.set_result(None)

    def _on_disconnect(
        self,
        client: mqtt.Client,
        userdata: Any,
        flags: mqtt.DisconnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        if self._disconnected.done():
            return
        if flags.is_disconnect_packet_from_server:
            self.taken_over = reason_code.value == refusals.SESSION_TAKEN_OVER
            self._reason = f"the broker ended it: {reason_code}"
        elif reason_code.value == refusals.KEEPALIVE_TIMEOUT:
            self._reason = f"no answer to a ping for {self._client.keepalive} s"
        self._disconnected.set_result(None)

    def _settle(self, disconnected: asyncio.Future[None]) -> None:
        """Once, at the end of the connection: nobody waits any longer for what will not come."""
        if not disconnected.cancelled() and disconnected.exception() is not None:
            self._client._sock_close()  # noqa: SLF001 - aiomqtt leaves it open after an error in a callback
        if not self._connected.done():
            tls_failure = self._socket.failure if isinstance(self._socket, WatchedTlsSocket) else None
            self._connected.set_exception(tls_failure or HungUpError("the broker hung up before it answered"))
        for packet in self._client._out_packet:  # noqa: SLF001
            if packet["command"] & 0xF0 == _PUBLISH:
                self._shared.counters.bytes_sent -= packet["to_process"]
                self._shared.counters.packets_sent -= packet["pos"] == 0
        for answer, _ in self._acks.values():
            self._slots.release()
            if not answer.done():
                answer.set_exception(LinkDownError(f"the connection to broker {self.broker} went away"))
        self._acks.clear()
        for subscribing in self._pending_subscribes.values():
            if not subscribing.done():
                subscribing.set_exception(HungUpError("the broker hung up before it acknowledged the subscriptions"))

    def _on_socket_open(self, client: mqtt.Client, userdata: Any, sock: Any) -> None:
        """At once, as for writing, and with a reader that can be held."""
        self._loop.add_reader(sock.fileno(), self._read)
        self._misc_task = self._loop.create_task(self._misc_loop())

    def _on_socket_register_write(self, client: mqtt.Client, userdata: Any, sock: Any) -> None:
        """At once: aiomqtt puts it off, and by then the descriptor may be closed, or belong to somebody else."""
        self._loop.add_writer(sock.fileno(), self._write)

    def _take_publish(self) -> MQTTErrorCode:
        """Instead of paho's own, which copies the payload six times; for a packet that has come in whole."""
        counters, raw = self._shared.counters, self._client._in_packet  # noqa: SLF001
        body = raw["packet"]
        try:
            found = parse_publish(raw["command"], body, modern=self._modern)
            topic = found.topic.decode()
        except (MalformedPublishError, UnicodeDecodeError) as error:
            self._reason = f"the broker sent a malformed packet: {type(error).__name__}"
            return mqtt.MQTT_ERR_PROTOCOL
        self._heard += len(body)
        counters.packets_received += 1
        counters.bytes_received += packet_bytes(len(body))
        if self._shared.sink(Packet(topic, found.payload, found.retained)):
            self.hold()
        return mqtt.MQTT_ERR_SUCCESS if found.packet_id is None else self._client.ack(found.packet_id, 1)

    def _take_pingresp(self) -> MQTTErrorCode:
        self._answers += 1
        return self._plain_pingresp()

    def _queue_packet(
        self,
        command: int,
        packet: bytes | bytearray,
        mid: int,
        qos: int,
        info: mqtt.MQTTMessageInfo | None = None,
    ) -> MQTTErrorCode:
        """As paho's own, which would copy the rest of the packet for each write to the socket."""
        self._queued += len(packet) if command != PacketTypes.PINGREQ << 4 else 0
        return self._plain_queue(command, memoryview(packet), mid, qos, info)  # type: ignore[arg-type]

    def _on_publish(
        self, client: mqtt.Client, userdata: Any, mid: int, reason_code: ReasonCode, properties: Properties
    ) -> None:
        if mid not in self._acks:
            return
        answer, end = self._acks.pop(mid)
        self._heard, self._acked = self._heard + 1, max(self._acked, end)
        self._slots.release()
        if not answer.done():
            answer.set_result(reason_code)
