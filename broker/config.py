"""The configuration of a local Mosquitto, every line with its reason.

For one machine only: tests, the demonstration, first steps. What a broker that others can reach needs stands in
`mosquitto.conf` at the top of the repository.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from shared.errors import ConfigError

PACKET_BYTES_MAX = 1_000_000
"""Largest MQTT packet that we let through: the smallest default among the brokers that people use, so that what works
here works there (NATS 1 MiB, EMQX 1 MB, Mosquitto 2.1 2 MB)."""

QUEUED_BYTES_MAX = 512 * 1024 * 1024
"""Bytes queued for one client: twice the default credit budget, which a correct coordinator never exceeds."""

QUEUED_MESSAGES_MAX = 10_000
"""Messages queued for one client; data is bounded by bytes, this bounds floods of small ones."""

CONNECTIONS_MAX = 4096
"""Sites, status readers and tests together; each takes a file descriptor."""

INFLIGHT_MESSAGES_MAX = 16
"""PUBLISH packets sent to one client and not yet acknowledged, equal to the default transfer window. Each of them is
one copy of its payload in the broker's memory for each subscriber."""

EMBEDDED_READY = "embedded broker ready"
"""The line by which the embedded broker tells its launcher that it serves; Mosquitto has its own."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_loopback(host: str) -> None:
    """Raise ConfigError unless `host` is a loopback address: a broker without passwords is for this machine alone."""
    if not is_loopback(host):
        raise ConfigError(
            f"a broker without passwords may not listen on {host}",
            hint="use 127.0.0.1, or run Mosquitto with mosquitto.conf, which asks for passwords",
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of mosquitto.conf and the reason for it."""

    key: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"# {self.reason}\n{self.key} {self.value}\n"


def local_settings(host: str, port: int) -> tuple[Setting, ...]:
    """The settings of a broker without passwords on a loopback address; ConfigError for any other address."""
    require_loopback(host)
    return (
        Setting("listener", f"{port} {host}", "this machine alone can reach it"),
        Setting("allow_anonymous", "true", "acceptable because of the line above, and only because of it"),
        Setting(
            "user", "root", "who starts it runs it: else, started by root, it changes user and cannot read this folder"
        ),
        Setting(
            "persistence", "false", "a snapshot every half hour promises nothing; outbox and journal keep everything"
        ),
        Setting("max_packet_size", str(PACKET_BYTES_MAX), "what is refused elsewhere shall be refused here"),
        Setting("max_inflight_messages", str(INFLIGHT_MESSAGES_MAX), "one payload copy per subscriber and message"),
        Setting(
            "max_queued_messages", str(QUEUED_MESSAGES_MAX), "bounded; 0, 'unlimited', was broken in 2.0.16 to 2.0.21"
        ),
        Setting(
            "max_queued_bytes", str(QUEUED_BYTES_MAX), "bounded memory, above what credits ever allow to be in flight"
        ),
        Setting("max_connections", str(CONNECTIONS_MAX), "bounded, above any federation on one machine"),
        Setting("set_tcp_nodelay", "true", "grants and receipts are small and somebody waits for each"),
        Setting("log_dest", "stderr", "goes to mosquitto.log beside this file"),
        Setting("log_type", "error", "the broker's own troubles"),
        Setting("log_type", "warning", "the same, milder"),
        Setting("log_type", "notice", "who connected and why somebody was cut off"),
        Setting("log_type", "information", "among it the line that says the broker is ready"),
        Setting("log_timestamp_format", "%Y-%m-%dT%H:%M:%S", "seconds since 1970 are hard to compare with other logs"),
    )


def local_config(host: str, port: int) -> str:
    """The text of mosquitto.conf for a broker of this machine alone."""
    return "\n".join(str(setting) for setting in local_settings(host, port))
