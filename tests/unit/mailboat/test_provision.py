"""Enrolment from the site's request to the site's kit, and the authority's register."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography import x509

from mailboat import authority as bench
from mailboat import enrolment
from mailboat.commands.enroll import accept, enroll
from mailboat.commands.provision import approve, init, list_command, revoke
from mailboat.commands.rotate import rotate
from shared.errors import ConfigError, CorruptError, RefusedError
from shared.trust.document import to_json
from shared.trust.grant import parse_grant
from shared.trust.kit import load_kit, read_peers
from shared.trust.signing import authority_fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fresh authority of the federation `ward`."""
    agreed = '[federation]\nname = "ward"\n[model]\nbase = "toy"\n[trust]\nmode = "sealed"\n'
    (tmp_path / "federation.toml").write_text(agreed)
    made = tmp_path / "authority"
    init(made, federation=tmp_path / "federation.toml", broker_host=["localhost"], broker_folder=made / "broker")
    return made


def fingerprint(folder: Path) -> str:
    """The authority's, as it would be read aloud."""
    return authority_fingerprint(bench.open_authority(folder).public)


def ask(folder: Path, name: str = "site-1", kit: str = "kit") -> tuple[Path, str]:
    """A site's new kit and its request's fingerprint."""
    path = folder.parent / kit
    enroll(name=name, out=path)
    return path, enrolment.parse_request((path / "request.json").read_bytes()).fingerprint


def admit(folder: Path, name: str = "site-1", kit: str = "kit") -> Path:
    """Enrol, approve, accept; the kit."""
    path, said = ask(folder, name, kit)
    approve(path / "request.json", folder=folder, fingerprint=said)
    accept(folder / "grants" / f"{name}.grant", kit=path, authority=fingerprint(folder))
    return path


def peers(folder: Path) -> tuple[set[str], set[int]]:
    """Whom the coordinator would admit, and the serials that it would refuse."""
    kit = load_kit(folder / "coordinator-kit", role="coordinator", federation="ward", now=bench.unix_now())
    found = read_peers(kit.folder, "coordinator", "ward")
    assert not found.unreadable
    return set(found.members), set(found.revocations.serials)


def crl_serials(folder: Path) -> set[int]:
    """What the broker would refuse."""
    return {entry.serial_number for entry in x509.load_pem_x509_crl((folder / "broker" / "crl.pem").read_bytes())}


def test_an_admitted_site_has_a_whole_kit(folder: Path) -> None:
    """Both kits load, the coordinator admits the site, and membership and certificate have one serial."""
    kit = load_kit(admit(folder), role="site", federation="ward", now=bench.unix_now())
    assert kit.member.name == "site-1"
    assert set(kit.peers().members) == {"coordinator"}
    assert peers(folder) == ({"site-1"}, set())
    certificate = x509.load_pem_x509_certificate((kit.folder / "tls.crt").read_bytes())
    assert certificate.serial_number == kit.member.serial


def test_everything_is_private(folder: Path) -> None:
    """Folders are 0700, files 0600, in the authority as in the kit."""
    kit = admit(folder)
    for root in (folder, kit):
        for path in (root, *root.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_wrong_fingerprint_admits_nobody(folder: Path) -> None:
    """What was not read over the telephone is neither approved nor accepted."""
    kit, said = ask(folder)
    with pytest.raises(RefusedError) as refused:
        approve(kit / "request.json", folder=folder, fingerprint=said[::-1])
    assert refused.value.rule == "other-fingerprint"
    approve(kit / "request.json", folder=folder, fingerprint=said.upper().replace(" ", ""))
    with pytest.raises(RefusedError):
        accept(folder / "grants" / "site-1.grant", kit=kit, authority="0" * 32)
    assert not (kit / "authority.pub").exists()


@pytest.mark.parametrize("field", ["name", "sign_key", "box_key", "csr", "signature"])
def test_an_altered_request_is_refused(folder: Path, field: str) -> None:
    """Each field of a request is bound by its signature."""
    kit, _said = ask(folder)
    other, _said = ask(folder, "site-2", "kit-2")
    fields = json.loads((kit / "request.json").read_text())
    fields[field] = json.loads((other / "request.json").read_text())[field]
    with pytest.raises(RefusedError):
        enrolment.parse_request(json.dumps(fields).encode())


def test_a_request_of_an_earlier_release_is_read() -> None:
    """The golden file is one that is out there; signing a request is random, so it is read and not compared."""
    data = (Path(__file__).parents[2] / "golden" / "trust" / "north.request").read_bytes()
    request = enrolment.parse_request(data)
    assert (request.v, request.name) == (1, "north")
    assert to_json(request) == data


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"[" * 50_000, b" " * 200_000])
def test_other_files_are_neither_request_nor_grant(data: bytes) -> None:
    """Any bytes are refused by name, and nothing else happens."""
    for parse in (enrolment.parse_request, parse_grant):
        with pytest.raises(RefusedError):
            parse(data)


