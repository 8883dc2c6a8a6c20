from __future__ import annotations

import random
import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes

from shared.config import BrokerSection
from shared.errors import ConfigError, MailboatError, RefusedError
from shared.link import Counters, backoff, endpoints, refusals
from shared.link.backoff import Backoff
from shared.link.endpoints import Endpoint, parse_endpoints, read_password, tls_context
from shared.link.packets import MalformedPublishError, Publish, parse_publish, publish_packet_bytes, varint_bytes


def after_failures(count: int, *, answered: bool) -> Backoff:
    """The state after so many failed attempts in a row."""
    state = Backoff(since=0.0)
    for _ in range(count):
        state = backoff.failed(state, answered=answered)
    return state


class TestBackoff:
    def test_first_try_after_a_drop_is_prompt(self) -> None:
        """A connection that had settled is tried again within half a second, whatever went before."""
        state = backoff.dropped(after_failures(9, answered=True), now=100.0, lasted_s=60.0, taken_over=False)
        assert backoff.ceiling_s(state, now=100.0, cap_s=15.0) == 0.5

    @pytest.mark.parametrize(("lasted_s", "taken_over"), [(1.9, False), (600.0, True)])
    def test_being_thrown_out_counts_as_a_failure(self, lasted_s: float, taken_over: bool) -> None:
        """A connection that ends at once, or by another client with our id, makes the waits grow."""
        state, ceilings = Backoff(since=0.0), []
        for _ in range(7):
            state = backoff.dropped(state, now=0.0, lasted_s=lasted_s, taken_over=taken_over)
            ceilings.append(backoff.ceiling_s(state, now=0.0, cap_s=15.0))
        assert ceilings == [1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]

    def test_a_refusing_broker_is_left_alone(self) -> None:
        """Waits after a passing refusal double up to the cap, and never overflow."""
        assert backoff.ceiling_s(after_failures(3, answered=True), now=0.0, cap_s=15.0) == 4.0
        assert backoff.ceiling_s(after_failures(5000, answered=True), now=0.0, cap_s=15.0) == 15.0

    @pytest.mark.parametrize(("outage_s", "ceiling_s"), [(0, 0.75), (45, 0.75), (60, 1.0), (300, 5.0), (9000, 15.0)])
    def test_an_absent_broker_is_sought_in_proportion(self, outage_s: float, ceiling_s: float) -> None:
        """While nobody answers, no wait adds more than a sixtieth to the outage, or the cap."""
        assert backoff.ceiling_s(after_failures(50, answered=False), now=outage_s, cap_s=15.0) == ceiling_s

    @given(st.integers(0, 50), st.booleans(), st.floats(0, 1e6), st.integers())
    def test_waits_are_drawn_from_zero_to_the_ceiling(
        self, failures: int, answered: bool, now: float, seed: int
    ) -> None:
        """Every wait lies between zero and the ceiling, which is at most the cap."""
        state = after_failures(failures, answered=answered)
        wait = backoff.delay_s(state, now=now, spent_s=0.0, cap_s=15.0, uniform=random.Random(seed).uniform)
        assert 0.0 <= wait <= backoff.ceiling_s(state, now=now, cap_s=15.0) <= 15.0


