"""The configuration of a Mosquitto that hospitals reach over networks nobody controls, every line with its reason."""

from __future__ import annotations

from pathlib import PurePath

from broker.config import INFLIGHT_MESSAGES_MAX, PACKET_BYTES_MAX, QUEUED_BYTES_MAX, QUEUED_MESSAGES_MAX, Setting

TLS_PORT = 8883
"""The port that is registered for MQTT over TLS."""

MEMORY_BYTES_MAX = 1024 * 1024 * 1024
"""The broker as a whole: four times the default credit budget of 256 MiB."""

CLIENTS_MAX = 1024
"""Far above any federation of hospitals; each open connection costs a file descriptor and a TLS state of some 50 KB."""

KEEPALIVE_MAX_S = 3600
"""The longest that a site may configure; a client that asks for more could be dead for hours unnoticed."""


def production_settings(folder: PurePath, port: int) -> tuple[Setting, ...]:
    """The settings of a broker whose certificates, list and rules lie in `folder` on its own machine.

    Accepted by Mosquitto 2.0.11 and valid for 2.1.
    """
    return (
        # Who may enter.
        Setting("listener", str(port), "one listener, on every address; there is none without TLS"),
        Setting("tls_version", "tlsv1.2", "this version or newer"),
        Setting("cafile", str(folder / "ca.crt"), "the federation's own authority, and no public one"),
        Setting("certfile", str(folder / "server.crt"), "shows clients that this is the broker"),
        Setting("keyfile", str(folder / "server.key"), "readable by the broker's user alone"),
        Setting("require_certificate", "true", "who has no certificate of the federation ends at the handshake"),
        Setting("crlfile", str(folder / "crl.pem"), "certificates taken back; read again at SIGHUP"),
        Setting("use_identity_as_username", "true", "the name in the certificate is the name in the access rules"),
        Setting(
            "use_username_as_clientid",
            "true",
            "nobody can take over another's session by its client id; a second process of a site cuts off the first",
        ),
        Setting("allow_anonymous", "false", "the access rules need a name"),
        Setting("acl_file", str(folder / "acl"), "a site reads and writes its own topics; the rest is denied"),
        # How much one may take.
        Setting("max_connections", str(CLIENTS_MAX), "bounded; each costs a file descriptor and memory"),
        Setting("max_packet_size", str(PACKET_BYTES_MAX), "above Mailboat's largest packet; larger ones are refused"),
        Setting("max_inflight_messages", str(INFLIGHT_MESSAGES_MAX), "one payload copy per subscriber and message"),
        Setting("max_queued_messages", str(QUEUED_MESSAGES_MAX), "bounds floods of small messages; never 0, unlimited"),
        Setting("max_queued_bytes", str(QUEUED_BYTES_MAX), "for one client; above what credits allow to be under way"),
        Setting("memory_limit", str(MEMORY_BYTES_MAX), "refuses a message before the machine runs out of memory"),
        Setting("max_keepalive", str(KEEPALIVE_MAX_S), "a dead client is noticed within one and a half times this"),
        Setting("persistent_client_expiration", "14d", "a session that nobody came back to gives its memory back"),
        # What it need not do.
        Setting("persistence", "false", "outboxes and journal keep all that matters; nothing of it lies at the broker"),
        Setting("queue_qos0_messages", "false", "only messages of QoS 1 are used"),
        Setting("set_tcp_nodelay", "true", "grants and receipts are small and somebody waits for each"),
        # What it tells.
        Setting("log_dest", "stderr", "the service manager keeps it"),
        Setting("log_type", "error", "the broker's own troubles"),
        Setting("log_type", "warning", "the same, milder"),
        Setting("log_type", "notice", "who connected and why somebody was cut off or not let in"),
        Setting("log_type", "information", "among it the line that says the broker is ready"),
        Setting("log_timestamp_format", "%Y-%m-%dT%H:%M:%S", "comparable with the other parts' logs"),
    )


def production_config(folder: PurePath, port: int = TLS_PORT) -> str:
    """The text of mosquitto.conf for a federation's broker."""
    head = "# The broker of one federation, generated. Run it as a user of its own: mosquitto -c FILE\n\n"
    return head + "\n".join(str(setting) for setting in production_settings(folder, port))
