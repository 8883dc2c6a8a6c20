"""The signed history of a run over a real Mosquitto with TLS: what an auditor finds when somebody rewrites it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.launcher import find_mosquitto
from coordinator.bundle import export_bundle
from coordinator.journal import Journal
from coordinator.proof import Proof, prove
from coordinator.records import Accepted, Record, Signed, VersionCommitted, Witnessed, recorded_at, to_bytes
from coordinator.views import JOURNAL
from edge_client.heads import Heads
from shared.audit import GENESIS, Row, line_bytes, linked
from shared.config import FederationConfig
from shared.configfile import load_config
from shared.errors import RefusedError
from shared.messages import Head
from shared.trust.kit import AUTHORITY, SIGN_KEY, load_authorities, load_authority
from shared.trust.membership import Believed
from shared.trust.witness import HEADS, head_line, parse_head, signed_head
from tests.audited import flipped, restored
from tests.commands import call, running
from tests.helpers import any_free_port, run_async
from tests.integration.test_renewal import Mosquitto
from tests.integration.test_tls import SITES, provisioned
from tests.toys import toy_coordinator, toy_plan, toy_site

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed: apt-get install mosquitto"),
]
Edit = Callable[[Record], Record | None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sealed run of two sites and three versions; each test leaves it as it was."""
    root = tmp_path_factory.mktemp("witnessed")

    federation = provisioned(root, any_free_port())

    async def everybody() -> None:
        broker = Mosquitto(federation)
        await broker.start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(toy_coordinator(root / "coordinator.toml"))
                for name in SITES:
                    group.create_task(toy_site(root / f"{name}.toml"))
        finally:
            await broker.stop()

    run_async(everybody(), timeout_s=100)
    return root


def storage(root: Path) -> Path:
    """The coordinator's folder."""
    return root / "coordinator"


def proof_of(root: Path, *, sites: tuple[str, ...] = ()) -> Proof:
    """What the check says, with what these sites hold."""
    federation = load_config(root / "federation.toml", FederationConfig)
    return prove(
        storage(root),
        federation,
        toy_plan(federation, 100_000),
        receipts=[root / site / "receipts" for site in sites],
        believed=Believed(load_authorities(root / "coordinator-kit" / AUTHORITY)),
    )


def found(root: Path, **options: tuple[str, ...]) -> list[tuple[str, str]]:
    """Rule and place of each finding."""
    return [(finding.rule, finding.where) for finding in proof_of(root, **options).findings]


def rows_of(root: Path) -> list[Row]:
    """The journal's rows."""
    with Journal.open_read(storage(root) / JOURNAL) as journal:
        return list(journal.rows())


def records_of(root: Path) -> list[Record]:
    """The journal's records."""
    with Journal.open_read(storage(root) / JOURNAL) as journal:
        return list(journal.replay())


@contextlib.contextmanager
def rewritten(root: Path, edit: Edit, key: Ed25519PrivateKey | None = None) -> Iterator[None]:
    """While the block runs, the journal says what `edit` makes of each record, with a sound chain and new heads.

    This is what the coordinator itself can do: its own heads are signed anew, with `key` or its own.
    """
    federation = load_config(root / "federation.toml", FederationConfig)
    signer = key or load_authority(root / "coordinator-kit" / SIGN_KEY)
    fingerprint = toy_plan(federation, 100_000).fingerprint
    rows: list[Row] = []
    for before in records_of(root):
        record = edit(before)
        if record is None:
            continue
        head = rows[-1].hash if rows else GENESIS
        if isinstance(record, Signed):
            at = (record.version, len(rows), head.hex())
            again = signed_head(signer, federation.federation.name, fingerprint, at)
            record = dataclasses.replace(record, seq=again.seq, head=again.head, signature=again.signature)
        rows.append(linked(head, len(rows) + 1, recorded_at(record), record.kind, to_bytes(record)))
    path, trail = storage(root) / JOURNAL, storage(root) / "audit.jsonl"
    with restored(path), restored(trail):
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("DELETE FROM rows")
            values = [(row.seq, row.at, row.kind, row.body, row.prev, row.hash) for row in rows]
            db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", values)
        trail.write_bytes(b"".join(line_bytes(row) for row in rows))
        yield