class TestPackets:
    @given(
        topic=st.binary(max_size=300),
        payload=st.binary(max_size=300),
        packet_id=st.none() | st.integers(1, 65535),
        retained=st.booleans(),
        modern=st.booleans(),
        properties=st.binary(max_size=200),
    )
    def test_what_is_written_is_read(
        self, topic: bytes, payload: bytes, packet_id: int | None, retained: bool, modern: bool, properties: bytes
    ) -> None:
        """Every packet is read as it was written, properties passed over, and its length is the computed one."""
        first = 0x30 | (0 if packet_id is None else 2) | retained
        length = bytes([len(properties) & 127 | 128, len(properties) >> 7]) if len(properties) > 127 else b""
        prefix = (length or bytes([len(properties)])) + properties if modern else b""
        identified = b"" if packet_id is None else packet_id.to_bytes(2, "big")
        body = len(topic).to_bytes(2, "big") + topic + identified + prefix + payload
        assert parse_publish(first, bytearray(body), modern=modern) == Publish(topic, payload, retained, packet_id)
        size = publish_packet_bytes(topic=len(topic), payload=len(payload), qos=first >> 1 & 1, properties=len(prefix))
        assert size == 1 + varint_bytes(len(body)) + len(body)

    @given(st.integers(0, 255), st.binary(max_size=40), st.booleans())
    def test_no_bytes_do_harm(self, first: int, body: bytes, modern: bool) -> None:
        """Arbitrary bytes are either a packet or malformed, and nothing else happens."""
        try:
            parse_publish(first, body, modern=modern)
        except MalformedPublishError:
            return
        assert first >> 1 & 3 < 2

    @pytest.mark.parametrize(
        ("first", "body"),
        [
            (0x34, b"\x00\x01t\x00\x01\x00"),
            (0x32, b"\x00\x01t\x00"),
            (0x30, b"\x00\x05t"),
            (0x30, b"\x00\x01t\x05ab"),
            (0x30, b"\x00\x01t\xff\xff\xff\xff\x01"),
            (0x30, b""),
        ],
    )
    def test_malformed(self, first: int, body: bytes) -> None:
        """QoS 2, a missing packet id, and lengths beyond the end or of five bytes are malformed."""
        with pytest.raises(MalformedPublishError):
            parse_publish(first, body, modern=True)


class TestCounters:
    @pytest.mark.parametrize(("value", "length"), [(0, 1), (127, 1), (128, 2), (16383, 2), (16384, 3), (268435455, 4)])
    def test_variable_byte_integer(self, value: int, length: int) -> None:
        """The lengths of table 1-1 of MQTT 5.0."""
        assert varint_bytes(value) == length

    def test_publish_packet(self) -> None:
        """Topic `a/b`, packet id, no properties, 10 bytes: 2 + 2 + 3 + 2 + 1 + 10."""
        assert publish_packet_bytes(topic=3, payload=10, qos=1, properties=1) == 20
        assert publish_packet_bytes(topic=3, payload=10, qos=0, properties=0) == 17

    def test_reconnects_are_those_after_the_first(self) -> None:
        """No connection and one connection both make zero reconnects."""
        assert [Counters(connects=n).reconnects for n in (0, 1, 3)] == [0, 0, 2]


class TestEndpoints:
    @pytest.mark.parametrize(
        ("url", "found"),
        [
            ("mqtt://a:1883,b:1884", (Endpoint("a", 1883, tls=False), Endpoint("b", 1884, tls=False))),
            ("mqtts://a, mqtt://b", (Endpoint("a", 8883, tls=True), Endpoint("b", 1883, tls=False))),
            ("mqtt://[::1]:99/", (Endpoint("::1", 99, tls=False),)),
        ],
    )
    def test_lists_of_urls(self, url: str, found: tuple[Endpoint, ...]) -> None:
        """Ports have defaults and a scheme holds until the next one."""
        assert parse_endpoints(url) == found

    def test_text_of_an_address(self) -> None:
        """An IPv6 address keeps its brackets."""
        assert [str(e) for e in parse_endpoints("mqtt://[::1]:99,h:1")] == ["[::1]:99", "h:1"]

    @pytest.mark.parametrize(
        "url",
        ["mqtt://", "mqtt://a:0", "mqtt://a:x", "mqtt://a:99999", "mqtt://a,", "mqtt://a/b", "mqtt://" + "a" * 99],
    )
    def test_wrong_urls(self, url: str) -> None:
        """Anything but addresses is a configuration error that names the key."""
        with pytest.raises(ConfigError, match=r"broker\.url"):
            parse_endpoints(url)

    def test_password_in_the_url(self) -> None:
        """A URL with a password is refused, and the message does not repeat it."""
        with pytest.raises(ConfigError, match="password_file") as caught:
            parse_endpoints("mqtt://me:geheim@a:1883")
        assert "geheim" not in str(caught.value)

    def test_password_file(self, tmp_path: Path) -> None:
        """The password is the file's first line, without its end."""
        path = tmp_path / "password"
        path.write_bytes("paßwort\n".encode())
        assert read_password(BrokerSection(password_file=path)) == "paßwort"
        assert read_password(BrokerSection()) is None
        path.write_bytes(b"\xff\n")
        with pytest.raises(ConfigError, match="UTF-8"):
            read_password(BrokerSection(password_file=path))

    @pytest.mark.parametrize("key", ["ca_file", "password_file"])
    def test_missing_files(self, tmp_path: Path, key: str) -> None:
        """A file that is not there is named with its key."""
        section = BrokerSection.model_validate({key: tmp_path / "absent"})
        with pytest.raises(ConfigError, match=rf"absent.*{key}"):
            (read_password if key == "password_file" else tls_context)(section)

    def test_a_ca_file_that_is_none(self, tmp_path: Path) -> None:
        """A file that holds no certificate is named."""
        path = tmp_path / "ca.pem"
        path.write_text("no certificate")
        with pytest.raises(ConfigError, match=r"ca\.pem"):
            tls_context(BrokerSection(ca_file=path))