def test_a_grant_fits_its_own_kit_alone(folder: Path) -> None:
    """Another site's grant and an altered one are refused."""
    admit(folder, "site-2", "kit-2")
    kit, said = ask(folder)
    approve(kit / "request.json", folder=folder, fingerprint=said)
    with pytest.raises(RefusedError) as refused:
        accept(folder / "grants" / "site-2.grant", kit=kit, authority=fingerprint(folder))
    assert refused.value.rule == "other-keys"
    path = folder / "grants" / "site-1.grant"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "ca": fields["ca"] + "\n"}))
    with pytest.raises(RefusedError) as refused:
        accept(path, kit=kit, authority=fingerprint(folder))
    assert refused.value.rule == "bad-signature"


def test_revoking_reaches_roster_list_and_crl(folder: Path) -> None:
    """All serials that the site ever had are on both lists, its renewals included; the others stay admitted."""
    admit(folder)
    admit(folder, "site-2", "kit-2")
    rotate("site-1", folder=folder)
    revoke("site-1", folder=folder)
    serials = {entry.serial for entry in bench.open_authority(folder).register.entries if entry.name == "site-1"}
    assert len(serials) == 2
    assert peers(folder) == ({"site-2"}, serials)
    assert crl_serials(folder) == serials
    with pytest.raises(ConfigError, match="not admitted"):
        revoke("site-1", folder=folder)


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_admitting_and_revoking_touch_nobody_elses_kit(folder: Path) -> None:
    """Not a byte of another site's kit changes, nor of its grant; the coordinator gets a roster and a list."""
    kit, grant, ends = admit(folder), folder / "grants" / "site-1.grant", folder / "coordinator-kit"
    before, granted, held = contents(kit), grant.read_bytes(), contents(ends)
    admit(folder, "site-2", "kit-2")
    revoke("site-2", folder=folder)
    assert (contents(kit), grant.read_bytes()) == (before, granted)
    changed = {name for name, data in contents(ends).items() if held.get(name) != data}
    assert {name.partition("/")[0] for name in changed} <= {"roster", "revocations", "grants"}
    assert "revocations" in changed
    assert peers(folder)[0] == {"site-1"}


def test_revoked_keys_never_come_back(folder: Path) -> None:
    """The same request is refused under every name rule; a new kit under the old name is admitted."""
    kit = admit(folder)
    said = enrolment.parse_request((kit / "request.json").read_bytes()).fingerprint
    revoke("site-1", folder=folder)
    with pytest.raises(RefusedError) as refused:
        approve(kit / "request.json", folder=folder, fingerprint=said)
    assert refused.value.rule == "revoked"
    admit(folder, "site-1", "kit-again")
    assert peers(folder)[0] == {"site-1"}