def later(record: Record) -> Record:
    """The record of version 1, with another time: the smallest lie there is."""
    if isinstance(record, VersionCommitted) and record.version == 1:
        return dataclasses.replace(record, at=record.at + 1)
    return record


def test_every_version_is_signed_and_every_update_witnessed(run: Path) -> None:
    """Nothing is wrong; the sites had seen the head of the version from which they started, and hold all heads."""
    records = records_of(run)
    proof = proof_of(run, sites=("site-1", "site-2"))
    assert proof.findings == ()
    signed = [record for record in records if isinstance(record, Signed)]
    witnessed = [record for record in records if isinstance(record, Witnessed)]
    accepted = [record for record in records if isinstance(record, Accepted)]
    assert [record.version for record in signed] == [0, 1, 2, 3]
    assert [record.update_id for record in witnessed] == [record.update_id for record in accepted]
    heads = {record.seq for record in signed}
    assert {record.seq for record in witnessed} <= heads | {0}
    assert max(record.seq for record in witnessed) >= signed[1].seq
    held = [parse_head(line, "site") for line in (run / "site-1" / "receipts" / HEADS).read_bytes().splitlines()]
    assert [head.seq for head in held] == sorted(heads)[-len(held) :]
    assert proof.signatures >= len(signed) + len(witnessed) + 2


def test_history_changed_after_a_counter_signature_is_found_and_located(run: Path) -> None:
    """The coordinator rewrites version 1 and signs all heads anew: the sites' signatures name row and range."""
    witnessed = [
        seq for seq, record in enumerate(records_of(run), start=1) if isinstance(record, Witnessed) and record.seq
    ]
    changed = next(seq for seq, record in enumerate(records_of(run), start=1) if isinstance(record, VersionCommitted))
    with rewritten(run, later):
        findings = [each for each in proof_of(run).findings if each.rule == "history-changed"]
    after = [seq for seq in witnessed if records_of(run)[seq - 1].seq >= changed]  # type: ignore[union-attr]
    assert [each.where for each in findings] == [f"{JOURNAL}: row {seq}" for seq in after]
    first, _, last = findings[0].what.rpartition("rows ")[2].partition(" to ")
    assert int(first) <= changed <= int(last)


def test_without_the_sites_signatures_what_the_sites_hold_tells(run: Path) -> None:
    """Who takes the sites' signatures out, too, is told by the journal itself and by the heads that a site kept."""

    def forget(record: Record) -> Record | None:
        return None if isinstance(record, Witnessed) else later(record)

    with rewritten(run, forget):
        alone = {rule for rule, _ in found(run)}
        beside = {rule for rule, where in found(run, sites=("site-1",)) if HEADS in where}
    assert alone == {"not-signed"}
    assert beside == {"history-changed"}


def test_a_rewritten_journal_signed_by_somebody_else_is_found(run: Path) -> None:
    """A chain that is sound, and heads signed with a key that is not the coordinator's."""
    with rewritten(run, lambda record: record, Ed25519PrivateKey.generate()):
        rules = found(run)
    signed = [seq for seq, record in enumerate(records_of(run), start=1) if isinstance(record, Signed)]
    assert [where for rule, where in rules if rule == "signature"] == [f"{JOURNAL}: row {seq}" for seq in signed]


def test_a_membership_that_the_authority_did_not_sign_counts_for_nothing(run: Path) -> None:
    """A site of the coordinator's own making is named; without the authority's key it would pass."""

    def forge(record: Record) -> Record:
        if isinstance(record, Witnessed):
            return dataclasses.replace(record, member=flipped(record.member, 8 * (len(record.member) - 3)))
        return record

    with rewritten(run, forge):
        assert "signer" in {rule for rule, _ in found(run)}