class TestRefusals:
    @pytest.mark.parametrize(
        ("code", "rule"),
        [
            (0x85, "client-id-rejected"),
            (0x86, "bad-credentials"),
            (0x87, "not-authorised"),
            (0x8A, "banned"),
            (0x9B, "no-qos-1"),
        ],
    )
    def test_what_trying_again_cannot_mend(self, code: int, rule: str) -> None:
        """Each such code has its rule, and the message names the broker."""
        error = refusals.connect_refusal(code, "b:1883", "site-1")
        assert isinstance(error, RefusedError)
        assert (error.rule, "b:1883" in error.message, bool(error.hint)) == (rule, True, True)

    @pytest.mark.parametrize("code", [0x80, 0x88, 0x89, 0x97, 0x9F])
    def test_what_passes(self, code: int) -> None:
        """Unavailable, busy, over quota: the link goes on trying."""
        assert refusals.connect_refusal(code, "b:1883", "site-1") is None

    @pytest.mark.parametrize(
        ("reason", "kind"),
        [
            ("WRONG_VERSION_NUMBER", ConfigError),
            ("TLSV13_ALERT_CERTIFICATE_REQUIRED", RefusedError),
            ("TLSV1_ALERT_UNKNOWN_CA", RefusedError),
            ("UNEXPECTED_EOF_WHILE_READING", None),
            ("TLSV1_ALERT_INTERNAL_ERROR", None),
        ],
    )
    def test_tls(self, reason: str, kind: type[MailboatError] | None) -> None:
        """What certificates cause is final; what a broken connection causes is not."""
        error = ssl.SSLError(1, reason)
        error.reason = reason
        found = refusals.tls_refusal(error, "b:8883")
        assert found is None if kind is None else isinstance(found, kind)

    def test_codes_are_those_of_the_library(self) -> None:
        """The MQTT library names our constants as we do."""
        from paho.mqtt.reasoncodes import ReasonCode

        named = {
            refusals.SESSION_TAKEN_OVER: ReasonCode(PacketTypes.DISCONNECT, "Session taken over"),
            refusals.KEEPALIVE_TIMEOUT: ReasonCode(PacketTypes.DISCONNECT, "Keep alive timeout"),
            refusals.UNSUPPORTED_PROTOCOL: ReasonCode(PacketTypes.CONNACK, "Unsupported protocol version"),
            refusals.NO_MATCHING_SUBSCRIBERS: ReasonCode(PacketTypes.PUBACK, "No matching subscribers"),
        }
        assert all(code == reason.value for code, reason in named.items())


def test_default_port_table() -> None:
    """The registered ports of MQTT and MQTT over TLS."""
    assert endpoints.PORTS == {"mqtt": 1883, "mqtts": 8883}
