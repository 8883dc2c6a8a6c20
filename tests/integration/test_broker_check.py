"""`mailboat broker check` against the generated Mosquitto with TLS, and against one that is open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer

from broker.launcher import find_mosquitto
from mailboat.commands import broker
from mailboat.commands.provision import revoke
from shared.errors import ConfigError
from tests.integration.test_tls import Federation, admit, federation, serving

__all__ = ["federation"]

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.integration,
    pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed: apt-get install mosquitto"),
]


def checked(federation: Federation, capsys: pytest.CaptureFixture[str], *who: str) -> tuple[int, list[dict[str, str]]]:
    """Exit status and findings."""
    capsys.readouterr()
    configs = [federation.root / f"{each}.toml" for each in who]
    with pytest.raises(typer.Exit) as done:
        broker.check(config=configs, revoked=federation.root / "gone-kit", as_json=True)
    out = "\n" + capsys.readouterr().out  # before it, what links say when they are cut off
    found: list[dict[str, str]] = json.loads(out[out.rindex("\n[\n") :])
    return done.value.exit_code, found


def test_the_generated_broker_refuses_all_that_it_must(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading, writing, client ids, no certificate and a revoked one: every finding is OK."""
    folder = federation.root / "authority"
    admit(folder, "gone", federation.root / "gone-kit")
    revoke("gone", folder=folder)
    with serving(federation):
        status, findings = checked(federation, capsys, "site-1", "site-2", "coordinator")
    assert [each for each in findings if each["level"] != "OK"] == []
    assert status == 0
    assert {each["what"] for each in findings} == {"broker", "certificate", "read", "write", "client id"}


@pytest.mark.parametrize(
    ("line", "changed", "what"),
    [
        ("acl_file", "", "read"),
        ("acl_file", "", "write"),
        ("use_username_as_clientid true", "use_username_as_clientid false", "client id"),
        ("require_certificate true", "require_certificate false\nallow_anonymous true", "certificate"),
        ("crlfile", "", "certificate"),
    ],
)
def test_a_broker_with_one_line_missing_is_named(
    line: str, changed: str, what: str, federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each protection taken away alone is found by the trial that it was there for."""
    folder = federation.root / "authority"
    admit(folder, "gone", federation.root / "gone-kit")
    revoke("gone", folder=folder)
    config = folder / "broker" / "mosquitto.conf"
    lines = [changed if each.startswith(line) else each for each in config.read_text().splitlines()]
    if "allow_anonymous true" in changed:
        named = ("allow_anonymous false", "use_identity_as_username", "use_username_as_clientid")
        lines = [each for each in lines if not each.startswith(named)]
    config.write_text("\n".join(lines))
    with serving(federation):
        status, findings = checked(federation, capsys, "site-1", "site-2", "coordinator")
    assert status == 3
    assert what in {each["what"] for each in findings if each["level"] == "FAIL"}


def test_one_site_is_not_enough(federation: Federation) -> None:
    """The error says what to name; nothing is connected."""
    with pytest.raises(ConfigError, match="one site alone"):
        broker.check(config=[federation.root / "site-1.toml"])


def test_a_kit_that_is_none(federation: Federation, tmp_path: Path) -> None:
    """The missing file is named."""
    shutil.copytree(federation.root / "site-1-kit", tmp_path / "half")
    (tmp_path / "half" / "tls.key").unlink()
    with pytest.raises(ConfigError, match=r"tls\.key: no such file"):
        broker.check(config=[federation.root / f"site-{n}.toml" for n in (1, 2)], revoked=tmp_path / "half")