@pytest.mark.parametrize("kind", [Signed, Witnessed])
@pytest.mark.parametrize("field", ["head", "signature", "seq", "bare_sha256"])
def test_one_bit_of_a_signature_is_found_and_located(run: Path, kind: type[Record], field: str) -> None:
    """Head, row and signature of each kind of row, with a sound chain behind it: the finding names the row."""
    position, record = [(seq, each) for seq, each in enumerate(records_of(run), start=1) if isinstance(each, kind)][-1]
    if not hasattr(record, field):
        return
    value = getattr(record, field)
    other = (
        flipped(value, 5)
        if isinstance(value, bytes)
        else value - 1
        if isinstance(value, int)
        else flipped(bytes.fromhex(value), 5).hex()
    )
    body = to_bytes(dataclasses.replace(record, **{field: other}))  # type: ignore[arg-type]
    path = storage(run) / JOURNAL
    with restored(path):
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE rows SET body = ? WHERE seq = ?", (body, position))
        findings = found(run)
    assert ("chain", f"{JOURNAL}: row {position}") in findings
    assert ("signature", f"{JOURNAL}: row {position}") in findings


def test_a_head_that_nobody_signed_is_no_evidence(run: Path) -> None:
    """A site cannot accuse the coordinator with a line of its own making."""
    path = run / "site-1" / "receipts" / HEADS
    with restored(path):
        path.write_bytes(head_line(Head(version=1, seq=2, head="ab" * 32, signature=bytes(64))))
        assert found(run, sites=("site-1",)) == [("head-unsigned", f"site-1/receipts/{HEADS}: line 1")]


def test_the_bundle_s_script_checks_the_signatures(run: Path, tmp_path: Path) -> None:
    """Sound: it counts them. History changed after a counter-signature: it names the row, without Mailboat."""
    federation = load_config(run / "federation.toml", FederationConfig)
    authority = run / "coordinator-kit" / AUTHORITY

    def script(name: str) -> subprocess.CompletedProcess[str]:
        out = tmp_path / name
        export_bundle(
            storage(run),
            federation,
            toy_plan(federation, 100_000),
            out / "run.tar",
            authority={AUTHORITY: authority.read_bytes()},
        )
        with tarfile.open(out / "run.tar") as tar:
            tar.extractall(out, filter="data")
        (inner,) = (path for path in out.iterdir() if path.is_dir())
        command = [sys.executable, "-I", str(inner / "verify.py")]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")

    signed = [record for record in records_of(run) if isinstance(record, Signed | Witnessed)]
    sound = script("sound")
    assert sound.returncode == 0, sound.stdout
    assert f"{len(signed)} signatures looked at" in sound.stdout
    with rewritten(run, later):
        forged = script("forged")
    assert forged.returncode == 3
    assert "had another hash for site-1" in forged.stdout


def test_a_site_keeps_what_it_saw(run: Path, tmp_path: Path) -> None:
    """A head of an earlier row, or another for the same, is refused by the site's own file."""
    shutil.copytree(run / "site-1" / "receipts", tmp_path / "receipts")
    heads = Heads(tmp_path)
    last = heads.last
    assert last is not None
    for changed, rule in (({"seq": last.seq - 1}, "head-went-back"), ({"head": "ab" * 32}, "head-differs")):
        with pytest.raises(RefusedError) as caught:
            heads.keep(last.model_copy(update=changed))
        assert caught.value.rule == rule
    heads.keep(last)
    assert Heads(tmp_path).last == last


def test_the_trail_of_a_sealed_run_is_tailed(run: Path) -> None:
    """Each row once and in order, signatures among them, once and while following; filters by version, site, rule."""
    rows = [row.seq for row in rows_of(run)]
    told = call(run, "audit", "tail", "--json")
    assert [json.loads(line)["seq"] for line in told.stdout.splitlines()] == rows, told.stderr
    with running(run, "audit", "tail", "-f") as tail:
        said = tail.wait_for(f"#{rows[-1]} ")
    assert [int(line.split("#")[1].split()[0]) for line in said.splitlines()] == rows
    some = call(run, "audit", "tail", "--site", "site-1", "--version", "1", "--json").stdout.splitlines()
    assert {json.loads(line)["kind"] for line in some} == {"committed", "accepted", "witnessed"}
    assert call(run, "audit", "tail", "--rule", "run-ended").stdout == ""
