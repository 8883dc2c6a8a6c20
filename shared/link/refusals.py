"""What the broker's reason codes mean: which error they become, and whether trying again can help.

MQTT 5 codes (MQTT 5.0, section 2.4); the codes of 3.1.1 are translated to them before they come here.
"""

from __future__ import annotations

import ssl

from shared.errors import ConfigError, MailboatError, RefusedError

UNSUPPORTED_PROTOCOL = 0x84
NO_MATCHING_SUBSCRIBERS = 0x10
KEEPALIVE_TIMEOUT = 0x8D
SESSION_TAKEN_OVER = 0x8E
FAILURE = 0x80
"""Codes from here on say no."""
PASSING = {0x80, 0x83, 0x97}
"""Unspecified and implementation specific errors, and a quota that is spent: another time it may be yes. A cluster
says 0x80 to a subscription while it chooses a leader; in MQTT 3.1.1 that is also the only way to say 'not allowed'."""
SUBSCRIBE_PATIENCE_S = 90.0
"""A passing refusal of a first subscription is believed when it was tried for this long."""
ADMITTED_PATIENCE_S = 900.0
"""The same for one that was granted on an earlier connection: access lists change rarely, and a cluster that lost a
node refuses until it has chosen leaders, which took minutes on a machine that had no time for it."""

_CONNECT = {
    0x85: ("client-id-rejected", "does not accept the client id {client_id!r}", "choose another name for this side"),
    0x86: (
        "bad-credentials",
        "does not accept the user name or the password",
        "check broker.username and broker.password_file against the broker's own list",
    ),
    0x87: (
        "not-authorised",
        "does not admit this client",
        "check broker.username, broker.password_file and the certificate against the broker's own list",
    ),
    0x8A: ("banned", "has banned this client", "ask the broker's administrator"),
    0x8C: ("bad-auth-method", "wants another way of authentication", "use a password or a client certificate"),
    0x9A: ("no-retain", "does not retain messages", "enable retained messages on the broker"),
    0x9B: ("no-qos-1", "does not support QoS 1", "use a broker that does"),
}
_CERTIFICATE_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")


def connect_refusal(code: int, broker: str, client_id: str) -> RefusedError | None:
    """The error for a CONNACK that trying again cannot mend; None for the passing ones, such as 'server busy'."""
    if code not in _CONNECT:
        return None
    rule, text, hint = _CONNECT[code]
    return RefusedError(f"broker {broker} {text.format(client_id=client_id)}", rule=rule, hint=hint)


def subscribe_refusal(topic: str, reason: str, broker: str) -> RefusedError:
    """The error for a topic that the broker does not let us read."""
    return RefusedError(
        f"broker {broker} does not let this client subscribe to {topic}: {reason}",
        rule="not-authorised",
        hint="the broker's access list must admit this client to that topic; `mailboat broker acl` writes such a list",
    )


def publish_refusal(topic: str, reason: str, broker: str) -> RefusedError:
    """The error for a topic that the broker does not let us write."""
    return RefusedError(
        f"broker {broker} does not accept a message on {topic}: {reason}",
        rule="not-authorised",
        hint="the broker's access list must admit this client to that topic; `mailboat broker acl` writes such a list",
    )


def tls_refusal(error: ssl.SSLError, broker: str) -> MailboatError | None:
    """The error for a TLS failure that trying again cannot mend; None for a connection that merely broke."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return RefusedError(
            f"broker {broker} shows a certificate that does not verify: {error.verify_message}",
            rule="broker-certificate",
            hint="broker.ca_file must hold the authority that signed it, and the URL the name it was issued for",
        )
    reason = error.reason or ""
    if reason == "WRONG_VERSION_NUMBER":
        return ConfigError(f"broker {broker} does not speak TLS on that port", hint="use mqtt://, or the TLS port")
    if "ALERT" in reason and any(word in reason for word in _CERTIFICATE_ALERTS):
        return RefusedError(
            f"broker {broker} does not accept our certificate: {reason.replace('_', ' ').lower()}",
            rule="client-certificate",
            hint="broker.cert_file must be signed by the broker's authority, in date, and not revoked",
        )
    return None
