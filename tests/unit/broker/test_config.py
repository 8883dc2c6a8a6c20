"""The configuration of the local broker, and the hardened one at the top of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker import config
from shared.config import CoordinatorConfig, LinkSection
from shared.errors import ConfigError

HARDENED = Path(__file__).parents[3] / "mosquitto.conf"


def settings_of(text: str) -> dict[str, list[str]]:
    """Every key with its values, in the order of the file."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition(" ")
            found.setdefault(key, []).append(value)
    return found


def test_the_local_broker_listens_on_loopback_only() -> None:
    """A broker that asks for no password is bound to an address that no other machine can reach."""
    settings = settings_of(config.local_config("127.0.0.1", 4711))
    assert settings["listener"] == ["4711 127.0.0.1"]
    assert settings["allow_anonymous"] == ["true"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "broker.example.org", ""])  # noqa: S104 - refused
def test_no_open_broker_for_other_machines(host: str) -> None:
    """An address that others can reach is refused for a broker without passwords, with the way out."""
    with pytest.raises(ConfigError, match=r"may not listen on.*mosquitto\.conf"):
        config.local_config(host, 1883)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_every_loopback_address_will_do(host: str) -> None:
    """The loopback network, IPv6 and the usual name count as this machine."""
    assert config.is_loopback(host)


def test_listener_limits_follow_their_listener() -> None:
    """Mosquitto gives max_connections to the listener named last, so it must come after it."""
    for text in (config.local_config("127.0.0.1", 1), HARDENED.read_text()):
        keys = list(settings_of(text))
        assert keys.index("max_connections") > keys.index("listener")


def test_every_local_setting_has_a_reason() -> None:
    """Each line of the generated file stands below a comment that says why."""
    for block in config.local_config("127.0.0.1", 1).strip().split("\n\n"):
        comment, *lines = block.splitlines()
        assert comment.startswith("# ")
        assert len(comment) > 10
        assert len(lines) == 1


def test_both_brokers_have_the_same_limits() -> None:
    """What fits through the local broker fits through the hardened one."""
    local, hardened = settings_of(config.local_config("127.0.0.1", 1)), settings_of(HARDENED.read_text())
    for key in (
        "max_packet_size",
        "max_inflight_messages",
        "max_queued_messages",
        "max_queued_bytes",
        "max_connections",
    ):
        assert local[key] == hardened[key], key


def test_hardened_broker_admits_nobody_unknown() -> None:
    """The hardened file asks for a name, a password and a rule."""
    settings = settings_of(HARDENED.read_text())
    assert settings["allow_anonymous"] == ["false"]
    assert settings["allow_zero_length_clientid"] == ["false"]
    for key in ("password_file", "acl_file"):
        (path,) = settings[key]
        assert (HARDENED.parent / path).is_file()


def test_limits_fit_the_parts_that_rely_on_them() -> None:
    """Queue, window, packet and keepalive limits admit what coordinator and sites are configured to use."""
    credit_bytes = CoordinatorConfig(federation=Path("f"), storage=Path("s")).credit_mib * 1024 * 1024
    link = LinkSection()
    settings = settings_of(HARDENED.read_text())
    assert credit_bytes * 2 <= config.QUEUED_BYTES_MAX
    assert credit_bytes * 4 <= int(settings["memory_limit"][0])
    assert link.window <= config.INFLIGHT_MESSAGES_MAX
    assert LinkSection(keepalive_s=int(settings["max_keepalive"][0])).keepalive_s == 3600
    assert config.PACKET_BYTES_MAX > 768 * 1024  # the largest slice_kib, with room for its header


def test_hardened_file_keeps_to_what_both_versions_know() -> None:
    """No setting that 2.1 has retired or that 2.0.11 does not know yet."""
    retired_or_new = {
        "per_listener_settings", "auth_plugin", "message_size_limit", "bind_address", "port", "max_inflight_bytes",
        "global_max_clients", "global_max_connections", "listener_allow_anonymous", "plugin_load", "plugin_use",
        "accept_protocol_versions",
    }  # fmt: skip
    assert not retired_or_new & set(settings_of(HARDENED.read_text()))