def test_other_keys_need_replace(folder: Path) -> None:
    """A taken name is not given to a second kit by mistake; with --replace the first one is revoked."""
    admit(folder)
    kit, said = ask(folder, "site-1", "kit-again")
    with pytest.raises(RefusedError) as refused:
        approve(kit / "request.json", folder=folder, fingerprint=said)
    assert refused.value.rule == "name-taken"
    approve(kit / "request.json", folder=folder, fingerprint=said, replace=True)
    assert len(crl_serials(folder)) == 1
    assert peers(folder)[0] == {"site-1"}


def test_a_renewal_needs_no_telephone(folder: Path) -> None:
    """`rotate SITE` makes a grant for the same keys, which a kit takes without a question."""
    kit = admit(folder)
    before = (kit / "member").read_bytes()
    rotate("site-1", folder=folder, days=200)
    accept(folder / "grants" / "site-1.grant", kit=kit)
    assert (kit / "member").read_bytes() != before
    load_kit(kit, role="site", federation="ward", now=bench.unix_now() + 199 * 86_400)


@pytest.mark.parametrize(
    ("name", "file"), [("coordinator", "coordinator-kit/tls.crt"), ("broker", "broker/server.crt")]
)
def test_the_ends_are_renewed_with_their_keys(folder: Path, name: str, file: str) -> None:
    """The certificate is new, its key the same."""
    before = x509.load_pem_x509_certificate((folder / file).read_bytes())
    rotate(name, folder=folder)
    after = x509.load_pem_x509_certificate((folder / file).read_bytes())
    assert (before.serial_number, before.public_key()) != (after.serial_number, after.public_key())
    assert before.public_key() == after.public_key()


def test_rotating_the_federation_key_raises_the_list(folder: Path) -> None:
    """The list's number rises, and nobody is on it."""
    before = bench.open_authority(folder).register
    rotate("federation-key", folder=folder)
    after = bench.open_authority(folder).register
    assert (after.number, after.listed_at > before.listed_at) == (before.number + 1, True)
    assert peers(folder)[1] == set()


def test_an_interrupted_command_is_finished_by_the_next(folder: Path) -> None:
    """What follows from the register is written again when it is missing or stale."""
    admit(folder)
    kit = folder / "coordinator-kit"
    (kit / "roster" / "site-1.member").unlink()
    (kit / "revocations").unlink()
    bench.open_authority(folder)
    assert peers(folder) == ({"site-1"}, set())


def test_the_list_in_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, states and days are there for scripts, and no key."""
    admit(folder)
    revoke("site-1", folder=folder)
    capsys.readouterr()
    list_command(folder=folder, as_json=True)
    listed = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["state"] for row in listed["members"]}
    assert rows == {"broker": "admitted", "coordinator": "admitted", "site-1": "revoked"}
    told = {"name", "role", "state", "until", "days_left", "serial", "ca", "key"}  # the last two are numbers
    assert all(row.keys() == told and row["key"] == 1 for row in listed["members"])


def test_an_authority_is_made_once_and_read_whole(folder: Path, tmp_path: Path) -> None:
    """A second init, a folder without one, a broken register, and a federation without trust are refused."""
    agreed = tmp_path / "federation.toml"
    with pytest.raises(ConfigError, match="not an empty folder"):
        init(folder, federation=agreed, broker_host=["localhost"])
    with pytest.raises(ConfigError, match="holds no authority"):
        bench.open_authority(tmp_path)
    agreed.write_text(agreed.read_text().replace("sealed", "none"))
    with pytest.raises(ConfigError, match="mode"):
        init(tmp_path / "x", federation=agreed, broker_host=["localhost"])
    (folder / "register.json").write_text("{}")
    with pytest.raises(CorruptError):
        bench.open_authority(folder)


@pytest.mark.parametrize("name", ["coordinator", "Site", "a/b", ""])
def test_what_cannot_be_a_site_gets_no_kit(tmp_path: Path, name: str) -> None:
    """A name that the broker or a path would misread is refused before any key is made."""
    with pytest.raises(ConfigError):
        enroll(name=name, out=tmp_path / "kit")
    assert not (tmp_path / "kit").exists()
